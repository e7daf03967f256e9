//! What the limits on clients amount to.

use super::super::{Config, Listener, ListenerTls, Pool, units};
use super::{Limits, Warning};
use crate::clock;

/// Before so many days are left a certificate should have been renewed, as the alert has it.
const RENEWED: f64 = 7.0;

/// Warns of limits that cannot hold, or are never reached.
pub(super) fn forecast(config: &Config, limits: Limits, warnings: &mut Vec<Warning>) {
    let total = config.server.max_connections;
    for (index, listener) in config.listeners.iter().enumerate() {
        let path = if config.listeners.len() == 1 { "listener".to_owned() } else { format!("listener[{index}]") };
        let mut warn = |key: &str, message: String| warnings.push(Warning { key: format!("{path}.{key}"), message });
        if listener.max_connections > total {
            let message = format!("is never reached: `server.max_connections` is {total}");
            warn("max_connections", message);
        }
        let here = of_listener(listener, total);
        if listener.max_connections_per_client >= here {
            let message = format!("one client can take all {here} connections, and then nobody else is served");
            warn("max_connections_per_client", message);
        }
        // As much again is kept in the kernel.
        let pending = (here as u64).saturating_mul(2 * listener.max_pending_answers as u64);
        if let Some(memory) = limits.memory.filter(|memory| pending > *memory) {
            let message = format!(
                "{here} clients that do not read can make {} MiB of answers wait, and the machine has {} MiB",
                pending >> 20,
                memory >> 20
            );
            warn("max_pending_answers", message);
        }
        if listener.connection_rate_per_client == 0 && listener.ban_duration != Listener::DEFAULT_BAN {
            warn("ban_duration", "nobody is ever banned: `connection_rate_per_client` is 0".to_owned());
        }
        if listener.message_timeout > listener.idle_timeout {
            let idle = units::format_duration(listener.idle_timeout);
            let message = format!(
                "is cut short: a connection on which no whole message comes for `idle_timeout` ({idle}) is closed, unless \
                 answers are owed on it"
            );
            warn("message_timeout", message);
        }
        if let Some(message) = exposure(listener, config.pools.get(listener.pool)) {
            warn("pool", message);
        }
        if let Some(message) = listener.tls.as_ref().and_then(|tls| certificate(tls, clock::unix_seconds())) {
            warn("tls.certificate", message);
        }
    }
}

/// Clients from elsewhere, whom a backend takes for this host.
fn exposure(listener: &Listener, pool: Option<&Pool>) -> Option<String> {
    let pool = pool.filter(|pool| pool.hides_clients())?;
    let only_here = listener.address.ip().is_loopback() && listener.accept_proxy.is_none();
    (!only_here).then(|| {
        format!(
            "backends of `{}` see this host in the place of every client: what they allow to its address, all clients in \
             `listener.allow_from` can do, but for what `listener.refuse` names. `[pool.proxy_protocol]` with another \
             `identity` than `forwarder` tells them who asks",
            pool.name
        )
    })
}

/// A certificate that is over, or soon will be.
fn certificate(tls: &ListenerTls, now: f64) -> Option<String> {
    let days = (tls.identity.as_ref()?.not_after()? as f64 - now) / 86_400.0;
    let file = tls.certificate.display();
    if days < 0.0 {
        Some(format!("{file} is over since {:.0} days: clients that look at it do not connect", days.abs().floor()))
    } else {
        (days < RENEWED).then(|| format!("{file} is over in {:.0} days", days.floor()))
    }
}

/// Most client connections on all these listeners together.
pub(in crate::config) fn most(config: &Config, of: impl Fn(&Listener) -> bool) -> usize {
    let total = config.server.max_connections;
    let each = config.listeners.iter().filter(|listener| of(listener)).map(|listener| of_listener(listener, total));
    each.fold(0, usize::saturating_add).min(total)
}

/// How many client connections the listener can have.
fn of_listener(listener: &Listener, total: usize) -> usize {
    if listener.max_connections == 0 { total } else { listener.max_connections.min(total) }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::super::super::contract_tests::MINIMAL;
    use super::super::super::from_str;
    use super::*;
    use crate::tls::server::Identity;

    /// The warnings for the minimal configuration with these lines in its listener.
    fn warnings(listener: &str, memory: u64) -> Vec<String> {
        let text = MINIMAL.replacen("pool = \"resolvers\"\n", &format!("pool = \"resolvers\"\n{listener}\n"), 1);
        let limits = Limits { memory: Some(memory), ..Limits::default() };
        let mut warnings = Vec::new();
        forecast(&from_str("f.toml", &text).unwrap(), limits, &mut warnings);
        warnings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn limits_that_are_never_reached() {
        assert_eq!(warnings("max_connections = 10000", 8 << 30), [""; 0]);
        assert_eq!(
            warnings("max_connections = 10001", 8 << 30),
            ["key `listener.max_connections`: is never reached: `server.max_connections` is 10000"]
        );
        assert_eq!(
            warnings("max_connections = 50", 8 << 30),
            [
                "key `listener.max_connections_per_client`: one client can take all 50 connections, and then nobody else \
              is served"
            ]
        );
        assert_eq!(
            warnings("ban_duration = \"1m\"", 8 << 30),
            ["key `listener.ban_duration`: nobody is ever banned: `connection_rate_per_client` is 0"]
        );
        assert_eq!(warnings("ban_duration = \"1m\"\nconnection_rate_per_client = 1", 8 << 30), [""; 0]);
    }

    #[test]
    fn a_message_that_may_take_longer_than_a_silence() {
        assert_eq!(warnings("message_timeout = \"10s\"", 8 << 30), [""; 0]);
        assert_eq!(
            warnings("message_timeout = \"11s\"", 8 << 30),
            [
                "key `listener.message_timeout`: is cut short: a connection on which no whole message comes for `idle_timeout` \
              (10s) is closed, unless answers are owed on it"
            ]
        );
    }

    #[test]
    fn clients_from_elsewhere_whom_backends_take_for_this_host() {
        let warned = |address: &str, identity: Option<&str>, accepts: &str| {
            let proxy = identity
                .map_or_else(String::new, |identity| format!("[pool.proxy_protocol]\nidentity = \"{identity}\"\n"));
            let text = format!(
                "[[listener]]\nname = \"dns\"\naddress = \"{address}\"\npool = \"p\"\n{accepts}[[pool]]\nname = \"p\"\n\
                 {proxy}[[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:9\"\n"
            );
            let config = from_str("f.toml", &text).unwrap();
            // What is refused by default and what is warned of go by the same.
            assert_eq!(config.listeners[0].refuse.len(), if config.pools[0].hides_clients() { 4 } else { 0 });
            let mut warnings = Vec::new();
            forecast(&config, Limits::default(), &mut warnings);
            let said = |warning: &Warning| warning.key == "listener.pool" && warning.message.contains("every client");
            warnings.iter().filter(|warning| said(warning)).count()
        };
        let accepts = "[listener.accept_proxy]\nfrom = [\"127.0.0.1\"]\n";
        for (address, accepts, expected) in [
            ("127.0.0.1:5300", "", 0),
            ("[::1]:5300", "", 0),
            ("0.0.0.0:5300", "", 1),
            ("192.0.2.1:5300", "", 1),
            ("127.0.0.1:5300", accepts, 1),
        ] {
            assert_eq!(warned(address, None, accepts), expected, "{address}");
            assert_eq!(warned(address, Some("forwarder"), accepts), expected, "{address}");
            assert_eq!(warned(address, Some("address"), accepts), 0, "{address}");
        }
    }

    #[test]
    fn more_answers_than_memory() {
        // 10,000 times 256 KiB, in the process and in the kernel.
        assert_eq!(warnings("", 5000 << 20), [""; 0]);
        assert_eq!(
            warnings("", (5000 << 20) - 1),
            [
                "key `listener.max_pending_answers`: 10000 clients that do not read can make 5000 MiB of answers wait, and \
              the machine has 4999 MiB"
            ]
        );
        assert_eq!(warnings("max_pending_answers = \"64KiB\"", 2 << 30), [""; 0]);
    }

    #[test]
    fn certificates_that_are_over_or_soon_will_be() {
        let directory = std::env::temp_dir().join(format!("counterfoil-over-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (certificate, key) = (directory.join("c.pem"), directory.join("k.pem"));
        let made = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(["dns.example".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        std::fs::write(&certificate, params.self_signed(&made).unwrap().pem()).unwrap();
        std::fs::write(&key, made.serialize_pem()).unwrap();
        let identity = Identity::read(&certificate, &key);
        std::fs::remove_dir_all(&directory).unwrap();
        let tls = ListenerTls { certificate: "c.pem".into(), identity: identity.ok(), ..ListenerTls::default() };
        let end = 1_893_456_000.0;
        let said = |before: f64| super::certificate(&tls, end - before * 86_400.0);
        assert_eq!(said(8.0), None);
        assert_eq!(said(6.5).as_deref(), Some("c.pem is over in 6 days"));
        let over = "c.pem is over since 2 days: clients that look at it do not connect";
        assert_eq!(said(-2.5).as_deref(), Some(over));
        assert_eq!(super::certificate(&ListenerTls::default(), end), None, "not read");
    }
}
