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

/// A node introduces itself to a coordinator that it may have outlived.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct NodeReport {
    /// Who it is.
    pub info: NodeInfo,
    /// The assignment whose experts it holds, of this coordinator or of one before.
    pub holding: Option<Assignment>,
}

/// How a node is, asked several times a second.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct NodeVitals {
    /// What `status` shows.
    pub status: NodeStatus,
    /// Its lane has something to compute.
    pub busy: bool,
    /// Moves while its lane computes.
    pub progress: u64,
    /// Nodes of its epoch that it cannot reach.
    pub unreachable: Vec<String>,
}

/// Where a node of an epoch is reached; both are empty where nobody is.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct NodeAddress {
    /// Its name.
    pub name: String,
    /// Its data-plane address.
    pub address: String,
}

/// Most rules of a placement, and most holders that a rule lists.
pub const PLACEMENT_RULES_MAX: usize = 4096;
/// See [`PLACEMENT_RULES_MAX`].
pub const PLACEMENT_HOLDERS_MAX: usize = 1 << 16;

/// Who holds the experts of some groups of a tier: a rule is small however many experts it places.
///
/// The experts of the range are counted through all sparse layers: layers upwards, then groups,
/// then experts. Number i of them is held by `holders[s · copies..][..copies]` with
/// `s = i mod (holders.len() / copies)`, the first of whom is asked first.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct PlacementRule {
    /// Index of the tier.
    pub tier: u16,
    /// First group.
    pub first_group: u32,
    /// The group after the last.
    pub end_group: u32,
    /// Holders of each expert.
    pub copies: u16,
    /// Indices of nodes.
    pub holders: Vec<u16>,
}

/// What a node is to hold, and where everything else is.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Assignment {
    /// Number of this placement; it grows.
    pub epoch: u64,
    /// Root hash of the checkpoint.
    pub checkpoint: [u8; 32],
    /// Where the checkpoint is: a folder, with the number of its manifest.
    pub model_path: String,
    /// Who holds which expert. The receiver loads what it holds itself.
    pub placement: Vec<PlacementRule>,
    /// The nodes of this epoch.
    pub nodes: Vec<NodeAddress>,
    /// The receiver's own index in `nodes`.
    pub you: u16,
    /// Name of the format in which every node keeps keys and values.
    pub kv_dtype: String,
    /// Positions with which every node serves the model: they bound a request, and they fix the
    /// rotary table.
    pub context: u64,
}

impl Assignment {
    /// Whether every index names a node of the list, and sizes are within bounds. To be asked once,
    /// on receipt.
    pub fn check(&self) -> Result<(), MessageError> {
        let field = |field, found: u64, expected: String| {
            Err(MessageError::Field { what: "Assignment", field, found, expected })
        };
        let nodes = self.nodes.len();
        let rules = self.placement.len();
        if rules > PLACEMENT_RULES_MAX {
            return field(
                "number of rules",
                rules as u64,
                format!("{PLACEMENT_RULES_MAX} at most"),
            );
        }
        for rule in &self.placement {
            let holders = rule.holders.len();
            let copies = usize::from(rule.copies);
            if holders == 0
                || holders > PLACEMENT_HOLDERS_MAX
                || copies == 0
                || holders % copies != 0
            {
                let expected =
                    format!("1 to {PLACEMENT_HOLDERS_MAX}, and a multiple of its {copies} copies,");
                return field("number of holders", holders as u64, expected);
            }
        }
        let outside = |&&node: &&u16| usize::from(node) >= nodes;
        let mut all = self.placement.iter().flat_map(|rule| &rule.holders).chain([&self.you]);
        match all.find(outside) {
            None => Ok(()),
            Some(&node) => field(
                "index of a node",
                node.into(),
                format!("less than {nodes}, the number of its nodes,"),
            ),
        }
    }
}

/// Most names that are revoked at a time.
pub const REVOKED_MAX: usize = 4096;

/// A name that was sent away for good.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Revoked {
    /// The name.
    pub name: String,
    /// Its certificates that were issued until then are refused; milliseconds since 1970.
    pub until: u64,
    /// Whether it may get no other.
    pub barred: bool,
}

/// The coordinator tells a worker all names that are revoked: the worker refuses them as peers, and
/// ends connections that it has with them. A list replaces the one before.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct RevokedNames {
    /// All of them.
    pub names: Vec<Revoked>,
}

impl RevokedNames {
    /// Whether the list is within its bound. To be asked once, on receipt.
    pub fn check(&self) -> Result<(), MessageError> {
        match self.names.len() {
            0..=REVOKED_MAX => Ok(()),
            found => Err(MessageError::Field {
                what: "RevokedNames",
                field: "number of names",
                found: found as u64,
                expected: format!("{REVOKED_MAX} at most"),
            }),
        }
    }
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
    /// Positions that its cache of keys and values holds; 0 before it has one.
    pub kv_tokens: u64,
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

/// Most residences that a node lists, and most bytes of the name of one.
pub const RESIDENCES_MAX: usize = 8;
/// See [`RESIDENCES_MAX`].
pub const RESIDENCE_NAME_MAX: usize = 1024;

/// A place of experts on a node: what it holds, and what it has done since the node began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct ResidenceStatus {
    /// What it is and where, for people.
    pub name: String,
    /// Bytes that it holds.
    pub held: u64,
    /// Bytes that it may hold; nothing of a place that holds all there is.
    pub budget: Option<u64>,
    /// Experts that were wanted of it and there.
    pub hits: u64,
    /// Experts that were wanted of it and not there.
    pub misses: u64,
    /// Experts that were fetched because they were predicted.
    pub prefetches: u64,
    /// Of those, the ones that were wanted.
    pub prefetches_used: u64,
    /// Experts that were let go.
    pub evictions: u64,
    /// Bytes that came into it, or out of a place that holds all there is.
    pub bytes: u64,
    /// Of those, the ones that were let go unused.
    pub bytes_in_vain: u64,
    /// Experts that were damaged there.
    pub damaged: u64,
    /// Reads and writes that failed for another reason.
    pub failures: u64,
}

/// What a node's scheduler has done since its lane began, and what it holds now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct ScheduleStatus {
    /// Sequences that wait for pages.
    pub waiting: u64,
    /// Sequences that run.
    pub running: u64,
    /// Pages of the cache of keys and values.
    pub pages: u64,
    /// Pages that sequences have.
    pub pages_used: u64,
    /// Pages that nobody has, kept for their prefix.
    pub pages_idle: u64,
    /// Positions that were computed.
    pub computed: u64,
    /// Positions that were found in the cache.
    pub found: u64,
    /// Times that a sequence lost its pages to another.
    pub preemptions: u64,
    /// Tokens that were guessed.
    pub guessed: u64,
    /// Of those, the ones that were right.
    pub guessed_right: u64,
}

/// The places of a node's experts, the fastest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct NodeResidences {
    /// The node's name.
    pub name: String,
    /// Tokens that were generated there.
    pub tokens: u64,
    /// How long its lane had nothing to compute because experts were on their way, in microseconds.
    pub waited_us: u64,
    /// At most [`RESIDENCES_MAX`].
    pub residences: Vec<ResidenceStatus>,
    /// Its scheduler.
    pub schedule: ScheduleStatus,
}

impl NodeResidences {
    /// Whether sizes are within bounds. To be asked once, on receipt.
    pub fn check(&self) -> Result<(), MessageError> {
        let field = |field, found: usize, most: usize| {
            let (found, expected) = (found as u64, format!("{most} at most"));
            Err(MessageError::Field { what: "NodeResidences", field, found, expected })
        };
        if self.residences.len() > RESIDENCES_MAX {
            return field("number of residences", self.residences.len(), RESIDENCES_MAX);
        }
        let longest = self.residences.iter().map(|place| place.name.len()).max().unwrap_or(0);
        match longest {
            0..=RESIDENCE_NAME_MAX => Ok(()),
            _ => field("length of a residence's name", longest, RESIDENCE_NAME_MAX),
        }
    }
}
