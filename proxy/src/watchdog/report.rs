//! What the watchdog publishes after each sweep. Metrics, admin and drills read it; no worker ever does.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::finding::Finding;
use super::ladder::Outcome;
use super::policy::Policy;
use super::reaper::ReapRecord;
use super::reconcile::Joined;
use crate::clock::{Mono, nanos};
use crate::config::Class;
use crate::kernel::{Crosscheck, KernelSnapshot, Source, TcpState};
use crate::ledger::BackendIndex;

/// Upper bounds of the sweep duration's buckets, nanoseconds.
pub const SWEEP_BOUNDS: [u64; 8] =
    [500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 50_000_000, 250_000_000, 1_000_000_000];

/// The state of the watchdog after its last sweep.
#[derive(Clone, Debug)]
pub struct Report {
    /// Where the kernel view comes from.
    pub source: Source,
    /// Why nothing is reaped; none: the view is whole.
    pub uncertain: Option<String>,
    /// Events that the kernel view missed so far.
    pub missed: u64,
    /// Held sockets of the last kernel snapshot.
    pub sockets: BTreeMap<(Option<BackendIndex>, TcpState), Group>,
    /// What is wrong now.
    pub findings: Vec<Finding>,
    /// By worker.
    pub stalled: Vec<bool>,
    /// Sweeps so far, failed ones included.
    pub sweeps: u64,
    /// By bucket of [`SWEEP_BOUNDS`], the last is everything above; and nanoseconds in all.
    pub durations: ([u64; SWEEP_BOUNDS.len() + 1], u64),
    /// Unix time of the last sweep that succeeded, seconds; zero: none yet.
    pub last_success: f64,
    /// By class and outcome.
    pub reaped: [[u64; Outcome::ALL.len()]; Class::ALL.len()],
    /// The latest reapings, oldest first.
    pub recent: VecDeque<Arc<ReapRecord>>,
    /// When the kernel was last read.
    pub taken: Mono,
    /// How long the last sweep took.
    pub last_sweep: Duration,
    /// How long the slowest one took.
    pub slowest_sweep: Duration,
    /// The last comparison with the witnesses; none: not due yet since the view was opened.
    pub crosscheck: Option<Checked>,
}

/// A comparison of the kernel view with its witnesses.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Unix time, seconds.
    pub at: f64,
    /// What it said.
    pub result: Crosscheck,
}

/// Sockets of one backend in one state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// How many.
    pub count: u64,
    /// When the oldest one was opened, if the view knows.
    pub oldest: Option<Mono>,
}

impl Report {
    /// Before the first sweep.
    pub(crate) fn new(source: Source, workers: usize) -> Self {
        Self {
            source,
            uncertain: None,
            missed: 0,
            sockets: BTreeMap::new(),
            findings: Vec::new(),
            stalled: vec![false; workers],
            sweeps: 0,
            durations: Default::default(),
            last_success: 0.0,
            reaped: Default::default(),
            recent: VecDeque::new(),
            taken: Mono::ZERO,
            last_sweep: Duration::ZERO,
            slowest_sweep: Duration::ZERO,
            crosscheck: None,
        }
    }

    /// How many findings there are per backend and class.
    pub fn discrepancies(&self) -> BTreeMap<(Option<BackendIndex>, Class), u64> {
        let mut counts = BTreeMap::new();
        for finding in &self.findings {
            *counts.entry((finding.backend, finding.class)).or_insert(0) += 1;
        }
        counts
    }

    pub(super) fn record_duration(&mut self, taken: Duration) {
        self.last_sweep = taken;
        self.slowest_sweep = self.slowest_sweep.max(taken);
        let nanos = nanos(taken);
        let (buckets, sum) = &mut self.durations;
        buckets[SWEEP_BOUNDS.partition_point(|bound| *bound < nanos)] += 1;
        *sum = sum.saturating_add(nanos);
    }
}

/// Held sockets by backend and state. The ledger's word on the backend comes first: two may have one address.
pub(super) fn groups(
    kernel: &KernelSnapshot,
    joined: &Joined<'_>,
    policy: &Policy,
) -> BTreeMap<(Option<BackendIndex>, TcpState), Group> {
    let mut groups: BTreeMap<_, Group> = BTreeMap::new();
    for socket in kernel.sockets.iter().filter(|socket| socket.held) {
        let row = joined.pair(socket.cookie).row;
        let backend = row.map(|row| row.backend).or_else(|| policy.backend_of(socket));
        let group = groups.entry((backend, socket.state)).or_default();
        group.count += 1;
        let opened = socket.opened.map(Mono).or_else(|| row.map(|row| row.opened));
        group.oldest = match (group.oldest, opened) {
            (Some(oldest), Some(opened)) => Some(oldest.min(opened)),
            (oldest, opened) => oldest.or(opened),
        };
    }
    groups
}

/// The place of the latest report.
#[derive(Debug)]
pub(super) struct Published(Mutex<Arc<Report>>);

impl Published {
    pub(super) fn new(report: Report) -> Self {
        Self(Mutex::new(Arc::new(report)))
    }

    pub(super) fn put(&self, report: Report) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(report);
    }

    pub(super) fn get(&self) -> Arc<Report> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
