//! What the tests of this folder share: `lite-llm` processes, watched from outside as a user does.
//!
//! Every wait has a deadline and fails with all that the process said.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Longest wait for anything that has no deadline of its own.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The model that is part of the repository.
pub(crate) fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/manpages-moe")
}

/// Processes of one test file that watch the clock run one test at a time.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|failed_test| failed_test.into_inner())
}

/// A running `lite-llm`, killed when dropped.
pub(crate) struct Process {
    child: Child,
    what: String,
    out: Arc<Mutex<String>>,
    err: Arc<Mutex<String>>,
    readers: Vec<thread::JoinHandle<()>>,
    /// Asks the reader of its standard output to leave.
    leave: Arc<AtomicBool>,
}

/// A process that ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// All of its standard output.
    pub(crate) out: String,
    /// All of its standard error.
    pub(crate) err: String,
}

impl Ended {
    /// Its code is this one, and its standard error holds these words.
    #[track_caller]
    pub(crate) fn expect(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for word in words {
            assert!(self.err.contains(word), "{word:?} is missing: {self:#?}");
        }
        self
    }

    /// It ended with an error of one sentence, and nothing else was logged.
    #[track_caller]
    pub(crate) fn one_error(&self, code: i32, words: &[&str]) -> &Self {
        let errors = self.err.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!((errors, self.err.contains("WARN")), (1, false), "{self:#?}");
        assert!(!self.err.contains("panicked"), "{self:#?}");
        assert!(self.err.matches("(os error").count() <= 1, "a cause is said twice: {self:#?}");
        self.expect(code, words)
    }
}

fn follow(
    mut from: impl Read + Send + 'static,
    leave: &Arc<AtomicBool>,
) -> (Arc<Mutex<String>>, thread::JoinHandle<()>) {
    let text = Arc::new(Mutex::new(String::new()));
    let (grows, leave) = (text.clone(), leave.clone());
    let reader = thread::spawn(move || {
        let mut bytes = [0; 4096];
        // A pipe that breaks has ended, as one that is closed.
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            grows.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
            if leave.load(Ordering::Relaxed) {
                break;
            }
        }
    });
    (text, reader)
}

impl Process {
    /// Starts `lite-llm` with these arguments.
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Self {
        Self::start_with(args, Stdio::null(), &[])
    }

    /// The same, with these variables.
    pub(crate) fn start_with_variables(args: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_with(args, Stdio::null(), variables)
    }

    /// Starts `lite-llm` with a standard input that stays open and empty.
    pub(crate) fn start_with_open_input(args: &[&str]) -> (Self, std::process::ChildStdin) {
        let mut process = Self::start_with(args, Stdio::piped(), &[]);
        let input = process.child.stdin.take().unwrap();
        (process, input)
    }

    fn start_with<S: AsRef<std::ffi::OsStr>>(
        args: &[S],
        input: Stdio,
        variables: &[(&str, &str)],
    ) -> Self {
        let what = args.iter().map(|a| a.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ");
        let mut child = Command::new(env!("CARGO_BIN_EXE_lite-llm"))
            .args(args)
            .env_remove("LITE_LLM_LOG")
            .env_remove("LITE_LLM_LOG_FORMAT")
            .env_remove("LITE_LLM_CONFIG")
            .env_remove("LITE_LLM_STATE")
            .env_remove("LITE_LLM_CLIENT")
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .envs(variables.iter().copied())
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let leave = Arc::default();
        let (out, out_reader) = follow(child.stdout.take().unwrap(), &leave);
        let (err, err_reader) = follow(child.stderr.take().unwrap(), &Arc::default());
        Self { child, what, out, err, readers: vec![out_reader, err_reader], leave }
    }

    /// What it wrote to standard output so far.
    pub(crate) fn out(&self) -> String {
        self.out.lock().unwrap().clone()
    }

    /// What it wrote to standard error so far.
    pub(crate) fn err(&self) -> String {
        self.err.lock().unwrap().clone()
    }

    /// Waits until something is so.
    #[track_caller]
    pub(crate) fn wait_until(&mut self, what: &str, mut so: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !so(self) {
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || begun.elapsed() > PATIENCE {
                thread::sleep(Duration::from_millis(100));
                let (out, err, how) = (self.out(), self.err(), &self.what);
                panic!("{how}: {what} never came; ended: {ended:?}\n{out}\n{err}");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until its standard output holds this.
    #[track_caller]
    pub(crate) fn says(&mut self, words: &str) {
        self.wait_until(words, |process| process.out().contains(words));
    }

    /// Closes its standard output, once it has written there once more.
    pub(crate) fn close_output(&self) {
        self.leave.store(true, Ordering::Relaxed);
    }

    /// Whether its standard output was closed, by either side.
    pub(crate) fn output_is_closed(&self) -> bool {
        self.readers[0].is_finished()
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, by its name.
    pub(crate) fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Kills it, as the system does when memory is short, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// What its threads do, where Linux tells: their names, states, ticks of CPU so far, and what they
    /// wait for in the kernel.
    fn threads(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let tell = |task: std::fs::DirEntry| {
            let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let (stat, wchan) = (read("stat"), read("wchan"));
            let name = stat.split(['(', ')']).nth(1).unwrap_or_default().to_owned();
            let fields: Vec<&str> =
                stat.rsplit(')').next().unwrap_or_default().split(' ').collect();
            let field = |at: usize| fields.get(at).copied().unwrap_or("?");
            format!("{name} {} {} {} {wchan}\n", field(1), field(12), field(13))
        };
        tasks.into_iter().flatten().flatten().map(tell).collect()
    }

    /// Waits for its end, for `limit` at most.
    #[track_caller]
    pub(crate) fn ends_within(mut self, limit: Duration) -> Ended {
        let begun = Instant::now();
        let status: ExitStatus = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > limit {
                let (out, err, how) = (self.out(), self.err(), &self.what);
                let threads = self.threads();
                panic!("{how}: still there after {limit:?}\n{out}\n{err}\nthreads:\n{threads}");
            }
            thread::sleep(Duration::from_millis(5));
        };
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        Ended { code: status.code(), out: self.out(), err: self.err() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that ended already cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `lite-llm` to its end.
#[track_caller]
pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ended {
    Process::start(args).ends_within(PATIENCE)
}

/// Runs `lite-llm` to its end with this on its standard input.
#[track_caller]
pub(crate) fn run_with_input(args: &[&str], input: &[u8]) -> Ended {
    let mut process = Process::start_with(args, Stdio::piped(), &[]);
    let mut stdin = process.child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = thread::spawn(move || {
        // A process that does not read it is no failure of the test.
        let _ = stdin.write_all(&input);
    });
    let ended = process.ends_within(PATIENCE);
    writer.join().unwrap();
    ended
}

/// A coordinator and workers, each a process.
pub(crate) struct Cluster {
    pub(crate) coordinator: Process,
    pub(crate) workers: Vec<(String, Process)>,
    /// The coordinator's state, with the tokens.
    pub(crate) state: tempfile::TempDir,
    more: Vec<String>,
    /// The coordinator's own arguments.
    arguments: Vec<String>,
}

impl Cluster {
    /// Starts a coordinator that waits for `workers` workers; all processes get `more` arguments.
    pub(crate) fn waiting(workers: usize, more: &[&str]) -> Self {
        Self::waiting_with(workers, more, &[])
    }

    /// The same; `own` are arguments of the coordinator alone.
    pub(crate) fn waiting_with(workers: usize, more: &[&str], own: &[&str]) -> Self {
        let state = tempfile::tempdir().unwrap();
        let (model, workers) = (demo_model(), workers.to_string());
        let mut args = vec!["coordinator", "--listen", "127.0.0.1:0", "--workers", &workers];
        args.extend(["--model", model.to_str().unwrap()]);
        args.extend(["--state", state.path().to_str().unwrap()]);
        args.extend(more);
        args.extend(own);
        let mut coordinator = Process::start(&args);
        coordinator.says("waiting for workers");
        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let arguments = owned(&args);
        Self { coordinator, workers: Vec::new(), state, more: owned(more), arguments }
    }

    /// Starts a coordinator and workers of these names, ready to serve.
    pub(crate) fn ready(names: &[&str], more: &[&str]) -> Self {
        Self::ready_with(names, more, &[])
    }

    /// The same; `own` are arguments of the coordinator alone.
    pub(crate) fn ready_with(names: &[&str], more: &[&str], own: &[&str]) -> Self {
        let mut cluster = Self::waiting_with(names.len(), more, own);
        names.iter().for_each(|name| cluster.join(name));
        cluster.is_ready(names);
        cluster
    }

    /// Starts a coordinator in the place of one that was killed, at its address.
    pub(crate) fn start_coordinator_again(&mut self) {
        let said = self.coordinator.out();
        let address = said.split_whitespace().nth(2).unwrap().trim_end_matches(',').to_owned();
        let mut arguments = self.arguments.clone();
        let listen = arguments.iter().position(|word| word == "127.0.0.1:0").unwrap();
        arguments[listen] = address;
        self.coordinator = Process::start(&arguments);
    }

    /// The cluster's status.
    #[track_caller]
    pub(crate) fn status(&self) -> serde_json::Value {
        let token = self.token();
        let ended = run(&["status", "--json", "--token", &token]);
        ended.expect(0, &[]);
        serde_json::from_str(&ended.out).unwrap()
    }

    /// Waits until so many jobs run.
    #[track_caller]
    pub(crate) fn is_running(&self, jobs: usize) {
        let begun = Instant::now();
        loop {
            let status = self.status();
            let nodes = status["nodes"].as_array().unwrap();
            let here: u64 = nodes.iter().map(|node| node["sequences"].as_u64().unwrap()).sum();
            if here as usize >= jobs {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{status:#}");
        }
    }

    /// Where the token for clients is.
    pub(crate) fn token(&self) -> String {
        self.state.path().join("client.token").to_str().unwrap().to_owned()
    }

    /// Where the token for workers is.
    pub(crate) fn worker_token(&self) -> String {
        self.state.path().join("worker.token").to_str().unwrap().to_owned()
    }

    /// Starts a worker.
    pub(crate) fn join(&mut self, name: &str) {
        let worker = self.worker(name);
        self.workers.push((name.to_owned(), worker));
    }

    /// Starts a worker that is no member yet.
    pub(crate) fn worker(&self, name: &str) -> Process {
        let token = self.worker_token();
        let mut args = vec!["worker", "--token", &token, "--name", name, "--threads", "1"];
        args.extend(["--dram", "1GiB", "--kv", "64MiB"]);
        args.extend(self.more.iter().map(String::as_str));
        Process::start(&args)
    }

    /// Waits until these workers serve.
    #[track_caller]
    pub(crate) fn is_ready(&mut self, names: &[&str]) {
        let ready = format!("ready: {}", names.join(", "));
        self.coordinator.wait_until(&ready, |coordinator| {
            coordinator.out().lines().last().is_some_and(|line| line == ready)
        });
    }

    /// Takes a worker out of the list.
    pub(crate) fn take(&mut self, name: &str) -> Process {
        let index = self.workers.iter().position(|(other, _)| other == name).unwrap();
        self.workers.remove(index).1
    }

    /// Starts `submit` with these arguments.
    pub(crate) fn submit(&self, args: &[&str]) -> Process {
        let token = self.token();
        let mut all = vec!["submit", "--token", &token];
        all.extend(self.more.iter().map(String::as_str));
        all.extend(args);
        Process::start(&all)
    }

    /// The text of a short job.
    #[track_caller]
    pub(crate) fn text(&self) -> String {
        let args = ["--json", "--max-tokens", "24", "--seed", "7", "ls - list"];
        let ended = self.submit(&args).ends_within(PATIENCE);
        ended.expect(0, &[]);
        let line: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
        line["text"].as_str().unwrap().to_owned()
    }

    /// Starts a job that goes on for long, and waits until its answer flows.
    #[track_caller]
    pub(crate) fn long_job(&self) -> Process {
        let prompt = "ls - list";
        let mut job = self.submit(&["--max-tokens", "1000", "--ignore-eos", prompt]);
        job.wait_until("an answer", |job| job.out().len() > prompt.len() + 40);
        job
    }
}
