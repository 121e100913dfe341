//! The HTTP API of a coordinator: what OpenAI's clients speak, beside the process's own `submit`.
//!
//! It stands in this crate because it is a way into the process, as the command line is: it decides
//! nothing about models or clusters. A request becomes jobs of the coordinator in the same process;
//! their events become its answer.
//!
//! Invariants: connections, the bytes of bodies, jobs and their tokens are bounded, and what is beyond
//! is refused with a status that says so; every wait has a deadline; whoever closes a connection, or
//! does not read from it, ends its jobs; other origins' pages get nothing (no CORS).

mod admission;
mod ask;
mod batches;
mod body;
mod calls;
mod chat;
mod choice;
mod error;
mod experts;
mod files;
mod form;
mod generate;
mod health;
mod metrics;
mod page;
mod place;
mod play;
mod prompts;
mod responses;
mod show;
mod stall;
mod store;
mod tls;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, MatchedPath, Path, Request, State},
    http::{HeaderMap, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use lite_llm_actors::coordinator::CoordinatorHandle;
use lite_llm_kernels::{DETERMINISM_VERSION, kv::KvDType, math::Math};
use lite_llm_runtime::config::ModelConfig;
use lite_llm_transport::keys::{KeyError, Keys};
use parking_lot::Mutex;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

pub(crate) use self::tls::acceptor;
use self::{
    admission::{Admission, KeyLimits, Limits},
    body::Bodies,
    error::ApiError,
    health::{Readiness, describe},
    metrics::Metrics,
    place::Requests,
    stall::Stalling,
    store::Files,
};
use crate::{commands::unix_time, otlp::Reports, telemetry};

/// Connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 1024;
/// How long the head of a request may take to arrive, and a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// The same for connections that come while half of all places are taken.
const CROWDED_HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may read nothing while there is something for it.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Bytes that wait for one client to read, and of the head of a request.
const BUFFER_BYTES: usize = 64 << 10;
/// Pause after a connection that could not be accepted: most often there are too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long answers may take to end when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_millis(300);
/// Jobs that run or wait for all clients together.
const JOBS_MAX: usize = 512;
/// Their tokens, in contexts of the model.
const CONTEXTS_MAX: u64 = 128;

/// What can be asked, for programs: see the tests of `ask`, which hold it to what is taken.
const OPENAPI: &str = include_str!("openapi.json");

/// What an API is started with.
pub(crate) struct HttpOptions {
    /// Where it listens; port 0 takes any.
    pub(crate) listen: SocketAddr,
    /// What clients call the model.
    pub(crate) model: String,
    /// Names all that fixes an answer's bits beside its request: see [`fingerprint`].
    pub(crate) fingerprint: String,
    /// What the model is, with the context that it is served with.
    pub(crate) config: ModelConfig,
    /// Who runs the jobs.
    pub(crate) coordinator: CoordinatorHandle,
    /// Who may ask, as soon as there is a key; without, all who reach it.
    pub(crate) keys: Option<Arc<Keys>>,
    /// Where files of batches are kept, and for how long; nowhere, if the process keeps no ledger.
    pub(crate) files: Option<(PathBuf, Duration)>,
    /// Bytes of an expert, by tier.
    pub(crate) expert_bytes: Vec<u64>,
    /// Connections are TLS.
    pub(crate) tls: Option<TlsAcceptor>,
}

/// What answers are known by: requests that are equal in all, seeds included, have answers of equal
/// bits where this is equal. It covers the model's files, the format of keys and values, the context,
/// how products are computed, and the determinism contract.
pub(crate) fn fingerprint(
    checkpoint: &[u8; 32],
    (kv_dtype, math): (KvDType, Math),
    context: usize,
) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(checkpoint).update(kv_dtype.name().as_bytes());
    hasher.update(&(context as u64).to_le_bytes()).update(&DETERMINISM_VERSION.to_le_bytes());
    if math == Math::Fast {
        hasher.update(b" fast");
    }
    format!("fp_{}", &hasher.finalize().to_hex()[..12])
}

/// A running API.
pub(crate) struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    exporter: Option<Exporter>,
}

/// What sends metrics to an OTLP receiver. Dropped, it ends.
pub(crate) struct Exporter(JoinHandle<()>);

impl Drop for Exporter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Exporter {
    /// For a coordinator without an API, of which nothing is counted here.
    pub(crate) fn start(coordinator: &CoordinatorHandle) -> Result<Option<Self>> {
        Ok(Self::of(coordinator.clone(), Metrics::new()?))
    }

    /// Nothing, if the process was started without a receiver.
    fn of(coordinator: CoordinatorHandle, metrics: Metrics) -> Option<Self> {
        let to = telemetry::receiver()?;
        let gather = move || {
            let (coordinator, metrics) = (coordinator.clone(), metrics.clone());
            async move {
                let said = describe(&coordinator).await;
                let (status, residences) = said.map_err(|e| anyhow::anyhow!("{}", e.json()))?;
                metrics.families(&status, &residences)
            }
        };
        let reports = Reports::new(to)?;
        Some(Self(tokio::spawn(async move { reports.export(gather).await })))
    }
}

impl Server {
    /// Starts it. An error if the address cannot be had.
    pub(crate) async fn start(mut options: HttpOptions) -> Result<Self> {
        let (listen, tls) = (options.listen, options.tls.take());
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("--http {listen}: the address cannot be had"))?;
        let address = listener.local_addr()?;
        let (stop, stopping) = watch::channel(false);
        let api = Api::new(options)?;
        let exporter = Exporter::of(api.coordinator.clone(), api.metrics.clone());
        let task = tokio::spawn(accept(listener, tls, router(api), stopping));
        Ok(Self { address, stop, task, exporter })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it. Answers that flow end early, and their connections with them.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        drop(self.exporter);
        // A task that panicked has ended, too.
        let _ = self.task.await;
    }
}

/// What all requests share.
struct Api {
    name: String,
    created: i64,
    fingerprint: String,
    config: ModelConfig,
    coordinator: CoordinatorHandle,
    keys: Option<Arc<Keys>>,
    /// Listens beyond loopback: there is no asking without a key, not even when the last is gone.
    is_open: bool,
    bodies: Bodies,
    admission: Mutex<Admission>,
    metrics: Metrics,
    readiness: Readiness,
    requests: Mutex<Requests>,
    files: Option<Files>,
    /// Batches that are made.
    making: Semaphore,
    /// Of files of batches.
    sizes: Mutex<batches::Sizes>,
    expert_bytes: Vec<u64>,
    watched: experts::Watched,
}

impl Api {
    fn new(options: HttpOptions) -> Result<Arc<Self>> {
        let HttpOptions {
            listen,
            model,
            fingerprint,
            config,
            coordinator,
            keys,
            files,
            expert_bytes,
            ..
        } = options;
        let files = files.map(|(folder, keep)| Files::open(folder, keep)).transpose()?;
        let tokens = CONTEXTS_MAX * config.context as u64;
        Ok(Arc::new(Self {
            name: model,
            created: unix_time(),
            fingerprint,
            config,
            coordinator,
            keys,
            is_open: !listen.ip().is_loopback(),
            bodies: Bodies::new(),
            admission: Mutex::new(Admission::new(Limits { jobs: JOBS_MAX, tokens })),
            metrics: Metrics::new()?,
            readiness: Readiness::default(),
            requests: Mutex::default(),
            files,
            making: Semaphore::new(batches::MAKING_MAX),
            sizes: Mutex::default(),
            expert_bytes,
            watched: experts::Watched::default(),
        }))
    }
}

/// Who asks, and what it may.
#[derive(Debug, Clone, Default)]
struct Caller {
    key: Option<(String, KeyLimits)>,
}

impl Caller {
    /// Whose its jobs are among tenants; without a key nobody's. No certificate has such a name.
    fn tenant(&self) -> String {
        self.key.as_ref().map_or_else(String::new, |(name, _)| format!("key:{name}"))
    }

    /// Under which name its files and batches are kept. No certificate has such a name.
    fn owner(&self) -> String {
        format!("key:{}", self.key.as_ref().map_or("", |(name, _)| name))
    }
}

fn router(api: Arc<Api>) -> Router {
    let guarded = middleware::from_fn_with_state(api.clone(), guard);
    let counted = middleware::from_fn_with_state(api.clone(), count);
    Router::new()
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/files", get(files::list).post(files::upload))
        .route("/v1/files/{file}", get(files::retrieve).delete(files::delete))
        .route("/v1/files/{file}/content", get(files::content))
        .route("/v1/batches", get(batches::list).post(batches::create))
        .route("/v1/batches/{batch}", get(batches::retrieve))
        .route("/v1/batches/{batch}/cancel", post(batches::cancel))
        .route("/metrics", get(health::metrics))
        .route("/cluster", get(page::cluster))
        .route("/cluster/experts", get(experts::experts))
        .route("/playground", post(play::play))
        .route_layer(guarded)
        // The page asks for a key by itself; whoever looks after the process needs none.
        .route("/", get(page::page))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route(
            "/openapi.json",
            get(async || ([(header::CONTENT_TYPE, "application/json")], OPENAPI)),
        )
        .route_layer(counted)
        .fallback(async |uri: Uri| {
            let path: String = uri.path().chars().take(200).collect();
            ApiError::not_found(format!("there is nothing at {path:?}"))
        })
        .method_not_allowed_fallback(async || ApiError::method())
        .layer(middleware::map_response(error::shaped))
        // Bodies have a limit of our own, which says what it is.
        .layer(DefaultBodyLimit::disable())
        .with_state(api)
}

/// Counts answers by the route, never by the path that was asked for.
async fn count(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    api.metrics.answered(route, response.status().as_u16());
    response
}

/// Lets in who may ask.
async fn guard(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let caller = match api.caller(request.headers()) {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    request.extensions_mut().insert(caller);
    next.run(request).await
}

impl Api {
    /// Who sends these headers, if it may ask.
    fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let unreadable = |error: KeyError| {
            warn!(%error, "the keys cannot be read");
            ApiError::unavailable("the keys cannot be read; the server's log says why")
        };
        let keys = match &self.keys {
            Some(keys) if self.is_open || !keys.is_empty().map_err(unreadable)? => keys,
            _ => {
                // A page of the web whose name was bent to this machine shows here: browsers send
                // the name.
                let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
                if !host.is_none_or(is_local) {
                    let message =
                        "without keys, this server answers to localhost and to addresses only";
                    return Err(ApiError::forbidden(message));
                }
                return Ok(Caller::default());
            }
        };
        let given = headers.get(header::AUTHORIZATION).and_then(|given| given.to_str().ok());
        let given = given.and_then(|given| given.split_once(' '));
        let Some((_, text)) = given.filter(|(how, _)| how.eq_ignore_ascii_case("bearer")) else {
            let message =
                "a key is expected: Authorization: Bearer KEY; `lite-llm key add` makes one";
            return Err(ApiError::unauthorized(message));
        };
        let found = keys.find(text.trim()).map_err(unreadable)?;
        let key =
            found.ok_or_else(|| ApiError::unauthorized("the key is not known, or no more"))?;
        let limits = KeyLimits {
            jobs: key.jobs,
            tokens_per_minute: key.tokens_per_minute,
            priority: key.priority,
        };
        Ok(Caller { key: Some((key.name, limits)) })
    }
}

/// Whether a `Host` names this machine as its own users do, or is an address.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || bare.parse::<std::net::IpAddr>().is_ok()
}

fn card(api: &Api) -> serde_json::Value {
    json!({
        "id": api.name,
        "object": "model",
        "created": api.created,
        "owned_by": "lite-llm",
        "max_model_len": api.config.context,
    })
}

async fn models(State(api): State<Arc<Api>>) -> Json<serde_json::Value> {
    Json(json!({ "object": "list", "data": [card(&api)] }))
}

async fn model(
    State(api): State<Arc<Api>>,
    Path(asked): Path<String>,
) -> Result<Json<serde_json::Value>, ApiError> {
    match asked == api.name {
        true => Ok(Json(card(&api))),
        false => Err(ApiError::no_model(&asked, &api.name)),
    }
}

/// Accepts connections until the server stops.
async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    app: Router,
    mut stopping: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut open = JoinSet::new();
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        while open.try_join_next().is_some() {}
        match (place, accepted) {
            (Ok(place), Ok((stream, _))) => {
                let (tls, app) = (tls.clone(), app.clone());
                let crowded = places.available_permits() < CONNECTIONS_MAX / 2;
                let head = if crowded { CROWDED_HEAD_TIMEOUT } else { HEAD_TIMEOUT };
                open.spawn(take_in(stream, tls, app, head, stopping.clone(), place));
            }
            (_, Err(error)) => {
                warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
            // Nobody closes the semaphore.
            (Err(_), Ok(_)) => break,
        }
    }
    drop(listener);
    let ended = async { while open.join_next().await.is_some() {} };
    if timeout(STOP_TIMEOUT, ended).await.is_err() {
        open.shutdown().await;
    }
}

/// Serves one connection, over TLS if that is wanted.
async fn take_in(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    app: Router,
    head: Duration,
    stopping: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    // Tokens are small and are to arrive one by one.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "a connection was gone at once");
        return;
    }
    let stream = Stalling::new(stream, STALL_MAX);
    let Some(tls) = tls else { return serve(stream, app, head, stopping).await };
    match timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => serve(stream, app, head, stopping).await,
        Ok(Err(error)) => debug!(%error, "a connection was no TLS"),
        Err(_) => debug!("a TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}"),
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    app: Router,
    head: Duration,
    mut stopping: watch::Receiver<bool>,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let told = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let ended = match told {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_machines_are_not_ours() {
        for ours in ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]:80", "10.0.0.1"] {
            assert!(is_local(ours), "{ours}");
        }
        for other in ["evil.example", "evil.example:8080", "localhost.evil.example", "", "a:b"] {
            assert!(!is_local(other), "{other}");
        }
    }
}
