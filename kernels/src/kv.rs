//! Shapes and addresses of the paged key/value cache.
//!
//! A page holds [`PAGE_TOKENS`] consecutive positions of one sequence, for every layer.
//! Position p of a sequence lies in `pages[p / PAGE_TOKENS]` at offset `p % PAGE_TOKENS`.
//! Attention walks a sequence page by page: the page is also the fixed block of the
//! determinism contract, so it is part of the contract's version.

/// Positions per page; fixed by the determinism contract.
pub const PAGE_TOKENS: usize = 64;

/// What one arena holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one page: keys and values of [`PAGE_TOKENS`] positions in every layer, f32.
    pub fn page_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.head_dim * PAGE_TOKENS * 2 * size_of::<f32>()
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
