//! The parameters of a checkpoint by their names ([`super::params`]), each read when it is asked for.

use std::cell::RefCell;

use super::params::row_major;
use crate::{
    checkpoint::{Checkpoint, CheckpointError},
    expert::{ExpertKey, GatedMlp},
};

/// A checkpoint of which only what is asked for is read; the last expert and the last gate over experts are
/// kept, for what belongs to them is mostly asked for together.
pub(crate) struct Stored<'a> {
    checkpoint: &'a Checkpoint,
    gate: RefCell<Option<(String, Vec<f32>)>>,
    expert: RefCell<Option<(ExpertKey, GatedMlp)>>,
}

impl<'a> Stored<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, gate: RefCell::new(None), expert: RefCell::new(None) }
    }

    /// The values of a parameter, row-major: of all but gates over tiers and groups.
    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let parts: Vec<&str> = name.split('.').collect();
        let number = |at: usize| parts.get(at).and_then(|part| part.parse::<u32>().ok());
        let missing = || {
            let (location, what) = (self.checkpoint.location(), format!("parameter {name}"));
            CheckpointError::Absent { location, what }
        };
        if parts.get(2) != Some(&"tiers") {
            // Whether it is a matrix is the checkpoint's to know.
            return match self.checkpoint.dense_vector(name) {
                Ok(values) => Ok(values),
                Err(_) => Ok(row_major(&self.checkpoint.dense_matrix(name)?)),
            };
        }
        let place = number(1).zip(number(3)).zip(number(5));
        let ((layer, tier), group) = place.ok_or_else(missing)?;
        let Some(expert) = number(7) else {
            let mut kept = self.gate.borrow_mut();
            if let Some((_, values)) = kept.as_ref().filter(|(of, _)| of == name) {
                return Ok(values.clone());
            }
            let gate = self.checkpoint.expert_router(layer as usize, tier as usize, group)?;
            let values = row_major(&gate);
            *kept = Some((name.into(), values.clone()));
            return Ok(values);
        };
        let key = ExpertKey { layer: layer as u16, tier: tier as u16, group, expert };
        let mut kept = self.expert.borrow_mut();
        if kept.as_ref().is_none_or(|(of, _)| *of != key) {
            *kept = Some((key, self.checkpoint.expert(key)?));
        }
        let matrix = kept.as_ref().and_then(|(_, mlp)| match *parts.get(8)? {
            "gate" => Some(&mlp.gate),
            "up" => Some(&mlp.up),
            "down" => Some(&mlp.down),
            _ => None,
        });
        Ok(row_major(matrix.ok_or_else(missing)?))
    }
}
