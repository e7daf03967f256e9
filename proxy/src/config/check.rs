//! `counterfoil check-config`: reads a file, prints the configuration in effect, and says what it will cost.

use std::fmt;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use rustix::process::{Resource, getrlimit};
use rustls::pki_types::ServerName;

use super::units::format_size;
use super::{
    Backend, Config, HealthMode, Listener, OneShotClose, Pool, ProxyProtocol, View, defaults, forecast, load, print,
};
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::template::Class;
use crate::scope::IpWithZone;
use crate::stdout::Stdout;

#[path = "check_clients.rs"]
pub(super) mod clients;
#[path = "check_files.rs"]
mod files;

pub use files::unreadable_later;

/// The exit code for a configuration that is not usable (EX_USAGE of sysexits.h).
pub const EX_USAGE: u8 = 64;

/// Descriptors of the process itself: standard streams, epoll and event descriptors of each thread, admin
/// connections, BPF programs, maps and links.
const OWN_DESCRIPTORS: usize = 64;

/// Descriptors of each worker beside its listeners: epoll, eventfd, timer.
const PER_WORKER: usize = 4;

/// The bits of `net.ipv4.tcp_fastopen` that allow it to clients and to servers (Linux' ip-sysctl).
const FAST_OPEN_CLIENT: u32 = 1;
const FAST_OPEN_SERVER: u32 = 2;

/// How long the kernel keeps TIME_WAIT, seconds (TCP_TIMEWAIT_LEN).
pub(super) const TIME_WAIT_SECONDS: u64 = 60;

/// What the machine allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// RLIMIT_NOFILE, hard; none: no limit.
    pub descriptors: Option<u64>,
    /// How many ports connections can come from, per source address (`ip_local_port_range`); none: not known.
    pub ports: Option<u64>,
    /// Memory of the machine, bytes; none: not known.
    pub memory: Option<u64>,
    /// `net.ipv4.tcp_fastopen`; none: not known.
    pub fast_open: Option<u32>,
}

impl Limits {
    /// Of this process, here and now.
    pub fn read() -> Self {
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let mut ends = range.split_ascii_whitespace().map_while(|end| end.parse::<u64>().ok());
        let ports = ends.next().zip(ends.next()).and_then(|(first, last)| (last + 1).checked_sub(first));
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib =
            meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB")?.trim().parse().ok());
        let memory = kib.and_then(|kib: u64| kib.checked_mul(1024));
        let fast_open = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_fastopen").unwrap_or_default();
        let fast_open = fast_open.trim().parse().ok();
        Self { descriptors: getrlimit(Resource::Nofile).maximum, ports, memory, fast_open }
    }
}

/// Something that works, but perhaps not as hoped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The key that decides it; empty: it is about the whole file.
    pub key: String,
    /// What will happen.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => f.write_str(&self.message),
            key => write!(f, "key `{key}`: {}", self.message),
        }
    }
}

/// Checks a file: the configuration in effect and the forecast go to standard output, warnings and errors to standard error.
/// 0 if it can be used, else [`EX_USAGE`].
pub fn run(path: &Path) -> ExitCode {
    let (out, err) = (&mut Stdout::lock(), &mut io::stderr().lock());
    match load(path) {
        Ok(config) => {
            let limits = Limits::read();
            for warning in warnings(&config, limits).into_iter().chain(unreadable_later(path, &config)) {
                drop(writeln!(err, "warning: {}: {warning}", path.display()));
            }
            let mut text = print::to_toml(&config);
            for line in forecast::lines(&config, limits) {
                text.push_str(&format!("# forecast: {line}\n"));
            }
            match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    drop(writeln!(err, "error: {error}"));
                    ExitCode::FAILURE
                }
            }
        }
        Err(errors) => {
            for error in errors.iter() {
                drop(writeln!(err, "error: {error}"));
            }
            ExitCode::from(EX_USAGE)
        }
    }
}

/// What of the configuration will not be as hoped on a machine with these limits.
pub fn warnings(config: &Config, limits: Limits) -> Vec<Warning> {
    let mut warnings = Vec::new();
    warnings.extend(descriptors(config, limits));
    clients::forecast(config, limits, &mut warnings);
    warnings.extend(fast_open(config, limits));
    warnings.extend(view(config));
    for (index, (pool, listeners)) in config.pools.iter().zip(config.by_pool()).enumerate() {
        let path = if config.pools.len() == 1 { "pool".to_owned() } else { format!("pool[{index}]") };
        warnings.extend(usefulness(pool, &listeners, &path));
        for (index, backend) in pool.backends.iter().enumerate() {
            let index = if pool.backends.len() == 1 { String::new() } else { format!("[{index}]") };
            tls(config, pool, backend, &format!("{path}.backend{index}.tls"), &mut warnings);
        }
        if let Some(proxy) = &pool.proxy_protocol {
            headers(config, proxy, &path, &mut warnings);
            warnings.extend(unsaid(proxy, &listeners, &path));
            for (index, backend) in pool.backends.iter().enumerate() {
                let index = if pool.backends.len() == 1 { String::new() } else { format!("[{index}]") };
                let path = format!("{path}.backend{index}");
                warnings.extend(sources(backend, proxy, &path));
                warnings.extend(ports(backend, proxy, limits, &path));
            }
        }
    }
    warnings
}

/// Descriptors that are no connections.
fn reserve(config: &Config) -> usize {
    OWN_DESCRIPTORS + config.server.workers * (PER_WORKER + config.listeners.len())
}

/// Most connections to backends, by the limits of each and of all.
fn to_backends(config: &Config) -> usize {
    let each = config.pools.iter().flat_map(|pool| &pool.backends).map(|backend| backend.max_connections);
    each.fold(0, usize::saturating_add).min(config.connections.max_total)
}

/// Descriptors at most: for clients, to backends, others.
pub(super) fn needed(config: &Config) -> [usize; 3] {
    [clients::most(config, &config.listeners), to_backends(config), reserve(config)]
}

fn descriptors(config: &Config, limits: Limits) -> Option<Warning> {
    let [clients, backends, reserve] = needed(config);
    let needed = clients + backends + reserve;
    let limit = limits.descriptors.filter(|limit| *limit < needed as u64)?;
    Some(Warning {
        key: "server.max_connections".to_owned(),
        message: format!(
            "{clients} client connections, {backends} to backends and {reserve} other descriptors are {needed}, but \
             RLIMIT_NOFILE allows {limit}: clients will be refused before the limit here is reached"
        ),
    })
}

/// More connections than the kernel view has room for: it would be uncertain, and nothing would be reaped.
fn view(config: &Config) -> Option<Warning> {
    let (most, room) = (to_backends(config), config.kernel.max_sockets);
    let is_map = matches!(config.kernel.view, View::Auto | View::Ebpf);
    (is_map && (room as usize) < most).then(|| Warning {
        key: "kernel.max_sockets".to_owned(),
        message: format!(
            "there can be {most} connections to backends, and the kernel view by eBPF has room for {room} sockets: beyond \
             it is uncertain, and nothing is reaped"
        ),
    })
}

/// TCP fast open is asked for, and the kernel does not do it: neither side would notice.
pub(crate) fn fast_open(config: &Config, limits: Limits) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let Some(allowed) = limits.fast_open else { return warnings };
    let mut warn = |key: String, side: &str, bit: u32| {
        if allowed & bit == 0 {
            let message = format!(
                "net.ipv4.tcp_fastopen is {allowed}, which allows {side} none: `sysctl net.ipv4.tcp_fastopen={}` would",
                allowed | bit
            );
            warnings.push(Warning { key, message });
        }
    };
    if let Some(listener) = config.listeners.iter().find(|listener| listener.tcp_fast_open > 0) {
        warn(format!("listener.tcp_fast_open` of `{}", listener.name), "servers", FAST_OPEN_SERVER);
    }
    if let Some(backend) = config.pools.iter().flat_map(|pool| &pool.backends).find(|backend| backend.tcp_fast_open) {
        warn(format!("pool.backend.tcp_fast_open` of `{}", backend.name), "clients", FAST_OPEN_CLIENT);
    }
    warnings
}

/// A pool that nobody asks, or that cannot answer.
fn usefulness(pool: &Pool, listeners: &[&Listener], path: &str) -> Option<Warning> {
    if listeners.is_empty() {
        let message = "no listener uses this pool".to_owned();
        return Some(Warning { key: format!("{path}.name"), message });
    }
    if pool.backends.iter().all(|backend| backend.health.mode == HealthMode::Down) {
        let message = "all backends of this pool are down: every query fails".to_owned();
        return Some(Warning { key: format!("{path}.backend"), message });
    }
    None
}

fn headers(config: &Config, proxy: &ProxyProtocol, path: &str, warnings: &mut Vec<Warning>) {
    let mut warn = |key: &str, message: String| {
        warnings.push(Warning { key: format!("{path}.proxy_protocol{key}"), message });
    };
    let class = proxy.tlvs.class();
    if class == Class::Unique {
        warn(".tlv", "`{uuid}` differs per query: every query opens a connection".to_owned());
    }
    if class == Class::PerQuery && proxy.identity == Identity::Connection {
        let owned = config.connections.max_owned_per_client;
        warn(
            ".tlv",
            format!(
                "queries with different TLVs cannot share a connection, and `identity = \"connection\"` forbids to \
                 share with other clients: at most {owned} connections per client connection \
                 (`connections.max_owned_per_client`) are open at a time, and more sets of TLVs than that are reused \
                 in part only"
            ),
        );
    }
    if proxy.tlvs.is_per_connection() && proxy.identity != Identity::Connection {
        warn(
            ".tlv",
            "`{client_port}` names one client connection: no other client shares its connections, whatever \
             `identity` says"
                .to_owned(),
        );
    }
    if proxy.max_header > defaults::MAX_HEADER {
        warn(
            ".max_header",
            format!(
                "headers may have {}: PowerDNS Recursor and dnsdist refuse more than {} by default",
                format_size(proxy.max_header),
                format_size(defaults::MAX_HEADER)
            ),
        );
    }
}

/// `advertise_tls`, and no client comes over TLS.
fn unsaid(proxy: &ProxyProtocol, listeners: &[&Listener], path: &str) -> Option<Warning> {
    let over_tls = listeners.iter().any(|listener| listener.tls.is_some());
    (proxy.advertise_tls && !over_tls).then(|| Warning {
        key: format!("{path}.proxy_protocol.advertise_tls"),
        message: "there is nothing to say: no listener of this pool has `[listener.tls]`".to_owned(),
    })
}

/// What TLS costs with this configuration, and what it does not do.
fn tls(config: &Config, pool: &Pool, backend: &Backend, path: &str, warnings: &mut Vec<Warning>) {
    let Some(tls) = &backend.tls else { return };
    if backend.tcp_fast_open {
        let key = format!("{}.tcp_fast_open", path.trim_end_matches(".tls"));
        warnings.push(Warning { key, message: "does nothing: it is not used with TLS".to_owned() });
    }
    let mut warn = |key: &str, message: String| warnings.push(Warning { key: format!("{path}{key}"), message });
    if let ServerName::IpAddress(_) = tls.server_name {
        warn(
            ".server_name",
            "an address is not sent as SNI (RFC 6066 section 3): the certificate that the backend shows without it must \
             have the address among its names"
                .to_owned(),
        );
    }
    let Some(proxy) = &pool.proxy_protocol else { return };
    if proxy.tlvs.class() == Class::Unique {
        warn("", "every query opens a connection, and so costs a TLS handshake".to_owned());
    }
    let spares = config.connections.spares_per_backend;
    if tls.proxy_outside_tls && spares > 0 {
        warn(
            ".proxy_outside_tls",
            format!(
                "the PROXY header comes before the TLS handshake, so the {spares} connections that are kept ready \
                 (`connections.spares_per_backend`) have their handshake still before them"
            ),
        );
    }
}

/// The header names the forwarder's own side, so all who share it must come from one address.
fn sources(backend: &Backend, proxy: &ProxyProtocol, path: &str) -> Option<Warning> {
    let first = backend.source.first().filter(|_| backend.source.len() > 1)?;
    (proxy.identity == Identity::Forwarder).then(|| Warning {
        key: format!("{path}.source"),
        message: format!(
            "`identity = \"forwarder\"` names the source, so only the first is used: {}",
            IpWithZone(*first)
        ),
    })
}

/// One connection per query, closed by us in order: each keeps a port for the time of TIME_WAIT.
fn ports(backend: &Backend, proxy: &ProxyProtocol, limits: Limits, path: &str) -> Option<Warning> {
    let ports = limits.ports.filter(|_| proxy.tlvs.class() == Class::Unique)?;
    if backend.one_shot_close != OneShotClose::Fin {
        return None;
    }
    let sources = match proxy.identity {
        Identity::Forwarder => 1,
        _ => backend.source.len().max(1) as u64,
    };
    let rate = ports.saturating_mul(sources) / TIME_WAIT_SECONDS;
    Some(Warning {
        key: format!("{path}.one_shot_close"),
        message: format!(
            "with \"fin\" and a connection per query, {ports} ports on {sources} source address(es) last for {rate} \
             queries a second: each stays in TIME_WAIT for {TIME_WAIT_SECONDS} s"
        ),
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::super::contract_tests::MINIMAL;
    use super::super::from_str;
    use super::*;

    /// Enough for the defaults with two workers.
    const ROOMY: Limits =
        Limits { descriptors: Some(20_000), ports: Some(28_232), memory: Some(16 << 30), fast_open: Some(3) };

    /// The warnings for the minimal configuration with two workers and this behind it.
    fn warned(text: &str, limits: Limits) -> Vec<String> {
        let config = from_str("f.toml", &format!("server.workers = 2\n{MINIMAL}{text}")).unwrap();
        warnings(&config, limits).iter().map(ToString::to_string).collect()
    }

    fn tlv(identity: &str, value: &str) -> String {
        format!("[pool.proxy_protocol]\nidentity = \"{identity}\"\ntlv = [{{ type = 0xE0, value = \"{value}\" }}]\n")
    }

    #[test]
    fn nothing_to_warn_of() {
        assert_eq!(warned("", ROOMY), [""; 0]);
        assert_eq!(warned("", Limits::default()), [""; 0]);
        assert_eq!(warned(&tlv("connection", "static"), ROOMY), [""; 0]);
        assert_eq!(warned(&tlv("connection", "{client_port}"), ROOMY), [""; 0]);
        assert_eq!(warned(&tlv("address", "{qname}"), ROOMY), [""; 0]);
    }

    #[test]
    fn more_connections_than_descriptors() {
        let limits = |descriptors| Limits { descriptors: Some(descriptors), ..Limits::default() };
        // 10,000 + 512 + 64 + 2 * (4 + 1)
        assert_eq!(warned("", limits(10_586)), [""; 0]);
        let said = |clients: usize, backends: usize, limit: usize| {
            format!(
                "key `server.max_connections`: {clients} client connections, {backends} to backends and 74 other \
                 descriptors are {}, but RLIMIT_NOFILE allows {limit}: clients will be refused before the limit here is \
                 reached",
                clients + backends + 74
            )
        };
        assert_eq!(warned("", limits(10_585)), [said(10_000, 512, 10_585)]);
        // All backends together, and all listeners.
        assert_eq!(warned("max_connections = 9000\n", limits(9)), [said(10_000, 8192, 9)]);
        let few = MINIMAL.replacen("pool = \"resolvers\"\n", "pool = \"resolvers\"\nmax_connections = 300\n", 1);
        let config = from_str("f.toml", &format!("server.workers = 2\n{few}")).unwrap();
        assert_eq!(descriptors(&config, limits(9)).unwrap().to_string(), said(300, 512, 9));
    }

    #[test]
    fn a_header_per_query() {
        assert_eq!(
            warned(&tlv("forwarder", "{uuid}"), ROOMY),
            ["key `pool.proxy_protocol.tlv`: `{uuid}` differs per query: every query opens a connection"]
        );
    }

    #[test]
    fn ports_in_time_wait() {
        let text = "one_shot_close = \"fin\"\nsource = [\"127.0.0.1\", \"127.0.0.2\"]\n".to_owned();
        assert_eq!(
            warned(&(text.clone() + &tlv("address", "{uuid}")), ROOMY),
            [
                "key `pool.proxy_protocol.tlv`: `{uuid}` differs per query: every query opens a connection",
                "key `pool.backend.one_shot_close`: with \"fin\" and a connection per query, 28232 ports on 2 source \
                 address(es) last for 941 queries a second: each stays in TIME_WAIT for 60 s"
            ]
        );
        assert_eq!(warned(&(text + &tlv("address", "{qname}")), ROOMY), [""; 0]);
    }

    #[test]
    fn one_source_for_the_forwarder() {
        let text = "source = [\"127.0.0.1\", \"127.0.0.2\"]\n".to_owned();
        assert_eq!(
            warned(&(text.clone() + &tlv("forwarder", "{qname}")), ROOMY),
            ["key `pool.backend.source`: `identity = \"forwarder\"` names the source, so only the first is used: \
              127.0.0.1"]
        );
        assert_eq!(warned(&(text + &tlv("subnet", "{qname}")), ROOMY), [""; 0]);
    }

    #[test]
    fn owned_connections_and_headers_that_change() {
        assert_eq!(
            warned(&(tlv("connection", "{qname_label:1}") + "[connections]\nmax_owned_per_client = 3\n"), ROOMY),
            ["key `pool.proxy_protocol.tlv`: queries with different TLVs cannot share a connection, and `identity = \
              \"connection\"` forbids to share with other clients: at most 3 connections per client connection \
              (`connections.max_owned_per_client`) are open at a time, and more sets of TLVs than that are reused in \
              part only"]
        );
        assert_eq!(
            warned(&tlv("subnet", "{client_port}"), ROOMY),
            ["key `pool.proxy_protocol.tlv`: `{client_port}` names one client connection: no other client shares its \
              connections, whatever `identity` says"]
        );
    }

    #[test]
    fn tls_towards_backends() {
        let tls = |more: &str| format!("[pool.backend.tls]\n{more}\n");
        let named = tls("server_name = \"a.example\"");
        assert_eq!(warned(&named, ROOMY), [""; 0]);
        assert_eq!(warned(&(named.clone() + "[connections]\nspares_per_backend = 2\n"), ROOMY), [""; 0]);
        assert_eq!(
            warned(&tls("server_name = \"192.0.2.1\""), ROOMY),
            [
                "key `pool.backend.tls.server_name`: an address is not sent as SNI (RFC 6066 section 3): the certificate \
              that the backend shows without it must have the address among its names"
            ]
        );
        let per_query = named + &tlv("address", "{uuid}") + "[connections]\nspares_per_backend = 2\n";
        assert_eq!(
            warned(&per_query, ROOMY)[..2],
            [
                "key `pool.backend.tls`: every query opens a connection, and so costs a TLS handshake",
                "key `pool.backend.tls.proxy_outside_tls`: the PROXY header comes before the TLS handshake, so the 2 \
                 connections that are kept ready (`connections.spares_per_backend`) have their handshake still before \
                 them"
            ]
        );
    }

    #[test]
    fn a_kernel_view_without_room() {
        let few =
            |view: &str, room: usize| warned(&format!("[kernel]\nview = \"{view}\"\nmax_sockets = {room}\n"), ROOMY);
        assert_eq!(few("auto", 512), [""; 0]);
        let warning = "key `kernel.max_sockets`: there can be 512 connections to backends, and the kernel view by eBPF has \
                       room for 511 sockets: beyond it is uncertain, and nothing is reaped";
        assert_eq!([few("auto", 511), few("ebpf", 511)], [[warning], [warning]]);
        assert_eq!(few("sock-diag", 511), [""; 0]);
    }

    #[test]
    fn tcp_fast_open_over_tls() {
        let tls = "tcp_fast_open = true\n[pool.backend.tls]\nserver_name = \"a.example\"\n";
        assert_eq!(warned(tls, ROOMY), ["key `pool.backend.tcp_fast_open`: does nothing: it is not used with TLS"]);
    }

    #[test]
    fn long_headers() {
        assert_eq!(warned("[pool.proxy_protocol]\nmax_header = \"512B\"\n", ROOMY), [""; 0]);
        assert_eq!(
            warned("[pool.proxy_protocol]\nmax_header = \"4KiB\"\n", ROOMY),
            ["key `pool.proxy_protocol.max_header`: headers may have 4KiB: PowerDNS Recursor and dnsdist refuse more \
              than 512B by default"]
        );
    }

    #[test]
    fn tls_that_nobody_has() {
        let warning = "key `pool.proxy_protocol.advertise_tls`: there is nothing to say: no listener of this pool has \
                       `[listener.tls]`";
        assert_eq!(warned("[pool.proxy_protocol]\nadvertise_tls = true\n", ROOMY), [warning]);
        let tls = "[[listener]]\nname = \"dot\"\naddress = \"127.0.0.1:853\"\npool = \"resolvers\"\n\
                   [listener.tls]\ncertificate = \"c\"\nkey = \"k\"\n";
        assert_eq!(warned(&format!("[pool.proxy_protocol]\nadvertise_tls = true\n{tls}"), ROOMY), [""; 0]);
    }

    #[test]
    fn keys_of_several_pools_have_an_index() {
        let second = "[[pool]]\nname = \"two\"\nproxy_protocol.max_header = \"1KiB\"\n[[pool.backend]]\nname = \"b\"\n\
                      address = \"192.0.2.1:53\"\n";
        assert_eq!(
            warned(second, ROOMY),
            [
                "key `pool[1].name`: no listener uses this pool",
                "key `pool[1].proxy_protocol.max_header`: headers may have 1KiB: PowerDNS Recursor and dnsdist refuse \
                 more than 512B by default"
            ]
        );
    }

    #[test]
    fn a_pool_that_cannot_answer() {
        assert_eq!(
            warned("health.mode = \"down\"\n", ROOMY),
            ["key `pool.backend`: all backends of this pool are down: every query fails"]
        );
    }

    #[test]
    fn tcp_fast_open_that_the_kernel_does_not_do() {
        let text = MINIMAL.replace("pool = ", "tcp_fast_open = 16\npool = ") + "tcp_fast_open = true\n";
        let config = from_str("f.toml", &format!("server.workers = 2\n{text}")).unwrap();
        let warned = |allowed| {
            let limits = Limits { fast_open: Some(allowed), ..ROOMY };
            warnings(&config, limits).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(warned(3), [""; 0]);
        let listener = "key `listener.tcp_fast_open` of `dns`: net.ipv4.tcp_fastopen is 1, which allows servers none: \
                        `sysctl net.ipv4.tcp_fastopen=3` would";
        assert_eq!(warned(1), [listener]);
        assert_eq!(warned(0).len(), 2);
        assert!(warned(2)[0].contains("`pool.backend.tcp_fast_open` of `unbound-1`"), "{:?}", warned(2));
    }

    #[test]
    fn this_machine_has_limits() {
        let limits = Limits::read();
        assert!(limits.ports.is_some_and(|ports| (1..=65_536).contains(&ports)), "{limits:?}");
        assert!(limits.memory.is_some_and(|memory| memory > 1 << 20), "{limits:?}");
        assert_ne!(limits.descriptors, Some(0));
    }
}
