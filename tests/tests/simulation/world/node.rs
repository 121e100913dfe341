//! A worker's process: what stands in for its shell around [`LaneMachine`].

use std::{sync::Arc, time::Duration};

use lite_llm_actors::{
    cluster::Vitals,
    lane::{self, Arrangement, LaneLimits, LaneMachine, LaneParts},
    membership::{Holding, Plan},
};
use lite_llm_runtime::{engine, expert::ExpertKey, sequence::Request};
use lite_llm_transport::{
    frame::{Frame, OutgoingFrame},
    messages::{EndReason, ExpertBatchView, ExpertReplyView, JobEventBody, NodeInfo},
};

use super::{Defect, Message, What, World};
use crate::network::{Conn, Process};

impl World {
    pub(super) fn reconnect(&mut self, process: Process) {
        let head = self.head_process();
        let life = self.lives[process];
        let Some(node) = &self.nodes[process] else { return };
        if node.head.is_some() {
            return;
        }
        if self.is_silent(process, head) {
            let again = self.now + Duration::from_millis(200);
            return self.after(again, What::Reconnect { node: process, life });
        }
        let conn = self.network.open(process, head, self.now);
        let holding = node.holding.as_ref().map(|plan| Holding {
            epoch: plan.epoch,
            nodes: plan.nodes.iter().map(|node| node.name.clone()).collect(),
            you: plan.index,
            rules: plan.placement.rules().to_vec(),
        });
        let info = NodeInfo {
            name: Self::name(process),
            address: format!("w{process}:{life}"),
            release: String::new(),
            protocol: 1,
            determinism: 1,
            budget_bytes: self.budget,
            threads: 1,
            pid: life as u32,
        };
        let node = self.nodes[process].as_mut().unwrap();
        node.head = Some(conn);
        node.serving = None;
        self.send(conn, process, Message::Hello { info, holding });
    }

    pub(super) fn node_hears(&mut self, process: Process, conn: Conn, message: Message) {
        let now = self.instant();
        let Some(node) = &mut self.nodes[process] else { return };
        match message {
            Message::Ask { incarnation } => {
                let serving = node.serving.as_ref();
                let wanted = serving.iter().flat_map(|plan| (0u16..).zip(&plan.nodes));
                let others = wanted.filter(|(i, peer)| {
                    !peer.name.is_empty()
                        && Some(*i) != serving.map(|plan| plan.index)
                        && !node.up.contains_key(i)
                });
                let unreachable = others.map(|(_, peer)| peer.name.clone()).collect();
                let busy = node.computing;
                let (progress, budget) = (node.progress, self.budget);
                let vitals = Vitals { busy, progress, unreachable, budget };
                self.send(conn, process, Message::Vitals { incarnation, vitals });
            }
            Message::Assign { incarnation, plan, serves } => {
                node.assignments.push_back((conn, incarnation, plan, serves));
                self.load(process);
            }
            Message::Suspects(names) => {
                if let Some(lane) = &mut node.lane {
                    lane.handle(now, lane::Event::Suspects(names));
                }
            }
            Message::Dismiss => return self.kill(process),
            Message::Job { stream, job, generated } => {
                let request = &self.model.jobs[self.jobs[job].request].0;
                let request = Request { generated, ..request.clone() };
                match &mut node.lane {
                    None => {
                        let body = JobEventBody::NotTaken { reason: "no lane".into() };
                        self.send(conn, process, Message::JobEvent { stream, body });
                    }
                    Some(lane) => {
                        let sequence = node.next_sequence;
                        node.next_sequence += 1;
                        node.streams.insert(stream, sequence);
                        node.sequences.insert(sequence, stream);
                        lane.handle(now, lane::Event::Start { sequence, request });
                    }
                }
            }
            Message::EndJob { stream } => self.end_stream(process, stream),
            Message::Batch(frame) => {
                let view = ExpertBatchView::check(&frame).unwrap();
                match &mut node.lane {
                    Some(lane) => lane.handle(now, lane::Event::Batch { view, reply: conn }),
                    None => {
                        let id = view.head().id;
                        let failure =
                            lite_llm_transport::messages::ExpertFailure::new(id, "no lane");
                        let frame = OutgoingFrame::message(&failure).unwrap();
                        let frame = self.copied(&frame);
                        self.send(conn, process, Message::Reply(frame));
                    }
                }
            }
            Message::Reply(frame) => {
                let reply = ExpertReplyView::check(&frame).unwrap();
                let peer = node.up.iter().find(|(_, kept)| **kept == conn).map(|(&peer, _)| peer);
                if let (Some(peer), Some(lane)) = (peer, &mut node.lane) {
                    lane.handle(now, lane::Event::Reply { peer, reply });
                }
            }
            _ => {}
        }
        self.node_does(process);
    }

    pub(super) fn copied(&self, frame: &OutgoingFrame) -> Frame {
        Frame::copied(frame.kind(), frame.bytes(), &self.pool).unwrap()
    }

    pub(super) fn end_stream(&mut self, process: Process, stream: u64) {
        let now = self.instant();
        let Some(node) = &mut self.nodes[process] else { return };
        if let Some(sequence) = node.streams.remove(&stream) {
            node.sequences.remove(&sequence);
            if let Some(lane) = &mut node.lane {
                lane.handle(now, lane::Event::Cancel(sequence));
            }
        }
    }

    /// Begins the next assignment.
    pub(super) fn load(&mut self, process: Process) {
        let life = self.lives[process];
        let ms = Duration::from_millis;
        let Some(node) = &mut self.nodes[process] else { return };
        if node.loading || node.assignments.is_empty() {
            return;
        }
        node.loading = true;
        let (_, _, plan, _) = &node.assignments[0];
        let config = &self.model.tiny.backbone.config;
        let mut here = node.held.here.lock().unwrap();
        let keep = |key: &ExpertKey| {
            let serving = node.serving.as_ref();
            serving.is_some_and(|plan| plan.placement.holds(plan.index, *key))
                || plan.placement.holds(plan.index, *key)
        };
        here.retain(keep);
        let wanted = config.expert_keys().filter(|key| plan.placement.holds(plan.index, *key));
        let missing = wanted.filter(|key| !here.contains(key)).count();
        let bytes = self.model.tiny.expert_bytes[0];
        let total = (here.len() + missing) as u64 * bytes;
        drop(here);
        if total > self.budget {
            let (name, budget) = (Self::name(process), self.budget);
            return self.fail(format!("{name} is to hold {total} bytes of {budget}"));
        }
        let time = match missing {
            0 => Duration::ZERO,
            _ => self.dice.between(ms(5), ms(400)),
        };
        self.after(self.now + time, What::Load { node: process, life });
    }

    /// An assignment is done.
    pub(super) fn loaded(&mut self, process: Process) {
        let (now, defect) = (self.instant(), self.defect);
        let Some(node) = &mut self.nodes[process] else { return };
        node.loading = false;
        let Some((conn, incarnation, plan, serves)) = node.assignments.pop_front() else { return };
        if self.now < node.loads_fail_until {
            if serves {
                node.serving = None;
            }
            node.holding = node.serving.clone();
            if node.head == Some(conn) {
                let (epoch, result) = (plan.epoch, Err("it cannot read".to_owned()));
                self.send(conn, process, Message::Assigned { incarnation, epoch, serves, result });
            }
            self.load(process);
            return self.node_does(process);
        }
        let config = &self.model.tiny.backbone.config;
        {
            let mut here = node.held.here.lock().unwrap();
            let keys = config.expert_keys().filter(|key| plan.placement.holds(plan.index, *key));
            here.extend(keys);
        }
        node.holding = Some(plan.clone());
        let epoch = plan.epoch;
        if defect == Some(Defect::StaleEpoch)
            && serves
            && self.defects_left > 0
            && let Some(before) = node.serving.clone().filter(|before| before.epoch < epoch)
        {
            self.defects_left -= 1;
            node.assignments.push_back((conn, incarnation, before, true));
        }
        if serves && node.head == Some(conn) {
            let arrangement = Arrangement {
                placement: Arc::new(plan.placement.clone()),
                me: plan.index,
                nodes: plan.nodes.clone(),
            };
            match &mut node.lane {
                Some(lane) => lane.handle(now, lane::Event::Rearrange(arrangement)),
                None => {
                    let engine = self.model.tiny.engine();
                    node.lane = Some(LaneMachine::new(LaneParts {
                        engine,
                        store: node.held.clone(),
                        arrangement,
                        buffers: self.pool.clone(),
                        limits: LaneLimits {
                            patience: Duration::from_secs(600),
                            ..LaneLimits::default()
                        },
                    }));
                }
            }
            node.held.here.lock().unwrap().retain(|key| plan.placement.holds(plan.index, *key));
            self.relink(process, plan);
        }
        if self.nodes[process].as_ref().is_some_and(|node| node.head == Some(conn)) {
            let result = Ok(());
            self.send(conn, process, Message::Assigned { incarnation, epoch, serves, result });
        }
        self.load(process);
        self.node_does(process);
    }

    /// Keeps links to the nodes of a plan.
    pub(super) fn relink(&mut self, process: Process, plan: Plan) {
        let life = self.lives[process];
        let node = self.nodes[process].as_mut().unwrap();
        node.serving = Some(plan.clone());
        // A link stays as long as both indices mean the same start of the same process.
        if node.me.replace(plan.index) != Some(plan.index) {
            node.up.clear();
        }
        let addresses = &node.addresses;
        node.up.retain(|index, _| {
            let other = plan.nodes.get(usize::from(*index));
            other.is_some_and(|other| addresses.get(index) == Some(&other.address))
        });
        for (peer, other) in (0u16..).zip(&plan.nodes) {
            if peer != plan.index && !other.name.is_empty() {
                self.after(self.now, What::Dial { node: process, life, peer });
            }
        }
    }

    /// Tries to have a link to another node.
    pub(super) fn dial(&mut self, process: Process, peer: u16) {
        let (now, life) = (self.instant(), self.lives[process]);
        let Some(node) = &self.nodes[process] else { return };
        let Some(plan) = &node.serving else { return };
        let Some(other) = plan.nodes.get(usize::from(peer)) else { return };
        if node.up.contains_key(&peer) || other.name.is_empty() || peer == plan.index {
            return;
        }
        let (to, dials) = (Self::process(&other.name), peer < plan.index);
        let same_life = other.address == format!("w{to}:{}", self.lives[to]);
        let address = other.address.clone();
        let linked = node.links.get(&to).copied();
        let linked = linked.filter(|conn| self.network.connections.contains_key(conn));
        let conn = match linked {
            Some(conn) => Some(conn),
            None if dials && same_life && !self.is_silent(process, to) => {
                let conn = self.network.open(process, to, self.now);
                if let Some(other) = &mut self.nodes[to] {
                    other.links.insert(process, conn);
                }
                self.nodes[process].as_mut().unwrap().links.insert(to, conn);
                Some(conn)
            }
            None => None,
        };
        match conn {
            Some(conn) => {
                let node = self.nodes[process].as_mut().unwrap();
                node.up.insert(peer, conn);
                node.addresses.insert(peer, address);
                if let Some(lane) = &mut node.lane {
                    lane.handle(now, lane::Event::PeerUp { peer });
                }
                self.node_does(process);
            }
            None => {
                let pause =
                    self.dice.between(Duration::from_millis(50), Duration::from_millis(500));
                self.after(self.now + pause, What::Dial { node: process, life, peer });
            }
        }
    }

    /// Carries out what a node's lane wants.
    pub(super) fn node_does(&mut self, process: Process) {
        loop {
            let now = self.instant();
            let life = self.lives[process];
            let Some(node) = &mut self.nodes[process] else { return };
            let Some(lane) = &mut node.lane else { return };
            let Some(command) = lane.poll_command() else { break };
            match command {
                lane::Command::Send { id, peer, frame } => match node.up.get(&peer).copied() {
                    Some(conn) => {
                        let frame = self.copied(&frame);
                        self.send(conn, process, Message::Batch(frame));
                    }
                    None => {
                        let reason = "there is no link".to_owned();
                        lane.handle(now, lane::Event::Undelivered { id, peer, reason });
                    }
                },
                lane::Command::Answer { reply, frame } => {
                    let frame = self.copied(&frame);
                    self.send(reply, process, Message::Reply(frame));
                }
                lane::Command::Publish(event) => self.publish(process, event),
                lane::Command::NotTaken { sequence, reason } => {
                    let body = JobEventBody::NotTaken { reason };
                    self.tell_head(process, sequence, body);
                }
                lane::Command::Lost(reason) => panic!("a CPU is never lost: {reason}"),
                lane::Command::Compute => {
                    node.computing = true;
                    let micros = Duration::from_micros;
                    let time = self.dice.between(micros(100), micros(1500));
                    let node = self.nodes[process].as_ref().unwrap();
                    let done = (self.now + time * node.slow).max(node.stuck_until);
                    self.after(done, What::Computed { node: process, life });
                    break;
                }
            }
        }
        self.arm_node(process);
    }

    pub(super) fn arm_node(&mut self, process: Process) {
        let (base, now, life) = (self.base, self.now, self.lives[process]);
        let Some(node) = &mut self.nodes[process] else { return };
        let due = node.lane.as_ref().and_then(LaneMachine::poll_timeout);
        let due = due.map(|at| at.saturating_duration_since(base).max(now));
        if let Some(due) = due
            && node.ticks.is_none_or(|at| due < at)
        {
            node.ticks = Some(due);
            self.after(due, What::Tick { process, life });
        }
    }

    pub(super) fn computed(&mut self, process: Process) {
        let now = self.instant();
        let Some(node) = &mut self.nodes[process] else { return };
        node.computing = false;
        node.progress += 1;
        if let Some(lane) = &mut node.lane {
            lane.compute(now);
        }
        self.node_does(process);
    }

    pub(super) fn publish(&mut self, process: Process, event: engine::Event) {
        let (sequence, body) = match event {
            engine::Event::Token { sequence, index, id, .. } => {
                let mut index = index as u32;
                if self.defect == Some(Defect::TokenTwice) && self.defects_left > 0 && index > 0 {
                    self.defects_left -= 1;
                    index += 1;
                }
                (sequence, JobEventBody::Token { index, id, text: None })
            }
            engine::Event::Prefilled { sequence, done, total } => {
                let (prefilled, total) = (done as u32, total as u32);
                (sequence, JobEventBody::Progress { prefilled, total })
            }
            engine::Event::Ended { sequence, reason, generated } => {
                let generated = generated as u32;
                let reason = match reason {
                    lite_llm_runtime::sequence::EndReason::Cancelled => return,
                    _ => EndReason::Length,
                };
                (sequence, JobEventBody::Done { reason, generated })
            }
            engine::Event::Failed { sequence, reason } => {
                (sequence, JobEventBody::Failed { reason })
            }
            engine::Event::Logits { .. } | engine::Event::Routes { .. } => return,
        };
        self.tell_head(process, sequence, body);
    }

    pub(super) fn tell_head(&mut self, process: Process, sequence: u64, body: JobEventBody) {
        let Some(node) = &mut self.nodes[process] else { return };
        let Some(stream) = node.sequences.get(&sequence).copied() else { return };
        if body.is_last() {
            node.sequences.remove(&sequence);
            node.streams.remove(&stream);
        }
        if let Some(conn) = node.head {
            self.send(conn, process, Message::JobEvent { stream, body });
        }
    }
}
