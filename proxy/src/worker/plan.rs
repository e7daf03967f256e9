//! The configuration as a worker uses it: flat, with backends numbered over all pools ([`Numbers`]).

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use crate::backend::choose;
use crate::client::session::{Limits, Pace};
use crate::config::network::masked;
use crate::config::{
    AcceptProxy, Backend, BackendTls, Config, Connections, Listener, Network, Numbers, OnFailure, OneShotClose,
    Overload, Policy, Pool, ProxyProtocol,
};
use crate::ledger::BackendIndex;
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::seal::Seal;
use crate::proxy_protocol::template::{Class, TlvSet};
use crate::tcp::ClientSockets;

/// Everything a worker needs to know that changes with the configuration only.
#[derive(Debug)]
pub struct Plan {
    pub(crate) listeners: Vec<ListenerPlan>,
    pub(crate) pools: Vec<PoolPlan>,
    pub(crate) backends: Vec<BackendPlan>,
    pub(crate) connections: Connections,
}

#[derive(Debug)]
pub(crate) struct ListenerPlan {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) pool: u16,
    /// Who may come.
    pub(crate) allow_from: Vec<Network>,
    /// Whose word on the client is taken.
    pub(crate) accept_proxy: Option<Rc<AcceptProxy>>,
    /// What the sockets of its clients are like.
    pub(crate) sockets: ClientSockets,
    mask_v4: u8,
    mask_v6: u8,
    limits: Rc<Limits>,
    restricted: Rc<Limits>,
}

impl ListenerPlan {
    fn new(listener: &Listener, pool: u16, overload: &Overload) -> Self {
        let limits = Limits {
            max_in_flight: listener.max_in_flight,
            max_queries: listener.max_queries_per_connection,
            max_duration: listener.max_connection_duration,
            max_pending_answers: listener.max_pending_answers,
            idle_timeout: listener.idle_timeout,
            message_timeout: listener.message_timeout,
            write_timeout: listener.write_timeout,
            edns_tcp_keepalive: listener.edns_tcp_keepalive,
            refuse: listener.refuse.clone(),
        };
        let max_duration = match (limits.max_duration, overload.max_connection_duration) {
            (Duration::ZERO, max) | (max, Duration::ZERO) => max,
            (one, other) => one.min(other),
        };
        let idle_timeout = limits.idle_timeout.min(overload.idle_timeout);
        Self {
            name: listener.name.clone(),
            address: listener.address,
            pool,
            allow_from: listener.allow_from.clone(),
            accept_proxy: listener.accept_proxy.clone().map(Rc::new),
            sockets: ClientSockets::new(listener),
            mask_v4: listener.client_mask_v4,
            mask_v6: listener.client_mask_v6,
            restricted: Rc::new(Limits { max_duration, idle_timeout, ..limits.clone() }),
            limits: Rc::new(limits),
        }
    }

    /// What counts as one client with this address.
    pub(crate) fn client(&self, address: IpAddr) -> IpAddr {
        masked(address.to_canonical(), self.mask_v4, self.mask_v6)
    }

    pub(crate) fn limits(&self, pace: Pace) -> Rc<Limits> {
        Rc::clone(match pace {
            Pace::Normal => &self.limits,
            Pace::Restricted => &self.restricted,
        })
    }
}

#[derive(Clone, Debug)]
pub(crate) struct PoolPlan {
    pub(crate) query_timeout: Duration,
    pub(crate) retries: u8,
    pub(crate) on_failure: OnFailure,
    pub(crate) policy: Policy,
    pub(crate) proxy: Option<ProxyPlan>,
    /// All but those that are never used.
    pub(crate) backends: Vec<BackendIndex>,
}

#[derive(Clone, Debug)]
pub(crate) struct ProxyPlan {
    pub(crate) identity: Identity,
    pub(crate) tlvs: TlvSet,
    pub(crate) max_header: usize,
    /// What each connection's header gets beside what decides who shares it.
    pub(crate) seal: Seal,
    /// TLVs say what the client agreed on that came over TLS.
    pub(crate) advertise_tls: bool,
    /// TLVs of the client's own header are passed on.
    pub(crate) pass_incoming: bool,
    /// The connection ends with the client's.
    pub(crate) owned: bool,
    /// The header differs per query: it is rendered for each.
    pub(crate) per_query: bool,
    /// The header can never be used again.
    pub(crate) unique: bool,
    /// The header names the forwarder's own side, which differs between backends.
    pub(crate) per_backend: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct BackendPlan {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) weight: u32,
    /// Digest of the name.
    pub(crate) digest: u64,
    pub(crate) max_in_flight: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) write_timeout: Duration,
    pub(crate) source: Vec<SocketAddr>,
    pub(crate) tcp_fast_open: bool,
    pub(crate) one_shot_close: OneShotClose,
    /// Queries go over TLS only.
    pub(crate) tls: Option<Rc<BackendTls>>,
    /// This host's address on the way to the backend, for `identity = "forwarder"`; nowhere for the others.
    pub(crate) own_side: SocketAddr,
    /// What its pool's headers say.
    pub(crate) header: Option<ProxyProtocol>,
    /// Queries may go to it.
    pub(crate) in_use: bool,
}

impl Plan {
    /// Flattens the configuration. `own_side` finds this host's address on the way to a backend.
    pub fn new(config: &Config, own_side: impl Fn(SocketAddr, &[SocketAddr]) -> SocketAddr) -> Self {
        Self::build(config, &Numbers::new(config), &[], &[], own_side)
    }

    /// The plan after a reload. What the configuration has no more keeps its place, for connections and queries that are
    /// under way, and gets no new ones.
    pub fn next(
        &self,
        config: &Config,
        numbers: &Numbers,
        own_side: impl Fn(SocketAddr, &[SocketAddr]) -> SocketAddr,
    ) -> Self {
        Self::build(config, numbers, &self.pools, &self.backends, own_side)
    }

    fn build(
        config: &Config,
        numbers: &Numbers,
        old_pools: &[PoolPlan],
        old_backends: &[BackendPlan],
        own_side: impl Fn(SocketAddr, &[SocketAddr]) -> SocketAddr,
    ) -> Self {
        let mut pools: Vec<PoolPlan> = old_pools.iter().map(PoolPlan::without_backends).collect();
        pools.resize_with(numbers.pool_count(), PoolPlan::default);
        let kept = |(at, old): (usize, &BackendPlan)| {
            // Nothing is under way where nobody is.
            if numbers.is_vacant(at) { BackendPlan::default() } else { old.unused() }
        };
        let mut backends: Vec<BackendPlan> = old_backends.iter().enumerate().map(kept).collect();
        backends.resize_with(numbers.backends(), BackendPlan::default);
        for pool in &config.pools {
            let mut of_pool = Vec::new();
            for backend in &pool.backends {
                // All names of the configuration have numbers.
                let Some(index) = numbers.backend(&backend.name) else { continue };
                let in_use = backend.health.mode != crate::config::HealthMode::Down;
                if in_use {
                    of_pool.push(index);
                }
                if let Some(plan) = backends.get_mut(usize::from(index)) {
                    *plan = BackendPlan { in_use, ..BackendPlan::new(pool, backend, &own_side) };
                }
            }
            if let Some(plan) = numbers.pool(&pool.name).and_then(|index| pools.get_mut(usize::from(index))) {
                *plan = PoolPlan {
                    query_timeout: pool.query_timeout,
                    retries: pool.retries,
                    on_failure: pool.on_failure,
                    policy: pool.policy,
                    proxy: pool.proxy_protocol.as_ref().map(ProxyPlan::new),
                    backends: of_pool,
                };
            }
        }
        let listener = |listener: &Listener| {
            let pool = config.pools.get(listener.pool).and_then(|pool| numbers.pool(&pool.name));
            ListenerPlan::new(listener, pool.unwrap_or(u16::MAX), &config.overload)
        };
        let listeners = config.listeners.iter().map(listener).collect();
        Self { listeners, pools, backends, connections: config.connections.clone() }
    }
}

impl PoolPlan {
    fn without_backends(&self) -> Self {
        Self { backends: Vec::new(), ..self.clone() }
    }
}

impl ProxyPlan {
    fn new(proxy: &ProxyProtocol) -> Self {
        let class = proxy.tlvs.class();
        Self {
            identity: proxy.identity,
            tlvs: proxy.tlvs.clone(),
            // The rest is the seal's.
            max_header: proxy.max_header.saturating_sub(proxy.seal.len()),
            seal: proxy.seal,
            advertise_tls: proxy.advertise_tls,
            pass_incoming: proxy.pass_incoming_tlvs,
            owned: proxy.identity.is_per_connection() || proxy.tlvs.is_per_connection(),
            per_query: class >= Class::PerQuery,
            unique: class == Class::Unique,
            per_backend: proxy.identity == Identity::Forwarder,
        }
    }
}

impl BackendPlan {
    fn new(pool: &Pool, backend: &Backend, own_side: impl Fn(SocketAddr, &[SocketAddr]) -> SocketAddr) -> Self {
        let forwarder = pool.proxy_protocol.as_ref().is_some_and(|proxy| proxy.identity == Identity::Forwarder);
        Self {
            name: backend.name.clone(),
            address: backend.address,
            weight: backend.weight,
            digest: choose::digest(backend.name.as_bytes()),
            max_in_flight: backend.max_in_flight,
            connect_timeout: backend.connect_timeout,
            write_timeout: backend.write_timeout,
            // The header names the source of the connection, so it must be the same for all that share it.
            source: if forwarder { backend.source.iter().copied().take(1).collect() } else { backend.source.clone() },
            tcp_fast_open: backend.tcp_fast_open,
            one_shot_close: backend.one_shot_close,
            tls: backend.tls.clone().map(Rc::new),
            // To ask takes system calls, which for thousands of backends would hold the worker up.
            own_side: if forwarder { own_side(backend.address, &backend.source) } else { nowhere() },
            header: pool.proxy_protocol.clone(),
            in_use: true,
        }
    }

    fn unused(&self) -> Self {
        Self { in_use: false, ..self.clone() }
    }

    /// Whether a connection that was opened by the other plan is what this one would open.
    pub(crate) fn opens_like(&self, other: &Self) -> bool {
        self.in_use
            && other.in_use
            && (self.address, &self.source, self.own_side) == (other.address, &other.source, other.own_side)
            && self.header == other.header
            && self.tls == other.tls
    }

    /// Whether the PROXY header goes before a TLS handshake.
    pub(crate) fn header_in_clear(&self) -> bool {
        self.header.is_some() && self.tls.as_ref().is_some_and(|tls| tls.proxy_outside_tls)
    }
}

impl Default for PoolPlan {
    /// One that is in no use.
    fn default() -> Self {
        Self {
            query_timeout: Duration::from_secs(5),
            retries: 0,
            on_failure: OnFailure::default(),
            policy: Policy::default(),
            proxy: None,
            backends: Vec::new(),
        }
    }
}

fn nowhere() -> SocketAddr {
    SocketAddr::new(IpAddr::from([0; 4]), 0)
}

impl Default for BackendPlan {
    /// One that no pool has, such as the drill's peer.
    fn default() -> Self {
        Self {
            name: String::new(),
            address: nowhere(),
            weight: 1,
            digest: 0,
            max_in_flight: 1,
            connect_timeout: Duration::ZERO,
            write_timeout: Duration::ZERO,
            source: Vec::new(),
            tcp_fast_open: false,
            one_shot_close: OneShotClose::default(),
            tls: None,
            own_side: nowhere(),
            header: None,
            in_use: false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::cell::RefCell;

    use super::*;
    use crate::clock::Mono;
    use crate::config;

    fn configuration(identity: &str, name: &str) -> Config {
        let header = format!("[pool.proxy_protocol]\nidentity = \"{identity}\"\n");
        let text = format!(
            "[[listener]]\nname = \"l\"\naddress = \"127.0.0.1:0\"\npool = \"p\"\n[[pool]]\nname = \"p\"\n{header}\
             [[pool.backend]]\nname = \"{name}\"\naddress = \"127.0.0.1:53\"\n"
        );
        config::from_str("test", &text).unwrap()
    }

    /// A worker takes a configuration between two queries.
    #[test]
    fn the_routing_table_is_asked_only_for_headers_that_name_this_host() {
        let asked = RefCell::new(Vec::new());
        let own_side = |backend, _: &[SocketAddr]| {
            asked.borrow_mut().push(backend);
            backend
        };
        for (identity, times) in [("connection", 0), ("address", 0), ("subnet", 0), ("forwarder", 1)] {
            Plan::new(&configuration(identity, "a"), own_side);
            assert_eq!(asked.take().len(), times, "{identity}");
        }
    }

    /// However many names there were, a plan is no longer than the numbers in use.
    #[test]
    fn a_plan_forgets_what_the_numbers_forget() {
        let own_side = |backend, _: &[SocketAddr]| backend;
        let first = configuration("address", "a");
        let (plan, numbers) = (Plan::new(&first, own_side), Numbers::new(&first));
        let second = configuration("address", "b");
        let kept = numbers.with(&second, Mono::ZERO).unwrap();
        let plan = plan.next(&second, &kept, own_side);
        assert_eq!((plan.backends[0].name.as_str(), plan.backends[0].in_use), ("a", false));
        let forgotten = kept.without(kept.due(Mono::MAX));
        let plan = plan.next(&second, &forgotten, own_side);
        assert_eq!((plan.backends[0].name.as_str(), plan.backends[2].name.as_str()), ("", "b"));
        let third = configuration("address", "c");
        let numbers = forgotten.with(&third, Mono::ZERO).unwrap();
        let plan = plan.next(&third, &numbers, own_side);
        assert_eq!((plan.backends[0].name.as_str(), plan.backends.len()), ("c", 3), "1 is the drill's");
    }
}
