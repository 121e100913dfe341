//! A network in virtual time: connections between processes, over links that can be cut.
//!
//! A connection behaves as one of QUIC: what is sent arrives in order, once, or the connection is lost
//! at both ends; it is lost after [`IDLE`] of silence, however that came.

use std::{collections::BTreeMap, time::Duration};

/// A process, by its number.
pub(crate) type Process = usize;
/// A connection, by its number.
pub(crate) type Conn = u64;

/// Silence after which a connection is lost.
pub(crate) const IDLE: Duration = Duration::from_secs(2);

/// An open connection.
pub(crate) struct Connection {
    pub(crate) ends: [Process; 2],
    /// When what was sent last in each direction arrives, by the sender's end.
    arrives: [Duration; 2],
    /// Since when nothing gets through.
    pub(crate) silent: Option<Duration>,
    /// An end has died: a process that is started in its place knows nothing of the connection.
    pub(crate) dead: bool,
}

/// Connections, and the state of the links under them.
#[derive(Default)]
pub(crate) struct Network {
    pub(crate) connections: BTreeMap<Conn, Connection>,
    /// Directions, from and to, in which nothing gets through.
    cuts: BTreeMap<(Process, Process), u32>,
    next: Conn,
}

impl Network {
    pub(crate) fn open(&mut self, a: Process, b: Process, now: Duration) -> Conn {
        self.next += 1;
        let connection = Connection { ends: [a, b], arrives: [now; 2], silent: None, dead: false };
        self.connections.insert(self.next, connection);
        self.next
    }

    pub(crate) fn cut(&mut self, from: Process, to: Process) {
        *self.cuts.entry((from, to)).or_default() += 1;
    }

    pub(crate) fn mend(&mut self, from: Process, to: Process) {
        if let Some(cuts) = self.cuts.get_mut(&(from, to)) {
            *cuts -= 1;
        }
    }

    pub(crate) fn is_cut(&self, from: Process, to: Process) -> bool {
        self.cuts.get(&(from, to)).is_some_and(|cuts| *cuts > 0)
    }

    /// The other end of a connection.
    pub(crate) fn other(&self, conn: Conn, end: Process) -> Option<Process> {
        let [a, b] = self.connections.get(&conn)?.ends;
        Some(if a == end { b } else { a })
    }

    /// When a message that takes `delay` arrives: not before those that were sent earlier.
    pub(crate) fn arrival(
        &mut self,
        conn: Conn,
        from: Process,
        now: Duration,
        delay: Duration,
    ) -> Option<Duration> {
        let connection = self.connections.get_mut(&conn)?;
        let arrives = &mut connection.arrives[usize::from(connection.ends[1] == from)];
        *arrives = (*arrives + Duration::from_nanos(1)).max(now + delay);
        Some(*arrives)
    }
}
