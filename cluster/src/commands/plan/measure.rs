//! What a plan is to know of this machine, measured with the product's own parts in a few seconds.
//!
//! Experts of the model are fetched as a worker fetches them, which times the disk or the store; the
//! kernels then compute with these, and the engine with these in the place of all others: the bits
//! are nonsense, the time is not.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use lite_llm_kernels::{
    buffer::Buffer, cpu::Cpu, matrix::PackedMatrix, measure::read_bandwidth, slots::SlotPool,
};
use lite_llm_runtime::{
    backbone::Backbone,
    blocks::{BlockOptions, BlockReader, measure},
    checkpoint::Checkpoint,
    config::{ModelConfig, MoeConfig},
    engine::{Engine, Event, Step},
    expert::{ExpertKey, ExpertStore, GatedMlp, StoreError},
    moe_layer::{ExpertCall, run_experts},
    random::{Purpose, random_u64},
    residency::{
        Fetched, Fetcher, LocalFetcher, Urgency,
        replay::{Device, RowTime},
    },
    sequence::Request,
    trace::Trace,
};

use crate::commands::bad_input;

/// Bytes read to measure the memory: more than most caches hold.
const MEMORY_BYTES: usize = 96 << 20;
/// Bytes of experts to compute with.
const SAMPLE_BYTES: u64 = 192 << 20;
/// Experts fetched one by one, to see how long one takes.
const ONE_BY_ONE: usize = 5;
/// How long each part may take, about.
const PART: Duration = Duration::from_millis(400);
/// Threads that verify, as a worker has.
const VERIFY_THREADS: usize = 2;
/// Rows of an expert at which multiplying bounds, not reading.
const MANY_ROWS: usize = 32;
/// Dense weights that are read to time the engine.
const DENSE_BYTES_MAX: u64 = 1 << 30;
/// Bytes of keys and values of a short text.
const KV_BYTES: u64 = 64 << 20;
/// Smallest file that shows how fast a disk is.
const FILE_BYTES: u64 = 64 << 20;

/// Experts that stand for all others, by tier.
pub(super) struct Samples {
    tiers: Vec<Vec<Arc<GatedMlp>>>,
    next: AtomicUsize,
    /// Seconds of a fetch alone, verified.
    pub(super) one: f64,
    /// Bytes per second of many at a time, verified.
    pub(super) rate: f64,
    /// How they were read.
    pub(super) how: String,
}

/// Bytes per second that `cpu`'s threads read from memory.
pub(super) fn memory(cpu: &Cpu) -> f64 {
    read_bandwidth(cpu, MEMORY_BYTES)
}

/// Numbers that look random and are the same in every run.
fn draw(index: u64, below: u64) -> u64 {
    random_u64(0x706c_616e, Purpose::Sampling, index) % below.max(1)
}

impl Samples {
    /// Fetches some experts of every tier that is here.
    pub(super) fn fetch(checkpoint: &Arc<Checkpoint>, moe: &MoeConfig) -> Result<Self> {
        let (sizes, config) = (checkpoint.tier_expert_bytes(), checkpoint.config());
        let layers: Vec<usize> = config.sparse_layers().collect();
        let here = moe.tiers.iter().filter(|tier| !tier.absent).count().max(1) as u64;
        let pool = SlotPool::new(SAMPLE_BYTES * 2 + 64 * sizes.iter().copied().max().unwrap_or(0));
        let unreadable = |error: std::io::Error| anyhow!("experts cannot be read: {error}");
        let reader = BlockReader::new(BlockOptions::default()).map_err(unreadable)?;
        let fetcher =
            LocalFetcher::new(checkpoint.clone(), reader, VERIFY_THREADS).map_err(unreadable)?;
        let mut way = Way { fetcher, pool, one: Vec::new(), many: (0, Duration::ZERO) };
        let (mut tiers, mut draws) = (Vec::new(), 0..);
        for (tier, config) in moe.tiers.iter().enumerate() {
            let bytes = sizes[tier];
            if config.absent {
                tiers.push(Vec::new());
                continue;
            }
            let all = layers.len() as u64 * u64::from(config.experts());
            let wanted = (SAMPLE_BYTES / here / bytes.max(1)).clamp(2, 256).min(all);
            let mut keys = BTreeSet::new();
            while (keys.len() as u64) < wanted {
                let mut some = |below: usize| draw(draws.next().unwrap_or(0), below as u64);
                keys.insert(ExpertKey {
                    layer: layers[some(layers.len()) as usize] as u16,
                    tier: tier as u16,
                    group: some(config.groups as usize) as u32,
                    expert: some(config.experts_per_group as usize) as u32,
                });
            }
            let mut experts = way.fetch(&keys.into_iter().collect::<Vec<_>>(), bytes)?;
            // A slow archive gave few: copies are read from memory like others.
            for at in 0..(wanted as usize).saturating_sub(experts.len()) {
                experts.push(Arc::new(copy(&experts[at], &way.pool)?));
            }
            tiers.push(experts);
        }
        way.one.sort_by(f64::total_cmp);
        let one = way.one.get(way.one.len() / 2).copied().unwrap_or(0.0);
        let (bytes, time) = way.many;
        let rate = match time > Duration::ZERO {
            true => bytes as f64 / time.as_secs_f64(),
            false => sizes[0] as f64 / one.max(1e-9),
        };
        let how = way.fetcher.describe();
        Ok(Self { tiers, next: AtomicUsize::new(0), one, rate, how })
    }
}

/// Brings samples and sees how long that takes.
struct Way {
    fetcher: LocalFetcher,
    pool: Arc<SlotPool>,
    one: Vec<f64>,
    many: (u64, Duration),
}

impl Way {
    /// The first ones one by one, the others together, until too much time has passed.
    fn fetch(&mut self, keys: &[ExpertKey], bytes: u64) -> Result<Vec<Arc<GatedMlp>>> {
        let (mut experts, begun) = (Vec::new(), Instant::now());
        let singles = ONE_BY_ONE.min(keys.len() / 2).max(1);
        for key in &keys[..singles] {
            let from = Instant::now();
            experts.extend(self.together(std::slice::from_ref(key), bytes)?);
            self.one.push(from.elapsed().as_secs_f64());
            if begun.elapsed() > PART {
                break;
            }
        }
        let begun = Instant::now();
        for keys in keys[singles..].chunks(16) {
            let from = Instant::now();
            experts.extend(self.together(keys, bytes)?);
            self.many.0 += bytes * keys.len() as u64;
            self.many.1 += from.elapsed();
            if begun.elapsed() > PART {
                break;
            }
        }
        Ok(experts)
    }

    fn together(&self, keys: &[ExpertKey], bytes: u64) -> Result<Vec<Arc<GatedMlp>>> {
        let (tell, told) = mpsc::channel();
        for &key in keys {
            let (slot, tell) = (self.pool.take(bytes as usize)?, tell.clone());
            // Nobody listens after an error.
            let done = Box::new(move |fetched| drop(tell.send(fetched)));
            self.fetcher.fetch(key, slot, Urgency::Demand, done);
        }
        drop(tell);
        let expert = |fetched| match fetched {
            Fetched::Here(expert) => Ok(Arc::new(expert)),
            Fetched::Cancelled => Err(anyhow!("a fetch was given up")),
            Fetched::Failed(error) => Err(bad_input(error)),
        };
        let experts: Vec<_> = told.into_iter().map(expert).collect::<Result<_>>()?;
        match experts.len() == keys.len() {
            true => Ok(experts),
            false => Err(anyhow!("{} of {} experts came", experts.len(), keys.len())),
        }
    }
}

fn copy(expert: &GatedMlp, pool: &Arc<SlotPool>) -> Result<GatedMlp> {
    let of = |matrix: &PackedMatrix| -> Result<PackedMatrix> {
        let mut slot = pool.take(matrix.data().len())?;
        slot.copy_from_slice(matrix.data());
        let data = Buffer::from_owner(slot)?;
        Ok(PackedMatrix::new(matrix.dtype(), matrix.n(), matrix.k(), data)?)
    };
    Ok(GatedMlp { gate: of(&expert.gate)?, up: of(&expert.up)?, down: of(&expert.down)? })
}

/// One expert after the other, whoever is asked for: few callers find one in a cache.
impl ExpertStore for Samples {
    fn fetch(&self, key: ExpertKey) -> Result<Arc<GatedMlp>, StoreError> {
        let experts = self.tiers.get(usize::from(key.tier)).filter(|all| !all.is_empty());
        let experts = experts.ok_or(StoreError::NotHere { key })?;
        Ok(experts[self.next.fetch_add(1, Relaxed) % experts.len()].clone())
    }

    fn resident_bytes(&self) -> u64 {
        self.tiers.iter().flatten().map(|expert| expert.bytes()).sum()
    }
}

/// What the disk gives that a checkpoint lies on, read as experts are; none if it lies on none.
pub(super) fn disk(checkpoint: &Checkpoint, block: u64) -> Result<Option<f64>> {
    let Some(key) = checkpoint.config().expert_keys().next() else { return Ok(None) };
    match checkpoint.expert_place(key).map_err(bad_input)?.file {
        Some(file) => blocks(&file, block).map(Some),
        None => Ok(None),
    }
}

/// What a disk gives on which a folder is, or will be.
pub(super) fn folder(folder: &Path, block: u64) -> Result<f64> {
    // Where it is to be made, its disk is that of what is there.
    let here = folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    let written = || -> Result<_> {
        let mut file = tempfile::NamedTempFile::new_in(here)?;
        let mut left = FILE_BYTES.max(8 * block);
        // Not zeros: some disks do not store those.
        let part: Vec<u8> =
            (0..1u64 << 20).map(|at| (draw(at / 8, u64::MAX) >> (at % 8)) as u8).collect();
        while left > 0 {
            std::io::Write::write_all(&mut file, &part)?;
            left = left.saturating_sub(part.len() as u64);
        }
        file.as_file().sync_all()?;
        Ok(file)
    };
    let file = written().map_err(|error| {
        bad_input(anyhow!(
            "--nvme {}: its disk cannot be measured ({error}); name a folder that can be written to, \
             or give --disk-bandwidth",
            folder.display()
        ))
    })?;
    blocks(file.path(), block)
}

/// Bytes per second of blocks at random places of a file.
fn blocks(file: &Path, block: u64) -> Result<f64> {
    let (options, mut draws) = (BlockOptions::default(), 1 << 32..);
    let mut read = |total: u64| {
        let pick = |below| draw(draws.next().unwrap_or(0), below);
        measure::measure(file, block as usize, total, 1, &options, pick)
    };
    let rate = |rates: measure::Rates| rates.reader;
    let context = || format!("{}: cannot be read", file.display());
    // A first look says how much can be read in time; a bare loop reads as much again.
    let first = rate(read((8 * block).max(8 << 20)).with_context(context)?);
    let more = (first * PART.as_secs_f64() / 2.0) as u64;
    Ok(rate(read(more.max(8 * block)).with_context(context)?))
}

/// What computing takes when all experts are here.
pub(super) struct Kernels {
    /// By tier.
    pub(super) experts: Vec<RowTime>,
    /// Of a sparse layer, and its share of all others.
    pub(super) dense: RowTime,
    /// Whether the engine was timed; if not, the dense part's time is that of its bytes.
    pub(super) engine: bool,
}

pub(super) fn kernels(
    checkpoint: &Checkpoint,
    device: &Arc<Cpu>,
    samples: &Samples,
    dense_bytes: u64,
    by_network: bool,
) -> Result<Kernels> {
    let config = checkpoint.config();
    let Some(moe) = &config.moe else { return Err(anyhow!("the model has no experts")) };
    let layers = config.sparse_layers().count().max(1) as f64;
    let times = |tier: usize| match samples.tiers[tier].is_empty() {
        true => RowTime::default(),
        false => RowTime {
            first: expert(device, samples, config.hidden, tier, 1),
            each: expert(device, samples, config.hidden, tier, MANY_ROWS) / MANY_ROWS as f64,
        },
    };
    let experts: Vec<RowTime> = (0..moe.tiers.len()).map(times).collect();
    if by_network || dense_bytes > DENSE_BYTES_MAX {
        // As fast as experts, byte by byte.
        let tiers = experts.iter().zip(checkpoint.tier_expert_bytes());
        let (time, bytes) = tiers
            .max_by(|a, b| a.0.first.total_cmp(&b.0.first))
            .ok_or_else(|| anyhow!("the model has no experts"))?;
        let share = dense_bytes as f64 / layers / bytes as f64;
        let dense = RowTime { first: time.first * share, each: time.each * share };
        return Ok(Kernels { experts, dense, engine: false });
    }
    let (token, (rows, many)) = engine(checkpoint, device, samples, config)?;
    // What experts take of these; of uniform routing, as a look at some tokens.
    let trace =
        Trace::uniform(1, moe, 64.max(rows), 0).map_err(|reason| bad_input(anyhow!(reason)))?;
    let time_of = |tokens: std::ops::Range<usize>| -> f64 {
        let mut counts = vec![0usize; moe.experts()];
        for token in tokens {
            trace.routes(0, token).iter().for_each(|&flat| counts[usize::from(flat)] += 1);
        }
        let tier = |flat| ExpertKey::from_flat(moe, 0, flat).map_or(0, |key| key.tier);
        counts.iter().enumerate().map(|(flat, &n)| experts[usize::from(tier(flat))].of(n)).sum()
    };
    let of_token = (0..64).map(|at| time_of(at..at + 1)).sum::<f64>() / 64.0;
    let first = (token / layers - of_token).max(0.02 * token / layers);
    let each = (many / layers - time_of(0..rows)).max(0.02 * many / layers) / rows as f64;
    Ok(Kernels { experts, dense: RowTime { first, each }, engine: true })
}

/// Seconds of an expert of a tier with so many rows, several of them together as a token has.
fn expert(device: &Cpu, samples: &Samples, hidden: usize, tier: usize, rows: usize) -> f64 {
    let count = samples.tiers[tier].len().min(8);
    let states: Vec<f32> = (0..rows * hidden).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect();
    let mut outputs = vec![0.0f32; count * rows * hidden];
    let mut times = Vec::new();
    let begun = Instant::now();
    while times.len() < 3 || begun.elapsed() < PART / 4 {
        let calls = outputs.chunks_exact_mut(hidden).enumerate().map(|(at, output)| ExpertCall {
            key: ExpertKey { layer: 0, tier: tier as u16, group: 0, expert: (at / rows) as u32 },
            row: &states[at % rows * hidden..][..hidden],
            output,
        });
        let calls: Vec<_> = calls.collect();
        let from = Instant::now();
        run_experts(device, samples, calls);
        times.push(from.elapsed().as_secs_f64() / count as f64);
    }
    median(times)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Seconds of a token that is generated, and of so many rows of a prompt.
fn engine(
    checkpoint: &Checkpoint,
    device: &Arc<Cpu>,
    samples: &Samples,
    config: &ModelConfig,
) -> Result<(f64, (usize, f64))> {
    let backbone = Backbone::load(checkpoint, device.clone(), |_, _| {}).map_err(bad_input)?;
    let mut engine = Engine::new(Arc::new(backbone), KV_BYTES)?;
    let mut run = |id: u64, prompt: usize, tokens: usize| -> Result<Vec<f64>> {
        let ids = (0..prompt as u64).map(|at| draw(at + (id << 40), config.vocab as u64) as u32);
        engine.submit(id, Request::greedy(ids.collect(), tokens)).map_err(bad_input)?;
        let (begun, mut from, mut times) = (Instant::now(), Instant::now(), Vec::new());
        loop {
            match engine.step() {
                Step::Dispatch(pass) => engine.run_pass(pass, samples),
                Step::Advanced => {}
                Step::Idle => return Ok(times),
            }
            while let Some(event) = engine.poll_event() {
                match event {
                    Event::Token { .. } => {
                        times.push(from.elapsed().as_secs_f64());
                        from = Instant::now();
                        if begun.elapsed() > PART && times.len() > 3 {
                            engine.cancel(id);
                        }
                    }
                    Event::Failed { reason, .. } => return Err(anyhow!("the engine: {reason}")),
                    _ => {}
                }
            }
        }
    };
    let room = config.context.saturating_sub(1).max(1);
    // The first tokens warm up.
    let times = run(1, 4.min(room), 32.min(room))?;
    let token = median(times[(times.len() / 4).min(times.len().saturating_sub(1))..].to_vec());
    // Rows of a prompt take a third to a tenth of a generated token each.
    let rows = ((4.0 * PART.as_secs_f64() / token) as usize).clamp(16, 256).min(room);
    let many = run(2, rows, 1)?.first().copied().unwrap_or(token);
    Ok((token, (rows, many)))
}

/// A disk or store of which a fetch alone takes so many seconds, and many so many bytes per second.
pub(super) fn device(samples: &Samples, bytes: u64, rate: f64) -> Device {
    Device { latency: (samples.one - bytes as f64 / samples.rate.max(1.0)).max(0.0), rate }
}
