//! Damaged checkpoints, as a user sees them: every command that meets the damage names the file.

mod process;

use std::{
    fs,
    path::{Path, PathBuf},
};

use process::{demo_model, run};

/// A copy of the demo model that can be damaged and repaired.
struct Copy {
    folder: tempfile::TempDir,
}

impl Copy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy(&demo_model(), folder.path());
        Self { folder }
    }

    fn dir(&self) -> &str {
        self.folder.path().to_str().unwrap()
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Damages a file for as long as `then` runs.
    fn damaged(&self, file: &str, damage: impl FnOnce(&mut Vec<u8>), then: impl FnOnce()) {
        let good = fs::read(self.path(file)).unwrap();
        let mut bad = good.clone();
        damage(&mut bad);
        fs::write(self.path(file), bad).unwrap();
        then();
        fs::write(self.path(file), good).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// All files of the checkpoint that `verify` reads.
const FILES: [&str; 7] = [
    "manifest.1.json",
    "dense/index.json",
    "dense/model.safetensors",
    "dense/l003.safetensors",
    "tiers/tier_1b/index.json",
    "tiers/tier_1b/l002-g00000.safetensors",
    "tokenizer.json",
];

#[test]
fn truncated_files_are_named() {
    let copy = Copy::new();
    for file in FILES {
        let bytes = fs::metadata(copy.path(file)).unwrap().len() as usize;
        for kept in [0, bytes / 2, bytes - 1] {
            // The manifest's last byte is the end of its last line.
            if (file, kept) == ("manifest.1.json", bytes - 1) {
                continue;
            }
            copy.damaged(
                file,
                |b| b.truncate(kept),
                || {
                    run(&["verify", copy.dir()]).expect(2, &["error: ", file]);
                },
            );
        }
        let path = copy.path(file);
        let moved = copy.path("elsewhere");
        fs::rename(&path, &moved).unwrap();
        match file {
            // A tier without its index is a tier that is not here.
            "tiers/tier_1b/index.json" => {
                let ended = run(&["verify", copy.dir()]);
                assert!(ended.out.contains("tier_1b are not here"), "{ended:#?}");
                run(&["run", "--model", copy.dir(), "hi"]).one_error(2, &["set of tiers is empty"]);
            }
            "manifest.1.json" => {
                run(&["verify", copy.dir()]).expect(2, &["error: ", "manifest.N.json"]);
            }
            file => drop(run(&["verify", copy.dir()]).expect(2, &["error: ", file])),
        }
        fs::rename(&moved, &path).unwrap();
    }
    run(&["verify", copy.dir()]).expect(0, &[]);
}

#[test]
fn flipped_bits_are_named() {
    let copy = Copy::new();
    for file in FILES {
        let bytes = fs::metadata(copy.path(file)).unwrap().len() as usize;
        // The first byte; within a safetensors header; in the middle; the last one that counts.
        for at in [0, 20, bytes / 2, bytes - 2] {
            copy.damaged(
                file,
                |b| b[at] ^= 1,
                || {
                    let ended = run(&["verify", copy.dir()]);
                    assert!(
                        ended.code == Some(2) && ended.err.contains(file),
                        "{file} {at}: {ended:#?}"
                    );
                },
            );
        }
    }
    run(&["verify", copy.dir()]).expect(0, &[]);
}

#[test]
fn verify_names_every_damaged_file() {
    let copy = Copy::new();
    let files = &FILES[2..4];
    for file in files.iter().chain(&FILES[5..]) {
        let mut bytes = fs::read(copy.path(file)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 0x40;
        fs::write(copy.path(file), bytes).unwrap();
    }
    run(&["verify", copy.dir()])
        .expect(2, &["4 errors", FILES[2], FILES[3], FILES[5], FILES[6], "copy it again"]);
}

#[test]
fn damage_is_found_where_a_model_is_loaded() {
    let copy = Copy::new();
    for file in FILES {
        let bytes = fs::metadata(copy.path(file)).unwrap().len() as usize;
        copy.damaged(
            file,
            |b| b[bytes - 9] ^= 1,
            || {
                run(&["run", "--model", copy.dir(), "--max-tokens", "1", "hi"])
                    .one_error(2, &[file]);
            },
        );
        copy.damaged(
            file,
            |b| b.truncate(bytes - 9),
            || {
                run(&["run", "--model", copy.dir(), "--max-tokens", "1", "hi"])
                    .one_error(2, &[file]);
            },
        );
    }
    run(&["run", "--model", copy.dir(), "--max-tokens", "1", "hi"]).expect(0, &["[1 tokens"]);
}
