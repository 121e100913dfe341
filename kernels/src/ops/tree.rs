//! The tree of rule 1: the one order in which partial sums meet.
//!
//! What is summed (k of a product, values of a row, positions of a sequence) is cut in leaves of
//! [`LEAF`] by absolute index. The tree over n leaves splits them at the largest power of two below
//! n, and so on downwards; a node is `earlier + later`. A row that is cut at a multiple of a leaf
//! times a power of two is cut at a node, so that each part's sum is a node of the same tree.
//!
//! Upwards it is a binary counter: leaf i is added to as many waiting subtrees as i has trailing
//! ones, the latest first; the last leaf is added to all that wait.

/// Length of a leaf; fixed by the determinism contract.
pub const LEAF: usize = 256;

/// Subtrees that wait at the same time, at most, in a tree of any length that a `usize` can have.
const LEVELS: usize = usize::BITS as usize;

/// Leaves of `len` values; an empty row has one, which is empty.
#[inline(always)]
pub const fn leaves(len: usize) -> usize {
    if len == 0 { 1 } else { len.div_ceil(LEAF) }
}

/// Subtrees that wait before leaf `index` comes.
#[inline(always)]
pub(crate) const fn waiting(index: usize) -> usize {
    index.count_ones() as usize
}

/// How many of the waiting subtrees leaf `index` of `count` is added to.
#[inline(always)]
pub(crate) const fn merges(index: usize, count: usize) -> usize {
    if index + 1 == count { waiting(index) } else { index.trailing_ones() as usize }
}

/// Leaves that have been added, and wait for what comes after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subtree {
    /// It has 2^level leaves.
    pub(crate) level: usize,
    /// Its last leaf.
    pub(crate) last: usize,
}

/// The subtrees that leaf `index` of `count` is added to, in order, where leaves below `first` are
/// left out; subtrees of which nothing is left are left out, too.
#[inline(always)]
pub(crate) fn earlier(index: usize, count: usize, first: usize) -> impl Iterator<Item = Subtree> {
    let mut bits = index;
    (0..merges(index, count)).filter_map(move |_| {
        let level = bits.trailing_zeros() as usize;
        // All that comes before the lowest of the bits, and this one's own leaves.
        let end = bits;
        bits &= bits - 1;
        (end > first).then(|| Subtree { level, last: end - 1 })
    })
}

/// The level of the subtree that leaf `index` completes.
#[inline(always)]
pub(crate) const fn level(index: usize) -> usize {
    index.trailing_ones() as usize
}

/// The sum of leaf sums that come in order.
#[inline(always)]
pub fn fold(sums: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut sum = Sum::of(sums.len());
    for leaf in sums {
        sum.add(leaf);
    }
    sum.total()
}

/// A sum of leaves that come one by one. For loops that are compiled per instruction set: the closures of an
/// iterator would be compiled without the instructions.
pub(crate) struct Sum {
    stack: [f32; LEVELS],
    top: usize,
    index: usize,
    count: usize,
}

impl Sum {
    /// Of so many leaves.
    #[inline(always)]
    pub(crate) fn of(count: usize) -> Self {
        Self { stack: [0.0; LEVELS], top: 0, index: 0, count }
    }

    #[inline(always)]
    pub(crate) fn add(&mut self, mut leaf: f32) {
        for _ in 0..merges(self.index, self.count) {
            self.top -= 1;
            leaf += self.stack[self.top];
        }
        self.stack[self.top] = leaf;
        self.top += 1;
        self.index += 1;
    }

    #[inline(always)]
    pub(crate) fn total(self) -> f32 {
        self.stack[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, from the root down.
    fn by_definition(sums: &[f32]) -> f32 {
        match sums {
            [] => 0.0,
            [one] => *one,
            _ => {
                let at = (sums.len() - 1).ilog2();
                let (earlier, later) = sums.split_at(1 << at);
                by_definition(earlier) + by_definition(later)
            }
        }
    }

    #[test]
    fn the_counter_is_the_tree_of_the_definition() {
        let mut differs_from_a_chain = 0;
        for n in 0..70 {
            let sums: Vec<f32> = (0..n).map(|i| (i as f32 * 12.9898).sin() * 43.5).collect();
            let found = fold(sums.iter().copied());
            assert_eq!(found.to_bits(), by_definition(&sums).to_bits(), "{n} leaves");
            let chain = sums.iter().fold(0.0f32, |a, b| a + b);
            differs_from_a_chain += usize::from(found.to_bits() != chain.to_bits());
        }
        assert!(differs_from_a_chain > 20, "the data can tell orders apart");
    }

    #[test]
    fn subtrees_without_leaves_are_left_out() {
        /// The definition over leaves `from..to`; a side below `first` is left out.
        fn by_definition(from: usize, to: usize, first: usize) -> Option<String> {
            if to - from == 1 {
                return (from >= first).then(|| from.to_string());
            }
            let middle = from + (1 << (to - from - 1).ilog2());
            match (by_definition(from, middle, first), by_definition(middle, to, first)) {
                (Some(a), Some(b)) => Some(format!("({a}+{b})")),
                (a, b) => a.or(b),
            }
        }
        for count in 1..40 {
            for first in 0..count {
                let mut slots = vec![String::new(); 8];
                let mut root = None;
                for index in first..count {
                    let sum = earlier(index, count, first)
                        .fold(index.to_string(), |sum, s| format!("({}+{sum})", slots[s.level]));
                    slots[level(index)] = sum.clone();
                    root = Some(sum);
                }
                assert_eq!(root, by_definition(0, count, first), "{first} of {count}");
            }
        }
    }

    #[test]
    fn parts_cut_at_nodes_keep_their_sums() {
        // Four ranks of two leaves each: their subtrees' sums, added in the tree, are the whole.
        let sums: Vec<f32> = (0..8).map(|i| (i as f32 * 78.233).sin() * 1e3).collect();
        let ranks: Vec<f32> = sums.chunks(2).map(|part| fold(part.iter().copied())).collect();
        let whole = fold(sums.iter().copied());
        assert_eq!(fold(ranks.into_iter()).to_bits(), whole.to_bits());
    }
}
