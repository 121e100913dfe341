//! What one step trains on: rows of tokens, cut into documents, with what comes next.

use std::ops::Range;

use lite_llm_kernels::ops::leaves::Place;

/// One row (sequence) of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// What follows each of them, where that is to be predicted.
    pub targets: Vec<Option<u32>>,
    /// Where documents begin, 0 first, upwards. Attention and positions begin anew there.
    pub documents: Vec<usize>,
}

impl Row {
    /// A row that is one document and predicts each of its own tokens but the first.
    pub fn whole(tokens: Vec<u32>) -> Self {
        let targets = tokens.iter().skip(1).map(|&t| Some(t)).chain([None]).collect();
        Self { tokens, targets, documents: vec![0] }
    }
}

/// The rows of one step, over all micro-batches and ranks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// By their index in the global batch.
    pub rows: Vec<Row>,
}

impl Batch {
    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len()).sum()
    }

    /// Predictions in all.
    pub fn predictions(&self) -> usize {
        let of = |row: &Row| row.targets.iter().filter(|t| t.is_some()).count();
        self.rows.iter().map(of).sum()
    }
}

/// The rows of one node of the tree over rows, flat.
#[derive(Debug, Clone)]
pub(super) struct Flat {
    pub(super) rows: Range<usize>,
    pub(super) ids: Vec<u32>,
    pub(super) places: Vec<Place>,
    pub(super) targets: Vec<Option<u32>>,
    /// Position within the document.
    pub(super) positions: Vec<u32>,
    /// Documents as ranges of flat rows.
    pub(super) documents: Vec<Range<usize>>,
}

impl Flat {
    pub(super) fn new(batch: &Batch, rows: Range<usize>) -> Self {
        let mut flat = Self {
            rows: rows.clone(),
            ids: Vec::new(),
            places: Vec::new(),
            targets: Vec::new(),
            positions: Vec::new(),
            documents: Vec::new(),
        };
        for index in rows {
            let row = &batch.rows[index];
            let first = flat.ids.len();
            flat.ids.extend(&row.tokens);
            flat.targets.extend(&row.targets);
            let place = |position| Place { row: index as u32, position };
            flat.places.extend((0..row.tokens.len() as u32).map(place));
            let ends = row.documents.iter().skip(1).copied().chain([row.tokens.len()]);
            for (start, end) in row.documents.iter().copied().zip(ends) {
                if start < end {
                    flat.documents.push(first + start..first + end);
                    flat.positions.extend(0..(end - start) as u32);
                }
            }
        }
        flat
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }
}
