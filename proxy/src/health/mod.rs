//! Whether backends are up: checks, from one place in the process, and the board where all workers read the result.
//!
//! ```text
//! task (a thread of its own) - check (a query over a connection of its own) - judge (pure) - board (atomics) - workers
//! ```
//!
//! Under `auto` a backend is checked all the time. Under `lazy` it is checked only after queries failed, and then until
//! it passes: workers count failures in a row on the board.
//!
//! Answers to real queries are evidence, too: a backend with more clients than it has places for leaves the connection of
//! a check in its queue and serves all others. So a worker notes on the board that a query was answered that was sent since
//! the check began, and a check that got no answer does not count against that.

mod check;
mod judge;
mod places;
mod task;
mod wire;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

pub(crate) use task::{Health, start};

use crate::clock::Mono;
use crate::config::{Config, HealthMode, Numbers};
use crate::dns::message::RCODE_SERVFAIL;
use crate::ledger::BackendIndex;
use crate::table::Table;
use task::Target;

/// What is known of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// No check has ended yet: it gets queries.
    Unknown,
    /// It gets queries.
    Up,
    /// It gets none.
    Down,
}

impl State {
    const ALL: [Self; 3] = [Self::Unknown, Self::Up, Self::Down];

    /// The word in logs, metrics and `ctl`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CheckResult {
    /// With an answer.
    Passed,
    /// Without one in time, or with SERVFAIL.
    Failed,
    /// It was not made: there was no place for its connection under the limits.
    Skipped,
    /// Nothing came for it, while a query that was sent since it began was answered: the backend has no place for one more
    /// connection. Counts as passed.
    Contradicted,
}

impl CheckResult {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Passed, Self::Failed, Self::Skipped, Self::Contradicted];

    /// Whether it counts as passed.
    const fn speaks_for_it(self) -> bool {
        matches!(self, Self::Passed | Self::Contradicted)
    }

    /// The label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
            Self::Contradicted => "contradicted",
        }
    }
}

/// The states of all backends: written by the thread that checks, read by the workers for each query.
#[derive(Debug)]
pub struct Board {
    places: Table<Place>,
}

/// One backend on the board.
#[derive(Debug, Default)]
pub struct Place {
    /// How it is checked, as a place in [`MODES`] and one more; zero: the configuration does not have it.
    mode: AtomicU8,
    state: AtomicU8,
    /// Queries that failed since the last one that was answered; counted under `lazy` only.
    failures: AtomicU32,
    /// When the present check began; zero: there was none.
    checked_since: AtomicU64,
    /// The check during which a query was both sent and answered: its `checked_since`.
    answered: AtomicU64,
    /// Connections that have brought something, ever; and of these those that have ended.
    taken: AtomicU64,
    left: AtomicU64,
    checks: [AtomicU64; CheckResult::ALL.len()],
    /// Changes to up and to down.
    changes: [AtomicU64; 2],
}

const MODES: [HealthMode; 4] = [HealthMode::Auto, HealthMode::Lazy, HealthMode::Up, HealthMode::Down];

impl Board {
    /// All backends of a configuration, by index.
    pub fn new(config: &Config) -> Self {
        let numbers = Numbers::new(config);
        let board = Self { places: Table::new(numbers.backends()) };
        board.take(config, &numbers, Vec::new());
        board
    }

    /// Another configuration is in force: a backend that is checked as before keeps its state.
    pub fn adopt(&self, old: &Config, new: &Config, numbers: &Numbers) {
        self.places.grow(numbers.backends());
        self.take(new, numbers, task::targets(old, numbers));
    }

    fn take(&self, config: &Config, numbers: &Numbers, before: Vec<Target>) {
        let by_number =
            |targets: Vec<Target>| targets.into_iter().map(|it| (it.backend, it)).collect::<HashMap<_, _>>();
        let (now, before) = (by_number(task::targets(config, numbers)), by_number(before));
        let has: HashSet<_> = config.pools.iter().flat_map(|pool| &pool.backends).map(|it| it.name.as_str()).collect();
        for (place, name) in self.places.iter().zip(numbers.names()) {
            if !has.contains(name) {
                place.mode.store(0, Ordering::Relaxed);
                place.state.store(State::Unknown as u8, Ordering::Relaxed);
            }
        }
        for backend in config.pools.iter().flat_map(|pool| &pool.backends) {
            let Some(number) = numbers.backend(&backend.name) else { continue };
            let place = &self.places[usize::from(number)];
            let mode = MODES.iter().position(|mode| *mode == backend.health.mode).map_or(0, |at| at + 1);
            // Fewer than 256.
            place.mode.store(mode as u8, Ordering::Relaxed);
            if now.get(&number).is_some_and(|target| before.get(&number) == Some(target)) {
                continue;
            }
            let state = match backend.health.mode {
                HealthMode::Auto => State::Unknown,
                HealthMode::Lazy | HealthMode::Up => State::Up,
                HealthMode::Down => State::Down,
            };
            place.state.store(state as u8, Ordering::Relaxed);
            place.failures.store(0, Ordering::Relaxed);
        }
    }

    /// Counts from zero, for another backend; only while nobody uses this one.
    pub fn reset(&self, backend: BackendIndex) {
        let Some(place) = self.get(backend) else { return };
        place.checks.iter().chain(&place.changes).for_each(|counter| counter.store(0, Ordering::Relaxed));
        place.failures.store(0, Ordering::Relaxed);
    }

    /// A backend's place.
    pub fn get(&self, backend: BackendIndex) -> Option<&Place> {
        self.places.get(usize::from(backend))
    }

    /// All places, by index, those of backends too that the configuration had before.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.iter()
    }

    /// Whether queries may go to it.
    pub fn is_usable(&self, backend: BackendIndex) -> bool {
        self.get(backend).is_some_and(|place| place.state() != State::Down)
    }

    /// Whether it is known to be up.
    pub fn is_up(&self, backend: BackendIndex) -> bool {
        self.get(backend).is_some_and(|place| place.state() == State::Up)
    }

    /// A query to it failed for a reason that is the backend's: no answer in time, no connection, a connection that died.
    pub fn query_failed(&self, backend: BackendIndex) {
        if let Some(place) = self.get(backend).filter(|place| place.mode() == Some(HealthMode::Lazy)) {
            place.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Something has come over a connection to it for the first time: it is not waiting in the backend's queue.
    pub fn connection_taken(&self, backend: BackendIndex) {
        if let Some(place) = self.get(backend) {
            place.taken.fetch_add(1, Ordering::Release);
        }
    }

    /// Such a connection has ended.
    pub fn connection_left(&self, backend: BackendIndex) {
        if let Some(place) = self.get(backend) {
            place.left.fetch_add(1, Ordering::Release);
        }
    }

    /// It answered a query that was sent at this time, with this RCODE.
    pub fn query_answered(&self, backend: BackendIndex, sent: Mono, rcode: u8) {
        let Some(place) = self.get(backend) else { return };
        // Loads per answer; written only after failures, and once per check.
        if place.failures.load(Ordering::Relaxed) != 0 {
            place.failures.store(0, Ordering::Relaxed);
        }
        // The same rules as for a check's own answer: in its time, and not SERVFAIL.
        let since = place.checked_since.load(Ordering::Relaxed);
        if sent.0 >= since && rcode != RCODE_SERVFAIL && place.answered.load(Ordering::Relaxed) != since {
            place.answered.store(since, Ordering::Relaxed);
        }
    }
}

impl Place {
    /// How it is checked; none: the configuration does not have it.
    pub fn mode(&self) -> Option<HealthMode> {
        let mode = usize::from(self.mode.load(Ordering::Relaxed));
        mode.checked_sub(1).and_then(|at| MODES.get(at)).copied()
    }

    /// Its state. Where the configuration says it, that counts: the last check of before a reload may end after it.
    pub fn state(&self) -> State {
        match self.mode() {
            Some(HealthMode::Up) => State::Up,
            Some(HealthMode::Down) => State::Down,
            _ => State::ALL.get(usize::from(self.state.load(Ordering::Relaxed))).copied().unwrap_or(State::Unknown),
        }
    }

    /// Checks that ended so.
    pub fn checks(&self, result: CheckResult) -> u64 {
        self.checks[result as usize].load(Ordering::Relaxed)
    }

    /// How often it came up (`true`) or went down.
    pub fn changes(&self, up: bool) -> u64 {
        self.changes[usize::from(!up)].load(Ordering::Relaxed)
    }

    /// Queries that failed in a row.
    pub fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    /// A check begins.
    fn begin_check(&self, now: Mono) {
        self.checked_since.store(now.0, Ordering::Relaxed);
    }

    /// Whether a query was sent and answered since the check began.
    fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed) == self.checked_since.load(Ordering::Relaxed)
    }

    /// Connections that have brought something, ever; and of these those that have ended.
    fn taken(&self) -> (u64, u64) {
        // In this order there are never fewer than have ended.
        let left = self.left.load(Ordering::Acquire);
        (self.taken.load(Ordering::Acquire), left)
    }

    fn count(&self, result: CheckResult) {
        self.checks[result as usize].fetch_add(1, Ordering::Relaxed);
        if result.speaks_for_it() {
            self.failures.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn set(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
        self.changes[usize::from(state == State::Down)].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    /// Only an answer that a check would take, to a query that had no more time than the check has.
    #[test]
    fn an_answer_to_a_query_since_the_check_began_is_evidence() {
        let text = "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n[[pool]]\nname = \"p\"\n\
                    [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\n";
        let board = Board::new(&crate::config::from_str("test", text).unwrap());
        let place = board.get(0).unwrap();
        for (began, sent, rcode, evidence) in [
            (10, 9, 0, false),
            (10, 10, 0, true),
            (20, 19, 0, false),
            (20, 21, 2, false),
            (20, 21, 3, true),
            (30, 0, 0, false),
        ] {
            place.begin_check(Mono(began));
            board.query_answered(0, Mono(sent), rcode);
            assert_eq!(place.has_answered(), evidence, "sent at {sent}, RCODE {rcode}, the check began at {began}");
        }
    }

    /// A check of before a reload ends after it, when nobody checks any more: nothing would ever set it right.
    #[test]
    fn what_the_configuration_says_stands_against_a_late_check() {
        let config = |mode: &str| {
            let text = format!(
                "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n[[pool]]\nname = \"p\"\n\
                 [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\nhealth.mode = \"{mode}\"\n\
                 [[pool.backend]]\nname = \"c\"\naddress = \"127.0.0.1:1054\"\n"
            );
            crate::config::from_str("test", &text).unwrap()
        };
        let (checked, numbers) = (config("auto"), Numbers::new(&config("auto")));
        for (mode, late, usable) in
            [("up", State::Down, true), ("down", State::Up, false), ("auto", State::Down, false)]
        {
            let board = Board::new(&checked);
            assert_eq!(board.get(0).unwrap().state(), State::Unknown);
            board.adopt(&checked, &config(mode), &numbers);
            board.get(0).unwrap().set(late);
            assert_eq!(board.is_usable(0), usable, "{mode}");
        }
    }
}
