//! What a configuration will need: connections, descriptors, ports. `check-config` prints it behind the configuration.

use super::check::{Limits, TIME_WAIT_SECONDS, clients, needed};
use super::{Backend, Config, HealthMode, Listener, OneShotClose, Pool, ProxyProtocol};
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::template::Class;

/// The forecast, line by line.
pub fn lines(config: &Config, limits: Limits) -> Vec<String> {
    let mut lines = Vec::new();
    for (pool, listeners) in config.pools.iter().zip(config.by_pool()) {
        lines.push(format!("pool {:?}: {}", pool.name, sharing(config, pool, &listeners)));
        lines.push(format!("pool {:?}: {}", pool.name, most(config, pool, &listeners)));
        for backend in &pool.backends {
            lines.push(format!("backend {:?}: {}", backend.name, ports(config, pool, backend, limits)));
            lines.extend(places(config, backend).map(|places| format!("backend {:?}: {places}", backend.name)));
        }
    }
    lines.push(descriptors(config, limits));
    lines
}

/// Who shares its connections. `listeners` are the pool's.
fn sharing(config: &Config, pool: &Pool, listeners: &[&Listener]) -> String {
    let Some(proxy) = &pool.proxy_protocol else {
        return "shared connections: every client uses the same ones".to_owned();
    };
    if proxy.tlvs.class() == Class::Unique {
        return "one-shot connections: `{uuid}` differs per query: every query opens a connection".to_owned();
    }
    if is_owned(proxy) {
        return match per_client(config, pool, proxy) {
            1 => "owned connections: one for each client connection, which ends with it".to_owned(),
            most => format!(
                "owned connections: up to {most} for each client connection, one for each different header to each \
                 backend that it keeps to; they end with it"
            ),
        };
    }
    let who = match proxy.identity {
        Identity::Subnet { v4, v6 } => format!("the clients of one network (/{v4}, /{v6})"),
        Identity::Address => "the client connections of one address".to_owned(),
        Identity::Forwarder | Identity::Connection => "all clients".to_owned(),
    };
    let condition = match proxy.tlvs.class() {
        Class::PerQuery => ", for queries whose TLVs are equal",
        Class::PerClient if proxy.identity == Identity::Forwarder => ", where their TLVs are equal",
        _ => "",
    };
    let tls = if proxy.advertise_tls && listeners.iter().any(|listener| listener.tls.is_some()) {
        "; not by clients that agreed on different things over TLS (`advertise_tls`)"
    } else {
        ""
    };
    format!("keyed connections: shared by {who}{condition}{tls}")
}

fn is_owned(proxy: &ProxyProtocol) -> bool {
    proxy.identity.is_per_connection() || proxy.tlvs.is_per_connection()
}

/// Connections that one client connection may own.
fn per_client(config: &Config, pool: &Pool, proxy: &ProxyProtocol) -> usize {
    let usable = pool.backends.iter().filter(|backend| backend.health.mode != HealthMode::Down).count();
    let different = if proxy.tlvs.class() >= Class::PerQuery { usize::MAX } else { usable.max(1) };
    different.min(config.connections.max_owned_per_client)
}

/// How many connections there can be, and what bounds them.
fn most(config: &Config, pool: &Pool, listeners: &[&Listener]) -> String {
    let usable = pool.backends.iter().filter(|backend| backend.health.mode != HealthMode::Down);
    let backends = usable.map(|backend| backend.max_connections).fold(0, usize::saturating_add);
    let total = config.connections.max_total;
    let owned = pool.proxy_protocol.as_ref().filter(|proxy| is_owned(proxy));
    let clients = clients::most(config, listeners.iter().copied());
    let clients = owned.map(|proxy| clients.saturating_mul(per_client(config, pool, proxy)));
    let most = backends.min(total).min(clients.unwrap_or(usize::MAX));
    let (by, then) = if Some(most) == clients {
        ("as many as clients can own", "")
    } else if most == backends {
        ("`max_connections` of its backends", "; queries beyond wait, for `connections.max_wait`")
    } else {
        ("`connections.max_total`", "; queries beyond wait, for `connections.max_wait`")
    };
    format!("at most {most} connections ({by}){then}")
}

/// What servers take that are not told otherwise. What this one takes cannot be known from here.
fn places(config: &Config, backend: &Backend) -> Option<String> {
    // Unbound's default, the lowest.
    const FEWEST: usize = 10;
    let connections = backend.max_connections.min(config.connections.max_total);
    (backend.health.mode != HealthMode::Down && connections > FEWEST).then(|| {
        format!(
            "up to {connections} connections at once, health checks and spares included: set `max_connections` to what it \
             takes, if that is less. By default Unbound takes {FEWEST} for each thread (`incoming-num-tcp`), PowerDNS 20 \
             (`max-tcp-connections`), PowerDNS Recursor 128 (`max-tcp-clients`), dnsdist any number"
        )
    })
}

/// How many ports they need.
fn ports(config: &Config, pool: &Pool, backend: &Backend, limits: Limits) -> String {
    let proxy = pool.proxy_protocol.as_ref();
    let sources = match proxy.map(|proxy| proxy.identity) {
        Some(Identity::Forwarder) => 1,
        _ => backend.source.len().max(1) as u64,
    };
    let connections = backend.max_connections.min(config.connections.max_total);
    let Some(range) = limits.ports else {
        return format!("at most {connections} connections; how many ports there are is not known");
    };
    let ports = range.saturating_mul(sources);
    let held = match (proxy.map(|proxy| proxy.tlvs.class()), backend.one_shot_close) {
        (Some(Class::Unique), OneShotClose::Fin) => format!(
            ", and each query's port for {TIME_WAIT_SECONDS} s more: {} queries a second at most",
            ports / TIME_WAIT_SECONDS
        ),
        (Some(Class::Unique), OneShotClose::Reset) => ", free again once a query is answered".to_owned(),
        _ => String::new(),
    };
    let enough = if ports < connections as u64 { ": more than there are" } else { "" };
    format!("at most {connections} of {ports} ports ({sources} source address(es)){enough}{held}")
}

fn descriptors(config: &Config, limits: Limits) -> String {
    let [clients, backends, others] = needed(config);
    let of = limits.descriptors.map_or_else(String::new, |limit| format!(" of {limit} (RLIMIT_NOFILE)"));
    let sum = clients + backends + others;
    format!("descriptors: {clients} for clients, {backends} to backends, {others} others: at most {sum}{of}")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::super::contract_tests::MINIMAL;
    use super::super::from_str;
    use super::*;

    const LIMITS: Limits =
        Limits { descriptors: Some(20_000), ports: Some(28_232), memory: Some(16 << 30), fast_open: Some(3) };

    fn forecast(text: &str) -> Vec<String> {
        lines(&from_str("f.toml", &format!("server.workers = 2\n{MINIMAL}{text}")).unwrap(), LIMITS)
    }

    fn proxy(identity: &str, value: &str) -> String {
        format!("[pool.proxy_protocol]\nidentity = \"{identity}\"\ntlv = [{{ type = 0xE0, value = \"{value}\" }}]\n")
    }

    #[test]
    fn all_of_it() {
        assert_eq!(
            forecast(""),
            [
                "pool \"resolvers\": shared connections: every client uses the same ones",
                "pool \"resolvers\": at most 512 connections (`max_connections` of its backends); queries beyond wait, for \
                 `connections.max_wait`",
                "backend \"unbound-1\": at most 512 of 28232 ports (1 source address(es))",
                "backend \"unbound-1\": up to 512 connections at once, health checks and spares included: set \
                 `max_connections` to what it takes, if that is less. By default Unbound takes 10 for each thread \
                 (`incoming-num-tcp`), PowerDNS 20 (`max-tcp-connections`), PowerDNS Recursor 128 (`max-tcp-clients`), \
                 dnsdist any number",
                "descriptors: 10000 for clients, 512 to backends, 74 others: at most 10586 of 20000 (RLIMIT_NOFILE)",
            ]
        );
    }

    #[test]
    fn who_shares() {
        for (identity, value, expected) in [
            ("connection", "x", "owned connections: one for each client connection, which ends with it"),
            (
                "connection",
                "{qname}",
                "owned connections: up to 8 for each client connection, one for each different header to each backend \
                 that it keeps to; they end with it",
            ),
            ("address", "{unique_id}", "keyed connections: shared by the client connections of one address"),
            (
                "subnet",
                "{edns:65001}",
                "keyed connections: shared by the clients of one network (/24, /56), for queries whose TLVs are equal",
            ),
            ("forwarder", "{client_ip}", "keyed connections: shared by all clients, where their TLVs are equal"),
            ("forwarder", "{uuid}", "one-shot connections: `{uuid}` differs per query: every query opens a connection"),
        ] {
            assert_eq!(forecast(&proxy(identity, value))[0], format!("pool \"resolvers\": {expected}"));
        }
    }

    #[test]
    fn tls_is_part_of_what_is_shared() {
        let tls = "[[listener]]\nname = \"dot\"\naddress = \"127.0.0.1:853\"\npool = \"resolvers\"\n\
                   [listener.tls]\ncertificate = \"c\"\nkey = \"k\"\n";
        let advertised = "[pool.proxy_protocol]\nidentity = \"forwarder\"\nadvertise_tls = true\n";
        let plain = "pool \"resolvers\": keyed connections: shared by all clients";
        assert_eq!(forecast(advertised)[0], plain);
        let different = "; not by clients that agreed on different things over TLS (`advertise_tls`)";
        assert_eq!(forecast(&format!("{advertised}{tls}"))[0], format!("{plain}{different}"));
    }

    #[test]
    fn what_bounds_them() {
        let few = "[connections]\nmax_owned_per_client = 3\nmax_total = 9\n[server]\n";
        let of = |clients: &str, backend: &str, rest: &str| {
            let text = format!("server.max_connections = {clients}\n{MINIMAL}{backend}{rest}");
            lines(&from_str("f.toml", &text).unwrap(), LIMITS)[1].clone()
        };
        let owned = proxy("connection", "{qname}");
        let few = few.trim_end_matches("[server]\n");
        assert!(of("2", "", &format!("{owned}{few}")).ends_with("at most 6 connections (as many as clients can own)"));
        // Those of the pool's own listeners.
        let one = format!("server.max_connections = 200\n{MINIMAL}{owned}{few}")
            .replace("pool = ", "max_connections = 1\npool = ");
        let lines = lines(&from_str("f.toml", &one).unwrap(), LIMITS);
        assert!(lines[1].ends_with("at most 3 connections (as many as clients can own)"), "{lines:?}");
        assert!(of("200", "", &format!("{owned}{few}")).contains("at most 9 connections (`connections.max_total`)"));
        assert!(of("200", "max_connections = 5\n", &owned).contains("at most 5 connections (`max_connections`"));
    }

    /// The least that a server is known to take is nothing to say anything of.
    #[test]
    fn what_servers_take() {
        let says = |text: &str| forecast(text).iter().any(|line| line.contains("`incoming-num-tcp`"));
        assert!(!says("max_connections = 10\n") && says("max_connections = 11\n"));
        assert!(!says("[connections]\nmax_total = 10\n") && !says("health.mode = \"down\"\n"));
    }

    #[test]
    fn ports_of_one_shot_connections() {
        let fin = "one_shot_close = \"fin\"\nmax_connections = 100\n".to_owned();
        assert_eq!(
            forecast(&(fin + &proxy("address", "{uuid}")))[2],
            "backend \"unbound-1\": at most 100 of 28232 ports (1 source address(es)), and each query's port for 60 s \
             more: 470 queries a second at most"
        );
        assert!(forecast(&proxy("address", "{uuid}"))[2].ends_with(", free again once a query is answered"));
        assert!(
            forecast("max_connections = 100000\n[connections]\nmax_total = 50000\n")[2].contains("more than there")
        );
    }
}
