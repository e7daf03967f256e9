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

use anyhow::{Context as _, Result, anyhow};
use tokio::sync::mpsc;

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
use life::{Life, Pulse, Signals};
use listen::Listening;
use order::{Inbox, Orders};
use reload::Reloader;

/// A forwarder that is ready to run.
pub struct App {
    observed: Observed,
    workers: Vec<Worker>,
    addresses: Vec<SocketAddr>,
    all_inherited: bool,
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
        let Listening { sockets, addresses, all_inherited } = listen::open(&config.listeners, count, inherited)?;
        let mut receivers = receivers.into_iter();
        let mut workers = Vec::with_capacity(count);
        for (index, (listeners, requests)) in sockets.into_iter().zip(receivers.by_ref()).enumerate() {
            workers.push(Worker {
                index,
                workers: count,
                config: Arc::clone(&config),
                listeners,
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
        let listening = [addresses.as_slice(), others, &[drill.address()?]].concat();
        let (mut view, source, reason) = kernel::open(config.kernel.view, &listening, config.kernel.max_sockets)
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
        Ok(Self {
            observed,
            workers,
            addresses,
            all_inherited,
            watchdog,
            health,
            file,
            tls,
            doors,
            drill,
            environment,
            notifier,
        })
    }

    /// Serves until SIGTERM, SIGINT or an order to drain, then drains.
    ///
    /// # Errors
    ///
    /// A thread can't be started, or a worker failed.
    pub fn run(self) -> Result<()> {
        let Self {
            observed,
            workers,
            addresses,
            all_inherited,
            watchdog,
            health,
            file,
            tls,
            doors,
            drill,
            environment,
            notifier,
        } = self;
        let config = Arc::clone(&observed.config);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            // Before the workers: a signal that comes early must not be lost.
            let signals = Signals::catch()?;
            let live = Live::new(observed.clone());
            let metrics = Arc::new(metrics::registry(live.clone(), watchdog.handle()));
            let (orders, inbox): (Orders, Inbox) = order::channel();
            let served = admin::Served { live: live.clone(), watchdog: watchdog.handle(), metrics, orders };
            let admin = admin::start(served, drill, doors)?;
            let http = admin.http().map_or_else(|| "off".to_owned(), |address| address.to_string());
            let socket = admin.socket().map_or_else(|| "off".to_owned(), |path| path.display().to_string());
            tracing::info!(http, socket, "admin");
            let mut threads = Vec::new();
            for worker in workers {
                threads.push(start(worker, &observed.ledger)?);
            }
            let health = start_health(&observed, health)?;
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
            let reloader =
                Reloader { file, live: live.clone(), watchdog: watchdog.handle(), tls, may_sever, stricter: None };
            let pulse = Pulse::new(environment.watchdog, config.server.workers);
            Life { live, inbox, signals, notifier, status, pulse, reloader, all_inherited }
                .run(life::watch(threads))
                .await?;
            drop((health, admin, watchdog));
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
