//! Experts from the memory of other nodes: a residence beside the disk and the archive.
//!
//! ```text
//! cache ─ fetch ─▶ PeerFetcher ─ what is faster ─┬─▶ a peer that holds it: a stream of weights
//!                                                └─▶ the next fetcher: disk cache, folder, archive
//! ```
//!
//! Who may have an expert is known from the placements that this node serves and loads; how fast each
//! way is, from what was measured (`ways.rs`). A peer gives what is in its memory at that moment, and
//! fetches nothing for others (`serve.rs`).
//!
//! Invariants: bytes of a peer are verified by the checkpoint's hash like all others, so one that lies
//! costs time, never an answer; a fetch has one slot whatever fails on the way, and every way has a
//! deadline; what fails on one way is tried on the other; nothing here runs on a lane's thread but a
//! look at a few numbers.

mod ask;
mod fetcher;
mod serve;
mod ways;

pub(crate) use self::serve::streams;
pub use self::{
    fetcher::{Epoch, PEERS_ASKED_MAX, PeerFetcher, PeerOptions},
    serve::{SERVED_MAX, SERVED_PER_PEER_MAX, STREAMS_PER_PEER_MAX, Served, TAKES_WITHIN},
    ways::FAILED_PAUSES,
};
