//! A worker that has a valid certificate and asks for weights as no honest one does: the worker that
//! it asks neither panics nor hangs, gives what it may and no more, and goes on serving.

use std::time::Duration;

use lite_llm_actors::peers::STREAMS_PER_PEER_MAX;
use lite_llm_runtime::expert::ExpertKey;
use lite_llm_tests::{Setup, job, reference, run};
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    identity::Role,
    join::join,
    messages::{WeightsPart, WeightsReply, WeightsRequest, encode},
};

use crate::{bytes_of, hello, loopback, request, soon};

/// Frames as they stand on the wire.
fn framed(len: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    [&len.to_le_bytes()[..], &kind.to_le_bytes(), body].concat()
}

const WEIGHTS_REQUEST: u32 = 9;

/// Asks on a stream of its own; nothing if it ends without an answer.
async fn ask(connection: &Connection, request: &WeightsRequest) -> Option<WeightsReply> {
    let asking = async {
        let stream = connection.open_stream(StreamKind::Weights).await.ok()?;
        let (mut sender, mut receiver) = stream;
        sender.send_message(request).await.ok()?;
        receiver.recv_message::<WeightsReply>().await.ok()?
    };
    soon("an answer", asking).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_a_hostile_worker_harm_nobody() {
    let (_folder, checkpoint, _) = reference("olmoe");
    let cluster = Setup::default().start(&checkpoint).await;
    let job = job(&[1, 2, 3, 4, 5], 6, 0);
    let expected = run(&cluster, job.clone()).await.unwrap();
    let head = cluster.coordinator();
    let hello = hello();
    let joining = join(head.address(), head.token(), Role::Worker, "zz-evil", &hello);
    let identity = soon("join", joining).await.unwrap();
    let endpoint = Endpoint::bind(loopback(), &identity, Options::new(hello)).unwrap();
    let honest = head.status().await.unwrap().nodes.remove(0);
    let address = honest.address.parse().unwrap();
    let dial = || async {
        let expect = Expect::worker(&honest.name);
        soon("dial", endpoint.connect(address, &expect)).await.unwrap()
    };
    let connection = dial().await;

    // What is here is given, one after the other on one stream, and is what it should be.
    let (mut sender, mut receiver) = connection.open_stream(StreamKind::Weights).await.unwrap();
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    for &key in &keys {
        sender.send_message(&request(&checkpoint, key)).await.unwrap();
        let reply = soon("reply", receiver.recv_message::<WeightsReply>()).await.unwrap();
        let expected = bytes_of(&checkpoint.expert(key).unwrap());
        assert_eq!(reply, Some(WeightsReply::Here { bytes: expected.len() as u64 }), "{key}");
        let mut found = Vec::new();
        while found.len() < expected.len() {
            let frame = soon("a part", receiver.recv()).await.unwrap().unwrap();
            match WeightsPart::check(frame, expected.len() - found.len()).unwrap() {
                WeightsPart::Bytes(part) => found.extend_from_slice(part.bytes()),
                WeightsPart::Ended(reply) => panic!("{key}: {reply:?}"),
            }
        }
        assert!(found == expected, "{key}");
    }
    drop((sender, receiver));

    // Keys and checkpoints that there are not.
    let valid = request(&checkpoint, keys[0]);
    let strange = [
        WeightsRequest { checkpoint: [0; 32], ..valid.clone() },
        WeightsRequest { layer: u16::MAX, ..valid.clone() },
        WeightsRequest { tier: u16::MAX, ..valid.clone() },
        WeightsRequest { group: u32::MAX, ..valid.clone() },
        WeightsRequest { expert: u32::MAX, ..valid.clone() },
        WeightsRequest { layer: 1 << 15, tier: 1, group: 1, expert: 1 << 31, ..valid.clone() },
    ];
    for request in strange {
        assert_eq!(ask(&connection, &request).await, Some(WeightsReply::NotHere), "{request:?}");
    }

    // Frames that are none, claim more than they may, or are of another kind.
    let body = encode(&valid);
    let mut bad = vec![vec![], vec![0], vec![0xff; 7], b"GET / HTTP/1.1\r\n\r\n".to_vec()];
    for len in [0, 1, 1025, 1 << 20, 64 << 20, u32::MAX] {
        bad.push(framed(len, WEIGHTS_REQUEST, &[]));
        bad.push(framed(len, WEIGHTS_REQUEST, &[7; 3]));
    }
    for kind in (0..13).chain([99, u32::MAX, 1 << 16 | WEIGHTS_REQUEST]) {
        if kind != WEIGHTS_REQUEST {
            bad.push(framed(body.len() as u32, kind, &body));
        }
    }
    for at in 0..body.len() {
        bad.push(framed(at as u32, WEIGHTS_REQUEST, &body[..at]));
    }
    let mut connection = connection;
    for bytes in bad {
        if connection.close_reason().is_some() {
            connection = dial().await;
        }
        let sent = async {
            let opened = connection.open_raw(StreamKind::Weights).await;
            let Ok((mut sender, mut receiver)) = opened else { return };
            let _ = sender.write_all(&bytes).await;
            let _ = sender.finish();
            let answer = receiver.read_to_end(1 << 20).await;
            // It ends without an answer, or its connection does.
            assert!(answer.map_or(true, |answer| answer.is_empty()), "{bytes:?}");
        };
        soon("the end of a stream", sent).await;
    }

    // More streams than one may have, all with a request whose answer nobody reads; no more of them are
    // answered than may be.
    if connection.close_reason().is_some() {
        connection = dial().await;
    }
    let mut open = Vec::new();
    for _ in 0..6 * STREAMS_PER_PEER_MAX {
        let Ok((mut sender, receiver)) = connection.open_raw(StreamKind::Weights).await else {
            break;
        };
        let ask = framed(body.len() as u32, WEIGHTS_REQUEST, &body);
        for _ in 0..50 {
            let _ = tokio::time::timeout(Duration::from_millis(20), sender.write_all(&ask)).await;
        }
        open.push((sender, receiver));
    }
    let mut answered = 0;
    for (_, receiver) in &mut open {
        let mut header = [0; 8];
        let read = receiver.read_exact(&mut header);
        let read = tokio::time::timeout(Duration::from_secs(5), read).await;
        answered += usize::from(matches!(read, Ok(Ok(()))));
    }
    assert!((1..=STREAMS_PER_PEER_MAX).contains(&answered), "{answered} of {}", open.len());
    assert!(run(&cluster, job.clone()).await.as_ref() == Ok(&expected), "meanwhile");
    drop(open);
    assert!(run(&cluster, job).await.as_ref() == Ok(&expected), "afterwards");
    connection.close("that was all");
    cluster.stop().await;
}
