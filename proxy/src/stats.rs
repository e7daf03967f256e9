//! Counters of the data path: one block per worker, written by that worker alone, summed when somebody scrapes.
//!
//! A counter is a load and a store, never a locked instruction: nobody else writes it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::client::handshake::{HandshakeFailure, SessionKind};
use crate::close::{ClientCloseReason, FailReason, TransferEnd};
use crate::distinct::Distinct;
use crate::dns::synth::InfoCode;
use crate::dns::transfer::Request;
use crate::table::Table;

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the owning worker may.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Subtracts; for gauges of the owning worker.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(n), Ordering::Relaxed);
    }

    /// Sets; only the owning worker may, or somebody else while that does not use it.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// Reads; anybody may.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why a client connection was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// `[server] max_connections`
    MaxConnections,
    /// `[[listener]] max_connections`
    PerListener,
    /// `max_connections_per_client`
    PerClient,
    /// `connection_rate_per_client`: the one that was too many.
    ConnectionRate,
    /// From a client that was over that rate.
    Banned,
    /// A client outside of `allow_from`.
    NotAllowed,
    /// The process has no descriptor left.
    Descriptors,
    /// No PROXY header from a peer that must send one.
    ProxyMissing,
    /// A PROXY header that cannot be read or is too long.
    ProxyInvalid,
    /// No whole PROXY header within `accept_proxy.timeout`.
    ProxyTimeout,
    /// Closed before the PROXY header was whole.
    ProxyClosed,
    /// Its place among the PROXY headers that are awaited was given to another: `accept_proxy.max_pending`.
    ProxyEvicted,
    /// A PROXY header as the first octets on a listener that speaks TLS, from a peer whose word is not taken.
    ProxyUntrusted,
    /// Its place among the TLS handshakes was given to another: `[listener.tls] max_handshakes`.
    HandshakeEvicted,
    /// A TLS handshake that did not come to its end.
    TlsHandshake,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::MaxConnections,
        Self::PerListener,
        Self::PerClient,
        Self::ConnectionRate,
        Self::Banned,
        Self::NotAllowed,
        Self::Descriptors,
        Self::ProxyMissing,
        Self::ProxyInvalid,
        Self::ProxyTimeout,
        Self::ProxyClosed,
        Self::ProxyEvicted,
        Self::ProxyUntrusted,
        Self::HandshakeEvicted,
        Self::TlsHandshake,
    ];

    /// The label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::MaxConnections => "max_connections",
            Self::PerListener => "per_listener",
            Self::PerClient => "per_client",
            Self::ConnectionRate => "connection_rate",
            Self::Banned => "banned",
            Self::NotAllowed => "not_allowed",
            Self::Descriptors => "descriptors",
            Self::ProxyMissing => "proxy_missing",
            Self::ProxyInvalid => "proxy_invalid",
            Self::ProxyTimeout => "proxy_timeout",
            Self::ProxyClosed => "proxy_closed",
            Self::ProxyEvicted => "proxy_evicted",
            Self::ProxyUntrusted => "proxy_untrusted",
            Self::HandshakeEvicted => "handshake_evicted",
            Self::TlsHandshake => "tls_handshake",
        }
    }

    /// Whether somebody in front is probably not configured as this listener is, or the other way round.
    pub const fn is_suspicious(self) -> bool {
        matches!(
            self,
            Self::ProxyMissing | Self::ProxyInvalid | Self::ProxyTimeout | Self::ProxyUntrusted | Self::NotAllowed
        )
    }
}

/// What a connection that was accepted waits for before its session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// The PROXY header of a peer that must send one.
    ProxyHeader,
    /// The end of the TLS handshake.
    TlsHandshake,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::ProxyHeader, Self::TlsHandshake];

    /// The label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::ProxyHeader => "proxy_header",
            Self::TlsHandshake => "tls_handshake",
        }
    }
}

/// How a query came to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Acquired {
    /// An open connection was used again.
    Hit,
    /// A connection was opened.
    New,
    /// A connection that was opened in advance.
    Spare,
    /// A connection was opened for this query alone.
    OneShot,
    /// It had to wait at a cap.
    Wait,
    /// It got none.
    Refused,
}

impl Acquired {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Hit, Self::New, Self::Spare, Self::OneShot, Self::Wait, Self::Refused];

    /// The label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::New => "new",
            Self::Spare => "spare",
            Self::OneShot => "one_shot",
            Self::Wait => "wait",
            Self::Refused => "refused",
        }
    }
}

/// The two kinds of zone transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TransferKind {
    /// Full (RFC 5936).
    Axfr,
    /// Incremental (RFC 1995), whichever way it was answered.
    Ixfr,
}

impl TransferKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Axfr, Self::Ixfr];

    /// The label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Axfr => "axfr",
            Self::Ixfr => "ixfr",
        }
    }
}

impl From<Request> for TransferKind {
    fn from(request: Request) -> Self {
        match request {
            Request::Axfr => Self::Axfr,
            Request::Ixfr { .. } => Self::Ixfr,
        }
    }
}

/// Counters of one listener.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Client connections open now.
    pub connections: Counter,
    /// Client connections accepted.
    pub opened: Counter,
    /// Client connections accepted near a limit, with the times of `[overload]`.
    pub restricted: Counter,
    /// By [`ClientCloseReason`].
    pub closed: [Counter; ClientCloseReason::ALL.len()],
    /// By [`Refusal`].
    pub refused: [Counter; Refusal::ALL.len()],
    /// Times that `accept(2)` failed for want of descriptors or memory.
    pub accept_failures: Counter,
    /// Accepted, and no session yet, by [`Stage`].
    pub pending: [Counter; Stage::ALL.len()],
    /// TLS sessions begun, by [`SessionKind::index`].
    pub tls_sessions: [Counter; SessionKind::ALL.len()],
    /// By [`HandshakeFailure`].
    pub tls_failures: [Counter; HandshakeFailure::ALL.len()],
    /// Queries accepted.
    pub queries: Counter,
    /// Queries that a backend answered and whose answer was queued for the client.
    pub answers: Counter,
    /// Queries that got an answer of our own, by [`FailReason`].
    pub failed: [Counter; FailReason::ALL.len()],
    /// Of those the ones that told why, by [`InfoCode::index`].
    pub extended_errors: [Counter; InfoCode::ALL.len()],
    /// Queries whose client left first.
    pub abandoned: Counter,
    /// Messages with QR set, which get no answer.
    pub ignored: Counter,
    /// Queries in flight now.
    pub in_flight: Counter,
    /// Zone transfers that have ended, by [`TransferKind`] and [`TransferEnd`].
    pub transfers: [[Counter; TransferEnd::ALL.len()]; TransferKind::ALL.len()],
    /// Messages of zone transfers passed on.
    pub transfer_messages: Counter,
}

/// Upper bounds of the latency buckets, nanoseconds.
pub const LATENCY_BOUNDS: [u64; 20] = [
    50_000,
    100_000,
    200_000,
    350_000,
    500_000,
    750_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
    2_000_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
];

/// A histogram with one writer.
#[derive(Debug, Default)]
pub struct Latency {
    /// By bucket of [`LATENCY_BOUNDS`]; the last is everything above.
    pub buckets: [Counter; LATENCY_BOUNDS.len() + 1],
    /// Nanoseconds in all.
    pub sum: Counter,
}

impl Latency {
    /// Counts one query.
    pub fn record(&self, taken: Duration) {
        let nanos = crate::clock::nanos(taken);
        let bucket = LATENCY_BOUNDS.partition_point(|bound| *bound < nanos);
        self.buckets[bucket].add(1);
        self.sum.add(nanos);
    }
}

/// Counters of one pool.
#[derive(Debug, Default)]
pub struct PoolStats {
    /// From the arrival of a query to the backend's answer, of a zone transfer to its first message.
    pub latency: Latency,
    /// By [`Acquired`].
    pub acquired: [Counter; Acquired::ALL.len()],
    /// Queries sent again on a fresh connection.
    pub retries: Counter,
    /// Queries sent again, apart from others, because one of those in flight with them may have brought down the connection.
    pub repeats: Counter,
    /// The PROXY headers that queries needed.
    pub headers: Distinct,
    /// Queries under way, as of the last reload or, while there are any, the last clean-up.
    pub under_way: Counter,
}

impl PoolStats {
    /// From zero, for another pool; only while no worker knows this one.
    pub fn reset(&self) {
        self.latency.buckets.iter().chain(&self.acquired).for_each(|counter| counter.set(0));
        self.latency.sum.set(0);
        self.retries.set(0);
        self.repeats.set(0);
        self.headers.reset();
    }
}

/// Counters of one backend.
#[derive(Debug, Default)]
pub struct BackendStats {
    /// Queries written to it.
    pub queries: Counter,
    /// Queries given to a connection that had carried one before.
    pub reused: Counter,
    /// Connections that could not be opened.
    pub connect_failures: Counter,
    /// Connections for which this host had no descriptor, no memory or no port.
    pub shortages: Counter,
    /// Queries that brought down a connection which they had for themselves.
    pub convicted: Counter,
    /// TLS handshakes that were completed, full ones and resumed ones.
    pub handshakes: [Counter; 2],
}

impl BackendStats {
    /// From zero, for another backend; only while no worker has a connection to this one.
    pub fn reset(&self) {
        let Self { queries, reused, connect_failures, shortages, convicted, handshakes } = self;
        [queries, reused, connect_failures, shortages, convicted]
            .into_iter()
            .chain(handshakes)
            .for_each(|counter| counter.set(0));
    }
}

/// The counters of one worker.
#[derive(Debug)]
pub struct WorkerStats {
    /// In the order of the configuration.
    pub listeners: Box<[ListenerStats]>,
    /// By pool number.
    pub pools: Table<PoolStats>,
    /// By backend index.
    pub backends: Table<BackendStats>,
    /// Queries that wait for a connection now.
    pub waiting: Counter,
}

impl WorkerStats {
    /// All zero.
    pub fn new(listeners: usize, pools: usize, backends: usize) -> Self {
        Self {
            listeners: (0..listeners).map(|_| ListenerStats::default()).collect(),
            pools: Table::new(pools),
            backends: Table::new(backends),
            waiting: Counter::default(),
        }
    }
}

/// What goes on now, all workers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Client connections.
    pub clients: u64,
    /// Queries in flight.
    pub queries: u64,
}

impl Tally {
    /// Of these workers.
    pub fn of(workers: &[Arc<WorkerStats>]) -> Self {
        let listeners = || workers.iter().flat_map(|worker| worker.listeners.iter());
        Self {
            clients: listeners().map(|listener| listener.connections.get()).sum(),
            queries: listeners().map(|listener| listener.in_flight.get()).sum(),
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} client connections, {} queries in flight", self.clients, self.queries)
    }
}

/// How often the configuration was read again, and how that went.
#[derive(Debug)]
pub struct Reloads {
    /// It was refused.
    pub failures: AtomicU64,
    /// It was taken.
    pub successes: AtomicU64,
    /// The last one was refused.
    pub refused: AtomicBool,
    /// Unix time, whole seconds, of when the configuration in force was taken.
    pub taken: AtomicU64,
}

impl Reloads {
    /// At the start of the process, whose configuration was taken at this Unix time, seconds.
    pub fn new(started: f64) -> Self {
        let taken = AtomicU64::new(started as u64);
        Self { failures: AtomicU64::new(0), successes: AtomicU64::new(0), refused: AtomicBool::new(false), taken }
    }
}
