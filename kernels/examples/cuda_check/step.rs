//! A whole decode step of OLMoE-1B-7B's shape with random weights, as one recorded graph.

use lite_llm_kernels::{
    cuda::{
        Cuda, Dev,
        fast::{Math, TILE_ROWS},
        launch::{Choose, DevMatrix, DevQueries, Experts, Linear, row_words},
        one::{Heads, Norm},
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

/// A format of weights, and how products with them are computed.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    dtype: DType,
    math: Math,
}

const KINDS: [Kind; 4] = [
    Kind { name: "bf16", dtype: DType::Bf16, math: Math::Exact },
    Kind { name: "fast", dtype: DType::Bf16, math: Math::Fast },
    Kind { name: "int8", dtype: DType::Int8, math: Math::Exact },
    Kind { name: "int4", dtype: DType::Int4, math: Math::Exact },
];

impl Kind {
    fn fast(self) -> bool {
        self.math.is_fast(self.dtype)
    }

    /// Whether products read something else than f32 rows.
    fn own_rows(self) -> bool {
        self.dtype.is_quantised() || self.fast()
    }
}

fn weights(
    cuda: &Cuda,
    Kind { dtype, math, .. }: Kind,
    n: usize,
    k: usize,
    seed: u32,
) -> Result<DevMatrix, DeviceError> {
    let w = cuda.matrix_of(dtype, n, k, 0)?;
    cuda.scramble(w.data(), seed)?;
    Ok(w.by(math))
}

/// All of it, or the formats, `prefill` and `decode` that are named.
pub(crate) fn all(cuda: &Cuda, peak: f64, what: &[String]) -> Done {
    let named = |name: &str| what.iter().any(|w| w == name);
    let (prefills, decodes) = (!named("decode"), !named("prefill"));
    let some = KINDS.iter().any(|kind| named(kind.name));
    for kind in KINDS.into_iter().filter(|kind| !some || named(kind.name)) {
        let Kind { dtype, math, .. } = kind;
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
            let experts = Experts {
                dtype,
                math,
                hidden: HIDDEN,
                intermediate: INTER,
                table: cuda.upload(&table)?,
            };
            let w = |n, seed| weights(cuda, kind, n, HIDDEN, seed);
            layers.push(Layer {
                qkv: [w(HIDDEN, l)?, w(HIDDEN, 100 + l)?, w(HIDDEN, 200 + l)?],
                o: w(HIDDEN, 300 + l)?,
                gate: gate(cuda, l)?,
                experts,
                _memory: memory,
            });
        }
        let head = weights(cuda, kind, VOCABULARY, HIDDEN, 400)?;
        // Smaller items waste fewer rows, larger ones read weights less often.
        for (item_rows, wide) in [(64, false), (128, false), (64, true), (128, true)] {
            if prefills && (kind.fast() || !wide) {
                cuda.set_wide(wide);
                prefill(cuda, kind, &layers, &head, 2048, item_rows)?;
                cuda.set_wide(true);
            }
        }
        // Items of sixteen rows read weights once, where items of eight may do so twice.
        for (batch, item_rows) in [(1, 1), (8, 4), (64, 8), (64, 16)] {
            if decodes {
                step(cuda, kind, &layers, &head, batch, item_rows, 512, expert, peak)?;
            }
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
    kind: Kind,
    layers: &[Layer],
    head: &DevMatrix,
    batch: usize,
    item_rows: usize,
    context: usize,
    expert: usize,
    peak: f64,
) -> Done {
    let f = |cols: usize| cuda.filled::<f32>(batch * cols, 0);
    let Kind { name, dtype, math } = kind;
    let (quantised, own_rows) = (dtype.is_quantised(), kind.own_rows());
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
    let records = f(row_words(dtype, math, HIDDEN))?;
    let parts = cuda.filled::<f32>(routes * HIDDEN, 0)?;
    let between = cuda.filled::<f32>(routes * row_words(dtype, math, INTER), 0)?;
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
    let counters = cuda.filled::<u32>(batch * HEADS + HIDDEN, 0)?;
    let chosen = cuda.routes(EXPERTS, K)?;
    let by = Some(Norm { weight: &norm, eps: 1e-5 });
    let heads =
        Heads { q: &q, k: &k, v: &v, norms: Some((&norm, &norm, 1e-5)), rotary: Some(&rotary) };
    // A single row: six kernels a layer.
    let run_one = |only: Option<&str>| -> Done {
        let on = |name: &str| only.is_none_or(|only| only == name);
        for (l, layer) in layers.iter().enumerate() {
            if on("qkv, o") {
                let [wq, wk, wv] = &layer.qkv;
                let products = [
                    Linear { weight: wq, bias: None, out: &q },
                    Linear { weight: wk, bias: None, out: &k },
                    Linear { weight: wv, bias: None, out: &v },
                ];
                cuda.linear_one(&x, by, &products, false)?;
            }
            if on("attention") && kind.fast() {
                cuda.heads_keep(&kv, l, heads, &slots)?;
                cuda.attention_fast(&kv, l, &q, &queries, 0.088, None, &leaves, &attended)?;
            } else if on("attention") {
                cuda.attention_step(
                    &kv, l, heads, &queries, 0.088, None, &leaves, &counters, &attended,
                )?;
            }
            if on("qkv, o") {
                let products = [Linear { weight: &layer.o, bias: None, out: &x }];
                cuda.linear_one(&attended, None, &products, true)?;
            }
            if on("routes") {
                cuda.route_one(&x, by, &layer.gate, how, &layer.experts, &chosen)?;
            }
            if on("experts") {
                cuda.swiglu_one(&x, by, &layer.experts, &chosen, &between, &parts, &counters, &x)?;
            }
        }
        if on("head") {
            let products = [Linear { weight: head, bias: None, out: &logits }];
            cuda.linear_one(&x, by, &products, false)?;
        }
        Ok(())
    };
    // What products of the format read: the rows themselves, or their records.
    let input = |from: &Dev<f32>| match own_rows {
        _ if quantised => cuda.quantise(from, HIDDEN, batch, &records),
        true => cuda.pair_rows(from, HIDDEN, batch, &records),
        false => Ok(()),
    };
    let spread = cuda.spread(256)?;
    // Tiles pay for blocks and many outputs; qkv and o of bf16 took 1.8 ms so, and 1.2 otherwise.
    let dense = |x: &Dev<f32>, products: &[Linear<'_>], adds: bool| {
        if quantised && batch >= 32 && products[0].weight.n() > HIDDEN {
            cuda.linear_tiles(x, batch, products, adds, Some(&spread))
        } else {
            cuda.matmul(x, batch, products, adds)
        }
    };
    // Of the format, and in f32 for the gate.
    let normed = |from: &Dev<f32>, both: bool| {
        let f32s = (both || !own_rows).then_some(&h);
        if kind.fast() {
            return cuda.norm_pairs(from, &norm, 1e-5, f32s, &records);
        }
        cuda.norm_rows(from, &norm, 1e-5, f32s, quantised.then_some(&records))
    };
    let run = |only: Option<&str>| -> Done {
        if batch == 1 {
            return run_one(only);
        }
        let on = |name: &str| only.is_none_or(|only| only == name);
        // x is left as the step before made it: it does not matter for time.
        for (l, layer) in layers.iter().enumerate() {
            if on("norms") {
                normed(&x, false)?;
            }
            let rows = if own_rows { &records } else { &h };
            if on("qkv, o") {
                let [wq, wk, wv] = &layer.qkv;
                dense(
                    rows,
                    &[
                        Linear { weight: wq, bias: None, out: &q },
                        Linear { weight: wk, bias: None, out: &k },
                        Linear { weight: wv, bias: None, out: &v },
                    ],
                    false,
                )?;
            }
            if on("norms") {
                cuda.heads_keep(&kv, l, heads, &slots)?;
            }
            if on("attention") {
                if kind.fast() {
                    cuda.attention_fast(&kv, l, &q, &queries, 0.088, None, &leaves, &attended)?;
                } else {
                    cuda.attention(&kv, l, &q, &queries, 0.088, None, &leaves, &attended)?;
                }
            }
            if on("norms") {
                input(&attended)?;
            }
            if on("qkv, o") {
                let rows = if own_rows { &records } else { &attended };
                dense(rows, &[Linear { weight: &layer.o, bias: None, out: &x }], true)?;
            }
            if on("norms") {
                normed(&x, true)?;
            }
            if on("routes") {
                cuda.matmul(
                    &h,
                    batch,
                    &[Linear { weight: &layer.gate, bias: None, out: &scores }],
                    false,
                )?;
                cuda.choose(&scores, how, &index, &weight, &bad)?;
                cuda.group_routes(&index, EXPERTS, &grouped)?;
            }
            if on("experts") {
                cuda.swiglu_routes(
                    &layer.experts,
                    &grouped,
                    K,
                    if own_rows { &records } else { &h },
                    &between,
                    &parts,
                )?;
                cuda.weighted_sum(&parts, &weight, K, true, &x)?;
            }
        }
        if on("head") {
            normed(&x, false)?;
            let rows = if own_rows { &records } else { &h };
            dense(rows, &[Linear { weight: head, bias: None, out: &logits }], false)?;
        }
        Ok(())
    };
    cuda.write(&x, 0, &cuda.download(&embedded)?)?;
    let graph = captured(cuda, || run(None))?;
    cuda.write(&x, 0, &cuda.download(&embedded)?)?;
    let ms = median(cuda, || cuda.replay(&graph))?;
    let chosen = cuda.download(if batch == 1 { &chosen.index } else { &index })?;
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
        "decode {name}, batch {batch}, items of {item_rows}, context {context}: {ms:.3} ms, {rate:.0} tok/s, limit {limit:.0}, {:.2} of it ({active} experts of the last layer, {uniform:.1} uniform)",
        rate / limit
    );
    let mut line = String::from("   by itself, ms:");
    // A single row's norms are part of its products.
    for part in ["norms", "qkv, o", "attention", "routes", "experts", "head"] {
        if batch == 1 && part == "norms" {
            continue;
        }
        let graph = captured(cuda, || run(Some(part)))?;
        line += &format!(" {part} {:.3};", median(cuda, || cuda.replay(&graph))?);
    }
    println!("{line}");
    Ok(())
}

/// A prompt of so many tokens, alone, to the logits of its last.
fn prefill(
    cuda: &Cuda,
    kind: Kind,
    layers: &[Layer],
    head: &DevMatrix,
    rows: usize,
    item_rows: usize,
) -> Done {
    let Kind { name, dtype, math } = kind;
    let f = |cols: usize| cuda.filled::<f32>(rows * cols, 0);
    let routes = rows * K;
    let (mut state, mut values) = (7u64, Vec::new());
    for _ in 0..rows * HIDDEN {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        values.push((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0);
    }
    let embedded = cuda.upload(&values)?;
    let norm = cuda.upload(&vec![1.0f32; HIDDEN])?;
    let rotary = cuda.upload(&vec![0.5f32; rows * HEAD])?;
    let (x, h, attended) = (f(HIDDEN)?, f(HIDDEN)?, f(HIDDEN)?);
    let (q, k, v, scores) = (f(HIDDEN)?, f(HIDDEN)?, f(HIDDEN)?, f(EXPERTS)?);
    let logits = cuda.filled::<f32>(VOCABULARY, 0)?;
    let records = f(row_words(dtype, math, HIDDEN))?;
    let parts = cuda.filled::<f32>(routes * HIDDEN, 0)?;
    let between = cuda.filled::<f32>(routes * row_words(dtype, math, INTER), 0)?;
    let (index, weight, bad) = (
        cuda.filled::<u32>(routes, 0)?,
        cuda.filled::<f32>(routes, 0)?,
        cuda.filled::<u32>(rows, 0)?,
    );
    let grouped = cuda.grouped(routes, EXPERTS, item_rows)?;
    let shape = KvShape { layers: LAYERS, kv_heads: HEADS, head_dim: HEAD, dtype: KvDType::Bf16 };
    let pages = rows / 64;
    let kv = cuda.kv(shape, pages, 0x3c)?;
    let tables: Vec<u32> = (0..rows).flat_map(|_| 0..pages as u32).collect();
    let slots: Vec<[u32; 2]> = (0..rows as u32).map(|p| [p / 64, p % 64]).collect();
    let slots = cuda.upload(&slots)?;
    let positions: Vec<u32> = (0..rows as u32).collect();
    let queries = DevQueries {
        tables: cuda.upload(&tables)?,
        stride: pages,
        positions: cuda.upload(&positions)?,
        longest: rows - 1,
    };
    let each = if kind.fast() { TILE_ROWS as u32 } else { 64 };
    let tiles: Vec<[u32; 2]> = (0..rows as u32 / each).map(|t| [t * each, each]).collect();
    let tiles = cuda.upload(&tiles)?;
    let leaves = cuda.attention_parts(rows, HEADS, HEAD, rows - 1)?;
    let names = cuda.upload(&[5u64])?;
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
    let heads =
        Heads { q: &q, k: &k, v: &v, norms: Some((&norm, &norm, 1e-5)), rotary: Some(&rotary) };
    let (quantised, own_rows) = (dtype.is_quantised(), kind.own_rows());
    // Of the format, and in f32 for the gate.
    let normed = |both: bool| {
        let f32s = (both || !own_rows).then_some(&h);
        if kind.fast() {
            return cuda.norm_pairs(&x, &norm, 1e-5, f32s, &records);
        }
        cuda.norm_rows(&x, &norm, 1e-5, f32s, quantised.then_some(&records))
    };
    let run = |only: Option<&str>| -> Done {
        let on = |name: &str| only.is_none_or(|only| only == name);
        for (l, layer) in layers.iter().enumerate() {
            if on("norms") {
                normed(false)?;
            }
            if on("qkv, o") {
                let [wq, wk, wv] = &layer.qkv;
                let products = [
                    Linear { weight: wq, bias: None, out: &q },
                    Linear { weight: wk, bias: None, out: &k },
                    Linear { weight: wv, bias: None, out: &v },
                ];
                let from = if own_rows { &records } else { &h };
                cuda.linear_tiles(from, rows, &products, false, None)?;
            }
            if on("norms") {
                cuda.heads_keep(&kv, l, heads, &slots)?;
            }
            if on("attention") {
                let window = None;
                if kind.fast() {
                    cuda.attention_rows_fast(
                        &kv, l, &q, &queries, &tiles, 0.088, window, &leaves, &attended,
                    )?;
                } else {
                    cuda.attention_rows(
                        &kv, l, &q, &queries, &tiles, 0.088, window, &leaves, &attended,
                    )?;
                }
            }
            if on("norms") && quantised {
                cuda.quantise(&attended, HIDDEN, rows, &records)?;
            } else if on("norms") && own_rows {
                cuda.pair_rows(&attended, HIDDEN, rows, &records)?;
            }
            if on("qkv, o") {
                let products = [Linear { weight: &layer.o, bias: None, out: &x }];
                let from = if own_rows { &records } else { &attended };
                cuda.linear_tiles(from, rows, &products, true, None)?;
            }
            if on("norms") {
                normed(true)?;
            }
            if on("routes") {
                let products = [Linear { weight: &layer.gate, bias: None, out: &scores }];
                cuda.matmul(&h, rows, &products, false)?;
                cuda.choose(&scores, how, &index, &weight, &bad)?;
                cuda.group_routes(&index, EXPERTS, &grouped)?;
            }
            if on("experts") {
                let from = if own_rows { &records } else { &h };
                cuda.swiglu_tiles(&layer.experts, &grouped, K, from, &between, &parts)?;
            }
            if on("sums") {
                cuda.weighted_sum(&parts, &weight, K, true, &x)?;
            }
        }
        if on("head") {
            let last = cuda.upload(&[rows as u32 - 1])?;
            let row = cuda.filled::<f32>(HIDDEN, 0)?;
            cuda.select_rows(&x, &last, HIDDEN, &row)?;
            let by = Some(Norm { weight: &norm, eps: 1e-5 });
            let products = [Linear { weight: head, bias: None, out: &logits }];
            cuda.linear_one(&row, by, &products, false)?;
        }
        Ok(())
    };
    cuda.write(&x, 0, &cuda.download(&embedded)?)?;
    run(None)?;
    cuda.write(&x, 0, &cuda.download(&embedded)?)?;
    let ms = median(cuda, || run(None))?;
    let wide = if cuda.is_wide() { ", wide" } else { "" };
    println!(
        "prefill {name}, 1 x {rows}, items of {item_rows}{wide}: {ms:.2} ms, {:.0} tok/s",
        rows as f64 / f64::from(ms) * 1e3
    );
    let mut line = String::from("   by itself, ms:");
    for part in ["norms", "qkv, o", "attention", "routes", "experts", "sums", "head"] {
        line += &format!(" {part} {:.2};", median(cuda, || run(Some(part)))?);
    }
    println!("{line}");
    Ok(())
}
