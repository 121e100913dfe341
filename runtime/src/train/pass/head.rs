//! The head: logits, losses, and their gradients, of a piece of the rows or of the vocabulary at a time.

use std::ops::Range;

use lite_llm_kernels::{
    cpu::Tensor,
    ops::{
        cross_entropy::{self, RowSoftmax},
        leaves::{LeafPlan, Place},
        norm::rms_norm,
        panel_sums::{RowMajor, products},
        row_sums::{Factor, sum_rows},
    },
    rows::Rows,
};

use super::{Gradients, LOGITS_MAX, ParamId, Pass, Tape, TrainError};

impl Pass<'_> {
    /// The last norm of the residual stream.
    pub(super) fn normed(&self, tape: &Tape) -> Tensor {
        let config = self.params.config();
        let mut normed = self.cpu.take_tensor(self.rows(), config.hidden);
        let norm = self.params.values(self.params.ids().norm);
        rms_norm(self.cpu, tape.last.as_slice(), norm, config.norm_eps, normed.as_mut_slice());
        self.params.precision().round(self.cpu, normed.as_mut_slice());
        normed
    }

    fn head(&self) -> ParamId {
        self.params.ids().head.unwrap_or(self.params.ids().embed)
    }

    /// Logits of some rows, to `out` `[rows, V]`.
    fn logits_of(&self, normed: &Tensor, rows: Range<usize>, out: &mut [f32]) {
        let hidden = self.params.config().hidden;
        let from = Rows::dense(&normed.as_slice()[rows.start * hidden..rows.end * hidden], hidden);
        let weight = self.params.weight(self.head());
        products(self.cpu, from, &mut [RowMajor { weight, bias: None, out }]);
    }

    /// All logits `[N, V]`: for comparison.
    pub(in crate::train) fn logits(&self, tape: &Tape) -> Vec<f32> {
        let normed = self.normed(tape);
        let mut logits = vec![0.0; self.rows() * self.params.config().vocab];
        self.logits_of(&normed, 0..self.rows(), &mut logits);
        self.cpu.give_tensor(normed);
        logits
    }

    /// Rows whose logits, so many values at most, exist at a time.
    fn rows_of(&self, logits_max: usize) -> usize {
        (logits_max / self.params.config().vocab).clamp(1, self.rows().max(1))
    }

    /// All rows, by pieces of so many.
    fn pieces(&self, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.rows();
        (0..rows).step_by(most).map(move |from| from..(from + most).min(rows))
    }

    /// The sum of all predictions' losses, by rule 8.
    pub(in crate::train) fn loss(&self, tape: &Tape) -> Result<f32, TrainError> {
        let (normed, vocab) = (self.normed(tape), self.params.config().vocab);
        let mut softmaxes = Vec::with_capacity(self.rows());
        let most = self.rows_of(self.logits_max.min(LOGITS_MAX));
        let mut memory = self.cpu.take(most * vocab);
        for piece in self.pieces(most) {
            let logits = &mut memory[..piece.len() * vocab];
            self.logits_of(&normed, piece.clone(), logits);
            softmaxes.extend(cross_entropy::losses(self.cpu, logits, &self.flat.targets[piece]));
        }
        self.cpu.give(memory);
        self.cpu.give_tensor(normed);
        self.sum_losses(&softmaxes)
    }

    fn sum_losses(&self, softmaxes: &[RowSoftmax]) -> Result<f32, TrainError> {
        let predicted: Vec<usize> =
            (0..self.rows()).filter(|&row| self.flat.targets[row].is_some()).collect();
        let losses: Vec<f32> = predicted.iter().map(|&row| softmaxes[row].loss).collect();
        if let Some(at) = losses.iter().position(|loss| !loss.is_finite()) {
            let (row, value) = (predicted[at], losses[at]);
            let error = TrainError::NotFinite { tensor: "the logits".into(), row, value };
            return Err(error.at(&self.flat));
        }
        let places: Vec<Place> = predicted.iter().map(|&row| self.flat.places[row]).collect();
        let plan = LeafPlan::of_tokens(&places, self.flat.rows.clone());
        let mut sum = [0.0];
        sum_rows(self.cpu, Factor::One, Rows::dense(&losses, 1), 1, &plan, &mut sum);
        Ok(sum[0])
    }

    /// Loss, and the gradients of the last norm's output and of the head.
    pub(super) fn head_backward(
        &self,
        normed: &Tensor,
        scale: f32,
        wanted: &[bool],
        gradients: &mut Gradients,
    ) -> Result<(f32, Vec<f32>), TrainError> {
        let (cpu, config) = (self.cpu, self.params.config());
        let (hidden, vocab, rows) = (config.hidden, config.vocab, self.rows());
        let head = self.head();
        let mut dnormed = cpu.take(rows * hidden);
        let mut softmaxes = Vec::with_capacity(rows);
        let over_vocab = LeafPlan::of(vocab);
        let most = self.rows_of(self.logits_max);
        let mut memory = cpu.take(most * vocab);
        for piece in self.pieces(most) {
            let logits = &mut memory[..piece.len() * vocab];
            self.logits_of(normed, piece.clone(), logits);
            let targets = &self.flat.targets[piece.clone()];
            let of = cross_entropy::losses(cpu, logits, targets);
            cross_entropy::gradient(cpu, logits, &of, targets, 0, scale);
            self.params.precision().round(cpu, logits);
            let factor = Factor::PerOutput(Rows::dense(logits, vocab));
            let table = Rows::dense(self.params.weight(head), hidden);
            let out = &mut dnormed[piece.start * hidden..piece.end * hidden];
            sum_rows(cpu, factor, table, hidden, &over_vocab, out);
            softmaxes.extend(of);
        }
        let loss = self.sum_losses(&softmaxes)?;
        if wanted[head] {
            let mut gradient = cpu.take(vocab * hidden);
            if most == rows {
                let factor = Factor::PerTerm(Rows::dense(&memory, vocab));
                sum_rows(cpu, factor, normed.as_rows(), hidden, &self.tokens, &mut gradient);
            } else {
                self.head_gradient(normed, &softmaxes, scale, &mut gradient);
            }
            // A table that is both has its parts added when all rows have been.
            let tied = self.params.list().len();
            gradients.set(self.params.ids().head.unwrap_or(tied), gradient);
        }
        cpu.give(memory);
        Ok((loss, dnormed))
    }

    /// The head's gradient, by pieces of the vocabulary whose logits are computed again.
    fn head_gradient(
        &self,
        normed: &Tensor,
        softmaxes: &[RowSoftmax],
        scale: f32,
        gradient: &mut [f32],
    ) {
        let (cpu, hidden, rows) = (self.cpu, self.params.config().hidden, self.rows());
        let table = self.params.weight(self.head());
        let piece = (self.logits_max / rows.max(1)).max(1);
        let mut memory = cpu.take(rows * piece.min(table.len() / hidden));
        for (i, (table, out)) in
            table.chunks(piece * hidden).zip(gradient.chunks_mut(piece * hidden)).enumerate()
        {
            let n = table.len() / hidden;
            let logits = &mut memory[..rows * n];
            let of = RowMajor { weight: table, bias: None, out: logits };
            products(cpu, normed.as_rows(), &mut [of]);
            let targets = &self.flat.targets;
            cross_entropy::gradient(cpu, logits, softmaxes, targets, i * piece, scale);
            self.params.precision().round(cpu, logits);
            let factor = Factor::PerTerm(Rows::dense(logits, n));
            sum_rows(cpu, factor, normed.as_rows(), hidden, &self.tokens, out);
        }
        cpu.give(memory);
    }
}

#[cfg(test)]
mod tests {
    use lite_llm_kernels::cpu::Cpu;

    use super::*;
    use crate::{
        config::ModelConfig,
        tier::TierMask,
        train::{
            Recompute,
            batch::{Batch, Flat, Row},
            config::NewModel,
            params::Params,
            pass::LOGITS_MAX,
        },
    };

    /// Head gradients of three rows where so many logits exist at a time, and what they are made of.
    fn head(logits_max: usize) -> (Vec<f32>, Vec<f32>, Params, Flat) {
        let tier = serde_json::json!({ "name": "tier_1b", "groups": 1, "experts": 2 });
        let new = serde_json::json!({
            "tokenizer": "", "hidden": 12, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 6,
            "context": 512, "intermediate": 4, "routes": [1, 1, 1], "tiers": [tier],
        });
        let new: NewModel = serde_json::from_value(new).unwrap();
        let mut like: ModelConfig = new.config(&vocabulary(1)).unwrap();
        like.vocab = 301;
        let mut params = Params::random(like, 3);
        let id = params.ids().head.unwrap();
        params.list_mut()[id].values_mut().iter_mut().for_each(|x| *x *= 30.0);
        let row = |n: u32| Row::whole((0..n).map(|i| (i * i + n) % 301).collect());
        let batch = Batch { rows: vec![row(300), row(5), row(40)] };
        let mask = TierMask::new(vec![true]);
        let cpu = Cpu::best(2);
        let flat = Flat::new(&batch, 0..3);
        let mut pass = Pass::new(&cpu, &params, &mask, Recompute::None, false, flat.clone(), None);
        pass.logits_max = logits_max;
        let tape = pass.forward(true).unwrap();
        let normed = pass.normed(&tape);
        let wanted = vec![true; params.list().len()];
        let mut gradients = Gradients::new(wanted.len() + 1);
        pass.head_backward(&normed, 0.25, &wanted, &mut gradients).unwrap();
        let gradient = gradients.take(id).unwrap();
        let normed = normed.as_slice().to_vec();
        (gradient, normed, params, flat)
    }

    fn vocabulary(tokens: usize) -> ModelConfig {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let mut config = crate::checkpoint::Checkpoint::open(demo).unwrap().config().clone();
        config.vocab = config.vocab.max(tokens);
        config
    }

    #[test]
    fn the_heads_gradient_by_pieces_has_the_bits_of_the_whole_and_is_the_formulas() {
        let (whole, normed, params, flat) = head(LOGITS_MAX);
        for most in [1, 301 * 7, 345 * 10] {
            let pieces = head(most).0;
            let same = pieces.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "pieces of {most} logits");
        }
        let table = params.values(params.ids().head.unwrap());
        let mut exact = vec![0.0f64; table.len()];
        for (row, target) in flat.targets.iter().enumerate() {
            let Some(target) = *target else { continue };
            let x = &normed[row * 12..][..12];
            let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let z: Vec<f64> = table.chunks(12).map(dot).collect();
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            for (i, z) in z.iter().enumerate() {
                let dz = 0.25 * (z.exp() / sum - f64::from(u8::from(i == target as usize)));
                for (to, x) in exact[i * 12..].iter_mut().zip(x) {
                    *to += dz * f64::from(*x);
                }
            }
        }
        let norm = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
        let off: f64 = exact.iter().zip(&whole).map(|(e, f)| (e - f64::from(*f)).powi(2)).sum();
        assert!(norm > 1.0 && off.sqrt() < 1e-5 * norm, "{} of {norm}", off.sqrt());
    }
}
