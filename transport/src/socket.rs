//! The UDP socket, and how QUIC is driven over it.
//!
//! Two ways: on loopback, datagrams as large as the kernel takes and no segmentation offload (which
//! would send ten at once); elsewhere discovery of the path's limit, with offload.
//!
//! Invariant: a connection begins with what a stranger may have ([`PeerLimits::STRANGER`]); it gets
//! more when its certificate has been seen, by its role.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Arc, OnceLock},
    time::Duration,
};

use quinn::{
    ClientConfig, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
    congestion::CubicConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};

use crate::{connection::IDLE_TIMEOUT, identity::Role, limits::PeerLimits, tls::BindError};

/// How often an idle connection says that it lives.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// Bytes that one peer may send ahead on one stream.
pub const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// Bytes that a worker or the coordinator may send ahead on all its streams.
pub const CONNECTION_WINDOW_BYTES: u32 = PeerLimits::NODE.window_bytes;

/// Congestion window of a new connection: within a machine or a rack nothing is gained by probing.
const INITIAL_WINDOW_BYTES: u64 = 16 << 20;
/// Largest datagram that is taken from a peer.
const DATAGRAM_BYTES_MAX: u16 = 65_500;
/// Largest datagram over loopback; a larger start than this one aborts inside quinn.
const LOOPBACK_MTU_START: u16 = 16_000;
const LOOPBACK_MTU_MAX: u16 = 65_400;
/// Largest datagram on a network with jumbo frames.
const NETWORK_MTU_MAX: u16 = 8_952;
/// Bytes that a socket is asked to hold in the kernel, either way: a burst of large datagrams
/// overflows the default, and each loss costs a round of recovery. The kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 16 << 20;
/// What a peer on this machine may send ahead in any case.
const LOOPBACK_WINDOW_BYTES_MIN: u32 = 256 << 10;

/// A socket that only connects.
pub(crate) fn outgoing(toward: SocketAddr) -> Result<quinn::Endpoint, BindError> {
    open(local_address_for(toward))
}

pub(crate) fn local_address_for(toward: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match (toward, toward.ip().is_loopback()) {
        (SocketAddr::V4(_), true) => Ipv4Addr::LOCALHOST.into(),
        (SocketAddr::V4(_), false) => Ipv4Addr::UNSPECIFIED.into(),
        (SocketAddr::V6(_), true) => Ipv6Addr::LOCALHOST.into(),
        (SocketAddr::V6(_), false) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, 0)
}

pub(crate) fn open(address: SocketAddr) -> Result<quinn::Endpoint, BindError> {
    let failed = |source| BindError::Socket { address, source };
    let socket = UdpSocket::bind(address).map_err(failed)?;
    let options = socket2::SockRef::from(&socket);
    // What is not granted is lived without.
    let _ = options.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = options.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(DATAGRAM_BYTES_MAX).expect("within QUIC's bounds");
    quinn::Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime)).map_err(failed)
}

pub(crate) fn client_config(tls: Arc<QuicClientConfig>, toward: SocketAddr) -> ClientConfig {
    let mut config = ClientConfig::new(tls);
    config.transport_config(Arc::new(transport(toward.ip().is_loopback())));
    config
}

pub(crate) fn server_config(tls: Arc<QuicServerConfig>, loopback: bool) -> Arc<ServerConfig> {
    let mut config = ServerConfig::with_crypto(tls);
    config.transport_config(Arc::new(transport(loopback)));
    // Nodes do not wander: a packet from elsewhere is not theirs.
    config.migration(false);
    Arc::new(config)
}

/// How far a peer on this machine may send ahead: no further than half of what the kernel holds
/// for a socket, since what overflows it is lost, and a round trip is short.
fn loopback_window() -> (u32, u32) {
    static WINDOW: OnceLock<(u32, u32)> = OnceLock::new();
    *WINDOW.get_or_init(measure_loopback_window)
}

fn measure_loopback_window() -> (u32, u32) {
    let granted = (|| {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        let options = socket2::SockRef::from(&socket);
        options.set_recv_buffer_size(SOCKET_BUFFER_BYTES).ok()?;
        u32::try_from(options.recv_buffer_size().ok()?).ok()
    })();
    let window = (granted.unwrap_or(0) / 2).clamp(LOOPBACK_WINDOW_BYTES_MIN, STREAM_WINDOW_BYTES);
    // One stream that nobody reads must not hold up the others.
    (window, CONNECTION_WINDOW_BYTES / STREAM_WINDOW_BYTES * window)
}

/// How far a peer may send ahead, on one stream and on all.
fn windows(loopback: bool) -> (u32, u32) {
    match loopback {
        true => loopback_window(),
        false => (STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES),
    }
}

/// Gives a peer whose certificate was seen what its role may have.
pub(crate) fn welcome(quic: &quinn::Connection, peer: Role) {
    let (_, window) = windows(quic.remote_address().ip().is_loopback());
    let limits = PeerLimits::of(peer);
    quic.set_max_concurrent_bi_streams(VarInt::from_u32(limits.streams));
    quic.set_receive_window(VarInt::from_u32(window.min(limits.window_bytes)));
}

fn transport(loopback: bool) -> TransportConfig {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW_BYTES);
    let mut discovery = MtuDiscoveryConfig::default();
    let mut config = TransportConfig::default();
    if loopback {
        discovery.upper_bound(LOOPBACK_MTU_MAX);
        config.initial_mtu(LOOPBACK_MTU_START).enable_segmentation_offload(false);
    } else {
        discovery.upper_bound(NETWORK_MTU_MAX);
    }
    let window = windows(loopback);
    config
        .mtu_discovery_config(Some(discovery))
        .congestion_controller_factory(Arc::new(cubic))
        .stream_receive_window(VarInt::from_u32(window.0))
        .receive_window(VarInt::from_u32(PeerLimits::STRANGER.window_bytes))
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .max_concurrent_bidi_streams(VarInt::from_u32(PeerLimits::STRANGER.streams))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE_INTERVAL))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("two seconds fit QUIC's field")));
    config
}
