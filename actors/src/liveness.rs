//! Is a member alive? A pure machine that asks and listens.
//!
//! Every member is asked every [`POLL_INTERVAL`], one question at a time. It is suspected, and then
//! lost, when it does not answer; also when it answers, but its compute thread has work and does
//! not get on. The latter takes [`STUCK_AFTER`] to be lost by: one expensive operation (a page of
//! weights from a slow disk, the prefill of a long chunk) may take seconds without a sign, and a
//! member that answers will say when it is over. It is suspected as early as the silent are, for
//! others can do its work meanwhile, and that costs nothing if it was for nothing.
//!
//! Invariants: a member is lost once; an answer of another incarnation counts for nothing; nobody
//! is suspected for the time in which this machine itself was not ticked.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::words;

/// How often a member is asked.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time without a sign of progress after which a member is suspected.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(500);
/// Time without an answer after which a member is lost.
pub const LOST_AFTER: Duration = Duration::from_millis(1500);
/// Time without progress of its compute thread after which a member that answers is lost.
pub const STUCK_AFTER: Duration = Duration::from_secs(10);
/// Time between two ticks beyond which this process was paused.
pub const PAUSE_MIN: Duration = Duration::from_millis(300);

/// What happens.
#[derive(Debug, Clone)]
pub enum Event {
    /// A member is there.
    Joined {
        /// Its name.
        name: String,
        /// Which of its lives.
        incarnation: u64,
    },
    /// A member is gone.
    Left {
        /// Its name.
        name: String,
        /// Which of its lives ended.
        incarnation: u64,
    },
    /// A member has answered.
    Answered {
        /// Its name.
        name: String,
        /// Which of its lives was asked.
        incarnation: u64,
        /// Whether its compute thread has work.
        busy: bool,
        /// A counter that moves while that thread gets on.
        progress: u64,
    },
    /// A question will not be answered: it may be asked again.
    Unanswered {
        /// Who was asked.
        name: String,
        /// Which of its lives.
        incarnation: u64,
    },
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Ask a member how it is.
    Ask {
        /// Its name.
        name: String,
        /// Which of its lives: the answer is to bear it.
        incarnation: u64,
    },
    /// A member shows no sign of progress.
    Suspect {
        /// Its name.
        name: String,
        /// What was noticed.
        reason: String,
    },
    /// It does again.
    Recovered {
        /// Its name.
        name: String,
    },
    /// A member is to be taken for dead. It is not asked any more.
    Lost {
        /// Its name.
        name: String,
        /// Which of its lives.
        incarnation: u64,
        /// What was noticed.
        reason: String,
    },
}

#[derive(Debug)]
struct Member {
    incarnation: u64,
    asked: Instant,
    in_flight: bool,
    answered: Instant,
    busy: bool,
    progress: u64,
    /// When its thread got on last, or had nothing to do.
    moved: Instant,
    suspect: bool,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Liveness {
    members: BTreeMap<String, Member>,
    ticked: Option<Instant>,
    commands: VecDeque<Command>,
}

impl Liveness {
    /// Takes note of an event.
    pub fn handle(&mut self, now: Instant, event: Event) {
        match event {
            Event::Joined { name, incarnation } => {
                if self.members.get(&name).is_some_and(|m| m.incarnation == incarnation) {
                    return;
                }
                let member = Member {
                    incarnation,
                    asked: now.checked_sub(POLL_INTERVAL).unwrap_or(now),
                    in_flight: false,
                    answered: now,
                    busy: false,
                    progress: 0,
                    moved: now,
                    suspect: false,
                };
                self.members.insert(name, member);
            }
            Event::Left { name, incarnation } => {
                if self.member(&name, incarnation).is_some() {
                    self.members.remove(&name);
                }
            }
            Event::Answered { name, incarnation, busy, progress } => {
                self.answered(now, &name, incarnation, busy, progress);
            }
            Event::Unanswered { name, incarnation } => {
                if let Some(member) = self.member(&name, incarnation) {
                    member.in_flight = false;
                }
            }
            Event::Tick => self.tick(now),
        }
    }

    /// The next thing to be done.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When a tick is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.members.is_empty() {
            return None;
        }
        let asked = self.members.values().map(|member| member.asked).min();
        self.ticked.or(asked).map(|at| at + POLL_INTERVAL)
    }

    fn member(&mut self, name: &str, incarnation: u64) -> Option<&mut Member> {
        self.members.get_mut(name).filter(|member| member.incarnation == incarnation)
    }

    fn answered(&mut self, now: Instant, name: &str, incarnation: u64, busy: bool, progress: u64) {
        let Some(member) = self.member(name, incarnation) else { return };
        member.in_flight = false;
        member.answered = now;
        // A thread that just got work has not been stuck with it.
        if !busy || !member.busy || progress != member.progress {
            member.moved = now;
        }
        (member.busy, member.progress) = (busy, progress);
        if member.suspect && now - member.moved < SUSPECT_AFTER {
            member.suspect = false;
            self.commands.push_back(Command::Recovered { name: name.to_owned() });
        }
    }

    fn tick(&mut self, now: Instant) {
        let gap = self.ticked.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.ticked = Some(now);
        let mut lost = Vec::new();
        for (name, member) in &mut self.members {
            if gap > PAUSE_MIN {
                // This process slept: what it did not hear meanwhile says nothing.
                member.answered = (member.answered + gap).min(now);
                member.moved = (member.moved + gap).min(now);
            }
            let silent = now.saturating_duration_since(member.answered);
            let stuck = match member.busy {
                true => now.saturating_duration_since(member.moved),
                false => Duration::ZERO,
            };
            if silent >= LOST_AFTER || stuck >= STUCK_AFTER {
                lost.push(name.clone());
                let reason = match silent >= LOST_AFTER {
                    true => words::silent(silent),
                    false => words::stuck(stuck),
                };
                let (name, incarnation) = (name.clone(), member.incarnation);
                self.commands.push_back(Command::Lost { name, incarnation, reason });
                continue;
            }
            if !member.suspect && silent.max(stuck) >= SUSPECT_AFTER {
                member.suspect = true;
                let reason = match silent >= SUSPECT_AFTER {
                    true => words::silent(silent),
                    false => words::stuck(stuck),
                };
                self.commands.push_back(Command::Suspect { name: name.clone(), reason });
            }
            if !member.in_flight && now.saturating_duration_since(member.asked) >= POLL_INTERVAL {
                (member.in_flight, member.asked) = (true, now);
                let (name, incarnation) = (name.clone(), member.incarnation);
                self.commands.push_back(Command::Ask { name, incarnation });
            }
        }
        self.members.retain(|name, _| !lost.contains(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Draws;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn drain(liveness: &mut Liveness) -> Vec<Command> {
        std::iter::from_fn(|| liveness.poll_command()).collect()
    }

    fn join(liveness: &mut Liveness, now: Instant, incarnation: u64) {
        liveness.handle(now, Event::Joined { name: "a".into(), incarnation });
    }

    fn answer(incarnation: u64, busy: bool, progress: u64) -> Event {
        Event::Answered { name: "a".into(), incarnation, busy, progress }
    }

    /// Ticks every 50 ms from one time to another; returns what was said, and when, but questions.
    fn run(
        liveness: &mut Liveness,
        start: Instant,
        from: u64,
        to: u64,
        mut answers: impl FnMut(u64) -> Option<Event>,
    ) -> Vec<(u64, Command)> {
        let mut said = Vec::new();
        for at in (from..=to).step_by(50) {
            liveness.handle(start + ms(at), Event::Tick);
            for command in drain(liveness) {
                match command {
                    Command::Ask { .. } => {
                        if let Some(event) = answers(at) {
                            liveness.handle(start + ms(at), event);
                        }
                    }
                    other => said.push((at, other)),
                }
            }
            said.extend(drain(liveness).into_iter().map(|command| (at, command)));
        }
        said
    }

    #[test]
    fn who_is_silent_is_suspected_then_lost_and_asked_once_meanwhile() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        join(&mut liveness, start, 1);
        let mut asked = 0;
        let said = run(&mut liveness, start, 0, 3000, |_| {
            asked += 1;
            None
        });
        assert_eq!(asked, 1, "one question at a time");
        assert!(
            matches!(
                &said[..],
                [(500, Command::Suspect { .. }), (1500, Command::Lost { incarnation: 1, .. })]
            ),
            "{said:?}"
        );
        assert_eq!(liveness.poll_timeout(), None);
    }

    #[test]
    fn who_answers_and_gets_on_is_left_alone_and_who_is_idle_too() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        join(&mut liveness, start, 1);
        assert!(run(&mut liveness, start, 0, 30_000, |at| Some(answer(1, true, at))).is_empty());
        assert!(
            run(&mut liveness, start, 30_050, 60_000, |_| Some(answer(1, false, 7))).is_empty()
        );
    }

    #[test]
    fn a_stuck_thread_is_suspected_soon_and_lost_late_and_recovers_by_getting_on() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        join(&mut liveness, start, 1);
        let said = run(&mut liveness, start, 0, 12_000, |at| {
            Some(answer(1, true, if at < 2000 { 0 } else { 1 }))
        });
        assert!(
            matches!(&said[..], [(500, Command::Suspect { reason, .. }),
            (2000, Command::Recovered { .. }), (2500, Command::Suspect { .. }),
            (12_000, Command::Lost { .. })] if reason.contains("compute")),
            "{said:?}"
        );
    }

    #[test]
    fn answers_and_farewells_of_another_life_count_for_nothing() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        join(&mut liveness, start, 1);
        join(&mut liveness, start, 2);
        liveness.handle(start, Event::Left { name: "a".into(), incarnation: 1 });
        let said = run(&mut liveness, start, 0, 1500, |_| Some(answer(1, false, 0)));
        assert!(matches!(said[..], [_, (1500, Command::Lost { incarnation: 2, .. })]), "{said:?}");
    }

    #[test]
    fn nobody_is_suspected_for_our_own_sleep() {
        let (mut liveness, start) = (Liveness::default(), Instant::now());
        join(&mut liveness, start, 1);
        run(&mut liveness, start, 0, 1000, |at| Some(answer(1, true, at)));
        assert!(run(&mut liveness, start, 4000, 4000, |_| None).is_empty(), "3 s of sleep");
        // From here on it is the member that is silent.
        let said = run(&mut liveness, start, 4050, 6000, |_| None);
        assert!(
            matches!(said[..], [(4500.., Command::Suspect { .. }), (5500.., Command::Lost { .. })]),
            "{said:?}"
        );
    }

    /// Histories of members that answer or not, and of pauses of our own: whoever is silent while
    /// we are awake is suspected and lost in time, nobody else is.
    #[test]
    fn random_histories() {
        for seed in 0..2000 {
            let mut random = Draws(seed);
            let (mut liveness, start) = (Liveness::default(), Instant::now());
            join(&mut liveness, start, seed);
            liveness.handle(start, Event::Tick);
            // `quiet`: how long we were awake since the last answer.
            let (mut now, mut silent_until, mut quiet, mut suspect) = (0, 0, 0, false);
            for progress in 0..200 {
                let pause = if random.below(20) == 0 { 301 + random.below(3000) } else { 0 };
                let step = 40 + random.below(60);
                now += step + pause;
                quiet += if pause > 0 { 0 } else { step };
                if now > silent_until && random.below(30) == 0 {
                    silent_until = now + random.below(2500);
                }
                liveness.handle(start + ms(now), Event::Tick);
                let mut lost = false;
                for command in drain(&mut liveness) {
                    match command {
                        Command::Suspect { .. } => {
                            assert!(!suspect && quiet >= 500, "seed {seed}: {quiet} ms");
                            suspect = true;
                        }
                        Command::Lost { .. } => lost = true,
                        Command::Ask { .. } => {}
                        Command::Recovered { .. } => panic!("seed {seed}: nobody answered"),
                    }
                }
                assert_eq!(lost, quiet >= 1500, "seed {seed}: {quiet} ms");
                assert!(lost || suspect == (quiet >= 500), "seed {seed}: {quiet} ms");
                if lost {
                    break;
                }
                if now >= silent_until {
                    liveness.handle(start + ms(now), answer(seed, true, progress));
                    let recovered = [Command::Recovered { name: "a".into() }];
                    assert_eq!(drain(&mut liveness), recovered[..usize::from(suspect)]);
                    (quiet, suspect) = (0, false);
                }
            }
        }
    }
}
