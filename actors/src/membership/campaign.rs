//! Histories of members that join, leave, fail, lose links and come back, and of coordinators that
//! start again, against nodes that hold exactly what they were told to.

use std::collections::{BTreeMap, BTreeSet};

use lite_llm_runtime::expert::ExpertKey;

use super::{tests::info, *};
use crate::testing::{Draws, tiny_model};

/// A worker, as the module's text asks for it.
struct Node {
    budget: u64,
    /// Another for each start of its process.
    pid: u32,
    incarnation: u64,
    /// Its process runs, and the coordinator is told of its end.
    joined: bool,
    memory: BTreeSet<ExpertKey>,
    /// What it was told to serve since it joined.
    serves: Option<Plan>,
    /// What it says that it has loaded.
    holds: Option<Plan>,
    loads: Option<Plan>,
    /// It was told to compute and has not said yet that it does.
    begins: bool,
    /// It has said so.
    computes: bool,
    /// Loads fail until then.
    broken_until: u64,
}

struct World {
    seed: u64,
    random: Draws,
    membership: Membership,
    start: Instant,
    now: u64,
    nodes: BTreeMap<String, Node>,
    cut: BTreeSet<(String, String)>,
    incarnations: u64,
    /// Greatest epoch that was seen.
    epoch: u64,
    /// The epoch that serves.
    served: u64,
    /// Epochs that had to be loaded.
    loaded_epochs: BTreeSet<u64>,
    /// And the process that is to go.
    drained: BTreeMap<String, u32>,
    dismissed: usize,
    /// Experts that were loaded.
    loads: usize,
    keys: Vec<ExpertKey>,
    /// Nodes have little room.
    tight: bool,
}

const EXPERT: u64 = 10;

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Draws(seed);
        let config = tiny_model(1 + random.below(2) as usize, 4 + random.below(5) as u32);
        let keys: Vec<ExpertKey> = config.expert_keys().collect();
        let options = MembershipOptions {
            config,
            expert_bytes: vec![EXPERT],
            workers: 1 + random.below(3) as usize,
            copies: 1 + random.below(2) as u16,
            policy: PlacementPolicy::Balanced,
            overcommit: false,
        };
        Self {
            seed,
            random,
            membership: Membership::new(options),
            start: Instant::now(),
            now: 0,
            nodes: BTreeMap::new(),
            cut: BTreeSet::new(),
            incarnations: 0,
            epoch: 0,
            served: 0,
            loaded_epochs: BTreeSet::new(),
            drained: BTreeMap::new(),
            dismissed: 0,
            loads: 0,
            keys,
            tight: seed.is_multiple_of(4),
        }
    }

    fn share(&self, plan: &Plan) -> BTreeSet<ExpertKey> {
        let holds = |key: &&ExpertKey| plan.placement.holds(plan.index, **key);
        self.keys.iter().filter(holds).copied().collect()
    }

    fn handle(&mut self, event: Event) {
        let now = self.start + Duration::from_millis(self.now);
        self.membership.handle(now, event);
        while let Some(command) = self.membership.poll_command() {
            self.carry_out(command);
        }
        self.check();
    }

    fn carry_out(&mut self, command: Command) {
        let seed = self.seed;
        match command {
            Command::Load { name, assignment } => {
                let new = !self.loaded_epochs.contains(&assignment.epoch);
                assert!(!new || assignment.epoch > self.epoch, "seed {seed}: epochs grow");
                self.epoch = self.epoch.max(assignment.epoch);
                self.loaded_epochs.insert(assignment.epoch);
                let share = self.share(&assignment);
                let served = self.nodes[&name].serves.as_ref().map(|plan| self.share(plan));
                let Some(node) = self.nodes.get_mut(&name).filter(|node| node.joined) else {
                    panic!("seed {seed}: {name} is not there");
                };
                let known = node.holds.as_ref().map_or(0, |plan| plan.epoch);
                assert!(assignment.epoch > known, "seed {seed}: {name} knows {known}");
                let served = served.unwrap_or_default();
                node.memory.retain(|key| share.contains(key) || served.contains(key));
                node.holds = node.serves.clone();
                node.loads = Some(assignment);
            }
            Command::Serve { name, assignment } => {
                assert!(assignment.epoch >= self.served, "seed {seed}: a stale epoch serves");
                let first = assignment.epoch > self.served;
                self.served = assignment.epoch;
                self.epoch = self.epoch.max(assignment.epoch);
                let share = self.share(&assignment);
                let node = &self.nodes[&name];
                assert!(node.joined && share.is_subset(&node.memory), "seed {seed}: {name} lacks");
                if first && self.loaded_epochs.contains(&assignment.epoch) {
                    self.check_holders(&assignment);
                }
                let node = self.nodes.get_mut(&name).unwrap();
                let known = node.holds.as_ref().map_or(0, |plan| plan.epoch);
                assert!(assignment.epoch >= known, "seed {seed}: {name} knows {known}");
                node.memory.retain(|key| share.contains(key));
                (node.serves, node.holds) = (Some(assignment.clone()), Some(assignment));
                (node.loads, node.begins) = (None, true);
            }
            Command::Dismiss { name, incarnation, .. } => {
                let node = self.nodes.get_mut(&name).unwrap();
                if node.incarnation == incarnation {
                    assert!(self.drained.contains_key(&name), "seed {seed}: {name} is sent away");
                    *node = node.dead();
                }
                self.dismissed += 1;
            }
            Command::Changed => {}
        }
    }

    /// Every holder of an epoch that serves has what it is to hold.
    fn check_holders(&self, plan: &Plan) {
        for (index, address) in (0u16..).zip(&plan.nodes) {
            let share = self.share(&Plan { index, ..plan.clone() });
            let loaded = share.is_empty()
                || self.nodes.get(&address.name).is_some_and(|n| share.is_subset(&n.memory));
            assert!(loaded, "seed {}: {} of epoch {}", self.seed, address.name, plan.epoch);
        }
    }

    fn check(&self) {
        let seed = self.seed;
        for (name, node) in &self.nodes {
            let held = node.memory.len() as u64 * EXPERT;
            assert!(held <= node.budget, "seed {seed}: {name} holds {held} of {}", node.budget);
        }
        let complete =
            matches!(self.membership.state(), State::Ready | State::Degraded { complete: true });
        let epoch = self.membership.epoch();
        let mut holders = self.nodes.values().filter(|node| node.joined);
        if complete {
            let serving: Vec<&Node> = holders
                .by_ref()
                .filter(|n| n.serves.as_ref().is_some_and(|plan| plan.epoch == epoch))
                .collect();
            let held = |key: &ExpertKey| {
                serving.iter().filter(|node| node.computes).any(|node| {
                    let plan = node.serves.as_ref().unwrap();
                    plan.placement.holds(plan.index, *key) && node.memory.contains(key)
                })
            };
            assert!(self.keys.iter().all(held), "seed {seed}: {:?}", self.membership.state());
        }
        for home in self.membership.homes() {
            let node = &self.nodes[home];
            let told = node.serves.as_ref().is_some_and(|plan| plan.epoch == epoch);
            assert!(complete && node.joined && told, "seed {seed}: {home} is no home");
            assert!(node.computes, "seed {seed}: {home} does not compute yet");
            assert!(!self.drained.contains_key(home), "seed {seed}: {home} is to go");
        }
        let homeless = self.membership.homes().next().is_none();
        assert!(!homeless || *self.membership.state() != State::Ready, "seed {seed}: ready?");
    }

    fn join(&mut self, name: &str) {
        self.incarnations += 1;
        let node = self.nodes.get_mut(name).unwrap();
        (node.joined, node.incarnation) = (true, self.incarnations);
        (node.loads, node.serves) = (None, None);
        (node.begins, node.computes) = (false, false);
        let holding = node.holds.as_ref().map(|plan| Holding {
            epoch: plan.epoch,
            nodes: plan.nodes.iter().map(|node| node.name.clone()).collect(),
            you: plan.index,
            rules: plan.placement.rules().to_vec(),
        });
        self.epoch = self.epoch.max(holding.as_ref().map_or(0, |holding| holding.epoch));
        let (pid, incarnation) = (node.pid, node.incarnation);
        let info = NodeInfo { pid, ..info(name, node.budget) };
        self.cut.retain(|(a, b)| a != name && b != name);
        if self.drained.get(name).is_some_and(|drained| *drained != pid) {
            self.drained.remove(name);
        }
        self.handle(Event::Joined { info, incarnation, holding });
    }

    fn leave(&mut self, name: &str, dies: bool) {
        let node = self.nodes.get_mut(name).unwrap();
        node.joined = false;
        let incarnation = node.incarnation;
        if dies {
            *node = node.dead();
        }
        self.handle(Event::Left { name: name.into(), incarnation, reason: "idle".into() });
    }

    /// A node begins to compute if it was told to, and ends what it loads.
    fn load(&mut self, name: &str) {
        let node = self.nodes.get_mut(name).unwrap();
        if std::mem::take(&mut node.begins) {
            node.computes = true;
            self.handle(Event::Computes { name: name.into() });
        }
        let node = self.nodes.get_mut(name).unwrap();
        let Some(plan) = node.loads.take() else { return };
        let broken = self.now < node.broken_until;
        let result = if broken { Err("broken".to_owned()) } else { Ok(()) };
        if !broken {
            let share = self.share(&plan);
            let node = self.nodes.get_mut(name).unwrap();
            let before = node.memory.len();
            node.memory.extend(share);
            self.loads += node.memory.len() - before;
            node.holds = Some(plan.clone());
        }
        self.handle(Event::Loaded { name: name.into(), epoch: plan.epoch, result });
    }

    /// All begin to compute who were told to.
    fn begin(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        names.iter().for_each(|name| self.load(name));
    }

    fn restart_coordinator(&mut self) {
        self.membership = Membership::new(self.membership.options.clone());
        self.cut.clear();
        self.drained.clear();
        (self.epoch, self.served) = (0, 0);
        self.loaded_epochs.clear();
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in names {
            if self.nodes[&name].joined {
                self.join(&name);
            }
        }
    }

    fn any(&mut self, joined: bool) -> Option<String> {
        let names: Vec<&String> =
            self.nodes.iter().filter(|(_, n)| n.joined == joined).map(|(name, _)| name).collect();
        let at = self.random.next().checked_rem(names.len() as u64)?;
        Some(names[at as usize].clone())
    }

    fn pass(&mut self, time: u64) {
        let end = self.now + time;
        loop {
            let due = self.membership.poll_timeout().map(|at| at - self.start);
            let at = due.map_or(end, |at| (at.as_millis() as u64).clamp(self.now, end));
            self.now = at;
            self.handle(Event::Tick);
            if at == end {
                return;
            }
        }
    }

    fn fault(&mut self) {
        let (joined, away) = (self.any(true), self.any(false));
        match self.random.below(14) {
            0..2 if self.nodes.len() < 5 => {
                let total = self.keys.len() as u64 * EXPERT;
                let budget = match self.random.below(3) {
                    _ if self.tight => total / 3 + self.random.below(total / 3),
                    0 => total / 2 + self.random.below(total / 2),
                    _ => total,
                };
                let name = format!("n{}", self.nodes.len());
                self.nodes.insert(name.clone(), Node::new(budget));
                self.join(&name);
            }
            0..4 => away.into_iter().for_each(|name| self.join(&name)),
            4..6 => joined.into_iter().for_each(|name| {
                let dies = self.random.below(2) == 0;
                self.leave(&name, dies);
            }),
            6 => joined.into_iter().for_each(|name| {
                // It comes back before its end was noticed; then that is told.
                let before = self.nodes[&name].incarnation;
                if self.random.below(2) == 0 {
                    let node = self.nodes.get_mut(&name).unwrap();
                    *node = node.dead();
                }
                self.join(&name);
                let reason = "late".into();
                self.handle(Event::Left { name, incarnation: before, reason });
            }),
            7..10 => {
                let (Some(a), Some(b)) = (joined, self.any(true)) else { return };
                if a != b && self.cut.insert((a.clone(), b.clone())) {
                    self.handle(Event::Unreachable { name: a, by: b });
                }
            }
            10 => {
                let Some((a, b)) = self.cut.pop_first() else { return };
                self.handle(Event::Reachable { name: a, by: b });
            }
            11 => joined.into_iter().for_each(|name| {
                self.nodes.get_mut(&name).unwrap().broken_until = self.now + 3000;
            }),
            12 if self.random.below(3) == 0 => joined.into_iter().for_each(|name| {
                self.drained.insert(name.clone(), self.nodes[&name].pid);
                self.handle(Event::Drain { name });
            }),
            12 => {
                // Reports of epochs that are over, or never were.
                let epoch = self.random.below(self.epoch + 1);
                let result = if self.random.below(2) == 0 { Ok(()) } else { Err("old".into()) };
                let current = self.membership.target.as_ref().map(|target| target.number);
                if let Some(name) = joined.filter(|_| current != Some(epoch)) {
                    self.handle(Event::Loaded { name, epoch, result });
                }
            }
            _ if self.random.below(3) == 0 => self.restart_coordinator(),
            _ => {}
        }
    }

    fn run(&mut self) {
        for _ in 0..60 {
            self.fault();
            let time = [0, 50, 400, 1500][self.random.below(4) as usize];
            for _ in 0..self.random.below(3) {
                if let Some(name) = self.any(true) {
                    self.load(&name);
                }
            }
            self.pass(time);
        }
    }

    /// Everything is mended; everybody comes back.
    fn heal(&mut self) {
        while let Some((a, b)) = self.cut.pop_first() {
            self.handle(Event::Reachable { name: a, by: b });
        }
        while self.nodes.len() < 3 {
            let name = format!("n{}", self.nodes.len());
            self.nodes.insert(name, Node::new(self.keys.len() as u64 * EXPERT));
        }
        while let Some(name) = self.drained.keys().next().cloned() {
            self.leave(&name, true);
            self.join(&name);
        }
        while let Some(name) = self.any(false) {
            self.join(&name);
        }
        for _ in 0..60 {
            let names: Vec<String> = self.nodes.keys().cloned().collect();
            names.iter().for_each(|name| self.load(name));
            self.pass(500);
        }
    }
}

impl Node {
    /// The same after its process has died.
    fn dead(&self) -> Self {
        let (incarnation, pid) = (self.incarnation, self.pid + 1);
        Self { incarnation, pid, ..Self::new(self.budget) }
    }

    fn new(budget: u64) -> Self {
        Self {
            budget,
            pid: 1,
            incarnation: 0,
            joined: false,
            memory: BTreeSet::new(),
            serves: None,
            holds: None,
            loads: None,
            begins: false,
            computes: false,
            broken_until: 0,
        }
    }
}

#[test]
fn random_histories() {
    let (mut loads, mut served, mut dismissed, mut few) = (0, 0, 0, 0);
    for seed in 0..2000 {
        let mut world = World::new(seed);
        world.run();
        world.heal();
        let missing = world.membership.missing();
        let state = world.membership.state();
        let experts = world.keys.len() as u64;
        let room: u64 = world.nodes.values().map(|n| (n.budget / EXPERT).min(experts)).sum();
        if room < experts {
            assert!(matches!(state, State::Failed(_)), "seed {seed}: {state:?}");
            continue;
        }
        let wanted = if room < experts * u64::from(world.membership.options.copies) {
            few += 1;
            State::Degraded { complete: true }
        } else {
            State::Ready
        };
        assert_eq!(*state, wanted, "seed {seed}: {missing:?}");
        assert_eq!(world.membership.homes().count(), world.nodes.len(), "seed {seed}: {missing:?}");
        // At rest, nothing moves any more, and another coordinator loads nothing again.
        let before = world.loads;
        world.pass(20_000);
        world.restart_coordinator();
        world.begin();
        world.pass(20_000);
        world.begin();
        assert_eq!(world.loads, before, "seed {seed}");
        assert_eq!(
            *world.membership.state(),
            wanted,
            "seed {seed}: {:?}",
            world.membership.missing()
        );
        assert!(world.nodes.values().all(|node| node.loads.is_none()), "seed {seed}");
        (loads, served) = (loads + world.loads, served + world.epoch);
        dismissed += world.dismissed;
    }
    assert!(
        loads > 10_000 && served > 10_000 && dismissed > 100 && few > 50,
        "{loads} {served} {dismissed}"
    );
}
