//! Training text: files become one stream of tokens, the stream becomes rows, rows become batches.
//!
//! A text file is one document; a line of a JSONL file is one, its `text`; either may be compressed with zstd
//! (`.zst`). Every document ends with the
//! model's end token, where it has one. Documents stand one behind the other and are cut in rows of
//! equal length; a row knows where documents begin, and predicts nothing across such a place. Which row
//! comes when is a function of (seed, epoch) and its index: rule 7 of the determinism contract.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

use super::batch::{Batch, Row};
use crate::{
    checkpoint::index::Hash,
    random::{Purpose, random_u64},
    tokenizer::Tokenizer,
};

/// The epoch whose order picks rows that are held out; no training comes so far.
const HELD_OUT_EPOCH: u64 = u64::MAX >> 32;

/// Text that cannot be trained on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {found}; {expected}")]
pub struct DataError {
    path: String,
    found: String,
    expected: String,
}

fn error(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> DataError {
    DataError { path: path.display().to_string(), found: found.into(), expected: expected.into() }
}

/// The texts of a file, document by document.
fn documents(path: &Path) -> Result<Vec<String>, DataError> {
    const READABLE: &str =
        "a readable file of text, or of JSON lines with a \"text\" each, is expected";
    let mut bytes =
        fs::read(path).map_err(|e| error(path, format!("cannot read: {e}"), READABLE))?;
    let mut named = path.to_path_buf();
    if path.extension().is_some_and(|e| e == "zst") {
        bytes = zstd::decode_all(&bytes[..]).map_err(|e| {
            error(path, format!("cannot decompress: {e}"), "a whole file of zstd is expected")
        })?;
        named.set_extension("");
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        error(path, format!("not UTF-8: byte {at} begins no character"), "convert it to UTF-8")
    })?;
    if named.extension().is_none_or(|e| e != "jsonl") {
        return Ok(if text.trim().is_empty() { Vec::new() } else { vec![text] });
    }
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let bad = |found: String| {
                error(
                    path,
                    format!("line {number}: {found}"),
                    "a JSON object with a \"text\" is expected",
                )
            };
            let value: serde_json::Value =
                serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
            let text = value.get("text").and_then(|text| text.as_str());
            text.map(str::to_owned).ok_or_else(|| bad("no \"text\" that is a string".into()))
        })
        .collect()
}

/// Files of a pattern: a path, or one whose last part has a `*`. Sorted, so that machines agree.
fn files(base: &Path, pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    let path = base.join(pattern);
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let Some((before, after)) = name.split_once('*') else { return Ok(vec![path]) };
    // A bare name is one of the folder that we are in.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let found = fs::read_dir(folder).map_err(|e| {
        error(folder, format!("cannot list: {e}"), "an existing folder is expected")
    })?;
    let mut list: Vec<PathBuf> = found
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let fits = |n: &String| {
                n.len() >= before.len() + after.len() && n.starts_with(before) && n.ends_with(after)
            };
            path.is_file() && name.as_ref().is_some_and(fits)
        })
        .collect();
    list.sort();
    match list.is_empty() {
        true => Err(error(&path, "no file has such a name", "name files that exist")),
        false => Ok(list),
    }
}

/// The documents of files, whose patterns are relative to `base`.
pub fn texts(base: &Path, patterns: &[String]) -> Result<Vec<String>, DataError> {
    let mut all = Vec::new();
    for pattern in patterns {
        for path in files(base, pattern)? {
            all.extend(documents(&path)?);
        }
    }
    match all.is_empty() {
        true => Err(error(Path::new(&patterns.join(", ")), "no text", "give files with some text")),
        false => Ok(all),
    }
}

/// A stream of tokens, cut into rows.
#[derive(Debug, Clone)]
pub struct Dataset {
    stream: Vec<u32>,
    /// Where documents begin, 0 first.
    starts: Vec<usize>,
    length: usize,
    /// Rows to train on, by their index in the stream.
    rows: Vec<usize>,
    held_out: Vec<usize>,
    seed: u64,
    order: Arc<Mutex<Order>>,
}

/// The order of the epoch that was asked for last.
#[derive(Debug, Default)]
struct Order {
    /// Epoch, and places in [`Dataset::rows`].
    of: Option<(u64, Arc<[usize]>)>,
    /// How often one was made.
    made: u64,
}

impl Dataset {
    /// Reads files (patterns below `base`), makes rows of `length` tokens, and holds out a share of them.
    pub fn read(
        base: &Path,
        patterns: &[String],
        tokenizer: &Tokenizer,
        end: Option<u32>,
        (length, held_out, seed): (usize, f64, u64),
    ) -> Result<Self, DataError> {
        let (mut stream, mut starts) = (Vec::new(), Vec::new());
        for pattern in patterns {
            for path in files(base, pattern)? {
                for text in documents(&path)? {
                    let ids = tokenizer.encode(&text, false).map_err(|e| {
                        error(&path, e.to_string(), "text that the tokenizer can read is expected")
                    })?;
                    starts.push(stream.len());
                    stream.extend(ids);
                    stream.extend(end);
                }
            }
        }
        Self::new(stream, starts, (length, held_out, seed))
            .map_err(|(found, expected)| error(Path::new(&patterns.join(", ")), found, expected))
    }

    /// The same of a stream; or what was found and what is expected.
    fn new(
        stream: Vec<u32>,
        mut starts: Vec<usize>,
        (length, share, seed): (usize, f64, u64),
    ) -> Result<Self, (String, String)> {
        starts.dedup();
        let rows = stream.len().saturating_sub(1) / length.max(1);
        let held = ((rows as f64 * share).ceil() as usize).min(rows);
        if rows.saturating_sub(held) == 0 {
            let needed = length + 1;
            let found = format!("{} tokens, of which {held} rows are held out", stream.len());
            let expected = format!(
                "at least one row of {needed} tokens beside those is expected: give more text, or a shorter \
                 data.sequence"
            );
            return Err((found, expected));
        }
        let mut order = permutation(rows, seed, HELD_OUT_EPOCH);
        let mut held_out: Vec<usize> = order.drain(..held).collect();
        held_out.sort_unstable();
        order.sort_unstable();
        Ok(Self { stream, starts, length, rows: order, held_out, seed, order: Arc::default() })
    }

    /// Hash of the stream and of where documents begin.
    pub fn hash(&self) -> Hash {
        let starts: Vec<u64> = self.starts.iter().map(|start| *start as u64).collect();
        let bytes: [&[u8]; 2] = [bytemuck::cast_slice(&self.stream), bytemuck::cast_slice(&starts)];
        Hash::of(&bytes.concat())
    }

    /// Tokens in the stream.
    pub fn tokens(&self) -> usize {
        self.stream.len()
    }

    /// Rows to train on in an epoch, and rows held out.
    pub fn rows(&self) -> [usize; 2] {
        [self.rows.len(), self.held_out.len()]
    }

    /// Row i of the stream.
    fn row(&self, i: usize) -> Row {
        let (from, to) = (i * self.length, (i + 1) * self.length);
        let after = self.starts.partition_point(|start| *start <= from);
        let inside = self.starts[after..].iter().take_while(|start| **start <= to);
        let starts: Vec<usize> = inside.map(|start| start - from).collect();
        let mut targets: Vec<Option<u32>> =
            self.stream[from + 1..=to].iter().map(|&id| Some(id)).collect();
        for start in &starts {
            targets[start - 1] = None;
        }
        let documents = [0]
            .into_iter()
            .chain(starts.into_iter().filter(|start| *start < self.length))
            .collect();
        Row { tokens: self.stream[from..to].to_vec(), targets, documents }
    }

    /// `rows` rows from sample `first` on: samples are counted over all epochs.
    pub fn batch(&self, first: u64, rows: usize) -> Batch {
        let count = self.rows.len() as u64;
        let sample = |n: u64| self.row(self.rows[self.order_of(n / count)[(n % count) as usize]]);
        Batch { rows: (first..first + rows as u64).map(sample).collect() }
    }

    /// The order of an epoch, made when it is first asked for.
    fn order_of(&self, epoch: u64) -> Arc<[usize]> {
        let mut order = self.order.lock();
        match &order.of {
            Some((of, known)) if *of == epoch => known.clone(),
            _ => {
                let new: Arc<[usize]> = permutation(self.rows.len(), self.seed, epoch).into();
                *order = Order { of: Some((epoch, new.clone())), made: order.made + 1 };
                new
            }
        }
    }

    /// The rows that are held out, in batches.
    pub fn held_out(&self, rows: usize) -> impl Iterator<Item = Batch> + '_ {
        let batch = |rows: &[usize]| Batch { rows: rows.iter().map(|i| self.row(*i)).collect() };
        self.held_out.chunks(rows.max(1)).map(batch)
    }
}

/// The order of so many things in an epoch: by a random number each, and by index where two are equal.
fn permutation(count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let key = |i: usize| (random_u64(seed, Purpose::Shuffle, epoch << 32 | i as u64), i);
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_cached_key(|i| key(*i));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(starts: &[usize]) -> Dataset {
        Dataset::new((0..43).collect(), starts.to_vec(), (4, 0.2, 5)).unwrap()
    }

    #[test]
    fn nothing_is_predicted_across_documents_and_rows_know_where_they_begin() {
        let data = dataset(&[0, 2, 8, 13]);
        let row = data.row(0);
        assert_eq!((row.tokens, row.documents), (vec![0, 1, 2, 3], vec![0, 2]));
        assert_eq!(row.targets, [Some(1), None, Some(3), Some(4)]);
        let row = data.row(1);
        assert_eq!((row.documents, row.targets[3]), (vec![0], None));
        let row = data.row(3);
        assert_eq!((row.tokens, row.documents), (vec![12, 13, 14, 15], vec![0, 1]));
        assert_eq!(row.targets, [None, Some(14), Some(15), Some(16)]);
    }

    #[test]
    fn an_epoch_has_every_row_once_and_any_sample_can_be_asked_for() {
        let data = dataset(&[0]);
        assert_eq!(data.rows(), [8, 2]);
        let first =
            |batch: &Batch| -> Vec<u32> { batch.rows.iter().map(|r| r.tokens[0]).collect() };
        let (one, two) = (first(&data.batch(0, 8)), first(&data.batch(8, 8)));
        assert_ne!(one, two, "epochs have their own orders");
        assert_eq!(first(&data.batch(5, 6)), [&one[5..], &two[..3]].concat());
        let mut all = [one, data.held_out(3).flat_map(|b| first(&b)).collect()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).map(|i| i * 4).collect::<Vec<_>>());
    }

    #[test]
    fn a_bare_pattern_is_one_of_this_folder() {
        let here = files(Path::new(""), "Cargo.t*").unwrap();
        assert_eq!(here, [Path::new("./Cargo.toml")]);
        let error = files(Path::new(""), "no such*").unwrap_err().to_string();
        assert!(error.starts_with("no such*: no file has such a name"), "{error}");
    }

    #[test]
    fn compressed_files_are_read_as_what_they_hold() {
        let dir = tempfile::tempdir().unwrap();
        let lines = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
        for name in ["a.jsonl.zst", "a.txt.zst"] {
            let path = dir.path().join(name);
            let whole = zstd::encode_all(lines.as_bytes(), 3).unwrap();
            fs::write(&path, &whole).unwrap();
            let found = documents(&path).unwrap();
            let expected = if name.contains("jsonl") { vec!["one", "two"] } else { vec![lines] };
            assert_eq!(found, expected);
            fs::write(&path, &whole[..whole.len() - 1]).unwrap();
            let error = documents(&path).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("cannot decompress"), "{error}");
        }
    }

    #[test]
    fn the_order_of_an_epoch_is_made_once() {
        let data = dataset(&[0]);
        for first in (0..24).step_by(2) {
            data.batch(first, 2);
        }
        assert_eq!(data.order.lock().made, 3, "three epochs of eight rows");
    }

    #[test]
    fn too_little_text_is_refused_with_what_would_do() {
        for stream in [vec![], vec![1], vec![1, 2, 3, 4]] {
            let (found, expected) = Dataset::new(stream, vec![0], (4, 0.0, 0)).unwrap_err();
            assert!(found.contains("tokens") && expected.contains('5'), "{found} {expected}");
        }
    }
}
