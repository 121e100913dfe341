//! Workers that start: what they say that they have room for, and the folder of a disk cache that they
//! take into use.

use std::{
    path::Path,
    sync::{Mutex, OnceLock},
    thread::{self, ThreadId},
    time::Duration,
};

use lite_llm_actors::{
    node::Model,
    worker::{Worker, WorkerOptions},
};
use lite_llm_runtime::{
    blocks::{BlockOptions, BlockReader},
    residency::{FetchOptions, NvmeFolder, fetcher_for},
};
use lite_llm_tests::reference;
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};

use crate::{
    cluster::{all_equal, alone, head, options, requests, worker},
    soon,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_given_what_its_experts_may_take_beside_the_rest_of_the_model() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let requests = requests(&checkpoint);
    let expected = alone(&checkpoint, &requests).await;
    let (all, rest) = (checkpoint.all_expert_bytes(), checkpoint.dense_bytes());
    let head = head(&checkpoint, 2, 1).await;
    // What the first was started with would do for a half, what its experts may take for less.
    let room = all * 30 / 100;
    assert!(room + rest > all / 2 && room > (room + rest) / 4, "{room} and {rest} of {all}");
    let model = || Model::Open(checkpoint.clone());
    let tight = options(&head, "w1", room + rest, model());
    let first = Worker::start(WorkerOptions { dram_holds_rest: true, ..tight }).await.unwrap();
    let second = worker(&head, "w2", 1 << 30, model()).await;
    soon("a cluster of two", head.ready()).await.unwrap();
    let each = checkpoint.tier_expert_bytes()[0].next_multiple_of(4096);
    let fits = async {
        loop {
            let nodes = head.status().await.unwrap().nodes;
            let of = |name: &str| nodes.iter().find(|node| node.name == name).unwrap().clone();
            let (one, other) = (of("w1"), of("w2"));
            let settled = one.state == "ready" && other.state == "ready";
            let total = u64::from(one.experts + other.experts) * each;
            if settled && total == all && u64::from(one.experts) * each <= one.budget {
                return one;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let node = soon("a share that fits", fits).await;
    let store = first.store().unwrap();
    assert_eq!((node.budget, store.budget()), (room, room));
    assert!(node.experts > 0);
    let before = store.counters();
    all_equal(&head, &requests, &expected).await;
    let after = store.counters();
    assert_eq!(after.misses, before.misses, "all of its share is in its memory");
    head.stop().await;
    first.stop().await;
    second.stop().await;
}

/// Who took which folder into use.
struct Watch;

static SEEN: OnceLock<Mutex<Vec<(String, ThreadId)>>> = OnceLock::new();

fn seen() -> &'static Mutex<Vec<(String, ThreadId)>> {
    SEEN.get_or_init(Mutex::default)
}

#[derive(Default)]
struct Folder(String);

impl Visit for Folder {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "folder" {
            self.0 = format!("{value:?}");
        }
    }
}

impl Subscriber for Watch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().contains("nvme::disk")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut folder = Folder::default();
        event.record(&mut folder);
        seen().lock().unwrap().push((folder.0, thread::current().id()));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The threads on which a folder was looked through.
fn looked_through(folder: &Path) -> Vec<ThreadId> {
    let folder = folder.to_str().unwrap();
    let of_folder = |(at, thread): &(String, ThreadId)| at.contains(folder).then_some(*thread);
    seen().lock().unwrap().iter().filter_map(of_folder).collect()
}

/// It may have a million files, and others wait for what this thread does.
#[tokio::test]
async fn a_disk_cache_is_looked_through_on_a_thread_that_may_block() {
    tracing::subscriber::set_global_default(Watch).unwrap();
    let (folder, checkpoint, _) = reference("olmoe");
    let disk = |name: &str| NvmeFolder { folder: folder.path().join(name), budget: 1 << 30 };
    let reader = BlockReader::new(BlockOptions::default()).unwrap();
    let ways = FetchOptions { reader, nvme: Some(disk("here")), threads: 1, requests: 1 };
    drop(fetcher_for(&checkpoint, ways).unwrap());
    assert_eq!(looked_through(&disk("here").folder), [thread::current().id()]);
    let head = head(&checkpoint, 1, 1).await;
    let options = options(&head, "w1", 1 << 30, Model::Open(checkpoint.clone()));
    let options = WorkerOptions { nvme: Some(disk("there")), ..options };
    let worker = Worker::start(options).await.unwrap();
    soon("a cluster of one", head.ready()).await.unwrap();
    let by = looked_through(&disk("there").folder);
    // All tasks of this test run on its own thread.
    assert!(by.len() == 1 && by[0] != thread::current().id(), "{by:?}");
    head.stop().await;
    worker.stop().await;
}
