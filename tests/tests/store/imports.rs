//! Imports into stores: staged, read back, continued where they were interrupted, and never in the
//! way of each other.

use std::{
    fs::File,
    io::{Seek, Write},
    sync::Arc,
};

use lite_llm_runtime::{
    checkpoint::{Checkpoint, CheckpointError, archive::Archive},
    import::{Destination, ImportError, ImportOptions, import, random},
};
use lite_llm_tests::{
    demo,
    s3::{Fault, S3Server},
};

use super::{compression, demo_folder, open, store};

const URL: &str = "s3://bucket/new";
/// The manifest's key.
const MANIFEST: &str = "bucket/new/manifest.1.json";

fn begin(server: &S3Server, source: &ImportOptions) -> Result<String, ImportError> {
    let out = Destination::Store(Arc::new(store(server, URL)));
    let options = ImportOptions { out, ..source.clone() };
    import(&options, &mut |_, _, _| {}).map(|summary| summary.id)
}

fn from_demo() -> ImportOptions {
    ImportOptions::new(demo_folder(), demo_folder().as_path())
}

/// Keys of shards that were uploaded since the last call.
fn uploaded(server: &S3Server) -> Vec<String> {
    let seen = server.seen().into_iter();
    seen.filter(|seen| seen.method == "PUT" && seen.key.ends_with(".safetensors"))
        .map(|seen| seen.key)
        .collect()
}

#[test]
fn an_import_leaves_the_checkpoint_and_nothing_else() {
    let server = S3Server::start();
    let id = begin(&server, &from_demo()).unwrap();
    assert_eq!(id, demo().manifest().root.to_string(), "the same bytes as in a folder");
    let other = S3Server::start();
    other.put_folder("bucket/new", &demo_folder());
    assert_eq!(server.keys(), other.keys());
    assert!(server.keys().iter().all(|key| server.get(key) == other.get(key)));
    // A finished checkpoint stays.
    let error = begin(&server, &from_demo()).unwrap_err().to_string();
    assert!(error.contains("already holds a checkpoint"), "{error}");
}

#[test]
fn an_import_that_was_interrupted_opens_nothing_and_goes_on_where_it_was() {
    let server = S3Server::start();
    server.fail("PUT", "l003-g00000.safetensors", Fault::Status(403), 1);
    let error = begin(&server, &from_demo()).unwrap_err().to_string();
    assert!(error.contains("l003-g00000.safetensors: access denied (403"), "{error}");
    assert!(!server.keys().contains(&MANIFEST.to_owned()));
    let error = open(&server, URL).unwrap_err();
    assert!(matches!(error, CheckpointError::Unfinished { .. }), "{error}");
    assert!(error.to_string().contains("run the import again"), "{error}");
    let before = uploaded(&server);

    // Another model, or the same with other options, is not mixed with it.
    let other = ImportOptions { compress: compression(), ..from_demo() };
    let error = begin(&server, &other).unwrap_err().to_string();
    assert!(error.contains("unfinished import of another model"), "{error}");
    assert!(uploaded(&server).is_empty());

    // One shard was damaged meanwhile, and is made again.
    let torn = before[2].clone();
    server.put(&torn, vec![0; 10]);
    let id = begin(&server, &from_demo()).unwrap();
    assert_eq!(id, demo().manifest().root.to_string());
    let after = uploaded(&server);
    let again: Vec<_> = after.iter().filter(|key| before.contains(key)).collect();
    let failed = before.last().unwrap();
    assert_eq!(again, [&torn, failed], "only what was not whole is uploaded again");
    assert!(server.keys().iter().all(|key| !key.contains("import")), "{:?}", server.keys());
    let opened = open(&server, URL).unwrap();
    lite_llm_runtime::checkpoint::verify::verify(&opened, &mut |_, _, _| {}).unwrap();
}

#[test]
fn a_folder_of_hugging_face_is_imported_into_a_store_in_spite_of_faults() {
    let (dir, server) = (tempfile::tempdir().unwrap(), S3Server::start());
    let source = dir.path().join("hf");
    let shape = random::RandomShape::tiny(random::RandomClass::Olmoe);
    random::write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
    let here = dir.path().join("here");
    let plain = import(&ImportOptions::new(&*source, &*here), &mut |_, _, _| {}).unwrap();
    for fault in [Fault::Status(500), Fault::Drop, Fault::DoneButSilent] {
        server.fail("PUT", "", fault, 5);
    }
    server.fail("PUT", "manifest", Fault::DoneButSilent, 2);
    server.fail("GET", "", Fault::DropAfter(10), 5);
    let id = begin(&server, &ImportOptions::new(&*source, &*source)).unwrap();
    assert_eq!(id, plain.id);
}

#[test]
fn bytes_that_a_store_keeps_wrongly_are_found_before_the_manifest() {
    let server = S3Server::start();
    server.fail("GET", "l002-g00000.safetensors", Fault::Corrupt, u64::MAX);
    let error = begin(&server, &from_demo()).unwrap_err().to_string();
    assert!(error.contains("read back") && error.contains("l002-g00000"), "{error}");
    assert!(server.get(MANIFEST).is_none());
}

#[test]
fn a_manifest_that_is_there_is_never_replaced() {
    let server = S3Server::start();
    // It appears at the last moment.
    server.fail("PUT", "tokenizer.json", Fault::Status(403), 1);
    begin(&server, &from_demo()).unwrap_err();
    let mut options = from_demo();
    options.out = Destination::Store(Arc::new(store(&server, URL)));
    let mut progress = |_: u64, _: u64, what: &str| {
        if what == "the manifest" {
            server.put(MANIFEST, b"somebody else's".to_vec());
        }
    };
    let error = import(&options, &mut progress).unwrap_err();
    let raced = matches!(error, ImportError::Checkpoint(CheckpointError::Raced { .. }));
    assert!(raced, "{error}");
    assert_eq!(*server.get(MANIFEST).unwrap(), b"somebody else's");
}

#[test]
fn what_is_in_use_is_not_written_to() {
    let server = S3Server::start();
    server.put("bucket/new/thesis.tex", b"years of work".to_vec());
    let error = begin(&server, &from_demo()).unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");
    assert_eq!(server.keys(), ["bucket/new/thesis.tex"]);
    // Web servers are read, not written to.
    let out = Destination::Store(Arc::new(store(&server, &server.http("bucket/web"))));
    let options = ImportOptions { out, ..from_demo() };
    let error = import(&options, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("cannot do that"), "{error}");
}

#[test]
fn a_file_url_is_written_to_as_a_folder_is() {
    let (dir, server) = (tempfile::tempdir().unwrap(), S3Server::start());
    let url = format!("file://{}/new", dir.path().canonicalize().unwrap().display());
    let out = Destination::Store(Arc::new(store(&server, &url)));
    let options = ImportOptions { out, ..from_demo() };
    let id = import(&options, &mut |_, _, _| {}).unwrap().id;
    assert_eq!(id, demo().manifest().root.to_string());
    // It opens as a folder, too.
    let folder = Checkpoint::open(dir.path().join("new")).unwrap();
    lite_llm_runtime::checkpoint::verify::verify(&folder, &mut |_, _, _| {}).unwrap();
}

#[test]
fn large_objects_are_written_in_parts_and_leave_none_behind() {
    let server = S3Server::start();
    let archive = store(&server, "s3://bucket/x");
    let bytes: Vec<u8> = (0..40u32 << 20).map(|i| (i ^ (i >> 9)) as u8).collect();
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file.rewind().unwrap();
    server.fail("PUT", "large", Fault::Status(500), 2);
    server.fail("POST", "large", Fault::Drop, 1);
    archive.put("large", &file, bytes.len() as u64).unwrap();
    assert!(*server.get("bucket/x/large").unwrap() == bytes);
    server.fail("PUT", "other", Fault::Status(403), u64::MAX);
    let error = archive.put("other", &file, bytes.len() as u64).unwrap_err().to_string();
    assert!(error.contains("s3://bucket/x/other: access denied"), "{error}");
    assert_eq!(server.unfinished_uploads(), 0, "an upload that failed is taken back");
}
