//! Checks of the kernels that do several operations at once: a decode step of one row, tiles of many
//! rows, attention of a prompt.

use lite_llm_kernels::{
    cuda::{
        fast::Math,
        launch::{Choose, DevQueries, Experts, Linear, row_words},
        one::{Heads, Norm},
    },
    device::{Swiglu, SwigluGroup},
    dtype::DType,
    kv::{KvDType, KvShape, KvSlot, PAGE_TOKENS, Query},
    matrix::PackedMatrix,
    ops::{arena::KvArena, attention, elementwise, matmul, norm, rope, softmax, swiglu},
    rows::Rows,
};

use super::{
    checks::{Done, matrix, records},
    truth::Check,
};

/// Products of a single row with what is fused with them.
pub(super) fn one(check: &mut Check<'_>, dtype: DType) -> Done {
    for (k, n) in [(4096, 130), (2304, 31), (3328, 64), (3840, 1)] {
        let (x, w) = (check.values(k, 1.0), matrix(check, dtype, n, k));
        let bias = check.values(n, 1.0);
        let (dx, dw, db) =
            (check.cuda.upload(&x)?, check.cuda.matrix(&w)?, check.cuda.upload(&bias)?);
        let mut expected = vec![0.0; n];
        matmul::matmul(&check.cpu, Rows::dense(&x, k), &w, Some(&bias), &mut expected);
        let out = check.poisoned(n)?;
        let product = [Linear { weight: &dw, bias: Some(&db), out: &out }];
        check.cuda.linear_one(&dx, None, &product, false)?;
        let name = format!("linear_one {dtype} {n}x{k}, long");
        check.same(&name, &out, &expected)?;
        check.cuda.linear_one(&dx, None, &product, true)?;
        let mut sum = expected.clone();
        elementwise::add(&check.cpu, &mut sum, &expected);
        check.same(&format!("{name}, added"), &out, &sum)?;
    }
    for (hidden, inter, count, k) in [
        (256, 256, 3, 1),
        (512, 768, 5, 2),
        (768, 256, 40, 3),
        (2048, 1024, 9, 8),
        (1280, 512, 64, 8),
    ] {
        let x = check.values(hidden, 1.0);
        let weight = check.values(hidden, 1.0);
        let mut normed = vec![0.0; hidden];
        norm::rms_norm(&check.cpu, &x, &weight, 1e-5, &mut normed);
        let (dx, dn) = (check.cuda.upload(&x)?, check.cuda.upload(&weight)?);
        let normed_by = Norm { weight: &dn, eps: 1e-5 };
        for n in [1, 31, 96, 130] {
            let (w, w2) =
                (matrix(check, dtype, n, hidden), matrix(check, dtype, n / 2 + 1, hidden));
            let (dw, dw2) = (check.cuda.matrix(&w)?, check.cuda.matrix(&w2)?);
            let bias = check.values(n, 1.0);
            let db = check.cuda.upload(&bias)?;
            for (by, row) in [(None, &x), (Some(normed_by), &normed)] {
                let mut expected = vec![0.0; n];
                let rows = Rows::dense(row, hidden);
                matmul::matmul(&check.cpu, rows, &w, Some(&bias), &mut expected);
                let mut second = vec![0.0; w2.n()];
                matmul::matmul(&check.cpu, rows, &w2, None, &mut second);
                let (out, out2) = (check.poisoned(n)?, check.poisoned(w2.n())?);
                let many = [
                    Linear { weight: &dw, bias: Some(&db), out: &out },
                    Linear { weight: &dw2, bias: None, out: &out2 },
                ];
                check.cuda.linear_one(&dx, by, &many, false)?;
                let name = format!("linear_one {dtype} {n}x{hidden} normed {}", by.is_some());
                check.same(&name, &out, &expected)?;
                check.same(&name, &out2, &second)?;
                check.cuda.linear_one(&dx, by, &many[..1], true)?;
                let mut sum = expected.clone();
                elementwise::add(&check.cpu, &mut sum, &expected);
                check.same(&format!("{name}, added"), &out, &sum)?;
            }
        }
        let weights: Vec<[PackedMatrix; 3]> = (0..count)
            .map(|_| {
                [
                    matrix(check, dtype, inter, hidden),
                    matrix(check, dtype, inter, hidden),
                    matrix(check, dtype, hidden, inter),
                ]
            })
            .collect();
        let gate = matrix(check, DType::F32, count, hidden);
        let mut scores = vec![0.0; count];
        matmul::matmul(&check.cpu, Rows::dense(&normed, hidden), &gate, None, &mut scores);
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let mut p = scores.clone();
        softmax::softmax(&mut p);
        let index: Vec<u32> = order[..k].iter().map(|&e| e as u32).collect();
        let gates: Vec<f32> = order[..k].iter().map(|&e| p[e]).collect();
        let mut parts = vec![vec![0.0f32; hidden]; k];
        let mut groups: Vec<SwigluGroup<'_, PackedMatrix>> = Vec::new();
        for (part, &e) in parts.iter_mut().zip(&order) {
            let [gate, up, down] = &weights[e];
            let weights = Swiglu { gate, up, down };
            groups.push(SwigluGroup { weights, rows: vec![&normed], outputs: vec![part] });
        }
        swiglu::swiglu_groups(&check.cpu, &mut groups);
        drop(groups);
        let slices: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        let mut expected = vec![0.0; hidden];
        elementwise::weighted_sum(&check.cpu, &slices, &gates, &[k as u32], &mut expected);
        let base = check.values(hidden, 1.0);
        let mut sum = base.clone();
        elementwise::add(&check.cpu, &mut sum, &expected);

        let mut keep = Vec::new();
        let mut table = vec![[0u64; 3]; count];
        for (e, matrices) in weights.iter().enumerate() {
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
        let names = check.cuda.upload(&[5u64])?;
        let dgate = check.cuda.matrix(&gate)?;
        let how = Choose {
            n: count,
            k,
            seed: 3,
            masks: None,
            tier_names: &names,
            level: 2,
            tiers: None,
            groups: None,
            parents: None,
            renormalise: false,
        };
        let routes = check.cuda.routes(count, k)?;
        let counters = check.cuda.filled::<u32>(hidden.div_ceil(32), 0)?;
        let between = check.poisoned(k * row_words(dtype, Math::Exact, inter))?;
        // Twice: counters come back to where they were.
        for _ in 0..2 {
            let (dparts, out) = (check.poisoned(k * hidden)?, check.cuda.upload(&base)?);
            check.cuda.fill(&routes.index, 0xA5)?;
            check.cuda.route_one(&dx, Some(normed_by), &dgate, how, &experts, &routes)?;
            check.cuda.swiglu_one(
                &dx,
                Some(normed_by),
                &experts,
                &routes,
                &between,
                &dparts,
                &counters,
                &out,
            )?;
            let name = format!("swiglu_one {dtype} {k} of {count}, {hidden}x{inter}");
            check.same_words(&name, &routes.index, &index)?;
            check.same(&name, &routes.weight, &gates)?;
            check.same(&name, &out, &sum)?;
        }
    }
    Ok(())
}

/// From products to attended values as one kernel, and with norms, rotary and append as one.
pub(super) fn steps(check: &mut Check<'_>, dtype: KvDType) -> Done {
    for (kv_heads, group, head_dim, whole) in [
        (16, 1, 128, true),
        (4, 8, 64, false),
        (2, 2, 80, false),
        (1, 3, 8, true),
        (2, 1, 252, true),
        (1, 12, 76, false),
        (1, 8, 128, false),
    ] {
        let shape = KvShape { layers: 2, kv_heads, head_dim, dtype };
        let (lengths, layer) = ([1usize, 64, 65, 256, 257, 700, 1500], 1);
        let per = |len: usize| len.div_ceil(PAGE_TOKENS);
        let pages: usize = lengths.iter().map(|&len| per(len)).sum();
        let cols = kv_heads * head_dim;
        for (window, mode) in [None, Some(1), Some(100), Some(300)].iter().zip([3, 0, 1, 2]) {
            let (has_norms, has_rotary) = (mode & 1 == 1, mode & 2 == 2);
            let mut arena = KvArena::new(shape, pages);
            let kv = check.cuda.kv(shape, pages, 0xff)?;
            let kv2 = check.cuda.kv(shape, pages, 0xff)?;
            let mut next = 0u32;
            let (mut tables, mut slots) = (Vec::new(), Vec::new());
            for len in lengths {
                let table: Vec<u32> = (0..per(len) as u32).rev().map(|i| next + i).collect();
                next += table.len() as u32;
                let at: Vec<KvSlot> = (0..len)
                    .map(|p| KvSlot {
                        page: table[p / PAGE_TOKENS],
                        offset: (p % PAGE_TOKENS) as u32,
                    })
                    .collect();
                let before = &at[..len - 1];
                if !before.is_empty() {
                    let k = check.values(before.len() * cols, 1.0);
                    let v = check.values(before.len() * cols, 1.0);
                    arena.append(&check.cpu, layer, &k, &v, before);
                    let on: Vec<[u32; 2]> = before.iter().map(|s| [s.page, s.offset]).collect();
                    let (dk, dv, on) =
                        (check.cuda.upload(&k)?, check.cuda.upload(&v)?, check.cuda.upload(&on)?);
                    check.cuda.kv_append(&kv, layer, &dk, &dv, &on)?;
                    check.cuda.kv_append(&kv2, layer, &dk, &dv, &on)?;
                }
                slots.push(at[len - 1]);
                tables.push(table);
            }
            let rows = lengths.len();
            let (q, k, v) = (
                check.values(rows * cols * group, 1.0),
                check.values(rows * cols, 1.0),
                check.values(rows * cols, 1.0),
            );
            let widths = if whole { (cols * group, cols) } else { (head_dim, head_dim) };
            let (nq, nk) = (check.values(widths.0, 1.0), check.values(widths.1, 1.0));
            let positions: Vec<u32> = lengths.iter().map(|&len| len as u32 - 1).collect();
            let inv: Vec<f32> = (0..head_dim / 2).map(|i| 1.0 / (1.0 + i as f32 * 3.7)).collect();
            let mut rotary = vec![0.0; rows * head_dim];
            rope::rotary_table(&check.cpu, &positions, &inv, 1.0, &mut rotary);
            let (mut eq, mut ek) = (q.clone(), k.clone());
            if has_norms {
                norm::rms_norm(&check.cpu, &q, &nq, 1e-5, &mut eq);
                norm::rms_norm(&check.cpu, &k, &nk, 1e-5, &mut ek);
            }
            if has_rotary {
                rope::rope(&check.cpu, &mut eq, head_dim, &rotary);
                rope::rope(&check.cpu, &mut ek, head_dim, &rotary);
            }
            arena.append(&check.cpu, layer, &ek, &v, &slots);
            let queries: Vec<Query<'_>> =
                (0..rows).map(|s| Query { pages: &tables[s], position: positions[s] }).collect();
            let mut expected = vec![0.0; q.len()];
            attention::attention(
                &check.cpu,
                &arena,
                layer,
                &eq,
                &queries,
                0.125,
                *window,
                &mut expected,
            );
            let stride = tables.iter().map(Vec::len).max().unwrap_or(0);
            let flat: Vec<u32> = tables
                .iter()
                .flat_map(|t| (0..stride).map(|i| t.get(i).copied().unwrap_or(u32::MAX)))
                .collect();
            let on = DevQueries {
                tables: check.cuda.upload(&flat)?,
                stride,
                positions: check.cuda.upload(&positions)?,
                longest: 1499,
            };
            let (dq, dk, dv) =
                (check.cuda.upload(&q)?, check.cuda.upload(&k)?, check.cuda.upload(&v)?);
            let (dnq, dnk, drotary) =
                (check.cuda.upload(&nq)?, check.cuda.upload(&nk)?, check.cuda.upload(&rotary)?);
            let heads = Heads {
                q: &dq,
                k: &dk,
                v: &dv,
                norms: has_norms.then_some((&dnq, &dnk, 1e-5)),
                rotary: has_rotary.then_some(&drotary),
            };
            let parts = check.cuda.attention_parts(rows, kv_heads * group, head_dim, on.longest)?;
            let name =
                format!("{dtype} {kv_heads}x{group}x{head_dim} window {window:?} mode {mode}");
            if check.cuda.attention_step_fits(&kv) {
                let counters = check.cuda.filled::<u32>(rows * kv_heads * group, 0)?;
                for _ in 0..2 {
                    let out = check.poisoned(q.len())?;
                    check.cuda.attention_step(
                        &kv, layer, heads, &on, 0.125, *window, &parts, &counters, &out,
                    )?;
                    check.same(&format!("attention_step {name}"), &out, &expected)?;
                }
                // What it kept is what others read.
                let (out, deq) = (check.poisoned(q.len())?, check.cuda.upload(&eq)?);
                check.cuda.attention(&kv, layer, &deq, &on, 0.125, *window, &parts, &out)?;
                check.same(&format!("kept by attention_step {name}"), &out, &expected)?;
            }
            let slots: Vec<[u32; 2]> = slots.iter().map(|s| [s.page, s.offset]).collect();
            check.cuda.heads_keep(&kv2, layer, heads, &check.cuda.upload(&slots)?)?;
            check.same(&format!("heads_keep, q {name}"), &dq, &eq)?;
            let out = check.poisoned(q.len())?;
            check.cuda.attention(&kv2, layer, &dq, &on, 0.125, *window, &parts, &out)?;
            check.same(&format!("heads_keep {name}"), &out, &expected)?;
        }
    }
    Ok(())
}

/// Products of many rows.
pub(super) fn tiles(check: &mut Check<'_>, dtype: DType) -> Done {
    for (m, n, k) in [
        (1, 33, 64),
        (70, 130, 256),
        (64, 128, 320),
        (129, 100, 512),
        (200, 257, 768),
        (65, 64, 2048),
        (130, 96, 2304),
        (64, 40, 4608),
        (3, 1, 9216),
        (64, 300, 2048),
        (61, 33, 512),
    ] {
        let w = matrix(check, dtype, n, k);
        let w2 = matrix(check, dtype, n / 2 + 1, k);
        let (x, bias) = (check.values(m * k, 1.0), check.values(n, 1.0));
        let mut expected = vec![0.0; m * n];
        matmul::matmul(&check.cpu, Rows::dense(&x, k), &w, Some(&bias), &mut expected);
        let mut second = vec![0.0; m * w2.n()];
        matmul::matmul(&check.cpu, Rows::dense(&x, k), &w2, None, &mut second);
        let rows = if dtype.is_quantised() { records(check, &x, k) } else { x.clone() };
        let (dw, dw2) = (check.cuda.matrix(&w)?, check.cuda.matrix(&w2)?);
        let (dx, db) = (check.cuda.upload(&rows)?, check.cuda.upload(&bias)?);
        let (out, out2) = (check.poisoned(m * n)?, check.poisoned(second.len())?);
        let many = [
            Linear { weight: &dw, bias: Some(&db), out: &out },
            Linear { weight: &dw2, bias: None, out: &out2 },
        ];
        let name = format!("tile {dtype} {m}x{n}x{k}");
        let spread = check.cuda.spread(16)?;
        check.cuda.linear_tiles(&dx, m, &many, false, Some(&spread))?;
        check.same(&format!("{name}, spread"), &out, &expected)?;
        check.same(&format!("{name}, spread, second"), &out2, &second)?;
        check.cuda.fill(&out, 0xA5)?;
        check.cuda.fill(&out2, 0xA5)?;
        check.cuda.linear_tiles(&dx, m, &many, false, None)?;
        check.same(&name, &out, &expected)?;
        check.same(&format!("{name}, second"), &out2, &second)?;
        check.cuda.linear_tiles(&dx, m, &many[..1], true, Some(&spread))?;
        let mut sum = expected.clone();
        elementwise::add(&check.cpu, &mut sum, &expected);
        check.same(&format!("{name}, added"), &out, &sum)?;
    }
    Ok(())
}

/// Attention of rows that follow each other.
pub(super) fn attention_rows(check: &mut Check<'_>) -> Done {
    for (kv_heads, group, head_dim) in [(2, 1, 128), (1, 3, 64)] {
        let dtype = KvDType::Bf16;
        let shape = KvShape { layers: 2, kv_heads, head_dim, dtype };
        // First position and rows of each chunk.
        let (chunks, layer) = ([(0u32, 1usize), (0, 700), (250, 70), (1111, 300)], 1);
        let per = |len: usize| len.div_ceil(PAGE_TOKENS);
        let len_of = |(from, rows): (u32, usize)| from as usize + rows;
        let pages: usize = chunks.iter().map(|&c| per(len_of(c))).sum();
        let mut arena = KvArena::new(shape, pages);
        let kv = check.cuda.kv(shape, pages, 0xff)?;
        let (cols, mut next) = (kv_heads * head_dim, 0u32);
        let (mut tables, mut rows, mut tiles) = (Vec::new(), Vec::new(), Vec::new());
        for (s, &chunk) in chunks.iter().enumerate() {
            let len = len_of(chunk);
            let table: Vec<u32> = (0..per(len) as u32).rev().map(|i| next + i).collect();
            next += table.len() as u32;
            let (k, v) = (check.values(len * cols, 1.0), check.values(len * cols, 1.0));
            let slots: Vec<KvSlot> = (0..len)
                .map(|p| KvSlot { page: table[p / PAGE_TOKENS], offset: (p % PAGE_TOKENS) as u32 })
                .collect();
            arena.append(&check.cpu, layer, &k, &v, &slots);
            let slots: Vec<[u32; 2]> = slots.iter().map(|s| [s.page, s.offset]).collect();
            let (dk, dv, ds) =
                (check.cuda.upload(&k)?, check.cuda.upload(&v)?, check.cuda.upload(&slots)?);
            check.cuda.kv_append(&kv, layer, &dk, &dv, &ds)?;
            tables.push(table);
            let mut from = 0;
            while from < chunk.1 {
                let count = (chunk.1 - from).min(64);
                tiles.push([rows.len() as u32, count as u32]);
                rows.extend((0..count).map(|r| (s, chunk.0 + (from + r) as u32)));
                from += count;
            }
        }
        let q = check.values(rows.len() * cols * group, 1.0);
        let queries: Vec<Query<'_>> =
            rows.iter().map(|&(s, position)| Query { pages: &tables[s], position }).collect();
        let stride = tables.iter().map(Vec::len).max().unwrap_or(0);
        let at = |s: usize, i: usize| tables[s].get(i).copied().unwrap_or(u32::MAX);
        let flat: Vec<u32> =
            rows.iter().flat_map(|&(s, _)| (0..stride).map(move |i| at(s, i))).collect();
        let positions: Vec<u32> = rows.iter().map(|&(_, p)| p).collect();
        let on = DevQueries {
            tables: check.cuda.upload(&flat)?,
            stride,
            positions: check.cuda.upload(&positions)?,
            longest: 1410,
        };
        let (dq, dt) = (check.cuda.upload(&q)?, check.cuda.upload(&tiles)?);
        let parts =
            check.cuda.attention_parts(rows.len(), kv_heads * group, head_dim, on.longest)?;
        for window in [None, Some(1), Some(100), Some(256), Some(700)] {
            let mut expected = vec![0.0; q.len()];
            let cpu = &check.cpu;
            attention::attention(cpu, &arena, layer, &q, &queries, 0.125, window, &mut expected);
            let out = check.poisoned(q.len())?;
            check.cuda.attention_rows(&kv, layer, &dq, &on, &dt, 0.125, window, &parts, &out)?;
            let name = format!("attention_rows {kv_heads}x{group}x{head_dim} window {window:?}");
            check.same(&name, &out, &expected)?;
        }
    }
    Ok(())
}
