//! The safetensors files of a Hugging Face folder: headers read and checked, data read by position.
//!
//! Invariant: once opened, every [`View`] lies inside its file. Headers must describe the whole
//! data section without gaps or overlaps, so a truncated or spliced file is refused here.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::{ImportError, PIECE_BYTES};
use crate::checkpoint::source::is_plain;

/// A single file's name.
pub const SINGLE: &str = "model.safetensors";
/// Name of the index of several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// Largest header, as in the safetensors library.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
const INDEX_BYTES_MAX: u64 = 1 << 30;

/// Format of the values of a source tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HfDType {
    /// IEEE single precision.
    F32,
    /// Its upper half.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl HfDType {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            HfDType::F32 => 4,
            HfDType::Bf16 | HfDType::F16 => 2,
        }
    }
}

/// A row-major matrix within a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    file: usize,
    offset: u64,
    /// Format of its values.
    pub dtype: HfDType,
    /// Rows.
    pub rows: usize,
    /// Values in a row.
    pub cols: usize,
}

impl View {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.cols * self.dtype.bytes()
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes() as u64
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn slice(&self, from: usize, rows: usize) -> Self {
        assert!(from + rows <= self.rows, "rows of the view");
        let offset = self.offset + from as u64 * self.row_bytes() as u64;
        Self { offset, rows, ..self.clone() }
    }
}

/// All tensors of a folder.
#[derive(Debug)]
pub struct HfTensors {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    offset: u64,
    dtype: String,
    shape: Vec<usize>,
}

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

impl HfTensors {
    /// Opens all files of a folder and checks their headers.
    pub fn open(dir: &Path) -> Result<Self, ImportError> {
        let mut all = Self { dir: dir.to_owned(), files: vec![], tensors: HashMap::new() };
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            all.add_file(&single)?;
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
        let map: WeightIndex = serde_json::from_slice(&text).map_err(|e| {
            ImportError::file(&index, e.to_string(), "expected an object `weight_map`")
        })?;
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
            all.add_file(&dir.join(name))?;
        }
        for (tensor, file) in &map.weight_map {
            let holds = all.tensors.get(tensor).map(|entry| &all.files[entry.file].0);
            if holds != Some(&dir.join(file)) {
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

    fn add_file(&mut self, path: &Path) -> Result<(), ImportError> {
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

        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        let (start, data_bytes) = (8 + header_bytes, bytes - 8 - header_bytes);
        let mut at = 0;
        for (name, entry) in entries {
            let (from, to) = entry.data_offsets;
            let wrong = |found: String, expected: String| ImportError::Tensor {
                path: path.display().to_string(),
                tensor: name.clone(),
                found,
                expected: format!(
                    "{expected}; the file is damaged or truncated: download it again"
                ),
            };
            let size = dtype_bytes(&entry.dtype).ok_or_else(|| {
                wrong(format!("format {:?}", entry.dtype), "expected one of safetensors".into())
            })?;
            let needed = entry
                .shape
                .iter()
                .try_fold(size, |product, &d| product.checked_mul(d as u64))
                .ok_or_else(|| {
                    wrong(
                        format!("shape {:?}", entry.shape),
                        "expected fewer than 2^64 bytes".into(),
                    )
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
            if self.tensors.contains_key(&name) {
                return Err(wrong("it occurs twice".into(), "expected once".into()));
            }
            let file = self.files.len();
            let (dtype, shape, offset) = (entry.dtype, entry.shape, start + from);
            self.tensors.insert(name, Entry { file, offset, dtype, shape });
        }
        if at != data_bytes {
            return Err(damaged(format!("{data_bytes} bytes of data, {at} of them in tensors")));
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }

    /// Whether the folder has a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// File that holds a tensor, or the folder; for messages.
    pub fn path_of(&self, name: &str) -> String {
        let file = self.tensors.get(name).map(|entry| &self.files[entry.file].0);
        file.unwrap_or(&self.dir).display().to_string()
    }

    /// Name of the tensor that a view is of, and the file that holds it; for messages.
    pub(super) fn name_of(&self, view: &View) -> (String, String) {
        let before = |e: &Entry| e.file == view.file && e.offset <= view.offset;
        let tensors = self.tensors.iter().filter(|(_, entry)| before(entry));
        let name = tensors.max_by_key(|(_, entry)| entry.offset).map(|(name, _)| name.clone());
        (name.unwrap_or_default(), self.files[view.file].0.display().to_string())
    }

    /// A tensor of exactly this shape, as a matrix whose rows have the last dimension's length.
    pub fn view(&self, name: &str, shape: &[usize]) -> Result<View, ImportError> {
        let error = |found: String, expected: String| ImportError::Tensor {
            path: self.path_of(name),
            tensor: name.into(),
            found,
            expected,
        };
        let Some(entry) = self.tensors.get(name) else {
            return Err(error(
                "it is missing".into(),
                format!(
                    "expected with shape {shape:?}; the folder is incomplete: download it again"
                ),
            ));
        };
        if entry.shape != shape {
            return Err(error(
                format!("shape {:?}", entry.shape),
                format!("expected {shape:?} by config.json; one of the two is not this model's"),
            ));
        }
        let dtype = match entry.dtype.as_str() {
            "F32" => HfDType::F32,
            "BF16" => HfDType::Bf16,
            "F16" => HfDType::F16,
            other => {
                return Err(error(
                    format!("format {other}"),
                    "expected F32, BF16 or F16; quantised folders are not read: use the original"
                        .into(),
                ));
            }
        };
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product();
        Ok(View { file: entry.file, offset: entry.offset, dtype, rows, cols })
    }

    /// Whether two views have the same format, shape and bytes.
    pub fn equal(&self, a: &View, b: &View) -> Result<bool, ImportError> {
        if (a.dtype, a.rows, a.cols) != (b.dtype, b.rows, b.cols) {
            return Ok(false);
        }
        let rows = (PIECE_BYTES / a.row_bytes().max(1)).max(1);
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for from in (0..a.rows).step_by(rows) {
            for (view, bytes) in [(a, &mut left), (b, &mut right)] {
                let piece = view.slice(from, rows.min(view.rows - from));
                bytes.resize(piece.bytes() as usize, 0);
                self.read(&piece, bytes)?;
            }
            if left != right {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills `out` with the bytes of a view.
    ///
    /// # Panics
    /// If `out` has another length than the view.
    pub fn read(&self, view: &View, out: &mut [u8]) -> Result<(), ImportError> {
        assert_eq!(out.len() as u64, view.bytes(), "room for the view");
        let (path, file) = &self.files[view.file];
        file.read_exact_at(out, view.offset).map_err(ImportError::io(path, "read"))
    }
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
