//! Checkpoints of a run: the model, what the optimizer remembers, and where the run is.
//!
//! `step-N/` holds `model/` (a checkpoint that opens by itself), `state.safetensors` (optimizer states and what
//! tiers are pulled to) and, written last, `state.json` with the hashes of both. It is written as
//! `step-N.staging/`, synced, and renamed: a folder under its name is whole. A run goes on from the highest one.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::{
    grow::{TRAINED_DTYPE, tensor_bytes},
    params::Params,
};
use crate::checkpoint::{
    Checkpoint, CheckpointError,
    index::Hash,
    layout::Part,
    writer::{Text, Writer},
};

const STAGING: &str = ".staging";
const STATE: &str = "state.json";
const TENSORS: &str = "state.safetensors";
/// Locked while a process trains.
const LOCK: &str = "run.lock";
/// The model within a checkpoint of a run.
pub const MODEL: &str = "model";

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps of the whole run.
    pub step: u64,
    /// Phase that it is in.
    pub phase: usize,
    /// Steps of that phase.
    pub step_in_phase: u64,
    /// Rows of data that were used.
    pub samples: u64,
    /// Best loss held out in this phase, and looks since; for `patience`.
    #[serde(with = "bits")]
    pub best: Option<f64>,
    /// See `best`.
    pub since_best: u64,
    /// Step at which each expert last had a token: by layer and flat index.
    pub last_used: Vec<Vec<u64>>,
}

/// A number in JSON by its bits: as a decimal it could come back as its neighbour.
mod bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Number {
        Bits(String),
        /// What earlier versions wrote.
        Decimal(f64),
    }

    #[allow(clippy::ref_option)]
    pub(super) fn serialize<S: Serializer>(x: &Option<f64>, to: S) -> Result<S::Ok, S::Error> {
        x.map(|x| Number::Bits(format!("{:016x}", x.to_bits()))).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
        let bits = |text: &str| {
            let bits = u64::from_str_radix(text, 16);
            bits.map(f64::from_bits).map_err(|_| {
                serde::de::Error::custom(format!("{text:?} is not the bits of a number in hex"))
            })
        };
        match Option::<Number>::deserialize(from)? {
            Some(Number::Bits(text)) => bits(&text).map(Some),
            Some(Number::Decimal(x)) => Ok(Some(x)),
            None => Ok(None),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    format: u32,
    /// Hash of all of the configuration that decides bits.
    config: Hash,
    model: Hash,
    tensors: Hash,
    progress: Progress,
}

/// Why a run's checkpoint was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}; earlier checkpoints are as they were")]
    Io {
        /// Which file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The model within could not be written.
    #[error("{path}: {source}; earlier checkpoints are as they were")]
    Write {
        /// Which folder.
        path: String,
        /// What is wrong.
        source: Box<CheckpointError>,
    },
    /// The model within could not be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// It is not what it should be.
    #[error("{path}: {reason}")]
    Bad {
        /// Which file.
        path: String,
        /// What was found, and what to do.
        reason: String,
    },
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> StateError {
    let path = path.display().to_string();
    move |source| StateError::Io { path, action, source }
}

fn bad(path: &Path, reason: impl Into<String>) -> StateError {
    StateError::Bad { path: path.display().to_string(), reason: reason.into() }
}

/// Keeps other runs out of a folder for as long as it lives; also after a kill, for the system ends it with
/// the process.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Makes the folder if need be, and locks it.
    pub fn take(run: &Path) -> Result<Self, StateError> {
        fs::create_dir_all(run).map_err(io(run, "create"))?;
        let path = run.join(LOCK);
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(io(&path, "create"))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(bad(
                run,
                "another process trains in this folder; wait for its end, or name another `out`",
            )),
            // A file system without locks has none to be in the way either.
            _ => Ok(Self { _file: file }),
        }
    }
}

/// Writes a whole model into a new folder.
pub fn write_model(dir: &Path, params: &Params, text: &Text) -> Result<Hash, CheckpointError> {
    let mut writer = Writer::create(dir, params.config(), TRAINED_DTYPE)?;
    let parts: Vec<Part> = Part::all(params.config()).collect();
    for part in parts {
        writer.write_part(part, |spec, sink| sink.write(&tensor_bytes(params, part, spec)))?;
    }
    writer.finish(text)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let mut file = File::create(path).map_err(io(path, "create"))?;
    file.write_all(bytes).map_err(io(path, "write"))?;
    file.sync_all().map_err(io(path, "sync"))
}

fn sync_folder(path: &Path) -> Result<(), StateError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(io(path, "sync"))
}

/// The folder of a step.
fn folder(run: &Path, step: u64) -> PathBuf {
    run.join(format!("step-{step:08}"))
}

/// Writes a checkpoint of a run, and removes all but the `keep` latest. `config` names all that decides
/// bits.
pub fn save<'a>(
    run: &Path,
    params: &Params,
    text: &Text,
    progress: &Progress,
    tensors: impl Iterator<Item = (String, &'a [f32])>,
    (config, keep): (Hash, usize),
) -> Result<PathBuf, StateError> {
    let done = folder(run, progress.step);
    let mut staging = done.clone().into_os_string();
    staging.push(STAGING);
    let staging = PathBuf::from(staging);
    // What an interrupted writer left, here or at another step.
    let left = fs::read_dir(run).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let left = left.filter(|path| path.to_string_lossy().ends_with(STAGING));
    for old in left.chain([done.clone()]).filter(|path| path.exists()) {
        fs::remove_dir_all(&old).map_err(io(&old, "remove"))?;
    }
    let with = (params, text, progress, config);
    if let Err(error) = stage(&staging, with, tensors) {
        // What is not whole is of no use, and may be what fills the disk; what cannot be removed is next time.
        let _ = fs::remove_dir_all(&staging);
        return Err(error);
    }
    fs::rename(&staging, &done).map_err(io(&done, "rename"))?;
    sync_folder(run)?;
    let mut all = list(run)?;
    all.truncate(all.len().saturating_sub(keep));
    for (_, old) in all {
        fs::remove_dir_all(&old).map_err(io(&old, "remove"))?;
    }
    Ok(done)
}

/// Writes all of a checkpoint into a folder, and syncs it.
fn stage<'a>(
    staging: &Path,
    (params, text, progress, config): (&Params, &Text, &Progress, Hash),
    tensors: impl Iterator<Item = (String, &'a [f32])>,
) -> Result<(), StateError> {
    fs::create_dir_all(staging).map_err(io(staging, "create"))?;
    let path = staging.join(MODEL);
    let model = write_model(&path, params, text).map_err(|source| {
        let path = path.display().to_string();
        StateError::Write { path, source: source.into() }
    })?;
    let tensors = write_tensors(&staging.join(TENSORS), &tensors.collect())?;
    let saved = Saved { format: 1, config, model, tensors, progress: progress.clone() };
    let text = serde_json::to_vec_pretty(&saved).map_err(|e| bad(&path, e.to_string()))?;
    write_file(&staging.join(STATE), &text)?;
    sync_folder(staging)
}

/// Writes a safetensors file without a copy of it in memory, and syncs it; the hash of its bytes.
fn write_tensors(path: &Path, tensors: &BTreeMap<String, &[f32]>) -> Result<Hash, StateError> {
    let mut end = 0;
    let infos = tensors.iter().map(|(name, values)| {
        let begin = end;
        end += size_of_val(*values);
        let (shape, data_offsets) = (vec![values.len()], (begin, end));
        (name.clone(), TensorInfo { dtype: Dtype::F32, shape, data_offsets })
    });
    let metadata = Metadata::new(None, infos.collect()).map_err(|e| bad(path, e.to_string()))?;
    let mut names = serde_json::to_vec(&metadata).map_err(|e| bad(path, e.to_string()))?;
    // So that the numbers begin at a multiple of 8 bytes.
    names.resize(names.len().next_multiple_of(8), b' ');
    let mut file = File::create(path).map_err(io(path, "create"))?;
    let mut hasher = blake3::Hasher::new();
    let mut write = |bytes: &[u8]| {
        hasher.update(bytes);
        file.write_all(bytes).map_err(io(path, "write"))
    };
    write(&(names.len() as u64).to_le_bytes())?;
    write(&names)?;
    for values in tensors.values() {
        write(bytemuck::cast_slice(values))?;
    }
    file.sync_all().map_err(io(path, "sync"))?;
    Ok(Hash(hasher.finalize().into()))
}

/// Reads what [`write_tensors`] has written, each tensor into memory of its own, and the hash of all bytes.
fn read_tensors(path: &Path) -> Result<(BTreeMap<String, Vec<f32>>, Hash), StateError> {
    let damaged = |what: String| {
        bad(path, format!("{what}; remove the checkpoint's folder to go on from the one before"))
    };
    let mut file = File::open(path).map_err(io(path, "read"))?;
    let length = file.metadata().map_err(io(path, "read"))?.len();
    let mut hasher = blake3::Hasher::new();
    let mut read = |bytes: &mut [u8]| -> Result<(), StateError> {
        file.read_exact(bytes).map_err(io(path, "read"))?;
        hasher.update(bytes);
        Ok(())
    };
    let mut header = [0; 8];
    if length < header.len() as u64 {
        return Err(damaged(format!("it ends after {length} bytes")));
    }
    read(&mut header)?;
    let claimed = u64::from_le_bytes(header);
    if claimed > length - header.len() as u64 {
        return Err(damaged(format!(
            "it has {length} bytes, and says that {claimed} name tensors"
        )));
    }
    let mut names = vec![0; claimed as usize];
    read(&mut names)?;
    let metadata: Metadata =
        serde_json::from_slice(&names).map_err(|error| damaged(error.to_string()))?;
    let expected = (header.len() as u64 + claimed).saturating_add(metadata.data_len() as u64);
    if length != expected {
        return Err(damaged(format!("it has {length} bytes; {expected} are expected")));
    }
    let mut tensors = BTreeMap::new();
    // They lie one after another, without gaps: the metadata was checked for that.
    for name in metadata.offset_keys() {
        let info = metadata.info(&name);
        let bytes = info.map_or(0, |info| info.data_offsets.1 - info.data_offsets.0);
        if !bytes.is_multiple_of(size_of::<f32>()) {
            return Err(damaged(format!("{name} has {bytes} bytes")));
        }
        let mut values = vec![0.0; bytes / size_of::<f32>()];
        read(bytemuck::cast_slice_mut(&mut values))?;
        tensors.insert(name, values);
    }
    Ok((tensors, Hash(hasher.finalize().into())))
}

/// Checkpoints of a run, earliest first.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>, StateError> {
    let entries = match fs::read_dir(run) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io(run, "list")(e)),
    };
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
    let mut all: Vec<(u64, PathBuf)> =
        entries.filter_map(|e| Some(e.ok()?.path())).filter_map(|p| Some((step(&p)?, p))).collect();
    all.sort();
    Ok(all)
}

/// What a checkpoint of a run holds.
#[derive(Debug)]
pub struct Loaded {
    /// The parameters.
    pub params: Params,
    /// Where the run was.
    pub progress: Progress,
    /// Everything else by name.
    pub tensors: BTreeMap<String, Vec<f32>>,
}

/// Reads a checkpoint of a run, and verifies every byte; `config` of where the run was must be the hash
/// that it was written with.
pub fn load(dir: &Path, config: impl Fn(&Progress) -> Hash) -> Result<Loaded, StateError> {
    let path = dir.join(STATE);
    let bytes = fs::read(&path).map_err(io(&path, "read"))?;
    let saved: Saved = serde_json::from_slice(&bytes).map_err(|e| {
        bad(
            &path,
            format!(
                "{e}; the checkpoint is damaged: remove its folder to go on from the one before"
            ),
        )
    })?;
    if saved.config != config(&saved.progress) {
        return Err(bad(
            &path,
            "it was written by a run with another configuration of model, data or of phases that had begun; go on with that one, \
             or name another `out`",
        ));
    }
    let checkpoint = Checkpoint::open(dir.join(MODEL))?;
    if Hash(checkpoint.id()) != saved.model {
        return Err(bad(&path, "the model beside it is another one; restore the folder"));
    }
    let params = Params::load(&checkpoint)?;
    let path = dir.join(TENSORS);
    let (tensors, hash) = read_tensors(&path)?;
    if hash != saved.tensors {
        let reason = "its bytes are not those that were written; remove the checkpoint's folder to go on from \
                      the one before";
        return Err(bad(&path, reason));
    }
    Ok(Loaded { params, progress: saved.progress, tensors })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_loss_comes_back_with_its_bits_and_older_checkpoints_are_read() {
        let mut progress = Progress {
            step: 1,
            phase: 0,
            step_in_phase: 1,
            samples: 4,
            best: None,
            since_best: 0,
            last_used: Vec::new(),
        };
        let round = |progress: &Progress| -> Progress {
            serde_json::from_slice(&serde_json::to_vec_pretty(progress).unwrap()).unwrap()
        };
        assert_eq!(round(&progress).best, None);
        let mut wrong = 0;
        for i in 0..20_000u64 {
            let x = f64::from_bits(
                0x4010_0000_0000_0000 + i.wrapping_mul(0x9e37_79b9_7f4a) % (1 << 51),
            );
            progress.best = Some(x);
            assert_eq!(round(&progress).best.map(f64::to_bits), Some(x.to_bits()));
            let decimal: f64 = serde_json::from_str(&serde_json::to_string(&x).unwrap()).unwrap();
            wrong += usize::from(decimal.to_bits() != x.to_bits());
        }
        let mut old = serde_json::to_value(&progress).unwrap();
        old["best"] = 2.5.into();
        assert_eq!(serde_json::from_value::<Progress>(old).unwrap().best, Some(2.5));
        assert!(wrong > 0, "decimals would do: these numbers cannot tell");
    }
}
