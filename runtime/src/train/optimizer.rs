//! Optimizers. Each tensor is stepped by itself, with its own state beside it, so that state can live
//! where its parameter does.
//!
//! A gradient that is absent is a gradient of zeros: the parameter decays, and its moments go on moving it.

use lite_llm_kernels::{
    cpu::Cpu,
    ops::optimize::{self, AdafactorStep, AdamWStep, Factored},
};
use serde::{Deserialize, Serialize};

/// Which step it is, for all tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepAt {
    /// Steps since the state was empty, this one included.
    pub t: u64,
    /// Learning rate.
    pub lr: f64,
    /// Gradients are multiplied by this first.
    pub clip: f32,
}

/// What moves parameters along their gradients.
pub trait Optimizer: Send + Sync {
    /// Its name in files.
    fn name(&self) -> &'static str;

    /// Names and lengths of a tensor's states, which begin as zeros.
    fn state(&self, shape: &[usize]) -> Vec<(&'static str, usize)>;

    /// Steps one tensor of a shape. `decay` says whether weight decay concerns it.
    #[allow(clippy::too_many_arguments)]
    fn step(
        &self,
        cpu: &Cpu,
        at: StepAt,
        decay: bool,
        shape: &[usize],
        values: &mut [f32],
        gradient: Option<&[f32]>,
        state: &mut [Vec<f32>],
    );

    /// Steps one tensor several times, none of which has a gradient.
    fn idle(
        &self,
        cpu: &Cpu,
        steps: &[StepAt],
        decay: bool,
        shape: &[usize],
        values: &mut [f32],
        state: &mut [Vec<f32>],
    ) {
        for &at in steps {
            self.step(cpu, at, decay, shape, values, None, state);
        }
    }
}

/// Elements that go through all steps while they are in a core's cache.
const BLOCK: usize = 2048;

/// AdamW.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 }
    }
}

impl AdamW {
    fn at(&self, at: StepAt, decay: bool) -> AdamWStep {
        let correction = |beta: f64| (1.0 - libm::pow(beta, at.t as f64)) as f32;
        AdamWStep {
            lr: at.lr as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            correction1: correction(self.beta1),
            correction2: correction(self.beta2),
            eps: self.eps as f32,
            decay: if decay { self.weight_decay as f32 } else { 0.0 },
            clip: at.clip,
        }
    }
}

impl Optimizer for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn state(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        let len = shape.iter().product();
        vec![("m", len), ("v", len)]
    }

    fn step(
        &self,
        cpu: &Cpu,
        at: StepAt,
        decay: bool,
        _shape: &[usize],
        values: &mut [f32],
        gradient: Option<&[f32]>,
        state: &mut [Vec<f32>],
    ) {
        let [m, v] = state else { unreachable!("the state is as this optimizer made it") };
        optimize::adamw(cpu.simd(), self.at(at, decay), values, gradient, m, v);
    }

    fn idle(
        &self,
        cpu: &Cpu,
        steps: &[StepAt],
        decay: bool,
        _shape: &[usize],
        values: &mut [f32],
        state: &mut [Vec<f32>],
    ) {
        let steps: Vec<AdamWStep> = steps.iter().map(|at| self.at(*at, decay)).collect();
        let [m, v] = state else { unreachable!("the state is as this optimizer made it") };
        let blocks = values.chunks_mut(BLOCK).zip(m.chunks_mut(BLOCK)).zip(v.chunks_mut(BLOCK));
        for ((values, m), v) in blocks {
            for &step in &steps {
                optimize::adamw(cpu.simd(), step, values, None, m, v);
            }
        }
    }
}

/// SGD with momentum.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sgd {
    /// How much of the last step goes on.
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl Default for Sgd {
    fn default() -> Self {
        Self { momentum: 0.9, weight_decay: 0.0 }
    }
}

impl Optimizer for Sgd {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn state(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        vec![("b", shape.iter().product())]
    }

    fn step(
        &self,
        cpu: &Cpu,
        at: StepAt,
        decay: bool,
        _shape: &[usize],
        values: &mut [f32],
        gradient: Option<&[f32]>,
        state: &mut [Vec<f32>],
    ) {
        let decay = if decay { self.weight_decay as f32 } else { 0.0 };
        let of = [at.lr as f32, self.momentum as f32, decay, at.clip];
        let [b] = state else { unreachable!("the state is as this optimizer made it") };
        optimize::sgd(cpu.simd(), of, at.t == 1, values, gradient, b);
    }
}

/// Adafactor with a given learning rate, scaled by each parameter's root mean square.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adafactor {
    /// Added to squares of gradients.
    pub eps: f64,
    /// Smallest scale of a parameter.
    pub scale_min: f64,
    /// Largest root mean square of an update.
    pub clip_threshold: f64,
    /// Second moments decay by 1 − t^decay_rate.
    pub decay_rate: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl Default for Adafactor {
    fn default() -> Self {
        Self {
            eps: 1e-30,
            scale_min: 1e-3,
            clip_threshold: 1.0,
            decay_rate: -0.8,
            weight_decay: 0.0,
        }
    }
}

impl Optimizer for Adafactor {
    fn name(&self) -> &'static str {
        "adafactor"
    }

    fn state(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        match *shape {
            [rows, columns] => vec![("rows", rows), ("columns", columns)],
            _ => vec![("v", shape.iter().product())],
        }
    }

    fn step(
        &self,
        cpu: &Cpu,
        at: StepAt,
        decay: bool,
        _shape: &[usize],
        values: &mut [f32],
        gradient: Option<&[f32]>,
        state: &mut [Vec<f32>],
    ) {
        let step = AdafactorStep {
            lr: at.lr as f32,
            beta: (1.0 - libm::pow(at.t as f64, self.decay_rate)) as f32,
            eps: self.eps as f32,
            scale_min: self.scale_min as f32,
            threshold: self.clip_threshold as f32,
            decay: if decay { self.weight_decay as f32 } else { 0.0 },
            clip: at.clip,
        };
        let state = match state {
            [rows, columns] => Factored::Matrix { rows, columns },
            [v] => Factored::Vector(v),
            _ => unreachable!("the state is as this optimizer made it"),
        };
        optimize::adafactor(cpu, step, values, gradient, state);
    }
}
