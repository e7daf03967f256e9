//! The watchdog's thread: reads both halves, joins them, publishes what it found, and lets the reaper act.
//!
//! It only reads the ledger's atomics and sends requests that nobody waits for, so it can neither block a worker nor be
//! blocked by one.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};

use tokio::sync::oneshot;

use super::finding::Finding;
use super::flight::Recorder;
use super::policy::Policy;
use super::reaper::{Hands, Reaper};
use super::reconcile::{History, Joined, Trust, reconcile, stalled};
use super::report::{Checked, Published, Report, groups};
use super::{Look, Ordered, Subject};
use crate::clock::{self, Mono};
use crate::close::CloseReason;
use crate::config::Class;
use crate::control::Control;
use crate::kernel::{Crosscheck, KernelSnapshot, KernelSocket, KernelView, Source, ViewError};
use crate::ledger::{LedgerSnapshot, RowId};

/// Between two steps of the reaper while it is busy.
const STEP: std::time::Duration = std::time::Duration::from_millis(100);

/// What others ask of the watchdog.
#[derive(Debug)]
pub(super) enum Request {
    /// Sweep at once.
    Sweep,
    /// Read both halves.
    Look(oneshot::Sender<Look>),
    /// Reap one finding.
    Reap {
        /// Of which socket.
        cookie: u64,
        /// Whether it has begun.
        answer: oneshot::Sender<Result<Ordered, String>>,
    },
    /// Work with another configuration.
    Adopt(Box<Subject>),
    /// End.
    Stop,
}

/// The state of the thread.
pub(super) struct Task {
    subject: Subject,
    view: Box<dyn KernelView>,
    published: Arc<Published>,
    report: Report,
    history: History,
    recorder: Recorder,
    reaper: Reaper,
    started: Mono,
    next_crosscheck: Mono,
    /// Why the last cross-check does not believe the view.
    disbelief: Option<String>,
    /// A ghost's socket turned out to exist: the view is wrong about something.
    doubt: bool,
    known: HashSet<(u64, Class)>,
}

impl Task {
    pub(super) fn new(subject: Subject, view: Box<dyn KernelView>, published: Arc<Published>) -> Self {
        let now = clock::now();
        Self {
            report: Report::new(view.source(), subject.policy.workers),
            reaper: Reaper::new(&subject.settings).with_tlv_types(subject.tlv_types.clone()),
            next_crosscheck: now.after(subject.settings.crosscheck_interval),
            subject,
            view,
            published,
            history: History::default(),
            recorder: Recorder::default(),
            started: now,
            disbelief: None,
            doubt: false,
            known: HashSet::new(),
        }
    }

    /// Until somebody says stop, or nobody is left who could.
    pub(super) fn run(mut self, requests: &Receiver<Request>) {
        let mut next_sweep = clock::now();
        loop {
            let now = clock::now();
            let wake = if self.reaper.is_busy() { next_sweep.min(now.after(STEP)) } else { next_sweep };
            let mut requested = false;
            match requests.recv_timeout(wake.since(now)) {
                Ok(Request::Sweep) => requested = true,
                // Who asked may be gone: then nobody needs to know.
                Ok(Request::Look(answer)) => drop(answer.send(self.look())),
                Ok(Request::Reap { cookie, answer }) => drop(answer.send(self.order(cookie))),
                Ok(Request::Adopt(subject)) => {
                    let now = clock::now();
                    self.adopt(*subject, now);
                    next_sweep = next_sweep.min(now.after(self.subject.settings.interval));
                }
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = clock::now();
            if requested || now >= next_sweep {
                self.sweep();
                // From now, not from when it was due: sweeps do not bunch up after a pause.
                next_sweep = now.after(self.subject.settings.interval);
            }
            if self.reaper.is_busy() {
                self.reap();
            }
        }
    }

    /// Goes by another configuration from now on. What was not due for long by the old intervals is due by the new ones.
    fn adopt(&mut self, subject: Subject, now: Mono) {
        self.reaper.adopt(&subject.settings, subject.tlv_types.clone());
        self.next_crosscheck = self.next_crosscheck.min(now.after(subject.settings.crosscheck_interval));
        self.subject = subject;
    }

    fn sweep(&mut self) {
        let began = clock::now();
        self.report.sweeps += 1;
        match self.read() {
            Ok((kernel, ledger)) => self.join(&kernel, &ledger, began),
            Err(ViewError::Off) => self.blind(None),
            Err(error) => self.blind(Some(error)),
        }
        let now = clock::now();
        self.report.record_duration(now.since(began));
        self.publish();
    }

    /// The kernel first, then the ledger.
    fn read(&mut self) -> Result<(KernelSnapshot, LedgerSnapshot), ViewError> {
        let now = clock::now();
        if self.view.source() != Source::None && (now >= self.next_crosscheck || self.disbelief.is_some() || self.doubt)
        {
            self.next_crosscheck = now.after(self.subject.settings.crosscheck_interval);
            // One that fails settles no doubt.
            let crosscheck = self.view.crosscheck()?;
            self.doubt = false;
            self.tell_of_witnesses(&crosscheck);
            self.disbelief = crosscheck.doubt().map(str::to_owned);
            self.report.crosscheck = Some(Checked { at: clock::unix_seconds(), result: crosscheck });
        }
        let mut kernel = self.view.snapshot()?;
        if kernel.uncertain.is_none() {
            kernel.uncertain.clone_from(&self.disbelief);
        }
        let ledger = self.subject.ledger.snapshot(clock::now());
        Ok((kernel, ledger))
    }

    /// One line for each change of what the witnesses contradict each other about.
    fn tell_of_witnesses(&self, now: &Crosscheck) {
        let before = self.report.crosscheck.as_ref().and_then(|checked| checked.result.disagreement.as_ref());
        match (&now.disagreement, now.liar) {
            (disagreement, _) if disagreement.as_ref() == before => {}
            (Some(disagreement), Some(liar)) => {
                tracing::warn!(disagreement, liar = liar.label(), "one of the kernel view's witnesses is wrong");
            }
            (Some(disagreement), None) => tracing::warn!(disagreement, "the kernel view's witnesses disagree"),
            (None, _) => tracing::info!(compared = ?now.compared, "the kernel view's witnesses agree again"),
        }
    }

    fn join(&mut self, kernel: &KernelSnapshot, ledger: &LedgerSnapshot, began: Mono) {
        let policy = Arc::clone(&self.subject.policy);
        let joined = Joined::new(kernel, self.trust(), ledger);
        let mut findings = reconcile(&joined, &mut self.history, &policy);
        self.recorder.record(&joined);
        for finding in &mut findings {
            finding.flight = self.recorder.flight(finding.cookie);
        }
        self.announce(&findings, &policy, began);
        self.watch_workers(ledger, &policy);
        self.reaper.admit(&findings, &joined, &policy, began);
        if kernel.uncertain != self.report.uncertain {
            match &kernel.uncertain {
                Some(reason) => tracing::warn!(reason, "the kernel view is uncertain, nothing is reaped"),
                None => tracing::info!("the kernel view is whole again"),
            }
        }
        self.report.sockets = groups(kernel, &joined, &policy);
        self.report.findings = findings;
        self.report.uncertain.clone_from(&kernel.uncertain);
        self.report.missed = kernel.missed;
        self.report.taken = joined.taken();
        self.report.last_success = clock::unix_seconds();
        if joined.is_whole() {
            self.subject.ledger.retire_tombstones(|tombstone| {
                tombstone.closed < joined.taken() && joined.pair(tombstone.cookie).socket.is_none()
            });
        }
    }

    /// A sweep without a kernel view: only the workers can be watched.
    fn blind(&mut self, error: Option<ViewError>) {
        self.history.interrupt();
        let ledger = self.subject.ledger.snapshot(clock::now());
        let policy = Arc::clone(&self.subject.policy);
        self.watch_workers(&ledger, &policy);
        self.report.sockets.clear();
        self.report.findings.clear();
        match error {
            // Off by configuration: that is all this sweep can do.
            None => self.report.last_success = clock::unix_seconds(),
            Some(error) => {
                let error = Some(error.to_string());
                // Once, not with each sweep.
                if self.report.uncertain != error {
                    tracing::warn!(error, "the kernel view cannot be read");
                }
                self.report.uncertain = error;
            }
        }
    }

    fn trust(&self) -> Trust {
        match self.view.source() {
            _ if !self.subject.has_ledger => Trust::Beside,
            Source::Ebpf => Trust::Full,
            Source::SockDiag | Source::None => Trust::Fallback,
        }
    }

    /// One line for each finding that is new, and one for each that is over.
    fn announce(&mut self, findings: &[Finding], policy: &Policy, now: Mono) {
        for finding in findings.iter().filter(|finding| !self.known.contains(&(finding.cookie, finding.class))) {
            tracing::warn!(
                cookie = finding.cookie,
                class = finding.class.name(),
                backend = policy.label(finding.backend),
                owner = finding.owner(),
                sweeps = finding.sweeps,
                since_seconds = now.since(finding.since).as_secs_f64(),
                evidence = finding.evidence(now),
                held_back = finding.held_back.map(|held_back| held_back.to_string()),
                "finding"
            );
        }
        let current: HashSet<_> = findings.iter().map(|finding| (finding.cookie, finding.class)).collect();
        for (cookie, class) in self.known.difference(&current) {
            tracing::info!(cookie, class = class.name(), "finding is over");
        }
        self.known = current;
    }

    fn watch_workers(&mut self, ledger: &LedgerSnapshot, policy: &Policy) {
        let stalled = stalled(ledger, self.started, policy);
        for (worker, (now, before)) in stalled.iter().zip(&self.report.stalled).enumerate() {
            match (now, before) {
                (true, false) => tracing::error!(worker, "worker is stalled, nothing of it is reaped"),
                (false, true) => tracing::info!(worker, "worker runs again"),
                _ => {}
            }
        }
        self.report.stalled = stalled;
    }

    /// One step of every reaping, on snapshots of its own: fresher than the rung before (I10).
    fn reap(&mut self) {
        let Ok((kernel, ledger)) = self.read() else { return };
        let policy = Arc::clone(&self.subject.policy);
        let joined = Joined::new(&kernel, self.trust(), &ledger);
        let mut hands = Grip { subject: &self.subject, view: &mut *self.view, doubt: false };
        self.reaper.step(&joined, &policy, &mut hands, clock::now());
        self.doubt |= hands.doubt;
        self.publish();
    }

    fn look(&mut self) -> Look {
        let (kernel, ledger) = match self.read() {
            Ok((kernel, ledger)) => (Ok(kernel), ledger),
            Err(error) => (Err(error.to_string()), self.subject.ledger.snapshot(clock::now())),
        };
        Look { kernel, ledger, report: self.published.get() }
    }

    /// Begins the reaping that an operator orders, if it is of a finding that may be acted on. The ladder evaluates the
    /// class again before each rung, as always (I10).
    fn order(&mut self, cookie: u64) -> Result<Ordered, String> {
        if let Some(reason) = &self.report.uncertain {
            return Err(format!("the kernel view is uncertain: {reason}"));
        }
        let Some(finding) = self.report.findings.iter().find(|finding| finding.cookie == cookie).cloned() else {
            return Err(self.no_finding(cookie));
        };
        let serial = self.reaper.order(&finding, clock::now())?;
        tracing::warn!(cookie, class = finding.class.name(), "an operator orders a reaping");
        Ok(Ordered { finding, serial })
    }

    /// Why a socket that is no finding is not reaped.
    fn no_finding(&mut self, cookie: u64) -> String {
        let (kernel, ledger) = match self.read() {
            Ok(read) => read,
            Err(error) => return format!("the kernel view cannot be read: {error}"),
        };
        let joined = Joined::new(&kernel, self.trust(), &ledger);
        if !joined.pair(cookie).exists() {
            return format!("neither view has a socket {cookie}");
        }
        match joined.condition(cookie, &self.subject.policy) {
            Some(condition) => {
                let class = condition.class.name();
                format!("socket {cookie} looks like a {class}, but not in enough sweeps or not for long enough yet")
            }
            None => format!("socket {cookie} is no finding: nothing is wrong with it"),
        }
    }

    fn publish(&mut self) {
        self.report.reaped = self.reaper.counts;
        self.report.recent.clone_from(&self.reaper.recent);
        self.published.put(self.report.clone());
    }
}

/// The reaper's hands: on this process's connections, and on any that the view can name.
struct Grip<'a> {
    subject: &'a Subject,
    view: &'a mut dyn KernelView,
    doubt: bool,
}

impl Hands for Grip<'_> {
    fn ask(&mut self, row: RowId) -> bool {
        self.subject.controls.send(row.shard, Control::Close { row, reason: CloseReason::Reaped })
    }

    fn shut_down(&mut self, row: RowId) -> bool {
        let shut = self.subject.ledger.with_socket(row, |socket| socket.shutdown(std::net::Shutdown::Both));
        match shut {
            // ENOTCONN: the connection is gone already, and its owner sleeps on.
            Some(Err(error)) if error.kind() != io::ErrorKind::NotConnected => {
                tracing::debug!(%error, "shutdown(2)");
                false
            }
            Some(_) => true,
            None => false,
        }
    }

    fn destroy(&mut self, socket: &KernelSocket) -> io::Result<()> {
        self.view.destroy(socket).map_err(io::Error::other)?.result()
    }

    fn retire(&mut self, row: RowId, cookie: u64) -> bool {
        let exists = self
            .subject
            .ledger
            .with_socket(row, |socket| socket.cookie().is_ok_and(|found| found == cookie))
            .unwrap_or(false);
        if exists {
            tracing::error!(cookie, "no ghost: its socket exists, so the kernel view is wrong");
            self.doubt = true;
            return false;
        }
        self.subject.ledger.retire_row(row, cookie)
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
