//! Gradients of all parameters, as nodes of rule 8's tree over the rows of the global batch.

use std::{collections::BTreeMap, ops::Range};

use lite_llm_kernels::{
    cpu::Cpu,
    ops::{elementwise, leaves::sides},
};

use super::params::ParamId;

/// Gradients of one node over rows. A parameter that no token reached has none: it is not zero, it is
/// left out.
#[derive(Debug, Default)]
pub struct Gradients {
    list: Vec<Option<Vec<f32>>>,
}

impl Gradients {
    /// Room for so many parameters.
    pub(super) fn new(parameters: usize) -> Self {
        Self { list: (0..parameters).map(|_| None).collect() }
    }

    /// The gradient of a parameter, in its shape, if a token reached it.
    pub fn get(&self, id: ParamId) -> Option<&[f32]> {
        self.list.get(id).and_then(|g| g.as_deref())
    }

    pub(super) fn set(&mut self, id: ParamId, gradient: Vec<f32>) {
        self.list[id] = Some(gradient);
    }

    /// Adds the sides of a node: earlier + later.
    pub(super) fn meet(mut self, cpu: &Cpu, later: Self) -> Self {
        for (earlier, later) in self.list.iter_mut().zip(later.list) {
            match (earlier.as_mut(), later) {
                (Some(sum), Some(later)) => {
                    elementwise::add(cpu, sum, &later);
                    cpu.give(later);
                }
                (None, Some(later)) => *earlier = Some(later),
                (_, None) => {}
            }
        }
        self
    }

    /// Moves what `from` holds to what `to` holds: `to + from`.
    pub(super) fn fold_into(&mut self, cpu: &Cpu, from: ParamId, to: ParamId) {
        let Some(more) = self.list.get_mut(from).and_then(Option::take) else { return };
        match &mut self.list[to] {
            Some(sum) => {
                elementwise::add(cpu, sum, &more);
                cpu.give(more);
            }
            none => *none = Some(more),
        }
    }

    /// Gives the memory back to who computes, to be used again.
    pub fn recycle(self, cpu: &Cpu) {
        self.list.into_iter().flatten().for_each(|gradient| cpu.give(gradient));
    }

    /// Takes a gradient out.
    pub fn take(&mut self, id: ParamId) -> Option<Vec<f32>> {
        self.list.get_mut(id).and_then(Option::take)
    }
}

/// Gradients of nodes that several ranks compute, which meet in the tree in whatever order they come.
#[derive(Debug, Default)]
pub(super) struct NodeSums {
    /// By parameter, then by (first row, end) of the node.
    nodes: BTreeMap<ParamId, BTreeMap<(usize, usize), Vec<f32>>>,
}

/// The node above one of a batch of so many rows, and its other side.
fn above(node: &Range<usize>, rows: usize) -> Option<(Range<usize>, Range<usize>)> {
    let mut parent = 0..rows;
    loop {
        let [earlier, later] = sides(&parent)?;
        match () {
            () if earlier == *node => return Some((parent, later)),
            () if later == *node => return Some((parent, earlier)),
            () if node.start < earlier.end => parent = earlier,
            () => parent = later,
        }
    }
}

impl NodeSums {
    /// Adds a node's gradient; sides that are both there meet at once.
    pub(super) fn add(
        &mut self,
        cpu: &Cpu,
        rows: usize,
        (id, mut node): (ParamId, Range<usize>),
        mut gradient: Vec<f32>,
    ) {
        let nodes = self.nodes.entry(id).or_default();
        while let Some((parent, other)) = above(&node, rows)
            && let Some(side) = nodes.remove(&(other.start, other.end))
        {
            gradient = match other.start < node.start {
                true => sum(cpu, side, gradient),
                false => sum(cpu, gradient, side),
            };
            node = parent;
        }
        nodes.insert((node.start, node.end), gradient);
    }

    /// A parameter's gradient over the whole batch, taken out: what no token reached is left out.
    pub(super) fn take(&mut self, cpu: &Cpu, rows: usize, id: ParamId) -> Option<Vec<f32>> {
        let mut nodes = self.nodes.remove(&id)?;
        fold(cpu, &mut nodes, 0..rows)
    }
}

fn sum(cpu: &Cpu, mut earlier: Vec<f32>, later: Vec<f32>) -> Vec<f32> {
    elementwise::add(cpu, &mut earlier, &later);
    cpu.give(later);
    earlier
}

fn fold(
    cpu: &Cpu,
    nodes: &mut BTreeMap<(usize, usize), Vec<f32>>,
    node: Range<usize>,
) -> Option<Vec<f32>> {
    if let Some(gradient) = nodes.remove(&(node.start, node.end)) {
        return Some(gradient);
    }
    // Most nodes are not there at all: only those above one that is are looked into.
    nodes.range((node.start, 0)..(node.end, 0)).next()?;
    let [earlier, later] = sides(&node)?;
    match (fold(cpu, nodes, earlier), fold(cpu, nodes, later)) {
        (Some(earlier), Some(later)) => Some(sum(cpu, earlier, later)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gradients of nodes that come in any order, some of them not at all, meet as [`Gradients::meet`] has it.
    #[test]
    fn nodes_meet_in_the_tree_whatever_comes_first() {
        let cpu = Cpu::best(1);
        let rows = 11;
        let nodes = lite_llm_kernels::ops::leaves::nodes(rows, 2);
        let value = |node: &Range<usize>| vec![1.0 / (3.0 + node.start as f32), 1e7];
        let mut differ = false;
        for absent in 0..nodes.len() {
            let here = |node: &Range<usize>| *node != nodes[absent];
            fn walk(
                cpu: &Cpu,
                node: Range<usize>,
                leaf: &dyn Fn(&Range<usize>) -> Option<Vec<f32>>,
            ) -> Gradients {
                let [earlier, later] = match sides(&node) {
                    Some(sides) if node.len() > 2 => sides,
                    _ => return Gradients { list: vec![leaf(&node)] },
                };
                walk(cpu, earlier, leaf).meet(cpu, walk(cpu, later, leaf))
            }
            let leaf = |node: &Range<usize>| here(node).then(|| value(node));
            let expected = walk(&cpu, 0..rows, &leaf).take(0);
            for turn in 0..nodes.len() {
                let mut sums = NodeSums::default();
                for i in 0..nodes.len() {
                    let node = &nodes[(i * 5 + turn) % nodes.len()];
                    if here(node) {
                        sums.add(&cpu, rows, (0, node.clone()), value(node));
                    }
                }
                assert_eq!(sums.take(&cpu, rows, 0), expected);
                assert_eq!(sums.take(&cpu, rows, 0), None);
            }
            let mut plain = nodes.iter().filter(|node| here(node)).map(value);
            let first = plain.next().unwrap();
            differ |= Some(plain.fold(first, |sum_, more| sum(&cpu, sum_, more))) != expected;
        }
        assert!(differ, "these numbers cannot tell one order from another");
    }
}
