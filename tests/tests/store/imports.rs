//! Imports into stores: staged, read back, continued where they were interrupted, and never in the
//! way of each other.

use std::{
    fs::File,
    io::{Seek, Write},
    sync::Arc,
};

use lite_llm_actors::archive::StoreArchive;
use lite_llm_runtime::{
    checkpoint::{Checkpoint, CheckpointError, archive::Archive},
    import::{Destination, ImportError, ImportOptions, import, random},
};
use lite_llm_tests::{
    demo,
    s3::{Fault, S3Server},
};

use super::{compression, demo_folder, open, options, store};

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
fn the_journal_of_another_import_is_not_believed() {
    let server = S3Server::start();
    let packed = ImportOptions { compress: compression(), ..from_demo() };
    // What the mark of the other one says.
    server.fail("PUT", "dense/", Fault::Status(403), 1);
    begin(&server, &packed).unwrap_err();
    let mark = server.get("bucket/new/import.staging").unwrap();
    server.keys().iter().for_each(|key| server.remove(key));
    server.fail("PUT", "tokenizer.json", Fault::Status(403), 1);
    begin(&server, &from_demo()).unwrap_err();
    // Two that raced, or a hand: its shards are there, and so is its journal.
    server.put("bucket/new/import.staging", mark.to_vec());
    let id = begin(&server, &packed).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let here = ImportOptions { out: dir.path().join("x").as_path().into(), ..packed };
    assert_eq!(id, import(&here, &mut |_, _, _| {}).unwrap().id);
    let opened = open(&server, URL).unwrap();
    lite_llm_runtime::checkpoint::verify::verify(&opened, &mut |_, _, _| {}).unwrap();
}

#[test]
fn what_a_kill_left_of_a_large_upload_is_ended_by_the_next_import() {
    let (dir, server) = (tempfile::tempdir().unwrap(), S3Server::start());
    let source = dir.path().join("hf");
    // Its embedding alone is larger than a part.
    let tiny = random::RandomShape::tiny(random::RandomClass::Olmoe);
    let shape = random::RandomShape { vocab: 80_000, layers: 1, ..tiny };
    random::write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
    let options = ImportOptions::new(&*source, &*source);
    let large = "new/dense/model.safetensors";
    server.fail("PUT", large, Fault::Status(403), 1);
    // Who is killed takes nothing back.
    server.fail("DELETE", large, Fault::Status(403), u64::MAX);
    begin(&server, &options).unwrap_err();
    assert_eq!(server.unfinished_uploads(), 1);
    server.heal();
    // And where another import of the same ends what this one has begun, it begins again.
    server.fail("PUT", large, Fault::Status(404), 1);
    begin(&server, &options).unwrap();
    assert_eq!(server.unfinished_uploads(), 0);
    assert!(server.keys().iter().all(|key| !key.contains("import")), "{:?}", server.keys());
}

#[test]
fn a_conflict_of_two_conditional_writes_passes() {
    let server = S3Server::start();
    server.fail("PUT", "import.staging", Fault::Status(409), 2);
    server.fail("PUT", "manifest.1.json", Fault::Status(409), 2);
    begin(&server, &from_demo()).unwrap();
    // Who met another and then finds its object has not made it.
    let archive = store(&server, "s3://bucket/x");
    server.put("bucket/x/mark", b"ours".to_vec());
    server.fail("PUT", "mark", Fault::Status(409), 1);
    assert_eq!(archive.create("mark", b"ours"), Ok(false));
}

#[test]
fn a_checkpoint_in_a_store_is_a_source_and_compressed_ones_unpack_into_folders() {
    let (dir, server) = (tempfile::tempdir().unwrap(), S3Server::start());
    begin(&server, &ImportOptions { compress: compression(), ..from_demo() }).unwrap();
    let opened = Some(Arc::new(open(&server, URL).unwrap()));
    let folder = dir.path().join("unpacked");
    let options = ImportOptions { opened, ..ImportOptions::new(URL, folder.as_path()) };
    let id = import(&options, &mut |_, _, _| {}).unwrap().id;
    assert_eq!(id, demo().manifest().root.to_string());
    // From store to store, too, and on where it was interrupted.
    let to = || Destination::Store(Arc::new(store(&server, "s3://bucket/again")));
    let options = ImportOptions { out: to(), ..options };
    server.fail("PUT", "again/tokenizer.json", Fault::Status(403), 1);
    import(&options, &mut |_, _, _| {}).unwrap_err();
    server.seen();
    assert_eq!(import(&options, &mut |_, _, _| {}).unwrap().id, id);
    assert_eq!(uploaded(&server), Vec::<String>::new());
    // What is not compressed is refused as before.
    let again = dir.path().join("again");
    let options = ImportOptions::new(folder, again.as_path());
    let error = import(&options, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("--compress"), "{error}");
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
    server.remove("bucket/new/thesis.tex");
    server.put("bucket/new/thesis/chapter1.tex", b"years of work".to_vec());
    let error = begin(&server, &from_demo()).unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");
    assert_eq!(server.keys(), ["bucket/new/thesis/chapter1.tex"]);
    for url in ["s3://bucket/new@3", "file:///tmp/x@3"] {
        let error = StoreArchive::open(url, &options(&server)).unwrap_err().to_string();
        assert!(error.contains("one manifest") && error.contains(url), "{error}");
    }
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
    let left = std::fs::read_dir(dir.path().join("new")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_str().unwrap().contains("import")), "{left:?}");
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
    server.fail("POST", "large", Fault::ErrorWithin, 2);
    archive.put("large", &file, bytes.len() as u64, None).unwrap();
    assert!(*server.get("bucket/x/large").unwrap() == bytes);
    server.fail("PUT", "other", Fault::Status(403), u64::MAX);
    let error = archive.put("other", &file, bytes.len() as u64, None).unwrap_err().to_string();
    assert!(error.contains("s3://bucket/x/other: access denied"), "{error}");
    assert_eq!(server.unfinished_uploads(), 0, "an upload that failed is taken back");
    server.heal();
    // The last answer says that all is well, and begins too early to know.
    let begun = archive.begin_put("third", bytes.len() as u64).unwrap();
    server.fail("POST", "third", Fault::ErrorWithin, 2);
    archive.put("third", &file, bytes.len() as u64, begun.as_deref()).unwrap();
    assert!(*server.get("bucket/x/third").unwrap() == bytes);
    // Nothing is begun for what is small, and what is not there can be abandoned.
    assert_eq!(archive.begin_put("small", 100), Ok(None));
    archive.abandon_put("third", &begun.unwrap()).unwrap();
}
