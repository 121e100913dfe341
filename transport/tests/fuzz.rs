//! Damaged and hostile bytes of every message: an error or a valid view, never a panic, never a
//! read outside the frame.

mod fixtures;
mod support;

use std::{fmt::Debug, sync::LazyLock};

use fixtures::{
    assignment, events, info, order, replies, requests, residences, scored, status,
    weights_replies, weights_request,
};
use lite_llm_transport::{
    frame::{Frame, FrameKind, OutgoingFrame},
    messages::{
        Assignment, ClientReply, ClientRequest, ExpertBatchView, ExpertFailure, ExpertOutputs,
        ExpertReplyView, JobEvent, JobEventBody, Message, NodeInfo, OutgoingExpertBatch,
        OutgoingExpertOutputs, PlacementRule, RevokedNames, TraceContext, WeightsPart,
        WeightsRequest, Wire, decode, encode, experts::REASON_BYTES_MAX,
    },
    pool::BufferPool,
    session::Hello,
};
use proptest::prelude::*;
use support::batch;

static POOL: LazyLock<BufferPool> = LazyLock::new(BufferPool::default);

fn frame(kind: FrameKind, bytes: &[u8]) -> Frame {
    Frame::copied(kind, bytes, &POOL).unwrap()
}

fn batch_bytes() -> Vec<u8> {
    let mut outgoing = OutgoingExpertBatch::new(batch(3, 3, 5, 2), &POOL).unwrap();
    outgoing.rows_mut().fill(1.0);
    outgoing.finish().bytes().to_vec()
}

fn outputs_bytes() -> Vec<u8> {
    let head = ExpertOutputs { id: 3, trace: TraceContext::default(), width: 7, rows: 4 };
    let mut outgoing = OutgoingExpertOutputs::new(head, &POOL).unwrap();
    outgoing.rows_mut().fill(1.0);
    outgoing.finish().bytes().to_vec()
}

/// Reads everything that a view hands out.
fn look_at_batch(bytes: &[u8]) -> bool {
    let Ok(view) = ExpertBatchView::check(&frame(FrameKind::ExpertBatch, bytes)) else {
        return false;
    };
    let head = view.head();
    assert_eq!(view.hidden().len(), head.rows as usize * head.width as usize);
    let sum: u64 = view.hidden().iter().map(|number| u64::from(number.to_bits())).sum();
    let rows = view.calls().iter().map(|call| view.row(call.row as usize).len() as u64);
    sum.checked_add(rows.sum()).is_some()
}

fn look_at_reply(kind: FrameKind, bytes: &[u8]) -> bool {
    match ExpertReplyView::check(&frame(kind, bytes)) {
        Ok(ExpertReplyView::Outputs(view)) => {
            let head = view.head();
            let rows = 0..head.rows as usize;
            rows.map(|row| view.row(row).len()).sum::<usize>() == view.outputs().len()
        }
        Ok(ExpertReplyView::Failure(failure)) => failure.reason.len() < usize::MAX,
        Err(_) => false,
    }
}

/// A whole value survives; every cut of it is an error or a value, as is every flipped bit.
fn damage<T: Wire + PartialEq + Debug>(value: &T) {
    let bytes = encode(value);
    assert_eq!(&decode::<T>(&bytes).unwrap(), value);
    for len in 0..bytes.len() {
        let _ = decode::<T>(&bytes[..len]);
        let _ = decode::<T>(&bytes[bytes.len() - len..]);
    }
    for at in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[at / 8] ^= 1 << (at % 8);
        let _ = decode::<T>(&damaged);
    }
}

fn damage_frames<T: Message + PartialEq + Debug>(values: &[T]) {
    for value in values {
        damage(value);
        let outgoing = OutgoingFrame::message(value).unwrap();
        let whole = frame(outgoing.kind(), outgoing.bytes());
        assert_eq!(&whole.decode::<T>().unwrap(), value);
        assert!(frame(FrameKind::ExpertBatch, outgoing.bytes()).decode::<T>().is_err());
    }
}

#[test]
fn every_cut_and_flip_of_every_owned_message_is_survived() {
    damage_frames(&events());
    damage_frames(&requests());
    damage_frames(&replies());
    damage_frames(&[ClientReply::Residences(vec![residences()])]);
    damage_frames(&[ExpertFailure::new(1, "there is no such expert here")]);
    damage_frames(&[weights_request()]);
    damage_frames(&weights_replies());
    damage_frames(&[order()]);
    damage_frames(&[scored()]);
    damage(&info());
    damage(&assignment());
    damage(&status());
}

#[test]
fn every_cut_and_flip_of_a_batch_and_of_its_reply_is_survived() {
    let (batch, outputs) = (batch_bytes(), outputs_bytes());
    assert!(look_at_batch(&batch) && look_at_reply(FrameKind::ExpertOutputs, &outputs));
    for (bytes, look) in [
        (&batch, &look_at_batch as &dyn Fn(&[u8]) -> bool),
        (&outputs, &|bytes: &[u8]| look_at_reply(FrameKind::ExpertOutputs, bytes)),
    ] {
        for len in 0..bytes.len() {
            look(&bytes[..len]);
            look(&bytes[bytes.len() - len..]);
        }
        for at in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            look(&damaged);
        }
        // Every aligned word at the values where arithmetic breaks.
        for at in (0..bytes.len() / 4).map(|word| word * 4) {
            for value in [0, 1, u32::MAX, i32::MAX as u32, i32::MIN as u32, 1 << 16, 1 << 26] {
                let mut damaged = bytes.clone();
                damaged[at..at + 4].copy_from_slice(&value.to_le_bytes());
                look(&damaged);
            }
        }
    }
    assert!(!look_at_batch(&outputs), "outputs passed as a batch");
}

#[test]
fn a_batch_that_contradicts_itself_is_refused_and_the_field_is_named() {
    let build = |change: &dyn Fn(&mut lite_llm_transport::messages::ExpertBatch)| {
        let mut head = batch(1, 4, 32, 2);
        change(&mut head);
        OutgoingExpertBatch::new(head, &POOL).unwrap_err().to_string()
    };
    for (error, word) in [
        (build(&|head| head.rows = 0), "rows is 0"),
        (build(&|head| head.rows = u32::MAX), "rows is 4294967295"),
        (build(&|head| head.width = 0), "width is 0"),
        (build(&|head| head.width = u32::MAX), "width is 4294967295"),
        (build(&|head| head.calls.clear()), "calls is 0"),
        (build(&|head| head.calls[1].row = 4), "row of a call is 4; less than the batch's 4 rows"),
        (build(&|head| (head.rows, head.width) = (1 << 16, 1 << 16)), "a frame holds at most"),
        (build(&|head| (head.width, head.calls) = (1 << 16, vec![head.calls[0]; 300])), "calls is"),
    ] {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
    // The same, when it comes from a peer: rows and width are changed in the finished bytes.
    let whole = batch_bytes();
    let fields = whole.windows(8).rposition(|w| w == [5, 0, 0, 0, 3, 0, 0, 0]).expect("its shape");
    for (width, rows) in
        [(0, 3), (5, 0), (5, 2), (5, 4), (6, 3), (u32::MAX, u32::MAX), (1 << 16, 1)]
    {
        let mut hostile = whole.clone();
        hostile[fields..fields + 4].copy_from_slice(&u32::to_le_bytes(width));
        hostile[fields + 4..fields + 8].copy_from_slice(&u32::to_le_bytes(rows));
        let check = ExpertBatchView::check(&frame(FrameKind::ExpertBatch, &hostile));
        assert!(check.is_err(), "{rows} rows of {width} were believed");
    }
}

#[test]
fn values_that_contradict_their_shape_are_refused() {
    let refused = |body| {
        let event = JobEvent { job: 1, trace: TraceContext::default(), body };
        let outgoing = OutgoingFrame::message(&ClientReply::Event(event)).unwrap();
        frame(outgoing.kind(), outgoing.bytes()).decode::<ClientReply>().is_err()
    };
    let logits =
        |rows, width| JobEventBody::Logits { first_row: 0, rows, width, values: vec![0.0; 6] };
    let routes =
        |layers, rows, k| JobEventBody::Routes { first_row: 0, layers, rows, k, ids: vec![0; 12] };
    assert!(!refused(logits(2, 3)) && !refused(routes(2, 3, 2)));
    assert!(refused(logits(2, 2)) && refused(logits(u32::MAX, u32::MAX)));
    assert!(refused(routes(2, 3, 3)) && refused(routes(u32::MAX, u32::MAX, u32::MAX)));

    let reason = |bytes: usize| ExpertFailure { id: 1, reason: "x".repeat(bytes) };
    let checked = |bytes| {
        let bytes = encode(&reason(bytes));
        ExpertReplyView::check(&frame(FrameKind::ExpertFailure, &bytes))
    };
    assert!(checked(REASON_BYTES_MAX).is_ok() && checked(REASON_BYTES_MAX + 1).is_err());

    assert!(assignment().check().is_ok());
    assert!(Assignment { you: 2, ..assignment() }.check().is_err());
    let rule = assignment().placement.remove(0);
    for bad in [
        PlacementRule { holders: vec![0, 7], ..rule.clone() },
        PlacementRule { holders: vec![], ..rule.clone() },
        PlacementRule { copies: 0, ..rule.clone() },
        PlacementRule { copies: 2, ..rule.clone() },
        PlacementRule { holders: vec![0; 1 << 17], ..rule.clone() },
    ] {
        let error = Assignment { placement: vec![bad], ..assignment() }.check().unwrap_err();
        assert!(error.to_string().contains("Assignment"), "{error}");
    }
    assert!(Assignment { placement: vec![rule; 5000], ..assignment() }.check().is_err());
    assert!(Assignment { nodes: vec![], ..assignment() }.check().is_err());
}

proptest! {
    #[test]
    fn random_bytes_are_survived_as_every_message(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        look_at_batch(&bytes);
        look_at_reply(FrameKind::ExpertOutputs, &bytes);
        look_at_reply(FrameKind::ExpertFailure, &bytes);
        let _ = decode::<ClientRequest>(&bytes);
        let _ = decode::<ClientReply>(&bytes);
        let _ = decode::<JobEvent>(&bytes);
        let _ = decode::<Assignment>(&bytes);
        let _ = decode::<RevokedNames>(&bytes).map(|names| names.check());
        let _ = decode::<NodeInfo>(&bytes);
        let _ = decode::<WeightsRequest>(&bytes);
        for kind in [FrameKind::Weights, FrameKind::WeightsReply, FrameKind::WeightsRequest] {
            let part = WeightsPart::check(frame(kind, &bytes), 100);
            let fits = (1..=100).contains(&bytes.len());
            assert!(kind != FrameKind::Weights || part.is_ok() == fits);
        }
        let _ = Hello::from_bytes(&bytes);
        let _ = String::from_utf8_lossy(&bytes).parse::<TraceContext>();
    }

    #[test]
    fn random_damage_to_a_batch_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        for (whole, reply) in [(batch_bytes(), false), (outputs_bytes(), true)] {
            let mut damaged = whole;
            for (at, value) in &changes {
                let at = at.index(damaged.len());
                damaged[at] = *value;
            }
            if reply { look_at_reply(FrameKind::ExpertOutputs, &damaged) } else { look_at_batch(&damaged) };
        }
    }
}
