//! Counter-based random numbers: a function of (seed, purpose, index), never of call order.

/// What a random number is for; equal seeds give independent streams for different purposes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Choosing a token; the index is the token's position.
    Sampling = 1,
    /// Ordering candidates of equal score; the index names layer, level and candidate.
    TieBreak = 2,
    /// Initial or test weights; the index is the element's.
    Weights = 3,
    /// Which node an expert is placed on, where that is asked to be random.
    Placement = 4,
    /// The order of training rows; the index is the epoch · 2^32 + the row.
    Shuffle = 5,
}

/// A uniform 64-bit number.
///
/// Two rounds of SplitMix64 (Steele, Lea, Flood 2014) over the three inputs, with g =
/// 0x9e3779b97f4a7c15 and modulo 2^64: `mix(mix(seed ^ purpose · g) + index · g)`.
pub fn random_u64(seed: u64, purpose: Purpose, index: u64) -> u64 {
    let stream = mix(seed ^ (purpose as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mix(stream.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// A uniform number in `[0, 1)` with 53 bits.
pub fn random_unit(seed: u64, purpose: Purpose, index: u64) -> f64 {
    (random_u64(seed, purpose, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// A number that names what has a name: FNV-1a of its bytes, 64 bits.
pub fn hash_name(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_pinned_for_ever() {
        // Sampled texts and tie-breaks of every release depend on these bits: they were computed
        // by another program, from the definition.
        for (seed, purpose, index, bits) in [
            (0, Purpose::Sampling, 0, 0x46b7_3e79_f0c3_7c00),
            (0, Purpose::TieBreak, 0, 0xee27_51b9_2135_351c),
            (1, Purpose::Sampling, 0, 0x7f46_a57c_92db_ee5f),
            (7, Purpose::Weights, 1 << 40, 0x9f70_0728_3044_fb1c),
            (u64::MAX, Purpose::Placement, u64::MAX, 0x5929_813f_039d_9c56),
        ] {
            assert_eq!(random_u64(seed, purpose, index), bits, "{seed} {purpose:?} {index}");
        }
        assert_eq!(random_unit(0, Purpose::Sampling, 0), 0.27623358227789463);
        assert_eq!(random_unit(7, Purpose::Weights, 1 << 40), 0.62280316096464);
        assert_eq!(hash_name("tier_1b"), 0x462d_d60f_88de_d391);
        assert_eq!(hash_name("tier_10b"), 0x1fbf_bf65_9383_559b);
        assert_eq!(hash_name(""), 0xcbf2_9ce4_8422_2325);
    }

    #[test]
    fn units_fill_the_interval_evenly() {
        let mean =
            (0..10_000).map(|i| random_unit(7, Purpose::Sampling, i)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }
}
