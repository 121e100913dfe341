//! Standard output that goes away: its reader leaves, or its disk is full. The command ends, soon
//! and without a panic; a server serves on.

mod process;

use std::process::Command;

use process::{Cluster, PATIENCE, Process, demo_model};

/// Exit code of a command whose reader has left.
const READER_LEFT: i32 = 141;

/// Runs `lite-llm` in a shell, which gives its own exit code; its standard error comes back.
fn shell(line: &str) -> (Option<i32>, String) {
    let line = format!("set -o pipefail; {line}");
    let done = Command::new("bash")
        .args(["-c", &line, env!("CARGO_BIN_EXE_lite-llm"), demo_model().to_str().unwrap()])
        .output()
        .unwrap();
    (done.status.code(), String::from_utf8(done.stderr).unwrap())
}

#[test]
fn a_reader_that_leaves_ends_the_command_quietly() {
    let (code, said) = shell("$0 run --ignore-eos --max-tokens 1000 'ls - list' | head -c 9");
    assert_eq!(code, Some(READER_LEFT), "{said}");
    assert!(!said.contains("panicked") && !said.contains("error"), "{said}");
    // What stands at the end of a whole answer.
    assert!(!said.contains("per second"), "the answer was computed to its end, for nobody: {said}");
    // So short that everything may be written before its reader leaves: here it has left before.
    let (code, said) = shell("{ sleep 1; $0 inspect $1; } | true");
    assert_eq!((code, said.as_str()), (Some(READER_LEFT), ""));
}

#[test]
fn standard_error_that_nobody_reads_is_not_missed() {
    let (code, said) =
        shell("{ sleep 1; $0 run --max-tokens 4 'ls - list'; } 2>&1 >/dev/null | true");
    assert_eq!((code, said.as_str()), (Some(0), ""));
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error_of_one_sentence() {
    for args in ["inspect $1", "inspect $1 --json", "run --max-tokens 4 x", "doctor"] {
        let (code, said) = shell(&format!("$0 {args} > /dev/full"));
        assert_eq!(code, Some(1), "{args}: {said}");
        assert!(!said.contains("panicked"), "{args}: {said}");
        let error = said.lines().last().unwrap_or_default();
        let words = "error: standard output cannot be written: No space left on device";
        assert!(error.starts_with(words), "{args}: {said}");
    }
}

#[test]
fn a_server_whose_reader_left_serves_on() {
    let mut cluster = Cluster::ready(&["a"], &[]);
    cluster.coordinator.close_output();
    // Every change of its workers is a line of the coordinator's: the first closes its output,
    // the next find it closed.
    for _ in 0..2 {
        let worker = cluster.take("a");
        worker.signal("TERM");
        worker.ends_within(PATIENCE).expect(0, &[]);
        cluster.join("a");
        cluster.workers[0].1.says("joined");
        assert!(!cluster.text().is_empty());
    }
    let closed = |coordinator: &Process| coordinator.output_is_closed();
    cluster.coordinator.wait_until("its output closed", closed);
    cluster.coordinator.signal("TERM");
    cluster.coordinator.ends_within(PATIENCE).expect(0, &[]);
}
