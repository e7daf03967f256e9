//! The configuration as the program uses it: parsed, checked, with every default filled in.
//!
//! [`load`] and [`from_str`] read it. The text is walked twice: [`schema`] knows every key of the format and refuses
//! what is unknown or not supported yet; then the sections are read, each key with its range and its default from
//! [`defaults`]. Every problem is collected with its place and key, so that one run reports all of them.

pub mod check;
pub mod choices;
pub mod defaults;
pub(crate) mod effort;
pub mod error;
mod files;
pub mod forecast;
mod listeners;
pub mod network;
pub mod numbers;
mod parse;
mod pools;
pub mod print;
pub mod refuse;
pub mod schema;
mod section;
mod source;
pub mod text;
pub mod units;

#[cfg(test)]
mod backend_tls_tests;
#[cfg(test)]
mod contract_tests;
#[cfg(test)]
mod error_tests;
#[cfg(test)]
mod growth_tests;
#[cfg(test)]
mod listener_tls_tests;
#[cfg(test)]
mod random_tests;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use rustls::pki_types::ServerName;

use crate::backend::tls::Trust;
use crate::dns::name::DomainName;
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::seal::Seal;
use crate::proxy_protocol::template::TlvSet;
use crate::tls::server;

pub use error::{ConfigError, ConfigErrors};
pub use network::Network;
pub use numbers::{Numbered, Numbers};
pub use parse::{from_str, load};
pub use refuse::Refusable;
pub use text::{Place, Text};

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `[server]`
    pub server: Server,
    /// `[overload]`
    pub overload: Overload,
    /// `[[listener]]`, at least one.
    pub listeners: Vec<Listener>,
    /// `[[pool]]`, at least one.
    pub pools: Vec<Pool>,
    /// `[connections]`
    pub connections: Connections,
    /// `[kernel]`
    pub kernel: Kernel,
    /// `[watchdog]`
    pub watchdog: Watchdog,
    /// `[admin]`
    pub admin: Admin,
}

impl Config {
    /// The sessions that were had with backends which are as they were in `old` are remembered.
    pub fn keep_sessions_of(&mut self, old: &Self) {
        let same =
            |new: &Backend, old: &Backend| (&new.name, new.address, &new.tls) == (&old.name, old.address, &old.tls);
        let before = old.pools.iter().flat_map(|pool| &pool.backends);
        let before: HashMap<&str, &Backend> = before.map(|backend| (backend.name.as_str(), backend)).collect();
        for backend in self.pools.iter_mut().flat_map(|pool| &mut pool.backends) {
            if let Some(before) = before.get(backend.name.as_str()).filter(|before| same(backend, before)) {
                backend.tls.clone_from(&before.tls);
            }
        }
    }

    /// The listeners of each pool, by the index of the pool.
    pub(crate) fn by_pool(&self) -> Vec<Vec<&Listener>> {
        group_by_pool(&self.listeners, self.pools.len())
    }
}

fn group_by_pool(listeners: &[Listener], pools: usize) -> Vec<Vec<&Listener>> {
    let mut by_pool = vec![Vec::new(); pools];
    effort::spend(pools + listeners.len());
    for listener in listeners {
        if let Some(of_pool) = by_pool.get_mut(listener.pool) {
            of_pool.push(listener);
        }
    }
    by_pool
}

/// `[server]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Worker threads; 0 in the file means one per core and is resolved here.
    pub workers: usize,
    /// How long SIGTERM waits for what is in flight.
    pub drain_timeout: Duration,
    /// Before draining, not ready but serving, so that a load balancer has the time to notice.
    pub drain_delay: Duration,
    /// Client connections in total.
    pub max_connections: usize,
    /// Log filter, such as `info,counterfoil::watchdog=debug`.
    pub log: String,
}

/// `[overload]`: for client connections that are accepted near a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overload {
    /// Percent of any connection limit from which on they are restricted; 100: never.
    pub threshold: u8,
    /// Between queries, if the listener's is not shorter.
    pub idle_timeout: Duration,
    /// From beginning to end, if the listener's is not shorter; zero: no limit.
    pub max_connection_duration: Duration,
}

/// `[[listener]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Unique name: label in metrics and `{listener}` in TLVs.
    pub name: String,
    /// Where it listens; port 0 lets the kernel choose.
    pub address: SocketAddr,
    /// Index into [`Config::pools`].
    pub pool: usize,
    /// Client connections on it, 0: no limit of its own.
    pub max_connections: usize,
    /// Connections per client.
    pub max_connections_per_client: usize,
    /// Prefix length of what counts as one client, IPv4.
    pub client_mask_v4: u8,
    /// Prefix length of what counts as one client, IPv6.
    pub client_mask_v6: u8,
    /// Queries in flight on one client connection; more are not read yet.
    pub max_in_flight: usize,
    /// Messages on one client connection, 0: no limit.
    pub max_queries_per_connection: u32,
    /// From beginning to end of a client connection, zero: no limit.
    pub max_connection_duration: Duration,
    /// Between queries; reset by whole messages only (RFC 7766 section 6.2.3).
    pub idle_timeout: Duration,
    /// From the first byte of a message to its last.
    pub message_timeout: Duration,
    /// For a client that does not read.
    pub write_timeout: Duration,
    /// Answers kept for a client that does not read, bytes: above, its queries are not read.
    pub max_pending_answers: usize,
    /// New connections per second, 0: no limit.
    pub connection_rate_per_client: u32,
    /// For a client over that rate.
    pub ban_duration: Duration,
    /// Clients that ask by edns-tcp-keepalive (RFC 7828) are told the idle timeout.
    pub edns_tcp_keepalive: bool,
    /// A client of which nothing is heard for so long is probed, and given up after half as long again; zero: never.
    pub tcp_keepalive: Duration,
    /// Who may connect: clients, or the peers that speak for nobody else.
    pub allow_from: Vec<Network>,
    /// What is not forwarded.
    pub refuse: Vec<Refusable>,
    /// Connections at once that have sent data with their SYN (RFC 7413) and whose handshake is not over, 0: no data are
    /// taken from a SYN.
    pub tcp_fast_open: u32,
    /// `[listener.accept_proxy]`; none: nobody speaks for a client.
    pub accept_proxy: Option<AcceptProxy>,
    /// `[listener.tls]`; none: in the clear.
    pub tls: Option<ListenerTls>,
}

/// `[listener.tls]`: DNS over TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerTls {
    /// A file in PEM with its certificate, and those between it and an authority.
    pub certificate: PathBuf,
    /// A file in PEM with the key of the certificate.
    pub key: PathBuf,
    /// What is in these files; none while no files were read ([`from_str`]).
    pub identity: Option<server::Identity>,
    /// From the connection, or the PROXY header in front, to the end of the handshake.
    pub handshake_timeout: Duration,
    /// Handshakes at a time, on this listener.
    pub max_handshakes: usize,
}

/// `[listener.accept_proxy]`: PROXY v1 and v2 in front of the listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptProxy {
    /// From these peers a header is required, from all others it is refused.
    pub from: Vec<Network>,
    /// A longer header is refused, bytes.
    pub max_header: usize,
    /// From `accept(2)` to the last byte of the header; inside TLS, from the end of the handshake.
    pub timeout: Duration,
    /// Connections at a time whose header has not come, on this listener.
    pub max_pending: usize,
    /// On a listener with TLS the header comes before the handshake, or else as the first octets inside.
    pub outside_tls: bool,
}

impl AcceptProxy {
    /// Whether this peer speaks for others.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.from.iter().any(|network| network.contains(peer))
    }
}

/// `[[pool]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Unique name.
    pub name: String,
    /// Which backend a query goes to.
    pub policy: Policy,
    /// From the arrival of a query to its SERVFAIL; covers waiting, connecting and the retry.
    pub query_timeout: Duration,
    /// On a fresh connection, before any byte of an answer.
    pub retries: u8,
    /// What a client gets for a query that no backend answered.
    pub on_failure: OnFailure,
    /// `[pool.proxy_protocol]`; none: no header, connections are shared.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// `[[pool.backend]]`, at least one.
    pub backends: Vec<Backend>,
}

/// `[pool.proxy_protocol]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// Whose address the header carries.
    pub identity: Identity,
    /// A longer header is an error, bytes.
    pub max_header: usize,
    /// `crc32c` and `unique_id`: what each connection's header gets.
    pub seal: Seal,
    /// Headers say that the client came over TLS, and what it agreed on (SSL, ALPN, AUTHORITY).
    pub advertise_tls: bool,
    /// TLVs of the client's own header come before those below.
    pub pass_incoming_tlvs: bool,
    /// `[[pool.proxy_protocol.tlv]]`, in the order of the file.
    pub tlvs: TlvSet,
}

/// `[[pool.backend]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Unique name over all pools: label in metrics.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its share of the queries, compared with those of the others, where the policy has shares.
    pub weight: u32,
    /// Queries in flight on one connection.
    pub max_in_flight: usize,
    /// Connections of all kinds together.
    pub max_connections: usize,
    /// For `connect(2)`.
    pub connect_timeout: Duration,
    /// For a backend that does not read.
    pub write_timeout: Duration,
    /// Local addresses, used in turn, all with port 0.
    pub source: Vec<SocketAddr>,
    /// Questions go with the SYN where the kernel has a cookie (RFC 7413).
    pub tcp_fast_open: bool,
    /// How a one-shot connection is closed.
    pub one_shot_close: OneShotClose,
    /// `[pool.backend.tls]`; none: queries are sent in clear.
    pub tls: Option<BackendTls>,
    /// `[pool.backend.health]`
    pub health: Health,
}

/// `[pool.backend.tls]`: DNS over TLS (RFC 7858), the backend authenticated or no query sent (RFC 8310 section 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendTls {
    /// What the backend's certificate must be valid for; also sent as SNI, unless it is an address.
    pub server_name: ServerName<'static>,
    /// Who may have issued it, as PEM; none: the system's trust store.
    pub ca: Option<PathBuf>,
    /// The PROXY header goes before the handshake, in clear; else it is the first that TLS carries.
    pub proxy_outside_tls: bool,
    /// What is in that file. Nobody is trusted while no files were read ([`from_str`]).
    pub trust: Trust,
}

/// `[[pool]] policy`: which backend a query goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// The one with the fewest queries that it has not answered, by weight; of equals each in turn.
    #[default]
    LeastOutstanding,
    /// Each in turn, as often as its weight says.
    RoundRobin,
    /// Any, with a probability by weight.
    WeightedRandom,
    /// The one that the name in the question falls to, by weight.
    ConsistentHash,
    /// The first in the file that is up.
    FirstAvailable,
}

/// `[[pool]] on_failure`: what a client gets for a query that no backend answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// SERVFAIL.
    #[default]
    Servfail,
    /// The end of its connection, with all that is in flight on it.
    Close,
}

/// `one_shot_close`: who keeps TIME_WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OneShotClose {
    /// `SO_LINGER` 0: no TIME_WAIT on either side.
    #[default]
    Reset,
    /// An orderly close: TIME_WAIT on our side.
    Fin,
}

/// `[pool.backend.health]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether and when it is checked.
    pub mode: HealthMode,
    /// From the begin of one check to that of the next.
    pub interval: Duration,
    /// From the begin of a check to its answer.
    pub timeout: Duration,
    /// The name that is asked for, type A.
    pub name: DomainName,
    /// Checks in a row that must pass for a backend to come up.
    pub rise: u32,
    /// Checks in a row that must fail for it to go down; under `lazy` also the queries that must fail before the first.
    pub fall: u32,
}

/// `[pool.backend.health] mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HealthMode {
    /// Checked all the time.
    #[default]
    Auto,
    /// Checked after queries failed, until it passes.
    Lazy,
    /// Always used.
    Up,
    /// Never used.
    Down,
}

/// `[connections]`: towards backends, all kinds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Closed after this long with nothing in flight.
    pub idle_timeout: Duration,
    /// A backend of which nothing is heard for so long is probed, and given up after half as long again; zero: never.
    pub tcp_keepalive: Duration,
    /// Closed when next idle, spread by 10 %.
    pub max_age: Duration,
    /// Shared and keyed connections kept idle per backend.
    pub max_idle_per_backend: usize,
    /// Per client connection.
    pub max_owned_per_client: usize,
    /// All backends together.
    pub max_total: usize,
    /// New backend connections per second for one client address, 0: no limit.
    pub max_opens_per_client: u32,
    /// Queries that wait at a backend's or the total cap.
    pub max_waiting: usize,
    /// At such a cap.
    pub max_wait: Duration,
    /// Connections kept ready per backend, for each worker; nothing was sent on them.
    pub spares_per_backend: usize,
    /// They are closed after this long unused.
    pub spare_idle_timeout: Duration,
    /// How often the clean-up walks all connections.
    pub cleanup_interval: Duration,
}

/// `[kernel]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Which view.
    pub view: View,
    /// Size of the kernel map, sockets.
    pub max_sockets: u32,
}

/// `[kernel] view`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum View {
    /// eBPF if it can be had, else `sock_diag`.
    #[default]
    Auto,
    /// eBPF or an error.
    Ebpf,
    /// `sock_diag` with `/proc/self/fd`.
    SockDiag,
    /// No view: the watchdog reports that it is blind.
    None,
}

/// `[watchdog]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watchdog {
    /// Between sweeps.
    pub interval: Duration,
    /// How long a condition must hold before it is a finding.
    pub grace: Duration,
    /// In how many consecutive sweeps.
    pub sweeps: u32,
    /// eBPF against `sock_diag`.
    pub crosscheck_interval: Duration,
    /// What is done about findings.
    pub reap: ReapMode,
    /// Rate cap of the reaper.
    pub max_reaps_per_minute: u32,
    /// Classes that are acted on; all are reported.
    pub classes: Vec<Class>,
}

/// `[watchdog] reap`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ReapMode {
    /// Findings are reported only.
    Off,
    /// What would be done is logged and counted.
    DryRun,
    /// Findings are acted on.
    #[default]
    On,
}

/// The classes of findings, section 5 of the design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Class {
    /// The kernel holds it for this process, the ledger never heard of it.
    Orphan,
    /// A ledger entry without a kernel socket.
    Ghost,
    /// The peer has closed, we still hold it.
    Zombie,
    /// Established, and no byte for longer than the idle timeout allows.
    Hoard,
    /// Queries in flight, no byte for longer than every timeout.
    Stuck,
    /// SYN_SENT longer than the connect timeout.
    Embryo,
    /// Held in FIN_WAIT2 or CLOSING.
    Lingering,
}

impl Class {
    /// All classes.
    pub const ALL: [Self; 7] =
        [Self::Orphan, Self::Ghost, Self::Zombie, Self::Hoard, Self::Stuck, Self::Embryo, Self::Lingering];

    /// The name in configuration, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Orphan => "orphan",
            Self::Ghost => "ghost",
            Self::Zombie => "zombie",
            Self::Hoard => "hoard",
            Self::Stuck => "stuck",
            Self::Embryo => "embryo",
            Self::Lingering => "lingering",
        }
    }
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// `/metrics`, `/healthz`, `/readyz`, the status page and `/api/v1/`; none: off.
    pub http: Option<SocketAddr>,
    /// A file with the token of those who may change something over HTTP; none: nobody may.
    pub token_file: Option<PathBuf>,
    /// Unix socket of `ctl` and `drill`; none: off.
    pub socket: Option<PathBuf>,
}
