//! The safetensors files of a Hugging Face folder: headers read and checked.
//!
//! Invariant: headers must describe the whole data section without gaps or overlaps, so a truncated
//! or spliced file is refused here.

use std::{collections::BTreeMap, fmt, fs::File, os::unix::fs::FileExt, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::{
    ImportError,
    tensors::{Entry, RowOrder, Tensors},
};
use crate::checkpoint::source::is_plain;

/// A single file's name.
pub(super) const SINGLE: &str = "model.safetensors";
/// Name of the index of several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Largest header, as in the safetensors library.
pub(super) const HEADER_BYTES_MAX: u64 = 100_000_000;
const INDEX_BYTES_MAX: u64 = 1 << 30;

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Header entries in the order of the file, names that occur twice included.
struct Header(Vec<(String, HeaderEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
struct WeightIndex {
    weight_map: BTreeMap<String, String>,
}

/// Opens all files of a folder and checks their headers.
pub(super) fn open(dir: &Path) -> Result<Tensors, ImportError> {
    let mut all = Tensors::new(dir);
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if single.exists() {
        add_file(&mut all, &single)?;
        return Ok(all);
    }
    if !index.exists() {
        return Err(ImportError::file(
            dir,
            format!("neither {SINGLE} nor {INDEX}"),
            "expected weights in the safetensors format; convert other formats first",
        ));
    }
    let text = read_small(&index, INDEX_BYTES_MAX)?;
    let map: WeightIndex = serde_json::from_slice(&text)
        .map_err(|e| ImportError::file(&index, e.to_string(), "expected an object `weight_map`"))?;
    let mut names: Vec<_> = map.weight_map.values().collect();
    names.sort();
    names.dedup();
    for name in names {
        if !is_plain(name) {
            return Err(ImportError::file(
                &index,
                format!("file name {name:?} in weight_map"),
                "expected a relative path inside the folder",
            ));
        }
        add_file(&mut all, &dir.join(name))?;
    }
    for (tensor, file) in &map.weight_map {
        let holds = all.file_of(tensor);
        if holds != Some(&*dir.join(file)) {
            return Err(ImportError::Tensor {
                path: dir.join(file).display().to_string(),
                tensor: tensor.clone(),
                found: match holds {
                    Some(other) => format!("it is in {}", other.display()),
                    None => "it is in no file".into(),
                },
                expected: format!("{INDEX} says that it is here; download the folder again"),
            });
        }
    }
    Ok(all)
}

fn add_file(all: &mut Tensors, path: &Path) -> Result<(), ImportError> {
    let metadata = std::fs::metadata(path).map_err(ImportError::io(path, "open"))?;
    if !metadata.is_file() {
        return Err(ImportError::file(path, "not a regular file", "expected safetensors"));
    }
    let file = File::open(path).map_err(ImportError::io(path, "open"))?;
    let bytes = metadata.len();
    let damaged = |found: String| {
        ImportError::file(
            path,
            found,
            "expected a whole safetensors file; it is damaged or truncated: download it again",
        )
    };
    if bytes < 8 {
        return Err(damaged(format!("{bytes} bytes")));
    }
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 0).map_err(ImportError::io(path, "read"))?;
    let header_bytes = u64::from_le_bytes(word);
    if header_bytes > HEADER_BYTES_MAX || header_bytes > bytes - 8 {
        return Err(damaged(format!("a header of {header_bytes} bytes in a file of {bytes}")));
    }
    let mut text = vec![0; header_bytes as usize];
    file.read_exact_at(&mut text, 8).map_err(ImportError::io(path, "read"))?;
    let Header(mut entries) =
        serde_json::from_slice(&text).map_err(|e| damaged(format!("header: {e}")))?;

    let file = all.add_file(path, file);
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let (start, data_bytes) = (8 + header_bytes, bytes - 8 - header_bytes);
    let mut at = 0;
    for (name, entry) in entries {
        let (from, to) = entry.data_offsets;
        let wrong = |found: String, expected: String| ImportError::Tensor {
            path: path.display().to_string(),
            tensor: name.clone(),
            found,
            expected: format!("{expected}; the file is damaged or truncated: download it again"),
        };
        let size = dtype_bytes(&entry.dtype).ok_or_else(|| {
            wrong(format!("format {:?}", entry.dtype), "expected one of safetensors".into())
        })?;
        let needed = entry
            .shape
            .iter()
            .try_fold(size, |product, &d| product.checked_mul(d as u64))
            .ok_or_else(|| {
                wrong(format!("shape {:?}", entry.shape), "expected fewer than 2^64 bytes".into())
            })?;
        if from != at || to.checked_sub(from) != Some(needed) {
            return Err(wrong(
                format!("data from {from} to {to}"),
                format!("expected {needed} bytes from {at}"),
            ));
        }
        if to > data_bytes {
            return Err(wrong(
                format!("data up to {to}"),
                format!("expected no more than the {data_bytes} bytes of the file"),
            ));
        }
        at = to;
        if all.contains(&name) {
            return Err(wrong("it occurs twice".into(), "expected once".into()));
        }
        let (dtype, shape, offset) = (entry.dtype, entry.shape, start + from);
        let (order, alias) = (RowOrder::Plain, None);
        all.add(name, Entry { file, offset, dtype, shape, order, alias });
    }
    if at != data_bytes {
        return Err(damaged(format!("{data_bytes} bytes of data, {at} of them in tensors")));
    }
    Ok(())
}

fn dtype_bytes(name: &str) -> Option<u64> {
    Some(match name {
        "F64" | "I64" | "U64" | "C64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "I8" | "U8" | "BOOL" => 1,
        _ => return None,
    })
}

/// Reads a file that must not be larger than `max`.
pub(super) fn read_small(path: &Path, max: u64) -> Result<Vec<u8>, ImportError> {
    let metadata = std::fs::metadata(path).map_err(ImportError::io(path, "open"))?;
    if !metadata.is_file() || metadata.len() > max {
        return Err(ImportError::file(
            path,
            format!("{} bytes, regular file: {}", metadata.len(), metadata.is_file()),
            format!("expected a regular file of at most {max} bytes"),
        ));
    }
    std::fs::read(path).map_err(ImportError::io(path, "read"))
}
