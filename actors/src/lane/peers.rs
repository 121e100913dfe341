//! The other nodes, as a lane sees them: who holds which expert, and who can be asked.

use std::sync::Arc;

use lite_llm_runtime::expert::ExpertKey;
use lite_llm_transport::{exchange::ExchangeError, messages::NodeAddress};

use super::machine::Arrangement;
use crate::{placement::Placement, words::gone};

/// One other node.
#[derive(Debug, Clone, Default)]
struct Peer {
    /// Empty where nobody is.
    name: String,
    /// One that was started again listens elsewhere, and knows of nothing that the other owed.
    address: String,
    /// Batches can be sent to it.
    up: bool,
    /// It has shown no sign of progress lately.
    suspect: bool,
    /// How it was lost, if it was.
    lost: Option<String>,
}

/// See the module's text.
pub(super) struct Peers {
    placement: Arc<Placement>,
    me: u16,
    peers: Vec<Peer>,
}

impl Peers {
    pub(super) fn new(arrangement: Arrangement) -> Self {
        let Arrangement { placement, me, nodes } = arrangement;
        let peer = |NodeAddress { name, address }| Peer { name, address, ..Peer::default() };
        Self { placement, me, peers: nodes.into_iter().map(peer).collect() }
    }

    /// Index of this node.
    pub(super) fn me(&self) -> u16 {
        self.me
    }

    /// Takes another placement. Returns the indices at which another node is now; all of them, if
    /// this node's own index is another: its links are made anew then.
    pub(super) fn rearrange(&mut self, arrangement: Arrangement) -> Vec<u16> {
        let before = std::mem::replace(self, Self::new(arrangement));
        let moved = before.me != self.me;
        let mut others = Vec::new();
        for (index, old) in (0u16..).zip(before.peers) {
            match self.peers.get_mut(usize::from(index)) {
                Some(peer)
                    if !moved && (&peer.name, &peer.address) == (&old.name, &old.address) =>
                {
                    *peer = old;
                }
                _ => others.push(index),
            }
        }
        others
    }

    pub(super) fn up(&mut self, peer: u16) {
        if let Some(peer) = self.peers.get_mut(usize::from(peer)) {
            (peer.up, peer.lost) = (true, None);
        }
    }

    pub(super) fn lost(&mut self, peer: u16, reason: String) {
        if let Some(peer) = self.peers.get_mut(usize::from(peer)) {
            (peer.up, peer.lost) = (false, Some(reason));
        }
    }

    /// Takes the names of those who show no progress. Returns the indices of those who did before.
    pub(super) fn suspect(&mut self, names: &[String]) -> Vec<u16> {
        let mut new = Vec::new();
        for (index, peer) in (0u16..).zip(&mut self.peers) {
            let suspect = names.contains(&peer.name);
            if suspect && !std::mem::replace(&mut peer.suspect, suspect) {
                new.push(index);
            }
            peer.suspect = suspect;
        }
        new
    }

    /// Whom to ask for an expert, but for those who were tried: this node if it holds it, else the
    /// first holder that is up, one that is suspected only if there is no other.
    pub(super) fn holder(&self, key: ExpertKey, tried: &[u16]) -> Option<u16> {
        let holders = self.placement.holders(key);
        // The common case, without a look at anything else.
        if tried.is_empty() && holders == [self.me] {
            return Some(self.me);
        }
        if holders.contains(&self.me) && !tried.contains(&self.me) {
            return Some(self.me);
        }
        let others = || holders.iter().copied().filter(|node| !tried.contains(node));
        others()
            .find(|&node| self.is_sound(node))
            .or_else(|| others().find(|&node| self.peer(node).is_some_and(|peer| peer.up)))
    }

    /// Whether somebody holds an expert who can be asked and is not suspected, but for `tried`.
    pub(super) fn has_sound_holder(&self, key: ExpertKey, tried: &[u16]) -> bool {
        let sound = |node: &u16| *node == self.me || self.is_sound(*node);
        self.placement.holders(key).iter().any(|node| !tried.contains(node) && sound(node))
    }

    fn peer(&self, node: u16) -> Option<&Peer> {
        self.peers.get(usize::from(node))
    }

    fn is_sound(&self, node: u16) -> bool {
        self.peer(node).is_some_and(|peer| peer.up && !peer.suspect)
    }

    fn name(&self, peer: u16) -> &str {
        let name = self.peer(peer).map_or("", |peer| &peer.name);
        if name.is_empty() { "without a name" } else { name }
    }

    /// Why nobody can be asked for an expert, for people.
    pub(super) fn nobody(&self, key: ExpertKey) -> String {
        let lost = self.placement.holders(key).iter().find_map(|&node| {
            let peer = self.peer(node)?;
            peer.lost.as_ref().map(|how| gone(&peer.name, how))
        });
        lost.unwrap_or_else(|| {
            format!("no worker that can be reached holds {key}: start one, or use --replicas 2")
        })
    }

    /// Why a batch failed, for people.
    pub(super) fn describe(&self, error: &ExchangeError) -> String {
        match error {
            ExchangeError::Lost { peer, reason, .. } => gone(self.name(*peer), reason),
            ExchangeError::Refused { peer, reason, .. } => self.refused(*peer, reason),
            ExchangeError::TimedOut { peers: owing, waited, .. } => {
                let owing = owing.first().copied().unwrap_or(u16::MAX);
                format!("worker {} did not compute its experts within {waited:?}", self.name(owing))
            }
            ExchangeError::Overloaded { .. } => error.to_string(),
        }
    }

    /// Why a node's experts did not come, for people.
    pub(super) fn refused(&self, peer: u16, reason: &str) -> String {
        format!("worker {} did not compute its experts: {reason}", self.name(peer))
    }
}
