//! `[[listener]]` and all that is in it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::choices::Choice as _;
use super::error::Problem;
use super::parse::{MAX_COUNT, MILLISECOND, Unique};
use super::pools::{MAX_IN_FLIGHT, Pools};
use super::section::{Section, Value};
use super::units::MAX_SIZE;
use super::{AcceptProxy, Listener, ListenerTls, Network, Pool, Refusable};
use crate::proxy_protocol::{MAX_LEN, parse_v1};
use crate::tls::pem::PemError;

/// The least that is kept for a client that does not read: what every answer may have (RFC 1035 section 4.2.1), bytes.
const SHORTEST_ANSWER: usize = 512;

/// The longest queue of connections whose data came with the SYN: as long as the kernel's queue of connections can be.
const MAX_FAST_OPEN: u32 = 65_535;

/// Reads all listeners.
pub(super) fn read(root: &Section<'_, '_>, pools: &Pools<'_, '_>) -> Vec<Listener> {
    let mut names = Unique::default();
    let mut addresses = Unique::default();
    let sections = root.tables("listener");
    if sections.is_empty() {
        root.fail_empty("listener");
    }
    let mut listeners = Vec::new();
    for section in sections {
        let name = section.required("name").and_then(|value| names.name(&value));
        let pool = section.required("pool").and_then(|value| pools.find(&value));
        let address = section.required("address").and_then(|value| {
            let address = value.socket_address()?;
            if address.ip().is_multicast() {
                value.fail(Problem::NotUnicast(address.ip()));
            } else if address.port() != 0 {
                addresses.add(&value, &address.to_string());
            }
            Some(address)
        });
        // What is missing here has been reported; the placeholders are never used.
        let default = Listener::new(
            name.unwrap_or_default(),
            address.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))),
            pool.unwrap_or_default(),
        );
        let count = |key, default, min| section.integer(key, default, min..=MAX_COUNT);
        let max_pending_answers =
            section.value("max_pending_answers").and_then(|value| value.size(SHORTEST_ANSWER..=MAX_SIZE));
        let tls = read_tls(&section.table("tls"));
        match (default.address.port(), &tls) {
            (853, None) => section.fail("address", Problem::ListensInClearOnDotPort),
            (53, Some(_)) => section.fail("address", Problem::ListensForTlsOnPort53),
            _ => {}
        }
        listeners.push(Listener {
            max_connections: count("max_connections", default.max_connections, 0),
            max_connections_per_client: count("max_connections_per_client", default.max_connections_per_client, 1),
            client_mask_v4: section.integer("client_mask_v4", default.client_mask_v4, 1..=32),
            client_mask_v6: section.integer("client_mask_v6", default.client_mask_v6, 1..=128),
            max_in_flight: section.integer("max_in_flight", default.max_in_flight, 1..=MAX_IN_FLIGHT),
            max_queries_per_connection: section.integer(
                "max_queries_per_connection",
                default.max_queries_per_connection,
                0..=u32::MAX,
            ),
            max_connection_duration: section.duration(
                "max_connection_duration",
                default.max_connection_duration,
                Duration::ZERO,
            ),
            max_pending_answers: max_pending_answers.unwrap_or(default.max_pending_answers),
            connection_rate_per_client: section.integer(
                "connection_rate_per_client",
                default.connection_rate_per_client,
                0..=1_000_000,
            ),
            ban_duration: section.duration("ban_duration", default.ban_duration, Duration::ZERO),
            edns_tcp_keepalive: section.boolean("edns_tcp_keepalive", default.edns_tcp_keepalive),
            tcp_keepalive: section.duration("tcp_keepalive", default.tcp_keepalive, Duration::ZERO),
            allow_from: section
                .value("allow_from")
                .and_then(|value| read_networks(&value, "; nobody could connect"))
                .unwrap_or_else(|| default.allow_from.clone()),
            refuse: read_refuse(&section, pools.get(default.pool)),
            tcp_fast_open: section.integer("tcp_fast_open", default.tcp_fast_open, 0..=MAX_FAST_OPEN),
            idle_timeout: section.duration("idle_timeout", default.idle_timeout, MILLISECOND),
            message_timeout: section.duration("message_timeout", default.message_timeout, MILLISECOND),
            write_timeout: section.duration("write_timeout", default.write_timeout, MILLISECOND),
            accept_proxy: read_accept_proxy(&section.table("accept_proxy")),
            tls,
            ..default
        });
    }
    listeners
}

fn read_accept_proxy(section: &Section<'_, '_>) -> Option<AcceptProxy> {
    if !section.is_present() {
        return None;
    }
    let default = AcceptProxy::default();
    // A shorter limit would refuse lines of version 1 that are right.
    let max_header = section.value("max_header").and_then(|value| value.size(parse_v1::MAX_LINE..=MAX_LEN));
    Some(AcceptProxy {
        from: section
            .required("from")
            .and_then(|value| {
                read_networks(&value, "; without `[listener.accept_proxy]` PROXY headers are taken from nobody")
            })
            .unwrap_or_default(),
        max_header: max_header.unwrap_or(default.max_header),
        timeout: section.duration("timeout", default.timeout, MILLISECOND),
        max_pending: section.integer("max_pending", default.max_pending, 1..=MAX_COUNT),
        outside_tls: section.boolean("outside_tls", default.outside_tls),
    })
}

fn read_tls(section: &Section<'_, '_>) -> Option<ListenerTls> {
    if !section.is_present() {
        return None;
    }
    let default = ListenerTls::default();
    let named = |key| section.required(key).and_then(|value| value.string());
    let (certificate, key) = (named("certificate"), named("key"));
    let identity = certificate.zip(key).and_then(|(certificate, key)| {
        let files = section.files()?;
        let (read, certificate) = (files.identity(certificate, key), files.path(certificate));
        // One file may hold both.
        let key = |error: &PemError| match error.fault.is_of_key() || error.file != certificate {
            true => "key",
            false => "certificate",
        };
        read.map_err(|error| section.fail(key(&error), Problem::Pem(error))).ok()
    });
    Some(ListenerTls {
        certificate: certificate.map(PathBuf::from).unwrap_or_default(),
        key: key.map(PathBuf::from).unwrap_or_default(),
        identity,
        handshake_timeout: section.duration("handshake_timeout", default.handshake_timeout, MILLISECOND),
        max_handshakes: section.integer("max_handshakes", default.max_handshakes, 1..=MAX_COUNT),
    })
}

/// What is not forwarded to this pool.
fn read_refuse(section: &Section<'_, '_>, pool: Option<&Pool>) -> Vec<Refusable> {
    let Some(value) = section.value("refuse") else { return pool.map(Refusable::default_for).unwrap_or_default() };
    let mut seen = Unique::default();
    let mut refuse = Vec::new();
    for element in value.list().unwrap_or_default() {
        if let Some(refusable) = element.choice::<Refusable>() {
            seen.add(&element, refusable.word());
            refuse.push(refusable);
        }
    }
    refuse
}

/// Networks, at least one; `empty` says what no network would mean.
fn read_networks(value: &Value<'_, '_>, empty: &'static str) -> Option<Vec<Network>> {
    let mut seen = Unique::default();
    let elements = value.list()?;
    if elements.is_empty() {
        value.fail(Problem::Empty(empty));
    }
    let mut network = |element: Value<'_, '_>| {
        let network = element.network()?;
        seen.add(&element, &network.to_string());
        Some(network)
    };
    Some(elements.into_iter().filter_map(&mut network).collect())
}
