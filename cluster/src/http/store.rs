//! Files that were uploaded: one file of the state folder each, with a line before its content that
//! says whose it is.
//!
//! Invariants: a file is there whole or not at all, and was synced before anybody is told of it; an
//! owner sees its own only; files and their bytes are bounded; old ones are let go.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::commands::unix_time;

/// Longest file, in bytes.
pub(super) const FILE_BYTES_MAX: u64 = 64 << 20;
/// Bytes of all files, and their number.
const FILES_BYTES_MAX: u64 = 1 << 30;
const FILES_MAX: usize = 1000;
/// Bytes before the content: a line of JSON that ends with blanks.
const HEAD_BYTES: u64 = 2048;
/// Most characters of a name that are kept.
const NAME_CHARS_MAX: usize = 128;
/// How the name of an uploaded file ends here.
const ENDING: &str = "jsonl";

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct About {
    /// Of this layout.
    lite_llm_file: u32,
    pub(super) owner: String,
    pub(super) name: String,
    /// Seconds since 1970.
    pub(super) created: i64,
    /// Of its content.
    pub(super) bytes: u64,
}

/// Why a file is not kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotKept {
    /// It, or all of them, would be more than is kept.
    #[error("{0}")]
    TooMuch(String),
    /// The disk.
    #[error("{0}")]
    Disk(#[from] io::Error),
}

fn too_much<T>(reason: String) -> Result<T, NotKept> {
    Err(NotKept::TooMuch(reason))
}

/// See the module's text. All of it but [`Files::open`] may wait for the disk: it is not for a task.
#[derive(Clone)]
pub(super) struct Files {
    folder: PathBuf,
    keep: Duration,
    index: Arc<Mutex<Index>>,
}

#[derive(Default)]
struct Index {
    files: BTreeMap<String, About>,
    /// Bytes of files, and of those that arrive.
    bytes: u64,
}

/// A file that arrives. Dropped, it leaves nothing.
pub(super) struct Arriving {
    files: Files,
    file: NamedTempFile,
    bytes: u64,
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.files.index.lock().bytes -= self.bytes;
    }
}

impl Files {
    /// Opens a folder, which is made if it is missing. What was arriving when the process was killed is
    /// removed.
    pub(super) fn open(folder: PathBuf, keep: Duration) -> Result<Self> {
        let shown = folder.display().to_string();
        fs::create_dir_all(&folder).with_context(|| format!("{shown}: cannot make it"))?;
        #[cfg(unix)]
        {
            let only_owner = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(&folder, only_owner).with_context(|| shown.clone())?;
        }
        let mut index = Index::default();
        for entry in fs::read_dir(&folder).with_context(|| shown.clone())? {
            let path = entry.with_context(|| shown.clone())?.path();
            let id = path.file_stem().and_then(|id| id.to_str()).unwrap_or_default().to_owned();
            if path.extension().is_none_or(|ending| ending != ENDING) || !id.starts_with("file-") {
                fs::remove_file(&path)
                    .with_context(|| format!("{}: a leftover", path.display()))?;
                continue;
            }
            let about = read_head(&path).with_context(|| {
                format!("{}: it is damaged; move it away to begin without it", path.display())
            })?;
            index.bytes += about.bytes;
            index.files.insert(id, about);
        }
        let files = Self { folder, keep, index: Arc::new(Mutex::new(index)) };
        files.forget();
        Ok(files)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.{ENDING}"))
    }

    /// Lets go of old ones.
    fn forget(&self) {
        let keep = i64::try_from(self.keep.as_secs()).unwrap_or(i64::MAX);
        let now = unix_time();
        let mut index = self.index.lock();
        let is_old = |about: &About| now.saturating_sub(about.created) >= keep;
        let old = index.files.iter().filter(|(_, about)| is_old(about));
        let old: Vec<String> = old.map(|(id, _)| id.clone()).collect();
        for id in old {
            self.remove(&mut index, &id);
        }
    }

    fn remove(&self, index: &mut Index, id: &str) {
        // One that cannot be removed is found again when the folder is opened.
        if let Some(about) = index.files.remove(id) {
            index.bytes -= about.bytes;
            let _ = fs::remove_file(self.path(id));
        }
    }

    /// Begins a file.
    pub(super) fn begin(&self) -> Result<Arriving, NotKept> {
        self.forget();
        if self.index.lock().files.len() >= FILES_MAX {
            return too_much(format!("{FILES_MAX} files are kept already: delete some"));
        }
        let mut file = tempfile::Builder::new().suffix(".part").tempfile_in(&self.folder)?;
        file.write_all(&[b' '; HEAD_BYTES as usize])?;
        Ok(Arriving { files: self.clone(), file, bytes: 0 })
    }

    /// An owner's files, the newest first.
    pub(super) fn list(&self, owner: &str) -> Vec<(String, About)> {
        self.forget();
        let index = self.index.lock();
        let own = index.files.iter().filter(|(_, about)| about.owner == owner);
        let mut own: Vec<_> = own.map(|(id, about)| (id.clone(), about.clone())).collect();
        own.sort_by(|a, b| (b.1.created, &b.0).cmp(&(a.1.created, &a.0)));
        own
    }

    /// What is known of an owner's file.
    pub(super) fn about(&self, owner: &str, id: &str) -> Option<About> {
        self.forget();
        self.index.lock().files.get(id).filter(|about| about.owner == owner).cloned()
    }

    /// An owner's file, at the beginning of its content.
    pub(super) fn read(&self, owner: &str, id: &str) -> io::Result<Option<File>> {
        let Some(_) = self.about(owner, id) else { return Ok(None) };
        let mut file = File::open(self.path(id))?;
        file.seek(SeekFrom::Start(HEAD_BYTES))?;
        Ok(Some(file))
    }

    /// Removes an owner's file. Whether there was one.
    pub(super) fn delete(&self, owner: &str, id: &str) -> bool {
        let mut index = self.index.lock();
        let own = index.files.get(id).is_some_and(|about| about.owner == owner);
        if own {
            self.remove(&mut index, id);
        }
        own
    }
}

fn read_head(path: &Path) -> Result<About> {
    let mut file = File::open(path)?;
    let mut head = [0; HEAD_BYTES as usize];
    file.read_exact(&mut head)?;
    let about: About = serde_json::from_slice(&head)?;
    anyhow::ensure!(about.lite_llm_file == 1, "its layout is {}", about.lite_llm_file);
    let found = file.metadata()?.len();
    anyhow::ensure!(found == HEAD_BYTES + about.bytes, "it has {found} bytes");
    Ok(about)
}

impl Arriving {
    /// More of it.
    pub(super) fn push(&mut self, part: &[u8]) -> Result<(), NotKept> {
        let more = part.len() as u64;
        if self.bytes + more > FILE_BYTES_MAX {
            return too_much(format!("the file has more than {FILE_BYTES_MAX} bytes: split it"));
        }
        let mut index = self.files.index.lock();
        if index.bytes + more > FILES_BYTES_MAX {
            return too_much(format!(
                "files of {FILES_BYTES_MAX} bytes are kept already: delete some"
            ));
        }
        index.bytes += more;
        drop(index);
        self.bytes += more;
        Ok(self.file.write_all(part)?)
    }

    /// It is whole: syncs it and gives it its name.
    pub(super) fn finish(mut self, owner: &str, name: &str) -> Result<(String, About), NotKept> {
        let name: String = name.chars().take(NAME_CHARS_MAX).collect();
        let (owner, created, bytes) = (owner.to_owned(), unix_time(), self.bytes);
        let about = About { lite_llm_file: 1, owner, name, created, bytes };
        let id = format!("file-{}", uuid::Uuid::new_v4().simple());
        let files = self.files.clone();
        let mut kept = || -> io::Result<()> {
            let file = self.file.as_file_mut();
            file.seek(SeekFrom::Start(0))?;
            serde_json::to_writer(&*file, &about)?;
            file.seek(SeekFrom::Start(HEAD_BYTES - 1))?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(self.file.path(), files.path(&id))?;
            File::open(&files.folder)?.sync_all()
        };
        if let Err(error) = kept() {
            // It may have its name already, and whoever sent it is told that it is not kept.
            let _ = fs::remove_file(files.path(&id));
            return Err(error.into());
        }
        let mut index = files.index.lock();
        // Its bytes are the file's from now on.
        index.files.insert(id.clone(), about.clone());
        self.bytes = 0;
        drop(index);
        Ok((id, about))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);

    fn put(files: &Files, owner: &str, content: &[u8]) -> String {
        let mut file = files.begin().unwrap();
        content.chunks(7).for_each(|part| file.push(part).unwrap());
        file.finish(owner, "a \"name\" of é\u{1}.jsonl").unwrap().0
    }

    #[test]
    fn what_was_uploaded_is_there_for_its_owner_after_any_end() {
        let folder = tempfile::tempdir().unwrap();
        let open = |keep| Files::open(folder.path().join("files"), keep).unwrap();
        let files = open(WEEK);
        let id = put(&files, "key:a", b"{\"a\": 1}\n{}");
        let mut broken = files.begin().unwrap();
        broken.push(b"half").unwrap();
        // A process that is killed drops nothing.
        std::mem::forget(broken);
        let files = open(WEEK);
        assert_eq!(files.index.lock().bytes, 11, "what was arriving is gone");
        let about = files.about("key:a", &id).unwrap();
        assert_eq!((about.bytes, about.name.as_str()), (11, "a \"name\" of é\u{1}.jsonl"));
        let mut text = String::new();
        files.read("key:a", &id).unwrap().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "{\"a\": 1}\n{}");
        assert!(files.read("key:b", &id).unwrap().is_none() && !files.delete("key:b", &id));
        assert!(files.list("key:b").is_empty());
        assert!(files.delete("key:a", &id));
        assert_eq!((files.list("key:a").len(), files.index.lock().bytes), (0, 0));
        put(&files, "key:a", b"x");
        assert!(open(Duration::ZERO).list("key:a").is_empty(), "old ones are let go");
        assert_eq!(fs::read_dir(folder.path().join("files")).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_file_is_named_and_what_is_too_much_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::open(folder.path().to_owned(), WEEK).unwrap();
        let mut file = files.begin().unwrap();
        let part = vec![b'x'; 32 << 20];
        file.push(&part).unwrap();
        file.push(&part).unwrap();
        let said = |pushed: Result<(), NotKept>| match pushed {
            Err(NotKept::TooMuch(said)) => said,
            other => panic!("{other:?}"),
        };
        assert!(said(file.push(b"x")).contains("split it"));
        drop(file);
        assert_eq!(files.index.lock().bytes, 0);
        files.index.lock().bytes = FILES_BYTES_MAX;
        assert!(said(files.begin().unwrap().push(b"x")).contains("delete some"));
        fs::write(folder.path().join("file-1.jsonl"), b"{}").unwrap();
        let error = format!("{:#}", Files::open(folder.path().to_owned(), WEEK).err().unwrap());
        assert!(error.contains("file-1.jsonl") && error.contains("damaged"), "{error}");
    }
}
