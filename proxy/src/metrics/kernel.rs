//! The kernel's view, and what the watchdog makes of both.

use std::fmt;
use std::time::Duration;

use super::encode::{Durations, Families};
use crate::clock::{self, Mono};
use crate::config::Class;
use crate::kernel::{TcpState, Witness};
use crate::ledger::BackendIndex;
use crate::watchdog::report::{Report, SWEEP_BOUNDS};
use crate::watchdog::{Handle, Outcome, Policy};

/// States that are always shown, so that a rule on them never lacks its series.
const SHOWN: [TcpState; 8] = [
    TcpState::SynSent,
    TcpState::Established,
    TcpState::CloseWait,
    TcpState::Close,
    TcpState::FinWait1,
    TcpState::FinWait2,
    TcpState::LastAck,
    TcpState::Closing,
];

/// Reads the last sweep's report: a scrape never touches the kernel view itself.
#[derive(Debug)]
pub(super) struct Kernel<'a> {
    pub(super) policy: &'a Policy,
    /// Between sweeps.
    pub(super) interval: Duration,
    pub(super) watchdog: &'a Handle,
}

impl Kernel<'_> {
    pub(super) fn encode(&self, families: &mut Families<'_>) -> fmt::Result {
        let report = self.watchdog.report();
        self.view(families, &report)?;
        self.findings(families, &report)?;
        sweeps(families, &report)?;
        families.gauge("watchdog_interval_seconds", "Time between sweeps, as configured", self.interval.as_secs_f64())
    }

    /// All backends, the drill's peer, and the sockets whose peer is none of them.
    fn backends(&self) -> impl Iterator<Item = (Option<BackendIndex>, &str)> {
        let known = self.policy.names().map(|(index, _)| u16::try_from(index).ok());
        known.chain([None]).map(|index| (index, self.policy.label(index)))
    }

    fn view(&self, families: &mut Families<'_>, report: &Report) -> fmt::Result {
        let source = [("source", report.source.label())];
        families.info("kernel_view", "Where the kernel view comes from", &source)?;
        families.gauge(
            "kernel_view_uncertain",
            "1 while the kernel view cannot be relied on and nothing is reaped",
            f64::from(u8::from(report.uncertain.is_some())),
        )?;
        families.counter("kernel_missed_events", "Events that the kernel view missed", report.missed)?;
        let named = report.crosscheck.as_ref().map_or([0; 3], |checked| checked.result.named);
        families.counters(
            "kernel_witness_disagreements",
            "Comparisons in which this witness contradicted the two others",
            Witness::ALL.into_iter().map(|witness| ([("witness", witness.label())], named[witness as usize])),
        )?;
        families.gauges(
            "kernel_backend_sockets",
            "Sockets towards backends that a descriptor holds, as the kernel has them",
            self.backends().flat_map(|(backend, name)| {
                let known = backend.is_some();
                TcpState::ALL.into_iter().filter_map(move |state| {
                    let group = report.sockets.get(&(backend, state));
                    let shown = group.is_some() || (known && SHOWN.contains(&state));
                    let count = group.map_or(0, |group| group.count);
                    shown.then_some(([("backend", name), ("tcp_state", state.as_str())], count as f64))
                })
            }),
        )?;
        let now = clock::now();
        let age = |opened: Mono| now.since(opened).as_secs_f64();
        families.gauges(
            "kernel_oldest_socket_age_seconds",
            "Age of the oldest such socket",
            report.sockets.iter().filter_map(|((backend, state), group)| {
                let labels = [("backend", self.policy.label(*backend)), ("tcp_state", state.as_str())];
                Some((labels, age(group.oldest?)))
            }),
        )
    }

    fn findings(&self, families: &mut Families<'_>, report: &Report) -> fmt::Result {
        let counts = report.discrepancies();
        families.gauges(
            "discrepancy_sockets",
            "Findings now: sockets in an unhealthy class, seen in enough consecutive sweeps and past the grace time",
            self.backends().flat_map(|(backend, name)| {
                let counts = &counts;
                Class::ALL.into_iter().map(move |class| {
                    let labels = [("backend", name), ("class", class.name())];
                    (labels, counts.get(&(backend, class)).copied().unwrap_or(0) as f64)
                })
            }),
        )?;
        families.counters(
            "reaped",
            "Reapings by class and outcome, as the kernel shows it",
            Class::ALL.into_iter().flat_map(|class| {
                Outcome::ALL.into_iter().map(move |outcome| {
                    let labels = [("class", class.name()), ("outcome", outcome.label())];
                    (labels, report.reaped[class as usize][outcome as usize])
                })
            }),
        )
    }
}

fn sweeps(families: &mut Families<'_>, report: &Report) -> fmt::Result {
    families.counter("watchdog_sweeps", "Sweeps, failed ones included", report.sweeps)?;
    let (buckets, sum) = report.durations;
    families.histogram(
        "watchdog_sweep_duration_seconds",
        "Time that a sweep takes",
        &Durations::new(&SWEEP_BOUNDS, buckets, sum),
    )?;
    families.gauge("watchdog_last_success_timestamp_seconds", "When a sweep last succeeded", report.last_success)?;
    let names: Vec<String> = (0..report.stalled.len()).map(|worker| worker.to_string()).collect();
    families.gauges(
        "worker_stalled",
        "1 while a worker shows no sign of life",
        names
            .iter()
            .zip(&report.stalled)
            .map(|(name, stalled)| ([("worker", name.as_str())], f64::from(u8::from(*stalled)))),
    )
}
