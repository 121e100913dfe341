//! Ownership and failure: who holds what, and what happens when somebody is gone.
//!
//! ```text
//! CoordinatorHandle (door: QUIC endpoint)
//! ├─ Jobs                        the ledger of detached jobs, on an OS thread
//! └─ Coordinator                 membership, placement, jobs          (one per cluster)
//!      │  ractor: Describe, Load, Serve, Vitals, Dismiss              control plane
//!      ▼
//!    NodeActor                   the one actor that others see        (one per worker)
//!    ├─ LaneActor ── Lane        sequences and passes, on an OS thread
//!    ├─ Loader                   carries assignments out
//!    ├─ StorageActor             residence of experts (DRAM)
//!    └─ ExpertShard × layers     the experts this node was given
//! ```
//!
//! Jobs and token batches are not actor messages: they travel as frames on QUIC streams of their
//! own ([`node::jobs`], [`links`]) into the lane's bounded inbox ([`lane`]). Weights go from one
//! node's memory to another's on streams of a third kind ([`peers`]).
//!
//! Invariants: no arithmetic and no file formats here; decisions are made by pure machines
//! ([`cluster`], [`lane::LaneMachine`], and the exchange of `transport`); every wait has a deadline,
//! every queue a bound; one facade actor per node is visible to others, never one per expert.

pub mod archive;
pub mod cluster;
pub mod control;
pub mod coordinator;
pub mod lane;
pub mod ledger;
pub mod links;
pub mod liveness;
pub mod local;
pub mod membership;
pub mod node;
pub mod peers;
pub mod placement;
pub mod shard;
pub mod storage;
#[cfg(test)]
mod testing;
pub mod trace;
pub mod training;
pub mod wire;
pub mod words;
pub mod worker;
