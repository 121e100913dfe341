//! Memory of our own for weights that come and go: slots of a pool, under a budget.
//!
//! Invariants: the bytes that a pool has mapped, used and spare, never exceed its budget, and its
//! resident memory never exceeds the bytes mapped; a slot begins at a multiple of [`SLOT_ALIGN`], so
//! a disk can write into it directly; its memory is given to nobody else before it is dropped, which
//! for a slot that became a [`Buffer`](crate::buffer::Buffer) is when the last of its slices goes.
//!
//! Slots of one size lie side by side in regions of some dozen MiB. Those consist of huge pages
//! where the system has them: a read into scattered small pages costs several times the processor
//! time, and slow disks half their rate.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    slice,
    sync::Arc,
};

use memmap2::{MmapMut, MmapRaw, UncheckedAdvice};
use parking_lot::Mutex;

/// Alignment of slots in bytes, and what their sizes are rounded up to: what O_DIRECT asks for.
pub const SLOT_ALIGN: usize = 4096;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Bytes of a region, if its slots are not larger. Beyond its last whole huge page a region has
/// small ones; here they are at most a sixteenth of it.
const REGION: usize = 32 << 20;

/// Why there is no slot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoSlot {
    /// The budget has no room, spare slots of other sizes counted as room.
    #[error("{needed} bytes are needed, {free} of a budget of {budget} are free")]
    OverBudget {
        /// Bytes of the slot, rounded up to [`SLOT_ALIGN`].
        needed: u64,
        /// Bytes of the budget that no slot uses.
        free: u64,
        /// Bytes of the budget.
        budget: u64,
    },
    /// The system refuses memory that the budget would allow.
    #[error("the system gives no memory for a slot of {bytes} bytes: {reason}")]
    System {
        /// Bytes of the slot, rounded up to [`SLOT_ALIGN`].
        bytes: u64,
        /// What the system says.
        reason: String,
    },
}

/// Slots of any size, whose memory is kept for the next of the same size when they are dropped.
pub struct SlotPool {
    budget: u64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By the bytes of a slot.
    classes: BTreeMap<usize, Class>,
    regions: u64,
    used: u64,
    mapped: u64,
}

/// All slots of one size.
#[derive(Default)]
struct Class {
    /// By age. The oldest are used first, so that the youngest become free as a whole.
    regions: BTreeMap<u64, Region>,
    /// Those that have spare slots.
    spare: BTreeSet<u64>,
    /// Those that have slots without memory.
    blank: BTreeSet<u64>,
}

struct Region {
    map: MmapRaw,
    /// Where the first slot begins in the mapping.
    begin: usize,
    slots: usize,
    spare: Vec<usize>,
    /// Slots whose memory went back to the system. Their addresses stay reserved, and they do not
    /// count as mapped.
    blank: Vec<usize>,
}

impl SlotPool {
    /// An empty pool for at most `budget` bytes. It takes memory as slots are taken.
    pub fn new(budget: u64) -> Arc<Self> {
        Arc::new(Self { budget, inner: Mutex::default() })
    }

    /// Bytes that it may have mapped.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Bytes of the slots that are taken, each rounded up to [`SLOT_ALIGN`].
    pub fn used(&self) -> u64 {
        self.inner.lock().used
    }

    /// Bytes of the slots that are taken or spare.
    pub fn mapped(&self) -> u64 {
        self.inner.lock().mapped
    }

    /// A slot of `bytes` bytes, with whatever its last user left in it. While the slots taken and
    /// this one fit the budget, there is room: spare slots of other sizes are given up for it.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Slot, NoSlot> {
        let over = |needed, free| NoSlot::OverBudget { needed, free, budget: self.budget };
        let mut inner = self.inner.lock();
        let free = self.budget - inner.used;
        let size = match bytes.max(1).checked_next_multiple_of(SLOT_ALIGN) {
            Some(size) if size as u64 <= free => size,
            Some(size) => return Err(over(size as u64, free)),
            None => return Err(over(bytes as u64, free)),
        };
        let system =
            |error: io::Error| NoSlot::System { bytes: size as u64, reason: error.to_string() };
        if inner.classes.get(&size).is_none_or(|class| class.spare.is_empty()) {
            inner.make_room(self.budget, size).map_err(system)?;
            inner.more(self.budget, size).map_err(system)?;
        }
        let (region, index, begin) = inner.take_spare(size);
        Ok(Slot { begin, bytes, size, region, index, pool: self.clone() })
    }

    /// Gives the memory of regions without slots in use back to the system.
    pub fn trim(&self) {
        let mut inner = self.inner.lock();
        let unused: Vec<(usize, u64)> = inner
            .classes
            .iter()
            .flat_map(|(&size, class)| {
                let unused = class.regions.iter().filter(|(_, region)| region.is_unused());
                unused.map(move |(&id, _)| (size, id))
            })
            .collect();
        unused.into_iter().for_each(|(size, id)| inner.unmap(size, id));
    }

    fn put_back(&self, slot: &Slot) {
        let mut inner = self.inner.lock();
        inner.used -= slot.size as u64;
        let class = inner.classes.get_mut(&slot.size).expect("a class stays while slots are used");
        let region = class.regions.get_mut(&slot.region).expect("and so does a region");
        region.spare.push(slot.index);
        class.spare.insert(slot.region);
    }
}

impl fmt::Debug for SlotPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        write!(f, "SlotPool({} used, {} mapped of {} bytes)", inner.used, inner.mapped, self.budget)
    }
}

impl Inner {
    /// Has room for one more slot of a size that has no spare one, giving up spare ones of others:
    /// whole regions first, for they leave no holes in huge pages.
    fn make_room(&mut self, budget: u64, size: usize) -> io::Result<()> {
        while budget - self.mapped < size as u64 {
            let whole = self.classes.iter().find_map(|(&size, class)| {
                let spare = class.spare.iter().rev();
                let mut whole = spare.filter(|id| class.regions[id].is_unused());
                whole.next().map(|&id| (size, id))
            });
            if let Some((size, id)) = whole {
                self.unmap(size, id);
                continue;
            }
            let (&size, class) = self
                .classes
                .iter_mut()
                .find(|(_, class)| !class.spare.is_empty())
                .expect("slots that are not used are spare");
            let id = *class.spare.last().expect("as just seen");
            let region = class.regions.get_mut(&id).expect("listed regions exist");
            region.discard(size)?;
            class.blank.insert(id);
            if region.spare.is_empty() {
                class.spare.remove(&id);
            }
            self.mapped -= size as u64;
        }
        Ok(())
    }

    fn unmap(&mut self, size: usize, id: u64) {
        let class = self.classes.get_mut(&size).expect("listed classes exist");
        let region = class.regions.remove(&id).expect("listed regions exist");
        class.spare.remove(&id);
        class.blank.remove(&id);
        if class.regions.is_empty() {
            self.classes.remove(&size);
        }
        let spare = region.spare.len();
        // Its memory goes before it stops counting.
        drop(region);
        self.mapped -= (spare * size) as u64;
    }

    /// Has a spare slot of a size for which there is room.
    fn more(&mut self, budget: u64, size: usize) -> io::Result<()> {
        let class = self.classes.entry(size).or_default();
        if let Some(&id) = class.blank.first() {
            let region = class.regions.get_mut(&id).expect("listed regions exist");
            region.revive(size);
            if region.blank.is_empty() {
                class.blank.remove(&id);
            }
            class.spare.insert(id);
            self.mapped += size as u64;
            return Ok(());
        }
        let room = usize::try_from(budget - self.mapped).unwrap_or(usize::MAX);
        let slots = (REGION.min(room) / size).max(1);
        let region = Region::new(slots, size).inspect_err(|_| {
            if self.classes[&size].regions.is_empty() {
                self.classes.remove(&size);
            }
        })?;
        let class = self.classes.entry(size).or_default();
        class.regions.insert(self.regions, region);
        class.spare.insert(self.regions);
        self.regions += 1;
        self.mapped += (slots * size) as u64;
        Ok(())
    }

    fn take_spare(&mut self, size: usize) -> (u64, usize, NonNull<u8>) {
        let class = self.classes.get_mut(&size).expect("there is a spare slot");
        let id = *class.spare.first().expect("there is a spare slot");
        let region = class.regions.get_mut(&id).expect("listed regions exist");
        let index = region.spare.pop().expect("listed regions have spare slots");
        if region.spare.is_empty() {
            class.spare.remove(&id);
        }
        self.used += size as u64;
        (id, index, region.slot(index, size))
    }
}

impl Region {
    fn new(slots: usize, size: usize) -> io::Result<Self> {
        let bytes = slots * size;
        // Huge pages begin at their multiples, mappings do not. What is mapped beside the slots to
        // make up for it is never touched, so it takes no memory.
        let beside = if bytes < HUGE { 0 } else { HUGE };
        let length = bytes.checked_add(beside).ok_or(io::ErrorKind::OutOfMemory)?;
        let map = MmapRaw::from(MmapMut::map_anon(length)?);
        let begin = match beside {
            0 => 0,
            _ => map.as_ptr().align_offset(HUGE),
        };
        let region = Self { map, begin, slots, spare: (0..slots).rev().collect(), blank: vec![] };
        region.advise_huge(bytes);
        Ok(region)
    }

    /// Asks for huge pages where all of them is ours, and for none where it is not: the memory of
    /// a huge page is taken as a whole.
    #[cfg(target_os = "linux")]
    fn advise_huge(&self, bytes: usize) {
        use memmap2::Advice::{HugePage, NoHugePage};
        let whole = bytes / HUGE * HUGE;
        // A system that has none says so, and small pages serve.
        let _ = self.map.advise_range(NoHugePage, 0, self.map.len());
        if whole > 0 {
            let _ = self.map.advise_range(HugePage, self.begin, whole);
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn advise_huge(&self, _: usize) {}

    fn is_unused(&self) -> bool {
        self.spare.len() + self.blank.len() == self.slots
    }

    fn slot(&self, index: usize, size: usize) -> NonNull<u8> {
        let begin = self.map.as_mut_ptr().wrapping_add(self.begin + index * size);
        NonNull::new(begin).expect("no mapping holds address 0")
    }

    /// Gives a spare slot's memory back to the system.
    fn discard(&mut self, size: usize) -> io::Result<()> {
        let index = *self.spare.last().expect("the region has a spare slot");
        if self.blank.is_empty() {
            // Touching a part of a hole would else take the memory of all of it.
            self.advise_huge(0);
        }
        let begin = self.map.as_ptr() as usize + self.begin + index * size;
        // Where pages are larger than slots' alignment, those that it shares with others stay.
        let page = page_bytes();
        let (from, to) = (begin.next_multiple_of(page), (begin + size) / page * page);
        if from < to {
            let from_map = from - self.map.as_ptr() as usize;
            // SAFETY: the range consists of whole pages of a spare slot, which nobody refers to;
            // whoever takes it again finds zeros.
            unsafe {
                self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, from_map, to - from)?;
            }
        }
        self.spare.pop();
        self.blank.push(index);
        Ok(())
    }

    /// Lets a slot without memory have some again, as it is touched.
    fn revive(&mut self, size: usize) {
        let index = self.blank.pop().expect("the region has a slot without memory");
        self.spare.push(index);
        if self.blank.is_empty() {
            // Without holes, the system may put huge pages together again.
            self.advise_huge(self.slots * size);
        }
    }
}

fn page_bytes() -> usize {
    // SAFETY: it takes a number and returns one.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(SLOT_ALIGN).max(SLOT_ALIGN)
}

/// Bytes of a pool, its owner's alone. They go back to the pool when it is dropped.
pub struct Slot {
    begin: NonNull<u8>,
    /// As asked for.
    bytes: usize,
    /// Rounded up.
    size: usize,
    region: u64,
    index: usize,
    pool: Arc<SlotPool>,
}

// SAFETY: a slot owns its bytes as a `Box<[u8]>` does; the pool is shared behind a lock.
unsafe impl Send for Slot {}
// SAFETY: as above; a shared slot is only read.
unsafe impl Sync for Slot {}

impl Slot {
    /// The pool that it goes back to.
    pub fn pool(&self) -> &Arc<SlotPool> {
        &self.pool
    }

    /// All of it, rounded up to [`SLOT_ALIGN`]: what a disk that reads whole blocks writes into.
    pub fn raw_mut(&mut self) -> &mut [u8] {
        // SAFETY: `size` bytes from `begin` are mapped and initialised (by the system, with zeros)
        // and lie in a region that is not unmapped before this slot is back. No other slot has a
        // part of them, and `&mut self` excludes every other reference through this one.
        unsafe { slice::from_raw_parts_mut(self.begin.as_ptr(), self.size) }
    }
}

impl Deref for Slot {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: as in `raw_mut`, of which these are the first bytes; `&self` excludes writers.
        unsafe { slice::from_raw_parts(self.begin.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        &mut self.raw_mut()[..bytes]
    }
}

impl AsRef<[u8]> for Slot {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({} bytes)", self.bytes)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.put_back(self);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::buffer::Buffer;

    const MIB: usize = 1 << 20;

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            ((self.0 >> 33) as usize) % n
        }
    }

    #[test]
    fn slots_are_aligned_and_as_long_as_asked() {
        let pool = SlotPool::new(64 * MIB as u64);
        let mut held = Vec::new();
        for bytes in [0, 1, 4096, 4097, 400_000, 3 * MIB + 5] {
            let mut slot = pool.take(bytes).unwrap();
            assert_eq!(slot.len(), bytes);
            assert_eq!(slot.as_ptr() as usize % SLOT_ALIGN, 0);
            let raw = slot.raw_mut();
            assert_eq!(raw.len(), bytes.max(1).next_multiple_of(SLOT_ALIGN));
            assert!(raw.iter().all(|&b| b == 0), "pages of the system");
            raw.fill(7);
            held.push(slot);
        }
        let used: usize = held.iter_mut().map(|slot| slot.raw_mut().len()).sum();
        assert_eq!(pool.used(), used as u64);
        held.clear();
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.take(400_000).unwrap()[0], 7, "kept, not cleared");
    }

    #[test]
    fn whatever_fits_the_budget_beside_what_is_used_has_room() {
        let pool = SlotPool::new(10 * MIB as u64);
        let many: Vec<_> = (0..25).map(|_| pool.take(400 << 10).unwrap()).collect();
        let full = pool.take(400 << 10).unwrap_err();
        let (needed, budget) = (400 << 10, 10 << 20);
        assert_eq!(full, NoSlot::OverBudget { needed, free: 240 << 10, budget });
        assert!(full.to_string().contains("409600 bytes"), "{full}");
        // Every second goes: half of the budget, nowhere two of them side by side.
        let kept: Vec<_> = many.into_iter().step_by(2).collect();
        let mut large = pool.take(4 * MIB).unwrap();
        large.fill(1);
        assert!(pool.mapped() <= pool.budget());
        let small = pool.take(400 << 10).unwrap();
        assert!(pool.take(MIB).is_err());
        drop((kept, small));
        drop(large);
        let mut whole = pool.take(10 * MIB).unwrap();
        whole.fill(1);
        assert_eq!((pool.used(), pool.mapped()), (pool.budget(), pool.budget()));
        assert!(matches!(pool.take(usize::MAX), Err(NoSlot::OverBudget { .. })));
    }

    #[test]
    fn memory_that_the_system_refuses_is_an_error() {
        let pool = SlotPool::new(u64::MAX);
        let refused = pool.take(1 << 62).unwrap_err();
        assert!(matches!(refused, NoSlot::System { .. }), "{refused}");
        assert_eq!((pool.used(), pool.mapped()), (0, 0));
        pool.take(1).unwrap();
    }

    #[test]
    fn a_slot_that_a_buffer_shares_is_not_taken_before_the_last_slice_goes() {
        let pool = SlotPool::new(8192);
        let mut slot = pool.take(8000).unwrap();
        slot.fill(3);
        let whole = Buffer::from_owner(slot).unwrap();
        let part = whole.slice(4096..8000).unwrap();
        drop(whole);
        assert!(matches!(pool.take(1), Err(NoSlot::OverBudget { free: 0, .. })));
        assert!(part.iter().all(|&b| b == 3));
        drop(part);
        pool.take(8000).unwrap();
    }

    /// Pages of a range that are in memory, from the flags that the kernel shows every process.
    #[cfg(target_os = "linux")]
    fn resident(begin: usize, bytes: usize) -> usize {
        use std::os::unix::fs::FileExt;
        let pages = std::fs::File::open("/proc/self/pagemap").unwrap();
        let page = page_bytes();
        let mut flags = vec![0; bytes / page * 8];
        pages.read_exact_at(&mut flags, (begin / page * 8) as u64).unwrap();
        flags.chunks(8).filter(|flag| flag[7] & 0x80 != 0).count() * page
    }

    #[cfg(target_os = "linux")]
    fn resident_of(pool: &SlotPool) -> u64 {
        let inner = pool.inner.lock();
        let regions = inner.classes.values().flat_map(|class| class.regions.values());
        regions.map(|region| resident(region.map.as_ptr() as usize, region.map.len()) as u64).sum()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn resident_memory_stays_within_what_counts_as_mapped() {
        let pool = SlotPool::new(50 * MIB as u64 + 4096);
        let mut random = Random(5);
        let mut held: Vec<Slot> = Vec::new();
        for _ in 0..400 {
            let bytes = [400 << 10, 3 * MIB + 4096, 700 << 10, 9000][random.below(4)];
            match pool.take(bytes) {
                Ok(mut slot) => {
                    slot.raw_mut().fill(1);
                    held.push(slot);
                }
                Err(_) => held.truncate(random.below(held.len())),
            }
            if !held.is_empty() && random.below(3) == 0 {
                held.swap_remove(random.below(held.len()));
            }
            let (resident, mapped) = (resident_of(&pool), pool.mapped());
            assert!(resident <= mapped && mapped <= pool.budget(), "{resident} of {mapped}");
        }
    }

    #[test]
    fn histories_of_many_threads_stay_within_the_budget_and_share_no_byte() {
        let pool = SlotPool::new(24 * MIB as u64);
        thread::scope(|scope| {
            for thread in 0..4u64 {
                let pool = &pool;
                scope.spawn(move || {
                    let mut random = Random(thread);
                    let mut held: Vec<(Slot, u8)> = Vec::new();
                    let check = |(slot, mark): &(Slot, u8)| {
                        assert!([0, slot.len() - 1].iter().all(|&i| slot[i] == *mark));
                    };
                    for step in 0..3000 {
                        let bytes = [5000, 300 << 10, MIB, 2 * MIB + 100][random.below(4)];
                        if let Ok(mut slot) = pool.take(bytes) {
                            let mark = (thread * 64 + step % 64) as u8;
                            (slot[0], slot[bytes - 1]) = (mark, mark);
                            held.push((slot, mark));
                        }
                        while held.len() > 6 || (!held.is_empty() && random.below(3) == 0) {
                            let gone = held.swap_remove(random.below(held.len()));
                            check(&gone);
                        }
                        held.iter().for_each(check);
                        let (used, mapped) = (pool.used(), pool.mapped());
                        assert!(mapped <= pool.budget() && used <= pool.budget());
                    }
                });
            }
        });
        assert_eq!(pool.used(), 0);
        pool.take(24 * MIB).unwrap();
    }
}
