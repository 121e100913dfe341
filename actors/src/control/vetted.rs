//! What a peer says on the control plane, message by message, before ractor_cluster hears it.
//!
//! Invariants: the first message of a session says a name that begins with the certificate's; what
//! shows actors takes no more than [`SHOWN_BYTES_MAX`] in the life of a session; what breaks this ends
//! the stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use lite_llm_transport::connection::RawReceiver;
use tokio::io::{AsyncRead, ReadBuf};

use super::CONTROL_BYTES_MAX;

/// Bytes of messages that show actors: a node shows one, twice.
const SHOWN_BYTES_MAX: usize = 1 << 10;
/// Bytes that are read at a time.
const CHUNK_BYTES: usize = 8 << 10;
const LENGTH_BYTES: usize = 8;
/// Most fields of a message down to those that show actors: each has a handful.
const FIELDS_MAX: usize = 64;

/// Fields of ractor_cluster's messages.
const AUTH: u64 = 1;
const CONTROL: u64 = 3;
const AUTH_NAME: u64 = 1;
const NAME: u64 = 1;
const SPAWN: u64 = 1;
const PG_JOIN: u64 = 5;

/// See the module's text.
pub(super) struct Vetted {
    inner: RawReceiver,
    /// Who it is, as the certificate says.
    peer: String,
    named: bool,
    shown: usize,
    /// The present message, with its length before it.
    message: Vec<u8>,
    /// How much of it was handed out; nothing before it is whole.
    given: usize,
}

impl Vetted {
    pub(super) fn new(inner: RawReceiver, peer: String) -> Self {
        Self { inner, peer, named: false, shown: 0, message: Vec::new(), given: 0 }
    }

    /// Bytes of the present message, if that is known.
    fn wanted(&self) -> io::Result<usize> {
        let Some(length) = self.message.first_chunk::<LENGTH_BYTES>() else {
            return Ok(LENGTH_BYTES);
        };
        match u64::from_be_bytes(*length) {
            length @ ..=CONTROL_BYTES_MAX => Ok(LENGTH_BYTES + length as usize),
            length => Err(io::Error::other(format!("a message of {length} bytes"))),
        }
    }

    fn vet(&mut self) -> io::Result<()> {
        let refused = |what: &str| io::Error::other(format!("{} {what}", self.peer));
        let message =
            fields(&self.message[LENGTH_BYTES..]).ok_or_else(|| refused("speaks oddly"))?;
        if !self.named {
            let name = name_of(&message).ok_or_else(|| refused("says no name"))?;
            let own =
                name.strip_prefix(self.peer.as_bytes()).is_some_and(|it| it.starts_with(b" "));
            if !own {
                return Err(refused("says that it is somebody else"));
            }
            self.named = true;
            return Ok(());
        }
        for (field, control) in message {
            let Some(control) = control.filter(|_| field == CONTROL) else { continue };
            let shows = fields(control).ok_or_else(|| refused("speaks oddly"))?;
            if shows.iter().any(|(kind, _)| matches!(*kind, SPAWN | PG_JOIN)) {
                self.shown += control.len();
            }
        }
        if self.shown > SHOWN_BYTES_MAX {
            return Err(refused("shows more than a node has to show"));
        }
        Ok(())
    }
}

impl AsyncRead for Vetted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let wanted = this.wanted()?;
            let have = this.message.len();
            if have == wanted {
                if this.given == 0 {
                    this.vet()?;
                }
                let piece = (have - this.given).min(out.remaining());
                out.put_slice(&this.message[this.given..this.given + piece]);
                this.given += piece;
                if this.given == have {
                    this.message.clear();
                    this.given = 0;
                }
                return Poll::Ready(Ok(()));
            }
            let mut chunk = [0; CHUNK_BYTES];
            let mut read = ReadBuf::new(&mut chunk[..(wanted - have).min(CHUNK_BYTES)]);
            ready!(AsyncRead::poll_read(Pin::new(&mut this.inner), context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.message.extend_from_slice(read.filled());
        }
    }
}

/// The name that an introduction says, if it says one name and nothing else.
fn name_of<'a>(message: &[(u64, Option<&'a [u8]>)]) -> Option<&'a [u8]> {
    let only = |message: &[(u64, Option<&'a [u8]>)], field| match message {
        [(found, value)] if *found == field => *value,
        _ => None,
    };
    let auth = fields(only(message, AUTH)?)?;
    let said = fields(only(&auth, AUTH_NAME)?)?;
    let names: Vec<_> = said.into_iter().filter(|(field, _)| *field == NAME).collect();
    only(&names, NAME)
}

/// A field's number, and its bytes if it has some.
type Field<'a> = (u64, Option<&'a [u8]>);

/// The fields of a protobuf message, with the bytes of those that have a length.
fn fields(mut bytes: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        if fields.len() == FIELDS_MAX {
            return None;
        }
        let tag = varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => varint(&mut bytes).map(|_| None)?,
            1 => bytes.split_off(..8).map(|_| None)?,
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                Some(bytes.split_off(..length)?)
            }
            5 => bytes.split_off(..4).map(|_| None)?,
            _ => return None,
        };
        fields.push((tag >> 3, value));
    }
    Some(fields)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
