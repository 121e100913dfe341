//! Who of those who have proven nothing may stay, and who must make room: a pure machine.
//!
//! A stranger passes two rooms: in the first it does TLS, in the second it proves the secret of a
//! token. Whoever shows a certificate of the cluster goes from the first room straight
//! to the members, whose places no stranger can take.
//!
//! Invariants: a room holds at most so many, and at most so many of one source (an IPv4 address, or
//! the /64 of an IPv6 one); while a room is full, a newcomer takes the place of whoever has been
//! there longest, of the source that has the most, once that one has had [`STAY_MIN`]: those who
//! sit and say nothing keep nobody out. The last places of the handshakes are for addresses from
//! which nodes came lately. Whoever is sent away is told when to come again, each a bit later than
//! the one before, so that a crowd comes back as a queue.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use crate::identity::Role;

/// Connections of members: of nodes and clients together.
pub const CONNECTIONS_MAX: usize = 1024;
/// How many of these clients cannot take.
pub const NODES_RESERVE: usize = 256;
/// TLS handshakes at the same time.
pub const HANDSHAKES_MAX: usize = 128;
/// How many of these are for addresses from which nodes came lately.
pub const HANDSHAKES_RESERVE: usize = 32;
/// Joiners at the same time that have proven nothing yet.
pub const JOINS_MAX: usize = 128;
/// How many of either may come from one source.
pub const PER_SOURCE_MAX: usize = 64;
/// How long a stranger may stay in a full room: a few round trips.
pub const STAY_MIN: Duration = Duration::from_millis(250);
/// The longest time that somebody who is sent away is asked to wait.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(2);

/// The shortest such time.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(50);
/// How long it takes to serve one, so that the next is asked to come this much later.
const SERVICE_TIME: Duration = Duration::from_millis(10);
/// Addresses of nodes that are remembered.
const KNOWN_MAX: usize = 256;

/// Where somebody comes from, as far as addresses can be had at will: an IPv6 host has a /64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Source(IpAddr);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                Self(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into())
            }
            address => Self(address),
        }
    }
}

/// The right to be here; it is given back with [`Door::leave`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Ticket(u64);

/// Where strangers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// Doing TLS.
    Handshake,
    /// Proving a token's secret.
    Join,
}

/// Somebody is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entered {
    pub(crate) ticket: Ticket,
    /// Whoever has to go for it, and when that one may come again.
    pub(crate) evicted: Option<(Ticket, Duration)>,
}

/// There is no place; one may come again after this time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Busy {
    pub(crate) retry_after: Duration,
}

#[derive(Debug)]
struct Guest {
    room: Room,
    source: Source,
    since: Instant,
}

/// The machine.
#[derive(Debug, Default)]
pub(crate) struct Door {
    next: u64,
    /// Strangers.
    guests: HashMap<Ticket, Guest>,
    members: HashMap<Ticket, Role>,
    /// Where nodes came from, the latest first.
    known: VecDeque<Source>,
    /// When the last one that was sent away will have been served.
    queue_end: Option<Instant>,
}

impl Door {
    /// Whether strangers should prove that they receive what is sent to their address.
    pub(crate) fn is_crowded(&self) -> bool {
        self.in_room(Room::Handshake).count() >= HANDSHAKES_MAX / 4
    }

    /// A stranger wants to enter a room.
    pub(crate) fn enter(
        &mut self,
        now: Instant,
        room: Room,
        address: IpAddr,
    ) -> Result<Entered, Busy> {
        let source = Source::from(address);
        let places = match room {
            Room::Handshake if self.known.contains(&source) => HANDSHAKES_MAX,
            Room::Handshake => HANDSHAKES_MAX - HANDSHAKES_RESERVE,
            Room::Join => JOINS_MAX,
        };
        let mut of_source: HashMap<Source, usize> = HashMap::new();
        let mut taken = 0;
        for (_, guest) in self.in_room(room) {
            *of_source.entry(guest.source).or_default() += 1;
            taken += 1;
        }
        let ours = of_source.get(&source).copied().unwrap_or(0);
        let crowd = if ours >= PER_SOURCE_MAX {
            ours
        } else if taken >= places {
            of_source.values().copied().max().unwrap_or(0)
        } else {
            return Ok(self.admit(now, room, source, None));
        };
        let goes = |guest: &Guest| match ours >= PER_SOURCE_MAX {
            true => guest.source == source,
            false => of_source.get(&guest.source) == Some(&crowd),
        };
        let oldest = self.in_room(room).filter(|(_, guest)| goes(guest));
        let oldest = oldest.min_by_key(|(ticket, guest)| (guest.since, ticket.0));
        let oldest = oldest.map(|(ticket, guest)| (*ticket, guest.since));
        match oldest {
            Some((ticket, since)) if now.saturating_duration_since(since) >= STAY_MIN => {
                self.guests.remove(&ticket);
                let Busy { retry_after } = self.busy(now);
                Ok(self.admit(now, room, source, Some((ticket, retry_after))))
            }
            _ => Err(self.busy(now)),
        }
    }

    /// Somebody showed a certificate of the cluster.
    pub(crate) fn enter_member(
        &mut self,
        now: Instant,
        role: Role,
        address: IpAddr,
    ) -> Result<Ticket, Busy> {
        let places = match role {
            Role::Client => CONNECTIONS_MAX - NODES_RESERVE,
            Role::Worker | Role::Coordinator => CONNECTIONS_MAX,
        };
        if self.members.len() >= places {
            return Err(self.busy(now));
        }
        if role != Role::Client {
            let source = Source::from(address);
            self.known.retain(|known| *known != source);
            self.known.push_front(source);
            self.known.truncate(KNOWN_MAX);
        }
        let ticket = self.ticket();
        self.members.insert(ticket, role);
        Ok(ticket)
    }

    /// Somebody left, or went on to another room.
    pub(crate) fn leave(&mut self, ticket: Ticket) {
        self.guests.remove(&ticket);
        self.members.remove(&ticket);
    }

    /// Somebody has to come again: when.
    pub(crate) fn busy(&mut self, now: Instant) -> Busy {
        let turn = self.queue_end.map_or(now, |end| end.clamp(now, now + RETRY_AFTER_MAX));
        self.queue_end = Some(turn + SERVICE_TIME);
        Busy { retry_after: (turn - now + RETRY_AFTER_MIN).min(RETRY_AFTER_MAX) }
    }

    fn in_room(&self, room: Room) -> impl Iterator<Item = (&Ticket, &Guest)> {
        self.guests.iter().filter(move |(_, guest)| guest.room == room)
    }

    fn admit(
        &mut self,
        now: Instant,
        room: Room,
        source: Source,
        evicted: Option<(Ticket, Duration)>,
    ) -> Entered {
        let ticket = self.ticket();
        self.guests.insert(ticket, Guest { room, source, since: now });
        Entered { ticket, evicted }
    }

    fn ticket(&mut self) -> Ticket {
        self.next += 1;
        Ticket(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(last: u16) -> IpAddr {
        IpAddr::from([10, 0, (last >> 8) as u8, last as u8])
    }

    fn v6(host: u16, interface: u16) -> IpAddr {
        IpAddr::from([0x2001, 0xdb8, 0, host, 0, 0, 0, interface])
    }

    /// Fills a room from these addresses until it takes nobody without sending one away.
    fn fill(door: &mut Door, now: Instant, room: Room, addresses: &[IpAddr]) -> usize {
        let mut entered = 0;
        for address in addresses.iter().cycle().take(1000) {
            entered += usize::from(door.enter(now, room, *address).is_ok());
        }
        entered
    }

    #[test]
    fn one_source_gets_its_share_and_others_come_in() {
        let now = Instant::now();
        for addresses in [vec![v4(1)], (0..100).map(|i| v6(1, i)).collect()] {
            let mut door = Door::default();
            assert_eq!(fill(&mut door, now, Room::Join, &addresses), PER_SOURCE_MAX);
            let other = door.enter(now, Room::Join, v4(2)).unwrap();
            assert_eq!(other.evicted, None, "another source has its own share");
            assert!(door.enter(now, Room::Join, v6(2, 1)).is_ok());
        }
        // An IPv4 address is one however it is written.
        let mapped = IpAddr::V6("::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(Source::from(mapped), Source::from(v4(1)));
    }

    #[test]
    fn the_silent_make_room_for_newcomers_of_their_own_source() {
        let start = Instant::now();
        let mut door = Door::default();
        assert_eq!(fill(&mut door, start, Room::Join, &[v4(1)]), PER_SOURCE_MAX);
        assert!(door.enter(start + STAY_MIN / 2, Room::Join, v4(1)).is_err());
        let mut sent = Vec::new();
        for _ in 0..PER_SOURCE_MAX {
            let entered = door.enter(start + STAY_MIN, Room::Join, v4(1)).unwrap();
            let (ticket, retry_after) = entered.evicted.unwrap();
            assert!(retry_after >= RETRY_AFTER_MIN);
            sent.push(ticket.0);
        }
        assert!(sent.is_sorted(), "whoever came first goes first");
        assert!(door.enter(start + STAY_MIN, Room::Join, v4(1)).is_err(), "all are new now");
    }

    #[test]
    fn in_a_full_room_the_source_with_the_most_makes_room() {
        let start = Instant::now();
        let mut door = Door::default();
        fill(&mut door, start, Room::Join, &[v4(1)]);
        let few: Vec<_> = (2..1000).map(v4).collect();
        assert_eq!(fill(&mut door, start, Room::Join, &few), JOINS_MAX - PER_SOURCE_MAX);
        let later = start + STAY_MIN;
        let entered = door.enter(later, Room::Join, v4(5000)).unwrap();
        let (evicted, _) = entered.evicted.unwrap();
        assert!(evicted.0 <= PER_SOURCE_MAX as u64, "one of the many of one source");
        // Of two sources with their full shares each makes room for its own.
        let mut door = Door::default();
        fill(&mut door, start, Room::Join, &[v4(1)]);
        fill(&mut door, start, Room::Join, &[v4(2)]);
        let (evicted, _) = door.enter(later, Room::Join, v4(2)).unwrap().evicted.unwrap();
        assert!(evicted.0 > PER_SOURCE_MAX as u64, "one of its own");
    }

    #[test]
    fn joiners_take_no_place_of_handshakes_and_strangers_none_of_known_nodes() {
        let now = Instant::now();
        let mut door = Door::default();
        let crowd: Vec<_> = (100..1000).map(v4).collect();
        assert_eq!(fill(&mut door, now, Room::Join, &crowd), JOINS_MAX);
        let strangers = HANDSHAKES_MAX - HANDSHAKES_RESERVE;
        door.enter_member(now, Role::Worker, v4(1)).unwrap();
        assert_eq!(fill(&mut door, now, Room::Handshake, &crowd), strangers);
        assert!(door.is_crowded());
        let entered = door.enter(now, Room::Handshake, v4(1)).unwrap();
        assert_eq!(entered.evicted, None);
        // A client's address is no node's.
        door.enter_member(now, Role::Client, v4(2)).unwrap();
        assert!(door.enter(now, Room::Handshake, v4(2)).is_err());
    }

    #[test]
    fn clients_leave_places_for_nodes_and_whoever_leaves_makes_room() {
        let now = Instant::now();
        let mut door = Door::default();
        let clients = CONNECTIONS_MAX - NODES_RESERVE;
        let tickets: Vec<_> =
            (0..clients).map(|_| door.enter_member(now, Role::Client, v4(1)).unwrap()).collect();
        assert!(door.enter_member(now, Role::Client, v4(2)).is_err());
        for _ in 0..NODES_RESERVE {
            door.enter_member(now, Role::Worker, v4(3)).unwrap();
        }
        assert!(door.enter_member(now, Role::Worker, v4(3)).is_err());
        tickets.into_iter().for_each(|ticket| door.leave(ticket));
        assert!(door.enter_member(now, Role::Client, v4(2)).is_ok());
    }

    #[test]
    fn a_crowd_is_told_to_come_back_as_a_queue_within_a_bound() {
        let now = Instant::now();
        let mut door = Door::default();
        let delays: Vec<_> = (0..1000).map(|_| door.busy(now).retry_after).collect();
        assert!(delays.is_sorted());
        assert_eq!(delays[0], RETRY_AFTER_MIN);
        assert_eq!(delays[100] - delays[0], 100 * SERVICE_TIME);
        assert_eq!(delays[999], RETRY_AFTER_MAX);
        let later = now + 2 * RETRY_AFTER_MAX;
        assert_eq!(door.busy(later).retry_after, RETRY_AFTER_MIN, "the queue is served");
    }
}
