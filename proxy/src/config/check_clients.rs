//! What the limits on clients amount to.

use super::super::{Config, Listener, ListenerTls, Pool, units};
use super::{Limits, Warning};
use crate::clock;
use crate::tls::x509;

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
        for message in listener.tls.iter().flat_map(|tls| certificates(tls, clock::unix_seconds())) {
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

/// Certificates of a chain that are over, or soon will be, or are not valid yet; and one that is none for a server.
fn certificates(tls: &ListenerTls, now: f64) -> Vec<String> {
    let Some(identity) = &tls.identity else { return Vec::new() };
    let chain: Vec<&[u8]> = identity.certificates().collect();
    let called = |index: usize, certificate: &[u8]| match chain.len() {
        1 => tls.certificate.display().to_string(),
        _ => format!("{} of {}", x509::called(index + 1, certificate), tls.certificate.display()),
    };
    let mut messages = Vec::new();
    for (index, certificate) in chain.iter().enumerate() {
        let Some(valid) = x509::validity(certificate) else { continue };
        let [from, to] = [valid.start(), valid.end()].map(|at| (*at as f64 - now) / 86_400.0);
        let when = match () {
            () if to < 0.0 => format!("is over since {:.0} days: clients that look at it do not connect", -to.ceil()),
            () if from > 0.0 => {
                format!("is not valid for {:.0} days yet: clients that look at it do not connect", from.ceil())
            }
            () if to < RENEWED => format!("is over in {:.0} days", to.floor()),
            () => continue,
        };
        messages.push(format!("{} {when}", called(index, certificate)));
    }
    if let Some(own) = chain.first().filter(|own| x509::is_authority(own)) {
        let own = called(0, own);
        messages.push(format!(
            "{own} is that of an authority (CA:TRUE), which many clients do not take for a server's: issue it with CA:FALSE"
        ));
    }
    messages
}

/// Most client connections on all these listeners together.
pub(in crate::config) fn most<'a>(config: &Config, listeners: impl IntoIterator<Item = &'a Listener>) -> usize {
    let total = config.server.max_connections;
    let each = listeners.into_iter().map(|listener| of_listener(listener, total));
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
    fn certificates_that_are_not_valid_or_soon_will_not_be() {
        use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, date_time_ymd};
        let directory = std::env::temp_dir().join(format!("counterfoil-over-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let made = KeyPair::generate().unwrap();
        let certificate = |name: &str, (from, to): (i32, i32), is_ca: IsCa| {
            let mut params = CertificateParams::new(["dns.example".to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
            params.is_ca = is_ca;
            params.self_signed(&made).unwrap().pem()
        };
        let tls = |chain: &str| {
            let (certificate, key) = (directory.join("c.pem"), directory.join("k.pem"));
            std::fs::write(&certificate, chain).unwrap();
            std::fs::write(&key, made.serialize_pem()).unwrap();
            let identity = Identity::read(&certificate, &key).ok();
            ListenerTls { certificate: "c.pem".into(), identity, ..ListenerTls::default() }
        };
        // The first day of 2030.
        let end = 1_893_456_000.0;
        let said = |chain: &str, after: f64| certificates(&tls(chain), end + after * 86_400.0);
        let own = certificate("own", (2000, 2030), IsCa::NoCa);
        assert_eq!(said(&own, -8.0), [""; 0]);
        assert_eq!(said(&own, -6.5), ["c.pem is over in 6 days"]);
        let do_not = "clients that look at it do not connect";
        assert_eq!(said(&own, 2.5), [format!("c.pem is over since 2 days: {do_not}")]);
        let authority = IsCa::Ca(BasicConstraints::Unconstrained);
        let between = certificate("between", (2029, 2030), authority);
        let next = certificate("next", (2030, 2040), authority);
        let own = certificate("own", (2000, 2050), IsCa::ExplicitNoCa);
        assert_eq!(
            said(&format!("{own}{between}{next}"), -1.5),
            [
                "certificate 2 (\"between\") of c.pem is over in 1 days".to_owned(),
                format!("certificate 3 (\"next\") of c.pem is not valid for 2 days yet: {do_not}"),
            ]
        );
        assert_eq!(
            said(&certificate("own", (2000, 2050), authority), 0.0),
            ["c.pem is that of an authority (CA:TRUE), which many clients do not take for a server's: issue it with \
                 CA:FALSE"]
        );
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(certificates(&ListenerTls::default(), end), [""; 0], "not read");
    }
}
