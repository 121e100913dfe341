//! Attention over the paged cache: close to f64 arithmetic, with the bits of the rule as written
//! down here a second time, whatever the pages, the batch, the chunks and the CPU.

use lite_llm_kernels::{
    cpu::{Cpu, Tensor},
    device::Device,
    kv::{KvDType, KvShape, KvSlot, PAGE_TOKENS, Query},
    ops::{arena::KvArena, function::exp},
    simd::Simd,
};

mod numbers;
use numbers::{Numbers, assert_same, cpus};

/// Keys, values and queries of one sequence; row p belongs to position p.
struct Sequence {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dtype: KvDType,
}

/// What the cache keeps: numbers, and a scale per position and key/value head.
struct Kept {
    k: (Vec<f32>, Vec<f32>),
    v: (Vec<f32>, Vec<f32>),
}

/// Rows of heads as a format keeps them: numbers and scales, 1 where there are none.
fn kept(dtype: KvDType, values: &[f32], head_dim: usize, keys: bool) -> (Vec<f32>, Vec<f32>) {
    let (mut numbers, mut scales) = (Vec::new(), Vec::new());
    for head in values.chunks(head_dim) {
        let poison = |x: f32| if keys && !x.is_finite() { f32::NAN } else { x };
        let largest = head.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        match dtype {
            KvDType::F32 => numbers.extend(head.iter().map(|&x| poison(x))),
            KvDType::Bf16 => {
                numbers.extend(head.iter().map(|&x| poison(half::bf16::from_f32(x).to_f32())))
            }
            KvDType::Int8 if head.iter().any(|x| !x.is_finite()) => {
                numbers.extend(head.iter().map(|_| 0.0));
            }
            KvDType::Int8 => numbers.extend(head.iter().map(|x| match largest / 127.0 {
                0.0 => 0.0,
                s => (x / s).round_ties_even().clamp(-127.0, 127.0),
            })),
        }
        scales.push(match dtype {
            KvDType::Int8 if head.iter().any(|x| !x.is_finite()) => f32::NAN,
            KvDType::Int8 => largest / 127.0,
            _ => 1.0,
        });
    }
    (numbers, scales)
}

impl Sequence {
    fn new(seed: u64, kv_heads: usize, group: usize, head_dim: usize, len: usize) -> Self {
        let mut numbers = Numbers(seed);
        let kv = kv_heads * head_dim;
        let q = numbers.fill(len * kv * group).iter().map(|x| x * 4.0).collect();
        let (k, v) = (numbers.fill(len * kv), numbers.fill(len * kv));
        Self { kv_heads, group, head_dim, len, q, k, v, dtype: KvDType::F32 }
    }

    fn kept(&self) -> Kept {
        let kept = |values: &[f32], keys| kept(self.dtype, values, self.head_dim, keys);
        Kept { k: kept(&self.k, true), v: kept(&self.v, false) }
    }

    fn cols(&self) -> usize {
        self.kv_heads * self.group * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Pages in an order that is not that of memory.
    fn pages(&self) -> Vec<u32> {
        let count = self.len.div_ceil(PAGE_TOKENS) as u32;
        (0..count).map(|p| count - 1 - p).collect()
    }

    fn slots(&self, from: usize, to: usize) -> Vec<KvSlot> {
        let pages = self.pages();
        (from..to)
            .map(|p| KvSlot { page: pages[p / PAGE_TOKENS], offset: (p % PAGE_TOKENS) as u32 })
            .collect()
    }

    fn empty_arena(&self, cpu: &Cpu) -> KvArena {
        let shape = KvShape {
            layers: 2,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            dtype: self.dtype,
        };
        cpu.kv_arena(shape, self.pages().len()).unwrap()
    }

    fn append(&self, cpu: &Cpu, arena: &mut KvArena, from: usize, to: usize) {
        let cols = self.kv_heads * self.head_dim;
        let rows = |values: &[f32]| {
            let mut t = Tensor::zeros(to - from, cols);
            t.as_mut_slice().copy_from_slice(&values[from * cols..to * cols]);
            t
        };
        let (k, v) = (rows(&self.k), rows(&self.v));
        cpu.kv_append(arena, 1, &k, &v, &self.slots(from, to)).unwrap();
    }

    /// Attention of the rows at `positions`.
    fn attend(
        &self,
        cpu: &Cpu,
        arena: &KvArena,
        positions: &[usize],
        window: Option<u32>,
    ) -> Vec<f32> {
        let (cols, pages) = (self.cols(), self.pages());
        let (mut q, mut out) =
            (Tensor::zeros(positions.len(), cols), Tensor::zeros(positions.len(), cols));
        out.as_mut_slice().fill(f32::NAN);
        for (row, &p) in q.as_mut_slice().chunks_mut(cols).zip(positions) {
            row.copy_from_slice(&self.q[p * cols..][..cols]);
        }
        let queries: Vec<Query<'_>> =
            positions.iter().map(|&p| Query { pages: &pages, position: p as u32 }).collect();
        cpu.attention(arena, 1, &q, &queries, self.scale(), window, &mut out).unwrap();
        out.as_slice().to_vec()
    }

    fn key_value(&self, position: usize, head: usize) -> (&[f32], &[f32]) {
        let at = (position * self.kv_heads + head / self.group) * self.head_dim;
        (&self.k[at..][..self.head_dim], &self.v[at..][..self.head_dim])
    }

    fn query(&self, position: usize, head: usize) -> &[f32] {
        &self.q[position * self.cols() + head * self.head_dim..][..self.head_dim]
    }

    /// The rule, one head after another.
    fn by_the_rule(&self, position: usize, window: Option<u32>) -> Vec<f32> {
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w as usize));
        let (kept, mut out) = (self.kept(), Vec::new());
        for head in 0..self.kv_heads * self.group {
            let at = |position: usize| position * self.kv_heads + head / self.group;
            let numbers = |all: &[f32], position: usize| {
                all[at(position) * self.head_dim..][..self.head_dim].to_vec()
            };
            let leaf = |leaf: usize| {
                let seen = first.max(leaf * 256)..(position + 1).min((leaf + 1) * 256);
                if seen.is_empty() {
                    return None;
                }
                let scores: Vec<f32> = seen
                    .clone()
                    .map(|p| (p, rule_1(self.query(position, head), &numbers(&kept.k.0, p))))
                    .map(|(p, dot)| dot * kept.k.1[at(p)] * self.scale())
                    .collect();
                let max = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
                let mut l = [0.0f32; 8];
                let mut acc = vec![0.0f32; self.head_dim];
                for (p, score) in seen.zip(scores) {
                    let weight = exp(score - max);
                    l[p % 8] += weight;
                    let weight = weight * kept.v.1[at(p)];
                    for (x, v) in acc.iter_mut().zip(numbers(&kept.v.0, p)) {
                        *x = weight.mul_add(v, *x);
                    }
                }
                let sum = ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
                Some((max, sum, acc))
            };
            let (_, total, acc) = node(0, position / 256 + 1, &leaf).expect("a row sees itself");
            out.extend(acc.iter().map(|x| x / total));
        }
        out
    }

    /// Plain softmax attention in f64.
    fn exact(&self, position: usize, window: Option<u32>) -> Vec<f64> {
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w as usize));
        let mut out = Vec::new();
        for head in 0..self.kv_heads * self.group {
            let scores: Vec<f64> = (first..=position)
                .map(|p| {
                    let k = self.key_value(p, head).0;
                    let q = self.query(position, head);
                    let dot: f64 =
                        q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(self.scale())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..self.head_dim).map(|d| {
                let values = (first..=position).map(|p| f64::from(self.key_value(p, head).1[d]));
                values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / total
            }));
        }
        out
    }
}

/// What leaves or nodes give: the largest score, the sum of weights, sums of values.
type Node = (f32, f32, Vec<f32>);

/// The tree over leaves `from..to`, from the root down.
fn node(from: usize, to: usize, leaf: &impl Fn(usize) -> Option<Node>) -> Option<Node> {
    if to - from == 1 {
        return leaf(from);
    }
    let middle = from + (1 << (to - from - 1).ilog2());
    match (node(from, middle, leaf), node(middle, to, leaf)) {
        (Some((m, s, a)), Some((later_m, later_s, later_a))) => {
            let max = m.max(later_m);
            let (e, f) = (exp(m - max), exp(later_m - max));
            let acc = a.iter().zip(&later_a).map(|(a, b)| a * e + b * f).collect();
            Some((max, s * e + later_s * f, acc))
        }
        (earlier, later) => earlier.or(later),
    }
}

/// A product by rule 1, for up to three leaves.
fn rule_1(x: &[f32], w: &[f32]) -> f32 {
    let leaf =
        |(x, w): (&[f32], &[f32])| x.iter().zip(w).fold(0.0f32, |acc, (x, w)| x.mul_add(*w, acc));
    let leaves: Vec<f32> = x.chunks(256).zip(w.chunks(256)).map(leaf).collect();
    match leaves[..] {
        [a] => a,
        [a, b] => a + b,
        [a, b, c] => (a + b) + c,
        _ => panic!("too many leaves for this test"),
    }
}

/// Formats of the cache, and how far results may be from exact ones of the numbers given.
const FORMATS: [(KvDType, f64); 3] =
    [(KvDType::F32, 2e-6), (KvDType::Bf16, 2e-2), (KvDType::Int8, 5e-2)];

#[test]
fn rows_have_the_bits_of_the_rule_and_are_close_to_exact() {
    let cpus = cpus();
    for (kv_heads, group, head_dim) in [
        (1, 1, 2),
        (2, 3, 10),
        (2, 1, 64),
        (1, 4, 48),
        (2, 7, 36),
        (1, 6, 128),
        (1, 2, 300),
        (1, 1, 520),
    ] {
        for (dtype, bound) in FORMATS {
            let mut sequence = Sequence::new(7, kv_heads, group, head_dim, 140);
            sequence.dtype = dtype;
            for window in [None, Some(1), Some(5), Some(64), Some(65), Some(100)] {
                let positions = [0, 1, 62, 63, 64, 65, 127, 128, 139];
                let expected: Vec<f32> =
                    positions.iter().flat_map(|&p| sequence.by_the_rule(p, window)).collect();
                let exact = positions.iter().flat_map(|&p| sequence.exact(p, window));
                for (e, exact) in expected.iter().zip(exact) {
                    assert!((f64::from(*e) - exact).abs() < bound, "{e} against {exact}");
                }
                for cpu in &cpus {
                    let mut arena = sequence.empty_arena(cpu);
                    sequence.append(cpu, &mut arena, 0, sequence.len);
                    let found = sequence.attend(cpu, &arena, &positions, window);
                    let what = format!(
                        "{kv_heads}x{group}x{head_dim} {dtype} window {window:?} on {cpu:?}"
                    );
                    assert_same(&found, &expected, &what);
                }
            }
        }
    }
}

#[test]
fn chunks_of_the_prompt_and_company_in_the_batch_change_nothing() {
    let sequence = Sequence::new(11, 2, 2, 40, 200);
    let all: Vec<usize> = (0..200).collect();
    for cpu in cpus().into_iter().filter(|cpu| cpu.simd() != Simd::Scalar) {
        let mut whole = sequence.empty_arena(&cpu);
        sequence.append(&cpu, &mut whole, 0, 200);
        for window in [None, Some(70)] {
            let together = sequence.attend(&cpu, &whole, &all, window);
            for chunk in [1, 7, 64] {
                // As in a prefill: a chunk is appended, then its rows attend.
                let mut arena = sequence.empty_arena(&cpu);
                let mut found = Vec::new();
                for positions in all.chunks(chunk) {
                    let (from, to) = (positions[0], positions[0] + positions.len());
                    sequence.append(&cpu, &mut arena, from, to);
                    found.extend(sequence.attend(&cpu, &arena, positions, window));
                }
                assert_same(&found, &together, &format!("chunks of {chunk} on {cpu:?}"));
            }
        }
    }
}

#[test]
fn leaves_meet_in_the_tree_whatever_the_chunks_and_windows_leave_out() {
    let sequence = Sequence::new(31, 1, 2, 18, 1600);
    // The first and last of leaves, and what straddles them.
    let positions: Vec<usize> =
        (0..1600).filter(|p| [0, 1, 128, 254, 255].contains(&(p % 256)) || *p > 1590).collect();
    let cpus = cpus();
    for window in [None, Some(1), Some(200), Some(256), Some(257), Some(700), Some(1300)] {
        let expected: Vec<f32> =
            positions.iter().flat_map(|&p| sequence.by_the_rule(p, window)).collect();
        for cpu in &cpus {
            let mut arena = sequence.empty_arena(cpu);
            sequence.append(cpu, &mut arena, 0, sequence.len);
            for chunk in [1, 5, positions.len()] {
                let found: Vec<f32> = positions
                    .chunks(chunk)
                    .flat_map(|positions| sequence.attend(cpu, &arena, positions, window))
                    .collect();
                let what = format!("window {window:?}, {chunk} rows at a time on {cpu:?}");
                assert_same(&found, &expected, &what);
            }
        }
    }
}

#[test]
fn keys_that_are_not_visible_are_not_touched() {
    let mut sequence = Sequence::new(13, 1, 5, 33, 190);
    let window = Some(40);
    let positions = [100, 128, 130];
    let cpu = Cpu::best(2);
    let expected: Vec<Vec<f32>> =
        positions.iter().map(|&p| sequence.by_the_rule(p, window)).collect();
    for (&position, expected) in positions.iter().zip(&expected) {
        let clean = (sequence.k.clone(), sequence.v.clone());
        for p in (0..190).filter(|p| *p > position || *p + 40 <= position) {
            sequence.k[p * 33..(p + 1) * 33].fill(f32::NAN);
            sequence.v[p * 33..(p + 1) * 33].fill(f32::INFINITY);
        }
        let mut arena = sequence.empty_arena(&cpu);
        sequence.append(&cpu, &mut arena, 0, 190);
        let found = sequence.attend(&cpu, &arena, &[position], window);
        assert_same(&found, expected, &format!("position {position}"));
        (sequence.k, sequence.v) = clean;
    }
}

#[test]
fn a_visible_nan_reaches_its_heads_and_no_other_row() {
    let mut sequence = Sequence::new(17, 2, 1, 24, 80);
    sequence.k[50 * 48 + 3] = f32::NAN;
    for cpu in cpus() {
        let mut arena = sequence.empty_arena(&cpu);
        sequence.append(&cpu, &mut arena, 0, 80);
        let found = sequence.attend(&cpu, &arena, &[49, 50, 79], None);
        let rows: Vec<&[f32]> = found.chunks(24).collect();
        for (i, row) in rows.iter().enumerate() {
            let poisoned = i == 2 || i == 4;
            assert!(row.iter().all(|x| x.is_nan() == poisoned), "head {i} on {cpu:?}");
        }
    }
}

#[test]
fn pages_take_memory_when_they_are_first_written() {
    let cpu = Cpu::best(1);
    let sequence = Sequence::new(19, 1, 1, 8, 70);
    let mut arena = cpu
        .kv_arena(KvShape { layers: 2, kv_heads: 1, head_dim: 8, dtype: KvDType::F32 }, 1000)
        .unwrap();
    assert_eq!((arena.pages(), arena.pages_written()), (1000, 0));
    sequence.append(&cpu, &mut arena, 0, 3);
    assert_eq!(arena.pages_written(), 1);
    sequence.append(&cpu, &mut arena, 3, 70);
    assert_eq!(arena.pages_written(), 2);
}

#[test]
fn few_rows_with_many_keys_have_the_bits_of_the_rule_on_any_threads() {
    for (kv_heads, group, head_dim) in [(1, 4, 64), (1, 13, 48), (3, 1, 100)] {
        for (dtype, _) in FORMATS {
            let mut sequence = Sequence::new(23, kv_heads, group, head_dim, 1100);
            sequence.dtype = dtype;
            for window in [None, Some(900), Some(300)] {
                let positions = [700, 960, 1050, 1099];
                let expected: Vec<f32> =
                    positions.iter().flat_map(|&p| sequence.by_the_rule(p, window)).collect();
                for cpu in cpus() {
                    let mut arena = sequence.empty_arena(&cpu);
                    sequence.append(&cpu, &mut arena, 0, sequence.len);
                    let found = sequence.attend(&cpu, &arena, &positions, window);
                    let what = format!("{kv_heads}x{group}x{head_dim} {dtype} on {cpu:?}");
                    assert_same(&found, &expected, &what);
                    let alone = sequence.attend(&cpu, &arena, &positions[3..], window);
                    assert_same(&alone, &expected[3 * sequence.cols()..], &what);
                }
            }
        }
    }
}

#[test]
fn numbers_of_every_kind_have_the_bits_of_the_rule() {
    for seed in 0..12 {
        for (dtype, _) in FORMATS {
            let (kv_heads, group, head_dim) = (2, 2, 24);
            let mut sequence = Sequence::new(seed, kv_heads, group, head_dim, 90);
            sequence.dtype = dtype;
            let mut numbers = Numbers(seed + 100);
            let size = [1.0, 1e-20, 1e-38][seed as usize % 3];
            for values in [&mut sequence.q, &mut sequence.k, &mut sequence.v] {
                *values = numbers.wild(values.len()).iter().map(|x| x * size).collect();
            }
            if seed >= 9 {
                sequence.k.fill(if seed == 9 { 0.0 } else { 1e-45 });
                sequence.v[..1000].fill(-0.0);
            }
            let positions = [0, 40, 70, 89];
            let expected: Vec<f32> =
                positions.iter().flat_map(|&p| sequence.by_the_rule(p, Some(60))).collect();
            for cpu in cpus() {
                let mut arena = sequence.empty_arena(&cpu);
                sequence.append(&cpu, &mut arena, 0, 90);
                let found = sequence.attend(&cpu, &arena, &positions, Some(60));
                assert_same(&found, &expected, &format!("seed {seed}, {dtype} on {cpu:?}"));
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so_wherever_it_is_seen_and_nowhere_else() {
    let cpu = Cpu::best(2);
    for (dtype, _) in FORMATS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for which in ["q", "k", "v"] {
                let mut sequence = Sequence::new(29, 2, 1, 24, 80);
                sequence.dtype = dtype;
                match which {
                    "q" => sequence.q[50 * 48 + 3] = bad,
                    "k" => sequence.k[50 * 48 + 3] = bad,
                    _ => sequence.v[50 * 48 + 3] = bad,
                }
                let mut arena = sequence.empty_arena(&cpu);
                sequence.append(&cpu, &mut arena, 0, 80);
                let found = sequence.attend(&cpu, &arena, &[49, 50, 79], None);
                for (i, head) in found.chunks(24).enumerate() {
                    let poisoned = i == 2 || i == 4 && which != "q";
                    let finite = head.iter().all(|x| x.is_finite());
                    assert_eq!(finite, !poisoned, "{bad} in {which}, {dtype}, head {i}: {head:?}");
                }
            }
        }
    }
}

#[test]
fn pages_of_smaller_formats_are_smaller() {
    let bytes = KvDType::ALL
        .map(|dtype| KvShape { layers: 3, kv_heads: 2, head_dim: 128, dtype }.page_bytes());
    let numbers = 3 * 2 * 2 * 128 * PAGE_TOKENS;
    assert_eq!(bytes, [4 * numbers, 2 * numbers, numbers + 3 * 2 * 2 * PAGE_TOKENS * 4]);
    for dtype in KvDType::ALL {
        assert_eq!(dtype.name().parse(), Ok(dtype));
    }
    assert!("fp8".parse::<KvDType>().unwrap_err().to_string().contains("int8"));
}
