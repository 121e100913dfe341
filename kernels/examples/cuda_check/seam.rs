//! Checks of what a whole pass needs beside its products: routes of all levels, tokens, sums over the
//! routes that there are, copies that nobody waits for.

use std::sync::Arc;

use lite_llm_kernels::{
    cuda::{Dev, copy::Lane, descend::TierShape, fast::Math, launch::Experts, sample::NONE},
    device::{DeviceError, Draw},
    dtype::DType,
    ops::{LEAF, elementwise, softmax, sum, tree},
};

use super::{
    checks::{Done, mix, random},
    truth::Check,
};

pub(super) fn all(check: &mut Check<'_>, wanted: impl Fn(&str) -> bool) -> Done {
    for (name, what) in [
        ("descend", descends as fn(&mut Check<'_>) -> Done),
        ("sample", samples),
        ("sums", sums),
        ("copies", copies),
    ] {
        if wanted("seam") || wanted(name) {
            what(check)?;
            println!("{name}: {} differ", check.wrong.len());
        }
    }
    Ok(())
}

fn tier(name: u64, groups: usize, experts: usize, k_group: usize, k_expert: usize) -> TierShape {
    TierShape { name: mix(name), groups, experts, k_group, k_expert }
}

/// The k best of some candidates and their probabilities, or the first score that is no number.
fn chosen(
    candidates: &[(u32, f32)],
    k: usize,
    hash: impl Fn(u32) -> u64,
) -> Result<Vec<(u32, f32)>, f32> {
    if let Some((_, bad)) = candidates.iter().find(|(_, score)| !score.is_finite()) {
        return Err(*bad);
    }
    let mut p: Vec<f32> = candidates.iter().map(|&(_, score)| score).collect();
    softmax::softmax(&mut p);
    let mut all: Vec<(u32, f32, f32)> =
        candidates.iter().zip(&p).map(|(&(i, score), &p)| (i, score, p)).collect();
    all.sort_by(|a, b| {
        let order = b.1.partial_cmp(&a.1).expect("finite scores");
        order.then_with(|| hash(a.0).cmp(&hash(b.0))).then(a.0.cmp(&b.0))
    });
    Ok(all.into_iter().take(k).map(|(i, _, p)| (i, p)).collect())
}

/// A row's routes as runtime/src/routing/hierarchical.rs chooses them, or 1 + the level that failed and
/// its score.
fn descended(
    tiers: &[TierShape],
    k_tier: usize,
    (seed, layer): (u64, usize),
    open: impl Fn(usize) -> bool,
    row: &[f32],
    renormalise: bool,
) -> Result<Vec<(u32, f32)>, (u32, f32)> {
    let place = |level: u64| random(seed, (layer as u64) << 8 | level);
    let numbered =
        |scores: &[f32]| -> Vec<(u32, f32)> { (0..).zip(scores.iter().copied()).collect() };
    let mut rest = row;
    let mut next = |count: usize| {
        let (gate, behind) = rest.split_at(count);
        rest = behind;
        gate
    };
    let tier_gate = (tiers.len() > 1).then(|| next(tiers.len()));
    let group_gates: Vec<Option<&[f32]>> =
        tiers.iter().map(|t| (t.groups > 1).then(|| next(t.groups))).collect();
    let expert_gates: Vec<Vec<&[f32]>> =
        tiers.iter().map(|t| (0..t.groups).map(|_| next(t.experts)).collect()).collect();
    assert!(rest.is_empty());
    let best_tiers = match tier_gate {
        None => vec![(0, 1.0)],
        Some(gate) => {
            let mut candidates = numbered(gate);
            candidates.retain(|&(tier, _)| open(tier as usize));
            let hash = |tier: u32| random(random(place(0), tiers[tier as usize].name), 0);
            chosen(&candidates, k_tier, hash).map_err(|score| (1, score))?
        }
    };
    // Gates are asked in order of tiers, then of tiers and groups: the first that fails is named.
    let mut failed: Option<(usize, u32, f32)> = None;
    let mut fails = |tier: usize, group: u32, score: f32| {
        if failed.is_none_or(|(t, g, _)| (tier, group) < (t, g)) {
            failed = Some((tier, group, score));
        }
    };
    let mut branches = Vec::new();
    for &(t, weight) in &best_tiers {
        let tier = &tiers[t as usize];
        let Some(gate) = group_gates[t as usize] else {
            branches.push((t, 0, weight * 1.0));
            continue;
        };
        let hash = |g: u32| random(random(place(1), tier.name), u64::from(g) << 32);
        match chosen(&numbered(gate), tier.k_group, hash) {
            Ok(groups) => branches.extend(groups.iter().map(|&(g, p)| (t, g, weight * p))),
            Err(score) => fails(t as usize, 0, score),
        }
    }
    if let Some((_, _, score)) = failed {
        return Err((2, score));
    }
    let mut fails = |tier: usize, group: u32, score: f32| {
        if failed.is_none_or(|(t, g, _)| (tier, group) < (t, g)) {
            failed = Some((tier, group, score));
        }
    };
    let mut routes = Vec::new();
    for &(t, g, weight) in &branches {
        let tier = &tiers[t as usize];
        let before: usize = tiers[..t as usize].iter().map(|t| t.groups * t.experts).sum();
        let hash = |e: u32| random(random(place(2), tier.name), u64::from(g) << 32 | u64::from(e));
        let gate = expert_gates[t as usize][g as usize];
        match chosen(&numbered(gate), tier.k_expert, hash) {
            Ok(experts) => routes.extend(
                experts
                    .iter()
                    .map(|&(e, p)| ((before + g as usize * tier.experts) as u32 + e, weight * p)),
            ),
            Err(score) => fails(t as usize, g, score),
        }
    }
    if let Some((_, _, score)) = failed {
        return Err((3, score));
    }
    let sum: f32 = routes.iter().map(|&(_, w)| w).sum();
    if renormalise && sum > 0.0 {
        routes.iter_mut().for_each(|(_, w)| *w /= sum);
    }
    Ok(routes)
}

fn descends(check: &mut Check<'_>) -> Done {
    let shapes: Vec<(Vec<TierShape>, usize)> = vec![
        (vec![tier(1, 1, 64, 1, 8)], 1),
        (vec![tier(1, 1, 8, 1, 2), tier(2, 4, 16, 2, 4)], 1),
        (
            vec![
                tier(1, 3, 5, 2, 2),
                tier(2, 1, 7, 1, 3),
                tier(3, 40, 3, 3, 2),
                tier(4, 2, 300, 2, 10),
            ],
            2,
        ),
        (vec![tier(1, 2, 3, 5, 9)], 1),
        ((0..40).map(|i| tier(i, 2, 33, 1, 4)).collect(), 5),
        (vec![tier(1, 1, 1000, 1, 40), tier(2, 1, 1, 1, 1)], 2),
        (vec![tier(1, 8, 128, 8, 16)], 1),
    ];
    let (rows, seed, layer) = (check.rows(4000), 11u64, 3usize);
    for (tiers, k_tier) in &shapes {
        for (ties, renormalise) in [(false, false), (true, true)] {
            let gates = check.cuda.gates(tiers, *k_tier, seed, renormalise)?;
            let (cols, most) = (gates.cols(), gates.routes());
            let mut scores = check.values(rows * cols, 4.0);
            if ties {
                scores.iter_mut().for_each(|x| *x = (*x / 2.0).round() * 2.0);
            }
            for row in 0..rows / 8 {
                let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][row % 3];
                // In every third of these rows in two places.
                for _ in 0..1 + usize::from(row % 3 == 0) {
                    scores[row * 8 * cols + check.below(cols)] = bad;
                }
            }
            let words = tiers.len().div_ceil(32);
            let mut masks: Vec<u32> =
                (0..rows * words).map(|_| check.bits() | check.bits()).collect();
            masks[3 * words..4 * words].fill(0);
            let (ds, dm) = (check.cuda.upload(&scores)?, check.cuda.upload(&masks)?);
            for masked in [false, true] {
                let open = |row: usize, t: usize| {
                    !masked || masks[row * words + t / 32] >> (t % 32) & 1 == 1
                };
                let (mut index, mut weight) = (vec![u32::MAX; rows * most], vec![0.0; rows * most]);
                let (mut count, mut bad) = (vec![0u32; rows], vec![0u32; 2 * rows]);
                for (row, scores) in scores.chunks(cols).enumerate() {
                    let at = (seed, layer);
                    match descended(tiers, *k_tier, at, |t| open(row, t), scores, renormalise) {
                        Ok(routes) => {
                            count[row] = routes.len() as u32;
                            for (r, (expert, w)) in routes.into_iter().enumerate() {
                                (index[row * most + r], weight[row * most + r]) = (expert, w);
                            }
                        }
                        Err((level, score)) => {
                            (bad[2 * row], bad[2 * row + 1]) = (level, score.to_bits());
                        }
                    }
                }
                let to = check.cuda.descended(&gates, rows)?;
                check.cuda.fill(&to.index, 0xA5)?;
                check.cuda.fill(&to.weight, 0xA5)?;
                check.cuda.fill(&to.count, 0xA5)?;
                check.cuda.fill(&to.bad, 0xA5)?;
                check.cuda.descend(&gates, layer, &ds, masked.then_some(&dm), &to)?;
                let name = format!(
                    "descend {} tiers, {cols} scores, ties {ties}, masks {masked}",
                    tiers.len()
                );
                check.same_words(&format!("{name}: routes"), &to.index, &index)?;
                check.same(&format!("{name}: weights"), &to.weight, &weight)?;
                check.same_words(&format!("{name}: counts"), &to.count, &count)?;
                check.same_pairs(&format!("{name}: failures"), &to.bad, &bad)?;
            }
        }
    }
    Ok(())
}

/// Rule 9 as runtime/src/sampler.rs writes it, without bias and penalties.
fn token(z: &[f32], d: Draw) -> u32 {
    let mut rank: Vec<u32> = (0..z.len() as u32).collect();
    rank.sort_by(|&a, &b| {
        z[b as usize].partial_cmp(&z[a as usize]).expect("finite logits").then(a.cmp(&b))
    });
    if d.temperature == 0.0 {
        return rank[0];
    }
    let mut weights = z.to_vec();
    softmax::weights(&mut weights, z[rank[0] as usize], d.temperature);
    let row = |ids: &[u32]| {
        let mut row = vec![0.0; z.len()];
        ids.iter().for_each(|&id| row[id as usize] = weights[id as usize]);
        row
    };
    if d.top_k > 0 {
        rank.truncate(d.top_k as usize);
    }
    if d.top_p < 1.0 {
        let wanted = d.top_p * sum::sum(&row(&rank));
        let (mut below, mut reaches) = (0, rank.len());
        while reaches - below > 1 {
            let middle = (below + reaches) / 2;
            match sum::sum(&row(&rank[..middle])) >= wanted {
                true => reaches = middle,
                false => below = middle,
            }
        }
        rank.truncate(reaches);
    }
    let mut kept = row(&rank);
    kept.iter_mut().for_each(|w| *w = if *w >= d.min_p { *w } else { 0.0 });
    let leaves = sum::leaf_sums(&kept);
    let mut left = d.unit * f64::from(tree::fold(leaves.iter().copied()));
    let mut take = |parts: &[f32]| {
        let mut last = 0;
        for (i, &part) in parts.iter().enumerate().filter(|(_, part)| **part > 0.0) {
            last = i;
            if left - f64::from(part) < 0.0 {
                return i;
            }
            left -= f64::from(part);
        }
        last
    };
    let from = take(&leaves) * LEAF;
    (from + take(&kept[from..z.len().min(from + LEAF)])) as u32
}

fn samples(check: &mut Check<'_>) -> Done {
    let base = Draw { temperature: 0.8, top_p: 1.0, min_p: 0.0, top_k: 0, unit: 0.0 };
    let settings = [
        Draw { temperature: 0.0, ..base },
        base,
        Draw { top_k: 40, ..base },
        Draw { top_k: 1, ..base },
        Draw { top_p: 0.7, ..base },
        Draw { top_p: 1e-6, ..base },
        Draw { min_p: 0.05, ..base },
        Draw { min_p: 1.0, ..base },
        Draw { top_k: 300, top_p: 0.5, temperature: 1.7, ..base },
        Draw { top_k: 700, top_p: 0.999, min_p: 0.01, ..base },
        Draw { temperature: 1e-30, ..base },
        Draw { temperature: 50.0, top_p: 0.95, ..base },
    ];
    for vocab in [1, 2, 255, 257, 1500, 8193, 50304, 151_936, 300_001] {
        // Alike in all, some equal, both zeros; or all equal; or like a model's.
        for kind in 0..3 {
            if vocab > 60_000 && kind == 1 {
                continue;
            }
            let rows = settings.len() * check.rows(if vocab > 9000 { 1 } else { 8 }).min(8) + 1;
            let mut logits = check.values(rows * vocab, 4.0);
            for z in &mut logits {
                *z = match kind {
                    0 if check.bits().is_multiple_of(7) => (*z).round(),
                    0 if check.bits().is_multiple_of(11) => z.signum() * 0.0,
                    0 => *z / 20.0,
                    1 => 0.5,
                    _ => *z,
                };
            }
            let draws: Vec<Draw> = (0..rows)
                .map(|row| {
                    let bits = u64::from(check.bits()) << 31 | u64::from(check.bits());
                    let unit = match row / settings.len() {
                        _ if row % 13 == 12 => 1.0 - 2f64.powi(-53),
                        _ if row % 13 == 11 => 0.0,
                        _ => (bits >> 9) as f64 / (1u64 << 53) as f64,
                    };
                    Draw { unit, ..settings[row % settings.len()] }
                })
                .collect();
            // The last row cannot be sampled.
            let (bad, last) = (check.below(vocab), (rows - 1) * vocab);
            logits[last + bad] = f32::INFINITY;
            logits[last + vocab - 1] = f32::NAN;
            let expected: Vec<u32> = logits
                .chunks(vocab)
                .zip(&draws)
                .enumerate()
                .flat_map(|(row, (z, &draw))| match row + 1 == rows {
                    true => [NONE, bad as u32],
                    false => [token(z, draw), NONE],
                })
                .collect();
            let name = format!("sample of {vocab}, kind {kind}");
            let (dl, dd) = (check.cuda.upload(&logits)?, check.cuda.upload(&draws)?);
            let weights = check.poisoned(logits.len())?;
            let out = check.cuda.filled::<[u32; 2]>(rows, 0xA5)?;
            check.cuda.sample(&dl, &dd, &weights, &out)?;
            check.same_pairs(&name, &out, &expected)?;
            let mut expected = vec![NONE; rows];
            expected[rows - 1] = bad as u32;
            let out = check.cuda.filled::<u32>(rows, 0xA5)?;
            check.cuda.finite(&dl, &out)?;
            check.same_words(&format!("{name}: finite"), &out, &expected)?;
        }
    }
    Ok(())
}

/// Rows that have fewer routes than others, and routes whose experts are elsewhere.
fn sums(check: &mut Check<'_>) -> Done {
    for (rows, per_row, cols) in [(1, 8, 7), (5, 3, 64), (64, 8, 2048)] {
        let counts: Vec<u32> = (0..rows).map(|r| ((r + per_row) % (per_row + 1)) as u32).collect();
        let mut parts = check.values(rows * per_row * cols, 1.0);
        let weights = check.values(rows * per_row, 1.0);
        let (mut slices, mut few, mut ends) = (Vec::<Vec<f32>>::new(), Vec::new(), Vec::new());
        for (row, &count) in counts.iter().enumerate() {
            for r in row * per_row..(row + 1) * per_row {
                if r - row * per_row < count as usize {
                    slices.push(parts[r * cols..][..cols].to_vec());
                    few.push(weights[r]);
                } else {
                    // What is not there must not be added even times 0.
                    parts[r * cols..][..cols].fill(f32::NAN);
                }
            }
            ends.push(slices.len() as u32);
        }
        let slices: Vec<&[f32]> = slices.iter().map(Vec::as_slice).collect();
        let mut expected = vec![0.0; rows * cols];
        elementwise::weighted_sum(&check.cpu, &slices, &few, &ends, &mut expected);
        let (dp, dw) = (check.cuda.upload(&parts)?, check.cuda.upload(&weights)?);
        let (dc, out) = (check.cuda.upload(&counts)?, check.poisoned(rows * cols)?);
        check.cuda.weighted_sum_of(&dp, &dw, Some(&dc), per_row, false, &out)?;
        check.same(&format!("weighted_sum of counts {rows}x{per_row}x{cols}"), &out, &expected)?;

        // Rows from elsewhere, put where they belong.
        let places: Vec<u32> = (0..rows as u32).rev().map(|r| r * per_row as u32).collect();
        let from = check.values(rows * cols, 1.0);
        let mut expected = parts.clone();
        for (&place, from) in places.iter().zip(from.chunks(cols)) {
            expected[place as usize * cols..][..cols].copy_from_slice(from);
        }
        let (df, dplaces) = (check.cuda.upload(&from)?, check.cuda.upload(&places)?);
        check.cuda.put_rows(&df, &dplaces, cols, &dp)?;
        check.same(&format!("put_rows {rows}x{cols}"), &dp, &expected)?;
    }
    for (routes, experts) in [(1, 1), (8, 64), (40, 3), (5000, 300)] {
        let table: Vec<[u64; 3]> =
            (0..experts).map(|_| [u64::from(check.below(3) != 0), 1, 1]).collect();
        let index: Vec<u32> = (0..routes)
            .map(|_| if check.below(9) == 0 { u32::MAX } else { check.below(experts) as u32 })
            .collect();
        let absent: Vec<u32> = (0..routes as u32)
            .filter(|&r| table.get(index[r as usize] as usize).is_some_and(|e| e[0] == 0))
            .collect();
        let mut expected = vec![absent.len() as u32];
        expected.extend(&absent);
        expected.resize(routes + 1, 0xA5A5_A5A5);
        let (dtype, math, table) = (DType::F32, Math::Exact, check.cuda.upload(&table)?);
        let of = Experts { dtype, math, hidden: 1, intermediate: 1, table };
        let (di, out) = (check.cuda.upload(&index)?, check.cuda.filled::<u32>(routes + 1, 0xA5)?);
        check.cuda.absent_routes(&di, &of, &out)?;
        check.same_words(&format!("absent of {routes} routes"), &out, &expected)?;
    }
    Ok(())
}

/// Pieces of locked memory go up on one stream while the other computes, and come back.
fn copies(check: &mut Check<'_>) -> Done {
    let cuda = check.cuda;
    let (count, len) = (12, check.rows(1 << 20).max(1000));
    let values = check.values(count * len, 1.0);
    let mut memory = cuda.pinned::<f32>(count * len + 5)?;
    check.done += 1;
    if memory.iter().any(|&x| x.to_bits() != 0) {
        check.wrong.push("locked memory does not begin as zeros".into());
    }
    memory[..count * len].copy_from_slice(&values);
    let mut pieces: Vec<_> = memory.split(len).into_iter().map(Arc::new).collect();
    check.done += 1;
    if pieces.len() != count + 1 || pieces[count].len() != 5 {
        check.wrong.push("locked memory is split otherwise".into());
    }
    pieces.truncate(count);
    // Two buffers in turns: each is written again when the sum that reads it is done.
    let sum = cuda.filled::<f32>(len, 0)?;
    let buffers: [Dev<f32>; 2] = [check.poisoned(len)?, check.poisoned(len)?];
    let mut under_way = Vec::new();
    let mut read = Vec::new();
    for (i, piece) in pieces.iter().enumerate() {
        if i >= 2 {
            cuda.stream_wait(Lane::Copy, &read[i - 2])?;
        }
        let (to, half) = (&buffers[i % 2], len / 2);
        under_way.push(cuda.upload_async(Lane::Copy, piece, 0..half, to, 0)?);
        under_way.push(cuda.upload_async(Lane::Copy, piece, half..len, to, half)?);
        cuda.stream_wait(Lane::Compute, under_way[2 * i + 1].event())?;
        cuda.add(&sum, to)?;
        read.push(cuda.record(Lane::Compute)?);
    }
    let back = cuda.download_async(Lane::Compute, &sum, 1..len, cuda.pinned(len)?)?;
    let back = cuda.arrived(back)?;
    for event in &read {
        check.done += 1;
        if !cuda.has_passed(event)? {
            check.wrong.push("an event before what has come has not passed".into());
        }
    }
    drop(under_way);
    check.done += 1;
    if pieces.iter_mut().any(|piece| Arc::get_mut(piece).is_none()) {
        check.wrong.push("a piece is held by a copy that has ended".into());
    }
    let mut expected = vec![0.0; len];
    values.chunks(len).for_each(|piece| elementwise::add(&check.cpu, &mut expected, piece));
    let found = cuda.upload(&back[..len - 1])?;
    check.same("sums of what was copied", &found, &expected[1..])?;
    check.done += 1;
    let recorded = cuda.capture(|| {
        let copy = cuda.upload_async(Lane::Compute, &pieces[0], 0..1, &sum, 0);
        copy.map(drop)
    });
    if recorded.is_ok() {
        check.wrong.push("a copy that nobody waits for was recorded".into());
    }
    Ok::<(), DeviceError>(())
}
