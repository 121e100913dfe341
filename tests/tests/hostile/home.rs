//! Homes of jobs that report what cannot be so.
//!
//! What cannot be told: tokens of the model's vocabulary, in order and no more than were asked for,
//! that are not those that the model would have chosen; and that a job has failed. A home that says
//! nothing is waited for as long as one that reads a long prompt.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use lite_llm_transport::{
    connection::{AcceptedStream, Connection},
    messages::{
        ClientReply, EndReason, JobEvent, JobEventBody, JobOrder, TraceContext, decode, encode,
    },
};

use crate::{
    cluster::{Cluster, HonestJob, PATIENCE},
    damage::{Draws, times},
    frames::{self, CLIENT_REPLY, EXPERT_OUTPUTS, JOB_EVENT, JOB_ORDER},
    member::Member,
};

/// The first by name, so that jobs go there first.
const EVIL: &str = "evil";
/// Size of the tiny model's vocabulary.
const VOCAB: u32 = 320;

/// What a home says of a job, by the job's number and how many tokens it was given.
type Says = Arc<dyn Fn(u64, u32) -> Vec<u8> + Send + Sync>;

/// What is to be said now, and what became of it.
struct Script {
    says: Mutex<Says>,
    said: AtomicUsize,
    serving: AtomicBool,
}

impl Script {
    /// Is a home for as long as it is let, and comes back whenever it is sent away.
    async fn play(&self, member: &Member) {
        let member = &member;
        loop {
            let connection = member.connect().await;
            let control = member.control(&connection).await;
            let node = member.pretend(control, vec![1], |call| {
                self.serving.fetch_or(call.variant == "Serve", Relaxed);
                member.plausible(call)
            });
            tokio::select! {
                () = node => {}
                () = self.jobs(&connection) => {}
            }
            self.serving.store(false, Relaxed);
            connection.close("again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn jobs(&self, connection: &Connection) {
        while let Some(stream) = connection.accept_stream().await {
            self.job(stream).await;
        }
    }

    async fn job(&self, stream: AcceptedStream) {
        let (mut sender, mut receiver) = stream.into_raw();
        let Some((kind, body)) = frames::read(&mut receiver).await else { return };
        assert_eq!(kind, JOB_ORDER);
        let JobOrder { job, generated, .. } = decode(&body).unwrap();
        let given = generated.len() as u32;
        let says = self.says.lock().unwrap().clone();
        self.said.fetch_add(1, Relaxed);
        let _ = sender.write_all(&says(job, given)).await;
        let _ = sender.finish();
        let read = async { while frames::read(&mut receiver).await.is_some() {} };
        let _ = tokio::time::timeout(Duration::from_millis(200), read).await;
    }
}

fn framed(kind: u16, body: &[u8]) -> Vec<u8> {
    frames::claimed(body.len() as u32, u32::from(kind), body)
}

fn event(job: u64, body: JobEventBody) -> Vec<u8> {
    framed(JOB_EVENT, &encode(&JobEvent { job, trace: TraceContext::default(), body }))
}

fn token(index: u32, id: u32) -> JobEventBody {
    JobEventBody::Token { index, id, text: Some("not this text".into()) }
}

fn done(reason: EndReason, generated: u32) -> JobEventBody {
    JobEventBody::Done { reason, generated }
}

fn logits(first_row: u32, rows: u32, width: u32) -> JobEventBody {
    let values = vec![f32::NAN; rows.min(512) as usize * width.min(1 << 12) as usize];
    JobEventBody::Logits { first_row, rows, width, values }
}

fn routes(layers: u32, rows: u32, k: u32) -> JobEventBody {
    let ids = vec![-1; (layers.min(4) * rows.min(4) * k.min(4)) as usize];
    JobEventBody::Routes { first_row: 0, layers, rows, k, ids }
}

/// Events one after the other.
fn events(bodies: impl Fn(u32) -> Vec<JobEventBody> + Send + Sync + 'static) -> Says {
    Arc::new(move |job, given| {
        bodies(given).into_iter().flat_map(|body| event(job, body)).collect()
    })
}

/// Whether bytes happen to be what a home might say after one token.
fn is_believable(bytes: &[u8]) -> bool {
    let body = decode::<JobEvent>(bytes).map(|event| event.body);
    match body {
        Ok(JobEventBody::Token { index: 1, id, .. }) => id < VOCAB,
        Ok(JobEventBody::Failed { .. }) => true,
        _ => false,
    }
}

/// Things that a home may say of a job with these tokens and that cannot be so, or that say less
/// than a home has to.
fn lies(right: &[u32]) -> Vec<(String, Says)> {
    let mut all: Vec<(String, Says)> = Vec::new();
    let mut raw = |what: &str, says: Says| all.push((what.to_owned(), says));
    raw("nothing", Arc::new(|_, _| Vec::new()));
    raw("no frame", Arc::new(|_, _| b"GET / HTTP/1.1\r\n\r\n".to_vec()));
    raw("too long a frame", Arc::new(|_, _| frames::claimed(u32::MAX, 4, &[0; 9])));
    raw("half a frame", Arc::new(|_, _| frames::claimed(64 << 20, 4, &[0; 9])));
    raw("no event", Arc::new(|_, _| framed(JOB_EVENT, &[0xff; 77])));
    raw("an empty event", Arc::new(|_, _| framed(JOB_EVENT, &[])));
    raw("outputs", Arc::new(|_, _| framed(EXPERT_OUTPUTS, &[0; 64])));
    let accepted = encode(&ClientReply::Accepted { job: 1 });
    raw("a client's reply", Arc::new(move |_, _| framed(CLIENT_REPLY, &accepted)));
    let first = right[0];
    let mut says = |what: &str, bodies: Vec<JobEventBody>| {
        all.push((what.to_owned(), events(move |_| bodies.clone())));
    };
    for index in [7, u32::MAX, i32::MAX as u32] {
        says("a token out of order", vec![token(index, first)]);
    }
    for id in [VOCAB, u32::MAX, i32::MAX as u32] {
        says("a token that is none", vec![token(0, id)]);
    }
    for generated in [7, u32::MAX] {
        says("the end of more than there was", vec![done(EndReason::Length, generated)]);
    }
    for reason in [EndReason::Length, EndReason::EndOfText, EndReason::Context] {
        says("the end before the end", vec![done(reason, 0)]);
        says("the end after one token", vec![token(0, first), done(reason, 1)]);
    }
    says("that it was cancelled", vec![done(EndReason::Cancelled, 0)]);
    let another = token(0, (first + 1) % VOCAB);
    says("one token, then another", vec![token(0, first), another]);
    for (first_row, rows, width) in [(u32::MAX, 1, VOCAB), (u32::MAX, u32::MAX, 0)] {
        says("logits beyond all rows", vec![logits(first_row, rows, width)]);
    }
    for (first_row, rows, width) in [(0, 1, VOCAB), (0, 0, 0), (0, 512, 1 << 12)] {
        says("logits that nobody wants", vec![logits(first_row, rows, width)]);
    }
    for (layers, rows, k) in [(2, 1, 2), (u32::MAX, u32::MAX, 0), (0, u32::MAX, 0), (0, 1, 4)] {
        says("routes that nobody wants", vec![routes(layers, rows, k)]);
    }
    says("logits of another size", vec![logits(0, 1, u32::MAX)]);
    says("routes of another size", vec![routes(9, 9, 9)]);
    says("text", vec![JobEventBody::Text("x".repeat(1 << 20)), JobEventBody::Text(String::new())]);
    let progress = |prefilled, total| JobEventBody::Progress { prefilled, total };
    says("too much progress", vec![progress(u32::MAX, 0), progress(0, u32::MAX)]);
    says("that it did not take it", vec![JobEventBody::NotTaken { reason: "x".repeat(1 << 20) }]);
    let tokens: Vec<u32> = right.to_vec();
    all.push((
        "right tokens, and one more".into(),
        events(move |given| {
            let rest = (0..).zip(&tokens).skip(given as usize).map(|(i, id)| token(i, *id));
            rest.chain([token(tokens.len() as u32, 1)]).collect()
        }),
    ));
    let tokens: Vec<u32> = right.to_vec();
    all.push((
        "right tokens, of other jobs".into(),
        Arc::new(move |job, given| {
            let rest = (0..).zip(&tokens).skip(given as usize);
            let others = [0, 1, u64::MAX, job ^ 1].into_iter().cycle();
            rest.zip(others).flat_map(|((i, id), job)| event(job, token(i, *id))).collect()
        }),
    ));
    for seed in 0..times(20) as u64 {
        let first = token(0, first);
        all.push((
            format!("damaged events, seed {seed}"),
            Arc::new(move |job, _| {
                // What is damaged in the second event cannot pass for what the model chose.
                let body = JobEventBody::Token { index: 9, id: VOCAB, text: None };
                let second = encode(&JobEvent { job, trace: TraceContext::default(), body });
                let mut damaged = Draws(200 + seed).damaged(&second);
                if is_believable(&damaged) {
                    damaged.clear();
                }
                [event(job, first.clone()), framed(JOB_EVENT, &damaged)].concat()
            }),
        ));
    }
    all
}

/// Lies for which a home loses its connection, or after which a job goes elsewhere first.
const SEEN_THROUGH: [&str; 6] = [
    "a token out of order",
    "the end of more than there was",
    "one token, then another",
    "right tokens, and one more",
    "that it did not take it",
    "logits beyond all rows",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn homes_that_contradict_themselves_cost_a_job_nothing() {
    lie(|what| SEEN_THROUGH.contains(&what)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn homes_that_report_what_cannot_be_so_cost_a_job_nothing() {
    lie(|what| !SEEN_THROUGH.contains(&what)).await;
}

/// Tells lies, one after the other, to jobs of an honest client.
async fn lie(is_told: impl Fn(&str) -> bool) {
    let mut cluster = Cluster::start(2).await;
    let member = Member::join(&cluster, EVIL).await;
    let job = HonestJob::new(3);
    let script = Arc::new(Script {
        says: Mutex::new(Arc::new(|_, _| Vec::new())),
        said: AtomicUsize::new(0),
        serving: AtomicBool::new(false),
    });
    let evil = tokio::spawn({
        let script = script.clone();
        async move { script.play(&member).await }
    });
    let client = cluster.client("somebody").await;
    let mut harmed = Vec::new();
    for (what, says) in lies(&job.alone()).into_iter().filter(|(what, _)| is_told(what)) {
        *script.says.lock().unwrap() = says;
        let before = script.said.load(Relaxed);
        let until = std::time::Instant::now() + PATIENCE;
        // A job may go elsewhere while the liar is still being taken in.
        while script.said.load(Relaxed) == before {
            assert!(std::time::Instant::now() < until, "no job went to the liar ({what})");
            assert!(!evil.is_finished(), "the liar is not let in any more ({what})");
            if !script.serving.load(Relaxed) {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            let running = tokio::spawn({
                let (job, client) = (job.clone(), cluster.client("somebody").await);
                async move { job.run(&client).await }
            });
            let tokens = running.await;
            cluster.is_unharmed(&what);
            if !matches!(&tokens, Ok(Ok(tokens)) if *tokens == job.alone()) {
                eprintln!("harmed {what}: {:.300}", format!("{tokens:?}"));
                harmed.push(format!("{what}: {:.300}", format!("{tokens:?}")));
            }
        }
    }
    assert!(harmed.is_empty(), "jobs were harmed by a home that said\n{}", harmed.join("\n"));
    evil.abort();
    drop(client);
    cluster.serves("a home that lies").await;
}
