//! Products with weights in blocks of integers: rule 2 of the determinism contract.
//!
//! Rule 2: the integers of a block are multiplied and added exactly; a block's result is
//! `f32(Σ q·q) · (scale of the weights · scale of the activations)`, and block results are added
//! by rule 1, that is: inside a leaf of 256 k one accumulator per output starts at +0.0 and takes
//! them in order by fused multiply-add; leaves meet in the tree of `tile.rs`.
//!
//! A tile is R rows × N vectors of outputs of P panels; two leaves are added in registers, then go
//! into the tree. Rows are records (see
//! [`crate::blocks`]), each where it lies: nothing is interleaved, so a row that several networks
//! read is quantised once.

// Registers are arrays that are indexed alike; iterators would hide which lane meets which.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::{
    blocks::{BLOCK, INT4_BYTES, INT6_BYTES, INT8_BYTES, RECORD_WORDS, SCALE_BYTES},
    dtype::DType,
    matrix::{PANEL, PackedMatrix},
    ops::{
        tile::{LeafAt, Sink, finish, levels},
        tree::LEAF,
    },
    rows::Tiling,
    scratch,
    simd::{Kernel, OPENED_INT8_BYTES, OPENED_OUTPUTS, Vector, prefetch},
};

/// Blocks per leaf.
const LEAF_BLOCKS: usize = LEAF / BLOCK;
/// Blocks of two leaves, which are added in registers: the lowest nodes of rule 1's tree.
const PAIR_BLOCKS: usize = 2 * LEAF_BLOCKS;
const RECORD_BYTES: usize = RECORD_WORDS * 4;

/// Tiles from which on blocks are opened, where that helps at all.
const OPEN_TILES: usize = 4;

/// Panels that are read side by side at most, where there are too few rows to keep the multipliers
/// busy.
const STREAMS: usize = 4;

/// Quantised rows, wherever they lie.
#[derive(Clone, Copy)]
pub(crate) struct Records<'a> {
    /// Records of all rows.
    pub(crate) words: &'a [f32],
    /// The word at which each row's records begin; one row after the other where there is no list.
    pub(crate) starts: Option<&'a [usize]>,
    /// Words per row: [`crate::blocks::record_words`].
    pub(crate) row_words: usize,
}

impl Records<'_> {
    #[inline(always)]
    fn row(&self, row: usize) -> *const u8 {
        let start = self.starts.map_or(row * self.row_words, |starts| starts[row]);
        self.words[start..][..self.row_words].as_ptr().cast()
    }
}

/// Some tiles of rows times some panels of a matrix.
pub(crate) struct BlockedProduct<'a> {
    pub(crate) x: Records<'a>,
    pub(crate) tiling: Tiling,
    pub(crate) tiles: Range<usize>,
    pub(crate) w: &'a PackedMatrix,
    pub(crate) panels: Range<usize>,
    /// Of at least [`super::tile::stack_len`] values.
    pub(crate) stack: &'a mut [f32],
    pub(crate) sink: Sink<'a>,
    /// What is probably read next: where leaves are prefetched, its beginning is, too.
    pub(crate) next: Option<Next<'a>>,
}

/// Panels of a matrix that are read soon.
#[derive(Clone, Copy)]
pub(crate) struct Next<'a> {
    w: &'a PackedMatrix,
    first: usize,
    count: usize,
}

impl<'a> Next<'a> {
    pub(crate) fn new(w: &'a PackedMatrix, panels: Range<usize>) -> Self {
        Self { w, first: panels.start, count: panels.len() }
    }

    /// Where the first panel begins that one of so many streams reads, as far as there is one.
    #[inline(always)]
    fn start(self, stream: usize, streams: usize) -> *const u8 {
        let panels = self.w.n().div_ceil(PANEL);
        let panel = self.first + stream * (self.count / streams).max(1);
        self.w.data()[self.w.data().len() / panels * panel.min(panels - 1)..].as_ptr()
    }
}

/// Panels that are read side by side: the first of them, and how far they are apart.
#[derive(Clone, Copy)]
struct Streams<'a> {
    first: usize,
    apart: usize,
    /// What is read after them; what follows each in memory where nothing is said.
    next: Option<Next<'a>>,
}

/// A format of blocks.
trait Format {
    /// Bytes of a block: of a panel, or of a strip that was opened.
    const BYTES: usize;
    /// What blocks are opened to where many tiles read them.
    type Opened: Format;

    /// Whether to prefetch the next leaf where so many panels are read side by side (`streams`).
    /// Many streams keep memory busy by themselves, and prefetching would only be in their way
    /// (measured on Zen 3 with 8 lanes, on a Xeon with 16). One stream gains by it: four rows of
    /// int8 by 70 %, of int4 by 20 % (Zen 3).
    #[inline(always)]
    fn prefetches<V: Vector>(streams: usize) -> bool {
        streams <= 2
    }

    /// Whether V gains by opening blocks that many tiles read.
    fn opens<V: Vector>() -> bool {
        false
    }

    /// Opens a strip of `blocks` blocks, which begins with output `lane`.
    ///
    /// # Safety
    /// They are readable, and as many of `Opened` are writable.
    unsafe fn open<V: Vector>(_from: *const u8, _lane: usize, _to: *mut u8, _blocks: usize) {
        unreachable!("the format is read as it is stored")
    }

    /// The scales of the outputs from `lane` on.
    ///
    /// # Safety
    /// The block is readable.
    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8, lane: usize) -> V {
        // SAFETY: promised by the caller.
        unsafe {
            let words = block.cast::<u32>().add(lane % 16);
            if lane < 16 { V::load_bf16_low(words) } else { V::load_bf16_high(words) }
        }
    }

    /// Where the words of output `lane` and those after it begin in a block.
    ///
    /// # Safety
    /// The block is readable.
    #[inline(always)]
    unsafe fn words(block: *const u8, lane: usize) -> *const u8 {
        // SAFETY: promised by the caller.
        unsafe { block.add(SCALE_BYTES + lane * 4) }
    }

    /// # Safety
    /// As [`Vector::dots_int8`].
    unsafe fn dots<V: Vector, const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[V; N]; R]; P];
}

struct Int8;
struct Int6;
struct Int4;
/// Int8 after [`Vector::open_int8`].
struct OpenedInt8;

impl Format for Int8 {
    const BYTES: usize = INT8_BYTES;
    type Opened = OpenedInt8;

    /// Two streams suffice for two rows with 8 lanes: a tenth to a fifth more on Zen 3 (and a
    /// fifteenth less on a Xeon, which has 16 and prefetches).
    #[inline(always)]
    fn prefetches<V: Vector>(streams: usize) -> bool {
        streams == 1 || streams == 2 && V::LANES > 8
    }

    #[inline(always)]
    fn opens<V: Vector>() -> bool {
        V::OPENS_INT8
    }

    #[inline(always)]
    unsafe fn open<V: Vector>(from: *const u8, lane: usize, to: *mut u8, blocks: usize) {
        for b in 0..blocks {
            // SAFETY: promised by the caller.
            unsafe {
                V::open_int8(from.add(b * INT8_BYTES), lane, to.add(b * OPENED_INT8_BYTES));
            }
        }
    }

    #[inline(always)]
    unsafe fn dots<V: Vector, const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[V; N]; R]; P] {
        // SAFETY: promised by the caller.
        unsafe { V::dots_int8::<R, P, N>(x, w) }
    }
}

impl Format for Int6 {
    const BYTES: usize = INT6_BYTES;
    type Opened = Self;

    #[inline(always)]
    unsafe fn dots<V: Vector, const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[V; N]; R]; P] {
        // SAFETY: promised by the caller.
        unsafe { V::dots_int6::<R, P, N>(x, w) }
    }
}

impl Format for Int4 {
    const BYTES: usize = INT4_BYTES;
    type Opened = Self;

    #[inline(always)]
    unsafe fn dots<V: Vector, const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[V; N]; R]; P] {
        // SAFETY: promised by the caller.
        unsafe { V::dots_int4::<R, P, N>(x, w) }
    }
}

impl Format for OpenedInt8 {
    const BYTES: usize = OPENED_INT8_BYTES;
    type Opened = Self;

    #[inline(always)]
    unsafe fn dots<V: Vector, const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[V; N]; R]; P] {
        // SAFETY: promised by the caller.
        unsafe { V::dots_opened_int8::<R, P, N>(x, w) }
    }

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8, lane: usize) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load(block.cast::<f32>().add(lane % OPENED_OUTPUTS)) }
    }

    #[inline(always)]
    unsafe fn words(block: *const u8, _lane: usize) -> *const u8 {
        // SAFETY: promised by the caller.
        unsafe { block.add(OPENED_OUTPUTS * 4) }
    }
}

/// The sums of one leaf of `blocks` blocks, for N vectors from output `lane` on, of each of P
/// panels. Several panels are read side by side because memory answers several streams faster
/// than one; with 8 lanes or more, N vectors are then a whole panel, because a stream that leaves
/// lines out is answered slowly.
///
/// # Safety
/// `x` are the leaf's first records and `w` the panels' first blocks; all are readable.
#[inline(always)]
unsafe fn leaf<V: Vector, F: Format, const R: usize, const P: usize, const N: usize>(
    x: &mut [*const u8; R],
    w: &mut [*const u8; P],
    lane: usize,
    ahead: &mut Prefetch<P>,
    blocks: usize,
) -> [[[V; N]; R]; P] {
    // SAFETY: promised by the caller; pointers move to the leaf's end.
    unsafe {
        let mut acc = [[[V::zero(); N]; R]; P];
        for _ in 0..blocks {
            ahead.block();
            let mut words = *w;
            for p in 0..P {
                words[p] = F::words(w[p], lane);
            }
            let dots = F::dots::<V, R, P, N>(x, &words);
            for p in 0..P {
                let mut scales = [V::zero(); N];
                for v in 0..N {
                    scales[v] = F::scales::<V>(w[p], lane + v * V::LANES);
                }
                for r in 0..R {
                    let scale = V::splat(x[r].add(BLOCK).cast::<f32>().read_unaligned());
                    for v in 0..N {
                        let sum = &mut acc[p][r][v];
                        *sum = sum.fma(dots[p][r][v], scales[v].mul(scale));
                    }
                }
                w[p] = w[p].add(F::BYTES);
            }
            for r in 0..R {
                x[r] = x[r].add(RECORD_BYTES);
            }
        }
        acc
    }
}

/// The sum of one or two leaves, `blocks` blocks in all.
///
/// # Safety
/// As [`leaf`].
#[inline(always)]
unsafe fn pair<V: Vector, F: Format, const R: usize, const P: usize, const N: usize>(
    mut x: [*const u8; R],
    mut w: [*const u8; P],
    lane: usize,
    mut ahead: Prefetch<P>,
    blocks: usize,
) -> [[[V; N]; R]; P] {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sum = [[[V::zero(); N]; R]; P];
        for from in [0, LEAF_BLOCKS] {
            if from > 0 && from >= blocks {
                break;
            }
            let len = LEAF_BLOCKS.min(blocks - from);
            let acc = leaf::<V, F, R, P, N>(&mut x, &mut w, lane, &mut ahead, len);
            for p in 0..P {
                for r in 0..R {
                    for v in 0..N {
                        sum[p][r][v] = match from {
                            0 => acc[p][r][v],
                            _ => sum[p][r][v].add(acc[p][r][v]),
                        };
                    }
                }
            }
        }
        sum
    }
}

/// What is asked for while leaves are computed: those that each stream reads next.
#[derive(Clone, Copy)]
struct Prefetch<const P: usize> {
    at: [*const u8; P],
    /// Lines of each block.
    lines: usize,
    /// Bytes from one block to the next.
    step: usize,
}

impl<const P: usize> Prefetch<P> {
    /// One of `items` shares of the leaves that begin at `at`, of whose blocks `lines` lines are
    /// asked for.
    #[inline(always)]
    fn share<F: Format>(mut at: [*const u8; P], lines: usize, item: usize, items: usize) -> Self {
        let each = lines.div_ceil(items);
        let from = (item * each).min(lines);
        for at in &mut at {
            *at = at.wrapping_add(from * 64);
        }
        Self { at, lines: each.min(lines - from), step: F::BYTES }
    }

    #[inline(always)]
    fn block(&mut self) {
        for at in &mut self.at {
            for line in 0..self.lines {
                prefetch(at.wrapping_add(line * 64));
            }
            *at = at.wrapping_add(self.step);
        }
    }
}

impl Kernel for BlockedProduct<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: promised by the caller.
        unsafe {
            match self.w.dtype() {
                DType::Int8 => self.run_format::<V, Int8>(),
                DType::Int6 => self.run_format::<V, Int6>(),
                DType::Int4 => self.run_format::<V, Int4>(),
                other => unreachable!("{other} is not stored in blocks"),
            }
        }
    }
}

impl BlockedProduct<'_> {
    #[inline(always)]
    unsafe fn run_format<V: Vector, F: Format>(mut self) {
        let n = self.w.n();
        let rows = self.tiling.first(self.tiles.end) - self.tiling.first(self.tiles.start);
        let end = self.panels.end.min(n.div_ceil(PANEL));
        let mut panel = self.panels.start;
        while panel < end {
            // Panels side by side only where registers and a single tile of rows allow it.
            let together = match (self.tiles.len(), rows, V::LANES) {
                (1, 1, _) | (1, 2, 16) if end - panel >= STREAMS => STREAMS,
                (1, 1..=2, _) | (1, 3, 16) if end - panel >= 2 => 2,
                _ => 1,
            };
            // Each stream goes through panels that follow each other in memory: where a stream
            // begins anew, memory is slow to notice.
            let apart = (end - panel) / together;
            for first in panel..panel + apart {
                let rest = panel + together * apart;
                let next = match first + 1 < panel + apart {
                    true => None,
                    false if rest < end => Some(Next::new(self.w, rest..end)),
                    false => self.next,
                };
                let streams = Streams { first, apart, next };
                // SAFETY: promised by the caller.
                unsafe {
                    match (together, V::LANES, rows) {
                        (4, 8, _) => self.run_panels::<V, F, 4, 4>(streams),
                        (4, ..) => self.run_panels::<V, F, 4, 2>(streams),
                        (2, 8, _) => self.run_panels::<V, F, 2, 4>(streams),
                        (2, ..) => self.run_panels::<V, F, 2, 2>(streams),
                        (_, 8, 1..=2) => self.run_panels::<V, F, 1, 4>(streams),
                        _ => self.run_panels::<V, F, 1, 2>(streams),
                    }
                }
            }
            panel += together * apart;
        }
    }

    /// P panels; each pair of leaves is done for all tiles and all strips of N vectors while it is
    /// near.
    #[inline(always)]
    unsafe fn run_panels<V: Vector, F: Format, const P: usize, const N: usize>(
        &mut self,
        streams: Streams<'_>,
    ) {
        let Streams { first: panel, apart, next } = streams;
        let Self { x, tiling, tiles, w, stack, sink, .. } = self;
        let (x, tiling, w) = (*x, *tiling, *w);
        let (n, blocks) = (w.n(), w.k().div_ceil(BLOCK));
        let first = tiling.first(tiles.start);
        let rows = tiling.first(tiles.end) - first;
        let strip = N * V::LANES;
        let strips = PANEL / strip;
        let level_len = P * rows * PANEL;
        assert!(levels(w.k()) * level_len <= stack.len(), "the stack holds every level");
        assert!(x.row_words == blocks * RECORD_WORDS, "records are of k values");
        let last = panel + (P - 1) * apart;
        assert!((last + 1) * blocks * F::BYTES <= w.data().len(), "panels are in the matrix");
        let stack = stack.as_mut_ptr();
        let count = blocks.div_ceil(PAIR_BLOCKS).max(1);
        let items = tiles.len() * strips;
        let mut base = [std::ptr::null(); P];
        for p in 0..P {
            base[p] = w.data().as_ptr().wrapping_add((panel + p * apart) * blocks * F::BYTES);
        }
        let opens = P == 1 && strip == OPENED_OUTPUTS && F::opens::<V>();
        let mut opened = (opens && tiles.len() >= OPEN_TILES)
            .then(|| scratch::take(PAIR_BLOCKS * F::Opened::BYTES / size_of::<f32>()));
        for index in 0..count {
            let from = index * PAIR_BLOCKS;
            let len = PAIR_BLOCKS.min(blocks - from);
            let at = LeafAt { index, count };
            let mut w = base;
            for p in 0..P {
                w[p] = base[p].wrapping_add(from * F::BYTES);
            }
            let mut coming = w;
            for p in 0..P {
                coming[p] = match next {
                    Some(next) if index + 1 == count => next.start(p, P),
                    _ => w[p].wrapping_add(len * F::BYTES),
                };
            }
            for item in 0..items {
                // `opens` is asked, too, because it is known when this is compiled.
                let (t, part) = match opened {
                    // All tiles of a strip, whose weights are then near.
                    Some(_) if opens => (item % tiles.len(), item / tiles.len()),
                    // All strips of a tile, whose records are then near.
                    _ => (item / strips, item % strips),
                };
                if opens
                    && t == 0
                    && let Some(room) = &mut opened
                {
                    // SAFETY: the blocks are in the panel, and there is room for two leaves.
                    unsafe { F::open::<V>(w[0], part * strip, room.as_mut_ptr().cast(), len) };
                }
                let col = panel * PANEL + part * strip;
                let row = tiling.first(tiles.start + t);
                let r = tiling.first(tiles.start + t + 1) - row;
                let lines = if F::prefetches::<V>(P) { F::BYTES / 64 } else { 0 };
                let ahead = Prefetch::share::<F>(coming, lines, item, items);
                macro_rules! sizes {
                    ($($size:literal)*) => {
                        match r {
                            $($size => {
                                let mut at_row = [std::ptr::null(); $size];
                                for i in 0..$size {
                                    at_row[i] = x.row(row + i).wrapping_add(from * RECORD_BYTES);
                                }
                                // SAFETY: rows, panels and the stack hold the tile by the
                                // assertions above.
                                unsafe {
                                    let lane = part * strip;
                                    let acc = match &opened {
                                        Some(room) if opens => {
                                            let w = [room.as_ptr().cast(); P];
                                            pair::<V, F::Opened, $size, P, N>(
                                                at_row, w, lane, ahead, len,
                                            )
                                        }
                                        _ => pair::<V, F, $size, P, N>(
                                            at_row, w, lane, ahead, len,
                                        ),
                                    };
                                    for (p, acc) in acc.into_iter().enumerate() {
                                        let col = col + p * apart * PANEL;
                                        let place = p * rows * PANEL
                                            + ((row - first) + part * rows) * strip;
                                        if col < n {
                                            let stack = stack.add(place);
                                            finish(acc, at, stack, level_len, sink, (row, col, n));
                                        }
                                    }
                                }
                            })*
                            _ => unreachable!("tile of {r} rows"),
                        }
                    };
                }
                match (V::LANES, P, N) {
                    (8, 4, _) => sizes!(1),
                    (_, 4, _) | (8, _, 4) => sizes!(1 2),
                    (_, 2, _) => sizes!(1 2 3),
                    (4 | 8, ..) => sizes!(1 2 3 4),
                    _ => sizes!(1 2 3 4 5 6),
                }
            }
        }
    }
}
