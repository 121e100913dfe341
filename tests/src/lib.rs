//! What the tests of this folder share: reference models, clusters in one process, evaluations.

pub mod s3;
pub mod tiny;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use lite_llm_actors::{
    coordinator::{CoordinatorHandle, ServeError},
    local::{LocalCluster, LocalOptions},
    placement::PlacementPolicy,
};
use lite_llm_kernels::{dtype::DType, kv::KvDType, simd::Simd};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    import::{ImportOptions, import},
};
use lite_llm_transport::messages::{JobEvent, JobEventBody, JobRequest, LogitsWanted, Prompt};
use safetensors::SafeTensors;
use tokio::sync::mpsc;

/// How long any one thing in a test may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The demo model's checkpoint.
pub fn demo() -> Arc<Checkpoint> {
    let folder = root().join("models/manpages-moe");
    Arc::new(Checkpoint::open(folder).expect("the demo model is part of the repository"))
}

/// A Hugging Face folder of this repository's test data, imported; it lives as long as the folder.
pub fn reference(name: &str) -> (tempfile::TempDir, Arc<Checkpoint>, Reference) {
    reference_as(name, None)
}

/// The same with weights in another format.
pub fn reference_as(
    name: &str,
    dtype: Option<DType>,
) -> (tempfile::TempDir, Arc<Checkpoint>, Reference) {
    let source = root().join("tests/data/hf-refs").join(name);
    let reference = Reference::read(&source).expect("the references can be read");
    let (folder, checkpoint) = imported(source, dtype);
    (folder, checkpoint, reference)
}

/// A folder as a checkpoint, which lives as long as the folder that comes with it.
pub fn imported(source: PathBuf, dtype: Option<DType>) -> (tempfile::TempDir, Arc<Checkpoint>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("checkpoint");
    let options = ImportOptions { dtype, ..ImportOptions::new(source, &*out) };
    import(&options, &mut |_, _, _| {}).expect("the test data can be imported");
    let checkpoint = Checkpoint::open(out).expect("what was imported can be opened");
    (folder, Arc::new(checkpoint))
}

/// A file of the data that projects share, or `None` and a line that says so.
pub fn shared(path: &str) -> Option<PathBuf> {
    let folder =
        std::env::var_os("LITE_LLM_SHARED").map_or(root().join("../shared"), PathBuf::from);
    let file = folder.join(path);
    if file.exists() {
        return Some(file);
    }
    println!("skipped: {} is not here; LITE_LLM_SHARED says where shared data is", file.display());
    None
}

/// What transformers computed.
pub struct Reference {
    /// One entry per prompt.
    pub prompts: Vec<ReferencePrompt>,
    /// Largest difference of a logit that is still agreement.
    pub tolerance: f32,
}

/// What transformers computed from one prompt.
pub struct ReferencePrompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Its greedy continuation.
    pub greedy: Vec<u32>,
    /// `[rows, vocab]`.
    pub logits: Vec<f32>,
    /// Chosen experts `[layers, rows, k]`, in any order within the k.
    pub experts: Vec<i32>,
    /// Experts per token.
    pub k: usize,
}

impl ReferencePrompt {
    /// The chosen experts as `[layers][rows]` sorted sets.
    pub fn expert_sets(&self, layers: usize) -> Vec<Vec<Vec<i32>>> {
        let per_layer = self.experts.len() / layers;
        let layers = self.experts.chunks_exact(per_layer);
        layers.map(|layer| layer.chunks_exact(self.k).map(sorted).collect()).collect()
    }
}

fn sorted(experts: &[i32]) -> Vec<i32> {
    let mut experts = experts.to_vec();
    experts.sort_unstable();
    experts
}

impl Reference {
    fn read(folder: &Path) -> Result<Self> {
        let text = std::fs::read(folder.join("refs.json"))?;
        let refs: serde_json::Value = serde_json::from_slice(&text)?;
        let tolerance = refs["suggested_tolerance_abs"].as_f64().context("a tolerance")? as f32;
        let bytes = std::fs::read(folder.join("refs.safetensors"))?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let integers = |name: &str| -> Result<Vec<i64>> {
            let view = tensors.tensor(name)?;
            let data = view.data();
            Ok(match view.dtype() {
                safetensors::Dtype::I64 => bytemuck::pod_collect_to_vec(data),
                safetensors::Dtype::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(data)
                    .into_iter()
                    .map(i64::from)
                    .collect(),
                safetensors::Dtype::I16 => bytemuck::pod_collect_to_vec::<u8, i16>(data)
                    .into_iter()
                    .map(i64::from)
                    .collect(),
                safetensors::Dtype::U8 => data.iter().map(|&b| i64::from(b)).collect(),
                other => bail!("{name} has dtype {other:?}"),
            })
        };
        let mut prompts = Vec::new();
        for n in 0..2 {
            let ids = |name: &str| -> Result<Vec<u32>> {
                Ok(integers(&format!("p{n}.{name}"))?.into_iter().map(|id| id as u32).collect())
            };
            let experts = format!("p{n}.router_ids");
            prompts.push(ReferencePrompt {
                ids: ids("input_ids")?,
                greedy: ids("greedy_ids")?,
                logits: bytemuck::pod_collect_to_vec(
                    tensors.tensor(&format!("p{n}.logits"))?.data(),
                ),
                k: *tensors.tensor(&experts)?.shape().last().context("a shape")?,
                experts: integers(&experts)?.into_iter().map(|id| id as i32).collect(),
            });
        }
        Ok(Self { prompts, tolerance })
    }
}

/// How a cluster computes; none of it may change a bit, but for the cache's format and
/// the context.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Nodes.
    pub workers: usize,
    /// Compute threads of each.
    pub threads: usize,
    /// Vector instructions.
    pub simd: Simd,
    /// How experts are spread.
    pub placement: PlacementPolicy,
    /// Nodes that hold each expert.
    pub replicas: u16,
    /// How long parts of a job wait for a node that is gone.
    pub patience: Duration,
    /// Bytes of experts that each node holds in memory.
    pub dram_bytes: u64,
    /// How keys and values are kept: it does change bits.
    pub kv_dtype: KvDType,
    /// Positions with which the model is served; of a model whose rotary table depends on it, it
    /// changes bits, too.
    pub context: Option<usize>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            workers: 1,
            threads: 1,
            simd: Simd::best(),
            placement: PlacementPolicy::Balanced,
            replicas: 1,
            patience: Duration::from_secs(5),
            dram_bytes: 1 << 30,
            kv_dtype: KvDType::F32,
            context: None,
        }
    }
}

impl Setup {
    /// Starts such a cluster in this process.
    pub async fn start(&self, checkpoint: &Arc<Checkpoint>) -> LocalCluster {
        self.try_start(checkpoint).await.expect("a cluster starts")
    }

    /// The same, which may fail.
    pub async fn try_start(
        &self,
        checkpoint: &Arc<Checkpoint>,
    ) -> Result<LocalCluster, ServeError> {
        let options = LocalOptions {
            workers: self.workers,
            threads: self.threads,
            simd: self.simd,
            device: lite_llm_actors::node::DeviceChoice::Cpu,
            hbm_bytes: None,
            dram_bytes: self.dram_bytes,
            nvme: None,
            kv_bytes: 256 << 20,
            kv_dtype: self.kv_dtype,
            math: lite_llm_kernels::math::Math::Exact,
            context: self.context,
            placement: self.placement,
            replicas: self.replicas,
            patience: self.patience,
        };
        tokio::time::timeout(PATIENCE, LocalCluster::start(checkpoint.clone(), &options))
            .await
            .expect("a cluster starts in time")
    }
}

/// What came of a job.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Logits of all positions, as bits: NaN equals itself, and -0 is not 0.
    pub logits: Vec<u32>,
    /// Chosen experts `[layers, rows, k]` per chunk, flattened in order of chunks.
    pub experts: Vec<i32>,
    /// Rows of each chunk of `experts`.
    pub chunks: Vec<usize>,
    /// Generated tokens.
    pub tokens: Vec<u32>,
}

impl Outcome {
    /// The chosen experts as `[layers][rows]` sorted sets.
    pub fn expert_sets(&self, layers: usize, k: usize) -> Vec<Vec<Vec<i32>>> {
        let mut sets = vec![Vec::new(); layers];
        let mut rest = self.experts.as_slice();
        for &rows in &self.chunks {
            for set in &mut sets {
                let (mine, others) = rest.split_at(rows * k);
                rest = others;
                set.extend(mine.chunks_exact(k).map(sorted));
            }
        }
        sets
    }

    /// The logits as numbers.
    pub fn logits(&self) -> Vec<f32> {
        self.logits.iter().map(|&bits| f32::from_bits(bits)).collect()
    }
}

/// A job that gives everything: logits, routes, a greedy continuation.
pub fn job(prompt: &[u32], greedy: u32, prefill_chunk: u32) -> JobRequest {
    JobRequest {
        want_logits: LogitsWanted::All,
        want_routes: true,
        prefill_chunk,
        ..JobRequest::greedy(Prompt::Tokens(prompt.to_vec()), greedy)
    }
}

/// Runs a job to its end.
pub async fn run(cluster: &LocalCluster, request: JobRequest) -> Result<Outcome, String> {
    run_on(cluster.coordinator(), request).await
}

/// The same, of a cluster whose workers were started one by one.
pub async fn run_on(
    coordinator: &CoordinatorHandle,
    request: JobRequest,
) -> Result<Outcome, String> {
    let submitted = coordinator.submit(request).await;
    let (_, events) = submitted.map_err(|error| error.to_string())?;
    tokio::time::timeout(PATIENCE, collect(events)).await.expect("a job ends in time")
}

/// Runs jobs that are there at the same time, behind one that keeps a lane busy meanwhile, so that
/// they meet in its passes.
pub async fn run_together(
    cluster: &LocalCluster,
    requests: Vec<JobRequest>,
) -> Vec<Result<Outcome, String>> {
    let busy = JobRequest::greedy(requests[0].prompt.clone(), 8);
    let busy = cluster.coordinator().submit(busy).await;
    let mut submitted = Vec::new();
    for request in requests {
        submitted.push(cluster.coordinator().submit(request).await);
    }
    let mut outcomes = Vec::new();
    for submitted in submitted {
        outcomes.push(match submitted {
            Ok((_, events)) => {
                tokio::time::timeout(PATIENCE, collect(events)).await.expect("a job ends in time")
            }
            Err(error) => Err(error.to_string()),
        });
    }
    drop(busy);
    outcomes
}

async fn collect(mut events: mpsc::Receiver<JobEvent>) -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    while let Some(event) = events.recv().await {
        match event.body {
            JobEventBody::Token { id, .. } => outcome.tokens.push(id),
            JobEventBody::Logits { values, .. } => {
                outcome.logits.extend(values.iter().map(|v| v.to_bits()));
            }
            JobEventBody::Routes { rows, ids, .. } => {
                outcome.chunks.push(rows as usize);
                outcome.experts.extend(ids);
            }
            JobEventBody::Scored(token) => outcome.tokens.push(token.id),
            JobEventBody::Progress { .. } | JobEventBody::Text(_) => {}
            JobEventBody::Done { .. } => return Ok(outcome),
            JobEventBody::Failed { reason } | JobEventBody::NotTaken { reason } => {
                return Err(reason);
            }
        }
    }
    Err("the job's events ended without a last one".into())
}

/// Runs one job on a cluster of its own.
pub async fn run_alone(checkpoint: &Arc<Checkpoint>, setup: Setup, request: JobRequest) -> Outcome {
    let cluster = setup.start(checkpoint).await;
    let outcome = run(&cluster, request).await.expect("the job ends well");
    cluster.stop().await;
    outcome
}
