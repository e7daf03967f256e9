//! The thread that checks: one task per backend whose health is `auto` or `lazy`, and a shard of the ledger for their
//! connections. No worker waits for it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;

use super::check::{self, Cancel, Outcome};
use super::judge::Judge;
use super::places::{Counts, Places};
use super::{Board, CheckResult, Place, State};
use crate::clock;
use crate::close::CloseReason;
use crate::config::{self, BackendTls, Config, HealthMode, Numbers};
use crate::control::{Control, Controls};
use crate::dns::frame;
use crate::ledger::caps::AtCap;
use crate::ledger::{BackendIndex, Claim, ShardWriter};
use crate::proxy_protocol::MAX_LEN;
use crate::proxy_protocol::encode::HeaderWriter;

/// The running checks; end when this is dropped.
#[derive(Debug)]
pub(crate) struct Health {
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Health {
    fn drop(&mut self) {
        // Dropping the sender is the signal.
        self.stop.take();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the health checks has panicked");
        }
    }
}

/// What a check needs to know of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) backend: BackendIndex,
    name: String,
    pub(super) address: SocketAddr,
    pub(super) timeout: Duration,
    /// A LOCAL header if the pool sends headers, and the query with its length.
    pub(super) bytes: Vec<u8>,
    /// Where in `bytes` the query's length is.
    pub(super) query: usize,
    /// The query goes over TLS.
    pub(super) tls: Option<BackendTls>,
    source: Vec<SocketAddr>,
    health: config::Health,
}

/// Starts the thread. `claim` is for the shard of its connections, `requests` are those to its owner; `workers` are
/// asked to make room when a limit leaves none for a check.
///
/// # Errors
///
/// The thread or its runtime cannot be started.
pub(crate) fn start(
    config: &Config,
    board: Arc<Board>,
    claim: Claim,
    requests: mpsc::UnboundedReceiver<Control>,
    workers: Controls,
) -> io::Result<Health> {
    let targets = targets(config, &Numbers::new(config));
    let count = config.server.workers;
    let (stop, stopped) = watch::channel(());
    let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
    let thread = std::thread::Builder::new().name("health".to_owned()).spawn(move || {
        let ledger = claim.writer();
        let local = LocalSet::new();
        let mut checks = AllChecks { running: Vec::new(), ledger, board, workers, count, stopped };
        local.spawn_local(async move {
            checks.begin(targets);
            checks.obey(requests).await;
        });
        runtime.block_on(local);
    })?;
    Ok(Health { stop: Some(stop), thread: Some(thread) })
}

/// The backends of a configuration that are checked.
pub(super) fn targets(config: &Config, numbers: &Numbers) -> Vec<Target> {
    let mut targets = Vec::new();
    let backends = config.pools.iter().flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)));
    for (pool, backend) in backends {
        // All names of the configuration have numbers.
        let Some(number) = numbers.backend(&backend.name) else { continue };
        let health = &backend.health;
        if matches!(health.mode, HealthMode::Up | HealthMode::Down) {
            continue;
        }
        let mut bytes = Vec::new();
        if pool.proxy_protocol.is_some() {
            // A LOCAL header has 16 octets.
            let written = HeaderWriter::local(&mut bytes).finish(MAX_LEN);
            debug_assert!(written.is_ok());
        }
        let query = bytes.len();
        frame::append(&mut bytes, &question(health.name.wire()));
        targets.push(Target {
            backend: number,
            name: backend.name.clone(),
            address: backend.address,
            timeout: health.timeout,
            bytes,
            query,
            tls: backend.tls.clone(),
            source: backend.source.clone(),
            health: health.clone(),
        });
    }
    targets
}

/// A query for the A record of a name, with RD set; the ID is filled in for each check.
fn question(name: &[u8]) -> Vec<u8> {
    let mut query = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend_from_slice(name);
    query.extend_from_slice(&[0, 1, 0, 1]);
    query
}

/// The checks of all backends.
struct AllChecks {
    running: Vec<(Target, Rc<Cancel>)>,
    ledger: ShardWriter,
    board: Arc<Board>,
    workers: Controls,
    count: usize,
    stopped: watch::Receiver<()>,
}

impl AllChecks {
    fn begin(&mut self, targets: Vec<Target>) {
        for target in targets {
            let cancel = Rc::new(Cancel::default());
            self.running.push((target.clone(), Rc::clone(&cancel)));
            let checks = Checks {
                target,
                ledger: self.ledger.clone(),
                board: Arc::clone(&self.board),
                workers: self.workers.clone(),
                count: self.count,
                cancel,
                turn: 0,
                places: Places::default(),
            };
            tokio::task::spawn_local(checks.run(self.stopped.clone()));
        }
    }

    /// Goes on with those that are as before, ends the others and begins the new ones.
    fn change(&mut self, mut targets: Vec<Target>) {
        self.ledger.use_new_slots();
        // A backend is checked once.
        let wanted: HashMap<_, _> = targets.iter().map(|target| (target.backend, target)).collect();
        self.running.retain(|(running, cancel)| {
            let same = wanted.get(&running.backend).is_some_and(|target| *target == running);
            if !same {
                cancel.ended.set(true);
                cancel.break_off(CloseReason::Reconfigured);
                self.ledger.caps().find(running.backend, None);
            }
            same
        });
        let kept: HashSet<_> = self.running.iter().map(|(running, _)| running.backend).collect();
        targets.retain(|target| !kept.contains(&target.backend));
        self.begin(targets);
    }

    /// Requests to the owner of the shard: the reaper's, to close a connection, and another configuration.
    async fn obey(mut self, mut requests: mpsc::UnboundedReceiver<Control>) {
        let mut stopped = self.stopped.clone();
        loop {
            let request = tokio::select! {
                request = requests.recv() => request,
                _ = stopped.changed() => None,
            };
            match request {
                Some(Control::Close { row, reason }) => {
                    if let Some((_, cancel)) = self.running.iter().find(|(_, cancel)| cancel.row.get() == Some(row)) {
                        cancel.break_off(reason);
                    }
                }
                Some(Control::Reconfigure { config, numbers, done }) => {
                    self.change(targets(&config, &numbers));
                    // Who has asked may not wait any more.
                    let _ = done.send(());
                }
                Some(_) => {}
                None => {
                    for (_, cancel) in &self.running {
                        cancel.break_off(CloseReason::Drained);
                    }
                    return;
                }
            }
        }
    }
}

/// The checks of one backend.
struct Checks {
    target: Target,
    ledger: ShardWriter,
    board: Arc<Board>,
    workers: Controls,
    count: usize,
    cancel: Rc<Cancel>,
    turn: usize,
    places: Places,
}

impl Checks {
    async fn run(mut self, mut stopped: watch::Receiver<()>) {
        let config::Health { mode, interval, rise, fall, .. } = self.target.health;
        let begin = if mode == HealthMode::Lazy { State::Up } else { State::Unknown };
        let mut judge = Judge::new(begin, rise, fall);
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.cancel.ended.get() {
            tokio::select! {
                _ = stopped.changed() => return,
                () = self.cancel.notify.notified() => continue,
                _ = ticks.tick() => {}
            }
            let known = self.places.limit();
            if mode == HealthMode::Lazy && judge.state() == State::Up && !self.is_suspect(fall) && known.is_none() {
                continue;
            }
            self.check(&mut judge).await;
            if known.is_some() && known != self.places.limit() {
                // There may be many more.
                ticks.reset_after(interval / 20);
            }
            // A wake-up that came between two checks must not break off the next one.
            self.cancel.reason.set(CloseReason::Drained);
        }
    }

    fn is_suspect(&self, fall: u32) -> bool {
        self.board.get(self.target.backend).is_some_and(|place| place.failures() >= fall)
    }

    fn counts(&self, place: &Place) -> Counts {
        let caps = self.ledger.caps();
        let (taken, left) = place.taken();
        let used = caps.backend(self.target.backend).map_or(0, |(_, used)| used);
        Counts { used, ended: caps.ended(self.target.backend), taken, left }
    }

    /// What a check has shown of how many connections the backend takes counts from now on.
    fn find_places(&mut self, result: CheckResult, before: Counts, after: Counts) {
        let known = self.places.limit();
        let limit = self.places.checked(result, before, after);
        if limit == known {
            return;
        }
        self.ledger.caps().find(self.target.backend, limit);
        let (backend, address) = (self.target.name.as_str(), self.target.address);
        if let Some(limit) = limit.filter(|limit| known.is_none_or(|known| *limit < known)) {
            tracing::warn!(backend, %address, limit, "backend takes fewer connections than max_connections: queries wait for those");
        } else {
            tracing::info!(backend, %address, limit, "backend takes more connections than were found");
            self.tell_capacity();
        }
    }

    /// Queries that wait for it may go elsewhere, or come to it.
    fn tell_capacity(&self) {
        for worker in 0..self.count {
            self.workers.send(worker, Control::CapacityFreed);
        }
    }

    /// Workers are asked to close an idle connection: to this backend or, at the total cap, to any.
    fn make_room(&self, cap: AtCap) {
        for worker in 0..self.count {
            self.workers.send(worker, Control::MakeRoom { backend: self.target.backend, cap, worker: None });
        }
    }

    async fn check(&mut self, judge: &mut Judge) {
        let source = match self.target.source.as_slice() {
            [] => None,
            sources => sources.get(self.turn % sources.len()).copied(),
        };
        self.turn = self.turn.wrapping_add(1);
        let board = Arc::clone(&self.board);
        let Some(place) = board.get(self.target.backend) else { return };
        place.begin_check(clock::now());
        let before = self.counts(place);
        let outcome = check::run(&self.ledger, &self.target, source, &self.cancel).await;
        let (name, address) = (self.target.name.clone(), self.target.address);
        let (result, failure) = match outcome {
            Outcome::Passed => (CheckResult::Passed, None),
            Outcome::Failed(failure) if failure.is_for_want_of_a_place() => {
                // It may be us who hold all places, with connections that nobody needs now.
                self.make_room(AtCap::Backend);
                let contradicted = place.has_answered();
                (if contradicted { CheckResult::Contradicted } else { CheckResult::Failed }, Some(failure))
            }
            Outcome::Failed(failure) => (CheckResult::Failed, Some(failure)),
            Outcome::NoPlace(cap) => {
                place.count(CheckResult::Skipped);
                tracing::debug!(backend = name, ?cap, "health check skipped: no place for a connection");
                self.make_room(cap);
                return;
            }
            Outcome::NoMeans(error) => {
                place.count(CheckResult::Skipped);
                tracing::warn!(backend = name, %error, "health check skipped: this host has no means for a connection");
                return;
            }
            Outcome::BrokenOff => return,
        };
        place.count(result);
        if let Some(failure) = &failure {
            tracing::debug!(backend = name, %address, %failure, result = result.label(), "health check failed");
        }
        self.find_places(result, before, self.counts(place));
        let Some(state) = judge.checked(result.speaks_for_it()) else { return };
        place.set(state);
        if state == State::Down {
            // It may be another one when it comes back.
            self.places = Places::default();
            self.ledger.caps().find(self.target.backend, None);
        }
        match failure.filter(|_| state == State::Down) {
            None => tracing::info!(backend = name, %address, "backend is up"),
            Some(failure) => tracing::warn!(backend = name, %address, %failure, "backend is down"),
        }
        self.tell_capacity();
    }
}
