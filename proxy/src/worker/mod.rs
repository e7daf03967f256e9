//! A worker: one thread with one `current_thread` runtime, its own listeners, its own pool, its own shard of the ledger.
//! Nothing in it is shared with other workers but the counters of the caps.

pub(crate) mod answer;
mod apart;
#[cfg(test)]
mod apart_tests;
#[cfg(test)]
mod backends_tests;
mod backoff;
pub mod buffer;
mod by_client;
pub mod core;
#[cfg(test)]
mod core_tests;
#[cfg(test)]
mod ending_tests;
mod house;
pub(crate) mod links;
#[cfg(test)]
mod overload_tests;
mod place;
pub mod plan;
pub mod queries;
mod reconfigure;
#[cfg(test)]
mod reconfigure_tests;
pub(crate) mod route;
pub(crate) mod shell;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod spares_tests;
mod suspects;
mod timers;
pub(crate) mod transfer;
pub(crate) mod turn;
mod turns;
#[cfg(test)]
mod turns_tests;
#[cfg(test)]
mod waits_tests;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use self::core::{Core, Shared};
use self::plan::Plan;
use self::shell::{GRAIN, Shell};
use crate::app::listen::Accepting;
use crate::client::accept::{Acceptor, Door};
use crate::client::limits::ClientLimits;
use crate::clock::{self, Mono};
use crate::config::Config;
use crate::control::{Control, Controls};
use crate::ledger::ShardWriter;
use crate::stats::WorkerStats;
use crate::tls::server::ServerTls;

/// How often a worker shows that it runs.
pub const HEARTBEAT: Duration = Duration::from_millis(250);

/// Everything that a worker is made of. Made on the main thread, so that whatever fails fails before anything runs.
#[derive(Debug)]
pub struct Worker {
    /// Its number, which is its shard's.
    pub index: usize,
    /// How many workers there are.
    pub workers: usize,
    /// The configuration.
    pub config: Arc<Config>,
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// The limits on clients.
    pub limits: Arc<ClientLimits>,
    /// TLS towards clients.
    pub tls: Arc<ServerTls>,
    /// Its counters.
    pub stats: Arc<WorkerStats>,
    /// Requests to it.
    pub requests: mpsc::UnboundedReceiver<Control>,
    /// The way to the other workers.
    pub controls: Controls,
}

impl Worker {
    /// Runs until it has drained. Says through `started` that nothing of its own can fail any more, and accepts on what it
    /// then gets; if that is never given, it ends.
    ///
    /// # Errors
    ///
    /// If the runtime can't be made or a listener can't be registered.
    pub fn run(
        self,
        ledger: ShardWriter,
        started: mpsc::UnboundedSender<()>,
        listeners: oneshot::Receiver<Vec<Accepting>>,
    ) -> std::io::Result<()> {
        // A local runtime, not a `LocalSet` on another: waking a task from the event loop of a `LocalSet` costs a system
        // call (a write to the runtime's eventfd).
        let options = tokio::runtime::LocalOptions::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build_local(options)?;
        runtime.block_on(self.serve(ledger, started, listeners))
    }

    async fn serve(
        self,
        ledger: ShardWriter,
        started: mpsc::UnboundedSender<()>,
        listeners: oneshot::Receiver<Vec<Accepting>>,
    ) -> std::io::Result<()> {
        let plan = Rc::new(Plan::new(&self.config, crate::backend::connect::own_side));
        let seed = fastrand::u64(..);
        let core = Core::new(plan, Arc::clone(&self.stats), Arc::clone(&self.shared), seed, clock::now());
        let core = core.numbered(self.index);
        let shell = Shell::new(core, self.stats, ledger, self.index, self.workers, self.controls);
        let (stop, stopped) = watch::channel(false);
        // Who starts the workers has gone if it hears nothing.
        let _ = started.send(());
        drop(started);
        let Ok(listeners) = listeners.await else { return Ok(()) };
        for Accepting { listener, socket, inherited } in listeners {
            let (limits, tls) = (Arc::clone(&self.limits), Arc::clone(&self.tls));
            // A socket that was passed may be a transparent one, which takes what is for any address.
            let local = socket.local_addr().ok().filter(|local| !inherited && !local.ip().is_unspecified());
            let door = Rc::new(Door { shell: Rc::clone(&shell), index: listener, local, limits, tls });
            let listener = tokio::net::TcpListener::from_std(socket)?;
            let acceptor = Acceptor { listener, leaves_queue: inherited, door };
            tokio::task::spawn_local(acceptor.run(stopped.clone()));
        }
        tokio::task::spawn_local(begin_rounds(Rc::clone(&shell)));
        // The last receivers are those who accept, and wait for PROXY headers: when they are gone, nobody comes any more.
        drop(stopped);
        let keeper = Keeper { shell, requests: self.requests, stop, draining: None, all_closed: false };
        // As a task of its own: to wake the future that the runtime blocks on costs a system call.
        tokio::task::spawn_local(keeper.run()).await.map_err(std::io::Error::other)
    }
}

/// Begins a round whenever one is over, once all tasks that have something to do have run.
async fn begin_rounds(shell: Rc<Shell>) {
    loop {
        shell.round_over.notified().await;
        tokio::task::yield_now().await;
        shell.core.borrow_mut().next_round();
        shell.flush();
    }
}

/// The housekeeper: deadlines, heartbeat, requests from other threads.
struct Keeper {
    shell: Rc<Shell>,
    requests: mpsc::UnboundedReceiver<Control>,
    stop: watch::Sender<bool>,
    draining: Option<Draining>,
    all_closed: bool,
}

/// The ends of draining.
struct Draining {
    /// From then on no more queries are taken; none: that is so already.
    last_call: Option<Mono>,
    until: Mono,
}

/// The share of the time to drain after which no more queries are taken, so that what was taken can be answered.
const LAST_CALL: f64 = 0.9;

impl Draining {
    fn next(&self) -> Mono {
        self.last_call.unwrap_or(self.until)
    }
}

impl Keeper {
    async fn run(mut self) {
        loop {
            let now = clock::now();
            self.shell.ledger.beat(now);
            {
                let mut core = self.shell.core.borrow_mut();
                core.tick(now);
            }
            if self.drained(now) {
                // For ever: an owner that has come to its end does not hang.
                self.shell.ledger.beat(Mono::MAX);
                return;
            }
            self.shell.flush();
            let next = self.shell.core.borrow().next_deadline();
            let end = self.draining.as_ref().map(Draining::next).filter(|end| *end > now);
            let next = end.map_or(next, |end| end.min(next));
            let until = next.clamp(now.after(GRAIN), now.after(HEARTBEAT));
            self.shell.sleeps_until.set(until);
            let request = tokio::select! {
                request = self.requests.recv() => request,
                () = tokio::time::sleep_until(clock::instant(until)) => None,
                () = self.shell.nudge.notified() => None,
            };
            if let Some(request) = request {
                self.obey(request);
            }
        }
    }

    fn obey(&mut self, request: Control) {
        let now = clock::now();
        match request {
            Control::Close { row, reason } => {
                if let Some(key) = self.shell.conn_at(row) {
                    self.shell.core.borrow_mut().close_conn(key, reason, now);
                }
            }
            Control::MakeRoom { backend, cap, worker } => {
                self.shell.core.borrow_mut().asked_for_room(backend, cap, worker, now);
            }
            Control::Shed => self.shell.core.borrow_mut().shed_excess(),
            Control::CapacityFreed => self.shell.core.borrow_mut().capacity_freed(now),
            Control::Reconfigure { config, numbers, done } => {
                self.shell.ledger.use_new_slots();
                let mut core = self.shell.core.borrow_mut();
                let plan = core.plan.next(&config, &numbers, crate::backend::connect::own_side);
                core.reconfigure(Rc::new(plan), now);
                // Who has asked may not wait any more.
                let _ = done.send(());
            }
            Control::Drain { over, spread } => {
                let _ = self.stop.send(true);
                self.draining =
                    Some(Draining { last_call: Some(now.after(over.mul_f64(LAST_CALL))), until: now.after(over) });
                self.shell.core.borrow_mut().drain(spread, now);
            }
            #[cfg(feature = "test-hooks")]
            Control::Hang(duration) => std::thread::sleep(duration),
            #[cfg(feature = "test-hooks")]
            Control::Neglect => self.shell.core.borrow_mut().next_cleanup = clock::Mono::MAX,
            #[cfg(feature = "test-hooks")]
            Control::ForgetRows { nth } => self.shell.ledger.forget_every(nth),
        }
    }

    /// Goes on with draining. True when nothing is left.
    fn drained(&mut self, now: Mono) -> bool {
        let Some(draining) = &mut self.draining else { return false };
        let until = draining.until;
        let mut core = self.shell.core.borrow_mut();
        if draining.last_call.take_if(|at| *at <= now).is_some() {
            core.drain_is_nearly_over();
        }
        let accepting = self.stop.receiver_count() > 0;
        if core.sessions.is_empty() && !accepting && !self.all_closed {
            self.all_closed = true;
            core.close_all(now);
        } else if now >= until {
            core.drain_is_over();
        }
        let quiet = now >= until || !self.shell.is_anybody_leaving();
        !accepting && core.sessions.is_empty() && core.pool.is_empty() && quiet
    }
}
