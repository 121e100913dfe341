//! Checkpoints in object stores: the same bits as from a folder, imports that can be interrupted, and
//! stores that misbehave.

mod faults;
mod imports;
mod real;

use std::{path::PathBuf, sync::Arc, time::Duration};

use lite_llm_actors::archive::{Limits, StoreArchive, StoreOptions, open_checkpoint_url};
use lite_llm_runtime::{
    checkpoint::{Checkpoint, CheckpointError, codec::Compression, verify::verify},
    import::{Destination, ImportOptions, import},
};
use lite_llm_tests::{Outcome, Setup, demo, job, root, run_alone, s3::S3Server};

/// Where the demo model lies in a server's bucket.
const DEMO: &str = "bucket/models/demo";

fn demo_folder() -> PathBuf {
    root().join("models/manpages-moe")
}

/// Deadlines that a busy machine keeps, with pauses that a test can wait for.
fn limits() -> Limits {
    let backoff = Duration::from_millis(10);
    Limits { backoff, backoff_max: Duration::from_millis(100), ..Limits::default() }
}

fn options(server: &S3Server) -> StoreOptions {
    StoreOptions { environment: server.environment(), limits: limits() }
}

fn open(server: &S3Server, url: &str) -> Result<Checkpoint, CheckpointError> {
    open_checkpoint_url(url, &options(server))
}

fn store(server: &S3Server, url: &str) -> StoreArchive {
    StoreArchive::open(url, &options(server)).unwrap()
}

fn compression() -> Option<Compression> {
    Some(Compression { level: 1, now: || Duration::ZERO })
}

/// Brings the demo model to a place.
fn bring(out: Destination, compress: Option<Compression>) -> Checkpoint {
    let options = ImportOptions { compress, ..ImportOptions::new(demo_folder(), out.clone()) };
    import(&options, &mut |_, _, _| {}).unwrap();
    match out {
        Destination::Folder(folder) => Checkpoint::open(folder).unwrap(),
        Destination::Store(archive) => Checkpoint::open_archive(archive, None).unwrap(),
    }
}

/// Logits, routes and tokens of a job.
async fn outcome(checkpoint: &Arc<Checkpoint>, workers: usize) -> Outcome {
    let prompt: Vec<u32> = (0..60).map(|i| (i * 7919 + 13) % 2048).collect();
    let setup = Setup { workers, ..Setup::default() };
    run_alone(checkpoint, setup, job(&prompt, 6, 0)).await
}

#[tokio::test]
async fn a_store_gives_the_same_bits_as_a_folder() {
    let server = S3Server::start();
    server.put_folder(DEMO, &demo_folder());
    let folder = demo();
    let expected = outcome(&folder, 1).await;
    let urls = [
        format!("s3://{DEMO}"),
        format!("s3://{DEMO}@1"),
        server.http(DEMO),
        server.http(&format!("{DEMO}/")),
        format!("file://{}", demo_folder().canonicalize().unwrap().display()),
    ];
    for url in urls {
        let checkpoint = Arc::new(open(&server, &url).unwrap());
        assert_eq!(checkpoint.id(), folder.id(), "{url}");
        assert!(format!("{checkpoint:?}").find("hunter2").is_none(), "{url}: secrets");
        for workers in [1, 3] {
            assert!(outcome(&checkpoint, workers).await == expected, "{url}, {workers} workers");
        }
        let report = verify(&checkpoint, &mut |_, _, _| {}).unwrap();
        assert_eq!(report, verify(&folder, &mut |_, _, _| {}).unwrap(), "{url}");
        // What opens this very manifest again.
        let again = open(&server, &checkpoint.address()).unwrap();
        assert_eq!(again.id(), folder.id());
    }
}

#[tokio::test]
async fn compressed_experts_give_the_same_bits_from_a_folder_and_from_a_store() {
    let (dir, server) = (tempfile::tempdir().unwrap(), S3Server::start());
    let expected = outcome(&demo(), 1).await;
    let folder = bring(dir.path().join("demo").as_path().into(), compression());
    let archive = Arc::new(store(&server, "s3://bucket/packed"));
    let stored = bring(Destination::Store(archive), compression());
    assert_eq!(folder.id(), stored.id(), "the same bytes, wherever they lie");
    assert_ne!(folder.id(), demo().id());
    for checkpoint in [folder, stored] {
        let checkpoint = Arc::new(checkpoint);
        let summary = lite_llm_runtime::checkpoint::inspect::inspect(&checkpoint).unwrap();
        let compressed = summary.compressed.expect("experts are compressed");
        assert!(compressed.sections == 80 && compressed.stored * 10 < compressed.bytes * 8);
        let report = verify(&checkpoint, &mut |_, _, _| {}).unwrap();
        assert_eq!(report.compressed, 80);
        assert!(outcome(&checkpoint, 1).await == expected);
        assert!(outcome(&checkpoint, 3).await == expected);
    }
    // Unpacked again, it is what it was.
    let options = ImportOptions::new(
        dir.path().join("demo"),
        Destination::Store(Arc::new(store(&server, "s3://bucket/unpacked"))),
    );
    let unpacked = import(&options, &mut |_, _, _| {}).unwrap();
    assert_eq!(unpacked.id, demo().manifest().root.to_string());
}

#[test]
fn damage_to_what_is_compressed_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("demo");
    let checkpoint = bring(folder.as_path().into(), compression());
    let key = checkpoint.config().expert_keys().nth(3).unwrap();
    let place = checkpoint.expert_place(key).unwrap();
    let file = folder.join(&place.path);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[place.offset as usize + 1000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = checkpoint.expert(key).unwrap_err().to_string();
    assert!(error.contains("as it is stored") && error.contains(&place.path), "{error}");
    let damage = verify(&checkpoint, &mut |_, _, _| {}).unwrap_err();
    assert_eq!(damage.errors.len(), 1, "{damage}");
    assert!(damage.to_string().contains("experts.3 as it is stored"), "{damage}");
}

#[test]
fn earlier_manifests_open_by_their_number() {
    let server = S3Server::start();
    let kept = root().join("runtime/tests/data/checkpoint.v2");
    server.put_folder("bucket/grown", &kept);
    for url in ["s3://bucket/grown".to_owned(), server.http("bucket/grown")] {
        let ids = ["", "@1", "@2"].map(|at| open(&server, &format!("{url}{at}")).unwrap().id());
        assert!(ids[0] == ids[2] && ids[0] != ids[1]);
        let error = open(&server, &format!("{url}@9")).unwrap_err();
        assert!(matches!(error, CheckpointError::NoNumber { number: 9, .. }), "{error}");
    }
    // A tier whose files are not there is left out, as in a folder.
    server.remove("bucket/grown/v2/tiers/tier_10b/index.json");
    let checkpoint = open(&server, "s3://bucket/grown").unwrap();
    assert!(checkpoint.config().has_tier(0) && !checkpoint.config().has_tier(1));
}
