//! Clusters whose workers have memory and disks of different kinds.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use lite_llm_actors::{
    archive::{StoreArchive, StoreOptions, open_checkpoint_url},
    coordinator::{CoordinatorHandle, CoordinatorOptions},
    node::Model,
    placement::PlacementPolicy,
    worker::{Worker, WorkerOptions},
};
use lite_llm_kernels::{cpu::Cpu, kv::KvDType, simd::Simd};
use lite_llm_runtime::{
    checkpoint::{
        Checkpoint,
        archive::{Archive, ArchiveError},
    },
    expert::ExpertStore,
};
use lite_llm_tests::{
    Outcome, Setup, demo, job, reference, root, run, run_alone, run_on, s3::S3Server,
};
use lite_llm_transport::{identity::ClusterCa, messages::JobRequest};

use crate::{large, loopback, peers, soon};

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn head(
    checkpoint: &Arc<Checkpoint>,
    workers: usize,
    replicas: u16,
) -> CoordinatorHandle {
    let options = CoordinatorOptions {
        listen: loopback(),
        authority: Arc::new(ClusterCa::ephemeral().unwrap()),
        checkpoint: checkpoint.clone(),
        workers,
        placement: PlacementPolicy::Balanced,
        kv_dtype: KvDType::F32,
        math: lite_llm_kernels::math::Math::Exact,
        context: None,
        remote_workers: false,
        replicas,
        patience: PATIENCE,
        ledger: None,
        client_priority: 0,
    };
    CoordinatorHandle::start(options).await.unwrap()
}

pub(crate) async fn worker(
    head: &CoordinatorHandle,
    name: &str,
    dram_bytes: u64,
    model: Model,
) -> Worker {
    Worker::start(options(head, name, dram_bytes, model)).await.unwrap()
}

pub(crate) fn options(
    head: &CoordinatorHandle,
    name: &str,
    dram_bytes: u64,
    model: Model,
) -> WorkerOptions {
    WorkerOptions {
        coordinator: head.address(),
        token: head.token().clone(),
        name: name.into(),
        listen: loopback(),
        device: Arc::new(Cpu::new(1, Simd::best())).into(),
        dram_bytes,
        dram_holds_rest: false,
        nvme: None,
        kv_bytes: 256 << 20,
        model,
        remote: false,
        patience: PATIENCE,
    }
}

pub(crate) fn requests(checkpoint: &Checkpoint) -> Vec<JobRequest> {
    let vocab = checkpoint.config().vocab;
    let prompt = |n: usize| {
        (0..4 + 5 * n).map(|i| ((n * 7919 + i * 104_729 + 13) % vocab) as u32).collect::<Vec<_>>()
    };
    (0..6).map(|n| job(&prompt(n), 6, [0, 1, 3][n % 3])).collect()
}

pub(crate) async fn alone(checkpoint: &Arc<Checkpoint>, requests: &[JobRequest]) -> Vec<Outcome> {
    let cluster = Setup::default().start(checkpoint).await;
    let mut outcomes = Vec::new();
    for request in requests {
        outcomes.push(run(&cluster, request.clone()).await.unwrap());
    }
    cluster.stop().await;
    outcomes
}

pub(crate) async fn all_equal(
    head: &CoordinatorHandle,
    requests: &[JobRequest],
    expected: &[Outcome],
) {
    for (n, (request, expected)) in requests.iter().zip(expected).enumerate() {
        let outcome = run_on(head, request.clone()).await;
        assert!(outcome.as_ref() == Ok(expected), "request {n}: {:?}", outcome.err());
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// Overwrites the second half of every shard of experts.
fn damage(folder: &Path) -> usize {
    let mut damaged = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            damaged += damage(&path);
        } else if path.to_string_lossy().contains("tiers")
            && path.extension().is_some_and(|extension| extension == "safetensors")
        {
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle..].fill(0x55);
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    damaged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_files_are_damaged_gets_its_share_from_who_has_it_in_memory() {
    let (folder, checkpoint, _) = reference("olmoe");
    gets_its_share(&folder, checkpoint).await;
    // Each is several parts on the wire.
    let (folder, checkpoint) = large();
    gets_its_share(&folder, checkpoint).await;
}

async fn gets_its_share(folder: &tempfile::TempDir, checkpoint: Arc<Checkpoint>) {
    let requests = requests(&checkpoint);
    let expected = alone(&checkpoint, &requests).await;
    let bad = tempfile::tempdir().unwrap();
    copy(&folder.path().join("checkpoint"), bad.path());
    assert!(damage(bad.path()) > 0);
    let head = head(&checkpoint, 1, 1).await;
    let first = worker(&head, "w1", 1 << 30, Model::Open(checkpoint.clone())).await;
    soon("a cluster of one", head.ready()).await.unwrap();
    let second = worker(&head, "w2", 1 << 30, Model::Folder(bad.path().into())).await;
    let shared = async {
        loop {
            let status = head.status().await.unwrap();
            let ready = |name| status.nodes.iter().any(|n| n.name == name && n.state == "ready");
            if ready("w1") && ready("w2") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("a cluster of two", shared).await;
    let places = second.store().unwrap().residences();
    let seen = peers(&places);
    println!("{places:#?}");
    assert!(seen.hits > 0 && seen.bytes_read > 0 && seen.damaged == 0, "{seen:?}");
    all_equal(&head, &requests, &expected).await;
    head.stop().await;
    first.stop().await;
    second.stop().await;
}

/// A store that takes its time.
#[derive(Debug)]
struct Slow {
    archive: StoreArchive,
    /// Milliseconds of each read.
    pause: Arc<AtomicU64>,
}

impl Archive for Slow {
    fn location(&self) -> String {
        self.archive.location()
    }

    fn list(&self, folder: &str) -> Result<Option<Vec<(String, u64)>>, ArchiveError> {
        self.archive.list(folder)
    }

    fn size(&self, path: &str) -> Result<Option<u64>, ArchiveError> {
        self.archive.size(path)
    }

    fn read_into(&self, path: &str, from: u64, out: &mut [u8]) -> Result<u64, ArchiveError> {
        std::thread::sleep(Duration::from_millis(self.pause.load(Relaxed)));
        self.archive.read_into(path, from, out)
    }

    fn begin_put(&self, path: &str, bytes: u64) -> Result<Option<String>, ArchiveError> {
        self.archive.begin_put(path, bytes)
    }

    fn put(
        &self,
        path: &str,
        file: &std::fs::File,
        bytes: u64,
        begun: Option<&str>,
    ) -> Result<(), ArchiveError> {
        self.archive.put(path, file, bytes, begun)
    }

    fn abandon_put(&self, path: &str, begun: &str) -> Result<(), ArchiveError> {
        self.archive.abandon_put(path, begun)
    }

    fn create(&self, path: &str, bytes: &[u8]) -> Result<bool, ArchiveError> {
        self.archive.create(path, bytes)
    }

    fn remove(&self, paths: &[String]) -> Result<(), ArchiveError> {
        self.archive.remove(paths)
    }
}

/// A checkpoint behind a store that takes as long as the number says.
pub(crate) fn far(folder: &Path) -> (Arc<Checkpoint>, Arc<AtomicU64>) {
    let pause = Arc::new(AtomicU64::new(0));
    let url = format!("file://{}", folder.join("checkpoint").display());
    let archive = StoreArchive::open(&url, &StoreOptions::default()).unwrap();
    let slow = Arc::new(Slow { archive, pause: pause.clone() });
    (Arc::new(Checkpoint::open_archive(slow, None).unwrap()), pause)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_archive_has_become_slow_asks_its_peer() {
    let (folder, checkpoint, _) = reference("olmoe");
    let requests = requests(&checkpoint);
    let expected = alone(&checkpoint, &requests).await;
    let (far, pause) = far(folder.path());
    let dram = checkpoint.all_expert_bytes() * 45 / 100;
    let head = head(&checkpoint, 2, 2).await;
    let first = worker(&head, "w1", dram, Model::Open(checkpoint.clone())).await;
    let second = worker(&head, "w2", dram, Model::Open(far)).await;
    soon("a cluster of two", head.ready()).await.unwrap();
    pause.store(40, Relaxed);
    for _ in 0..2 {
        all_equal(&head, &requests, &expected).await;
    }
    let places = second.store().unwrap().residences();
    println!("{places:#?}");
    assert!(peers(&places).hits > 0, "{places:?}");
    head.stop().await;
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_workers_serve_from_a_store_more_than_their_memory_holds_together() {
    let server = S3Server::start();
    server.put_folder("bucket/models/demo", &root().join("models/manpages-moe"));
    let options = StoreOptions { environment: server.environment(), ..StoreOptions::default() };
    let stored = open_checkpoint_url("s3://bucket/models/demo", &options).unwrap();
    let stored = Arc::new(stored);
    let prompt: Vec<u32> = (0..40).map(|i| (i * 7919 + 13) % 2048).collect();
    let request = job(&prompt, 6, 0);
    let expected = run_alone(&demo(), Setup::default(), request.clone()).await;
    for replicas in [1, 2] {
        let dram_bytes = stored.all_expert_bytes() / 6;
        let setup = Setup { workers: 3, replicas, dram_bytes, ..Setup::default() };
        let cluster = setup.start(&stored).await;
        assert!(run(&cluster, request.clone()).await.as_ref() == Ok(&expected), "{replicas}");
        let stores = cluster.stores();
        let held: u64 = stores.iter().map(|store| store.resident_bytes()).sum();
        assert!(stores.len() == 3 && held * 2 <= stored.all_expert_bytes(), "{held}");
        assert!(stores.iter().all(|store| store.counters().evictions > 0));
        cluster.stop().await;
    }
}
