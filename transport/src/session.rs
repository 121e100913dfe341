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
const ARCH_BYTES_MAX: usize = 32;
/// Bit of the contract's version on the wire of who computes with `--math fast`: releases that know of
/// no such thing refuse it as they refuse another contract.
const FAST: u32 = 1 << 31;

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
    /// Of who computes with `--math fast`: on which architecture, if that is known, for such bits are
    /// equal on one alone.
    pub fast: Option<String>,
}

impl Hello {
    /// What this build says, with kernels of this determinism contract.
    pub fn new(determinism: u32) -> Self {
        let release = RELEASE.to_owned();
        Self { protocol: PROTOCOL_VERSION, determinism, release, checkpoint: None, fast: None }
    }

    /// The introduction as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let release = &self.release[..self.release.floor_char_boundary(RELEASE_BYTES_MAX)];
        let mut fields = Vec::with_capacity(64);
        fields.extend(self.protocol.to_le_bytes());
        let fast = if self.fast.is_some() { FAST } else { 0 };
        fields.extend((self.determinism | fast).to_le_bytes());
        fields.push(release.len() as u8);
        fields.extend(release.as_bytes());
        fields.push(u8::from(self.checkpoint.is_some()));
        fields.extend(self.checkpoint.unwrap_or_default());
        if let Some(arch) = &self.fast {
            let arch = &arch[..arch.floor_char_boundary(ARCH_BYTES_MAX)];
            fields.push(arch.len() as u8);
            fields.extend(arch.as_bytes());
        }
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
        let (checkpoint, rest) = rest.split_first_chunk::<32>()?;
        let determinism = u32::from_le_bytes(*determinism);
        let fast = match determinism & FAST {
            0 => None,
            _ => {
                let (len, rest) = rest.split_first()?;
                Some(words(rest.get(..usize::from(*len))?))
            }
        };
        Some(Self {
            protocol: u32::from_le_bytes(*protocol),
            determinism: determinism & !FAST,
            release: words(release),
            fast,
            checkpoint: (*flag != 0).then_some(*checkpoint),
        })
    }

    /// Reads an introduction.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (header, fields) = bytes.split_first_chunk::<HELLO_HEADER_BYTES>()?;
        Self::from_fields(fields.get(..Self::fields_len(*header)?)?)
    }
}

/// What is shown to people: no control characters.
fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).collect()
}

/// How somebody computes, for people.
fn math(fast: Option<&String>) -> String {
    match fast {
        None => "exact".into(),
        Some(arch) if arch.is_empty() => "fast".into(),
        Some(arch) => format!("fast ({arch})"),
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
    /// Other products: their bits would differ.
    #[error(
        "{peer} computes with --math {found}, this {us} with --math {expected}: their bits would \
         differ, start both alike"
    )]
    Math {
        /// The other side.
        peer: String,
        /// This side.
        us: String,
        /// How it computes.
        found: String,
        /// How we do.
        expected: String,
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
    /// Both sides compute.
    computes: bool,
    deadline: Option<Instant>,
    ended: bool,
    commands: VecDeque<Command>,
}

impl Session {
    /// A session of `us` (a role) with `peer` (as errors call it).
    pub fn new(us: impl ToString, peer: impl ToString, ours: Hello) -> Self {
        let (us, peer) = (us.to_string(), peer.to_string());
        let (deadline, ended, commands) = (None, false, VecDeque::new());
        Self { us, peer, ours, computes: true, deadline, ended, commands }
    }

    /// The same with a client, who computes nothing, or with somebody who may be one.
    pub fn computing(self, computes: bool) -> Self {
        Self { computes, ..self }
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
        if self.computes {
            let unknown = |arch: &String| arch.is_empty();
            let same = match (&hello.fast, &self.ours.fast) {
                (None, None) => true,
                (Some(a), Some(b)) => a == b || unknown(a) || unknown(b),
                _ => false,
            };
            if !same {
                let (found, expected) = (math(hello.fast.as_ref()), math(self.ours.fast.as_ref()));
                return Err(SessionError::Math { peer, us, found, expected });
            }
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
    fn other_products_fail_unless_one_side_computes_nothing() {
        let now = Instant::now();
        let judge = |ours: Option<&str>, theirs: Option<&str>, computes: bool| {
            let hello = |fast: Option<&str>| Hello { fast: fast.map(Into::into), ..Hello::new(1) };
            let session = Session::new("coordinator", "worker w1", hello(ours));
            let mut session = session.computing(computes);
            let theirs = Hello::from_bytes(&hello(theirs).to_bytes()).unwrap();
            session.handle(now, Event::Received(theirs));
            match session.poll_command() {
                Some(Command::Fail(error)) => Some(error.to_string()),
                _ => None,
            }
        };
        let (fast, hopper, ampere) = (Some(""), Some("sm_90a"), Some("sm_80"));
        for (ours, theirs, words) in [
            (None, hopper, ["worker w1 computes with --math fast (sm_90a)", "--math exact"]),
            (fast, None, ["worker w1 computes with --math exact", "coordinator with --math fast"]),
            (ampere, hopper, ["--math fast (sm_90a)", "--math fast (sm_80)"]),
        ] {
            let error = judge(ours, theirs, true).expect("they do not fit");
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
            assert_eq!(judge(ours, theirs, false), None);
        }
        for (ours, theirs) in [(None, None), (fast, hopper), (hopper, fast), (hopper, hopper)] {
            assert_eq!(judge(ours, theirs, true), None);
        }
        // A release that does not know this sees another contract.
        let bytes = Hello { fast: Some("sm_90a".into()), ..Hello::new(2) }.to_bytes();
        assert_eq!(bytes[10..14], 0x8000_0002u32.to_le_bytes());
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
        for fast in [None, Some("sm_90a".into())] {
            let hello = Hello { checkpoint: Some([9; 32]), fast, ..Hello::new(3) };
            let bytes = hello.to_bytes();
            assert_eq!(Hello::from_bytes(&bytes), Some(hello.clone()));
            for len in 0..bytes.len() {
                assert_eq!(Hello::from_bytes(&bytes[..len]), None);
            }
            let mut later = bytes.clone();
            later.extend([1, 2, 3]);
            let len = (bytes.len() - HELLO_HEADER_BYTES + 3) as u16;
            later[4..6].copy_from_slice(&len.to_le_bytes());
            assert_eq!(Hello::from_bytes(&later), Some(hello));
        }
    }

    #[test]
    fn the_bytes_of_a_hello_never_change() {
        let hello = Hello { protocol: 1, release: "0.1.0".into(), ..Hello::new(1) };
        let mut expected = b"LLM\0\x2f\0\x01\0\0\0\x01\0\0\0\x050.1.0\0".to_vec();
        expected.extend([0; 32]);
        assert_eq!(hello.to_bytes(), expected);
    }
}
