//! Frames between two endpoints: shapes, copies, hostile sizes, peers that go silent.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use lite_llm_transport::{
    connection::StreamKind,
    endpoint::{Endpoint, Expect},
    frame::{FRAME_BYTES_MAX, FrameError, FrameKind, OutgoingFrame},
    identity::Role,
    limits::{PeerLimits, REQUEST_BYTES_MAX},
    messages::{
        ClientReply, ClientRequest, ExpertBatchView, ExpertFailure, ExpertOutputs, ExpertReplyView,
        JobOrder, JobRequest, OutgoingExpertBatch, OutgoingExpertOutputs, Prompt,
    },
    pool::BufferPool,
};
use support::*;

/// Rows of known numbers.
fn fill(numbers: &mut [f32], seed: u32) {
    for (i, number) in numbers.iter_mut().enumerate() {
        *number = f32::from_bits((i as u32).wrapping_mul(2_654_435_761) ^ seed);
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_128_rows_goes_out_and_its_outputs_come_back_bit_by_bit() {
    let pair = pair().await;
    let ((mut out, mut back), (mut reply, mut requests)) = pair.stream().await;
    let pool = BufferPool::default();
    let served = tokio::spawn(async move {
        let pool = BufferPool::default();
        while let Some(frame) = requests.recv().await.unwrap() {
            let batch = ExpertBatchView::check(&frame).unwrap();
            let head = batch.head();
            let rows = batch.calls().len() as u32;
            let outputs = ExpertOutputs { id: head.id, trace: head.trace, width: 2048, rows };
            let mut outputs = OutgoingExpertOutputs::new(outputs, &pool).unwrap();
            for (i, call) in batch.calls().iter().enumerate() {
                outputs.row_mut(i).copy_from_slice(batch.row(call.row as usize));
            }
            reply.send(outputs.finish()).await.unwrap();
        }
        reply.send_message(&ExpertFailure::new(9, "enough")).await.unwrap();
        reply.finish().await.unwrap();
    });
    for round in 0..4 {
        let head = batch(round, 128, 2048, 8);
        let mut outgoing = OutgoingExpertBatch::new(head.clone(), &pool).unwrap();
        fill(outgoing.rows_mut(), round as u32);
        let sent = bits(outgoing.rows_mut());
        soon("send", out.send(outgoing.finish())).await.unwrap();
        let frame = soon("recv", back.recv()).await.unwrap().unwrap();
        let ExpertReplyView::Outputs(outputs) = ExpertReplyView::check(&frame).unwrap() else {
            panic!("failed");
        };
        assert_eq!((outputs.head().id, outputs.head().trace), (round, head.trace));
        for (i, call) in head.calls.iter().enumerate() {
            let from = call.row as usize * 2048;
            assert_eq!(bits(outputs.row(i)), sent[from..from + 2048], "call {i}");
        }
    }
    out.finish().await.unwrap();
    let frame = soon("recv", back.recv()).await.unwrap().unwrap();
    assert!(matches!(
        ExpertReplyView::check(&frame).unwrap(),
        ExpertReplyView::Failure(failure) if failure.reason == "enough" && failure.id == 9
    ));
    assert!(soon("end", back.recv()).await.unwrap().is_none());
    served.await.unwrap();
}

#[tokio::test]
async fn activations_are_copied_once_on_receipt_and_never_on_sending() {
    let pair = pair().await;
    let ((mut out, _back), (_reply, mut requests)) = pair.stream().await;
    let pool = BufferPool::default();
    let mut outgoing = OutgoingExpertBatch::new(batch(1, 32, 2048, 2), &pool).unwrap();
    fill(outgoing.rows_mut(), 5);
    let written_at = outgoing.rows_mut().as_ptr() as usize;
    let frame = outgoing.finish();
    assert_eq!(frame.bytes().as_ptr() as usize, written_at, "finishing a frame moved its rows");
    let bytes = frame.bytes().len() as u64;
    soon("send", out.send(frame)).await.unwrap();
    let received = soon("recv", requests.recv()).await.unwrap().unwrap();
    let view = ExpertBatchView::check(&received).unwrap();

    let (near, far) = (pair.near.totals(), pair.far.totals());
    assert_eq!((near.bytes_sent, near.bytes_copied), (bytes, 0), "sending copied");
    assert_eq!((far.bytes_received, far.bytes_copied), (bytes, bytes), "one copy on receipt");
    // The kernel reads in the buffer into which the datagrams were gathered.
    let body = received.bytes().as_ptr_range();
    let hidden = view.hidden().as_ptr_range();
    assert!(body.start <= hidden.start.cast() && hidden.end.cast() <= body.end);
    for row in 0..32 {
        assert_eq!(view.row(row).as_ptr() as usize % 64, 0, "row {row} is not aligned");
    }
    let clone = view.clone();
    assert_eq!(clone.hidden().as_ptr(), view.hidden().as_ptr(), "cloning a view copied");
}

#[tokio::test]
async fn widths_that_fill_no_lane_are_padded_at_the_end_only() {
    let pool = BufferPool::default();
    for (rows, width) in [(1, 1), (3, 5), (7, 17), (2, 16), (5, 33)] {
        let mut outgoing = OutgoingExpertBatch::new(batch(1, rows, width, 1), &pool).unwrap();
        fill(outgoing.rows_mut(), 1);
        let sent = bits(outgoing.rows_mut());
        let outgoing = outgoing.finish();
        let frame =
            lite_llm_transport::frame::Frame::copied(outgoing.kind(), outgoing.bytes(), &pool);
        let view = ExpertBatchView::check(&frame.unwrap()).unwrap();
        assert_eq!(bits(view.hidden()), sent, "{rows} × {width}");
        assert_eq!(view.head(), &batch(1, rows, width, 1));
    }
}

#[tokio::test]
async fn hostile_headers_are_refused_before_memory_is_taken() {
    for (header, word) in [
        ([0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0], "4294967295"),
        ([1, 0, 0, 4, 1, 0, 0, 0], "announced a frame of 67108865"),
        ([8, 0, 0, 0, 99, 0, 0, 0], "unknown kind"),
        ([8, 0, 0, 0, 0, 0, 0, 0], "unknown kind"),
        ([8, 0, 0, 0, 1, 0, 1, 0], "unknown kind"),
        ([0xff; 8], "unknown kind"),
    ] {
        let pair = pair().await;
        let (mut send, _recv) = pair.near.open_raw(StreamKind::Experts).await.unwrap();
        let accepted = soon("accept", pair.far.accept_stream()).await.unwrap();
        let (_sender, mut receiver) = accepted.into_frames();
        send.write_all(&header).await.unwrap();
        let error = soon("recv", receiver.recv()).await.unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("worker w1"), "{error}");
    }
}

#[tokio::test]
async fn every_cut_of_a_frame_on_the_wire_is_an_error() {
    let pair = pair().await;
    let whole = OutgoingFrame::message(&ClientReply::Accepted { job: 7 }).unwrap();
    let mut wire = (whole.bytes().len() as u32).to_le_bytes().to_vec();
    wire.extend([6, 0, 0, 0]);
    wire.extend(whole.bytes());
    for len in 0..=wire.len() {
        let (mut send, _recv) = pair.near.open_raw(StreamKind::Experts).await.unwrap();
        let accepted = soon("accept", pair.far.accept_stream()).await.unwrap();
        let (_sender, mut receiver) = accepted.into_frames();
        send.write_all(&wire[..len]).await.unwrap();
        send.finish().unwrap();
        match soon("recv", receiver.recv_message::<ClientReply>()).await {
            Ok(None) => assert_eq!(len, 0),
            Ok(Some(reply)) => {
                assert_eq!((len, reply), (wire.len(), ClientReply::Accepted { job: 7 }));
            }
            Err(error) => assert!(error.to_string().contains("bytes of a frame"), "{error}"),
        }
    }
}

/// Memory of this process, in bytes.
fn resident() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(text.split_whitespace().nth(1)?.parse::<usize>().ok()? * 4096)
}

#[tokio::test]
async fn memory_follows_the_bytes_that_arrive_not_those_that_are_claimed() {
    let pair = pair().await;
    let Some(before) = resident() else {
        eprintln!("skipped: this system has no /proc/self/statm");
        return;
    };
    let mut held = Vec::new();
    for _ in 0..16 {
        let (mut send, recv) = pair.near.open_raw(StreamKind::Experts).await.unwrap();
        let accepted = soon("accept", pair.far.accept_stream()).await.unwrap();
        let (sender, mut receiver) = accepted.into_frames();
        let mut header = (FRAME_BYTES_MAX as u32).to_le_bytes().to_vec();
        header.extend([1, 0, 0, 0, 9, 9, 9]);
        send.write_all(&header).await.unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(20), receiver.recv()).await;
        assert!(waited.is_err(), "a frame of which three bytes came was returned");
        held.push((send, recv, sender, receiver));
    }
    let grown = resident().unwrap().saturating_sub(before);
    assert!(grown < FRAME_BYTES_MAX, "16 claims of 64 MiB took {grown} bytes");
}

#[tokio::test]
async fn a_receive_that_is_dropped_half_way_loses_nothing() {
    let pair = pair().await;
    let (mut send, _recv) = pair.near.open_raw(StreamKind::Experts).await.unwrap();
    let accepted = soon("accept", pair.far.accept_stream()).await.unwrap();
    let (_sender, mut receiver) = accepted.into_frames();
    let frame = OutgoingFrame::message(&ClientReply::Accepted { job: 7 }).unwrap();
    let mut wire = (frame.bytes().len() as u32).to_le_bytes().to_vec();
    wire.extend([6, 0, 0, 0]);
    wire.extend(frame.bytes());
    for byte in &wire[..wire.len() - 1] {
        send.write_all(&[*byte]).await.unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(2), receiver.recv()).await;
        assert!(waited.is_err());
    }
    send.write_all(&wire[wire.len() - 1..]).await.unwrap();
    let reply = soon("recv", receiver.recv_message::<ClientReply>()).await.unwrap();
    assert_eq!(reply, Some(ClientReply::Accepted { job: 7 }));
}

#[tokio::test]
async fn a_send_that_is_dropped_half_way_is_not_continued_by_another_frame() {
    let pair = pair().await;
    let (mut sender, _receiver) = pair.near.open_stream(StreamKind::Experts).await.unwrap();
    // Nobody reads at the other end: the second of these does not fit the windows.
    let pool = BufferPool::default();
    let big = || OutgoingExpertBatch::new(batch(1, 4000, 2048, 1), &pool).unwrap().finish();
    let sending = tokio::time::timeout(Duration::from_millis(300), async {
        sender.send(big()).await.unwrap();
        sender.send(big()).await.unwrap();
        sender.send(big()).await.unwrap();
    });
    assert!(sending.await.is_err(), "96 MiB went to a peer that reads nothing");
    let error = sender.send(big()).await.unwrap_err();
    assert!(matches!(error, FrameError::Abandoned { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_that_never_reads_holds_up_no_other_stream() {
    let pair = pair().await;
    let (mut stuck, _r) = pair.near.open_stream(StreamKind::Experts).await.unwrap();
    let _unread = soon("accept", pair.far.accept_stream()).await.unwrap();
    let pool = BufferPool::default();
    let big = OutgoingExpertBatch::new(batch(1, 4000, 2048, 1), &pool).unwrap().finish();
    let sending = tokio::spawn(async move { stuck.send(big).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let ((mut out, _back), (_reply, mut requests)) = pair.stream().await;
    out.send_message(&ExpertFailure::new(3, "small")).await.unwrap();
    let frame = soon("recv", requests.recv()).await.unwrap().unwrap();
    assert_eq!(frame.decode::<ExpertFailure>().unwrap().id, 3);
    sending.abort();
}

/// A hop that carries datagrams until it is told to lose them all.
async fn lossy_hop(to: std::net::SocketAddr) -> (std::net::SocketAddr, Arc<AtomicBool>) {
    let (front, back) = (
        tokio::net::UdpSocket::bind(loopback()).await.unwrap(),
        tokio::net::UdpSocket::bind(loopback()).await.unwrap(),
    );
    let address = front.local_addr().unwrap();
    let lost = Arc::new(AtomicBool::new(false));
    let losing = lost.clone();
    tokio::spawn(async move {
        let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
        let mut client = address;
        loop {
            tokio::select! {
                Ok((len, from)) = front.recv_from(&mut there) => {
                    client = from;
                    if !losing.load(Relaxed) {
                        let _ = back.send_to(&there[..len], to).await;
                    }
                }
                Ok((len, _)) = back.recv_from(&mut here) => {
                    if !losing.load(Relaxed) {
                        let _ = front.send_to(&here[..len], client).await;
                    }
                }
            }
        }
    });
    (address, lost)
}

#[tokio::test]
async fn a_peer_that_vanishes_is_noticed_by_both_within_three_seconds() {
    let ca = authority();
    let (w1, w2) = (worker(&ca, "w1"), worker(&ca, "w2"));
    let (address, lost) = lossy_hop(w2.local_addr().unwrap()).await;
    let expect = Expect::worker("w2");
    let (near, far) =
        soon("connect", async { tokio::join!(w1.connect(address, &expect), w2.accept()) }).await;
    let (near, far) = (near.unwrap(), far.unwrap());
    let (mut sender, mut receiver) = near.open_stream(StreamKind::Experts).await.unwrap();
    let stream = soon("accept", far.accept_stream()).await.unwrap();
    // An idle connection lives on…
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(near.close_reason().is_none() && far.close_reason().is_none());
    // …until nothing comes through, even while one side sends.
    let started = Instant::now();
    lost.store(true, Relaxed);
    sender.send_message(&ExpertFailure::new(1, "anybody?")).await.unwrap();
    let error = soon("recv", receiver.recv()).await.unwrap_err().to_string();
    assert!(error.contains("worker w2") && error.contains("did not answer"), "{error}");
    let (a, b) = soon("closed", async { tokio::join!(near.closed(), far.closed()) }).await;
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    assert!(a.reason.contains("did not answer") && b.reason.contains("did not answer"));
    drop(stream);
}

#[tokio::test]
async fn closing_tells_the_peer_why_at_once() {
    let pair = pair().await;
    let started = Instant::now();
    pair.near.close("the job is done");
    let lost = soon("closed", pair.far.closed()).await;
    assert!(lost.to_string().contains("the job is done"), "{lost}");
    assert!(soon("accept", pair.far.accept_stream()).await.is_none());
    assert!(pair.near.open_stream(StreamKind::Experts).await.is_err());
    assert!(started.elapsed() < Duration::from_secs(1));
}

/// A client's stream takes a prompt and a bit; whoever claims more, or more at once than its
/// connection may, loses the stream and nobody else's.
#[tokio::test]
async fn a_client_may_send_a_prompt_and_a_bit() {
    let ca = authority();
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    let identity = ca.identity(Role::Client, "c1").unwrap();
    let client = Endpoint::outgoing(address, &identity, options()).unwrap();
    let expect = Expect::coordinator();
    let (near, far) =
        soon("connect", async { tokio::join!(client.connect(address, &expect), head.accept()) })
            .await;
    let (near, far) = (near.unwrap(), far.unwrap());
    let header = |bytes: usize| {
        let mut header = (bytes as u32).to_le_bytes().to_vec();
        header.extend((FrameKind::ClientRequest as u16).to_le_bytes());
        header.extend([0, 0]);
        header
    };
    let open = async || {
        let (send, recv) = soon("open", near.open_raw(StreamKind::Client)).await.unwrap();
        let (sender, receiver) = soon("accept", far.accept_stream()).await.unwrap().into_frames();
        (send, recv, sender, receiver)
    };

    let (mut send, _recv, _sender, mut receiver) = open().await;
    send.write_all(&header(REQUEST_BYTES_MAX + 1)).await.unwrap();
    let error = soon("an error", receiver.recv()).await.unwrap_err();
    let limit = REQUEST_BYTES_MAX;
    assert!(matches!(error, FrameError::TooLong { limit: l, .. } if l == limit), "{error}");

    // A sender is told before it sends.
    let prompt = Prompt::Text("x".repeat(REQUEST_BYTES_MAX));
    let request = ClientRequest::Order(JobOrder::from(JobRequest::greedy(prompt, 1)).into());
    let (mut sender, _receiver) = near.open_stream(StreamKind::Client).await.unwrap();
    let _stream = soon("accept", far.accept_stream()).await.unwrap();
    let error = sender.send_message(&request).await.unwrap_err().to_string();
    assert!(error.contains("was not sent") && error.contains("send less"), "{error}");
    // ... and may send something smaller then.
    sender.send_message(&ClientRequest::Status).await.unwrap();

    // Claims of whole prompts on many streams: as many as fit what a client may begin.
    let fit = PeerLimits::CLIENT.frame_bytes / REQUEST_BYTES_MAX;
    let mut streams = Vec::new();
    for _ in 0..fit {
        let (mut send, recv, sender, mut receiver) = open().await;
        send.write_all(&header(REQUEST_BYTES_MAX)).await.unwrap();
        let waits = tokio::time::timeout(Duration::from_millis(50), receiver.recv()).await;
        assert!(waits.is_err(), "a frame of which nothing came");
        streams.push((send, recv, sender, receiver));
    }
    let (mut send, _recv, _sender, mut receiver) = open().await;
    send.write_all(&header(REQUEST_BYTES_MAX)).await.unwrap();
    let error = soon("an error", receiver.recv()).await.unwrap_err();
    assert!(matches!(error, FrameError::TooMany { .. }), "{error}");
    // What is given up makes room.
    streams.clear();
    let (mut send, _recv, _sender, mut receiver) = open().await;
    send.write_all(&header(REQUEST_BYTES_MAX)).await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(50), receiver.recv()).await;
    assert!(waits.is_err());

    // Streams: as many as a client may have open, and a clear error for one more.
    let mut open = Vec::new();
    let error = loop {
        match near.open_stream(StreamKind::Client).await {
            Ok(stream) => open.push(stream),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("too many open"), "{error}");
    assert!(open.len() <= PeerLimits::CLIENT.streams as usize);
}
