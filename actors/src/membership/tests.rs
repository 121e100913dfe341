//! What membership promises, each seen to fail with the promise broken.

use super::*;
use crate::testing::tiny_model;

/// A machine with members whose loads end when the test says so.
pub(super) struct Cluster {
    pub(super) membership: Membership,
    pub(super) now: Instant,
    pub(super) commands: Vec<Command>,
    /// Who does not say that it computes when it is told to.
    pub(super) slow: Vec<&'static str>,
}

pub(super) fn info(name: &str, budget_bytes: u64) -> NodeInfo {
    NodeInfo {
        name: name.into(),
        address: format!("{name}:1"),
        release: String::new(),
        protocol: 1,
        determinism: 1,
        budget_bytes,
        threads: 1,
        pid: 1,
    }
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// 16 experts of 10 bytes.
fn cluster(workers: usize, copies: u16) -> Cluster {
    let membership = Membership::new(MembershipOptions {
        config: tiny_model(2, 8),
        expert_bytes: vec![10],
        workers,
        copies,
        policy: PlacementPolicy::Balanced,
        overcommit: false,
    });
    Cluster { membership, now: Instant::now(), commands: Vec::new(), slow: Vec::new() }
}

fn holding(plan: &Plan) -> Holding {
    let nodes = plan.nodes.iter().map(|node| node.name.clone()).collect();
    Holding { epoch: plan.epoch, nodes, you: plan.index, rules: plan.placement.rules().to_vec() }
}

impl Cluster {
    fn handle(&mut self, event: Event) -> &mut Self {
        self.membership.handle(self.now, event);
        while let Some(command) = self.membership.poll_command() {
            if let Command::Serve { name, .. } = &command
                && !self.slow.contains(&name.as_str())
            {
                self.membership.handle(self.now, Event::Computes { name: name.clone() });
            }
            self.commands.push(command);
        }
        self
    }

    fn join(&mut self, name: &str, incarnation: u64) -> &mut Self {
        self.join_with(name, incarnation, 1000, None)
    }

    fn join_with(
        &mut self,
        name: &str,
        incarnation: u64,
        budget: u64,
        holding: Option<Holding>,
    ) -> &mut Self {
        self.handle(Event::Joined { info: info(name, budget), incarnation, holding })
    }

    fn leave(&mut self, name: &str, incarnation: u64) -> &mut Self {
        self.handle(Event::Left { name: name.into(), incarnation, reason: "idle".into() })
    }

    fn loaded(&mut self, name: &str, epoch: u64) -> &mut Self {
        self.handle(Event::Loaded { name: name.into(), epoch, result: Ok(()) })
    }

    fn fails(&mut self, name: &str, epoch: u64) -> &mut Self {
        let result = Err("no memory".into());
        self.handle(Event::Loaded { name: name.into(), epoch, result })
    }

    fn link(&mut self, name: &str, by: &str, up: bool) -> &mut Self {
        let (name, by) = (name.into(), by.into());
        self.handle(match up {
            true => Event::Reachable { name, by },
            false => Event::Unreachable { name, by },
        })
    }

    /// Time passes, with ticks only where the machine asks for them.
    fn wait(&mut self, time: Duration) -> &mut Self {
        let end = self.now + time;
        while let Some(at) = self.membership.poll_timeout().filter(|at| *at <= end) {
            assert!(at >= self.now, "a timeout in the past");
            self.now = at;
            self.handle(Event::Tick);
            assert_ne!(self.membership.poll_timeout(), Some(at), "it asks for the same tick again");
        }
        self.now = end;
        self
    }

    fn take(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    fn loads(&mut self) -> Vec<(String, Plan)> {
        let load = |command| match command {
            Command::Load { name, assignment } => Some((name, assignment)),
            _ => None,
        };
        self.take().into_iter().filter_map(load).collect()
    }

    fn serves(&mut self) -> Vec<(String, Plan)> {
        let serve = |command| match command {
            Command::Serve { name, assignment } => Some((name, assignment)),
            _ => None,
        };
        self.take().into_iter().filter_map(serve).collect()
    }

    /// Everybody loads what it is told, until nobody is told anything.
    fn load_all(&mut self) -> &mut Self {
        let mut told = self.loads();
        while !told.is_empty() {
            for (name, plan) in &told {
                self.loaded(name, plan.epoch);
            }
            told = self.loads();
        }
        self
    }

    fn homes(&self) -> Vec<&str> {
        self.membership.homes().collect()
    }

    fn state(&self) -> State {
        self.membership.state().clone()
    }

    /// Experts that a member serves.
    fn share(&self, name: &str) -> u64 {
        let placement = self.membership.serving().unwrap();
        let index = usize::from(self.membership.slot(name).unwrap());
        placement.held(&[1], 16)[index]
    }
}

fn ready(names: &[&str], copies: u16) -> Cluster {
    let mut cluster = cluster(names.len(), copies);
    for name in names {
        cluster.join(name, 1);
    }
    cluster.load_all();
    cluster.take();
    assert_eq!(cluster.state(), State::Ready);
    cluster
}

#[test]
fn it_waits_then_loads_then_serves_when_all_have_loaded() {
    let mut c = cluster(2, 1);
    assert_eq!((c.state(), c.membership.missing().to_join), (State::Waiting, 2));
    assert!(c.join("a", 1).take().is_empty());
    let told = c.join("b", 1).loads();
    assert_eq!((told.len(), c.state()), (2, State::Loading));
    let epoch = told[0].1.epoch;
    assert!(c.loaded("a", epoch).loaded("b", epoch - 1).serves().is_empty(), "another epoch");
    assert_eq!(c.membership.missing().loading, ["b"]);
    assert!(c.loaded("a", epoch).loaded("c", epoch).serves().is_empty(), "b has not loaded");
    let served = c.loaded("b", epoch).serves();
    assert_eq!(served, told);
    assert_eq!((c.state(), c.homes()), (State::Ready, vec!["a", "b"]));
    assert_eq!(c.membership.missing(), Missing { workers: 2, ..Missing::default() });
}

#[test]
fn nothing_is_ready_before_the_holders_have_said_that_they_compute() {
    let mut c = cluster(2, 1);
    c.slow = vec!["a", "b", "c"];
    let computes = |name: &str| Event::Computes { name: name.into() };
    c.join("a", 1).join("b", 1).load_all();
    assert_eq!((c.state(), c.homes().len()), (State::Loading, 0));
    assert_eq!(c.membership.missing().beginning, ["a", "b"]);
    c.handle(computes("b"));
    assert_eq!((c.state(), c.homes().len()), (State::Loading, 0), "only a has some experts");
    assert_eq!(c.membership.missing().beginning, ["a"]);
    c.take();
    c.handle(computes("a"));
    assert_eq!((c.state(), c.homes()), (State::Ready, vec!["a", "b"]));
    assert_eq!(c.take(), [Command::Changed]);
    // Who computes already goes on from one epoch to the next; who has joined has yet to begin.
    c.join("c", 1).load_all();
    assert_eq!((c.state(), c.membership.missing().beginning), (State::Loading, vec!["c".into()]));
    c.handle(computes("c"));
    assert_eq!((c.state(), c.homes()), (State::Ready, vec!["a", "b", "c"]));
    // Another life begins anew, and who could not compute, too.
    c.handle(Event::Unfit { name: "c".into(), reason: "no memory".into() }).load_all();
    assert_eq!(c.homes(), ["a", "b"]);
    c.wait(RETRY_DELAY).load_all();
    assert_eq!(c.membership.missing().beginning, ["c"]);
}

#[test]
fn copies_that_compute_serve_while_others_begin() {
    let mut c = cluster(2, 2);
    c.slow = vec!["b"];
    c.join("a", 1).join("b", 1).load_all();
    assert_eq!((c.state(), c.homes()), (State::Degraded { complete: true }, vec!["a"]));
    c.handle(Event::Computes { name: "b".into() });
    assert_eq!((c.state(), c.homes()), (State::Ready, vec!["a", "b"]));
}

#[test]
fn a_joiner_gets_its_share_while_the_others_serve() {
    let mut c = ready(&["a", "b"], 1);
    let before = c.membership.epoch();
    let told = c.join("c", 1).loads();
    assert_eq!((told.len(), c.state(), c.homes()), (3, State::Ready, vec!["a", "b"]));
    assert_eq!(c.membership.epoch(), before);
    c.loaded("a", told[0].1.epoch).loaded("b", told[0].1.epoch);
    assert!(c.serves().is_empty() && c.membership.epoch() == before);
    assert_eq!(c.loaded("c", told[0].1.epoch).serves().len(), 3);
    assert_eq!(c.homes(), ["a", "b", "c"]);
    assert_eq!([c.share("a"), c.share("b"), c.share("c")].iter().max(), Some(&6));
}

#[test]
fn a_lost_member_is_waited_for_if_others_hold_its_experts() {
    let mut c = ready(&["a", "b", "c"], 2);
    c.leave("b", 1).wait(REPAIR_DELAY - ms(1));
    assert!(c.loads().is_empty());
    assert_eq!((c.state(), c.homes()), (State::Degraded { complete: true }, vec!["a", "c"]));
    let lost = Lost { name: "b".into(), how: Some("idle".into()) };
    assert_eq!(c.membership.missing().lost, [lost]);
    c.wait(ms(1)).load_all();
    assert_eq!((c.state(), c.share("a"), c.share("c")), (State::Ready, 16, 16));
}

#[test]
fn a_lost_member_is_replaced_at_once_if_nobody_else_holds_its_experts() {
    let mut c = ready(&["a", "b"], 1);
    let told = c.leave("b", 1).loads();
    assert_eq!((told.len(), c.state(), c.homes().len()), (1, State::Loading, 0));
    // Its successor does not put off the end of the outage.
    assert!(c.join("c", 1).loads().is_empty());
    c.loaded("a", told[0].1.epoch);
    assert_eq!((c.state(), c.homes(), c.share("c")), (State::Ready, vec!["a", "c"], 0));
    c.load_all();
    assert_eq!((c.homes(), c.share("a"), c.share("c")), (vec!["a", "c"], 8, 8));
}

#[test]
fn without_room_for_the_lost_experts_a_newcomer_takes_the_slot_and_survivors_keep_theirs() {
    let mut c = cluster(2, 1);
    c.join_with("a", 1, 80, None).join_with("b", 1, 80, None).load_all().take();
    c.leave("b", 1);
    assert!(c.loads().is_empty());
    assert_eq!(c.state(), State::Degraded { complete: false });
    let missing = c.membership.missing();
    assert_eq!((missing.experts, missing.to_join, missing.room.is_some()), (8, 1, true));
    c.join_with("z", 1, 10, None);
    assert!(matches!(c.state(), State::Failed(reason) if reason.contains("160 bytes")));
    let before = c.membership.serving().cloned();
    c.leave("z", 1).take();
    c.join_with("c", 1, 80, None).load_all();
    assert_eq!((c.state(), c.membership.serving().cloned()), (State::Ready, before));
    assert_eq!(c.membership.slot("c"), Some(1));
}

#[test]
fn who_has_less_room_than_it_said_is_given_less_and_is_believed_once() {
    let mut c = ready(&["a", "b"], 1);
    let room = |name: &str, budget| Event::Room { name: name.into(), budget };
    for (name, budget) in [("a", 1000), ("a", u64::MAX), ("nobody", 1), ("b", 400)] {
        assert!(c.handle(room(name, budget)).loads().is_empty(), "{name} {budget}: nothing moves");
    }
    c.handle(room("a", 40)).load_all();
    assert_eq!((c.state(), c.share("a"), c.share("b")), (State::Ready, 4, 12));
    for (name, budget) in [("a", 0), ("b", 10)] {
        assert!(c.handle(room(name, budget)).loads().is_empty(), "{name} has said another already");
    }
    // In another life it may have another.
    c.join("a", 2).load_all();
    assert!(c.share("a") > 4);
    c.handle(room("a", 20)).load_all();
    assert_eq!((c.state(), c.share("a"), c.share("b")), (State::Ready, 2, 14));
}

#[test]
fn a_newer_life_replaces_the_older_whose_farewell_counts_for_nothing() {
    let mut c = ready(&["a", "b"], 2);
    assert!(c.join("b", 1).take().is_empty(), "the same life again");
    let again = NodeInfo { pid: 2, ..info("b", 1000) };
    c.handle(Event::Joined { info: again, incarnation: 2, holding: None });
    assert!(
        c.commands
            .iter()
            .any(|c| matches!(c, Command::Dismiss { name, incarnation: 1, .. } if name == "b"))
    );
    let told = c.loads();
    c.leave("b", 1);
    assert_eq!(c.membership.slot("b"), Some(1));
    assert_eq!((c.homes(), c.state()), (vec!["a"], State::Degraded { complete: true }));
    c.loaded("a", told[0].1.epoch).loaded("b", told[0].1.epoch);
    assert_eq!(c.homes(), ["a", "b"]);
}

#[test]
fn a_member_that_only_lost_its_connection_goes_on_with_what_it_holds() {
    let mut c = ready(&["a", "b"], 1);
    let placement = c.membership.serving().unwrap().clone();
    let nodes = vec!["a".to_owned(), "b".to_owned()];
    let epoch = c.membership.epoch();
    let held = Holding { epoch, nodes, you: 1, rules: placement.rules().to_vec() };
    c.join_with("b", 2, 1000, Some(held.clone()));
    let served = c.serves();
    assert_eq!((served.len(), served[0].0.as_str(), served[0].1.epoch), (1, "b", epoch));
    assert_eq!((c.state(), c.membership.epoch()), (State::Ready, epoch));
    // What it claims to hold of another slot is no use here.
    for wrong in [
        Holding { you: 0, ..held.clone() },
        Holding { you: 9, ..held.clone() },
        Holding { epoch: u64::MAX, ..held.clone() },
        Holding { rules: Vec::new(), ..held },
    ] {
        let incarnation = 10 + c.now.elapsed().as_nanos() as u64;
        assert!(c.join_with("b", incarnation, 1000, Some(wrong)).serves().is_empty());
        c.load_all().take();
    }
}

#[test]
fn a_coordinator_that_starts_again_loads_nothing_again() {
    let mut c = cluster(3, 2);
    c.join("a", 1).join("b", 1);
    let told = c.join("c", 1).loads();
    for (name, plan) in &told {
        c.loaded(name, plan.epoch);
    }
    assert_eq!(c.state(), State::Ready);
    let mut again = cluster(3, 2);
    let join = |again: &mut Cluster, at: usize| {
        let (name, plan) = &told[at];
        again.join_with(name, 7, 1000, Some(holding(plan)));
    };
    join(&mut again, 1);
    assert_eq!(again.state(), State::Waiting);
    // Two of three hold everything.
    join(&mut again, 0);
    assert_eq!(
        (again.state(), again.homes()),
        (State::Degraded { complete: true }, vec!["a", "b"])
    );
    assert!(again.membership.epoch() > told[0].1.epoch);
    again.wait(ms(500));
    join(&mut again, 2);
    assert_eq!((again.state(), again.homes().len()), (State::Ready, 3));
    assert!(!again.commands.iter().any(|command| matches!(command, Command::Load { .. })));
    assert_eq!(again.membership.serving(), Some(&told[0].1.placement));
    again.wait(ms(5000));
    assert!(again.loads().is_empty());
}

#[test]
fn who_cannot_load_is_left_out_for_a_while_and_nothing_is_final() {
    let mut c = cluster(2, 1);
    c.join("a", 1);
    let told = c.join("b", 1).loads();
    let rest = c.fails("b", told[0].1.epoch).loads();
    assert!(rest.iter().all(|(_, plan)| !plan.placement.names(1)));
    c.loaded("a", rest[0].1.epoch).take();
    assert_eq!((c.state(), c.homes()), (State::Ready, vec!["a"]));
    assert_eq!(c.membership.missing().unfit, [("b".to_owned(), "no memory".to_owned())]);
    assert!(c.fails("b", told[0].1.epoch).take().is_empty(), "an older epoch");
    c.wait(RETRY_DELAY).load_all();
    assert_eq!((c.state(), c.homes(), c.share("b")), (State::Ready, vec!["a", "b"], 8));

    let mut alone = cluster(1, 1);
    let told = alone.join("a", 1).loads();
    alone.fails("a", told[0].1.epoch);
    assert!(matches!(alone.state(), State::Failed(reason) if reason.contains("no memory")));
    alone.wait(RETRY_DELAY).load_all();
    assert_eq!(alone.state(), State::Ready);
}

#[test]
fn the_death_of_a_holder_ends_a_target() {
    let mut c = ready(&["a", "b"], 1);
    let told = c.join("c", 1).loads();
    let before = c.membership.serving().cloned();
    let (again, epoch) = (c.leave("c", 1).serves(), told[0].1.epoch);
    // What serves is served on, under a number that ends what was loaded for the target.
    assert!(again.len() == 2 && again.iter().all(|(_, plan)| plan.epoch > epoch));
    assert_eq!(c.membership.serving(), before.as_ref());
    c.loaded("a", epoch).loaded("b", epoch).loaded("c", epoch);
    assert!(c.serves().is_empty());
    assert_eq!((c.state(), c.homes()), (State::Ready, vec!["a", "b"]));
}

#[test]
fn a_drained_member_gives_its_share_away_and_is_let_go() {
    let mut c = ready(&["a", "b", "c"], 1);
    c.handle(Event::Drain { name: "b".into() });
    assert_eq!(c.homes(), ["a", "c"]);
    let told = c.loads();
    assert!(c.take().is_empty(), "it still serves");
    for (name, plan) in &told {
        c.loaded(name, plan.epoch);
    }
    assert!(c.take().iter().any(|c| matches!(c, Command::Dismiss { name, .. } if name == "b")));
    assert_eq!((c.state(), c.homes(), c.share("a")), (State::Ready, vec!["a", "c"], 8));
    // The last one cannot give anything to anybody.
    c.handle(Event::Drain { name: "c".into() }).load_all().take();
    c.handle(Event::Drain { name: "a".into() }).load_all();
    assert!(!c.take().iter().any(|c| matches!(c, Command::Dismiss { .. })));
    assert_eq!(c.membership.missing().draining, ["a"]);
}

#[test]
fn a_link_that_stays_cut_is_worked_around_and_comes_back() {
    let mut c = ready(&["a", "b", "c"], 1);
    c.link("b", "a", false);
    assert_eq!(c.homes(), ["c"], "neither end of the cut reaches everything");
    c.wait(LINK_REPAIR - ms(1));
    assert!(c.loads().is_empty());
    c.wait(ms(1)).load_all();
    assert_eq!((c.share("b"), c.homes()), (0, vec!["a", "c"]), "of equals, the higher slot");
    c.link("b", "a", true).wait(LINK_REPAIR / 2);
    assert!(c.loads().is_empty());
    c.link("b", "a", false).wait(LINK_REPAIR / 2).link("b", "a", true).wait(LINK_REPAIR - ms(1));
    assert!(c.loads().is_empty(), "it flaps");
    c.wait(ms(1)).load_all();
    assert_eq!((c.homes().len(), c.share("b")), (3, 5));
}

#[test]
fn a_cut_between_copies_moves_nothing() {
    let mut c = ready(&["a", "b", "c"], 2);
    c.link("b", "a", false).link("a", "b", false).wait(ms(10_000));
    // Whatever one of them does not reach, the third has.
    assert!(c.loads().is_empty());
    assert_eq!((c.state(), c.homes().len()), (State::Ready, 3));
    c.link("b", "a", true);
    assert_eq!(c.membership.missing().cut.len(), 1, "the other end still says so");
}

#[test]
fn a_suspect_gets_no_jobs_and_keeps_its_experts() {
    let mut c = ready(&["a", "b"], 1);
    c.handle(Event::Suspect { name: "a".into(), reason: "silent".into() });
    assert_eq!(c.take(), [Command::Changed]);
    // Nobody else has its experts: that is not ready.
    assert_eq!((c.homes(), c.state()), (vec!["b"], State::Degraded { complete: true }));
    c.handle(Event::Recovered { name: "a".into() });
    assert_eq!((c.homes().len(), c.state()), (2, State::Ready));
    let mut c = ready(&["a", "b"], 2);
    c.handle(Event::Suspect { name: "a".into(), reason: "silent".into() });
    assert_eq!((c.homes(), c.state()), (vec!["b"], State::Ready), "the other has them, too");
}

#[test]
fn copies_are_given_up_where_that_makes_room_for_what_is_lost() {
    let mut c = cluster(4, 2);
    for name in ["a", "b", "c", "d"] {
        c.join_with(name, 1, 80, None);
    }
    c.load_all().take();
    assert_eq!(c.state(), State::Ready);
    // What remains has room for one copy of everything, if it gives up the second of the rest.
    c.leave("a", 1).leave("b", 1).load_all();
    assert_eq!(c.state(), State::Degraded { complete: true });
    assert_eq!((c.share("c"), c.share("d")), (8, 8));
}
