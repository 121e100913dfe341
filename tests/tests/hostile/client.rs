//! Clients that mean no good.

use lite_llm_transport::{
    connection::StreamKind,
    identity::{OPERATOR, Role},
    join::join,
    messages::{
        ClientReply, ClientRequest, EndReason, ExpertFailure, JobEvent, JobEventBody, JobOrder,
        JobRequest, LogitsWanted, Prompt, TraceContext, decode, encode,
    },
};

use crate::{
    cluster::{Client, Cluster, HONEST, HonestJob, hello, soon},
    damage::{Draws, times},
    frames::{self, CLIENT_REPLY, CLIENT_REQUEST, Raw},
};

/// Says something on a stream of its own, ends it, and returns what was answered.
async fn told(client: &Client, bytes: &[u8]) -> Vec<Raw> {
    let opened = soon("a stream", client.connection.open_raw(StreamKind::Client)).await;
    let (mut sender, mut receiver) = opened.expect("a client's connection outlives its requests");
    let answers = async {
        // The other side may have hung up already.
        let _ = sender.write_all(bytes).await;
        let _ = sender.finish();
        let mut answers = Vec::new();
        while let Some(answer) = frames::read(&mut receiver).await {
            answers.push(answer);
        }
        answers
    };
    soon("the end of a stream", answers).await
}

fn framed(kind: u16, body: &[u8]) -> Vec<u8> {
    frames::claimed(body.len() as u32, u32::from(kind), body)
}

fn job(change: impl FnOnce(&mut JobRequest)) -> JobRequest {
    let mut request = HonestJob::new(1).request();
    change(&mut request);
    request
}

fn prompt(prompt: Prompt) -> JobRequest {
    job(|job| job.prompt = prompt)
}

/// Jobs at the limits of every field and beyond, and whether they can be served.
fn extreme_jobs() -> Vec<(JobRequest, bool)> {
    let ids = |n: usize, id: u32| Prompt::Tokens(vec![id; n]);
    let mut jobs = vec![
        (prompt(ids(0, 0)), false),
        (prompt(ids(1, 0)), true),
        (prompt(ids(511, 319)), true),
        (prompt(ids(512, 0)), false),
        (prompt(ids(1 << 20, 0)), false),
        (prompt(ids(1, 320)), false),
        (prompt(ids(1, u32::MAX)), false),
        (job(|job| job.max_new_tokens = 0), true),
        (job(|job| job.max_new_tokens = u32::MAX), true),
        (job(|job| (job.temperature, job.top_k, job.seed) = (1.0, u32::MAX, u64::MAX)), true),
        (job(|job| (job.temperature, job.seed) = (f32::MAX, i64::MIN as u64)), true),
        (job(|job| (job.temperature, job.top_p) = (f32::MIN_POSITIVE, 1e-45)), true),
        (job(|job| job.temperature = -0.0), true),
        (job(|job| job.prefill_chunk = u32::MAX), true),
        (job(|job| job.prefill_chunk = 1), true),
        (job(|job| (job.want_logits, job.want_routes) = (LogitsWanted::All, true)), true),
        (job(|job| job.trace.flags = 0xff), true),
    ];
    for temperature in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        jobs.push((job(|job| job.temperature = temperature), false));
    }
    for top_p in [f32::NAN, 0.0, -1.0, 1.5, f32::INFINITY] {
        jobs.push((job(|job| job.top_p = top_p), false));
    }
    for tiers in ["nothing", "", "..", ",", "all,all,x", &"tier_1b,".repeat(100_000)] {
        jobs.push((job(|job| job.tiers = tiers.into()), false));
    }
    // The tiny model has no tokenizer.
    for text in [String::new(), "x".repeat(4 << 20), "[".repeat(1 << 20)] {
        jobs.push((prompt(Prompt::Text(text.clone())), false));
        jobs.push((prompt(Prompt::Chat(text)), false));
    }
    jobs
}

fn order(request: JobRequest) -> ClientRequest {
    ClientRequest::Order(Box::new(request.into()))
}

/// What clients may not say, as frames of every kind.
fn not_for_clients() -> Vec<Raw> {
    let request = HonestJob::new(1).request();
    let body = JobEventBody::Token { index: 0, id: 1, text: None };
    let event = JobEvent { job: 1, trace: TraceContext::default(), body };
    let start = JobOrder { job: 1, ..request.clone().into() };
    let go_on = JobOrder { job: 1, generated: vec![1], ..request.into() };
    let bodies = [
        encode(&event),
        encode(&ExpertFailure::new(1, "no")),
        encode(&ClientReply::Event(event)),
        encode(&ClientReply::Accepted { job: 1 }),
        encode(&start),
        encode(&go_on),
        encode(&ClientRequest::Drain(HONEST.into())),
        Vec::new(),
    ];
    // What is framed as a request may happen to be one.
    let kinds = (1..=8).filter(|kind| *kind != CLIENT_REQUEST);
    let mut all: Vec<Raw> =
        kinds.flat_map(|kind| bodies.iter().map(move |body| (kind, body.clone()))).collect();
    all.push((CLIENT_REQUEST, encode(&ClientRequest::Drain(HONEST.into()))));
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_says_what_it_may_not_gets_a_refusal() {
    let mut cluster = Cluster::start(1).await;
    let evil = cluster.client("evil").await;
    for (number, (request, served)) in extreme_jobs().into_iter().enumerate() {
        let ended = match evil.submit(request).await {
            Ok((mut stream, _)) => matches!(stream.last().await, JobEventBody::Done { .. }),
            Err(reason) => {
                assert!(!reason.is_empty() && reason.len() < 4096, "{} bytes", reason.len());
                false
            }
        };
        assert_eq!(ended, served, "job {number}");
        cluster.is_unharmed("a job");
    }
    for (kind, body) in not_for_clients() {
        for (kind, answer) in told(&evil, &framed(kind, &body)).await {
            assert_eq!(kind, CLIENT_REPLY);
            match decode::<ClientReply>(&answer).unwrap() {
                ClientReply::Refused { .. } => {}
                other => panic!("{other:?} answers what no client may say"),
            }
        }
    }
    for bytes in frames::no_frames() {
        told(&evil, &bytes).await;
    }
    cluster.serves("what no client may say").await;
    // Nobody is the operator by name, or a worker by a client's token.
    let token = cluster.token(Role::Client);
    let address = token.address().parse().unwrap();
    for (role, name) in [(Role::Client, OPERATOR), (Role::Worker, "evil")] {
        let joined = soon("an answer", join(address, &token, role, name, &hello())).await;
        assert!(joined.is_err(), "{role} {name} has joined");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_cannot_touch_anothers_job() {
    let mut cluster = Cluster::start(1).await;
    let (owner, thief) = (cluster.client("owner").await, cluster.client("thief").await);
    let request = job(|job| job.max_new_tokens = 450);
    let (mut stream, number) = owner.submit(request.clone()).await.unwrap();
    for guess in [number, 0, 1, u64::MAX, number ^ 1] {
        thief.requests().await.say(&ClientRequest::Cancel(guess)).await;
        for generated in [vec![], vec![7], vec![0; 451], vec![u32::MAX], vec![0; 1 << 20]] {
            let request = job(|job| job.max_new_tokens = 2);
            let generated_of = generated.clone();
            let go_on = JobOrder { job: guess, generated: generated_of, ..request.into() };
            let mut other = thief.requests().await;
            match other.ask(&ClientRequest::Order(Box::new(go_on))).await {
                ClientReply::Accepted { job } => {
                    assert!(generated.len() < 2 && job != number, "{job} goes on");
                    // Whatever is said on a job's stream ends that job, and no other.
                    other.say(&ClientRequest::Cancel(number)).await;
                    other.last().await;
                }
                ClientReply::Refused { .. } => assert!(!generated.is_empty()),
                other => panic!("{other:?}"),
            }
        }
    }
    let last = stream.last().await;
    let done = JobEventBody::Done { reason: EndReason::Length, generated: 450 };
    assert_eq!(last, done, "the owner's job");
    cluster.serves("a thief").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_at_any_moment_leave_nothing_behind() {
    let mut cluster = Cluster::start(1).await;
    let evil = cluster.client("evil").await;
    let submit = order(job(|job| job.max_new_tokens = 400));
    let mut draws = Draws(1);
    for n in 0..times(600) {
        let mut stream = evil.requests().await;
        stream.say(&submit).await;
        for _ in 0..draws.below(3) {
            stream.reply().await;
        }
        if n % 100 == 99 {
            cluster.client("evil").await.requests().await.say(&submit).await;
        }
    }
    // Questions whose answers nobody reads.
    for _ in 0..20 {
        let mut stream = evil.requests().await;
        for _ in 0..50 {
            stream.say(&ClientRequest::Status).await;
        }
    }
    let none_left = async {
        while evil.status().await.jobs_running > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    soon("the end of jobs that nobody reads", none_left).await;
    cluster.serves("clients that left").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_requests_are_refused_or_served() {
    let mut cluster = Cluster::start(1).await;
    let evil = cluster.client("evil").await;
    let mut draws = Draws(2);
    let request = job(|job| (job.want_routes, job.temperature) = (true, 0.7));
    let go_on = JobOrder { job: 7, generated: vec![9], ..request.clone().into() };
    let valid = [
        encode(&order(request)),
        encode(&order(job(|job| job.prompt = Prompt::Chat("[]".into())))),
        encode(&ClientRequest::Order(Box::new(go_on))),
        encode(&ClientRequest::Cancel(7)),
        encode(&ClientRequest::Status),
        encode(&ClientRequest::Drain("honest".into())),
    ];
    for n in 0..times(400) {
        let one = &valid[draws.below(2) * draws.below(valid.len())];
        let body = draws.damaged(one);
        let mut bytes = framed(CLIENT_REQUEST, &body);
        if n % 8 == 0 {
            bytes = draws.damaged(&bytes);
        }
        told(&evil, &bytes).await;
    }
    cluster.serves("damaged requests").await;
}
