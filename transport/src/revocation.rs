//! Names that were sent away for good: whose certificates are refused, and who may not join.
//!
//! Kept in the state folder as a text file: a first line with format and version, then a line per
//! name: the name, the moment of its revocation in milliseconds since 1970, and `barred` or
//! `allowed`. Certificates carry their moment of issue, so a list of names is all that is needed.
//!
//! Invariants: a certificate of a revoked name that was issued at or before the revocation is never
//! good again; a name that is barred gets no other until that is undone.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use crate::{
    identity::{PeerCertificate, PeerIdentity, checked_name},
    messages::cluster::{REVOKED_MAX, Revoked},
    moment::{from_millis, millis, utc},
};

pub(crate) const REVOKED_FIRST_LINE: &str = "lite-llm revoked names 1";
/// Longest file of this kind, in bytes.
pub(crate) const REVOKED_BYTES_MAX: u64 = 1 << 20;
/// How often a coordinator looks whether its list has changed.
pub const REVOKED_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The names, each with what is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RevokedList {
    names: BTreeMap<String, Revoked>,
}

impl RevokedList {
    /// A list as it travels. Of a name that is there twice the stricter holds.
    pub(crate) fn new(names: Vec<Revoked>) -> Self {
        let mut list = Self::default();
        for revoked in names {
            let kept = list.names.entry(revoked.name.clone()).or_insert_with(|| revoked.clone());
            kept.until = kept.until.max(revoked.until);
            kept.barred |= revoked.barred;
        }
        list
    }

    pub(crate) fn to_vec(&self) -> Vec<Revoked> {
        self.names.values().cloned().collect()
    }

    /// Why this peer is refused, if it is.
    pub(crate) fn refuses(
        &self,
        peer: &PeerIdentity,
        certificate: &PeerCertificate,
    ) -> Option<String> {
        let revoked = self.names.get(&peer.name)?;
        (millis(certificate.issued) <= revoked.until).then(|| {
            let (name, at) = (&revoked.name, utc(from_millis(revoked.until)));
            let remedy = match revoked.barred {
                true => format!("`lite-llm revoke {name} --undo` would let it join anew"),
                false => "join anew".to_owned(),
            };
            format!("the certificate of {peer} was revoked at {at}; {remedy}")
        })
    }

    /// Why nobody may join under this name, if so.
    pub(crate) fn bars(&self, name: &str) -> Option<String> {
        let revoked = self.names.get(name).filter(|revoked| revoked.barred)?;
        let at = utc(from_millis(revoked.until));
        Some(format!(
            "{name} was revoked at {at}; take another name, or undo that where the coordinator is: \
             lite-llm revoke {name} --undo"
        ))
    }

    pub(crate) fn revoke(&mut self, name: &str, now: SystemTime) -> Result<(), String> {
        if self.names.len() >= REVOKED_MAX && !self.names.contains_key(name) {
            return Err(format!("{REVOKED_MAX} names are revoked already, and no more are kept"));
        }
        let until = millis(now).max(self.names.get(name).map_or(0, |revoked| revoked.until));
        let revoked = Revoked { name: name.to_owned(), until, barred: true };
        self.names.insert(name.to_owned(), revoked);
        Ok(())
    }

    pub(crate) fn undo(&mut self, name: &str) -> Result<(), String> {
        match self.names.get_mut(name) {
            Some(revoked) => {
                revoked.barred = false;
                Ok(())
            }
            None => Err(format!("{name} is not revoked")),
        }
    }

    pub(crate) fn to_text(&self) -> String {
        let mut text = format!("{REVOKED_FIRST_LINE}\n");
        for Revoked { name, until, barred } in self.names.values() {
            let word = if *barred { "barred" } else { "allowed" };
            text += &format!("{name} {until} {word} # at {}\n", utc(from_millis(*until)));
        }
        text
    }

    /// A missing file is an empty list.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self, String> {
        let Some(text) = text else { return Ok(Self::default()) };
        let mut lines = text.lines();
        if lines.next() != Some(REVOKED_FIRST_LINE) {
            return Err("its first line is another".to_owned());
        }
        let mut list = Vec::new();
        for (number, line) in (2..).zip(lines) {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            let revoked = match words[..] {
                [] => continue,
                [name, until, word @ ("barred" | "allowed")] => until
                    .parse()
                    .ok()
                    .filter(|_| checked_name(crate::identity::Role::Worker, name).is_ok())
                    .map(|until| Revoked {
                        name: name.to_owned(),
                        until,
                        barred: word == "barred",
                    }),
                _ => None,
            };
            list.push(revoked.ok_or_else(|| format!("line {number} names nobody"))?);
        }
        match list.len() {
            0..=REVOKED_MAX => Ok(Self::new(list)),
            more => Err(format!("it has {more} names; at most {REVOKED_MAX} are kept")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Role;

    fn refused(list: &RevokedList, name: &str, issued: SystemTime) -> bool {
        let peer = PeerIdentity { name: name.to_owned(), role: Role::Worker };
        list.refuses(&peer, &PeerCertificate { fingerprint: [0; 32], issued }).is_some()
    }

    #[test]
    fn what_was_issued_until_then_is_refused_for_ever_and_later_only_what_may_join() {
        let now = from_millis(millis(SystemTime::now()));
        let (before, after) = (now - Duration::from_millis(1), now + Duration::from_millis(1));
        let mut list = RevokedList::default();
        list.revoke("w1", now).unwrap();
        assert!(refused(&list, "w1", before) && refused(&list, "w1", now));
        assert!(!refused(&list, "w1", after) && !refused(&list, "w2", before));
        assert!(list.bars("w1").is_some() && list.bars("w2").is_none());
        list.undo("w1").unwrap();
        assert!(refused(&list, "w1", now) && list.bars("w1").is_none());
        // A clock that was set back takes nothing back.
        list.revoke("w1", before).unwrap();
        assert!(refused(&list, "w1", now) && list.bars("w1").is_some());
        assert!(list.undo("w2").unwrap_err().contains("w2 is not revoked"));
    }

    #[test]
    fn a_list_reads_back_and_is_bounded() {
        let mut list = RevokedList::default();
        assert_eq!(RevokedList::parse(None).unwrap(), list);
        for i in 0..REVOKED_MAX {
            list.revoke(&format!("w{i}"), SystemTime::now()).unwrap();
        }
        list.undo("w7").unwrap();
        assert!(list.revoke("w-more", SystemTime::now()).is_err());
        let text = list.to_text();
        assert!((text.len() as u64) < REVOKED_BYTES_MAX);
        assert_eq!(RevokedList::parse(Some(&text)).unwrap(), list);
        assert_eq!(RevokedList::new(list.to_vec()), list);
        for damaged in
            ["", "x", "lite-llm revoked names 1\nw1", "lite-llm revoked names 1\nW 1 barred"]
        {
            assert!(RevokedList::parse(Some(damaged)).is_err(), "{damaged}");
        }
    }
}
