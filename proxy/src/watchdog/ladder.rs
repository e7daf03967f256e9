//! The reaper's ladder for one socket: a pure state machine from fresh facts to the next action (I10, I13).
//!
//! The owner is asked first, as it alone knows what else has to end with the connection. If the kernel has not seen the
//! close in time, `shutdown(2)` wakes whoever waits on the socket. Last, SOCK_DESTROY takes the connection away, though
//! never the descriptor. Each rung needs the class's predicate on facts that are fresher than the rung before.

use std::time::Duration;

use crate::clock::Mono;
use crate::config::Class;
use crate::kernel::TcpState;
use crate::ledger::RowId;

/// How long a rung has until the kernel must show its effect.
pub const RUNG_TIME: Duration = Duration::from_secs(1);

/// How long a reaping may last in all, for instance while the view is uncertain.
pub const GIVE_UP: Duration = Duration::from_secs(30);

/// What is known of one socket now.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The kernel view can be relied on.
    pub whole: bool,
    /// No reason to hold back: the owner runs, the peer is ours.
    pub free: bool,
    /// The socket's state, if a descriptor still holds it.
    pub held: Option<TcpState>,
    /// The class whose predicate holds now.
    pub class: Option<Class>,
    /// The ledger's row for it.
    pub row: Option<RowId>,
}

/// What the reaper does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// Ask the owning task to close it.
    Ask,
    /// `shutdown(2)` in both directions.
    ShutDown,
    /// SOCK_DESTROY by cookie.
    Destroy,
    /// Retire the row of a socket that does not exist.
    Retire,
}

impl Rung {
    /// The word in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ask => "ask_owner",
            Self::ShutDown => "shutdown",
            Self::Destroy => "sock_destroy",
            Self::Retire => "retire_row",
        }
    }
}

/// What the kernel shows at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Outcome {
    /// No descriptor holds it any more; a ghost: its row is gone.
    Released,
    /// No connection any more, but a descriptor still holds the socket: the backend's place is free, the descriptor
    /// still leaks.
    Severed,
    /// Nothing of the kind.
    Ineffective,
    /// Nothing was done, as configured.
    DryRun,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 4] = [Self::Released, Self::Severed, Self::Ineffective, Self::DryRun];

    /// The label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Severed => "severed",
            Self::Ineffective => "ineffective",
            Self::DryRun => "dry_run",
        }
    }
}

/// The next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing yet.
    Wait,
    /// This rung, and its row if it has one.
    Act(Rung, Option<RowId>),
    /// The end, as the kernel shows it.
    Done(Outcome),
    /// The end without an outcome: nothing is, or can be, done about it any more.
    Withdraw(&'static str),
}

/// One socket's way up the ladder.
#[derive(Clone, Copy, Debug)]
pub struct Ladder {
    class: Class,
    started: Mono,
    last: Option<(Rung, Mono)>,
}

impl Ladder {
    /// At the foot.
    pub fn new(class: Class, now: Mono) -> Self {
        Self { class, started: now, last: None }
    }

    /// The rung that was last taken.
    pub fn rung(&self) -> Option<Rung> {
        self.last.map(|(rung, _)| rung)
    }

    /// The rung could not even be tried, so there is nothing to wait for.
    pub fn failed(&mut self) {
        if let Some((_, at)) = &mut self.last {
            *at = Mono::ZERO;
        }
    }

    /// The next action, on facts that were read after the last one.
    pub fn step(&mut self, facts: &Facts, now: Mono) -> Action {
        let action = self.decide(facts, now);
        if let Action::Act(rung, _) = action {
            self.last = Some((rung, now));
        }
        action
    }

    fn decide(&self, facts: &Facts, now: Mono) -> Action {
        if !facts.whole {
            return if now.since(self.started) < GIVE_UP {
                Action::Wait
            } else {
                Action::Withdraw("the kernel view stays uncertain")
            };
        }
        match self.last {
            None => self.first(facts),
            Some((Rung::Retire, at)) => match facts.row {
                None => Action::Done(Outcome::Released),
                Some(_) if now.since(at) < RUNG_TIME => Action::Wait,
                Some(_) => Action::Done(Outcome::Ineffective),
            },
            Some(_) if facts.held.is_none() => Action::Done(Outcome::Released),
            Some((_, at)) if now.since(at) < RUNG_TIME => Action::Wait,
            Some((Rung::Ask, _)) => self.second(facts),
            // Since our own shutdown the connection is no use to anybody, whatever its class has become.
            Some((Rung::ShutDown, _)) => match facts.held {
                Some(TcpState::Close) => Action::Done(Outcome::Severed),
                _ if !facts.free => Action::Withdraw("held back"),
                _ => Action::Act(Rung::Destroy, None),
            },
            Some((Rung::Destroy, _)) => match facts.held {
                Some(TcpState::Close) => Action::Done(Outcome::Severed),
                _ => Action::Done(Outcome::Ineffective),
            },
        }
    }

    fn first(&self, facts: &Facts) -> Action {
        if facts.class != Some(self.class) {
            return Action::Withdraw("the condition is over");
        }
        if !facts.free {
            return Action::Withdraw("held back");
        }
        match (self.class, facts.row) {
            (Class::Ghost, row) => Action::Act(Rung::Retire, row),
            (_, Some(row)) => Action::Act(Rung::Ask, Some(row)),
            // SOCK_DESTROY cannot reach a socket without a connection, and only the owner could close its descriptor.
            (_, None) if facts.held == Some(TcpState::Close) => Action::Withdraw("no connection left to sever"),
            (_, None) => Action::Act(Rung::Destroy, None),
        }
    }

    fn second(&self, facts: &Facts) -> Action {
        match facts.row {
            // The owner let the row go but not the descriptor: now it is nobody's.
            None if facts.class == Some(Class::Orphan) && facts.held == Some(TcpState::Close) => {
                Action::Done(Outcome::Severed)
            }
            None if facts.class == Some(Class::Orphan) => Action::Act(Rung::Destroy, None),
            Some(row) if facts.class == Some(self.class) && facts.free => Action::Act(Rung::ShutDown, Some(row)),
            _ if !facts.free => Action::Withdraw("held back"),
            _ => Action::Withdraw("the condition is over"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: RowId = RowId { shard: 0, slot: 3, generation: 8 };
    const SECOND: u64 = 1_000_000_000;

    fn facts(class: Class, state: TcpState) -> Facts {
        let row = (class != Class::Orphan).then_some(ROW);
        Facts { whole: true, free: true, held: (class != Class::Ghost).then_some(state), class: Some(class), row }
    }

    const GONE: Facts = Facts { whole: true, free: true, held: None, class: None, row: None };

    fn at(seconds: u64) -> Mono {
        Mono(seconds * SECOND)
    }

    #[test]
    fn the_owner_is_asked_and_closes() {
        let mut ladder = Ladder::new(Class::Zombie, at(1));
        let zombie = facts(Class::Zombie, TcpState::CloseWait);
        assert_eq!(ladder.step(&zombie, at(1)), Action::Act(Rung::Ask, Some(ROW)));
        assert_eq!(ladder.step(&zombie, Mono(at(1).0 + SECOND / 2)), Action::Wait);
        assert_eq!(ladder.step(&GONE, Mono(at(1).0 + SECOND / 2)), Action::Done(Outcome::Released));
    }

    #[test]
    fn an_owner_that_does_nothing_is_climbed_past() {
        let mut ladder = Ladder::new(Class::Zombie, at(1));
        let zombie = facts(Class::Zombie, TcpState::CloseWait);
        assert_eq!(ladder.step(&zombie, at(1)), Action::Act(Rung::Ask, Some(ROW)));
        assert_eq!(ladder.step(&zombie, at(2)), Action::Act(Rung::ShutDown, Some(ROW)));
        let shut = facts(Class::Lingering, TcpState::LastAck);
        assert_eq!(ladder.step(&shut, at(2)), Action::Wait);
        assert_eq!(ladder.step(&shut, at(3)), Action::Act(Rung::Destroy, None));
        let severed = facts(Class::Zombie, TcpState::Close);
        assert_eq!(ladder.step(&severed, Mono(at(3).0 + 1)), Action::Wait, "the owner may still wake and close");
        assert_eq!(ladder.step(&severed, at(4)), Action::Done(Outcome::Severed));
        assert_eq!(ladder.rung(), Some(Rung::Destroy));
    }

    #[test]
    fn what_withstands_sock_destroy_is_ineffective() {
        let mut ladder = Ladder::new(Class::Orphan, at(1));
        let orphan = facts(Class::Orphan, TcpState::Established);
        assert_eq!(ladder.step(&orphan, at(1)), Action::Act(Rung::Destroy, None));
        assert_eq!(ladder.step(&orphan, at(2)), Action::Done(Outcome::Ineffective));
    }

    #[test]
    fn an_orphan_is_severed_directly_and_one_without_connection_is_left() {
        let mut ladder = Ladder::new(Class::Orphan, at(1));
        assert_eq!(ladder.step(&facts(Class::Orphan, TcpState::Established), at(1)), Action::Act(Rung::Destroy, None));
        let closed = facts(Class::Orphan, TcpState::Close);
        assert_eq!(ladder.step(&closed, at(2)), Action::Done(Outcome::Severed));
        assert!(matches!(Ladder::new(Class::Orphan, at(1)).step(&closed, at(1)), Action::Withdraw(_)));
    }

    #[test]
    fn a_ghosts_row_is_retired() {
        let mut ladder = Ladder::new(Class::Ghost, at(1));
        let ghost = facts(Class::Ghost, TcpState::Close);
        assert_eq!(ladder.step(&ghost, at(1)), Action::Act(Rung::Retire, Some(ROW)));
        assert_eq!(ladder.step(&ghost, Mono(at(1).0 + 1)), Action::Wait);
        assert_eq!(ladder.step(&GONE, Mono(at(1).0 + 2)), Action::Done(Outcome::Released));
    }

    #[test]
    fn no_rung_without_the_predicate_on_fresh_facts() {
        let zombie = facts(Class::Zombie, TcpState::CloseWait);
        let healthy = Facts { class: None, ..facts(Class::Zombie, TcpState::Established) };
        assert!(matches!(Ladder::new(Class::Zombie, at(1)).step(&healthy, at(1)), Action::Withdraw(_)));
        let mut ladder = Ladder::new(Class::Hoard, at(1));
        let hoard = facts(Class::Hoard, TcpState::Established);
        assert_eq!(ladder.step(&hoard, at(1)), Action::Act(Rung::Ask, Some(ROW)));
        assert!(matches!(ladder.step(&healthy, at(2)), Action::Withdraw(_)), "a byte moved meanwhile");
        // And not while a worker is stalled.
        let stalled = Facts { free: false, ..zombie };
        assert!(matches!(Ladder::new(Class::Zombie, at(1)).step(&stalled, at(1)), Action::Withdraw(_)));
        let mut ladder = Ladder::new(Class::Zombie, at(1));
        assert_eq!(ladder.step(&zombie, at(1)), Action::Act(Rung::Ask, Some(ROW)));
        assert!(matches!(ladder.step(&stalled, at(2)), Action::Withdraw(_)));
    }

    #[test]
    fn nothing_happens_while_the_view_is_uncertain() {
        let mut ladder = Ladder::new(Class::Zombie, at(1));
        let unsure = Facts { whole: false, ..facts(Class::Zombie, TcpState::CloseWait) };
        assert_eq!(ladder.step(&unsure, at(1)), Action::Wait);
        assert_eq!(ladder.step(&Facts { whole: false, ..GONE }, at(2)), Action::Wait, "nor is anything concluded");
        assert!(matches!(ladder.step(&unsure, at(31)), Action::Withdraw(_)));
    }

    #[test]
    fn an_owner_that_has_ended_is_not_waited_for() {
        let mut ladder = Ladder::new(Class::Zombie, at(10));
        let zombie = facts(Class::Zombie, TcpState::CloseWait);
        assert_eq!(ladder.step(&zombie, at(10)), Action::Act(Rung::Ask, Some(ROW)));
        ladder.failed();
        assert_eq!(ladder.step(&zombie, at(10)), Action::Act(Rung::ShutDown, Some(ROW)));
    }
}
