//! What is wrong now, and the latest reapings: what their log lines hold, and the flight recorder.

use serde::Serialize;
use serde_json::Value;

use super::{Context, Page, digest, seconds};
use crate::clock::Mono;
use crate::ledger::RowState;
use crate::watchdog::reaper::{ReapRecord, type_list};
use crate::watchdog::{Finding, Observed, Outcome, Rung};

/// A finding; times are seconds before now, or before the end of its reaping.
#[derive(Serialize)]
struct Leak {
    event: &'static str,
    cookie: u64,
    class: &'static str,
    backend: String,
    local: Option<String>,
    remote: Option<String>,
    tcp_state: Option<&'static str>,
    kind: Option<&'static str>,
    ledger_state: Option<&'static str>,
    owner: Option<u64>,
    header: Option<String>,
    tlv_types: String,
    age_seconds: Option<f64>,
    since_seconds: f64,
    sweeps: u32,
    held_back: Option<String>,
    evidence: String,
    changes: Vec<Change>,
}

/// One entry of the flight recorder.
#[derive(Serialize)]
struct Change {
    seconds_ago: f64,
    tcp_state: Option<&'static str>,
    ledger_state: Option<&'static str>,
}

#[derive(Serialize)]
struct Reap {
    #[serde(flatten)]
    leak: Leak,
    serial: u64,
    /// When it was over, unix time.
    time: f64,
    ordered: bool,
    rung: Option<&'static str>,
    outcome: &'static str,
    note: String,
}

pub(super) fn findings(context: &Context<'_>, after: u64) -> Page {
    let mut findings: Vec<&Finding> = context.look.report.findings.iter().collect();
    findings.sort_unstable_by_key(|finding| finding.cookie);
    let types = context.observed.tlv_types();
    let mut page = Page::default();
    let mut last = after;
    for finding in findings.into_iter().filter(|finding| finding.cookie > after) {
        if page.is_full(last) {
            break;
        }
        page.push(leak("finding", finding, finding.evidence(context.now), context.now, context.observed, &types));
        last = finding.cookie;
    }
    page
}

pub(super) fn reaps(context: &Context<'_>, after: u64) -> Page {
    let types = context.observed.tlv_types();
    let mut page = Page::default();
    let mut last = after;
    for record in context.look.report.recent.iter().filter(|record| record.serial > after) {
        if page.is_full(last) {
            break;
        }
        page.push(reap(record, context.observed, &types));
        last = record.serial;
    }
    page
}

/// One record, as the answer to the order that it ends.
pub(in crate::admin) fn reaped(record: &ReapRecord, observed: &Observed) -> Value {
    serde_json::to_value(reap(record, observed, &observed.tlv_types())).unwrap_or_default()
}

fn reap(record: &ReapRecord, observed: &Observed, types: &[Vec<u8>]) -> Reap {
    Reap {
        leak: leak("reap", &record.finding, record.evidence.clone(), record.at, observed, types),
        serial: record.serial,
        time: (record.unix * 1000.0).round() / 1000.0,
        ordered: record.ordered,
        rung: record.rung.map(Rung::name),
        outcome: record.outcome.map_or("withdrawn", Outcome::label),
        note: record.note.clone(),
    }
}

fn leak(
    event: &'static str,
    finding: &Finding,
    evidence: String,
    now: Mono,
    observed: &Observed,
    types: &[Vec<u8>],
) -> Leak {
    let Finding { socket, row, .. } = finding;
    let ago = |at: Mono| seconds(now.since(at));
    let changes = finding.flight.changes().iter().map(|change| Change {
        seconds_ago: ago(change.at),
        tcp_state: change.tcp.map(|state| state.as_str()),
        ledger_state: change.row.map(RowState::label),
    });
    Leak {
        event,
        cookie: finding.cookie,
        class: finding.class.name(),
        backend: observed.policy.label(finding.backend).to_owned(),
        local: socket.as_ref().map(|socket| socket.local.to_string()),
        remote: socket.as_ref().map(|socket| socket.remote.to_string()),
        tcp_state: socket.as_ref().map(|socket| socket.state.as_str()),
        kind: row.map(|row| row.kind.label()),
        ledger_state: row.map(|row| row.state.label()),
        owner: row.map(|row| row.owner).filter(|owner| *owner != 0),
        header: row.and_then(|row| digest(row.header)),
        tlv_types: type_list(finding.tlv_types(types)),
        age_seconds: finding.opened().map(ago),
        since_seconds: ago(finding.since),
        sweeps: finding.sweeps,
        held_back: finding.held_back.map(|held_back| held_back.to_string()),
        evidence,
        changes: changes.collect(),
    }
}
