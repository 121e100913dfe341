//! Stores that are slow, drop connections, refuse, lie or never answer: a right answer, or an error
//! that names the object, the reason and what to do, before the deadline.

use std::time::{Duration, Instant};

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
