//! The keys of a source's configuration, with errors that name file and key.
//!
//! Readers ask by the names of a `config.json`. A file that has names of its own ([`Keys::spelled`])
//! hears of those.

use std::{collections::HashMap, path::Path};

use serde_json::{Map, Value};

use super::{ImportError, hf_tensors::read_small};

const JSON_BYTES_MAX: u64 = 16 << 20;

/// An object of a JSON file, with errors that name file and key.
pub(super) struct Keys {
    path: String,
    prefix: String,
    map: Map<String, Value>,
    /// Names in the file of keys that have others there.
    spelled: HashMap<String, String>,
}

impl Keys {
    pub(super) fn read(path: &Path) -> Result<Self, ImportError> {
        let bytes = read_small(path, JSON_BYTES_MAX)?;
        let map = serde_json::from_slice(&bytes).map_err(|e| {
            ImportError::file(path, e.to_string(), "expected a JSON object; download it again")
        })?;
        Ok(Self::of(path, map))
    }

    fn of(path: &Path, map: Map<String, Value>) -> Self {
        let (path, prefix) = (path.display().to_string(), String::new());
        Self { path, prefix, map, spelled: HashMap::new() }
    }

    /// Keys that `path` says in a form of its own, with the names that they have there.
    pub(super) fn spelled(
        path: &Path,
        map: Map<String, Value>,
        spelled: HashMap<String, String>,
    ) -> Self {
        Self { spelled, ..Self::of(path, map) }
    }

    /// The file, for messages.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// What a key is called in the file.
    pub(super) fn name(&self, key: &str) -> String {
        let full = format!("{}{key}", self.prefix);
        self.spelled.get(&full).cloned().unwrap_or(full)
    }

    /// Whether there is nothing in it.
    pub(super) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether a key is there, if only as null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// All keys.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// The value of a key; `None` if it is absent or null.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// All keys and values, nulls too.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    pub(super) fn wrong(&self, key: &str, expected: &str) -> ImportError {
        let found = self.map.get(key).map_or("missing".into(), Value::to_string);
        ImportError::Key {
            path: self.path.clone(),
            key: self.name(key),
            found: found.chars().take(200).collect(),
            expected: expected.into(),
        }
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Keys>, ImportError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, "an object is expected"))?;
        let prefix = format!("{}{key}.", self.prefix);
        let (path, spelled) = (self.path.clone(), self.spelled.clone());
        Ok(Some(Keys { path, prefix, map: map.clone(), spelled }))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, ImportError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
        size.map(Some).ok_or_else(|| self.wrong(key, "a whole number from 0 is expected"))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, ImportError> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| self.wrong(key, "a whole number is expected"))
    }

    /// One number or a list of them.
    pub(super) fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>, ImportError> {
        match self.value(key) {
            Some(Value::Array(list)) => {
                let sizes = list.iter().map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok()));
                let sizes: Option<Vec<_>> = sizes.collect();
                sizes.map(Some).ok_or_else(|| self.wrong(key, "whole numbers are expected"))
            }
            _ => Ok(self.optional_size(key)?.map(|size| vec![size])),
        }
    }

    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>, ImportError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(key, "a number is expected"))
    }

    pub(super) fn number(&self, key: &str) -> Result<f64, ImportError> {
        let number = self.optional_number(key)?;
        number.ok_or_else(|| self.wrong(key, "a number is expected"))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ImportError> {
        let Some(value) = self.value(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false is expected"))
    }

    /// A list of numbers.
    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>, ImportError> {
        let list = self.value(key).and_then(Value::as_array);
        let numbers = list.and_then(|list| list.iter().map(Value::as_f64).collect());
        numbers.ok_or_else(|| self.wrong(key, "a list of numbers is expected"))
    }
}
