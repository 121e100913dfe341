//! What ranks ask of each other while a step is computed: rows through experts and back, gradients for those who
//! own the parameters, new values from them.
//!
//! Rows of a layer go to the owner of their expert once, however many of its experts they go to. The owner keeps
//! what its backward pass needs under (rank, round, pass, layer) until that comes. Gradients come by nodes of the tree
//! over the batch and meet in that tree (`gradients::NodeSums`), so that who computed which node, and
//! when it came, changes no bit.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use lite_llm_kernels::{cpu::Tensor, ops::leaves::Place};

use super::{
    TrainError,
    batch::Flat,
    bytes::{Damaged, Reader, Writer},
    moe::ExpertTape,
    orders::{self, ROWS_MAX},
    params::ParamId,
};
use crate::expert::ExpertKey;

/// Waits for answers, in the order of what was asked.
pub type Answers = Box<dyn FnOnce() -> Result<Vec<Vec<u8>>, TrainError> + Send>;

/// The way to the other ranks. What comes to a rank is answered by [`super::rank::Rank::serve`].
pub trait Exchange: Send + Sync {
    /// Sends bytes to ranks, one thing to each, and returns at once.
    fn ask(&self, calls: Vec<(usize, Vec<u8>)>) -> Answers;
}

/// What a rank asks of another.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Call {
    /// Rows through experts.
    Forward(Forward),
    /// Their gradients back through them.
    Backward(Backward),
    /// Gradients of a node, for their owner.
    Gradients(Gradients),
    /// Values that their owner has stepped.
    Values(Vec<orders::Tensor>),
}

/// Which layer of which pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    pub(super) round: u64,
    pub(super) pass: u64,
    pub(super) layer: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Forward {
    pub(super) at: At,
    /// Rows of the global batch.
    pub(super) batch: usize,
    /// The node that the pass computes.
    pub(super) node: Range<usize>,
    /// Whether a backward pass is to come.
    pub(super) keep: bool,
    /// Where each row is in the batch, upwards.
    pub(super) places: Vec<Place>,
    /// `[places, hidden]`.
    pub(super) x: Vec<f32>,
    /// Experts, and which of these rows each gets, upwards.
    pub(super) experts: Vec<(ExpertKey, Vec<u32>)>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Backward {
    pub(super) at: At,
    /// Of the layer's output, for the rows of the forward pass `[places, hidden]`.
    pub(super) dout: Vec<f32>,
    /// By which each expert's outputs were multiplied, one after another.
    pub(super) weights: Vec<f32>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Gradients {
    pub(super) round: u64,
    /// Rows of the global batch.
    pub(super) batch: usize,
    /// The node whose they are.
    pub(super) node: Range<usize>,
    /// By parameter; that of the embedding as an output projection is behind the last.
    pub(super) list: Vec<(ParamId, Vec<f32>)>,
}

fn write_at(to: &mut Writer, At { round, pass, layer }: At) {
    to.number(round as usize);
    to.number(pass as usize);
    to.number(layer);
}

fn read_at(from: &mut Reader<'_>) -> Result<At, Damaged> {
    let (round, pass, layer) = (from.number()? as u64, from.number()? as u64, from.number()?);
    Ok(At { round, pass, layer })
}

fn read_node(from: &mut Reader<'_>) -> Result<(usize, Range<usize>), Damaged> {
    let (batch, node) = (from.number()?, from.range()?);
    let fits = batch <= ROWS_MAX && node.end <= batch && !node.is_empty();
    if fits { Ok((batch, node)) } else { Err(Damaged) }
}

impl Call {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        // But for rows and gradients there is little.
        let mut to = Writer::with_room(match self {
            Self::Forward(Forward { x, .. }) => 5 * x.len(),
            Self::Backward(Backward { dout, .. }) => 5 * dout.len(),
            Self::Gradients(Gradients { list, .. }) => {
                list.iter().map(|(_, gradient)| 4 * gradient.len() + 32).sum()
            }
            Self::Values(tensors) => tensors.iter().map(|t| 4 * t.values.len() + 32).sum(),
        });
        match self {
            Self::Forward(Forward { at, batch, node, keep, places, x, experts }) => {
                to.number(0);
                write_at(&mut to, *at);
                to.number(*batch);
                to.range(node);
                to.flags(&[*keep]);
                let places: Vec<u32> = places.iter().flat_map(|p| [p.row, p.position]).collect();
                to.u32s(&places);
                to.f32s(x);
                to.number(experts.len());
                for (key, rows) in experts {
                    to.u32s(&[u32::from(key.layer), u32::from(key.tier), key.group, key.expert]);
                    to.u32s(rows);
                }
            }
            Self::Backward(Backward { at, dout, weights }) => {
                to.number(1);
                write_at(&mut to, *at);
                to.f32s(dout);
                to.f32s(weights);
            }
            Self::Gradients(Gradients { round, batch, node, list }) => {
                to.number(2);
                to.number(*round as usize);
                to.number(*batch);
                to.range(node);
                to.number(list.len());
                for (id, gradient) in list {
                    to.number(*id);
                    to.f32s(gradient);
                }
            }
            Self::Values(tensors) => {
                to.number(3);
                orders::write_tensors(&mut to, tensors);
            }
        }
        to.into_bytes()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, Damaged> {
        let mut from = Reader::new(bytes);
        let call = match from.number()? {
            0 => {
                let at = read_at(&mut from)?;
                let (batch, node) = read_node(&mut from)?;
                let keep = from.flags()? == [true];
                let places = from.u32s()?;
                let places = places.chunks_exact(2).map(|p| Place { row: p[0], position: p[1] });
                let (places, x) = (places.collect(), from.f32s()?);
                let expert = |from: &mut Reader<'_>| {
                    let [layer, tier, group, expert] = from.u32s()?[..] else {
                        return Err(Damaged);
                    };
                    let small = |n: u32| u16::try_from(n).map_err(|_| Damaged);
                    let key = ExpertKey { layer: small(layer)?, tier: small(tier)?, group, expert };
                    Ok((key, from.u32s()?))
                };
                let experts = (0..from.count(32)?).map(|_| expert(&mut from));
                let experts = experts.collect::<Result<_, _>>()?;
                Self::Forward(Forward { at, batch, node, keep, places, x, experts })
            }
            1 => {
                let at = read_at(&mut from)?;
                Self::Backward(Backward { at, dout: from.f32s()?, weights: from.f32s()? })
            }
            2 => {
                let round = from.number()? as u64;
                let (batch, node) = read_node(&mut from)?;
                let gradient = |from: &mut Reader<'_>| Ok((from.number()?, from.f32s()?));
                let list = (0..from.count(16)?).map(|_| gradient(&mut from));
                let list = list.collect::<Result<_, _>>()?;
                Self::Gradients(Gradients { round, batch, node, list })
            }
            3 => Self::Values(orders::read_tensors(&mut from)?),
            _ => return Err(Damaged),
        };
        from.end()?;
        Ok(call)
    }
}

/// Values one after another: what calls are answered with.
pub(super) fn values_to_bytes(lists: &[&[f32]]) -> Vec<u8> {
    let mut to = Writer::with_room(lists.iter().map(|values| 4 * values.len() + 8).sum());
    lists.iter().for_each(|values| to.f32s(values));
    to.into_bytes()
}

fn values_from_bytes<const N: usize>(
    bytes: &[u8],
    lengths: [usize; N],
) -> Result<[Vec<f32>; N], Damaged> {
    let mut from = Reader::new(bytes);
    let mut all = std::array::from_fn(|_| Vec::new());
    for (values, len) in all.iter_mut().zip(lengths) {
        *values = from.f32s()?;
        if values.len() != len {
            return Err(Damaged);
        }
    }
    from.end()?;
    Ok(all)
}

/// The other ranks, for the passes of one round.
pub(super) struct Others<'a> {
    exchange: &'a dyn Exchange,
    /// The rank that owns each parameter.
    owners: &'a [usize],
    rank: usize,
    round: u64,
    /// Rows of the global batch.
    batch: usize,
    passes: AtomicU64,
}

/// Experts of other ranks at work.
pub(super) struct Waiting {
    answers: Answers,
    /// Of each rank that was asked: its experts, by their places.
    asked: Vec<Vec<usize>>,
}

impl<'a> Others<'a> {
    pub(super) fn new(
        exchange: &'a dyn Exchange,
        (owners, rank): (&'a [usize], usize),
        (round, batch): (u64, usize),
    ) -> Self {
        Self { exchange, owners, rank, round, batch, passes: AtomicU64::new(0) }
    }

    /// A number for a pass.
    pub(super) fn next_pass(&self) -> u64 {
        self.passes.fetch_add(1, Ordering::Relaxed)
    }

    /// The rank that has an expert, if it is another one.
    pub(super) fn owner(&self, expert: ParamId) -> Option<usize> {
        Some(self.owners[expert]).filter(|owner| *owner != self.rank)
    }

    fn by_owner(experts: &[ExpertTape]) -> BTreeMap<usize, Vec<usize>> {
        let mut by_owner: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (place, expert) in experts.iter().enumerate() {
            if let Some(owner) = expert.owner {
                by_owner.entry(owner).or_default().push(place);
            }
        }
        by_owner
    }

    /// Sends rows to those of these experts that others have; `None` if they have none.
    pub(super) fn forward(
        &self,
        (pass, layer, keep): (u64, usize, bool),
        flat: &Flat,
        hidden: &Tensor,
        experts: &[ExpertTape],
    ) -> Option<Waiting> {
        let by_owner = Self::by_owner(experts);
        let mut calls = Vec::with_capacity(by_owner.len());
        for (&owner, places) in &by_owner {
            let rows = rows_of(experts, places);
            let local = |row: &u32| rows.binary_search(row).unwrap_or(0) as u32;
            let of = |&place: &usize| {
                let expert = &experts[place];
                (expert.key, expert.rows.iter().map(local).collect())
            };
            let forward = Forward {
                at: At { round: self.round, pass, layer },
                batch: self.batch,
                node: flat.rows.clone(),
                keep,
                places: rows.iter().map(|&row| flat.places[row as usize]).collect(),
                x: gathered(&rows, hidden.cols(), |row| hidden.row(row)),
                experts: places.iter().map(of).collect(),
            };
            calls.push((owner, Call::Forward(forward).to_bytes()));
        }
        self.send(calls, by_owner)
    }

    /// Sends gradients of the layer's output back; `weight` of a route by its place.
    pub(super) fn backward(
        &self,
        (pass, layer): (u64, usize),
        dout: &[f32],
        width: usize,
        experts: &[ExpertTape],
        weight: impl Fn(u32) -> f32,
    ) -> Option<Waiting> {
        let by_owner = Self::by_owner(experts);
        let mut calls = Vec::with_capacity(by_owner.len());
        for (&owner, places) in &by_owner {
            let rows = rows_of(experts, places);
            let routes = places.iter().flat_map(|&place| &experts[place].routes);
            let backward = Backward {
                at: At { round: self.round, pass, layer },
                dout: gathered(&rows, width, |row| &dout[row * width..][..width]),
                weights: routes.map(|&route| weight(route)).collect(),
            };
            calls.push((owner, Call::Backward(backward).to_bytes()));
        }
        self.send(calls, by_owner)
    }

    fn send(
        &self,
        calls: Vec<(usize, Vec<u8>)>,
        by_owner: BTreeMap<usize, Vec<usize>>,
    ) -> Option<Waiting> {
        if calls.is_empty() {
            return None;
        }
        let answers = self.exchange.ask(calls);
        Some(Waiting { answers, asked: by_owner.into_values().collect() })
    }
}

/// Some rows, one after another.
fn gathered<'a>(rows: &[u32], width: usize, of: impl Fn(usize) -> &'a [f32]) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows.len() * width);
    rows.iter().for_each(|&row| values.extend_from_slice(of(row as usize)));
    values
}

/// Rows that go to some experts, upwards.
fn rows_of(experts: &[ExpertTape], places: &[usize]) -> Vec<u32> {
    let mut rows: Vec<u32> =
        places.iter().flat_map(|&place| &experts[place].rows).copied().collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

impl Waiting {
    /// Outputs of the experts, by their places.
    pub(super) fn outputs(
        self,
        experts: &[ExpertTape],
        width: usize,
    ) -> Result<Vec<(usize, Vec<f32>)>, TrainError> {
        let mut all = Vec::new();
        for (places, bytes) in self.asked.iter().zip((self.answers)()?) {
            let count = |place: &usize| experts[*place].rows.len();
            let [y] = values_from_bytes(&bytes, [places.iter().map(count).sum::<usize>() * width])?;
            let mut rest = &y[..];
            for place in places {
                let (own, others) = rest.split_at(count(place) * width);
                all.push((*place, own.to_vec()));
                rest = others;
            }
        }
        Ok(all)
    }

    /// Of each expert by its place: gradients of its routes' weights, and of the rows that came.
    #[allow(clippy::type_complexity)]
    pub(super) fn gradients(
        self,
        experts: &[ExpertTape],
        width: usize,
    ) -> Result<Vec<(usize, (Vec<f32>, Vec<f32>))>, TrainError> {
        let mut all = Vec::new();
        for (places, bytes) in self.asked.iter().zip((self.answers)()?) {
            let count = |place: &usize| experts[*place].rows.len();
            let rows = places.iter().map(count).sum::<usize>();
            let [dw, dx] = values_from_bytes(&bytes, [rows, rows * width])?;
            let (mut dw, mut dx) = (&dw[..], &dx[..]);
            for place in places {
                let (own_w, others_w) = dw.split_at(count(place));
                let (own_x, others_x) = dx.split_at(count(place) * width);
                all.push((*place, (own_w.to_vec(), own_x.to_vec())));
                (dw, dx) = (others_w, others_x);
            }
        }
        Ok(all)
    }
}
