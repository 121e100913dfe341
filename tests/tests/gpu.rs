//! A worker on a GPU beside one on a CPU: the same bits, and what happens when the GPU is lost in the
//! middle of a step. Skipped, with a line that says so, where there is no driver;
//! `kernels/cuda/host/run.sh cargo test --workspace --test gpu` runs it without one.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lite_llm_actors::{
    coordinator::{CoordinatorHandle, CoordinatorOptions},
    node::{Model, NodeDevice},
    placement::PlacementPolicy,
    worker::{Worker, WorkerError, WorkerOptions},
};
use lite_llm_kernels::{
    cpu::Cpu,
    cuda::{Cuda, compile::Folders, driver_present},
    cuda_device::Gpu,
    kv::KvDType,
    math::Math,
    simd::Simd,
};
use lite_llm_runtime::checkpoint::Checkpoint;
use lite_llm_tests::{Outcome, PATIENCE, Setup, demo, job, root, run_alone, run_on};
use lite_llm_transport::{
    identity::ClusterCa,
    messages::{JobRequest, Prompt},
};

/// Calls of the kernel that chooses tokens after which it takes the GPU with it.
const CALLS: u32 = 9;

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(1, Simd::best()))
}

/// A GPU whose kernels are read from `sources`, if they are there.
fn gpu(sources: Option<PathBuf>) -> Option<NodeDevice> {
    gpu_by(Math::Exact, sources)
}

fn gpu_by(math: Math, sources: Option<PathBuf>) -> Option<NodeDevice> {
    if !driver_present() {
        eprintln!("skipped: there is no NVIDIA driver here");
        return None;
    }
    let cache = std::env::var_os("LITE_LLM_CACHE").map(PathBuf::from);
    let gpu = Gpu::new(Cuda::open(0, Folders { cache, sources }).unwrap(), cpu()).by(math);
    Some(NodeDevice::Cuda { gpu: Arc::new(gpu), hbm_bytes: Some(64 << 20), sharers: 1 })
}

/// The kernels of this repository, but one that traps when it is called for the [`CALLS`]th time.
fn kernels_that_trap(folder: &Path) {
    for file in fs::read_dir(root().join("kernels/cuda")).unwrap() {
        let file = file.unwrap().path();
        let name = file.file_name().unwrap().to_owned();
        if !file.extension().is_some_and(|kind| kind == "cu" || kind == "cuh") {
            continue;
        }
        let mut text = fs::read_to_string(&file).unwrap();
        if name == "sample.cu" {
            let head = "ENTRY __launch_bounds__(1024) sample(";
            assert!(text.contains(head), "the kernel that chooses tokens");
            let (before, after) = text.split_once(head).unwrap();
            let (arguments, body) = after.split_once("{\n").unwrap();
            let trap = format!(
                "  if (blockIdx.x == 0 && threadIdx.x == 0 && ++calls == {CALLS}) __trap();\n"
            );
            text = format!("{before}__device__ u32 calls;\n{head}{arguments}{{\n{trap}{body}");
        }
        fs::write(folder.join(name), text).unwrap();
    }
}

struct Both {
    coordinator: CoordinatorHandle,
    on_gpu: Worker,
    on_cpu: Worker,
}

const LOOPBACK: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// A coordinator that waits for so many workers, each of which is to hold all experts.
async fn coordinator(checkpoint: &Arc<Checkpoint>, workers: u16, math: Math) -> CoordinatorHandle {
    let coordinator = CoordinatorHandle::start(CoordinatorOptions {
        listen: SocketAddr::from(LOOPBACK),
        authority: Arc::new(ClusterCa::ephemeral().unwrap()),
        checkpoint: checkpoint.clone(),
        workers: workers.into(),
        placement: PlacementPolicy::default(),
        kv_dtype: KvDType::F32,
        math,
        context: None,
        remote_workers: false,
        replicas: workers,
        patience: PATIENCE,
        ledger: None,
        client_priority: 0,
    });
    coordinator.await.unwrap()
}

async fn start(
    coordinator: &CoordinatorHandle,
    checkpoint: &Arc<Checkpoint>,
    name: &str,
    device: NodeDevice,
) -> Result<Worker, WorkerError> {
    let options = WorkerOptions {
        coordinator: coordinator.address(),
        token: coordinator.token().clone(),
        name: name.to_owned(),
        listen: SocketAddr::from(LOOPBACK),
        device,
        dram_bytes: 1 << 30,
        dram_holds_rest: false,
        nvme: None,
        kv_bytes: 64 << 20,
        model: Model::Open(checkpoint.clone()),
        remote: false,
        patience: PATIENCE,
    };
    Worker::start(options).await
}

/// A cluster of a worker on a GPU and one on a CPU, each of which holds all experts.
async fn both(checkpoint: &Arc<Checkpoint>, gpu: NodeDevice) -> Both {
    let coordinator = coordinator(checkpoint, 2, Math::Exact).await;
    let (on_gpu, on_cpu) = tokio::join!(
        start(&coordinator, checkpoint, "gpu", gpu),
        start(&coordinator, checkpoint, "cpu", cpu().into())
    );
    coordinator.ready().await.unwrap();
    Both { coordinator, on_gpu: on_gpu.unwrap(), on_cpu: on_cpu.unwrap() }
}

fn prompts(checkpoint: &Checkpoint) -> Vec<Vec<u32>> {
    let vocab = checkpoint.config().vocab as u32;
    let prompt = |seed: u32| (0..20 + seed).map(|i| (i * 7919 + 13 * seed) % vocab).collect();
    (0..4).map(prompt).collect()
}

fn tokens_of(prompt: &[u32]) -> JobRequest {
    JobRequest::greedy(Prompt::Tokens(prompt.to_vec()), 12)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_on_a_gpu_beside_one_on_a_cpu() {
    let Some(device) = gpu(None) else { return };
    let checkpoint = demo();
    let both = both(&checkpoint, device).await;
    for prompt in prompts(&checkpoint) {
        for request in [job(&prompt, 6, 7), tokens_of(&prompt)] {
            let truth = run_alone(&checkpoint, Setup::default(), request.clone()).await;
            // Two at a time, so that one is at home on each.
            let run = || run_on(&both.coordinator, request.clone());
            let (one, other) = tokio::join!(run(), run());
            for found in [one.unwrap(), other.unwrap()] {
                assert_eq!(found.tokens, truth.tokens);
                assert!(found.logits == truth.logits, "logits of {} tokens", prompt.len());
            }
        }
    }
    // What status, metrics and the page are made of: the GPU's memory first, and what came into it.
    let places = both.coordinator.residences().await.unwrap();
    let names = |name: &str| -> Vec<&str> {
        let node = places.iter().find(|node| node.name == name).unwrap();
        node.residences.iter().map(|place| place.name.as_str()).collect()
    };
    assert_eq!(names("gpu")[0], "hbm");
    assert!(!names("cpu").contains(&"hbm"), "{:?}", names("cpu"));
    let hbm = &places.iter().find(|node| node.name == "gpu").unwrap().residences[0];
    assert_eq!(hbm.budget, Some(64 << 20));
    // Each expert takes a miss and its bytes, and what is held is what came, in whole pieces.
    let experts = checkpoint.config().expert_keys().count() as u64;
    assert_eq!((hbm.misses, hbm.evictions), (experts, 0), "all of them, once");
    assert!(hbm.bytes > 0 && hbm.held >= hbm.bytes, "{hbm:?}");
    both.coordinator.stop().await;
    both.on_gpu.stop().await;
    both.on_cpu.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fast_worker_serves_its_like_and_is_refused_by_others() {
    let checkpoint = demo();
    let fast = coordinator(&checkpoint, 1, Math::Fast).await;
    let refused = start(&fast, &checkpoint, "exact", cpu().into()).await.err().unwrap();
    let reason = refused.to_string();
    assert!(
        reason.contains("computes with --math fast, this worker with --math exact"),
        "{reason}"
    );
    let Some(device) = gpu_by(Math::Fast, None) else { return fast.stop().await };
    let exact = coordinator(&checkpoint, 1, Math::Exact).await;
    let refused = start(&exact, &checkpoint, "fast", device.clone()).await.err().unwrap();
    let reason = refused.to_string();
    assert!(
        reason.contains("computes with --math exact, this worker with --math fast ("),
        "{reason}"
    );
    exact.stop().await;
    let worker = start(&fast, &checkpoint, "fast", device).await.unwrap();
    fast.ready().await.unwrap();
    assert!(fast.status().await.unwrap().model.ends_with("(--math fast)"));
    // Together as alone, and not as an exact node has it.
    let prompts = prompts(&checkpoint);
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(run_on(&fast, job(prompt, 6, 7)).await.unwrap());
    }
    let run = |at: usize| run_on(&fast, job(&prompts[at], 6, 3));
    let (first, second, third) = tokio::join!(run(0), run(1), run(2));
    for (found, alone) in [first, second, third].into_iter().zip(&alone) {
        let found = found.unwrap();
        assert!(found.tokens == alone.tokens && found.logits == alone.logits);
    }
    let exact = run_alone(&checkpoint, Setup::default(), job(&prompts[0], 6, 7)).await;
    assert!(exact.logits != alone[0].logits, "fast bits are bits of their own");
    fast.stop().await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_gpu_was_doing_goes_on_elsewhere() {
    let sources = tempfile::tempdir().unwrap();
    kernels_that_trap(sources.path());
    let Some(device) = gpu(Some(sources.path().to_owned())) else { return };
    let checkpoint = demo();
    let mut truth: Vec<Outcome> = Vec::new();
    for prompt in prompts(&checkpoint) {
        truth.push(run_alone(&checkpoint, Setup::default(), tokens_of(&prompt)).await);
    }
    let Both { coordinator, mut on_gpu, on_cpu } = both(&checkpoint, device).await;
    let prompts = prompts(&checkpoint);
    let ended = tokio::time::timeout(PATIENCE, on_gpu.run());
    tokio::pin!(ended);
    // Until enough of them were at home on the GPU.
    let mut reason = None;
    while reason.is_none() {
        let job = |at: usize| run_on(&coordinator, tokens_of(&prompts[at]));
        let (first, second, third, fourth) = tokio::join!(job(0), job(1), job(2), job(3));
        for (found, truth) in [first, second, third, fourth].into_iter().zip(&truth) {
            assert_eq!(found.unwrap().tokens, truth.tokens);
        }
        reason = tokio::time::timeout(Duration::from_millis(100), &mut ended).await.ok();
    }
    let reason = reason.unwrap();
    let reason = reason.expect("a worker without its GPU ends").to_string();
    assert!(reason.contains("cuda:0"), "{reason}");
    // And the next ones do not go there.
    let again = run_on(&coordinator, tokens_of(&prompts[0])).await.unwrap();
    assert_eq!(again.tokens, truth[0].tokens);
    coordinator.stop().await;
    on_cpu.stop().await;
}
