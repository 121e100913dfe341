//! Pages of keys and values.
//!
//! A page holds, per layer and key/value head, keys `[head_dim][PAGE_TOKENS]` (so that scores
//! vectorise over keys) and then values `[PAGE_TOKENS][head_dim]`.
//!
//! Invariant: a page takes memory when it is first written, and keeps it.

use crate::{
    buffer::AlignedBytes,
    kv::{KvShape, KvSlot, PAGE_TOKENS},
};

/// Pages of keys and values for all layers and sequences. A page's memory is taken when it is
/// first written, and kept.
pub struct KvArena {
    shape: KvShape,
    pages: Vec<Option<AlignedBytes>>,
}

impl KvArena {
    /// An arena of `pages` pages, none of which takes memory yet.
    pub fn new(shape: KvShape, pages: usize) -> Self {
        Self { shape, pages: (0..pages).map(|_| None).collect() }
    }

    /// What a page holds.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Pages that there are.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that have taken memory.
    pub fn pages_written(&self) -> usize {
        self.pages.iter().flatten().count()
    }

    /// Values of one key/value head's keys, or values, in one page and layer.
    pub(crate) fn head_len(&self) -> usize {
        self.shape.head_dim * PAGE_TOKENS
    }

    /// Keys and values of one head: `[head_dim][PAGE_TOKENS]` and `[PAGE_TOKENS][head_dim]`.
    pub(crate) fn head(&self, page: u32, layer: usize, kv_head: usize) -> (&[f32], &[f32]) {
        let bytes = self.pages[page as usize].as_ref().expect("attention reads written pages");
        let at = self.head_at(layer, kv_head);
        bytemuck::cast_slice::<u8, f32>(bytes)[at..at + 2 * self.head_len()]
            .split_at(self.head_len())
    }

    fn head_at(&self, layer: usize, kv_head: usize) -> usize {
        assert!(layer < self.shape.layers && kv_head < self.shape.kv_heads, "head of the arena");
        (layer * self.shape.kv_heads + kv_head) * 2 * self.head_len()
    }

    /// Writes keys and values, dense `[slots.len(), kv_heads * head_dim]`, into their slots.
    ///
    /// # Panics
    /// If the shapes do not fit each other, or a slot is outside the arena.
    pub fn append(&mut self, layer: usize, k: &[f32], v: &[f32], slots: &[KvSlot]) {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let cols = kv_heads * head_dim;
        assert_eq!((k.len(), v.len()), (slots.len() * cols, slots.len() * cols), "[rows, cols]");
        let (head_len, page_bytes) = (self.head_len(), self.shape.page_bytes());
        for (r, slot) in slots.iter().enumerate() {
            let offset = slot.offset as usize;
            assert!(offset < PAGE_TOKENS, "offset {offset} is inside a page");
            for head in 0..kv_heads {
                let at = self.head_at(layer, head);
                let page = self.pages[slot.page as usize]
                    .get_or_insert_with(|| AlignedBytes::zeroed(page_bytes));
                let page: &mut [f32] = bytemuck::cast_slice_mut(page);
                let (keys, values) = page[at..at + 2 * head_len].split_at_mut(head_len);
                let from = r * cols + head * head_dim;
                for (d, &x) in k[from..from + head_dim].iter().enumerate() {
                    keys[d * PAGE_TOKENS + offset] = x;
                }
                values[offset * head_dim..(offset + 1) * head_dim]
                    .copy_from_slice(&v[from..from + head_dim]);
            }
        }
    }
}
