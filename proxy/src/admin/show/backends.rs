//! Per backend: the ledger by kind and state beside the kernel's sockets by TCP state, limits and findings.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Context, Page};
use crate::config::choices::Choice as _;
use crate::ledger::{BackendIndex, BackendTotals};

/// Counts by name; what is zero is left out.
type Counts = BTreeMap<&'static str, u64>;

#[derive(Default, Serialize)]
struct Backend {
    event: &'static str,
    backend: String,
    pool: Option<String>,
    address: Option<String>,
    health: Option<&'static str>,
    state: Option<&'static str>,
    limit: Option<usize>,
    used: Option<usize>,
    connections: u64,
    sockets: u64,
    in_flight: u64,
    ledger: BTreeMap<&'static str, Counts>,
    kernel: Counts,
    unheld: Counts,
    findings: Counts,
    opened: u64,
    closed: u64,
    queries: u64,
    reused: u64,
    connect_failures: u64,
}

/// The backends of the configuration, the drill's peer, what is none of them if there is any, and the total.
pub(super) fn page(context: &Context<'_>) -> Page {
    let (known, totals) = (context.observed.policy.backends.len(), context.observed.ledger.totals());
    let mut backends: Vec<Backend> = (0..known).map(|index| describe(index, totals.get(index), context)).collect();
    let mut unknown = Backend { backend: context.label(None), ..Backend::default() };
    for row in &context.look.ledger.rows {
        let backend = backends.get_mut(usize::from(row.backend)).unwrap_or(&mut unknown);
        backend.connections += 1;
        backend.in_flight += u64::from(row.in_flight);
        *backend.ledger.entry(row.kind.label()).or_default().entry(row.state.label()).or_default() += 1;
    }
    let rows: BTreeMap<u64, BackendIndex> =
        context.look.ledger.rows.iter().map(|row| (row.cookie, row.backend)).collect();
    for socket in context.look.kernel.iter().flat_map(|kernel| &kernel.sockets) {
        // The ledger's word on the backend comes first: two may have one address.
        let index = rows.get(&socket.cookie).copied().or_else(|| context.observed.policy.backend_of(socket));
        let backend = index.and_then(|index| backends.get_mut(usize::from(index))).unwrap_or(&mut unknown);
        if socket.held {
            backend.sockets += 1;
            *backend.kernel.entry(socket.state.as_str()).or_default() += 1;
        } else {
            *backend.unheld.entry(socket.state.as_str()).or_default() += 1;
        }
    }
    for finding in &context.look.report.findings {
        let backend = finding.backend.and_then(|index| backends.get_mut(usize::from(index))).unwrap_or(&mut unknown);
        *backend.findings.entry(finding.class.name()).or_default() += 1;
    }
    let mut page = Page::default();
    let total = total(&backends, context);
    // Vacant numbers have no name.
    for backend in backends.into_iter().filter(|backend| !backend.backend.is_empty()) {
        page.push(Backend { event: "backend", ..backend });
    }
    if unknown.connections + unknown.sockets > 0 || !unknown.unheld.is_empty() || !unknown.findings.is_empty() {
        page.push(Backend { event: "backend", ..unknown });
    }
    page.push(total);
    page
}

/// What the configuration and the counters say.
fn describe(index: usize, totals: Option<&BackendTotals>, context: &Context<'_>) -> Backend {
    let observed = context.observed;
    let caps = BackendIndex::try_from(index).ok().and_then(|index| observed.ledger.caps().backend(index));
    // The drill's peer, and what a reload has taken out, have no state.
    let place = BackendIndex::try_from(index).ok().and_then(|index| observed.health.get(index));
    let place = place.filter(|place| place.mode().is_some());
    let stats = || observed.stats.iter().filter_map(|worker| worker.backends.get(index));
    Backend {
        backend: observed.policy.backends.get(index).map(|backend| backend.name.clone()).unwrap_or_default(),
        pool: observed.numbers.pool_of(index).map(str::to_owned),
        address: observed.policy.backends.get(index).map(|backend| backend.address.to_string()),
        health: place.and_then(|place| place.mode()).map(|mode| mode.word()),
        state: place.map(|place| place.state().label()),
        limit: caps.map(|(limit, _)| limit),
        used: caps.map(|(_, used)| used),
        opened: totals.map_or(0, |totals| totals.opened.iter().sum()),
        closed: totals.map_or(0, |totals| totals.closed.iter().sum()),
        queries: stats().map(|backend| backend.queries.get()).sum(),
        reused: stats().map(|backend| backend.reused.get()).sum(),
        connect_failures: stats().map(|backend| backend.connect_failures.get()).sum(),
        ..Backend::default()
    }
}

#[derive(Serialize)]
struct Total {
    event: &'static str,
    /// `[connections] max_total`
    limit: usize,
    /// Without the drill's.
    used: usize,
    connections: u64,
    sockets: u64,
    findings: usize,
}

fn total(backends: &[Backend], context: &Context<'_>) -> Total {
    let (limit, used) = context.observed.ledger.caps().total();
    Total {
        event: "total",
        limit,
        used,
        connections: backends.iter().map(|backend| backend.connections).sum(),
        sockets: context.look.kernel.iter().flat_map(|kernel| &kernel.sockets).filter(|socket| socket.held).count()
            as u64,
        findings: context.look.report.findings.len(),
    }
}
