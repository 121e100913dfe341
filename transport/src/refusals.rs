//! What is said about those who did not get in: to whoever asks, and to the log, which strangers
//! cannot fill.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use crate::throttle::{Event, Throttle};

/// At most one line in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// Refusals that wait to be looked at.
const WAITING_MAX: usize = 64;

/// Somebody who did not get a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Where it came from.
    pub address: SocketAddr,
    /// Why it was refused.
    pub reason: String,
}

/// Takes refusals from all tasks of an endpoint.
pub(crate) struct Refusals {
    waiting: mpsc::Sender<Refusal>,
    log: Mutex<Throttle<Refusal>>,
    held: Notify,
}

impl Refusals {
    /// The taker, and where the first of those that nobody looked at come out.
    pub(crate) fn new() -> (Arc<Self>, mpsc::Receiver<Refusal>) {
        let (waiting, refusals) = mpsc::channel(WAITING_MAX);
        let log = Mutex::new(Throttle::new(LOG_INTERVAL));
        (Arc::new(Self { waiting, log, held: Notify::new() }), refusals)
    }

    pub(crate) fn note(&self, address: SocketAddr, reason: String) {
        let refusal = Refusal { address, reason };
        // The oldest are kept if nobody looks.
        let _ = self.waiting.try_send(refusal.clone());
        self.log_event(Event::Happened(refusal));
        self.held.notify_one();
    }

    fn log_event(&self, event: Event<Refusal>) {
        let line = {
            let mut log = self.log.lock();
            log.handle(tokio::time::Instant::now().into_std(), event);
            log.poll_command()
        };
        if let Some(line) = line {
            let Refusal { address, reason } = line.last;
            match line.others {
                0 => tracing::warn!(%address, %reason, "refused a connection"),
                others => tracing::warn!(
                    %address, %reason, others,
                    "refused a connection, and {others} more since the line before"
                ),
            }
        }
    }

    /// Says what is held back, when its time has come. Runs until it is dropped.
    pub(crate) async fn say_held(&self) {
        loop {
            let due = self.log.lock().poll_timeout();
            match due {
                Some(due) => {
                    tokio::time::sleep_until(due.into()).await;
                    self.log_event(Event::Tick);
                }
                None => self.held.notified().await,
            }
        }
    }
}
