//! `lite-llm bench transport`: dispatch and combine between two processes, beside the same bytes
//! on a bare QUIC stream of the same connection and over bare TCP.
//!
//! ```text
//! this process                                    transport-peer (started by it)
//! coordinator: certificates  ◀──── join ────────  token file
//! worker w1  ◀──────── QUIC, mutual TLS ───────▶  worker w2: expert batches, bare stream
//!            ◀──────── TCP, no TLS ────────────▶             bare stream
//! ```
//!
//! Invariant: the peer ends with this process: it is killed when the measurement is dropped, and
//! ends by itself when its standard input does.

use std::{io::Read, net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use lite_llm_kernels::DETERMINISM_VERSION;
use lite_llm_transport::{
    connection::{Connection, RawReceiver, RawSender, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    frame::{FrameReceiver, FrameSender},
    identity::{ClusterCa, Role},
    join::join,
    measure::{self, Load, MeasureError, Times},
    messages::experts::calls_max,
    session::Hello,
    token::JoinToken,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::timeout,
};

use super::samples::{Goal, Samples, print_table};
use crate::{
    cli::{BenchLoadArgs, BenchTransportArgs, BenchTransportPeerArgs},
    commands::bad_input,
    progress::{Progress, Unit},
};

/// What is asked of expert batches against our bare QUIC stream, in bytes per second.
const RATIO: f64 = 0.7;
/// How long the other process may take to start, join and listen.
const START_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a run of round trips may take per round trip, before the peer counts as stuck.
const ROUND_TIMEOUT: Duration = Duration::from_secs(10);
/// Name of the other process in the cluster of two.
const PEER: &str = "w2";

fn failed(error: MeasureError) -> anyhow::Error {
    anyhow!("{error}")
}

impl BenchLoadArgs {
    fn load(&self) -> Result<Load> {
        let (calls, most) =
            (u64::from(self.rows) * u64::from(self.top_k), u64::from(calls_max(self.hidden)));
        if calls > most {
            return Err(bad_input(anyhow!(
                "--rows {} x --top-k {} are {calls} outputs; a batch of width {} carries {most}",
                self.rows,
                self.top_k,
                self.hidden
            )));
        }
        Ok(Load { rows: self.rows, width: self.hidden, k: self.top_k })
    }
}

pub(super) async fn measure(args: BenchTransportArgs, json: bool) -> Result<()> {
    let load = args.load.load()?;
    // On a worker thread, beside the tasks of the connection: a node's streams live there, too.
    let report = tokio::spawn(async move { run(&args, load, json).await }).await??;
    match json {
        true => say!("{}", report.json()),
        false => report.print(),
    }
    Ok(())
}

async fn run(args: &BenchTransportArgs, load: Load, json: bool) -> Result<Report> {
    let mut report = Report { load, rounds: args.rounds, loops: Default::default() };
    let mut pair = Pair::start(&args.load, load).await?;
    let mut progress = Progress::new("bench transport", Unit::Things("runs"), json);
    let (rounds, runs) = (args.rounds as usize, u64::from(args.runs));
    let patience = ROUND_TIMEOUT * args.rounds.saturating_add(1);
    for run in 0..=runs {
        progress.update(run, runs + 1, "");
        // The first run of each loop warms up and is not counted.
        let rounds = if run == 0 { rounds.min(20) } else { rounds };
        for which in Loop::ALL {
            let times =
                timeout(patience, pair.drive(which, load, rounds)).await.map_err(|_| {
                    anyhow!(
                        "the other process answered nothing for {patience:?} ({})",
                        which.name()
                    )
                })??;
            if run > 0 {
                report.loops[which as usize].take(&times);
            }
        }
    }
    progress.finish();
    pair.stop().await?;
    Ok(report)
}

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loop {
    Experts,
    Quic,
    Tcp,
}

impl Loop {
    const ALL: [Loop; 3] = [Loop::Quic, Loop::Experts, Loop::Tcp];

    fn name(self) -> &'static str {
        match self {
            Loop::Experts => "expert batches",
            Loop::Quic => "bare QUIC stream",
            Loop::Tcp => "bare TCP, no TLS",
        }
    }
}

/// This process's half of the measurement.
struct Pair {
    coordinator: Endpoint,
    endpoint: Endpoint,
    connection: Connection,
    experts: (FrameSender, FrameReceiver),
    raw: (RawSender, RawReceiver),
    tcp: TcpStream,
    child: Child,
}

impl Pair {
    async fn start(args: &BenchLoadArgs, load: Load) -> Result<Self> {
        let authority = Arc::new(ClusterCa::ephemeral()?);
        let options = Options::new(Hello::new(DETERMINISM_VERSION));
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let identity = authority.identity(Role::Coordinator, "coordinator")?;
        let coordinator =
            Endpoint::bind_coordinator(loopback, &identity, authority.clone(), options.clone())?;
        let folder = tempfile::tempdir().context("no temporary folder for the join token")?;
        let token = JoinToken::path_in(folder.path(), Role::Worker);
        authority.join_token(Role::Worker, coordinator.local_addr()?.to_string())?.write(&token)?;

        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "transport-peer", "--token"]).arg(&token);
        for (flag, value) in
            [("--rows", args.rows), ("--hidden", args.hidden), ("--top-k", args.top_k)]
        {
            command.arg(flag).arg(value.to_string());
        }
        // Ctrl-C is this process's to handle.
        #[cfg(unix)]
        command.process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("the other process did not start")?;
        let stdout = child.stdout.take().context("the other process has no output")?;
        let mut line = String::new();
        timeout(START_TIMEOUT, BufReader::new(stdout).read_line(&mut line))
            .await
            .map_err(|_| anyhow!("the other process said nothing for {START_TIMEOUT:?}"))??;
        let Some((quic, tcp)) = line.trim().split_once(' ') else {
            bail!("the other process named {line:?} as its addresses; two are expected");
        };

        let endpoint = Endpoint::bind(loopback, &authority.identity(Role::Worker, "w1")?, options)?;
        let connection = endpoint.connect(quic.parse()?, &Expect::worker(PEER)).await?;
        let mut experts = connection.open_stream(StreamKind::Experts).await?;
        // The peer takes the first stream before the second is opened.
        let pool = endpoint.pool();
        measure::drive_experts(&mut experts.0, &mut experts.1, pool, load, 1)
            .await
            .map_err(failed)?;
        let raw = connection.open_raw(StreamKind::Experts).await?;
        let tcp = TcpStream::connect(tcp).await?;
        Ok(Self { coordinator, endpoint, connection, experts, raw, tcp, child })
    }

    async fn drive(&mut self, which: Loop, load: Load, rounds: usize) -> Result<Times> {
        let times = match which {
            Loop::Experts => {
                let (sender, receiver) = &mut self.experts;
                let pool = self.endpoint.pool();
                measure::drive_experts(sender, receiver, pool, load, rounds).await
            }
            Loop::Quic => measure::drive_raw(&mut self.raw.0, &mut self.raw.1, load, rounds).await,
            Loop::Tcp => measure::drive_tcp(&mut self.tcp, load, rounds).await,
        };
        times.map_err(failed).with_context(|| which.name())
    }

    async fn stop(mut self) -> Result<()> {
        self.connection.close("measured");
        drop((self.tcp, self.child.stdin.take()));
        self.endpoint.close("measured").await;
        self.coordinator.close("measured").await;
        timeout(START_TIMEOUT, self.child.wait())
            .await
            .map_err(|_| anyhow!("the other process does not end"))??;
        Ok(())
    }
}

/// The other process: says where it listens, serves one connection of each kind, ends with it.
pub(super) async fn peer(args: BenchTransportPeerArgs) -> Result<()> {
    let load = args.load.load()?;
    let serve = tokio::spawn(async move { serve(&args, load).await });
    // Nothing is ever written: standard input ends when the asking process does.
    let orphaned = tokio::task::spawn_blocking(|| {
        let mut nothing = [0];
        while std::io::stdin().read(&mut nothing).is_ok_and(|read| read > 0) {}
    });
    tokio::select! {
        served = serve => served?,
        _ = orphaned => Ok(()),
    }
}

async fn serve(args: &BenchTransportPeerArgs, load: Load) -> Result<()> {
    let token = JoinToken::read(&args.token).map_err(bad_input)?;
    let address: SocketAddr = token.address().parse()?;
    let hello = Hello::new(DETERMINISM_VERSION);
    let identity = join(address, &token, Role::Worker, PEER, &hello).await?;
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::bind(loopback, &identity, Options::new(hello))?;
    let listener = TcpListener::bind(loopback).await?;
    say!("{} {}", endpoint.local_addr()?, listener.local_addr()?);

    let connection = endpoint.accept().await.context("nobody came")?;
    let (sender, receiver) =
        connection.accept_stream().await.context("no stream came")?.into_frames();
    let pool = endpoint.pool().clone();
    let mut loops = tokio::task::JoinSet::new();
    loops.spawn(measure::serve_experts(sender, receiver, pool));
    let (send, recv) = connection.accept_stream().await.context("no second stream")?.into_raw();
    loops.spawn(measure::serve_raw(send, recv, load));
    let (stream, _) = listener.accept().await?;
    loops.spawn(measure::serve_tcp(stream, load));
    // The loops end with the connection, which the asking process closes.
    connection.closed().await;
    loops.shutdown().await;
    endpoint.close("measured").await;
    Ok(())
}

/// Round trips of one loop.
#[derive(Default)]
struct Measured {
    /// Seconds of every round trip.
    all: Samples,
    /// Median seconds of each run.
    medians: Samples,
}

impl Measured {
    fn take(&mut self, times: &Times) {
        self.all.extend(times.sorted().iter().map(Duration::as_secs_f64));
        self.medians.push(times.percentile(0.5).as_secs_f64());
    }

    /// GB/s of the runs.
    fn rates(&self, load: &Load) -> Samples {
        self.medians.rates((load.request_bytes() + load.reply_bytes()) as f64 / 1e9)
    }
}

struct Report {
    load: Load,
    rounds: u32,
    /// By [`Loop`].
    loops: [Measured; 3],
}

impl Report {
    fn ratio(&self, of: Loop, to: Loop) -> f64 {
        let rate = |which| self.loops[which as usize].rates(&self.load).median();
        rate(of) / rate(to)
    }

    fn goal(&self) -> Goal {
        Goal { ratio: self.ratio(Loop::Experts, Loop::Quic), asked: RATIO }
    }

    fn print(&self) {
        say!(
            "{} tokens x {} x top-{}: {} B out, {} B back, two processes over loopback",
            self.load.rows,
            self.load.width,
            self.load.k,
            self.load.request_bytes(),
            self.load.reply_bytes(),
        );
        say!(
            "{} runs of {} round trips, by turns · ± half the spread of the runs\n",
            self.loops[0].medians.len(),
            self.rounds
        );
        let rows = Loop::ALL.map(|which| {
            let measured = &self.loops[which as usize];
            let ms = |share| format!("{:.3}", measured.all.percentile(share) * 1e3);
            let rates = measured.rates(&self.load);
            vec![which.name().to_owned(), ms(0.5), ms(0.99), rates.show(3)]
        });
        print_table(&["", "p50 ms", "p99 ms", "GB/s"], &rows);
        say!("\nexpert batches / bare QUIC stream: {}", self.goal().show());
        say!("expert batches / bare TCP: {:.3}", self.ratio(Loop::Experts, Loop::Tcp));
    }

    fn json(&self) -> Value {
        let measured = |which: Loop| {
            let measured = &self.loops[which as usize];
            let ms = |share| measured.all.percentile(share) * 1e3;
            json!({
                "p50_ms": ms(0.5),
                "p99_ms": ms(0.99),
                "gigabytes_per_second": measured.rates(&self.load).json(),
            })
        };
        json!({
            "bench": "transport",
            "rows": self.load.rows,
            "hidden": self.load.width,
            "top_k": self.load.k,
            "request_bytes": self.load.request_bytes(),
            "reply_bytes": self.load.reply_bytes(),
            "rounds_per_run": self.rounds,
            "experts": measured(Loop::Experts),
            "quic": measured(Loop::Quic),
            "tcp": measured(Loop::Tcp),
            "ratio": self.goal().ratio,
            "asked": RATIO,
            "ratio_to_tcp": self.ratio(Loop::Experts, Loop::Tcp),
        })
    }
}
