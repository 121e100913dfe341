//! The walk of some rows, its leaves spread over all threads: for a few rows with many keys.
//!
//! Two rounds: what each leaf gives; then the tree over the leaves of each item. Every number is
//! computed from the same numbers by the same operations as in [`super::walk`].

use std::ops::Range;

use super::{Job, page::meet, walk::Items};
use crate::{cpu::Cpu, ops::tree, rows::RowsMut, scratch};

/// Attention of rows of one sequence.
pub(super) fn spread(cpu: &Cpu, job: &Job<'_>, rows: Range<usize>) {
    let kv_heads = job.arena.shape().kv_heads;
    let leaves = job.leaves(rows.clone());
    let items = |kv_head| Items::new(cpu.simd(), job, rows.clone(), kv_head);
    let (count, record) = (items(0).count(), items(0).record_len());
    let mut records = scratch::take(kv_heads * leaves.len() * record);
    let records = RowsMut::dense(&mut records, record);
    cpu.pool().run(kv_heads * leaves.len(), &|task| {
        let items = items(task / leaves.len());
        let mut memory = scratch::take(items.memory_len());
        // SAFETY: every task has its own record.
        let record = unsafe { records.part(task, 0, record) };
        items.leaf(
            leaves.start + task % leaves.len(),
            None,
            &mut items.memory(&mut memory),
            record,
        );
    });
    cpu.pool().run(kv_heads * count, &|task| {
        let (kv_head, item) = (task / count, task % count);
        let items = items(kv_head);
        // SAFETY: every task has its own item's parts of the records of all leaves.
        let node = |leaf: usize| unsafe {
            items.node_of(&records, kv_head * leaves.len() + leaf - leaves.start, item)
        };
        let (first, all) = items.tree(item);
        for leaf in first..all {
            // A subtree lies where its last leaf did.
            for earlier in tree::earlier(leaf, all, first) {
                meet(cpu.simd(), node(earlier.last), node(leaf));
            }
        }
        items.finish(item, node(all - 1));
    });
}
