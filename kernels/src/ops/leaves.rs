//! The order of a sum as a program: which leaves there are, and after which of them subtrees meet.
//!
//! A [`LeafPlan`] is rule 1's tree of [`super::tree`] over one index, or rule 8's over the tokens of
//! a batch: within a row (sequence) leaves of [`LEAF`] positions, upwards, in the tree; then the tree over the
//! rows by their index in the global batch. A leaf or row of which no token takes part is left out:
//! the node above it is its other side, untouched.
//!
//! A plan runs on a stack: sum the next leaf; then, as often as it says, `top = below + top`.

use std::ops::Range;

use crate::{
    RELAXED_ORDER,
    ops::tree::{LEAF, leaves, merges},
};

/// Where a token is: its row of the global batch and its position in that row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Index of the row in the global batch.
    pub row: u32,
    /// Position in the row.
    pub position: u32,
}

/// A leaf: consecutive terms, and what happens after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// Terms in it.
    pub(crate) terms: u32,
    /// Subtrees that it is then added to, the latest first.
    pub(crate) merges: u32,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafPlan {
    leaves: Vec<Leaf>,
    terms: usize,
    depth: usize,
}

impl LeafPlan {
    /// Rule 1 over `terms` terms.
    pub fn of(terms: usize) -> Self {
        let count = leaves(terms);
        let leaf = |index: usize| Leaf {
            terms: LEAF.min(terms - index * LEAF) as u32,
            merges: merges(index, count) as u32,
        };
        Self::new(if terms == 0 { Vec::new() } else { (0..count).map(leaf).collect() })
    }

    /// All terms in one leaf, upwards.
    pub fn one_leaf(terms: usize) -> Self {
        let leaf = Leaf { terms: terms as u32, merges: 0 };
        Self::new(if terms == 0 { Vec::new() } else { vec![leaf] })
    }

    /// Rule 8 over tokens in ascending order whose rows are within `rows`, a node of the tree over
    /// the global batch (see [`nodes`]).
    ///
    /// # Panics
    /// If a token's row is outside, or tokens are not in ascending order.
    pub fn of_tokens(tokens: &[Place], rows: Range<usize>) -> Self {
        assert!(tokens.is_sorted(), "tokens come in the order of their places");
        let inside = |place: &Place| rows.contains(&(place.row as usize));
        assert!(tokens.first().is_none_or(inside) && tokens.last().is_none_or(inside), "rows");
        let mut plan = Vec::new();
        over_rows(tokens, rows, &mut plan);
        Self::new(plan)
    }

    fn new(leaves: Vec<Leaf>) -> Self {
        let leaves = if RELAXED_ORDER { in_one_sum(&leaves) } else { leaves };
        let (mut height, mut depth, mut terms) = (0, 0, 0);
        for leaf in &leaves {
            height += 1;
            depth = depth.max(height);
            height -= leaf.merges as usize;
            terms += leaf.terms as usize;
        }
        Self { leaves, terms, depth }
    }

    /// Terms in all.
    pub fn terms(&self) -> usize {
        self.terms
    }

    /// Subtrees that exist at the same time, at most.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    pub(crate) fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }
}

/// Leaves of as many terms as there are, each added to the sum so far: what an order of no meaning costs least with.
fn in_one_sum(leaves: &[Leaf]) -> Vec<Leaf> {
    let terms: usize = leaves.iter().map(|leaf| leaf.terms as usize).sum();
    let leaf =
        |from: usize| Leaf { terms: LEAF.min(terms - from) as u32, merges: u32::from(from > 0) };
    (0..terms).step_by(LEAF).map(leaf).collect()
}

/// The two sides of a node of rule 1's tree over so many leaves or rows.
fn split(range: &Range<usize>) -> usize {
    range.start + (1 << (range.len() - 1).ilog2())
}

/// Adds the program of a node over rows; says whether there was anything.
fn over_rows(tokens: &[Place], rows: Range<usize>, plan: &mut Vec<Leaf>) -> bool {
    if tokens.is_empty() {
        return false;
    }
    if rows.len() == 1 {
        let last = tokens.last().map_or(0, |t| t.position as usize);
        return over_leaves(tokens, 0..last / LEAF + 1, plan);
    }
    let middle = split(&rows);
    let at = tokens.partition_point(|t| (t.row as usize) < middle);
    let earlier = over_rows(&tokens[..at], rows.start..middle, plan);
    let later = over_rows(&tokens[at..], middle..rows.end, plan);
    meet(earlier, later, plan)
}

/// The same over the leaves of one row. The tree's shape is that of the leaves up to the last that
/// takes part: leaves behind it are left out, and leave no trace.
fn over_leaves(tokens: &[Place], leaves: Range<usize>, plan: &mut Vec<Leaf>) -> bool {
    if tokens.is_empty() {
        return false;
    }
    if leaves.len() == 1 {
        plan.push(Leaf { terms: tokens.len() as u32, merges: 0 });
        return true;
    }
    let middle = split(&leaves);
    let at = tokens.partition_point(|t| (t.position as usize) < middle * LEAF);
    let earlier = over_leaves(&tokens[..at], leaves.start..middle, plan);
    let later = over_leaves(&tokens[at..], middle..leaves.end, plan);
    meet(earlier, later, plan)
}

fn meet(earlier: bool, later: bool, plan: &mut [Leaf]) -> bool {
    if earlier
        && later
        && let Some(last) = plan.last_mut()
    {
        last.merges += 1;
    }
    earlier || later
}

/// Cuts `0..rows` into nodes of the tree over the rows, none with more than `most` rows, in order.
/// Each may be computed by itself (a micro-batch, a data-parallel rank): [`sides`] says how they meet.
///
/// # Panics
/// If `most` is zero.
pub fn nodes(rows: usize, most: usize) -> Vec<Range<usize>> {
    assert!(most > 0, "a node has rows");
    let mut list = Vec::new();
    let mut waiting: Vec<Range<usize>> = (rows > 0).then_some(0..rows).into_iter().collect();
    while let Some(node) = waiting.pop() {
        match sides(&node) {
            Some([earlier, later]) if node.len() > most => waiting.extend([later, earlier]),
            _ => list.push(node),
        }
    }
    list
}

/// The two sides of a node over rows; none of a single row.
pub fn sides(node: &Range<usize>) -> Option<[Range<usize>; 2]> {
    (node.len() > 1).then(|| {
        let middle = split(node);
        [node.start..middle, middle..node.end]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a plan over names of terms, and shows the tree.
    fn shown(plan: &LeafPlan) -> String {
        let (mut stack, mut next) = (Vec::<String>::new(), 0);
        for leaf in plan.leaves() {
            stack.push(format!("{next}-{}", next + leaf.terms));
            next += leaf.terms;
            for _ in 0..leaf.merges {
                let (later, earlier) = (stack.pop().unwrap(), stack.pop().unwrap());
                stack.push(format!("({earlier}+{later})"));
            }
        }
        assert!(stack.len() <= 1);
        stack.pop().unwrap_or_default()
    }

    #[test]
    fn one_index_is_rule_1() {
        assert_eq!(shown(&LeafPlan::of(0)), "");
        assert_eq!(shown(&LeafPlan::of(256)), "0-256");
        assert_eq!(shown(&LeafPlan::of(700)), "((0-256+256-512)+512-700)");
        assert_eq!(LeafPlan::of(700).depth(), 2);
    }

    #[test]
    fn tokens_meet_within_rows_first_and_what_is_missing_is_left_out() {
        let row = |row: u32, to: u32| (0..to).map(move |position| Place { row, position });
        let all: Vec<Place> = row(0, 300).chain(row(1, 300)).chain(row(2, 10)).collect();
        let tree = "(((0-256+256-300)+(300-556+556-600))+600-610)";
        assert_eq!(shown(&LeafPlan::of_tokens(&all, 0..3)), tree);
        let some: Vec<Place> =
            all.iter().copied().filter(|p| p.row != 1 || p.position >= 256).collect();
        assert_eq!(shown(&LeafPlan::of_tokens(&some, 0..3)), "(((0-256+256-300)+300-344)+344-354)");
        let late: Vec<Place> = all.iter().copied().filter(|p| p.row == 2).collect();
        assert_eq!(shown(&LeafPlan::of_tokens(&late, 0..3)), "0-10");
    }

    #[test]
    fn nodes_cover_the_rows_and_respect_the_tree() {
        assert_eq!(nodes(5, 8).len(), 1);
        assert_eq!(nodes(5, 4), [0..4, 4..5]);
        assert_eq!(nodes(7, 2), [0..2, 2..4, 4..6, 6..7]);
        assert_eq!(nodes(8, 3), [0..2, 2..4, 4..6, 6..8]);
        assert_eq!(nodes(0, 3), []);
    }
}
