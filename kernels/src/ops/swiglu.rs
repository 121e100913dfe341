//! Gated feed-forward networks: `down( silu(gate·x) * (up·x) )`, many of them as one piece of work.
//!
//! Shapes of one network: x `[m, hidden]`, gate and up `[intermediate, hidden]`,
//! down `[hidden, intermediate]`, out `[m, hidden]`.
//! Three steps over all networks together, so that there is no fork and join per network:
//! interleave the rows; gate, up and silu; down. What lies between is written once, already
//! interleaved as the down product reads it.

use crate::{
    cpu::Cpu,
    device::{Swiglu, SwigluGroup},
    matrix::{PANEL, PackedMatrix},
    ops::{
        matmul::{INLINE_FMAS, Plan},
        tile::{Product, Sink, Tiles, stack_len},
    },
    rows::{RowPtr, Rows, RowsMut, pack_tile},
    scratch,
};

/// One network over dense rows; `out` is dense `[x.len(), hidden]`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn swiglu(cpu: &Cpu, x: Rows<'_>, weights: Swiglu<'_, PackedMatrix>, out: &mut [f32]) {
    assert_eq!(out.len(), x.len() * weights.down.n(), "out is [rows, hidden]");
    let out = RowsMut::dense(out, weights.down.n());
    run(cpu, &mut [Piece::new(cpu, x, weights, out)]);
}

/// Many networks, each over its own rows, read and written in place.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn swiglu_groups(cpu: &Cpu, groups: &mut [SwigluGroup<'_, PackedMatrix>]) {
    for group in groups.iter() {
        assert_eq!(group.rows.len(), group.outputs.len(), "one output row per input row");
        let hidden = group.weights.down.n();
        assert!(group.outputs.iter().all(|row| row.len() == hidden), "output rows are [hidden]");
    }
    let outputs: Vec<RowPtr> = groups
        .iter_mut()
        .flat_map(|group| group.outputs.iter_mut().map(|row| RowPtr::new(row)))
        .collect();
    let mut outputs = &outputs[..];
    let mut pieces: Vec<Piece<'_>> = groups
        .iter()
        .map(|group| {
            let (own, rest) = outputs.split_at(group.rows.len());
            outputs = rest;
            // SAFETY: `groups` stays borrowed for as long as the pieces live.
            let out = unsafe { RowsMut::list(own) };
            Piece::new(cpu, Rows::List(&group.rows), group.weights, out)
        })
        .filter(|piece| !piece.rows.is_empty())
        .collect();
    run(cpu, &mut pieces);
}

/// One network's share of the work.
struct Piece<'a> {
    rows: Rows<'a>,
    weights: Swiglu<'a, PackedMatrix>,
    out: RowsMut<'a>,
    up: Plan,
    down: Plan,
    /// Where its interleaved rows and its intermediate values begin.
    packed_at: usize,
    between_at: usize,
    /// Its first task of each step.
    pack_task: usize,
    up_task: usize,
    down_task: usize,
}

impl<'a> Piece<'a> {
    fn new(cpu: &Cpu, rows: Rows<'a>, weights: Swiglu<'a, PackedMatrix>, out: RowsMut<'a>) -> Self {
        let Swiglu { gate, up, down } = weights;
        assert_eq!((gate.n(), gate.k()), (up.n(), up.k()), "gate and up are of one shape");
        assert_eq!((down.n(), down.k()), (up.k(), up.n()), "down is [hidden, intermediate]");
        assert!((0..rows.len()).all(|i| rows.row(i).len() == up.k()), "rows are [hidden]");
        let m = rows.len();
        Self {
            rows,
            weights,
            out,
            up: Plan::new(cpu, m, up.n(), up.k()),
            down: Plan::new(cpu, m, down.n(), down.k()),
            packed_at: 0,
            between_at: 0,
            pack_task: 0,
            up_task: 0,
            down_task: 0,
        }
    }

    /// Interleaved copies of its rows: none where a single row is read in place.
    fn packed_len(&self) -> usize {
        if self.rows.len() > 1 { self.rows.len() * self.weights.up.k() } else { 0 }
    }

    fn between_len(&self) -> usize {
        self.rows.len() * self.weights.up.n()
    }

    fn pack(&self, task: usize, packed: RowsMut<'_>) {
        let (k, tiling) = (self.weights.up.k(), self.up.tiling);
        let (from, to) = (tiling.first(task), tiling.first(task + 1));
        // SAFETY: tiles do not overlap, and neither do pieces.
        let out = unsafe { packed.part(0, self.packed_at + from * k, (to - from) * k) };
        pack_tile(self.rows, tiling, task, out);
    }

    fn gate_and_up(&self, cpu: &Cpu, task: usize, packed: &[f32], between: RowsMut<'_>) {
        let Swiglu { gate, up, .. } = self.weights;
        let values = if self.rows.len() > 1 {
            &packed[self.packed_at..][..self.packed_len()]
        } else {
            self.rows.row(0)
        };
        let x = Tiles { values, tiling: self.up.tiling, k: up.k() };
        let (tiles, panels) = self.up.task(task);
        let (first_row, first_col) = (x.tiling.first(tiles.start), panels.start * PANEL);
        let rows = x.tiling.first(tiles.end) - first_row;
        let cols = panels.len() * PANEL;
        let mut stack = scratch::take(stack_len(rows, up.k()));
        let mut gated = scratch::take(rows * cols);
        let out = RowsMut::dense(&mut gated, cols);
        cpu.simd().run(Product {
            x,
            tiles: tiles.clone(),
            w: gate,
            panels: panels.clone(),
            stack: &mut stack,
            sink: Sink::Block { out, first_row, first_col },
        });
        let sink = Sink::Gated {
            gate: &gated,
            cols,
            first_row,
            first_col,
            tiling: x.tiling,
            out: between,
            at: self.between_at,
            k: up.n(),
        };
        cpu.simd().run(Product { x, tiles, w: up, panels, stack: &mut stack, sink });
    }

    fn down(&self, cpu: &Cpu, task: usize, between: &[f32]) {
        let down = self.weights.down;
        let values = &between[self.between_at..][..self.between_len()];
        let x = Tiles { values, tiling: self.down.tiling, k: down.k() };
        let (tiles, panels) = self.down.task(task);
        let rows = x.tiling.first(tiles.end) - x.tiling.first(tiles.start);
        let mut stack = scratch::take(stack_len(rows, down.k()));
        let sink = Sink::Rows { out: self.out, bias: None };
        cpu.simd().run(Product { x, tiles, w: down, panels, stack: &mut stack, sink });
    }
}

fn run(cpu: &Cpu, pieces: &mut [Piece<'_>]) {
    let (mut packs, mut ups, mut downs) = (0, 0, 0);
    let (mut packed_len, mut between_len, mut fmas) = (0, 0, 0);
    for piece in pieces.iter_mut() {
        (piece.pack_task, piece.up_task, piece.down_task) = (packs, ups, downs);
        (piece.packed_at, piece.between_at) = (packed_len, between_len);
        packs += if piece.packed_len() > 0 { piece.up.tiling.count() } else { 0 };
        ups += piece.up.tasks();
        downs += piece.down.tasks();
        packed_len += piece.packed_len();
        between_len += piece.between_len();
        fmas += 2 * piece.between_len() * piece.weights.up.k();
    }
    let pieces = &*pieces;
    let mut packed = scratch::take(packed_len);
    let mut between = scratch::take(between_len);
    let step = |worth: bool, tasks: usize, task: &(dyn Fn(usize) + Sync)| {
        if worth { cpu.pool().run(tasks, task) } else { (0..tasks).for_each(task) }
    };

    let out = RowsMut::dense(&mut packed, packed_len);
    step(packed_len >= INLINE_FMAS, packs, &|task| {
        let piece = holder(pieces, task, |p| p.pack_task);
        piece.pack(task - piece.pack_task, out);
    });
    let out = RowsMut::dense(&mut between, between_len);
    step(fmas >= INLINE_FMAS, ups, &|task| {
        let piece = holder(pieces, task, |p| p.up_task);
        piece.gate_and_up(cpu, task - piece.up_task, &packed, out);
    });
    step(fmas >= INLINE_FMAS, downs, &|task| {
        let piece = holder(pieces, task, |p| p.down_task);
        piece.down(cpu, task - piece.down_task, &between);
    });
}

/// The piece that a task belongs to: the last that begins at or before it.
fn holder<'p, 'a>(
    pieces: &'p [Piece<'a>],
    task: usize,
    first: impl Fn(&Piece<'a>) -> usize,
) -> &'p Piece<'a> {
    &pieces[pieces.partition_point(|p| first(p) <= task) - 1]
}
