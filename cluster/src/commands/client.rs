//! `lite-llm submit` and `lite-llm status`: talking to a coordinator from outside. Jobs that are left
//! there are in `detached`.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use lite_llm_actors::coordinator::PROMPT_BYTES_MAX;
use lite_llm_kernels::DETERMINISM_VERSION;
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    frame::{FrameReceiver, FrameSender},
    identity::{Identity, OPERATOR, Role},
    join::join_within,
    messages::{ClientReply, ClientRequest, ClusterStatus, JobOrder, JobRequest, NodeResidences},
    session::Hello,
    token::JoinToken,
};
use serde::Deserialize;
use serde_json::json;
use tracing::debug_span;

use super::{
    answer::Answer, authority::open_authority, bad_input, coordinator_addresses, detached,
    first_that_answers, read_token, run::read_prompt,
};
use crate::{
    bias,
    cli::{
        ChatArgs, ChoosingArgs, ClientArgs, DrainArgs, HostPort, SamplingArgs, Seed, SubmitArgs,
    },
    size::Size,
    telemetry,
};

/// What is said of an answer that fits nothing that was asked.
pub(super) const OTHER_QUESTION: &str = "the coordinator answered another question than was asked";
/// How long the coordinator may take to answer a question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause between two attempts to connect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);

/// A connection to a coordinator.
pub(super) struct Client {
    endpoint: Endpoint,
    connection: Connection,
}

/// The coordinator does not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(String);

impl Client {
    async fn connect(args: &ClientArgs) -> Result<Self> {
        let token = read_token(args.token.as_ref(), Role::Client)?;
        let retry = args.retry.0;
        let addresses = coordinator_addresses(args.coordinator.as_ref(), &token).await?;
        let mut last = anyhow::anyhow!("the coordinator has no address");
        for address in addresses {
            match Self::connect_to(address, &token, args.name.as_deref(), retry).await {
                Ok(client) => return Ok(client),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_to(
        address: SocketAddr,
        token: &JoinToken,
        name: Option<&str>,
        retry: Duration,
    ) -> Result<Self> {
        let hello = Hello::new(DETERMINISM_VERSION);
        let any = format!("client-{}", std::process::id());
        let (name, started) = (name.unwrap_or(&any), Instant::now());
        let identity = join_within(retry, address, token, Role::Client, name, &hello).await?;
        Self::connect_as(address, &identity, retry.saturating_sub(started.elapsed())).await
    }

    async fn connect_as(address: SocketAddr, identity: &Identity, retry: Duration) -> Result<Self> {
        let options = Options::new(Hello::new(DETERMINISM_VERSION));
        let endpoint = Endpoint::outgoing(address, identity, options)?;
        let connection = endpoint.connect_within(retry, address, &Expect::coordinator()).await?;
        Ok(Self { endpoint, connection })
    }

    async fn ask(&self, request: &ClientRequest) -> Result<(FrameSender, FrameReceiver)> {
        let (mut sender, receiver) = self.connection.open_stream(StreamKind::Client).await?;
        sender.send_message(request).await?;
        Ok((sender, receiver))
    }

    /// The answer to a question that has one.
    async fn answer(&self, question: &ClientRequest) -> Result<ClientReply> {
        self.answer_within(ANSWER_TIMEOUT, question).await
    }

    /// The same, within another time. An answer that says no is [`Refused`].
    pub(super) async fn answer_within(
        &self,
        limit: Duration,
        question: &ClientRequest,
    ) -> Result<ClientReply> {
        let (_sender, mut receiver) = self.ask(question).await?;
        let reply = tokio::time::timeout(limit, next(&mut receiver))
            .await
            .with_context(|| format!("the coordinator did not answer within {limit:?}"))??;
        match reply {
            ClientReply::Refused { reason } => Err(Refused(reason).into()),
            reply => Ok(reply),
        }
    }

    async fn status(&self) -> Result<ClusterStatus> {
        match self.answer(&ClientRequest::Status).await? {
            ClientReply::Status(status) => Ok(status),
            _ => bail!(OTHER_QUESTION),
        }
    }

    async fn residences(&self) -> Result<Vec<NodeResidences>> {
        match self.answer(&ClientRequest::Residences).await? {
            ClientReply::Residences(residences) => Ok(residences),
            _ => bail!(OTHER_QUESTION),
        }
    }

    /// Runs a job from its beginning, or goes on where its answer is.
    async fn run(&self, order: JobOrder, answer: &mut Answer) -> Result<()> {
        let generated = answer.ids().to_vec();
        let request = ClientRequest::Order(Box::new(JobOrder { generated, ..order }));
        // The sender stays open: its end would tell the coordinator that nobody listens.
        let (_sender, mut receiver) = self.ask(&request).await?;
        loop {
            match next(&mut receiver).await? {
                ClientReply::Accepted { .. } => {}
                ClientReply::Event(event) => {
                    if answer.take(event)? {
                        return Ok(());
                    }
                }
                ClientReply::Refused { reason } => bail!("{reason}"),
                ClientReply::Status(_)
                | ClientReply::Residences(_)
                | ClientReply::Noted
                | ClientReply::Detached(_) => bail!(OTHER_QUESTION),
            }
        }
    }

    /// Whether its connection stands.
    fn is_live(&self) -> bool {
        self.connection.close_reason().is_none()
    }
}

/// A connection to a coordinator that is made anew when it is lost.
pub(super) struct Reconnecting {
    args: ClientArgs,
    /// The operator's identity and where the coordinator is, if the operator asks.
    operator: Option<(Identity, Vec<SocketAddr>)>,
    client: tokio::sync::Mutex<Option<Arc<Client>>>,
}

impl Reconnecting {
    pub(super) fn new(args: &ClientArgs) -> Self {
        Self { args: args.clone(), operator: None, client: tokio::sync::Mutex::default() }
    }

    /// One of whoever has the coordinator's state folder.
    pub(super) async fn as_operator(args: &ClientArgs, state: Option<PathBuf>) -> Result<Self> {
        let operator = operator(state, args.coordinator.as_ref()).await?;
        Ok(Self { operator: Some(operator), ..Self::new(args) })
    }

    async fn connect(&self) -> Result<Client> {
        let Some((identity, addresses)) = &self.operator else {
            return Client::connect(&self.args).await;
        };
        let mut last = anyhow::anyhow!("the coordinator has no address");
        for address in addresses {
            match Client::connect_as(*address, identity, self.args.retry.0).await {
                Ok(client) => return Ok(client),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// How long the coordinator is looked for when it is lost.
    pub(super) fn retry(&self) -> Duration {
        self.args.retry.0
    }

    /// The connection that stands, or a new one, within `--retry` if the first was lost.
    pub(super) async fn client(&self) -> Result<Arc<Client>> {
        let mut kept = self.client.lock().await;
        let lost = match &*kept {
            Some(client) if client.is_live() => return Ok(client.clone()),
            lost => lost.is_some(),
        };
        let limit = if lost { self.args.retry.0 } else { Duration::ZERO };
        let deadline = Instant::now() + limit;
        loop {
            match self.connect().await {
                Ok(client) => {
                    let client = Arc::new(client);
                    *kept = Some(client.clone());
                    return Ok(client);
                }
                Err(error) if Instant::now() + RECONNECT_PAUSE >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(RECONNECT_PAUSE).await,
            }
        }
    }

    /// Runs a job. Where the connection is lost the job goes on over another, with the same bits:
    /// it is its prompt, its seed and its tokens so far.
    async fn run(&self, order: JobOrder, answer: &mut Answer) -> Result<()> {
        loop {
            let client = self.client().await?;
            match client.run(order.clone(), answer).await {
                Err(_) if !client.is_live() && !self.args.retry.0.is_zero() => {}
                ended => return ended,
            }
        }
    }

    pub(super) async fn close(self) {
        if let Some(client) = self.client.into_inner() {
            client.endpoint.close("done").await;
        }
    }
}

async fn next(receiver: &mut FrameReceiver) -> Result<ClientReply> {
    match receiver.recv().await? {
        Some(frame) => Ok(frame.decode::<ClientReply>()?),
        None => bail!("the coordinator ended the conversation; its log may say why"),
    }
}

/// One line of a jobs file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobLine {
    prompt: String,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<u64>,
    tiers: Option<String>,
    stop: Option<Vec<String>>,
    chat: Option<bool>,
    system: Option<String>,
    /// The client's own name for it.
    custom_id: Option<String>,
}

/// A job of a file.
pub(super) struct FileJob {
    pub(super) prompt: String,
    pub(super) sampling: SamplingArgs,
    pub(super) request: JobRequest,
    pub(super) custom_id: Option<String>,
}

/// Jobs of a file that run at a time.
const CONCURRENT_MAX: usize = 32;

pub(super) async fn submit(args: SubmitArgs, json: bool) -> Result<()> {
    args.sampling.check()?;
    if args.detach || args.wait {
        return detached::submit(args, json).await;
    }
    if let Some(prompt) = &args.prompt {
        let prompt = read_prompt(prompt, PROMPT_BYTES_MAX).await?;
        let client = Reconnecting::new(&args.client);
        client.client().await?;
        args.sampling.tell_seed();
        let mut request = args.sampling.request(args.sampling.remote_prompt(&prompt));
        let span = debug_span!("submit");
        request.trace = telemetry::context_of(&span);
        let mut answer = Answer::begin(&prompt, &args.sampling, json, Instant::now());
        let (serving, choosing) = (args.sampling.serving(), args.sampling.choosing()?);
        client.run(JobOrder { serving, choosing, ..request.into() }, &mut answer).await?;
        answer.finish()?;
        client.close().await;
        return Ok(());
    }
    let jobs = read_jobs(&args)?;
    let count = jobs.len();
    let client = Arc::new(Reconnecting::new(&args.client));
    client.client().await?;
    let mut running = tokio::task::JoinSet::new();
    let mut next = jobs.into_iter().enumerate();
    let mut failed = 0;
    loop {
        while running.len() < CONCURRENT_MAX {
            let Some((index, job)) = next.next() else { break };
            let FileJob { prompt, sampling, mut request, custom_id } = job;
            // Each job is a trace of its own.
            let span = debug_span!("submit", index);
            request.trace = telemetry::context_of(&span);
            let (client, choosing) = (client.clone(), sampling.choosing()?);
            running.spawn(async move {
                let _span = span;
                let mut answer = Answer::silent(&prompt, sampling.stop_texts(), Instant::now());
                let serving = sampling.serving();
                let order = JobOrder { serving, choosing, ..request.into() };
                let result = client.run(order, &mut answer).await;
                (index, custom_id, result.map(|()| answer))
            });
        }
        let Some(ended) = running.join_next().await else { break };
        let (index, custom_id, result) = ended?;
        let mut line = match result {
            Ok(answer) => answer.line(index)?,
            Err(error) => {
                failed += 1;
                json!({ "job": index, "error": format!("{error:#}") })
            }
        };
        if let Some(id) = custom_id {
            line["custom_id"] = id.into();
        }
        say!("{line}");
    }
    if let Ok(client) = Arc::try_unwrap(client) {
        client.close().await;
    }
    if failed > 0 {
        bail!("{failed} of {count} jobs failed; their lines say why");
    }
    Ok(())
}

pub(super) fn read_jobs(args: &SubmitArgs) -> Result<Vec<FileJob>> {
    let Some(path) = &args.file else { return Ok(Vec::new()) };
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{shown}: cannot read"))
        .map_err(bad_input)?;
    let mut jobs = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let job: JobLine = serde_json::from_str(line)
            .with_context(|| format!("{shown}, line {number}: {{\"prompt\": \"…\"}} is expected"))
            .map_err(bad_input)?;
        let base = &args.sampling;
        let system = job.system.or_else(|| base.chat.system.clone());
        let chat = job.chat.unwrap_or(base.chat.chat || system.is_some());
        let bias = job.logit_bias.map(|given| {
            let ids = given.iter().map(|(id, &value)| Ok((bias::token(id)?, value)));
            ids.collect::<Result<Vec<_>, String>>()
        });
        let bias = bias.transpose().map_err(|error| anyhow!("logit_bias: {error}"));
        let bias = bias.with_context(|| format!("{shown}, line {number}")).map_err(bad_input)?;
        let of = &base.choosing;
        let choosing = ChoosingArgs {
            min_p: job.min_p.unwrap_or(of.min_p),
            presence_penalty: job.presence_penalty.unwrap_or(of.presence_penalty),
            frequency_penalty: job.frequency_penalty.unwrap_or(of.frequency_penalty),
            repetition_penalty: job.repetition_penalty.unwrap_or(of.repetition_penalty),
            logit_bias: bias.unwrap_or_else(|| of.logit_bias.clone()),
        };
        let sampling = SamplingArgs {
            choosing,
            max_tokens: job.max_tokens.unwrap_or(base.max_tokens),
            temperature: job.temperature.unwrap_or(base.temperature),
            top_k: job.top_k.unwrap_or(base.top_k),
            top_p: job.top_p.unwrap_or(base.top_p),
            seed: job.seed.map_or(base.seed, |value| Seed { value, any: false }),
            tiers: job.tiers.unwrap_or_else(|| base.tiers.clone()),
            stop: job.stop.unwrap_or_else(|| base.stop.clone()),
            chat: ChatArgs { chat, system },
            ..base.clone()
        };
        sampling.check().with_context(|| format!("{shown}, line {number}")).map_err(bad_input)?;
        let request = sampling.request(sampling.remote_prompt(&job.prompt));
        let (prompt, custom_id) = (job.prompt, job.custom_id);
        jobs.push(FileJob { prompt, sampling, request, custom_id });
    }
    Ok(jobs)
}

pub(super) async fn status(args: ClientArgs, json: bool) -> Result<()> {
    let client = Client::connect(&args).await?;
    let status = client.status().await?;
    let residences = client.residences().await?;
    client.endpoint.close("done").await;
    if json {
        say!("{}", status_json(&status, &residences));
        return Ok(());
    }
    say!("model       {} ({}…)", status.model, status.checkpoint.get(..12).unwrap_or_default());
    say!("state       {}, placement {}", status.state, status.epoch);
    if !status.waiting_for.is_empty() {
        say!("waiting for {}", status.waiting_for.join(", "));
    }
    say!(
        "jobs        {} running, {} done, {:.1} tokens per second",
        status.jobs_running,
        status.jobs_done,
        status.tokens_per_second
    );
    say!(
        "{:<16} {:<22} {:<12} {:>14} {:>21} {:>5} {:>7}",
        "node",
        "address",
        "state",
        "experts",
        "memory",
        "seqs",
        "tok/s"
    );
    for node in &status.nodes {
        say!(
            "{:<16} {:<22} {:<12} {:>14} {:>21} {:>5} {:>7.1}",
            node.name,
            node.address,
            node.state,
            format!("{}/{}", node.loaded, node.total),
            format!("{} of {}", Size(node.expert_bytes), Size(node.budget)),
            node.sequences,
            node.tokens_per_second
        );
    }
    say_schedules(&residences);
    say_residences(&residences);
    Ok(())
}

/// What schedulers have done so far, and what their caches hold.
fn say_schedules(nodes: &[NodeResidences]) {
    say!();
    say!(
        "{:<16} {:>6} {:>6} {:>19} {:>20} {:>10} {:>18}",
        "node",
        "runs",
        "waits",
        "cache pages",
        "prefix hits",
        "preempted",
        "guesses right"
    );
    for NodeResidences { name, schedule, .. } in nodes {
        let share = |part: u64, all: u64| match all {
            0 => "-".to_owned(),
            all => format!("{part} ({:.0} %)", 100.0 * part as f64 / all as f64),
        };
        say!(
            "{name:<16} {:>6} {:>6} {:>19} {:>20} {:>10} {:>18}",
            schedule.running,
            schedule.waiting,
            format!("{} of {}", schedule.pages_used, schedule.pages),
            share(schedule.found, schedule.found + schedule.computed),
            schedule.preemptions,
            share(schedule.guessed_right, schedule.guessed)
        );
    }
}

/// Where experts are, and what moving them has cost so far.
fn say_residences(nodes: &[NodeResidences]) {
    say!();
    say!(
        "{:<16} {:>21} {:>9} {:>9} {:>6} {:>15} {:>9} {:>10}  experts in",
        "node",
        "holds",
        "hits",
        "misses",
        "hits",
        "early (used)",
        "let go",
        "moved"
    );
    for node in nodes {
        for place in &node.residences {
            let of = place.budget.map_or(String::new(), |budget| format!(" of {}", Size(budget)));
            let held = match place.budget {
                None => "all".to_owned(),
                Some(_) => format!("{}{of}", Size(place.held)),
            };
            let asked = place.hits + place.misses;
            let rate = match asked {
                0 => "-".to_owned(),
                _ => format!("{:.0} %", 100.0 * place.hits as f64 / asked as f64),
            };
            let early = format!("{} ({})", place.prefetches, place.prefetches_used);
            let (hits, misses, gone) = (place.hits, place.misses, place.evictions);
            let (name, moved) = (&node.name, Size(place.bytes).to_string());
            say!(
                "{name:<16} {held:>21} {hits:>9} {misses:>9} {rate:>6} {early:>15} {gone:>9} \
                 {moved:>10}  {}",
                place.name
            );
            if place.damaged + place.failures > 0 {
                let (damaged, failed) = (place.damaged, place.failures);
                say!("{:<16} {damaged} experts were damaged there, {failed} transfers failed", "");
            }
        }
        if node.tokens > 0 && node.waited_us > 0 {
            let each = node.waited_us as f64 / 1e3 / node.tokens as f64;
            say!("{:<16} waited for experts {each:.1} ms per token", node.name);
        }
    }
}

fn residences_json(node: &NodeResidences) -> serde_json::Value {
    let places: Vec<_> = node
        .residences
        .iter()
        .map(|place| {
            json!({
                "name": place.name,
                "bytes": place.held,
                "budget_bytes": place.budget,
                "hits": place.hits,
                "misses": place.misses,
                "prefetches": place.prefetches,
                "prefetches_used": place.prefetches_used,
                "evictions": place.evictions,
                "bytes_moved": place.bytes,
                "bytes_in_vain": place.bytes_in_vain,
                "damaged": place.damaged,
                "failures": place.failures,
            })
        })
        .collect();
    json!({
        "node": node.name,
        "tokens": node.tokens,
        "waited_us": node.waited_us,
        "residences": places,
        "schedule": {
            "running": node.schedule.running,
            "waiting": node.schedule.waiting,
            "pages": node.schedule.pages,
            "pages_used": node.schedule.pages_used,
            "pages_idle": node.schedule.pages_idle,
            "positions_computed": node.schedule.computed,
            "positions_found": node.schedule.found,
            "preemptions": node.schedule.preemptions,
            "guessed": node.schedule.guessed,
            "guessed_right": node.schedule.guessed_right,
        },
    })
}

/// The operator's identity, made by the authority in a state folder, and where its coordinator is.
async fn operator(
    state: Option<PathBuf>,
    coordinator: Option<&HostPort>,
) -> Result<(Identity, Vec<SocketAddr>)> {
    let (state, authority) = open_authority(state)?;
    let token = JoinToken::read(&JoinToken::path_in(&state, Role::Client)).map_err(bad_input)?;
    let identity = authority.identity(Role::Client, OPERATOR)?;
    Ok((identity, coordinator_addresses(coordinator, &token).await?))
}

/// Asks the coordinator to move a worker's work away and to let it go.
pub(super) async fn drain(args: DrainArgs) -> Result<()> {
    let (identity, addresses) = operator(args.state, args.coordinator.as_ref()).await?;
    let connect = async |address| Client::connect_as(address, &identity, Duration::ZERO).await;
    let client = first_that_answers(&addresses, connect).await?;
    match client.answer(&ClientRequest::Drain(args.name.clone())).await? {
        ClientReply::Noted => {
            let name = &args.name;
            say!("{name} gets no more jobs and leaves when others hold its experts");
        }
        _ => bail!(OTHER_QUESTION),
    }
    client.endpoint.close("done").await;
    Ok(())
}

fn status_json(status: &ClusterStatus, residences: &[NodeResidences]) -> serde_json::Value {
    let nodes: Vec<_> = status
        .nodes
        .iter()
        .map(|node| {
            json!({
                "name": node.name,
                "address": node.address,
                "state": node.state,
                "experts_loaded": node.loaded,
                "experts": node.total,
                "expert_bytes": node.expert_bytes,
                "budget_bytes": node.budget,
                "sequences": node.sequences,
                "kv_tokens": node.kv_tokens,
                "tokens_per_second": node.tokens_per_second,
            })
        })
        .collect();
    json!({
        "model": status.model,
        "checkpoint": status.checkpoint,
        "epoch": status.epoch,
        "state": status.state,
        "waiting_for": status.waiting_for,
        "nodes": nodes,
        "residences": residences.iter().map(residences_json).collect::<Vec<_>>(),
        "jobs_running": status.jobs_running,
        "jobs_done": status.jobs_done,
        "tokens_per_second": status.tokens_per_second,
    })
}
