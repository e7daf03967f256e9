//! Putting the program together: everything that can fail at start fails in [`App::build`], before a client is served.

mod life;
pub mod listen;
pub mod order;
mod reload;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::sync::{mpsc, oneshot};

use crate::client::limits::ClientLimits;
use crate::config::{Config, Numbers, ReapMode, check};
use crate::control::{Control, Controls};
use crate::health::Board;
use crate::ledger::caps::Caps;
use crate::ledger::{BackendIndex, Ledger};
use crate::stats::WorkerStats;
use crate::systemd::{Environment, Notifier, activation};
use crate::tls::server::ServerTls;
use crate::watchdog::{Live, Observed, Watchdog};
use crate::worker::Worker;
use crate::worker::core::Shared;
use crate::{admin, drill, health, kernel, metrics, privilege, watchdog};
pub use life::Caught;
use life::{Life, Pulse, Waiting};
use listen::{Accepting, Listening};
use order::{Inbox, Orders};
use reload::Reloader;

/// A forwarder that is ready to run.
pub struct App {
    observed: Observed,
    workers: Vec<Worker>,
    listening: Listening,
    watchdog: Watchdog,
    /// Requests to the owner of the health checks' connections.
    health: mpsc::UnboundedReceiver<Control>,
    file: Option<PathBuf>,
    tls: Arc<ServerTls>,
    doors: admin::Doors,
    drill: drill::Setup,
    environment: Environment,
    notifier: Notifier,
}

impl App {
    /// Binds everything, opens the kernel view and starts the watchdog. After that the calling thread, and every thread that
    /// it starts, has no capabilities. `file` is where the configuration comes from, for
    /// reloads; `others` are addresses on which other parts of the process listen.
    ///
    /// # Errors
    ///
    /// An address can't be listened on, or the configured kernel view can't be had; the error says which and why.
    pub fn build(config: Config, file: Option<PathBuf>, others: &[SocketAddr]) -> Result<Self> {
        privilege::forbid_new()?;
        let environment = Environment::read();
        let notifier = Notifier::new(environment.notify.as_deref()).context("NOTIFY_SOCKET in the environment")?;
        raise_descriptor_limit();
        forbid_huge_pages();
        let config = Arc::new(config);
        let count = config.server.workers;
        let backends: Vec<_> = config.pools.iter().flat_map(|pool| &pool.backends).collect();
        let numbers = Numbers::new(&config);
        let limits = backends.iter().map(|backend| backend.max_connections);
        let caps = Arc::new(
            Caps::new(limits, config.connections.max_total)
                .at(backends.iter().map(|backend| backend.address))
                .shared_by(count)
                .with_drill(numbers.drill().unwrap_or(BackendIndex::MAX), drill::AT_ONCE),
        );
        let slots = config.connections.max_total + drill::AT_ONCE;
        // The shards: the workers', the health checks' and the drill's.
        let ledger = Arc::new(Ledger::new(count + 2, slots, numbers.backends(), Arc::clone(&caps)));

        let (senders, receivers): (Vec<_>, Vec<_>) = (0..count + 2).map(|_| mpsc::unbounded_channel()).unzip();
        let controls = Controls::new(senders);
        let board = Arc::new(Board::new(&config));
        let shared = Arc::new(Shared {
            caps,
            waiting: AtomicUsize::new(0),
            health: Arc::clone(&board),
            digests: foldhash::fast::RandomState::default(),
            serial: AtomicU64::new(0),
        });
        let limits = ClientLimits::new(&config);
        let tls = ServerTls::new(&config).context("TLS towards clients")?;

        let inherited = activation::sockets(&environment)?;
        warn_of_fast_open(&config);
        let listening = listen::open(&config.listeners, count, inherited)?;
        let mut receivers = receivers.into_iter();
        let mut workers = Vec::with_capacity(count);
        for (index, requests) in receivers.by_ref().take(count).enumerate() {
            workers.push(Worker {
                index,
                workers: count,
                config: Arc::clone(&config),
                shared: Arc::clone(&shared),
                limits: Arc::clone(&limits),
                tls: Arc::clone(&tls),
                stats: Arc::new(WorkerStats::new(config.listeners.len(), config.pools.len(), backends.len())),
                requests,
                controls: controls.clone(),
            });
        }
        let health = receivers.next().context("the health checks' shard comes after those of the workers")?;
        let requests = receivers.next().context("the drill's shard is the last")?;
        let drill = drill::Setup::bind(requests).context("the drill's peer can't listen on 127.0.0.1")?;
        let doors = admin::Doors::bind(&config.admin)?;
        // Sockets that these addresses accepted are clients', not connections to backends.
        let accept = [listening.addresses.as_slice(), others, &[drill.address()?]].concat();
        let (mut view, source, reason) = kernel::open(config.kernel.view, &accept, config.kernel.max_sockets)
            .with_context(|| format!("key `kernel.view`: {:?}", config.kernel.view))?;
        tracing::info!(source = source.as_str(), reason, "kernel view");
        privilege::keep_for_watchdog(&mut *view, config.watchdog.reap)?;
        let stats = workers.iter().map(|worker| Arc::clone(&worker.stats)).collect();
        let observed = Observed::new(config, ledger, stats, controls, drill.address()?)
            .with_view_reason(&reason)
            .with_health(board)
            .with_clients(limits);
        let watchdog = watchdog::start(observed.subject(), view)?;
        privilege::drop_all()?;
        Ok(Self { observed, workers, listening, watchdog, health, file, tls, doors, drill, environment, notifier })
    }

    /// Serves until SIGTERM, SIGINT or an order to drain, then drains.
    ///
    /// # Errors
    ///
    /// A thread can't be started, another process has an address, or a worker failed.
    pub fn run(self, signals: Caught) -> Result<()> {
        let Self { observed, workers, listening, watchdog, health, file, tls, doors, drill, environment, notifier } =
            self;
        let config = Arc::clone(&observed.config);
        let Caught { runtime, mut signals } = signals;
        runtime.block_on(async move {
            let live = Live::new(observed.clone());
            let metrics = Arc::new(metrics::registry(live.clone(), watchdog.handle()));
            let (orders, inbox): (Orders, Inbox) = order::channel();
            let served = admin::Served { live: live.clone(), watchdog: watchdog.handle(), metrics, orders };
            let admin = admin::start(served, drill, doors)?;
            let http = admin.http().map_or_else(|| "off".to_owned(), |address| address.to_string());
            let socket = admin.socket().map_or_else(|| "off".to_owned(), |path| path.display().to_string());
            tracing::info!(http, socket, "admin");
            let workers = Workers::start(workers, &observed.ledger).await?;
            let health = start_health(&observed, health)?;
            if let Some(signal) = signals.end_was_asked_for().await {
                tracing::info!(signal, "ended before a client was served");
                return Ok(());
            }
            // The last thing that can fail, as another process may have come first.
            listening.listen()?;
            let Listening { sockets, addresses, all_inherited, .. } = listening;
            let threads = workers.accept_on(sockets);
            for (listener, address) in config.listeners.iter().zip(&addresses) {
                tracing::info!(listener = listener.name, %address, "listening");
            }
            observed.set_serving(true);
            tracing::info!("ready");
            let status = format!(
                "serving on {} listeners with {} workers, kernel view: {}",
                addresses.len(),
                config.server.workers,
                watchdog.handle().report().source.as_str()
            );
            notifier.ready(&status);
            let may_sever = config.watchdog.reap == ReapMode::On;
            let reloader = Reloader::new(file, live.clone(), watchdog.handle(), tls, may_sever);
            let pulse = Pulse::new(environment.watchdog, config.server.workers);
            Life {
                live,
                inbox,
                signals,
                notifier,
                status,
                pulse,
                reloader,
                waiting: Waiting::default(),
                all_inherited,
                ignores_one: false,
            }
            .run(life::watch(threads))
            .await?;
            drop((health, admin, watchdog));
            tracing::info!("drained");
            Ok(())
        })
    }
}

/// The workers' threads, which run but accept nobody yet.
struct Workers {
    threads: Vec<JoinHandle<Result<()>>>,
    listeners: Vec<oneshot::Sender<Vec<Accepting>>>,
}

impl Workers {
    /// Starts all; when this is over, nothing of theirs can fail any more.
    async fn start(workers: Vec<Worker>, ledger: &Ledger) -> Result<Self> {
        let (started, mut all_started) = mpsc::unbounded_channel();
        let (count, mut threads, mut senders) = (workers.len(), Vec::new(), Vec::new());
        for worker in workers {
            // Each shard is taken once, here.
            let shard = worker.index;
            let claim = ledger.claim(shard).ok_or_else(|| anyhow!("shard {shard} of the ledger is taken"))?;
            let (sender, listeners) = oneshot::channel();
            let (thread, started) = (std::thread::Builder::new().name(format!("worker-{shard}")), started.clone());
            let run = move || worker.run(claim.writer(), started, listeners);
            threads.push(thread.spawn(move || run().with_context(|| format!("worker {shard}")))?);
            senders.push(sender);
        }
        drop(started);
        let mut running = 0;
        while all_started.recv().await.is_some() {
            running += 1;
        }
        if running < count {
            // The others end, as they get no listeners.
            drop(senders);
            life::watch(threads).await?;
            bail!("a worker ended before it had begun");
        }
        Ok(Self { threads, listeners: senders })
    }

    /// Each begins to accept.
    fn accept_on(self, sockets: Vec<Vec<Accepting>>) -> Vec<JoinHandle<Result<()>>> {
        for (worker, sockets) in self.listeners.into_iter().zip(sockets) {
            // A worker that is gone is noticed by who waits for its thread.
            let _ = worker.send(sockets);
        }
        self.threads
    }
}

/// Starts the health checks, which have the shard after the workers'.
fn start_health(observed: &Observed, requests: mpsc::UnboundedReceiver<Control>) -> Result<health::Health> {
    let shard = observed.config.server.workers;
    let claim = observed.ledger.claim(shard).ok_or_else(|| anyhow!("shard {shard} of the ledger is taken"))?;
    let board = Arc::clone(&observed.health);
    Ok(health::start(&observed.config, board, claim, requests, observed.controls.clone())?)
}

/// Memory comes in small pages, so that no more of it is taken than is used.
fn forbid_huge_pages() {
    if let Err(error) = crate::kernel::sys::forbid_huge_pages() {
        tracing::debug!(%error, "memory may come in huge pages: more of it than is used");
    }
}

/// The kernel may not do it, and says so to nobody.
fn warn_of_fast_open(config: &Config) {
    for warning in check::fast_open(config, check::Limits::read()) {
        tracing::warn!(%warning, "configuration");
    }
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
