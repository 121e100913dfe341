//! Parameters, an optimizer, and the steps that bring them forward.
//!
//! A step: losses and gradients of the batch; the norm of all trained gradients (per tensor by rule 3,
//! tensors by sorted name in rule 1's tree); clipping; then each trained tensor by itself. Of a tensor of which
//! only rows are trained, these rows are the tensor: nothing else of it is stepped, decayed or counted.
//!
//! A parameter without a gradient costs nothing: its step is put off until somebody looks at it (`idle.rs`).
//!
//! Of several ranks each has a trainer of its own, of what it owns; [`super::spread`] does the step.

use std::sync::Arc;

use lite_llm_kernels::{
    cpu::Cpu,
    ops::{
        optimize::{sum_of_squares, sums_of_squares},
        tree,
    },
};
use parking_lot::Mutex;

use super::{
    TrainError,
    batch::Batch,
    gradients::Gradients,
    idle::{Behind, History},
    optimizer::{Optimizer, StepAt},
    orders::{Kind, Prepared, Tensor},
    params::{Param, ParamId, Params},
    step::{self, StepLosses, StepOptions},
    trained::Trained,
};

/// See the module's text.
pub struct Trainer {
    cpu: Arc<Cpu>,
    params: Params,
    optimizer: Arc<dyn Optimizer>,
    trained: Vec<Trained>,
    decays: Vec<bool>,
    /// States of each trained parameter's optimizer; those of one that is behind are with it.
    states: Vec<Vec<Vec<f32>>>,
    /// Steps that may have been put off.
    history: Arc<History>,
    /// Largest norm of the gradient.
    clip: Option<f64>,
    pull: Option<Pull>,
    steps: u64,
}

/// A pull of parameters toward what they were: λ/2 · |p − p₀|² is added to what is minimised.
#[derive(Debug, Clone)]
pub struct Pull {
    strength: f64,
    /// p₀ of each parameter that is pulled.
    toward: Vec<Option<Vec<f32>>>,
}

impl Pull {
    /// Toward what the parameters that `which` names are now.
    pub fn toward(params: &Params, strength: f64, which: impl Fn(&str) -> bool) -> Self {
        let now = |param: &Param| which(&param.name).then(|| param.values().to_vec());
        Self { strength, toward: params.list().iter().map(now).collect() }
    }

    /// Toward what is still to come, for so many parameters.
    pub(super) fn hollow(strength: f64, parameters: usize) -> Self {
        Self { strength, toward: vec![None; parameters] }
    }
}

/// Gradients that are ready to be applied.
pub(super) struct Ready {
    /// Of each parameter, in the shape of what is stepped of it.
    pub(super) each: Vec<Option<Vec<f32>>>,
    /// Of what is trained, in the order of parameters.
    pub(super) prepared: Vec<Prepared>,
}

/// The norm of all gradients, and the pull's loss; of all that is trained, in the order of parameters.
pub(super) fn norm_and_pull(
    all: impl Iterator<Item = Prepared>,
    name: impl Fn(ParamId) -> String,
) -> Result<(f64, f64), TrainError> {
    let (mut squares, mut pull) = (Vec::new(), 0.0);
    for of in all {
        if !of.squares.is_finite() {
            return Err(TrainError::Gradient { parameter: name(of.id) });
        }
        squares.push(of.squares);
        pull += of.pull;
    }
    match tree::fold(squares.into_iter()) {
        sum if sum.is_finite() => Ok((f64::from(sum).sqrt(), pull)),
        norm => Err(TrainError::Norm { norm }),
    }
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Losses before the step.
    pub losses: StepLosses,
    /// Norm of all trained gradients, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// λ/2 · |p − p₀|² of what is pulled.
    pub pull: f64,
}

impl Clone for Trainer {
    /// A copy of what it is now: steps that are put off later are not the copy's.
    fn clone(&self) -> Self {
        self.catch_up();
        let states = (0..self.states.len()).map(|id| self.states_of(id).to_vec()).collect();
        Self {
            cpu: self.cpu.clone(),
            params: self.params.clone(),
            optimizer: self.optimizer.clone(),
            trained: self.trained.clone(),
            decays: self.decays.clone(),
            states,
            history: Arc::default(),
            clip: self.clip,
            pull: self.pull.clone(),
            steps: self.steps,
        }
    }
}

impl Trainer {
    /// A trainer whose optimizer has seen nothing yet. `trained` has one entry per parameter, and
    /// `decays` says which of them weight decay concerns.
    ///
    /// # Panics
    /// If there is not one entry per parameter.
    pub fn new(
        cpu: Arc<Cpu>,
        mut params: Params,
        optimizer: Box<dyn Optimizer>,
        trained: Vec<Trained>,
        decays: Vec<bool>,
        clip: Option<f64>,
    ) -> Self {
        // Another trainer may have put steps off.
        params.list_mut().iter_mut().for_each(|param| drop(param.catch_up()));
        let count = params.list().len();
        assert!(trained.len() == count && decays.len() == count, "one entry per parameter");
        let states = params
            .list()
            .iter()
            .zip(&trained)
            .map(|(param, trained)| match stepped_shape(&param.shape, trained) {
                Some(shape) => {
                    optimizer.state(&shape).into_iter().map(|(_, len)| vec![0.0; len]).collect()
                }
                None => Vec::new(),
            })
            .collect();
        let optimizer = Arc::from(optimizer);
        let history = Arc::default();
        Self {
            cpu,
            params,
            optimizer,
            trained,
            decays,
            states,
            history,
            clip,
            pull: None,
            steps: 0,
        }
    }

    /// Pulls parameters from now on, or no longer.
    pub fn pull(&mut self, pull: Option<Pull>) {
        self.pull = pull;
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The parameters, taken out.
    pub fn into_params(self) -> Params {
        self.params
    }

    /// The threads that it computes with.
    pub(super) fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// What of each parameter is trained, which of them weight decay concerns, and the strength of the pull.
    pub(super) fn settings(&self) -> (&[Trained], &[bool], Option<f64>) {
        (&self.trained, &self.decays, self.pull.as_ref().map(|pull| pull.strength))
    }

    fn states_of(&self, id: ParamId) -> &[Vec<f32>] {
        self.params.list()[id].states_behind().unwrap_or(&self.states[id])
    }

    /// Looks at all that is behind, on all threads.
    fn catch_up(&self) {
        let behind: Vec<&Param> = self.params.list().iter().filter(|p| p.is_behind()).collect();
        self.cpu.pool().run(behind.len(), &|i| {
            behind[i].values();
        });
    }

    /// How many parameters are behind: steps without a gradient were put off, and nobody has looked at them since.
    pub fn behind(&self) -> usize {
        self.params.list().iter().filter(|param| param.is_behind()).count()
    }

    /// Values and states of a parameter, as they are.
    pub(super) fn tensors(&self, id: ParamId) -> Vec<Tensor> {
        let mut all =
            vec![Tensor { id, kind: Kind::Values, values: self.params.values(id).to_vec() }];
        for (n, state) in self.states_of(id).iter().enumerate() {
            all.push(Tensor { id, kind: Kind::State(n), values: state.clone() });
        }
        let toward = self.pull.as_ref().and_then(|pull| pull.toward[id].clone());
        all.extend(toward.map(|values| Tensor { id, kind: Kind::Toward, values }));
        all
    }

    /// Takes a parameter's values or state; says whether they fit it.
    pub(super) fn put(&mut self, Tensor { id, kind, values }: Tensor) -> bool {
        let Some(param) = self.params.list_mut().get_mut(id) else { return false };
        match kind {
            Kind::Values => param.put_values(values),
            Kind::State(n) => match self.states[id].get_mut(n) {
                Some(state) if state.len() == values.len() || state.is_empty() => {
                    *state = values;
                    true
                }
                _ => false,
            },
            Kind::Toward => match &mut self.pull {
                Some(pull) if values.len() == param.len() => {
                    pull.toward[id] = Some(values);
                    true
                }
                _ => false,
            },
        }
    }

    /// Drops values and states, which are with others from now on.
    pub(super) fn hollow(&mut self) {
        self.params.list_mut().iter_mut().for_each(|param| drop(param.take_values()));
        self.states.iter_mut().flatten().for_each(|state| *state = Vec::new());
        let toward = self.pull.iter_mut().flat_map(|pull| pull.toward.iter_mut().flatten());
        toward.for_each(|values| *values = Vec::new());
    }

    /// Begins behind so many steps.
    pub(super) fn begin_at(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Names and values of the optimizer's states, by parameter.
    pub fn states(&self) -> impl Iterator<Item = (String, &[f32])> {
        let names = self.params.list().iter().zip(&self.trained).enumerate();
        let states = names.flat_map(|(id, (param, trained))| {
            let states = self.states_of(id);
            let shape = stepped_shape(&param.shape, trained);
            let kinds = shape.map_or_else(Vec::new, |shape| self.optimizer.state(&shape));
            kinds
                .into_iter()
                .zip(states)
                .map(|((kind, _), values)| (format!("{}.{kind}", param.name), &values[..]))
        });
        let toward = self.pull.iter().flat_map(|pull| self.params.list().iter().zip(&pull.toward));
        let toward = toward.filter_map(|(param, toward)| {
            Some((format!("{}.toward", param.name), toward.as_deref()?))
        });
        states.chain(toward)
    }

    /// Takes up where a trainer was that had done so many steps. `state` gives each of
    /// [`Trainer::states`] by its name; returns the name of one that is missing or of another length.
    pub fn restore(
        &mut self,
        steps: u64,
        mut state: impl FnMut(&str) -> Option<Vec<f32>>,
    ) -> Result<(), String> {
        let names: Vec<String> = self.states().map(|(name, _)| name).collect();
        let mut names = names.into_iter();
        let toward = self.pull.iter_mut().flat_map(|pull| pull.toward.iter_mut().flatten());
        for values in self.states.iter_mut().flatten().chain(toward) {
            let name = names.next().unwrap_or_default();
            match state(&name) {
                Some(saved) if saved.len() == values.len() => *values = saved,
                _ => return Err(name),
            }
        }
        self.steps = steps;
        Ok(())
    }

    /// One step on a batch.
    pub fn step(
        &mut self,
        batch: &Batch,
        options: &StepOptions<'_>,
        lr: f64,
    ) -> Result<StepReport, TrainError> {
        let (losses, gradients) = self.gradients(batch, options)?;
        let Ready { each, prepared } = self.prepare(gradients);
        let names = |id: ParamId| self.params.list()[id].name.clone();
        let (grad_norm, pull) = norm_and_pull(prepared.into_iter(), names)?;
        let at = self.next(lr, grad_norm);
        self.apply(at, each);
        Ok(StepReport { losses, grad_norm, lr, pull })
    }

    /// The next step, for a gradient of this norm.
    pub(super) fn next(&self, lr: f64, grad_norm: f64) -> StepAt {
        let clip = self.clip.map_or(1.0, |most| (most / (grad_norm + 1e-6)).min(1.0)) as f32;
        StepAt { t: self.steps + 1, lr, clip }
    }

    /// Gradients as they are applied: of what is trained, with the pull.
    pub(super) fn prepare(&self, mut gradients: Gradients) -> Ready {
        let mut each: Vec<Option<Vec<f32>>> = Vec::with_capacity(self.trained.len());
        for (id, trained) in self.trained.iter().enumerate() {
            let rows = self.params.list()[id].row_len();
            let gradient = gradients.take(id).filter(|_| *trained != Trained::Nothing);
            each.push(gradient.map(|gradient| stepped(gradient, rows, trained)));
        }
        let ids = (0..each.len()).filter(|id| self.trained[*id] != Trained::Nothing);
        let ids: Vec<ParamId> = ids.collect();
        let pulls: Vec<f64> = ids.iter().map(|id| self.add_pull(*id, &mut each[*id])).collect();
        let tensors: Vec<&[f32]> =
            ids.iter().map(|id| each[*id].as_deref().unwrap_or_default()).collect();
        let squares = sums_of_squares(&self.cpu, &tensors);
        let all = ids.into_iter().zip(squares).zip(pulls);
        let prepared = all.map(|((id, squares), pull)| Prepared { id, squares, pull }).collect();
        Ready { each, prepared }
    }

    /// The gradients of a batch, with nothing stepped.
    pub fn gradients(
        &self,
        batch: &Batch,
        options: &StepOptions<'_>,
    ) -> Result<(StepLosses, Gradients), TrainError> {
        let wanted: Vec<bool> = self.trained.iter().map(|t| *t != Trained::Nothing).collect();
        step::gradients(&self.cpu, &self.params, batch, options, &wanted)
    }

    /// Adds the pull's gradient of a parameter, λ (p − p₀), and gives its loss.
    fn add_pull(&self, id: ParamId, gradient: &mut Option<Vec<f32>>) -> f64 {
        let pull = self.pull.as_ref().and_then(|p| Some((p.strength, p.toward[id].as_ref()?)));
        let Some((strength, toward)) = pull.filter(|_| self.trained[id] == Trained::All) else {
            return 0.0;
        };
        let values = self.params.values(id);
        let away: Vec<f32> = values.iter().zip(toward).map(|(p, p0)| p - p0).collect();
        let gradient = gradient.get_or_insert_with(|| vec![0.0; away.len()]);
        for (gradient, away) in gradient.iter_mut().zip(&away) {
            *gradient = (strength as f32).mul_add(*away, *gradient);
        }
        0.5 * strength * f64::from(sum_of_squares(&away))
    }

    /// The first value of a parameter or of an optimizer's state that is NaN or infinite, and of what.
    pub fn not_finite(&self) -> Option<(String, f32)> {
        let bad = |values: &[f32]| values.iter().copied().find(|x| !x.is_finite());
        let params = self.params.list().iter();
        let mut params = params.filter_map(|p| Some((p.name.clone(), bad(p.values())?)));
        params.next().or_else(|| {
            self.states()
                .find_map(|(name, values)| Some((format!("{name} of the optimizer"), bad(values)?)))
        })
    }

    /// Steps every trained tensor, on all threads.
    pub(super) fn apply(&mut self, at: StepAt, gradients: Vec<Option<Vec<f32>>>) {
        self.steps = at.t;
        let Self { cpu, params, optimizer, trained, decays, states, history, .. } = self;
        let step = history.read().len();
        let tensors = params.list_mut().iter_mut().zip(states).zip(gradients);
        let tasks: Vec<_> = tensors
            .zip(trained.iter().zip(decays.iter()))
            .filter(|(_, (trained, _))| **trained != Trained::Nothing)
            .map(|(((param, state), gradient), (trained, decay))| {
                Mutex::new((param, state, gradient, trained, *decay))
            })
            .collect();
        cpu.pool().run(tasks.len(), &|i| {
            let (param, state, gradient, trained, decay) = &mut *tasks[i].lock();
            let Some(shape) = stepped_shape(&param.shape, trained) else { return };
            if gradient.is_none() && param.is_behind() {
                return;
            }
            if let Some(now) = param.catch_up() {
                **state = now;
            }
            if gradient.is_none() && **trained == Trained::All {
                let states = std::mem::take(&mut **state);
                let with = (&*cpu, &*optimizer);
                param.put_off(Behind::new(with, (&*history, step), *decay, states));
                return;
            }
            let given = gradient.take();
            let gradient = given.as_deref();
            let row_len = param.row_len();
            let values = param.values_mut();
            match trained {
                Trained::Rows(rows) => {
                    let mut some = stepped(values.to_vec(), row_len, trained);
                    optimizer.step(cpu, at, *decay, &shape, &mut some, gradient, state);
                    for (&row, some) in rows.iter().zip(some.chunks_exact(row_len)) {
                        values[row * row_len..][..row_len].copy_from_slice(some);
                    }
                }
                _ => optimizer.step(cpu, at, *decay, &shape, values, gradient, state),
            }
            if let Some(gradient) = given {
                cpu.give(gradient);
            }
        });
        // After all have caught up with the steps before.
        history.write().push(at);
        self.cpu.forget_unused();
    }
}

/// The shape of what is stepped of a parameter.
fn stepped_shape(shape: &[usize], trained: &Trained) -> Option<Vec<usize>> {
    match trained {
        Trained::Nothing => None,
        Trained::All => Some(shape.to_vec()),
        Trained::Rows(rows) => {
            Some(std::iter::once(rows.len()).chain(shape.iter().skip(1).copied()).collect())
        }
    }
}

/// What is stepped of a parameter's values.
fn stepped(values: Vec<f32>, row_len: usize, trained: &Trained) -> Vec<f32> {
    match trained {
        Trained::Rows(rows) => {
            rows.iter().flat_map(|row| values[row * row_len..][..row_len].iter().copied()).collect()
        }
        _ => values,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::optimizer::Sgd;

    #[test]
    fn squares_that_are_finite_each_but_not_together_are_an_error() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/manpages-moe");
        let checkpoint = crate::checkpoint::Checkpoint::open(demo).unwrap();
        let mut config = checkpoint.config().clone();
        (config.layers, config.moe, config.vocab) = (Vec::new(), None, 8);
        let layer = crate::config::FeedForward::Dense { intermediate: 4 };
        config.layers.push(crate::config::LayerConfig { window: None, feed_forward: layer });
        let params = Params::random(config, 1);
        let count = params.list().len();
        let (trained, decays) = (vec![Trained::All; count], vec![false; count]);
        let cpu = Arc::new(Cpu::best(1));
        let trainer = Trainer::new(cpu, params, Box::new(Sgd::default()), trained, decays, None);
        let norm = |gradients: &[(ParamId, f32)]| {
            let mut all = Gradients::new(count);
            gradients.iter().for_each(|(id, g)| all.set(*id, vec![*g]));
            let prepared = trainer.prepare(all).prepared;
            assert_eq!(prepared.len(), count);
            norm_and_pull(prepared.into_iter(), |id| id.to_string())
        };
        let (alone, _) = norm(&[(0, 1.5e19)]).unwrap();
        assert!((alone - 1.5e19).abs() < 1e13, "{alone}");
        let error = norm(&[(0, 1.5e19), (1, 1.5e19)]).unwrap_err();
        assert!(matches!(error, TrainError::Norm { .. }), "{error}");
    }
}
