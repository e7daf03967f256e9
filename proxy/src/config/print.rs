//! A configuration as TOML, every key that works with the value in effect. Read again, it is the same configuration.

use std::fmt::{Display, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use super::choices::Choice;
use super::{
    Admin, Backend, Config, Connections, Kernel, Listener, Overload, Pool, ProxyProtocol, Server, Watchdog, units,
};
use crate::proxy_protocol::identity::Identity;
use crate::scope::{IpWithZone, WithZone};

/// The whole configuration. `workers` is the number of workers in effect, never 0.
pub fn to_toml(config: &Config) -> String {
    let mut out = Writer::default();
    server(&mut out, &config.server);
    overload(&mut out, &config.overload);
    for listener in &config.listeners {
        self::listener(&mut out, listener, &config.pools);
    }
    for pool in &config.pools {
        self::pool(&mut out, pool);
    }
    connections(&mut out, &config.connections);
    kernel(&mut out, &config.kernel);
    watchdog(&mut out, &config.watchdog);
    admin(&mut out, &config.admin);
    out.text
}

/// Writes headings and `key = value` lines. Writing to a `String` cannot fail.
#[derive(Default)]
struct Writer {
    text: String,
}

impl Writer {
    fn heading(&mut self, heading: &str) {
        let gap = if self.text.is_empty() { "" } else { "\n" };
        let _ = writeln!(self.text, "{gap}{heading}");
    }

    fn bare(&mut self, key: &str, value: impl Display) {
        let _ = writeln!(self.text, "{key} = {value}");
    }

    fn text(&mut self, key: &str, value: impl Display) {
        self.bare(key, quoted(value));
    }

    fn list(&mut self, key: &str, values: impl Iterator<Item = String>) {
        let values: Vec<String> = values.map(quoted).collect();
        self.bare(key, format!("[{}]", values.join(", ")));
    }

    fn duration(&mut self, key: &str, value: Duration) {
        self.text(key, units::format_duration(value));
    }
}

/// A TOML string, with whatever quotes and escapes it needs.
fn quoted(value: impl Display) -> String {
    toml::Value::String(value.to_string()).to_string()
}

fn server(out: &mut Writer, server: &Server) {
    out.heading("[server]");
    out.bare("workers", server.workers);
    out.duration("drain_delay", server.drain_delay);
    out.duration("drain_timeout", server.drain_timeout);
    out.bare("max_connections", server.max_connections);
    out.text("log", &server.log);
}

fn overload(out: &mut Writer, overload: &Overload) {
    out.heading("[overload]");
    out.bare("threshold", overload.threshold);
    out.duration("idle_timeout", overload.idle_timeout);
    out.duration("max_connection_duration", overload.max_connection_duration);
}

fn listener(out: &mut Writer, listener: &Listener, pools: &[Pool]) {
    out.heading("[[listener]]");
    out.text("name", &listener.name);
    out.text("address", WithZone(listener.address));
    out.text("pool", pools.get(listener.pool).map_or("", |pool| &pool.name));
    out.bare("max_connections", listener.max_connections);
    out.bare("max_connections_per_client", listener.max_connections_per_client);
    out.bare("client_mask_v4", listener.client_mask_v4);
    out.bare("client_mask_v6", listener.client_mask_v6);
    out.bare("max_in_flight", listener.max_in_flight);
    out.bare("max_queries_per_connection", listener.max_queries_per_connection);
    out.duration("max_connection_duration", listener.max_connection_duration);
    out.duration("idle_timeout", listener.idle_timeout);
    out.duration("message_timeout", listener.message_timeout);
    out.duration("write_timeout", listener.write_timeout);
    out.text("max_pending_answers", units::format_size(listener.max_pending_answers));
    out.bare("connection_rate_per_client", listener.connection_rate_per_client);
    out.duration("ban_duration", listener.ban_duration);
    out.bare("edns_tcp_keepalive", listener.edns_tcp_keepalive);
    out.duration("tcp_keepalive", listener.tcp_keepalive);
    out.list("allow_from", listener.allow_from.iter().map(ToString::to_string));
    out.list("refuse", listener.refuse.iter().map(|refusable| refusable.word().to_owned()));
    out.bare("tcp_fast_open", listener.tcp_fast_open);
    if let Some(proxy) = &listener.accept_proxy {
        out.heading("[listener.accept_proxy]");
        out.list("from", proxy.from.iter().map(ToString::to_string));
        out.text("max_header", units::format_size(proxy.max_header));
        out.duration("timeout", proxy.timeout);
        out.bare("max_pending", proxy.max_pending);
        out.bare("outside_tls", proxy.outside_tls);
    }
    if let Some(tls) = &listener.tls {
        out.heading("[listener.tls]");
        out.text("certificate", tls.certificate.display());
        out.text("key", tls.key.display());
        out.duration("handshake_timeout", tls.handshake_timeout);
        out.bare("max_handshakes", tls.max_handshakes);
    }
}

fn pool(out: &mut Writer, pool: &Pool) {
    out.heading("[[pool]]");
    out.text("name", &pool.name);
    out.text("policy", pool.policy.word());
    out.duration("query_timeout", pool.query_timeout);
    out.bare("retries", pool.retries);
    out.text("on_failure", pool.on_failure.word());
    if let Some(proxy) = &pool.proxy_protocol {
        proxy_protocol(out, proxy);
    }
    for backend in &pool.backends {
        self::backend(out, backend);
    }
}

fn proxy_protocol(out: &mut Writer, proxy: &ProxyProtocol) {
    out.heading("[pool.proxy_protocol]");
    out.text(
        "identity",
        match proxy.identity {
            Identity::Connection => "connection",
            Identity::Address => "address",
            Identity::Subnet { .. } => "subnet",
            Identity::Forwarder => "forwarder",
        },
    );
    if let Identity::Subnet { v4, v6 } = proxy.identity {
        out.bare("subnet_v4", v4);
        out.bare("subnet_v6", v6);
    }
    out.text("max_header", units::format_size(proxy.max_header));
    out.bare("crc32c", proxy.seal.crc32c);
    out.bare("unique_id", proxy.seal.unique_id);
    out.bare("advertise_tls", proxy.advertise_tls);
    out.bare("pass_incoming_tlvs", proxy.pass_incoming_tlvs);
    for (kind, template) in proxy.tlvs.iter() {
        out.heading("[[pool.proxy_protocol.tlv]]");
        out.bare("type", format!("{kind:#04X}").replace("0X", "0x"));
        out.text("value", template);
    }
}

fn backend(out: &mut Writer, backend: &Backend) {
    out.heading("[[pool.backend]]");
    out.text("name", &backend.name);
    out.text("address", WithZone(backend.address));
    out.bare("weight", backend.weight);
    out.bare("max_in_flight", backend.max_in_flight);
    out.bare("max_connections", backend.max_connections);
    out.duration("connect_timeout", backend.connect_timeout);
    out.duration("write_timeout", backend.write_timeout);
    out.list("source", backend.source.iter().map(|source| IpWithZone(*source).to_string()));
    out.bare("tcp_fast_open", backend.tcp_fast_open);
    out.text("one_shot_close", backend.one_shot_close.word());
    if let Some(tls) = &backend.tls {
        out.heading("[pool.backend.tls]");
        out.text("server_name", tls.server_name.to_str());
        if let Some(ca) = &tls.ca {
            // A path comes from a configuration, which is UTF-8.
            out.text("ca", ca.display());
        }
        out.bare("proxy_outside_tls", tls.proxy_outside_tls);
    }
    out.heading("[pool.backend.health]");
    let health = &backend.health;
    out.text("mode", health.mode.word());
    out.duration("interval", health.interval);
    out.duration("timeout", health.timeout);
    out.text("name", &health.name);
    out.bare("rise", health.rise);
    out.bare("fall", health.fall);
}

fn connections(out: &mut Writer, connections: &Connections) {
    out.heading("[connections]");
    out.duration("idle_timeout", connections.idle_timeout);
    out.duration("tcp_keepalive", connections.tcp_keepalive);
    out.duration("max_age", connections.max_age);
    out.bare("max_idle_per_backend", connections.max_idle_per_backend);
    out.bare("max_owned_per_client", connections.max_owned_per_client);
    out.bare("max_total", connections.max_total);
    out.bare("max_opens_per_client", connections.max_opens_per_client);
    out.bare("max_waiting", connections.max_waiting);
    out.duration("max_wait", connections.max_wait);
    out.bare("spares_per_backend", connections.spares_per_backend);
    out.duration("spare_idle_timeout", connections.spare_idle_timeout);
    out.duration("cleanup_interval", connections.cleanup_interval);
}

fn kernel(out: &mut Writer, kernel: &Kernel) {
    out.heading("[kernel]");
    out.text("view", kernel.view.word());
    out.bare("max_sockets", kernel.max_sockets);
}

fn watchdog(out: &mut Writer, watchdog: &Watchdog) {
    out.heading("[watchdog]");
    out.duration("interval", watchdog.interval);
    out.duration("grace", watchdog.grace);
    out.bare("sweeps", watchdog.sweeps);
    out.duration("crosscheck_interval", watchdog.crosscheck_interval);
    out.text("reap", watchdog.reap.word());
    out.bare("max_reaps_per_minute", watchdog.max_reaps_per_minute);
    out.list("classes", watchdog.classes.iter().map(|class| class.name().to_owned()));
}

fn admin(out: &mut Writer, admin: &Admin) {
    out.heading("[admin]");
    out.text("http", admin.http.map(|address| WithZone(address).to_string()).unwrap_or_default());
    // Paths come from a configuration, which is UTF-8.
    let path = |path: &Option<PathBuf>| path.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
    out.text("token_file", path(&admin.token_file));
    out.text("socket", path(&admin.socket));
}
