//! Progress of long work: a bar on a terminal, plain lines elsewhere, nothing under `--json`.

use std::{
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a plain line is printed.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes, with their rate.
    Bytes,
    /// Anything else, by this name.
    Things(&'static str),
}

/// One piece of long work.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    unit: Unit,
    last_line: Instant,
    quiet: bool,
}

impl Progress {
    /// Begins; `quiet` shows nothing.
    pub(crate) fn new(what: &str, unit: Unit, quiet: bool) -> Self {
        let bar = (!quiet && stderr().is_terminal()).then(|| {
            let template = match unit {
                Unit::Bytes => {
                    "{prefix} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}  {msg}"
                }
                Unit::Things(_) => "{prefix} {wide_bar} {pos}/{len} {eta}  {msg}",
            };
            let style = ProgressStyle::with_template(template)
                .expect("the templates above are well formed");
            ProgressBar::new(0).with_style(style).with_prefix(what.to_owned())
        });
        Self { bar, what: what.to_owned(), unit, last_line: Instant::now(), quiet }
    }

    /// So much of so much is done; `now` is what is being worked on.
    pub(crate) fn update(&mut self, done: u64, total: u64, now: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(now.to_owned());
        } else if !self.quiet && self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            let percent = done * 100 / total.max(1);
            match self.unit {
                Unit::Bytes => {
                    remark!("{}: {percent}% of {}", self.what, crate::size::Size(total))
                }
                Unit::Things(name) => remark!("{}: {done} of {total} {name}", self.what),
            }
        }
    }

    /// Ends, leaving nothing on the screen.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
