//! The container: metadata and a list of tensors, then their bytes.
//!
//! Layout (`docs/gguf.md` of ggml; little-endian, versions 2 and 3): `GGUF`, version u32, tensors
//! u64, keys u64; then every key: name, type u32, value; then every tensor: name, dimensions u32,
//! their sizes u64, innermost first, type u32, offset u64 from the start of the data; then, from
//! the next multiple of `general.alignment` (32), the data. A text is its length u64 and its bytes.
//!
//! Invariant: whatever the file says, its head takes no more than some hundreds of megabytes
//! ([`HEAD_BYTES_MAX`], [`ITEMS_MAX`]), and every tensor of a format that is read lies inside the file
//! and in nobody else's bytes.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use serde_json::Value;

use crate::import::{ImportError, tensors::SourceDType};

/// Most bytes of metadata and list together; the largest vocabularies take some 15 MB.
pub(super) const HEAD_BYTES_MAX: u64 = 64 << 20;
/// Most items of all lists together; the largest vocabularies have about a million.
const ITEMS_MAX: u64 = 8 << 20;
/// Most keys, and most tensors.
const ENTRIES_MAX: u64 = 1 << 20;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT: &str = "general.alignment";

/// What a file says before its data.
#[derive(Debug)]
pub(super) struct Head {
    /// Values of the metadata; texts are texts, lists are lists.
    pub(super) metadata: HashMap<String, Value>,
    /// Every tensor.
    pub(super) tensors: Vec<Info>,
}

/// A tensor in the list.
#[derive(Debug)]
pub(super) struct Info {
    pub(super) name: String,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// Name of its format.
    pub(super) dtype: String,
    /// Where it begins in the file.
    pub(super) offset: u64,
}

/// Reads and checks the head of a file of `bytes` bytes.
pub(super) fn read(path: &Path, file: &File, bytes: u64) -> Result<Head, ImportError> {
    let mut reader = Reader { path, inner: BufReader::new(file), at: 0, bytes, items: 0 };
    if &reader.take::<4>()? != b"GGUF" {
        return Err(ImportError::file(
            path,
            "a file that does not begin with GGUF",
            "expected a Hugging Face folder, a checkpoint or a GGUF file",
        ));
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(ImportError::file(
            path,
            format!("version {version}"),
            "expected a GGUF file of version 2 or 3, little-endian: convert the model again",
        ));
    }
    let (count, keys) = (reader.u64()?, reader.u64()?);
    if count.max(keys) > ENTRIES_MAX {
        return Err(reader.damaged(format!("{count} tensors and {keys} keys")));
    }
    let mut metadata = HashMap::new();
    for _ in 0..keys {
        let key = reader.text()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.damaged(format!("key {key} twice")));
        }
    }
    let alignment = match metadata.get(ALIGNMENT) {
        None => 32,
        Some(value) => value
            .as_u64()
            .filter(|n| n.is_power_of_two() && *n <= 1 << 20)
            .ok_or_else(|| reader.damaged(format!("{ALIGNMENT} is {value}")))?,
    };
    let mut tensors = Vec::new();
    for _ in 0..count {
        tensors.push(reader.info()?);
    }
    let start = reader.at.next_multiple_of(alignment);
    check_places(&reader, &mut tensors, start)?;
    Ok(Head { metadata, tensors })
}

/// Turns offsets from the start of the data into places of the file, and sees that they are whole.
fn check_places(reader: &Reader<'_>, tensors: &mut [Info], start: u64) -> Result<(), ImportError> {
    tensors.sort_by_key(|info| info.offset);
    let mut free = start;
    for info in tensors {
        let wrong = |found: String| ImportError::Tensor {
            path: reader.path.display().to_string(),
            tensor: info.name.clone(),
            found,
            expected: "the file is damaged or truncated: download it again".into(),
        };
        let values = info.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        // The size of a format that is not read is not known; who asks for it hears its name.
        let (per_block, bytes) = SourceDType::named(&info.dtype).map_or((1, 0), SourceDType::block);
        let row = info.shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(per_block) {
            return Err(wrong(format!("rows of {row} in {}, blocks of {per_block}", info.dtype)));
        }
        let size = values.and_then(|n| (n / per_block as u64).checked_mul(bytes as u64));
        let from = info.offset.checked_add(start);
        let to = from.zip(size).and_then(|(from, size)| from.checked_add(size));
        match (from, to) {
            (Some(from), Some(to)) if from >= free && to <= reader.bytes => {
                (info.offset, free) = (from, to);
            }
            _ => {
                return Err(wrong(format!(
                    "{:?} in {} from byte {} of the data, in a file of {} bytes",
                    info.shape, info.dtype, info.offset, reader.bytes
                )));
            }
        }
    }
    Ok(())
}

/// Reads what a file's head is made of, no further than its end.
struct Reader<'a> {
    path: &'a Path,
    inner: BufReader<&'a File>,
    at: u64,
    bytes: u64,
    /// Items of all lists so far.
    items: u64,
}

impl Reader<'_> {
    fn damaged(&self, found: impl Into<String>) -> ImportError {
        let found = format!("{}, before byte {}", found.into(), self.at);
        let expected = "expected a GGUF file; it is damaged or truncated: download it again";
        ImportError::file(self.path, found, expected)
    }

    /// Says that so many bytes follow, before memory is used for them.
    fn follow(&self, bytes: u64) -> Result<(), ImportError> {
        if bytes > self.bytes - self.at {
            return Err(self.damaged(format!("{bytes} bytes more than the file has")));
        }
        if self.at + bytes > HEAD_BYTES_MAX {
            return Err(self.damaged(format!("more than {HEAD_BYTES_MAX} bytes before the data")));
        }
        Ok(())
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<(), ImportError> {
        self.follow(out.len() as u64)?;
        self.inner.read_exact(out).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("the end"),
            _ => ImportError::io(self.path, "read")(error),
        })?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ImportError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, ImportError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ImportError> {
        self.take().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, ImportError> {
        let length = self.u64()?;
        self.follow(length)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.damaged("a text that is no UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, ImportError> {
        const ARRAY: u32 = 9;
        if kind != ARRAY {
            return self.item(kind, key);
        }
        let (kind, items) = (self.u32()?, self.u64()?);
        self.items = self.items.saturating_add(items);
        if self.items > ITEMS_MAX {
            return Err(self.damaged(format!("key {key} with {items} items")));
        }
        // Every item takes a byte at least.
        self.follow(items)?;
        (0..items).map(|_| self.item(kind, key)).collect::<Result<Vec<_>, _>>().map(Value::Array)
    }

    /// A value that is no list. NaN and infinity become null, as JSON has neither.
    fn item(&mut self, kind: u32, key: &str) -> Result<Value, ImportError> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.take()?).into(),
            1 => i8::from_le_bytes(self.take()?).into(),
            2 => u16::from_le_bytes(self.take()?).into(),
            3 => i16::from_le_bytes(self.take()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.take()?).into(),
            6 => f32::from_le_bytes(self.take()?).into(),
            7 => (u8::from_le_bytes(self.take()?) != 0).into(),
            8 => self.text()?.into(),
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.take()?).into(),
            12 => f64::from_le_bytes(self.take()?).into(),
            _ => return Err(self.damaged(format!("key {key} of type {kind}"))),
        })
    }

    fn info(&mut self) -> Result<Info, ImportError> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > DIMENSIONS_MAX {
            return Err(self.damaged(format!("tensor {name} of {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64()?;
            let size = usize::try_from(size)
                .map_err(|_| self.damaged(format!("tensor {name} of size {size}")))?;
            shape.insert(0, size);
        }
        let dtype = dtype_name(self.u32()?);
        let offset = self.u64()?;
        Ok(Info { name, shape, dtype, offset })
    }
}

/// Name of a format by its number in `ggml.h`.
fn dtype_name(number: u32) -> String {
    let name = match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        20 => "IQ4_NL",
        23 => "IQ4_XS",
        30 => "BF16",
        39 => "MXFP4",
        _ => return format!("{number} of ggml"),
    };
    name.into()
}
