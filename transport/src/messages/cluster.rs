//! The control plane: who is in the cluster, who owns which expert, how far loading is.
//!
//! These travel inside messages of the actors as bytes (see [`super::encode`]).

use rkyv::{Archive, Deserialize, Serialize};

use super::MessageError;

/// A node introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name, the one in its certificate.
    pub name: String,
    /// Where it accepts connections of the data plane, `host:port`.
    pub address: String,
    /// Its release.
    pub release: String,
    /// The wire's version that it speaks.
    pub protocol: u32,
    /// The determinism contract that its kernels obey.
    pub determinism: u32,
    /// Bytes of experts that it is willing to hold.
    pub budget_bytes: u64,
    /// Its compute threads.
    pub threads: u32,
    /// Its process.
    pub pid: u32,
}

/// Where a node of an epoch is reached.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct NodeAddress {
    /// Its name.
    pub name: String,
    /// Its data-plane address.
    pub address: String,
}

/// An expert by layer and index in the layer's flat list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FlatExpert {
    /// Layer of the model.
    pub layer: u16,
    /// Index in the layer's flat list: tiers, then groups, then experts.
    pub flat: u32,
}

/// What a node is to hold, and where everything else is.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Assignment {
    /// Number of this placement; it grows.
    pub epoch: u64,
    /// Root hash of the checkpoint.
    pub checkpoint: [u8; 32],
    /// Folder of the checkpoint.
    pub model_path: String,
    /// What the receiver loads.
    pub experts: Vec<FlatExpert>,
    /// Per layer, per flat index: the owner, as an index of `nodes`. Dense layers are empty.
    pub owners: Vec<Vec<u16>>,
    /// The nodes of this epoch.
    pub nodes: Vec<NodeAddress>,
    /// The receiver's own index in `nodes`.
    pub you: u16,
    /// Seed of the routing's tie-break.
    pub seed: u64,
    /// Name of the format in which every node keeps keys and values.
    pub kv_dtype: String,
    /// Positions with which every node serves the model: they bound a request, and they fix the
    /// rotary table.
    pub context: u64,
}

impl Assignment {
    /// Whether every index names a node of the list. To be asked once, on receipt.
    pub fn check(&self) -> Result<(), MessageError> {
        let nodes = self.nodes.len();
        let outside = |&&node: &&u16| usize::from(node) >= nodes;
        let mut all = self.owners.iter().flatten().chain([&self.you]);
        match all.find(outside) {
            None => Ok(()),
            Some(&node) => Err(MessageError::Field {
                what: "Assignment",
                field: "index of a node",
                found: node.into(),
                expected: format!("less than {nodes}, the number of its nodes,"),
            }),
        }
    }
}

/// How far a node is with loading.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct LoadProgress {
    /// The node's name.
    pub node: String,
    /// Experts that are there.
    pub loaded: u32,
    /// Experts that were assigned.
    pub total: u32,
    /// Bytes read.
    pub bytes: u64,
}

/// One node, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its data-plane address.
    pub address: String,
    /// What it is doing, in words.
    pub state: String,
    /// Experts that it owns.
    pub experts: u32,
    /// Their bytes.
    pub expert_bytes: u64,
    /// Bytes that it is willing to hold.
    pub budget: u64,
    /// Sequences at home there.
    pub sequences: u32,
    /// Tokens that it generated per second, lately.
    pub tokens_per_second: f32,
    /// Experts that are loaded.
    pub loaded: u32,
    /// Experts that it is to load.
    pub total: u32,
}

/// The whole cluster, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Name of the model.
    pub model: String,
    /// Root hash of the checkpoint, in hexadecimal digits.
    pub checkpoint: String,
    /// Number of the placement.
    pub epoch: u64,
    /// What the cluster is doing, in words.
    pub state: String,
    /// Nodes that it waits for.
    pub waiting_for: Vec<String>,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
    /// Jobs that run now.
    pub jobs_running: u32,
    /// Jobs that ended.
    pub jobs_done: u64,
    /// Tokens generated per second, lately.
    pub tokens_per_second: f32,
}
