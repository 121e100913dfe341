//! Compatibility by bytes: a checkpoint of format 2, extended once, is kept as files. Every later build
//! reads it, with the same names and the same bits, and writes the same bytes from the same values.
//!
//! If this fails, the layout or the determinism contract changed: undo that, or raise
//! `FORMAT_VERSION` or `DETERMINISM_VERSION`, keep what is there for the versions that read it, and
//! write the files of the new version with `LITE_LLM_WRITE_BYTES=1`.

mod grow;
mod hf;

use std::{
    fs,
    path::{Path, PathBuf},
};

use grow::{checkpoint, contents, extend, logits, tier_10b};
use lite_llm_runtime::checkpoint::{Checkpoint, verify::verify};

/// Roots of its manifests.
const ROOTS: [&str; 2] = [
    "d500ba38cd9805857162f4ed0d01b835d1653d327f34b0685d9fc764b8e849ac",
    "f663a96e67951eb100369004cdbda39c591e19324494d26524a721220f394862",
];
/// blake3 of the logits' bits, by address and TierSet.
const LOGITS: [(&str, &str, &str); 3] = [
    ("@1", "all", "1c0f56cbbf1bfb74c1277b29681f63d68c74d8233de1515bf9da75b0c135368b"),
    ("@2", "tier_1b", "1c0f56cbbf1bfb74c1277b29681f63d68c74d8233de1515bf9da75b0c135368b"),
    ("@2", "all", "3a231623011c99df7f5c0886483b150e80d19927273cfd04f45f905d8623c4c3"),
];

fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/checkpoint.v2")
}

#[test]
fn a_checkpoint_of_format_2_is_written_as_it_was() {
    let (_dir, out) = checkpoint();
    extend(&out, tier_10b()).unwrap();
    let written = contents(&out);
    if std::env::var_os("LITE_LLM_WRITE_BYTES").is_some() {
        for (name, bytes) in &written {
            let path = kept().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
    let kept = contents(&kept());
    assert!(written.keys().eq(kept.keys()), "the same files");
    for (name, bytes) in &kept {
        assert!(written[name] == *bytes, "{}: this build lays it otherwise", name.display());
    }
}

#[test]
fn a_checkpoint_of_format_2_reads_with_its_roots_and_its_bits() {
    let at = |suffix: &str| format!("{}{suffix}", kept().display());
    for (number, root) in ROOTS.iter().enumerate() {
        let checkpoint = Checkpoint::open(at(&format!("@{}", number + 1))).unwrap();
        verify(&checkpoint, &mut |_, _, _| {}).unwrap();
        assert_eq!(checkpoint.manifest().root.to_string(), *root, "manifest {}", number + 1);
    }
    let found = LOGITS.map(|(address, tiers, _)| {
        let bits = logits(&at(address), tiers).unwrap();
        (address, tiers, blake3::hash(bytemuck::cast_slice(&bits)).to_string())
    });
    let expected = LOGITS.map(|(address, tiers, hash)| (address, tiers, hash.to_owned()));
    assert_eq!(found, expected);
}
