//! What the nodes show of their experts and links, gathered for people who watch.

use lite_llm_transport::messages::NodeView;
use ractor::RpcReplyPort;

use super::CoordinatorState;
use crate::{liveness, node::NodeMessage};

impl CoordinatorState {
    /// Asks all nodes; those that do not answer soon, or nothing that fits, are left out.
    pub(super) fn views(&self, reply: RpcReplyPort<Vec<NodeView>>) {
        let asked = self.nodes.iter().map(|(name, node)| {
            let (name, actor) = (name.clone(), node.actor.clone());
            async move {
                let timeout = liveness::LOST_AFTER.as_millis() as u64;
                let answer = ractor::call_t!(actor, NodeMessage::View, timeout).ok()?;
                let said = answer.into_inner().ok()?;
                said.check().ok()?;
                Some(NodeView { name, ..said })
            }
        });
        let asked = futures::future::join_all(asked.collect::<Vec<_>>());
        tokio::spawn(async move {
            let mut said: Vec<NodeView> = asked.await.into_iter().flatten().collect();
            said.sort_by(|a, b| a.name.cmp(&b.name));
            // Whoever asked may be gone.
            let _ = reply.send(said);
        });
    }
}
