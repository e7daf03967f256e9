//! The reaper: the only consumer of findings that may act, and only through [`Hands`].
//!
//! What it decides is in [`ladder`](super::ladder); here is whom it starts on (mode, classes, rate), the fresh facts for
//! each step, and the line in the log that each reaping leaves.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::finding::Finding;
use super::flight::{Change, Flight};
use super::ladder::{Action, Facts, Ladder, Outcome, Rung};
use super::policy::Policy;
use super::reconcile::Joined;
use crate::clock::{self, Mono};
use crate::config::{Class, ReapMode, Watchdog};
use crate::kernel::KernelSocket;
use crate::ledger::{RowId, RowState};

/// What the reaper can do to the world.
pub trait Hands {
    /// Asks the owner of a row to close it. False if the owner has ended.
    fn ask(&mut self, row: RowId) -> bool;
    /// `shutdown(2)` on a row's socket. False if its owner has let go of it.
    fn shut_down(&mut self, row: RowId) -> bool;
    /// SOCK_DESTROY.
    ///
    /// # Errors
    /// The kernel refuses: no CAP_NET_ADMIN, no such socket any more, or not offered.
    fn destroy(&mut self, socket: &KernelSocket) -> io::Result<()>;
    /// Retires a ghost's row. False if its socket turns out to exist, or the slot has moved on.
    fn retire(&mut self, row: RowId, cookie: u64) -> bool;
}

/// A reaping that is over, for logs, metrics and drills.
#[derive(Clone, Debug)]
pub struct ReapRecord {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// The finding's class.
    pub class: Class,
    /// The last rung that was taken.
    pub rung: Option<Rung>,
    /// What the kernel showed; none: withdrawn.
    pub outcome: Option<Outcome>,
    /// Why it was withdrawn, or why a rung failed.
    pub note: String,
    /// When it was over.
    pub at: Mono,
    /// The same as unix time, seconds.
    pub unix: f64,
    /// Records are numbered from 1.
    pub serial: u64,
    /// An operator ordered it.
    pub ordered: bool,
    /// The finding as it was when the reaping began, with the changes of its state up to the end.
    pub finding: Finding,
    /// What both views said of it when the reaping began.
    pub evidence: String,
}

/// Records kept for drills and for `ctl`.
pub const RECENT: usize = 1000;

/// An ineffective reaping is tried again after this long.
const TRY_AGAIN: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Active {
    finding: Finding,
    ladder: Ladder,
    note: String,
    ordered: bool,
    evidence: String,
}

impl Active {
    fn new(finding: &Finding, ordered: bool, now: Mono) -> Self {
        let ladder = Ladder::new(finding.class, now);
        Self { finding: finding.clone(), ladder, note: String::new(), ordered, evidence: finding.evidence(now) }
    }
}

/// The state of all reapings.
#[derive(Debug)]
pub struct Reaper {
    mode: ReapMode,
    classes: Vec<Class>,
    per_minute: usize,
    started: VecDeque<Mono>,
    active: HashMap<u64, Active>,
    /// Sockets that outlived their reaping, whatever class they are in by now, and when to try again; none: never.
    outlived: HashMap<u64, Option<Mono>>,
    /// What dry run has counted and is still a finding.
    rehearsed: HashSet<(u64, Class)>,
    /// The findings of the sweep before: what is reaped was published for a whole interval, so that a scrape sees it.
    published: HashSet<(u64, Class)>,
    /// By class and outcome.
    pub counts: [[u64; Outcome::ALL.len()]; Class::ALL.len()],
    /// The latest reapings, oldest first.
    pub recent: VecDeque<Arc<ReapRecord>>,
    /// Of the last record.
    serial: u64,
    /// Types of the TLVs in the headers to each backend.
    tlv_types: Vec<Vec<u8>>,
}

impl Reaper {
    /// A reaper as configured.
    pub fn new(config: &Watchdog) -> Self {
        Self {
            mode: config.reap,
            classes: config.classes.clone(),
            per_minute: config.max_reaps_per_minute as usize,
            started: VecDeque::new(),
            active: HashMap::new(),
            outlived: HashMap::new(),
            rehearsed: HashSet::new(),
            published: HashSet::new(),
            counts: Default::default(),
            recent: VecDeque::new(),
            serial: 0,
            tlv_types: Vec::new(),
        }
    }

    /// With the types of the TLVs in the headers to each backend, for the log.
    #[must_use]
    pub fn with_tlv_types(self, tlv_types: Vec<Vec<u8>>) -> Self {
        Self { tlv_types, ..self }
    }

    /// Goes by another configuration from now on; what is under way goes on.
    pub fn adopt(&mut self, config: &Watchdog, tlv_types: Vec<Vec<u8>>) {
        self.mode = config.reap;
        self.classes.clone_from(&config.classes);
        self.per_minute = config.max_reaps_per_minute as usize;
        self.tlv_types = tlv_types;
        // What was only rehearsed so far may be acted on now.
        self.rehearsed.clear();
    }

    /// Whether a reaping is under way.
    pub fn is_busy(&self) -> bool {
        !self.active.is_empty()
    }

    /// Takes up the findings of one sweep, as far as the mode, the classes and the rate allow.
    pub fn admit(&mut self, findings: &[Finding], joined: &Joined<'_>, policy: &Policy, now: Mono) {
        self.outlived.retain(|cookie, again| again.is_none_or(|again| now < again) && joined.pair(*cookie).exists());
        let current: HashSet<_> = findings.iter().map(|finding| (finding.cookie, finding.class)).collect();
        self.rehearsed.retain(|rehearsed| current.contains(rehearsed));
        let published = std::mem::replace(&mut self.published, current);
        if self.mode == ReapMode::Off {
            return;
        }
        for finding in findings {
            if finding.held_back.is_some()
                || !published.contains(&(finding.cookie, finding.class))
                || !self.classes.contains(&finding.class)
                || self.active.contains_key(&finding.cookie)
                || self.outlived.contains_key(&finding.cookie)
                || self.rehearsed.contains(&(finding.cookie, finding.class))
            {
                continue;
            }
            if !self.take_place(now) {
                tracing::warn!(per_minute = self.per_minute, "the rate cap of the reaper is reached, the rest waits");
                return;
            }
            let active = Active::new(finding, false, now);
            if self.mode == ReapMode::DryRun {
                self.rehearsed.insert((finding.cookie, finding.class));
                self.finish(active, Some(Outcome::DryRun), policy, now);
            } else {
                self.active.insert(finding.cookie, active);
            }
        }
    }

    /// Begins the reaping of one finding on an operator's order: mode, classes and rate are those of the reaper's own
    /// decisions and do not count here. The number of the next record, at the soonest its own.
    ///
    /// # Errors
    /// It is held back, or being reaped already.
    pub fn order(&mut self, finding: &Finding, now: Mono) -> Result<u64, String> {
        if let Some(held_back) = finding.held_back {
            return Err(format!("socket {} is held back: {held_back}", finding.cookie));
        }
        if self.active.contains_key(&finding.cookie) {
            return Err(format!("socket {} is being reaped already", finding.cookie));
        }
        self.active.insert(finding.cookie, Active::new(finding, true, now));
        Ok(self.serial + 1)
    }

    fn take_place(&mut self, now: Mono) -> bool {
        while self.started.front().is_some_and(|at| now.since(*at) >= Duration::from_secs(60)) {
            self.started.pop_front();
        }
        let free = self.started.len() < self.per_minute;
        if free {
            self.started.push_back(now);
        }
        free
    }

    /// One step of every reaping, on snapshots that were taken for it.
    pub fn step(&mut self, fresh: &Joined<'_>, policy: &Policy, hands: &mut impl Hands, now: Mono) {
        let mut over = Vec::new();
        for (cookie, active) in &mut self.active {
            let facts = facts(*cookie, fresh, policy, &active.finding);
            if facts.whole {
                active.finding.flight.record(Change::of(&fresh.pair(*cookie), fresh.taken()));
            }
            match active.ladder.step(&facts, now) {
                Action::Wait => {}
                Action::Act(rung, row) => act(active, rung, row, fresh, hands),
                Action::Done(outcome) => over.push((*cookie, Some(outcome))),
                Action::Withdraw(why) => {
                    why.clone_into(&mut active.note);
                    over.push((*cookie, None));
                }
            }
        }
        for (cookie, outcome) in over {
            if let Some(active) = self.active.remove(&cookie) {
                self.finish(active, outcome, policy, now);
            }
        }
    }

    fn finish(&mut self, active: Active, outcome: Option<Outcome>, policy: &Policy, now: Mono) {
        let Active { finding, ladder, note, ordered, evidence } = active;
        if let Some(outcome) = outcome {
            self.counts[finding.class as usize][outcome as usize] += 1;
        }
        match outcome {
            Some(Outcome::Severed) => drop(self.outlived.insert(finding.cookie, None)),
            Some(Outcome::Ineffective) => drop(self.outlived.insert(finding.cookie, Some(now.after(TRY_AGAIN)))),
            // Gone, only rehearsed, or healthy again.
            Some(Outcome::Released | Outcome::DryRun) | None => {}
        }
        self.serial += 1;
        let record = ReapRecord {
            cookie: finding.cookie,
            class: finding.class,
            rung: ladder.rung(),
            outcome,
            note,
            at: now,
            unix: clock::unix_seconds(),
            serial: self.serial,
            ordered,
            finding,
            evidence,
        };
        log(&record, &self.tlv_types, policy);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Arc::new(record));
    }
}

/// What is known of a finding's socket now, its class's predicate included.
fn facts(cookie: u64, fresh: &Joined<'_>, policy: &Policy, finding: &Finding) -> Facts {
    let pair = fresh.pair(cookie);
    Facts {
        whole: fresh.is_whole(),
        free: fresh.stalled_owner(pair.row, finding.first_seen, policy).is_none(),
        held: pair.socket.map(|socket| socket.state),
        class: fresh.condition(cookie, policy).map(|condition| condition.class),
        row: pair.row.map(|row| row.id),
    }
}

fn act(active: &mut Active, rung: Rung, row: Option<RowId>, fresh: &Joined<'_>, hands: &mut impl Hands) {
    let cookie = active.finding.cookie;
    let done = match (rung, row) {
        (Rung::Ask, Some(row)) => hands.ask(row),
        (Rung::ShutDown, Some(row)) => hands.shut_down(row),
        (Rung::Retire, Some(row)) => hands.retire(row, cookie),
        (Rung::Destroy, _) => match fresh.pair(cookie).socket.map(|socket| hands.destroy(socket)) {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                // The outcome says the rest; the reason is needed to understand it.
                let _ = write!(active.note, "SOCK_DESTROY: {error}");
                false
            }
            None => false,
        },
        (Rung::Ask | Rung::ShutDown | Rung::Retire, None) => false,
    };
    tracing::debug!(cookie, class = active.finding.class.name(), rung = rung.name(), done, "reaping");
    if !done {
        active.ladder.failed();
    }
}

/// Types of TLVs as the configuration writes them: `0xE0,0xE1`.
pub fn type_list(types: &[u8]) -> String {
    types.iter().map(|kind| format!("{kind:#04X}").replacen("0X", "0x", 1)).collect::<Vec<_>>().join(",")
}

/// The flight recorder on one line: how long before `now`, and what kernel and ledger said.
fn changes(flight: &Flight, now: Mono) -> String {
    let mut text = String::new();
    for change in flight.changes() {
        let tcp = change.tcp.map_or("none", |state| state.as_str());
        let row = change.row.map_or("none", RowState::label);
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{:.1} s ago {tcp}/{row}", now.since(change.at).as_secs_f64());
    }
    text
}

fn log(record: &ReapRecord, tlv_types: &[Vec<u8>], policy: &Policy) {
    let (finding, now) = (&record.finding, record.at);
    let addresses = finding.socket.as_ref().map(|socket| (socket.local.to_string(), socket.remote.to_string()));
    let (local, remote) = addresses.unwrap_or_default();
    tracing::warn!(
        cookie = finding.cookie,
        local,
        remote,
        class = finding.class.name(),
        backend = policy.label(finding.backend),
        owner = finding.owner(),
        age_seconds = finding.opened().map_or(0.0, |opened| now.since(opened).as_secs_f64()),
        since_seconds = now.since(finding.since).as_secs_f64(),
        sweeps = finding.sweeps,
        tlv_types = type_list(finding.tlv_types(tlv_types)),
        evidence = record.evidence,
        changes = changes(&finding.flight, now),
        ordered = record.ordered,
        rung = record.rung.map_or("none", Rung::name),
        outcome = record.outcome.map_or("withdrawn", Outcome::label),
        note = record.note,
        message = match record.outcome {
            Some(Outcome::DryRun) => "would be reaped",
            Some(_) => "reaped",
            None => "reaping withdrawn",
        },
    );
}

#[cfg(test)]
#[path = "reaper_tests.rs"]
mod tests;
