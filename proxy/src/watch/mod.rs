//! `counterfoil watch`: the watchdog beside processes that know nothing of it.
//!
//! ```text
//! kernel view of their sockets ── Followed ── watchdog (trust: beside, no ledger) ── findings ── reaper: SOCK_DESTROY only
//!                     processes, descriptors ──┐          └─ report ─┐
//!          their own metrics over HTTP ── Watched ──────────── /metrics
//! ```

mod args;
mod follow;
mod http;
mod samples;
mod userspace;
mod watched;

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::{fs, io};

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub use args::{Plan, WatchArgs};
pub use watched::{Descriptors, Processes, Userspace, Watched};

use crate::config::ReapMode;
use crate::kernel::Process;
use crate::metrics::Metrics;
use crate::watchdog::Watchdog;
use crate::{admin, kernel, logging, metrics, privilege, watchdog};
use follow::Followed;
use http::Served;

/// Sockets towards the backends that are looked at.
const MAX_SOCKETS: u32 = 65_536;

impl Plan {
    /// Watches until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// The address for metrics cannot be listened on, there is no such process, or it may not be looked at; what is
    /// missing is said.
    pub fn run(self) -> Result<()> {
        // Before anything else: from now on none of them ends the process by itself.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let signals = runtime
            .block_on(async { io::Result::Ok([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]) })?;
        privilege::forbid_new()?;
        let listener = self.http.map(bind).transpose()?;
        let (mut view, source, reason) = kernel::open_beside(self.view, &self.who, &self.backends, MAX_SOCKETS)?;
        tracing::info!(source = source.as_str(), reason, "kernel view");
        let elsewhere = view.snapshot().is_ok_and(|snapshot| snapshot.processes.iter().any(is_elsewhere));
        privilege::keep_for_watch(&mut *view, self.subject.settings.reap, elsewhere)?;
        let watched = Arc::new(if self.userspace.is_some() { Watched::with_userspace() } else { Watched::default() });
        let followed = Followed::new(view, Arc::clone(&watched));
        let watchdog = watchdog::start(self.subject.clone(), Box::new(followed))?;
        privilege::drop_all()?;
        let metrics = Arc::new(metrics::beside(&self.subject, Arc::clone(&watched), watchdog.handle()));
        self.serve(runtime, signals, listener, watched, watchdog, metrics)
    }

    fn serve(
        self,
        runtime: Runtime,
        [mut terminate, mut interrupt]: [Signal; 2],
        listener: Option<TcpListener>,
        watched: Arc<Watched>,
        watchdog: Watchdog,
        metrics: Arc<Metrics>,
    ) -> Result<()> {
        let interval = self.subject.settings.interval;
        let stopped: Result<()> = runtime.block_on(async {
            let http = listener.as_ref().map(TcpListener::local_addr).transpose()?;
            if let Some(listener) = listener {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                let served = Served { metrics, watched: Arc::clone(&watched), watchdog: watchdog.handle(), interval };
                tokio::spawn(admin::serve_router(listener, http::router(served)));
            }
            if let Some((page, selector)) = self.userspace {
                tokio::spawn(userspace::follow(page, selector, interval, watched));
            }
            let settings = &self.subject.settings;
            let classes: Vec<&str> = settings.classes.iter().map(|class| class.name()).collect();
            tracing::info!(
                who = %self.who,
                backends = list(&self.backends),
                reap = if settings.reap == ReapMode::On { "on" } else { "dry-run" },
                classes = classes.join(","),
                http = http.map_or_else(|| "off".to_owned(), |address| address.to_string()),
                "ready"
            );
            let mut log = tokio::time::interval(logging::LOOK);
            loop {
                tokio::select! {
                    _ = log.tick() => logging::tell_held_back(),
                    _ = terminate.recv() => break tracing::info!(signal = "SIGTERM", "stopping"),
                    _ = interrupt.recv() => break tracing::info!(signal = "SIGINT", "stopping"),
                }
            }
            Ok(())
        });
        // A name that is being looked up for the metric holds nobody back.
        runtime.shutdown_background();
        drop(watchdog);
        stopped
    }
}

/// In another network namespace than this process.
fn is_elsewhere(process: &Process) -> bool {
    let theirs = fs::metadata(format!("/proc/{}/ns/net", process.pid));
    let own = fs::metadata("/proc/thread-self/ns/net");
    matches!((theirs, own), (Ok(theirs), Ok(own)) if theirs.ino() != own.ino())
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn bind(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).with_context(|| format!("--http {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
