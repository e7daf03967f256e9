//! Who owns backend connections, and how many clients each listener has.
//!
//! The ledger knows an owner by the serial number of its client connection. Its address is in the sessions, which only
//! their worker reads, so it is not shown.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use serde::Serialize;

use super::{Context, Page};
use crate::clock::Mono;
use crate::stats::{Counter, ListenerStats};
use crate::tls::Version;

#[derive(Serialize)]
struct Listener<'a> {
    event: &'static str,
    listener: &'a str,
    connections: u64,
    opened: u64,
    closed: u64,
    refused: u64,
    in_flight: u64,
    queries: u64,
}

#[derive(Serialize)]
struct Client {
    event: &'static str,
    owner: u64,
    worker: usize,
    /// The version; none: in the clear.
    tls: Option<&'static str>,
    connections: u64,
    in_flight: u64,
    carried: u64,
    distinct_headers: usize,
    backends: BTreeMap<String, u64>,
    states: BTreeMap<&'static str, u64>,
    oldest_seconds: f64,
    last_byte_seconds: f64,
}

#[derive(Default)]
struct Owned {
    worker: usize,
    tls: Option<Version>,
    in_flight: u64,
    carried: u64,
    headers: BTreeSet<u64>,
    backends: BTreeMap<String, u64>,
    states: BTreeMap<&'static str, u64>,
    oldest: Option<Mono>,
    last_byte: Mono,
}

/// The listeners on the first page, then the owners by serial number.
pub(super) fn page(context: &Context<'_>, after: u64) -> Page {
    let mut page = Page::default();
    if after == 0 {
        for (index, listener) in context.observed.config.listeners.iter().enumerate() {
            page.push(self::listener(index, &listener.name, context));
        }
    }
    let mut owners: BTreeMap<u64, Owned> = BTreeMap::new();
    for row in context.look.ledger.rows.iter().filter(|row| row.owner > after) {
        let owned = owners.entry(row.owner).or_default();
        owned.worker = row.id.shard;
        owned.tls = row.client_tls;
        owned.in_flight += u64::from(row.in_flight);
        owned.carried += row.queries;
        owned.headers.insert(row.header);
        *owned.backends.entry(context.label(Some(row.backend))).or_default() += 1;
        *owned.states.entry(row.state.label()).or_default() += 1;
        owned.oldest = Some(owned.oldest.map_or(row.opened, |oldest| oldest.min(row.opened)));
        owned.last_byte = owned.last_byte.max(row.last_byte);
    }
    let mut last = after;
    for (owner, owned) in owners.range((Bound::Excluded(after), Bound::Unbounded)) {
        if page.is_full(last) {
            break;
        }
        page.push(Client {
            event: "client",
            owner: *owner,
            worker: owned.worker,
            tls: owned.tls.map(Version::label),
            connections: owned.states.values().sum(),
            in_flight: owned.in_flight,
            carried: owned.carried,
            distinct_headers: owned.headers.len(),
            backends: owned.backends.clone(),
            states: owned.states.clone(),
            oldest_seconds: owned.oldest.map_or(0.0, |at| context.ago(at)),
            last_byte_seconds: context.ago(owned.last_byte),
        });
        last = *owner;
    }
    page
}

fn listener<'a>(index: usize, name: &'a str, context: &Context<'_>) -> Listener<'a> {
    let sum = |counter: &dyn Fn(&ListenerStats) -> u64| {
        context.observed.stats.iter().filter_map(|worker| worker.listeners.get(index)).map(counter).sum()
    };
    let all = |counters: &[Counter]| counters.iter().map(Counter::get).sum::<u64>();
    Listener {
        event: "listener",
        listener: name,
        connections: sum(&|stats| stats.connections.get()),
        opened: sum(&|stats| stats.opened.get()),
        closed: sum(&|stats| all(&stats.closed)),
        refused: sum(&|stats| all(&stats.refused)),
        in_flight: sum(&|stats| stats.in_flight.get()),
        queries: sum(&|stats| stats.queries.get()),
    }
}
