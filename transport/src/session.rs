//! The first words on a connection: both sides say what they run, both judge it.
//!
//! A pure machine: [`crate::connection`] gives it time and bytes. Its one outcome is
//! [`Command::Ready`] or [`Command::Fail`], exactly once, at its deadline at the latest.
//!
//! The bytes of a [`Hello`] are laid by hand and never change, so that two releases whose
//! everything else differs can still tell each other so; later releases may append fields.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{PROTOCOL_VERSION, RELEASE, messages::trace::hex};

/// How long a peer may take to introduce itself.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest introduction, in bytes after its length.
pub const HELLO_BYTES_MAX: usize = 1024;
/// Bytes before the fields: a mark, then their length.
pub(crate) const HELLO_HEADER_BYTES: usize = 6;

const MARK: [u8; 4] = *b"LLM\0";
const RELEASE_BYTES_MAX: usize = 64;

/// What a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Version of the wire.
    pub protocol: u32,
    /// Version of the determinism contract.
    pub determinism: u32,
    /// Its release, for people.
    pub release: String,
    /// Root hash of the checkpoint that it serves, if it serves one.
    pub checkpoint: Option<[u8; 32]>,
}

impl Hello {
    /// What this build says, with kernels of this determinism contract.
    pub fn new(determinism: u32) -> Self {
        let release = RELEASE.to_owned();
        Self { protocol: PROTOCOL_VERSION, determinism, release, checkpoint: None }
    }

    /// The introduction as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let release = &self.release[..self.release.floor_char_boundary(RELEASE_BYTES_MAX)];
        let mut fields = Vec::with_capacity(64);
        fields.extend(self.protocol.to_le_bytes());
        fields.extend(self.determinism.to_le_bytes());
        fields.push(release.len() as u8);
        fields.extend(release.as_bytes());
        fields.push(u8::from(self.checkpoint.is_some()));
        fields.extend(self.checkpoint.unwrap_or_default());
        let mut bytes = Vec::from(MARK);
        bytes.extend((fields.len() as u16).to_le_bytes());
        bytes.extend(fields);
        bytes
    }

    /// How many bytes of fields follow this header.
    pub(crate) fn fields_len(header: [u8; HELLO_HEADER_BYTES]) -> Option<usize> {
        let len = u16::from_le_bytes([header[4], header[5]]) as usize;
        (header[..4] == MARK && len <= HELLO_BYTES_MAX).then_some(len)
    }

    /// Reads the fields; what a later release appended is skipped.
    pub(crate) fn from_fields(fields: &[u8]) -> Option<Self> {
        let (protocol, rest) = fields.split_first_chunk::<4>()?;
        let (determinism, rest) = rest.split_first_chunk::<4>()?;
        let (len, rest) = rest.split_first()?;
        let (release, rest) = rest.split_at_checked(usize::from(*len))?;
        let (flag, rest) = rest.split_first()?;
        let (checkpoint, _) = rest.split_first_chunk::<32>()?;
        Some(Self {
            protocol: u32::from_le_bytes(*protocol),
            determinism: u32::from_le_bytes(*determinism),
            // It is shown to people: no control characters.
            release: String::from_utf8_lossy(release).chars().filter(|c| !c.is_control()).collect(),
            checkpoint: (*flag != 0).then_some(*checkpoint),
        })
    }

    /// Reads an introduction.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (header, fields) = bytes.split_first_chunk::<HELLO_HEADER_BYTES>()?;
        Self::from_fields(fields.get(..Self::fields_len(*header)?)?)
    }
}

/// Two processes that cannot work together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// Another version of the wire.
    #[error(
        "{peer} speaks protocol {found} (release {theirs}), this {us} {expected} \
         (release {RELEASE}): install the same release on both"
    )]
    Protocol {
        /// The other side.
        peer: String,
        /// This side.
        us: String,
        /// Its version.
        found: u32,
        /// Ours.
        expected: u32,
        /// Its release.
        theirs: String,
    },
    /// Another determinism contract: its bits would differ.
    #[error(
        "{peer} computes by determinism contract {found} (release {theirs}), this {us} by \
         {expected} (release {RELEASE}): their bits would differ, install the same release on both"
    )]
    Determinism {
        /// The other side.
        peer: String,
        /// This side.
        us: String,
        /// Its version.
        found: u32,
        /// Ours.
        expected: u32,
        /// Its release.
        theirs: String,
    },
    /// Another model.
    #[error("{peer} serves checkpoint {found}, this {us} {expected}: start both with one model")]
    Checkpoint {
        /// The other side.
        peer: String,
        /// This side.
        us: String,
        /// What it serves.
        found: String,
        /// What we serve.
        expected: String,
    },
    /// No introduction at all.
    #[error("{peer} did not introduce itself as lite-llm does; is it another program?")]
    Garbled {
        /// The other side.
        peer: String,
    },
    /// The connection ended first.
    #[error("{peer} ended the handshake: {reason}")]
    Lost {
        /// The other side.
        peer: String,
        /// Why.
        reason: String,
    },
    /// It says nothing.
    #[error("{peer} did not introduce itself within {HELLO_TIMEOUT:?}")]
    TimedOut {
        /// The other side.
        peer: String,
    },
}

/// What happens to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The connection stands.
    Opened,
    /// The peer introduced itself.
    Received(Hello),
    /// The peer said something else.
    Garbled,
    /// The connection ended.
    Lost(String),
    /// Time went by.
    Tick,
}

/// What a session wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Introduce us.
    Send(Hello),
    /// The two fit; this is the peer.
    Ready(Hello),
    /// They don't, or it cannot be known.
    Fail(SessionError),
}

/// The machine.
#[derive(Debug)]
pub struct Session {
    us: String,
    peer: String,
    ours: Hello,
    deadline: Option<Instant>,
    ended: bool,
    commands: VecDeque<Command>,
}

impl Session {
    /// A session of `us` (a role) with `peer` (as errors call it).
    pub fn new(us: impl ToString, peer: impl ToString, ours: Hello) -> Self {
        let (us, peer) = (us.to_string(), peer.to_string());
        Self { us, peer, ours, deadline: None, ended: false, commands: VecDeque::new() }
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, event: Event) {
        if self.ended {
            return;
        }
        let peer = || self.peer.clone();
        match event {
            Event::Opened => {
                self.deadline = Some(now + HELLO_TIMEOUT);
                self.commands.push_back(Command::Send(self.ours.clone()));
            }
            Event::Received(hello) => {
                let outcome = match self.judge(&hello) {
                    Ok(()) => Command::Ready(hello),
                    Err(error) => Command::Fail(error),
                };
                self.end(outcome);
            }
            Event::Garbled => self.end(Command::Fail(SessionError::Garbled { peer: peer() })),
            Event::Lost(reason) => {
                self.end(Command::Fail(SessionError::Lost { peer: peer(), reason }));
            }
            Event::Tick if self.deadline.is_some_and(|deadline| now >= deadline) => {
                self.end(Command::Fail(SessionError::TimedOut { peer: peer() }));
            }
            Event::Tick => {}
        }
    }

    /// What is to be done next, if anything.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When to call [`Self::handle`] with [`Event::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    fn end(&mut self, outcome: Command) {
        self.ended = true;
        self.deadline = None;
        self.commands.push_back(outcome);
    }

    fn judge(&self, hello: &Hello) -> Result<(), SessionError> {
        let (peer, us) = (self.peer.clone(), self.us.clone());
        let theirs = hello.release.clone();
        if hello.protocol != self.ours.protocol {
            let (found, expected) = (hello.protocol, self.ours.protocol);
            return Err(SessionError::Protocol { peer, us, found, expected, theirs });
        }
        if hello.determinism != self.ours.determinism {
            let (found, expected) = (hello.determinism, self.ours.determinism);
            return Err(SessionError::Determinism { peer, us, found, expected, theirs });
        }
        match (hello.checkpoint, self.ours.checkpoint) {
            (Some(found), Some(expected)) if found != expected => {
                let (found, expected) = (hex(&found[..8]), hex(&expected[..8]));
                Err(SessionError::Checkpoint { peer, us, found, expected })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(session: &mut Session) -> Vec<Command> {
        std::iter::from_fn(|| session.poll_command()).collect()
    }

    fn opened(now: Instant) -> Session {
        let mut session = Session::new("coordinator", "worker w1", Hello::new(1));
        session.handle(now, Event::Opened);
        assert_eq!(drain(&mut session), [Command::Send(Hello::new(1))]);
        session
    }

    #[test]
    fn equal_versions_are_ready_and_nothing_follows() {
        let now = Instant::now();
        let mut session = opened(now);
        session.handle(now, Event::Received(Hello::new(1)));
        assert_eq!(drain(&mut session), [Command::Ready(Hello::new(1))]);
        session.handle(now + HELLO_TIMEOUT, Event::Tick);
        session.handle(now, Event::Lost("gone".into()));
        assert_eq!((drain(&mut session), session.poll_timeout()), (vec![], None));
    }

    #[test]
    fn other_versions_fail_and_both_are_named() {
        let now = Instant::now();
        for (hello, words) in [
            (
                Hello { protocol: 5, ..Hello::new(1) },
                ["worker w1 speaks protocol 5", "coordinator 4"],
            ),
            (Hello::new(7), ["contract 7", "coordinator by 1"]),
        ] {
            let mut session = opened(now);
            session.handle(now, Event::Received(hello));
            let Some(Command::Fail(error)) = session.poll_command() else { panic!("accepted") };
            for word in words.into_iter().chain(["install the same release"]) {
                assert!(error.to_string().contains(word), "{error}");
            }
        }
    }

    #[test]
    fn another_checkpoint_fails_but_none_is_fine() {
        let now = Instant::now();
        let ours = Hello { checkpoint: Some([1; 32]), ..Hello::new(1) };
        let judge = |checkpoint| {
            let mut session = Session::new("worker", "worker w2", ours.clone());
            session.handle(now, Event::Received(Hello { checkpoint, ..Hello::new(1) }));
            matches!(session.poll_command(), Some(Command::Ready(_)))
        };
        assert!(judge(None) && judge(Some([1; 32])) && !judge(Some([2; 32])));
    }

    #[test]
    fn silence_ends_at_the_deadline_and_names_the_peer() {
        let now = Instant::now();
        let mut session = opened(now);
        let deadline = session.poll_timeout().unwrap();
        session.handle(deadline - Duration::from_nanos(1), Event::Tick);
        assert_eq!(drain(&mut session), []);
        session.handle(deadline, Event::Tick);
        let Some(Command::Fail(error)) = session.poll_command() else { panic!("still waiting") };
        assert!(error.to_string().contains("worker w1"), "{error}");
    }

    #[test]
    fn a_hello_survives_its_bytes_and_later_fields() {
        let hello = Hello { checkpoint: Some([9; 32]), ..Hello::new(3) };
        let bytes = hello.to_bytes();
        assert_eq!(Hello::from_bytes(&bytes), Some(hello.clone()));
        for len in 0..bytes.len() {
            assert_eq!(Hello::from_bytes(&bytes[..len]), None);
        }
        let mut later = bytes.clone();
        later.extend([1, 2, 3]);
        later[4..6].copy_from_slice(&((bytes.len() - HELLO_HEADER_BYTES + 3) as u16).to_le_bytes());
        assert_eq!(Hello::from_bytes(&later), Some(hello));
    }

    #[test]
    fn the_bytes_of_a_hello_never_change() {
        let hello =
            Hello { protocol: 1, determinism: 1, release: "0.1.0".into(), checkpoint: None };
        let mut expected = b"LLM\0\x2f\0\x01\0\0\0\x01\0\0\0\x050.1.0\0".to_vec();
        expected.extend([0; 32]);
        assert_eq!(hello.to_bytes(), expected);
    }
}
