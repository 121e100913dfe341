//! One check per operation, over ragged, empty and maximal shapes.

use lite_llm_kernels::{
    blocks::{quantise, record_words},
    cuda::{
        fast::Math,
        launch::{Choose, DevQueries, Experts, Linear, VARIANTS, row_words},
    },
    device::{DeviceError, Swiglu, SwigluGroup},
    dtype::DType,
    kv::{KvDType, KvShape, KvSlot, PAGE_TOKENS, Query},
    matrix::{PackedMatrix, Source},
    ops::{
        arena::KvArena, attention, elementwise, embed, function, matmul, norm, rope, softmax,
        swiglu,
    },
    rows::Rows,
};

use super::{fast, fused, seam, truth::Check};

pub(super) type Done = Result<(), DeviceError>;

/// All of them, or those that are named.
pub(crate) fn all(check: &mut Check<'_>, what: &[String]) -> Done {
    let only: Vec<&str> =
        "small products experts attention routes one steps tiles rows fast fast-products \
         fast-experts fast-attention seam descend sample sums copies"
            .split(' ')
            .filter(|name| what.iter().any(|w| w == name))
            .collect();
    let wanted = |name: &str| only.is_empty() || only.contains(&name);
    if wanted("small") {
        functions(check)?;
        graphs(check)?;
        small(check)?;
        quantised(check)?;
        norms(check)?;
        println!("small ones: {} differ", check.wrong.len());
    }
    if wanted("products") {
        for dtype in DType::ALL {
            products(check, dtype)?;
            println!("products {dtype}: {} differ", check.wrong.len());
        }
    }
    if wanted("experts") {
        for dtype in DType::ALL {
            networks(check, dtype)?;
            println!("experts {dtype}: {} differ", check.wrong.len());
        }
    }
    if wanted("one") {
        for dtype in DType::ALL {
            fused::one(check, dtype)?;
            println!("one row {dtype}: {} differ", check.wrong.len());
        }
    }
    if wanted("tiles") {
        for dtype in DType::ALL {
            fused::tiles(check, dtype)?;
            println!("tiles {dtype}: {} differ", check.wrong.len());
        }
    }
    if wanted("rows") {
        fused::attention_rows(check)?;
        println!("attention of rows: {} differ", check.wrong.len());
    }
    fast::all(check, wanted)?;
    seam::all(check, wanted)?;
    if wanted("steps") {
        for dtype in KvDType::ALL {
            fused::steps(check, dtype)?;
            println!("steps {dtype}: {} differ", check.wrong.len());
        }
    }
    if wanted("routes") {
        routes(check)?;
        println!("routes: {} differ", check.wrong.len());
    }
    if wanted("attention") {
        for dtype in KvDType::ALL {
            attentions(check, dtype)?;
            println!("attention {dtype}: {} differ", check.wrong.len());
        }
    }
    Ok(())
}

fn functions(check: &mut Check<'_>) -> Done {
    let inputs: Vec<f32> = (0..u32::MAX / 997).map(|i| f32::from_bits(i * 997)).collect();
    for (name, f) in [
        ("exp_all", function::exp as fn(f32) -> f32),
        ("sigmoid_all", function::sigmoid),
        ("silu_all", function::silu),
    ] {
        let x = check.cuda.upload(&inputs)?;
        check.cuda.function_of(name, &x)?;
        let expected: Vec<f32> = inputs.iter().map(|&x| f(x)).collect();
        check.same(name, &x, &expected)?;
    }
    Ok(())
}

/// What records some work gives a graph, what records none an error.
fn graphs(check: &mut Check<'_>) -> Done {
    let (x, y) = (check.cuda.upload(&[1.0f32])?, check.cuda.upload(&[2.0f32])?);
    check.cuda.add(&x, &y)?;
    check.cuda.capture(|| check.cuda.add(&x, &y))?;
    check.same("what is recorded is not done", &x, &[3.0])?;
    check.done += 1;
    if check.cuda.capture(|| Ok(())).is_ok() {
        check.wrong.push("a graph without work was made".into());
    }
    Ok(())
}

fn small(check: &mut Check<'_>) -> Done {
    for (rows, cols) in [(1, 1), (3, 7), (5, 64), (2, 2048), (64, 2048)] {
        let (mut x, y) = (check.values(rows * cols, 2.0), check.values(rows * cols, 2.0));
        let (dx, dy) = (check.cuda.upload(&x)?, check.cuda.upload(&y)?);
        check.cuda.add(&dx, &dy)?;
        elementwise::add(&check.cpu, &mut x, &y);
        check.same("add", &dx, &x)?;
        check.cuda.clamp(&dx, 1.5)?;
        elementwise::clamp(&check.cpu, &mut x, 1.5);
        check.same("clamp", &dx, &x)?;
        let logits = check.values(rows, 3.0);
        check.cuda.sigmoid_gate(&dx, &check.cuda.upload(&logits)?)?;
        elementwise::sigmoid_gate(&check.cpu, &mut x, &logits);
        check.same("sigmoid_gate", &dx, &x)?;

        let picks: Vec<u32> = (0..4).map(|_| check.below(rows) as u32).collect();
        let out = check.poisoned(picks.len() * cols)?;
        check.cuda.select_rows(&dx, &check.cuda.upload(&picks)?, cols, &out)?;
        let mut expected = vec![0.0; picks.len() * cols];
        elementwise::select_rows(Rows::dense(&x, cols), &picks, &mut expected);
        check.same("select_rows", &out, &expected)?;

        for per_row in [1, 8] {
            let (parts, weights) =
                (check.values(rows * per_row * cols, 1.0), check.values(rows * per_row, 1.0));
            let slices: Vec<&[f32]> = parts.chunks(cols).collect();
            let ends: Vec<u32> = (1..=rows).map(|r| (r * per_row) as u32).collect();
            let mut expected = vec![0.0; rows * cols];
            elementwise::weighted_sum(&check.cpu, &slices, &weights, &ends, &mut expected);
            let (dparts, dweights) = (check.cuda.upload(&parts)?, check.cuda.upload(&weights)?);
            let out = check.poisoned(rows * cols)?;
            check.cuda.weighted_sum(&dparts, &dweights, per_row, false, &out)?;
            check.same("weighted_sum", &out, &expected)?;
            check.cuda.write(&out, 0, &y)?;
            check.cuda.weighted_sum(&dparts, &dweights, per_row, true, &out)?;
            let mut sum = y.clone();
            elementwise::add(&check.cpu, &mut sum, &expected);
            check.same("weighted_sum that adds", &out, &sum)?;
        }
    }
    for (rows, heads, head_dim) in [(1, 1, 2), (3, 2, 6), (7, 16, 128)] {
        let mut x = check.values(rows * heads * head_dim, 1.0);
        let positions: Vec<u32> = (0..rows as u32).map(|r| r * 977 + 5).collect();
        let inv: Vec<f32> = (0..head_dim / 2).map(|i| 1.0 / (1.0 + i as f32 * 3.7)).collect();
        let mut table = vec![0.0; rows * head_dim];
        rope::rotary_table(&check.cpu, &positions, &inv, 1.0, &mut table);
        let dx = check.cuda.upload(&x)?;
        check.cuda.rope(&dx, &check.cuda.upload(&table)?, head_dim)?;
        rope::rope(&check.cpu, &mut x, head_dim, &table);
        check.same("rope", &dx, &x)?;
    }
    for dtype in DType::ALL {
        for (n, k) in [(1, 1), (33, 45), (70, 256)] {
            let w = matrix(check, dtype, n, k);
            let ids: Vec<u32> = (0..9).map(|_| check.below(n) as u32).collect();
            let mut expected = vec![0.0; ids.len() * k];
            embed::embed(&check.cpu, &w, &ids, &mut expected);
            let out = check.poisoned(expected.len())?;
            check.cuda.embed(&check.cuda.matrix(&w)?, &check.cuda.upload(&ids)?, &out)?;
            check.same(&format!("embed {dtype}"), &out, &expected)?;
        }
    }
    Ok(())
}

fn norms(check: &mut Check<'_>) -> Done {
    for width in [1, 7, 8, 64, 128, 255, 256, 257, 511, 768, 2048, 5000, 8193 * 2] {
        let x = check.values(3 * width, 2.0);
        let weight = check.values(width, 1.0);
        let mut expected = vec![0.0; x.len()];
        norm::rms_norm(&check.cpu, &x, &weight, 1e-5, &mut expected);
        let (dx, dw, out) =
            (check.cuda.upload(&x)?, check.cuda.upload(&weight)?, check.poisoned(x.len())?);
        check.cuda.rms_norm(&dx, &dw, 1e-5, &out)?;
        check.same(&format!("rms_norm {width}"), &out, &expected)?;
        let (rows, words) = (check.poisoned(x.len())?, check.poisoned(3 * record_words(width))?);
        check.cuda.norm_rows(&dx, &dw, 1e-5, Some(&rows), Some(&words))?;
        check.same(&format!("norm_rows {width}"), &rows, &expected)?;
        let in_blocks: Vec<u32> =
            records(check, &expected, width).iter().map(|w| w.to_bits()).collect();
        let found: Vec<u32> = check.cuda.download(&words)?.iter().map(|w| w.to_bits()).collect();
        let found = check.cuda.upload(&found)?;
        check.same_words(&format!("norm_rows in blocks {width}"), &found, &in_blocks)?;
        check.cuda.rms_norm(&dx, &dw, 1e-5, &dx)?;
        check.same(&format!("rms_norm in place {width}"), &dx, &expected)?;
    }
    Ok(())
}

pub(super) fn records(check: &Check<'_>, x: &[f32], k: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / k * record_words(k)];
    for (row, out) in x.chunks(k).zip(out.chunks_mut(record_words(k))) {
        quantise(check.cpu.simd(), row, out);
    }
    out
}

fn quantised(check: &mut Check<'_>) -> Done {
    for k in [1, 31, 32, 33, 1024, 2049] {
        let rows = 4;
        let mut x = check.values(rows * k, 3.0);
        x[0] = f32::INFINITY;
        x[k] = f32::NAN;
        x[2 * k..3 * k].fill(1e-33);
        let expected: Vec<u32> = records(check, &x, k).iter().map(|w| w.to_bits()).collect();
        let out = check.poisoned(expected.len())?;
        check.cuda.quantise(&check.cuda.upload(&x)?, k, rows, &out)?;
        let found: Vec<u32> = check.cuda.download(&out)?.iter().map(|w| w.to_bits()).collect();
        let found = check.cuda.upload(&found)?;
        check.same_words(&format!("quantise {k}"), &found, &expected)?;
    }
    Ok(())
}

pub(super) fn matrix(check: &mut Check<'_>, dtype: DType, n: usize, k: usize) -> PackedMatrix {
    let values = check.values(n * k, 0.1);
    PackedMatrix::pack(dtype, n, k, Source::F32(&values))
}

fn products(check: &mut Check<'_>, dtype: DType) -> Done {
    let shapes = [
        (1, 1, 1),
        (2, 3, 7),
        (1, 33, 32),
        (5, 70, 33),
        (9, 32, 255),
        (3, 130, 256),
        (8, 31, 257),
        (4, 64, 512),
        (1, 257, 700),
        (17, 100, 800),
        (7, 96, 1024),
        (6, 64, 1030),
        (8, 64, 2048),
        (2, 40, 2305),
        (3, 33, 4608),
        (1, 32, 8200),
    ];
    for (m, n, k) in shapes {
        let w = matrix(check, dtype, n, k);
        let w2 = matrix(check, dtype, n / 2 + 1, k);
        let x = check.values(m * k, 1.0);
        let bias = check.values(n, 1.0);
        let mut expected = vec![0.0; m * n];
        matmul::matmul(&check.cpu, Rows::dense(&x, k), &w, Some(&bias), &mut expected);
        let mut second = vec![0.0; m * w2.n()];
        matmul::matmul(&check.cpu, Rows::dense(&x, k), &w2, None, &mut second);
        let rows = if dtype.is_quantised() { records(check, &x, k) } else { x.clone() };
        let (dw, dw2, dx, db) = (
            check.cuda.matrix(&w)?,
            check.cuda.matrix(&w2)?,
            check.cuda.upload(&rows)?,
            check.cuda.upload(&bias)?,
        );
        for variant in VARIANTS {
            let (out, out2) = (check.poisoned(m * n)?, check.poisoned(second.len())?);
            let many = [
                Linear { weight: &dw, bias: Some(&db), out: &out },
                Linear { weight: &dw2, bias: None, out: &out2 },
            ];
            check.cuda.matmul_by(variant, &dx, m, &many, false)?;
            let name = format!("{} {dtype} {m}x{n}x{k}", variant.name());
            check.same(&name, &out, &expected)?;
            check.same(&format!("{name}, second"), &out2, &second)?;
            check.cuda.matmul_by(variant, &dx, m, &many[..1], true)?;
            let mut sum = expected.clone();
            elementwise::add(&check.cpu, &mut sum, &expected);
            check.same(&format!("{name}, added"), &out, &sum)?;
        }
    }
    Ok(())
}

fn networks(check: &mut Check<'_>, dtype: DType) -> Done {
    for (hidden, inter, count, rows, k) in [
        (64, 32, 3, 1, 1),
        (100, 70, 5, 3, 2),
        (300, 257, 5, 9, 3),
        (2048, 96, 4, 12, 2),
        (96, 1024, 3, 30, 1),
        (512, 192, 3, 200, 2),
        (1536, 1088, 2, 70, 1),
    ] {
        let absent = count - 1;
        let weights: Vec<[PackedMatrix; 3]> = (0..count)
            .map(|_| {
                [
                    matrix(check, dtype, inter, hidden),
                    matrix(check, dtype, inter, hidden),
                    matrix(check, dtype, hidden, inter),
                ]
            })
            .collect();
        let x = check.values(rows * hidden, 1.0);
        let routes: Vec<u32> = (0..rows * k).map(|_| check.below(count) as u32).collect();
        let poison = f32::from_bits(0xA5A5_A5A5);
        let mut parts = vec![vec![0.0f32; hidden]; rows * k];
        let mut groups: Vec<SwigluGroup<'_, PackedMatrix>> = weights
            .iter()
            .map(|[gate, up, down]| SwigluGroup {
                weights: Swiglu { gate, up, down },
                rows: Vec::new(),
                outputs: Vec::new(),
            })
            .collect();
        for (route, part) in parts.iter_mut().enumerate() {
            let group = &mut groups[routes[route] as usize];
            group.rows.push(&x[route / k * hidden..][..hidden]);
            group.outputs.push(part);
        }
        swiglu::swiglu_groups(&check.cpu, &mut groups);
        drop(groups);
        for (route, part) in parts.iter_mut().enumerate() {
            if routes[route] as usize == absent {
                part.fill(poison);
            }
        }
        let expected: Vec<f32> = parts.concat();

        let mut keep = Vec::new();
        let mut table = vec![[0u64; 3]; count];
        for (e, matrices) in weights.iter().enumerate().filter(|(e, _)| *e != absent) {
            for (i, w) in matrices.iter().enumerate() {
                let w = check.cuda.matrix(w)?;
                table[e][i] = w.data().address();
                keep.push(w);
            }
        }
        let experts = Experts {
            dtype,
            math: Math::Exact,
            hidden,
            intermediate: inter,
            table: check.cuda.upload(&table)?,
        };
        let in_rows = if dtype.is_quantised() { records(check, &x, hidden) } else { x.clone() };
        let (dx, droutes) = (check.cuda.upload(&in_rows)?, check.cuda.upload(&routes)?);
        let tiles = check.cuda.tiles_fit(dtype, hidden) && check.cuda.tiles_fit(dtype, inter);
        for item_rows in [1, 4, 8, 16, 64, 128] {
            if item_rows > 16 && !tiles {
                continue;
            }
            let grouped = check.cuda.grouped(routes.len(), count, item_rows)?;
            check.cuda.group_routes(&droutes, count, &grouped)?;
            let mut order: Vec<u32> = (0..routes.len() as u32).collect();
            order.sort_by_key(|&r| routes[r as usize]);
            check.same_words("group_routes", &grouped.order, &order)?;
            let between = check.poisoned(routes.len() * row_words(dtype, Math::Exact, inter))?;
            let out = check.poisoned(expected.len())?;
            if item_rows > 16 {
                check.cuda.swiglu_tiles(&experts, &grouped, k, &dx, &between, &out)?;
            } else {
                check.cuda.swiglu_routes(&experts, &grouped, k, &dx, &between, &out)?;
            }
            let name = format!(
                "swiglu {dtype} items of {item_rows}, {rows}x{k} of {count}, {hidden}x{inter}"
            );
            check.same(&name, &out, &expected)?;
        }
    }
    Ok(())
}

fn attentions(check: &mut Check<'_>, dtype: KvDType) -> Done {
    for (kv_heads, group, head_dim) in [
        (1, 1, 2),
        (2, 1, 128),
        (1, 4, 64),
        (2, 3, 6),
        (1, 2, 80),
        (1, 1, 320),
        (1, 8, 128),
        (1, 4, 516),
    ] {
        let shape = KvShape { layers: 2, kv_heads, head_dim, dtype };
        let (lengths, layer) = ([1usize, 64, 65, 256, 257, 700, 1500], 1);
        let per = |len: usize| len.div_ceil(PAGE_TOKENS);
        let pages: usize = lengths.iter().map(|&len| per(len)).sum();
        let mut arena = KvArena::new(shape, pages);
        let kv = check.cuda.kv(shape, pages, 0xff)?;
        let (cols, mut next) = (kv_heads * head_dim, 0u32);
        let mut tables: Vec<Vec<u32>> = Vec::new();
        for len in lengths {
            // Pages of a sequence lie backwards, so that order cannot be mistaken for place.
            let table: Vec<u32> = (0..per(len) as u32).rev().map(|i| next + i).collect();
            next += table.len() as u32;
            let (k, v) = (check.values(len * cols, 1.0), check.values(len * cols, 1.0));
            let slots: Vec<KvSlot> = (0..len)
                .map(|p| KvSlot { page: table[p / PAGE_TOKENS], offset: (p % PAGE_TOKENS) as u32 })
                .collect();
            arena.append(&check.cpu, layer, &k, &v, &slots);
            let slots: Vec<[u32; 2]> = slots.iter().map(|s| [s.page, s.offset]).collect();
            check.cuda.kv_append(
                &kv,
                layer,
                &check.cuda.upload(&k)?,
                &check.cuda.upload(&v)?,
                &check.cuda.upload(&slots)?,
            )?;
            tables.push(table);
        }
        let mut rows: Vec<(usize, u32)> =
            lengths.iter().enumerate().map(|(s, &len)| (s, len as u32 - 1)).collect();
        rows.extend([
            (5, 0),
            (5, 255),
            (5, 256),
            (5, 511),
            (5, 512),
            (6, 1023),
            (6, 1024),
            (6, 1279),
            (6, 1400),
        ]);
        let q = check.values(rows.len() * cols * group, 1.0);
        let queries: Vec<Query<'_>> =
            rows.iter().map(|&(s, position)| Query { pages: &tables[s], position }).collect();
        let stride = tables.iter().map(Vec::len).max().unwrap_or(0);
        let flat: Vec<u32> = rows
            .iter()
            .flat_map(|&(s, _)| {
                (0..stride)
                    .map(|i| tables[s].get(i).copied().unwrap_or(u32::MAX))
                    .collect::<Vec<_>>()
            })
            .collect();
        let positions: Vec<u32> = rows.iter().map(|&(_, p)| p).collect();
        let longest = 1499;
        let dq = check.cuda.upload(&q)?;
        let queries_on = DevQueries {
            tables: check.cuda.upload(&flat)?,
            stride,
            positions: check.cuda.upload(&positions)?,
            longest,
        };
        let parts = check.cuda.attention_parts(rows.len(), kv_heads * group, head_dim, longest)?;
        for window in [None, Some(1), Some(100), Some(256), Some(700)] {
            let mut expected = vec![0.0; q.len()];
            attention::attention(
                &check.cpu,
                &arena,
                layer,
                &q,
                &queries,
                0.125,
                window,
                &mut expected,
            );
            let out = check.poisoned(q.len())?;
            check.cuda.attention(&kv, layer, &dq, &queries_on, 0.125, window, &parts, &out)?;
            check.same(
                &format!("attention {dtype} {kv_heads}x{group}x{head_dim} window {window:?}"),
                &out,
                &expected,
            )?;
        }
    }
    Ok(())
}

pub(super) fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// As in the runtime: a random number for the order of equal scores.
pub(super) fn random(seed: u64, index: u64) -> u64 {
    let stream = mix(seed ^ 2u64.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mix(stream.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

fn routes(check: &mut Check<'_>) -> Done {
    let names: Vec<u64> = (0..40).map(|i| mix(i + 77)).collect();
    let dnames = check.cuda.upload(&names)?;
    // The pin of the runtime's own test: seed 11, layer 3.
    for (n, k, level, ties, masked) in [
        (1usize, 1usize, 2usize, false, false),
        (64, 8, 2, false, false),
        (64, 8, 2, true, false),
        (128, 8, 1, true, false),
        (40, 3, 0, true, true),
        (33, 40, 0, false, true),
        (300, 10, 2, true, true),
        (1000, 4, 2, false, true),
        (64, 8, 2, true, true),
    ] {
        let branches = 20_000usize;
        let (words, place) = (n.div_ceil(32), random(11, 3 << 8 | level as u64));
        let mut scores = check.values(branches * n, 4.0);
        if ties {
            scores.iter_mut().for_each(|x| *x = (*x / 2.0).round() * 2.0);
        }
        let bad_branch = 7;
        scores[bad_branch * n] = f32::NAN;
        let mut masks: Vec<u32> =
            (0..branches * words).map(|_| check.bits() | check.bits()).collect();
        masks[bad_branch * words] |= 1;
        masks[3 * words..4 * words].fill(0);
        let (tiers, groups): (Vec<u32>, Vec<u32>) =
            (0..branches).map(|_| (check.below(40) as u32, check.bits())).unzip();
        let parents = check.values(branches, 1.0);
        let (mut index, mut weight, mut bad) = (Vec::new(), Vec::new(), Vec::new());
        for b in 0..branches {
            let open = |i: usize| !masked || masks[b * words + i / 32] >> (i % 32) & 1 == 1;
            let of: Vec<usize> = (0..n).filter(|&i| open(i)).collect();
            let score = |i: usize| scores[b * n + i];
            bad.push(u32::from(of.iter().any(|&i| !score(i).is_finite())));
            if bad[b] == 1 {
                index.extend(vec![0xA5A5_A5A5u32; k]);
                weight.extend(vec![f32::from_bits(0xA5A5_A5A5); k]);
                continue;
            }
            let hash = |i: usize| {
                let tier = names[if level == 0 { i } else { tiers[b] as usize }];
                let candidate = [0, (i as u64) << 32, u64::from(groups[b]) << 32 | i as u64][level];
                random(random(place, tier), candidate)
            };
            let mut order: Vec<usize> = (0..of.len()).collect();
            order.sort_by(|&x, &y| {
                let (x, y) = (of[x], of[y]);
                score(y)
                    .partial_cmp(&score(x))
                    .unwrap()
                    .then_with(|| hash(x).cmp(&hash(y)))
                    .then(x.cmp(&y))
            });
            let mut p: Vec<f32> = of.iter().map(|&i| score(i)).collect();
            softmax::softmax(&mut p);
            for r in 0..k {
                let at = order.get(r);
                index.push(at.map_or(u32::MAX, |&at| of[at] as u32));
                weight.push(at.map_or(0.0, |&at| parents[b] * p[at]));
            }
        }
        let mut normed = weight.clone();
        for (row, bad) in normed.chunks_mut(k).zip(&bad) {
            let sum: f32 = row.iter().sum();
            if *bad == 0 && sum > 0.0 {
                row.iter_mut().for_each(|w| *w /= sum);
            }
        }
        let (ds, dm) = (check.cuda.upload(&scores)?, check.cuda.upload(&masks)?);
        let (dt, dg, dp) =
            (check.cuda.upload(&tiers)?, check.cuda.upload(&groups)?, check.cuda.upload(&parents)?);
        for renormalise in [false, true] {
            let how = Choose {
                n,
                k,
                seed: place,
                masks: masked.then_some(&dm),
                tier_names: &dnames,
                level,
                tiers: Some(&dt),
                groups: Some(&dg),
                parents: Some(&dp),
                renormalise,
            };
            let (di, db) = (
                check.cuda.filled::<u32>(branches * k, 0xA5)?,
                check.cuda.filled::<u32>(branches, 0xA5)?,
            );
            let dw = check.poisoned(branches * k)?;
            check.cuda.choose(&ds, how, &di, &dw, &db)?;
            let name = format!(
                "choose {k} of {n}, level {level}, ties {ties}, masks {masked}, renormalise {renormalise}"
            );
            check.same_words(&name, &di, &index)?;
            check.same(&name, &dw, if renormalise { &normed } else { &weight })?;
            check.same_words(&name, &db, &bad)?;
        }
    }
    Ok(())
}
