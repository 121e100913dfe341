//! What the gates said of a batch: scores and probabilities of all candidates, for training.

/// A gate of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Gate {
    /// Over the tiers.
    Tiers,
    /// Over the groups of a tier.
    Groups {
        /// Index of the tier.
        tier: usize,
    },
    /// Over the experts of a group.
    Experts {
        /// Index of the tier.
        tier: usize,
        /// Group within the tier.
        group: usize,
    },
}

/// The place of a gate among traces as a router leaves them, which is the order of [`Gate`]; none where there was no
/// choice.
pub fn trace_of(traces: &[GateTrace], gate: Gate) -> Option<usize> {
    traces.binary_search_by_key(&gate, |trace| trace.gate).ok()
}

/// What one gate said of the rows that came to it.
#[derive(Debug, Clone, PartialEq)]
pub struct GateTrace {
    /// Which gate.
    pub gate: Gate,
    /// Candidates of the gate, those outside the set of tiers included.
    pub candidates: usize,
    /// Rows of the batch that came to it, upwards, each once.
    pub rows: Vec<u32>,
    /// `[rows, candidates]`.
    pub scores: Vec<f32>,
    /// Softmax over the open candidates `[rows, candidates]`; 0 for closed ones.
    pub probabilities: Vec<f32>,
    /// Whether a candidate was open to the rows.
    pub open: Vec<bool>,
}

impl GateTrace {
    pub(super) fn new(gate: Gate, candidates: usize, rows: impl Iterator<Item = u32>) -> Self {
        let (scores, probabilities) = (Vec::new(), Vec::new());
        let open = vec![false; candidates];
        Self { gate, candidates, rows: rows.collect(), scores, probabilities, open }
    }

    /// Adds the next row.
    pub(super) fn push(&mut self, scores: &[f32], open: &[(u32, f32)], probabilities: &[f32]) {
        self.scores.extend_from_slice(scores);
        let at = self.probabilities.len();
        self.probabilities.resize(at + self.candidates, 0.0);
        for (&(index, _), &probability) in open.iter().zip(probabilities) {
            self.probabilities[at + index as usize] = probability;
            self.open[index as usize] = true;
        }
    }

    /// The probabilities of row i of [`GateTrace::rows`].
    pub fn row(&self, i: usize) -> &[f32] {
        &self.probabilities[i * self.candidates..][..self.candidates]
    }

    /// Candidates that were open.
    pub fn open_candidates(&self) -> usize {
        self.open.iter().filter(|open| **open).count()
    }
}
