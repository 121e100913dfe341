//! What a pass takes to the device, once: tokens, positions, pages, what is wanted of each row.

use lite_llm_kernels::{
    cuda::{Cuda, Dev, launch::DevQueries},
    device::{DeviceError, Draw},
    kv::PAGE_TOKENS,
};

use crate::forward::{Chunk, WantedLogits};

/// Rows of a tile of attention at most.
const TILE_ROWS: usize = 64;

/// Words to which every part of a plan is aligned.
const ALIGN: usize = 4;

/// A plan on the host, and where its parts lie: the same for passes of one shape.
pub(super) struct HostPlan {
    layout: Layout,
    words: Vec<u32>,
    /// Every row is the one row of its sequence, and its logits are wanted.
    steps: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// Rows of the pass.
    pub(super) rows: usize,
    /// Pages of a row of the page tables.
    pub(super) stride: usize,
    mask_words: usize,
    tiles: usize,
    wanted: usize,
}

/// A plan in the device's memory.
pub(super) struct Plan {
    pub(super) rows: usize,
    pub(super) ids: Dev<u32>,
    pub(super) slots: Dev<[u32; 2]>,
    pub(super) queries: DevQueries,
    /// First rows and counts; none where every row is a sequence of its own.
    pub(super) tiles: Option<Dev<[u32; 2]>>,
    pub(super) zeros: Dev<u32>,
    /// A bit for every tier that a row may use.
    pub(super) masks: Option<Dev<u32>>,
    /// Rows whose logits are wanted.
    pub(super) wanted: Dev<u32>,
    /// How their tokens are chosen.
    pub(super) draws: Dev<Draw>,
}

/// Where the parts of a plan begin, in words.
struct Parts {
    ids: usize,
    positions: usize,
    slots: usize,
    tables: usize,
    zeros: usize,
    masks: usize,
    tiles: usize,
    wanted: usize,
    draws: usize,
    end: usize,
}

impl Layout {
    fn parts(&self) -> Parts {
        let mut end = 0;
        let mut part = |words: usize| {
            let at = end;
            end = (at + words).next_multiple_of(ALIGN);
            at
        };
        let Self { rows, stride, mask_words, tiles, wanted } = *self;
        Parts {
            ids: part(rows),
            positions: part(rows),
            slots: part(2 * rows),
            tables: part(rows * stride),
            zeros: part(rows),
            masks: part(rows * mask_words),
            tiles: part(2 * tiles),
            wanted: part(wanted),
            draws: part(wanted * size_of::<Draw>() / size_of::<u32>()),
            end,
        }
    }

    /// The last position for which a row of the page tables has a page.
    fn longest(&self) -> usize {
        self.stride * PAGE_TOKENS - 1
    }

    /// The parts of a plan that lies at `memory`.
    pub(super) fn views(&self, memory: &Dev<u32>) -> Plan {
        let Self { rows, stride, mask_words, tiles, wanted } = *self;
        let at = self.parts();
        fn view<T>(memory: &Dev<u32>, word: usize, len: usize) -> Dev<T> {
            memory.part(word * size_of::<u32>(), len)
        }
        Plan {
            rows,
            ids: view(memory, at.ids, rows),
            slots: view(memory, at.slots, rows),
            queries: DevQueries {
                tables: view(memory, at.tables, rows * stride),
                stride,
                positions: view(memory, at.positions, rows),
                longest: self.longest(),
            },
            tiles: (tiles > 0).then(|| view(memory, at.tiles, tiles)),
            zeros: view(memory, at.zeros, rows),
            masks: (mask_words > 0).then(|| view(memory, at.masks, rows * mask_words)),
            wanted: view(memory, at.wanted, wanted),
            draws: view(memory, at.draws, wanted),
        }
    }
}

impl HostPlan {
    /// The plan of a pass, with one of `draws` for each row whose logits are wanted, over so many tiers.
    pub(super) fn new(chunks: &[Chunk], draws: &[Draw], tiers: usize) -> Self {
        let rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let last = chunks.iter().map(|chunk| chunk.start + chunk.tokens.len() - 1).max();
        let mut tiles = Vec::new();
        let mut first = 0;
        for chunk in chunks {
            let end = first + chunk.tokens.len() as u32;
            while first < end {
                let count = (end - first).min(TILE_ROWS as u32);
                tiles.push([first, count]);
                first += count;
            }
        }
        let steps = tiles.len() == rows
            && draws.len() == rows
            && chunks.iter().all(|chunk| chunk.logits == WantedLogits::Last);
        if tiles.len() == rows {
            tiles.clear();
        }
        let layout = Layout {
            rows,
            // So that a pass's shape is that of many.
            stride: (last.unwrap_or(0) / PAGE_TOKENS + 1).next_power_of_two(),
            mask_words: if tiers > 1 { tiers.div_ceil(32) } else { 0 },
            tiles: tiles.len(),
            wanted: draws.len(),
        };
        let at = layout.parts();
        let mut words = vec![0; at.end];
        let mut row = 0;
        let mut wanted = 0;
        for chunk in chunks {
            // All of a tile's rows read the pages of its first.
            let end = chunk.start + chunk.tokens.len();
            let pages = &chunk.pages[..end.div_ceil(PAGE_TOKENS)];
            for (&token, position) in chunk.tokens.iter().zip(chunk.start..) {
                words[at.ids + row] = token;
                words[at.positions + row] = position as u32;
                let (page, offset) = (position / PAGE_TOKENS, position % PAGE_TOKENS);
                words[at.slots + 2 * row] = pages[page];
                words[at.slots + 2 * row + 1] = offset as u32;
                words[at.tables + row * layout.stride..][..pages.len()].copy_from_slice(pages);
                for tier in (0..tiers).filter(|&t| layout.mask_words > 0 && chunk.tiers.allows(t)) {
                    words[at.masks + row * layout.mask_words + tier / 32] |= 1 << (tier % 32);
                }
                row += 1;
            }
            if chunk.logits == WantedLogits::Last && wanted < draws.len() {
                words[at.wanted + wanted] = row as u32 - 1;
                wanted += 1;
            }
        }
        words[at.tiles..][..2 * tiles.len()].copy_from_slice(tiles.as_flattened());
        let draws: &[u32] = bytemuck::cast_slice(draws);
        words[at.draws..][..draws.len()].copy_from_slice(draws);
        Self { layout, words, steps }
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// Whether every row is the newest of a sequence of its own, and only its token is wanted.
    pub(super) fn is_step(&self) -> bool {
        self.steps
    }

    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Takes it to the device.
    pub(super) fn lend(&self, cuda: &Cuda) -> Result<Plan, DeviceError> {
        Ok(self.layout.views(&cuda.lend(&self.words)?))
    }
}
