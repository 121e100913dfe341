//! Keys of the HTTP API: who may ask, and how much. Only their hashes are kept.
//!
//! A text file in the state folder: a first line with format and version, then a line per key: its
//! name, the blake3 hash of its text, the moment it was made in milliseconds since 1970, its limits,
//! `-` where there is none, and the highest priority that it may ask for, if that is not 0. A coordinator reads the file again when it has changed.
//!
//! Invariants: the text of a key is told once, when it is made; it holds 256 random bits, so that its
//! hash gives nothing away and cannot be searched for; a name has one key.

use std::{collections::HashMap, path::Path, time::SystemTime};

use crate::{
    identity::{Role, checked_name},
    messages::trace::{hex, hex_into},
    moment::{from_millis, millis, utc},
    random,
    state::{KEYS_FILE, Source, StateDir, StateError, Watched},
};

const FIRST_LINE: &str = "lite-llm keys 1";
/// Longest file of this kind, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most keys of a coordinator.
pub const KEYS_MAX: usize = 10_000;
/// What every key begins with, so that people and scanners know one when they see it.
pub const KEY_PREFIX: &str = "lite-llm-";

/// A key, without its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Whose it is.
    pub name: String,
    hash: [u8; 32],
    /// When it was made.
    pub made: SystemTime,
    /// Jobs that it may have at a time, if that is bounded.
    pub jobs: Option<u32>,
    /// Tokens of prompts and answers per minute, if they are bounded.
    pub tokens_per_minute: Option<u64>,
    /// The highest priority that its requests may have.
    pub priority: i8,
}

/// What a key allows its holder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyRights {
    /// See [`Key::jobs`].
    pub jobs: Option<u32>,
    /// See [`Key::tokens_per_minute`].
    pub tokens_per_minute: Option<u64>,
    /// See [`Key::priority`].
    pub priority: i8,
}

/// Why a list of keys cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was asked for.
    #[error("{0}")]
    Change(String),
}

#[derive(Debug, Clone, Default)]
struct List {
    keys: Vec<Key>,
    by_hash: HashMap<[u8; 32], usize>,
}

/// The keys of a state folder.
pub struct Keys {
    state: StateDir,
    list: Watched<List>,
}

impl Keys {
    /// Opens the list of a state folder; without a file it is empty.
    pub fn open(state: &Path) -> Result<Self, KeyError> {
        let state = StateDir::open_or_create(state)?;
        let list = Watched::open(Source {
            path: state.file(KEYS_FILE),
            bytes_max: FILE_BYTES_MAX,
            parse: List::parse,
            without: "there are no keys, and none is asked for",
        })?;
        Ok(Self { state, list })
    }

    /// Makes a key of a name, and returns its text, which nobody can tell again.
    pub fn add(&self, name: &str, rights: KeyRights) -> Result<String, KeyError> {
        let KeyRights { jobs, tokens_per_minute, priority } = rights;
        let checked = checked_name(Role::Client, name);
        checked.map_err(|error| KeyError::Change(error.to_string()))?;
        let mut secret = [0; 32];
        random::fill(&mut secret).map_err(KeyError::Change)?;
        let text = format!("{KEY_PREFIX}{}", hex(&secret));
        let made = from_millis(millis(SystemTime::now()));
        let hash = hash(&text);
        let key = Key { name: name.to_owned(), hash, made, jobs, tokens_per_minute, priority };
        self.change(|keys| {
            if keys.iter().any(|key| key.name == name) {
                return Err(format!(
                    "{name} has a key; revoke it first (lite-llm key revoke {name}), or take \
                     another name"
                ));
            }
            if keys.len() >= KEYS_MAX {
                return Err(format!("there are {KEYS_MAX} keys already, and no more are kept"));
            }
            keys.push(key);
            Ok(())
        })?;
        Ok(text)
    }

    /// Ends the key of a name, at once.
    pub fn revoke(&self, name: &str) -> Result<(), KeyError> {
        self.change(|keys| {
            let before = keys.len();
            keys.retain(|key| key.name != name);
            match keys.len() < before {
                true => Ok(()),
                false => Err(format!("no key is named {name}; `lite-llm key list` names them")),
            }
        })
    }

    /// All keys, by their names.
    pub fn all(&self) -> Result<Vec<Key>, KeyError> {
        let mut keys = self.list.now()?.keys.clone();
        keys.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(keys)
    }

    /// Whether there is none, so that nobody is asked for one.
    pub fn is_empty(&self) -> Result<bool, KeyError> {
        Ok(self.list.now()?.keys.is_empty())
    }

    /// The key whose text this is.
    pub fn find(&self, text: &str) -> Result<Option<Key>, KeyError> {
        let list = self.list.now()?;
        // What is compared are hashes of what only its owner can choose: how long it takes tells
        // nothing of the text.
        Ok(list.by_hash.get(&hash(text)).and_then(|at| list.keys.get(*at)).cloned())
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Vec<Key>) -> Result<(), String>,
    ) -> Result<(), KeyError> {
        let _lock = self.state.lock_edits()?;
        let mut keys = self.list.now()?.keys.clone();
        change(&mut keys).map_err(KeyError::Change)?;
        let list = List::new(keys);
        let text = list.to_text();
        Ok(self.list.replace(list, &text)?)
    }
}

fn hash(text: &str) -> [u8; 32] {
    *blake3::hash(text.as_bytes()).as_bytes()
}

impl List {
    fn new(keys: Vec<Key>) -> Self {
        let by_hash = keys.iter().enumerate().map(|(at, key)| (key.hash, at)).collect();
        Self { keys, by_hash }
    }

    fn to_text(&self) -> String {
        let mut text = format!("{FIRST_LINE}\n");
        for Key { name, hash, made, jobs, tokens_per_minute, priority } in &self.keys {
            let jobs = jobs.map_or("-".to_owned(), |jobs| jobs.to_string());
            let tokens = tokens_per_minute.map_or("-".to_owned(), |tokens| tokens.to_string());
            let (hash, at) = (hex(hash), utc(*made));
            // Releases before knew of none, and read a list without.
            let priority = match priority {
                0 => String::new(),
                priority => format!(" {priority}"),
            };
            let made = millis(*made);
            text += &format!("{name} {hash} {made} {jobs} {tokens}{priority} # made at {at}\n");
        }
        text
    }

    /// A missing file is an empty list.
    fn parse(text: Option<&str>) -> Result<Self, String> {
        let Some(text) = text else { return Ok(Self::default()) };
        let mut lines = text.lines();
        if lines.next() != Some(FIRST_LINE) {
            return Err("its first line is another".to_owned());
        }
        let mut keys: Vec<Key> = Vec::new();
        for (number, line) in (2..).zip(lines) {
            let words: Vec<&str> =
                line.split('#').next().unwrap_or_default().split_whitespace().collect();
            let key = match words[..] {
                [] => continue,
                [name, hash, made, jobs, tokens] => key(name, hash, made, jobs, tokens, "0"),
                [name, hash, made, jobs, tokens, priority] => {
                    key(name, hash, made, jobs, tokens, priority)
                }
                _ => None,
            };
            keys.push(key.ok_or_else(|| format!("line {number} is no key"))?);
        }
        match keys.len() {
            0..=KEYS_MAX => Ok(Self::new(keys)),
            more => Err(format!("it has {more} keys; at most {KEYS_MAX} are kept")),
        }
    }
}

fn key(
    name: &str,
    hash: &str,
    made: &str,
    jobs: &str,
    tokens: &str,
    priority: &str,
) -> Option<Key> {
    fn limit<T: std::str::FromStr>(text: &str) -> Option<Option<T>> {
        match text {
            "-" => Some(None),
            text => text.parse().ok().map(Some),
        }
    }
    checked_name(Role::Client, name).ok()?;
    let mut bytes = [0; 32];
    hex_into(hash, &mut bytes)?;
    Some(Key {
        name: name.to_owned(),
        hash: bytes,
        made: from_millis(made.parse().ok()?),
        jobs: limit(jobs)?,
        tokens_per_minute: limit(tokens)?,
        priority: priority.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_its_text_until_it_is_revoked_by_another_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let (here, there) = (Keys::open(&path).unwrap(), Keys::open(&path).unwrap());
        assert!(here.is_empty().unwrap());
        let rights = KeyRights { jobs: Some(4), tokens_per_minute: Some(60_000), priority: 7 };
        let text = there.add("ci", rights).unwrap();
        let other = there.add("me", KeyRights::default()).unwrap();
        let found = here.find(&text).unwrap().unwrap();
        let limits = (found.jobs, found.tokens_per_minute);
        assert_eq!((found.name.as_str(), limits), ("ci", (Some(4), Some(60_000))));
        assert_eq!(found.priority, 7);
        let other_found = here.find(&other).unwrap().unwrap();
        assert_eq!((other_found.jobs, other_found.priority), (None, 0));
        for wrong in ["", "lite-llm-", &text[1..], &text[..text.len() - 1]] {
            assert_eq!(here.find(wrong).unwrap(), None);
        }
        let kept = std::fs::read_to_string(path.join(KEYS_FILE)).unwrap();
        assert!(!kept.contains(&text[KEY_PREFIX.len()..]), "only the hash is kept");
        assert!(
            there.add("ci", KeyRights::default()).unwrap_err().to_string().contains("has a key")
        );
        there.revoke("ci").unwrap();
        assert_eq!(here.find(&text).unwrap(), None);
        assert!(there.revoke("ci").is_err());
        assert_eq!(here.all().unwrap().len(), 1);
        assert!(there.add("no name", KeyRights::default()).is_err());
    }

    #[test]
    fn a_damaged_list_is_an_error_and_no_open_door() {
        let line = format!("a {} 1 - -", "0".repeat(64));
        assert_eq!(List::parse(Some(&format!("{FIRST_LINE}\n{line}\n"))).unwrap().keys.len(), 1);
        for bad in ["", "other\n", &format!("{FIRST_LINE}\na b c\n")] {
            assert!(List::parse(Some(bad)).is_err(), "{bad:?}");
        }
        for bad in [
            line.replace('0', "x"),
            format!("{line} 1 1"),
            format!("{line} 128"),
            line.replace(" - -", " -1 -"),
        ] {
            assert!(List::parse(Some(&format!("{FIRST_LINE}\n{bad}\n"))).is_err(), "{bad:?}");
        }
    }
}
