//! Checks of `--math fast`: near the CPU's numbers, and the same bits for any number of rows, by any
//! kernel, in any chunk.

use lite_llm_kernels::{
    cuda::{
        Dev,
        fast::{Math, TILE_ROWS},
        launch::{Choose, DevQueries, Experts, Linear, VARIANTS},
        one::Norm,
    },
    device::{DeviceError, Swiglu, SwigluGroup},
    dtype::DType,
    kv::{KvDType, KvShape, KvSlot, PAGE_TOKENS, Query},
    matrix::PackedMatrix,
    ops::{arena::KvArena, attention, elementwise, matmul, norm, swiglu},
    rows::Rows,
};

use super::{
    checks::{Done, matrix},
    truth::Check,
};

/// Root mean square of what differs, of the expected values' own, at most.
const PRODUCTS: f64 = 2e-6;
const ROUNDED: f64 = 1e-2;

/// As bf16 keeps them.
fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter()
        .map(|&x| {
            let b = x.to_bits();
            f32::from_bits(b.wrapping_add(0x7fff + (b >> 16 & 1)) & 0xffff_0000)
        })
        .collect()
}

fn rows_of(
    check: &Check<'_>,
    x: &[f32],
    k: usize,
    m: usize,
) -> Result<(Dev<f32>, Dev<f32>), DeviceError> {
    let (dx, pairs) = (check.cuda.upload(x)?, check.poisoned(m * k.div_ceil(2))?);
    check.cuda.pair_rows(&dx, k, m, &pairs)?;
    Ok((dx, pairs))
}

pub(super) fn all(check: &mut Check<'_>, wanted: impl Fn(&str) -> bool) -> Done {
    for (name, what) in [
        ("fast-products", products as fn(&mut Check<'_>) -> Done),
        ("fast-experts", experts),
        ("fast-attention", attentions),
    ] {
        if wanted("fast") || wanted(name) {
            what(check)?;
            let (wrong, worst) = (check.wrong.len(), check.worst);
            println!("{name}: {wrong} differ; largest error {worst:.2} of its limit");
        }
    }
    Ok(())
}

fn products(check: &mut Check<'_>) -> Done {
    for (m, n, k) in [
        (1, 1, 1),
        (3, 33, 45),
        (9, 70, 255),
        (5, 31, 257),
        (17, 100, 800),
        (70, 130, 256),
        (129, 100, 512),
        (200, 257, 768),
        (300, 96, 2048),
        (130, 96, 2304),
        (64, 40, 4608),
        (3, 33, 9216),
        (65, 64, 1056),
    ] {
        let w = matrix(check, DType::Bf16, n, k);
        let dw = check.cuda.matrix(&w)?.by(Math::Fast);
        let (x, bias) = (check.values(m * k, 1.0), check.values(n, 1.0));
        let db = check.cuda.upload(&bias)?;
        let mut expected = vec![0.0; m * n];
        let near = rounded(&x);
        matmul::matmul(&check.cpu, Rows::dense(&near, k), &w, Some(&bias), &mut expected);
        // Row by row: what all others are to give.
        let mut base = Vec::new();
        for row in x.chunks(k) {
            let ((_, pairs), out) = (rows_of(check, row, k, 1)?, check.poisoned(n)?);
            let one = [Linear { weight: &dw, bias: Some(&db), out: &out }];
            check.cuda.matmul_by(VARIANTS[0], &pairs, 1, &one, false)?;
            base.extend(check.cuda.download(&out)?);
        }
        let name = format!("fast {m}x{n}x{k}");
        check.near(&name, &base, &expected, PRODUCTS);
        let (_, pairs) = rows_of(check, &x, k, m)?;
        for variant in VARIANTS {
            let out = check.poisoned(m * n)?;
            let many = [Linear { weight: &dw, bias: Some(&db), out: &out }];
            check.cuda.matmul_by(variant, &pairs, m, &many, false)?;
            check.same(&format!("{name} by {}", variant.name()), &out, &base)?;
        }
        let (fits, narrow) = (check.cuda.tensor_fits(k), check.narrow);
        for wide in [false, true].into_iter().filter(|&wide| fits && !(wide && narrow)) {
            check.cuda.set_wide(wide);
            let name = if wide { format!("{name} wide") } else { name.clone() };
            let out = check.poisoned(m * n)?;
            let many = [Linear { weight: &dw, bias: Some(&db), out: &out }];
            check.cuda.linear_tiles(&pairs, m, &many, false, None)?;
            check.same(&format!("{name} in tiles"), &out, &base)?;
            check.cuda.linear_tiles(&pairs, m, &many, true, None)?;
            let mut sum = base.clone();
            elementwise::add(&check.cpu, &mut sum, &base);
            check.same(&format!("{name} in tiles, added"), &out, &sum)?;
            check.cuda.set_wide(true);
        }
        let (out, dx) = (check.poisoned(n)?, check.cuda.upload(&x[..k])?);
        let one = [Linear { weight: &dw, bias: Some(&db), out: &out }];
        if check.cuda.one_linear_fits(k) {
            check.cuda.linear_one(&dx, None, &one, false)?;
            check.same(&format!("{name} of one row"), &out, &base[..n])?;
        }
        if check.cuda.one_fits(k) {
            // With its norm, and by a norm of its own.
            let weight = check.values(k, 1.0);
            let (dn, pairs) = (check.cuda.upload(&weight)?, check.poisoned(k / 2)?);
            check.cuda.norm_pairs(&dx, &dn, 1e-5, None, &pairs)?;
            check.cuda.matmul_by(VARIANTS[0], &pairs, 1, &one, false)?;
            let normed = check.cuda.download(&out)?;
            check.cuda.fill(&out, 0xA5)?;
            check.cuda.linear_one(&dx, Some(Norm { weight: &dn, eps: 1e-5 }), &one, false)?;
            check.same(&format!("{name} of one row, normed"), &out, &normed)?;
        }
    }
    Ok(())
}

fn experts(check: &mut Check<'_>) -> Done {
    for (hidden, inter, count, rows, k) in
        [(256, 256, 3, 1, 1), (96, 64, 5, 9, 2), (512, 288, 3, 200, 2), (2048, 1024, 4, 130, 2)]
    {
        let dtype = DType::Bf16;
        let weights: Vec<[PackedMatrix; 3]> = (0..count)
            .map(|_| [(inter, hidden), (inter, hidden), (hidden, inter)])
            .map(|shapes| shapes.map(|(n, k)| matrix(check, dtype, n, k)))
            .collect();
        let (mut keep, mut table) = (Vec::new(), vec![[0u64; 3]; count]);
        for (e, matrices) in weights.iter().enumerate() {
            for (i, w) in matrices.iter().enumerate() {
                let w = check.cuda.matrix(w)?;
                table[e][i] = w.data().address();
                keep.push(w);
            }
        }
        let table = check.cuda.upload(&table)?;
        let experts = Experts { dtype, math: Math::Fast, hidden, intermediate: inter, table };
        // Every row has k routes of different experts.
        let routes: Vec<u32> =
            (0..rows * k).map(|i| ((i / k * 7 + i % k + i / 31) % count) as u32).collect();
        let x = check.values(rows * hidden, 1.0);
        let near = rounded(&x);
        let mut parts = vec![vec![0.0f32; hidden]; rows * k];
        let mut groups: Vec<SwigluGroup<'_, PackedMatrix>> = Vec::new();
        for (route, part) in parts.iter_mut().enumerate() {
            let [gate, up, down] = &weights[routes[route] as usize];
            let row = &near[route / k * hidden..][..hidden];
            let weights = Swiglu { gate, up, down };
            groups.push(SwigluGroup { weights, rows: vec![row], outputs: vec![part] });
        }
        swiglu::swiglu_groups(&check.cpu, &mut groups);
        drop(groups);
        let expected = parts.concat();
        let (dx, pairs) = rows_of(check, &x, hidden, rows)?;
        let droutes = check.cuda.upload(&routes)?;
        let (mut base, narrow): (Option<Vec<f32>>, _) = (None, check.narrow);
        for (item_rows, wide) in [1, 4, 8, 16, 64, 128]
            .map(|rows| (rows, false))
            .into_iter()
            .chain([(64, true), (128, true)])
            .filter(|&(_, wide)| !(wide && narrow))
        {
            check.cuda.set_wide(wide);
            let grouped = check.cuda.grouped(routes.len(), count, item_rows)?;
            check.cuda.group_routes(&droutes, count, &grouped)?;
            let (between, out) =
                (check.poisoned(routes.len() * inter / 2)?, check.poisoned(expected.len())?);
            if item_rows <= 16 {
                check.cuda.swiglu_routes(&experts, &grouped, k, &pairs, &between, &out)?;
            } else {
                check.cuda.swiglu_tiles(&experts, &grouped, k, &pairs, &between, &out)?;
            }
            check.cuda.set_wide(true);
            let wide = if wide { " wide" } else { "" };
            let name =
                format!("fast experts {hidden}x{inter}, {rows} rows, items of {item_rows}{wide}");
            match &base {
                Some(base) => check.same(&name, &out, base)?,
                None => {
                    let found = check.cuda.download(&out)?;
                    check.near(&name, &found, &expected, ROUNDED);
                    base = Some(found);
                }
            }
        }
        if check.cuda.one_fits(hidden) && check.cuda.one_fits(inter) {
            one_row(check, &experts, &dx, rows)?;
        }
    }
    Ok(())
}

/// A single row by its own kernels and by those of many.
fn one_row(check: &mut Check<'_>, experts: &Experts, x: &Dev<f32>, rows: usize) -> Done {
    let (hidden, count, k) = (experts.hidden, experts.table.len(), 2);
    let row = check.cuda.upload(&check.cuda.download(x)?[(rows - 1) * hidden..])?;
    let weight = check.values(hidden, 1.0);
    let dn = check.cuda.upload(&weight)?;
    let gate = matrix(check, DType::F32, count, hidden);
    let (dgate, names) = (check.cuda.matrix(&gate)?, check.cuda.upload(&[5u64])?);
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
    let (routes, by) = (check.cuda.routes(count, k)?, Some(Norm { weight: &dn, eps: 1e-5 }));
    let counters = check.cuda.filled::<u32>(hidden.div_ceil(32), 0)?;
    let between = check.poisoned(k * experts.intermediate / 2)?;
    let (parts, out) = (check.poisoned(k * hidden)?, check.cuda.filled::<f32>(hidden, 0)?);
    check.cuda.route_one(&row, by, &dgate, how, experts, &routes)?;
    check.cuda.swiglu_one(&row, by, experts, &routes, &between, &parts, &counters, &out)?;
    let found = check.cuda.download(&out)?;

    let (mut normed, x) = (vec![0.0; hidden], check.cuda.download(&row)?);
    norm::rms_norm(&check.cpu, &x, &weight, 1e-5, &mut normed);
    let (_, pairs) = rows_of(check, &normed, hidden, 1)?;
    let grouped = check.cuda.grouped(k, count, 1)?;
    check.cuda.group_routes(&routes.index, count, &grouped)?;
    let out = check.cuda.filled::<f32>(hidden, 0)?;
    check.cuda.swiglu_routes(experts, &grouped, k, &pairs, &between, &parts)?;
    check.cuda.weighted_sum(&parts, &routes.weight, k, true, &out)?;
    check.same(&format!("fast experts of one row {hidden}"), &out, &found)
}

fn attentions(check: &mut Check<'_>) -> Done {
    for (kv_heads, group, head_dim) in [(2, 1, 128), (1, 3, 64), (1, 16, 128)] {
        let shape = KvShape { layers: 2, kv_heads, head_dim, dtype: KvDType::Bf16 };
        let (chunks, layer) = ([(0u32, 1usize), (0, 530), (250, 71), (1111, 40)], 1);
        let per = |len: usize| len.div_ceil(PAGE_TOKENS);
        let len_of = |(from, rows): (u32, usize)| from as usize + rows;
        let pages: usize = chunks.iter().map(|&c| per(len_of(c))).sum();
        let mut arena = KvArena::new(shape, pages);
        let kv = check.cuda.kv(shape, pages, 0xff)?;
        let (cols, mut next) = (kv_heads * head_dim, 0u32);
        let (mut tables, mut rows) = (Vec::new(), Vec::new());
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
            rows.extend((0..chunk.1).map(|r| (s, chunk.0 + r as u32)));
        }
        let q = check.values(rows.len() * cols * group, 1.0);
        let near = rounded(&q);
        let queries: Vec<Query<'_>> =
            rows.iter().map(|&(s, position)| Query { pages: &tables[s], position }).collect();
        let stride = tables.iter().map(Vec::len).max().unwrap_or(0);
        let at = |s: usize, i: usize| tables[s].get(i).copied().unwrap_or(u32::MAX);
        let flat: Vec<u32> =
            rows.iter().flat_map(|&(s, _)| (0..stride).map(move |i| at(s, i))).collect();
        let positions: Vec<u32> = rows.iter().map(|&(_, p)| p).collect();
        let (tables, positions) = (check.cuda.upload(&flat)?, check.cuda.upload(&positions)?);
        let on = DevQueries { tables, stride, positions, longest: 1150 };
        let (heads, dq) = (kv_heads * group, check.cuda.upload(&q)?);
        let parts = check.cuda.attention_parts(rows.len(), heads, head_dim, on.longest)?;
        // At the smaller scale many keys count.
        let windows = [(None, 0.125), (None, 0.004), (Some(1), 0.01)];
        let windows = windows.into_iter().chain([(Some(100), 0.01), (Some(700), 0.004)]);
        for (window, scale) in windows {
            let mut expected = vec![0.0; q.len()];
            let cpu = &check.cpu;
            attention::attention(cpu, &arena, layer, &near, &queries, scale, window, &mut expected);
            let out = check.poisoned(q.len())?;
            check.cuda.attention_fast(&kv, layer, &dq, &on, scale, window, &parts, &out)?;
            let base = check.cuda.download(&out)?;
            let name = format!(
                "fast attention {kv_heads}x{group}x{head_dim} window {window:?} scale {scale}"
            );
            check.near(&name, &base, &expected, ROUNDED);
            for most in [TILE_ROWS, 64, 7] {
                let (mut tiles, mut from) = (Vec::new(), 0);
                for chunk in chunks {
                    for r in (0..chunk.1).step_by(most) {
                        tiles.push([from + r as u32, (chunk.1 - r).min(most) as u32]);
                    }
                    from += chunk.1 as u32;
                }
                let (tiles, out) = (check.cuda.upload(&tiles)?, check.poisoned(q.len())?);
                check.cuda.attention_rows_fast(
                    &kv, layer, &dq, &on, &tiles, scale, window, &parts, &out,
                )?;
                check.same(&format!("{name} in tiles of {most}"), &out, &base)?;
            }
        }
    }
    Ok(())
}
