//! A whole decode step of OLMoE-1B-7B's shape with random weights, as one recorded graph.

use lite_llm_kernels::{
    cuda::{
        Cuda, Dev,
        launch::{Choose, DevMatrix, DevQueries, Experts, Linear, row_words},
    },
    device::DeviceError,
    dtype::DType,
    kv::{KvDType, KvShape},
    matrix::PackedMatrix,
};

use super::speed::{captured, median};

type Done = Result<(), DeviceError>;

const LAYERS: usize = 16;
const HIDDEN: usize = 2048;
const INTER: usize = 1024;
const EXPERTS: usize = 64;
const K: usize = 8;
const HEADS: usize = 16;
const HEAD: usize = 128;
const VOCABULARY: usize = 50304;

struct Layer {
    qkv: [DevMatrix; 3],
    o: DevMatrix,
    gate: DevMatrix,
    experts: Experts,
    _memory: Dev<u8>,
}

fn weights(
    cuda: &Cuda,
    dtype: DType,
    n: usize,
    k: usize,
    seed: u32,
) -> Result<DevMatrix, DeviceError> {
    let w = cuda.matrix_of(dtype, n, k, 0)?;
    cuda.scramble(w.data(), seed)?;
    Ok(w)
}

pub(crate) fn all(cuda: &Cuda, peak: f64) -> Done {
    for dtype in [DType::Bf16, DType::Int8, DType::Int4] {
        let up = PackedMatrix::packed_bytes(dtype, INTER, HIDDEN).expect("a size");
        let down = PackedMatrix::packed_bytes(dtype, HIDDEN, INTER).expect("a size");
        let expert = 2 * up + down;
        let mut layers = Vec::new();
        for l in 0..LAYERS as u32 {
            let memory = cuda.filled::<u8>(EXPERTS * expert, 0)?;
            cuda.scramble(&memory, 1000 + l)?;
            let table: Vec<[u64; 3]> = (0..EXPERTS)
                .map(|e| {
                    let at = memory.address() + (e * expert) as u64;
                    [at, at + up as u64, at + 2 * up as u64]
                })
                .collect();
            let experts =
                Experts { dtype, hidden: HIDDEN, intermediate: INTER, table: cuda.upload(&table)? };
            let w = |n, seed| weights(cuda, dtype, n, HIDDEN, seed);
            layers.push(Layer {
                qkv: [w(HIDDEN, l)?, w(HIDDEN, 100 + l)?, w(HIDDEN, 200 + l)?],
                o: w(HIDDEN, 300 + l)?,
                gate: gate(cuda, l)?,
                experts,
                _memory: memory,
            });
        }
        let head = weights(cuda, dtype, VOCABULARY, HIDDEN, 400)?;
        for batch in [1, 8, 64] {
            step(cuda, dtype, &layers, &head, batch, 512, expert, peak)?;
        }
    }
    Ok(())
}

/// Scores that differ, so that rows choose different experts.
fn gate(cuda: &Cuda, seed: u32) -> Result<DevMatrix, DeviceError> {
    let mut state = u64::from(seed) + 9;
    let values: Vec<f32> = (0..EXPERTS * HIDDEN)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * 0.1
        })
        .collect();
    cuda.matrix(&PackedMatrix::pack(
        DType::F32,
        EXPERTS,
        HIDDEN,
        lite_llm_kernels::matrix::Source::F32(&values),
    ))
}

#[allow(clippy::too_many_arguments)]
fn step(
    cuda: &Cuda,
    dtype: DType,
    layers: &[Layer],
    head: &DevMatrix,
    batch: usize,
    context: usize,
    expert: usize,
    peak: f64,
) -> Done {
    let f = |cols: usize| cuda.filled::<f32>(batch * cols, 0);
    let quantised = dtype.is_quantised();
    let item_rows = if batch == 1 {
        1
    } else if batch <= 8 {
        4
    } else {
        8
    };
    let routes = batch * K;
    let (mut state, mut table) = (7u64, Vec::new());
    for _ in 0..batch * HIDDEN {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        table.push((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0);
    }
    let embedded = cuda.upload(&table)?;
    let norm = cuda.upload(&vec![1.0f32; HIDDEN])?;
    let rotary = cuda.upload(&vec![0.5f32; batch * HEAD])?;
    let (x, h, attended, logits) = (f(HIDDEN)?, f(HIDDEN)?, f(HIDDEN)?, f(VOCABULARY)?);
    let (q, k, v, scores) = (f(HIDDEN)?, f(HIDDEN)?, f(HIDDEN)?, f(EXPERTS)?);
    let records = f(row_words(dtype, HIDDEN))?;
    let parts = cuda.filled::<f32>(routes * HIDDEN, 0)?;
    let between = cuda.filled::<f32>(routes * row_words(dtype, INTER), 0)?;
    let (index, weight, bad) = (
        cuda.filled::<u32>(routes, 0)?,
        cuda.filled::<f32>(routes, 0)?,
        cuda.filled::<u32>(batch, 0)?,
    );
    let grouped = cuda.grouped(routes, EXPERTS, item_rows)?;
    let shape = KvShape { layers: LAYERS, kv_heads: HEADS, head_dim: HEAD, dtype: KvDType::Bf16 };
    let pages = context / 64;
    let kv = cuda.kv(shape, batch * pages, 0x3c)?;
    let tables: Vec<u32> = (0..(batch * pages) as u32).collect();
    let last = context - 1;
    let slots: Vec<[u32; 2]> =
        (0..batch).map(|b| [(b * pages + last / 64) as u32, (last % 64) as u32]).collect();
    let slots = cuda.upload(&slots)?;
    let queries = DevQueries {
        tables: cuda.upload(&tables)?,
        stride: pages,
        positions: cuda.upload(&vec![last as u32; batch])?,
        longest: last,
    };
    let leaves = cuda.attention_parts(batch, HEADS, HEAD, last)?;
    let names = cuda.upload(&[5u64])?;
    // What products of the format read: the rows themselves, or their records.
    let input = |from: &Dev<f32>| {
        if quantised { cuda.quantise(from, HIDDEN, batch, &records) } else { Ok(()) }
    };
    let run = |only: Option<&str>| -> Done {
        let on = |name: &str| only.is_none_or(|only| only == name);
        // x is left as the step before made it: it does not matter for time.
        for (l, layer) in layers.iter().enumerate() {
            if on("norms") {
                cuda.rms_norm(&x, &norm, 1e-5, &h)?;
                input(&h)?;
            }
            let rows = if quantised { &records } else { &h };
            if on("qkv, o") {
                let [wq, wk, wv] = &layer.qkv;
                cuda.matmul(
                    rows,
                    batch,
                    &[
                        Linear { weight: wq, bias: None, out: &q },
                        Linear { weight: wk, bias: None, out: &k },
                        Linear { weight: wv, bias: None, out: &v },
                    ],
                    false,
                )?;
            }
            if on("norms") {
                cuda.rms_norm(&q, &norm, 1e-5, &q)?;
                cuda.rms_norm(&k, &norm, 1e-5, &k)?;
                cuda.rope(&q, &rotary, HEAD)?;
                cuda.rope(&k, &rotary, HEAD)?;
            }
            if on("attention") {
                cuda.kv_append(&kv, l, &k, &v, &slots)?;
                cuda.attention(&kv, l, &q, &queries, 0.088, None, &leaves, &attended)?;
            }
            if on("norms") {
                input(&attended)?;
            }
            if on("qkv, o") {
                let rows = if quantised { &records } else { &attended };
                cuda.matmul(
                    rows,
                    batch,
                    &[Linear { weight: &layer.o, bias: None, out: &x }],
                    true,
                )?;
            }
            if on("norms") {
                cuda.rms_norm(&x, &norm, 1e-5, &h)?;
                input(&h)?;
            }
            if on("routes") {
                cuda.matmul(
                    &h,
                    batch,
                    &[Linear { weight: &layer.gate, bias: None, out: &scores }],
                    false,
                )?;
                let how = Choose {
                    n: EXPERTS,
                    k: K,
                    seed: 3,
                    masks: None,
                    tier_names: &names,
                    level: 2,
                    tiers: None,
                    groups: None,
                    parents: None,
                    renormalise: false,
                };
                cuda.choose(&scores, how, &index, &weight, &bad)?;
                cuda.group_routes(&index, EXPERTS, &grouped)?;
            }
            if on("experts") {
                cuda.swiglu_routes(
                    &layer.experts,
                    &grouped,
                    K,
                    if quantised { &records } else { &h },
                    &between,
                    &parts,
                )?;
                cuda.weighted_sum(&parts, &weight, K, true, &x)?;
            }
        }
        if on("head") {
            cuda.rms_norm(&x, &norm, 1e-5, &h)?;
            input(&h)?;
            cuda.matmul(
                if quantised { &records } else { &h },
                batch,
                &[Linear { weight: head, bias: None, out: &logits }],
                false,
            )?;
        }
        Ok(())
    };
    cuda.write(&x, 0, &cuda.download(&embedded)?)?;
    let graph = captured(cuda, || run(None))?;
    cuda.write(&x, 0, &cuda.download(&embedded)?)?;
    let ms = median(cuda, || cuda.replay(&graph))?;
    let chosen = cuda.download(&index)?;
    let mut seen = [false; EXPERTS];
    chosen.iter().for_each(|&e| seen[e as usize % EXPERTS] = true);
    let active = seen.iter().filter(|&&s| s).count();
    // With uniform routing, as FIELD.md counts.
    let uniform = EXPERTS as f64 * (1.0 - (1.0 - K as f64 / EXPERTS as f64).powi(batch as i32));
    let dense: usize = layers
        .iter()
        .map(|l| l.qkv.iter().chain([&l.o, &l.gate]).map(|w| w.data().len()).sum::<usize>())
        .sum::<usize>()
        + head.data().len();
    let cache = batch * context * LAYERS * 2 * HIDDEN * 2;
    let bytes = dense as f64 + cache as f64 + LAYERS as f64 * uniform * expert as f64;
    let limit = batch as f64 * peak / bytes;
    let rate = batch as f64 / f64::from(ms) * 1e3;
    println!(
        "decode {dtype}, batch {batch}, context {context}: {ms:.3} ms, {rate:.0} tok/s, limit {limit:.0}, {:.2} of it ({active} experts of the last layer, {uniform:.1} uniform)",
        rate / limit
    );
    let mut line = String::from("   by itself, ms:");
    for part in ["norms", "qkv, o", "attention", "routes", "experts", "head"] {
        let graph = captured(cuda, || run(Some(part)))?;
        line += &format!(" {part} {:.3};", median(cuda, || cuda.replay(&graph))?);
    }
    println!("{line}");
    Ok(())
}
