//! What a ledger does, one thing at a time; [`super::campaign`] has random histories.

use std::time::Duration;

use lite_llm_transport::messages::{
    DetachedBatch, DetachedJob, DetachedState, JobEnding, JobRange, JobRequest, Prompt,
};

use super::{
    Keep,
    events::{Command, Event, Record, Rules, Saved, SavedBatch, SavedJob},
    machine::Ledger,
};

const ALL: JobRange = JobRange { first: 0, last: u64::MAX };

fn rules() -> Rules {
    Rules {
        model: [1; 32],
        context: 64,
        running_max: 3,
        open_max: 1000,
        bytes_max: 1 << 20,
        keep: Keep { time: Duration::from_secs(10), jobs: 1000 },
    }
}

fn batch(key: u64, jobs: usize) -> DetachedBatch {
    let request = JobRequest::greedy(Prompt::Tokens(vec![1]), 4);
    let job = DetachedJob::plain(request);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&key.to_le_bytes());
    DetachedBatch { key: bytes, note: String::new(), jobs: vec![job; jobs] }
}

fn accept(ledger: &mut Ledger, owner: &str, key: u64, jobs: usize) {
    let (owner, batch) = (owner.to_owned(), batch(key, jobs));
    ledger.handle(0, Event::Accept { caller: key, owner, batch });
}

/// Takes its commands, syncing what it writes. Returns the others, and the writes.
fn settle(ledger: &mut Ledger, now: u64) -> (Vec<Command>, Vec<Vec<Record>>) {
    let (mut commands, mut writes) = (Vec::new(), Vec::new());
    while let Some(command) = ledger.poll_command() {
        match command {
            Command::Write { write, records } => {
                writes.push(records);
                ledger.handle(now, Event::Synced { write });
            }
            Command::Changed => {}
            command => commands.push(command),
        }
    }
    (commands, writes)
}

fn ended(at: u64) -> JobEnding {
    let (text, reason) = (String::new(), String::new());
    JobEnding { state: DetachedState::Length, at, ids: vec![1, 2, 3, 4], text, reason }
}

fn runs(commands: &[Command]) -> Vec<u64> {
    let run = |command: &Command| match command {
        Command::Run { job, .. } => Some(*job),
        _ => None,
    };
    commands.iter().filter_map(run).collect()
}

#[test]
fn five_hundred_jobs_that_come_at_once_are_one_write() {
    let mut ledger = Ledger::new(rules(), Saved::default());
    for key in 0..500 {
        accept(&mut ledger, "anna", key, 1);
    }
    let Some(Command::Write { write, records }) = ledger.poll_command() else { panic!("a write") };
    assert_eq!(records.len(), 500);
    assert_eq!(ledger.poll_command(), None, "nobody is told before it is on disk");
    // What comes meanwhile waits for the next.
    accept(&mut ledger, "anna", 500, 1);
    assert_eq!(ledger.poll_command(), None);
    assert!(ledger.list(None, ALL, 1000).is_empty(), "nor is it shown");
    ledger.handle(1, Event::Synced { write });
    let (commands, writes) = settle(&mut ledger, 1);
    assert_eq!(writes.len(), 1);
    let told = commands.iter().filter(|command| matches!(command, Command::Accepted { .. }));
    assert_eq!((told.count(), runs(&commands)), (501, vec![1, 2, 3]));
}

#[test]
fn owners_take_turns_and_what_has_no_room_is_refused_with_a_reason() {
    let mut ledger = Ledger::new(Rules { open_max: 10, ..rules() }, Saved::default());
    accept(&mut ledger, "anna", 1, 8);
    accept(&mut ledger, "ben", 2, 2);
    let (commands, _) = settle(&mut ledger, 0);
    assert_eq!(runs(&commands), [1, 9, 2]);
    ledger.handle(1, Event::Ended { job: 1, ending: ended(1) });
    let (commands, _) = settle(&mut ledger, 1);
    assert_eq!(runs(&commands), [3]);
    accept(&mut ledger, "ben", 3, 2);
    let (commands, writes) = settle(&mut ledger, 1);
    let [Command::Refused { caller: 3, reason }] = &commands[..] else { panic!("{commands:?}") };
    assert!(reason.contains("9 detached jobs") && reason.contains("10 at most"), "{reason}");
    assert!(writes.is_empty());
    let mut ledger = Ledger::new(Rules { bytes_max: 600, ..rules() }, Saved::default());
    accept(&mut ledger, "anna", 1, 1);
    accept(&mut ledger, "anna", 2, 1);
    let (commands, _) = settle(&mut ledger, 0);
    let refused = |command: &Command| matches!(command, Command::Refused { caller: 2, .. });
    assert!(commands.iter().any(refused), "{commands:?}");
}

#[test]
fn results_are_let_go_batch_by_batch_when_they_are_old_or_many() {
    for keep in [
        Keep { time: Duration::from_secs(10), jobs: 1000 },
        Keep { time: Duration::from_secs(1000), jobs: 2 },
    ] {
        let mut ledger = Ledger::new(Rules { keep, ..rules() }, Saved::default());
        accept(&mut ledger, "anna", 1, 2);
        accept(&mut ledger, "anna", 2, 1);
        settle(&mut ledger, 0);
        for job in 1..=3 {
            ledger.handle(job * 5000, Event::Ended { job, ending: ended(job * 5000) });
            settle(&mut ledger, job * 5000);
        }
        ledger.handle(20_001, Event::Tick);
        let (_, writes) = settle(&mut ledger, 20_001);
        assert_eq!(writes, [[Record::Forgotten { first: 1, jobs: 2 }]]);
        assert_eq!(ledger.list(None, ALL, 10).len(), 1, "the last is kept");
        // Its key may be used again, and is another batch.
        accept(&mut ledger, "anna", 1, 1);
        let (commands, _) = settle(&mut ledger, 20_001);
        assert!(
            commands
                .contains(&Command::Accepted { caller: 1, jobs: JobRange { first: 4, last: 4 } }),
            "{commands:?}"
        );
    }
}

#[test]
fn jobs_of_another_model_wait_for_it_and_can_be_cancelled() {
    let jobs = vec![SavedJob { bytes: (600, 48), tokens: 2, ended: None }];
    let (owner, key) = ("anna".to_owned(), [1; 16]);
    let saved = SavedBatch { owner, key, model: [2; 32], at: 5, jobs };
    let saved = Saved { next: 8, batches: [(7, saved)].into() };
    let mut ledger = Ledger::new(rules(), saved);
    assert_eq!(settle(&mut ledger, 9).0, []);
    assert_eq!(ledger.list(Some("anna"), ALL, 10)[0].state, DetachedState::OtherModel);
    ledger.handle(9, Event::Cancel { caller: 1, owner: Some("ben".into()), jobs: ALL });
    assert_eq!(settle(&mut ledger, 9).0, [Command::Cancelled { caller: 1, jobs: 0 }]);
    ledger.handle(9, Event::Cancel { caller: 2, owner: Some("anna".into()), jobs: ALL });
    let Some(Command::Write { write, .. }) = ledger.poll_command() else { panic!("a write") };
    assert_eq!(ledger.list(None, ALL, 10)[0].state, DetachedState::Running, "it is not on disk");
    ledger.handle(9, Event::Synced { write });
    assert_eq!(settle(&mut ledger, 9).0, [Command::Cancelled { caller: 2, jobs: 1 }]);
    assert_eq!(ledger.list(None, ALL, 10)[0].state, DetachedState::Cancelled);
}

#[test]
fn tokens_are_written_once_a_second_and_with_whatever_else_is() {
    let mut ledger = Ledger::new(rules(), Saved::default());
    accept(&mut ledger, "anna", 1, 2);
    settle(&mut ledger, 0);
    ledger.handle(0, Event::Tick);
    let progress = |from: u32, tokens: &[u32]| {
        let tokens = tokens.to_vec();
        Event::Progress { job: 1, from, tokens }
    };
    ledger.handle(10, progress(0, &[5, 6]));
    assert!(settle(&mut ledger, 10).1.is_empty(), "an answer is no reason to sync");
    ledger.handle(11, Event::Ended { job: 2, ending: ended(11) });
    let (_, writes) = settle(&mut ledger, 11);
    let tokens = |from, tokens: &[u32]| Record::Tokens { job: 1, from, tokens: tokens.to_vec() };
    assert!(writes[0].contains(&tokens(0, &[5, 6])), "{writes:?}");
    // What is told again is written once; what leaves something out is not believed.
    ledger.handle(12, progress(1, &[6, 7]));
    ledger.handle(13, progress(9, &[1]));
    ledger.handle(500, Event::Tick);
    assert!(settle(&mut ledger, 500).1.is_empty());
    ledger.handle(1500, Event::Tick);
    assert_eq!(settle(&mut ledger, 1500).1, [[tokens(2, &[7])]]);
    assert_eq!(ledger.list(None, ALL, 10)[0].tokens, 3);
}

#[test]
fn an_owner_finds_its_batches_newest_first() {
    let mut ledger = Ledger::new(rules(), Saved::default());
    for (owner, key) in [("anna", 1), ("ben", 2), ("anna", 3), ("anna", 4)] {
        accept(&mut ledger, owner, key, 2);
        if key < 4 {
            settle(&mut ledger, 0);
        }
    }
    assert_eq!(ledger.batches("anna", u64::MAX, 9), [5, 1], "one is not on disk yet");
    assert_eq!(ledger.batches("anna", 5, 9), [1]);
    assert_eq!(ledger.batches("anna", u64::MAX, 1), [5]);
}

#[test]
fn whoever_lost_an_answer_hears_what_was_taken_as_soon_as_it_is_on_disk() {
    let mut ledger = Ledger::new(rules(), Saved::default());
    let known = |ledger: &mut Ledger, caller, owner: &str, key: u64| {
        let (owner, key) = (owner.to_owned(), batch(key, 1).key);
        ledger.handle(0, Event::Known { caller, owner, key });
    };
    known(&mut ledger, 1, "anna", 7);
    assert_eq!(ledger.poll_command(), Some(Command::NotKnown { caller: 1 }));
    accept(&mut ledger, "anna", 7, 2);
    let Some(Command::Write { write, .. }) = ledger.poll_command() else { panic!("a write") };
    known(&mut ledger, 2, "anna", 7);
    assert_eq!(ledger.poll_command(), None, "it may still fail to be written");
    known(&mut ledger, 3, "ben", 7);
    assert_eq!(ledger.poll_command(), Some(Command::NotKnown { caller: 3 }));
    ledger.handle(1, Event::Synced { write });
    let (commands, _) = settle(&mut ledger, 1);
    let jobs = JobRange { first: 1, last: 2 };
    for caller in [7, 2] {
        assert!(commands.contains(&Command::Accepted { caller, jobs }), "{commands:?}");
    }
}
