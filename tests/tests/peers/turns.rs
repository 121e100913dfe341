//! Who asks for experts and does not take them: what others ask for is given to them all the same.

use std::time::{Duration, Instant};

use lite_llm_actors::peers::{SERVED_MAX, SERVED_PER_PEER_MAX};
use lite_llm_runtime::{checkpoint::Checkpoint, expert::ExpertKey};
use lite_llm_tests::Setup;
use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect, Options},
    frame::{FrameReceiver, FrameSender},
    identity::Role,
    join::join,
    messages::{WEIGHTS_CHUNK_BYTES, WeightsPart, WeightsReply},
};

use crate::{bytes_of, hello, large, loopback, request, soon};

/// An expert from a stream, or what was said instead.
async fn take(
    checkpoint: &Checkpoint,
    key: ExpertKey,
    (sender, receiver): &mut (FrameSender, FrameReceiver),
) -> Result<Vec<u8>, WeightsReply> {
    sender.send_message(&request(checkpoint, key)).await.unwrap();
    let reply = soon("a reply", receiver.recv_message::<WeightsReply>()).await.unwrap().unwrap();
    let WeightsReply::Here { bytes } = reply else { return Err(reply) };
    let (mut found, mut parts) = (Vec::new(), 0);
    while (found.len() as u64) < bytes {
        let frame = soon("a part", receiver.recv()).await.unwrap().unwrap();
        match WeightsPart::check(frame, bytes as usize - found.len()).unwrap() {
            WeightsPart::Bytes(part) => found.extend_from_slice(part.bytes()),
            WeightsPart::Ended(reply) => return Err(reply),
        }
        parts += 1;
    }
    assert_eq!(parts, bytes.div_ceil(WEIGHTS_CHUNK_BYTES as u64));
    Ok(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_take_what_it_asks_for_keeps_nobody_waiting() {
    let (_folder, checkpoint) = large();
    let keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
    let cluster = Setup::default().start(&checkpoint).await;
    let head = cluster.coordinator();
    let honest = head.status().await.unwrap().nodes.remove(0);
    let dial = async |name: &str| -> (Endpoint, Connection) {
        let joining = join(head.address(), head.token(), Role::Worker, name, &hello());
        let identity = soon("join", joining).await.unwrap();
        let endpoint = Endpoint::bind(loopback(), &identity, Options::new(hello())).unwrap();
        let expect = Expect::worker(&honest.name);
        let address = honest.address.parse().unwrap();
        let connection = soon("dial", endpoint.connect(address, &expect)).await.unwrap();
        (endpoint, connection)
    };
    let open = async |connection: &Connection| {
        soon("a stream", connection.open_stream(StreamKind::Weights)).await.unwrap()
    };
    // Two peers take all turns there are and read nothing: more than any window holds is on its way.
    let mut kept = Vec::new();
    for name in ["zz-slow-1", "zz-slow-2"] {
        let (endpoint, connection) = dial(name).await;
        let mut streams = Vec::new();
        for _ in 0..SERVED_PER_PEER_MAX {
            let mut stream = open(&connection).await;
            for _ in 0..30 {
                stream.0.send_message(&request(&checkpoint, keys[0])).await.unwrap();
            }
            streams.push(stream);
        }
        kept.push((endpoint, connection, streams));
    }
    assert_eq!(kept.len() * SERVED_PER_PEER_MAX, SERVED_MAX);
    tokio::time::sleep(Duration::from_millis(500)).await;
    // One of them asks for more than its share.
    let mut more = open(&kept[0].1).await;
    assert_eq!(take(&checkpoint, keys[1], &mut more).await, Err(WeightsReply::Busy));
    // Another peer gets what it asks for, long before the slow ones are given up for themselves.
    let (_endpoint, connection) = dial("zz-quick").await;
    let (mut stream, begun) = (open(&connection).await, Instant::now());
    for &key in &keys {
        let expected = bytes_of(&checkpoint.expert(key).unwrap());
        loop {
            match take(&checkpoint, key, &mut stream).await {
                Ok(found) => break assert!(found == expected, "{key}"),
                Err(reply) => assert_eq!(reply, WeightsReply::Busy, "{key}"),
            }
            assert!(begun.elapsed() < Duration::from_secs(3), "{key}: others keep all turns");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    drop(kept);
    connection.close("that was all");
    cluster.stop().await;
}
