//! What this machine can do at best, to compare kernels with.

use std::{hint::black_box, time::Instant};

use crate::{buffer::AlignedBytes, cpu::Cpu, simd::vectorised};

/// Bytes per second that all threads of `cpu` together read from a buffer of `bytes` bytes:
/// the best of five passes. A buffer much larger than the caches measures memory.
pub fn read_bandwidth(cpu: &Cpu, bytes: usize) -> f64 {
    const PIECE: usize = 1 << 20;
    let pieces = (bytes / PIECE).max(1);
    let mut buffer = AlignedBytes::zeroed(pieces * PIECE);
    // Zeroed memory may all be one page until it is written.
    buffer.iter_mut().step_by(64).for_each(|byte| *byte = 1);
    let words: &[u64] = bytemuck::cast_slice(&buffer);
    let pass = || {
        let from = Instant::now();
        cpu.pool().run(pieces, &|i| {
            let words = &words[i * PIECE / 8..(i + 1) * PIECE / 8];
            black_box(add_words(cpu.simd(), words));
        });
        (pieces * PIECE) as f64 / from.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

vectorised! {
    fn add_words(words: &[u64]) -> u64 {
        let mut lanes = [0u64; 64];
        for chunk in words.as_chunks::<64>().0 {
            for i in 0..64 {
                lanes[i] = lanes[i].wrapping_add(chunk[i]);
            }
        }
        lanes.into_iter().fold(0, u64::wrapping_add)
    }
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
