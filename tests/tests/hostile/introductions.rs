//! Workers whose words on the control plane are not to be believed: who they are, what they hold,
//! how they are, what they have loaded.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use lite_llm_actors::node::Loaded;
use lite_llm_transport::messages::{
    Assignment, NodeAddress, NodeReport, NodeVitals, PlacementRule, encode,
};

use crate::{
    cluster::{Cluster, HONEST, soon},
    control::{Control, Said, messages},
    damage::{Draws, times},
    member::{Member, drop_jobs},
};

/// Not the first by name, so that no job goes there first.
const EVIL: &str = "zz-evil";

/// An assignment as a worker might hold it, of the whole model.
fn whole(member: &Member, checkpoint: [u8; 32]) -> Assignment {
    let rule = PlacementRule { tier: 0, first_group: 0, end_group: 1, copies: 1, holders: vec![0] };
    Assignment {
        epoch: 1,
        checkpoint,
        model_path: String::new(),
        placement: vec![rule],
        nodes: vec![NodeAddress { name: member.name.clone(), address: member.info().address }],
        you: 0,
        kv_dtype: "f32".into(),
        context: 512,
    }
}

/// Reports at the limits of every field and beyond.
fn extreme_reports(member: &Member, checkpoint: [u8; 32]) -> Vec<NodeReport> {
    let mut reports = Vec::new();
    let mut with = |change: &dyn Fn(&mut NodeReport)| {
        let mut report = NodeReport { info: member.info(), holding: None };
        change(&mut report);
        reports.push(report);
    };
    let long = "x".repeat(1 << 20);
    for name in ["", HONEST, "coordinator", "zz-evil\0", &long] {
        with(&|report| report.info.name = name.into());
    }
    for address in ["", "here", "255.255.255.255:65535", "[::]:0", "0.0.0.0:0", &long] {
        with(&|report| report.info.address = address.into());
    }
    for number in [0, 1, u32::MAX] {
        with(&|report| (report.info.protocol, report.info.determinism) = (number, number));
        with(&|report| (report.info.threads, report.info.pid) = (number, number));
    }
    for budget in [0, 1, u64::MAX, u64::MAX - 1, i64::MAX as u64] {
        with(&|report| report.info.budget_bytes = budget);
    }
    with(&|report| report.info.release = long.clone());
    let mut holds = |change: &dyn Fn(&mut Assignment)| {
        let mut holding = whole(member, checkpoint);
        change(&mut holding);
        with(&|report| report.holding = Some(holding.clone()));
    };
    for epoch in [0, 1, u64::MAX, u64::MAX - 1, (1 << 62) + 1, i64::MAX as u64] {
        holds(&|held| held.epoch = epoch);
    }
    for you in [1, u16::MAX, i16::MAX as u16] {
        holds(&|held| held.you = you);
    }
    let node = |name: &str| NodeAddress { name: name.into(), address: long.clone() };
    holds(&|held| held.nodes.clear());
    holds(&|held| held.nodes = vec![node(HONEST)]);
    holds(&|held| held.nodes = vec![node(EVIL), node(HONEST), node(EVIL)]);
    holds(&|held| held.nodes.resize(70_000, NodeAddress { name: "x".into(), address: "".into() }));
    holds(&|held| held.context = u64::MAX);
    holds(&|held| held.kv_dtype = long.clone());
    holds(&|held| held.placement.clear());
    holds(&|held| held.placement = vec![held.placement[0].clone(); 5000]);
    let rules: [&dyn Fn(&mut PlacementRule); 12] = [
        &|rule| rule.tier = u16::MAX,
        &|rule| rule.end_group = 0,
        &|rule| rule.end_group = u32::MAX,
        &|rule| (rule.first_group, rule.end_group) = (u32::MAX, 0),
        &|rule| (rule.first_group, rule.end_group) = (u32::MAX, u32::MAX),
        &|rule| rule.copies = 0,
        &|rule| rule.copies = u16::MAX,
        &|rule| rule.holders.clear(),
        &|rule| rule.holders = vec![u16::MAX],
        &|rule| rule.holders = vec![0; 1 << 16],
        &|rule| rule.holders = vec![0; 1 << 18],
        &|rule| (rule.copies, rule.holders) = (u16::MAX, vec![0; usize::from(u16::MAX)]),
    ];
    for change in rules {
        holds(&|held| change(&mut held.placement[0]));
    }
    // As many members, and as many copies, as can be said.
    holds(&|held| {
        let name = |n: usize| if n == 0 { EVIL.to_owned() } else { format!("nobody-{n}") };
        let nodes = (0..4096).map(|n| NodeAddress { name: name(n), address: String::new() });
        held.nodes = nodes.collect();
        held.placement[0].copies = 4096;
        held.placement[0].holders = (0..4096).collect();
    });
    reports
}

fn checkpoint_of(hex: &str) -> [u8; 32] {
    std::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_a_worker_says_it_is_harms_nobody() {
    let mut cluster = Cluster::start(2).await;
    let member = Member::join(&cluster, EVIL).await;
    let status = cluster.client("observer").await.status().await;
    let checkpoint = checkpoint_of(&status.checkpoint);
    let mut reports: Vec<Vec<u8>> =
        extreme_reports(&member, checkpoint).iter().map(encode).collect();
    let mut draws = Draws(3);
    let holding = Some(whole(&member, checkpoint));
    let valid = encode(&NodeReport { info: member.info(), holding });
    reports.extend((0..times(60)).map(|_| draws.damaged(&valid)));
    reports.push(vec![]);
    let connection = member.connect().await;
    drop_jobs(connection.clone());
    for (round, reports) in reports.chunks(100).enumerate() {
        let control = member.control(&connection).await;
        let mut described = BTreeSet::new();
        let lies = member.pretend(control, (0..reports.len() as u64).collect(), |call| {
            if call.variant != "Describe" {
                return member.plausible(call);
            }
            described.insert(call.to);
            reports[call.to as usize].clone()
        });
        // Whoever is asked who it is is asked at once; the rest is time for what follows from it.
        let _ = tokio::time::timeout(Duration::from_secs(2), lies).await;
        assert_eq!(described.len(), reports.len(), "each is asked who it is");
        if round == 0 {
            cluster.serves("the first lies about who one is").await;
        }
    }
    cluster.serves("lies about who one is").await;
    connection.close("that was all");
    cluster.serves("a liar that left").await;
    let nodes = cluster.client("observer").await.status().await.nodes;
    assert_eq!(nodes.len(), 1, "{nodes:?}");
}

/// Vitals at the limits of every field and beyond.
fn extreme_vitals(member: &Member) -> Vec<NodeVitals> {
    let mut all = Vec::new();
    let mut with = |change: &dyn Fn(&mut NodeVitals)| {
        let mut vitals = member.vitals();
        change(&mut vitals);
        all.push(vitals);
    };
    let long = "x".repeat(1 << 20);
    for speed in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -1.0] {
        with(&|vitals| vitals.status.tokens_per_second = speed);
    }
    for text in ["", HONEST, "\u{1b}[2J\n\0", &long] {
        with(&|vitals| vitals.status.state = text.into());
        with(&|vitals| vitals.status.name = text.into());
        with(&|vitals| vitals.status.address = text.into());
        with(&|vitals| vitals.unreachable = vec![text.into()]);
    }
    for number in [0, u32::MAX, i32::MAX as u32] {
        with(&|vitals| (vitals.status.experts, vitals.status.loaded) = (number, !number));
        with(&|vitals| (vitals.status.sequences, vitals.status.total) = (number, number));
        with(&|vitals| vitals.status.budget = u64::from(number).wrapping_sub(1));
        with(&|vitals| vitals.progress = u64::from(number).wrapping_sub(1));
        with(&|vitals| (vitals.busy, vitals.progress) = (true, u64::MAX));
    }
    with(&|vitals| vitals.unreachable = vec![HONEST.into(); 200_000]);
    with(&|vitals| vitals.unreachable = vec![EVIL.into(), HONEST.into(), EVIL.into()]);
    with(&|vitals| vitals.unreachable = vec![String::new(); 1 << 20]);
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_a_worker_says_it_is_and_what_it_has_loaded_harm_nobody() {
    let mut cluster = Cluster::start(2).await;
    let member = Member::join(&cluster, EVIL).await;
    let mut draws = Draws(4);
    let mut vitals: Vec<Vec<u8>> = extreme_vitals(&member).iter().map(encode).collect();
    let valid = encode(&member.vitals());
    vitals.extend((0..times(30)).map(|_| draws.damaged(&valid)));
    let error = |error: &str| encode(&Loaded { error: Some(error.into()) });
    let mut loads = vec![error(""), vec![], vec![0xff; 9], error(&"x".repeat(1 << 20))];
    let valid = error("a reason of some length");
    loads.extend((0..times(20)).map(|_| draws.damaged(&valid)));
    loads.push(encode(&Loaded { error: None }));
    let (vitals, loads) = (Arc::new(vitals), Arc::new(loads));
    let told = Arc::new(AtomicUsize::new(0));
    // A session may end at any of these; a stubborn liar comes back.
    let lies = tokio::spawn({
        let (member, told, all) = (member.clone(), told.clone(), vitals.len());
        async move {
            let mut load = 0;
            while told.load(Relaxed) < all {
                let connection = member.connect().await;
                drop_jobs(connection.clone());
                let control = member.control(&connection).await;
                let session = member.pretend(control, vec![1], |call| match &*call.variant {
                    "Vitals" => vitals[told.fetch_add(1, Relaxed) % all].clone(),
                    "Load" | "Serve" => {
                        load += 1;
                        loads[load % loads.len()].clone()
                    }
                    _ => member.plausible(call),
                });
                let ended = async {
                    while told.load(Relaxed) < all {
                        pause().await
                    }
                };
                tokio::select! {
                    () = session => {}
                    () = ended => {}
                }
                connection.close("again");
            }
        }
    });
    cluster.serves("the first lies about how one is").await;
    soon("all lies are told", lies).await.unwrap();
    cluster.serves("lies about how one is").await;
}

async fn pause() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_said_on_the_control_plane_harms_nobody() {
    let mut cluster = Cluster::start(2).await;
    let member = Member::join(&cluster, EVIL).await;
    let connection = member.connect().await;
    drop_jobs(connection.clone());
    let mut draws = Draws(5);
    // Before anybody is known: lengths, and what is not of this protocol.
    for bytes in [
        vec![0xff; 8],
        (1u64 << 40).to_be_bytes().to_vec(),
        (16u64 << 20).to_be_bytes().to_vec(),
        [&9u64.to_be_bytes()[..], &[0xff; 9]].concat(),
        vec![0; 8],
    ] {
        let mut control =
            Control::silent(&connection).await.expect("the coordinator takes streams");
        control.write(&bytes).await;
    }
    for message in messages(&member.scope) {
        let mut control =
            Control::silent(&connection).await.expect("the coordinator takes streams");
        control.send(&message).await;
    }
    cluster.serves("control messages of nobody").await;
    let wrong = Control::open(&connection, "another cookie", &member.session(), 1).await;
    assert!(wrong.is_none(), "a session without the cookie");
    // As a member: all messages in one session, then each damaged.
    let mut control = member.control(&connection).await;
    for message in messages(&member.scope) {
        control.send(&message).await;
    }
    let all = messages(&member.scope);
    for _ in 0..times(100) {
        let mut control = member.control(&connection).await;
        for _ in 0..3 {
            let message = &all[draws.below(all.len())];
            // A message of a megabyte says no more than its first kilobyte, damaged.
            control.send(&draws.damaged(&message[..message.len().min(1024)])).await;
        }
    }
    cluster.serves("control messages of a member").await;
    // Nodes that appear and go, and the same one again and again.
    let mut control = member.control(&connection).await;
    for round in 0..20u64 {
        control.show(&member.scope, round * 50..round * 50 + 100).await;
        control.terminate(round * 50..round * 50 + 20).await;
        let answered = async {
            while let Some(said) = control.next().await {
                if let Said::Call(call) = said {
                    let answer = member.plausible(&call);
                    control.answer(&call, answer).await;
                }
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(100), answered).await;
    }
    cluster.serves("nodes that appear and go").await;
    connection.close("that was all");
    cluster.serves("a member that left").await;
}

/// The honest worker is there for some seconds: whoever loses its session is missed meanwhile.
async fn honest_stays(cluster: &Cluster) {
    let observer = cluster.client("observer").await;
    for _ in 0..60 {
        let nodes = observer.status().await.nodes;
        assert!(nodes.iter().any(|node| node.name == HONEST), "the honest worker lost its session");
        pause().await;
        pause().await;
    }
}

/// Honest names are learnt where they can be, and taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_cannot_take_the_session_of_another() {
    let mut cluster = Cluster::start(1).await;
    let member = Member::join(&cluster, EVIL).await;
    let connection = member.connect().await;
    let mut control = member.control(&connection).await;
    control.enumerate().await;
    let sessions = async {
        loop {
            match control.next().await {
                Some(Said::Sessions(names)) => return names,
                Some(_) => {}
                None => return Vec::new(),
            }
        }
    };
    // An answer may be refused; then there is nothing to be learnt.
    let names = tokio::time::timeout(Duration::from_secs(3), sessions).await.unwrap_or_default();
    let honest: Vec<&String> = names.iter().filter(|name| name.contains(HONEST)).collect();
    let mut thieves = Vec::new();
    for id in [0, 1, u64::MAX] {
        for name in &honest {
            let cookie = member.cookie();
            let open = Control::open(&connection, &cookie, name, id);
            let opened = tokio::time::timeout(Duration::from_secs(2), open).await;
            thieves.extend(opened.ok().flatten());
        }
    }
    honest_stays(&cluster).await;
    drop(thieves);
    cluster.serves("a thief of sessions").await;
}

/// An address that a coordinator would have to tell all others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_as_long_as_a_message_cuts_nobody_off() {
    let mut cluster = Cluster::start(1).await;
    let member = Member::join(&cluster, EVIL).await;
    let connection = member.connect().await;
    drop_jobs(connection.clone());
    let control = member.control(&connection).await;
    let liar = member.clone();
    let lies = tokio::spawn(async move {
        let session = liar.pretend(control, vec![1], |call| match &*call.variant {
            "Describe" => {
                let mut info = liar.info();
                info.address.clear();
                // As much as one message of the control plane takes.
                let rest = encode(&NodeReport { info: info.clone(), holding: None }).len() + 64;
                info.address = "x".repeat((16 << 20) - rest);
                encode(&NodeReport { info, holding: None })
            }
            _ => liar.plausible(call),
        });
        session.await;
    });
    honest_stays(&cluster).await;
    lies.abort();
    connection.close("that was all");
    cluster.serves("an endless address").await;
}

/// More nodes than a cluster may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_shows_many_nodes_takes_no_memory_with_them() {
    let mut cluster = Cluster::start(1).await;
    let member = Member::join(&cluster, EVIL).await;
    let connection = member.connect().await;
    drop_jobs(connection.clone());
    let mut control = member.control(&connection).await;
    for first in 0..20u64 {
        control.show(&member.scope, first * 10_000..first * 10_000 + 10_000).await;
    }
    let drained = async { while control.next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_secs(8), drained).await;
    cluster.serves("many nodes").await;
}
