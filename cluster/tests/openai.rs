//! The unmodified `openai` package of Python against a cluster of two workers.
//!
//! The package is installed into a folder of its own under `target/`; without Python or a network the
//! test says so and skips.

mod process;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use process::{Cluster, PATIENCE, run};
use serde_json::{Value, json};

/// How long Python may take to install a package.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(240);

/// Runs a command to its end, within a limit. Its output, or why there is none.
fn output(command: &mut Command, input: &str, limit: Duration) -> Result<String, String> {
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawned.spawn().map_err(|error| error.to_string())?;
    child.stdin.take().unwrap().write_all(input.as_bytes()).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let pid = child.id();
    let waiting = std::thread::spawn(move || child.wait_with_output());
    while !waiting.is_finished() {
        if begun.elapsed() > limit {
            let _ = Command::new("kill").arg("-9").arg(pid.to_string()).status();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let ended = waiting.join().unwrap().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    match ended.status.success() {
        true => Ok(said),
        false => Err(format!("{said}\n{}", String::from_utf8_lossy(&ended.stderr))),
    }
}

/// A Python that has the package.
fn python() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openai-venv");
    let python = folder.join("bin/python");
    let has_it = || output(Command::new(&python).args(["-c", "import openai"]), "", PATIENCE);
    if has_it().is_ok() {
        return Some(python);
    }
    let made =
        output(Command::new("python3").args(["-m", "venv"]).arg(&folder), "", INSTALL_TIMEOUT)
            .and_then(|_| {
                let arguments = ["-m", "pip", "install", "--quiet", "openai"];
                output(Command::new(&python).args(arguments), "", INSTALL_TIMEOUT)
            })
            .and_then(|_| has_it());
    match made {
        Ok(_) => Some(python),
        Err(error) => {
            eprintln!("skipped: the openai package cannot be installed: {error}");
            None
        }
    }
}

/// Where a coordinator's API is, as it says.
fn url(said: &str) -> String {
    let line = said.lines().find(|line| line.starts_with("http on ")).unwrap();
    line.split([' ', ',']).nth(2).unwrap().to_owned()
}

#[test]
fn the_openai_package_talks_to_a_cluster() {
    let Some(python) = python() else { return };
    let mut cluster = Cluster::ready_with(&["a", "b"], &[], &["--http", "127.0.0.1:0"]);
    let args = ["--json", "--max-tokens", "24", "--seed", "7", "ls - list"];
    let submitted = cluster.submit(&args).ends_within(PATIENCE);
    submitted.expect(0, &[]);
    let submitted: Value = serde_json::from_str(&submitted.out).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    let url = url(&cluster.coordinator.out());
    let mut talk = Command::new(python);
    talk.arg(script).arg(&url);
    let said = output(&mut talk, &json!(submitted).to_string(), 3 * PATIENCE);
    let said = said.unwrap_or_else(|error| {
        panic!("{error}\n{}\n{}", cluster.coordinator.out(), cluster.coordinator.err())
    });
    assert!(said.contains("leaving ok"), "{said}");
    // Who left in the middle has left nothing behind.
    let begun = Instant::now();
    while cluster.status()["jobs_running"] != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{:#}", cluster.status());
    }
    cluster.coordinator.wait_until("no more jobs", |_| true);
    cluster.coordinator.signal("TERM");
    cluster.coordinator.ends_within(PATIENCE).expect(0, &[]);
    let refused = run(&["run", "--http", "0.0.0.0:0"]);
    refused.expect(2, &["0.0.0.0:0", "loopback"]);
}
