//! What can run out, and how much of it there is: the gauges that the rules on exhaustion compare.
//!
//! Descriptors are in `process.rs`, a backend's own limit in `traffic.rs`.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::encode::Families;
use crate::clock::{self, Mono};
use crate::config::Backend;
use crate::config::check;
use crate::kernel::ports_in_use;
use crate::proxy_protocol::identity::Identity;
use crate::watchdog::Observed;

/// Ports are not counted more often: the kernel walks its whole table of connections for it.
const COUNTED_FOR: Duration = Duration::from_secs(2);

/// Reads everything when it is scraped.
#[derive(Debug)]
pub(super) struct Limits<'a> {
    pub(super) observed: &'a Observed,
    pub(super) ports: &'a Ports,
}

/// The last count of local ports, kept from one scrape to the next.
#[derive(Debug, Default)]
pub(super) struct Ports(Mutex<Option<Counted>>);

#[derive(Debug)]
struct Counted {
    at: Mono,
    towards: Vec<SocketAddr>,
    /// By backend; none: the kernel did not say.
    ports: Option<Vec<u64>>,
}

impl Limits<'_> {
    pub(super) fn encode(&self, families: &mut Families<'_>) -> fmt::Result {
        families.gauge(
            "client_connections_limit",
            "Client connections allowed",
            self.observed.config.server.max_connections as f64,
        )?;
        self.listeners(families)?;
        let (limit, used) = self.observed.ledger.caps().total();
        families.gauge(
            "total_connections",
            "Backend connections that count towards the total limit: all but a drill's",
            used as f64,
        )?;
        families.gauge("total_connections_limit", "Backend connections allowed in total", limit as f64)?;
        self.ports(families)
    }

    /// What counts on each listener: open connections, those that are pending, and those that are being closed.
    fn listeners(&self, families: &mut Families<'_>) -> fmt::Result {
        let listeners = || {
            let of = |(at, name)| self.observed.clients.on_listener(at).map(|(used, limit)| (name, used, limit));
            self.observed.config.listeners.iter().map(|listener| listener.name.as_str()).enumerate().filter_map(of)
        };
        families.gauges(
            "listener_connections",
            "Connections that count towards the listener's limit and the total: open, pending, or being closed",
            listeners().map(|(name, used, _)| ([("listener", name)], used as f64)),
        )?;
        families.gauges(
            "listener_connections_limit",
            "Client connections allowed on the listener, where it has a limit of its own",
            listeners().filter_map(|(name, _, limit)| Some(([("listener", name)], limit? as f64))),
        )
    }

    /// Each configured backend, with the number of source addresses that its connections come from.
    fn backends(&self) -> impl Iterator<Item = (&Backend, usize)> {
        self.observed.config.pools.iter().flat_map(|pool| {
            let forwarder = pool.proxy_protocol.as_ref().is_some_and(|proxy| proxy.identity == Identity::Forwarder);
            pool.backends.iter().map(move |backend| {
                // The forwarder's header names one source.
                (backend, if forwarder { 1 } else { backend.source.len().max(1) })
            })
        })
    }

    fn ports(&self, families: &mut Families<'_>) -> fmt::Result {
        if let Some(used) = self.used_ports() {
            families.gauges(
                "backend_ports",
                "Local ports in use towards the backend's address, TIME_WAIT included, by any process of this network \
                 namespace",
                self.backends()
                    .zip(used)
                    .map(|((backend, _), used)| ([("backend", backend.name.as_str())], used as f64)),
            )?;
        }
        let Some(range) = check::Limits::read().ports else { return Ok(()) };
        families.gauges(
            "backend_ports_limit",
            "Local ports that connections to the backend can come from, all source addresses together",
            self.backends()
                .map(|(backend, sources)| ([("backend", backend.name.as_str())], range as f64 * sources as f64)),
        )
    }

    fn used_ports(&self) -> Option<Vec<u64>> {
        let mut counted = self.ports.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::now();
        let peers: Vec<SocketAddr> = self.backends().map(|(backend, _)| backend.address).collect();
        if let Some(counted) = &*counted
            && now.since(counted.at) < COUNTED_FOR
            && counted.towards == peers
        {
            return counted.ports.clone();
        }
        let ports =
            ports_in_use(&peers).inspect_err(|error| tracing::debug!(%error, "local ports are not counted")).ok();
        *counted = Some(Counted { at: now, towards: peers, ports: ports.clone() });
        ports
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use crate::config;
    use crate::watchdog::fixture;

    /// How many source addresses the backend's connections have, with these lines in the pool.
    fn sources(pool: &str) -> Vec<usize> {
        let text = format!(
            "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:0\"\npool = \"p\"\n[[pool]]\nname = \"p\"\n{pool}\n\
             [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:9\"\nsource = [\"127.0.0.2\", \"127.0.0.3\"]\n\
             [[pool.backend]]\nname = \"c\"\naddress = \"127.0.0.1:10\"\n"
        );
        let (observed, _setup, _worker) = fixture::observed(config::from_str("f.toml", &text).unwrap());
        let limits = Limits { observed: &observed, ports: &Ports::default() };
        limits.backends().map(|(_, sources)| sources).collect()
    }

    #[test]
    fn each_source_address_has_the_whole_range() {
        assert_eq!(sources(""), [2, 1]);
        assert_eq!(sources("proxy_protocol.identity = \"address\""), [2, 1]);
        assert_eq!(sources("proxy_protocol.identity = \"forwarder\""), [1, 1], "only the first one is used");
    }
}
