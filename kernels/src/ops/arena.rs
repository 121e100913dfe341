//! Pages of keys and values, and how numbers lie in them.
//!
//! Per layer and key/value head, in this order:
//! - keys `[head_dim][PAGE_TOKENS]`, so that scores vectorise over keys;
//! - values `[PAGE_TOKENS][cols]`, cols being head_dim in whole vectors, zeros at the end;
//! - for int8 only, f32 scales of the keys `[PAGE_TOKENS]` and of the values `[PAGE_TOKENS]`.
//!
//! bf16 lies in words of two: elements 2i (low) and 2i + 1 (high) of a key, and positions 2i and
//! 2i + 1 of a value's column, so that one shift or mask widens a vector of them.
//!
//! Invariants: a page takes memory when it is first written, and keeps it. A key that holds an
//! infinity is kept as one that holds a NaN: a score of −infinity would weigh nothing, and what
//! went wrong would not be seen.

use crate::{
    buffer::AlignedBytes,
    cpu::Cpu,
    kv::{KvDType, KvShape, KvSlot, PAGE_TOKENS},
    simd::vectorised,
};

/// Fewer values than this are not worth a second thread. A key's values lie in as many cache lines,
/// so that it is not many.
const INLINE_VALUES: usize = 1 << 9;

/// Pages of keys and values for all layers and sequences. A page's memory is taken when it is
/// first written, and kept.
pub struct KvArena {
    shape: KvShape,
    pages: Vec<Option<AlignedBytes>>,
    /// Where each page's memory is; null where there is none. It never moves.
    starts: Vec<Start>,
}

#[derive(Clone, Copy)]
struct Start(*mut u8);

// SAFETY: an address inside the arena's own memory; it is written through by `append` only,
// which has the arena for itself.
unsafe impl Send for Start {}
// SAFETY: as above.
unsafe impl Sync for Start {}

/// One head's keys and values in one page and layer.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    /// All of it, as the file's text says.
    pub(crate) bytes: &'a [u8],
    /// Where the values begin.
    pub(crate) values_at: usize,
}

impl<'a> Head<'a> {
    pub(crate) fn keys(&self) -> *const u8 {
        self.bytes.as_ptr()
    }

    pub(crate) fn values(&self) -> *const u8 {
        self.bytes[self.values_at..].as_ptr()
    }

    /// The scales of keys and of values, of an int8 arena.
    pub(crate) fn scales(&self) -> [&'a [f32; PAGE_TOKENS]; 2] {
        let scales: &[f32] =
            bytemuck::cast_slice(&self.bytes[self.bytes.len() - 2 * PAGE_TOKENS * 4..]);
        let (scales, _) = scales.as_chunks::<PAGE_TOKENS>();
        [&scales[0], &scales[1]]
    }
}

impl KvArena {
    /// An arena of `pages` pages, none of which takes memory yet.
    pub fn new(shape: KvShape, pages: usize) -> Self {
        let starts = vec![Start(std::ptr::null_mut()); pages];
        Self { shape, pages: (0..pages).map(|_| None).collect(), starts }
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

    /// Keys and values of one head.
    pub(crate) fn head(&self, page: u32, layer: usize, kv_head: usize) -> Head<'_> {
        let page = self.pages[page as usize].as_ref().expect("attention reads written pages");
        let (at, len) = (self.head_at(layer, kv_head), self.shape.head_bytes());
        Head { bytes: &page[at..at + len], values_at: self.shape.key_bytes() }
    }

    fn head_at(&self, layer: usize, kv_head: usize) -> usize {
        assert!(layer < self.shape.layers && kv_head < self.shape.kv_heads, "head of the arena");
        (layer * self.shape.kv_heads + kv_head) * self.shape.head_bytes()
    }

    /// Writes keys and values, dense `[slots.len(), kv_heads * head_dim]`, into their slots.
    ///
    /// # Panics
    /// If the shapes do not fit each other, or a slot is outside the arena.
    pub fn append(&mut self, cpu: &Cpu, layer: usize, k: &[f32], v: &[f32], slots: &[KvSlot]) {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let cols = kv_heads * head_dim;
        assert_eq!((k.len(), v.len()), (slots.len() * cols, slots.len() * cols), "[rows, cols]");
        for slot in slots {
            assert!((slot.offset as usize) < PAGE_TOKENS, "{slot:?} is inside a page");
            let page = slot.page as usize;
            let page_bytes = self.shape.page_bytes();
            let bytes = self.pages[page].get_or_insert_with(|| AlignedBytes::zeroed(page_bytes));
            // Anew each time: a pointer from before the page was read must not write.
            self.starts[page] = Start(bytes.as_mut_ptr());
        }
        // Keys and values of a head are a task each: no two write to the same bytes.
        let this = &*self;
        let task = |task: usize| {
            let (kv_head, side) = (task / 2, task % 2);
            let rows = Rows {
                values: &[k, v][side][kv_head * head_dim..],
                stride: cols,
                len: head_dim,
                slots,
                starts: &this.starts,
                shape: this.shape,
                at: this.head_at(layer, kv_head),
            };
            match side {
                0 => write_keys(cpu.simd(), rows),
                _ => write_values(cpu.simd(), rows),
            }
        };
        if slots.is_empty() {
            return;
        }
        if k.len() < INLINE_VALUES {
            (0..2 * kv_heads).for_each(task);
        } else {
            cpu.pool().run(2 * kv_heads, &task);
        }
    }
}

/// One head's keys or values of all slots.
#[derive(Clone, Copy)]
struct Rows<'a> {
    /// Row r starts at `r * stride` and has `len` values.
    values: &'a [f32],
    stride: usize,
    len: usize,
    slots: &'a [KvSlot],
    starts: &'a [Start],
    shape: KvShape,
    /// Where the head is in a page.
    at: usize,
}

impl Rows<'_> {
    #[inline(always)]
    fn row(&self, r: usize) -> &[f32] {
        &self.values[r * self.stride..][..self.len]
    }

    /// Where `from` bytes into the head of row r's page are, and the row's offset in the page.
    #[inline(always)]
    fn place(&self, r: usize, from: usize) -> (*mut u8, usize) {
        let slot = self.slots[r];
        let start = self.starts[slot.page as usize].0;
        (start.wrapping_add(self.at + from), slot.offset as usize)
    }
}

vectorised! {
    fn write_keys(rows: Rows<'_>) {
        for r in 0..rows.slots.len() {
            let (to, offset) = rows.place(r, 0);
            let key = rows.row(r);
            // SAFETY: the slot's page has memory for the whole head, and the task has the head's
            // keys for itself; `offset` is below PAGE_TOKENS.
            unsafe {
                match rows.shape.dtype {
                    KvDType::F32 => {
                        let to = to.cast::<f32>().add(offset);
                        for (d, &x) in key.iter().enumerate() {
                            *to.add(d * PAGE_TOKENS) = if x.is_finite() { x } else { f32::NAN };
                        }
                    }
                    KvDType::Bf16 => {
                        let to = to.cast::<u16>().add(2 * offset);
                        for (d, &x) in key.iter().enumerate() {
                            let bits = bf16_bits(x);
                            let bits = if bits & 0x7f80 == 0x7f80 { 0x7fc0 } else { bits };
                            *to.add(d / 2 * 2 * PAGE_TOKENS + d % 2) = bits;
                        }
                    }
                    KvDType::Int8 => {
                        let scale = scale_of(key);
                        let scales = rows.shape.head_bytes() - 2 * PAGE_TOKENS * size_of::<f32>();
                        *to.add(scales).cast::<f32>().add(offset) = scale;
                        let to = to.cast::<i8>().add(offset);
                        for (d, &x) in key.iter().enumerate() {
                            *to.add(d * PAGE_TOKENS) = quantised(x, scale);
                        }
                    }
                }
            }
        }
    }
}

vectorised! {
    fn write_values(rows: Rows<'_>) {
        let cols = rows.shape.value_cols();
        for r in 0..rows.slots.len() {
            let (to, offset) = rows.place(r, rows.shape.key_bytes());
            let value = rows.row(r);
            // SAFETY: as for keys; a row has room for `cols` values.
            unsafe {
                match rows.shape.dtype {
                    KvDType::F32 => {
                        let to = to.cast::<f32>().add(offset * cols);
                        to.copy_from_nonoverlapping(value.as_ptr(), value.len());
                    }
                    KvDType::Bf16 => {
                        let to = to.cast::<u16>().add(offset / 2 * 2 * cols + offset % 2);
                        for (d, &x) in value.iter().enumerate() {
                            *to.add(2 * d) = bf16_bits(x);
                        }
                    }
                    KvDType::Int8 => {
                        let scale = scale_of(value);
                        let scales = cols * PAGE_TOKENS + PAGE_TOKENS * size_of::<f32>();
                        *to.add(scales).cast::<f32>().add(offset) = scale;
                        let to = to.cast::<i8>().add(offset * cols);
                        for (d, &x) in value.iter().enumerate() {
                            *to.add(d) = quantised(x, scale);
                        }
                    }
                }
            }
        }
    }
}

/// The nearest bf16, ties to even; a NaN stays one.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded as u16 }
}

/// The largest magnitude over 127; NaN if a value is not finite.
#[inline(always)]
fn scale_of(row: &[f32]) -> f32 {
    // As integers, magnitudes have the order of their values, infinity and NaN above all.
    let largest = row.iter().fold(0, |most, x| (x.to_bits() & 0x7fff_ffff).max(most));
    if largest >= f32::INFINITY.to_bits() { f32::NAN } else { f32::from_bits(largest) / 127.0 }
}

/// x in steps of `scale`. A scale of zero, and a NaN, give zero.
#[inline(always)]
fn quantised(x: f32, scale: f32) -> i8 {
    let n = (x / scale).round_ties_even().clamp(-127.0, 127.0);
    if scale > 0.0 { n as i8 } else { 0 }
}
