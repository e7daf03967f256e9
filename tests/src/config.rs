//! Configurations for scenarios, as TOML text.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use crate::certificates::Certificate;

/// What the keys of `[pool.backend.health]` begin with.
const HEALTH: &str = "health.";

/// A configuration with one listener on a free port of 127.0.0.1 and one pool. Keys that are not set keep the program's
/// defaults, but for `allow_from` and `refuse`: clients have addresses from everywhere behind PROXY headers, and ask for
/// everything ([`Self::guarded`] has the defaults). Values are TOML, so a string brings its quotes along.
#[derive(Clone, Debug, Default)]
pub struct Config {
    listen: Option<SocketAddr>,
    sections: Vec<(&'static str, Vec<(String, String)>)>,
    backends: Vec<(SocketAddr, Vec<(String, String)>)>,
    tlvs: Vec<(u8, String)>,
    proxy: bool,
    guarded: bool,
    more: String,
}

/// Everybody may come.
const ANYBODY: &str = "[\"0.0.0.0/0\", \"::/0\"]";

impl Config {
    /// A listener and one backend, named `dns` and `backend-0`, one worker, no PROXY header.
    pub fn new(backend: SocketAddr) -> Self {
        Self::default().set("server", "workers", "1").backend(backend, &[])
    }

    /// Idle backend connections close after a second, so that a scenario comes to rest soon.
    #[must_use]
    pub fn settles_soon(self) -> Self {
        self.set("connections", "idle_timeout", "\"1s\"").set("connections", "cleanup_interval", "\"100ms\"")
    }

    /// For a link on which packets are late, lost or spoiled: patience, and connections to the backend that come and go, by a
    /// TLV.
    #[must_use]
    pub fn over_a_bad_link(self) -> Self {
        self.backend_key("connect_timeout", "\"6s\"")
            .identity("address")
            .tlv(0xe0, "{qname_label:2}")
            .set("pool", "query_timeout", "\"8s\"")
            .set("listener", "idle_timeout", "\"20s\"")
            .set("listener", "message_timeout", "\"20s\"")
            .set("connections", "idle_timeout", "\"500ms\"")
            .set("connections", "cleanup_interval", "\"100ms\"")
            .set("watchdog", "crosscheck_interval", "\"1s\"")
    }

    /// Sets a key of a section that exists once: `server`, `overload`, `listener`, `listener.accept_proxy`, `listener.tls`,
    /// `pool`, `pool.proxy_protocol`, `connections`, `kernel`, `watchdog`, `admin`.
    #[must_use]
    pub fn set(mut self, section: &'static str, key: &str, value: impl ToString) -> Self {
        let at = self.sections.iter().position(|(name, _)| *name == section).unwrap_or_else(|| {
            self.sections.push((section, Vec::new()));
            self.sections.len() - 1
        });
        let keys = &mut self.sections[at].1;
        keys.retain(|(have, _)| have != key);
        keys.push((key.to_owned(), value.to_string()));
        self
    }

    /// PROXY headers are required from these peers (and refused from all others).
    #[must_use]
    pub fn accept_proxy(self, from: &[&str]) -> Self {
        self.set("listener.accept_proxy", "from", format!("{from:?}"))
    }

    /// The listener speaks TLS, with this certificate.
    #[must_use]
    pub fn tls(self, certificate: &Certificate) -> Self {
        self.set("listener.tls", "certificate", format!("{:?}", certificate.certificate)).set(
            "listener.tls",
            "key",
            format!("{:?}", certificate.key),
        )
    }

    /// Only those may come, and only that is forwarded, which the program allows by default.
    #[must_use]
    pub fn guarded(self) -> Self {
        Self { guarded: true, ..self }
    }

    /// Listens there instead of on a free port of 127.0.0.1.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = Some(address);
        self
    }

    /// One more backend, `backend-N`, with these keys; those of its health begin with `health.`. Unless they say
    /// otherwise the mode is `up` (no checks).
    #[must_use]
    pub fn backend(mut self, address: SocketAddr, keys: &[(&str, &str)]) -> Self {
        let keys = keys.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.backends.push((address, keys));
        self
    }

    /// DNS over TLS to the first backend, of this name, whose certificate this authority has issued.
    #[must_use]
    pub fn dot(self, server_name: &str, ca: &Path) -> Self {
        self.backend_key("tls.server_name", format!("{server_name:?}"))
            .backend_key("tls.ca", format!("{:?}", ca.display().to_string()))
    }

    /// Sets a key of the first backend.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn backend_key(mut self, key: &str, value: impl ToString) -> Self {
        self.backends[0].1.push((key.to_owned(), value.to_string()));
        self
    }

    /// PROXY v2 towards the backends, with this `identity`.
    #[must_use]
    pub fn identity(mut self, identity: &str) -> Self {
        self.proxy = true;
        self.set("pool.proxy_protocol", "identity", format!("\"{identity}\""))
    }

    /// One more TLV, after those before.
    #[must_use]
    pub fn tlv(mut self, kind: u8, value: &str) -> Self {
        self.tlvs.push((kind, value.to_owned()));
        self
    }

    /// One more listener, on a free port of 127.0.0.1, with a pool of its own, whose one backend gets no PROXY header. All
    /// three have this name.
    #[must_use]
    pub fn listener_without_header(mut self, name: &str, backend: SocketAddr) -> Self {
        let listener = format!("[[listener]]\nname = \"{name}\"\naddress = \"127.0.0.1:0\"\npool = \"{name}\"\n");
        let backend = format!("[[pool.backend]]\nname = \"{name}\"\naddress = \"{backend}\"\n");
        self.more += &format!("{listener}[[pool]]\nname = \"{name}\"\n{backend}[pool.backend.health]\nmode = \"up\"\n");
        self
    }

    /// The text of the file. `socket` is the admin socket.
    ///
    /// # Panics
    /// Never in practice: writing into a string does not fail.
    pub fn text(&self, socket: &str) -> String {
        let mut text = String::new();
        let listen = self.listen.map_or_else(|| "127.0.0.1:0".to_owned(), |address| address.to_string());
        self.section(&mut text, "[server]", "server", &[]);
        if self.sections.iter().any(|(name, _)| *name == "overload") {
            self.section(&mut text, "[overload]", "overload", &[]);
        }
        let address = format!("\"{listen}\"");
        let mut listener = vec![("name", "\"dns\""), ("address", &address), ("pool", "\"resolvers\"")];
        if !self.guarded {
            listener.extend([("allow_from", ANYBODY), ("refuse", "[]")]);
        }
        self.section(&mut text, "[[listener]]", "listener", &listener);
        if self.sections.iter().any(|(name, _)| *name == "listener.accept_proxy") {
            self.section(&mut text, "[listener.accept_proxy]", "listener.accept_proxy", &[]);
        }
        if self.sections.iter().any(|(name, _)| *name == "listener.tls") {
            self.section(&mut text, "[listener.tls]", "listener.tls", &[]);
        }
        self.section(&mut text, "[[pool]]", "pool", &[("name", "\"resolvers\"")]);
        if self.proxy {
            self.section(&mut text, "[pool.proxy_protocol]", "pool.proxy_protocol", &[]);
            for (kind, value) in &self.tlvs {
                writeln!(text, "[[pool.proxy_protocol.tlv]]\ntype = {kind:#04x}\nvalue = \"{value}\"").unwrap();
            }
        }
        for (number, (address, keys)) in self.backends.iter().enumerate() {
            writeln!(text, "[[pool.backend]]\nname = \"backend-{number}\"\naddress = \"{address}\"").unwrap();
            for (key, value) in keys.iter().filter(|(key, _)| !key.starts_with(HEALTH)) {
                writeln!(text, "{key} = {value}").unwrap();
            }
            let health: Vec<_> =
                keys.iter().filter_map(|(key, value)| Some((key.strip_prefix(HEALTH)?, value))).collect();
            writeln!(text, "[pool.backend.health]").unwrap();
            let mode = health.iter().rev().find(|(key, _)| *key == "mode").map_or("\"up\"", |(_, mode)| mode.as_str());
            writeln!(text, "mode = {mode}").unwrap();
            for (key, value) in health.iter().filter(|(key, _)| *key != "mode") {
                writeln!(text, "{key} = {value}").unwrap();
            }
        }
        for name in ["connections", "kernel", "watchdog"] {
            self.section(&mut text, &format!("[{name}]"), name, &[]);
        }
        let admin = [("http", "\"127.0.0.1:0\""), ("socket", &format!("\"{socket}\""))];
        self.section(&mut text, "[admin]", "admin", &admin);
        text + &self.more
    }

    fn section(&self, text: &mut String, head: &str, name: &str, fixed: &[(&str, &str)]) {
        writeln!(text, "{head}").unwrap();
        let set = self.sections.iter().find(|(have, _)| *have == name).map_or(&[][..], |(_, keys)| keys.as_slice());
        for (key, value) in fixed {
            if !set.iter().any(|(have, _)| have == key) {
                writeln!(text, "{key} = {value}").unwrap();
            }
        }
        for (key, value) in set {
            writeln!(text, "{key} = {value}").unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_values_win_and_tables_are_in_order() {
        let text = Config::new("127.0.0.1:53".parse().unwrap())
            .set("server", "workers", "2")
            .set("admin", "http", "\"\"")
            .guarded()
            .identity("connection")
            .tlv(0xe0, "{qname_label:1}")
            .backend_key("max_in_flight", "7")
            .text("/s");
        assert_eq!(
            text,
            "[server]\nworkers = 2\n[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:0\"\npool = \"resolvers\"\n\
             [[pool]]\nname = \"resolvers\"\n[pool.proxy_protocol]\nidentity = \"connection\"\n\
             [[pool.proxy_protocol.tlv]]\ntype = 0xe0\nvalue = \"{qname_label:1}\"\n\
             [[pool.backend]]\nname = \"backend-0\"\naddress = \"127.0.0.1:53\"\nmax_in_flight = 7\n\
             [pool.backend.health]\nmode = \"up\"\n[connections]\n[kernel]\n[watchdog]\n\
             [admin]\nsocket = \"/s\"\nhttp = \"\"\n"
        );
    }

    /// Every key that a scenario sets, through the program's own reader.
    #[test]
    fn the_program_reads_it() {
        let text = Config::new("127.0.0.1:53".parse().unwrap())
            .set("server", "workers", 2)
            .set("server", "max_connections", 3)
            .set("server", "drain_timeout", "\"2s\"")
            .set("listener", "max_connections_per_client", 2)
            .set("listener", "max_in_flight", 1000)
            .set("listener", "idle_timeout", "\"600ms\"")
            .set("listener", "message_timeout", "\"500ms\"")
            .set("listener", "write_timeout", "\"1s\"")
            .set("overload", "threshold", 50)
            .set("listener", "max_connections", 9)
            .set("listener", "connection_rate_per_client", 9)
            .set("listener.accept_proxy", "timeout", "\"1s\"")
            .accept_proxy(&["127.0.0.2", "::1"])
            .set("pool", "query_timeout", "\"1s\"")
            .set("connections", "idle_timeout", "\"1s\"")
            .set("connections", "cleanup_interval", "\"60s\"")
            .set("watchdog", "reap", "\"on\"")
            .identity("connection")
            .tlv(0xe0, "{qname_label:1}")
            .tlv(0xe2, "hex:017f")
            .tlv(0xe3, "{{{qname_label:2}}}")
            .tlv(0xe4, "{client_ip}#{client_port} {listener} {qtype} {uuid}")
            .backend_key("max_in_flight", 100)
            .backend("127.0.0.1:54".parse().unwrap(), &[])
            .listener_without_header("plain", "127.0.0.1:55".parse().unwrap())
            .text("/run/x");
        let parsed = counterfoil::config::from_str("test", &text).unwrap_or_else(|errors| panic!("{errors}\n{text}"));
        assert_eq!(parsed.pools[0].backends.len(), 2);
        assert_eq!((parsed.listeners[1].pool, parsed.pools[1].proxy_protocol.is_none()), (1, true));
    }
}
