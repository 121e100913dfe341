//! Which pages of the key/value cache belong to which sequence, and which hold a prefix that another
//! may use.
//!
//! A full page never changes: its keys and values are a function of the tokens up to its end and of
//! what is served ([`Prefix`]), whoever computed them (determinism contract). So it may be shared.
//!
//! Invariants: a page is free, or has users, or is idle: nobody's, but known by its prefix; what a
//! sequence still writes into has one user; an idle page is given up when a page is needed, the one
//! that was used longest ago first, and of a prefix its end first.

use std::collections::{BTreeSet, HashMap};

use lite_llm_kernels::kv::PAGE_TOKENS;

use crate::tier::TierMask;

/// What a page's contents are a function of: all tokens up to its end, and whose they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix([u8; 32]);

impl Prefix {
    /// Before the first token: keys and values depend on the tiers, and nobody learns from how soon an
    /// answer comes what other tenants have asked. What a whole arena has in common (checkpoint, format
    /// of the cache, context, how products are computed) is no part of it.
    pub fn root(tenant: &str, tiers: &TierMask) -> Self {
        let mut hash = blake3::Hasher::new_derive_key("lite-llm key/value cache: root of a prefix");
        hash.update(&(tenant.len() as u64).to_le_bytes());
        hash.update(tenant.as_bytes());
        hash.update(&tiers.bytes());
        Self(hash.finalize().into())
    }

    /// With the tokens of one more page.
    fn then(&self, tokens: &[u32]) -> Self {
        let mut hash = blake3::Hasher::new_keyed(&self.0);
        for token in tokens {
            hash.update(&token.to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

#[derive(Debug, Clone, Default)]
struct Page {
    users: u32,
    prefix: Option<Prefix>,
    /// When it became idle, if it is.
    idle: (u64, u32),
}

/// The pages of an arena.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    pages: Vec<Page>,
    known: HashMap<Prefix, u32>,
    /// By when they were last used and, of one sequence, from its end.
    idle: BTreeSet<((u64, u32), u32)>,
    uses: u64,
}

/// No page is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the key/value cache is full: {needed} pages of {PAGE_TOKENS} tokens needed, {free} free")]
pub struct CacheFull {
    /// Pages asked for.
    pub needed: usize,
    /// Pages that can be had.
    pub free: usize,
}

impl PagePool {
    /// A pool of `pages` free pages.
    pub fn new(pages: usize) -> Self {
        Self {
            free: (0..pages as u32).rev().collect(),
            pages: vec![Page::default(); pages],
            known: HashMap::new(),
            idle: BTreeSet::new(),
            uses: 0,
        }
    }

    /// Pages in all.
    pub fn capacity(&self) -> usize {
        self.pages.len()
    }

    /// Pages that can be had: free ones, and those that are only kept for their prefix.
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Of those, the ones that hold a prefix.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Of the pages that begin with these tokens, how many are known.
    fn known(&self, root: Prefix, tokens: &[u32]) -> Vec<(Prefix, u32)> {
        let chain = tokens.chunks_exact(PAGE_TOKENS).scan(root, |prefix, tokens| {
            *prefix = prefix.then(tokens);
            Some(*prefix)
        });
        chain.map_while(|prefix| Some((prefix, *self.known.get(&prefix)?))).collect()
    }

    fn take(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.idle.pop_first()?;
                let known = self.pages[page as usize].prefix.take();
                known.and_then(|prefix| self.known.remove(&prefix));
                page
            }
        };
        self.pages[page as usize].users = 1;
        Some(page)
    }

    fn share(&mut self, page: u32) {
        let known = &mut self.pages[page as usize];
        if known.users == 0 {
            self.idle.remove(&(known.idle, page));
        }
        known.users += 1;
    }

    /// `from_end` pages of the same sequence come after it.
    fn give_back(&mut self, page: u32, from_end: u32) {
        let gone = &mut self.pages[page as usize];
        gone.users -= 1;
        if gone.users > 0 {
            return;
        }
        if gone.prefix.is_some() {
            gone.idle = (self.uses, from_end);
            self.idle.insert((gone.idle, page));
        } else {
            self.free.push(page);
        }
    }
}

/// The pages of one sequence. Give them back with [`PageTable::release`].
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<u32>,
    /// Prefixes of the full pages that others may use.
    shown: Vec<Prefix>,
}

impl PageTable {
    /// The pages, in order of position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Pages with users that a sequence of these tokens, of which at least one is to be computed, would
    /// share: it needs no free ones for them.
    pub fn shared(pool: &PagePool, root: Prefix, tokens: &[u32]) -> usize {
        let all_but_one = &tokens[..tokens.len().saturating_sub(1)];
        let known = pool.known(root, all_but_one).into_iter();
        known.filter(|(_, page)| pool.pages[*page as usize].users > 0).count()
    }

    /// Takes the pages of these tokens that are in the cache, into an empty table: the positions that
    /// need no computing, of which the last token is none.
    pub fn adopt(&mut self, pool: &mut PagePool, root: Prefix, tokens: &[u32]) -> usize {
        let all_but_one = &tokens[..tokens.len().saturating_sub(1)];
        for (prefix, page) in pool.known(root, all_but_one) {
            pool.share(page);
            self.pages.push(page);
            self.shown.push(prefix);
        }
        self.pages.len() * PAGE_TOKENS
    }

    /// Lets others use the pages that are full: `cached` positions are computed.
    pub fn show(&mut self, pool: &mut PagePool, root: Prefix, tokens: &[u32], cached: usize) {
        for number in self.shown.len()..cached / PAGE_TOKENS {
            let before = self.shown.last().copied().unwrap_or(root);
            let prefix = before.then(&tokens[number * PAGE_TOKENS..][..PAGE_TOKENS]);
            self.shown.push(prefix);
            // If another has computed the same, this one stays this sequence's own.
            pool.known.entry(prefix).or_insert_with(|| {
                let page = self.pages[number];
                pool.pages[page as usize].prefix = Some(prefix);
                page
            });
        }
    }

    /// Takes pages until there is room for `tokens` positions: all that are needed, or none.
    pub fn reserve(&mut self, pool: &mut PagePool, tokens: usize) -> Result<(), CacheFull> {
        let needed = tokens.div_ceil(PAGE_TOKENS).saturating_sub(self.pages.len());
        if needed > pool.free() {
            return Err(CacheFull { needed, free: pool.free() });
        }
        self.pages.extend((0..needed).map_while(|_| pool.take()));
        Ok(())
    }

    /// Gives all pages back. Those that others may use stay in the cache while there is room.
    pub fn release(&mut self, pool: &mut PagePool) {
        pool.uses += 1;
        self.shown.clear();
        for (from_end, page) in self.pages.drain(..).rev().enumerate() {
            pool.give_back(page, from_end as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(tenant: &str) -> Prefix {
        Prefix::root(tenant, &TierMask::new(vec![true, false]))
    }

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
    }

    #[test]
    fn a_prefix_is_found_by_whom_it_belongs_to_until_its_pages_are_needed() {
        let mut pool = PagePool::new(4);
        let text: Vec<u32> = (0..3 * PAGE_TOKENS as u32).collect();
        let mut a = PageTable::default();
        a.reserve(&mut pool, text.len()).unwrap();
        a.show(&mut pool, root("a"), &text, text.len() - 1);
        let found = |pool: &PagePool, root, text: &[u32]| {
            pool.known(root, &text[..text.len() - 1]).len() * PAGE_TOKENS
        };
        assert_eq!(found(&pool, root("a"), &text), 2 * PAGE_TOKENS, "two pages are full");
        assert_eq!(found(&pool, root("b"), &text), 0, "another tenant's");
        let other = Prefix::root("a", &TierMask::new(vec![true, true]));
        assert_eq!(found(&pool, other, &text), 0, "other tiers");
        let mut changed = text.clone();
        changed[PAGE_TOKENS + 1] += 1;
        assert_eq!(found(&pool, root("a"), &changed), PAGE_TOKENS);
        assert_eq!(found(&pool, root("a"), &text[..PAGE_TOKENS]), 0, "one is to be computed");

        let mut b = PageTable::default();
        assert_eq!(b.adopt(&mut pool, root("a"), &text), 2 * PAGE_TOKENS);
        assert_eq!(b.pages(), &a.pages()[..2]);
        a.release(&mut pool);
        assert_eq!((pool.free(), pool.idle()), (2, 0), "two have a user, one was not full");
        b.release(&mut pool);
        assert_eq!((pool.free(), pool.idle()), (4, 2));
        let mut c = PageTable::default();
        c.reserve(&mut pool, 3 * PAGE_TOKENS).unwrap();
        assert_eq!(found(&pool, root("a"), &text), PAGE_TOKENS, "the end of a prefix goes first");
    }
}
