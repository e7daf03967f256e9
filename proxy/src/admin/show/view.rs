//! The kernel view and the watchdog: how far both can be relied on.

use serde::Serialize;

use super::{Context, Page, seconds};
use crate::clock::Mono;
use crate::config::{Class, choices::Choice as _};
use crate::kernel::Witness;
use crate::watchdog::report::Checked;

#[derive(Serialize)]
struct View<'a> {
    event: &'static str,
    source: &'static str,
    /// Why this one.
    reason: &'a str,
    uncertain: Option<&'a str>,
    missed_events: u64,
    sockets: usize,
    connections: usize,
    tombstones: usize,
    findings: usize,
    crosscheck: Option<Crosscheck<'a>>,
    sweeps: u64,
    last_success: f64,
    last_sweep_seconds: f64,
    mean_sweep_seconds: f64,
    slowest_sweep_seconds: f64,
    interval_seconds: f64,
    grace_seconds: f64,
    consecutive_sweeps: u32,
    reap: &'static str,
    classes: Vec<&'static str>,
    max_reaps_per_minute: u32,
    workers: Vec<Worker>,
}

/// The last comparison with the witnesses.
#[derive(Serialize)]
struct Crosscheck<'a> {
    /// Unix time.
    time: f64,
    view: usize,
    descriptors: usize,
    sock_diag: usize,
    found: usize,
    held_elsewhere: usize,
    disagreement: Option<&'a str>,
    /// Which witness is wrong, if two are against one.
    liar: Option<&'static str>,
}

#[derive(Serialize)]
struct Worker {
    worker: usize,
    stalled: bool,
    /// None: it never started.
    heartbeat_seconds: Option<f64>,
}

pub(super) fn page(context: &Context<'_>) -> Page {
    let (look, report) = (context.look, &context.look.report);
    let watchdog = &context.observed.config.watchdog;
    let (buckets, sum) = report.durations;
    let counted: u64 = buckets.iter().sum();
    let workers = report.stalled.iter().enumerate().map(|(worker, stalled)| {
        let beat = look.ledger.heartbeats.get(worker).copied().filter(|beat| *beat != Mono::ZERO);
        Worker { worker, stalled: *stalled, heartbeat_seconds: beat.map(|beat| context.ago(beat)) }
    });
    let mut page = Page::default();
    page.push(View {
        event: "view",
        source: report.source.as_str(),
        reason: &context.observed.view_reason,
        uncertain: match &look.kernel {
            Ok(kernel) => kernel.uncertain.as_deref(),
            Err(error) => Some(error),
        },
        missed_events: look.kernel.as_ref().map_or(report.missed, |kernel| kernel.missed),
        sockets: look.kernel.iter().flat_map(|kernel| &kernel.sockets).filter(|socket| socket.held).count(),
        connections: look.ledger.rows.len(),
        tombstones: look.ledger.tombstones.len(),
        findings: report.findings.len(),
        crosscheck: report.crosscheck.as_ref().map(crosscheck),
        sweeps: report.sweeps,
        last_success: (report.last_success * 1000.0).round() / 1000.0,
        last_sweep_seconds: report.last_sweep.as_secs_f64(),
        mean_sweep_seconds: if counted == 0 { 0.0 } else { sum as f64 / counted as f64 / 1e9 },
        slowest_sweep_seconds: report.slowest_sweep.as_secs_f64(),
        interval_seconds: seconds(watchdog.interval),
        grace_seconds: seconds(watchdog.grace),
        consecutive_sweeps: watchdog.sweeps,
        reap: watchdog.reap.word(),
        classes: watchdog.classes.iter().copied().map(Class::name).collect(),
        max_reaps_per_minute: watchdog.max_reaps_per_minute,
        workers: workers.collect(),
    });
    page
}

fn crosscheck(checked: &Checked) -> Crosscheck<'_> {
    let [view, descriptors, sock_diag] = checked.result.compared;
    Crosscheck {
        time: (checked.at * 1000.0).round() / 1000.0,
        view,
        descriptors,
        sock_diag,
        found: checked.result.found.len(),
        held_elsewhere: checked.result.held_elsewhere.len(),
        disagreement: checked.result.disagreement.as_deref(),
        liar: checked.result.liar.map(Witness::label),
    }
}
