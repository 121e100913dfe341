//! Where experts are, and how they come to where they are computed with.
//!
//! [`Residency`] decides, a pure machine; [`policy`] says who is to go; [`ExpertCache`] holds the
//! experts of the host's memory and is what lanes see; a [`Fetcher`] brings the bytes.

mod cache;
mod fetch;
mod machine;
pub mod policy;
pub mod replay;

pub use self::{
    cache::{CacheOptions, ExpertCache},
    fetch::{Done, Fetched, Fetcher, LocalFetcher},
    machine::{
        Command, Counters, Event, ROUTED_ROWS_MAX, Residency, ResidencyOptions, RoutedRow, Urgency,
    },
};
