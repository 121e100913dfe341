//! Jobs on their way from home to home, and their readers.

use std::{hash::Hasher, time::Duration};

use lite_llm_actors::{
    cluster::Event,
    coordinator::progress::{Next, Take},
};
use lite_llm_transport::messages::JobEventBody;

use super::{Defect, Job, Message, Place, What, World};
use crate::network::Conn;

impl World {
    pub(super) fn submit(&mut self, job: usize) {
        if self.jobs[job].place == Place::Ended {
            return;
        }
        self.jobs[job].submitted = true;
        if self.head.is_none() {
            // The client tries again; a coordinator that starts finds it.
            self.jobs[job].place = Place::Nowhere;
            let again = self.now + Duration::from_millis(250);
            return self.after(again, What::Submit(job));
        }
        if self.jobs[job].place != Place::Nowhere {
            return;
        }
        let (request, read) = (self.jobs[job].request, self.jobs[job].read.clone());
        self.jobs[job].progress = self.fresh(request, read);
        self.wants(job);
    }

    pub(super) fn wants(&mut self, job: usize) {
        let now = self.instant();
        self.jobs[job].place = Place::Wanting;
        if let Some(head) = &mut self.head {
            let refused = std::mem::take(&mut self.jobs[job].refused);
            head.cluster.handle(now, Event::Wants { job: job as u64, refused });
        }
        self.head_does();
    }

    pub(super) fn go_home(&mut self, job: usize, conn: Option<Conn>, name: &str) {
        if self.jobs[job].place != Place::Wanting {
            return;
        }
        let Some(conn) = conn else { return self.wants(job) };
        self.streams += 1;
        let (stream, node) = (self.streams, Self::process(name));
        self.jobs[job].place = Place::At { conn, stream, node };
        let generated = self.jobs[job].progress.generated().to_vec();
        self.send(conn, self.head_process(), Message::Job { stream, job, generated });
    }

    /// All jobs of a connection that is gone go elsewhere.
    pub(super) fn leave_conn(&mut self, gone: Conn) {
        for job in 0..self.jobs.len() {
            if matches!(self.jobs[job].place, Place::At { conn, .. } if conn == gone) {
                self.job_lost(job);
            }
        }
    }

    pub(super) fn job_lost(&mut self, job: usize) {
        self.jobs[job].place = Place::Nowhere;
        match self.jobs[job].progress.lost() {
            Next::Again(attempt) => {
                self.after(self.now, What::Offer { job, attempt });
            }
            Next::GiveUp(body) => self.fail(format!("job {job} was given up: {body:?}")),
            Next::Ended => {}
        }
    }

    pub(super) fn job_event(&mut self, conn: Conn, stream: u64, body: JobEventBody) {
        let at = |job: &Job| matches!(job.place, Place::At { conn: c, stream: s, .. } if (c, s) == (conn, stream));
        let Some(job) = self.jobs.iter().position(at) else { return };
        if let JobEventBody::NotTaken { .. } = body {
            let place = std::mem::replace(&mut self.jobs[job].place, Place::Nowhere);
            if let Place::At { node, .. } = place {
                self.jobs[job].refused.push(Self::name(node));
            }
            let attempt = self.jobs[job].progress.attempt();
            let now = self.instant();
            if let Some(head) = &mut self.head {
                head.cluster.handle(now, Event::Left { job: job as u64 });
            }
            let again = self.now + Duration::from_millis(100);
            return self.after(again, What::Offer { job, attempt });
        }
        let attempt = self.jobs[job].progress.attempt();
        match self.jobs[job].progress.take(attempt, body) {
            Take::Drop => {}
            Take::Pass(body) => self.read(job, body),
            Take::Last(body) => {
                self.read(job, body.clone());
                if self.defect == Some(Defect::EndTwice) && self.defects_left > 0 {
                    self.defects_left -= 1;
                    self.read(job, body);
                }
                self.jobs[job].place = Place::Ended;
                let now = self.instant();
                if let Some(head) = &mut self.head {
                    head.cluster.handle(now, Event::Left { job: job as u64 });
                }
            }
            Take::Violation(reason) => self.fail(format!("job {job}: {reason}")),
        }
    }

    /// What the reader of a job gets.
    pub(super) fn read(&mut self, job: usize, body: JobEventBody) {
        let expected = &self.model.jobs[self.jobs[job].request].1;
        let reader = &mut self.jobs[job];
        if reader.ends > 0 {
            return self.fail(format!("job {job} was told {body:?} after its end"));
        }
        match body {
            JobEventBody::Token { index, id, .. } => {
                self.trace.write_u32(id);
                reader.read.push(id);
                let at = reader.read.len() - 1;
                if index as usize != at || expected.get(at) != Some(&id) {
                    let right = expected.get(at).copied();
                    self.fail(format!("job {job}: token {index} is {id}, not {right:?} of {at}"));
                }
            }
            JobEventBody::Done { .. } => {
                reader.ends += 1;
                if reader.read != *expected {
                    let (found, right) = (reader.read.len(), expected.len());
                    self.fail(format!("job {job} ended with {found} of {right} tokens"));
                }
            }
            JobEventBody::Failed { reason } => self.fail(format!("job {job} failed: {reason}")),
            _ => {}
        }
    }
}
