//! How fast expert batches cross between two processes, beside the same bytes bare.
//!
//! `cargo run --release -p lite-llm-transport --example wire [rows width k rounds [raw|experts|tcp]]`
//!
//! This process is the coordinator and worker w1; it starts itself again as worker w2, which joins
//! with a token, then serves expert batches, bare QUIC and bare TCP.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    sync::Arc,
};

use lite_llm_transport::{
    connection::StreamKind,
    endpoint::{Endpoint, Expect, Options},
    identity::{ClusterCa, Role},
    join::join,
    measure::{self, Load, MeasureError, Times},
    session::Hello,
    token::JoinToken,
};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), MeasureError> {
    let args: Vec<String> = env::args().skip(1).collect();
    let number =
        |i: usize, default: u32| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    if args.first().is_some_and(|arg| arg == "serve") {
        let load = Load { rows: number(2, 0), width: number(3, 0), k: number(4, 0) };
        return serve(&args[1], load).await;
    }
    let load = Load { rows: number(0, 128), width: number(1, 2048), k: number(2, 8) };
    drive(load, number(3, 300) as usize).await
}

async fn drive(load: Load, rounds: usize) -> Result<(), MeasureError> {
    let folder = env::temp_dir().join(format!("lite-llm-wire-{}", std::process::id()));
    let ca = Arc::new(ClusterCa::open_or_create(&folder)?);
    let options = Options::new(Hello::new(1));
    let head = ca.identity(Role::Coordinator, "head")?;
    let local = "127.0.0.1:0".parse()?;
    let head = Endpoint::bind_coordinator(local, &head, ca.clone(), options.clone())?;
    let token = folder.join("token");
    ca.join_token(Role::Worker, head.local_addr()?.to_string())?.write(&token)?;

    let sizes = [load.rows, load.width, load.k].map(|size| size.to_string());
    let mut child = Command::new(env::current_exe()?)
        .arg("serve")
        .arg(&token)
        .args(sizes)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let line =
        tokio::task::spawn_blocking(move || lines.next()).await?.ok_or("w2 ended early")??;
    let (quic, tcp) = line.split_once(' ').ok_or("w2 named no addresses")?;

    let endpoint = Endpoint::bind(local, &ca.identity(Role::Worker, "w1")?, options)?;
    let connection = endpoint.connect(quic.parse()?, &Expect::worker("w2")).await?;
    let (mut sender, mut receiver) = connection.open_stream(StreamKind::Experts).await?;
    let pool = endpoint.pool().clone();
    println!(
        "{} B out, {} B back, {rounds} rounds, three passes",
        load.request_bytes(),
        load.reply_bytes()
    );
    let (mut sender_raw, mut receiver_raw) = {
        // The first stream is taken before the second is opened.
        measure::drive_experts(&mut sender, &mut receiver, &pool, load, 20).await?;
        connection.open_raw(StreamKind::Experts).await?
    };
    let mut stream = tokio::net::TcpStream::connect(tcp).await?;
    let only = env::args().nth(5);
    let runs = |what: &str| only.as_deref().is_none_or(|only| only == what);
    for _ in 0..3 {
        let (mut raw_rate, mut experts_rate) = (None, None);
        if runs("raw") {
            let times =
                measure::drive_raw(&mut sender_raw, &mut receiver_raw, load, rounds).await?;
            raw_rate = Some(show("bare QUIC", &times));
        }
        if runs("experts") {
            let times =
                measure::drive_experts(&mut sender, &mut receiver, &pool, load, rounds).await?;
            experts_rate = Some(show("expert batches", &times));
        }
        if runs("tcp") {
            show("bare TCP, no TLS", &measure::drive_tcp(&mut stream, load, rounds).await?);
        }
        if let (Some(raw), Some(experts)) = (raw_rate, experts_rate) {
            println!("expert batches / bare QUIC: {:.3}", experts / raw);
        }
    }
    println!("datagrams lost: {}", connection.datagrams_lost());
    connection.close("measured");
    endpoint.close("measured").await;
    drop(stream);
    child.wait()?;
    Ok(std::fs::remove_dir_all(&folder)?)
}

/// Prints the times and returns bytes per second.
fn show(what: &str, times: &Times) -> f64 {
    let ms = |share| times.percentile(share).as_secs_f64() * 1e3;
    println!(
        "{what:18} p5 {:8.3} ms  p50 {:8.3} ms  p99 {:8.3} ms  {:6.3} GB/s",
        ms(0.05),
        ms(0.5),
        ms(0.99),
        times.bytes_per_second() / 1e9
    );
    times.bytes_per_second()
}

async fn serve(token: &str, load: Load) -> Result<(), MeasureError> {
    let token = JoinToken::read(token.as_ref())?;
    let hello = Hello::new(1);
    let identity = join(token.address().parse()?, &token, Role::Worker, "w2", &hello).await?;
    let endpoint = Endpoint::bind("127.0.0.1:0".parse()?, &identity, Options::new(hello))?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{} {}", endpoint.local_addr()?, listener.local_addr()?);
    std::io::stdout().flush()?;
    let connection = endpoint.accept().await.ok_or("nobody came")?;
    let (sender, receiver) =
        connection.accept_stream().await.ok_or("no stream came")?.into_frames();
    let pool = endpoint.pool().clone();
    let experts = tokio::spawn(measure::serve_experts(sender, receiver, pool));
    let (send, recv) = connection.accept_stream().await.ok_or("no second stream")?.into_raw();
    let raw = tokio::spawn(measure::serve_raw(send, recv, load));
    let (stream, _) = listener.accept().await?;
    measure::serve_tcp(stream, load).await?;
    connection.closed().await;
    experts.abort();
    raw.abort();
    endpoint.close("measured").await;
    Ok(())
}
