//! What the tests of watchdog, metrics, admin and drills start from: a configuration, a ledger and a shard's owner.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Observed;
use crate::config::{
    Admin, Backend, Class, Config, Connections, Health, HealthMode, Kernel, Listener, OnFailure, OneShotClose,
    Overload, Policy, Pool, ReapMode, Server, View, Watchdog,
};
use crate::control::{Control, Controls};
use crate::drill::{AT_ONCE, Setup};
use crate::ledger::Ledger;
use crate::ledger::caps::Caps;
use crate::stats::WorkerStats;

pub(crate) fn config(reap: ReapMode, socket: Option<PathBuf>) -> Config {
    Config {
        server: Server {
            workers: 1,
            drain_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(1),
            max_connections: 10,
            log: "info".to_owned(),
        },
        overload: Overload::default(),
        listeners: vec![Listener {
            // Needs escaping in an exposition.
            name: "d\"n\\s".to_owned(),
            max_connections: 7,
            max_connections_per_client: 10,
            max_in_flight: 10,
            ..Listener::new("", "127.0.0.1:0".parse().unwrap(), 0)
        }],
        pools: vec![Pool {
            name: "resolvers".to_owned(),
            policy: Policy::LeastOutstanding,
            query_timeout: Duration::from_secs(5),
            retries: 1,
            on_failure: OnFailure::Servfail,
            proxy_protocol: None,
            backends: vec![Backend {
                name: "unbound".to_owned(),
                address: "127.0.0.1:9".parse().unwrap(),
                weight: 1,
                max_in_flight: 32,
                max_connections: 100,
                connect_timeout: Duration::from_secs(2),
                write_timeout: Duration::from_secs(2),
                source: Vec::new(),
                tcp_fast_open: false,
                one_shot_close: OneShotClose::Reset,
                tls: None,
                health: Health { mode: HealthMode::Up, ..Health::default() },
            }],
        }],
        connections: Connections {
            idle_timeout: Duration::from_secs(30),
            max_age: Duration::from_secs(600),
            max_idle_per_backend: 64,
            max_owned_per_client: 8,
            max_total: 100,
            max_opens_per_client: 0,
            max_waiting: 100,
            max_wait: Duration::from_secs(1),
            spares_per_backend: 0,
            spare_idle_timeout: Duration::from_secs(1),
            cleanup_interval: Duration::from_millis(100),
            ..Connections::default()
        },
        kernel: Kernel { view: View::SockDiag, max_sockets: 1000 },
        watchdog: Watchdog {
            interval: Duration::from_millis(100),
            grace: Duration::from_millis(300),
            sweeps: 3,
            crosscheck_interval: Duration::from_secs(60),
            reap,
            max_reaps_per_minute: 600,
            classes: Class::ALL.to_vec(),
        },
        admin: Admin { http: Some("127.0.0.1:0".parse().unwrap()), token_file: None, socket },
    }
}

/// One worker that is nobody's, and the drill's shard. The receiver is the worker's.
pub(crate) fn observed(config: Config) -> (Observed, Setup, UnboundedReceiver<Control>) {
    let caps = Arc::new(Caps::new([100], 100).with_drill(1, AT_ONCE));
    let ledger = Arc::new(Ledger::new(2, 100, 2, caps));
    let (worker, received) = unbounded_channel();
    let (drill, drill_received) = unbounded_channel();
    let setup = Setup::bind(drill_received).unwrap();
    let stats = vec![Arc::new(WorkerStats::new(1, 1, 1))];
    let controls = Controls::new(vec![worker, drill]);
    let observed = Observed::new(Arc::new(config), ledger, stats, controls, setup.address().unwrap());
    (observed, setup, received)
}
