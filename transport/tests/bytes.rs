//! A handshake, a frame of each kind and an assignment as files, which every later build must write
//! and read alike. A file's name says with which protocol its layout came; what a later protocol
//! adds are further messages, and variants at the ends of enums.
//!
//! If this fails, a layout changed: undo that, and give what is new a message of its own. New files
//! are written with `LITE_LLM_WRITE_BYTES=1`.

mod fixtures;
mod support;

use std::{fmt::Debug, fs, path::PathBuf};

use lite_llm_transport::{
    frame::{Frame, OutgoingFrame},
    messages::{
        Assignment, ClientReply, ClientRequest, ClusterStatus, DetachedJob, ExpertBatchView,
        ExpertFailure, ExpertOutputs, ExpertPlace, ExpertReplyView, FailedExpert, JobEnding,
        JobEvent, JobEventBody, LinkView, Message, NodeInfo, NodeReport, NodeView, NodeVitals,
        OutgoingExpertBatch, OutgoingExpertOutputs, OutgoingWeights, TraceContext, WeightsPart,
        decode, encode,
    },
    pool::BufferPool,
    session::Hello,
};
use support::batch;

fn kept(name: &str, outgoing: &OutgoingFrame) -> Frame {
    Frame::copied(outgoing.kind(), &kept_bytes(name, outgoing.bytes()), &BufferPool::default())
        .unwrap()
}

/// The bytes of a file, which are those that this build writes.
fn kept_bytes(name: &str, written: &[u8]) -> Vec<u8> {
    let file = format!("tests/data/{name}.bin");
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(&file);
    if std::env::var_os("LITE_LLM_WRITE_BYTES").is_some() && !path.exists() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, written).unwrap();
    }
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
    assert!(bytes == written, "{file}: this build lays the message otherwise");
    bytes
}

/// A message whose frame is kept.
fn message<T: Message + PartialEq + Debug>(name: &str, value: &T) {
    let frame = kept(name, &OutgoingFrame::message(value).unwrap());
    assert_eq!(&frame.decode::<T>().unwrap(), value);
}

#[test]
fn messages_are_written_and_read_as_they_were() {
    for (i, event) in fixtures::events().iter().enumerate() {
        message(&format!("job_event_{i}.v2"), event);
    }
    // Events are replies, too. How a cluster is has another layout since.
    for i in [0, 2, 3] {
        message(&format!("client_reply_{i}.v2"), &fixtures::replies()[i]);
    }
    let assignment = fixtures::assignment();
    let bytes = kept_bytes("assignment.v2", &encode(&assignment));
    assert_eq!(decode::<Assignment>(&bytes).unwrap(), assignment);
    let info = fixtures::info();
    assert_eq!(decode::<NodeInfo>(&kept_bytes("node_info.v2", &encode(&info))).unwrap(), info);
    let hello = Hello { protocol: 2, checkpoint: Some([9; 32]), ..Hello::new(2) };
    let bytes = kept_bytes("hello.v2", &hello.to_bytes());
    assert_eq!(Hello::from_bytes(&bytes), Some(hello));
}

#[test]
fn what_protocol_3_added_is_written_and_read_as_it_was() {
    message("client_reply_noted.v3", &ClientReply::Noted);
    // What the ledger's file holds.
    let ending = fixtures::ending();
    let bytes = kept_bytes("job_ending.v3", &encode(&ending));
    assert_eq!(decode::<JobEnding>(&bytes).unwrap(), ending);
    message("weights_request.v3", &fixtures::weights_request());
    for (i, reply) in fixtures::weights_replies().iter().enumerate() {
        message(&format!("weights_reply_{i}.v3"), reply);
    }
    let pool = BufferPool::default();
    pool.take(4096).unwrap().fill(0xaa);
    let mut outgoing = OutgoingWeights::new(5, &pool).unwrap();
    outgoing.bytes_mut().copy_from_slice(&[1, 2, 3, 4, 5]);
    let part = WeightsPart::check(kept("weights.v3", &outgoing.finish()), 5).unwrap();
    let WeightsPart::Bytes(part) = part else { panic!("not a part") };
    assert_eq!(part.bytes(), [1, 2, 3, 4, 5]);
    let body = JobEventBody::NotTaken { reason: "it is full".into() };
    message("job_event_scored_token.v3", &fixtures::scored());
    message("job_event_not_taken.v3", &JobEvent { job: 1, trace: Default::default(), body });
    let report = NodeReport { info: fixtures::info(), holding: Some(fixtures::assignment()) };
    let bytes = kept_bytes("node_report.v3", &encode(&report));
    assert_eq!(decode::<NodeReport>(&bytes).unwrap(), report);
}

/// Protocol 4 has one way to send a job, and knows of grammars and schedulers.
#[test]
fn what_protocol_4_changed_is_written_and_read_as_it_was() {
    for (i, request) in fixtures::requests().iter().enumerate() {
        message(&format!("client_request_{i}.v4"), request);
    }
    message("client_request_drain.v4", &ClientRequest::Drain("w1".into()));
    message("client_request_residences.v4", &ClientRequest::Residences);
    message("client_request_order.v4", &ClientRequest::Order(fixtures::order().into()));
    for (i, request) in fixtures::detached_requests().into_iter().enumerate() {
        message(&format!("client_request_detached_{i}.v4"), &ClientRequest::Detached(request));
    }
    let residences = fixtures::residences();
    message("client_reply_residences.v4", &ClientReply::Residences(vec![residences]));
    for (i, reply) in fixtures::detached_replies().into_iter().enumerate() {
        message(&format!("client_reply_detached_{i}.v4"), &ClientReply::Detached(reply));
    }
    message("client_reply_status.v4", &ClientReply::Status(fixtures::status()));
    message("job_order.v4", &fixtures::order());
    let job = fixtures::detached_job();
    let bytes = kept_bytes("detached_job.v4", &encode(&job));
    assert_eq!(decode::<DetachedJob>(&bytes).unwrap(), job);
    let status = fixtures::status();
    let bytes = kept_bytes("cluster_status.v4", &encode(&status));
    assert_eq!(decode::<ClusterStatus>(&bytes).unwrap(), status);
    let status = fixtures::status().nodes.remove(0);
    let vitals = NodeVitals { status, busy: true, progress: 7, unreachable: vec!["w2".into()] };
    let bytes = kept_bytes("node_vitals.v4", &encode(&vitals));
    assert_eq!(decode::<NodeVitals>(&bytes).unwrap(), vitals);
}

#[test]
fn frames_of_experts_are_written_and_read_as_they_were() {
    // A pool whose buffers hold what earlier frames left: nothing of that may reach the wire.
    let pool = BufferPool::default();
    pool.take(4096).unwrap().fill(0xaa);

    let mut outgoing = OutgoingExpertBatch::new(batch(3, 3, 5, 2), &pool).unwrap();
    outgoing.rows_mut().copy_from_slice(&std::array::from_fn::<f32, 15, _>(|i| i as f32));
    let view = ExpertBatchView::check(&kept("expert_batch.v2", &outgoing.finish())).unwrap();
    assert_eq!(view.head(), &batch(3, 3, 5, 2));
    assert_eq!(view.row(2), [10.0, 11.0, 12.0, 13.0, 14.0]);

    pool.take(4096).unwrap().fill(0xaa);
    let trace = TraceContext { trace_id: [7; 16], span_id: [5; 8], flags: 1 };
    let head = ExpertOutputs { id: 3, trace, width: 3, rows: 2 };
    let mut outgoing = OutgoingExpertOutputs::new(head.clone(), &pool).unwrap();
    outgoing.rows_mut().copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, -0.0]);
    let frame = kept("expert_outputs.v2", &outgoing.finish());
    let ExpertReplyView::Outputs(view) = ExpertReplyView::check(&frame).unwrap() else {
        panic!("not outputs");
    };
    assert_eq!((view.head(), view.row(1)[0]), (&head, 4.0));
    assert_eq!(view.row(1)[2].to_bits(), (-0.0_f32).to_bits());

    pool.take(4096).unwrap().fill(0xaa);
    let mut outgoing = OutgoingExpertOutputs::new(head.clone(), &pool).unwrap();
    outgoing.rows_mut().copy_from_slice(&[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]);
    let failed =
        |expert, reason: &str| FailedExpert { tier: 1, group: 2, expert, reason: reason.into() };
    let failed = vec![failed(3, "short"), failed(4, "its file cannot be read")];
    let outgoing = outgoing.finish_without(failed.clone(), &pool).unwrap();
    let frame = kept("expert_outputs_failed.v2", &outgoing);
    let ExpertReplyView::Outputs(view) = ExpertReplyView::check(&frame).unwrap() else {
        panic!("not outputs");
    };
    assert_eq!((view.head(), view.failed(), view.row(0)[2]), (&head, &failed[..], 3.0));

    let failure = ExpertFailure::new(3, "the expert is not here");
    let frame = kept("expert_failure.v2", &OutgoingFrame::message(&failure).unwrap());
    assert_eq!(frame.decode::<ExpertFailure>().unwrap(), failure);
}

#[test]
fn messages_of_training_are_written_and_read_as_they_were() {
    use lite_llm_transport::messages::TrainMessage::{Call, Failed, Given, Order, Rank, Ranks};
    let trace = TraceContext { trace_id: [1; 16], span_id: [2; 8], flags: 1 };
    let all = [
        Ranks { rank: 1, epoch: 2, bytes: 7 },
        Order { trace, bytes: 8 },
        Rank { rank: 3, epoch: 4 },
        Call { trace, bytes: 9 },
        Given { bytes: 10 },
        Failed { bytes: 11 },
    ];
    for (i, head) in all.iter().enumerate() {
        message(&format!("train_message_{i}.v4"), head);
    }
}

#[test]
fn what_nodes_show_is_written_and_read_as_it_was() {
    let link = LinkView { peer: "w2".into(), sent: 7, sent_bytes: 4096 };
    let view = NodeView {
        name: "w1".into(),
        layers: 1,
        experts: 3,
        places: vec![ExpertPlace::Elsewhere, ExpertPlace::Away, ExpertPlace::Memory],
        loads: vec![0, 1, 2],
        links: vec![link],
    };
    let bytes = kept_bytes("node_view.v3", &encode(&view));
    assert_eq!(decode::<NodeView>(&bytes).unwrap(), view);
}
