//! The user's view: clients, queries and backend connections, from the workers' counters and the ledger (I11).

use std::collections::HashMap;
use std::fmt;

use super::encode::{Durations, Families};
use crate::client::handshake::{HandshakeFailure, SessionKind};
use crate::clock;
use crate::close::{ClientCloseReason, CloseReason, FailReason, TransferEnd};
use crate::distinct::estimate;
use crate::dns::synth::InfoCode;
use crate::health::{CheckResult, State};
use crate::ledger::{ConnKind, RowState};
use crate::stats::{
    Acquired, BackendStats, Counter, LATENCY_BOUNDS, ListenerStats, PoolStats, Refusal, Stage, TransferKind,
};
use crate::watchdog::Observed;

/// Reads everything when it is scraped. What the configuration had before a reload goes on being shown for a while
/// ([`crate::config::Numbers`]), so that no counter ever goes back, and none is shown for ever.
#[derive(Debug)]
pub(super) struct Traffic<'a> {
    pub(super) observed: &'a Observed,
}

impl Traffic<'_> {
    pub(super) fn encode(&self, families: &mut Families<'_>) -> fmt::Result {
        self.clients(families)?;
        self.tls(families)?;
        self.queries(families)?;
        self.transfers(families)?;
        self.connections(families)?;
        self.backends(families)?;
        self.health(families)?;
        self.pools(families)
    }

    /// A counter of a listener, summed over the workers.
    fn listener(&self, index: usize, counter: impl Fn(&ListenerStats) -> &Counter) -> u64 {
        self.observed.stats.iter().filter_map(|worker| worker.listeners.get(index)).map(|l| counter(l).get()).sum()
    }

    fn pool(&self, index: usize, counter: impl Fn(&PoolStats) -> &Counter) -> u64 {
        self.observed.stats.iter().filter_map(|worker| worker.pools.get(index)).map(|p| counter(p).get()).sum()
    }

    fn backend(&self, index: usize, counter: impl Fn(&BackendStats) -> &Counter) -> u64 {
        self.observed.stats.iter().filter_map(|worker| worker.backends.get(index)).map(|b| counter(b).get()).sum()
    }

    fn listeners(&self) -> impl Iterator<Item = (usize, &str)> {
        self.observed.config.listeners.iter().map(|listener| listener.name.as_str()).enumerate()
    }

    fn backend_names(&self) -> impl Iterator<Item = (usize, &str)> {
        self.observed.policy.names()
    }

    fn clients(&self, families: &mut Families<'_>) -> fmt::Result {
        families.gauges(
            "client_connections",
            "Client connections open now",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.connections) as f64)),
        )?;
        families.gauges(
            "client_connections_pending",
            "Connections accepted whose client is not known or not served yet, by what they wait for",
            self.listeners().flat_map(|(i, name)| {
                Stage::ALL.into_iter().map(move |stage| {
                    let labels = [("listener", name), ("stage", stage.label())];
                    (labels, self.listener(i, |l| &l.pending[stage as usize]) as f64)
                })
            }),
        )?;
        families.counters(
            "client_connections_opened",
            "Client connections accepted",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.opened))),
        )?;
        families.counters(
            "client_connections_restricted",
            "Client connections accepted near a limit, with the times of [overload]",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.restricted))),
        )?;
        families.counters(
            "client_connections_closed",
            "Client connections closed, by reason",
            self.listeners().flat_map(|(i, name)| {
                ClientCloseReason::ALL.iter().map(move |reason| {
                    let labels = [("listener", name), ("reason", reason.label())];
                    (labels, self.listener(i, |l| &l.closed[*reason as usize]))
                })
            }),
        )?;
        families.counters(
            "client_connections_refused",
            "Client connections not accepted, by reason",
            self.listeners().flat_map(|(i, name)| {
                Refusal::ALL.into_iter().map(move |refusal| {
                    let labels = [("listener", name), ("reason", refusal.label())];
                    (labels, self.listener(i, |l| &l.refused[refusal as usize]))
                })
            }),
        )?;
        families.counters(
            "client_accept_failures",
            "Times that accept(2) failed for want of descriptors or memory; the clients wait in the kernel's queue",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.accept_failures))),
        )
    }

    /// What clients agreed on with listeners that have TLS.
    fn tls(&self, families: &mut Families<'_>) -> fmt::Result {
        let listeners = || {
            let with_tls = |(i, _): &(usize, &str)| self.observed.config.listeners[*i].tls.is_some();
            self.listeners().filter(with_tls)
        };
        families.counters(
            "tls_sessions",
            "TLS sessions of clients, by version, new or resumed",
            listeners().flat_map(|(i, name)| {
                SessionKind::ALL.into_iter().map(move |kind| {
                    let session = if kind.resumed { "resumed" } else { "new" };
                    let labels = [("listener", name), ("version", kind.version.label()), ("session", session)];
                    (labels, self.listener(i, |l| &l.tls_sessions[kind.index()]))
                })
            }),
        )?;
        families.counters(
            "tls_handshake_failures",
            "TLS handshakes of clients that did not come to their end, by reason",
            listeners().flat_map(|(i, name)| {
                HandshakeFailure::ALL.into_iter().map(move |failure| {
                    let labels = [("listener", name), ("reason", failure.label())];
                    (labels, self.listener(i, |l| &l.tls_failures[failure as usize]))
                })
            }),
        )?;
        families.gauges(
            "tls_certificate_not_after_timestamp_seconds",
            "When the certificate that clients are shown ends",
            listeners().filter_map(|(i, name)| {
                let identity = self.observed.config.listeners[i].tls.as_ref()?.identity.as_ref()?;
                Some(([("listener", name)], identity.not_after()? as f64))
            }),
        )
    }

    fn queries(&self, families: &mut Families<'_>) -> fmt::Result {
        families.counters(
            "queries",
            "Queries accepted: answers, failed, abandoned and in flight add up to them",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.queries))),
        )?;
        families.counters(
            "answers",
            "Queries that a backend answered",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.answers))),
        )?;
        families.counters(
            "queries_failed",
            "Queries that got an answer of the forwarder's own, by reason",
            self.listeners().flat_map(|(i, name)| {
                FailReason::ALL.iter().map(move |reason| {
                    let labels = [("listener", name), ("reason", reason.label())];
                    (labels, self.listener(i, |l| &l.failed[*reason as usize]))
                })
            }),
        )?;
        families.counters(
            "edns_errors",
            "Answers of the forwarder's own that had an extended DNS error, by its code",
            self.listeners().flat_map(|(i, name)| {
                InfoCode::ALL.into_iter().map(move |code| {
                    let labels = [("listener", name), ("edns_error", code.label())];
                    (labels, self.listener(i, |l| &l.extended_errors[code.index()]))
                })
            }),
        )?;
        families.counters(
            "queries_abandoned",
            "Queries whose client left first",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.abandoned))),
        )?;
        families.counters(
            "messages_ignored",
            "Messages of clients that are no queries (QR set) and get no answer",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.ignored))),
        )?;
        let in_flight: u64 = self.listeners().map(|(i, _)| self.listener(i, |l| &l.in_flight)).sum();
        families.gauge("queries_in_flight", "Queries in flight now", in_flight as f64)?;
        let waiting: u64 = self.observed.stats.iter().map(|worker| worker.waiting.get()).sum();
        families.gauge("queries_waiting", "Queries that wait for a connection now", waiting as f64)
    }

    fn transfers(&self, families: &mut Families<'_>) -> fmt::Result {
        families.counters(
            "transfers",
            "Zone transfers that have ended, by kind and how they ended",
            self.listeners().flat_map(|(i, name)| {
                TransferKind::ALL.into_iter().flat_map(move |kind| {
                    TransferEnd::ALL.iter().map(move |end| {
                        let labels = [("listener", name), ("kind", kind.label()), ("outcome", end.label())];
                        (labels, self.listener(i, |l| &l.transfers[kind as usize][*end as usize]))
                    })
                })
            }),
        )?;
        families.counters(
            "transfer_messages",
            "Messages of zone transfers passed on to clients",
            self.listeners().map(|(i, name)| ([("listener", name)], self.listener(i, |l| &l.transfer_messages))),
        )
    }

    /// Backend connections as the ledger has them: gauges are read there, never counted twice.
    fn connections(&self, families: &mut Families<'_>) -> fmt::Result {
        let mut now: HashMap<(usize, ConnKind, RowState), u64> = HashMap::new();
        for row in self.observed.ledger.snapshot(clock::now()).rows {
            *now.entry((usize::from(row.backend), row.kind, row.state)).or_insert(0) += 1;
        }
        families.gauges(
            "backend_connections",
            "Backend connections in the ledger now",
            self.backend_names().flat_map(|(i, name)| {
                let now = &now;
                ConnKind::ALL.into_iter().flat_map(move |kind| {
                    RowState::ALL.into_iter().map(move |state| {
                        let labels = [("backend", name), ("kind", kind.label()), ("state", state.label())];
                        (labels, now.get(&(i, kind, state)).copied().unwrap_or(0) as f64)
                    })
                })
            }),
        )?;
        let caps = self.observed.ledger.caps();
        families.gauges(
            "backend_connections_limit",
            "Backend connections allowed",
            self.backend_names().filter(|(i, _)| self.observed.policy.backends[*i].configured).filter_map(
                |(i, name)| {
                    let (limit, _) = caps.backend(u16::try_from(i).ok()?)?;
                    Some(([("backend", name)], limit as f64))
                },
            ),
        )?;
        let totals = self.observed.ledger.totals();
        families.counters(
            "backend_connections_opened",
            "Backend connections opened",
            self.backend_names().flat_map(|(i, name)| {
                let opened = totals.get(i).map(|totals| totals.opened).unwrap_or_default();
                let of = move |kind: ConnKind| ([("backend", name), ("kind", kind.label())], opened[kind as usize]);
                ConnKind::ALL.into_iter().map(of)
            }),
        )?;
        families.counters(
            "backend_connections_closed",
            "Backend connections closed, by reason",
            self.backend_names().flat_map(|(i, name)| {
                let totals = totals.get(i);
                CloseReason::ALL.iter().map(move |reason| {
                    let closed = totals.map_or(0, |totals| totals.closed[*reason as usize]);
                    ([("backend", name), ("reason", reason.label())], closed)
                })
            }),
        )
    }

    fn backends(&self, families: &mut Families<'_>) -> fmt::Result {
        families.counters(
            "backend_connections_reused",
            "Queries given to a connection that had carried one before",
            self.backend_names().map(|(i, name)| ([("backend", name)], self.backend(i, |b| &b.reused))),
        )?;
        families.counters(
            "backend_connect_failures",
            "Backend connections that could not be opened",
            self.backend_names().map(|(i, name)| ([("backend", name)], self.backend(i, |b| &b.connect_failures))),
        )?;
        families.counters(
            "backend_tls_handshakes",
            "TLS handshakes with a backend that were completed, by whether a session was resumed",
            self.backend_names().flat_map(|(i, name)| {
                [("full", 0), ("resumed", 1)].map(|(kind, at)| {
                    ([("backend", name), ("kind", kind)], self.backend(i, |backend| &backend.handshakes[at]))
                })
            }),
        )?;
        families.counters(
            "backend_shortages",
            "Connections for which this host had no descriptor, no memory or no local port",
            self.backend_names().map(|(i, name)| ([("backend", name)], self.backend(i, |b| &b.shortages))),
        )?;
        families.counters(
            "backend_convictions",
            "Queries on which the backend closed a connection that they had for themselves",
            self.backend_names().map(|(i, name)| ([("backend", name)], self.backend(i, |b| &b.convicted))),
        )?;
        families.counters(
            "backend_queries",
            "Queries written to a backend, retries included",
            self.backend_names().map(|(i, name)| ([("backend", name)], self.backend(i, |b| &b.queries))),
        )
    }

    /// What the health checks say.
    fn health(&self, families: &mut Families<'_>) -> fmt::Result {
        let drill = self.observed.policy.drill();
        let places = || {
            let names = self.backend_names().filter(move |(i, _)| *i != usize::from(drill));
            names.filter_map(|(i, name)| Some((name, self.observed.health.get(u16::try_from(i).ok()?)?)))
        };
        families.gauges(
            "backend_up",
            "Whether the backend is known to be up",
            places()
                .filter(|(_, place)| place.mode().is_some())
                .map(|(name, place)| ([("backend", name)], f64::from(u8::from(place.state() == State::Up)))),
        )?;
        families.gauges(
            "pool_up",
            "Whether a backend of the pool is known to be up: without one its listeners cannot be served",
            self.observed
                .config
                .pools
                .iter()
                .map(|pool| ([("pool", pool.name.as_str())], f64::from(u8::from(self.observed.is_up(pool))))),
        )?;
        families.counters(
            "backend_health_checks",
            "Health checks, by result",
            places().flat_map(|(name, place)| {
                CheckResult::ALL
                    .into_iter()
                    .map(move |result| ([("backend", name), ("result", result.label())], place.checks(result)))
            }),
        )?;
        families.counters(
            "backend_health_changes",
            "How often the backend came up or went down, as its health checks have it",
            places().flat_map(|(name, place)| {
                [State::Up, State::Down]
                    .into_iter()
                    .map(move |state| ([("backend", name), ("to", state.label())], place.changes(state == State::Up)))
            }),
        )
    }

    fn pools(&self, families: &mut Families<'_>) -> fmt::Result {
        let names = || self.observed.numbers.pools();
        families.counters(
            "pool_retries",
            "Queries sent again on a fresh connection",
            names().map(|(i, name)| ([("pool", name)], self.pool(i, |p| &p.retries))),
        )?;
        families.counters(
            "pool_repeats",
            "Queries sent again, apart from others, as any of those in flight may have brought down their connection",
            names().map(|(i, name)| ([("pool", name)], self.pool(i, |p| &p.repeats))),
        )?;
        families.gauges(
            "pool_distinct_headers",
            "Different PROXY headers that queries needed in the last one to two minutes: an estimate, off by 3 %",
            names().map(|(i, name)| {
                let workers = self.observed.stats.iter().filter_map(|worker| worker.pools.get(i));
                ([("pool", name)], estimate(workers.map(|pool| &pool.headers)))
            }),
        )?;
        families.counters(
            "pool_acquire",
            "How queries came to a connection",
            names().flat_map(|(i, name)| {
                Acquired::ALL.into_iter().map(move |result| {
                    let labels = [("pool", name), ("result", result.label())];
                    (labels, self.pool(i, |p| &p.acquired[result as usize]))
                })
            }),
        )?;
        families.histograms(
            "query_duration_seconds",
            "From the arrival of a query to its backend's answer",
            names().map(|(i, name)| {
                let counts = (0..=LATENCY_BOUNDS.len()).map(|bucket| self.pool(i, |p| &p.latency.buckets[bucket]));
                let sum = self.pool(i, |p| &p.latency.sum);
                ([("pool", name)], Durations::new(&LATENCY_BOUNDS, counts, sum))
            }),
        )
    }
}
