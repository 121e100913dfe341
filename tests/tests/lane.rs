//! The lane as a machine: what becomes of expert calls whose holder is lost, suspected, or does not
//! have its experts. Three lanes hand each other frames; time goes by only where a test says so.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use lite_llm_actors::{
    lane::{Arrangement, Command, Event, LaneLimits, LaneMachine, LaneParts},
    placement::Placement,
};
use lite_llm_kernels::cpu::Cpu;
use lite_llm_runtime::{engine, sequence::Request, store::DramStore};
use lite_llm_tests::tiny::TinyModel;
use lite_llm_transport::{
    frame::{Frame, OutgoingFrame},
    messages::{ExpertBatchView, ExpertReplyView, NodeAddress, PlacementRule},
    pool::BufferPool,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Three lanes: the first is home to a request and holds no expert.
struct Lanes {
    lanes: Vec<LaneMachine<Cpu, u16>>,
    now: Instant,
    pool: BufferPool,
    /// Lanes that what is sent to does not reach, and what was sent to them.
    silent: BTreeSet<u16>,
    unread: Vec<(u16, Frame)>,
    tokens: Vec<u32>,
    failed: Option<String>,
    ended: u32,
    not_taken: Option<String>,
}

fn nodes() -> Vec<NodeAddress> {
    ["a", "b", "c"]
        .map(|name| NodeAddress { name: name.into(), address: format!("{name}:1") })
        .into()
}

/// Every expert is held by these nodes, in this order.
fn held_by(model: &TinyModel, holders: &[u16]) -> Arc<Placement> {
    let copies = holders.len() as u16;
    let rule =
        PlacementRule { tier: 0, first_group: 0, end_group: 1, copies, holders: holders.to_vec() };
    Arc::new(Placement::new(&model.backbone.config, vec![rule]).unwrap())
}

fn request() -> Request {
    Request::greedy(vec![1, 50, 7, 200, 3], 4)
}

impl Lanes {
    fn new(model: &TinyModel, holders: &[u16], stores: [Arc<DramStore>; 3]) -> Self {
        let now = Instant::now();
        let placement = held_by(model, holders);
        let lane = |(me, store): (u16, Arc<DramStore>)| {
            let mut lane = LaneMachine::new(LaneParts {
                engine: model.engine(),
                store,
                arrangement: Arrangement { placement: placement.clone(), me, nodes: nodes() },
                buffers: BufferPool::default(),
                limits: LaneLimits { patience: PATIENCE, ..LaneLimits::default() },
            });
            for peer in (0..3).filter(|peer| *peer != me) {
                lane.handle(now, Event::PeerUp { peer });
            }
            lane
        };
        Self {
            lanes: (0u16..).zip(stores).map(lane).collect(),
            now,
            pool: BufferPool::default(),
            silent: BTreeSet::new(),
            unread: Vec::new(),
            tokens: Vec::new(),
            failed: None,
            ended: 0,
            not_taken: None,
        }
    }

    /// The usual three: all of them have all experts in their stores.
    fn with_holders(model: &TinyModel, holders: &[u16]) -> Self {
        Self::new(model, holders, [(); 3].map(|()| model.store.clone()))
    }

    fn home(&mut self, event: Event<u16>) {
        self.lanes[0].handle(self.now, event);
        self.run();
    }

    fn copied(&self, frame: &OutgoingFrame) -> Frame {
        Frame::copied(frame.kind(), frame.bytes(), &self.pool).unwrap()
    }

    /// Lets the home's time go by, up to its next deadlines until then.
    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.lanes[0].poll_timeout().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.home(Event::Tick);
        }
        self.now = end;
    }

    /// Hands a batch to a lane.
    fn batch(&mut self, to: u16, frame: &Frame) {
        let view = ExpertBatchView::check(frame).unwrap();
        self.lanes[usize::from(to)].handle(self.now, Event::Batch { view, reply: 0 });
    }

    /// Carries out what the lanes want, until they want nothing.
    fn run(&mut self) {
        let mut quiet = false;
        while !quiet {
            quiet = true;
            for me in 0..3u16 {
                while let Some(command) = self.lanes[usize::from(me)].poll_command() {
                    quiet = false;
                    self.carry_out(me, command);
                }
            }
        }
    }

    fn carry_out(&mut self, me: u16, command: Command<u16>) {
        match command {
            Command::Send { peer, frame, .. } => {
                let frame = self.copied(&frame);
                match self.silent.contains(&peer) {
                    true => self.unread.push((peer, frame)),
                    false => self.batch(peer, &frame),
                }
            }
            Command::Answer { reply, frame } => {
                let reply_frame = self.copied(&frame);
                let reply_view = ExpertReplyView::check(&reply_frame).unwrap();
                let event = Event::Reply { peer: me, reply: reply_view };
                self.lanes[usize::from(reply)].handle(self.now, event);
            }
            Command::Compute => self.lanes[usize::from(me)].compute(self.now),
            Command::Publish(engine::Event::Token { id, .. }) => self.tokens.push(id),
            Command::Publish(engine::Event::Ended { .. }) => self.ended += 1,
            Command::Publish(engine::Event::Failed { reason, .. }) => self.failed = Some(reason),
            Command::Publish(_) => {}
            Command::NotTaken { reason, .. } => self.not_taken = Some(reason),
            Command::Lost(reason) => panic!("a CPU is never lost: {reason}"),
        }
    }

    fn start(&mut self) {
        self.home(Event::Start { sequence: 0, request: request() });
    }

    #[track_caller]
    fn has_ended_as_alone(&self, model: &TinyModel) {
        let not = (self.failed.as_deref(), self.not_taken.as_deref());
        assert_eq!((self.ended, not), (1, (None, None)));
        assert_eq!(self.tokens, model.alone(&request()));
    }

    #[track_caller]
    fn waits(&self) {
        assert_eq!((self.ended, self.failed.as_deref()), (0, None));
        assert!(self.lanes[0].is_waiting());
    }
}

#[test]
fn calls_of_a_lost_holder_go_to_the_other_at_once_and_its_late_answers_change_nothing() {
    let model = TinyModel::load();
    let mut lanes = Lanes::with_holders(&model, &[1, 2]);
    lanes.silent.insert(1);
    lanes.start();
    lanes.waits();
    lanes.home(Event::PeerLost { peer: 1, reason: "it was killed".into() });
    lanes.has_ended_as_alone(&model);
    for (to, frame) in std::mem::take(&mut lanes.unread) {
        lanes.batch(to, &frame);
    }
    lanes.run();
    lanes.has_ended_as_alone(&model);
}

#[test]
fn calls_of_a_suspect_go_to_the_other_holder_and_stay_where_there_is_none() {
    let model = TinyModel::load();
    let suspects = || Event::Suspects(vec!["b".into()]);
    let mut lanes = Lanes::with_holders(&model, &[1, 2]);
    lanes.silent.insert(1);
    lanes.start();
    lanes.home(suspects());
    lanes.has_ended_as_alone(&model);

    let mut lanes = Lanes::with_holders(&model, &[1]);
    lanes.silent.insert(1);
    lanes.start();
    lanes.home(suspects());
    lanes.waits();
    // It was only slow.
    lanes.silent.clear();
    for (to, frame) in std::mem::take(&mut lanes.unread) {
        lanes.batch(to, &frame);
    }
    lanes.run();
    lanes.has_ended_as_alone(&model);
}

#[test]
fn without_another_holder_a_pass_waits_for_one_and_keeps_what_it_has() {
    let model = TinyModel::load();
    for comes in ["another holder", "the same again", "its own experts"] {
        let mut lanes = Lanes::with_holders(&model, &[1]);
        lanes.silent.insert(1);
        lanes.start();
        lanes.home(Event::PeerLost { peer: 1, reason: "it was killed".into() });
        lanes.wait(PATIENCE / 2);
        lanes.waits();
        lanes.silent.clear();
        let moved = |to| Arrangement { placement: held_by(&model, &[to]), me: 0, nodes: nodes() };
        lanes.home(match comes {
            "another holder" => Event::Rearrange(moved(2)),
            "its own experts" => Event::Rearrange(moved(0)),
            _ => Event::PeerUp { peer: 1 },
        });
        lanes.has_ended_as_alone(&model);
    }
}

#[test]
fn whoever_waits_too_long_is_told_for_whom() {
    let model = TinyModel::load();
    let mut lanes = Lanes::with_holders(&model, &[1]);
    lanes.silent.insert(1);
    lanes.start();
    lanes.home(Event::PeerLost { peer: 1, reason: "it was killed".into() });
    lanes.wait(PATIENCE - Duration::from_secs(1));
    lanes.waits();
    lanes.wait(Duration::from_secs(2));
    let reason = lanes.failed.clone().expect("it fails");
    assert!(reason.contains("worker b is gone (it was killed)"), "{reason}");
    // The lane serves on.
    lanes.failed = None;
    lanes.silent.clear();
    lanes.home(Event::PeerUp { peer: 1 });
    lanes.home(Event::Start { sequence: 1, request: request() });
    lanes.has_ended_as_alone(&model);
}

#[test]
fn a_holder_that_does_not_have_its_experts_is_passed_over_and_asked_again() {
    let model = TinyModel::load();
    let empty = || Arc::new(DramStore::new(0));
    let stores = || [empty(), empty(), model.store.clone()];
    let mut lanes = Lanes::new(&model, &[1, 2], stores());
    lanes.start();
    lanes.has_ended_as_alone(&model);

    let mut lanes = Lanes::new(&model, &[1], stores());
    lanes.start();
    lanes.waits();
    let placement = held_by(&model, &[2]);
    lanes.home(Event::Rearrange(Arrangement { placement, me: 0, nodes: nodes() }));
    lanes.has_ended_as_alone(&model);
}

#[test]
fn a_peer_that_was_started_again_owes_nothing() {
    let model = TinyModel::load();
    let mut lanes = Lanes::with_holders(&model, &[1, 2]);
    lanes.silent.insert(1);
    lanes.start();
    lanes.waits();
    // Under the same name, at another address, before anybody noticed that it was gone.
    let mut again = nodes();
    again[1].address = "b:2".into();
    let placement = held_by(&model, &[1, 2]);
    lanes.home(Event::Rearrange(Arrangement { placement, me: 0, nodes: again }));
    lanes.has_ended_as_alone(&model);
}

/// Caches are of each node's own size.
#[test]
fn a_request_that_is_too_long_for_this_nodes_cache_may_be_at_home_elsewhere() {
    let model = TinyModel::load();
    let mut lanes = Lanes::with_holders(&model, &[1, 2]);
    let placement = held_by(&model, &[1, 2]);
    let tight = engine::Engine::new(model.backbone.clone(), 1).unwrap();
    lanes.lanes[0] = LaneMachine::new(LaneParts {
        engine: tight,
        store: model.store.clone(),
        arrangement: Arrangement { placement, me: 0, nodes: nodes() },
        buffers: BufferPool::default(),
        limits: LaneLimits::default(),
    });
    let request = Request { max_new_tokens: 100, ..request() };
    lanes.home(Event::Start { sequence: 0, request });
    assert!(lanes.not_taken.is_some_and(|reason| reason.contains("--kv")));
    assert_eq!(lanes.failed, None, "its coordinator asks another");
}
