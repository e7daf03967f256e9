//! Putting the program together: everything that can fail at start fails in [`App::build`], before a client is served.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::client::limits::ClientLimits;
use crate::config::Config;
use crate::control::{Control, Controls};
use crate::ledger::Ledger;
use crate::ledger::caps::Caps;
use crate::stats::WorkerStats;
use crate::watchdog::{Observed, Watchdog};
use crate::worker::Worker;
use crate::worker::core::Shared;
use crate::{admin, drill, kernel, metrics, privilege, watchdog};

/// Connections that the kernel keeps ready for `accept(2)`; it may allow fewer (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;
/// Beyond `drain_timeout`, before a worker that does not end is given up.
const LAST_CALL: Duration = Duration::from_secs(5);

/// A forwarder that is ready to run.
pub struct App {
    observed: Observed,
    workers: Vec<Worker>,
    addresses: Vec<SocketAddr>,
    watchdog: Watchdog,
    doors: admin::Doors,
    drill: drill::Setup,
}

impl App {
    /// Binds everything, opens the kernel view and starts the watchdog. After that the calling thread, and every thread that
    /// it starts, has no capabilities. `others` are addresses on which other parts of the process listen.
    ///
    /// # Errors
    ///
    /// An address can't be listened on, or the configured kernel view can't be had; the error says which and why.
    pub fn build(config: Config, others: &[SocketAddr]) -> Result<Self> {
        privilege::forbid_new()?;
        raise_descriptor_limit();
        let config = Arc::new(config);
        let count = config.server.workers;
        let backends: Vec<_> = config.pools.iter().flat_map(|pool| &pool.backends).collect();
        let limits = backends.iter().map(|backend| backend.max_connections);
        let caps = Arc::new(Caps::new(limits, config.connections.max_total).with_drill(drill::AT_ONCE));
        let slots = config.connections.max_total + drill::AT_ONCE;
        let ledger = Arc::new(Ledger::new(count + 1, slots, backends.len() + 1, Arc::clone(&caps)));

        let (senders, receivers): (Vec<_>, Vec<_>) = (0..=count).map(|_| mpsc::unbounded_channel()).unzip();
        let controls = Controls::new(senders);
        let shared = Arc::new(Shared { caps, waiting: AtomicUsize::new(0), serial: AtomicU64::new(0) });
        let limits = ClientLimits::new(config.server.max_connections);

        let mut bound = Vec::new();
        for listener in &config.listeners {
            bound.push(
                listen(listener.address, count)
                    .with_context(|| format!("listener `{}` cannot listen on {}", listener.name, listener.address))?,
            );
        }
        let addresses: Vec<SocketAddr> = bound.iter().map(|(address, _)| *address).collect();
        let mut sockets: Vec<_> = bound.into_iter().map(|(_, sockets)| sockets.into_iter()).collect();
        let mut receivers = receivers.into_iter();
        let mut workers = Vec::with_capacity(count);
        for (index, requests) in receivers.by_ref().take(count).enumerate() {
            workers.push(Worker {
                index,
                workers: count,
                config: Arc::clone(&config),
                listeners: sockets.iter_mut().filter_map(Iterator::next).collect(),
                shared: Arc::clone(&shared),
                limits: Arc::clone(&limits),
                stats: Arc::new(WorkerStats::new(config.listeners.len(), config.pools.len(), backends.len())),
                requests,
                controls: controls.clone(),
            });
        }
        let requests = receivers.next().context("the drill's shard comes after those of the workers")?;
        let drill = drill::Setup::bind(requests).context("the drill's peer can't listen on 127.0.0.1")?;
        let doors = admin::Doors::bind(&config.admin)?;
        // Sockets that these addresses accepted are clients', not connections to backends.
        let listening = [addresses.as_slice(), others, &[drill.address()?]].concat();
        let (mut view, source, reason) = kernel::open(config.kernel.view, &listening, config.kernel.max_sockets)
            .with_context(|| format!("key `kernel.view`: {:?}", config.kernel.view))?;
        tracing::info!(source = source.as_str(), reason, "kernel view");
        privilege::keep_for_watchdog(&mut *view, config.watchdog.reap)?;
        let stats = workers.iter().map(|worker| Arc::clone(&worker.stats)).collect();
        let observed = Observed::new(config, ledger, stats, controls, drill.address()?).with_view_reason(&reason);
        let watchdog = watchdog::start(observed.subject(), view)?;
        privilege::drop_all()?;
        Ok(Self { observed, workers, addresses, watchdog, doors, drill })
    }

    /// Serves until SIGTERM or SIGINT, then drains.
    ///
    /// # Errors
    ///
    /// A thread can't be started, or a worker failed.
    pub fn run(self) -> Result<()> {
        let Self { observed, workers, addresses, watchdog, doors, drill } = self;
        let config = Arc::clone(&observed.config);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            // Before the workers: a signal that comes early must not be lost.
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let metrics = Arc::new(metrics::registry(observed.clone(), watchdog.handle()));
            let admin = admin::start(observed.clone(), watchdog.handle(), metrics, drill, doors)?;
            let http = admin.http().map_or_else(|| "off".to_owned(), |address| address.to_string());
            let socket = admin.socket().map_or_else(|| "off".to_owned(), |path| path.display().to_string());
            tracing::info!(http, socket, "admin");
            let mut threads = Vec::new();
            for worker in workers {
                threads.push(start(worker, &observed.ledger)?);
            }
            for (listener, address) in config.listeners.iter().zip(&addresses) {
                tracing::info!(listener = listener.name, %address, "listening");
            }
            observed.set_serving(true);
            tracing::info!("ready");
            let ended = watch(threads);
            tokio::pin!(ended);
            tokio::select! {
                ended = &mut ended => return ended.and(Err(anyhow!("the workers ended without having been asked to"))),
                _ = terminate.recv() => tracing::info!(signal = "SIGTERM", "draining"),
                _ = interrupt.recv() => tracing::info!(signal = "SIGINT", "draining"),
            }
            observed.set_serving(false);
            for worker in 0..config.server.workers {
                observed.controls.send(worker, Control::Drain { over: config.server.drain_timeout });
            }
            tokio::select! {
                ended = &mut ended => ended?,
                // A second signal, or a worker that does not come to its end.
                _ = terminate.recv() => return Err(anyhow!("stopped before everything was drained")),
                _ = interrupt.recv() => return Err(anyhow!("stopped before everything was drained")),
                () = tokio::time::sleep(config.server.drain_timeout + LAST_CALL) => {
                    return Err(anyhow!("a worker did not end within drain_timeout"));
                }
            }
            drop((admin, watchdog));
            tracing::info!("drained");
            Ok(())
        })
    }
}

fn start(worker: Worker, ledger: &Ledger) -> Result<JoinHandle<Result<()>>> {
    // Each shard is taken once, here.
    let shard = worker.index;
    let claim = ledger.claim(shard).ok_or_else(|| anyhow!("shard {shard} of the ledger is taken"))?;
    let thread = std::thread::Builder::new().name(format!("worker-{shard}"));
    Ok(thread.spawn(move || worker.run(claim.writer()).with_context(|| format!("worker {shard}")))?)
}

/// Waits for all workers.
async fn watch(threads: Vec<JoinHandle<Result<()>>>) -> Result<()> {
    let mut threads = threads;
    while !threads.is_empty() {
        let (ended, running): (Vec<_>, Vec<_>) = threads.into_iter().partition(JoinHandle::is_finished);
        for thread in ended {
            thread.join().map_err(|_| anyhow!("a worker panicked"))??;
        }
        threads = running;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// One listening socket per worker on the same address; the kernel spreads the connections (SO_REUSEPORT).
#[expect(clippy::disallowed_methods, reason = "sockets that listen are no backend sockets")]
fn listen(address: SocketAddr, workers: usize) -> std::io::Result<(SocketAddr, Vec<TcpListener>)> {
    let mut address = address;
    let mut sockets = Vec::with_capacity(workers);
    for _ in 0..workers {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from(socket);
        // The kernel has chosen a port if the configuration left it open.
        address = listener.local_addr()?;
        sockets.push(listener);
    }
    Ok((address, sockets))
}

/// Each connection needs a descriptor on both sides: the soft limit is raised to the hard one.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "the soft limit of open files stays below the hard one");
    }
}
