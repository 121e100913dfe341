//! Rows of a table: `out[r, :] = table[ids[r], :]`, widened exactly.

use crate::{cpu::Cpu, matrix::PackedMatrix, ops::elementwise::for_rows};

/// Copies the rows named by `ids` into `out`, dense `[ids.len(), table.k()]`.
///
/// # Panics
/// If an id is outside the table, or `out` does not fit.
pub fn embed(cpu: &Cpu, table: &PackedMatrix, ids: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), ids.len() * table.k(), "out is [ids, k]");
    if out.is_empty() {
        return;
    }
    for_rows(cpu, out, table.k(), |first, out| {
        for (row, &id) in out.chunks_exact_mut(table.k()).zip(&ids[first..]) {
            assert!((id as usize) < table.n(), "id {id} is outside a table of {}", table.n());
            table.row(id as usize, row);
        }
    });
}
