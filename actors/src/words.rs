//! What the machines know, in sentences that say what to do.

use std::time::Duration;

use crate::membership::{Missing, State};

/// What a cluster is doing.
pub fn state(state: &State) -> String {
    match state {
        State::Waiting => "waiting for workers".into(),
        State::Loading => "loading".into(),
        State::Ready => "ready".into(),
        State::Degraded { complete: true } => "degraded: it serves, with fewer copies".into(),
        State::Degraded { complete: false } => "degraded: experts are missing".into(),
        State::Failed(reason) => format!("failed: {reason}"),
    }
}

/// What a loss means for a job.
pub fn gone(worker: &str, how: &str) -> String {
    format!("worker {worker} is gone ({how}); start it again, or another, to take its place")
}

/// To a member that has given its share away.
pub fn drained(worker: &str) -> String {
    format!("{worker} is drained: others hold its experts; it may be stopped")
}

/// To a member whose name another has taken.
pub fn replaced(worker: &str) -> String {
    format!("another worker named {worker} has joined; give one of them another --name")
}

/// To a member for which there is no slot.
pub fn full(slots: usize) -> String {
    format!("this cluster has {slots} workers, which is the most that there can be")
}

/// Of a member that cannot do its part.
pub fn could_not_load(worker: &str, reason: &str) -> String {
    format!("worker {worker} could not load its experts: {reason}; it is asked again")
}

/// Of a member that does not answer.
pub fn silent(time: Duration) -> String {
    format!("it has not answered for {:.1} s", time.as_secs_f32())
}

/// Of a member that answers, but does not compute.
pub fn stuck(time: Duration) -> String {
    format!(
        "its compute thread has work and did not get on for {:.1} s; look for a disk or a network \
         folder that hangs",
        time.as_secs_f32()
    )
}

/// Of a job that was tried again and again.
pub fn gave_up(attempts: u32) -> String {
    format!(
        "{attempts} attempts in a row were lost without a new token; see `lite-llm status`, and          submit again when the cluster is ready"
    )
}

/// What the cluster waits for, one sentence for each thing; nothing, if it is whole.
pub fn waiting_for(missing: &Missing) -> Vec<String> {
    let mut words = Vec::new();
    let Missing { to_join, workers, loading, experts, lost, unfit, .. } = missing;
    if *to_join > 0 {
        words.push(format!("{to_join} of {workers} workers to join"));
    }
    if !loading.is_empty() {
        words.push(format!("{} to load", loading.join(", ")));
    }
    if !missing.beginning.is_empty() {
        words.push(format!("{} to begin to compute", missing.beginning.join(", ")));
    }
    for lost in lost {
        let how = lost.how.as_ref().map_or(String::new(), |how| format!(" ({how})"));
        words.push(format!("{} to come back{how}", lost.name));
    }
    if *experts > 0 {
        words.push(format!("a holder of {experts} experts: start a worker, or raise --dram"));
    }
    for (name, reason) in unfit {
        words.push(could_not_load(name, reason));
    }
    for (a, b) in &missing.cut {
        words.push(format!("a link between {a} and {b}: check the network between them"));
    }
    for name in &missing.suspect {
        words.push(format!("a sign of life of {name}"));
    }
    for name in &missing.draining {
        words.push(format!("others to take over what {name} holds, which is to be drained"));
    }
    words.extend(missing.room.clone());
    if let Some((living, wanted)) = missing.copies.filter(|_| *experts == 0) {
        words.push(format!("more copies: some experts have {living} of {wanted}"));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::Lost;

    #[test]
    fn facts_become_sentences_that_say_what_to_do() {
        assert!(waiting_for(&Missing::default()).is_empty());
        let missing = Missing {
            to_join: 1,
            workers: 2,
            experts: 7,
            lost: vec![Lost { name: "b".into(), how: Some("idle".into()) }],
            copies: Some((0, 2)),
            ..Missing::default()
        };
        let words = waiting_for(&missing);
        assert_eq!(words[..2], ["1 of 2 workers to join", "b to come back (idle)"]);
        assert!(words[2].contains("7 experts: start a worker") && words.len() == 3, "{words:?}");
        assert!(gone("b", "idle").contains("b is gone (idle)"));
    }
}
