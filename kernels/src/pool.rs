//! Compute threads.
