//! Where experts are, and how they come to where they are computed with.
//!
//! [`Residency`] decides, a pure machine; [`policy`] says who is to go; [`ExpertCache`] holds the
//! experts of the host's memory and is what lanes see; a [`Fetcher`] brings the bytes, and
//! [`fetcher_for`] says which one does.

mod archive;
mod cache;
mod chain;
mod fetch;
mod hbm;
mod machine;
mod nvme;
pub mod policy;
pub mod replay;
mod work;

pub use self::{
    archive::ArchiveFetcher,
    cache::{CacheOptions, ExpertCache},
    chain::{FetchOptions, NvmeFolder, REQUESTS, fetcher_for},
    fetch::{Done, Fetched, Fetcher, LocalFetcher, ResidenceStats},
    hbm::HbmStore,
    machine::{
        Command, Counters, Event, ROUTED_ROWS_MAX, Residency, ResidencyOptions, RoutedRow, Urgency,
    },
    nvme::{NvmeFetcher, NvmeOptions, WRITES_MAX},
};
