//! Members that are lost, as a user sees it: the cluster goes on, and every job has the text that it
//! would have had.

mod process;

use std::time::Duration;

use process::{Cluster, PATIENCE, Process, alone};

/// Jobs that run at the same time, and tokens of each.
const JOBS: usize = 12;
const TOKENS: usize = 600;
/// How long giving up may take.
const GIVES_UP_WITHIN: Duration = Duration::from_secs(30);

/// Jobs that go on for long, from one file: all of them the same job.
fn jobs(cluster: &Cluster, count: usize) -> Process {
    let file = cluster.state.path().join("jobs.jsonl");
    let job = format!("{{\"prompt\": \"ls - list\", \"max_tokens\": {TOKENS}, \"seed\": 7}}\n");
    std::fs::write(&file, job.repeat(count)).unwrap();
    cluster.submit(&["--ignore-eos", "--file", file.to_str().unwrap()])
}

/// The one text of such jobs, once they have ended.
#[track_caller]
fn text(jobs: Process, count: usize) -> String {
    let ended = jobs.ends_within(PATIENCE);
    ended.expect(0, &[]);
    let lines: Vec<serde_json::Value> =
        ended.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), count);
    for line in &lines {
        assert_eq!(
            line["ids"].as_array().unwrap().len(),
            TOKENS,
            "a token was lost, or came twice"
        );
        assert_eq!(line["text"], lines[0]["text"]);
    }
    lines[0]["text"].as_str().unwrap().to_owned()
}

/// Ends a worker in the middle of a job; the job goes on. Returns the cluster and what was lost.
#[track_caller]
fn lose(lost: &str, signal: &str, more: &[&str]) -> (Cluster, Process) {
    // Where every worker has every expert, jobs are over sooner.
    let count = if more.is_empty() { JOBS } else { 5 * JOBS };
    let mut cluster = Cluster::ready_with(&["a", "b"], &[], more);
    let before = text(jobs(&cluster, JOBS), JOBS);
    let jobs = jobs(&cluster, count);
    // Both homes have jobs, and each needs experts of the other.
    cluster.is_running(4);
    let worker = cluster.take(lost);
    worker.signal(signal);
    assert_eq!(text(jobs, count), before, "another worker, another text");
    (cluster, worker)
}

#[test]
fn a_killed_worker_costs_a_pause_and_its_experts_are_loaded_by_others() {
    let _alone = alone();
    let (mut cluster, _) = lose("b", "KILL", &[]);
    cluster.is_ready(&["a"]);
    // One of the same name, at once, has its place again.
    cluster.join("b");
    cluster.is_ready(&["a", "b"]);
    text(jobs(&cluster, JOBS), JOBS);
}

#[test]
fn a_killed_home_costs_its_jobs_a_pause() {
    let _alone = alone();
    lose("a", "KILL", &[]);
}

#[test]
fn with_replicas_the_other_holder_serves_at_once() {
    let _alone = alone();
    lose("b", "KILL", &["--replicas", "2"]);
}

#[test]
fn a_stopped_worker_is_taken_in_again_when_it_goes_on() {
    let _alone = alone();
    let (mut cluster, lost) = lose("b", "STOP", &[]);
    lost.signal("CONT");
    cluster.is_ready(&["a", "b"]);
    text(jobs(&cluster, JOBS), JOBS);
}

#[test]
fn workers_wait_for_their_coordinator_and_load_nothing_again() {
    let _alone = alone();
    let mut cluster = Cluster::ready(&["a", "b"], &[]);
    let before = cluster.text();
    let running = jobs(&cluster, JOBS);
    cluster.is_running(1);
    let loaded = cluster.status()["nodes"].clone();
    cluster.coordinator.signal("KILL");
    cluster.start_coordinator_again();
    cluster.is_ready(&["a", "b"]);
    // The client connects again and goes on where it was.
    text(running, JOBS);
    assert_eq!(cluster.text(), before);
    let again = cluster.status()["nodes"].clone();
    for (was, is) in loaded.as_array().unwrap().iter().zip(again.as_array().unwrap()) {
        assert_eq!((&was["name"], &was["experts"]), (&is["name"], &is["experts"]));
    }
}

#[test]
fn a_coordinator_that_does_not_come_back_is_waited_for_so_long_and_no_longer() {
    let _alone = alone();
    let mut cluster = Cluster::waiting(1, &[]);
    let token = cluster.worker_token();
    let args = ["worker", "--token", &token, "--name", "a", "--threads", "1", "--dram", "1GiB"];
    let worker = Process::start(&[&args[..], &["--patience", "1s"]].concat());
    cluster.is_ready(&["a"]);
    let mut job = cluster.submit(&["--max-tokens", "1000", "--ignore-eos", "--retry", "1s", "ls"]);
    job.wait_until("an answer", |job| !job.out().trim().is_empty());
    cluster.coordinator.signal("KILL");
    worker
        .ends_within(GIVES_UP_WITHIN)
        .expect(1, &["lost the coordinator", "did not come back within 1s"]);
    job.ends_within(GIVES_UP_WITHIN).one_error(1, &["no coordinator answered", "is it running"]);
}

#[test]
fn a_drained_worker_gives_its_work_away_and_ends() {
    let _alone = alone();
    let cluster = Cluster::ready(&["a", "b"], &[]);
    let before = text(jobs(&cluster, JOBS), JOBS);
    let running = jobs(&cluster, JOBS);
    cluster.is_running(4);
    let state = cluster.state.path().to_str().unwrap().to_owned();
    let drain = |name: &str| process::run(&["drain", name, "--state", &state]);
    drain("a").expect(0, &[]);
    assert_eq!(text(running, JOBS), before);
    let mut cluster = cluster;
    cluster.take("a").ends_within(PATIENCE).one_error(1, &["drained"]);
    assert_eq!(text(jobs(&cluster, JOBS), JOBS), before);
    drain("a").one_error(1, &["no worker is named a", "b"]);
    drain("b").one_error(1, &["b is the only worker"]);
}

#[test]
fn a_worker_that_joins_gets_its_share_while_jobs_run() {
    let _alone = alone();
    let mut cluster = Cluster::ready(&["a"], &[]);
    let before = text(jobs(&cluster, JOBS), JOBS);
    let running = jobs(&cluster, JOBS);
    cluster.join("b");
    cluster.is_ready(&["a", "b"]);
    assert_eq!(text(running, JOBS), before);
    let nodes = cluster.status()["nodes"].clone();
    let experts: Vec<u64> =
        nodes.as_array().unwrap().iter().map(|node| node["experts"].as_u64().unwrap()).collect();
    assert_eq!(experts.len(), 2);
    assert!(experts[0].abs_diff(experts[1]) <= 1, "{experts:?}");
    assert_eq!(text(jobs(&cluster, JOBS), JOBS), before);
}
