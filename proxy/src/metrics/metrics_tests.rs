//! The exposition: its grammar, its names, and that its numbers are those of the sources.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use super::*;
use crate::clock;
use crate::config::{ReapMode, View};
use crate::kernel;
use crate::ledger::{ConnKind, OpenInfo};
use crate::watchdog::{self, fixture};

/// Names and values of all samples, after checking the grammar of OpenMetrics 1.0 as far as this program uses it.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let body = text.strip_suffix("# EOF\n").unwrap();
    assert!(!body.contains("# EOF"));
    let mut samples = BTreeMap::new();
    let mut families = HashSet::new();
    let mut current = (String::new(), String::new());
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(families.insert(name.to_owned()), "{name} comes twice, or its samples are not together");
            assert!(!help.is_empty());
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(families.contains(name), "{name} has no help before its type");
            current = (name.to_owned(), kind.to_owned());
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let suffix = name.strip_prefix(current.0.as_str()).unwrap_or_else(|| panic!("{line} in {current:?}"));
            let allowed: &[&str] = match current.1.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_sum", "_count"],
                other => panic!("{other}"),
            };
            assert!(allowed.contains(&suffix), "{line}: {suffix} is no suffix of a {}", current.1);
            if let Some(labels) = series.strip_prefix(name).filter(|labels| !labels.is_empty()) {
                check_labels(labels);
            }
            assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} comes twice");
        }
    }
    samples
}

/// `{name="value",...}` with `\\`, `\"` and `\n` escaped.
fn check_labels(labels: &str) {
    let mut rest = labels.strip_prefix('{').unwrap();
    loop {
        let (name, after) = rest.split_once("=\"").unwrap();
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{labels}");
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next().unwrap() {
                (_, '\\') => assert!(matches!(chars.next().unwrap().1, '\\' | '"' | 'n'), "{labels}"),
                (end, '"') => break end,
                (_, c) => assert_ne!(c, '\n'),
            }
        };
        match &after[end + 1..] {
            "}" => return,
            more => rest = more.strip_prefix(',').unwrap(),
        }
    }
}

#[test]
fn the_exposition_is_openmetrics_and_has_every_name_of_the_contract() {
    let (observed, _setup, _worker) = fixture::observed(fixture::config(ReapMode::Off, None));
    let (view, ..) = kernel::open(View::None, &[], 10).unwrap();
    let watchdog = watchdog::start(observed.subject(), view).unwrap();
    let metrics = registry(Live::new(observed.clone()), watchdog.handle());
    let stats = &observed.stats[0];
    stats.listeners[0].queries.add(7);
    stats.pools[0].latency.record(Duration::from_micros(60));
    let writer = observed.ledger.writer(0).unwrap();
    let info = OpenInfo { backend: 0, kind: ConnKind::Owned, owner: 1, header: 0, client_tls: None };
    let _place = observed.clients.enter(0).unwrap();
    let (_listener, socket) = connected();
    let (_socket, _entry) = writer.reserve(info).unwrap().bind(socket, clock::now()).unwrap();
    let deadline = clock::now().after(Duration::from_secs(10));
    while watchdog.handle().report().sweeps == 0 {
        assert!(clock::now() < deadline);
        std::thread::yield_now();
    }
    let samples = parse(&metrics.render(Format::OpenMetrics));
    let value = |series: &str| samples.get(series).copied();
    assert_eq!(value("counterfoil_queries_total{listener=\"d\\\"n\\\\s\"}"), Some(7.0));
    let owned = "counterfoil_backend_connections{backend=\"unbound\",kind=\"owned\",state=\"connecting\"}";
    assert_eq!(value(owned), Some(1.0), "the ledger's row");
    assert_eq!(value("counterfoil_query_duration_seconds_bucket{le=\"0.0001\",pool=\"resolvers\"}"), Some(1.0));
    assert_eq!(value("counterfoil_query_duration_seconds_bucket{le=\"+Inf\",pool=\"resolvers\"}"), Some(1.0));
    assert_eq!(value("counterfoil_kernel_view_info{source=\"none\"}"), Some(1.0));
    assert_eq!(value("counterfoil_discrepancy_sockets{backend=\"drill\",class=\"zombie\"}"), Some(0.0));
    assert_eq!(value("counterfoil_worker_stalled{worker=\"0\"}"), Some(0.0));
    // Nobody connects to the backend's port, discard's; the row above is one place taken.
    assert_eq!(value("counterfoil_backend_ports{backend=\"unbound\"}"), Some(0.0));
    assert_eq!(value("counterfoil_total_connections"), Some(1.0));
    assert_eq!(value("counterfoil_total_connections_limit"), Some(100.0));
    assert_eq!(value("counterfoil_client_connections_limit"), Some(10.0));
    assert_eq!(
        value("counterfoil_client_connections_pending{listener=\"d\\\"n\\\\s\",stage=\"proxy_header\"}"),
        Some(0.0)
    );
    assert_eq!(value("counterfoil_listener_connections{listener=\"d\\\"n\\\\s\"}"), Some(1.0), "the place taken above");
    assert_eq!(value("counterfoil_listener_connections_limit{listener=\"d\\\"n\\\\s\"}"), Some(7.0));
    let names: HashSet<&str> = samples.keys().map(|series| series.split('{').next().unwrap()).collect();
    for name in CONTRACT {
        assert!(names.contains(name), "{name} is missing");
    }
}

fn connected() -> (std::net::TcpListener, socket2::Socket) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    (listener.try_clone().unwrap(), socket2::Socket::from(listener))
}

const CONTRACT: [&str; 47] = [
    "counterfoil_build_info",
    "counterfoil_client_connections",
    "counterfoil_client_connections_opened_total",
    "counterfoil_client_connections_closed_total",
    "counterfoil_client_connections_refused_total",
    "counterfoil_client_accept_failures_total",
    "counterfoil_queries_total",
    "counterfoil_answers_total",
    "counterfoil_queries_failed_total",
    "counterfoil_edns_errors_total",
    "counterfoil_queries_abandoned_total",
    "counterfoil_queries_in_flight",
    "counterfoil_queries_waiting",
    "counterfoil_query_duration_seconds_count",
    "counterfoil_backend_connections",
    "counterfoil_backend_connections_limit",
    "counterfoil_backend_connections_opened_total",
    "counterfoil_backend_connections_closed_total",
    "counterfoil_backend_connections_reused_total",
    "counterfoil_backend_connect_failures_total",
    "counterfoil_backend_tls_handshakes_total",
    "counterfoil_backend_queries_total",
    "counterfoil_pool_retries_total",
    "counterfoil_pool_acquire_total",
    "counterfoil_kernel_view_info",
    "counterfoil_kernel_view_uncertain",
    "counterfoil_kernel_missed_events_total",
    "counterfoil_kernel_witness_disagreements_total",
    "counterfoil_kernel_backend_sockets",
    "counterfoil_discrepancy_sockets",
    "counterfoil_reaped_total",
    "counterfoil_watchdog_sweeps_total",
    "counterfoil_watchdog_sweep_duration_seconds_bucket",
    "counterfoil_watchdog_last_success_timestamp_seconds",
    "counterfoil_watchdog_interval_seconds",
    "counterfoil_worker_stalled",
    "counterfoil_client_connections_pending",
    "counterfoil_listener_connections",
    "counterfoil_listener_connections_limit",
    "counterfoil_client_connections_limit",
    "counterfoil_total_connections",
    "counterfoil_total_connections_limit",
    "counterfoil_backend_ports",
    "counterfoil_backend_ports_limit",
    "process_max_fds",
    "process_cpu_seconds_total",
    "process_open_fds",
];
