//! Our policy: the value of an expert is an estimate of γ^(tokens until its next use − 1), learned
//! online. Belady keeps what is used soonest; this is the same with a guess of when.
//!
//! ```text
//! how often lately (six half-lives) ─────┐                       judged 16 tokens later by what was
//! how often the wider choice named it ───┼─▶ Σ weight · log odds ─▶ estimate     │  used since, and
//! what followed the last 1, 2, 3 tokens ─┘            ▲                          │  by the estimate
//!                                                     └── weights, biases, rows ─┘  of then
//! ```
//!
//! What followed is kept in hashed rows of estimates; a row that is new begins with what the shorter
//! context says. One vector of weights for each layer and number of known contexts.

use std::collections::BTreeMap;

use super::{
    Policy, Row, Shape,
    odds::{Curves, UNIT},
};

/// γ. 0.7 serves small caches a little better, 0.9 large ones.
pub(in crate::residency) const DISCOUNT: f32 = 0.8;
/// Experts of a layer for which the cost of a token, which grows with them, is worth it.
const EXPERTS_MAX: usize = 1024;
/// Parts of an average that one token replaces: half-lives of 1, 4, 16, 32, 128 and 1,024 tokens.
const AVERAGES: [f32; 6] = [0.5, 0.1591, 0.0424, 0.02143, 0.005401, 0.000677];
/// The same of the wider choice: half-lives of 2.4 and 23 tokens.
const WIDER: [f32; 2] = [0.25, 0.03];
/// Which of the averages stands in where no sequence has an estimate.
const STAND_IN: usize = 3;
/// How many of the last tokens make a context.
const ORDERS: [usize; 3] = [1, 2, 3];
/// First of the inputs that are contexts.
const CONTEXTS: usize = AVERAGES.len() + WIDER.len();
const INPUTS: usize = CONTEXTS + ORDERS.len();
/// Tokens after which an estimate is judged.
const HORIZON: usize = 16;
const STEP: f32 = 0.001 * UNIT;
const BIAS_STEP: f32 = 0.002;
const MEAN_STEP: f32 = 0.02;
/// A row averages over at most this many tokens.
const MEMORY: f32 = 60.0;
/// Rows of a table: a power of two, at most this.
const ROWS_MAX: usize = 4096;
/// Sequences that are followed, at most.
const STREAMS_MAX: usize = 64;
/// A sequence is silent that was in none of the last so many passes: its estimates count no more,
/// and another may take its place.
const SILENT: u64 = 64;

/// See the module's text.
#[derive(Debug)]
pub struct Foresight {
    experts: usize,
    /// Rows of a table.
    rows: usize,
    streams_max: usize,
    curves: Curves,
    layers: Vec<Layer>,
    streams: BTreeMap<u64, Stream>,
    /// Passes so far, each counted in every layer.
    clock: u64,
}

#[derive(Debug)]
struct Layer {
    /// `[inputs but contexts, experts]`.
    averages: Vec<f32>,
    /// Of all goals so far.
    mean: Vec<f32>,
    /// One for each order.
    tables: Vec<Table>,
    /// By how many contexts are known.
    weights: Vec<[f32; INPUTS]>,
    bias: Vec<f32>,
    /// Estimates over all sequences.
    merged: Vec<f32>,
}

/// Estimates that are found by a hash of the context; another context of the same row takes it over.
#[derive(Debug)]
struct Table {
    mark: Vec<u16>,
    seen: Vec<u8>,
    /// `[rows, experts]`, in 65,536ths.
    value: Vec<u16>,
}

/// A sequence that is followed.
#[derive(Debug)]
struct Stream {
    /// When it had its last row.
    touched: u64,
    layers: Vec<Track>,
}

/// A sequence in a layer.
#[derive(Debug, Default)]
struct Track {
    /// Those of the last tokens, by token modulo horizon.
    trails: Vec<Trail>,
    tokens: usize,
    /// Estimates.
    value: Vec<f32>,
}

/// What a token left, until it is judged.
#[derive(Debug, Default)]
struct Trail {
    /// `[inputs, experts]`.
    inputs: Vec<i8>,
    rows: [usize; ORDERS.len()],
    known: usize,
    used: Vec<u32>,
}

/// A number for the last `order` tokens.
fn context(last: &[u32; 3], order: usize) -> u64 {
    let mix = |h: u64| {
        let h = (h ^ (h >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (h ^ (h >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    };
    last[..order].iter().fold(order as u64, |h, &token| mix(h ^ (u64::from(token) + 1)))
}

/// Bytes of a layer without its tables, of a row of all its tables, and of a sequence in it.
pub(super) fn sizes(experts: usize) -> (usize, usize, usize) {
    let layer = 4 * experts * (CONTEXTS + 3);
    let row = ORDERS.len() * (3 + 2 * experts);
    let stream = HORIZON * (INPUTS * experts + size_of::<Trail>()) + 4 * experts;
    (layer, row, stream)
}

impl Foresight {
    /// One whose state takes at most so many bytes; none if that is too little, or if a layer has
    /// more experts than is worth its while.
    pub fn within(shape: Shape, bytes: usize) -> Option<Self> {
        let Shape { layers, experts, active } = shape;
        if !(1..=EXPERTS_MAX).contains(&experts) || layers == 0 {
            return None;
        }
        let (layer, row, stream) = sizes(experts);
        let left = bytes.checked_sub(layers * (layer + row + stream))?;
        // Four fifths for what was learned of contexts, the rest for sequences.
        let rows = (left / 5 * 4 / (layers * row)).clamp(1, ROWS_MAX);
        let rows = 1 << rows.ilog2();
        let streams_max =
            (left.saturating_sub(layers * row * rows) / (layers * stream) + 1).min(STREAMS_MAX);
        let even = active as f32 / experts as f32;
        let table =
            || Table { mark: vec![0; rows], seen: vec![0; rows], value: vec![0; rows * experts] };
        let mut weights = [0.2; INPUTS];
        weights[AVERAGES.len()..CONTEXTS].fill(0.0);
        let layer = || Layer {
            averages: vec![even; CONTEXTS * experts],
            mean: vec![even; experts],
            tables: ORDERS.iter().map(|_| table()).collect(),
            weights: vec![weights; ORDERS.len() + 1],
            bias: vec![0.0; experts],
            merged: vec![even; experts],
        };
        Some(Self {
            experts,
            rows,
            streams_max,
            curves: Curves::new(),
            layers: (0..layers).map(|_| layer()).collect(),
            streams: BTreeMap::new(),
            clock: 0,
        })
    }

    /// Sequences that had a row since then are not silent.
    fn heard_since(&self) -> u64 {
        self.clock.saturating_sub(SILENT * self.layers.len() as u64)
    }

    /// Follows a sequence, if there is room: one that has been silent for long leaves.
    fn follow(&mut self, id: u64) -> bool {
        if !self.streams.contains_key(&id) && self.streams.len() >= self.streams_max {
            let oldest = self.streams.iter().min_by_key(|(_, stream)| stream.touched);
            match oldest.map(|(&id, stream)| (id, stream.touched < self.heard_since())) {
                Some((oldest, true)) => drop(self.streams.remove(&oldest)),
                _ => return false,
            }
        }
        let (touched, layers) = (self.clock, self.layers.len());
        let stream = self.streams.entry(id).or_insert_with(|| Stream {
            touched,
            layers: std::iter::repeat_with(Track::default).take(layers).collect(),
        });
        stream.touched = touched;
        true
    }
}

impl Layer {
    fn average(&mut self, row: &Row<'_>) {
        let experts = self.bias.len();
        let shares = AVERAGES.iter().chain(&WIDER);
        for (k, (average, share)) in self.averages.chunks_exact_mut(experts).zip(shares).enumerate()
        {
            for value in average.iter_mut() {
                *value -= share * *value;
            }
            for &expert in if k < AVERAGES.len() { row.experts } else { row.near } {
                if let Some(value) = average.get_mut(expert as usize) {
                    *value += share;
                }
            }
        }
    }

    /// What is known now.
    fn look(&mut self, curves: &Curves, row: &Row<'_>, trail: &mut Trail) {
        let n = self.bias.len();
        trail.inputs.resize(INPUTS * n, 0);
        let (averages, contexts) = trail.inputs.split_at_mut(CONTEXTS * n);
        for (input, average) in averages.iter_mut().zip(&self.averages) {
            *input = curves.odds(*average);
        }
        if row.near.is_empty() {
            averages[AVERAGES.len() * n..].fill(0);
        }
        trail.known = 0;
        for (k, table) in self.tables.iter_mut().enumerate() {
            let hash = context(&row.last, ORDERS[k]);
            let at = hash as usize & (table.mark.len() - 1);
            let mark = (hash >> 48) as u16;
            if table.mark[at] != mark {
                (table.mark[at], table.seen[at]) = (mark, 0);
            }
            trail.rows[k] = at;
            let (shorter, here) = contexts.split_at_mut(k * n);
            if table.seen[at] > 0 {
                trail.known = k + 1;
                for (input, value) in here.iter_mut().zip(&table.value[at * n..][..n]) {
                    *input = curves.odds_of_16_bits(*value);
                }
            } else if k > 0 {
                here[..n].copy_from_slice(&shorter[(k - 1) * n..]);
            } else {
                for (input, mean) in here.iter_mut().zip(&self.mean) {
                    *input = curves.odds(*mean);
                }
            }
        }
        trail.used.clear();
        trail.used.extend_from_slice(row.experts);
    }

    fn estimate(&self, curves: &Curves, known: usize, inputs: &[i8], out: &mut Vec<f32>) {
        out.clone_from(&self.bias);
        for (inputs, weight) in inputs.chunks_exact(self.bias.len()).zip(&self.weights[known]) {
            let weight = weight * UNIT;
            for (odds, &input) in out.iter_mut().zip(inputs) {
                *odds += weight * f32::from(input);
            }
        }
        for odds in out {
            *odds = curves.chance(*odds);
        }
    }

    /// Moves weights, biases and rows of a judged token towards the goal.
    fn learn(&mut self, curves: &Curves, trail: &Trail, goal: &[f32]) {
        let n = goal.len();
        let mut errors = Vec::with_capacity(n);
        self.estimate(curves, trail.known, &trail.inputs, &mut errors);
        let known = errors.iter_mut().zip(goal).zip(&mut self.bias).zip(&mut self.mean);
        for (((error, goal), bias), mean) in known {
            *error = goal - *error;
            *bias += BIAS_STEP * *error;
            *mean += MEAN_STEP * (goal - *mean);
        }
        for (inputs, weight) in trail.inputs.chunks_exact(n).zip(&mut self.weights[trail.known]) {
            // Eight sums side by side, then one: a fixed order that vector units can follow.
            let mut lanes = [0f32; 8];
            for (errors, inputs) in errors.chunks(8).zip(inputs.chunks(8)) {
                for ((lane, error), &input) in lanes.iter_mut().zip(errors).zip(inputs) {
                    *lane += error * f32::from(input);
                }
            }
            *weight += STEP * lanes.iter().sum::<f32>();
        }
        let mut shorter = self.mean.clone();
        for (table, &at) in self.tables.iter_mut().zip(&trail.rows) {
            let seen = table.seen[at];
            let rate = 1.0 / (f32::from(seen) + 1.6).min(MEMORY);
            table.seen[at] = seen.saturating_add(1);
            let values = table.value[at * n..][..n].iter_mut();
            for ((value, shorter), goal) in values.zip(&mut shorter).zip(goal) {
                let old = if seen == 0 { *shorter } else { f32::from(*value) / 65536.0 };
                *shorter = old + rate * (goal - old);
                *value = (*shorter * 65536.0) as u16;
            }
        }
    }
}

impl Track {
    /// What has become known of the token a horizon before this one: discounted, what was used
    /// since, and beyond that the estimate of now.
    fn goal(&self, used: &[u32]) -> Vec<f32> {
        let mut goal = self.value.clone();
        for back in 0..HORIZON {
            for value in &mut goal {
                *value *= DISCOUNT;
            }
            let used = match back {
                0 => used,
                _ => &self.trails[(self.tokens - back) % HORIZON].used,
            };
            for &expert in used {
                if let Some(value) = goal.get_mut(expert as usize) {
                    *value = 1.0;
                }
            }
        }
        goal
    }
}

impl Policy for Foresight {
    fn used(&mut self, layer: usize, row: &Row<'_>) {
        if layer >= self.layers.len() {
            return;
        }
        let followed = self.follow(row.stream);
        let (at, curves) = (&mut self.layers[layer], &self.curves);
        at.average(row);
        let Some(stream) = self.streams.get_mut(&row.stream).filter(|_| followed) else { return };
        let track = &mut stream.layers[layer];
        let slot = track.tokens % HORIZON;
        if track.tokens < HORIZON {
            track.trails.push(Trail::default());
        }
        let mut trail = Trail::default();
        at.look(curves, row, &mut trail);
        at.estimate(curves, trail.known, &trail.inputs, &mut track.value);
        let judged = std::mem::replace(&mut track.trails[slot], trail);
        if track.tokens >= HORIZON {
            let goal = track.goal(row.experts);
            at.learn(curves, &judged, &goal);
        }
        track.tokens += 1;
    }

    fn passed(&mut self, layer: usize) {
        if layer >= self.layers.len() {
            return;
        }
        self.clock += 1;
        let since = self.heard_since();
        let heard = self.streams.values().filter(|stream| stream.touched >= since);
        let tracks = heard.map(|stream| &stream.layers[layer]).filter(|track| track.tokens > 0);
        let (mut alone, at) = (true, &mut self.layers[layer]);
        at.merged.fill(1.0);
        for track in tracks {
            alone = false;
            for (merged, value) in at.merged.iter_mut().zip(&track.value) {
                *merged *= 1.0 - value;
            }
        }
        match alone {
            true => {
                at.merged.copy_from_slice(&at.averages[STAND_IN * self.experts..][..self.experts])
            }
            false => at.merged.iter_mut().for_each(|merged| *merged = 1.0 - *merged),
        }
    }

    fn ended(&mut self, stream: u64) {
        self.streams.remove(&stream);
    }

    fn value(&self, layer: usize, expert: u32) -> f32 {
        let merged = self.layers.get(layer).and_then(|layer| layer.merged.get(expert as usize));
        merged.copied().unwrap_or(0.0)
    }

    fn bytes(&self) -> usize {
        let (layer, row, stream) = sizes(self.experts);
        self.layers.len() * (layer + row * self.rows + stream * self.streams.len())
    }
}
