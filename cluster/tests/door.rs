//! Who may join, as a user sees it: wrong tokens, strangers, other releases, one too many.

mod process;

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use lite_llm_transport::{
    connection::StreamKind,
    endpoint::{Endpoint, Expect, Options},
    identity::{ClusterCa, Role},
    join::join,
    messages::{ClientReply, ClientRequest},
    session::Hello,
    token::JoinToken,
};
use process::{Cluster, PATIENCE, alone, demo_model, run};

/// Exit code of something that went wrong outside.
const FAILED: i32 = 1;
/// Exit code of bad input.
const BAD_INPUT: i32 = 2;

#[test]
fn token_files_that_are_none_are_named() {
    let _alone = alone();
    let cluster = Cluster::waiting(1, &[]);
    let good = fs::read(cluster.token()).unwrap();
    let path = cluster.state.path().join("given-token");
    let given = path.to_str().unwrap();
    let missing = run(&["worker", "--token", given]);
    missing.one_error(BAD_INPUT, &["could not read the join token", given]);
    // As a token is kept; one that others can read is another error.
    fs::write(&path, "").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let model = demo_model().join("dense/model.safetensors");
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for bytes in [fs::read(model).unwrap(), flipped, good[..middle].to_vec(), Vec::new()] {
        fs::write(&path, bytes).unwrap();
        for command in ["worker", "submit", "status"] {
            let mut args = vec![command, "--token", given];
            args.extend((command == "submit").then_some("hi"));
            run(&args).one_error(BAD_INPUT, &[given, "is no join token", "Copy it again"]);
        }
    }
}

#[test]
fn a_token_of_another_cluster_is_refused_by_its_holder() {
    let _alone = alone();
    let (ours, theirs) = (Cluster::waiting(1, &[]), Cluster::waiting(1, &[]));
    let address = JoinToken::read(ours.token().as_ref()).unwrap().address().to_owned();
    run(&["worker", "--join", &address, "--token", &theirs.worker_token()])
        .one_error(FAILED, &[&address, "not the one of this token"]);
    run(&["submit", "--coordinator", &address, "--token", &theirs.token(), "hi"])
        .one_error(FAILED, &[&address, "not the one of this token"]);
}

#[test]
fn of_two_workers_of_one_name_the_newer_stays() {
    let _alone = alone();
    let mut cluster = Cluster::ready(&["a"], &[]);
    let before = cluster.text();
    let first = cluster.take("a");
    cluster.join("a");
    first.ends_within(PATIENCE).one_error(FAILED, &["another worker named a", "--name"]);
    let bad = cluster.worker("Not/A/Name").ends_within(PATIENCE);
    bad.one_error(FAILED, &["\"Not/A/Name\" cannot name a node", "a-z"]);
    assert_eq!(cluster.text(), before);
}

/// Runs something that ends soon.
fn soon<T>(future: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(PATIENCE, future).await };
    runtime.block_on(limited).unwrap()
}

#[test]
fn a_worker_of_another_release_is_told_both_versions_and_so_is_the_log() {
    let _alone = alone();
    let mut cluster = Cluster::waiting(1, &["--log", "info"]);
    let token = JoinToken::read(cluster.worker_token().as_ref()).unwrap();
    let address = token.address().parse().unwrap();
    for (hello, words) in [
        (Hello { protocol: 5, ..Hello::new(1) }, ["protocol 4", "this worker 5"]),
        (Hello::new(9), ["contract 2", "worker by 9"]),
    ] {
        let joining = join(address, &token, Role::Worker, "newer", &hello);
        let error = soon(joining).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{error}");
        }
    }
    cluster.coordinator.wait_until("both refusals", |coordinator| {
        let log = coordinator.err();
        log.contains("speaks protocol 5") && log.contains("contract 9")
    });
    // The cluster serves who belongs to it.
    cluster.join("a");
    cluster.is_ready(&["a"]);
}

#[test]
fn a_coordinator_of_another_release_is_named_by_the_worker() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _guard = runtime.enter();
    for (hello, words) in [
        (Hello { protocol: 5, ..Hello::new(1) }, ["protocol 5", "this worker 4"]),
        (Hello::new(9), ["contract 9", "worker by 2"]),
    ] {
        let ca = std::sync::Arc::new(ClusterCa::ephemeral().unwrap());
        let identity = ca.identity(Role::Coordinator, "coordinator").unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let options = Options::new(hello);
        let endpoint = Endpoint::bind_coordinator(listen, &identity, ca.clone(), options).unwrap();
        let address = endpoint.local_addr().unwrap().to_string();
        ca.join_token(Role::Worker, address).unwrap().write(&file).unwrap();
        let worker = process::Process::start(&["worker", "--token", file.to_str().unwrap()]);
        let ended = worker.ends_within(Duration::from_secs(20));
        ended.one_error(FAILED, &words).one_error(FAILED, &["same release"]);
    }
}

#[test]
fn a_cluster_whose_experts_do_not_fit_says_so_to_everybody() {
    let _alone = alone();
    let mut cluster = Cluster::waiting(1, &[]);
    let token = cluster.worker_token();
    let _small = process::Process::start(&["worker", "--token", &token, "--dram", "100KiB"]);
    cluster.coordinator.says("failed: the experts take 11796480 bytes");
    let refused = cluster.submit(&["hi"]).ends_within(PATIENCE);
    refused.one_error(FAILED, &["11796480 bytes", "give 102400", "--dram"]);
}

#[test]
fn what_a_model_cannot_serve_is_refused_by_the_cluster() {
    let _alone = alone();
    let cluster = Cluster::ready(&["a"], &[]);
    let long = "word ".repeat(3000);
    for (args, words) in [
        (&[""][..], &["the prompt is empty"][..]),
        (&[&long], &["this model sees 1024", "shorten"]),
        (&["--tiers", "tier_zz", "hi"], &["no tier tier_zz", "tier_1b"]),
        (&["--speculate", "tier:tier_zz", "hi"], &["speculate: ", "no tier tier_zz", "tier_1b"]),
        (
            &["--as", "tester-1", "--detach", "--speculate", "tier:tier_zz", "hi"],
            &["speculate: ", "no tier tier_zz"],
        ),
        (&["--priority", "1", "hi"], &["priority is 1", "0 at most", "--client-priority 1"]),
        (
            &["--as", "tester-1", "--detach", "--priority", "1", "hi"],
            &["priority is 1", "0 at most"],
        ),
        (&["--logit-bias", "99999=1", "hi"], &["the bias of token 99999", "2048 tokens"]),
    ] {
        cluster.submit(args).ends_within(PATIENCE).one_error(FAILED, words);
    }
    // In a file of jobs a bad one fails alone.
    let jobs = cluster.state.path().join("jobs.jsonl");
    fs::write(
        &jobs,
        "{\"prompt\": \"\"}\n{\"prompt\": \"ls\", \"max_tokens\": 3, \
         \"logit_bias\": {\"70\": 100}}\n",
    )
    .unwrap();
    let jobs = jobs.to_str().unwrap();
    let ended = cluster.submit(&["--file", jobs]).ends_within(PATIENCE);
    ended.one_error(FAILED, &["1 of 2 jobs failed"]);
    let mut lines: Vec<serde_json::Value> =
        ended.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines.sort_by_key(|line| line["job"].as_u64());
    assert!(lines[0]["error"].as_str().unwrap().contains("empty"), "{ended:#?}");
    assert_eq!(lines[1]["ids"], serde_json::json!([70, 70, 70]), "{ended:#?}");
    // Flags do the same, of jobs that are left there, too.
    for more in [&[][..], &["--as", "tester-1", "--wait"]] {
        let args = ["--json", "--logit-bias", "70=100", "--max-tokens", "3"];
        let ended = cluster.submit(&[&args[..], more, &["ls"]].concat()).ends_within(PATIENCE);
        assert!(ended.expect(0, &[]).out.contains("70,70,70"), "{ended:#?}");
    }
}

#[test]
fn clients_may_ask_for_the_priority_that_the_coordinator_allows() {
    let _alone = alone();
    let cluster = Cluster::ready_with(&["a"], &[], &["--client-priority", "5"]);
    let submit = |priority: &str, more: &[&str]| {
        let args = ["--priority", priority, "--max-tokens", "2", "ls"];
        cluster.submit(&[more, &args[..]].concat()).ends_within(PATIENCE)
    };
    for more in [&[][..], &["--as", "tester-1", "--wait"]] {
        for fine in ["-3", "0", "5"] {
            submit(fine, more).expect(0, &[]);
        }
        submit("6", more).one_error(FAILED, &["priority is 6", "5 at most"]);
    }
}

#[test]
fn a_second_coordinator_of_a_state_is_told_of_the_first_and_changes_nothing() {
    let _alone = alone();
    let cluster = Cluster::ready(&["a"], &[]);
    let (before, token) = (cluster.text(), fs::read(cluster.token()).unwrap());
    let (model, state) = (demo_model(), cluster.state.path().to_str().unwrap());
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--model", model.to_str().unwrap()];
    let second = process::Process::start(&[&args[..], &["--state", state][..]].concat());
    let pid = format!("process {}", cluster.coordinator.pid());
    second.ends_within(PATIENCE).one_error(FAILED, &["is running", &pid, "--state"]);
    assert_eq!(fs::read(cluster.token()).unwrap(), token);
    assert_eq!(cluster.text(), before);
}

#[test]
fn a_token_of_the_other_role_and_one_that_others_read_are_named() {
    let _alone = alone();
    let cluster = Cluster::waiting(1, &[]);
    let (client, worker) = (cluster.token(), cluster.worker_token());
    run(&["worker", "--token", &client])
        .one_error(BAD_INPUT, &[&client, "makes clients", "worker.token"]);
    run(&["status", "--token", &worker])
        .one_error(BAD_INPUT, &[&worker, "makes workers", "client.token"]);
    fs::set_permissions(&client, fs::Permissions::from_mode(0o644)).unwrap();
    run(&["status", "--token", &client]).one_error(BAD_INPUT, &[&client, "644", "chmod 600"]);
    fs::set_permissions(cluster.state.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let state = cluster.state.path().to_str().unwrap();
    run(&["token", "client", "--state", state]).one_error(BAD_INPUT, &[state, "chmod 700"]);
}

#[test]
fn tokens_are_replaced_and_names_revoked_while_the_cluster_serves() {
    let _alone = alone();
    let mut cluster = Cluster::ready(&["a"], &[]);
    let before = cluster.text();
    let state = cluster.state.path().to_str().unwrap().to_owned();
    let old = cluster.state.path().join("old.token");
    fs::copy(cluster.token(), &old).unwrap();
    let old = old.to_str().unwrap();
    run(&["status", "--token", old]).expect(0, &[]);
    let rotate = ["token", "client", "--rotate", "--expires", "30d", "--state", &state];
    run(&rotate).expect(0, &[]);
    run(&["status", "--token", old]).one_error(FAILED, &["copy the token", "wrote last"]);
    assert_eq!(cluster.text(), before, "the new token, and the address in it");
    run(&["token", "client", "--expires", "soon", "--rotate", "--state", &state])
        .expect(BAD_INPUT, &["is no time"]);

    run(&["revoke", "a", "--state", &state]).expect(0, &[]);
    cluster.take("a").ends_within(PATIENCE).one_error(FAILED, &["worker a was revoked"]);
    let refused = cluster.worker("a").ends_within(PATIENCE);
    refused.one_error(FAILED, &["a was revoked", "--undo"]);
    run(&["revoke", "a", "--undo", "--state", &state]).expect(0, &[]);
    cluster.join("a");
    let coordinator = &mut cluster.coordinator;
    coordinator.wait_until("a again", |it| it.out().ends_with("ready: a\n"));
    assert_eq!(cluster.text(), before);
    run(&["revoke", "nobody", "--undo", "--state", &state])
        .one_error(BAD_INPUT, &["nobody is not revoked"]);
}

#[test]
fn a_client_does_what_its_token_gives_and_no_more() {
    let _alone = alone();
    let cluster = Cluster::ready(&["a", "b"], &[]);
    let before = cluster.text();
    let token = JoinToken::read(cluster.token().as_ref()).unwrap();
    let address = token.address().parse().unwrap();
    let hello = || Hello::new(lite_llm_kernels::DETERMINISM_VERSION);
    let reply = soon(async {
        let identity = join(address, &token, Role::Client, "c", &hello()).await.unwrap();
        let endpoint = Endpoint::outgoing(address, &identity, Options::new(hello())).unwrap();
        let connection = endpoint.connect(address, &Expect::coordinator()).await.unwrap();
        let (mut sender, mut receiver) = connection.open_stream(StreamKind::Client).await.unwrap();
        sender.send_message(&ClientRequest::Drain("a".into())).await.unwrap();
        let frame = receiver.recv().await.unwrap().unwrap();
        frame.decode::<ClientReply>().unwrap()
    });
    let refused =
        matches!(&reply, ClientReply::Refused { reason } if reason.contains("state folder"));
    assert!(refused, "{reply:?}");
    assert_eq!(cluster.text(), before);
    assert_eq!(cluster.status()["nodes"].as_array().unwrap().len(), 2);
}
