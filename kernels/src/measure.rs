//! What this machine can do at best, to compare kernels with.

use std::{hint::black_box, time::Instant};

use crate::{
    buffer::AlignedBytes,
    cpu::Cpu,
    simd::{Simd, vectorised},
};

/// Bytes per second that all threads of `cpu` together read from a buffer of `bytes` bytes: the
/// best of several passes, in which each thread reads 1 to 8 places at a time.
/// A buffer much larger than the caches measures memory.
pub fn read_bandwidth(cpu: &Cpu, bytes: usize) -> f64 {
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
    [read_1, read_2, read_4, read_8]
        .into_iter()
        .flat_map(|read| [pass(read), pass(read), pass(read)])
        .fold(0.0, f64::max)
}

vectorised! {
    fn read_1(words: &[u64]) -> u64 {
        add_words::<1>(words)
    }
}

vectorised! {
    fn read_2(words: &[u64]) -> u64 {
        add_words::<2>(words)
    }
}

vectorised! {
    fn read_4(words: &[u64]) -> u64 {
        add_words::<4>(words)
    }
}

vectorised! {
    fn read_8(words: &[u64]) -> u64 {
        add_words::<8>(words)
    }
}

/// The sum of all words, read as N streams side by side.
#[inline(always)]
fn add_words<const N: usize>(words: &[u64]) -> u64 {
    const WIDTH: usize = 32;
    let part = words.len() / N;
    let streams: [&[u64]; N] = std::array::from_fn(|s| &words[s * part..(s + 1) * part]);
    let mut lanes = [0u64; WIDTH];
    for at in 0..part / WIDTH {
        for stream in &streams {
            let chunk = &stream[at * WIDTH..(at + 1) * WIDTH];
            for i in 0..WIDTH {
                lanes[i] = lanes[i].wrapping_add(chunk[i]);
            }
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
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
