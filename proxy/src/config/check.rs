//! `counterfoil check-config`: reads a file, prints the configuration in effect, and says what it will cost.

use std::fmt;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use rustix::process::{Resource, getrlimit};

use super::units::format_size;
use super::{Config, OneShotClose, Pool, ProxyProtocol, defaults, load, print};
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::template::Class;

/// The exit code for a configuration that is not usable (EX_USAGE of sysexits.h).
pub const EX_USAGE: u8 = 64;

/// Descriptors of the process itself: standard streams, epoll and event descriptors of each thread, admin
/// connections, BPF programs, maps and links.
const OWN_DESCRIPTORS: usize = 64;

/// Descriptors of each worker beside its listeners: epoll, eventfd, timer.
const PER_WORKER: usize = 4;

/// How long the kernel keeps TIME_WAIT, seconds (TCP_TIMEWAIT_LEN).
const TIME_WAIT_SECONDS: u64 = 60;

/// What the machine allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// RLIMIT_NOFILE, hard; none: no limit.
    pub descriptors: Option<u64>,
    /// How many ports connections can come from, per source address (`ip_local_port_range`); none: not known.
    pub ports: Option<u64>,
}

impl Limits {
    /// Of this process, here and now.
    pub fn read() -> Self {
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let mut ends = range.split_ascii_whitespace().map_while(|end| end.parse::<u64>().ok());
        let ports = ends.next().zip(ends.next()).and_then(|(first, last)| (last + 1).checked_sub(first));
        Self { descriptors: getrlimit(Resource::Nofile).maximum, ports }
    }
}

/// Something that works, but perhaps not as hoped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The key that decides it.
    pub key: String,
    /// What will happen.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key `{}`: {}", self.key, self.message)
    }
}

/// Checks a file: the configuration in effect goes to standard output, warnings and errors to standard error.
/// 0 if it can be used, else [`EX_USAGE`].
pub fn run(path: &Path) -> ExitCode {
    let (out, err) = (&mut io::stdout().lock(), &mut io::stderr().lock());
    match load(path) {
        Ok(config) => {
            for warning in forecast(&config, Limits::read()) {
                drop(writeln!(err, "warning: {}: {warning}", path.display()));
            }
            match out.write_all(print::to_toml(&config).as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
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

/// What the configuration will cost on a machine with these limits.
pub fn forecast(config: &Config, limits: Limits) -> Vec<Warning> {
    let mut warnings = Vec::new();
    warnings.extend(descriptors(config, limits));
    for (index, pool) in config.pools.iter().enumerate() {
        let path = if config.pools.len() == 1 { "pool".to_owned() } else { format!("pool[{index}]") };
        if let Some(proxy) = &pool.proxy_protocol {
            headers(config, proxy, &path, &mut warnings);
            ports(pool, proxy, limits, &path, &mut warnings);
        }
    }
    warnings
}

fn descriptors(config: &Config, limits: Limits) -> Option<Warning> {
    let workers = config.server.workers;
    let reserve = OWN_DESCRIPTORS + workers * (PER_WORKER + config.listeners.len());
    let (clients, backends) = (config.server.max_connections, config.connections.max_total);
    let needed = clients + backends + reserve;
    let limit = limits.descriptors.filter(|limit| *limit < needed as u64)?;
    Some(Warning {
        key: "server.max_connections".to_owned(),
        message: format!(
            "{clients} client connections, {backends} to backends (`connections.max_total`) and {reserve} other \
             descriptors are {needed}, but RLIMIT_NOFILE allows {limit}: clients will be refused before the limit here \
             is reached"
        ),
    })
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

/// One connection per query, closed by us in order: each keeps a port for the time of TIME_WAIT.
fn ports(pool: &Pool, proxy: &ProxyProtocol, limits: Limits, path: &str, warnings: &mut Vec<Warning>) {
    let Some(ports) = limits.ports.filter(|_| proxy.tlvs.class() == Class::Unique) else { return };
    for (index, backend) in pool.backends.iter().enumerate() {
        if backend.one_shot_close == OneShotClose::Fin {
            let path = if pool.backends.len() == 1 {
                path.to_owned() + ".backend"
            } else {
                format!("{path}.backend[{index}]")
            };
            let sources = backend.source.len().max(1) as u64;
            let rate = ports.saturating_mul(sources) / TIME_WAIT_SECONDS;
            warnings.push(Warning {
                key: format!("{path}.one_shot_close"),
                message: format!(
                    "with \"fin\" and a connection per query, {ports} ports on {sources} source address(es) last for \
                     {rate} queries a second: each stays in TIME_WAIT for {TIME_WAIT_SECONDS} s"
                ),
            });
        }
    }
}
