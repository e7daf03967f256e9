//! The thread that checks: one task per backend whose health is `auto` or `lazy`, and a shard of the ledger for their
//! connections. No worker waits for it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;

use super::check::{self, Cancel, Outcome};
use super::judge::Judge;
use super::{Board, CheckResult, State};
use crate::close::CloseReason;
use crate::config::{self, Config, HealthMode};
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
#[derive(Debug)]
pub(super) struct Target {
    pub(super) backend: BackendIndex,
    pub(super) address: SocketAddr,
    pub(super) timeout: Duration,
    /// A LOCAL header if the pool sends headers, and the query with its length.
    pub(super) bytes: Vec<u8>,
    /// Where in `bytes` the query's length is.
    pub(super) query: usize,
    source: Vec<IpAddr>,
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
    let targets = targets(config);
    let count = config.server.workers;
    let (stop, stopped) = watch::channel(());
    let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
    let thread = std::thread::Builder::new().name("health".to_owned()).spawn(move || {
        let ledger = claim.writer();
        let local = LocalSet::new();
        let mut cancels = Vec::with_capacity(targets.len());
        for target in targets {
            let cancel = Rc::new(Cancel::default());
            cancels.push(Rc::clone(&cancel));
            let checks = Checks {
                target,
                ledger: ledger.clone(),
                board: Arc::clone(&board),
                workers: workers.clone(),
                count,
                cancel,
                turn: 0,
            };
            local.spawn_local(checks.run(stopped.clone()));
        }
        local.spawn_local(obey(requests, cancels, stopped));
        runtime.block_on(local);
    })?;
    Ok(Health { stop: Some(stop), thread: Some(thread) })
}

fn targets(config: &Config) -> Vec<Target> {
    let mut targets = Vec::new();
    let backends = config.pools.iter().flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)));
    for (index, (pool, backend)) in backends.enumerate() {
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
            // The configuration allows at most 65,534 backends.
            backend: BackendIndex::try_from(index).unwrap_or(BackendIndex::MAX),
            address: backend.address,
            timeout: health.timeout,
            bytes,
            query,
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

/// Requests to the owner of the shard: the reaper's, to close a connection.
async fn obey(
    mut requests: mpsc::UnboundedReceiver<Control>,
    cancels: Vec<Rc<Cancel>>,
    mut stopped: watch::Receiver<()>,
) {
    loop {
        let request = tokio::select! {
            request = requests.recv() => request,
            _ = stopped.changed() => None,
        };
        match request {
            Some(Control::Close { row, reason }) => {
                if let Some(cancel) = cancels.iter().find(|cancel| cancel.row.get() == Some(row)) {
                    cancel.reason.set(reason);
                    cancel.notify.notify_waiters();
                }
            }
            Some(_) => {}
            None => {
                for cancel in cancels {
                    cancel.reason.set(CloseReason::Drained);
                    cancel.notify.notify_waiters();
                }
                return;
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
}

impl Checks {
    async fn run(mut self, mut stopped: watch::Receiver<()>) {
        let config::Health { mode, interval, rise, fall, .. } = self.target.health;
        let begin = if mode == HealthMode::Lazy { State::Up } else { State::Unknown };
        let mut judge = Judge::new(begin, rise, fall);
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = stopped.changed() => return,
                _ = ticks.tick() => {}
            }
            if mode == HealthMode::Lazy && judge.state() == State::Up && !self.is_suspect(fall) {
                continue;
            }
            self.check(&mut judge).await;
            // A wake-up that came between two checks must not break off the next one.
            self.cancel.reason.set(CloseReason::Drained);
        }
    }

    fn is_suspect(&self, fall: u32) -> bool {
        self.board.get(self.target.backend).is_some_and(|place| place.failures() >= fall)
    }

    async fn check(&mut self, judge: &mut Judge) {
        let source = match self.target.source.as_slice() {
            [] => None,
            sources => sources.get(self.turn % sources.len()).copied(),
        };
        self.turn = self.turn.wrapping_add(1);
        let outcome = check::run(&self.ledger, &self.target, source, &self.cancel).await;
        let Some(place) = self.board.get(self.target.backend) else { return };
        let (name, address) = (place.name.as_str(), self.target.address);
        let (result, failure) = match outcome {
            Outcome::Passed => (CheckResult::Passed, None),
            Outcome::Failed(failure) => (CheckResult::Failed, Some(failure)),
            Outcome::NoPlace(cap) => {
                place.count(CheckResult::Skipped);
                tracing::debug!(backend = name, ?cap, "health check skipped: no place for a connection");
                let backend = (cap == AtCap::Backend).then_some(self.target.backend);
                for worker in 0..self.count {
                    self.workers.send(worker, Control::EvictIdle { backend });
                }
                return;
            }
            Outcome::BrokenOff => return,
        };
        place.count(result);
        if let Some(failure) = &failure {
            tracing::debug!(backend = name, %address, %failure, "health check failed");
        }
        let Some(state) = judge.checked(result == CheckResult::Passed) else { return };
        place.set(state);
        match failure {
            None => tracing::info!(backend = name, %address, "backend is up"),
            Some(failure) => tracing::warn!(backend = name, %address, %failure, "backend is down"),
        }
        for worker in 0..self.count {
            // Queries that wait for it may go elsewhere, or come to it.
            self.workers.send(worker, Control::CapacityFreed);
        }
    }
}
