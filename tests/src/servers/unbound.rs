//! Unbound 1.17 with `proxy-protocol-port`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::{ADDRESS, ZONE};
use crate::certificates::Certificate;
use crate::netns::Namespace;
use crate::process::{self, Process};
use crate::tempdir::TempDir;

/// A running Unbound.
#[derive(Debug)]
pub struct Unbound {
    /// The process.
    pub process: Process,
    /// Where it listens; a connection without a PROXY header is refused there.
    pub address: SocketAddr,
    _dir: TempDir,
}

impl Unbound {
    /// Starts it with its default of 10 TCP clients. With `log_queries` it writes a line for each query, see
    /// [`Self::logged_client`].
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(log_queries: bool) -> Self {
        let dir = TempDir::new("unbound");
        let (process, port, ()) = process::start_on_free_port("unbound", |port| {
            let file = dir.write("unbound.conf", &config(Ipv4Addr::LOCALHOST, port, log_queries, &proxy_port(port)));
            (Process::start("unbound", "unbound", &["-d".as_ref(), "-c".as_ref(), file.as_os_str()]), ())
        });
        Self { process, address: super::loopback(port), _dir: dir }
    }

    /// Starts it with these lines more below `server:`; with `proxy` it wants a PROXY header.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_with(proxy: bool, more: &str) -> Self {
        let dir = TempDir::new("unbound");
        let (process, port, ()) = process::start_on_free_port("unbound", |port| {
            let more = if proxy { proxy_port(port) + more } else { more.to_owned() };
            let file = dir.write("unbound.conf", &config(Ipv4Addr::LOCALHOST, port, false, &more));
            (Process::start("unbound", "unbound", &["-d".as_ref(), "-c".as_ref(), file.as_os_str()]), ())
        });
        Self { process, address: super::loopback(port), _dir: dir }
    }

    /// Starts it with DNS over TLS alone; with `proxy` it also wants a PROXY header.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_dot(certificate: &Certificate, proxy: bool) -> Self {
        let dir = TempDir::new("unbound");
        let (process, port, ()) = process::start_on_free_port("unbound", |port| {
            let Certificate { certificate, key } = certificate;
            let mut more = format!(
                "    tls-port: {port}\n    tls-service-pem: {:?}\n    tls-service-key: {:?}\n",
                certificate.display().to_string(),
                key.display().to_string()
            );
            if proxy {
                more += &proxy_port(port);
            }
            let file = dir.write("unbound.conf", &config(Ipv4Addr::LOCALHOST, port, true, &more));
            (Process::start("unbound", "unbound", &["-d".as_ref(), "-c".as_ref(), file.as_os_str()]), ())
        });
        Self { process, address: super::loopback(port), _dir: dir }
    }

    /// Starts it on `address` inside a network namespace.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_in(namespace: &Namespace, address: Ipv4Addr) -> Self {
        let dir = TempDir::new("unbound");
        // Nothing else lives in the namespace, so no port is taken.
        let port = 5353;
        let file = dir.write("unbound.conf", &config(address, port, false, &proxy_port(port)));
        let file = file.display().to_string();
        let mut process = namespace.start("unbound", &["unbound", "-d", "-c", &file]);
        assert!(process.listens(port, Duration::from_secs(20)), "unbound does not listen:\n{}", process.tail());
        Self { process, address: SocketAddr::from((address, port)), _dir: dir }
    }

    /// The client address that Unbound saw for a query for `name`.
    ///
    /// # Panics
    /// If Unbound logs no query for it in time.
    #[track_caller]
    pub fn logged_client(&mut self, name: &str) -> IpAddr {
        let marker = format!(" {name}. A IN");
        self.process.wait_for_line(Duration::from_secs(5), &format!("a query for {name}"), |line| {
            // `[1700000000] unbound[123:0] info: 127.0.0.2 n1.example.test. A IN`
            line.strip_suffix(&marker)?.rsplit(' ').next()?.parse().ok()
        })
    }
}

fn proxy_port(port: u16) -> String {
    format!("    proxy-protocol-port: {port}\n")
}

fn config(address: Ipv4Addr, port: u16, log_queries: bool, more: &str) -> String {
    let log_queries = if log_queries { "yes" } else { "no" };
    format!(
        r#"server:
    interface: {address}@{port}
    port: {port}
{more}    do-udp: no
    do-ip6: no
    num-threads: 1
    chroot: ""
    username: ""
    directory: ""
    pidfile: ""
    use-syslog: no
    logfile: ""
    log-queries: {log_queries}
    module-config: "iterator"
    # The address that the PROXY header names is what is asked for permission.
    access-control: 0.0.0.0/0 allow
    local-zone: "{ZONE}." redirect
    local-data: "{ZONE}. 60 IN A {ADDRESS}"
remote-control:
    control-enable: no
"#
    )
}
