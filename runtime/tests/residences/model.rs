//! A small model in every place that experts are fetched from, one of its experts damaged everywhere;
//! and who fetches them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use lite_llm_kernels::{dtype::DType, slots::SlotPool};
use lite_llm_runtime::{
    blocks::{BlockFile, BlockOptions, BlockReader, Priority, Read},
    checkpoint::{
        Checkpoint,
        archive::{Archive, ArchiveError, ArchiveFailure},
        codec::Compression,
    },
    expert::{ExpertKey, GatedMlp},
    import::{
        ImportOptions, import,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    residency::{FetchOptions, Fetched, Fetcher, NvmeFolder, Urgency, fetcher_for},
};
use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The same model three times: as it is used, compressed, and embedded.
pub(crate) struct Model {
    _dir: TempDir,
    plain: PathBuf,
    packed: PathBuf,
    truth: HashMap<ExpertKey, Vec<u8>>,
    /// Experts that are whole.
    pub(crate) keys: Vec<ExpertKey>,
    /// The one that is not.
    pub(crate) broken: ExpertKey,
    /// Bytes of an expert, and of its slot or blocks.
    pub(crate) bytes: usize,
    pub(crate) slot: u64,
}

impl Model {
    /// Its files, as they lie within a program.
    pub(crate) fn embedded(&self) -> &'static [(&'static str, &'static [u8])] {
        let leak = |(name, bytes): (String, Vec<u8>)| -> (&'static str, &'static [u8]) {
            (name.leak(), bytes.leak())
        };
        files(&self.plain).into_iter().map(leak).collect::<Vec<_>>().leak()
    }
}

fn bytes_of(expert: &GatedMlp) -> Vec<u8> {
    [&expert.gate, &expert.up, &expert.down].iter().flat_map(|m| m.data().to_vec()).collect()
}

pub(crate) fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let dir = folder();
        let source = dir.path().join("hf");
        // Experts that do not end at a block.
        let shape =
            RandomShape { layers: 3, intermediate: 40, ..RandomShape::tiny(RandomClass::Olmoe) };
        write_random_hf(&source, &shape, &mut |_, _| {}).unwrap();
        let (plain, packed) = (dir.path().join("plain"), dir.path().join("packed"));
        let compression = Compression { level: 1, now: || Duration::ZERO };
        for (out, compress) in [(&plain, None), (&packed, Some(compression))] {
            let dtype = Some(DType::Bf16);
            let options = ImportOptions { dtype, compress, ..ImportOptions::new(&*source, &**out) };
            import(&options, &mut |_, _, _| {}).unwrap();
        }
        let checkpoint = Checkpoint::open(&plain).unwrap();
        let mut keys: Vec<ExpertKey> = checkpoint.config().expert_keys().collect();
        let truth =
            keys.iter().map(|&key| (key, bytes_of(&checkpoint.expert(key).unwrap()))).collect();
        let broken = keys.pop().unwrap();
        for folder in [&plain, &packed] {
            let checkpoint = Checkpoint::open(folder).unwrap();
            let place = checkpoint.expert_place(broken).unwrap();
            assert_eq!(place.file.is_none(), *folder == packed, "experts are compressed");
            let shard = folder.join(&place.path);
            let mut bytes = fs::read(&shard).unwrap();
            bytes[place.offset as usize + 100] ^= 1;
            fs::write(shard, bytes).unwrap();
        }
        let bytes = checkpoint.tier_expert_bytes()[0] as usize;
        assert_ne!(bytes % 4096, 0);
        let slot = bytes.next_multiple_of(4096) as u64;
        Model { _dir: dir, plain, packed, truth, keys, broken, bytes, slot }
    })
}

/// Below the target folder: temporary folders may lie in memory.
pub(crate) fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read(path).unwrap());
            }
        }
    }
    found
}

/// What a store does wrong with shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Refuses,
    Panics,
    CorruptsOnce,
}

/// An object store in memory.
#[derive(Debug)]
pub(crate) struct Memory {
    files: BTreeMap<String, Vec<u8>>,
    shut: Mutex<bool>,
    opened: Condvar,
    pub(crate) fault: Mutex<Option<Fault>>,
    pub(crate) asked_by: Mutex<HashSet<ThreadId>>,
    /// Shards' reads.
    pub(crate) reads: Mutex<u64>,
}

impl Memory {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            files: files(&model().plain),
            shut: Mutex::new(false),
            opened: Condvar::new(),
            fault: Mutex::default(),
            asked_by: Mutex::default(),
            reads: Mutex::default(),
        })
    }

    /// Answers nothing more, or again.
    pub(crate) fn shut(&self, shut: bool) {
        *self.shut.lock() = shut;
        self.opened.notify_all();
    }

    fn error(path: &str, kind: ArchiveFailure) -> ArchiveError {
        ArchiveError { object: format!("memory://{path}"), kind, reason: "on purpose".into() }
    }

    fn asked(&self) {
        self.asked_by.lock().insert(thread::current().id());
        let mut shut = self.shut.lock();
        while *shut {
            self.opened.wait(&mut shut);
        }
    }
}

impl Archive for Memory {
    fn location(&self) -> String {
        "memory://model".into()
    }

    fn list(&self, folder: &str) -> Result<Option<Vec<(String, u64)>>, ArchiveError> {
        assert_eq!(folder, "");
        let root = self.files.iter().filter(|(name, _)| !name.contains('/'));
        Ok(Some(root.map(|(name, bytes)| (name.clone(), bytes.len() as u64)).collect()))
    }

    fn size(&self, path: &str) -> Result<Option<u64>, ArchiveError> {
        self.asked();
        Ok(self.files.get(path).map(|bytes| bytes.len() as u64))
    }

    fn read_into(&self, path: &str, from: u64, out: &mut [u8]) -> Result<u64, ArchiveError> {
        self.asked();
        let bytes = self.files.get(path);
        let bytes = bytes.ok_or_else(|| Self::error(path, ArchiveFailure::Absent))?;
        out.copy_from_slice(&bytes[from as usize..][..out.len()]);
        if path.ends_with(".safetensors") {
            *self.reads.lock() += 1;
            let mut fault = self.fault.lock();
            match *fault {
                Some(Fault::Refuses) => return Err(Self::error(path, ArchiveFailure::Unavailable)),
                Some(Fault::Panics) => panic!("on purpose"),
                Some(Fault::CorruptsOnce) => {
                    out[7] ^= 1;
                    *fault = None;
                }
                None => {}
            }
        }
        Ok(bytes.len() as u64)
    }

    fn begin_put(&self, _: &str, _: u64) -> Result<Option<String>, ArchiveError> {
        Ok(None)
    }

    fn abandon_put(&self, _: &str, _: &str) -> Result<(), ArchiveError> {
        Ok(())
    }

    fn put(&self, path: &str, _: &fs::File, _: u64, _: Option<&str>) -> Result<(), ArchiveError> {
        Err(Self::error(path, ArchiveFailure::Unsupported))
    }

    fn create(&self, path: &str, _: &[u8]) -> Result<bool, ArchiveError> {
        Err(Self::error(path, ArchiveFailure::Unsupported))
    }

    fn remove(&self, _: &[String]) -> Result<(), ArchiveError> {
        Err(Self::error("", ArchiveFailure::Unsupported))
    }
}

/// Where experts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Folder,
    /// Without io_uring and O_DIRECT.
    FolderByThreads,
    Packed,
    Embedded,
    Archive,
    /// A disk cache over the archive, with nothing on it, with half of the experts, with all.
    Empty,
    Half,
    Warm,
    /// A disk cache over a folder.
    OverFolder,
}

pub(crate) const PLACES: [Place; 9] = [
    Place::Folder,
    Place::FolderByThreads,
    Place::Packed,
    Place::Embedded,
    Place::Archive,
    Place::Empty,
    Place::Half,
    Place::Warm,
    Place::OverFolder,
];

/// A fetcher of one thread, and what it reads.
pub(crate) struct Source {
    pub(crate) fetcher: Arc<dyn Fetcher>,
    pub(crate) reader: Arc<BlockReader>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) nvme: TempDir,
}

pub(crate) fn reader(ring: bool) -> Arc<BlockReader> {
    // One request at a time, so that their order is seen.
    let (in_flight, prefetch_in_flight, threads) = (1, 1, 1);
    let direct = ring;
    let options = BlockOptions {
        ring,
        direct,
        in_flight,
        prefetch_in_flight,
        threads,
        ..BlockOptions::default()
    };
    BlockReader::new(options).unwrap()
}

impl Source {
    pub(crate) fn new(place: Place) -> Self {
        let (memory, nvme) = (Memory::new(), folder());
        let reader = reader(place != Place::FolderByThreads);
        let stored = || Checkpoint::open_archive(memory.clone(), None).unwrap();
        let checkpoint = match place {
            Place::Folder | Place::FolderByThreads | Place::OverFolder => {
                Checkpoint::open(&model().plain).unwrap()
            }
            Place::Packed => Checkpoint::open(&model().packed).unwrap(),
            Place::Embedded => Checkpoint::embedded(model().embedded()).unwrap(),
            _ => stored(),
        };
        let experts = model().keys.len() as u64 + 1;
        let budget = match place {
            Place::Empty | Place::Warm | Place::OverFolder => Some(experts * model().slot),
            Place::Half => Some(experts / 2 * model().slot),
            _ => None,
        };
        let budget = budget.map(|budget| NvmeFolder { folder: nvme.path().to_owned(), budget });
        let fetcher = fetcher(checkpoint, &reader, budget).unwrap();
        let source = Self { fetcher, reader, memory, nvme };
        if place == Place::Warm {
            source.fill(&model().keys);
        }
        source
    }

    /// A disk cache over the archive, in a folder that is there.
    pub(crate) fn reopened(nvme: TempDir, experts: u64) -> Self {
        let (memory, reader) = (Memory::new(), reader(true));
        let fetcher = over_memory(&memory, &reader, nvme.path(), experts).unwrap();
        Self { fetcher, reader, memory, nvme }
    }

    /// Has the disk keep these experts.
    pub(crate) fn fill(&self, keys: &[ExpertKey]) {
        let client = Client::new(keys.len());
        for &key in keys {
            client.fetch(&*self.fetcher, key, Urgency::Demand);
            client.right(key);
            wait(|| self.file(key).is_some());
        }
        // The last one has its name; the writer is to have said so.
        wait(|| self.fetcher.residences()[0].held <= keys.len() as u64 * model().slot);
        client.fetch(&*self.fetcher, keys[0], Urgency::Demand);
        client.right(keys[0]);
    }

    /// An expert's file on the disk.
    pub(crate) fn file(&self, key: ExpertKey) -> Option<PathBuf> {
        let ExpertKey { layer, tier, group, expert } = key;
        let name = format!("{layer}-{tier}-{group}-{expert}");
        kept(self.nvme.path()).into_iter().map(|(path, _)| path).find(|path| path.ends_with(&name))
    }

    /// Holds its threads up until what is returned is released.
    pub(crate) fn hold(&self) -> Held {
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        let (held, is_held) = mpsc::channel();
        let pool = SlotPool::new(2 * model().slot);
        let slot = pool.take(model().bytes).unwrap();
        let (tell, gate) = (held.clone(), released.clone());
        let done = Box::new(move |fetched| {
            assert!(matches!(fetched, Fetched::Here(_)), "{fetched:?}");
            tell.send(()).unwrap();
            let _ = gate.lock().recv_timeout(PATIENCE);
        });
        self.fetcher.fetch(model().keys[0], slot, Urgency::Demand, done);
        is_held.recv_timeout(PATIENCE).unwrap();
        let (let_go, gone) = mpsc::channel::<()>();
        let path = std::env::current_exe().unwrap();
        let file = Arc::new(BlockFile::open(&path).unwrap());
        let slot = pool.take(1).unwrap();
        let done = Box::new(move |_| {
            held.send(()).unwrap();
            let _ = gone.recv_timeout(PATIENCE);
        });
        self.reader.submit(Read { file, offset: 0, slot, priority: Priority::Demand, done });
        is_held.recv_timeout(PATIENCE).unwrap();
        Held { reader: self.reader.clone(), let_go, release }
    }
}

/// A disk cache over a store in memory.
pub(crate) fn over_memory(
    memory: &Arc<Memory>,
    reader: &Arc<BlockReader>,
    folder: &Path,
    experts: u64,
) -> std::io::Result<Arc<dyn Fetcher>> {
    let checkpoint = Checkpoint::open_archive(memory.clone(), None).unwrap();
    let (folder, budget) = (folder.to_owned(), experts * model().slot);
    fetcher(checkpoint, reader, Some(NvmeFolder { folder, budget }))
}

fn fetcher(
    checkpoint: Checkpoint,
    reader: &Arc<BlockReader>,
    nvme: Option<NvmeFolder>,
) -> std::io::Result<Arc<dyn Fetcher>> {
    let options = FetchOptions { reader: reader.clone(), nvme, threads: 1, requests: 1 };
    fetcher_for(&Arc::new(checkpoint), options)
}

/// Files of experts below a folder, those that are being written included, and their sizes.
pub(crate) fn kept(folder: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for folder in fs::read_dir(folder).into_iter().flatten().flatten() {
        for entry in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
            // It may be gone meanwhile.
            if let Ok(metadata) = entry.metadata() {
                found.push((entry.path(), metadata.len()));
            }
        }
    }
    found
}

/// Waits until something holds.
pub(crate) fn wait(mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "it does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

/// See [`Source::hold`].
pub(crate) struct Held {
    reader: Arc<BlockReader>,
    let_go: Sender<()>,
    release: Sender<()>,
}

impl Held {
    pub(crate) fn release(self) {
        drop(self.let_go);
        // What was read is in the order of urgency before the first of it is answered.
        wait(|| self.reader.counters().waiting == 0);
        drop(self.release);
    }
}

/// Fetches, and hears what comes.
pub(crate) struct Client {
    pub(crate) pool: Arc<SlotPool>,
    tell: Sender<(ExpertKey, Fetched)>,
    pub(crate) answers: Receiver<(ExpertKey, Fetched)>,
}

impl Client {
    /// With room for so many experts.
    pub(crate) fn new(slots: usize) -> Self {
        let (tell, answers) = mpsc::channel();
        Self { pool: SlotPool::new(slots as u64 * model().slot), tell, answers }
    }

    pub(crate) fn fetch(&self, fetcher: &dyn Fetcher, key: ExpertKey, urgency: Urgency) {
        let slot = self.pool.take(model().bytes).unwrap();
        let (tell, pool, me) = (self.tell.clone(), self.pool.clone(), thread::current().id());
        let slots = pool.budget() / model().slot;
        let done = Box::new(move |fetched| {
            assert_ne!(thread::current().id(), me, "it is told from another thread");
            if slots == 1 && !matches!(fetched, Fetched::Here(_)) {
                assert_eq!(pool.used(), 0, "the slot was given back before");
            }
            let _ = tell.send((key, fetched));
        });
        fetcher.fetch(key, slot, urgency, done);
    }

    pub(crate) fn answer(&self) -> (ExpertKey, Fetched) {
        self.answers.recv_timeout(PATIENCE).expect("every fetch is answered")
    }

    /// The next answer is this expert, and right.
    pub(crate) fn right(&self, key: ExpertKey) {
        let (found, fetched) = self.answer();
        assert_eq!(found, key, "{fetched:?}");
        check(key, &fetched);
    }

    /// The next answer is that this expert was cancelled.
    pub(crate) fn cancelled(&self, among: &[ExpertKey]) {
        let (key, fetched) = self.answer();
        assert!(among.contains(&key) && matches!(fetched, Fetched::Cancelled), "{fetched:?}");
    }
}

pub(crate) fn check(key: ExpertKey, fetched: &Fetched) {
    let Fetched::Here(expert) = fetched else { panic!("{key}: {fetched:?}") };
    assert!(bytes_of(expert) == model().truth[&key], "{key} has other bytes");
}

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) as usize % n
    }
}
