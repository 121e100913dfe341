//! A worker and a client that have valid tokens and certificates, speak the protocol, and mean no
//! good: every length and index at its extremes, answers that nobody asked for, other jobs' numbers,
//! damaged bytes. The coordinator and the honest worker, each a process of its own, neither panic nor
//! hang nor take memory without bound, and an honest client's jobs get the tokens of the lone run.
//!
//! `LITE_LLM_HOSTILE=20` makes the random parts twenty times as long. What is not here: that roles
//! may open only their own streams is `transport/tests`' table; what owners of experts and homes of
//! jobs are trusted with is said in [`experts`] and [`home`].

mod client;
mod cluster;
mod control;
mod damage;
mod experts;
mod frames;
mod home;
mod introductions;
mod member;

/// Not a test, but a coordinator or a worker, where [`cluster`] starts this executable as one.
#[test]
fn a_process_of_a_cluster() {
    cluster::play_a_role();
}
