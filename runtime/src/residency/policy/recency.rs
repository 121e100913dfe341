//! The least recently used goes first: plainly, or with a part for what was used again.

use std::collections::BTreeSet;

use super::{Policy, Row, Shape};

/// Experts of a layer that a policy knows, at most; the others are worth nothing.
pub(super) const EXPERTS_MAX: usize = 1 << 20;

/// Uses of a layer, counted; an expert's last one by its index.
#[derive(Debug, Clone, Default)]
struct Uses {
    count: u64,
    last: Vec<u64>,
}

impl Uses {
    fn note(&mut self, expert: u32) {
        let at = expert as usize;
        if at < EXPERTS_MAX {
            self.count += 1;
            if self.last.len() <= at {
                self.last.resize(at + 1, 0);
            }
            self.last[at] = self.count;
        }
    }

    /// 1 for what was used last, falling towards 0.
    fn recency(&self, expert: u32, active: usize) -> f32 {
        match self.last.get(expert as usize) {
            None | Some(0) => 0.0,
            Some(last) => 1.0 / (1.0 + (self.count - last) as f32 / active as f32),
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.last[..])
    }
}

/// Plain recency; of one token's experts the better ranked are the younger.
#[derive(Debug)]
pub struct Lru {
    active: usize,
    layers: Vec<Uses>,
}

impl Lru {
    /// For a model of this shape.
    pub fn new(shape: Shape) -> Self {
        Self { active: shape.active, layers: vec![Uses::default(); shape.layers] }
    }
}

impl Policy for Lru {
    fn used(&mut self, layer: usize, row: &Row<'_>) {
        if let Some(uses) = self.layers.get_mut(layer) {
            row.experts.iter().rev().for_each(|&expert| uses.note(expert));
        }
    }

    fn value(&self, layer: usize, expert: u32) -> f32 {
        self.layers.get(layer).map_or(0.0, |uses| uses.recency(expert, self.active))
    }

    fn bytes(&self) -> usize {
        self.layers.iter().map(Uses::bytes).sum()
    }
}

/// Segmented LRU: an expert that is used again while it is remembered is protected; two thirds of
/// the slots at most are, and the least recent of them becomes an ordinary one.
///
/// It remembers as many experts of a layer as the cache has slots for, as a cache of that size alone
/// would.
#[derive(Debug)]
pub struct Segmented {
    active: usize,
    slots: usize,
    layers: Vec<Segments>,
}

#[derive(Debug, Clone, Default)]
struct Segments {
    uses: Uses,
    /// By last use, or by when it lost its protection.
    ordinary: BTreeSet<(u64, u32)>,
    protected: BTreeSet<(u64, u32)>,
}

impl Segmented {
    /// For a model of this shape and a cache of so many experts of each layer.
    pub fn new(shape: Shape, slots: usize) -> Self {
        let layers = vec![Segments::default(); shape.layers];
        Self { active: shape.active, slots: slots.max(1), layers }
    }
}

impl Segments {
    fn last(&self, expert: u32) -> u64 {
        self.uses.last.get(expert as usize).copied().unwrap_or(0)
    }

    fn note(&mut self, expert: u32, slots: usize) {
        let before = (self.last(expert), expert);
        self.uses.note(expert);
        let now = (self.last(expert), expert);
        if self.protected.remove(&before) || self.ordinary.remove(&before) {
            self.protected.insert(now);
        } else {
            self.ordinary.insert(now);
        }
        if self.protected.len() > slots * 2 / 3
            && let Some((_, oldest)) = self.protected.pop_first()
        {
            self.uses.note(oldest);
            self.ordinary.insert((self.last(oldest), oldest));
        }
    }

    fn forget(&mut self, slots: usize) {
        while self.ordinary.len() + self.protected.len() > slots {
            let forgotten = self.ordinary.pop_first().or_else(|| self.protected.pop_first());
            if let Some((_, expert)) = forgotten {
                self.uses.last[expert as usize] = 0;
            }
        }
    }
}

impl Policy for Segmented {
    fn used(&mut self, layer: usize, row: &Row<'_>) {
        if let Some(segments) = self.layers.get_mut(layer) {
            let known = row.experts.iter().rev().filter(|&&expert| (expert as usize) < EXPERTS_MAX);
            known.for_each(|&expert| segments.note(expert, self.slots));
            segments.forget(self.slots);
        }
    }

    fn value(&self, layer: usize, expert: u32) -> f32 {
        self.layers.get(layer).map_or(0.0, |segments| {
            let protected = segments.protected.contains(&(segments.last(expert), expert));
            let base = if protected { 0.5 } else { 0.0 };
            base + 0.5 * segments.uses.recency(expert, self.active)
        })
    }

    fn bytes(&self) -> usize {
        // A set's entry and its part of a node.
        let entry = 2 * size_of::<(u64, u32)>();
        let of_layer =
            |s: &Segments| s.uses.bytes() + entry * (s.ordinary.len() + s.protected.len());
        self.layers.iter().map(of_layer).sum()
    }
}
