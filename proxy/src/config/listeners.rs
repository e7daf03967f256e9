//! `[[listener]]` and all that is in it.

use std::net::SocketAddr;

use super::error::Problem;
use super::parse::{MAX_COUNT, MILLISECOND, Unique};
use super::pools::{MAX_IN_FLIGHT, Pools};
use super::section::{Section, Value};
use super::{AcceptProxy, Listener, Network};
use crate::proxy_protocol::{MAX_LEN, parse_v1};

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
        listeners.push(Listener {
            max_connections_per_client: section.integer(
                "max_connections_per_client",
                default.max_connections_per_client,
                1..=MAX_COUNT,
            ),
            max_in_flight: section.integer("max_in_flight", default.max_in_flight, 1..=MAX_IN_FLIGHT),
            idle_timeout: section.duration("idle_timeout", default.idle_timeout, MILLISECOND),
            message_timeout: section.duration("message_timeout", default.message_timeout, MILLISECOND),
            write_timeout: section.duration("write_timeout", default.write_timeout, MILLISECOND),
            accept_proxy: read_accept_proxy(&section.table("accept_proxy")),
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
        from: section.required("from").and_then(|value| read_networks(&value)).unwrap_or_default(),
        max_header: max_header.unwrap_or(default.max_header),
        timeout: section.duration("timeout", default.timeout, MILLISECOND),
    })
}

fn read_networks(value: &Value<'_, '_>) -> Option<Vec<Network>> {
    let mut seen = Unique::default();
    let elements = value.list()?;
    if elements.is_empty() {
        value.fail(Problem::Empty("; without `[listener.accept_proxy]` PROXY headers are taken from nobody"));
    }
    let mut network = |element: Value<'_, '_>| {
        let network = element.network()?;
        seen.add(&element, &network.to_string());
        Some(network)
    };
    Some(elements.into_iter().filter_map(&mut network).collect())
}
