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
            return match self.checkpoint.is_dense_matrix(name)? {
                true => Ok(row_major(&self.checkpoint.dense_matrix(name)?)),
                false => self.checkpoint.dense_vector(name),
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

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// What is wrong with a parameter is said, not that it is none of another kind.
    #[test]
    fn a_damaged_vector_is_named() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/manpages-moe");
        let folder = tempfile::tempdir().unwrap();
        let (mut folders, mut files) = (vec![demo.clone()], Vec::new());
        while let Some(from) = folders.pop() {
            let to = folder.path().join(from.strip_prefix(&demo).unwrap());
            fs::create_dir_all(&to).unwrap();
            for entry in fs::read_dir(&from).unwrap() {
                let entry = entry.unwrap();
                if entry.path().is_dir() {
                    folders.push(entry.path());
                    continue;
                }
                let copy = to.join(entry.file_name());
                fs::copy(entry.path(), &copy).unwrap();
                files.push(copy);
            }
        }
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let norm = Stored::new(&checkpoint).values("norm").unwrap();
        assert_eq!(norm.len(), checkpoint.config().hidden);
        let first: Vec<u8> = norm[..16].iter().flat_map(|value| value.to_le_bytes()).collect();
        for file in files {
            let mut bytes = fs::read(&file).unwrap();
            let found = bytes.windows(first.len()).position(|window| window == first);
            if let Some(at) = found {
                bytes[at] ^= 1;
                fs::write(&file, bytes).unwrap();
            }
        }
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let error = Stored::new(&checkpoint).values("norm").unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
    }
}
