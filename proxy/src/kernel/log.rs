//! Passes the eBPF program's own messages on to this program's log.

use log::{Level, Log, Metadata, Record};

/// Where they appear.
const TARGET: &str = "counterfoil::kernel::ebpf";

/// The `log` side of aya-log, handed on to `tracing` whether or not a global bridge between the two is installed.
pub(super) struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        match record.level() {
            Level::Error => tracing::error!(target: TARGET, "{}", record.args()),
            Level::Warn => tracing::warn!(target: TARGET, "{}", record.args()),
            Level::Info => tracing::info!(target: TARGET, "{}", record.args()),
            Level::Debug => tracing::debug!(target: TARGET, "{}", record.args()),
            Level::Trace => tracing::trace!(target: TARGET, "{}", record.args()),
        }
    }

    fn flush(&self) {}
}
