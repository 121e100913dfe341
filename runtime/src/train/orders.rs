//! What the trainer tells ranks, and what they give: [`Order`] and [`Given`] are all that travels between
//! them, and bytes of theirs keep every bit ([`super::rank`], [`super::spread`]).

use std::ops::Range;

use super::{
    Recompute, TrainError,
    balance::{BalanceWeights, Sums},
    batch::Row,
    bytes::{Damaged, Reader, Writer},
    config::OptimizerConfig,
    optimizer::{Adafactor, AdamW, Sgd, StepAt},
    params::ParamId,
    precision::Precision,
    trained::Trained,
};
use crate::config::ModelConfig;

/// Rows of a global batch at most.
pub(super) const ROWS_MAX: usize = 1 << 24;

/// What a rank is told, one thing after another.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// Forgets what it had, and begins with a model of which it gets its part by [`Order::Tensors`].
    Begin(Box<Begin>),
    /// Takes values and states.
    Tensors(Vec<Tensor>),
    /// Computes nodes of a batch.
    Work(Box<Work>),
    /// Adds what all ranks gave to the parameters that it owns.
    Prepare,
    /// Steps what it owns, and tells the others of what they hold, too.
    Apply(StepAt),
    /// Gives values and states of these parameters, which it owns.
    Read(Vec<ParamId>),
}

/// What a rank gives.
#[derive(Debug, Clone, PartialEq)]
pub enum Given {
    /// It is done.
    Done,
    /// For [`Order::Work`]: of each node.
    Nodes(Vec<OfNode>),
    /// For [`Order::Prepare`]: of each parameter that it owns and trains.
    Prepared(Vec<Prepared>),
    /// For [`Order::Read`].
    Tensors(Vec<Tensor>),
}

/// A rank's part of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Begin {
    /// The model.
    pub model: ModelConfig,
    /// Number format of products.
    pub precision: Precision,
    /// Which rank it is.
    pub rank: usize,
    /// Ranks in all.
    pub ranks: usize,
    /// The rank that owns each parameter: its master, and its optimizer's states.
    pub owners: Vec<usize>,
    /// What of each parameter is trained.
    pub trained: Vec<Trained>,
    /// Which of them weight decay concerns.
    pub decays: Vec<bool>,
    /// What moves them.
    pub optimizer: OptimizerConfig,
    /// How strongly what has a [`Kind::Toward`] is pulled.
    pub pull: Option<f64>,
    /// Steps so far.
    pub steps: u64,
}

/// What a tensor is of its parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Its values.
    Values,
    /// A state of its optimizer, by its place.
    State(usize),
    /// What it is pulled toward.
    Toward,
}

/// Values or a state of a parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Which parameter.
    pub id: ParamId,
    /// What of it.
    pub kind: Kind,
    /// All of it.
    pub values: Vec<f32>,
}

/// What is asked of nodes.
#[derive(Debug, Clone, PartialEq)]
pub enum Wanted {
    /// What their gates say.
    Sums,
    /// That, and losses.
    Losses,
    /// That, and gradients, which go to their owners.
    Gradients {
        /// The loss of each prediction is multiplied by this.
        scale: f32,
        /// What all gates say over the whole batch; if nothing, the node is the whole batch.
        known: Option<Sums>,
    },
}

/// Nodes of the tree over a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Work {
    /// Counts the work of all ranks.
    pub round: u64,
    /// Rows of the whole batch.
    pub batch: usize,
    /// Rows of each node among those of the batch, and these rows.
    pub nodes: Vec<(Range<usize>, Vec<Row>)>,
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
#[derive(Debug, Clone, PartialEq)]
pub struct OfNode {
    /// Sum of the predictions' losses.
    pub loss: f32,
    /// What its gates say.
    pub sums: Sums,
}

/// A parameter's gradient, before it is applied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prepared {
    /// Of which.
    pub id: ParamId,
    /// Σ g², by rule 3.
    pub squares: f32,
    /// λ/2 · |p − p₀|².
    pub pull: f64,
}

/// A configuration as JSON, if that brings back what went in: a decimal may come back as the number's neighbour.
fn json(model: &ModelConfig) -> Result<String, TrainError> {
    let text = serde_json::to_string(model).unwrap_or_default();
    match serde_json::from_str::<ModelConfig>(&text) {
        Ok(again) if again == *model => Ok(text),
        _ => Err(TrainError::Workers(
            "a number of the model's configuration changes on its way to workers; write it with fewer \
             digits, or train without --workers"
                .into(),
        )),
    }
}

fn numbers(to: &mut Writer, numbers: impl ExactSizeIterator<Item = usize>) {
    to.number(numbers.len());
    numbers.for_each(|n| to.number(n));
}

fn read_numbers(from: &mut Reader<'_>) -> Result<Vec<usize>, Damaged> {
    (0..from.count(8)?).map(|_| from.number()).collect()
}

pub(super) fn write_tensors(to: &mut Writer, tensors: &[Tensor]) {
    to.number(tensors.len());
    for Tensor { id, kind, values } in tensors {
        to.number(*id);
        to.number(match kind {
            Kind::Values => 0,
            Kind::Toward => 1,
            Kind::State(n) => 2 + n,
        });
        to.f32s(values);
    }
}

pub(super) fn read_tensors(from: &mut Reader<'_>) -> Result<Vec<Tensor>, Damaged> {
    let tensor = |from: &mut Reader<'_>| {
        let id = from.number()?;
        let kind = match from.number()? {
            0 => Kind::Values,
            1 => Kind::Toward,
            n => Kind::State(n - 2),
        };
        Ok(Tensor { id, kind, values: from.f32s()? })
    };
    (0..from.count(24)?).map(|_| tensor(from)).collect()
}

impl Begin {
    fn write(&self, to: &mut Writer) -> Result<(), TrainError> {
        to.text(&json(&self.model)?);
        to.flags(&[self.precision == Precision::Bf16]);
        to.number(self.rank);
        to.number(self.ranks);
        numbers(to, self.owners.iter().copied());
        to.number(self.trained.len());
        for trained in &self.trained {
            match trained {
                Trained::Nothing => to.number(0),
                Trained::All => to.number(1),
                Trained::Rows(rows) => {
                    to.number(2);
                    numbers(to, rows.iter().copied());
                }
            }
        }
        to.flags(&self.decays);
        let (kind, of) = match self.optimizer {
            OptimizerConfig::Adamw(AdamW { beta1, beta2, eps, weight_decay }) => {
                (0, vec![beta1, beta2, eps, weight_decay])
            }
            OptimizerConfig::Adafactor(of) => {
                let Adafactor { eps, scale_min, clip_threshold, decay_rate, weight_decay } = of;
                (1, vec![eps, scale_min, clip_threshold, decay_rate, weight_decay])
            }
            OptimizerConfig::Sgd(Sgd { momentum, weight_decay }) => {
                (2, vec![momentum, weight_decay])
            }
        };
        to.number(kind);
        of.iter().for_each(|number| to.f64(*number));
        to.flags(&[self.pull.is_some()]);
        to.f64(self.pull.unwrap_or_default());
        to.number(self.steps as usize);
        Ok(())
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let model = serde_json::from_str(&from.text()?).map_err(|_| Damaged)?;
        let precision = if from.flags()? == [true] { Precision::Bf16 } else { Precision::F32 };
        let (rank, ranks, owners) = (from.number()?, from.number()?, read_numbers(from)?);
        let trained = |from: &mut Reader<'_>| match from.number()? {
            0 => Ok(Trained::Nothing),
            1 => Ok(Trained::All),
            2 => read_numbers(from).map(Trained::Rows),
            _ => Err(Damaged),
        };
        let trained = (0..from.count(8)?).map(|_| trained(from)).collect::<Result<_, _>>()?;
        let decays = from.flags()?;
        let kind = from.number()?;
        let mut of = || from.f64();
        let optimizer = match kind {
            0 => OptimizerConfig::Adamw(AdamW {
                beta1: of()?,
                beta2: of()?,
                eps: of()?,
                weight_decay: of()?,
            }),
            1 => OptimizerConfig::Adafactor(Adafactor {
                eps: of()?,
                scale_min: of()?,
                clip_threshold: of()?,
                decay_rate: of()?,
                weight_decay: of()?,
            }),
            2 => OptimizerConfig::Sgd(Sgd { momentum: of()?, weight_decay: of()? }),
            _ => return Err(Damaged),
        };
        let pulled = from.flags()? == [true];
        let pull = Some(from.f64()?).filter(|_| pulled);
        let steps = from.number()? as u64;
        Ok(Self { model, precision, rank, ranks, owners, trained, decays, optimizer, pull, steps })
    }
}

impl Work {
    fn write(&self, to: &mut Writer) {
        to.number(self.round as usize);
        to.number(self.batch);
        to.number(self.nodes.len());
        for (node, rows) in &self.nodes {
            to.range(node);
            to.number(rows.len());
            for row in rows {
                to.u32s(&row.tokens);
                // No id is the largest: a vocabulary has fewer.
                let targets: Vec<u32> = row.targets.iter().map(|t| t.unwrap_or(u32::MAX)).collect();
                to.u32s(&targets);
                numbers(to, row.documents.iter().copied());
            }
        }
        to.flags(&self.tiers);
        let BalanceWeights { tier, group, expert, aux, z } = self.balance;
        [tier, group, expert, aux, z].iter().for_each(|weight| to.f64(*weight));
        to.flags(&[self.recompute == Recompute::Layer]);
        to.number(self.micro_rows);
        match &self.wanted {
            Wanted::Sums => to.number(0),
            Wanted::Losses => to.number(1),
            Wanted::Gradients { scale, known } => {
                to.number(2);
                to.f32(*scale);
                to.flags(&[known.is_some()]);
                if let Some(sums) = known {
                    sums.write(to);
                }
            }
        }
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let (round, batch) = (from.number()? as u64, from.number()?);
        if batch > ROWS_MAX {
            return Err(Damaged);
        }
        let row = |from: &mut Reader<'_>| {
            let tokens = from.u32s()?;
            let targets = from.u32s()?.into_iter().map(|t| (t != u32::MAX).then_some(t)).collect();
            Ok(Row { tokens, targets, documents: read_numbers(from)? })
        };
        let node = |from: &mut Reader<'_>| {
            let node = from.range()?;
            let rows = (0..from.count(24)?).map(|_| row(from)).collect::<Result<Vec<_>, _>>()?;
            let fits = !node.is_empty() && node.end <= batch && rows.len() == node.len();
            if fits { Ok((node, rows)) } else { Err(Damaged) }
        };
        let nodes = (0..from.count(24)?).map(|_| node(from)).collect::<Result<_, _>>()?;
        let tiers = from.flags()?;
        let balance = BalanceWeights {
            tier: from.f64()?,
            group: from.f64()?,
            expert: from.f64()?,
            aux: from.f64()?,
            z: from.f64()?,
        };
        let recompute = if from.flags()? == [true] { Recompute::Layer } else { Recompute::None };
        let micro_rows = from.number()?;
        let wanted = match from.number()? {
            0 => Wanted::Sums,
            1 => Wanted::Losses,
            2 => {
                let scale = from.f32()?;
                let known = from.flags()? == [true];
                let known = known.then(|| Sums::read(from)).transpose()?;
                Wanted::Gradients { scale, known }
            }
            _ => return Err(Damaged),
        };
        Ok(Self { round, batch, nodes, tiers, balance, recompute, micro_rows, wanted })
    }
}

impl Order {
    /// What it is, in a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Begin(_) => "begin",
            Self::Tensors(_) => "tensors",
            Self::Work(work) => match work.wanted {
                Wanted::Sums => "sums",
                Wanted::Losses => "losses",
                Wanted::Gradients { .. } => "gradients",
            },
            Self::Prepare => "prepare",
            Self::Apply(_) => "apply",
            Self::Read(_) => "read",
        }
    }

    /// As bytes. An error says which number of a configuration JSON does not keep.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TrainError> {
        let mut to = Writer::default();
        match self {
            Self::Begin(begin) => {
                to.number(0);
                begin.write(&mut to)?;
            }
            Self::Tensors(tensors) => {
                to.number(1);
                write_tensors(&mut to, tensors);
            }
            Self::Work(work) => {
                to.number(2);
                work.write(&mut to);
            }
            Self::Prepare => to.number(3),
            Self::Apply(StepAt { t, lr, clip }) => {
                to.number(4);
                to.number(*t as usize);
                to.f64(*lr);
                to.f32(*clip);
            }
            Self::Read(ids) => {
                to.number(5);
                numbers(&mut to, ids.iter().copied());
            }
        }
        Ok(to.into_bytes())
    }

    /// From bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Damaged> {
        let mut from = Reader::new(bytes);
        let order = match from.number()? {
            0 => Self::Begin(Box::new(Begin::read(&mut from)?)),
            1 => Self::Tensors(read_tensors(&mut from)?),
            2 => Self::Work(Box::new(Work::read(&mut from)?)),
            3 => Self::Prepare,
            4 => {
                Self::Apply(StepAt { t: from.number()? as u64, lr: from.f64()?, clip: from.f32()? })
            }
            5 => Self::Read(read_numbers(&mut from)?),
            _ => return Err(Damaged),
        };
        from.end()?;
        Ok(order)
    }
}

impl Given {
    /// As bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = Writer::default();
        match self {
            Self::Done => to.number(0),
            Self::Nodes(nodes) => {
                to.number(1);
                to.number(nodes.len());
                for OfNode { loss, sums } in nodes {
                    to.f32(*loss);
                    sums.write(&mut to);
                }
            }
            Self::Prepared(all) => {
                to.number(2);
                to.number(all.len());
                for Prepared { id, squares, pull } in all {
                    to.number(*id);
                    to.f32(*squares);
                    to.f64(*pull);
                }
            }
            Self::Tensors(tensors) => {
                to.number(3);
                write_tensors(&mut to, tensors);
            }
        }
        to.into_bytes()
    }

    /// From bytes; sums are of a model's gates.
    pub fn from_bytes(bytes: &[u8], model: &ModelConfig) -> Result<Self, Damaged> {
        let mut from = Reader::new(bytes);
        let node = |from: &mut Reader<'_>| {
            let (loss, sums) = (from.f32()?, Sums::read(from)?);
            if sums.fit(model) { Ok(OfNode { loss, sums }) } else { Err(Damaged) }
        };
        let prepared = |from: &mut Reader<'_>| {
            Ok(Prepared { id: from.number()?, squares: from.f32()?, pull: from.f64()? })
        };
        let given = match from.number()? {
            0 => Self::Done,
            1 => Self::Nodes(
                (0..from.count(12)?).map(|_| node(&mut from)).collect::<Result<_, _>>()?,
            ),
            2 => {
                let all = (0..from.count(20)?).map(|_| prepared(&mut from));
                Self::Prepared(all.collect::<Result<_, _>>()?)
            }
            3 => Self::Tensors(read_tensors(&mut from)?),
            _ => return Err(Damaged),
        };
        from.end()?;
        Ok(given)
    }
}

impl TrainError {
    /// As bytes, for who gave the order.
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
            Self::Lost(reason) => {
                to.number(4);
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
            4 => Self::Lost(from.text()?),
            _ => return Err(Damaged),
        })
    }
}

impl From<Damaged> for TrainError {
    fn from(damaged: Damaged) -> Self {
        Self::Workers(damaged.to_string())
    }
}
