//! What the nodes say of their experts and links, gathered for people who watch.

use lite_llm_transport::messages::{MessageError, NodeResidences, NodeView, Wire as Message};
use ractor::RpcReplyPort;

use super::CoordinatorState;
use crate::{liveness, node::NodeMessage, wire::Wire};

/// What a node says of itself, under a name that the coordinator knows better.
pub(super) trait Said: Message + Send + 'static {
    fn name(&mut self) -> &mut String;
    fn check(&self) -> Result<(), MessageError>;
}

impl Said for NodeResidences {
    fn name(&mut self) -> &mut String {
        &mut self.name
    }

    fn check(&self) -> Result<(), MessageError> {
        self.check()
    }
}

impl Said for NodeView {
    fn name(&mut self) -> &mut String {
        &mut self.name
    }

    fn check(&self) -> Result<(), MessageError> {
        self.check()
    }
}

impl CoordinatorState {
    /// Asks all nodes; those that do not answer soon, or nothing that fits, are left out.
    pub(super) fn gather<T: Said>(
        &self,
        question: fn(RpcReplyPort<Wire<T>>) -> NodeMessage,
        reply: RpcReplyPort<Vec<T>>,
    ) {
        // By name, as they are kept.
        let asked = self.nodes.iter().map(|(name, node)| {
            let (name, actor) = (name.clone(), node.actor.clone());
            async move {
                let timeout = liveness::LOST_AFTER.as_millis() as u64;
                let answer = ractor::call_t!(actor, question, timeout).ok()?;
                let mut said = answer.into_inner().ok()?;
                said.check().ok()?;
                *said.name() = name;
                Some(said)
            }
        });
        let asked = futures::future::join_all(asked.collect::<Vec<_>>());
        tokio::spawn(async move {
            // Whoever asked may be gone.
            let _ = reply.send(asked.await.into_iter().flatten().collect());
        });
    }
}
