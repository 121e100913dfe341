//! Where the time of a step goes: the spans of a run, each without the spans inside it.
//!
//! Only the thread that it is installed on is measured; the compute threads work while that
//! thread waits for them, within the same span.

use std::{cell::RefCell, collections::BTreeMap, sync::Arc, time::Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tracing::{Subscriber, span::Id};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt},
    registry::LookupSpan,
};

use super::samples::print_table;

/// Seconds and visits by the name of a span.
#[derive(Debug, Clone, Default)]
pub(super) struct Profile {
    spans: BTreeMap<&'static str, (f64, u64)>,
    /// Seconds from the first to the last.
    whole: f64,
}

/// Runs something and says where its time went.
pub(super) fn profile<T>(work: impl FnOnce() -> T) -> (T, Profile) {
    let times = Times::default();
    let seen = times.0.clone();
    let from = Instant::now();
    let subscriber = tracing_subscriber::registry().with(times);
    let value = tracing::subscriber::with_default(subscriber, work);
    let mut profile = seen.lock().clone();
    profile.whole = from.elapsed().as_secs_f64();
    (value, profile)
}

#[derive(Default)]
struct Times(Arc<Mutex<Profile>>);

thread_local! {
    /// Spans that this thread is in: since when, and how much of that was in spans inside.
    static OPEN: RefCell<Vec<(Instant, f64)>> = const { RefCell::new(Vec::new()) };
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Times {
    fn on_enter(&self, _: &Id, _: Context<'_, S>) {
        OPEN.with_borrow_mut(|open| open.push((Instant::now(), 0.0)));
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some((from, inside)) = OPEN.with_borrow_mut(Vec::pop) else { return };
        let seconds = from.elapsed().as_secs_f64();
        OPEN.with_borrow_mut(|open| {
            if let Some((_, inside)) = open.last_mut() {
                *inside += seconds;
            }
        });
        let Some(name) = context.metadata(id).map(|metadata| metadata.name()) else { return };
        let mut profile = self.0.lock();
        let (sum, visits) = profile.spans.entry(name).or_default();
        *sum += seconds - inside;
        *visits += 1;
    }
}

impl Profile {
    /// Spans with their seconds and visits, the longest first, and what no span covers.
    fn rows(&self) -> Vec<(&'static str, f64, u64)> {
        let mut rows: Vec<_> =
            self.spans.iter().map(|(&name, &(seconds, visits))| (name, seconds, visits)).collect();
        let covered: f64 = rows.iter().map(|row| row.1).sum();
        rows.push(("(between)", (self.whole - covered).max(0.0), 1));
        rows.sort_by(|a, b| b.1.total_cmp(&a.1));
        rows
    }

    pub(super) fn print(&self, tokens: usize) {
        say!("\nWhere the time of the engine alone goes, per token of {tokens}\n");
        let per_token = |seconds: f64| format!("{:.4}", seconds * 1e3 / tokens.max(1) as f64);
        let rows: Vec<_> = self
            .rows()
            .into_iter()
            .map(|(name, seconds, visits)| {
                let share = format!("{:.1} %", 100.0 * seconds / self.whole);
                vec![name.to_owned(), per_token(seconds), share, visits.to_string()]
            })
            .collect();
        print_table(&["span", "ms", "share", "visits"], &rows);
    }

    pub(super) fn json(&self) -> Value {
        let span = |(name, seconds, visits): (&str, f64, u64)| json!({ "span": name, "seconds": seconds, "visits": visits });
        json!({ "seconds": self.whole, "spans": self.rows().into_iter().map(span).collect::<Vec<_>>() })
    }
}
