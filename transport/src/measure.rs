//! Loops that measure the wire: expert batches as they are used, and the same bytes bare.
//!
//! For `lite-llm bench transport`. One side serves, the other drives; both may be one process or
//! two. Each loop moves the same number of bytes: a request, then a reply.

use std::{
    io,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    connection::{RawReceiver, RawSender},
    frame::{FrameReceiver, FrameSender},
    messages::{
        ExpertBatch, ExpertBatchView, ExpertCall, ExpertOutputs, ExpertReplyView,
        OutgoingExpertBatch, OutgoingExpertOutputs, TraceContext,
    },
    pool::BufferPool,
};

/// Why a loop ended early.
pub type MeasureError = Box<dyn std::error::Error + Send + Sync>;

/// What one round trip carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Hidden states per request.
    pub rows: u32,
    /// Numbers of one.
    pub width: u32,
    /// Experts per hidden state.
    pub k: u32,
}

impl Load {
    /// Bytes of the numbers of a request.
    pub fn request_bytes(&self) -> usize {
        4 * self.rows as usize * self.width as usize
    }

    /// Bytes of the numbers of a reply.
    pub fn reply_bytes(&self) -> usize {
        self.k as usize * self.request_bytes()
    }
}

/// How long round trips took.
#[derive(Debug, Clone)]
pub struct Times {
    sorted: Vec<Duration>,
    bytes: usize,
}

impl Times {
    fn new(mut times: Vec<Duration>, load: &Load) -> Self {
        times.sort_unstable();
        Self { sorted: times, bytes: load.request_bytes() + load.reply_bytes() }
    }

    /// All round trips, shortest first.
    pub fn sorted(&self) -> &[Duration] {
        &self.sorted
    }

    /// The time that this share of the round trips stayed within.
    pub fn percentile(&self, share: f64) -> Duration {
        let last = self.sorted.len().saturating_sub(1);
        let at = (share * self.sorted.len() as f64) as usize;
        self.sorted.get(at.min(last)).copied().unwrap_or_default()
    }

    /// Bytes of numbers per second, at the median.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.percentile(0.5).as_secs_f64().max(1e-9)
    }
}

/// Answers expert batches with one row per call, taken from the call's row: a kernel that costs
/// one write of the reply.
pub async fn serve_experts(
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
    pool: BufferPool,
) -> Result<(), MeasureError> {
    while let Some(frame) = receiver.recv().await? {
        let batch = ExpertBatchView::check(&frame)?;
        let &ExpertBatch { id, trace, width, .. } = batch.head();
        let head = ExpertOutputs { id, trace, width, rows: batch.calls().len() as u32 };
        let mut outputs = OutgoingExpertOutputs::new(head, &pool)?;
        let rows = outputs.rows_mut().chunks_exact_mut(width as usize);
        for (output, call) in rows.zip(batch.calls()) {
            output.copy_from_slice(batch.row(call.row as usize));
        }
        sender.send(outputs.finish()).await?;
    }
    Ok(())
}

/// Dispatches batches and reads every output.
pub async fn drive_experts(
    sender: &mut FrameSender,
    receiver: &mut FrameReceiver,
    pool: &BufferPool,
    load: Load,
    rounds: usize,
) -> Result<Times, MeasureError> {
    let hidden = vec![1.5; (load.rows * load.width) as usize];
    let call = |row| move |expert| ExpertCall { row, tier: 0, group: 0, expert };
    let calls: Vec<_> = (0..load.rows).flat_map(|row| (0..load.k).map(call(row))).collect();
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let start = Instant::now();
        let mut batch = OutgoingExpertBatch::new(
            ExpertBatch {
                id: round as u64,
                trace: TraceContext::default(),
                layer: 0,
                width: load.width,
                rows: load.rows,
                calls: calls.clone(),
            },
            pool,
        )?;
        batch.rows_mut().copy_from_slice(&hidden);
        sender.send(batch.finish()).await?;
        let frame = receiver.recv().await?.ok_or("the peer ended the stream")?;
        let ExpertReplyView::Outputs(outputs) = ExpertReplyView::check(&frame)? else {
            return Err("the peer failed".into());
        };
        if outputs.head().rows != load.rows * load.k {
            return Err("a reply of another shape".into());
        }
        times.push(start.elapsed());
    }
    Ok(Times::new(times, &load))
}

/// Answers bare requests on a QUIC stream of the same connection.
pub async fn serve_raw(
    mut send: RawSender,
    mut recv: RawReceiver,
    load: Load,
) -> Result<(), MeasureError> {
    let reply = bytes::Bytes::from(vec![1; load.reply_bytes()]);
    while take_raw(&mut recv, load.request_bytes()).await? {
        send.write_chunk(reply.clone()).await?;
    }
    Ok(())
}

/// Drives bare requests on a QUIC stream: QUIC's chunks are counted and dropped.
pub async fn drive_raw(
    send: &mut RawSender,
    recv: &mut RawReceiver,
    load: Load,
    rounds: usize,
) -> Result<Times, MeasureError> {
    let request = bytes::Bytes::from(vec![1; load.request_bytes()]);
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let start = Instant::now();
        send.write_chunk(request.clone()).await?;
        if !take_raw(recv, load.reply_bytes()).await? {
            return Err("the peer ended the stream".into());
        }
        times.push(start.elapsed());
    }
    Ok(Times::new(times, &load))
}

/// Takes this many bytes, or finds the end of the stream before the first.
async fn take_raw(recv: &mut RawReceiver, bytes: usize) -> Result<bool, MeasureError> {
    let mut taken = 0;
    while taken < bytes {
        match recv.read_chunk(bytes - taken, true).await? {
            Some(chunk) => taken += chunk.bytes.len(),
            None if taken == 0 => return Ok(false),
            None => return Err("the peer ended the stream inside a message".into()),
        }
    }
    Ok(true)
}

/// Answers bare requests over TCP, without TLS.
pub async fn serve_tcp(mut stream: TcpStream, load: Load) -> Result<(), MeasureError> {
    stream.set_nodelay(true)?;
    let (mut request, reply) = (vec![0; load.request_bytes()], vec![1; load.reply_bytes()]);
    loop {
        match stream.read_exact(&mut request).await {
            Ok(_) => stream.write_all(&reply).await?,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Drives bare requests over TCP, without TLS.
pub async fn drive_tcp(
    stream: &mut TcpStream,
    load: Load,
    rounds: usize,
) -> Result<Times, MeasureError> {
    stream.set_nodelay(true)?;
    let (request, mut reply) = (vec![1; load.request_bytes()], vec![0; load.reply_bytes()]);
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let start = Instant::now();
        stream.write_all(&request).await?;
        stream.read_exact(&mut reply).await?;
        times.push(start.elapsed());
    }
    Ok(Times::new(times, &load))
}
