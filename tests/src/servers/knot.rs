//! Knot DNS 3.2, a primary with incremental transfers. It takes PROXY headers over UDP only.

use std::net::SocketAddr;
use std::time::Duration;

use crate::process::{self, Process};
use crate::tempdir::TempDir;
use crate::zone;

/// A running server of [`zone::NAME`], for everybody, with [`zone::KEY`] or without.
#[derive(Debug)]
pub struct Knot {
    /// The process.
    pub process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    dir: TempDir,
}

impl Knot {
    /// Starts it with a zone of this serial and so many hosts.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(serial: u32, hosts: usize) -> Self {
        let dir = TempDir::new("knot");
        dir.write("zone", &zone::file(serial, hosts));
        let (process, port, ()) = process::start_on_free_port("knotd", |port| {
            let file = dir.write("knot.conf", &config(&dir.path().display().to_string(), port));
            (Process::start("knotd", "knotd", &["-c".as_ref(), file.as_os_str()]), ())
        });
        let mut knot = Self { process, address: super::loopback(port), dir };
        knot.wait_loaded(serial);
        knot
    }

    /// Loads another version of the zone. The difference can be had by IXFR.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn load(&mut self, serial: u32, hosts: usize) {
        self.dir.write("zone", &zone::file(serial, hosts));
        let socket = self.dir.path().join("knot.sock").display().to_string();
        let (ok, output) =
            process::run("knotc", &["-s", &socket, "-b", "zone-reload", zone::NAME], Duration::from_secs(20));
        assert!(ok, "knotc: {output}");
        self.wait_loaded(serial);
    }

    #[track_caller]
    fn wait_loaded(&mut self, serial: u32) {
        let serial = format!("serial {serial}");
        self.process.wait_for_line(Duration::from_secs(20), "that the zone is loaded", |line| {
            (line.contains("loaded") && line.contains(&serial) || line.ends_with(&serial)).then_some(())
        });
    }
}

fn config(dir: &str, port: u16) -> String {
    let (algorithm, key, secret) = zone::KEY;
    format!(
        "server:\n    listen: 127.0.0.1@{port}\n    rundir: {dir}\n    tcp-workers: 2\n    udp-workers: 1\n\
         \x20   background-workers: 1\n    tcp-io-timeout: 0\n    tcp-idle-timeout: 60\n\
         log:\n  - target: stdout\n    any: info\n\
         database:\n    storage: {dir}\n\
         key:\n  - id: {key}\n    algorithm: {algorithm}\n    secret: {secret}\n\
         acl:\n  - id: anybody\n    address: 127.0.0.0/8\n    action: transfer\n\
         \x20 - id: signed\n    key: {key}\n    action: transfer\n\
         zone:\n  - domain: {name}\n    storage: {dir}\n    file: zone\n    acl: [anybody, signed]\n\
         \x20   zonefile-load: difference\n    journal-content: changes\n",
        name = zone::NAME,
    )
}
