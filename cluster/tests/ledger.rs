//! Detached jobs, as a user sees them: what is accepted is finished, once, with the bits that it would
//! have had, whatever becomes of the coordinator.

mod process;

use std::{collections::BTreeMap, thread, time::Duration};

use process::{Cluster, Ended, PATIENCE, alone, run};
use serde_json::Value;

/// Under which name these tests leave jobs: without one, it would be that of whoever runs them.
const ME: [&str; 2] = ["--as", "tester-1"];

/// A command about detached jobs.
fn ask(cluster: &Cluster, args: &[&str]) -> Ended {
    ask_as(cluster, "tester-1", args)
}

fn ask_as(cluster: &Cluster, name: &str, args: &[&str]) -> Ended {
    let token = cluster.token();
    run(&[args, &["--token", &token, "--as", name]].concat())
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A file of jobs, of which each has its own seed.
fn file(cluster: &Cluster, jobs: usize, tokens: usize) -> String {
    let path = cluster.state.path().join("batch.jsonl");
    let line = |seed: usize| {
        let job = serde_json::json!({
            "prompt": "ls - list", "max_tokens": tokens, "seed": seed, "custom_id": format!("c{seed}"),
        });
        format!("{job}\n")
    };
    std::fs::write(&path, (0..jobs).map(line).collect::<String>()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Text, tokens and end of each job, by its own name.
fn answers(lines: &[Value]) -> BTreeMap<String, (Value, Value, Value)> {
    let answer = |line: &Value| {
        assert!(line.get("error").is_none(), "{line}");
        let id = line["custom_id"].as_str().unwrap().to_owned();
        (id, (line["text"].clone(), line["ids"].clone(), line["end"].clone()))
    };
    let answers: BTreeMap<_, _> = lines.iter().map(answer).collect();
    assert_eq!(answers.len(), lines.len(), "a job came twice");
    answers
}

#[test]
fn a_job_that_is_left_is_finished_and_found_again() {
    let _alone = alone();
    let cluster = Cluster::ready(&["a"], &[]);
    let text = cluster.text();
    let left = cluster
        .submit(
            &[&ME[..], &["--detach", "--max-tokens", "24", "--seed", "7", "ls - list"]].concat(),
        )
        .ends_within(PATIENCE);
    left.expect(0, &["1 accepted"]);
    let number = left.out.trim().to_owned();

    let shown = ask(&cluster, &["job", &number, "--wait", "--json"]);
    shown.expect(0, &[]);
    let job = &lines(&shown.out)[0];
    assert_eq!(job["text"].as_str().unwrap(), text, "it has the text of a job that is waited for");
    assert_eq!((&job["end"], &job["prompt"]), (&"Length".into(), &"ls - list".into()));
    ask(&cluster, &["job", &number]).expect(0, &["24 tokens, length"]);

    let listed = lines(&ask(&cluster, &["jobs", "--json"]).out);
    assert_eq!((listed.len(), &listed[0]["state"]), (1, &"length".into()));
    // Its owner sees it, and whoever has the state folder; nobody else does.
    let other = ask_as(&cluster, "tester-2", &["jobs", "--json"]);
    assert_eq!(other.expect(0, &[]).out, "");
    ask_as(&cluster, "tester-2", &["job", &number]).one_error(2, &["not among yours"]);
    ask_as(&cluster, "tester-2", &["cancel", &number]).one_error(2, &["not among yours"]);
    let state = cluster.state.path().to_str().unwrap();
    let all = run(&["jobs", "--json", "--all", "--state", state]);
    assert_eq!(lines(&all.expect(0, &[]).out).len(), 1);
}

#[test]
fn jobs_end_when_they_are_cancelled_and_at_their_stop_texts() {
    let _alone = alone();
    let cluster = Cluster::ready(&["a"], &[]);
    // So many that the last of them still runs when it is cancelled, however fast the machine is.
    let jobs = file(&cluster, 30, 1000);
    let long = ["--detach", "--json", "--ignore-eos", "--file", &jobs];
    let left = cluster.submit(&[&ME[..], &long].concat()).ends_within(PATIENCE);
    let accepted = &lines(&left.expect(0, &[]).out)[0];
    assert_eq!(accepted["accepted"], 30);
    let range = &accepted["jobs"][0];
    let number = range["last"].to_string();
    cluster.is_running(1);
    let cancelled = ask(&cluster, &["cancel", &number]);
    assert_eq!(cancelled.expect(0, &[]).out, "1 job cancelled\n");
    let again = ask(&cluster, &["cancel", &number]);
    assert_eq!(again.expect(0, &[]).out, "none of them was open any more\n");
    let job = &lines(&ask(&cluster, &["job", &number, "--json", "--wait"]).out)[0];
    assert_eq!((&job["state"], &job["end"]), (&"cancelled".into(), &"Cancelled".into()));
    ask(&cluster, &["cancel", &format!("{}-{number}", range["first"])]).expect(0, &[]);

    // The attached job and the detached one stop at the same token.
    let stop = ["--stop", "e", "--max-tokens", "50", "--seed", "3", "--json", "ls - list"];
    let attached = &lines(&cluster.submit(&stop).ends_within(PATIENCE).expect(0, &[]).out)[0];
    let args = [&ME[..], &["--wait"], &stop].concat();
    let detached = &lines(&cluster.submit(&args).ends_within(PATIENCE).expect(0, &[]).out)[0];
    for what in ["text", "ids", "end"] {
        assert_eq!(attached[what], detached[what], "{what}");
    }
    assert_eq!(detached["end"], "Stop");
}

#[test]
fn what_cannot_run_is_refused_before_it_is_accepted() {
    let _alone = alone();
    let cluster = Cluster::ready(&["a"], &[]);
    let path = cluster.state.path().join("bad.jsonl");
    let long = "word ".repeat(5000);
    let text = format!("{{\"prompt\": \"ls\"}}\n{{\"prompt\": \"{long}\"}}\n");
    std::fs::write(&path, text).unwrap();
    let args = [&ME[..], &["--detach", "--file", path.to_str().unwrap()]].concat();
    let refused = cluster.submit(&args).ends_within(PATIENCE);
    refused.one_error(1, &["job 2 of 2", "tokens"]);
    assert_eq!(ask(&cluster, &["jobs", "--json"]).expect(0, &[]).out, "", "all or nothing");
    ask(&cluster, &["job", "17"]).one_error(2, &["job 17", "not among yours"]);
    ask(&cluster, &["job", "9-3"]).expect(2, &["FIRST-LAST"]);
    // A name that no certificate can have.
    ask_as(&cluster, "Not A Name", &["jobs"]).expect(1, &["Not A Name"]);
}

#[test]
fn a_batch_survives_a_coordinator_that_is_killed_again_and_again() {
    let _alone = alone();
    const JOBS: usize = 30;
    let mut cluster = Cluster::ready(&["a", "b"], &[]);
    let jobs = file(&cluster, JOBS, 120);
    let alone = cluster.submit(&["--ignore-eos", "--file", &jobs]).ends_within(PATIENCE);
    let expected = answers(&lines(&alone.expect(0, &[]).out));

    let out = cluster.state.path().join("results.jsonl");
    let waits = ["--ignore-eos", "--retry", "60s", "--wait", "--out", out.to_str().unwrap()];
    let batch = cluster.submit(&[&ME[..], &waits, &["--file", &jobs]].concat());
    // A seeded sample of `tests/campaigns/ledger.py`.
    let mut state = 7_u64;
    for _ in 0..5 {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        thread::sleep(Duration::from_millis((state >> 33) % 900));
        cluster.coordinator.kill();
        cluster.start_coordinator_again();
        cluster.coordinator.says("tokens written");
    }
    batch.ends_within(PATIENCE).expect(0, &["results written"]);
    let results = lines(&std::fs::read_to_string(&out).unwrap());
    assert_eq!(answers(&results), expected, "0 lost, 0 twice, 0 changed");
    let listed = lines(&ask(&cluster, &["jobs", "--json", "--most", "4096"]).out);
    assert_eq!(listed.len(), JOBS, "the batch was taken once");
    assert!(listed.iter().all(|job| job["state"] == "length"), "{listed:?}");
}

#[test]
fn results_are_kept_for_as_long_as_was_said() {
    let _alone = alone();
    let cluster = Cluster::ready_with(&["a"], &[], &["--keep-jobs", "1s"]);
    let job = ["--wait", "--json", "--max-tokens", "2", "ls - list"];
    cluster.submit(&[&ME[..], &job].concat()).ends_within(PATIENCE).expect(0, &[]);
    let begun = std::time::Instant::now();
    while !ask(&cluster, &["jobs", "--json"]).expect(0, &[]).out.is_empty() {
        assert!(begun.elapsed() < PATIENCE, "it is kept for ever");
    }
}
