//! The least frequently used goes first, where older uses count less.

use super::{Policy, Row, Shape, recency::EXPERTS_MAX};

/// Tokens of a sequence after which a use counts half.
const HALF_LIFE: f64 = 32.0;
/// Tokens after which a use counts nothing.
const MEMORY: usize = 1024;

/// An average of how often each expert is used by a token. Its cost does not depend on the number
/// of experts.
#[derive(Debug)]
pub struct Ageing {
    /// What a use counts after so many tokens.
    ages: Vec<f32>,
    layers: Vec<Layer>,
}

#[derive(Debug, Clone, Default)]
struct Layer {
    /// Tokens of a sequence so far.
    now: u64,
    averages: Vec<Average>,
    /// Uses of this pass, its rows and sequences.
    uses: Vec<u32>,
    rows: usize,
    streams: Vec<u64>,
}

/// An average as it was after so many tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Average {
    value: f32,
    at: u64,
}

impl Ageing {
    /// For a model of this shape.
    pub fn new(shape: Shape) -> Self {
        // 2^(-1/32), by roots: IEEE roots have the same bits everywhere.
        let mut step = 0.5f64;
        let mut life = HALF_LIFE;
        while life > 1.0 {
            (step, life) = (step.sqrt(), life / 2.0);
        }
        let ages = std::iter::successors(Some(1.0f64), |age| Some(age * step));
        let ages = ages.take(MEMORY).map(|age| age as f32).collect();
        Self { ages, layers: vec![Layer::default(); shape.layers] }
    }
}

fn aged(ages: &[f32], average: Average, now: u64) -> f32 {
    let age = usize::try_from(now - average.at).unwrap_or(usize::MAX);
    average.value * ages.get(age).copied().unwrap_or(0.0)
}

impl Policy for Ageing {
    fn used(&mut self, layer: usize, row: &Row<'_>) {
        if let Some(layer) = self.layers.get_mut(layer) {
            layer.rows += 1;
            if !layer.streams.contains(&row.stream) {
                layer.streams.push(row.stream);
            }
            layer.uses.extend(row.experts.iter().filter(|e| (**e as usize) < EXPERTS_MAX));
        }
    }

    fn passed(&mut self, layer: usize) {
        let Some(layer) = self.layers.get_mut(layer).filter(|layer| layer.rows > 0) else { return };
        // What several sequences use side by side does not age faster.
        let tokens = layer.rows.div_ceil(layer.streams.len().max(1));
        layer.now += tokens as u64;
        let kept = self.ages.get(tokens).copied().unwrap_or(0.0);
        let share = (1.0 - kept) / layer.rows as f32;
        for &expert in &layer.uses {
            let at = expert as usize;
            if layer.averages.len() <= at {
                layer.averages.resize(at + 1, Average::default());
            }
            let value = aged(&self.ages, layer.averages[at], layer.now) + share;
            layer.averages[at] = Average { value, at: layer.now };
        }
        layer.uses.clear();
        layer.streams.clear();
        layer.rows = 0;
    }

    fn value(&self, layer: usize, expert: u32) -> f32 {
        self.layers.get(layer).map_or(0.0, |layer| {
            let average = layer.averages.get(expert as usize).copied().unwrap_or_default();
            aged(&self.ages, average, layer.now).min(1.0)
        })
    }

    fn bytes(&self) -> usize {
        let of_layer = |layer: &Layer| size_of_val(&layer.averages[..]);
        size_of_val(&self.ages[..]) + self.layers.iter().map(of_layer).sum::<usize>()
    }
}
