//! What tokens are proven with: a secret per role, each with a number, a beginning and an end.
//!
//! A small text file in the state folder: a first line with format and version, the secret that
//! workers share among themselves, and a line per secret, newest first within a role. The one that
//! workers share is no token's: it is handed out at joining, and outlives every rotation.
//!
//! Invariants: the role of a joiner is decided by which secret it proves, by nothing that it says;
//! a role has one current secret, and older ones only until their grace is over.

use std::time::{Duration, SystemTime};

use crate::{
    identity::Role,
    messages::trace::{hex, hex_into},
    moment::{from_seconds, seconds, utc},
    random,
};

/// How long a token lets others join, unless told otherwise.
pub const TOKEN_VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);
/// Secrets of a role that are kept: the current one, and those whose grace is not over.
const PER_ROLE_MAX: usize = 8;

pub(crate) const SECRETS_FIRST_LINE: &str = "lite-llm join secrets 1";

/// The number by which a token names its secret.
pub(crate) type SecretId = [u8; 8];

/// The secret of a token.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct JoinSecret {
    pub(crate) id: SecretId,
    pub(crate) role: Role,
    pub(crate) secret: [u8; 32],
    pub(crate) issued: SystemTime,
    pub(crate) expires: SystemTime,
}

impl JoinSecret {
    fn new(role: Role, now: SystemTime, validity: Duration) -> Result<Self, String> {
        let (mut id, mut secret) = ([0; 8], [0; 32]);
        random::fill(&mut id)?;
        random::fill(&mut secret)?;
        // To the second, as it is written.
        let issued = from_seconds(seconds(now));
        let expires = issued.checked_add(validity);
        let expires = expires.filter(|end| *end <= from_seconds(u64::MAX));
        let expires = expires.ok_or("it would expire after the year 9999")?;
        Ok(Self { id, role, secret, issued, expires })
    }

    /// Whether it lets nobody join any more.
    pub(crate) fn has_expired(&self, now: SystemTime) -> bool {
        now >= self.expires
    }
}

/// All of a cluster's.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct JoinSecrets {
    /// What workers share among themselves and with the coordinator.
    pub(crate) shared: [u8; 32],
    secrets: Vec<JoinSecret>,
}

impl JoinSecrets {
    pub(crate) fn new(now: SystemTime) -> Result<Self, String> {
        let mut shared = [0; 32];
        random::fill(&mut shared)?;
        let secret = |role| JoinSecret::new(role, now, TOKEN_VALIDITY);
        Ok(Self { shared, secrets: vec![secret(Role::Client)?, secret(Role::Worker)?] })
    }

    /// The secret of this number.
    pub(crate) fn find(&self, id: &SecretId) -> Option<&JoinSecret> {
        self.secrets.iter().find(|secret| secret.id == *id)
    }

    /// The secret that tokens of a role are made with now.
    pub(crate) fn current(&self, role: Role) -> Option<&JoinSecret> {
        self.secrets.iter().find(|secret| secret.role == role)
    }

    /// Gives a role a new secret. The old ones go on for `grace`, if they live so long.
    pub(crate) fn rotate(
        &mut self,
        role: Role,
        now: SystemTime,
        validity: Duration,
        grace: Duration,
    ) -> Result<(), String> {
        let new = JoinSecret::new(role, now, validity)?;
        let end = now.checked_add(grace).ok_or("the grace is too long")?;
        for secret in self.secrets.iter_mut().filter(|secret| secret.role == role) {
            secret.expires = secret.expires.min(from_seconds(seconds(end)));
        }
        self.secrets.retain(|secret| secret.role != role || !secret.has_expired(now));
        self.secrets.insert(0, new);
        let mut kept = 0;
        self.secrets.retain(|secret| {
            kept += usize::from(secret.role == role);
            secret.role != role || kept <= PER_ROLE_MAX
        });
        Ok(())
    }

    pub(crate) fn to_text(&self) -> String {
        let shared = hex(&self.shared);
        let mut text = format!("{SECRETS_FIRST_LINE}\nshared {shared}\n");
        for secret in &self.secrets {
            let (id, role, digits) = (hex(&secret.id), secret.role, hex(&secret.secret));
            let (issued, expires) = (seconds(secret.issued), seconds(secret.expires));
            let until = utc(secret.expires);
            text += &format!("{role} {id} {digits} {issued} {expires} # until {until}\n");
        }
        text
    }

    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        if first != SECRETS_FIRST_LINE {
            return Err(format!("its first line is {:?}", cut(first)));
        }
        let mut shared = [0; 32];
        let digits = lines.next().and_then(|line| line.strip_prefix("shared "));
        digits
            .and_then(|digits| hex_into(digits, &mut shared))
            .ok_or("its second line is not `shared` and 64 hex digits")?;
        let mut secrets = Vec::new();
        for (number, line) in (3..).zip(lines) {
            let wrong = || format!("line {number} is no secret");
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            let [role, id_digits, digits, issued, expires] = words[..] else {
                return Err(wrong());
            };
            let (mut id, mut secret) = ([0; 8], [0; 32]);
            hex_into(id_digits, &mut id).ok_or_else(wrong)?;
            hex_into(digits, &mut secret).ok_or_else(wrong)?;
            let role = Role::from_name(role).filter(|role| *role != Role::Coordinator);
            let role = role.ok_or_else(wrong)?;
            let moment = |text: &str| text.parse().map(from_seconds).map_err(|_| wrong());
            let (issued, expires) = (moment(issued)?, moment(expires)?);
            secrets.push(JoinSecret { id, role, secret, issued, expires });
        }
        let secrets = Self { shared, secrets };
        for role in [Role::Client, Role::Worker] {
            if secrets.current(role).is_none() {
                return Err(format!("it has no secret for a {role}"));
            }
        }
        Ok(secrets)
    }
}

/// The beginning of a text that is not what it should be.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn a_rotation_ends_the_old_secret_at_once_or_after_its_grace() {
        let now = SystemTime::now();
        let mut secrets = JoinSecrets::new(now).unwrap();
        let (client, worker) = (Role::Client, Role::Worker);
        let first = secrets.current(worker).unwrap().clone();
        let others = secrets.current(client).unwrap().clone();
        let shared = secrets.shared;
        secrets.rotate(worker, now, 30 * DAY, DAY).unwrap();
        let second = secrets.current(worker).unwrap().clone();
        assert_ne!((second.id, second.secret), (first.id, first.secret));
        let graced = secrets.find(&first.id).unwrap();
        assert!(!graced.has_expired(now) && graced.has_expired(now + DAY));
        assert!(!second.has_expired(now + 29 * DAY) && second.has_expired(now + 30 * DAY));
        secrets.rotate(worker, now, 30 * DAY, Duration::ZERO).unwrap();
        assert!(secrets.find(&first.id).is_none() && secrets.find(&second.id).is_none());
        assert!(secrets.current(client) == Some(&others) && secrets.shared == shared);
        assert!(secrets.rotate(worker, now, Duration::MAX, DAY).is_err());
    }

    #[test]
    fn secrets_read_back_and_damage_is_an_error() {
        let mut secrets = JoinSecrets::new(SystemTime::now()).unwrap();
        for _ in 0..20 {
            secrets.rotate(Role::Worker, SystemTime::now(), DAY, DAY).unwrap();
        }
        let text = secrets.to_text();
        assert_eq!(text.lines().count(), 3 + PER_ROLE_MAX);
        assert!(JoinSecrets::parse(&text).unwrap() == secrets);
        let lines: Vec<&str> = text.lines().collect();
        for len in 0..3 {
            assert!(JoinSecrets::parse(&lines[..len].join("\n")).is_err());
        }
        for damaged in [
            text.replace("secrets 1", "secrets 9"),
            text.replace("worker", "coordinator"),
            text.replace("client", "worker"),
            text.replace("shared ", "shared x"),
            text.replace(" # until", " 7 # until"),
        ] {
            assert!(JoinSecrets::parse(&damaged).is_err(), "{damaged}");
        }
    }
}
