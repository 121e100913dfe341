//! Parameters, an optimizer, and the steps that bring them forward.
//!
//! A step: losses and gradients of the batch; the norm of all trained gradients (per tensor by rule 3,
//! tensors by sorted name in rule 1's tree); clipping; then each trained tensor by itself. Of a tensor of which
//! only rows are trained, these rows are the tensor: nothing else of it is stepped, decayed or counted.

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
    optimizer::{Optimizer, StepAt},
    params::{Param, Params},
    shared::Workers,
    step::{self, StepLosses, StepOptions},
    trained::Trained,
};

/// See the module's text.
pub struct Trainer {
    cpu: Arc<Cpu>,
    params: Params,
    optimizer: Box<dyn Optimizer>,
    trained: Vec<Trained>,
    decays: Vec<bool>,
    /// States of each trained parameter's optimizer.
    states: Vec<Vec<Vec<f32>>>,
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

impl Trainer {
    /// A trainer whose optimizer has seen nothing yet. `trained` has one entry per parameter, and
    /// `decays` says which of them weight decay concerns.
    ///
    /// # Panics
    /// If there is not one entry per parameter.
    pub fn new(
        cpu: Arc<Cpu>,
        params: Params,
        optimizer: Box<dyn Optimizer>,
        trained: Vec<Trained>,
        decays: Vec<bool>,
        clip: Option<f64>,
    ) -> Self {
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
        Self { cpu, params, optimizer, trained, decays, states, clip, pull: None, steps: 0 }
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

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Names and values of the optimizer's states, by parameter.
    pub fn states(&self) -> impl Iterator<Item = (String, &[f32])> {
        let names = self.params.list().iter().zip(&self.trained).zip(&self.states);
        let states = names.flat_map(|((param, trained), states)| {
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
        self.step_by(None, batch, options, lr)
    }

    /// One step on a batch whose gradients others compute, if there are others; with the same bits.
    pub fn step_by(
        &mut self,
        workers: Option<&mut dyn Workers>,
        batch: &Batch,
        options: &StepOptions<'_>,
        lr: f64,
    ) -> Result<StepReport, TrainError> {
        let wanted: Vec<bool> = self.trained.iter().map(|t| *t != Trained::Nothing).collect();
        let (cpu, params) = (&self.cpu, &self.params);
        let (losses, mut gradients) = match workers {
            Some(workers) => step::gradients_by(workers, cpu, params, batch, options, &wanted)?,
            None => step::gradients(cpu, params, batch, options, &wanted)?,
        };
        let mut each: Vec<Option<Vec<f32>>> = Vec::with_capacity(wanted.len());
        for (id, trained) in self.trained.iter().enumerate() {
            let rows = self.params.list()[id].row_len();
            each.push(gradients.take(id).filter(|_| wanted[id]).map(|g| stepped(g, rows, trained)));
        }
        let pull = self.add_pull(&mut each);
        let grad_norm = self.norm(&each)?;
        let clip = self.clip.map_or(1.0, |most| (most / (grad_norm + 1e-6)).min(1.0)) as f32;
        self.steps += 1;
        self.apply(StepAt { t: self.steps, lr, clip }, each);
        Ok(StepReport { losses, grad_norm, lr, pull })
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

    /// Adds the pull's gradients, λ (p − p₀), and gives its loss.
    fn add_pull(&self, gradients: &mut [Option<Vec<f32>>]) -> f64 {
        let Some(Pull { strength, toward }) = &self.pull else { return 0.0 };
        let of_each = gradients.iter_mut().zip(toward).zip(self.params.list()).zip(&self.trained);
        let mut loss = 0.0;
        for (((gradient, toward), param), trained) in of_each {
            let (Some(toward), true) = (toward, *trained == Trained::All) else { continue };
            let away: Vec<f32> = param.values().iter().zip(toward).map(|(p, p0)| p - p0).collect();
            loss += 0.5 * strength * f64::from(sum_of_squares(&away));
            let gradient = gradient.get_or_insert_with(|| vec![0.0; away.len()]);
            for (gradient, away) in gradient.iter_mut().zip(&away) {
                *gradient = (*strength as f32).mul_add(*away, *gradient);
            }
        }
        loss
    }

    fn norm(&self, gradients: &[Option<Vec<f32>>]) -> Result<f64, TrainError> {
        let of = |(i, _): (usize, &Trained)| (i, gradients[i].as_deref().unwrap_or_default());
        let trained = self.trained.iter().enumerate();
        let (ids, tensors): (Vec<usize>, Vec<&[f32]>) =
            trained.filter(|(_, trained)| **trained != Trained::Nothing).map(of).unzip();
        let squares = sums_of_squares(&self.cpu, &tensors);
        if let Some(at) = squares.iter().position(|sum| !sum.is_finite()) {
            let parameter = self.params.list()[ids[at]].name.clone();
            return Err(TrainError::Gradient { parameter });
        }
        match tree::fold(squares.into_iter()) {
            sum if sum.is_finite() => Ok(f64::from(sum).sqrt()),
            norm => Err(TrainError::Norm { norm }),
        }
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
    fn apply(&mut self, at: StepAt, gradients: Vec<Option<Vec<f32>>>) {
        let Self { cpu, params, optimizer, trained, decays, states, .. } = self;
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
        let mut gradients: Vec<Option<Vec<f32>>> = vec![None; count];
        let (trained, decays) = (vec![Trained::All; count], vec![false; count]);
        let cpu = Arc::new(Cpu::best(1));
        let trainer = Trainer::new(cpu, params, Box::new(Sgd::default()), trained, decays, None);
        gradients[0] = Some(vec![1.5e19]);
        let alone = trainer.norm(&gradients).unwrap();
        assert!((alone - 1.5e19).abs() < 1e13, "{alone}");
        gradients[1] = Some(vec![1.5e19]);
        let error = trainer.norm(&gradients).unwrap_err();
        assert!(matches!(error, TrainError::Norm { .. }), "{error}");
    }
}
