//! Ctrl-C, anywhere: it ends what runs, soon, and the terminal is left in order.

mod process;

use std::{fs, time::Duration};

use lite_llm_runtime::import::random::{RandomClass, RandomShape, write_random_hf};
use process::{Cluster, PATIENCE, Process, alone};

/// How long an interrupted command may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(2);
/// Exit code of a command that was interrupted.
const INTERRUPTED: i32 = 130;

#[test]
fn a_run_ends_and_its_line_too() {
    let _alone = alone();
    for signal in ["INT", "TERM"] {
        let args = ["run", "--ignore-eos", "--max-tokens", "1000", "ls - list"];
        let mut run = Process::start(&args);
        run.wait_until("an answer", |run| run.out().len() > 40);
        run.signal(signal);
        let ended = run.ends_within(ENDS_WITHIN);
        ended.expect(INTERRUPTED, &["interrupted\n"]);
        assert!(ended.out.ends_with('\n'), "{ended:#?}");
    }
}

#[test]
fn a_trace_receiver_that_hangs_holds_nobody_up() {
    let _alone = alone();
    let receiver = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", receiver.local_addr().unwrap());
    let args = ["run", "--otlp", &url, "--ignore-eos", "--max-tokens", "1000", "ls - list"];
    let mut run = Process::start(&args);
    run.wait_until("an answer", |run| run.out().len() > 40);
    run.signal("INT");
    run.ends_within(ENDS_WITHIN).expect(INTERRUPTED, &["traces were not sent", "interrupted\n"]);
}

#[test]
fn an_import_ends_and_can_be_run_again() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let (hf, out) = (folder.path().join("hf"), folder.path().join("out"));
    // Many small files, each synced: time enough to be in the middle of it.
    let shape = RandomShape { layers: 48, ..RandomShape::tiny(RandomClass::Olmoe) };
    write_random_hf(&hf, &shape, &mut |_, _| {}).unwrap();
    let (hf, dir) = (hf.to_str().unwrap(), out.to_str().unwrap());
    let mut import = Process::start(&["import", hf, dir]);
    import.wait_until("the first file", |_| out.join("dense").exists());
    import.signal("INT");
    let ended = import.ends_within(ENDS_WITHIN);
    // Whatever it came to, there is a whole checkpoint or none.
    if !out.join("manifest.json").exists() {
        ended.expect(INTERRUPTED, &["interrupted"]);
        process::run(&["inspect", dir])
            .one_error(2, &["unfinished import", "run the import again"]);
        process::run(&["import", hf, dir]).expect(0, &[]);
    }
    process::run(&["verify", dir]).expect(0, &[]);
}

#[test]
fn a_wait_for_standard_input_ends() {
    let _alone = alone();
    let (run, open_end) = Process::start_with_open_input(&["run", "-"]);
    std::thread::sleep(Duration::from_millis(500));
    run.signal("INT");
    run.ends_within(ENDS_WITHIN).expect(INTERRUPTED, &["interrupted"]);
    drop(open_end);
}

#[test]
fn a_coordinator_that_waits_and_one_that_serves_end_in_good_order() {
    let _alone = alone();
    let waiting = Cluster::waiting(2, &[]);
    waiting.coordinator.signal("INT");
    let ended = waiting.coordinator.ends_within(ENDS_WITHIN);
    ended.expect(0, &[]);
    assert!(ended.out.ends_with("stopping\n") && ended.err.is_empty(), "{ended:#?}");

    let mut serving = Cluster::ready(&["a"], &[]);
    serving.coordinator.signal("TERM");
    let ended = serving.coordinator.ends_within(ENDS_WITHIN);
    ended.expect(0, &[]);
    // Its worker is told, need not find out, and waits for the next one.
    let mut worker = serving.workers.remove(0).1;
    worker.wait_until("the loss", |worker| {
        let said = worker.err();
        said.contains("lost the coordinator; trying again")
            && said.contains("the coordinator stops")
    });
    worker.signal("INT");
    // It may be in the middle of trying again.
    worker.ends_within(2 * ENDS_WITHIN).expect(0, &[]);
}

#[test]
fn a_worker_that_serves_leaves_and_its_jobs_go_on() {
    let _alone = alone();
    let mut cluster = Cluster::ready(&["a", "b"], &[]);
    let job = cluster.long_job();
    let leaver = cluster.take("b");
    leaver.signal("INT");
    let ended = leaver.ends_within(ENDS_WITHIN);
    ended.expect(0, &[]);
    assert!(ended.out.ends_with("stopping\n"), "{ended:#?}");
    // Its work goes on elsewhere.
    job.ends_within(PATIENCE).expect(0, &[]);
    cluster.is_ready(&["a"]);
}

#[test]
fn a_client_ends_and_its_job_with_it() {
    let _alone = alone();
    let mut cluster = Cluster::ready(&["a"], &[]);
    let job = cluster.long_job();
    job.signal("INT");
    let ended = job.ends_within(ENDS_WITHIN);
    ended.expect(INTERRUPTED, &["interrupted\n"]);
    assert!(ended.out.ends_with('\n'), "{ended:#?}");
    let token = cluster.token();
    cluster.coordinator.wait_until("the end of the job", |_| {
        let status = process::run(&["status", "--json", "--token", &token]);
        let status: serde_json::Value = serde_json::from_str(&status.out).unwrap();
        status["jobs_running"] == 0
    });
}

#[test]
fn a_worker_that_waits_for_its_coordinator_ends() {
    let _alone = alone();
    let cluster = Cluster::waiting(1, &[]);
    cluster.coordinator.signal("STOP");
    let worker = cluster.worker("a");
    std::thread::sleep(Duration::from_millis(500));
    worker.signal("INT");
    worker.ends_within(ENDS_WITHIN).expect(INTERRUPTED, &["interrupted"]);
    // Without Ctrl-C it gives up by itself.
    let worker = cluster.worker("a").ends_within(PATIENCE);
    worker.one_error(1, &["coordinator", "127.0.0.1:"]);
    fs::remove_dir_all(cluster.state.path()).unwrap();
}
