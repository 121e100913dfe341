//! The coordinator's door: its endpoint, the workers and clients that come through it.
//!
//! Who may come in is decided by certificates, in `transport`, which also says who was refused; a
//! worker's control stream is led to ractor_cluster, a client's requests to the coordinator actor.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use lite_llm_kernels::{DETERMINISM_VERSION, kv::KvDType, math::Math};
use lite_llm_runtime::{
    chat::Conversation,
    checkpoint::{Checkpoint, DATA_ALIGN},
    config::ModelConfig,
    prompt::{PromptError, Prompts},
};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Options},
    frame::{FrameReceiver, FrameSender},
    identity::{ClusterCa, OPERATOR, Role},
    messages::{
        Choosing, ClientReply, ClientRequest, ClusterStatus, DetachedReply, Grammar, JobEvent,
        JobOrder, JobRequest, NodeResidences, NodeView, Prompt, Serving,
    },
    session::Hello,
    token::JoinToken,
};
use ractor::{Actor, ActorRef};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tracing::warn;

use crate::{
    control::ControlPlane,
    coordinator::{
        CLIENT_EVENTS_MAX, Coordinator, CoordinatorArguments, CoordinatorMessage, Submission,
        detached, tokens::Threads,
    },
    ledger::{Jobs, LedgerError, LedgerOptions},
    node::{
        check_math,
        grammars::{FormError, GrammarDesk},
    },
    placement::PlacementPolicy,
    trace::Operation,
};

/// Longest prompt as text, in bytes.
pub const PROMPT_BYTES_MAX: usize = 4 << 20;
/// Prompts that are tokenised at the same time, and that wait for it.
const TOKENISED_MAX: usize = 2;
const TOKENISE_WAITING_MAX: usize = 256;
/// Bytes of those that are longer than [`SHORT_BYTES_MAX`], together. Others keep no short one out.
const TOKENISE_BYTES_MAX: usize = 64 << 20;
const SHORT_BYTES_MAX: usize = 64 << 10;
/// How long a prompt may wait to be tokenised.
const TOKENISE_TIMEOUT: Duration = Duration::from_secs(30);

/// What a coordinator is started with.
pub struct CoordinatorOptions {
    /// Where it listens; port 0 takes any.
    pub listen: SocketAddr,
    /// The cluster's authority.
    pub authority: Arc<ClusterCa>,
    /// The model that it serves.
    pub checkpoint: Arc<Checkpoint>,
    /// Workers that make the cluster whole.
    pub workers: usize,
    /// How experts are spread.
    pub placement: PlacementPolicy,
    /// How all workers keep keys and values: it is part of what fixes a request's bits.
    pub kv_dtype: KvDType,
    /// How all workers compute: part of that, too.
    pub math: Math,
    /// Positions with which all workers serve it; by default the model's own. Also part of that.
    pub context: Option<usize>,
    /// Whether workers are other processes; if not, they are actors of this one.
    pub remote_workers: bool,
    /// Workers that hold each expert.
    pub replicas: u16,
    /// How long jobs wait for a worker when none can serve them.
    pub patience: Duration,
    /// Where detached jobs are kept, if any are taken.
    pub ledger: Option<LedgerOptions>,
    /// The highest priority that a client's jobs may have; whoever has the coordinator's state may ask
    /// for any.
    pub client_priority: i8,
}

/// Why a coordinator did not start, or a request to it failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ServeError(pub String);

/// Why a prompt has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Too many wait already; later it may have them.
    #[error("{0}")]
    Busy(String),
    /// It cannot be used.
    #[error("{0}")]
    Prompt(String),
}

impl From<EncodeError> for ServeError {
    fn from(error: EncodeError) -> Self {
        failed(error)
    }
}

fn failed(error: impl std::fmt::Display) -> ServeError {
    ServeError(error.to_string())
}

/// What the prompts of one request take while they wait to be tokenised, until it is dropped.
pub struct PromptRoom(#[expect(dead_code, reason = "held")] Option<OwnedSemaphorePermit>);

/// A running coordinator.
#[derive(Clone)]
pub struct CoordinatorHandle {
    pub(super) actor: ActorRef<CoordinatorMessage>,
    endpoint: Endpoint,
    token: Arc<JoinToken>,
    control: Option<ControlPlane>,
    pub(super) prompts: Option<Prompts>,
    pub(super) config: Arc<ModelConfig>,
    /// Detached jobs, if they are kept.
    pub(super) jobs: Option<Jobs>,
    /// Where prompts are tokenised; places there, and in the queue for it.
    tokenizers: Threads,
    tokenizing: Arc<Semaphore>,
    queued: Arc<Semaphore>,
    queued_bytes: Arc<Semaphore>,
    address: SocketAddr,
    /// Positions that the largest cache of a node holds.
    kv_tokens: Arc<AtomicU64>,
    grammars: GrammarDesk,
    client_priority: i8,
    math: Math,
}

impl CoordinatorHandle {
    /// Starts a coordinator.
    pub async fn start(mut options: CoordinatorOptions) -> Result<Self, ServeError> {
        let config = options.checkpoint.config().served(options.context).map_err(failed)?;
        let (ledger, client_priority) = (options.ledger.take(), options.client_priority);
        let math = options.math;
        check_math(math, &options.checkpoint).map_err(failed)?;
        let model = detached::model_hash(&options, config.context);
        let CoordinatorOptions { listen, authority, checkpoint, workers, placement, .. } = options;
        // In memory they take whole pages.
        let pages = |bytes: u64| bytes.next_multiple_of(DATA_ALIGN);
        let expert_bytes = checkpoint.tier_expert_bytes().into_iter().map(pages).collect();
        let identity = authority.identity(Role::Coordinator, "coordinator").map_err(failed)?;
        let mut hello = Hello::new(DETERMINISM_VERSION);
        hello.checkpoint = Some(checkpoint.id());
        hello.fast = (math == Math::Fast).then(String::new);
        let endpoint =
            Endpoint::bind_coordinator(listen, &identity, authority.clone(), Options::new(hello))
                .map_err(failed)?;
        let address = endpoint.local_addr().map_err(failed)?;
        let token = authority.join_token(Role::Worker, address.to_string()).map_err(failed)?;
        let token = Arc::new(token);
        let control = match (options.remote_workers, identity.control_cookie()) {
            (true, Some(cookie)) => {
                Some(ControlPlane::start(&identity, &cookie).await.map_err(failed)?)
            }
            (true, None) => return Err(failed("the authority has no secret of the control plane")),
            (false, _) => None,
        };
        let prompts = match Prompts::of(&checkpoint) {
            Ok(prompts) => Some(prompts.serving(config.context)),
            Err(PromptError::Checkpoint(error)) => {
                warn!(%error, "serving token ids only");
                None
            }
            Err(error) => return Err(failed(error)),
        };
        let cluster = scope(&token);
        let kv_tokens = Arc::new(AtomicU64::new(0));
        let grammars = GrammarDesk::default();
        grammars.show(&checkpoint);
        let arguments = CoordinatorArguments {
            cluster,
            checkpoint,
            tokenizer: prompts.as_ref().map(|prompts| Arc::new(prompts.tokenizer().clone())),
            expert_bytes,
            workers,
            replicas: options.replicas,
            placement,
            kv_dtype: options.kv_dtype,
            config: config.clone(),
            patience: options.patience,
            kv_tokens: kv_tokens.clone(),
            control: control.clone(),
        };
        let (actor, _) = Actor::spawn(None, Coordinator, arguments).await.map_err(failed)?;
        let tokenizers = Threads::start(TOKENISED_MAX).map_err(failed)?;
        let tokenizing = Arc::new(Semaphore::new(TOKENISED_MAX));
        let queued = Arc::new(Semaphore::new(TOKENISE_WAITING_MAX));
        let queued_bytes = Arc::new(Semaphore::new(TOKENISE_BYTES_MAX));
        let (config, jobs) = (Arc::new(config), None);
        let mut handle = Self {
            actor,
            endpoint,
            token,
            control,
            prompts,
            config,
            jobs,
            tokenizers,
            tokenizing,
            queued,
            queued_bytes,
            address,
            kv_tokens,
            grammars,
            client_priority,
            math,
        };
        if let Some(ledger) = ledger {
            handle.open_ledger(ledger, model).await?;
        }
        tokio::spawn(handle.clone().accept());
        tokio::spawn(handle.clone().pass_revoked_on());
        Ok(handle)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What workers need to come in.
    pub fn token(&self) -> &JoinToken {
        &self.token
    }

    /// Waits until the cluster can serve, or says why it never will.
    pub async fn ready(&self) -> Result<(), ServeError> {
        ractor::call!(self.actor, CoordinatorMessage::WaitReady)
            .map_err(failed)?
            .map_err(ServeError)
    }

    /// Submits a job. Returns its number and its events; dropping them cancels it.
    pub async fn submit(
        &self,
        request: JobRequest,
    ) -> Result<(u64, mpsc::Receiver<JobEvent>), ServeError> {
        self.submit_order(request, Choosing::default(), Serving::default()).await
    }

    /// The same, with all that can be asked of the choice of its tokens and of those that schedule it.
    pub async fn submit_order(
        &self,
        request: JobRequest,
        choosing: Choosing,
        serving: Serving,
    ) -> Result<(u64, mpsc::Receiver<JobEvent>), ServeError> {
        let order = JobOrder { choosing, serving, ..request.into() };
        self.submit_for(None, Some(Operation::TextCompletion), order).await
    }

    /// The same, for whoever says in a span of its own what is asked: see [`trace::describe`].
    ///
    /// [`trace::describe`]: crate::trace::describe
    pub async fn submit_described(
        &self,
        request: JobRequest,
        choosing: Choosing,
        serving: Serving,
    ) -> Result<(u64, mpsc::Receiver<JobEvent>), ServeError> {
        self.submit_for(None, None, JobOrder { choosing, serving, ..request.into() }).await
    }

    /// What turns text into tokens and back, if the model has a tokenizer.
    pub fn prompts(&self) -> Option<&Prompts> {
        self.prompts.as_ref()
    }

    /// The same for a client, of a job that may have been begun.
    async fn submit_for(
        &self,
        client: Option<String>,
        operation: Option<Operation>,
        order: JobOrder,
    ) -> Result<(u64, mpsc::Receiver<JobEvent>), ServeError> {
        let JobOrder { mut request, choosing, mut serving, generated, .. } = order;
        if let Some(client) = &client {
            self.check_priority(client, serving.priority).map_err(ServeError)?;
            serving.tenant.clone_from(client);
        }
        request.prompt = match request.prompt {
            Prompt::Tokens(ids) => Prompt::Tokens(ids),
            text => Prompt::Tokens(self.encode(text).await?),
        };
        let (events, receiver) = mpsc::channel(CLIENT_EVENTS_MAX);
        let patience = None;
        let submission = Box::new(Submission {
            request,
            choosing,
            serving,
            generated,
            client,
            operation,
            patience,
            events,
        });
        let submit = |reply| CoordinatorMessage::Submit(submission, reply);
        let job = ractor::call!(self.actor, submit).map_err(failed)?.map_err(failed)?;
        Ok((job, receiver))
    }

    /// Whether a client may ask for this priority.
    pub(super) fn check_priority(&self, client: &str, found: i8) -> Result<(), String> {
        let most = self.client_priority;
        if found <= most || client == OPERATOR {
            return Ok(());
        }
        Err(format!(
            "priority is {found}; clients of this coordinator may ask for {most} at most: ask for \
             less, or start it with --client-priority {found}"
        ))
    }

    /// The tokens of a prompt; not on the actor's task, for a long text takes its time.
    pub async fn encode(&self, prompt: Prompt) -> Result<Vec<u32>, EncodeError> {
        let room = self.room_for(prompt.text_bytes())?;
        self.encode_in(&room, prompt).await
    }

    /// The same, where there is room for it already.
    pub async fn encode_in(
        &self,
        _room: &PromptRoom,
        prompt: Prompt,
    ) -> Result<Vec<u32>, EncodeError> {
        let (text, chat) = match prompt {
            Prompt::Tokens(ids) => return Ok(ids),
            Prompt::Text(text) => (text, false),
            Prompt::Chat(json) => (json, true),
        };
        if text.len() > PROMPT_BYTES_MAX {
            let found = text.len();
            return Err(EncodeError::Prompt(format!(
                "the prompt has {found} bytes; at most {PROMPT_BYTES_MAX} are taken"
            )));
        }
        let Some(prompts) = self.prompts.clone() else {
            return Err(EncodeError::Prompt("the model has no tokenizer; send token ids".into()));
        };
        let busy = || {
            EncodeError::Busy(format!(
                "{TOKENISE_WAITING_MAX} prompts wait to be tokenised already; try again later"
            ))
        };
        let queued = self.queued.clone().try_acquire_owned().map_err(|_| busy())?;
        let place = timeout(TOKENISE_TIMEOUT, self.tokenizing.clone().acquire_owned()).await;
        let place = place.map_err(|_| busy())?.map_err(|_| busy())?;
        let encode = move || {
            // Until it is done, also if nobody waits for it any more.
            let _permits = (queued, place);
            match chat {
                true => prompts.encode_chat(&Conversation::from_json(&text)?),
                false => prompts.encode(&text),
            }
        };
        let encoded = self.tokenizers.run(encode).await;
        let gave_up = || EncodeError::Prompt("the tokenizer gave up on the prompt".into());
        let encoded = encoded.ok_or_else(gave_up)?;
        encoded.map_err(|error: PromptError| EncodeError::Prompt(error.to_string()))
    }

    /// Room for so many bytes of a request's prompts, which wait to be tokenised.
    pub fn room_for(&self, bytes: usize) -> Result<PromptRoom, EncodeError> {
        if bytes <= SHORT_BYTES_MAX {
            return Ok(PromptRoom(None));
        }
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let room = self.queued_bytes.clone().try_acquire_many_owned(bytes);
        room.map(|room| PromptRoom(Some(room))).map_err(|_| {
            EncodeError::Busy(format!(
                "prompts of nearly {TOKENISE_BYTES_MAX} bytes wait to be tokenised already; try again \
                 later"
            ))
        })
    }

    /// Positions that prompt and answer of a job can have: those of the model, as far as the cache of
    /// some node holds them.
    pub fn positions_max(&self) -> usize {
        let context = self.config.context;
        match self.kv_tokens.load(Relaxed) {
            0 => context,
            held => context.min(usize::try_from(held).unwrap_or(usize::MAX)),
        }
    }

    /// Reads the form of an answer, so that one that cannot be used is known before its job begins.
    pub async fn check_grammar(&self, grammar: &Grammar) -> Result<(), FormError> {
        self.grammars.check(grammar).await
    }

    /// Ends a job.
    pub fn cancel(&self, job: u64) {
        // A coordinator that is gone has no jobs.
        let _ = self.actor.cast(CoordinatorMessage::Cancel { job, client: None });
    }

    /// How the cluster is.
    pub async fn status(&self) -> Result<ClusterStatus, ServeError> {
        let status = ractor::call!(self.actor, CoordinatorMessage::Describe).map_err(failed)?;
        Ok(match self.math {
            Math::Exact => status,
            Math::Fast => {
                ClusterStatus { model: format!("{} (--math fast)", status.model), ..status }
            }
        })
    }

    /// Where the experts of its nodes are.
    pub async fn residences(&self) -> Result<Vec<NodeResidences>, ServeError> {
        ractor::call!(self.actor, CoordinatorMessage::Residences).map_err(failed)
    }

    /// What its nodes show of their experts and links.
    pub async fn views(&self) -> Result<Vec<NodeView>, ServeError> {
        ractor::call!(self.actor, CoordinatorMessage::View).map_err(failed)
    }

    /// Moves a worker's work and experts away, and lets it go when that is done.
    pub async fn drain(&self, name: String) -> Result<(), ServeError> {
        ractor::call!(self.actor, |reply| CoordinatorMessage::Drain(name, reply))
            .map_err(failed)?
            .map_err(ServeError)
    }

    /// Ends it: workers and clients are told.
    pub async fn stop(self) {
        if let Some(jobs) = &self.jobs {
            jobs.stop().await;
        }
        let _ = self.actor.stop_and_wait(None, None).await;
        if let Some(control) = &self.control {
            control.stop();
        }
        self.endpoint.close("the coordinator stops").await;
    }

    async fn accept(self) {
        while let Some(connection) = self.endpoint.accept().await {
            match connection.peer().role {
                Role::Worker => tokio::spawn(self.clone().serve_worker(connection)),
                Role::Client => tokio::spawn(self.clone().serve_client(connection)),
                // The certificate authority issues no second coordinator to others.
                Role::Coordinator => continue,
            };
        }
    }

    /// Brings the list of revoked names to the workers whenever it changes.
    async fn pass_revoked_on(self) {
        let mut revoked = self.endpoint.watch_revoked();
        loop {
            let names = revoked.borrow_and_update().clone();
            if self.actor.cast(CoordinatorMessage::Revoked(names)).is_err()
                || revoked.changed().await.is_err()
            {
                return;
            }
        }
    }

    async fn serve_worker(self, connection: Connection) {
        // A coordinator that is gone needs no news, here and below.
        let _ = self.actor.cast(CoordinatorMessage::Connected(connection.clone()));
        while let Some(stream) = connection.accept_stream().await {
            if let (StreamKind::Control, Some(control)) = (stream.kind, &self.control) {
                control.connect(&connection.peer().to_string(), stream.into_raw(), true);
            }
        }
        let reason = connection.closed().await.reason;
        let _ = self.actor.cast(CoordinatorMessage::Disconnected(connection, reason));
    }

    async fn serve_client(self, connection: Connection) {
        while let Some(stream) = connection.accept_stream().await {
            if stream.kind == StreamKind::Client {
                let (sender, receiver) = stream.into_frames();
                let client = connection.peer().name.clone();
                tokio::spawn(self.clone().serve_request(client, sender, receiver));
            }
        }
    }

    /// Answers the requests of one stream, one after the other.
    async fn serve_request(
        self,
        client: String,
        mut sender: FrameSender,
        mut receiver: FrameReceiver,
    ) {
        while let Ok(Some(frame)) = receiver.recv().await {
            let answered = match frame.decode::<ClientRequest>() {
                Ok(ClientRequest::Status) => {
                    let reply = match self.status().await {
                        Ok(status) => ClientReply::Status(status),
                        Err(error) => ClientReply::Refused { reason: error.to_string() },
                    };
                    sender.send_message(&reply).await
                }
                Ok(ClientRequest::Residences) => {
                    let reply = match self.residences().await {
                        Ok(residences) => ClientReply::Residences(residences),
                        Err(error) => ClientReply::Refused { reason: error.to_string() },
                    };
                    sender.send_message(&reply).await
                }
                Ok(ClientRequest::Cancel(job)) => {
                    let client = Some(client.clone());
                    let _ = self.actor.cast(CoordinatorMessage::Cancel { job, client });
                    Ok(())
                }
                Ok(ClientRequest::Order(order)) => {
                    self.run_job(&client, *order, (&mut sender, &mut receiver)).await
                }
                Ok(ClientRequest::Drain(_)) if client != OPERATOR => {
                    let reason = "only whoever has the coordinator's state folder drains workers";
                    sender.send_message(&ClientReply::Refused { reason: reason.into() }).await
                }
                Ok(ClientRequest::Drain(name)) => {
                    let reply = match self.drain(name).await {
                        Ok(()) => ClientReply::Noted,
                        Err(error) => ClientReply::Refused { reason: error.to_string() },
                    };
                    sender.send_message(&reply).await
                }
                Ok(ClientRequest::Detached(request)) => {
                    let reply = match self.answer_detached(&client, request).await {
                        Ok(reply) => ClientReply::Detached(reply),
                        // Its connection ends, too; it asks the next coordinator.
                        Err(LedgerError::Stopping) => return,
                        // An earlier question of the same key may be under way.
                        Err(LedgerError::Unknown(reason) | LedgerError::Busy(reason)) => {
                            ClientReply::Detached(DetachedReply::Unknown(reason))
                        }
                        Err(error) => ClientReply::Refused { reason: error.to_string() },
                    };
                    sender.send_message(&reply).await
                }
                Err(error) => {
                    sender.send_message(&ClientReply::Refused { reason: error.to_string() }).await
                }
            };
            if answered.is_err() {
                return;
            }
        }
    }

    async fn run_job(
        &self,
        client: &str,
        order: JobOrder,
        (sender, receiver): (&mut FrameSender, &mut FrameReceiver),
    ) -> Result<(), lite_llm_transport::frame::SendError> {
        let operation = match &order.request.prompt {
            Prompt::Chat(_) => Operation::Chat,
            Prompt::Text(_) | Prompt::Tokens(_) => Operation::TextCompletion,
        };
        let submitted = self.submit_for(Some(client.to_owned()), Some(operation), order).await;
        let (job, mut events) = match submitted {
            Ok(accepted) => accepted,
            Err(error) => {
                return sender
                    .send_message(&ClientReply::Refused { reason: error.to_string() })
                    .await;
            }
        };
        sender.send_message(&ClientReply::Accepted { job }).await?;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => sender.send_message(&ClientReply::Event(event)).await?,
                    None => return Ok(()),
                },
                // Whoever waits for a job says nothing on its stream but that it is to end.
                wish = receiver.recv() => {
                    self.cancel(job);
                    if !matches!(wish, Ok(Some(_))) {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// The scope of a cluster's process groups: the same wherever a member reaches it from, another
/// for every cluster.
pub(crate) fn scope(token: &JoinToken) -> String {
    format!("lite-llm {}", token.cluster())
}
