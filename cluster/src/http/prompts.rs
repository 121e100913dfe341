//! The prompts of a completion, as they stand in a body.
//!
//! Read value by value into what they become: what serde does for enums without tags makes a tree of all
//! that it reads first, which of a million ids takes tens of MiB.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};

use super::ask::JOBS_MAX;

const EXPECTED: &str = "prompt: a text, token ids, or a list of either is expected";

/// See the module's text.
#[derive(Debug)]
pub(super) enum PromptField {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    Many(Vec<Vec<u32>>),
}

/// An entry of a list.
enum Entry {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl Entry {
    fn text(self) -> Option<String> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    fn id(self) -> Option<u32> {
        if let Self::Id(id) = self { Some(id) } else { None }
    }

    fn ids(self) -> Option<Vec<u32>> {
        if let Self::Ids(ids) = self { Some(ids) } else { None }
    }
}

/// A list that goes on as it began, so that all are alike.
fn rest<'de, A: SeqAccess<'de>, T>(
    mut list: A,
    first: Option<T>,
    most: usize,
    of: fn(Entry) -> Option<T>,
) -> Result<Vec<T>, A::Error> {
    let mut all = Vec::from_iter(first);
    while let Some(entry) = list.next_element::<Entry>()? {
        if all.len() == most {
            return Err(A::Error::custom(format!("prompt: at most {most} are taken at once")));
        }
        all.push(of(entry).ok_or_else(|| A::Error::custom(EXPECTED))?);
    }
    Ok(all)
}

struct Prompts;

impl<'de> Visitor<'de> for Prompts {
    type Value = PromptField;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E>(self, text: &str) -> Result<PromptField, E> {
        Ok(PromptField::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PromptField, A::Error> {
        Ok(match list.next_element()? {
            None => PromptField::Texts(Vec::new()),
            Some(Entry::Text(text)) => {
                PromptField::Texts(rest(list, Some(text), JOBS_MAX, Entry::text)?)
            }
            Some(Entry::Id(id)) => PromptField::Ids(rest(list, Some(id), usize::MAX, Entry::id)?),
            Some(Entry::Ids(ids)) => {
                PromptField::Many(rest(list, Some(ids), JOBS_MAX, Entry::ids)?)
            }
        })
    }
}

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Prompts)
    }
}

struct OfList;

impl<'de> Visitor<'de> for OfList {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E>(self, text: &str) -> Result<Entry, E> {
        Ok(Entry::Text(text.to_owned()))
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Entry, E> {
        u32::try_from(id).map(Entry::Id).map_err(|_| E::custom(EXPECTED))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Entry, A::Error> {
        rest(list, None, usize::MAX, Entry::id).map(Entry::Ids)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OfList)
    }
}
