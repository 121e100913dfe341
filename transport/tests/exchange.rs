//! The exchange under random schedules: every dispatch ends exactly once, nothing leaks.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use lite_llm_transport::exchange::{Command, Event, Exchange, ExchangeError};
use proptest::prelude::*;

const TIMEOUT: Duration = Duration::from_secs(10);

fn drain(exchange: &mut Exchange) -> Vec<Command> {
    std::iter::from_fn(|| exchange.poll_command()).collect()
}

fn failure(commands: Vec<Command>) -> ExchangeError {
    match <[Command; 1]>::try_from(commands) {
        Ok([Command::Fail { error, .. }]) => error,
        other => panic!("expected one failure, found {other:?}"),
    }
}

fn replied(id: u64, peer: u16) -> Event {
    Event::Replied { id, peer }
}

fn dispatched(id: u64, peers: &[u16]) -> Event {
    Event::Dispatched { id, peers: peers.to_vec() }
}

fn refused(id: u64, peer: u16) -> Event {
    Event::Refused { id, peer, reason: "no".into() }
}

fn lost(peer: u16) -> Event {
    Event::PeerLost { peer, reason: "gone".into() }
}

#[test]
fn a_dispatch_completes_when_the_last_peer_answered() {
    let now = Instant::now();
    let mut exchange = Exchange::new(TIMEOUT, 4);
    exchange.handle(now, dispatched(1, &[3, 4]));
    exchange.handle(now, replied(1, 3));
    exchange.handle(now, replied(1, 3));
    exchange.handle(now, replied(1, 9));
    assert_eq!(drain(&mut exchange), []);
    exchange.handle(now, replied(1, 4));
    assert_eq!(drain(&mut exchange), [Command::Complete { id: 1 }]);
    exchange.handle(now, replied(1, 4));
    exchange.handle(now, refused(1, 3));
    exchange.handle(now + TIMEOUT, Event::Tick);
    assert_eq!((drain(&mut exchange), exchange.poll_timeout()), (vec![], None));
}

#[test]
fn nobody_to_wait_for_is_complete() {
    let mut exchange = Exchange::default();
    exchange.handle(Instant::now(), dispatched(1, &[]));
    assert_eq!(drain(&mut exchange), [Command::Complete { id: 1 }]);
}

#[test]
fn a_failure_names_the_peer() {
    let now = Instant::now();
    let mut exchange = Exchange::new(TIMEOUT, 4);
    exchange.handle(now, dispatched(1, &[3, 4]));
    exchange.handle(now, refused(1, 4));
    let error = failure(drain(&mut exchange));
    assert_eq!((error.peer(), error.to_string().contains("node 4")), (Some(4), true));

    exchange.handle(now, dispatched(2, &[3, 4]));
    exchange.handle(now, dispatched(3, &[4]));
    exchange.handle(now, replied(2, 3));
    exchange.handle(now, lost(3));
    assert_eq!(drain(&mut exchange), [], "who answered already may go");
    exchange.handle(now, lost(4));
    assert_eq!(drain(&mut exchange).len(), 2);

    exchange.handle(now, dispatched(4, &[3, 4, 5]));
    exchange.handle(now, replied(4, 4));
    exchange.handle(now + TIMEOUT, Event::Tick);
    let error = failure(drain(&mut exchange));
    assert!(matches!(error, ExchangeError::TimedOut { ref peers, .. } if *peers == [3, 5]));
}

#[test]
fn one_too_many_is_refused_at_once() {
    let now = Instant::now();
    let mut exchange = Exchange::new(TIMEOUT, 1);
    exchange.handle(now, dispatched(1, &[3]));
    exchange.handle(now, dispatched(2, &[3]));
    assert!(matches!(failure(drain(&mut exchange)), ExchangeError::Overloaded { id: 2, max: 1 }));
    exchange.handle(now, replied(1, 3));
    exchange.handle(now, dispatched(3, &[3]));
    assert_eq!(drain(&mut exchange), [Command::Complete { id: 1 }]);
}

#[derive(Debug, Clone)]
enum Step {
    Dispatch(Vec<u16>),
    Reply(u64, u16),
    Refuse(u64, u16),
    Lose(u16),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let (id, peer) = (0..40_u64, 0..6_u16);
    prop_oneof![
        4 => prop::collection::vec(0..6_u16, 0..4).prop_map(Step::Dispatch),
        8 => (id.clone(), peer.clone()).prop_map(|(id, peer)| Step::Reply(id, peer)),
        1 => (id, peer.clone()).prop_map(|(id, peer)| Step::Refuse(id, peer)),
        1 => peer.prop_map(Step::Lose),
        2 => (0..6_u64).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn every_dispatch_ends_exactly_once_and_nothing_leaks(
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let mut now = Instant::now();
        let mut exchange = Exchange::new(TIMEOUT, 8);
        let mut started: BTreeMap<u64, Instant> = BTreeMap::new();
        let mut ended: BTreeMap<u64, u32> = BTreeMap::new();
        let mut next = 0;
        for step in steps {
            match step {
                Step::Dispatch(peers) => {
                    started.insert(next, now);
                    exchange.handle(now, Event::Dispatched { id: next, peers });
                    next += 1;
                }
                Step::Reply(id, peer) => exchange.handle(now, replied(id, peer)),
                Step::Refuse(id, peer) => exchange.handle(now, refused(id, peer)),
                Step::Lose(peer) => exchange.handle(now, lost(peer)),
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    exchange.handle(now, Event::Tick);
                }
            }
            for command in drain(&mut exchange) {
                let (Command::Complete { id } | Command::Fail { id, .. }) = command;
                *ended.entry(id).or_default() += 1;
                prop_assert!(started.contains_key(&id));
            }
            prop_assert!(exchange.in_flight() <= 8);
            prop_assert_eq!(exchange.in_flight(), started.len() - ended.len());
            prop_assert_eq!(exchange.poll_timeout().is_some(), exchange.in_flight() > 0);
            // Nothing is older than its deadline.
            for (id, start) in &started {
                prop_assert!(ended.contains_key(id) || now < *start + TIMEOUT);
            }
        }
        exchange.handle(now + TIMEOUT, Event::Tick);
        for command in drain(&mut exchange) {
            let (Command::Complete { id } | Command::Fail { id, .. }) = command;
            *ended.entry(id).or_default() += 1;
        }
        prop_assert_eq!(exchange.in_flight(), 0);
        prop_assert!(ended.len() == started.len() && ended.values().all(|&times| times == 1));
    }
}
