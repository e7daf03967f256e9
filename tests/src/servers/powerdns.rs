//! PowerDNS Authoritative 4.7 with `proxy-protocol-from`: a primary that answers every IXFR with all of the zone, unless
//! the client is up to date.

use std::net::SocketAddr;
use std::time::Duration;

use crate::process::{self, Process};
use crate::tempdir::TempDir;
use crate::zone;

const PROGRAM: &str = "pdns_server";

/// A running server of [`zone::NAME`].
#[derive(Debug)]
pub struct PowerDns {
    /// The process.
    pub process: Process,
    /// Where it listens. From 127.0.0.1 it wants a PROXY header, from other addresses none.
    pub address: SocketAddr,
    _dir: TempDir,
}

impl PowerDns {
    /// Starts it with a zone of this serial and so many hosts. Whoever is in 127.0.0.0/29 may transfer it, and anybody
    /// with [`zone::KEY`].
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(serial: u32, hosts: usize) -> Self {
        let dir = TempDir::new("pdns");
        let path = dir.path().display().to_string();
        let zone_file = dir.write("zone", &zone::file(serial, hosts)).display().to_string();
        let name = zone::NAME;
        let zones = format!("zone \"{name}\" {{ type master; file \"{zone_file}\"; }};\n");
        dir.write("named.conf", &zones);
        let config = |port: u16| {
            format!(
                "launch=bind\nbind-config={path}/named.conf\nbind-dnssec-db={path}/keys.db\n\
                 local-address=127.0.0.1\nlocal-port={port}\nproxy-protocol-from=127.0.0.1/32\n\
                 allow-axfr-ips=127.0.0.0/29\nsocket-dir={path}\ndaemon=no\nguardian=no\ndisable-syslog=yes\n\
                 security-poll-suffix=\nloglevel=6\nlog-timestamp=no\n"
            )
        };
        dir.write("pdns.conf", &config(0));
        let config_dir = format!("--config-dir={path}");
        let database = format!("{path}/keys.db");
        let (algorithm, key, secret) = zone::KEY;
        for command in [
            vec!["create-bind-db", &database],
            vec!["import-tsig-key", key, algorithm, secret],
            vec!["activate-tsig-key", name, key, "primary"],
        ] {
            let args = [vec![config_dir.as_str()], command].concat();
            let (ok, output) = process::run("pdnsutil", &args, Duration::from_secs(20));
            assert!(ok, "pdnsutil {args:?}: {output}");
        }
        let (process, port, ()) = process::start_on_free_port(PROGRAM, |port| {
            dir.write("pdns.conf", &config(port));
            (Process::start(PROGRAM, PROGRAM, &[&config_dir]), ())
        });
        Self { process, address: super::loopback(port), _dir: dir }
    }
}
