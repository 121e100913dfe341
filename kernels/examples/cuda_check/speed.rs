//! How fast the kernels are, beside the rate at which the card only reads.

use lite_llm_kernels::{
    cuda::{
        Cuda, Graph,
        fast::Math,
        launch::{DevQueries, Linear, VARIANTS, row_words},
    },
    device::DeviceError,
    dtype::DType,
    kv::{KvDType, KvShape},
};

type Done = Result<(), DeviceError>;

/// The median of several times in milliseconds, after some that do not count.
pub(crate) fn median(cuda: &Cuda, mut work: impl FnMut() -> Done) -> Result<f32, DeviceError> {
    let mut times = Vec::new();
    for i in 0..9 {
        let ms = cuda.time(&mut work)?;
        if i >= 2 {
            times.push(ms);
        }
    }
    times.sort_by(f32::total_cmp);
    Ok(times[times.len() / 2])
}

/// Bytes per second of a kernel that only reads 4 GiB.
pub(crate) fn reading(cuda: &Cuda) -> Result<f64, DeviceError> {
    let memory = cuda.filled::<u8>(4 << 30, 0)?;
    cuda.scramble(&memory, 1)?;
    let out = cuda.filled(1, 0)?;
    let ms = median(cuda, || cuda.read_all(&memory, &out))?;
    let rate = memory.len() as f64 / f64::from(ms) * 1e3;
    println!("reading only: {:.0} GB/s", rate / 1e9);
    Ok(rate)
}

pub(crate) fn all(cuda: &Cuda, peak: f64) -> Done {
    for dtype in [DType::Bf16, DType::Int8, DType::Int4, DType::F32] {
        products(cuda, dtype, peak)?;
    }
    for (dtype, name) in [(KvDType::Bf16, "bf16"), (KvDType::F32, "f32"), (KvDType::Int8, "int8")] {
        for (rows, context) in [(1, 512), (8, 512), (64, 512), (1, 8192)] {
            let shape = KvShape { layers: 1, kv_heads: 16, head_dim: 128, dtype };
            let pages = context / 64;
            // Several sets, so that they do not lie in the second cache.
            let sets = (400_000_000 / (rows * pages * shape.page_bytes())).clamp(1, 200);
            let kv = cuda.kv(shape, rows * pages * sets, 0x3c)?;
            let (q, out) =
                (cuda.filled::<f32>(rows * 2048, 0x3c)?, cuda.filled::<f32>(rows * 2048, 0)?);
            let positions = cuda.upload(&vec![context as u32 - 1; rows])?;
            let mut queries = Vec::new();
            for set in 0..sets {
                let tables: Vec<u32> =
                    (0..rows * pages).map(|i| (set * rows * pages + i) as u32).collect();
                let positions = cuda.upload(&cuda.download(&positions)?)?;
                queries.push(DevQueries {
                    tables: cuda.upload(&tables)?,
                    stride: pages,
                    positions,
                    longest: context - 1,
                });
            }
            let parts = cuda.attention_parts(rows, 16, 128, context - 1)?;
            let graph = captured(cuda, || {
                queries
                    .iter()
                    .try_for_each(|q_| cuda.attention(&kv, 0, &q, q_, 0.1, None, &parts, &out))
            })?;
            let ms = median(cuda, || cuda.replay(&graph))? / sets as f32;
            let rate = (rows * pages * shape.page_bytes()) as f64 / f64::from(ms) * 1e3;
            println!(
                "attention {name}, {rows} rows at context {context}: {:.1} us, {:.0} GB/s, {:.2} of reading",
                ms * 1e3,
                rate / 1e9,
                rate / peak
            );
        }
    }
    Ok(())
}

/// Once to load what it needs, then recorded.
pub(crate) fn captured(cuda: &Cuda, mut work: impl FnMut() -> Done) -> Result<Graph, DeviceError> {
    work()?;
    cuda.wait()?;
    Ok(cuda.capture(work)?.0)
}

fn products(cuda: &Cuda, dtype: DType, peak: f64) -> Done {
    for (n, k, what) in [(2048, 2048, "o"), (6144, 2048, "qkv"), (50304, 2048, "head")] {
        let one = cuda.matrix_of(dtype, n, k, 0)?;
        let bytes = one.data().len();
        drop(one);
        let count = (1_000_000_000 / bytes).clamp(2, 120);
        let mut weights = Vec::new();
        for i in 0..count {
            let w = cuda.matrix_of(dtype, n, k, 0)?;
            cuda.scramble(w.data(), i as u32)?;
            weights.push(w);
        }
        for m in [1, 2, 4, 8, 16, 64] {
            let x = cuda.filled::<f32>(m * row_words(dtype, Math::Exact, k), 0x3c)?;
            let out = cuda.filled::<f32>(m * n, 0)?;
            let chosen = cuda.variant(m, n / 32);
            let mut line = format!("{what} {dtype} [{n}, {k}] x {m}:");
            for variant in VARIANTS {
                if (m == 1) != variant.name().ends_with("x1")
                    || (m >= 16 && !variant.name().ends_with("x8"))
                {
                    continue;
                }
                let graph = captured(cuda, || {
                    weights.iter().try_for_each(|w| {
                        cuda.matmul_by(
                            variant,
                            &x,
                            m,
                            &[Linear { weight: w, bias: None, out: &out }],
                            false,
                        )
                    })
                })?;
                let ms = median(cuda, || cuda.replay(&graph))? / count as f32;
                let rate = bytes as f64 / f64::from(ms) * 1e3;
                let fma = (m * n * k) as f64 / f64::from(ms) / 1e9;
                line += &format!(
                    " {}{} {:.1}us {:.2} ({fma:.1}T)",
                    variant.name(),
                    if variant == chosen { "*" } else { "" },
                    ms * 1e3,
                    rate / peak
                );
            }
            println!("{line}");
        }
    }
    Ok(())
}
