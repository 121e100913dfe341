//! Stores that are slow, drop connections, refuse, lie or never answer: a right answer, or an error
//! that names the object, the reason and what to do, before the deadline.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use lite_llm_actors::archive::{Limits, StoreArchive, StoreOptions, open_checkpoint_url};
use lite_llm_runtime::{
    checkpoint::{Checkpoint, archive::Archive, verify::verify},
    expert::ExpertKey,
};
use lite_llm_tests::s3::{Fault, S3Server};

use super::{DEMO, demo_folder, limits, options, store};

/// How often a fault that stays is met.
const ALWAYS: u64 = u64::MAX;
/// Shard of the experts of a layer.
const SHARD: &str = "l003-g00000.safetensors";

fn expert() -> ExpertKey {
    ExpertKey { layer: 3, tier: 0, group: 0, expert: 5 }
}

/// Deadlines that a test can wait for.
fn hurried() -> Limits {
    Limits { deadline: Duration::from_secs(3), idle: Duration::from_secs(1), ..limits() }
}

fn open(server: &S3Server) -> Checkpoint {
    let options = StoreOptions { environment: server.environment(), limits: hurried() };
    open_checkpoint_url(&format!("s3://{DEMO}"), &options).unwrap()
}

/// Reads the expert, and checks that whatever comes of it comes in time.
fn read(checkpoint: &Checkpoint) -> Result<(), String> {
    let begun = Instant::now();
    let result = checkpoint.expert(expert()).map(drop).map_err(|error| error.to_string());
    let most = hurried().deadline * 3;
    assert!(begun.elapsed() < most, "{:?}: {result:?}", begun.elapsed());
    result
}

#[test]
fn a_fault_that_passes_changes_nothing() {
    let server = S3Server::start();
    server.put_folder(DEMO, &demo_folder());
    let whole = Checkpoint::open(demo_folder()).unwrap().expert(expert()).unwrap();
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::Drop,
        Fault::DropAfter(0),
        Fault::DropAfter(100_000),
        Fault::Short(1),
        Fault::Short(100_000),
        Fault::Shifted(1),
        Fault::Never,
        Fault::Slow(2 << 20),
    ];
    for fault in faults {
        let checkpoint = open(&server);
        // Waiting for an answer that does not come takes its time.
        let times = if fault == Fault::Never { 1 } else { 3 };
        server.fail("GET", SHARD, fault, times);
        let found =
            checkpoint.expert(expert()).unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert!(found.gate.data()[..] == whole.gate.data()[..], "{fault:?}");
        assert!(found.down.data()[..] == whole.down.data()[..], "{fault:?}");
        server.heal();
    }
    // So is one while it is opened, listed and asked for sizes.
    for fault in [Fault::Status(500), Fault::Drop, Fault::Never] {
        server.fail("*", "", fault, 1);
        open(&server);
        server.heal();
    }
}

#[test]
fn a_fault_that_stays_is_a_clear_error_in_time() {
    let server = S3Server::start();
    server.put_folder(DEMO, &demo_folder());
    let checkpoint = open(&server);
    // Index pages are read once and kept: the fault meets the shard alone.
    checkpoint.expert_place(expert()).unwrap();
    let faults: [(Fault, &[&str]); 13] = [
        (Fault::Status(500), &["the server failed (500 InternalError)", "tries in", "try again"]),
        (Fault::Status(503), &["overloaded (503 SlowDown)"]),
        (Fault::Status(404), &["not there (404)", "import it again"]),
        (Fault::Status(403), &["access denied (403 AccessDenied)", "AWS_ACCESS_KEY_ID"]),
        (Fault::Status(401), &["not authenticated (401"]),
        (Fault::Drop, &["dropped the connection", "tries in"]),
        (Fault::DropAfter(0), &["dropped the connection"]),
        (Fault::Short(1000), &["ended after", "tries in"]),
        (Fault::Shifted(8), &["other bytes than were asked for"]),
        (Fault::WrongSize(4096), &["bytes, expected"]),
        (Fault::Never, &["sent nothing for"]),
        (Fault::NoRanges, &["whole files only"]),
        (Fault::Slow(10), &["too slow", "gave up after 1 try"]),
    ];
    for (fault, parts) in faults {
        server.fail("GET", SHARD, fault, ALWAYS);
        let error = read(&checkpoint).expect_err(&format!("{fault:?}"));
        for part in parts.iter().chain(&[SHARD]) {
            assert!(error.contains(part), "{fault:?}: {error}: {part:?} is missing");
        }
        for secret in ["hunter2", "TESTKEY", "Signature"] {
            assert!(!error.contains(secret), "{fault:?}: {error}");
        }
        server.heal();
    }
    // Wrong bytes are found by their hash; nothing corrupt is used.
    server.fail("GET", SHARD, Fault::Corrupt, ALWAYS);
    let error = read(&checkpoint).unwrap_err();
    assert!(error.contains("blake3") && error.contains(SHARD), "{error}");
    let damage = verify(&checkpoint, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(damage.contains("blake3") && damage.contains(SHARD), "{damage}");
    server.heal();
    read(&checkpoint).unwrap();
}

#[test]
fn a_store_that_is_not_there_or_refuses_everything_says_so() {
    let server = S3Server::start();
    server.put_folder(DEMO, &demo_folder());
    let error = |url: &str, options: &StoreOptions| {
        let opened = open_checkpoint_url(url, options);
        opened.expect_err(url).to_string()
    };
    let nothing = error("s3://bucket/nowhere", &options(&server));
    assert!(nothing.contains("no checkpoint"), "{nothing}");
    let nothing = error(&server.http("bucket/nowhere"), &options(&server));
    assert!(nothing.contains("no checkpoint"), "{nothing}");

    server.require_key("ANOTHER");
    let denied = error(&format!("s3://{DEMO}"), &options(&server));
    assert!(denied.contains("access denied (403 InvalidAccessKeyId)"), "{denied}");
    assert!(!denied.contains("hunter2") && !denied.contains("TESTKEY"), "{denied}");

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let short = StoreOptions { limits: hurried(), ..options(&server) };
    let gone = error(&format!("http://{closed}/x"), &short);
    assert!(gone.contains("cannot be reached") && gone.contains("tries in"), "{gone}");

    let missing = error("file:///nowhere/at/all", &options(&server));
    assert!(missing.contains("no checkpoint"), "{missing}");
}

#[test]
fn reads_of_several_threads_and_of_one_large_range_overlap() {
    let server = S3Server::start();
    let bytes: Vec<u8> = (0..40u32 << 20).map(|i| (i ^ (i >> 11)) as u8).collect();
    server.put("bucket/x/large", bytes.clone());
    let archive = store(&server, "s3://bucket/x");
    // 1 MiB takes half a second each: eight of them together no longer than two.
    server.fail("GET", "large", Fault::Slow(2 << 20), ALWAYS);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for i in 0..8usize {
            let (archive, bytes) = (&archive, &bytes);
            scope.spawn(move || {
                let mut out = vec![0; 1 << 20];
                assert_eq!(archive.read_into("large", (i << 20) as u64, &mut out), Ok(40 << 20));
                assert!(out == bytes[i << 20..][..1 << 20]);
            });
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(server.most_at_once() >= 6, "{}", server.most_at_once());
    server.heal();
    server.seen();
    let mut out = vec![0; bytes.len()];
    archive.read_into("large", 0, &mut out).unwrap();
    assert!(out == bytes);
    assert_eq!(server.seen().len(), 5, "parts of 8 MiB");
    // A range beyond the end tells the size; the reader of a checkpoint compares it.
    assert_eq!(archive.read_into("large", 1 << 30, &mut out[..10]), Ok(40 << 20));
}

#[test]
fn a_task_may_read_as_much_as_it_likes_within_one_poll() {
    let server = S3Server::start();
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i ^ (i >> 8)) as u8).collect();
    server.put("bucket/x/object", bytes.clone());
    server.fail("GET", "object", Fault::Pieces(1000), ALWAYS);
    let archive = store(&server, "s3://bucket/x");
    let (sender, came) = mpsc::channel();
    // On a thread of its own: what fails here would spin for ever.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for _ in 0..200 {
                assert_eq!(archive.size("object"), Ok(Some(300_000)));
            }
            let mut out = vec![0; 300_000];
            archive.read_into("object", 0, &mut out).unwrap();
            sender.send(out).unwrap();
        });
    });
    let read = came.recv_timeout(Duration::from_secs(60)).expect("it comes to an end");
    assert!(read == bytes);
}

#[test]
fn answers_that_contradict_each_other_are_errors_and_not_bytes() {
    let server = S3Server::start();
    server.put("bucket/x/object", vec![1; 9 << 20]);
    let options = StoreOptions { environment: server.environment(), limits: hurried() };
    let archive = StoreArchive::open("s3://bucket/x", &options).unwrap();
    let mut out = vec![0; 9 << 20];
    // One of two parts comes of another object, it seems.
    server.fail("GET", "object", Fault::WrongSize(1), 1);
    let error = archive.read_into("object", 0, &mut out).unwrap_err().to_string();
    assert!(error.contains("other bytes than were asked for"), "{error}");
    // The range is said to lie behind the end, and does not.
    server.fail("GET", "object", Fault::Status(416), ALWAYS);
    let error = archive.read_into("object", 100, &mut out[..10]).unwrap_err().to_string();
    assert!(error.contains("other bytes than were asked for"), "{error}");
    server.heal();
    assert_eq!(archive.read_into("object", 0, &mut out), Ok(9 << 20));
    assert!(out.iter().all(|byte| *byte == 1));
}

#[test]
fn a_bucket_of_another_region_says_so() {
    let server = S3Server::start();
    server.put_folder(DEMO, &demo_folder());
    server.fail("*", "", Fault::Status(301), ALWAYS);
    let error = open_checkpoint_url(&format!("s3://{DEMO}"), &options(&server)).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("(301)") && error.contains("AWS_REGION must name"), "{error}");
}

#[test]
fn verification_ends_when_the_store_does_and_says_what_it_found() {
    let server = S3Server::start();
    server.put_folder(DEMO, &demo_folder());
    let checkpoint = open(&server);
    let (mut heard, mut before) = (0, 0);
    let report = verify(&checkpoint, &mut |done, total, _| {
        assert!(before <= done && done <= total, "{before} {done} {total}");
        (heard, before) = (heard + 1, done);
    });
    let report = report.unwrap();
    assert!(heard > report.sections + 4, "headers take their time, too: {heard}");

    server.put(&format!("{DEMO}/tiers/tier_1b/l000-g00000.safetensors"), vec![0; 100]);
    server.fail("GET", SHARD, Fault::Status(503), ALWAYS);
    let begun = Instant::now();
    let damage = verify(&checkpoint, &mut |_, _, _| {}).unwrap_err();
    assert!(begun.elapsed() < hurried().deadline * 3, "{:?}", begun.elapsed());
    let text = damage.to_string();
    assert!(damage.stopped && damage.errors.len() == 2, "{text}");
    assert!(text.contains("100 bytes, expected") && text.contains("503 SlowDown"), "{text}");
    assert!(text.contains("the rest was not looked at"), "{text}");

    // Nor is a group's index asked for again.
    let fresh = open(&server);
    server.seen();
    server.fail("GET", "g00000.json", Fault::Status(503), ALWAYS);
    let begun = Instant::now();
    let damage = verify(&fresh, &mut |_, _, _| {}).unwrap_err();
    assert!(begun.elapsed() < hurried().deadline * 2, "{:?}", begun.elapsed());
    assert!(damage.stopped && damage.errors.len() == 1, "{damage}");
}

#[test]
fn manifests_are_counted_where_nothing_lists_but_not_for_ever() {
    let server = S3Server::start();
    server.put_folder(DEMO, &demo_folder());
    let open = |url: &str| open_checkpoint_url(url, &options(&server));
    // Without permission to list, what is absent is forbidden.
    server.fail("HEAD", "manifest.2.json", Fault::Status(403), ALWAYS);
    open(&server.http(DEMO)).unwrap();
    // Who names a number asks for no other.
    server.seen();
    for url in [format!("{}@1", server.http(DEMO)), format!("s3://{DEMO}@1")] {
        open(&url).unwrap();
    }
    let seen = server.seen();
    assert!(seen.iter().all(|seen| !seen.key.contains("manifest.2")), "{seen:?}");
    assert!(seen.iter().all(|seen| seen.key.contains(DEMO)), "a listing: {seen:?}");
    server.heal();
    server.fail("HEAD", "manifest.1.json", Fault::Status(403), ALWAYS);
    let error = open(&server.http(DEMO)).unwrap_err().to_string();
    assert!(error.contains("access denied"), "{error}");
    server.heal();
    for number in 2..=1000 {
        server.put(&format!("{DEMO}/manifest.{number}.json"), b"<html>".to_vec());
    }
    let error = open(&server.http(DEMO)).unwrap_err().to_string();
    assert!(error.contains("an answer for every name"), "{error}");
}

#[test]
fn links_do_not_lead_out_of_a_file_url() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(dir.path().join("secret"), "x").unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), inside.join("link")).unwrap();
    std::fs::write(inside.join("plain"), "y").unwrap();
    let url = format!("file://{}", inside.display());
    let archive = StoreArchive::open(&url, &StoreOptions::default()).unwrap();
    let mut out = [0];
    assert_eq!(archive.read_into("plain", 0, &mut out), Ok(1));
    let error = archive.read_into("link", 0, &mut out).unwrap_err();
    assert!(error.to_string().contains("leads out"), "{error}");
}
