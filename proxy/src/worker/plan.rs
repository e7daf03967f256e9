//! The configuration as a worker uses it: flat, with backends numbered over all pools.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use crate::backend::choose;
use crate::client::session::{Limits, Pace};
use crate::config::{Config, Connections, Listener, OnFailure, OneShotClose, Overload, Policy};
use crate::ledger::BackendIndex;
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::template::{Class, TlvSet};

/// Everything a worker needs to know that never changes.
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
    limits: Rc<Limits>,
    restricted: Rc<Limits>,
}

impl ListenerPlan {
    fn new(listener: &Listener, overload: &Overload) -> Self {
        let limits = Limits {
            max_in_flight: listener.max_in_flight,
            max_queries: listener.max_queries_per_connection,
            max_duration: listener.max_connection_duration,
            max_pending_answers: listener.max_pending_answers,
            idle_timeout: listener.idle_timeout,
            message_timeout: listener.message_timeout,
            write_timeout: listener.write_timeout,
        };
        let max_duration = match (limits.max_duration, overload.max_connection_duration) {
            (Duration::ZERO, max) | (max, Duration::ZERO) => max,
            (one, other) => one.min(other),
        };
        let idle_timeout = limits.idle_timeout.min(overload.idle_timeout);
        Self {
            name: listener.name.clone(),
            address: listener.address,
            pool: u16::try_from(listener.pool).unwrap_or(u16::MAX),
            restricted: Rc::new(Limits { max_duration, idle_timeout, ..limits.clone() }),
            limits: Rc::new(limits),
        }
    }

    pub(crate) fn limits(&self, pace: Pace) -> Rc<Limits> {
        Rc::clone(match pace {
            Pace::Normal => &self.limits,
            Pace::Restricted => &self.restricted,
        })
    }
}

#[derive(Debug)]
pub(crate) struct PoolPlan {
    pub(crate) query_timeout: Duration,
    pub(crate) retries: u8,
    pub(crate) on_failure: OnFailure,
    pub(crate) policy: Policy,
    pub(crate) proxy: Option<ProxyPlan>,
    /// All but those that are never used.
    pub(crate) backends: Vec<BackendIndex>,
}

#[derive(Debug)]
pub(crate) struct ProxyPlan {
    pub(crate) identity: Identity,
    pub(crate) tlvs: TlvSet,
    pub(crate) max_header: usize,
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

#[derive(Debug)]
pub(crate) struct BackendPlan {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) weight: u32,
    /// Digest of the name.
    pub(crate) digest: u64,
    pub(crate) max_in_flight: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) write_timeout: Duration,
    pub(crate) source: Vec<IpAddr>,
    pub(crate) one_shot_close: OneShotClose,
    /// This host's address on the way to the backend, for `identity = "forwarder"`.
    pub(crate) own_side: SocketAddr,
}

impl Plan {
    /// Flattens the configuration. `own_side` finds this host's address on the way to a backend.
    pub fn new(config: &Config, own_side: impl Fn(SocketAddr, &[IpAddr]) -> SocketAddr) -> Self {
        let mut backends = Vec::new();
        let mut pools = Vec::new();
        for pool in &config.pools {
            let mut of_pool = Vec::new();
            for backend in &pool.backends {
                // The configuration allows at most 65,534 backends.
                let index = BackendIndex::try_from(backends.len()).unwrap_or(BackendIndex::MAX);
                if backend.health.mode != crate::config::HealthMode::Down {
                    of_pool.push(index);
                }
                let forwarder = pool.proxy_protocol.as_ref().is_some_and(|proxy| proxy.identity == Identity::Forwarder);
                backends.push(BackendPlan {
                    name: backend.name.clone(),
                    address: backend.address,
                    weight: backend.weight,
                    digest: choose::digest(backend.name.as_bytes()),
                    max_in_flight: backend.max_in_flight,
                    connect_timeout: backend.connect_timeout,
                    write_timeout: backend.write_timeout,
                    // The header names the source of the connection, so it must be the same for all that share it.
                    source: if forwarder {
                        backend.source.iter().copied().take(1).collect()
                    } else {
                        backend.source.clone()
                    },
                    one_shot_close: backend.one_shot_close,
                    own_side: own_side(backend.address, &backend.source),
                });
            }
            let proxy = pool.proxy_protocol.as_ref().map(|proxy| {
                let class = proxy.tlvs.class();
                ProxyPlan {
                    identity: proxy.identity,
                    tlvs: proxy.tlvs.clone(),
                    max_header: proxy.max_header,
                    pass_incoming: proxy.pass_incoming_tlvs,
                    owned: proxy.identity.is_per_connection() || proxy.tlvs.is_per_connection(),
                    per_query: class >= Class::PerQuery,
                    unique: class == Class::Unique,
                    per_backend: proxy.identity == Identity::Forwarder,
                }
            });
            pools.push(PoolPlan {
                query_timeout: pool.query_timeout,
                retries: pool.retries,
                on_failure: pool.on_failure,
                policy: pool.policy,
                proxy,
                backends: of_pool,
            });
        }
        let listeners = config.listeners.iter().map(|listener| ListenerPlan::new(listener, &config.overload)).collect();
        Self { listeners, pools, backends, connections: config.connections.clone() }
    }
}
