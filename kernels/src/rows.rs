//! Rows of activations, wherever they lie.
//!
//! Kernels read rows in place: in a tensor, or each in a received message. Nothing but the
//! alignment of f32 may be assumed of a row.
//! `RowsMut` is the other side: rows that several threads write, each its own columns.

use std::marker::PhantomData;

/// Rows to read, all of one length.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// `[rows, cols]` in one piece.
    Dense {
        /// The values, row by row.
        values: &'a [f32],
        /// Values per row.
        cols: usize,
    },
    /// One slice per row.
    List(&'a [&'a [f32]]),
}

impl<'a> Rows<'a> {
    /// Rows of `cols` values in one piece.
    ///
    /// # Panics
    /// If `values` is no whole number of rows.
    pub fn dense(values: &'a [f32], cols: usize) -> Self {
        assert!(cols > 0 && values.len().is_multiple_of(cols), "values are whole rows");
        Rows::Dense { values, cols }
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        match self {
            Rows::Dense { values, cols } => values.len() / cols,
            Rows::List(rows) => rows.len(),
        }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row i.
    pub fn row(&self, i: usize) -> &'a [f32] {
        match self {
            Rows::Dense { values, cols } => &values[i * cols..][..*cols],
            Rows::List(rows) => rows[i],
        }
    }
}

/// A row of the list form of [`RowsMut`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowPtr(*mut f32, usize);

// SAFETY: a plain address; `RowsMut::part` says who may use it.
unsafe impl Send for RowPtr {}
// SAFETY: as above.
unsafe impl Sync for RowPtr {}

impl RowPtr {
    pub(crate) fn new(row: &mut [f32]) -> Self {
        Self(row.as_mut_ptr(), row.len())
    }
}

/// Rows to write from several threads, each writing its own part.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut<'a> {
    place: Place<'a>,
    owner: PhantomData<&'a mut [f32]>,
}

#[derive(Clone, Copy)]
enum Place<'a> {
    Dense { first: *mut f32, len: usize, cols: usize },
    List(&'a [RowPtr]),
}

// SAFETY: writing goes through `part`, whose callers promise disjoint parts.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    pub(crate) fn dense(values: &'a mut [f32], cols: usize) -> Self {
        let place = Place::Dense { first: values.as_mut_ptr(), len: values.len(), cols };
        Self { place, owner: PhantomData }
    }

    /// # Safety
    /// The rows stay borrowed for `'a`: nobody else touches them meanwhile.
    pub(crate) unsafe fn list(rows: &'a [RowPtr]) -> Self {
        Self { place: Place::List(rows), owner: PhantomData }
    }

    /// Columns `from..from + len` of a row.
    ///
    /// # Safety
    /// No two threads ask for overlapping parts at the same time.
    #[inline(always)]
    pub(crate) unsafe fn part(&self, row: usize, from: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: inside the row; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.address(row, from, len), len) }
    }

    /// The same, to be read.
    ///
    /// # Safety
    /// Nobody writes to the part at the same time.
    #[inline(always)]
    pub(crate) unsafe fn read(&self, row: usize, from: usize, len: usize) -> &'a [f32] {
        // SAFETY: inside the row; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.address(row, from, len), len) }
    }

    /// Where columns `from..from + len` of a row are, which exist.
    #[inline(always)]
    pub(crate) fn address(&self, row: usize, from: usize, len: usize) -> *mut f32 {
        let (start, cols) = match self.place {
            Place::Dense { first, len: all, cols } => {
                assert!((row + 1) * cols <= all, "row {row} leaves the output");
                // SAFETY: just checked to be inside.
                (unsafe { first.add(row * cols) }, cols)
            }
            Place::List(rows) => (rows[row].0, rows[row].1),
        };
        assert!(from + len <= cols, "columns leave the output row");
        // SAFETY: inside the row as just checked.
        unsafe { start.add(from) }
    }
}

/// How m rows are cut into tiles of a product: as even as can be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiling {
    rows: usize,
    count: usize,
}

impl Tiling {
    pub(crate) fn new(rows: usize, tile_rows: usize) -> Self {
        Self { rows, count: rows.div_ceil(tile_rows) }
    }

    pub(crate) fn count(self) -> usize {
        self.count
    }

    /// First row of tile t; `first(count)` is the number of rows.
    #[inline(always)]
    pub(crate) fn first(self, t: usize) -> usize {
        let (base, longer) = (self.rows / self.count.max(1), self.rows % self.count.max(1));
        t * base + t.min(longer)
    }

    /// The tile of a row, and the row's place in it.
    #[inline(always)]
    pub(crate) fn locate(self, row: usize) -> (usize, usize) {
        let (base, longer) = (self.rows / self.count, self.rows % self.count);
        let boundary = longer * (base + 1);
        if row < boundary {
            (row / (base + 1), row % (base + 1))
        } else {
            (longer + (row - boundary) / base, (row - boundary) % base)
        }
    }
}

/// Interleaves the rows of tile t: `[k][rows of the tile]`.
pub(crate) fn pack_tile(rows: Rows<'_>, tiling: Tiling, t: usize, out: &mut [f32]) {
    let first = tiling.first(t);
    let count = tiling.first(t + 1) - first;
    let k = out.len() / count;
    // Blocks of k, so that a block's lines are still in the cache when the next row comes.
    const BLOCK: usize = 64;
    for from in (0..k).step_by(BLOCK) {
        let len = BLOCK.min(k - from);
        let out = &mut out[from * count..(from + len) * count];
        for r in 0..count {
            let row = &rows.row(first + r)[from..from + len];
            for (values, &x) in out.chunks_exact_mut(count).zip(row) {
                values[r] = x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_differ_by_at_most_one() {
        for rows in 1..200 {
            for most in [1, 6, 12] {
                let tiling = Tiling::new(rows, most);
                let mut next = 0;
                for t in 0..tiling.count() {
                    assert_eq!(tiling.first(t), next);
                    let len = tiling.first(t + 1) - next;
                    assert!(len >= 1 && len <= most && len >= rows / tiling.count());
                    for r in 0..len {
                        assert_eq!(tiling.locate(next + r), (t, r));
                    }
                    next += len;
                }
                assert_eq!(next, rows);
            }
        }
    }
}
