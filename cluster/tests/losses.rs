//! Members that are lost, as a user sees it: within five seconds whoever waits is told who is
//! gone, and with a replacement the same jobs give the same text again.

mod process;

use std::time::Duration;

use process::{Cluster, PATIENCE, alone};

/// How long a loss may stay unnoticed.
const NOTICED_WITHIN: Duration = Duration::from_secs(5);

/// Ends a worker in the middle of a job that is at home at `a` and needs experts of `a` and `b`.
fn lose(lost: &str, signal: &str) {
    let mut cluster = Cluster::ready(&["a", "b"], &[]);
    let before = cluster.text();
    let job = cluster.long_job();
    let said = cluster.coordinator.out().len();
    cluster.workers.iter().find(|(name, _)| name == lost).unwrap().1.signal(signal);
    let ended = job.ends_within(NOTICED_WITHIN);
    ended.one_error(
        1,
        &[&format!("worker {lost} is gone ("), "its experts are missing", "submit again"],
    );
    // The answer broke off in the middle of a line; the error does not continue it.
    assert!(ended.out.ends_with('\n'), "{ended:#?}");

    // The coordinator may notice a moment after the worker that waited for the lost one.
    cluster.coordinator.wait_until("the coordinator's own notice", |coordinator| {
        coordinator.out()[said..].contains("1 of 2 workers to join")
    });
    let refused = cluster.submit(&["hi"]).ends_within(PATIENCE);
    refused.one_error(1, &["not ready", "1 of 2 workers to join"]);
    cluster.join("c");
    let mut names = ["a", "b", "c"].to_vec();
    names.retain(|name| *name != lost);
    cluster.is_ready(&names);
    assert_eq!(cluster.text(), before, "another worker, another text");

    // One that was only stopped learns that it is out, and ends.
    let lost = cluster.take(lost);
    if signal == "STOP" {
        lost.signal("CONT");
        lost.ends_within(NOTICED_WITHIN).one_error(1, &["lost the coordinator"]);
    }
}

#[test]
fn a_killed_worker_fails_its_jobs_by_name_and_a_replacement_gives_the_same_text() {
    let _alone = alone();
    lose("b", "KILL");
}

#[test]
fn a_killed_home_of_a_job_is_noticed_alike() {
    let _alone = alone();
    lose("a", "KILL");
}

#[test]
fn a_stopped_worker_is_noticed_as_a_killed_one() {
    let _alone = alone();
    lose("b", "STOP");
}

#[test]
fn a_killed_coordinator_ends_its_workers_and_clients() {
    let _alone = alone();
    let mut cluster = Cluster::ready(&["a", "b"], &[]);
    let job = cluster.long_job();
    cluster.coordinator.signal("KILL");
    for name in ["a", "b"] {
        cluster
            .take(name)
            .ends_within(NOTICED_WITHIN)
            .one_error(1, &["lost the coordinator", "did not answer"]);
    }
    job.ends_within(NOTICED_WITHIN).one_error(1, &["coordinator"]);
    let token = cluster.token();
    process::run(&["status", "--token", &token])
        .one_error(1, &["no coordinator answered", "is it running"]);
}
