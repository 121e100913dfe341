//! Steps that are put off: a parameter without a gradient costs nothing in a step, and is caught up, with the bits that
//! it would have had, when somebody looks at it.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use lite_llm_kernels::cpu::Cpu;
use parking_lot::RwLock;

use super::optimizer::{Optimizer, StepAt};

/// All steps of a trainer.
pub(super) type History = RwLock<Vec<StepAt>>;

/// What a parameter that is behind is caught up with.
pub(super) struct Behind {
    pub(super) cpu: Arc<Cpu>,
    pub(super) optimizer: Arc<dyn Optimizer>,
    pub(super) history: Arc<History>,
    /// The first step that was put off, by its place among all.
    pub(super) from: usize,
    pub(super) decay: bool,
    /// States of its optimizer at that time.
    pub(super) states: Vec<Vec<f32>>,
    /// Values and states as they are now: set between two steps, when somebody looks, and taken with the next.
    now: OnceLock<Settled>,
}

/// Values and states.
pub(super) type Settled = (Vec<f32>, Vec<Vec<f32>>);

impl fmt::Debug for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Behind").field("from", &self.from).finish_non_exhaustive()
    }
}

impl Behind {
    pub(super) fn new(
        (cpu, optimizer): (&Arc<Cpu>, &Arc<dyn Optimizer>),
        (history, from): (&Arc<History>, usize),
        decay: bool,
        states: Vec<Vec<f32>>,
    ) -> Self {
        let (cpu, optimizer, history) = (cpu.clone(), optimizer.clone(), history.clone());
        Self { cpu, optimizer, history, from, decay, states, now: OnceLock::new() }
    }

    /// Whether somebody looked since the last step.
    pub(super) fn is_seen(&self) -> bool {
        self.now.get().is_some()
    }

    /// Values and states as they are now.
    pub(super) fn now(&self, shape: &[usize], values: &[f32]) -> &Settled {
        self.now.get_or_init(|| {
            let steps = self.history.read()[self.from..].to_vec();
            let (mut values, mut states) = (values.to_vec(), self.states.clone());
            self.optimizer.idle(&self.cpu, &steps, self.decay, shape, &mut values, &mut states);
            (values, states)
        })
    }

    /// Values and states as they are now, taken out.
    pub(super) fn settle(mut self, shape: &[usize], values: &[f32]) -> Settled {
        self.now(shape, values);
        self.now.take().unwrap_or_default()
    }
}
