//! Who is let in, and when the others may come again: a pure machine.
//!
//! Invariants: jobs and tokens of those who were let in and have not left never exceed the limits;
//! what was taken is given back once, when a request leaves; a refusal says how long to wait. A request
//! enters by the bytes of its prompts, before anything is computed for it, and is settled when their
//! tokens are known. A key's tokens of a minute are a bucket that fills steadily: prompts are paid for
//! when they are settled, answers on leaving, so that a key may owe what one round of its requests
//! generates, and waits until that is paid.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// What all requests together may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Jobs that run or wait.
    pub(super) jobs: usize,
    /// Tokens of their prompts and of their answers, as long as these may become.
    pub(super) tokens: u64,
}

/// What a key may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct KeyLimits {
    /// Jobs at a time, if bounded.
    pub(super) jobs: Option<u32>,
    /// Tokens of prompts and answers per minute, if bounded.
    pub(super) tokens_per_minute: Option<u64>,
    /// The highest priority that its requests may have.
    pub(super) priority: i8,
}

/// What one request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// Its jobs.
    pub(super) jobs: usize,
    /// Tokens of its prompts, each counted for every job that reads it.
    pub(super) prompt: u64,
    /// Tokens that its answers may have.
    pub(super) answer: u64,
}

/// A request that was not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Why.
    pub(super) reason: String,
    /// After this it may be otherwise.
    pub(super) retry_after: Duration,
}

/// Pause that is proposed where nobody knows better.
const PAUSE: Duration = Duration::from_secs(1);
const MINUTE: f64 = 60.0;

#[derive(Debug)]
struct Bucket {
    jobs: usize,
    /// Tokens of a full minute.
    full: f64,
    /// Tokens that may be taken at `at`; below 0 they are owed.
    tokens: f64,
    at: Instant,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Admission {
    limits: Limits,
    jobs: usize,
    tokens: u64,
    /// Of the keys that have jobs, or have not their whole minute's tokens.
    buckets: HashMap<String, Bucket>,
}

impl Admission {
    /// Nobody is in.
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, jobs: 0, tokens: 0, buckets: HashMap::new() }
    }

    /// Lets a request in, or says why not.
    pub(super) fn enter(
        &mut self,
        now: Instant,
        key: Option<(&str, KeyLimits)>,
        load: Load,
    ) -> Result<(), Refusal> {
        let refused = |reason, retry_after| Err(Refusal { reason, retry_after });
        let Limits { jobs, tokens } = self.limits;
        let takes = load.prompt.saturating_add(load.answer);
        if self.jobs + load.jobs > jobs {
            let reason = format!("{} jobs run or wait; at most {jobs} may", self.jobs);
            return refused(reason, PAUSE);
        }
        // One request alone may be larger than the limit.
        if self.jobs > 0 && self.tokens.saturating_add(takes) > tokens {
            let reason = format!(
                "the jobs that run or wait may come to {} tokens, this request's to {takes}; at most \
                 {tokens} are admitted",
                self.tokens
            );
            return refused(reason, PAUSE);
        }
        if let Some((name, limits)) = key {
            let full = limits.tokens_per_minute.unwrap_or(u64::MAX) as f64;
            let bucket = Bucket { jobs: 0, full, tokens: full, at: now };
            let bucket = self.buckets.entry(name.to_owned()).or_insert(bucket);
            bucket.full = full;
            bucket.fill(now);
            if let Some(most) = limits.jobs.filter(|most| bucket.jobs + load.jobs > *most as usize)
            {
                let reason =
                    format!("key {name} has {} jobs; it may have {most} at a time", bucket.jobs);
                return refused(reason, PAUSE);
            }
            if limits.tokens_per_minute.is_some() && bucket.tokens <= 0.0 {
                let wait = Duration::from_secs_f64((1.0 - bucket.tokens) * MINUTE / full);
                let reason = format!("key {name} has used its {full} tokens per minute");
                return refused(reason, wait.max(PAUSE));
            }
            bucket.jobs += load.jobs;
            bucket.tokens -= load.prompt as f64;
        }
        self.jobs += load.jobs;
        self.tokens = self.tokens.saturating_add(takes);
        Ok(())
    }

    /// The tokens of a request are known that was let in by the bytes of its prompts. It stays in with
    /// what it takes by them, or leaves because there is no room for that.
    pub(super) fn settle(
        &mut self,
        key: Option<&str>,
        before: Load,
        after: Load,
    ) -> Result<(), Refusal> {
        let others = self.tokens.saturating_sub(before.prompt.saturating_add(before.answer));
        let takes = after.prompt.saturating_add(after.answer);
        let all = others.saturating_add(takes);
        if all > self.tokens && all > self.limits.tokens && self.jobs > before.jobs {
            let reason = format!(
                "the jobs that run or wait may come to {others} tokens, this request's to {takes}; \
                 at most {} are admitted",
                self.limits.tokens
            );
            return Err(Refusal { reason, retry_after: PAUSE });
        }
        self.tokens = all;
        if let Some(bucket) = key.and_then(|name| self.buckets.get_mut(name)) {
            bucket.tokens += before.prompt as f64 - after.prompt as f64;
        }
        Ok(())
    }

    /// A request leaves that was let in with this load, and has generated so many tokens.
    pub(super) fn leave(&mut self, now: Instant, key: Option<&str>, load: Load, generated: u64) {
        self.jobs = self.jobs.saturating_sub(load.jobs);
        self.tokens = self.tokens.saturating_sub(load.prompt.saturating_add(load.answer));
        let Some(name) = key else { return };
        if let Some(bucket) = self.buckets.get_mut(name) {
            bucket.jobs = bucket.jobs.saturating_sub(load.jobs);
            bucket.tokens -= generated as f64;
        }
        self.buckets.retain(|_, bucket| {
            bucket.fill(now);
            bucket.jobs > 0 || bucket.tokens < bucket.full
        });
    }
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let gone = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + gone * self.full / MINUTE).min(self.full);
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: Load = Load { jobs: 1, prompt: 10, answer: 90 };

    fn second(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn jobs_and_tokens_are_bounded_and_given_back() {
        let now = Instant::now();
        let mut admission = Admission::new(Limits { jobs: 3, tokens: 250 });
        admission.enter(now, None, LOAD).unwrap();
        admission.enter(now, None, LOAD).unwrap();
        let refusal = admission.enter(now, None, LOAD).unwrap_err();
        assert!(refusal.reason.contains("200 tokens"), "{refusal:?}");
        admission.leave(now, None, LOAD, 5);
        let many = Load { jobs: 3, ..LOAD };
        assert!(admission.enter(now, None, many).unwrap_err().reason.contains("jobs"));
        admission.leave(now, None, LOAD, 5);
        assert_eq!((admission.jobs, admission.tokens), (0, 0));
        // One that is larger than all that is admitted at a time has its turn when it is alone.
        admission.enter(now, None, Load { answer: u64::MAX, ..LOAD }).unwrap();
        assert!(admission.enter(now, None, LOAD).is_err());
    }

    #[test]
    fn a_key_has_its_own_jobs_and_its_tokens_of_a_minute() {
        let start = Instant::now();
        let mut admission = Admission::new(Limits { jobs: 100, tokens: u64::MAX });
        let limits = KeyLimits { jobs: Some(2), tokens_per_minute: Some(60), priority: 0 };
        let (a, b) = (Some(("a", limits)), Some(("b", limits)));
        admission.enter(start, a, LOAD).unwrap();
        admission.enter(start, a, LOAD).unwrap();
        assert!(admission.enter(start, a, LOAD).unwrap_err().reason.contains("2 at a time"));
        admission.enter(start, b, LOAD).unwrap();
        // 60 − 2 · 10 − 100: it owes 60 tokens, which is a minute.
        admission.leave(start, Some("a"), LOAD, 100);
        let refusal = admission.enter(start, a, LOAD).unwrap_err();
        assert_eq!(refusal.retry_after, second(61));
        assert!(admission.enter(start + second(59), a, LOAD).is_err());
        admission.enter(start + second(61), a, LOAD).unwrap();
        // What fills up is forgotten.
        admission.leave(start + second(61), Some("a"), LOAD, 0);
        admission.leave(start + second(61), Some("a"), LOAD, 0);
        admission.leave(start + second(61), Some("b"), LOAD, 0);
        let none = Some(("c", KeyLimits::default()));
        admission.enter(start + second(500), none, LOAD).unwrap();
        admission.leave(start + second(500), Some("c"), LOAD, 0);
        assert!(admission.buckets.is_empty(), "{:?}", admission.buckets);
    }
    /// By its bytes a prompt takes its place before anybody tokenises it; by its tokens it keeps it.
    #[test]
    fn a_request_enters_by_its_bytes_and_stays_by_its_tokens() {
        let now = Instant::now();
        let mut admission = Admission::new(Limits { jobs: 10, tokens: 250 });
        let limits = KeyLimits { tokens_per_minute: Some(60), ..KeyLimits::default() };
        let (key, by_bytes) = (Some(("a", limits)), Load { jobs: 1, prompt: 100, answer: 90 });
        admission.enter(now, key, by_bytes).unwrap();
        assert!(admission.enter(now, None, by_bytes).is_err(), "there is no room by bytes");
        admission.settle(Some("a"), by_bytes, LOAD).unwrap();
        assert_eq!((admission.tokens, admission.buckets["a"].tokens), (100, 50.0));
        let small = Load { jobs: 1, prompt: 1, answer: 1 };
        admission.enter(now, None, small).unwrap();
        // A template may write more than it was given.
        let grown = Load { prompt: 200, ..small };
        assert!(admission.settle(None, small, grown).is_err());
        admission.leave(now, None, small, 0);
        // Who leaves before that has paid nothing.
        admission.settle(Some("a"), LOAD, Load { jobs: 1, prompt: 0, answer: 0 }).unwrap();
        admission.leave(now, Some("a"), Load { jobs: 1, prompt: 0, answer: 0 }, 0);
        assert_eq!((admission.jobs, admission.tokens, admission.buckets.len()), (0, 0, 0));
    }
}
