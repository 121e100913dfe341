//! The coordinator's process: what stands in for its shell around [`Cluster`].

use std::time::Duration;

use lite_llm_actors::cluster::{Command, Event};

use super::{Message, Place, What, World};
use crate::network::{Conn, Process};

impl World {
    pub(super) fn name(process: Process) -> String {
        format!("w{process}")
    }

    pub(super) fn process(name: &str) -> Process {
        name[1..].parse().unwrap()
    }

    pub(super) fn head_hears(&mut self, conn: Conn, message: Message) {
        let now = self.instant();
        let Some(head) = &mut self.head else { return };
        let name = head.workers.iter().find(|(_, c)| **c == conn).map(|(name, _)| name.clone());
        let event = match message {
            Message::Hello { info, holding } => {
                head.lives.insert(info.name.clone(), info.pid.into());
                let before = head.workers.insert(info.name.clone(), conn);
                let event = Event::Here { info, holding };
                if let Some(before) = before.filter(|before| *before != conn) {
                    self.leave_conn(before);
                    self.close(before);
                }
                Some(event)
            }
            Message::Vitals { incarnation, vitals } => {
                name.map(|name| Event::Vitals { name, incarnation, vitals: Some(vitals) })
            }
            Message::Assigned { incarnation, epoch, serves, result } => {
                name.map(|name| Event::Assigned { name, incarnation, epoch, serves, result })
            }
            Message::JobEvent { stream, body } => {
                self.job_event(conn, stream, body);
                None
            }
            _ => None,
        };
        if let (Some(event), Some(head)) = (event, &mut self.head) {
            head.cluster.handle(now, event);
        }
        self.head_does();
    }

    pub(super) fn head_does(&mut self) {
        let head_process = self.head_process();
        loop {
            let Some(head) = &mut self.head else { return };
            let Some(command) = head.cluster.poll_command() else { break };
            let conn = |name: &str| head.workers.get(name).copied();
            match command {
                Command::Ask { name, incarnation } => {
                    if let Some(conn) = conn(&name) {
                        self.send(conn, head_process, Message::Ask { incarnation });
                    }
                }
                Command::Assign { name, incarnation, plan, serves } => {
                    if let Some(conn) = conn(&name) {
                        let message = Message::Assign { incarnation, plan, serves };
                        self.send(conn, head_process, message);
                    }
                }
                Command::Suspects { name, suspects } => {
                    if let Some(conn) = conn(&name) {
                        self.send(conn, head_process, Message::Suspects(suspects));
                    }
                }
                Command::Leave { name, .. } => {
                    let node = Self::process(&name);
                    for job in 0..self.jobs.len() {
                        if let Place::At { conn, stream, node: at } = self.jobs[job].place
                            && at == node
                        {
                            self.send(conn, head_process, Message::EndJob { stream });
                            self.job_lost(job);
                        }
                    }
                }
                Command::Home { job, name } => {
                    let conn = conn(&name);
                    self.go_home(job as usize, conn, &name);
                }
                Command::Close { name, .. } => {
                    if let Some(conn) = head.workers.remove(&name) {
                        self.leave_conn(conn);
                        self.close(conn);
                    }
                }
                Command::Dismiss { name, reason } => {
                    let drained = self.drained.contains(&(Self::process(&name), head.lives[&name]));
                    if let Some(conn) = conn(&name) {
                        self.send(conn, head_process, Message::Dismiss);
                    }
                    if !drained {
                        self.fail(format!("{name} is sent away: {reason}"));
                    }
                }
            }
        }
        self.arm_head();
    }

    pub(super) fn arm_head(&mut self) {
        let (base, now) = (self.base, self.now);
        let process = self.head_process();
        let life = self.lives[process];
        let Some(head) = &mut self.head else { return };
        let due = head.cluster.poll_timeout().map(|at| at.saturating_duration_since(base));
        if let Some(due) = due.map(|due| due.max(now + Duration::from_millis(1)))
            && head.ticks.is_none_or(|at| due < at)
        {
            head.ticks = Some(due);
            self.after(due, What::Tick { process, life });
        }
    }
}
