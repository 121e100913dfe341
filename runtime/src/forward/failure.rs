//! What fails a chunk of a pass: numbers that are not finite, experts that cannot be run. The others
//! have the bits that they would have had without it.

use lite_llm_kernels::{
    device::{Device, DeviceError},
    kv::KvSlot,
};

use super::{Chunk, ChunkError, ForwardPass, slot};
use crate::routing::ScoreError;

impl<D: Device> ForwardPass<D> {
    /// Ends a chunk; only its first reason counts.
    pub(super) fn fail(&mut self, chunk: usize, error: ChunkError) {
        if self.failures[chunk].is_none() {
            self.failures[chunk] = Some(error);
            self.unclean.push(chunk);
        }
    }

    /// Ends the chunks of rows that could not be routed.
    pub(super) fn fail_unrouted(&mut self) -> Result<(), DeviceError> {
        for error in self.routes.failures().to_vec() {
            let (chunk, _) = self.place(error.row);
            if self.failures[chunk].is_none() {
                let ScoreError { layer, level, row, score } = error;
                let gate = || (format!("layer {layer}: the scores of the {level} gate"), score);
                let error = self.not_finite(row, gate)?;
                self.fail(chunk, error);
            }
        }
        Ok(())
    }

    /// Where what is not finite came from: the embedding of a token that the row sees in its chunk,
    /// the hidden state that a router was given, or else what the caller has seen.
    pub(super) fn not_finite(
        &self,
        row: usize,
        seen: impl FnOnce() -> (String, f32),
    ) -> Result<ChunkError, DeviceError> {
        let backbone = &*self.backbone;
        let device = &*backbone.device;
        let hidden = backbone.config.hidden;
        let not_finite = |values: &[f32]| values.iter().position(|value| !value.is_finite());
        let (chunk, position) = self.place(row);
        let (rows, chunk) = (self.rows_of(chunk), &self.chunks[chunk]);
        let tokens = &chunk.tokens[..=row - rows.start];
        let mut embedded = device.tensor(tokens.len(), hidden)?;
        device.embed(&backbone.embed, tokens, &mut embedded)?;
        let embedded = device.read(&embedded)?;
        if let Some(at) = not_finite(&embedded) {
            let (token, value) = (tokens[at / hidden], embedded[at]);
            let tensor = format!("the embedding table `embed`, row {token}, seen before layer 0,");
            let position = chunk.start + at / hidden;
            return Ok(ChunkError::NotFinite { position, token, tensor, value });
        }
        let token = chunk.tokens[row - rows.start];
        let (mut tensor, mut value) = seen();
        if self.layer < backbone.layers.len() {
            let states = device.read(&self.tensors.normed)?;
            if let Some(at) = not_finite(&states[row * hidden..][..hidden]) {
                let layer = self.layer;
                tensor = format!("layer {layer}: the hidden state after `layers.{layer}.ffn_norm`");
                value = states[row * hidden + at];
            }
        }
        Ok(ChunkError::NotFinite { position, token, tensor, value })
    }

    /// Takes the routes of chunks that failed away.
    pub(super) fn drop_failed_routes(&mut self) {
        let alive = self.rows_alive();
        self.routes.keep_rows(|row| alive[row]);
    }

    /// Zeroes the hidden states of chunks that failed, and what they wrote into the cache: pages are given
    /// to other sequences, and a kernel may multiply what lies behind a position by zero. What came
    /// before them is finite ([`Self::check_hidden`]), and may be others' prefix, too.
    pub(super) fn clean(&mut self, arena: &mut D::KvArena) -> Result<(), DeviceError> {
        if self.unclean.is_empty() {
            return Ok(());
        }
        let backbone = self.backbone.clone();
        let (device, attention) = (&*backbone.device, &backbone.config.attention);
        let (hidden, width) = (backbone.config.hidden, attention.kv_heads * attention.head_dim);
        let mut x = device.read(&self.tensors.x)?.into_owned();
        for chunk in std::mem::take(&mut self.unclean) {
            let rows = self.rows_of(chunk);
            x[rows.start * hidden..rows.end * hidden].fill(0.0);
            let Chunk { start, tokens, pages, .. } = &self.chunks[chunk];
            let positions = *start..start + tokens.len();
            let slots: Vec<KvSlot> = positions.map(|position| slot(pages, position)).collect();
            let mut zeros = device.tensor(slots.len(), width)?;
            device.write(&mut zeros, &vec![0.0; slots.len() * width])?;
            for layer in 0..backbone.layers.len() {
                device.kv_append(arena, layer, &zeros, &zeros, &slots)?;
            }
        }
        device.write(&mut self.tensors.x, &x)
    }

    /// Ends chunks whose hidden states after the last layer are not all finite, which keys and values
    /// that are not finite make of them. Where logits are wanted of every row, those tell.
    pub(super) fn check_hidden(&mut self) -> Result<(), DeviceError> {
        let rows_told = |(chunk, c): (usize, &Chunk)| self.logit_rows(chunk) == c.tokens.len();
        let backbone = self.backbone.clone();
        if self.chunks.iter().enumerate().all(rows_told)
            || backbone.device.is_finite(&self.tensors.x)?
        {
            return Ok(());
        }
        let (hidden, alive) = (backbone.config.hidden, self.rows_alive());
        let x = backbone.device.read(&self.tensors.x)?.into_owned();
        for (row, states) in x.chunks_exact(hidden).enumerate().filter(|(row, _)| alive[*row]) {
            if let Some(&value) = states.iter().find(|value| !value.is_finite()) {
                let seen = || ("the hidden state after the last layer".to_owned(), value);
                let error = self.not_finite(row, seen)?;
                self.fail(self.place(row).0, error);
            }
        }
        Ok(())
    }

    /// Ends the chunks of rows whose logits are not finite, and leaves those of the others.
    pub(super) fn fail_logits(
        &mut self,
        wanted: &[u32],
        mut logits: Vec<f32>,
    ) -> Result<(), DeviceError> {
        let vocab = self.backbone.config.vocab;
        for (&row, logits) in wanted.iter().zip(logits.chunks_exact(vocab)) {
            if self.failures[self.place(row as usize).0].is_some() {
                continue;
            }
            if let Some(&value) = logits.iter().find(|value| !value.is_finite()) {
                let error = self.not_finite(row as usize, || ("the logits".into(), value))?;
                self.fail(self.place(row as usize).0, error);
            }
        }
        let alive = self.rows_alive();
        let keep: Vec<bool> = wanted.iter().map(|&row| alive[row as usize]).collect();
        let mut to = 0;
        for from in (0..keep.len()).filter(|&row| keep[row]) {
            logits.copy_within(from * vocab..(from + 1) * vocab, to * vocab);
            to += 1;
        }
        let device = &*self.backbone.device;
        device.reshape(&mut self.tensors.logits, to, vocab)?;
        device.write(&mut self.tensors.logits, &logits[..to * vocab])
    }
}
