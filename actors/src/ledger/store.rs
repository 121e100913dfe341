//! The ledger's file: redb, one table per kind of record.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | name | number: `format`, `next` |
//! | `batches` | number of the first job | [`KeptBatch`] |
//! | `jobs` | number | [`DetachedJob`] |
//! | `tokens` | number, tokens before | ids, 4 bytes each, little-endian |
//! | `endings` | number | [`JobEnding`] |
//!
//! Values are rkyv, checked when they are read. Invariants: a write is one transaction, which is on
//! disk when [`Store::write`] returns; an ending is never written over; tokens follow each other; the
//! file has its name only when it is whole and on disk; one of an earlier format becomes one of this
//! in one transaction, with all its jobs.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
};

use lite_llm_transport::messages::{
    DetachedBatch, DetachedJob, JobEnding, JobRequest, decode, encode,
};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use rkyv::{Archive, Deserialize, Serialize};

use super::{
    events::{Record, Saved, SavedBatch, SavedJob},
    machine::{job_bytes, result_bytes},
};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const BATCHES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("batches");
const JOBS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("jobs");
const TOKENS: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("tokens");
const ENDINGS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("endings");

/// Of this layout.
const FORMAT: u64 = 2;
/// Memory that redb keeps pages in; by default it takes a GiB.
const CACHE_BYTES: usize = 16 << 20;

/// A batch, beside its jobs.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub(super) struct KeptBatch {
    owner: String,
    key: [u8; 16],
    model: [u8; 32],
    at: u64,
    jobs: u64,
    pub(super) note: String,
}

/// A [`DetachedJob`] of format 1.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
struct JobOfFormat1 {
    request: JobRequest,
    stop: Vec<String>,
    label: String,
}

impl From<JobOfFormat1> for DetachedJob {
    fn from(JobOfFormat1 { request, stop, label }: JobOfFormat1) -> Self {
        Self { stop, label, ..Self::plain(request) }
    }
}

/// The file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    /// Something that redb, or the system below it, says.
    #[error("{}: cannot {action}: {reason}; see that its disk has room and is well", path.display())]
    File { action: &'static str, path: PathBuf, reason: String },
    /// A file of a later release.
    #[error(
        "{}: its format is {found}, and this release reads {FORMAT}: use the release that wrote it, \
         or move the file away to begin without its jobs",
        path.display()
    )]
    Format { path: PathBuf, found: u64 },
    /// Something that no release writes.
    #[error(
        "{}: {what} is damaged: {reason}; restore the file, or move it away to begin without its jobs",
        path.display()
    )]
    Damaged { path: PathBuf, what: String, reason: String },
}

/// See the module's text.
pub(super) struct Store {
    database: Database,
    path: PathBuf,
}

impl Store {
    /// Opens a file, which is made if it is missing. One whose process was killed is repaired.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |reason: String| StoreError::File {
            action: "open the ledger",
            path: path.to_owned(),
            reason,
        };
        // Releases before format 2 could leave an empty one behind.
        if !fs::metadata(path).is_ok_and(|found| found.len() > 0) {
            Self::make(path)?;
        }
        let database = builder().open(path).map_err(|error| failed(error.to_string()))?;
        let store = Self { database, path: path.to_owned() };
        store.prepare()?;
        Ok(store)
    }

    /// Makes a file under another name, which gets its own when it is whole and on disk: whoever is
    /// killed meanwhile leaves none.
    fn make(path: &Path) -> Result<(), StoreError> {
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(".new");
        let unfinished = PathBuf::from(unfinished);
        let failed = |reason: String| StoreError::File {
            action: "make the ledger",
            path: unfinished.clone(),
            reason,
        };
        let system = |error: std::io::Error| failed(error.to_string());
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(system(error));
            }
            _ => {}
        }
        make_private(&unfinished).map_err(system)?;
        let database = builder().create(&unfinished).map_err(|error| failed(error.to_string()))?;
        let store = Self { database, path: unfinished.clone() };
        store.prepare()?;
        drop(store);
        File::open(&unfinished).and_then(|file| file.sync_all()).map_err(system)?;
        fs::rename(&unfinished, path).map_err(system)?;
        // The name is on disk when its folder is.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(system)
    }

    fn failed<E: std::fmt::Display>(&self, action: &'static str) -> impl Fn(E) -> StoreError {
        let path = self.path.clone();
        move |error| StoreError::File { action, path: path.clone(), reason: error.to_string() }
    }

    fn damaged(&self, what: String, reason: impl std::fmt::Display) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), what, reason: reason.to_string() }
    }

    /// Makes the tables, and sees that they are of this format, or become so.
    fn prepare(&self) -> Result<(), StoreError> {
        let prepared = || -> Result<u64, redb::Error> {
            let write = self.database.begin_write()?;
            let found = {
                let mut meta = write.open_table(META)?;
                let found = meta.get("format")?.map(|format| format.value());
                if found.is_none() {
                    meta.insert("format", FORMAT)?;
                }
                write.open_table(BATCHES)?;
                write.open_table(JOBS)?;
                write.open_table(TOKENS)?;
                write.open_table(ENDINGS)?;
                found.unwrap_or(FORMAT)
            };
            write.commit()?;
            Ok(found)
        };
        match prepared().map_err(self.failed("prepare the ledger"))? {
            FORMAT => Ok(()),
            1 => self.update_from_format_1(),
            found => Err(StoreError::Format { path: self.path.clone(), found }),
        }
    }

    /// Writes the jobs anew, whose layout has grown, or changes nothing.
    fn update_from_format_1(&self) -> Result<(), StoreError> {
        let failed = self.failed::<redb::Error>("update the ledger");
        let write = self.database.begin_write().map_err(|error| failed(error.into()))?;
        {
            let mut jobs = write.open_table(JOBS).map_err(|error| failed(error.into()))?;
            let numbers = jobs.iter().map_err(|error| failed(error.into()))?;
            let numbers: Result<Vec<u64>, _> =
                numbers.map(|entry| entry.map(|(number, _)| number.value())).collect();
            for number in numbers.map_err(|error| failed(error.into()))? {
                let old = jobs.get(number).map_err(|error| failed(error.into()))?;
                let Some(old) = old.map(|bytes| bytes.value().to_vec()) else { continue };
                let job: JobOfFormat1 = self.decoded("job", number, &old)?;
                let job = encode(&DetachedJob::from(job));
                jobs.insert(number, job.as_slice()).map_err(|error| failed(error.into()))?;
            }
            let mut meta = write.open_table(META).map_err(|error| failed(error.into()))?;
            meta.insert("format", FORMAT).map_err(|error| failed(error.into()))?;
        }
        write.commit().map_err(|error| failed(error.into()))
    }

    /// Writes all of these, or nothing, and returns when they are on disk.
    pub(super) fn write(&self, records: &[Record]) -> Result<(), StoreError> {
        let written = || -> Result<(), redb::Error> {
            let write = self.database.begin_write()?;
            for record in records {
                put(&write, record)?;
            }
            Ok(write.commit()?)
        };
        written().map_err(self.failed("write to the ledger"))
    }

    /// All that the machine is to know, where a model has so many positions.
    pub(super) fn load(&self, context: u64) -> Result<Saved, StoreError> {
        let failed = self.failed::<redb::Error>("read the ledger");
        let mut saved = Saved::default();
        let mut kept = BTreeMap::new();
        let read = || -> Result<_, redb::Error> {
            let read = self.database.begin_read()?;
            let next = read.open_table(META)?.get("next")?.map_or(1, |next| next.value());
            Ok((
                next,
                read.open_table(BATCHES)?,
                read.open_table(JOBS)?,
                read.open_table(TOKENS)?,
                read.open_table(ENDINGS)?,
            ))
        };
        let (next, batches, jobs, tokens, endings) = read().map_err(&failed)?;
        saved.next = next;
        for entry in batches.iter().map_err(|error| failed(error.into()))? {
            let (first, bytes) = entry.map_err(|error| failed(error.into()))?;
            let batch: KeptBatch = self.decoded("batch", first.value(), bytes.value())?;
            kept.insert(first.value(), batch);
        }
        for (first, batch) in kept {
            let mut found = Vec::new();
            for number in first..first.saturating_add(batch.jobs) {
                let bytes = jobs.get(number).map_err(|error| failed(error.into()))?;
                let bytes = bytes.ok_or_else(|| {
                    self.damaged(format!("batch {first}"), format!("it lacks job {number}"))
                })?;
                let job: DetachedJob = self.decoded("job", number, bytes.value())?;
                let mut count = 0;
                let parts = tokens.range((number, 0)..=(number, u32::MAX));
                for part in parts.map_err(|error| failed(error.into()))? {
                    let (key, ids) = part.map_err(|error| failed(error.into()))?;
                    if key.value().1 != count || ids.value().len() % 4 != 0 {
                        let what = format!("what job {number} has generated");
                        return Err(self.damaged(what, "a part is missing"));
                    }
                    count += (ids.value().len() / 4) as u32;
                }
                let bytes = endings.get(number).map_err(|error| failed(error.into()))?;
                let mut ended = None;
                if let Some(bytes) = bytes {
                    let ending: JobEnding = self.decoded("ending", number, bytes.value())?;
                    count = ending.ids.len() as u32;
                    ended = Some((ending.state, ending.at, result_bytes(&ending)));
                }
                let bytes = job_bytes(&job, context);
                found.push(SavedJob { bytes, tokens: count, ended });
            }
            let KeptBatch { owner, key, model, at, .. } = batch;
            saved.batches.insert(first, SavedBatch { owner, key, model, at, jobs: found });
        }
        Ok(saved)
    }

    /// A job, and the tokens of it that are written.
    pub(super) fn job(&self, number: u64) -> Result<(DetachedJob, Vec<u32>), StoreError> {
        let read = || -> Result<_, redb::Error> {
            let read = self.database.begin_read()?;
            let job = read.open_table(JOBS)?.get(number)?.map(|bytes| bytes.value().to_vec());
            let mut ids = Vec::new();
            for part in read.open_table(TOKENS)?.range((number, 0)..=(number, u32::MAX))? {
                let (_, bytes) = part?;
                let parts = bytes.value().chunks_exact(4);
                ids.extend(parts.map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])));
            }
            Ok((job, ids))
        };
        let (job, ids) = read().map_err(self.failed("read the ledger"))?;
        let job = job.ok_or_else(|| self.damaged(format!("job {number}"), "it is missing"))?;
        Ok((self.decoded("job", number, &job)?, ids))
    }

    /// How a job ended, if it has.
    pub(super) fn ending(&self, number: u64) -> Result<Option<JobEnding>, StoreError> {
        self.value(ENDINGS, "ending", number)
    }

    /// What is kept of a batch beside its jobs.
    pub(super) fn batch(&self, first: u64) -> Result<Option<KeptBatch>, StoreError> {
        self.value(BATCHES, "batch", first)
    }

    fn value<T: lite_llm_transport::messages::Wire>(
        &self,
        table: TableDefinition<'static, u64, &'static [u8]>,
        what: &str,
        number: u64,
    ) -> Result<Option<T>, StoreError> {
        let read = || -> Result<_, redb::Error> {
            let read = self.database.begin_read()?;
            Ok(read.open_table(table)?.get(number)?.map(|bytes| bytes.value().to_vec()))
        };
        let bytes = read().map_err(self.failed("read the ledger"))?;
        bytes.map(|bytes| self.decoded(what, number, &bytes)).transpose()
    }

    fn decoded<T: lite_llm_transport::messages::Wire>(
        &self,
        what: &str,
        number: u64,
        bytes: &[u8],
    ) -> Result<T, StoreError> {
        decode(bytes).map_err(|error| self.damaged(format!("{what} {number}"), error))
    }
}

fn put(write: &WriteTransaction, record: &Record) -> Result<(), redb::Error> {
    match record {
        Record::Batch { first, owner, model, at, batch } => {
            let DetachedBatch { key, note, jobs } = batch;
            let count = jobs.len() as u64;
            let (owner, note) = (owner.clone(), note.clone());
            let kept = KeptBatch { owner, key: *key, model: *model, at: *at, jobs: count, note };
            write.open_table(BATCHES)?.insert(first, encode(&kept).as_slice())?;
            let mut table = write.open_table(JOBS)?;
            for (number, job) in (*first..).zip(jobs) {
                table.insert(number, encode(job).as_slice())?;
            }
            write.open_table(META)?.insert("next", first + count)?;
        }
        Record::Tokens { job, from, tokens } => {
            let bytes: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
            write.open_table(TOKENS)?.insert((*job, *from), bytes.as_slice())?;
        }
        Record::Ended { job, ending } => {
            let mut endings = write.open_table(ENDINGS)?;
            // The machine sees to it; what is on disk is what people may have seen.
            if endings.get(job)?.is_none() {
                endings.insert(job, encode(ending).as_slice())?;
            }
            forget_tokens(write, *job)?;
        }
        Record::Forgotten { first, jobs } => {
            write.open_table(BATCHES)?.remove(first)?;
            for number in *first..first + jobs {
                write.open_table(JOBS)?.remove(number)?;
                write.open_table(ENDINGS)?.remove(number)?;
                forget_tokens(write, number)?;
            }
        }
    }
    Ok(())
}

fn forget_tokens(write: &WriteTransaction, job: u64) -> Result<(), redb::Error> {
    let mut tokens = write.open_table(TOKENS)?;
    tokens.retain_in((job, 0)..=(job, u32::MAX), |_, _| false)?;
    Ok(())
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// Makes an empty file that only its owner reads, if there is none.
fn make_private(path: &Path) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use lite_llm_transport::messages::{DetachedState, JobRequest};

    use super::*;

    fn batch(key: u8, jobs: usize) -> DetachedBatch {
        let request =
            JobRequest::greedy(lite_llm_transport::messages::Prompt::Tokens(vec![1, 2, 3]), 4);
        let job = DetachedJob {
            stop: vec!["x".into()],
            label: "l".into(),
            ..DetachedJob::plain(request)
        };
        DetachedBatch { key: [key; 16], note: "n".into(), jobs: vec![job; jobs] }
    }

    fn taken(first: u64, jobs: usize) -> Record {
        let (owner, batch) = ("anna".to_owned(), batch(first as u8, jobs));
        Record::Batch { first, owner, model: [3; 32], at: 5, batch }
    }

    fn ending(text: &str) -> JobEnding {
        let (ids, text, reason) = (vec![7, 8], text.to_owned(), String::new());
        JobEnding { state: DetachedState::Length, at: 9, ids, text, reason }
    }

    #[test]
    fn what_was_written_is_there_when_the_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jobs.redb");
        let store = Store::open(&path).unwrap();
        assert!(store.load(64).unwrap().batches.is_empty());
        let tokens = |job, from, tokens| Record::Tokens { job, from, tokens };
        store
            .write(&[
                taken(1, 3),
                tokens(1, 0, vec![7]),
                tokens(1, 1, vec![8, 9]),
                tokens(2, 0, vec![5]),
                Record::Ended { job: 2, ending: ending("two") },
            ])
            .unwrap();
        store.write(&[taken(4, 1), Record::Ended { job: 4, ending: ending("four") }]).unwrap();
        // An ending is not written over, whoever tries.
        store.write(&[Record::Ended { job: 2, ending: ending("else") }]).unwrap();
        store.write(&[Record::Forgotten { first: 4, jobs: 1 }]).unwrap();
        drop(store);

        let store = Store::open(&path).unwrap();
        let saved = store.load(64).unwrap();
        assert_eq!((saved.next, saved.batches.len()), (5, 1), "numbers are not given twice");
        let kept = &saved.batches[&1];
        assert_eq!(
            (kept.owner.as_str(), kept.key, kept.model, kept.at),
            ("anna", [1; 16], [3; 32], 5)
        );
        let tokens: Vec<u32> = kept.jobs.iter().map(|job| job.tokens).collect();
        assert_eq!(tokens, [3, 2, 0]);
        assert_eq!(
            kept.jobs[1].ended.map(|(state, at, _)| (state, at)),
            Some((DetachedState::Length, 9))
        );
        let (job, known) = store.job(1).unwrap();
        assert_eq!((job, known), (batch(1, 1).jobs.remove(0), vec![7, 8, 9]));
        assert!(store.job(2).unwrap().1.is_empty(), "of an end's tokens nothing else is kept");
        assert_eq!(store.ending(2).unwrap(), Some(ending("two")));
        assert_eq!((store.ending(1).unwrap(), store.ending(4).unwrap()), (None, None));
        assert_eq!(store.batch(1).unwrap().unwrap().note, "n");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "prompts are for their owner's eyes");
        }
    }

    #[test]
    fn files_that_are_none_or_are_damaged_are_refused_with_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jobs.redb");
        std::fs::write(&path, "not a database, but long enough to be looked at".repeat(200))
            .unwrap();
        let error = Store::open(&path).err().expect("refused").to_string();
        assert!(error.contains("jobs.redb") && error.contains("open the ledger"), "{error}");

        let path = folder.path().join("later.redb");
        let store = Store::open(&path).unwrap();
        let write = store.database.begin_write().unwrap();
        write.open_table(META).unwrap().insert("format", FORMAT + 1).unwrap();
        write.commit().unwrap();
        drop(store);
        let error = Store::open(&path).err().expect("refused").to_string();
        assert!(error.contains("its format is 3"), "{error}");

        let path = folder.path().join("damaged.redb");
        let store = Store::open(&path).unwrap();
        store.write(&[taken(1, 2)]).unwrap();
        let write = store.database.begin_write().unwrap();
        write.open_table(JOBS).unwrap().insert(2, &[1_u8, 2, 3][..]).unwrap();
        write.commit().unwrap();
        let error = store.load(64).expect_err("damaged").to_string();
        assert!(error.contains("job 2 is damaged"), "{error}");
        let write = store.database.begin_write().unwrap();
        write.open_table(JOBS).unwrap().remove(2).unwrap();
        write.commit().unwrap();
        let error = store.load(64).expect_err("damaged").to_string();
        assert!(error.contains("it lacks job 2"), "{error}");
    }

    /// What a process that is killed while it makes the file leaves is not the file.
    #[test]
    fn the_file_has_its_name_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (path, unfinished) =
            (folder.path().join("jobs.redb"), folder.path().join("jobs.redb.new"));
        for leftover in [&b""[..], b"half of a file, as a kill leaves it"] {
            std::fs::write(&unfinished, leftover).unwrap();
            let store = Store::open(&path).unwrap();
            store.write(&[taken(1, 2)]).unwrap();
            drop(store);
            assert!(!unfinished.exists());
            assert_eq!(Store::open(&path).unwrap().load(64).unwrap().batches.len(), 1);
            std::fs::remove_file(&path).unwrap();
        }
        // Where it cannot be made whole, there is none.
        std::fs::create_dir(&unfinished).unwrap();
        let error = Store::open(&path).err().expect("refused").to_string();
        assert!(error.contains("jobs.redb.new") && !path.exists(), "{error}");
        std::fs::remove_dir(&unfinished).unwrap();
        // An earlier release could be killed with nothing written.
        std::fs::write(&path, b"").unwrap();
        Store::open(&path).unwrap();
    }

    #[test]
    fn a_file_of_format_1_keeps_its_jobs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jobs.redb");
        let store = Store::open(&path).unwrap();
        store.write(&[taken(1, 3)]).unwrap();
        // A job that the release before wrote: see `bytes.rs` of transport at that time.
        let old = include_bytes!("data/job.1.bin");
        let write = store.database.begin_write().unwrap();
        write.open_table(META).unwrap().insert("format", 1).unwrap();
        for number in 1..=3 {
            write.open_table(JOBS).unwrap().insert(number, &old[..]).unwrap();
        }
        write.commit().unwrap();
        drop(store);
        for _ in 0..2 {
            let store = Store::open(&path).unwrap();
            assert_eq!(store.load(64).unwrap().batches[&1].jobs.len(), 3);
            let (job, _) = store.job(3).unwrap();
            assert_eq!((job.label.as_str(), job.stop[0].as_str()), ("line-1", "END"));
            assert_eq!((job.request.seed, job.request.max_new_tokens), (11, 5));
            assert_eq!(job, DetachedJob::from(decode::<JobOfFormat1>(old).unwrap()));
        }
    }

    /// A process that dies leaves its file as it is. Opened at any such moment it has whole writes,
    /// and all that were synced.
    #[test]
    fn a_file_that_was_not_closed_has_all_that_was_synced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, copy) = (folder.path().join("jobs.redb"), folder.path().join("copy.redb"));
        let store = Store::open(&path).unwrap();
        for number in 0..20 {
            store.write(&[taken(1 + 2 * number, 2)]).unwrap();
            std::fs::copy(&path, &copy).unwrap();
            let found = Store::open(&copy).unwrap().load(64).unwrap();
            assert_eq!((found.next, found.batches.len() as u64), (3 + 2 * number, number + 1));
        }
    }
}
