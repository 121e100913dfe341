//! Workers that send batches, and answer them, as no honest one does.
//!
//! What cannot be told: an owner of experts that answers in the right shape, with finite numbers that
//! are wrong, is believed. Workers are trusted with arithmetic; what they say is not trusted with
//! anything else.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use lite_llm_transport::{
    connection::{Connection, StreamKind},
    frame::{Frame, FrameKind},
    messages::{
        ExpertBatch, ExpertBatchView, ExpertCall, ExpertFailure, ExpertOutputs, ExpertReplyView,
        FailedExpert, OutgoingExpertBatch, OutgoingExpertOutputs, TraceContext, encode,
    },
    pool::BufferPool,
};

use crate::{
    cluster::{Cluster, HonestJob, soon},
    damage::{Draws, times},
    frames::{
        self, CLIENT_REPLY, EXPERT_BATCH, EXPERT_FAILURE, EXPERT_OUTPUTS, JOB_EVENT, JOB_ORDER, Raw,
    },
    member::{Member, drop_jobs},
};

const EVIL: &str = "zz-evil";
/// Numbers of a hidden state of the tiny model.
const WIDTH: u32 = 64;

fn head(rows: u32, width: u32) -> ExpertBatch {
    let call = |row| ExpertCall { row, tier: 0, group: 0, expert: row % 8 };
    let calls = (0..rows).map(call).collect();
    ExpertBatch { id: 1, trace: TraceContext::default(), layer: 0, width, rows, calls }
}

fn batch(head: ExpertBatch, number: f32) -> Vec<u8> {
    let mut batch = OutgoingExpertBatch::new(head, &BufferPool::default()).unwrap();
    batch.rows_mut().fill(number);
    batch.finish().bytes().to_vec()
}

/// The bytes with another number wherever a pair of words is found last.
fn patched(bytes: &[u8], found: (u32, u32), put: (u32, u32)) -> Vec<u8> {
    let pair = |(a, b): (u32, u32)| [a.to_le_bytes(), b.to_le_bytes()].concat();
    let at = bytes.windows(8).rposition(|words| words == pair(found)).expect("its shape");
    let mut bytes = bytes.to_vec();
    bytes[at..at + 8].copy_from_slice(&pair(put));
    bytes
}

/// Shapes that the bytes do not have, or that no frame could have.
const SHAPES: [(u32, u32); 10] = [
    (0, 0),
    (0, 3),
    (WIDTH, 0),
    (WIDTH, 2),
    (WIDTH, 4),
    (WIDTH + 1, 3),
    (u32::MAX, u32::MAX),
    (1 << 16, 1 << 16),
    (1 << 31, 2),
    (WIDTH, u32::MAX),
];

/// Batches whose calls are not of this model, or whose numbers are none.
fn extreme_batches() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut with = |change: &dyn Fn(&mut ExpertBatch)| {
        let mut head = head(3, WIDTH);
        change(&mut head);
        all.push(batch(head, 0.5));
    };
    for number in [1, u16::MAX, i16::MAX as u16] {
        with(&|head| head.layer = number);
        with(&|head| head.calls[1].tier = number);
        with(&|head| (head.layer, head.calls[0].tier) = (number, number));
    }
    for number in [1, 8, u32::MAX, i32::MAX as u32] {
        with(&|head| head.calls[1].group = number);
        with(&|head| head.calls[1].expert = number);
        with(&|head| (head.calls[1].group, head.calls[1].expert) = (number, number));
    }
    for id in [0, u64::MAX] {
        with(&|head| head.id = id);
    }
    with(&|head| head.calls = vec![head.calls[0]; 20_000]);
    with(&|head| head.trace.flags = 0xff);
    for width in [1, WIDTH - 1, WIDTH + 1, 1 << 16] {
        with(&|it| *it = head(3, width));
    }
    let numbers = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE / 2.0];
    all.extend(numbers.map(|number| batch(head(3, WIDTH), number)));
    let valid = batch(head(3, WIDTH), 0.5);
    all.extend(SHAPES.map(|shape| patched(&valid, (WIDTH, 3), shape)));
    // The row of a call, before its tier of 0.
    for row in [3, u32::MAX, i32::MAX as u32] {
        all.push(patched(&valid, (2, 0), (row, 0)));
    }
    all
}

/// Sends bytes on a stream of experts, and returns whether they were answered.
async fn sent(connection: &Connection, bytes: &[u8]) -> bool {
    let sending = async {
        let Ok(stream) = connection.open_raw(StreamKind::Experts).await else { return false };
        let (mut sender, mut receiver) = stream;
        let _ = sender.write_all(bytes).await;
        // The stream stays open until there is an answer, or the other side ends it.
        let answer = tokio::time::timeout(Duration::from_millis(300), frames::read(&mut receiver));
        if let Ok(answer) = answer.await {
            return answer.is_some();
        }
        let _ = sender.finish();
        frames::read(&mut receiver).await.is_some()
    };
    soon("an answer, or the end of a stream", sending).await
}

fn framed((kind, body): &Raw) -> Vec<u8> {
    frames::claimed(body.len() as u32, u32::from(*kind), body)
}

/// Dials again if the honest worker has hung up.
async fn live(member: &Member, connection: &mut Connection) {
    if connection.close_reason().is_some() {
        *connection = member.dial().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_of_a_hostile_worker_harm_nobody() {
    let mut cluster = Cluster::start(1).await;
    let member = Member::join(&cluster, EVIL).await;
    let mut connection = member.dial().await;
    let valid = batch(head(3, WIDTH), 0.5);
    assert!(sent(&connection, &framed(&(EXPERT_BATCH, valid.clone()))).await, "a valid batch");
    for body in extreme_batches() {
        live(&member, &mut connection).await;
        sent(&connection, &framed(&(EXPERT_BATCH, body))).await;
    }
    cluster.serves("batches that contradict themselves").await;
    for kind in 2..=8 {
        live(&member, &mut connection).await;
        let answered = sent(&connection, &framed(&(kind, valid.clone()))).await;
        assert!(!answered, "a frame of kind {kind} is no batch");
    }
    let mut draws = Draws(6);
    for n in 0..times(150) {
        live(&member, &mut connection).await;
        let bytes = match n % 4 {
            0 => draws.damaged(&framed(&(EXPERT_BATCH, valid.clone()))),
            _ => framed(&(EXPERT_BATCH, draws.damaged(&valid))),
        };
        sent(&connection, &bytes).await;
    }
    cluster.serves("damaged batches").await;
    // Headers of frames that never come, as many as there may be streams, and none ended.
    live(&member, &mut connection).await;
    let mut open = Vec::new();
    for bytes in frames::no_frames().iter().cycle().take(200) {
        if let Ok((mut sender, receiver)) = connection.open_raw(StreamKind::Experts).await {
            let _ = sender.write_all(bytes).await;
            open.push((sender, receiver));
        }
        live(&member, &mut connection).await;
    }
    cluster.serves("frames that never come").await;
    drop(open);
    // Batches whose answers nobody reads.
    live(&member, &mut connection).await;
    let many =
        batch(ExpertBatch { calls: vec![head(1, WIDTH).calls[0]; 4000], ..head(1, WIDTH) }, 0.5);
    let flood = async {
        let (mut sender, _receiver) = connection.open_raw(StreamKind::Experts).await.unwrap();
        for _ in 0..3000 {
            if !frames::write(&mut sender, &(EXPERT_BATCH, many.clone())).await {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let _ = tokio::time::timeout(Duration::from_secs(5), flood).await;
    cluster.serves("answers that nobody reads").await;
}

/// What is answered to a batch.
type Answer = Box<dyn Fn(&ExpertBatch) -> Vec<u8> + Send>;

fn outputs(batch: &ExpertBatch, change: impl Fn(&mut ExpertOutputs), number: f32) -> Vec<u8> {
    let (id, trace, rows) = (batch.id, batch.trace, batch.calls.len() as u32);
    let mut head = ExpertOutputs { id, trace, width: batch.width, rows };
    change(&mut head);
    let mut outputs = OutgoingExpertOutputs::new(head, &BufferPool::default()).unwrap();
    outputs.rows_mut().fill(number);
    outputs.finish().bytes().to_vec()
}

/// The outputs of a batch of which these experts were not run.
fn without(batch: &ExpertBatch, failed: Vec<FailedExpert>) -> Vec<u8> {
    let (id, trace, rows) = (batch.id, batch.trace, batch.calls.len() as u32);
    let head = ExpertOutputs { id, trace, width: batch.width, rows };
    let pool = BufferPool::default();
    let mut outputs = OutgoingExpertOutputs::new(head, &pool).unwrap();
    outputs.rows_mut().fill(0.5);
    outputs.finish_without(failed, &pool).unwrap().bytes().to_vec()
}

/// Whether outputs could be those of a batch, but for their numbers.
fn is_sound(batch: &ExpertBatch, body: &[u8]) -> bool {
    let frame = Frame::copied(FrameKind::ExpertOutputs, body, &BufferPool::default()).unwrap();
    let Ok(ExpertReplyView::Outputs(view)) = ExpertReplyView::check(&frame) else { return false };
    let ExpertOutputs { id, width, rows, .. } = *view.head();
    (id, width, rows as usize) == (batch.id, batch.width, batch.calls.len())
}

/// What an answer says to a batch.
type Body = Box<dyn Fn(&ExpertBatch) -> Vec<u8> + Send>;

/// Answers that can be told from right ones.
fn wrong_answers() -> VecDeque<Answer> {
    let mut all: VecDeque<Answer> = VecDeque::new();
    let mut says = |kind: u16, body: Body| {
        all.push_back(Box::new(move |batch| framed(&(kind, body(batch)))));
    };
    for more in [-1, 1, 1000] {
        says(
            EXPERT_OUTPUTS,
            Box::new(move |batch| {
                let rows = (batch.calls.len() as i64 + more).max(1) as u32;
                let rows = if rows == batch.calls.len() as u32 { rows + 1 } else { rows };
                outputs(batch, |head| head.rows = rows, 0.5)
            }),
        );
    }
    for width in [1, WIDTH - 1, WIDTH + 1, WIDTH * 2] {
        says(EXPERT_OUTPUTS, Box::new(move |b| outputs(b, |head| head.width = width, 0.5)));
    }
    for (width, rows) in SHAPES {
        says(
            EXPERT_OUTPUTS,
            Box::new(move |batch| {
                let calls = batch.calls.len() as u32;
                let rows = if rows == calls { rows + 1 } else { rows };
                patched(&outputs(batch, |_| {}, 0.5), (WIDTH, calls), (width, rows))
            }),
        );
    }
    // Of batches that nobody sent.
    let ids: [fn(u64) -> u64; 5] =
        [|_| 0, |_| u64::MAX, |id| id.wrapping_add(1), |id| id.wrapping_sub(1), |id| id ^ 1 << 63];
    for other in ids {
        says(EXPERT_OUTPUTS, Box::new(move |b| outputs(b, |head| head.id = other(b.id), 0.5)));
        says(EXPERT_FAILURE, Box::new(move |b| encode(&ExpertFailure::new(other(b.id), "no"))));
    }
    for reason in ["", "absent: ", "no"] {
        says(EXPERT_FAILURE, Box::new(move |batch| encode(&ExpertFailure::new(batch.id, reason))));
    }
    // As long as a frame may be, for every row of a long prompt.
    says(
        EXPERT_FAILURE,
        Box::new(|b| encode(&ExpertFailure { id: b.id, reason: "x".repeat(8 << 20) })),
    );
    for kind in [EXPERT_BATCH, JOB_EVENT, CLIENT_REPLY, JOB_ORDER, 7, 8, 0, 9, 99] {
        says(kind, Box::new(|b| outputs(b, |_| {}, 0.5)));
    }
    // Experts that were not run: nobody's, and all of this batch.
    says(
        EXPERT_OUTPUTS,
        Box::new(|batch| {
            let failed = batch.calls.iter().map(|call| {
                let (tier, group, expert) = (call.tier, call.group, call.expert);
                FailedExpert { tier, group, expert, reason: "x".repeat(5000) }.absent()
            });
            without(batch, failed.collect())
        }),
    );
    says(
        EXPERT_OUTPUTS,
        Box::new(|batch| {
            let nobodys = |tier, group, expert| {
                FailedExpert { tier, group, expert, reason: String::new() }.absent()
            };
            let call = batch.calls[0];
            let mut failed = vec![nobodys(call.tier, call.group, call.expert)];
            failed.push(nobodys(u16::MAX, u32::MAX, u32::MAX));
            failed.truncate(batch.calls.len());
            let body = without(batch, failed);
            // And a shape that does not fit.
            patched(&body, (WIDTH, batch.calls.len() as u32), (WIDTH, batch.calls.len() as u32 + 1))
        }),
    );
    for bytes in frames::no_frames() {
        all.push_back(Box::new(move |_| bytes.clone()));
    }
    for seed in 0..times(40) as u64 {
        all.push_back(Box::new(move |batch| {
            let mut draws = Draws(100 + seed);
            let valid = outputs(batch, |_| {}, 0.5);
            // Numbers that are wrong cannot be told: what is damaged is the rest, and it shows.
            let (numbers, rest) = valid.split_at(batch.calls.len() * WIDTH as usize * 4);
            let body = [numbers, &draws.damaged(rest)].concat();
            let body = if is_sound(batch, &body) { numbers.to_vec() } else { body };
            framed(&(EXPERT_OUTPUTS, body))
        }));
    }
    all
}

/// Owns experts, and answers for them with these; then hangs up.
async fn own(member: &Member, mut answers: VecDeque<Answer>) {
    let pool = BufferPool::default();
    // The honest one dials too, when it wants weights, and would send its batches there: what is
    // only silent takes as long as an answer may.
    let endpoint = member.endpoint.clone();
    let dialed = tokio::spawn(async move {
        while let Some(connection) = endpoint.accept().await {
            connection.close("not here");
        }
    });
    while !answers.is_empty() {
        let connection = member.dial().await;
        let served = async {
            // It gives nobody its weights, which the honest one may ask for meanwhile.
            let stream = loop {
                match connection.accept_stream().await {
                    Some(stream) if stream.kind == StreamKind::Experts => break stream,
                    Some(_) => {}
                    None => return,
                }
            };
            let (mut sender, mut receiver) = stream.into_raw();
            if let Some((kind, body)) = frames::read(&mut receiver).await {
                assert_eq!(kind, EXPERT_BATCH);
                let frame = Frame::copied(FrameKind::ExpertBatch, &body, &pool).unwrap();
                let view = ExpertBatchView::check(&frame).unwrap();
                let Some(answer) = answers.pop_front() else { return };
                let _ = sender.write_all(&answer(view.head())).await;
                // Who is not sent away for it goes by itself, so that the batch is sent again.
                let away = connection.closed();
                let _ = tokio::time::timeout(Duration::from_millis(100), away).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(5), served).await;
        connection.close("again");
    }
    dialed.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_a_hostile_owner_of_experts_harm_nobody() {
    let mut cluster = Cluster::start(1).await;
    let member = Member::join(&cluster, EVIL).await;
    let connection = member.connect().await;
    drop_jobs(connection.clone());
    let control = member.control(&connection).await;
    let serving = Arc::new(AtomicBool::new(false));
    tokio::spawn({
        let (member, serving) = (member.clone(), serving.clone());
        async move {
            let answer = |call: &_| {
                let call: &crate::control::Call = call;
                serving.fetch_or(call.variant == "Serve", Relaxed);
                member.plausible(call)
            };
            member.pretend(control, vec![1], answer).await;
        }
    });
    let served = async {
        while !serving.load(Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("the hostile worker gets its share", served).await;
    let owner = tokio::spawn({
        let member = member.clone();
        async move { own(&member, wrong_answers()).await }
    });
    // What is waited for may be had from others before all is said: then the next waits.
    let honest = cluster.client("somebody").await;
    let (job, mut jobs) = (HonestJob::long(), 0);
    loop {
        let running = tokio::spawn({
            let (client, job) = (cluster.client("somebody").await, job.clone());
            async move { job.run(&client).await }
        });
        while !owner.is_finished() && !running.is_finished() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let over = owner.is_finished();
        if over {
            connection.close("that was all");
            member.endpoint.close("that was all").await;
        }
        let tokens = soon("a job whose experts came from liars", running).await.unwrap();
        assert_eq!(tokens, Ok(job.alone()), "job {jobs}");
        cluster.is_unharmed("answers of a liar");
        jobs += 1;
        if over {
            break;
        }
    }
    owner.await.unwrap();
    drop(honest);
    cluster.serves("answers of a liar").await;
}
