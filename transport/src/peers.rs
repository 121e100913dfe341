//! Which connections of an endpoint live, and which peers are refused because they were revoked.
//!
//! Invariant: after [`Peers::set`] no connection of a peer that the list refuses lives, whether it
//! stood before or was being made meanwhile: a new one is first put down, then looked at.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    connection::{CLOSE_REVOKED, Connection, WeakConnection},
    identity::{ClusterCa, PeerCertificate, PeerIdentity},
    messages::Revoked,
    revocation::RevokedList,
};

pub(crate) struct Peers {
    revoked: Mutex<Arc<RevokedList>>,
    live: Mutex<Vec<WeakConnection>>,
    /// What [`Peers::refresh`] said last.
    complaint: Mutex<String>,
    changes: watch::Sender<Vec<Revoked>>,
}

impl Peers {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            revoked: Mutex::default(),
            live: Mutex::default(),
            complaint: Mutex::default(),
            changes: watch::Sender::new(Vec::new()),
        })
    }

    /// Why this peer is refused, if it is.
    pub(crate) fn refuses(
        &self,
        peer: &PeerIdentity,
        certificate: &PeerCertificate,
    ) -> Option<String> {
        let revoked = self.revoked.lock().clone();
        revoked.refuses(peer, certificate)
    }

    /// Puts down a new connection, or closes it and says why.
    pub(crate) fn keep(&self, connection: &Connection) -> Result<(), String> {
        {
            let mut live = self.live.lock();
            live.retain(WeakConnection::is_live);
            live.push(connection.downgrade());
        }
        match self.refuses(connection.peer(), connection.certificate()) {
            Some(reason) => {
                connection.close_with(CLOSE_REVOKED, &reason);
                Err(reason)
            }
            None => Ok(()),
        }
    }

    /// Replaces the list, and closes the connections that it refuses.
    pub(crate) fn set(&self, list: Arc<RevokedList>) {
        self.changes.send_replace(list.to_vec());
        *self.revoked.lock() = list;
        let live: Vec<_> = self.live.lock().iter().filter_map(WeakConnection::upgrade).collect();
        for connection in live {
            if let Some(reason) = self.refuses(connection.peer(), connection.certificate()) {
                tracing::warn!(peer = %connection.peer(), %reason, "closed a connection");
                connection.close_with(CLOSE_REVOKED, &reason);
            }
        }
    }

    /// Takes the authority's list, if it is another than before. One that cannot be read leaves
    /// the last that could.
    pub(crate) fn refresh(&self, ca: &ClusterCa) {
        let (list, complaint) = match ca.revoked() {
            Ok(list) => (list, String::new()),
            Err(error) => (ca.last_revoked(), error.to_string()),
        };
        {
            let mut said = self.complaint.lock();
            if !complaint.is_empty() && *said != complaint {
                tracing::error!(error = %complaint, "the list of revoked names stays as it was");
            }
            *said = complaint;
        }
        if !Arc::ptr_eq(&*self.revoked.lock(), &list) {
            self.set(list);
        }
    }

    /// The list, whenever it changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Vec<Revoked>> {
        self.changes.subscribe()
    }
}
