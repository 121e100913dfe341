//! Which vector instructions to compute with; chosen at run time, without effect on results.
