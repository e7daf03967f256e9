//! The defaults of every key, in one place. A key that is not in the file has the value that it has here.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use super::{
    AcceptProxy, Admin, Backend, Class, Connections, Health, HealthMode, Kernel, Listener, ListenerTls, Network,
    OnFailure, OneShotClose, Overload, Policy, Pool, ProxyProtocol, ReapMode, Server, View, Watchdog,
};
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::seal::Seal;
use crate::proxy_protocol::template::TlvSet;

/// Prefix length of a client network under `identity = "subnet"`, IPv4.
pub const SUBNET_V4: u8 = 24;

/// Prefix length of a client network under `identity = "subnet"`, IPv6.
pub const SUBNET_V6: u8 = 56;

/// The longest PROXY header that PowerDNS Recursor and dnsdist take by their own defaults, bytes.
pub const MAX_HEADER: usize = 512;

/// The longest PROXY header that is accepted: what fits the least IPv4 datagram of 576 bytes without its 40 bytes of IP
/// and TCP (section 2.2 of the specification), bytes.
pub const MAX_INCOMING_HEADER: usize = 536;

/// How long nothing may be heard of a peer before it is asked whether it is still there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);

/// Who may connect: loopback, private (RFC 1918), shared (RFC 6598), link-local (RFC 3927, RFC 4291) and unique local (RFC
/// 4193) networks, the same as dnsdist's default.
const ALLOW_FROM: [&str; 9] = [
    "127.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "192.168.0.0/16",
    "172.16.0.0/12",
    "::1",
    "fc00::/7",
    "fe80::/10",
];

fn allow_from() -> Vec<Network> {
    #[expect(clippy::expect_used, reason = "constants, which a test reads")]
    let network = |text: &str| text.parse().expect("a network");
    ALLOW_FROM.into_iter().map(network).collect()
}

/// What a health check asks for.
const CHECK_NAME: &str = "a.root-servers.net.";

/// One worker per core, as many as the process may use when it is first asked. What it may use can change while it runs, by
/// its cgroup or its affinity; a reload of the same file must not take that for another number of workers.
pub(super) fn workers() -> usize {
    static WORKERS: OnceLock<usize> = OnceLock::new();
    *WORKERS.get_or_init(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

impl Default for Server {
    fn default() -> Self {
        Self {
            workers: workers(),
            drain_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            max_connections: 10_000,
            log: "info".to_owned(),
        }
    }
}

impl Default for Overload {
    fn default() -> Self {
        Self {
            threshold: 90,
            idle_timeout: Duration::from_millis(500),
            max_connection_duration: Duration::from_secs(5),
        }
    }
}

impl Listener {
    /// The default of `ban_duration`.
    pub const DEFAULT_BAN: Duration = Duration::from_secs(10);

    /// A listener with defaults, which sends its queries to the pool of this index. It refuses nothing: what it refuses by
    /// default depends on the pool ([`Refusable::default_for`](super::Refusable::default_for)).
    pub fn new(name: &str, address: SocketAddr, pool: usize) -> Self {
        Self {
            name: name.to_owned(),
            address,
            pool,
            max_connections: 0,
            max_connections_per_client: 100,
            client_mask_v4: 32,
            client_mask_v6: 64,
            max_in_flight: 100,
            max_queries_per_connection: 0,
            max_connection_duration: Duration::ZERO,
            idle_timeout: Duration::from_secs(10),
            message_timeout: Duration::from_secs(2),
            write_timeout: Duration::from_secs(5),
            max_pending_answers: 256 << 10,
            connection_rate_per_client: 0,
            ban_duration: Self::DEFAULT_BAN,
            edns_tcp_keepalive: false,
            tcp_keepalive: TCP_KEEPALIVE,
            allow_from: allow_from(),
            refuse: Vec::new(),
            tcp_fast_open: 0,
            accept_proxy: None,
            tls: None,
        }
    }
}

impl Default for ListenerTls {
    /// Without files, which must be given.
    fn default() -> Self {
        Self {
            certificate: PathBuf::new(),
            key: PathBuf::new(),
            identity: None,
            handshake_timeout: Duration::from_secs(5),
            max_handshakes: 1000,
        }
    }
}

impl Default for AcceptProxy {
    /// It trusts nobody: `from` must be given.
    fn default() -> Self {
        Self {
            from: Vec::new(),
            max_header: MAX_INCOMING_HEADER,
            timeout: Duration::from_secs(3),
            max_pending: 1000,
            outside_tls: true,
        }
    }
}

impl Pool {
    /// A pool with defaults, without PROXY header.
    pub fn new(name: &str, backends: Vec<Backend>) -> Self {
        Self {
            name: name.to_owned(),
            policy: Policy::LeastOutstanding,
            query_timeout: Duration::from_secs(5),
            retries: 1,
            on_failure: OnFailure::Servfail,
            proxy_protocol: None,
            backends,
        }
    }
}

impl Default for ProxyProtocol {
    fn default() -> Self {
        Self {
            identity: Identity::Connection,
            max_header: MAX_HEADER,
            seal: Seal::default(),
            advertise_tls: false,
            pass_incoming_tlvs: true,
            tlvs: TlvSet::default(),
        }
    }
}

impl Backend {
    /// A backend with defaults.
    pub fn new(name: &str, address: SocketAddr) -> Self {
        Self {
            name: name.to_owned(),
            address,
            weight: 1,
            max_in_flight: 32,
            max_connections: 512,
            connect_timeout: Duration::from_secs(2),
            write_timeout: Duration::from_secs(2),
            source: Vec::new(),
            tcp_fast_open: false,
            one_shot_close: OneShotClose::Reset,
            tls: None,
            health: Health::default(),
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "a constant, which a test reads")]
        let name = CHECK_NAME.parse().expect("a domain name");
        Self {
            mode: HealthMode::Auto,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            name,
            rise: 1,
            fall: 3,
        }
    }
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(30),
            tcp_keepalive: TCP_KEEPALIVE,
            max_age: Duration::from_secs(10 * 60),
            max_idle_per_backend: 64,
            max_owned_per_client: 8,
            max_total: 8192,
            max_opens_per_client: 0,
            max_waiting: 1000,
            max_wait: Duration::from_secs(1),
            spares_per_backend: 0,
            spare_idle_timeout: Duration::from_secs(1),
            cleanup_interval: Duration::from_secs(1),
        }
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Self { view: View::Auto, max_sockets: 65_536 }
    }
}

impl Default for Watchdog {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(1),
            grace: Duration::from_secs(3),
            sweeps: 3,
            crosscheck_interval: Duration::from_secs(60),
            reap: ReapMode::On,
            max_reaps_per_minute: 600,
            classes: Class::ALL.to_vec(),
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            http: Some(SocketAddr::from(([127, 0, 0, 1], 9120))),
            token_file: None,
            socket: Some(PathBuf::from("/run/counterfoil/counterfoil.sock")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    #[test]
    fn the_number_of_workers_stays_what_it_was_at_the_start() {
        let before = Server::default().workers;
        let after = std::thread::spawn(|| {
            let may_use = sched_getaffinity(None).unwrap();
            let mut one = CpuSet::new();
            one.set((0..CpuSet::MAX_CPU).find(|cpu| may_use.is_set(*cpu)).unwrap());
            sched_setaffinity(None, &one).unwrap();
            (std::thread::available_parallelism().unwrap().get(), Server::default().workers)
        });
        assert_eq!(after.join().unwrap(), (1, before));
    }
}
