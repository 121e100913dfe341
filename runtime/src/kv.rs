//! Which pages of the key/value cache belong to which sequence.

use lite_llm_kernels::kv::{KvSlot, PAGE_TOKENS};

/// The free pages of an arena.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    pages: usize,
}

/// No page is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the key/value cache is full: {needed} pages of {PAGE_TOKENS} tokens needed, {free} free")]
pub struct CacheFull {
    /// Pages asked for.
    pub needed: usize,
    /// Pages free.
    pub free: usize,
}

impl PagePool {
    /// A pool of `pages` free pages.
    pub fn new(pages: usize) -> Self {
        Self { free: (0..pages as u32).rev().collect(), pages }
    }

    /// Pages in all.
    pub fn capacity(&self) -> usize {
        self.pages
    }

    /// Pages free.
    pub fn free(&self) -> usize {
        self.free.len()
    }
}

/// The pages of one sequence. Give them back with [`PageTable::release`].
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<u32>,
}

impl PageTable {
    /// The pages, in order of position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Takes pages until there is room for `tokens` positions: all that are needed, or none.
    pub fn reserve(&mut self, pool: &mut PagePool, tokens: usize) -> Result<(), CacheFull> {
        let needed = tokens.div_ceil(PAGE_TOKENS).saturating_sub(self.pages.len());
        if needed > pool.free.len() {
            return Err(CacheFull { needed, free: pool.free.len() });
        }
        let keep = pool.free.len() - needed;
        self.pages.extend(pool.free.drain(keep..).rev());
        Ok(())
    }

    /// Gives all pages back.
    pub fn release(&mut self, pool: &mut PagePool) {
        pool.free.append(&mut self.pages);
    }

    /// Where a position lies.
    pub fn slot(&self, position: usize) -> KvSlot {
        KvSlot { page: self.pages[position / PAGE_TOKENS], offset: (position % PAGE_TOKENS) as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_as_needed_and_all_come_back() {
        let mut pool = PagePool::new(3);
        let (mut a, mut b) = (PageTable::default(), PageTable::default());
        a.reserve(&mut pool, 1).unwrap();
        a.reserve(&mut pool, PAGE_TOKENS).unwrap();
        assert_eq!(a.pages().len(), 1);
        a.reserve(&mut pool, PAGE_TOKENS + 1).unwrap();
        assert_eq!(b.reserve(&mut pool, 2 * PAGE_TOKENS), Err(CacheFull { needed: 2, free: 1 }));
        assert!(b.pages().is_empty(), "all or none");
        a.release(&mut pool);
        b.reserve(&mut pool, 3 * PAGE_TOKENS).unwrap();
        assert_eq!(pool.free(), 0);
        assert_eq!(b.slot(PAGE_TOKENS + 5).offset, 5);
    }
}
