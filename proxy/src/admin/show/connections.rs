//! The join, socket by socket: one row for each cookie that either view has.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use serde::Serialize;

use super::{Context, Page, digest};
use crate::clock::Mono;
use crate::kernel::KernelSocket;
use crate::ledger::{LedgerRow, Tombstone};
use crate::watchdog::Finding;

/// Both halves of one socket, unheld ones included.
#[derive(Clone, Copy, Default)]
struct Both<'a> {
    socket: Option<&'a KernelSocket>,
    row: Option<&'a LedgerRow>,
    tombstone: Option<&'a Tombstone>,
}

#[derive(Serialize)]
struct Connection {
    event: &'static str,
    cookie: u64,
    backend: String,
    local: Option<String>,
    remote: Option<String>,
    tcp_state: Option<&'static str>,
    held: Option<bool>,
    kind: Option<&'static str>,
    ledger_state: Option<&'static str>,
    worker: Option<usize>,
    in_flight: Option<u32>,
    carried: Option<u64>,
    age_seconds: Option<f64>,
    kernel_last_byte_seconds: Option<f64>,
    ledger_last_byte_seconds: Option<f64>,
    bytes_sent: Option<u64>,
    bytes_received: Option<u64>,
    unread: Option<u32>,
    owner: Option<u64>,
    header: Option<String>,
    closed_seconds: Option<f64>,
    close_reason: Option<&'static str>,
    finding: Option<&'static str>,
    held_back: Option<String>,
}

pub(super) fn page(context: &Context<'_>, after: u64) -> Page {
    let findings: HashMap<u64, &Finding> =
        context.look.report.findings.iter().map(|finding| (finding.cookie, finding)).collect();
    let mut page = Page::default();
    let mut last = after;
    for (cookie, both) in join(context).range((Bound::Excluded(after), Bound::Unbounded)) {
        if page.is_full(last) {
            break;
        }
        page.push(connection(*cookie, both, findings.get(cookie).copied(), context));
        last = *cookie;
    }
    page
}

fn join<'a>(context: &Context<'a>) -> BTreeMap<u64, Both<'a>> {
    let mut joined: BTreeMap<u64, Both<'a>> = BTreeMap::new();
    for socket in context.look.kernel.iter().flat_map(|kernel| &kernel.sockets) {
        joined.entry(socket.cookie).or_default().socket = Some(socket);
    }
    for row in &context.look.ledger.rows {
        joined.entry(row.cookie).or_default().row = Some(row);
    }
    for tombstone in &context.look.ledger.tombstones {
        if let Some(both) = joined.get_mut(&tombstone.cookie) {
            // Closed while the ledger was being read: the row is history.
            both.row = None;
            both.tombstone = Some(tombstone);
        }
    }
    joined.retain(|_, both| both.socket.is_some() || both.row.is_some());
    joined
}

fn connection(cookie: u64, both: &Both<'_>, finding: Option<&Finding>, context: &Context<'_>) -> Connection {
    let Both { socket, row, tombstone } = *both;
    let backend = match (row, tombstone, socket) {
        (Some(row), ..) => Some(row.backend),
        (_, Some(tombstone), _) => Some(tombstone.backend),
        (.., Some(socket)) => context.observed.policy.backend_of(socket),
        (None, None, None) => None,
    };
    let opened = row.map(|row| row.opened).or_else(|| socket?.opened.map(Mono));
    let last_byte = socket.and_then(|socket| socket.last_received_ns.max(socket.last_sent_ns));
    Connection {
        event: "connection",
        cookie,
        backend: context.label(backend),
        local: socket.map(|socket| socket.local.to_string()),
        remote: socket.map(|socket| socket.remote.to_string()),
        tcp_state: socket.map(|socket| socket.state.as_str()),
        held: socket.map(|socket| socket.held),
        kind: row.map(|row| row.kind.label()),
        ledger_state: row.map(|row| row.state.label()),
        worker: row.map(|row| row.id.shard),
        in_flight: row.map(|row| row.in_flight),
        carried: row.map(|row| row.queries),
        age_seconds: opened.map(|at| context.ago(at)),
        kernel_last_byte_seconds: last_byte.map(|at| context.ago(Mono(at))),
        ledger_last_byte_seconds: row.map(|row| context.ago(row.last_byte)),
        bytes_sent: socket.and_then(|socket| socket.bytes_sent),
        bytes_received: socket.and_then(|socket| socket.bytes_received),
        unread: socket.and_then(|socket| socket.unread),
        owner: row.map(|row| row.owner).filter(|owner| *owner != 0),
        header: row.and_then(|row| digest(row.header)),
        closed_seconds: tombstone.map(|tombstone| context.ago(tombstone.closed)),
        close_reason: tombstone.map(|tombstone| tombstone.reason.label()),
        finding: finding.map(|finding| finding.class.name()),
        held_back: finding.and_then(|finding| finding.held_back).map(|held_back| held_back.to_string()),
    }
}
