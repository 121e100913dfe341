//! Gated feed-forward networks: `down( silu(gate·x) * (up·x) )`, many of them as one piece of work.
//!
//! Shapes of one network: x `[m, hidden]`, gate and up `[intermediate, hidden]`,
//! down `[hidden, intermediate]`, out `[m, hidden]`.
//! Two steps over all networks together, so that there is no fork and join per network: prepare
//! the rows; then gate, up and silu of all networks, followed by down of all. A network's down
//! begins when its own gate and up are done, not when all are, so that threads do not wait for
//! each other in between. What lies between is written once, already as the down product reads
//! it. A row that several quantised networks read is quantised once.

use std::{
    hint,
    sync::atomic::{
        AtomicUsize,
        Ordering::{Acquire, Release},
    },
    thread,
};

use crate::{
    blocks::{quantise_row, record_words},
    cpu::Cpu,
    device::{Swiglu, SwigluGroup},
    matrix::{PANEL, PackedMatrix},
    ops::{
        blocked::{Next, Records},
        function,
        matmul::{INLINE_FMAS, Input, Plan, input, input_words, product},
        tile::{Sink, stack_len},
    },
    rows::{RowPtr, Rows, RowsMut, pack_tile},
    scratch,
    simd::vectorised,
};

/// One network over dense rows; `out` is dense `[x.len(), hidden]`.
///
/// # Panics
/// If the shapes do not fit each other.
pub fn swiglu(cpu: &Cpu, x: Rows<'_>, weights: Swiglu<'_, PackedMatrix>, out: &mut [f32]) {
    assert_eq!(out.len(), x.len() * weights.down.n(), "out is [rows, hidden]");
    if x.is_empty() {
        return;
    }
    let out = RowsMut::dense(out, weights.down.n());
    run(cpu, &mut [Piece::new(cpu, x, weights, out, 1)]);
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
            Piece::new(cpu, Rows::List(&group.rows), group.weights, out, groups.len())
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
    /// Where its interleaved rows, its first row's place in the list of all rows that are
    /// quantised, and its intermediate values begin.
    packed_at: usize,
    listed_at: usize,
    between_at: usize,
    /// Its first task of each step.
    pack_task: usize,
    up_task: usize,
    down_task: usize,
    /// Tasks of gate and up that have not ended.
    ups_left: AtomicUsize,
}

impl<'a> Piece<'a> {
    fn new(
        cpu: &Cpu,
        rows: Rows<'a>,
        weights: Swiglu<'a, PackedMatrix>,
        out: RowsMut<'a>,
        together: usize,
    ) -> Self {
        let Swiglu { gate, up, down } = weights;
        assert_eq!((gate.n(), gate.k()), (up.n(), up.k()), "gate and up are of one shape");
        assert_eq!(gate.dtype(), up.dtype(), "gate and up are of one format");
        assert_eq!((down.n(), down.k()), (up.k(), up.n()), "down is [hidden, intermediate]");
        assert!((0..rows.len()).all(|i| rows.row(i).len() == up.k()), "rows are [hidden]");
        let m = rows.len();
        Self {
            rows,
            weights,
            out,
            up: Plan::new(cpu, m, up, together),
            down: Plan::new(cpu, m, down, together),
            packed_at: 0,
            listed_at: 0,
            between_at: 0,
            pack_task: 0,
            up_task: 0,
            down_task: 0,
            ups_left: AtomicUsize::new(0),
        }
    }

    fn quantised(&self) -> bool {
        self.weights.up.dtype().is_quantised()
    }

    /// Words of its interleaved rows: none where a single row is read in place, or where rows
    /// are quantised.
    fn packed_len(&self) -> usize {
        if self.quantised() { 0 } else { input_words(self.rows.len(), self.weights.up.k(), false) }
    }

    /// Words of a row between gate and down.
    fn between_words(&self) -> usize {
        let down = self.weights.down;
        if down.dtype().is_quantised() { record_words(down.k()) } else { down.k() }
    }

    fn between_len(&self) -> usize {
        self.rows.len() * self.between_words()
    }

    fn pack(&self, task: usize, packed: RowsMut<'_>) {
        let (k, tiling) = (self.weights.up.k(), self.up.tiling);
        let (from, to) = (tiling.first(task), tiling.first(task + 1));
        // SAFETY: tiles do not overlap, and neither do pieces.
        let out = unsafe { packed.part(0, self.packed_at + from * k, (to - from) * k) };
        pack_tile(self.rows, tiling, task, out);
    }

    fn gate_and_up(
        &self,
        cpu: &Cpu,
        task: usize,
        prepared: &Prepared<'_>,
        between: RowsMut<'_>,
        next: Option<Next<'_>>,
    ) {
        let Swiglu { gate, up, .. } = self.weights;
        let (k, n, tiling) = (up.k(), up.n(), self.up.tiling);
        let x = if self.quantised() {
            Input::Records(Records {
                words: prepared.records,
                starts: Some(&prepared.starts[self.listed_at..][..self.rows.len()]),
                row_words: record_words(k),
            })
        } else {
            let packed = &prepared.packed[self.packed_at..][..self.packed_len()];
            input(self.rows, packed, tiling, false, k)
        };
        let (tiles, panels) = self.up.task(task);
        let (first_row, first_col) = (tiling.first(tiles.start), panels.start * PANEL);
        let rows = tiling.first(tiles.end) - first_row;
        let cols = panels.len() * PANEL;
        let mut stack = scratch::take(stack_len(rows, k));
        let mut both = scratch::take(2 * rows * cols);
        let (gates, ups) = both.split_at_mut(rows * cols);
        let up_next = Some(Next::new(up, panels.clone()));
        for (w, out, next) in [(gate, &mut *gates, up_next), (up, &mut *ups, next)] {
            let sink = Sink::Block { out: RowsMut::dense(out, cols), first_row, first_col };
            product(cpu, x, (tiling, tiles.clone()), (w, panels.clone()), &mut stack, sink, next);
        }
        let width = cols.min(n - first_col);
        for (r, (gates, ups)) in gates.chunks(cols).zip(ups.chunks_mut(cols)).enumerate() {
            let (gates, ups) = (&gates[..width], &mut ups[..width]);
            gated(cpu.simd(), gates, ups);
            let row = first_row + r;
            if self.weights.down.dtype().is_quantised() {
                let at = self.between_at + row * self.between_words() + record_words(first_col);
                // SAFETY: tasks have their own rows and panels.
                let out = unsafe { between.part(0, at, record_words(width)) };
                quantise_row(cpu.simd(), ups, out);
            } else {
                let (t, r) = self.down.tiling.locate(row);
                let first = self.down.tiling.first(t);
                let tile_rows = self.down.tiling.first(t + 1) - first;
                for (i, &value) in ups.iter().enumerate() {
                    let at = self.between_at + first * n + (first_col + i) * tile_rows + r;
                    // SAFETY: as above.
                    unsafe { between.part(0, at, 1)[0] = value };
                }
            }
        }
    }

    /// Waits for its gate and up. Tasks are claimed in order and these never wait, so it is not
    /// for long.
    fn await_ups(&self) {
        let mut spins = 0;
        while self.ups_left.load(Acquire) > 0 {
            spins += 1;
            if spins < 1 << 12 { hint::spin_loop() } else { thread::yield_now() }
        }
    }

    fn down(&self, cpu: &Cpu, task: usize, between: RowsMut<'_>, next: Option<Next<'_>>) {
        let (down, tiling) = (self.weights.down, self.down.tiling);
        // SAFETY: its gate and up, which alone write there, have ended.
        let words = unsafe { between.read(0, self.between_at, self.between_len()) };
        let x = if down.dtype().is_quantised() {
            Input::Records(Records { words, starts: None, row_words: self.between_words() })
        } else {
            Input::Tiles(crate::ops::tile::Tiles { values: words, tiling, k: down.k() })
        };
        let (tiles, panels) = self.down.task(task);
        let rows = tiling.first(tiles.end) - tiling.first(tiles.start);
        let mut stack = scratch::take(stack_len(rows, down.k()));
        let sink = Sink::Rows { out: self.out, bias: None };
        product(cpu, x, (tiling, tiles), (down, panels), &mut stack, sink, next);
    }
}

vectorised! {
    /// `ups = silu(gates) * ups`.
    fn gated(gates: &[f32], ups: &mut [f32]) {
        for (u, &g) in ups.iter_mut().zip(gates) {
            *u *= function::silu(g);
        }
    }
}

/// Rows as the gate and up products read them.
struct Prepared<'a> {
    packed: &'a [f32],
    records: &'a [f32],
    starts: &'a [usize],
}

/// Rows that are to be quantised, each once however many networks read it.
struct Listed<'a> {
    /// Every distinct row and the word at which its records begin.
    distinct: Vec<(&'a [f32], usize)>,
    /// The same word for each row of each piece, piece by piece.
    starts: Vec<usize>,
    /// Words of all records.
    words: usize,
}

fn list<'a>(pieces: &mut [Piece<'a>]) -> Listed<'a> {
    let mut rows: Vec<(&[f32], usize)> = Vec::new();
    for piece in pieces.iter_mut().filter(|piece| piece.quantised()) {
        piece.listed_at = rows.len();
        for i in 0..piece.rows.len() {
            rows.push((piece.rows.row(i), rows.len()));
        }
    }
    let mut listed = Listed { distinct: Vec::new(), starts: vec![0; rows.len()], words: 0 };
    rows.sort_unstable_by_key(|(row, i)| (row.as_ptr(), row.len(), *i));
    for same in rows.chunk_by(|(a, _), (b, _)| std::ptr::eq(*a, *b)) {
        listed.distinct.push((same[0].0, listed.words));
        for (_, i) in same {
            listed.starts[*i] = listed.words;
        }
        listed.words += record_words(same[0].0.len());
    }
    listed
}

fn run(cpu: &Cpu, pieces: &mut [Piece<'_>]) {
    let listed = list(pieces);
    let (mut packs, mut ups, mut downs) = (0, 0, 0);
    let (mut packed_len, mut between_len, mut fmas) = (0, 0, 0);
    for piece in pieces.iter_mut() {
        (piece.pack_task, piece.up_task, piece.down_task) = (packs, ups, downs);
        (piece.packed_at, piece.between_at) = (packed_len, between_len);
        packs += if piece.packed_len() > 0 { piece.up.tiling.count() } else { 0 };
        ups += piece.up.tasks();
        downs += piece.down.tasks();
        *piece.ups_left.get_mut() = piece.up.tasks();
        packed_len += piece.packed_len();
        between_len += piece.between_len();
        fmas += 2 * piece.rows.len() * piece.weights.up.n() * piece.weights.up.k();
    }
    let pieces = &*pieces;
    let mut packed = scratch::take(packed_len);
    let mut records = scratch::take(listed.words);
    let mut between = scratch::take(between_len);
    let step = |worth: bool, tasks: usize, task: &(dyn Fn(usize) + Sync)| {
        if worth { cpu.pool().run(tasks, task) } else { (0..tasks).for_each(task) }
    };

    // Threads claim tasks in order: after task t, a thread probably gets task t + threads.
    let threads = cpu.pool().threads();
    let next_down = |task: usize| {
        if task >= downs {
            return None;
        }
        let piece = holder(pieces, task, |p| p.down_task);
        piece.down.next(piece.weights.down, task - piece.down_task)
    };
    let next_up = |task: usize| {
        if task >= ups {
            return next_down(task - ups);
        }
        let piece = holder(pieces, task, |p| p.up_task);
        piece.up.next(piece.weights.gate, task - piece.up_task)
    };

    let out = RowsMut::dense(&mut packed, packed_len);
    step(packed_len >= INLINE_FMAS, packs, &|task| {
        let piece = holder(pieces, task, |p| p.pack_task);
        piece.pack(task - piece.pack_task, out);
    });
    let out = RowsMut::dense(&mut records, listed.words);
    step(listed.words >= INLINE_FMAS, listed.distinct.len(), &|task| {
        let (row, at) = listed.distinct[task];
        // SAFETY: every distinct row has its own records.
        quantise_row(cpu.simd(), row, unsafe { out.part(0, at, record_words(row.len())) });
    });
    let prepared = Prepared { packed: &packed, records: &records, starts: &listed.starts };
    let out = RowsMut::dense(&mut between, between_len);
    step(fmas >= INLINE_FMAS, ups + downs, &|task| {
        let next = next_up(task + threads);
        if task < ups {
            let piece = holder(pieces, task, |p| p.up_task);
            let _ended = Ended(&piece.ups_left);
            piece.gate_and_up(cpu, task - piece.up_task, &prepared, out, next);
        } else {
            let piece = holder(pieces, task - ups, |p| p.down_task);
            piece.await_ups();
            piece.down(cpu, task - ups - piece.down_task, out, next);
        }
    });
}

/// Counts a task down when it ends, be it with a panic: nobody is to wait for it any more.
struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Release);
    }
}

/// The piece that a task belongs to: the last that begins at or before it.
fn holder<'p, 'a>(
    pieces: &'p [Piece<'a>],
    task: usize,
    first: impl Fn(&Piece<'a>) -> usize,
) -> &'p Piece<'a> {
    &pieces[pieces.partition_point(|p| first(p) <= task) - 1]
}
