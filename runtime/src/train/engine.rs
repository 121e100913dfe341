//! What does a run's steps, in this process or with others; and checkpoints that are written beside them.

use std::{path::PathBuf, thread};

use super::{
    TrainError,
    batch::Batch,
    happened::Happened,
    params::Params,
    run::RunError,
    spread::Spread,
    state::{self, Progress, StateError},
    step::{StepLosses, StepOptions, evaluate},
    trainer::{StepReport, Trainer},
};
use crate::checkpoint::{index::Hash, writer::Text};

/// What does the steps.
pub(super) enum Engine {
    /// This process.
    Here(Box<Trainer>),
    /// Several ranks.
    Spread(Box<Spread>),
    /// Nobody: what did them was taken, and nothing took its place.
    Nobody,
}

fn nobody() -> TrainError {
    TrainError::Lost("nobody trains".into())
}

impl Engine {
    pub(super) fn step(
        &mut self,
        batch: &Batch,
        options: &StepOptions<'_>,
        lr: f64,
    ) -> Result<StepReport, TrainError> {
        match self {
            Self::Here(trainer) => trainer.step(batch, options, lr),
            Self::Spread(spread) => spread.step(batch, options, lr),
            Self::Nobody => Err(nobody()),
        }
    }

    pub(super) fn evaluate(
        &mut self,
        batch: &Batch,
        options: &StepOptions<'_>,
    ) -> Result<StepLosses, TrainError> {
        match self {
            Self::Here(trainer) => evaluate(trainer.cpu(), trainer.params(), batch, options),
            Self::Spread(spread) => spread.evaluate(batch, options),
            Self::Nobody => Err(nobody()),
        }
    }

    /// The parameters' shapes; values only where this process trains.
    pub(super) fn params(&self) -> &Params {
        match self {
            Self::Here(trainer) => trainer.params(),
            Self::Spread(spread) => spread.params(),
            Self::Nobody => unreachable!("whoever takes the trainer puts another, or ends"),
        }
    }

    /// A copy of all values and states.
    pub(super) fn whole(&mut self) -> Result<Trainer, TrainError> {
        match self {
            Self::Here(trainer) => Ok(Trainer::clone(trainer)),
            Self::Spread(spread) => spread.collect(),
            Self::Nobody => Err(nobody()),
        }
    }

    /// All values and states, taken out.
    pub(super) fn take(&mut self) -> Result<Trainer, TrainError> {
        match std::mem::replace(self, Self::Nobody) {
            Self::Here(trainer) => Ok(*trainer),
            Self::Spread(mut spread) => spread.collect(),
            Self::Nobody => Err(nobody()),
        }
    }
}

/// A checkpoint that is being written, by a thread of its own.
pub(super) struct Saving {
    step: u64,
    thread: thread::JoinHandle<Result<PathBuf, StateError>>,
}

impl Saving {
    pub(super) fn begin(
        out: PathBuf,
        trainer: Trainer,
        text: Text,
        progress: Progress,
        to: (Hash, usize),
    ) -> Result<Self, StateError> {
        let (step, path) = (progress.step, out.display().to_string());
        let write = move || {
            // A phase that has not begun remembers nothing.
            let states = trainer.states().filter(|_| progress.step_in_phase > 0);
            state::save(&out, trainer.params(), &text, &progress, states, to)
        };
        let thread = thread::Builder::new().name("checkpoint".into()).spawn(write);
        let action = "start a thread that writes checkpoints to";
        let thread = thread.map_err(|source| StateError::Io { path, action, source })?;
        Ok(Self { step, thread })
    }

    pub(super) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it is written.
    pub(super) fn wait(self) -> Result<Happened, RunError> {
        let path = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(Happened::Saved { step: self.step, path: path.display().to_string() })
    }
}
