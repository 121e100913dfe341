//! How long a lane waits: for answers, for nodes, for weights.

use std::time::Duration;

use lite_llm_transport::exchange;

/// How long weights are waited for: every fetch has a deadline of its own, and a slow store may take
/// minutes to bring what a layer of a prompt needs.
const WEIGHTS_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a lane waits for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneLimits {
    /// For the answer to a batch.
    pub answer: Duration,
    /// For a node that takes the place of one that is gone.
    pub patience: Duration,
    /// For weights on their way to this node's memory, while none of those that are waited for come.
    pub weights: Duration,
}

impl Default for LaneLimits {
    fn default() -> Self {
        Self {
            answer: exchange::DISPATCH_TIMEOUT,
            patience: Duration::from_secs(60),
            weights: WEIGHTS_TIMEOUT,
        }
    }
}
