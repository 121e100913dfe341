//! Processes that start and end, and the connections between them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use lite_llm_actors::{
    cluster::{Cluster, Event},
    lane,
    membership::MembershipOptions,
    placement::PlacementPolicy,
};

use super::{Defect, Head, Held, Message, Node, Place, What, World};
use crate::network::{Conn, IDLE, Process};

impl World {
    pub(super) fn is_silent(&self, a: Process, b: Process) -> bool {
        let down = |process: Process| !self.alive[process] || self.frozen[process].is_some();
        down(a) || down(b) || self.network.is_cut(a, b) || self.network.is_cut(b, a)
    }

    /// Notes which connections nothing gets through.
    pub(super) fn look_at_silence(&mut self) {
        let conns: Vec<(Conn, [Process; 2], Option<Duration>)> = self
            .network
            .connections
            .iter()
            .map(|(&conn, connection)| (conn, connection.ends, connection.silent))
            .collect();
        for (conn, [a, b], before) in conns {
            let silent = self.network.connections[&conn].dead || self.is_silent(a, b);
            if silent && before.is_none() {
                let since = self.now;
                self.network.connections.get_mut(&conn).unwrap().silent = Some(since);
                self.after(since + IDLE, What::Idle { conn, since });
            } else if !silent {
                self.network.connections.get_mut(&conn).unwrap().silent = None;
            }
        }
    }

    /// Ends a connection; both ends are told.
    pub(super) fn close(&mut self, conn: Conn) {
        let Some(connection) = self.network.connections.remove(&conn) else { return };
        self.held.retain(|(held, _), _| *held != conn);
        for to in connection.ends {
            let life = self.lives[to];
            self.after(self.now, What::Lost { conn, to, life });
        }
    }

    pub(super) fn send(&mut self, conn: Conn, from: Process, message: Message) {
        let micros = Duration::from_micros;
        let delay = self.dice.between(micros(50), micros(2000));
        let Some(to) = self.network.other(conn, from) else { return };
        if self.network.connections.get(&conn).is_none_or(|connection| connection.dead) {
            // A process that was started anew hears nothing of what was for the one before.
            return;
        }
        if let Some(at) = self.network.arrival(conn, from, self.now, delay) {
            let life = self.lives[to];
            self.after(at, What::Arrives { conn, to, life, message });
        }
    }

    pub(super) fn arrives(&mut self, conn: Conn, to: Process, life: u64, message: Message) {
        let Some(from) = self.network.other(conn, to) else { return };
        let held = self.held.entry((conn, to)).or_default();
        if self.network.is_cut(from, to) || !held.is_empty() {
            // It is sent again until it gets through, in order, or the connection is lost.
            return held.push_back((life, message));
        }
        self.hears(conn, to, message);
    }

    /// What was held back on a link that is mended arrives.
    pub(super) fn release(&mut self, from: Process, to: Process) {
        if self.network.is_cut(from, to) {
            return;
        }
        let conns: Vec<Conn> = self
            .held
            .keys()
            .filter(|(conn, end)| *end == to && self.network.other(*conn, to) == Some(from))
            .map(|(conn, _)| *conn)
            .collect();
        for conn in conns {
            for (life, message) in self.held.remove(&(conn, to)).into_iter().flatten() {
                self.after(self.now, What::Arrives { conn, to, life, message });
            }
        }
    }

    pub(super) fn hears(&mut self, conn: Conn, to: Process, message: Message) {
        match to == self.head_process() {
            true => self.head_hears(conn, message),
            false => self.node_hears(to, conn, message),
        }
    }

    pub(super) fn lost(&mut self, conn: Conn, to: Process) {
        if to == self.head_process() {
            let Some(head) = &mut self.head else { return };
            let name = head.workers.iter().find(|(_, kept)| **kept == conn);
            let Some(name) = name.map(|(name, _)| name.clone()) else { return };
            head.workers.remove(&name);
            let reason = "it did not answer".to_owned();
            let now = self.base + self.now;
            head.cluster.handle(now, Event::Gone { name, reason });
            self.leave_conn(conn);
            self.head_does();
            return;
        }
        let now = self.instant();
        let Some(node) = &mut self.nodes[to] else { return };
        if node.head == Some(conn) {
            node.head = None;
            node.serving = None;
            let ended: Vec<u64> = node.streams.keys().copied().collect();
            for stream in ended {
                self.end_stream(to, stream);
            }
            let life = self.lives[to];
            let at = self.now + Duration::from_millis(100);
            self.after(at, What::Reconnect { node: to, life });
        } else {
            node.links.retain(|_, kept| *kept != conn);
            let down: Vec<u16> =
                node.up.iter().filter(|(_, c)| **c == conn).map(|(&peer, _)| peer).collect();
            for &peer in &down {
                node.up.remove(&peer);
                let reason = "the link is gone".to_owned();
                if let Some(lane) = &mut node.lane
                    && self.defect != Some(Defect::LostResend)
                {
                    lane.handle(now, lane::Event::PeerLost { peer, reason });
                }
            }
            for peer in down {
                let life = self.lives[to];
                let at = self.now + Duration::from_millis(50);
                self.after(at, What::Dial { node: to, life, peer });
            }
        }
        self.node_does(to);
    }

    pub(super) fn start(&mut self, process: Process) {
        if self.alive[process] {
            return;
        }
        self.alive[process] = true;
        self.frozen[process] = None;
        self.lives[process] += 1;
        let life = self.lives[process];
        if process == self.head_process() {
            let config = self.model.tiny.backbone.config.clone();
            let cluster = Cluster::new(MembershipOptions {
                config,
                expert_bytes: self.model.tiny.expert_bytes.clone(),
                workers: self.first,
                copies: self.copies,
                policy: PlacementPolicy::Balanced,
                overcommit: false,
            });
            self.head = Some(Head {
                cluster,
                workers: BTreeMap::new(),
                lives: BTreeMap::new(),
                ticks: None,
            });
            self.after(self.now, What::Tick { process, life });
            // Clients that lost the coordinator submit again, from what they have read.
            for job in 0..self.jobs.len() {
                if self.jobs[job].submitted && self.jobs[job].place != Place::Ended {
                    let at = self.now + Duration::from_millis(300);
                    self.jobs[job].place = Place::Nowhere;
                    self.after(at, What::Submit(job));
                }
            }
        } else {
            let wrong = self.defect == Some(Defect::ReplicaDiffers) && process == 0;
            let held = Held { all: self.model.tiny.store.clone(), here: Mutex::default(), wrong };
            self.nodes[process] = Some(Node {
                lane: None,
                held: Arc::new(held),
                holding: None,
                serving: None,
                assignments: VecDeque::new(),
                loading: false,
                head: None,
                links: BTreeMap::new(),
                up: BTreeMap::new(),
                me: None,
                addresses: BTreeMap::new(),
                computing: false,
                progress: 0,
                streams: BTreeMap::new(),
                sequences: BTreeMap::new(),
                next_sequence: 0,
                slow: 1,
                stuck_until: Duration::ZERO,
                loads_fail_until: Duration::ZERO,
                ticks: None,
            });
            self.after(self.now, What::Reconnect { node: process, life });
        }
        self.look_at_silence();
    }

    pub(super) fn kill(&mut self, process: Process) {
        if !self.alive[process] {
            return;
        }
        self.alive[process] = false;
        self.frozen[process] = None;
        for connection in self.network.connections.values_mut() {
            connection.dead |= connection.ends.contains(&process);
        }
        match process == self.head_process() {
            true => self.head = None,
            false => self.nodes[process] = None,
        }
        self.look_at_silence();
    }

    /// Somebody wants a worker to go, if there is another.
    pub(super) fn drain(&mut self, process: Process) {
        let (name, now) = (Self::name(process), self.instant());
        let Some(head) = &mut self.head else { return };
        if head.workers.len() > 1 && head.workers.contains_key(&name) {
            self.drained.insert((process, head.lives[&name]));
            head.cluster.handle(now, Event::Drain { name });
            self.head_does();
        }
    }

    pub(super) fn tick(&mut self, process: Process) {
        let now = self.instant();
        if process == self.head_process() {
            let Some(head) = &mut self.head else { return };
            head.ticks = None;
            head.cluster.handle(now, Event::Tick);
            self.head_does();
        } else if let Some(node) = &mut self.nodes[process] {
            node.ticks = None;
            if let Some(lane) = &mut node.lane
                && lane.poll_timeout().is_some_and(|at| at <= now)
            {
                lane.handle(now, lane::Event::Tick);
            }
            self.node_does(process);
        }
    }
}
