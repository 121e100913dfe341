//! Standard output and standard error, and what happens when nobody can read them any more.
//!
//! `println!` panics when its reader has left (`lite-llm status | head -1`) or the disk under a
//! redirection is full. Here the first failure is kept, what follows is dropped, and the command
//! is told to end, as by Ctrl-C. A server goes on: it works for others than its terminal.

use std::{
    fmt,
    io::{self, Write},
    sync::OnceLock,
};

use tokio::sync::Notify;

/// Why standard output is not written any more.
static FAILURE: OnceLock<io::Error> = OnceLock::new();
/// Somebody waits to hear of it.
static FAILED: Notify = Notify::const_new();

/// Writes a line to standard output, as `println!`.
macro_rules! say {
    () => { $crate::output::show(format_args!("\n")) };
    ($($words:tt)*) => {
        $crate::output::show(format_args!("{}\n", format_args!($($words)*)))
    };
}

/// Writes a line to standard error, as `eprintln!`; one that cannot be written is dropped.
macro_rules! remark {
    ($($words:tt)*) => {
        $crate::output::aside(format_args!("{}\n", format_args!($($words)*)))
    };
}

/// Writes to standard output, and through to its reader.
pub(crate) fn show(text: fmt::Arguments<'_>) {
    if FAILURE.get().is_some() {
        return;
    }
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_fmt(text).and_then(|()| out.flush()) {
        // Of two threads that fail, the first one's reason is kept.
        let _ = FAILURE.set(error);
        FAILED.notify_one();
    }
}

/// Writes to standard error, if it can be.
pub(crate) fn aside(text: fmt::Arguments<'_>) {
    // There is nowhere left to say that this failed.
    let _ = io::stderr().lock().write_fmt(text);
}

/// Why standard output could not be written, if it could not.
pub(crate) fn failure() -> Option<&'static io::Error> {
    FAILURE.get()
}

/// Returns when standard output cannot be written any more.
pub(crate) async fn failed() {
    FAILED.notified().await;
}
