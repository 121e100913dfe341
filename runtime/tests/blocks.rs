//! The block reader through its public face: with the ring and with threads, past the page cache and
//! through it.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::Duration,
};

use lite_llm_kernels::slots::{Slot, SlotPool};
use lite_llm_runtime::blocks::{
    BlockFile, BlockOptions, BlockReader, Priority, Priority::Demand, Priority::Prefetch, Read,
    ReadId, Unread,
};

const KIB: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(60);

/// A file of bytes that tell their position, in a folder of its own.
struct Fixture {
    folder: tempfile::TempDir,
    path: PathBuf,
    bytes: usize,
}

impl Fixture {
    fn new(bytes: usize) -> Self {
        // Below the target folder: temporary folders may lie in memory.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = folder.path().join("shard");
        let mut random = Random(bytes as u64);
        let mut block: Vec<u8> = (0..4096).map(|_| random.next() as u8).collect();
        let mut content = Vec::with_capacity(bytes + block.len());
        while content.len() < bytes {
            block[..8].copy_from_slice(&random.next().to_le_bytes());
            content.extend_from_slice(&block);
        }
        content.truncate(bytes);
        std::fs::write(&path, content).unwrap();
        Self { folder, path, bytes }
    }

    fn open(&self) -> Arc<BlockFile> {
        Arc::new(BlockFile::open(&self.path).unwrap())
    }

    fn at(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut found = vec![0; bytes];
        File::open(&self.path).unwrap().read_exact_at(&mut found, offset).unwrap();
        found
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
}

/// Every way to read.
fn ways() -> Vec<BlockOptions> {
    let mut ways = Vec::new();
    for (ring, direct) in [(true, true), (true, false), (false, true), (false, false)] {
        ways.push(BlockOptions { ring, direct, ..BlockOptions::default() });
    }
    ways
}

/// One request at a time, so that their order is seen.
fn one_by_one(ring: bool) -> BlockOptions {
    BlockOptions {
        ring,
        chunk: 64 * KIB,
        in_flight: 1,
        prefetch_in_flight: 1,
        threads: 1,
        ..BlockOptions::default()
    }
}

type Answers<T> = mpsc::Receiver<(T, io::Result<Slot>)>;

/// Submits reads whose answers come with their names.
struct Client<T> {
    reader: Arc<BlockReader>,
    pool: Arc<SlotPool>,
    tell: mpsc::Sender<(T, io::Result<Slot>)>,
    answers: Answers<T>,
}

impl<T: Send + 'static> Client<T> {
    fn new(options: BlockOptions) -> Self {
        let (tell, answers) = mpsc::channel();
        let reader = BlockReader::new(options).unwrap();
        Self { reader, pool: SlotPool::new(256 << 20), tell, answers }
    }

    fn read(
        &self,
        name: T,
        file: &Arc<BlockFile>,
        offset: u64,
        bytes: usize,
        priority: Priority,
    ) -> ReadId {
        let (tell, slot) = (self.tell.clone(), self.pool.take(bytes).unwrap());
        let done = Box::new(move |result: Result<_, Unread>| {
            assert!(result.as_ref().err().is_none_or(|unread| unread.slot.is_some()));
            tell.send((name, result.map_err(io::Error::from))).unwrap();
        });
        self.reader.submit(Read { file: file.clone(), offset, slot, priority, done })
    }

    fn answer(&self) -> (T, io::Result<Slot>) {
        self.answers.recv_timeout(PATIENCE).expect("every read is answered")
    }

    /// Holds the reader up in an answer until what is returned is dropped.
    fn hold(&self, file: &Arc<BlockFile>) -> mpsc::Sender<()> {
        let (held, is_held) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let slot = self.pool.take(1).unwrap();
        let done = Box::new(move |_| {
            held.send(()).unwrap();
            let _ = released.recv_timeout(PATIENCE);
        });
        let file = file.clone();
        self.reader.submit(Read { file, offset: 0, slot, priority: Demand, done });
        is_held.recv_timeout(PATIENCE).unwrap();
        release
    }
}

#[test]
fn many_reads_anywhere_are_what_the_file_holds() {
    // It does not end at a block.
    let fixture = Fixture::new((9 << 20) + 1234);
    for options in ways() {
        let (ring, direct) = (options.ring, options.direct);
        let client = Client::new(options);
        let file = fixture.open();
        let mut random = Random(7);
        let mut bytes_read = 0;
        for _ in 0..5 {
            let mut count = 0;
            for _ in 0..40 {
                let bytes = [1, 5000, 300 * KIB, (2 << 20) + 100][random.below(4)];
                let mut offset = random.below(fixture.bytes - bytes);
                if random.below(4) > 0 {
                    offset = offset / 4096 * 4096;
                }
                let offset = offset as u64;
                let priority = [Demand, Prefetch][random.below(2)];
                client.read((offset, bytes), &file, offset, bytes, priority);
                (count, bytes_read) = (count + 1, bytes_read + bytes);
            }
            // The very end.
            let offset = (fixture.bytes as u64 - 70_000) / 4096 * 4096;
            let bytes = fixture.bytes - offset as usize;
            client.read((offset, bytes), &file, offset, bytes, Demand);
            (count, bytes_read) = (count + 1, bytes_read + bytes);
            for _ in 0..count {
                let ((offset, bytes), result) = client.answer();
                assert!(result.unwrap()[..] == fixture.at(offset, bytes), "{bytes} at {offset}");
            }
        }
        let (counters, how) = (client.reader.counters(), client.reader.describe());
        assert_eq!((counters.reads, counters.bytes), (205, bytes_read as u64), "{how}");
        assert_eq!((counters.failed, counters.cancelled, counters.waiting), (0, 0, 0));
        if !direct {
            assert_eq!(counters.requests, counters.cached);
            assert!(how.ends_with("page cache"), "{how}");
        }
        if !ring {
            assert!(how.starts_with("pread"), "{how}");
        }
        assert_eq!(client.pool.used(), 0);
    }
}

#[test]
fn demands_go_before_prefetches_and_a_promoted_prefetch_is_one() {
    let fixture = Fixture::new(1 << 20);
    for ring in [true, false] {
        let client = Client::new(one_by_one(ring));
        let file = fixture.open();
        let gate = client.hold(&file);
        let ids: Vec<_> = (0..6).map(|i| client.read(i, &file, 0, 200 * KIB, Prefetch)).collect();
        for i in 6..9 {
            client.read(i, &file, 4096, 200 * KIB, Demand);
        }
        client.reader.promote(ids[3]);
        drop(gate);
        let order: Vec<_> = (0..9).map(|_| client.answer()).map(|(i, r)| (i, r.is_ok())).collect();
        let expected = [6, 7, 8, 3, 0, 1, 2, 4, 5].map(|i| (i, true));
        assert_eq!(order, expected, "{}", client.reader.describe());
    }
}

/// Whether it happens at least once: this thread may be held up for as long as a read takes.
fn happens(mut attempt: impl FnMut() -> bool) -> bool {
    (0..20).any(|_| attempt())
}

#[test]
fn a_demand_waits_for_requests_in_flight_not_for_the_prefetch_that_made_them() {
    let fixture = Fixture::new(64 << 20);
    for ring in [true, false] {
        let client = Client::new(one_by_one(ring));
        let file = fixture.open();
        let overtakes = || {
            let long = client.read(0, &file, 0, fixture.bytes, Prefetch);
            client.read(1, &file, 4096, 64 * KIB, Demand);
            let (first, _) = client.answer();
            client.reader.promote(long);
            let (second, result) = client.answer();
            if second == 0 {
                assert!(result.unwrap()[..] == fixture.at(0, fixture.bytes));
            }
            first == 1
        };
        assert!(happens(overtakes), "{}", client.reader.describe());
    }
}

#[test]
fn what_is_cancelled_before_it_began_is_told_so_and_frees_its_slot() {
    let fixture = Fixture::new(1 << 20);
    for ring in [true, false] {
        let client = Client::new(one_by_one(ring));
        let file = fixture.open();
        let gate = client.hold(&file);
        let first = client.read(0, &file, 0, 100 * KIB, Demand);
        let second = client.read(1, &file, 0, 100 * KIB, Prefetch);
        client.read(2, &file, 0, 100 * KIB, Prefetch);
        client.reader.cancel(second);
        client.reader.cancel(second);
        drop(gate);
        let mut answers: Vec<_> = (0..3).map(|_| client.answer()).collect();
        answers.sort_by_key(|(name, _)| *name);
        let cancelled = answers[1].1.as_ref().unwrap_err();
        assert_eq!(cancelled.kind(), io::ErrorKind::Interrupted);
        assert!(cancelled.to_string().contains("shard"), "{cancelled}");
        assert!(answers[0].1.is_ok() && answers[2].1.is_ok());
        // Those that have ended are not minded.
        client.reader.cancel(first);
        client.reader.promote(second);
        answers.clear();
        assert_eq!(client.pool.used(), 0);
        assert_eq!(client.reader.counters().cancelled, 1);
    }
}

#[test]
fn the_rest_of_a_long_prefetch_can_be_cancelled() {
    let fixture = Fixture::new(64 << 20);
    for ring in [true, false] {
        let client = Client::new(one_by_one(ring));
        let file = fixture.open();
        let is_cut = || {
            let before = client.reader.counters().requests;
            let long = client.read((), &file, 0, fixture.bytes, Prefetch);
            while client.reader.counters().requests == before {
                std::thread::yield_now();
            }
            client.reader.cancel(long);
            let (_, result) = client.answer();
            result.is_err_and(|error| error.kind() == io::ErrorKind::Interrupted)
        };
        assert!(happens(is_cut), "{}", client.reader.describe());
        assert_eq!(client.pool.used(), 0);
    }
}

#[test]
fn a_file_that_ends_early_or_is_not_there_is_an_error_that_says_where() {
    let fixture = Fixture::new(1 << 20);
    for options in ways() {
        let client = Client::new(options);
        let file = fixture.open();
        File::options().write(true).open(&fixture.path).unwrap().set_len(300_000).unwrap();
        client.read((), &file, 8192, 400_000, Demand);
        let error = client.answer().1.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let text = error.to_string();
        let path = fixture.path.display().to_string();
        let says = [&path, "400000 bytes at 8192", "ends after 291808"];
        assert!(says.iter().all(|says| text.contains(says)), "{text}");
        // All that is wanted may be there although not all of the last block is.
        client.read((), &file, 8192, 291_808, Demand);
        assert!(client.answer().1.unwrap()[..] == fixture.at(8192, 291_808));
        client.read((), &file, 1 << 40, 10, Demand);
        let text = client.answer().1.unwrap_err().to_string();
        assert!(text.contains("ends after 0"), "{text}");
        assert_eq!(client.reader.counters().failed, 2);
        assert_eq!(client.pool.used(), 0);
    }
    let absent = BlockFile::open(Path::new("/nowhere/shard")).unwrap_err();
    assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    assert!(absent.to_string().contains("/nowhere/shard"), "{absent}");
    // Opening a pipe would wait for ever.
    let pipe = fixture.folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for other in [fixture.folder.path(), &pipe] {
        let text = BlockFile::open(other).unwrap_err().to_string();
        let path = other.display().to_string();
        assert!(text.contains(&path) && text.contains("not a regular file"), "{text}");
    }
}

#[test]
fn a_reader_that_is_dropped_answers_everything() {
    let fixture = Fixture::new(16 << 20);
    for options in ways() {
        let client = Client::new(BlockOptions { in_flight: 1 << 20, threads: 2, ..options });
        let file = fixture.open();
        for i in 0..30 {
            client.read(i, &file, 0, 2 << 20, if i % 2 == 0 { Demand } else { Prefetch });
        }
        let (first, result) = client.answer();
        assert!(result.is_ok());
        drop(result);
        let Client { reader, pool, answers, tell } = client;
        drop((reader, tell));
        let mut names = vec![first];
        // The reader is gone: no answer comes after this.
        for (name, result) in answers.try_iter() {
            match result {
                Ok(slot) => assert!(slot[..] == fixture.at(0, 2 << 20)),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}"),
            }
            names.push(name);
        }
        names.sort_unstable();
        assert_eq!(names, (0..30).collect::<Vec<_>>());
        assert_eq!(pool.used(), 0);
    }
}

#[test]
fn an_answer_may_drop_the_reader_or_panic() {
    let fixture = Fixture::new(1 << 20);
    for options in ways() {
        let client = Client::new(options);
        let file = fixture.open();
        let slot = client.pool.take(10).unwrap();
        let done = Box::new(|_| panic!("on purpose"));
        client.reader.submit(Read { file: file.clone(), offset: 0, slot, priority: Demand, done });
        client.read(1, &file, 0, 10, Demand);
        assert_eq!(client.answer().0, 1);
        let Client { reader, pool, tell, answers } = client;
        let (last, slot) = (reader.clone(), pool.take(10).unwrap());
        let (let_go, gone) = mpsc::channel::<()>();
        let done = Box::new(move |result: Result<_, Unread>| {
            gone.recv_timeout(PATIENCE).unwrap();
            drop(last);
            tell.send((2, result.map_err(io::Error::from))).unwrap();
        });
        reader.submit(Read { file, offset: 0, slot, priority: Demand, done });
        drop(reader);
        let_go.send(()).unwrap();
        assert_eq!(answers.recv_timeout(PATIENCE).unwrap().0, 2);
    }
}

#[test]
fn histories_of_many_threads_are_answered_once_each() {
    let fixture = Fixture::new(8 << 20);
    for options in ways() {
        let options = BlockOptions { in_flight: 2 << 20, threads: 3, ..options };
        let client = Client::<()>::new(options);
        let file = fixture.open();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (client, file, fixture) = (&client.reader, &file, &fixture);
                let pool = SlotPool::new(64 << 20);
                scope.spawn(move || {
                    let (tell, answers) = mpsc::channel();
                    let mut random = Random(thread);
                    for round in 0..20 {
                        let mut ids = Vec::new();
                        for _ in 0..10 {
                            let bytes = 1 + random.below(600 * KIB);
                            let offset = random.below(1500) as u64 * 4096;
                            let (slot, tell) = (pool.take(bytes).unwrap(), tell.clone());
                            let done = Box::new(move |result: Result<Slot, Unread>| {
                                let result = result.map_err(io::Error::from);
                                tell.send((offset, bytes, result)).unwrap()
                            });
                            let priority = [Demand, Prefetch][random.below(2)];
                            let file = file.clone();
                            ids.push(client.submit(Read { file, offset, slot, priority, done }));
                            let id = ids[random.below(ids.len())];
                            match random.below(4) {
                                0 => client.promote(id),
                                1 => client.cancel(id),
                                _ => {}
                            }
                        }
                        for _ in 0..10 {
                            let (offset, bytes, result) = answers.recv_timeout(PATIENCE).unwrap();
                            match result {
                                Ok(slot) if round % 5 == 0 => {
                                    assert!(slot[..] == fixture.at(offset, bytes))
                                }
                                Ok(_) => {}
                                Err(error) => {
                                    assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}")
                                }
                            }
                        }
                    }
                    assert!(answers.try_recv().is_err());
                    assert_eq!(pool.used(), 0);
                });
            }
        });
        let counters = client.reader.counters();
        assert_eq!(counters.reads + counters.cancelled, 800);
        assert_eq!((counters.waiting, counters.failed), (0, 0));
    }
}
