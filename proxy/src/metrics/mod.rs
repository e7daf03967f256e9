//! `/metrics`: the only place where names and labels of metrics exist.
//!
//! Everything is read when it is scraped: counters from the workers, gauges from the ledger (I11), findings from the
//! watchdog's last report. Labels come from the configuration and from closed enums only, so their number is bounded.

mod beside;
mod encode;
mod format;
mod kernel;
mod limits;
mod process;
mod reload;
mod traffic;

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::watch::Watched;
use crate::watchdog::{Handle, Live, Subject};
use beside::Beside;
use encode::Families;
pub use format::Format;
use kernel::Kernel;
use limits::{Limits, Ports};
use process::Process;
use traffic::Traffic;

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    turns: Semaphore,
}

impl From<Registry> for Metrics {
    fn from(registry: Registry) -> Self {
        Self { registry, turns: Semaphore::new(1) }
    }
}

/// The metrics of what is observed.
pub fn registry(live: Live, watchdog: Handle) -> Metrics {
    let mut registry = Registry::default();
    let own = registry.sub_registry_with_prefix("counterfoil");
    own.register_collector(Box::new(Build));
    own.register_collector(Box::new(Own { live, watchdog, ports: Ports::default() }));
    registry.register_collector(Box::new(Process));
    registry.into()
}

/// The metrics of a watch beside other processes.
pub fn beside(subject: &Subject, watched: Arc<Watched>, watchdog: Handle) -> Metrics {
    let mut registry = Registry::default();
    let own = registry.sub_registry_with_prefix("counterfoil");
    let (policy, interval) = (Arc::clone(&subject.policy), subject.settings.interval);
    own.register_collector(Box::new(Build));
    own.register_collector(Box::new(Beside { policy, interval, watched, watchdog }));
    registry.register_collector(Box::new(Process));
    registry.into()
}

impl Metrics {
    /// The turn to render, first come, first served. Nobody has to wait for one; who may be one of many does.
    pub async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.turns.acquire().await.ok()
    }

    /// The exposition as of now.
    pub fn render(&self, format: Format) -> String {
        let mut text = String::with_capacity(64 * 1024);
        if let Err(error) = encode(&mut text, &self.registry) {
            // Writing to a string cannot fail, so this is a bug; the truncated text makes the scrape fail visibly.
            tracing::error!(%error, "metrics cannot be encoded");
        }
        match format {
            Format::OpenMetrics => text,
            Format::Text => format::to_text(&text),
        }
    }
}

/// All that is the forwarder's own, as of the configuration in force when it is scraped.
#[derive(Debug)]
struct Own {
    live: Live,
    watchdog: Handle,
    ports: Ports,
}

impl Collector for Own {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let observed = &self.live.now();
        let families = &mut Families(encoder);
        Traffic { observed }.encode(families)?;
        Limits { observed, ports: &self.ports }.encode(families)?;
        let interval = observed.config.watchdog.interval;
        Kernel { policy: &observed.policy, interval, watchdog: &self.watchdog }.encode(families)?;
        reload::encode(observed, families)
    }
}

#[derive(Debug)]
struct Build;

impl Collector for Build {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        Families(encoder).info("build", "The program", &[("version", env!("CARGO_PKG_VERSION"))])
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
