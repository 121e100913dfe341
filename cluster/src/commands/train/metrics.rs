//! Metrics of a run: a line of JSON for each thing that happened.
//!
//! The file is only ever appended to. A run that goes on says `{"event":"resumed","step":N}`: what stands
//! before it of later steps was not kept. A line that a kill has torn is ended, and nobody reads it.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use anyhow::{Context, Result};
use lite_llm_runtime::train::run::Happened;
use serde_json::{Value, json};

const METRICS: &str = "metrics.jsonl";

/// The metrics of a run.
pub(super) struct Metrics {
    file: File,
    path: String,
}

impl Metrics {
    /// Opens those of a run that has done so many steps.
    pub(super) fn open(run: &Path, done: u64) -> Result<Self> {
        let path = run.join(METRICS);
        let shown = path.display().to_string();
        let file = OpenOptions::new().create(true).append(true).read(true).open(&path);
        let mut metrics =
            Self { file: file.with_context(|| format!("{shown}: cannot open"))?, path: shown };
        if metrics.is_torn().with_context(|| format!("{}: cannot read", metrics.path))? {
            metrics.line("")?;
        }
        let begun = metrics.file.metadata().map(|file| file.len() > 0);
        // What an earlier attempt wrote beyond the last checkpoint, or before its first, counts no more.
        if done > 0 || begun.with_context(|| format!("{}: cannot read", metrics.path))? {
            metrics.line(&json!({ "event": "resumed", "step": done }).to_string())?;
        }
        Ok(metrics)
    }

    fn is_torn(&mut self) -> std::io::Result<bool> {
        if self.file.metadata()?.len() == 0 {
            return Ok(false);
        }
        self.file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        self.file.read_exact(&mut last)?;
        Ok(last != *b"\n")
    }

    /// A line in one write, so that a kill tears at most the last.
    fn line(&mut self, text: &str) -> Result<()> {
        let written = self.file.write_all(format!("{text}\n").as_bytes());
        written.with_context(|| format!("{}: cannot write", self.path))
    }

    pub(super) fn write(&mut self, event: &Happened, seconds: f64) -> Result<()> {
        let mut value = serde_json::to_value(event)?;
        value["seconds"] = json!(seconds);
        self.line(&value.to_string())
    }
}

/// What a run's metrics say of each step, by its number: steps, looks at what is held out, and loads of experts.
pub(super) fn read(run: &Path) -> Result<[BTreeMap<u64, Value>; 3]> {
    let path = run.join(METRICS);
    let bytes = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    let [mut steps, mut looks, mut loads] = [const { BTreeMap::new() }; 3];
    for line in bytes.split(|byte| *byte == b'\n') {
        let Ok(value) = serde_json::from_slice::<Value>(line) else { continue };
        let Some(step) = value["step"].as_u64() else { continue };
        match value["event"].as_str() {
            Some("step") => drop(steps.insert(step, value)),
            Some("evaluated") => drop(looks.insert(step, value)),
            Some("load") => drop(loads.insert(step, value)),
            Some("resumed") => {
                for of in [&mut steps, &mut looks, &mut loads] {
                    of.split_off(&(step + 1));
                }
            }
            _ => {}
        }
    }
    Ok([steps, looks, loads])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(step: u64, held_out: f64) -> Happened {
        Happened::Evaluated { step, phase: "0".into(), held_out }
    }

    #[test]
    fn what_was_written_stays_and_a_torn_line_hides_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(dir.path(), 0).unwrap();
        (1..=4).for_each(|step| metrics.write(&look(step, 4.0), 0.0).unwrap());
        drop(metrics);
        let path = dir.path().join(METRICS);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"event\":\"eval").unwrap();
        let before = fs::read(&path).unwrap();
        // It goes on from step 2: 3 comes again, and 4 did not.
        let mut metrics = Metrics::open(dir.path(), 2).unwrap();
        metrics.write(&look(3, 3.0), 0.0).unwrap();
        drop(metrics);
        assert!(fs::read(&path).unwrap().starts_with(&before), "the file was written anew");
        let [_, looks, _] = read(dir.path()).unwrap();
        let found: Vec<(u64, f64)> =
            looks.iter().map(|(step, v)| (*step, v["held_out"].as_f64().unwrap())).collect();
        assert_eq!(found, [(1, 4.0), (2, 4.0), (3, 3.0)]);
        // It begins anew: what no checkpoint has counts no more.
        let mut metrics = Metrics::open(dir.path(), 0).unwrap();
        metrics.write(&look(1, 5.0), 0.0).unwrap();
        let [_, looks, _] = read(dir.path()).unwrap();
        let found: Vec<u64> = looks.keys().copied().collect();
        assert_eq!(found, [1]);
    }
}
