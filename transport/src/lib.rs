//! What crosses the wire, and nothing else: frames, messages, sessions, QUIC with mutual TLS.
//!
//! Read [`messages`] (what is said), [`frame`] (how it lies in memory), [`session`] and
//! [`exchange`] (pure machines: no socket, no clock), then [`endpoint`] and [`connection`] (quinn).
//! [`identity`], [`token`], [`join`] and [`revocation`] say who may speak at all, [`state`] where that
//! is kept, [`door`] who waits when many come, [`limits`] how much anybody may send.
//!
//! Invariants:
//! - A peer is known by the certificate of its cluster before any of its streams is read.
//! - A size that a peer claims is checked against a named limit before memory is used for it.
//! - Activations are copied once per hop: from QUIC's datagrams into the aligned buffer in which
//!   the receiver's kernel reads them. Senders write them where they are sent from.
//! - Every wait has a named deadline; the error says who was waited for.
//!
//! Deliberately absent: model arithmetic, actors, and any opinion about where an expert lives.

#[cfg(target_endian = "big")]
compile_error!(
    "activations are read in place as little-endian f32: big-endian hosts are not supported"
);

mod admission;
pub mod connection;
pub mod door;
pub mod endpoint;
pub mod exchange;
pub mod frame;
pub mod identity;
pub mod join;
pub mod keys;
pub mod limits;
pub mod measure;
pub mod messages;
pub mod moment;
pub mod patience;
mod peers;
pub mod pool;
mod random;
mod refusals;
pub mod revocation;
pub mod secrets;
pub mod session;
pub mod socket;
pub mod state;
pub mod throttle;
mod tls;
pub mod token;

/// Version of the wire: of frames, messages and handshakes. Peers of different versions refuse
/// each other.
pub const PROTOCOL_VERSION: u32 = 4;

/// The release of this build, named to the peer in every handshake.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");
