//! `[[pool]]` and all that is in it.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use rustls::pki_types::ServerName;

use super::choices::IdentityWord;
use super::effort;
use super::error::Problem;
use super::parse::{MAX_COUNT, MILLISECOND, Unique, is_host};
use super::section::{Section, Value};
use super::{Backend, BackendTls, Health, Listener, Pool, ProxyProtocol, defaults, group_by_pool, units};
use crate::backend::tls::Trust;
use crate::proxy_protocol::client_tls;
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::seal::Seal;
use crate::proxy_protocol::template::{Context, Template, TlvSet, check_type};
use crate::proxy_protocol::{FIXED_LEN, IPV4_ADDRESSES, IPV6_ADDRESSES, MAX_LEN};
use crate::scope::IpWithZone;

/// Most queries in flight on one connection: as many as a message ID can tell apart (RFC 1035 section 4.1.1).
pub(super) const MAX_IN_FLIGHT: usize = 1 << 16;

/// The largest weight: shares finer than a thousandth are nobody's intention.
const MAX_WEIGHT: u32 = 1000;

/// The shortest interval of health checks: each opens a connection.
const SHORTEST_CHECK: Duration = Duration::from_millis(10);

/// Most checks in a row for `rise` and `fall`.
const MAX_CHECKS: u32 = 1000;

/// Most retries: each repeats the query while its client waits.
const MAX_RETRIES: u8 = 10;

/// Where nothing but DNS over TLS may be spoken (RFC 7858 section 3.1).
pub(super) const DOT_PORT: u16 = 853;

/// Where systems keep the certificates that they trust: Debian, Fedora, SUSE, Alpine.
const TRUST_STORES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// How many pools are named where another one is asked for.
const SUGGESTED: usize = 10;

/// Names of backends that metrics use as labels for something else.
const RESERVED_NAMES: [&str; 2] = ["drill", "unknown"];

/// The pools as read, with their places in the file for the checks that need more than one table.
pub(super) struct Pools<'a, 'i> {
    sections: Vec<Section<'a, 'i>>,
    pools: Vec<Pool>,
    by_name: HashMap<String, usize>,
    /// Addresses of all backends.
    addresses: Vec<(Value<'a, 'i>, SocketAddr)>,
}

impl<'a, 'i> Pools<'a, 'i> {
    /// Reads all pools.
    pub(super) fn read(root: &Section<'a, 'i>) -> Self {
        let mut pools =
            Self { sections: root.tables("pool"), pools: Vec::new(), by_name: HashMap::new(), addresses: Vec::new() };
        if pools.sections.is_empty() {
            root.fail_empty("pool");
        }
        let mut names = Unique::default();
        let mut backend_names = Unique::default();
        for section in &pools.sections {
            let name = section.required("name").and_then(|value| names.name(&value)).unwrap_or_default();
            let backends = read_backends(section, &mut backend_names, &mut pools.addresses);
            pools.by_name.entry(name.to_owned()).or_insert(pools.pools.len());
            let default = Pool::new(name, backends);
            pools.pools.push(Pool {
                policy: section.choice("policy", default.policy),
                query_timeout: section.duration("query_timeout", default.query_timeout, MILLISECOND),
                retries: section.integer("retries", default.retries, 0..=MAX_RETRIES),
                on_failure: section.choice("on_failure", default.on_failure),
                proxy_protocol: read_proxy_protocol(&section.table("proxy_protocol")),
                ..default
            });
        }
        pools
    }

    /// The index of the pool that a listener names.
    pub(super) fn find(&self, value: &Value<'_, '_>) -> Option<usize> {
        let name = value.string()?;
        let found = self.by_name.get(name).copied();
        // Pools whose own names are wrong have none here. Without any there is nothing that could be named.
        let named = || self.pools.iter().filter(|pool| !pool.name.is_empty());
        if found.is_none() && named().next().is_some() {
            value.fail_with(|| {
                let some: Vec<String> = named().take(SUGGESTED).map(|pool| format!("{:?}", pool.name)).collect();
                let more = if named().nth(SUGGESTED).is_some() { ", ..." } else { "" };
                Problem::UnknownPool { name: name.to_owned(), pools: some.join(", ") + more }
            });
        }
        found
    }

    /// Reports backends that are listeners of this very configuration.
    pub(super) fn check_loops(&self, listeners: &[Listener]) {
        let mut at = HashMap::new();
        for listener in listeners.iter().rev() {
            at.insert((listener.address.ip(), listener.address.port()), listener);
        }
        effort::spend(listeners.len() + self.addresses.len());
        for (value, backend) in &self.addresses {
            let everywhere = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
            let everywhere = everywhere.into_iter().filter(|_| backend.ip().is_loopback());
            let mut places = std::iter::once(backend.ip()).chain(everywhere);
            if let Some(listener) = places.find_map(|ip| at.get(&(ip, backend.port()))) {
                value.fail(Problem::Loop(*backend, listener.name.clone()));
            }
        }
    }

    /// Reports a `max_header` that no header can meet.
    pub(super) fn check_headers(&self, listeners: &[Listener]) {
        let by_pool = group_by_pool(listeners, self.pools.len());
        for ((section, pool), listeners) in self.sections.iter().zip(&self.pools).zip(&by_pool) {
            let Some(proxy) = &pool.proxy_protocol else { continue };
            // What a header has of its listener is the name, and whether that speaks TLS.
            let shortest = |over_tls: bool| {
                let those = listeners.iter().filter(|listener| listener.tls.is_some() == over_tls);
                let listener = those.min_by_key(|listener| listener.name.len())?;
                Some(shortest_header(proxy, pool, listener))
            };
            let Some(shortest) = shortest(false).into_iter().chain(shortest(true)).min() else { continue };
            if shortest > proxy.max_header {
                let max = units::format_size(proxy.max_header);
                section.table("proxy_protocol").fail("max_header", Problem::HeaderTooLong { shortest, max });
            }
        }
    }

    /// The one of this index.
    pub(super) fn get(&self, index: usize) -> Option<&Pool> {
        self.pools.get(index)
    }

    /// The pools in the order of the file.
    pub(super) fn into_pools(self) -> Vec<Pool> {
        self.pools
    }
}

/// The length of the shortest header that a query through this listener can have, bytes.
fn shortest_header(proxy: &ProxyProtocol, pool: &Pool, listener: &Listener) -> usize {
    let only_ipv6 = proxy.identity == Identity::Forwarder && pool.backends.iter().all(|b| b.address.is_ipv6());
    let mut header = vec![0; FIXED_LEN + if only_ipv6 { IPV6_ADDRESSES } else { IPV4_ADDRESSES }];
    let client = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let context = Context { client, listener: &listener.name, question: None, incoming: &[], sni: "", random: 0 };
    proxy.tlvs.render(&context, &mut header);
    let tls = if proxy.advertise_tls && listener.tls.is_some() { client_tls::SHORTEST } else { 0 };
    header.len() + tls + proxy.seal.len()
}

fn read_proxy_protocol(section: &Section<'_, '_>) -> Option<ProxyProtocol> {
    if !section.is_present() {
        return None;
    }
    let default = ProxyProtocol::default();
    let v4 = section.integer("subnet_v4", defaults::SUBNET_V4, 1..=32);
    let v6 = section.integer("subnet_v6", defaults::SUBNET_V6, 1..=128);
    let shortest = FIXED_LEN + IPV6_ADDRESSES;
    let max_header = section.value("max_header").and_then(|value| value.size(shortest..=MAX_LEN));
    Some(ProxyProtocol {
        identity: match section.choice("identity", IdentityWord::Connection) {
            IdentityWord::Connection => Identity::Connection,
            IdentityWord::Address => Identity::Address,
            IdentityWord::Subnet => Identity::Subnet { v4, v6 },
            IdentityWord::Forwarder => Identity::Forwarder,
        },
        max_header: max_header.unwrap_or(default.max_header),
        seal: Seal {
            crc32c: section.boolean("crc32c", default.seal.crc32c),
            unique_id: section.boolean("unique_id", default.seal.unique_id),
        },
        advertise_tls: section.boolean("advertise_tls", default.advertise_tls),
        pass_incoming_tlvs: section.boolean("pass_incoming_tlvs", default.pass_incoming_tlvs),
        tlvs: read_tlvs(section),
    })
}

fn read_tlvs(section: &Section<'_, '_>) -> TlvSet {
    let mut tlvs = TlvSet::default();
    for section in section.tables("tlv") {
        let kind = section.required("type").and_then(|value| {
            let kind = value.integer(0..=u8::MAX)?;
            check_type(kind).map_err(|error| value.fail(Problem::TlvType(error))).ok()?;
            Some(kind)
        });
        let template = section.required("value").and_then(|value| {
            let template = value.string()?.parse::<Template>();
            template.map_err(|error| value.fail(Problem::Template(error))).ok()
        });
        if let (Some(kind), Some(template)) = (kind, template)
            && let Err(error) = tlvs.push(kind, template)
        {
            section.fail("type", Problem::TlvType(error));
        }
    }
    tlvs
}

fn read_backends<'a, 'i>(
    pool: &Section<'a, 'i>,
    names: &mut Unique,
    addresses: &mut Vec<(Value<'a, 'i>, SocketAddr)>,
) -> Vec<Backend> {
    let sections = pool.tables("backend");
    if sections.is_empty() {
        pool.fail_empty("backend");
    }
    let mut seen = Unique::default();
    let mut backends = Vec::new();
    for section in sections {
        let name = section.required("name").and_then(|value| backend_name(&value, names)).unwrap_or_default();
        let address = section.required("address").and_then(|value| {
            let address = backend_address(&value)?;
            seen.add(&value, &address.to_string());
            addresses.push((value, address));
            Some(address)
        });
        let tls = section.table("tls");
        match (address.map(|address| address.port()), tls.is_present()) {
            (Some(DOT_PORT), false) => section.fail("address", Problem::AsksInClearOnDotPort),
            (Some(53), true) => section.fail("address", Problem::AsksOverTlsOnPort53),
            _ => {}
        }
        let default = Backend::new(name, address.unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))));
        backends.push(Backend {
            weight: section.integer("weight", default.weight, 1..=MAX_WEIGHT),
            max_in_flight: section.integer("max_in_flight", default.max_in_flight, 1..=MAX_IN_FLIGHT),
            max_connections: section.integer("max_connections", default.max_connections, 1..=MAX_COUNT),
            connect_timeout: section.duration("connect_timeout", default.connect_timeout, MILLISECOND),
            write_timeout: section.duration("write_timeout", default.write_timeout, MILLISECOND),
            source: section.value("source").and_then(|value| read_sources(&value, address)).unwrap_or_default(),
            tcp_fast_open: section.boolean("tcp_fast_open", default.tcp_fast_open),
            one_shot_close: section.choice("one_shot_close", default.one_shot_close),
            tls: read_tls(&tls),
            health: read_health(&section.table("health")),
            ..default
        });
    }
    backends
}

fn read_tls(section: &Section<'_, '_>) -> Option<BackendTls> {
    if !section.is_present() {
        return None;
    }
    let name = section.required("server_name").and_then(|value| {
        let name = value.string()?;
        let parsed = ServerName::try_from(name.to_owned());
        parsed.map_err(|_| value.fail(Problem::NotAServerName(name.to_owned()))).ok()
    });
    let ca = section.value("ca");
    let named = ca.as_ref().and_then(Value::string);
    let file = match (&ca, named) {
        // Of another type, which has been reported.
        (Some(_), None) => None,
        (_, Some(named)) => section.files().map(|files| files.path(named)),
        (None, None) => system_store(section),
    };
    let trust = section.files().zip(file).map(|(files, file)| Trust::new(&files.issuers(file)?)).transpose();
    let trust = trust.map_err(|error| section.fail("ca", Problem::Trust(error))).ok().flatten();
    Some(BackendTls {
        // Without a name nothing is used: that is an error.
        server_name: name.unwrap_or(ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into())),
        ca: named.map(PathBuf::from),
        proxy_outside_tls: section.boolean("proxy_outside_tls", true),
        trust: trust.unwrap_or_default(),
    })
}

/// The first of the usual places that has a trust store.
fn system_store(section: &Section<'_, '_>) -> Option<PathBuf> {
    let files = section.files()?;
    let found = TRUST_STORES.into_iter().map(|place| files.path(place)).find(|place| place.is_file());
    if found.is_none() {
        section.fail("ca", Problem::NoTrustStore(TRUST_STORES.join(", ")));
    }
    found
}

fn read_health(section: &Section<'_, '_>) -> Health {
    let default = Health::default();
    let name = section.value("name").and_then(|value| {
        let name = value.string()?.parse();
        name.map_err(|error| value.fail(Problem::DomainName(error))).ok()
    });
    Health {
        mode: section.choice("mode", default.mode),
        interval: section.duration("interval", default.interval, SHORTEST_CHECK),
        timeout: section.duration("timeout", default.timeout, MILLISECOND),
        name: name.unwrap_or(default.name),
        rise: section.integer("rise", default.rise, 1..=MAX_CHECKS),
        fall: section.integer("fall", default.fall, 1..=MAX_CHECKS),
    }
}

fn backend_name<'a>(value: &Value<'a, '_>, names: &mut Unique) -> Option<&'a str> {
    let name = names.name(value)?;
    if let Some(reserved) = RESERVED_NAMES.into_iter().find(|reserved| *reserved == name) {
        value.fail(Problem::ReservedName(reserved));
    }
    Some(name)
}

fn backend_address(value: &Value<'_, '_>) -> Option<SocketAddr> {
    let address = match value.socket_address()? {
        // The kernel connects to these by IPv4, and shows them so.
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            SocketAddr::new(IpAddr::V6(*v6.ip()).to_canonical(), v6.port())
        }
        address => address,
    };
    if !is_host(address.ip()) {
        value.fail(Problem::NotUnicast(address.ip()));
        return None;
    }
    if address.port() == 0 {
        value.fail(Problem::PortZero);
        return None;
    }
    Some(address)
}

fn read_sources(value: &Value<'_, '_>, backend: Option<SocketAddr>) -> Option<Vec<SocketAddr>> {
    let mut seen = Unique::default();
    let mut sources = Vec::new();
    for element in value.list()? {
        let Some(source) = element.ip_address() else { continue };
        let source_ip = source.ip().to_canonical();
        if !is_host(source_ip) {
            element.fail(Problem::NotUnicast(source_ip));
        }
        if let Some(address) = backend
            && address.is_ipv4() != source_ip.is_ipv4()
        {
            element.fail(Problem::FamilyMismatch { source_ip, address });
        }
        seen.add(&element, &IpWithZone(source).to_string());
        sources.push(if source_ip == source.ip() { source } else { SocketAddr::new(source_ip, 0) });
    }
    Some(sources)
}
