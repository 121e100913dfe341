//! Shapes, formats and addresses of the paged key/value cache.
//!
//! A page holds [`PAGE_TOKENS`] consecutive positions of one sequence, for every layer.
//! Position p of a sequence lies in `pages[p / PAGE_TOKENS]` at offset `p % PAGE_TOKENS`.
//! How positions are paged is no part of the determinism contract: attention's leaves are whole
//! pages, and what it computes of a leaf does not depend on them.

use std::{fmt, str::FromStr};

/// Positions per page.
pub const PAGE_TOKENS: usize = 64;

/// Values of a head in one page are rows of a multiple of this many, zeros at the end.
const COLUMNS: usize = 16;

/// How keys and values are kept. What attention computes is a function of the kept numbers, so
/// this is part of what fixes a request's bits: all homes of a cluster use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvDType {
    /// As they were computed.
    #[default]
    F32,
    /// Rounded to the nearest bf16, ties to even.
    Bf16,
    /// Per position and head one f32 scale s = (largest |x|) / 127, of keys and of values, and
    /// integers n = x / s rounded to nearest, ties to even, within ±127; zeros where s is zero.
    Int8,
}

/// A name that is no format of the cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no format of the key/value cache; expected f32, bf16 or int8")]
pub struct UnknownKvDType(String);

impl KvDType {
    /// Every format there is, largest first.
    pub const ALL: [KvDType; 3] = [KvDType::F32, KvDType::Bf16, KvDType::Int8];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvDType::F32 => "f32",
            KvDType::Bf16 => "bf16",
            KvDType::Int8 => "int8",
        }
    }

    /// Bytes of one number.
    fn bytes(self) -> usize {
        match self {
            KvDType::F32 => 4,
            KvDType::Bf16 => 2,
            KvDType::Int8 => 1,
        }
    }
}

impl fmt::Display for KvDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvDType {
    type Err = UnknownKvDType;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|dtype| dtype.name() == name);
        known.ok_or_else(|| UnknownKvDType(name.to_owned()))
    }
}

/// What one arena holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// How they are kept.
    pub dtype: KvDType,
}

impl KvShape {
    /// Bytes of one page: keys and values of [`PAGE_TOKENS`] positions in every layer.
    pub fn page_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.head_bytes()
    }

    /// Bytes of one head's keys, values and scales in one page and layer.
    pub(crate) fn head_bytes(&self) -> usize {
        let scales =
            if self.dtype == KvDType::Int8 { 2 * PAGE_TOKENS * size_of::<f32>() } else { 0 };
        self.key_bytes() + self.value_bytes() + scales
    }

    /// Bytes of one head's keys in one page and layer: whole pairs of elements.
    pub(crate) fn key_bytes(&self) -> usize {
        self.head_dim.next_multiple_of(2) * PAGE_TOKENS * self.dtype.bytes()
    }

    /// Bytes of one head's values in one page and layer.
    pub(crate) fn value_bytes(&self) -> usize {
        self.value_cols() * PAGE_TOKENS * self.dtype.bytes()
    }

    /// Elements of one kept value row of one head.
    pub(crate) fn value_cols(&self) -> usize {
        self.head_dim.next_multiple_of(COLUMNS)
    }
}

/// Where one position's key and value are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSlot {
    /// Page of the arena.
    pub page: u32,
    /// Offset inside the page, `< PAGE_TOKENS`.
    pub offset: u32,
}

/// One query row: its sequence's pages and its own position.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// The sequence's pages, in order of position.
    pub pages: &'a [u32],
    /// Position of this row; it sees keys `0..=position`.
    pub position: u32,
}
