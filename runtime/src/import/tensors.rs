//! The tensors of a source, whatever files hold them: names, shapes and formats known, values read
//! by position.
//!
//! Names and shapes are those of Hugging Face folders; readers of other files translate theirs.
//!
//! Invariant: every [`View`] lies inside its file. Readers check that before they add a tensor.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{ImportError, PIECE_BYTES};

/// Format of the values of a source tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SourceDType {
    /// IEEE single precision.
    F32,
    /// Its upper half.
    Bf16,
    /// IEEE half precision.
    F16,
    /// GGUF's Q8_0: blocks of 32 weights of 8 bits with an f16 scale.
    Q8,
    /// GGUF's Q4_0: blocks of 32 weights of 4 bits with an f16 scale.
    Q4,
    /// GGUF's Q6_K: blocks of 256 weights of 6 bits with 16 scales.
    Q6K,
}

impl SourceDType {
    const ALL: [(&'static str, SourceDType); 6] = [
        ("F32", SourceDType::F32),
        ("BF16", SourceDType::Bf16),
        ("F16", SourceDType::F16),
        ("Q8_0", SourceDType::Q8),
        ("Q4_0", SourceDType::Q4),
        ("Q6_K", SourceDType::Q6K),
    ];

    /// A format by its name in files and messages.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(n, _)| *n == name).map(|(_, dtype)| *dtype)
    }

    /// Values in a block, and its bytes.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            SourceDType::F32 => (1, 4),
            SourceDType::Bf16 | SourceDType::F16 => (1, 2),
            SourceDType::Q8 => (32, 34),
            SourceDType::Q4 => (32, 18),
            SourceDType::Q6K => (256, 210),
        }
    }

    /// Whether values are integers in blocks that share a scale.
    pub(super) fn is_quantised(self) -> bool {
        self.block().0 > 1
    }
}

/// A row-major matrix within a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    file: usize,
    offset: u64,
    /// Format of its values.
    pub(super) dtype: SourceDType,
    /// Rows.
    pub(super) rows: usize,
    /// Values in a row.
    pub(super) cols: usize,
    /// Order of its rows in the file.
    pub(super) order: RowOrder,
}

/// Order of the rows of a tensor in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As in a Hugging Face folder.
    Plain,
    /// Within every head of so many rows, row i of the first half stands before row i of the second.
    Interleaved {
        /// Rows of a head, an even number.
        head: usize,
    },
}

impl View {
    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        let (values, bytes) = self.dtype.block();
        self.cols / values * bytes
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes() as u64
    }

    /// Rows of a piece of about so many bytes, unpacked: a multiple of `unit`, whole heads where
    /// rows of a head are interleaved.
    pub(super) fn rows_in(&self, bytes: usize, unit: usize) -> usize {
        let unit = match self.order {
            RowOrder::Plain => unit,
            RowOrder::Interleaved { head } => (1..=head)
                .map(|n| n * unit)
                .find(|rows| rows.is_multiple_of(head))
                .expect("head times unit is a multiple of both"),
        };
        let row = if self.dtype.is_quantised() { 4 * self.cols } else { self.row_bytes() };
        (bytes / row.max(1) / unit).max(1) * unit
    }

    /// Some of the rows; whole heads of them where rows of a head are interleaved.
    ///
    /// # Panics
    /// If there are fewer.
    pub(super) fn slice(&self, from: usize, rows: usize) -> Self {
        assert!(from + rows <= self.rows, "rows of the view");
        if let RowOrder::Interleaved { head } = self.order {
            assert!(from.is_multiple_of(head) && rows.is_multiple_of(head), "whole heads");
        }
        let offset = self.offset + from as u64 * self.row_bytes() as u64;
        Self { offset, rows, ..self.clone() }
    }
}

/// All tensors of a source.
#[derive(Debug)]
pub(super) struct Tensors {
    source: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<String, Entry>,
    /// What the source would call a tensor that it lacks.
    missing: fn(&str) -> String,
}

/// Where a tensor lies.
#[derive(Debug)]
pub(super) struct Entry {
    /// Index of its file, as [`Tensors::add_file`] gave it.
    pub(super) file: usize,
    /// Where its bytes begin in the file.
    pub(super) offset: u64,
    /// Name of its format.
    pub(super) dtype: String,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// Order of its rows.
    pub(super) order: RowOrder,
    /// Its name in the file, if that is another one.
    pub(super) alias: Option<String>,
}

impl Tensors {
    /// No tensors yet, of the folder or file `source`.
    pub(super) fn new(source: &Path) -> Self {
        let (source, missing) = (source.to_owned(), str::to_owned as fn(&str) -> String);
        Self { source, files: vec![], tensors: HashMap::new(), missing }
    }

    /// Says what the source would call tensors that it lacks; for messages.
    pub(super) fn name_missing(&mut self, name: fn(&str) -> String) {
        self.missing = name;
    }

    /// Adds a file and gives its index.
    pub(super) fn add_file(&mut self, path: &Path, file: File) -> usize {
        self.files.push((path.to_owned(), file));
        self.files.len() - 1
    }

    /// Adds a tensor; its bytes lie inside its file and its name is new.
    pub(super) fn add(&mut self, name: String, entry: Entry) {
        self.tensors.insert(name, entry);
    }

    /// The file that holds a tensor, if one does.
    pub(super) fn file_of(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|entry| &*self.files[entry.file].0)
    }

    /// Whether the source has a tensor.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, sorted.
    pub(super) fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// File that holds a tensor, or the source; for messages.
    pub(super) fn path_of(&self, name: &str) -> String {
        self.file_of(name).unwrap_or(&self.source).display().to_string()
    }

    /// What a tensor is called in its file; for messages.
    pub(super) fn name_in_file(&self, name: &str) -> String {
        match self.tensors.get(name) {
            None => (self.missing)(name),
            Some(entry) => entry.alias.clone().unwrap_or_else(|| name.into()),
        }
    }

    /// Name of the tensor that a view is of, and the file that holds it; for messages.
    pub(super) fn name_of(&self, view: &View) -> (String, String) {
        let before = |e: &Entry| e.file == view.file && e.offset <= view.offset;
        let tensors = self.tensors.iter().filter(|(_, entry)| before(entry));
        let name = tensors.max_by_key(|(_, entry)| entry.offset).map(|(name, _)| name.clone());
        let name = name.unwrap_or_default();
        (self.name_in_file(&name), self.files[view.file].0.display().to_string())
    }

    /// A tensor of exactly this shape, as a matrix whose rows have the last dimension's length.
    pub(super) fn view(&self, name: &str, shape: &[usize]) -> Result<View, ImportError> {
        let error = |found: String, expected: String| ImportError::Tensor {
            path: self.path_of(name),
            tensor: self.name_in_file(name),
            found,
            expected,
        };
        let Some(entry) = self.tensors.get(name) else {
            return Err(error(
                "it is missing".into(),
                format!(
                    "expected with shape {shape:?}; the model is incomplete: download it again"
                ),
            ));
        };
        if entry.shape != shape {
            return Err(error(
                format!("shape {:?}", entry.shape),
                format!(
                    "expected {shape:?} by the configuration; one of the two is not this model's"
                ),
            ));
        }
        let Some(dtype) = SourceDType::named(&entry.dtype) else {
            return Err(error(
                format!("format {}", entry.dtype),
                "expected F32, BF16 or F16, in GGUF files also Q8_0, Q4_0 or Q6_K: use the original \
                 weights, or make a file of one of these from them"
                    .into(),
            ));
        };
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product();
        let &Entry { file, offset, order, .. } = entry;
        Ok(View { file, offset, dtype, rows, cols, order })
    }

    /// Whether two views have the same format, shape and bytes.
    pub(super) fn equal(&self, a: &View, b: &View) -> Result<bool, ImportError> {
        if (a.dtype, a.rows, a.cols, a.order) != (b.dtype, b.rows, b.cols, b.order) {
            return Ok(false);
        }
        let rows = a.rows_in(PIECE_BYTES, 1);
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

    /// Fills `out` with the bytes of a view, its rows in the order of the file.
    ///
    /// # Panics
    /// If `out` has another length than the view.
    pub(super) fn read(&self, view: &View, out: &mut [u8]) -> Result<(), ImportError> {
        assert_eq!(out.len() as u64, view.bytes(), "room for the view");
        let (path, file) = &self.files[view.file];
        file.read_exact_at(out, view.offset).map_err(ImportError::io(path, "read"))
    }
}
