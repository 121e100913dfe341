//! Repeated measurements, and what is said about them.
//!
//! Invariants: things that are compared take turns, run by run, so that whatever else the machine
//! does meets all of them; the median counts, and its spread is always shown beside it.

use std::time::{Duration, Instant};

use serde_json::json;

/// How long one run lasts at least: far above the clock's resolution and a scheduler's tick.
const RUN_MIN: Duration = Duration::from_millis(20);

/// One quantity, measured several times.
#[derive(Debug, Clone, Default)]
pub(super) struct Samples {
    sorted: Vec<f64>,
}

impl Samples {
    pub(super) fn push(&mut self, value: f64) {
        let at = self.sorted.partition_point(|&other| other < value);
        self.sorted.insert(at, value);
    }

    pub(super) fn extend(&mut self, values: impl IntoIterator<Item = f64>) {
        self.sorted.extend(values);
        self.sorted.sort_by(f64::total_cmp);
    }

    pub(super) fn len(&self) -> usize {
        self.sorted.len()
    }

    /// The value that this share of the measurements stayed within.
    pub(super) fn percentile(&self, share: f64) -> f64 {
        let last = self.len().saturating_sub(1);
        let at = (share * self.len() as f64) as usize;
        self.sorted.get(at.min(last)).copied().unwrap_or_default()
    }

    pub(super) fn median(&self) -> f64 {
        let n = self.len();
        match n {
            0 => 0.0,
            _ if n.is_multiple_of(2) => (self.sorted[n / 2 - 1] + self.sorted[n / 2]) / 2.0,
            _ => self.sorted[n / 2],
        }
    }

    /// Largest less smallest, as a share of the median.
    pub(super) fn spread(&self) -> f64 {
        match (self.sorted.first(), self.sorted.last()) {
            (Some(first), Some(last)) if self.median() > 0.0 => (last - first) / self.median(),
            _ => 0.0,
        }
    }

    /// The same measurements as rates of `work` per second, if they are seconds.
    pub(super) fn rates(&self, work: f64) -> Self {
        let mut rates = Self::default();
        rates.extend(self.sorted.iter().map(|seconds| work / seconds.max(1e-9)));
        rates
    }

    /// Median and spread, for people.
    pub(super) fn show(&self, digits: usize) -> String {
        format!("{:.digits$} ±{:.0}%", self.median(), self.spread() * 50.0)
    }

    /// Median and range, for programs.
    pub(super) fn json(&self) -> serde_json::Value {
        let (least, most) = (self.sorted.first(), self.sorted.last());
        json!({ "median": self.median(), "min": least, "max": most, "runs": self.len() })
    }
}

/// A ratio that was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Goal {
    pub(super) ratio: f64,
    pub(super) asked: f64,
}

impl Goal {
    pub(super) fn show(&self) -> String {
        let verdict = if self.ratio >= self.asked { "reached" } else { "missed" };
        format!("{:.3} (asked {:.2}: {verdict})", self.ratio, self.asked)
    }
}

/// Seconds per call of each of `calls`, which take turns for `runs` runs. A run repeats a short
/// call until [`RUN_MIN`] has passed.
pub(super) fn take_turns(runs: usize, calls: &mut [&mut dyn FnMut()]) -> Vec<Samples> {
    let repeats: Vec<u32> = calls.iter_mut().map(|call| repeats(&mut **call)).collect();
    let mut samples = vec![Samples::default(); calls.len()];
    for _ in 0..runs {
        for ((call, &repeats), samples) in calls.iter_mut().zip(&repeats).zip(&mut samples) {
            let from = Instant::now();
            (0..repeats).for_each(|_| call());
            samples.push(from.elapsed().as_secs_f64() / f64::from(repeats));
        }
    }
    samples
}

/// How often a call is to be repeated in a run; calling it here also warms it up.
fn repeats(call: &mut dyn FnMut()) -> u32 {
    call();
    let from = Instant::now();
    call();
    let once = from.elapsed().as_secs_f64().max(1e-7);
    (RUN_MIN.as_secs_f64() / once).ceil().clamp(1.0, 1e5) as u32
}

/// Prints rows under a heading, columns aligned; the first column is text.
pub(in crate::commands) fn print_table(heading: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heading[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        say!("{}", cells.collect::<Vec<_>>().join("   ").trim_end());
    };
    line(&mut heading.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_spread_are_those_of_the_values() {
        let mut samples = Samples::default();
        [5.0, 1.0, 3.0].into_iter().for_each(|value| samples.push(value));
        assert_eq!((samples.median(), samples.spread()), (3.0, 4.0 / 3.0));
        samples.extend([4.0]);
        assert_eq!(samples.median(), 3.5);
        assert_eq!((samples.percentile(0.99), samples.percentile(0.0)), (5.0, 1.0));
        assert_eq!(samples.rates(10.0).percentile(0.0), 2.0);
        assert_eq!(Samples::default().median(), 0.0);
    }

    #[test]
    fn calls_take_turns() {
        let order = std::cell::RefCell::new(Vec::new());
        let pause = Duration::from_millis(21);
        let call = |name: char| {
            let order = &order;
            move || {
                order.borrow_mut().push(name);
                std::thread::sleep(pause);
            }
        };
        let samples = take_turns(2, &mut [&mut call('a'), &mut call('b')]);
        // Two calls of each to warm up, then by turns.
        assert_eq!(order.take().into_iter().collect::<String>(), "aabbabab");
        assert!(samples.iter().all(|s| s.median() >= pause.as_secs_f64()));
    }
}
