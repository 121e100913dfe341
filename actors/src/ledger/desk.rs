//! Where the ledger is asked, from any task of its process.

use std::{sync::Arc, time::Duration};

use lite_llm_transport::messages::{
    DetachedBatch, DetachedReport, DetachedStatus, JobRange, JobsQuery, LISTED_MAX, WAIT_MS_MAX,
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc, oneshot, watch},
    time::{Instant, timeout, timeout_at},
};

use super::{
    LEDGER_BYTES_MAX, LedgerOptions, OPEN_JOBS_MAX, RUNNING_MAX,
    events::Rules,
    keeper::{Keeper, Reply, Wish},
    machine::Ledger,
    runner::RunsOn,
    store::Store,
};

/// Questions that wait for the ledger's thread.
const WISHES_MAX: usize = 1024;
/// Batches that wait for it: each may have the size of a client's longest frame.
const BATCHES_MAX: usize = 8;
/// How long anybody waits for the ledger: its disk may be slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the ledger did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LedgerError {
    /// It is not done, and will not be: the reason, and what to do.
    #[error("{0}")]
    Refused(String),
    /// The same, for want of room, which there may be later.
    #[error("{0}")]
    Full(String),
    /// It is not done by this question; one of the same key that was asked before may do it. Ask again.
    #[error("{0}; ask again")]
    Busy(String),
    /// Nobody knows whether it is done: the disk fails or is slow. Ask again, with the same key.
    #[error("it is not known whether it was done: {0}; ask again")]
    Unknown(String),
    /// The coordinator stops: nobody knows what became of it. Ask the next one.
    #[error("the coordinator is stopping; ask again when it is back")]
    Stopping,
}

impl LedgerError {
    /// The same, where nothing was to be done yet.
    pub(crate) fn before(self) -> Self {
        match self {
            Self::Unknown(reason) => Self::Busy(reason),
            other => other,
        }
    }
}

/// The ledger of a coordinator. An owner is any name: that of a client's certificate, or of an API
/// key with a prefix that no such name has. Who names no owner sees everybody's jobs.
#[derive(Clone)]
pub struct Jobs {
    wishes: mpsc::Sender<Wish>,
    changed: watch::Receiver<u64>,
    batches: Arc<Semaphore>,
    /// How long it is waited for.
    patience: Duration,
}

impl Jobs {
    /// Opens a ledger, and goes on with its jobs: `model` is a hash of all that fixes their bits beside
    /// themselves, `context` the positions with which it is served. To be called within tokio.
    ///
    /// # Errors
    /// The file cannot be opened, is of a later release, or is damaged.
    pub(crate) async fn open(
        options: LedgerOptions,
        model: [u8; 32],
        context: u64,
        runs_on: RunsOn,
    ) -> Result<Self, LedgerError> {
        let LedgerOptions { file: path, keep } = options;
        let rules = Rules {
            model,
            context,
            running_max: RUNNING_MAX,
            open_max: OPEN_JOBS_MAX,
            bytes_max: LEDGER_BYTES_MAX,
            keep,
        };
        let (wishes, inbox) = mpsc::channel(WISHES_MAX);
        let (changed, watched) = watch::channel(0);
        let runtime = Handle::current();
        let weak = wishes.downgrade();
        let (opened, was_opened) = oneshot::channel();
        let keep = move || {
            let found =
                Store::open(&path).and_then(|store| Ok((store.load(rules.context)?, store)));
            match found {
                Ok((saved, store)) => {
                    let ledger = Ledger::new(rules.clone(), saved);
                    if opened.send(Ok(())).is_ok() {
                        Keeper { path, rules, inbox, wishes: weak, changed, runs_on, runtime }
                            .keep(store, ledger);
                    }
                }
                // Whoever opened it may be gone.
                Err(error) => drop(opened.send(Err(LedgerError::Refused(error.to_string())))),
            }
        };
        let thread = std::thread::Builder::new().name("lite-llm-ledger".into()).spawn(keep);
        thread.map_err(|error| {
            LedgerError::Refused(format!("the system gives no threads: {error}"))
        })?;
        let ended = || LedgerError::Refused("the ledger's thread ended; its log says why".into());
        was_opened.await.map_err(|_| ended())??;
        let batches = Arc::new(Semaphore::new(BATCHES_MAX));
        Ok(Self { wishes, changed: watched, batches, patience: ANSWER_TIMEOUT })
    }

    /// Takes jobs whose prompts are token ids, together or not at all. Returns their numbers when they
    /// are on disk. Use `CoordinatorHandle::detach`, which encodes and checks them.
    pub(crate) async fn accept(
        &self,
        owner: &str,
        batch: DetachedBatch,
    ) -> Result<JobRange, LedgerError> {
        let place = timeout(self.patience, self.batches.acquire()).await;
        let _place = place.map_err(|_| self.slow().before())?.map_err(|_| gone())?;
        let owner = owner.to_owned();
        self.ask(|reply| Wish::Accept { owner, batch, reply }).await
    }

    /// The numbers of a batch that was taken under this key, if one was. Whoever lost an answer asks
    /// before anything else: what would be refused now may have been taken then.
    pub async fn known(&self, owner: &str, key: [u8; 16]) -> Result<Option<JobRange>, LedgerError> {
        let owner = owner.to_owned();
        self.ask(|reply| Wish::Known { owner, key, reply }).await
    }

    /// How far jobs are: the newest of a range, the oldest first. With `wait_ms`, an answer comes when
    /// more than `ended` of the range have ended, at the latest after so long.
    ///
    /// # Errors
    /// The disk fails or is too slow, or the coordinator stops; here and below.
    pub async fn list(
        &self,
        owner: Option<&str>,
        query: JobsQuery,
    ) -> Result<Vec<DetachedStatus>, LedgerError> {
        let JobsQuery { jobs, most, ended, wait_ms } = query;
        let most = LISTED_MAX.min(most as usize);
        let until = Instant::now() + Duration::from_millis(wait_ms.min(WAIT_MS_MAX).into());
        let mut changed = self.changed.clone();
        loop {
            changed.mark_unchanged();
            let owner = owner.map(str::to_owned);
            let listed = self.ask(|reply| Wish::List { owner, jobs, most, reply }).await?;
            let all_over = listed.ended == listed.all;
            if all_over || listed.ended > u64::from(ended) || Instant::now() >= until {
                return Ok(listed.jobs);
            }
            // A deadline is asked about above.
            if let Ok(Err(_)) = timeout_at(until, changed.changed()).await {
                return Err(gone());
            }
        }
    }

    /// All that is known of these jobs, in this order, as many as [`RESULTS_BYTES_MAX`] has room for;
    /// numbers that are nobody's, or another's, are left out.
    ///
    /// [`RESULTS_BYTES_MAX`]: lite_llm_transport::messages::RESULTS_BYTES_MAX
    pub async fn report(
        &self,
        owner: Option<&str>,
        mut jobs: Vec<u64>,
    ) -> Result<Vec<DetachedReport>, LedgerError> {
        jobs.truncate(LISTED_MAX);
        let owner = owner.map(str::to_owned);
        self.ask(|reply| Wish::Report { owner, jobs, reply }).await
    }

    /// An owner's batches that have numbers below `below`, the newest `most` of them, newest first.
    pub async fn batches(
        &self,
        owner: &str,
        below: u64,
        most: usize,
    ) -> Result<Vec<u64>, LedgerError> {
        let (owner, most) = (owner.to_owned(), most.min(LISTED_MAX));
        self.ask(|reply| Wish::Batches { owner, below, most, reply }).await
    }

    /// The note that was kept with a batch, by the number of its first job.
    pub async fn note(
        &self,
        owner: Option<&str>,
        batch: u64,
    ) -> Result<Option<String>, LedgerError> {
        let owner = owner.map(str::to_owned);
        self.ask(|reply| Wish::Note { owner, batch, reply }).await
    }

    /// Ends jobs that have not ended. Returns how many there were, when that is on disk.
    pub async fn cancel(&self, owner: Option<&str>, jobs: JobRange) -> Result<u64, LedgerError> {
        let owner = owner.map(str::to_owned);
        self.ask(|reply| Wish::Cancel { owner, jobs, reply }).await
    }

    /// Returns when the ledger's thread is gone.
    pub async fn ended(&self) {
        self.wishes.closed().await;
    }

    /// Writes what is known, and ends.
    pub(crate) async fn stop(&self) {
        let (told, stopped) = oneshot::channel();
        let stop = async {
            // One that is gone has stopped.
            if self.wishes.send(Wish::Stop(told)).await.is_ok() {
                let _ = stopped.await;
            }
        };
        let _ = timeout(self.patience, stop).await;
    }

    async fn ask<T>(&self, wish: impl FnOnce(Reply<T>) -> Wish) -> Result<T, LedgerError> {
        let (reply, answer) = oneshot::channel();
        let until = Instant::now() + self.patience;
        let sent = timeout_at(until, self.wishes.send(wish(reply))).await;
        // It never heard of it.
        sent.map_err(|_| self.slow().before())?.map_err(|_| gone())?;
        let answered = timeout_at(until, answer).await.map_err(|_| self.slow())?;
        // Whoever drops a question has failed, or is going.
        answered.map_err(|_| match self.wishes.is_closed() {
            true => gone(),
            false => LedgerError::Unknown("the ledger's disk failed".into()),
        })?
    }

    fn slow(&self) -> LedgerError {
        let patience = self.patience;
        LedgerError::Unknown(format!(
            "the ledger did not answer within {patience:?}: its disk is slow or full"
        ))
    }
}

fn gone() -> LedgerError {
    LedgerError::Stopping
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desk() -> (Jobs, mpsc::Receiver<Wish>) {
        let (wishes, inbox) = mpsc::channel(8);
        let changed = watch::channel(0).1;
        let (batches, patience) = (Arc::new(Semaphore::new(1)), Duration::from_millis(50));
        (Jobs { wishes, changed, batches, patience }, inbox)
    }

    fn batch() -> DetachedBatch {
        DetachedBatch { key: [1; 16], note: String::new(), jobs: Vec::new() }
    }

    /// What was not answered may have been taken, so nobody may say that it was not.
    #[tokio::test]
    async fn no_answer_is_no_refusal() {
        let (jobs, mut inbox) = desk();
        let (asked, _) = tokio::join!(jobs.accept("anna", batch()), async {
            let wish = inbox.recv().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(wish);
        });
        assert!(matches!(asked, Err(LedgerError::Unknown(_))), "a slow disk: {asked:?}");
        let (asked, _) = tokio::join!(jobs.accept("anna", batch()), async {
            drop(inbox.recv().await);
        });
        assert!(matches!(asked, Err(LedgerError::Unknown(_))), "a disk that failed: {asked:?}");
        // What was never asked was not done.
        let waits = jobs.batches.clone().acquire_owned().await.unwrap();
        let asked = jobs.accept("anna", batch()).await;
        assert!(matches!(asked, Err(LedgerError::Busy(_))), "too many wait: {asked:?}");
        drop(waits);
        for _ in 0..8 {
            let (reply, _) = oneshot::channel();
            let (owner, key) = ("anna".to_owned(), [1; 16]);
            jobs.wishes.try_send(Wish::Known { owner, key, reply }).unwrap();
        }
        let asked = jobs.accept("anna", batch()).await;
        assert!(matches!(asked, Err(LedgerError::Busy(_))), "the queue is full: {asked:?}");
        drop(inbox);
        let asked = jobs.cancel(None, JobRange { first: 1, last: 1 }).await;
        assert!(matches!(asked, Err(LedgerError::Stopping)), "{asked:?}");
    }
}
