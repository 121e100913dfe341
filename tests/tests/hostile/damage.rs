//! What is done to the bytes of valid messages, and how much of it.

use lite_llm_runtime::random::{Purpose, random_u64};

/// Values at which arithmetic breaks.
const EXTREMES: [u64; 12] = [
    0,
    1,
    u64::MAX,
    u64::MAX - 1,
    i64::MAX as u64,
    i64::MIN as u64,
    u32::MAX as u64,
    i32::MAX as u64,
    i32::MIN as u32 as u64,
    1 << 16,
    1 << 26,
    1 << 62,
];

/// So many times as the run is to be long: `LITE_LLM_HOSTILE=20` makes it twenty times as long.
pub(crate) fn times(few: usize) -> usize {
    let factor = std::env::var("LITE_LLM_HOSTILE").ok().and_then(|text| text.parse().ok());
    few * factor.unwrap_or(1)
}

/// Random numbers, each made of the one before.
pub(crate) struct Draws(pub(crate) u64);

impl Draws {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = random_u64(self.0, Purpose::Placement, 0);
        (self.0 % end.max(1) as u64) as usize
    }

    fn at(&mut self, bytes: &[u8], size: usize) -> usize {
        self.below((bytes.len() / size).max(1)) * size
    }

    /// Valid bytes with a few things wrong: bits, words at their extremes, pieces that lack, come
    /// twice or change places.
    pub(crate) fn damaged(&mut self, valid: &[u8]) -> Vec<u8> {
        let mut bytes = valid.to_vec();
        for _ in 0..1 + self.below(3) {
            let extreme = EXTREMES[self.below(EXTREMES.len())];
            match self.below(8) {
                0 | 1 => self.put(&mut bytes, 4, extreme),
                2 => self.put(&mut bytes, 8, extreme),
                3 => self.put(&mut bytes, 2, extreme),
                4 => {
                    let at = self.at(&bytes, 1);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
                5 => bytes.truncate(self.below(valid.len() + 1)),
                6 => {
                    let from = self.at(&bytes, 4);
                    let piece =
                        bytes[from..(from + 4 * (1 + self.below(4))).min(bytes.len())].to_vec();
                    let to = self.at(&bytes, 4);
                    bytes.splice(to..to, piece);
                }
                _ => {
                    let from = self.at(&bytes, 4).min(bytes.len());
                    let end = (from + 4 * self.below(8)).min(bytes.len());
                    bytes.drain(from..end);
                }
            }
        }
        bytes
    }

    /// Writes the low bytes of a number over an aligned word.
    fn put(&mut self, bytes: &mut [u8], size: usize, value: u64) {
        let at = self.at(bytes, size);
        if let Some(word) = bytes.get_mut(at..at + size) {
            word.copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
}
