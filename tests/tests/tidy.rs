//! The house's own rules, checked on the source: direction of crates, length of files, a first
//! line that says what a file owns, no unwrap outside tests, homes of unsafe code and of quinn.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lite_llm_tests::root;

/// Crates from left to right: each uses only what stands before it.
const ORDER: [&str; 5] = ["kernels", "runtime", "transport", "actors", "cluster"];
/// Longest file, in lines.
const LINES_MAX: usize = 700;

/// Every Rust file of these folders, with its text.
fn sources(folders: &[&str]) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("source is UTF-8");
                files.push((path, text));
            }
        }
    }
    assert!(!files.is_empty(), "there are sources to check");
    files
}

fn all() -> Vec<(PathBuf, String)> {
    let folders = ["kernels", "runtime", "transport", "actors", "cluster", "examples", "tests"];
    sources(&folders)
}

fn short(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The part of a file before its unit tests.
fn outside_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text)
}

#[test]
fn crates_use_only_what_stands_to_their_left() {
    for (at, folder) in ORDER.iter().enumerate() {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        for right in &ORDER[at..] {
            let name = format!("lite-llm-{right}.");
            let uses = manifest.lines().any(|line| line.starts_with(&name));
            assert!(!uses, "{folder} uses {right}, which stands to its right");
        }
    }
}

#[test]
fn files_say_what_they_own_and_stay_short() {
    for (path, text) in all() {
        assert!(text.starts_with("//!"), "{}: the first line says what it owns", short(&path));
        let lines = text.lines().count();
        assert!(
            lines <= LINES_MAX,
            "{}: {lines} lines; it has a second reason to exist",
            short(&path)
        );
    }
}

#[test]
fn nothing_unwraps_outside_tests_and_nothing_is_left_undone() {
    for (path, text) in
        sources(&ORDER.map(|folder| format!("{folder}/src")).each_ref().map(String::as_str))
    {
        // A module of tests has a file of its own where it is long.
        let tests = ["tests.rs", "campaign.rs", "testing.rs"];
        if tests.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        for (number, line) in (1..).zip(outside_tests(&text).lines()) {
            let code = line.split("//").next().unwrap_or(line);
            for banned in [".unwrap()", "todo!(", "unimplemented!(", "dbg!("] {
                assert!(!code.contains(banned), "{}:{number}: {banned}", short(&path));
            }
        }
    }
}

#[test]
fn unsafe_code_lives_in_kernels_and_the_ring_and_quinn_in_transport() {
    for folder in ["runtime", "transport", "actors", "cluster", "examples", "tests"] {
        for (path, text) in sources(&[folder]) {
            let code = || text.lines().map(|line| line.split("//").next().unwrap_or(line));
            let is_unsafe =
                code().any(|line| line.contains("unsafe {") || line.contains("unsafe fn"));
            // What products and reads are measured against has an unsafe door.
            let peer =
                path.ends_with("bench/kernels.rs") || path.ends_with("runtime/benches/blocks.rs");
            // The kernel writes into memory that a request owns, which no borrow can say.
            let ring = path.ends_with("runtime/src/blocks/ring.rs");
            assert!(
                !is_unsafe || peer || ring || path.ends_with("tidy.rs"),
                "{}: unsafe code",
                short(&path)
            );
            let quinn = folder != "transport" && code().any(|line| line.contains("quinn::"));
            assert!(
                !quinn || path.ends_with("tidy.rs"),
                "{}: quinn outside transport",
                short(&path)
            );
        }
    }
}

#[test]
fn pure_crates_know_no_runtime_and_no_clock() {
    for (path, text) in sources(&["kernels/src", "runtime/src"]) {
        for banned in ["tokio::", "ractor::", "std::net", "SystemTime::now", "Instant::now"] {
            // Measuring is a clock's business, and so is how long an idle thread spins.
            let mut clocks = ["measure.rs", "pool.rs", "tests.rs"].iter();
            let allowed = clocks.any(|file| path.ends_with(file));
            assert!(
                allowed || !outside_tests(&text).contains(banned),
                "{}: {banned} in a crate without clock and sockets",
                short(&path)
            );
        }
    }
}
