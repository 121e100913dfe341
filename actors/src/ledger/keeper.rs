//! The thread that keeps the ledger: it drives the machine, writes its file, and starts and stops the
//! tasks that run jobs.
//!
//! Invariants: nothing here waits for a job, a client or the network, only for its bounded queue and
//! for the disk; whoever asks is answered, or its channel closes. When the disk fails, jobs stop, those
//! who wait are told, and the file is opened again: what is on disk is the truth.

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use lite_llm_transport::messages::{
    DetachedBatch, DetachedReport, DetachedStatus, JobEnding, JobRange, Prompt, RESULTS_BYTES_MAX,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    task::AbortHandle,
    time::timeout,
};
use tracing::{error, info};

use super::{
    LedgerError,
    events::{Command, Event, Rules},
    machine::{Ledger, job_bytes},
    runner::{RunsOn, now},
    store::{Store, StoreError},
};

/// How often the machine's clock is looked at.
const TICK: Duration = Duration::from_millis(250);
/// Wishes that are taken before the disk has its turn.
const TAKEN_MAX: usize = 1024;
/// Pause before a file that failed is opened again.
const REOPEN_PAUSE: Duration = Duration::from_secs(5);

/// Who waits for an answer.
pub(super) type Reply<T> = oneshot::Sender<Result<T, LedgerError>>;

/// What is wanted of the thread.
pub(super) enum Wish {
    Accept {
        owner: String,
        batch: DetachedBatch,
        reply: Reply<JobRange>,
    },
    /// Whether a batch of this key was taken.
    Known {
        owner: String,
        key: [u8; 16],
        reply: Reply<Option<JobRange>>,
    },
    Cancel {
        owner: Option<String>,
        jobs: JobRange,
        reply: Reply<u64>,
    },
    List {
        owner: Option<String>,
        jobs: JobRange,
        most: usize,
        reply: Reply<Listed>,
    },
    Report {
        owner: Option<String>,
        jobs: Vec<u64>,
        reply: Reply<Vec<DetachedReport>>,
    },
    Batches {
        owner: String,
        below: u64,
        most: usize,
        reply: Reply<Vec<u64>>,
    },
    Note {
        owner: Option<String>,
        batch: u64,
        reply: Reply<Option<String>>,
    },
    Progress {
        job: u64,
        from: u32,
        tokens: Vec<u32>,
    },
    Ended {
        job: u64,
        ending: JobEnding,
    },
    /// Write what is known, and end.
    Stop(oneshot::Sender<()>),
}

/// Jobs of a range.
pub(super) struct Listed {
    pub(super) jobs: Vec<DetachedStatus>,
    /// How many there are, and how many of them have ended.
    pub(super) all: u64,
    pub(super) ended: u64,
}

/// Whoever waits for a command of the machine.
enum Caller {
    Accept(Reply<JobRange>),
    Known(Reply<Option<JobRange>>),
    Cancel(Reply<u64>),
}

/// See the module's text.
pub(super) struct Keeper {
    pub(super) path: PathBuf,
    pub(super) rules: Rules,
    pub(super) inbox: mpsc::Receiver<Wish>,
    /// Runners' way to the inbox.
    pub(super) wishes: mpsc::WeakSender<Wish>,
    pub(super) changed: watch::Sender<u64>,
    pub(super) runs_on: RunsOn,
    pub(super) runtime: Handle,
}

/// How a session with an open file ended.
enum Ended {
    Stopped(Option<oneshot::Sender<()>>),
    Failed(StoreError),
}

impl Keeper {
    /// Keeps the ledger of a file that is open, until it is told to stop or nobody is left.
    pub(super) fn keep(mut self, store: Store, ledger: Ledger) {
        let mut session = Session::new(store, ledger);
        loop {
            match session.serve(&mut self) {
                Ended::Stopped(told) => {
                    // The file is closed before whoever waits goes on.
                    drop(session);
                    if let Some(told) = told {
                        let _ = told.send(());
                    }
                    return;
                }
                Ended::Failed(error) => {
                    error!(%error, "the ledger's file failed; detached jobs wait until it is well");
                    session.fail(&error);
                    drop(session);
                    match self.open_again(error) {
                        Some(opened) => session = opened,
                        None => return,
                    }
                }
            }
        }
    }

    /// Opens the file anew, however long that takes. Meanwhile whoever asks is told why not.
    fn open_again(&mut self, mut error: StoreError) -> Option<Session> {
        loop {
            let until = Instant::now() + REOPEN_PAUSE;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                let wish = async { timeout(left, self.inbox.recv()).await };
                match self.runtime.block_on(wish) {
                    Ok(None) => return None,
                    Ok(Some(Wish::Stop(told))) => {
                        let _ = told.send(());
                        return None;
                    }
                    Ok(Some(wish)) => refuse(wish, &error),
                    Err(_) => break,
                }
            }
            let opened = Store::open(&self.path)
                .and_then(|store| Ok((store.load(self.rules.context)?, store)));
            match opened {
                Ok((saved, store)) => {
                    info!("the ledger's file is open again");
                    self.changed.send_modify(|count| *count += 1);
                    return Some(Session::new(store, Ledger::new(self.rules.clone(), saved)));
                }
                Err(failed) => error = failed,
            }
        }
    }
}

/// Tells whoever wished something that nobody knows: what an earlier question left on disk shows when
/// the file is open again.
fn refuse(wish: Wish, error: &StoreError) {
    let reason = || LedgerError::Unknown(error.to_string());
    // Whoever asked may be gone, here and below.
    match wish {
        Wish::Accept { reply, .. } => drop(reply.send(Err(reason()))),
        Wish::Known { reply, .. } => drop(reply.send(Err(reason()))),
        Wish::Cancel { reply, .. } => drop(reply.send(Err(reason()))),
        Wish::List { reply, .. } => drop(reply.send(Err(reason()))),
        Wish::Report { reply, .. } => drop(reply.send(Err(reason()))),
        Wish::Batches { reply, .. } => drop(reply.send(Err(reason()))),
        Wish::Note { reply, .. } => drop(reply.send(Err(reason()))),
        Wish::Progress { .. } | Wish::Ended { .. } | Wish::Stop(_) => {}
    }
}

/// A ledger with its open file.
struct Session {
    store: Store,
    ledger: Ledger,
    callers: HashMap<u64, Caller>,
    called: u64,
    tasks: HashMap<u64, AbortHandle>,
    ticked: Instant,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.tasks.values().for_each(AbortHandle::abort);
    }
}

impl Session {
    fn new(store: Store, ledger: Ledger) -> Self {
        let (callers, tasks) = (HashMap::new(), HashMap::new());
        Self { store, ledger, callers, called: 0, tasks, ticked: Instant::now() }
    }

    fn serve(&mut self, keeper: &mut Keeper) -> Ended {
        loop {
            if let Err(error) = self.carry_out(keeper) {
                return Ended::Failed(error);
            }
            // A timer is made where its runtime is entered.
            let wish = async { timeout(TICK, keeper.inbox.recv()).await };
            let mut next = match keeper.runtime.block_on(wish) {
                Ok(None) => return Ended::Stopped(None),
                Ok(wish) => wish,
                Err(_) => None,
            };
            // All that has come while the last write was synced goes into the next one.
            let mut taken = 0;
            while let Some(wish) = next {
                if let Wish::Stop(told) = wish {
                    self.ledger.handle(now(), Event::Flush);
                    if let Err(error) = self.carry_out(keeper) {
                        error!(%error, "what ran is computed again from its last tokens");
                    }
                    return Ended::Stopped(Some(told));
                }
                if let Err(error) = self.take(keeper, wish) {
                    return Ended::Failed(error);
                }
                taken += 1;
                next = (taken < TAKEN_MAX).then(|| keeper.inbox.try_recv().ok()).flatten();
            }
            if self.ticked.elapsed() >= TICK {
                self.ticked = Instant::now();
                self.ledger.handle(now(), Event::Tick);
            }
        }
    }

    fn call(&mut self, caller: Caller) -> u64 {
        self.called += 1;
        self.callers.insert(self.called, caller);
        self.called
    }

    fn take(&mut self, keeper: &Keeper, wish: Wish) -> Result<(), StoreError> {
        match wish {
            Wish::Accept { owner, batch, reply } => {
                let caller = self.call(Caller::Accept(reply));
                self.ledger.handle(now(), Event::Accept { caller, owner, batch });
            }
            Wish::Known { owner, key, reply } => {
                let caller = self.call(Caller::Known(reply));
                self.ledger.handle(now(), Event::Known { caller, owner, key });
            }
            Wish::Cancel { owner, jobs, reply } => {
                let caller = self.call(Caller::Cancel(reply));
                self.ledger.handle(now(), Event::Cancel { caller, owner, jobs });
            }
            Wish::List { owner, jobs, most, reply } => {
                let (all, ended) = self.ledger.count(owner.as_deref(), jobs);
                let jobs = self.ledger.list(owner.as_deref(), jobs, most);
                // Whoever asked may be gone, here and below.
                let _ = reply.send(Ok(Listed { jobs, all, ended }));
            }
            Wish::Report { owner, jobs, reply } => {
                let _ = reply.send(Ok(self.report(keeper, owner.as_deref(), &jobs)?));
            }
            Wish::Batches { owner, below, most, reply } => {
                let _ = reply.send(Ok(self.ledger.batches(&owner, below, most)));
            }
            Wish::Note { owner, batch, reply } => {
                let jobs = JobRange { first: batch, last: batch };
                let own = self.ledger.list(owner.as_deref(), jobs, 1);
                let note = match own.first().is_some_and(|job| job.batch == batch) {
                    true => self.store.batch(batch)?.map(|kept| kept.note),
                    false => None,
                };
                let _ = reply.send(Ok(note));
            }
            Wish::Progress { job, from, tokens } => {
                self.ledger.handle(now(), Event::Progress { job, from, tokens });
            }
            Wish::Ended { job, ending } => {
                // If this was an earlier one's, before the file was opened anew, the other computes in vain.
                if let Some(task) = self.tasks.remove(&job) {
                    task.abort();
                }
                self.ledger.handle(now(), Event::Ended { job, ending });
            }
            // The caller has seen to it.
            Wish::Stop(_) => {}
        }
        Ok(())
    }

    /// All that is known of jobs, as many as an answer holds.
    fn report(
        &self,
        keeper: &Keeper,
        owner: Option<&str>,
        jobs: &[u64],
    ) -> Result<Vec<DetachedReport>, StoreError> {
        let (mut reports, mut bytes) = (Vec::new(), 0);
        for &number in jobs {
            let range = JobRange { first: number, last: number };
            let Some(status) = self.ledger.list(owner, range, 1).pop() else { continue };
            let (job, _) = self.store.job(number)?;
            let ending = match status.state.has_ended() {
                true => self.store.ending(number)?,
                false => None,
            };
            let prompt = match (&job.request.prompt, &keeper.runs_on.tokenizer) {
                (Prompt::Tokens(ids), Some(tokenizer)) => tokenizer.decode_with_special(ids),
                _ => String::new(),
            };
            let of_prompt = match &job.request.prompt {
                Prompt::Tokens(ids) => ids.len() * 4,
                Prompt::Text(text) | Prompt::Chat(text) => text.len(),
            };
            let (beside, _) = job_bytes(&job, 0);
            bytes += of_prompt + beside as usize + prompt.len();
            bytes += ending.as_ref().map_or(0, |end| end.ids.len() * 4 + end.text.len());
            if bytes > RESULTS_BYTES_MAX && !reports.is_empty() {
                break;
            }
            reports.push(DetachedReport { status, job, prompt, ending });
        }
        Ok(reports)
    }

    fn carry_out(&mut self, keeper: &Keeper) -> Result<(), StoreError> {
        while let Some(command) = self.ledger.poll_command() {
            match command {
                Command::Write { write, records } => {
                    self.store.write(&records)?;
                    self.ledger.handle(now(), Event::Synced { write });
                }
                Command::Accepted { caller, jobs } => match self.callers.remove(&caller) {
                    Some(Caller::Accept(reply)) => drop(reply.send(Ok(jobs))),
                    Some(Caller::Known(reply)) => drop(reply.send(Ok(Some(jobs)))),
                    Some(Caller::Cancel(_)) | None => {}
                },
                Command::NotKnown { caller } => {
                    if let Some(Caller::Known(reply)) = self.callers.remove(&caller) {
                        let _ = reply.send(Ok(None));
                    }
                }
                Command::Refused { caller, reason } => {
                    if let Some(Caller::Accept(reply)) = self.callers.remove(&caller) {
                        let _ = reply.send(Err(LedgerError::Full(reason)));
                    }
                }
                Command::Cancelled { caller, jobs } => {
                    if let Some(Caller::Cancel(reply)) = self.callers.remove(&caller) {
                        let _ = reply.send(Ok(jobs));
                    }
                }
                Command::Run { job, owner } => {
                    let (detached, known) = self.store.job(job)?;
                    if let Some(wishes) = keeper.wishes.upgrade() {
                        let run = keeper.runs_on.clone().run((job, owner), detached, known, wishes);
                        self.tasks.insert(job, keeper.runtime.spawn(run).abort_handle());
                    }
                }
                Command::Stop { job } => {
                    if let Some(task) = self.tasks.remove(&job) {
                        task.abort();
                    }
                }
                Command::Changed => keeper.changed.send_modify(|count| *count += 1),
            }
        }
        Ok(())
    }

    /// Tells those who wait that nobody knows whether what they wanted is on disk.
    fn fail(&mut self, error: &StoreError) {
        for (_, caller) in self.callers.drain() {
            let reason = LedgerError::Unknown(error.to_string());
            match caller {
                Caller::Accept(reply) => drop(reply.send(Err(reason))),
                Caller::Known(reply) => drop(reply.send(Err(reason))),
                Caller::Cancel(reply) => drop(reply.send(Err(reason))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lite_llm_transport::messages::DetachedBatch;

    use super::*;
    use crate::ledger::{Keep, Saved};

    /// Whoever waits when the disk fails, or asks while it does, is not told no: what an earlier
    /// question of the same key left may be on disk.
    #[test]
    fn a_disk_that_fails_is_no_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("jobs.redb")).unwrap();
        let keep = Keep { time: Duration::from_secs(1), jobs: 1 };
        let rules = Rules {
            model: [0; 32],
            context: 8,
            running_max: 1,
            open_max: 9,
            bytes_max: 9999,
            keep,
        };
        let mut session = Session::new(store, Ledger::new(rules, Saved::default()));
        let (action, path) = ("write to the ledger", folder.path().to_owned());
        let error = StoreError::File { action, path, reason: "no space".into() };
        let unknown = |answer: Result<JobRange, LedgerError>| {
            assert!(matches!(answer, Err(LedgerError::Unknown(_))), "{answer:?}");
        };
        let (reply, mut answer) = oneshot::channel();
        session.call(Caller::Accept(reply));
        session.fail(&error);
        unknown(answer.try_recv().unwrap());
        let (reply, mut answer) = oneshot::channel();
        let batch = DetachedBatch { key: [1; 16], note: String::new(), jobs: Vec::new() };
        refuse(Wish::Accept { owner: "anna".into(), batch, reply }, &error);
        unknown(answer.try_recv().unwrap());
    }
}
