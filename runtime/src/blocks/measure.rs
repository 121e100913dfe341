//! What the disk gives: blocks at random places of a file, by the reader and by a loop that has
//! nothing but a ring, in turns.

use std::{
    io,
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use lite_llm_kernels::slots::{Slot, SlotPool};

use super::{BLOCK_ALIGN, BlockFile, BlockOptions, BlockReader, Priority, Read, Unread};

/// How long a block may take before the disk counts as stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// Rates of reading blocks, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// By [`BlockReader`].
    pub reader: f64,
    /// By the loop, with as much in flight; nothing where there is no ring.
    pub bare: Option<f64>,
}

/// Reads `total` bytes by each, in `rounds` turns, as blocks of `block` bytes: `pick(n)` is asked for
/// a number below `n`. A disk that caches is seen as it is only if the file is much larger.
pub fn measure(
    path: &Path,
    block: usize,
    total: u64,
    rounds: u32,
    options: &BlockOptions,
    mut pick: impl FnMut(u64) -> u64,
) -> io::Result<Rates> {
    let file = Arc::new(BlockFile::open(path)?);
    let bytes = std::fs::metadata(path)?.len();
    let places = bytes.saturating_sub(block as u64) / BLOCK_ALIGN;
    if block == 0 || places == 0 {
        let error = io::Error::from(io::ErrorKind::UnexpectedEof);
        return Err(file.error(0, block, &error));
    }
    let blocks = (total / u64::from(rounds.max(1)) / block as u64).max(1);
    // Enough that requests never wait for a block to be taken.
    let at_once = (2 * options.in_flight / block).clamp(4, 512);
    let budget = at_once as u64 * (block as u64).next_multiple_of(BLOCK_ALIGN);
    let setting = Setting { file, block, at_once, pool: SlotPool::new(budget) };
    let reader = BlockReader::new(options.clone())?;
    // Pages are given at their first touch, which is no part of the disk's time.
    let warm = (0..at_once).map(|_| {
        setting.slot().map(|mut slot| {
            slot.raw_mut().fill(1);
            slot
        })
    });
    drop(warm.collect::<io::Result<Vec<Slot>>>()?);
    let (mut by_reader, mut by_loop) = (Duration::ZERO, Some(Duration::ZERO));
    for _ in 0..rounds.max(1) {
        let offsets: Vec<u64> = (0..blocks).map(|_| pick(places) * BLOCK_ALIGN).collect();
        by_reader += setting.by_reader(&reader, &offsets)?;
        let offsets: Vec<u64> = (0..blocks).map(|_| pick(places) * BLOCK_ALIGN).collect();
        by_loop = match by_loop {
            Some(time) => setting.by_loop(options, &offsets)?.map(|more| time + more),
            None => None,
        };
    }
    let bytes = (blocks * u64::from(rounds.max(1)) * block as u64) as f64;
    let rate = |time: Duration| bytes / time.as_secs_f64();
    Ok(Rates { reader: rate(by_reader), bare: by_loop.map(rate) })
}

struct Setting {
    file: Arc<BlockFile>,
    block: usize,
    /// Blocks.
    at_once: usize,
    pool: Arc<SlotPool>,
}

impl Setting {
    fn slot(&self) -> io::Result<Slot> {
        self.pool.take(self.block).map_err(io::Error::other)
    }

    fn by_reader(&self, reader: &BlockReader, offsets: &[u64]) -> io::Result<Duration> {
        let begun = Instant::now();
        let (tell, told) = mpsc::channel();
        let (mut offsets, mut waiting) = (offsets.iter(), 0);
        loop {
            while waiting < self.at_once
                && let Some(&offset) = offsets.next()
            {
                let (file, slot, tell) = (self.file.clone(), self.slot()?, tell.clone());
                // Nobody is told after an error.
                let done = Box::new(move |result| drop(tell.send(result)));
                reader.submit(Read { file, offset, slot, priority: Priority::Demand, done });
                waiting += 1;
            }
            if waiting == 0 {
                return Ok(begun.elapsed());
            }
            let result: Result<Slot, Unread> =
                told.recv_timeout(PATIENCE).map_err(|_| io::ErrorKind::TimedOut)?;
            drop(result?);
            waiting -= 1;
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn by_loop(&self, _: &BlockOptions, _: &[u64]) -> io::Result<Option<Duration>> {
        Ok(None)
    }

    #[cfg(target_os = "linux")]
    fn by_loop(&self, options: &BlockOptions, offsets: &[u64]) -> io::Result<Option<Duration>> {
        use super::ring::{Bell, Part, Ring, Target};
        let (Ok(mut ring), Ok(bell)) = (Ring::new(256), Bell::new()) else { return Ok(None) };
        let raw = self.block.next_multiple_of(BLOCK_ALIGN as usize);
        let chunk = super::part_bytes(raw, options.chunk);
        let begun = Instant::now();
        // By number of the block: its target, and its parts in flight.
        let mut open: Vec<Option<_>> = (0..offsets.len()).map(|_| None).collect();
        let (mut next, mut at, mut in_flight) = (0, 0, 0);
        let mut complete = Vec::new();
        while next < offsets.len() || in_flight > 0 {
            while next < offsets.len() && in_flight < options.in_flight && ring.has_room() {
                if at == 0 {
                    let Ok(slot) = self.pool.take(self.block) else { break };
                    let target = Target::new(slot, self.file.clone(), offsets[next]);
                    open[next] = Some((target, raw.div_ceil(chunk)));
                }
                let Some((target, _)) = &open[next] else { break };
                let (bytes, direct) = (chunk.min(raw - at), options.direct);
                let part = Part { id: next as u64, at, bytes, direct, prefetch: false };
                if ring.push(target, part).is_none() {
                    break;
                }
                (at, in_flight) = (at + bytes, in_flight + bytes);
                if at == raw {
                    (next, at) = (next + 1, 0);
                }
            }
            ring.wait(&bell, PATIENCE, &mut complete)?;
            for (part, result) in complete.drain(..) {
                if result? < part.bytes {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                in_flight -= part.bytes;
                let slot = &mut open[part.id as usize];
                let left = slot.as_mut().map_or(0, |(_, left)| {
                    *left -= 1;
                    *left
                });
                if left == 0 {
                    *slot = None;
                }
            }
        }
        Ok(Some(begun.elapsed()))
    }
}
