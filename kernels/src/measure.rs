//! What this machine can do at best, to compare kernels with.

use std::{hint::black_box, time::Instant};

use crate::{
    buffer::AlignedBytes,
    cpu::Cpu,
    simd::{Kernel, Simd, Vector, vectorised},
};

/// Bytes per second that all threads of `cpu` together read from a buffer of `bytes` bytes, in the
/// best of several ways: each thread reads 1 to 8 places at a time, with and without asking for
/// what comes next. A way counts with the median of its passes, because memory that is shared
/// with others is faster one moment and slower the next.
/// A buffer much larger than the caches measures memory.
pub fn read_bandwidth(cpu: &Cpu, bytes: usize) -> f64 {
    const PASSES: usize = 5;
    const PIECE: usize = 1 << 20;
    let pieces = (bytes / PIECE).max(1);
    let mut buffer = AlignedBytes::zeroed(pieces * PIECE);
    // Zeroed memory may all be one page until it is written.
    buffer.iter_mut().step_by(64).for_each(|byte| *byte = 1);
    let words: &[u64] = bytemuck::cast_slice(&buffer);
    let pass = |read: fn(Simd, &[u64]) -> u64| {
        let from = Instant::now();
        cpu.pool().run(pieces, &|i| {
            let words = &words[i * PIECE / 8..(i + 1) * PIECE / 8];
            black_box(read(cpu.simd(), words));
        });
        (pieces * PIECE) as f64 / from.elapsed().as_secs_f64()
    };
    let ways: [fn(Simd, &[u64]) -> u64; 8] =
        [read_1, read_2, read_4, read_8, read_1_ahead, read_2_ahead, read_4_ahead, read_8_ahead];
    // The ways take turns.
    let passes = [(); PASSES].map(|()| ways.map(pass));
    let medians = (0..ways.len()).map(|way| {
        let mut rates = passes.map(|pass| pass[way]);
        rates.sort_by(f64::total_cmp);
        rates[PASSES / 2]
    });
    medians.fold(0.0, f64::max)
}

/// What the multipliers of all threads of `cpu` do at best, in operations per second (a product
/// and a sum are two): in f32, and in int8. Registers only; the best of several tries.
///
/// The second is derived from the first: VNNI multiplies four pairs of bytes where a fused
/// multiply-add does one of floats, and AVX2 needs two multiplying instructions for 32 pairs where
/// it has one for 8 floats.
pub fn peak_operations(cpu: &Cpu) -> (f64, f64) {
    const ROUNDS: usize = 1 << 18;
    let threads = cpu.pool().threads();
    let mut best = 0.0f64;
    for _ in 0..10 {
        let from = Instant::now();
        cpu.pool().run(threads, &|_| {
            black_box(cpu.simd().run(Multiply { rounds: black_box(ROUNDS) }));
        });
        let operations = 2 * threads * ROUNDS * CHAINS * cpu.simd().lanes();
        best = best.max(operations as f64 / from.elapsed().as_secs_f64());
    }
    let in_bytes = match cpu.simd().for_blocks() {
        Simd::Avx512 => 4.0,
        Simd::Avx2 => 2.0 * 8.0 / cpu.simd().lanes() as f64,
        // Plain code multiplies bytes no faster than floats.
        _ => 1.0,
    };
    (best, best * in_bytes)
}

/// Independent sums: enough that none waits for itself.
const CHAINS: usize = 12;

struct Multiply {
    rounds: usize,
}

impl Kernel for Multiply {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<V: Vector>(self) -> f32 {
        // SAFETY: promised by the caller; `out` holds a vector.
        unsafe {
            let (a, b) = (V::splat(black_box(1e-3)), V::splat(black_box(0.5)));
            let mut acc = [V::zero(); CHAINS];
            for _ in 0..self.rounds {
                for sum in &mut acc {
                    *sum = sum.fma(a, b);
                }
            }
            let mut out = [0.0; 16];
            let mut total = 0.0;
            for sum in acc {
                sum.store(out.as_mut_ptr());
                total += out[0];
            }
            total
        }
    }
}

vectorised! {
    fn read_1(words: &[u64]) -> u64 {
        add_words::<1, false>(words)
    }
}

vectorised! {
    fn read_2(words: &[u64]) -> u64 {
        add_words::<2, false>(words)
    }
}

vectorised! {
    fn read_4(words: &[u64]) -> u64 {
        add_words::<4, false>(words)
    }
}

vectorised! {
    fn read_8(words: &[u64]) -> u64 {
        add_words::<8, false>(words)
    }
}

vectorised! {
    fn read_1_ahead(words: &[u64]) -> u64 {
        add_words::<1, true>(words)
    }
}

vectorised! {
    fn read_2_ahead(words: &[u64]) -> u64 {
        add_words::<2, true>(words)
    }
}

vectorised! {
    fn read_4_ahead(words: &[u64]) -> u64 {
        add_words::<4, true>(words)
    }
}

vectorised! {
    fn read_8_ahead(words: &[u64]) -> u64 {
        add_words::<8, true>(words)
    }
}

/// Bytes from what is read to what is prefetched: the distance of products.
const AHEAD_BYTES: usize = 16 << 10;

/// The sum of all words, read as N streams side by side.
#[inline(always)]
fn add_words<const N: usize, const AHEAD: bool>(words: &[u64]) -> u64 {
    const WIDTH: usize = 32;
    let part = words.len() / N;
    let streams: [&[u64]; N] = std::array::from_fn(|s| &words[s * part..(s + 1) * part]);
    let mut lanes = [0u64; WIDTH];
    for at in 0..part / WIDTH {
        for stream in &streams {
            let chunk = &stream[at * WIDTH..(at + 1) * WIDTH];
            if AHEAD {
                ask_for(chunk.as_ptr().cast::<u8>().wrapping_add(AHEAD_BYTES), WIDTH * 8);
            }
            for i in 0..WIDTH {
                lanes[i] = lanes[i].wrapping_add(chunk[i]);
            }
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
}

/// Has cache lines fetched, where the machine can be asked.
#[inline(always)]
fn ask_for(from: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults, and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_takes_time() {
        let rate = read_bandwidth(&Cpu::best(2), 1 << 22);
        assert!(rate.is_finite() && rate > 0.0);
    }
}
