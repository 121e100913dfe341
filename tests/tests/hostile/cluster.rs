//! A cluster of processes of its own: this test's executable, started again in other roles. What
//! panics in them, what they hang in and what memory they take is theirs, and is seen.

use std::{
    fs::{self, File},
    io::Read,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lite_llm_actors::{
    coordinator::{CoordinatorHandle, CoordinatorOptions},
    node::Model,
    placement::PlacementPolicy,
    worker::{Worker, WorkerOptions},
};
use lite_llm_kernels::{DETERMINISM_VERSION, cpu::Cpu, kv::KvDType, simd::Simd};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    sequence::Request,
};
use lite_llm_tests::tiny::{KV_BYTES, TinyModel};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    frame::{FrameReceiver, FrameSender},
    identity::{ClusterCa, Role},
    join::join,
    messages::{
        ClientReply, ClientRequest, ClusterStatus, JobEvent, JobEventBody, JobRequest, Prompt,
    },
    session::Hello,
    token::JoinToken,
};

/// How long anything may take. The machine may be busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Most memory that a process may ever have taken; with this model it takes a twentieth.
const PEAK_BYTES_MAX: u64 = 1 << 30;
/// The honest worker. Its name is not the first, so that it is not the first to be given a job.
pub(crate) const HONEST: &str = "honest";

const ROLE: &str = "LITE_LLM_HOSTILE_ROLE";
const FOLDER: &str = "LITE_LLM_HOSTILE_FOLDER";
const COORDINATOR: &str = "coordinator";

/// Waits, but not for ever.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing happened for {PATIENCE:?}"),
    }
}

pub(crate) fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub(crate) fn hello() -> Hello {
    Hello::new(DETERMINISM_VERSION)
}

/// The tiny model of these tests in this process.
static TINY: LazyLock<TinyModel> = LazyLock::new(TinyModel::load);

/// The same model's checkpoint in a folder.
fn checkpoint(folder: &Path) {
    let (source, out) = (folder.join("hf"), folder.join("model"));
    let shape = RandomShape { layers: 2, ..RandomShape::tiny(RandomClass::Olmoe) };
    write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
    import(&ImportOptions::new(source, &*out), &mut |_, _, _| {}).unwrap();
}

/// What a process of a cluster does, if this is one.
pub(crate) fn play_a_role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let folder = std::path::PathBuf::from(std::env::var_os(FOLDER).expect("a folder"));
    // It ends with the test that started it, however that ends.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().unwrap().block_on(async {
        match role.split_once(' ') {
            Some((COORDINATOR, replicas)) => coordinate(&folder, replicas.parse().unwrap()).await,
            _ => {
                let error = work(&folder, &role).await;
                eprintln!("the worker ended: {error}");
            }
        }
    });
}

async fn coordinate(folder: &Path, replicas: u16) {
    let authority = Arc::new(ClusterCa::ephemeral().unwrap());
    let handle = CoordinatorHandle::start(CoordinatorOptions {
        listen: loopback(),
        authority: authority.clone(),
        checkpoint: Arc::new(Checkpoint::open(folder.join("model")).unwrap()),
        workers: 1,
        placement: PlacementPolicy::Balanced,
        kv_dtype: KvDType::F32,
        math: lite_llm_kernels::math::Math::Exact,
        context: None,
        remote_workers: true,
        replicas,
        patience: PATIENCE,
        ledger: None,
        client_priority: 0,
    });
    let handle = handle.await.unwrap();
    for role in [Role::Worker, Role::Client] {
        let token = authority.join_token(role, handle.address().to_string()).unwrap();
        let (whole, part) = (token_file(folder, role), folder.join("token"));
        token.write(&part).unwrap();
        fs::rename(part, whole).unwrap();
    }
    std::future::pending().await
}

async fn work(folder: &Path, name: &str) -> String {
    let token = JoinToken::read(&token_file(folder, Role::Worker)).unwrap();
    let worker = Worker::start(WorkerOptions {
        coordinator: token.address().parse().unwrap(),
        token,
        name: name.to_owned(),
        listen: loopback(),
        device: Arc::new(Cpu::new(1, Simd::best())).into(),
        dram_bytes: 1 << 30,
        dram_holds_rest: false,
        nvme: None,
        kv_bytes: KV_BYTES,
        model: Model::AsAssigned,
        remote: true,
        patience: PATIENCE,
    });
    worker.await.unwrap().run().await.to_string()
}

fn token_file(folder: &Path, role: Role) -> std::path::PathBuf {
    folder.join(format!("{role}.token"))
}

/// One cluster at a time: they share two cores.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A coordinator and an honest worker, each a process.
pub(crate) struct Cluster {
    folder: tempfile::TempDir,
    processes: Vec<(String, Child)>,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    /// A cluster that is to have so many copies of each expert.
    pub(crate) async fn start(replicas: u16) -> Self {
        let alone = alone();
        let folder = tempfile::tempdir().unwrap();
        checkpoint(folder.path());
        let mut cluster = Self { folder, processes: Vec::new(), _alone: alone };
        cluster.begin(COORDINATOR, &format!("{COORDINATOR} {replicas}"));
        let client = token_file(cluster.folder.path(), Role::Client);
        cluster.wait("the coordinator starts", || client.exists()).await;
        cluster.begin(HONEST, HONEST);
        let honest = cluster.client("observer").await;
        let ready = async {
            while !honest.status().await.nodes.iter().any(|node| node.state == "ready") {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        soon("the honest worker loads its experts", ready).await;
        cluster
    }

    fn begin(&mut self, name: &str, role: &str) {
        let log = |kind: &str| File::create(self.folder.path().join(format!("{name}.{kind}")));
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["a_process_of_a_cluster", "--exact", "--nocapture"])
            .env(ROLE, role)
            .env(FOLDER, self.folder.path())
            .stdin(Stdio::piped())
            .stdout(log("out").unwrap())
            .stderr(log("err").unwrap())
            .spawn()
            .unwrap();
        self.processes.push((name.to_owned(), process));
    }

    async fn wait(&mut self, what: &str, done: impl Fn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done() {
            let log = fs::read_to_string(self.folder.path().join(format!("{COORDINATOR}.err")));
            assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}: {log:?}");
            let ended = self.processes.iter_mut().find_map(|(_, it)| it.try_wait().unwrap());
            assert!(ended.is_none(), "{what}: a process ended ({ended:?}): {log:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn token(&self, role: Role) -> JoinToken {
        JoinToken::read(&token_file(self.folder.path(), role)).unwrap()
    }

    /// A client with a name of its own, as any user's.
    pub(crate) async fn client(&self, name: &str) -> Client {
        let token = self.token(Role::Client);
        let address = token.address().parse().unwrap();
        let identity =
            soon("join", join(address, &token, Role::Client, name, &hello())).await.unwrap();
        let endpoint = Endpoint::outgoing(address, &identity, Options::new(hello())).unwrap();
        let expect = Expect::coordinator();
        let connecting = endpoint.connect(address, &expect);
        let connection = soon("connect", connecting).await.unwrap();
        Client { _endpoint: endpoint, connection }
    }

    /// The honest processes live, none of their threads and tasks has panicked, and they never took
    /// more memory than so small a model gives them reason to.
    #[track_caller]
    pub(crate) fn is_unharmed(&mut self, after: &str) {
        for (name, process) in &mut self.processes {
            let log = fs::read_to_string(self.folder.path().join(format!("{name}.err"))).unwrap();
            assert!(!log.contains("panicked at"), "{name} panicked after {after}:\n{log}");
            let ended = process.try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended after {after} ({ended:?}):\n{log}");
            let peak = peak_bytes(process.id());
            assert!(peak < PEAK_BYTES_MAX, "{name} took {peak} bytes at its peak, after {after}");
        }
    }

    /// The same, and a job of an honest client gets the tokens that it gets alone.
    pub(crate) async fn serves(&mut self, after: &str) {
        let honest = self.client("somebody").await;
        let job = HonestJob::new(after.len() as u32);
        assert_eq!(job.run(&honest).await, Ok(job.alone()), "after {after}");
        self.is_unharmed(after);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, process) in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// The most memory that a process ever had.
fn peak_bytes(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// A job whose tokens are known.
#[derive(Clone)]
pub(crate) struct HonestJob {
    prompt: Vec<u32>,
    tokens: u32,
}

impl HonestJob {
    pub(crate) fn new(n: u32) -> Self {
        Self { prompt: (0..5 + n % 7).map(|i| (i * 31 + n * 7) % 256).collect(), tokens: 6 }
    }

    /// One whose prompt is so long that its batches have many rows.
    pub(crate) fn long() -> Self {
        Self { prompt: (0..400).map(|i| (i * 37) % 256).collect(), tokens: 3 }
    }

    pub(crate) fn request(&self) -> JobRequest {
        JobRequest::greedy(Prompt::Tokens(self.prompt.clone()), self.tokens)
    }

    /// What it generates by itself.
    pub(crate) fn alone(&self) -> Vec<u32> {
        TINY.alone(&Request::greedy(self.prompt.clone(), self.tokens as usize))
    }

    /// What it generates in a cluster. Nothing comes that was not asked for.
    pub(crate) async fn run(&self, client: &Client) -> Result<Vec<u32>, String> {
        let (mut stream, job) = client.submit(self.request()).await?;
        let mut tokens = Vec::new();
        loop {
            let event = stream.event().await;
            assert_eq!(event.job, job, "an event of another job");
            match event.body {
                JobEventBody::Token { index, id, .. } => {
                    assert_eq!(index as usize, tokens.len(), "a token twice, or one is missing");
                    tokens.push(id);
                }
                // Characters that random tokens leave open.
                JobEventBody::Text(text) if text.len() <= 64 => {}
                JobEventBody::Progress { .. } => {}
                JobEventBody::Done { .. } => return Ok(tokens),
                JobEventBody::Failed { reason } => return Err(reason),
                other => panic!("nobody asked for {other:?}"),
            }
        }
    }
}

/// A client's connection to the coordinator.
pub(crate) struct Client {
    _endpoint: Endpoint,
    pub(crate) connection: Connection,
}

/// One of its streams.
pub(crate) struct Requests {
    sender: FrameSender,
    receiver: FrameReceiver,
}

impl Client {
    pub(crate) async fn requests(&self) -> Requests {
        let stream = soon("a stream", self.connection.open_stream(StreamKind::Client)).await;
        let (sender, receiver) = stream.unwrap();
        Requests { sender, receiver }
    }

    /// How the cluster says it is.
    pub(crate) async fn status(&self) -> ClusterStatus {
        match self.requests().await.ask(&ClientRequest::Status).await {
            ClientReply::Status(status) => status,
            other => panic!("{other:?} is no status"),
        }
    }

    pub(crate) async fn submit(&self, request: JobRequest) -> Result<(Requests, u64), String> {
        let mut stream = self.requests().await;
        match stream.ask(&ClientRequest::Order(Box::new(request.into()))).await {
            ClientReply::Accepted { job } => Ok((stream, job)),
            ClientReply::Refused { reason } => Err(reason),
            other => panic!("{other:?} does not answer a job"),
        }
    }
}

impl Requests {
    pub(crate) async fn say(&mut self, request: &ClientRequest) {
        soon("a request is taken", self.sender.send_message(request)).await.unwrap();
    }

    pub(crate) async fn reply(&mut self) -> ClientReply {
        let reply = soon("a reply", self.receiver.recv_message::<ClientReply>()).await;
        reply.unwrap().expect("a stream that was not ended")
    }

    pub(crate) async fn ask(&mut self, request: &ClientRequest) -> ClientReply {
        self.say(request).await;
        self.reply().await
    }

    pub(crate) async fn event(&mut self) -> JobEvent {
        match self.reply().await {
            ClientReply::Event(event) => event,
            other => panic!("{other:?} is no event"),
        }
    }

    /// The job's last event; whatever comes before is dropped.
    pub(crate) async fn last(&mut self) -> JobEventBody {
        loop {
            let body = self.event().await.body;
            if body.is_last() {
                return body;
            }
        }
    }
}
