//! Backward of attention beside f64, where sequences are longer than a leaf.

mod numbers;

use lite_llm_kernels::ops::attention_backward::{
    Attended, AttentionGradients, AttentionShape, attention_backward,
};
use numbers::{Numbers, assert_same, cpus};

/// Output and gradients of one sequence in f64: `[out, dq, dk, dv]`.
fn exact(shape: AttentionShape, len: usize, [q, k, v, dout]: [&[f32]; 4]) -> [Vec<f64>; 4] {
    let AttentionShape { heads, kv_heads, head_dim, scale, window } = shape;
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    let mut all = [wide, wide, narrow, narrow].map(|cols| vec![0.0f64; len * cols]);
    let [out, dq, dk, dv] = &mut all;
    let scale = f64::from(scale);
    for h in 0..heads {
        let (at, kv) = (h * head_dim, h / (heads / kv_heads) * head_dim);
        for i in 0..len {
            let from = window.map_or(0, |w| (i + 1).saturating_sub(w as usize));
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let query = &q[i * wide + at..][..head_dim];
            let of = &dout[i * wide + at..][..head_dim];
            let scores: Vec<f64> =
                (from..=i).map(|j| scale * dot(query, &k[j * narrow + kv..][..head_dim])).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let dp: Vec<f64> =
                (from..=i).map(|j| dot(of, &v[j * narrow + kv..][..head_dim])).collect();
            let along: f64 = dp.iter().zip(&weights).map(|(d, w)| d * w / total).sum();
            for (n, j) in (from..=i).enumerate() {
                let p = weights[n] / total;
                let ds = p * (dp[n] - along) * scale;
                for c in 0..head_dim {
                    out[i * wide + at + c] += p * f64::from(v[j * narrow + kv + c]);
                    dq[i * wide + at + c] += ds * f64::from(k[j * narrow + kv + c]);
                    dk[j * narrow + kv + c] += ds * f64::from(query[c]);
                    dv[j * narrow + kv + c] += p * f64::from(of[c]);
                }
            }
        }
    }
    all
}

#[test]
fn sequences_of_several_leaves_have_the_gradients_of_f64_and_one_threads_bits() {
    let lengths = [700usize, 3, 0, 520];
    let rows: usize = lengths.iter().sum();
    for (head_dim, window) in [(6, None), (6, Some(300)), (70, Some(40))] {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim, scale, window };
        let (wide, narrow) = (4 * head_dim, 2 * head_dim);
        let mut random = Numbers(11);
        let [q, dout] = [(); 2].map(|()| random.fill(rows * wide));
        let [k, v] = [(); 2].map(|()| random.fill(rows * narrow));
        let mut start = 0;
        let mut sequences = Vec::new();
        let mut expected: [Vec<f64>; 4] = Default::default();
        for len in lengths {
            let part = |x: &[f32], cols: usize| x[start * cols..(start + len) * cols].to_vec();
            let parts = [part(&q, wide), part(&k, narrow), part(&v, narrow), part(&dout, wide)];
            let found = exact(shape, len, parts.each_ref().map(|part| &part[..]));
            expected.iter_mut().zip(found).for_each(|(all, more)| all.extend(more));
            sequences.push(start..start + len);
            start += len;
        }
        let out: Vec<f32> = expected[0].iter().map(|x| *x as f32).collect();
        let mut first: Option<[Vec<f32>; 3]> = None;
        for cpu in cpus() {
            let mut found = [wide, narrow, narrow].map(|cols| vec![0.0; rows * cols]);
            let [dq, dk, dv] = &mut found;
            let given = Attended { q: &q, k: &k, v: &v, out: &out, dout: &dout };
            let into = AttentionGradients { dq, dk, dv };
            attention_backward(&cpu, shape, &sequences, given, into);
            for (what, (found, exact)) in
                ["dq", "dk", "dv"].iter().zip(found.iter().zip(&expected[1..]))
            {
                let norm = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
                let off = found.iter().zip(exact).map(|(f, e)| (f64::from(*f) - e).powi(2));
                let off = off.sum::<f64>().sqrt();
                assert!(norm > 0.1 && off < 1e-5 * norm, "{what} {window:?}: {off} of {norm}");
            }
            match &first {
                None => first = Some(found),
                Some(first) => found.iter().zip(first).for_each(|(f, e)| assert_same(f, e, "bits")),
            }
        }
    }
}
