//! From "ready" to the end: signals, orders, and what the service manager is told.

use std::io;
use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep};

use super::order::{Inbox, Order, Phase, Reloaded};
use super::reload::Reloader;
use crate::clock::{self, Mono};
use crate::control::Control;
use crate::ledger::Ledger;
use crate::logging;
use crate::stats::Tally;
use crate::systemd::Notifier;
use crate::watchdog::Live;
use crate::watchdog::policy::STALLED_AFTER;
use crate::worker::HEARTBEAT;

/// Beyond `drain_timeout`, before a worker that does not end is given up.
const LAST_CALL: Duration = Duration::from_secs(5);
/// The part of `drain_timeout` over which idle client connections are closed; the rest is for the last queries.
const SPREAD: f64 = 0.8;
/// Between two lines to the service manager on how far draining is.
const PROGRESS: Duration = Duration::from_secs(1);

/// The main thread's event loop, with the signals that the process takes: made before anything else, so that none of them
/// ends the process by itself or is lost.
#[derive(Debug)]
pub struct Caught {
    pub(super) runtime: Runtime,
    pub(super) signals: Signals,
}

impl Caught {
    /// Catches them.
    ///
    /// # Errors
    /// There is no descriptor or no memory left.
    pub fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let signals = runtime.block_on(async { Signals::catch() })?;
        Ok(Self { runtime, signals })
    }
}

/// The signals that the process takes.
#[derive(Debug)]
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The signal that has asked for the end already, if one has.
    pub(super) async fn end_was_asked_for(&mut self) -> Option<&'static str> {
        // What has come is known once the event loop has turned.
        sleep(Duration::from_millis(1)).await;
        tokio::select! {
            biased;
            _ = self.terminate.recv() => Some("SIGTERM"),
            _ = self.interrupt.recv() => Some("SIGINT"),
            () = std::future::ready(()) => None,
        }
    }

    /// One that asks for the end, or for the configuration to be read again.
    async fn next(&mut self) -> Wish {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => Wish::End("SIGTERM"),
            _ = self.interrupt.recv() => Wish::End("SIGINT"),
            _ = self.hang_up.recv() => Wish::Reload,
        }
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug)]
enum Wish {
    End(&'static str),
    Reload,
}

/// Who asked for the end.
#[derive(Clone, Copy, Debug)]
enum EndedBy {
    Signal(&'static str),
    Order,
}

/// The main thread while the workers run.
pub(super) struct Life {
    pub(super) live: Live,
    pub(super) inbox: Inbox,
    pub(super) signals: Signals,
    pub(super) notifier: Notifier,
    /// What the manager shows while all is well.
    pub(super) status: String,
    pub(super) pulse: Pulse,
    pub(super) reloader: Reloader,
    pub(super) waiting: Waiting,
    /// Who wants to connect waits for the next process, so this one should not take long to end.
    pub(super) all_inherited: bool,
    /// The next signal for the end says nothing new.
    pub(super) ignores_one: bool,
}

/// Who waits for a reload. One that is asked for while another is under way begins when that is over: what it is to read
/// may have been written since.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// For the one that is under way.
    now: Vec<Answer>,
    /// For the next one.
    then: Vec<Answer>,
}

/// Where to say how a reload went; none: nobody waits, the log tells.
type Answer = Option<oneshot::Sender<Reloaded>>;

impl Life {
    /// Until all workers have ended, which somebody must ask for.
    pub(super) async fn run(mut self, workers: impl Future<Output = Result<()>>) -> Result<()> {
        tokio::pin!(workers);
        let by = tokio::select! {
            ended = &mut workers => return ended.and(Err(anyhow!("the workers ended without having been asked to"))),
            by = self.serve() => by,
        };
        // Whoever waits for a reload hears that the process ends.
        self.waiting = Waiting::default();
        self.announce(by).await;
        self.begin_to_drain();
        let timeout = self.live.now().config.server.drain_timeout;
        tokio::select! {
            ended = &mut workers => ended?,
            // Another signal, or a worker that does not come to its end.
            signal = self.draining() => return Err(anyhow!("stopped by {signal} before everything was drained")),
            () = sleep(timeout + LAST_CALL) => return Err(anyhow!("a worker did not end within drain_timeout")),
        }
        // Whoever waits for it is told; if nobody does, that is no error.
        let _ = self.inbox.phase.send(Phase::Drained);
        Ok(())
    }

    /// Until the end is asked for; returns by whom.
    async fn serve(&mut self) -> EndedBy {
        let mut log = interval(logging::LOOK);
        loop {
            let settled = self.reloader.settled();
            tokio::select! {
                _ = log.tick() => {
                    logging::tell_held_back();
                    self.reloader.forget();
                }
                wish = self.signals.next() => match wish {
                    Wish::End(signal) => return EndedBy::Signal(signal),
                    Wish::Reload => self.reload(None),
                },
                Some(order) = self.inbox.orders.recv() => match order {
                    Order::Drain => return EndedBy::Order,
                    Order::Reload(answer) => self.reload(Some(answer)),
                },
                reloaded = self.reloader.over() => self.reloaded(&reloaded),
                () = settled => self.reloader.settle(),
                () = self.pulse.next() => self.beat(),
            }
        }
    }

    fn reload(&mut self, answer: Answer) {
        self.waiting.then.push(answer);
        if !self.reloader.is_under_way() {
            self.begin_to_reload();
        }
    }

    fn begin_to_reload(&mut self) {
        self.waiting.now = std::mem::take(&mut self.waiting.then);
        self.notifier.reloading();
        if let Err(errors) = self.reloader.begin() {
            self.reloaded(&Err(errors));
        }
    }

    /// A reload is over.
    fn reloaded(&mut self, reloaded: &Reloaded) {
        match reloaded {
            Ok(_) => self.notifier.ready(&self.status),
            Err(errors) => {
                let first = errors.first().map_or("", String::as_str);
                self.notifier.ready(&format!("{}; the last configuration was refused: {first}", self.status));
            }
        }
        for answer in self.waiting.now.drain(..).flatten() {
            // Who has asked may be gone; the log tells, too.
            let _ = answer.send(reloaded.clone());
        }
        if !self.waiting.then.is_empty() {
            self.begin_to_reload();
        }
    }

    fn beat(&mut self) {
        self.pulse.beat(&self.notifier, &self.live.now().ledger);
    }

    /// Says that the end has come, and goes on serving for `drain_delay`, so that whoever sends clients here has the time
    /// to send them elsewhere. Whoever asks again cuts it short.
    async fn announce(&mut self, by: EndedBy) {
        let observed = self.live.now();
        let delay = observed.config.server.drain_delay;
        let delay_seconds = delay.as_secs_f64();
        match by {
            EndedBy::Signal(signal) => tracing::info!(signal, delay_seconds, "draining"),
            EndedBy::Order => tracing::info!(delay_seconds, "draining, by order"),
        }
        observed.set_serving(false);
        let _ = self.inbox.phase.send(Phase::Draining);
        self.notifier.stopping("draining");
        self.ignores_one = matches!(by, EndedBy::Order);
        if delay.is_zero() {
            return;
        }
        tokio::select! {
            () = sleep(delay) => {}
            () = self.asked_again() => tracing::info!("drain_delay is cut short"),
        }
    }

    /// Until the end is asked for again while clients are still served.
    async fn asked_again(&mut self) {
        let mut log = interval(logging::LOOK);
        loop {
            tokio::select! {
                _ = log.tick() => logging::tell_held_back(),
                wish = self.signals.next() => if self.is_new(wish).is_some() { return },
                Some(order) = self.inbox.orders.recv() => if refuse_while_draining(order) { return },
                () = self.pulse.next() => self.beat(),
            }
        }
    }

    /// The signal that asks for the end again. After an order the first one says nothing new: it is how a service manager
    /// stops what is draining already.
    fn is_new(&mut self, wish: Wish) -> Option<&'static str> {
        match wish {
            Wish::End(signal) => (!std::mem::take(&mut self.ignores_one)).then_some(signal),
            Wish::Reload => {
                tracing::warn!("not reloaded: the process drains");
                None
            }
        }
    }

    fn begin_to_drain(&mut self) {
        let observed = self.live.now();
        let server = &observed.config.server;
        let spread = if self.all_inherited { Duration::ZERO } else { server.drain_timeout.mul_f64(SPREAD) };
        for worker in 0..server.workers {
            observed.controls.send(worker, Control::Drain { over: server.drain_timeout, spread });
        }
    }

    /// Until another signal asks for the end at once. Another order says nothing new.
    async fn draining(&mut self) -> &'static str {
        let mut progress = interval(PROGRESS);
        loop {
            tokio::select! {
                wish = self.signals.next() => if let Some(signal) = self.is_new(wish) { return signal },
                Some(order) = self.inbox.orders.recv() => {
                    refuse_while_draining(order);
                }
                _ = progress.tick() => {
                    logging::tell_held_back();
                    self.notifier.status(&format!("draining: {}", Tally::of(&self.live.now().stats)));
                }
                () = self.pulse.next() => self.beat(),
            }
        }
    }
}

/// Nothing is reloaded any more. Whether it was an order to drain.
fn refuse_while_draining(order: Order) -> bool {
    match order {
        Order::Drain => true,
        Order::Reload(answer) => {
            // Who has asked may be gone.
            let _ = answer.send(Err(vec!["the process drains".to_owned()]));
            false
        }
    }
}

/// The signs of life to the service manager: none while a worker shows none, so that it starts the process again.
#[derive(Debug)]
pub(super) struct Pulse {
    interval: Option<Interval>,
    /// A worker that has been silent for so long is dead.
    patience: Duration,
    workers: usize,
    started: Mono,
    dead: Option<usize>,
}

impl Pulse {
    /// The manager acts after `watchdog` without a sign of life; none: it does not want any.
    pub(super) fn new(watchdog: Option<Duration>, workers: usize) -> Self {
        let interval = watchdog.map(|watchdog| {
            // sd_watchdog_enabled(3) asks for half of the time; a quarter leaves room for one that comes late.
            let every = (watchdog / 4).max(Duration::from_millis(1));
            let mut interval = tokio::time::interval_at(Instant::now() + every, every);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        let patience = watchdog.map_or(STALLED_AFTER, |watchdog| STALLED_AFTER.min(watchdog / 2)).max(HEARTBEAT * 2);
        Self { interval, patience, workers, started: clock::now(), dead: None }
    }

    /// When the next sign is due.
    async fn next(&mut self) {
        match &mut self.interval {
            Some(interval) => drop(interval.tick().await),
            None => std::future::pending().await,
        }
    }

    fn beat(&mut self, notifier: &Notifier, ledger: &Ledger) {
        let now = clock::now();
        let heartbeats = ledger.heartbeats();
        let silent = |worker: &usize| {
            let beat = heartbeats.get(*worker).copied().unwrap_or(Mono::ZERO);
            now.since(beat.max(self.started)) > self.patience
        };
        let dead = (0..self.workers).find(silent);
        match dead {
            None => notifier.alive(),
            Some(worker) if self.dead.is_none() => {
                tracing::error!(worker, "no sign of life goes to the service manager while the worker shows none");
            }
            Some(_) => {}
        }
        self.dead = dead;
    }
}

/// Waits for all workers.
pub(super) async fn watch(threads: Vec<std::thread::JoinHandle<Result<()>>>) -> Result<()> {
    let mut threads = threads;
    while !threads.is_empty() {
        let (ended, running): (Vec<_>, Vec<_>) = threads.into_iter().partition(std::thread::JoinHandle::is_finished);
        for thread in ended {
            thread.join().map_err(|_| anyhow!("a worker panicked"))??;
        }
        threads = running;
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    use std::sync::Arc;

    use super::*;
    use crate::ledger::caps::Caps;

    #[tokio::test(start_paused = true)]
    async fn a_silent_worker_stops_the_pulse_and_a_live_one_starts_it_again() {
        let name = format!("counterfoil-pulse-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        manager.set_nonblocking(true).unwrap();
        let notifier = Notifier::new(Some(format!("@{name}").as_ref())).unwrap();
        let alive = || std::iter::from_fn(|| manager.recv(&mut [0; 64]).ok()).count();
        let ledger = Ledger::new(3, 1, 1, Arc::new(Caps::new([1], 1)));
        let workers = [ledger.writer(0).unwrap(), ledger.writer(1).unwrap()];
        let mut pulse = Pulse::new(Some(Duration::from_secs(4)), 2);
        for _ in 0..8 {
            workers.iter().for_each(|worker| worker.beat(clock::now()));
            pulse.next().await;
            pulse.beat(&notifier, &ledger);
        }
        assert_eq!(alive(), 8, "one each second");
        for _ in 0..8 {
            workers[0].beat(clock::now());
            pulse.next().await;
            pulse.beat(&notifier, &ledger);
        }
        assert_eq!(alive(), 1, "the other worker is silent for two seconds, then counts as dead");
        // An owner that has come to its end does not hang.
        workers[1].beat(Mono::MAX);
        workers[0].beat(clock::now());
        pulse.next().await;
        pulse.beat(&notifier, &ledger);
        assert_eq!(alive(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_who_wants_no_sign_gets_one() {
        let mut pulse = Pulse::new(None, 1);
        assert!(tokio::time::timeout(Duration::from_secs(3600), pulse.next()).await.is_err());
    }
}
