//! The streams between roles, as the actors and the command line use them.

mod support;

use lite_llm_transport::{
    connection::{Connection, StreamKind},
    endpoint::{Endpoint, Expect},
    identity::Role,
    join::join,
    messages::{
        ClientReply, ClientRequest, EndReason, JobEvent, JobEventBody, JobOrder, JobRequest,
        LogitsWanted, Prompt, TraceContext,
    },
    session::Hello,
};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn meet(from: &Endpoint, to: &Endpoint) -> (Connection, Connection) {
    let (address, expect) = (to.local_addr().unwrap(), Expect::Peer(to.who().clone()));
    let both = async { tokio::join!(from.connect(address, &expect), to.accept()) };
    let (near, far) = soon("connect", both).await;
    (near.unwrap(), far.unwrap())
}

#[tokio::test]
async fn a_control_stream_is_plain_bytes_both_ways_whoever_opens_it() {
    let ca = authority();
    let (head, w1) = (coordinator(&ca), worker(&ca, "w1"));
    let (near, far) = meet(&w1, &head).await;
    for (opener, acceptor) in [(&near, &far), (&far, &near)] {
        let (mut send, mut recv) = opener.open_raw(StreamKind::Control).await.unwrap();
        let accepted = soon("accept", acceptor.accept_stream()).await.unwrap();
        assert_eq!(accepted.kind, StreamKind::Control);
        let (mut back, mut there) = accepted.into_raw();
        AsyncWriteExt::write_all(&mut send, b"question").await.unwrap();
        let mut question = [0; 8];
        AsyncReadExt::read_exact(&mut there, &mut question).await.unwrap();
        assert_eq!(&question, b"question");
        AsyncWriteExt::write_all(&mut back, b"answer").await.unwrap();
        AsyncWriteExt::shutdown(&mut back).await.unwrap();
        let mut answer = Vec::new();
        AsyncReadExt::read_to_end(&mut recv, &mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
    }
}

#[tokio::test]
async fn a_client_joins_submits_and_reads_its_events_to_the_last() {
    let ca = authority();
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    let trace: TraceContext =
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().unwrap();
    let request = JobRequest {
        prompt: Prompt::Text("how do I list files?".into()),
        max_new_tokens: 2,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        seed: 0,
        tiers: "all".into(),
        stop_at_eos: true,
        want_logits: LogitsWanted::None,
        want_routes: false,
        prefill_chunk: 0,
        trace,
    };
    let request = ClientRequest::Order(JobOrder::from(request).into());
    let events = [
        JobEventBody::Token { index: 0, id: 5, text: Some("ls".into()) },
        JobEventBody::Done { reason: EndReason::Length, generated: 1 },
    ]
    .map(|body| ClientReply::Event(JobEvent { job: 1, trace, body }));
    let replies: Vec<_> = [ClientReply::Accepted { job: 1 }].into_iter().chain(events).collect();

    let (expected, answers) = (request.clone(), replies.clone());
    let serving = tokio::spawn(async move {
        let connection = head.accept().await.unwrap();
        assert_eq!(connection.peer().role, Role::Client);
        let stream = connection.accept_stream().await.unwrap();
        let (mut sender, mut receiver) = stream.into_frames();
        let request = receiver.recv_message::<ClientRequest>().await.unwrap();
        assert_eq!(request, Some(expected));
        for reply in &answers {
            sender.send_message(reply).await.unwrap();
        }
        // Everything is dropped at once: what was sent is there all the same.
        sender.finish().await.unwrap();
    });

    let token = ca.join_token(Role::Client, address.to_string()).unwrap();
    let hello = Hello::new(1);
    let identity =
        soon("join", join(address, &token, Role::Client, "someone", &hello)).await.unwrap();
    let endpoint = Endpoint::outgoing(address, &identity, options()).unwrap();
    let expect = Expect::coordinator();
    let connection = soon("connect", endpoint.connect(address, &expect)).await.unwrap();
    let (mut sender, mut receiver) = connection.open_stream(StreamKind::Client).await.unwrap();
    sender.send_message(&request).await.unwrap();
    let mut read: Vec<ClientReply> = Vec::new();
    while let Some(reply) = soon("reply", receiver.recv_message()).await.unwrap() {
        read.push(reply);
    }
    assert_eq!(read, replies);
    soon("serving", serving).await.unwrap();
}

#[tokio::test]
async fn dropping_an_endpoint_ends_its_connections() {
    let ca = authority();
    let (w1, w2) = (worker(&ca, "w1"), worker(&ca, "w2"));
    let (near, far) = meet(&w1, &w2).await;
    drop(w1);
    let lost = soon("closed", far.closed()).await;
    assert!(lost.to_string().contains("worker w1"), "{lost}");
    assert!(near.close_reason().is_some());
    w2.close("done").await;
    assert!(soon("accept", w2.accept()).await.is_none());
}
