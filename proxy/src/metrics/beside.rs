//! What only a watch beside other processes has: the processes, and the other half of the count as they tell it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::encode::Families;
use super::kernel::Kernel;
use crate::kernel::TcpState;
use crate::watch::Watched;
use crate::watchdog::report::Report;
use crate::watchdog::{Handle, Policy};

/// Reads what the watch has seen last.
#[derive(Debug)]
pub(super) struct Beside {
    pub(super) policy: Arc<Policy>,
    /// Between sweeps.
    pub(super) interval: Duration,
    pub(super) watched: Arc<Watched>,
    pub(super) watchdog: Handle,
}

impl Collector for Beside {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        Kernel { policy: &self.policy, interval: self.interval, watchdog: &self.watchdog }.encode(&mut families)?;
        let processes = self.watched.processes();
        families.gauge("watched_processes", "Processes that are watched now", processes.count as f64)?;
        families.counter(
            "watched_restarts",
            "Processes that have taken the place of one that ended",
            processes.restarts,
        )?;
        if let Some(descriptors) = processes.descriptors {
            families.gauge(
                "watched_open_fds",
                "Descriptors open in the watched process that is nearest to its limit",
                descriptors.open as f64,
            )?;
            families.gauge("watched_max_fds", "Descriptors that this process may open", descriptors.limit)?;
        }
        self.userspace(&mut families)
    }
}

impl Beside {
    /// Nothing, unless a metric of the watched process is read.
    fn userspace(&self, families: &mut Families<'_>) -> fmt::Result {
        let Some(userspace) = self.watched.userspace() else { return Ok(()) };
        families.gauge(
            "userspace_metric_readable",
            "1 while the watched process's own metric can be read",
            f64::from(u8::from(userspace.value.is_some())),
        )?;
        families.counter("userspace_metric_failures", "Times that it could not be read", userspace.failures)?;
        let Some(value) = userspace.value else { return Ok(()) };
        families.gauge("userspace_connections", "Connections to backends as the watched process counts them", value)?;
        families.gauge(
            "userspace_excess_connections",
            "Connections that the watched process counts and the kernel has not: its number less the kernel's sockets \
             in any state but close",
            value - connections(&self.watchdog.report()) as f64,
        )
    }
}

/// Sockets that are connections still.
fn connections(report: &Report) -> u64 {
    let groups = report.sockets.iter().filter(|((_, state), _)| *state != TcpState::Close);
    groups.map(|(_, group)| group.count).sum()
}
