//! Which headers open the connections to each backend: the types of their TLVs, and how many distinct ones there are.
//!
//! The ledger keeps a digest of each header, not its bytes.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Context, Page, digest};
use crate::config::{Pool, ProxyProtocol};
use crate::proxy_protocol::identity::Identity;
use crate::proxy_protocol::template::Class;

/// Digests listed per backend, those with most connections first.
const LISTED: usize = 100;

#[derive(Serialize)]
struct Headers<'a> {
    event: &'static str,
    backend: &'a str,
    pool: &'a str,
    /// None: no PROXY header.
    identity: Option<&'static str>,
    tlvs: Vec<Tlv>,
    connections: u64,
    /// Among them without a header.
    without_header: u64,
    distinct_headers: usize,
    queries: u64,
    reused: u64,
    headers: Vec<Header>,
    headers_left_out: usize,
}

#[derive(Serialize)]
struct Tlv {
    r#type: String,
    varies: &'static str,
}

#[derive(Serialize)]
struct Header {
    header: Option<String>,
    connections: u64,
    in_flight: u64,
    carried: u64,
}

pub(super) fn page(context: &Context<'_>) -> Page {
    let mut page = Page::default();
    let pools = context.observed.config.pools.iter();
    let backends = pools.flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend.name.as_str())));
    for (pool, backend) in backends {
        // All names of the configuration have numbers.
        let Some(number) = context.observed.numbers.backend(backend) else { continue };
        page.push(headers(usize::from(number), pool, backend, context));
    }
    page
}

fn headers<'a>(index: usize, pool: &'a Pool, backend: &'a str, context: &Context<'_>) -> Headers<'a> {
    let mut distinct: BTreeMap<u64, Header> = BTreeMap::new();
    let (mut connections, mut without_header) = (0, 0);
    for row in context.look.ledger.rows.iter().filter(|row| usize::from(row.backend) == index) {
        connections += 1;
        if row.header == 0 {
            without_header += 1;
            continue;
        }
        let header = distinct.entry(row.header).or_insert_with(|| Header {
            header: digest(row.header),
            connections: 0,
            in_flight: 0,
            carried: 0,
        });
        header.connections += 1;
        header.in_flight += u64::from(row.in_flight);
        header.carried += row.queries;
    }
    let distinct_headers = distinct.len();
    let mut headers: Vec<Header> = distinct.into_values().collect();
    headers.sort_by_key(|header| std::cmp::Reverse((header.connections, header.carried)));
    headers.truncate(LISTED);
    let stats = || context.observed.stats.iter().filter_map(|worker| worker.backends.get(index));
    Headers {
        event: "headers",
        backend,
        pool: &pool.name,
        identity: pool.proxy_protocol.as_ref().map(identity),
        tlvs: pool.proxy_protocol.as_ref().map(tlvs).unwrap_or_default(),
        connections,
        without_header,
        distinct_headers,
        queries: stats().map(|backend| backend.queries.get()).sum(),
        reused: stats().map(|backend| backend.reused.get()).sum(),
        headers_left_out: distinct_headers - headers.len(),
        headers,
    }
}

fn identity(proxy: &ProxyProtocol) -> &'static str {
    match proxy.identity {
        Identity::Connection => "connection",
        Identity::Address => "address",
        Identity::Subnet { .. } => "subnet",
        Identity::Forwarder => "forwarder",
    }
}

fn tlvs(proxy: &ProxyProtocol) -> Vec<Tlv> {
    let varies = |class| match class {
        Class::Static => "never",
        Class::PerClient => "per client",
        Class::PerQuery => "with the question",
        Class::Unique => "with every query",
    };
    let tlvs = proxy.tlvs.iter();
    tlvs.map(|(kind, template)| Tlv { r#type: format!("0x{kind:02X}"), varies: varies(template.class()) }).collect()
}
