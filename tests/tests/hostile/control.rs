//! The control plane as its bytes: ractor_cluster's protocol, spoken by somebody who need not mean it.

use lite_llm_transport::connection::{Connection, RawReceiver, RawSender, StreamKind};

use crate::cluster::soon;

/// Builds a protobuf message.
#[derive(Default, Clone)]
pub(crate) struct Proto(pub(crate) Vec<u8>);

impl Proto {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub(crate) fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    pub(crate) fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    pub(crate) fn part(self, field: u64, value: Self) -> Self {
        self.bytes(field, value.0)
    }
}

/// One field of a protobuf message.
#[derive(Debug, Clone)]
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message that an honest coordinator wrote.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (first, rest) = bytes.split_first().expect("a whole number");
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                break;
            }
        }
        value
    }
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let value = varint(&mut bytes);
        let field = match tag & 7 {
            0 => Field::Number(value),
            2 => {
                let (field, rest) = bytes.split_at(value as usize);
                bytes = rest;
                Field::Bytes(field)
            }
            other => panic!("the coordinator uses wire type {other}"),
        };
        fields.push((tag >> 3, field));
    }
    fields
}

fn part(bytes: &[u8], wanted: u64) -> Option<&[u8]> {
    fields(bytes).into_iter().find_map(|(number, field)| match field {
        Field::Bytes(bytes) if number == wanted => Some(bytes),
        _ => None,
    })
}

fn number(bytes: &[u8], wanted: u64) -> u64 {
    let found = fields(bytes).into_iter().find_map(|(number, field)| match field {
        Field::Number(value) if number == wanted => Some(value),
        _ => None,
    });
    found.unwrap_or(0)
}

/// A question of the coordinator.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) to: u64,
    pub(crate) tag: u64,
    pub(crate) variant: String,
}

/// What the coordinator says.
#[derive(Debug)]
pub(crate) enum Said {
    Call(Call),
    /// Names of the sessions that it has with others.
    Sessions(Vec<String>),
    Other,
}

/// A session of the control plane that knows the cluster's cookie, as every worker does.
pub(crate) struct Control {
    sender: RawSender,
    receiver: RawReceiver,
}

/// Kinds of control messages.
const SPAWN: u64 = 1;
const TERMINATE: u64 = 2;
const PG_JOIN: u64 = 5;
const ENUMERATE: u64 = 7;
const READY: u64 = 9;

impl Control {
    /// A stream on which nothing was said.
    pub(crate) async fn silent(connection: &Connection) -> Option<Self> {
        let opening = soon("a control stream", connection.open_raw(StreamKind::Control)).await;
        let (sender, receiver) = opening.ok()?;
        Some(Self { sender, receiver })
    }

    /// A session under this name, or nothing if the coordinator wants none.
    pub(crate) async fn open(
        connection: &Connection,
        cookie: &str,
        name: &str,
        id: u64,
    ) -> Option<Self> {
        let mut control = Self::silent(connection).await?;
        let flags = Proto::default().number(1, 1);
        let introduced =
            Proto::default().bytes(1, name).part(2, flags).bytes(3, name).number(4, id);
        control.auth(1, introduced).await;
        let challenge = loop {
            let bytes = control.frame().await?;
            let Some(auth) = part(&bytes, 1) else { continue };
            if let Some(challenge) = part(auth, 4) {
                break number(challenge, 3) as u32;
            }
        };
        let proof = sha256(&[&challenge.to_be_bytes(), cookie.as_bytes()].concat());
        control.auth(5, Proto::default().number(1, 7).bytes(2, proof)).await;
        loop {
            let bytes = control.frame().await?;
            if part(&bytes, 1).is_some_and(|auth| part(auth, 6).is_some()) {
                return Some(control);
            }
        }
    }

    async fn auth(&mut self, field: u64, message: Proto) {
        let auth = Proto::default().part(field, message);
        self.send(&Proto::default().part(1, auth).0).await;
    }

    /// Bytes as they are.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> bool {
        self.sender.write_all(bytes).await.is_ok()
    }

    /// One message. Whether it was taken is of no interest.
    pub(crate) async fn send(&mut self, message: &[u8]) {
        let bytes = [&(message.len() as u64).to_be_bytes()[..], message].concat();
        soon("a control message is taken", self.write(&bytes)).await;
    }

    pub(crate) async fn control(&mut self, field: u64, message: Proto) {
        self.send(&control(field, message)).await;
    }

    /// Shows actors as nodes of the cluster.
    pub(crate) async fn show(&mut self, scope: &str, actors: impl IntoIterator<Item = u64>) {
        self.control(PG_JOIN, group(scope, actors)).await;
        self.control(READY, Proto::default()).await;
    }

    pub(crate) async fn terminate(&mut self, actors: impl IntoIterator<Item = u64>) {
        let all = actors.into_iter();
        self.control(TERMINATE, all.fold(Proto::default(), |all, pid| all.number(1, pid))).await;
    }

    pub(crate) async fn enumerate(&mut self) {
        self.control(ENUMERATE, Proto::default().bytes(1, "nobody").bytes(3, "nowhere")).await;
    }

    pub(crate) async fn answer(&mut self, call: &Call, answer: impl AsRef<[u8]>) {
        self.send(&reply(call.to, call.tag, answer)).await;
    }

    async fn frame(&mut self) -> Option<Vec<u8>> {
        let mut len = [0; 8];
        self.receiver.read_exact(&mut len).await.ok()?;
        let mut bytes = vec![0; u64::from_be_bytes(len) as usize];
        self.receiver.read_exact(&mut bytes).await.ok()?;
        Some(bytes)
    }

    /// What comes next, or nothing when the session has ended.
    pub(crate) async fn next(&mut self) -> Option<Said> {
        let bytes = self.frame().await?;
        if let Some(call) = part(&bytes, 2).and_then(|node| part(node, 2)) {
            let variant = part(call, 5).unwrap_or_default();
            return Some(Said::Call(Call {
                to: number(call, 1),
                tag: number(call, 3),
                variant: String::from_utf8_lossy(variant).into_owned(),
            }));
        }
        if let Some(sessions) = part(&bytes, 3).and_then(|control| part(control, 8)) {
            let names = fields(sessions).into_iter().filter_map(|(_, field)| match field {
                Field::Bytes(name) => part(name, 1),
                Field::Number(_) => None,
            });
            let names = names.map(|name| String::from_utf8_lossy(name).into_owned());
            return Some(Said::Sessions(names.collect()));
        }
        Some(Said::Other)
    }
}

fn control(field: u64, message: Proto) -> Vec<u8> {
    Proto::default().part(3, Proto::default().part(field, message)).0
}

fn group(scope: &str, actors: impl IntoIterator<Item = u64>) -> Proto {
    let group = Proto::default().bytes(1, lite_llm_actors::node::NODES);
    let all = actors.into_iter();
    all.fold(group, |group, pid| group.part(2, Proto::default().number(1, pid))).bytes(3, scope)
}

fn reply(to: u64, tag: u64, answer: impl AsRef<[u8]>) -> Vec<u8> {
    let reply = Proto::default().number(1, to).number(2, tag).bytes(3, answer);
    Proto::default().part(2, Proto::default().part(3, reply)).0
}

/// One of every message that a member may send, and of some that it may not: with actors, tags and
/// names that nobody knows.
pub(crate) fn messages(scope: &str) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for pid in [0, 1, 2, 3, 5, 8, 13, 21, 34, u64::from(u32::MAX), u64::MAX] {
        let actor = || Proto::default().number(1, pid);
        // Replies that nobody asked for.
        all.extend([0, 1, 2, u64::MAX].map(|tag| reply(pid, tag, [0xff; 64])));
        for variant in ["Dismiss", "Vitals", "Load", "Ended", ""] {
            let message = actor().bytes(2, [0xff; 40]).bytes(5, variant);
            all.push(Proto::default().part(2, Proto::default().part(1, message)).0);
            let call = actor().bytes(2, [0; 8]).number(3, pid).number(4, pid).bytes(5, variant);
            all.push(Proto::default().part(2, Proto::default().part(2, call)).0);
        }
        all.push(control(SPAWN, Proto::default().part(1, actor().bytes(2, "a name"))));
        all.push(control(TERMINATE, Proto::default().number(1, pid)));
        for group in [PG_JOIN, PG_JOIN + 1] {
            let in_group = |name: &str, scope: &str| {
                control(group, Proto::default().bytes(1, name).part(2, actor()).bytes(3, scope))
            };
            let long = "x".repeat(1 << 20);
            all.extend([
                in_group("", ""),
                in_group("__world__", "__all__"),
                in_group(&long, scope),
            ]);
            all.push(in_group(lite_llm_actors::node::NODES, scope));
        }
        let time = Proto::default().number(1, pid).number(2, pid);
        all.extend([3, 4].map(|ping| control(ping, Proto::default().part(1, time.clone()))));
    }
    let session = Proto::default().bytes(1, "worker honest").bytes(3, "127.0.0.1:1");
    all.push(control(8, Proto::default().part(1, session)));
    all.extend([
        control(READY, Proto::default()),
        control(10, Proto::default()),
        vec![],
        vec![0xff],
    ]);
    all
}

/// FIPS 180-4: the proof of the control plane's cookie.
fn sha256(message: &[u8]) -> [u8; 32] {
    // The first 32 bits of the fractional parts of square and cube roots of primes.
    let primes = (2u64..).filter(|n| (2..*n).all(|d| n % d != 0)).take(64);
    let root = |value: u128| {
        let mut root = (value as f64).sqrt() as u128;
        while root * root > value {
            root -= 1;
        }
        while (root + 1) * (root + 1) <= value {
            root += 1;
        }
        root
    };
    let cube_root = |value: u128| {
        let (mut low, mut high) = (0u128, 1 << 40);
        while low + 1 < high {
            let middle = (low + high) / 2;
            if middle * middle * middle <= value { low = middle } else { high = middle }
        }
        low
    };
    let primes: Vec<u128> = primes.map(u128::from).collect();
    let k: Vec<u32> = primes.iter().map(|p| cube_root(p << 96) as u32).collect();
    let mut h: Vec<u32> = primes[..8].iter().map(|p| root(p << 64) as u32).collect();
    let mut padded = message.to_vec();
    padded.push(0x80);
    padded.resize((padded.len() + 8).next_multiple_of(64) - 8, 0);
    padded.extend((8 * message.len() as u64).to_be_bytes());
    for block in padded.chunks_exact(64) {
        let word = |four: &[u8]| u32::from_be_bytes([four[0], four[1], four[2], four[3]]);
        let mut w: Vec<u32> = block.chunks_exact(4).map(word).collect();
        for t in 16..64 {
            let (a, b) = (w[t - 15], w[t - 2]);
            let s0 = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
            let s1 = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
            w.push(w[t - 16].wrapping_add(s0).wrapping_add(w[t - 7]).wrapping_add(s1));
        }
        let mut v = h.clone();
        for (k, w) in k.iter().zip(&w) {
            let s1 = v[4].rotate_right(6) ^ v[4].rotate_right(11) ^ v[4].rotate_right(25);
            let choice = (v[4] & v[5]) ^ (!v[4] & v[6]);
            let one = [s1, choice, *k, *w].into_iter().fold(v[7], u32::wrapping_add);
            let s0 = v[0].rotate_right(2) ^ v[0].rotate_right(13) ^ v[0].rotate_right(22);
            let two = s0.wrapping_add((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            v.rotate_right(1);
            v[4] = v[4].wrapping_add(one);
            v[0] = one.wrapping_add(two);
        }
        h.iter_mut().zip(v).for_each(|(h, v)| *h = h.wrapping_add(v));
    }
    let mut digest = [0; 32];
    digest.chunks_exact_mut(4).zip(h).for_each(|(four, h)| four.copy_from_slice(&h.to_be_bytes()));
    digest
}

#[test]
fn the_proof_is_the_one_of_the_standard() {
    let hex: String = sha256(b"abc").iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}
