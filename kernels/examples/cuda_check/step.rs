//! A whole decode step of a model's shape with random weights, as one recorded graph, and a prefill.

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

/// A model's sizes.
struct Shape {
    name: &'static str,
    layers: usize,
    hidden: usize,
    inter: usize,
    experts: usize,
    k: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    vocabulary: usize,
}

const OLMOE: Shape = Shape {
    name: "OLMoE-1B-7B",
    layers: 16,
    hidden: 2048,
    inter: 1024,
    experts: 64,
    k: 8,
    heads: 16,
    kv_heads: 16,
    head: 128,
    vocabulary: 50304,
};

const QWEN3: Shape = Shape {
    name: "Qwen3-30B-A3B",
    layers: 48,
    hidden: 2048,
    inter: 768,
    experts: 128,
    k: 8,
    heads: 32,
    kv_heads: 4,
    head: 128,
    vocabulary: 151936,
};

impl Shape {
    /// Width of queries, and of what attention gives.
    fn wide(&self) -> usize {
        self.heads * self.head
    }

    /// Weights of the norms of queries and keys: of the whole row, or of a head.
    fn head_norm(&self) -> usize {
        if self.heads == self.kv_heads { self.wide() } else { self.head }
    }

    /// Width of keys and of values.
    fn narrow(&self) -> usize {
        self.kv_heads * self.head
    }
}

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

/// All of it, or the formats, `prefill` and `decode` that are named; of OLMoE-1B-7B's shape, or of
/// Qwen3-30B-A3B's if `qwen3` is named.
pub(crate) fn all(cuda: &Cuda, peak: f64, what: &[String]) -> Done {
    let named = |name: &str| what.iter().any(|w| w == name);
    let (prefills, decodes) = (!named("decode"), !named("prefill"));
    let s = if named("qwen3") { &QWEN3 } else { &OLMOE };
    println!("{}", s.name);
    let some = KINDS.iter().any(|kind| named(kind.name));
    for kind in KINDS.into_iter().filter(|kind| !some || named(kind.name)) {
        let Kind { dtype, math, .. } = kind;
        let up = PackedMatrix::packed_bytes(dtype, s.inter, s.hidden).expect("a size");
        let down = PackedMatrix::packed_bytes(dtype, s.hidden, s.inter).expect("a size");
        let expert = 2 * up + down;
        let mut layers = Vec::new();
        for l in 0..s.layers as u32 {
            let memory = cuda.filled::<u8>(s.experts * expert, 0)?;
            cuda.scramble(&memory, 1000 + l)?;
            let table: Vec<[u64; 3]> = (0..s.experts)
                .map(|e| {
                    let at = memory.address() + (e * expert) as u64;
                    [at, at + up as u64, at + 2 * up as u64]
                })
                .collect();
            let experts = Experts {
                dtype,
                math,
                hidden: s.hidden,
                intermediate: s.inter,
                table: cuda.upload(&table)?,
            };
            let w = |n, seed| weights(cuda, kind, n, s.hidden, seed);
            layers.push(Layer {
                qkv: [w(s.wide(), l)?, w(s.narrow(), 100 + l)?, w(s.narrow(), 200 + l)?],
                o: weights(cuda, kind, s.hidden, s.wide(), 300 + l)?,
                gate: gate(cuda, s, l)?,
                experts,
                _memory: memory,
            });
        }
        let head = weights(cuda, kind, s.vocabulary, s.hidden, 400)?;
        // Smaller items waste fewer rows, larger ones read weights less often.
        for (item_rows, wide) in [(64, false), (128, false), (64, true), (128, true)] {
            if prefills && (kind.fast() || !wide) {
                cuda.set_wide(wide);
                prefill(cuda, s, kind, &layers, &head, 2048, item_rows)?;
                cuda.set_wide(true);
            }
        }
        // Items of sixteen rows read weights once, where items of eight may do so twice.
        for (batch, item_rows) in [(1, 1), (8, 4), (64, 8), (64, 16)] {
            if decodes {
                step(cuda, s, kind, &layers, &head, batch, item_rows, 512, expert, peak)?;
            }
        }
    }
    Ok(())
}

/// Scores that differ, so that rows choose different experts.
fn gate(cuda: &Cuda, s: &Shape, seed: u32) -> Result<DevMatrix, DeviceError> {
    let mut state = u64::from(seed) + 9;
    let values: Vec<f32> = (0..s.experts * s.hidden)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * 0.1
        })
        .collect();
    cuda.matrix(&PackedMatrix::pack(
        DType::F32,
        s.experts,
        s.hidden,
        lite_llm_kernels::matrix::Source::F32(&values),
    ))
}

#[allow(clippy::too_many_arguments)]
fn step(
    cuda: &Cuda,
    s: &Shape,
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
    let routes = batch * s.k;
    let (mut state, mut table) = (7u64, Vec::new());
    for _ in 0..batch * s.hidden {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        table.push((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0);
    }
    let embedded = cuda.upload(&table)?;
    let norm = cuda.upload(&vec![1.0f32; s.hidden])?;
    let heads_norm = cuda.upload(&vec![1.0f32; s.head_norm()])?;
    let rotary = cuda.upload(&vec![0.5f32; batch * s.head])?;
    let (x, h, attended, logits) = (f(s.hidden)?, f(s.hidden)?, f(s.wide())?, f(s.vocabulary)?);
    let (q, k, v, scores) = (f(s.wide())?, f(s.narrow())?, f(s.narrow())?, f(s.experts)?);
    let records = f(row_words(dtype, math, s.hidden))?;
    let wide_records = f(row_words(dtype, math, s.wide()))?;
    let parts = cuda.filled::<f32>(routes * s.hidden, 0)?;
    let between = cuda.filled::<f32>(routes * row_words(dtype, math, s.inter), 0)?;
    let (index, weight, bad) = (
        cuda.filled::<u32>(routes, 0)?,
        cuda.filled::<f32>(routes, 0)?,
        cuda.filled::<u32>(batch, 0)?,
    );
    let grouped = cuda.grouped(routes, s.experts, item_rows)?;
    let shape =
        KvShape { layers: s.layers, kv_heads: s.kv_heads, head_dim: s.head, dtype: KvDType::Bf16 };
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
    let leaves = cuda.attention_parts(batch, s.heads, s.head, last)?;
    let names = cuda.upload(&[5u64])?;
    let how = Choose {
        n: s.experts,
        k: s.k,
        seed: 3,
        masks: None,
        tier_names: &names,
        level: 2,
        tiers: None,
        groups: None,
        parents: None,
        renormalise: false,
    };
    let counters = cuda.filled::<u32>(batch * s.heads + s.hidden, 0)?;
    let chosen = cuda.routes(s.experts, s.k)?;
    let by = Some(Norm { weight: &norm, eps: 1e-5 });
    let heads = Heads {
        q: &q,
        k: &k,
        v: &v,
        norms: Some((&heads_norm, &heads_norm, 1e-5)),
        rotary: Some(&rotary),
    };
    // What products of the format read: the rows themselves, or their records.
    let input = |from: &Dev<f32>| match own_rows {
        _ if quantised => cuda.quantise(from, s.wide(), batch, &wide_records),
        true => cuda.pair_rows(from, s.wide(), batch, &wide_records),
        false => Ok(()),
    };
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
                if cuda.one_linear_fits(s.wide()) {
                    cuda.linear_one(&attended, None, &products, true)?;
                } else {
                    input(&attended)?;
                    let rows = if own_rows { &wide_records } else { &attended };
                    cuda.matmul(rows, 1, &products, true)?;
                }
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
    let spread = cuda.spread(256)?;
    // Tiles pay for blocks and many outputs; qkv and o of bf16 took 1.8 ms so, and 1.2 otherwise.
    let dense = |x: &Dev<f32>, products: &[Linear<'_>], adds: bool| {
        if quantised && batch >= 32 && products[0].weight.n() > s.hidden {
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
                let rows = if own_rows { &wide_records } else { &attended };
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
                cuda.group_routes(&index, s.experts, &grouped)?;
            }
            if on("experts") {
                cuda.swiglu_routes(
                    &layer.experts,
                    &grouped,
                    s.k,
                    if own_rows { &records } else { &h },
                    &between,
                    &parts,
                )?;
                cuda.weighted_sum(&parts, &weight, s.k, true, &x)?;
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
    let mut seen = vec![false; s.experts];
    chosen.iter().for_each(|&e| seen[e as usize % s.experts] = true);
    let active = seen.iter().filter(|&&s| s).count();
    // With uniform routing, as FIELD.md counts.
    let uniform =
        s.experts as f64 * (1.0 - (1.0 - s.k as f64 / s.experts as f64).powi(batch as i32));
    let dense: usize = layers
        .iter()
        .map(|l| l.qkv.iter().chain([&l.o, &l.gate]).map(|w| w.data().len()).sum::<usize>())
        .sum::<usize>()
        + head.data().len();
    let cache = batch * context * s.layers * 2 * s.narrow() * 2;
    let bytes = dense as f64 + cache as f64 + s.layers as f64 * uniform * expert as f64;
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
#[allow(clippy::too_many_arguments)]
fn prefill(
    cuda: &Cuda,
    s: &Shape,
    kind: Kind,
    layers: &[Layer],
    head: &DevMatrix,
    rows: usize,
    item_rows: usize,
) -> Done {
    let Kind { name, dtype, math } = kind;
    let f = |cols: usize| cuda.filled::<f32>(rows * cols, 0);
    let routes = rows * s.k;
    let (mut state, mut values) = (7u64, Vec::new());
    for _ in 0..rows * s.hidden {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        values.push((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0);
    }
    let embedded = cuda.upload(&values)?;
    let norm = cuda.upload(&vec![1.0f32; s.hidden])?;
    let heads_norm = cuda.upload(&vec![1.0f32; s.head_norm()])?;
    let rotary = cuda.upload(&vec![0.5f32; rows * s.head])?;
    let (x, h, attended) = (f(s.hidden)?, f(s.hidden)?, f(s.wide())?);
    let (q, k, v, scores) = (f(s.wide())?, f(s.narrow())?, f(s.narrow())?, f(s.experts)?);
    let logits = cuda.filled::<f32>(s.vocabulary, 0)?;
    let records = f(row_words(dtype, math, s.hidden))?;
    let wide_records = f(row_words(dtype, math, s.wide()))?;
    let parts = cuda.filled::<f32>(routes * s.hidden, 0)?;
    let between = cuda.filled::<f32>(routes * row_words(dtype, math, s.inter), 0)?;
    let (index, weight, bad) = (
        cuda.filled::<u32>(routes, 0)?,
        cuda.filled::<f32>(routes, 0)?,
        cuda.filled::<u32>(rows, 0)?,
    );
    let grouped = cuda.grouped(routes, s.experts, item_rows)?;
    let shape =
        KvShape { layers: s.layers, kv_heads: s.kv_heads, head_dim: s.head, dtype: KvDType::Bf16 };
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
    let leaves = cuda.attention_parts(rows, s.heads, s.head, rows - 1)?;
    let names = cuda.upload(&[5u64])?;
    let how = Choose {
        n: s.experts,
        k: s.k,
        seed: 3,
        masks: None,
        tier_names: &names,
        level: 2,
        tiers: None,
        groups: None,
        parents: None,
        renormalise: false,
    };
    let heads = Heads {
        q: &q,
        k: &k,
        v: &v,
        norms: Some((&heads_norm, &heads_norm, 1e-5)),
        rotary: Some(&rotary),
    };
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
                cuda.quantise(&attended, s.wide(), rows, &wide_records)?;
            } else if on("norms") && own_rows {
                cuda.pair_rows(&attended, s.wide(), rows, &wide_records)?;
            }
            if on("qkv, o") {
                let products = [Linear { weight: &layer.o, bias: None, out: &x }];
                let from = if own_rows { &wide_records } else { &attended };
                cuda.linear_tiles(from, rows, &products, true, None)?;
            }
            if on("norms") {
                normed(true)?;
            }
            if on("routes") {
                let products = [Linear { weight: &layer.gate, bias: None, out: &scores }];
                cuda.matmul(&h, rows, &products, false)?;
                cuda.choose(&scores, how, &index, &weight, &bad)?;
                cuda.group_routes(&index, s.experts, &grouped)?;
            }
            if on("experts") {
                let from = if own_rows { &records } else { &h };
                cuda.swiglu_tiles(&layer.experts, &grouped, s.k, from, &between, &parts)?;
            }
            if on("sums") {
                cuda.weighted_sum(&parts, &weight, s.k, true, &x)?;
            }
        }
        if on("head") {
            let last = cuda.upload(&[rows as u32 - 1])?;
            let row = cuda.filled::<f32>(s.hidden, 0)?;
            cuda.select_rows(&x, &last, s.hidden, &row)?;
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
