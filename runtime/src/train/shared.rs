//! A step that several compute: who has the parameters is told a node of the tree over rows, and gives back
//! its sums or its gradients.
//!
//! [`Work`] and [`Computed`] are all that travels beside parameters, and bytes of theirs keep every bit. What
//! a worker gives is a function of the parameters and the work, so that work of one that is lost can be given to
//! another, and the step has the bits of one process ([`super::step`]).

use std::ops::Range;

use lite_llm_kernels::cpu::Cpu;

use super::{
    Recompute, TrainError,
    balance::{BalanceWeights, Sums},
    batch::{Batch, Row},
    bytes::{Damaged, Reader, Writer},
    gradients::Gradients,
    params::{ParamId, Params},
    step::{self, Objective, StepOptions},
};
use crate::{config::ModelConfig, tier::TierMask};

/// Rows of a global batch at most.
const ROWS_MAX: usize = 1 << 24;

/// Who computes nodes of a step.
pub trait Workers: Send {
    /// How many there are, or are to be: a batch is cut for so many.
    fn count(&self) -> usize;

    /// What each of these gives, in their order, with parameters as they are now.
    fn compute(&mut self, params: &Params, work: Vec<Work>) -> Result<Vec<Computed>, TrainError>;
}

/// What is asked of a node.
#[derive(Debug, Clone, PartialEq)]
pub enum Wanted {
    /// What its gates say.
    Sums,
    /// Losses and gradients.
    Gradients {
        /// Of which parameters.
        of: Vec<bool>,
        /// The loss of each prediction is multiplied by this.
        scale: f32,
        /// What all gates say over the whole batch; if nothing, the node is the whole batch.
        known: Option<Sums>,
    },
}

/// A node of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Work {
    /// Its rows among those of the global batch.
    pub node: Range<usize>,
    /// These.
    pub rows: Vec<Row>,
    /// Which tiers are used.
    pub tiers: Vec<bool>,
    /// Weights of the losses beside cross-entropy.
    pub balance: BalanceWeights,
    /// What is kept for the backward pass.
    pub recompute: Recompute,
    /// Rows of a micro-batch at most.
    pub micro_rows: usize,
    /// What is asked.
    pub wanted: Wanted,
}

/// What a node gives.
#[derive(Debug)]
pub enum Computed {
    /// For [`Wanted::Sums`].
    Sums(Sums),
    /// For [`Wanted::Gradients`].
    Gradients {
        /// Sum of the predictions' losses.
        loss: f32,
        /// What the node's gates say.
        sums: Sums,
        /// By parameter, and one more: of the embedding as a table of inputs.
        gradients: Gradients,
    },
}

impl Work {
    /// Computes it.
    pub fn compute(self, cpu: &Cpu, params: &Params) -> Result<Computed, TrainError> {
        let tiers = params.config().moe.as_ref().map_or(0, |moe| moe.tiers.len());
        let rows = self.rows.len() == self.node.len() && self.node.end <= ROWS_MAX;
        if self.tiers.len() != tiers || !rows || self.node.is_empty() {
            return Err(TrainError::Batch("work that does not fit the model".into()));
        }
        let node = self.node.clone();
        // What is before the node is computed by others, and not looked at.
        let before = (0..node.start).map(|_| Row::default());
        let batch = Batch { rows: before.chain(self.rows).collect() };
        step::check(params, &batch, node.clone())?;
        let mask = TierMask::new(self.tiers);
        let options = StepOptions {
            mask: &mask,
            objective: Objective { cross_entropy: 1.0, balance: self.balance },
            recompute: self.recompute,
            micro_rows: self.micro_rows,
        };
        match self.wanted {
            Wanted::Sums => step::sums(cpu, params, &batch, &options, node).map(Computed::Sums),
            Wanted::Gradients { of, scale, known } => {
                if of.len() != params.list().len() {
                    return Err(TrainError::Batch("work for other parameters".into()));
                }
                let known = known.as_ref();
                let found = step::node(cpu, params, &batch, &options, &of, scale, node, known)?;
                let (loss, sums, gradients) = found;
                Ok(Computed::Gradients { loss, sums, gradients })
            }
        }
    }

    /// As bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = Writer::default();
        to.number(self.node.start);
        to.number(self.node.end);
        to.number(self.rows.len());
        for row in &self.rows {
            to.u32s(&row.tokens);
            // No id is the largest: a vocabulary has fewer.
            let targets: Vec<u32> = row.targets.iter().map(|t| t.unwrap_or(u32::MAX)).collect();
            to.u32s(&targets);
            let starts: Vec<u64> = row.documents.iter().map(|start| *start as u64).collect();
            to.u64s(&starts);
        }
        to.flags(&self.tiers);
        let BalanceWeights { tier, group, expert, aux, z } = self.balance;
        [tier, group, expert, aux, z].iter().for_each(|weight| to.f64(*weight));
        to.flags(&[self.recompute == Recompute::Layer]);
        to.number(self.micro_rows);
        match &self.wanted {
            Wanted::Sums => to.number(0),
            Wanted::Gradients { of, scale, known } => {
                to.number(1);
                to.flags(of);
                to.f32(*scale);
                to.flags(&[known.is_some()]);
                if let Some(sums) = known {
                    sums.write(&mut to);
                }
            }
        }
        to.into_bytes()
    }

    /// From bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Damaged> {
        let mut from = Reader::new(bytes);
        let node = from.number()?..from.number()?;
        let count = from.count(24)?;
        let mut rows = Vec::with_capacity(count);
        for _ in 0..count {
            let tokens = from.u32s()?;
            let targets = from.u32s()?.into_iter().map(|t| (t != u32::MAX).then_some(t)).collect();
            let documents = from.u64s()?.into_iter().map(|start| start as usize).collect();
            rows.push(Row { tokens, targets, documents });
        }
        let tiers = from.flags()?;
        let balance = BalanceWeights {
            tier: from.f64()?,
            group: from.f64()?,
            expert: from.f64()?,
            aux: from.f64()?,
            z: from.f64()?,
        };
        let recompute = match from.flags()?[..] {
            [true] => Recompute::Layer,
            _ => Recompute::None,
        };
        let micro_rows = from.number()?;
        let wanted = match from.number()? {
            0 => Wanted::Sums,
            1 => {
                let (of, scale) = (from.flags()?, from.f32()?);
                let known = match from.flags()?[..] {
                    [true] => Some(Sums::read(&mut from)?),
                    _ => None,
                };
                Wanted::Gradients { of, scale, known }
            }
            _ => return Err(Damaged),
        };
        from.end()?;
        Ok(Self { node, rows, tiers, balance, recompute, micro_rows, wanted })
    }
}

impl Computed {
    /// As bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = Writer::default();
        match self {
            Self::Sums(sums) => {
                to.number(0);
                sums.write(&mut to);
            }
            Self::Gradients { loss, sums, gradients } => {
                to.number(1);
                to.f32(*loss);
                sums.write(&mut to);
                gradients.write(&mut to);
            }
        }
        to.into_bytes()
    }

    /// From bytes; gradients have the shapes of parameters.
    pub fn from_bytes(bytes: &[u8], params: &Params) -> Result<Self, Damaged> {
        let mut from = Reader::new(bytes);
        let found = match from.number()? {
            0 => Self::Sums(Sums::read(&mut from)?),
            1 => Self::Gradients {
                loss: from.f32()?,
                sums: Sums::read(&mut from)?,
                gradients: Gradients::read(&mut from, params)?,
            },
            _ => return Err(Damaged),
        };
        from.end()?;
        let (Self::Sums(sums) | Self::Gradients { sums, .. }) = &found;
        if sums.fit(params.config()) { Ok(found) } else { Err(Damaged) }
    }
}

/// A model's configuration as bytes, for [`empty_model`].
pub fn model_to_bytes(config: &ModelConfig) -> Result<Vec<u8>, TrainError> {
    let bytes = serde_json::to_vec(config).unwrap_or_default();
    // A decimal may come back as the number's neighbour.
    match serde_json::from_slice::<ModelConfig>(&bytes) {
        Ok(again) if again == *config => Ok(bytes),
        _ => Err(TrainError::Workers(
            "a number of the model's configuration changes on its way to workers; write it with fewer \
             digits, or train without --workers"
                .into(),
        )),
    }
}

/// A model whose parameters are zeros until [`set_values`] sets them.
pub fn empty_model(bytes: &[u8]) -> Result<Params, Damaged> {
    let config: ModelConfig = serde_json::from_slice(bytes).map_err(|_| Damaged)?;
    config.check().map_err(|_| Damaged)?;
    let zeros = |_: &str, shape: &[usize]| Some(vec![0.0; shape.iter().product()]);
    Params::new(config, zeros).map_err(|_| Damaged)
}

/// Values of some parameters as bytes.
pub fn values_to_bytes<'a>(values: impl ExactSizeIterator<Item = (ParamId, &'a [f32])>) -> Vec<u8> {
    let mut to = Writer::default();
    to.number(values.len());
    for (id, values) in values {
        to.number(id);
        to.f32s(values);
    }
    to.into_bytes()
}

/// Sets the values that [`values_to_bytes`] has written.
pub fn set_values(params: &mut Params, bytes: &[u8]) -> Result<(), Damaged> {
    let mut from = Reader::new(bytes);
    for _ in 0..from.count(16)? {
        let (id, values) = (from.number()?, from.f32s()?);
        let param = params.list_mut().get_mut(id).ok_or(Damaged)?;
        if param.values().len() != values.len() {
            return Err(Damaged);
        }
        param.values_mut().copy_from_slice(&values);
    }
    from.end()
}

impl TrainError {
    /// As bytes, for who gave the work.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = Writer::default();
        match self {
            Self::NotFinite { tensor, row, value } => {
                to.number(0);
                to.text(tensor);
                to.number(*row);
                to.f32(*value);
            }
            Self::Gradient { parameter } => {
                to.number(1);
                to.text(parameter);
            }
            Self::Norm { norm } => {
                to.number(2);
                to.f32(*norm);
            }
            Self::Batch(reason) | Self::Workers(reason) => {
                to.number(3);
                to.text(reason);
            }
        }
        to.into_bytes()
    }

    /// From bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Damaged> {
        let mut from = Reader::new(bytes);
        Ok(match from.number()? {
            0 => Self::NotFinite { tensor: from.text()?, row: from.number()?, value: from.f32()? },
            1 => Self::Gradient { parameter: from.text()? },
            2 => Self::Norm { norm: from.f32()? },
            3 => Self::Batch(from.text()?),
            _ => return Err(Damaged),
        })
    }
}
