//! HAProxy: as a TCP proxy in front of the program, where it speaks for its clients by PROXY headers; and as a forwarder
//! that keeps idle connections to its backend.

use std::net::SocketAddr;

use crate::process::{self, Process};
use crate::tempdir::TempDir;

/// A running HAProxy.
#[derive(Debug)]
pub struct Haproxy {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub address: SocketAddr,
    _dir: TempDir,
}

impl Haproxy {
    /// Starts it in front of `server`, to pass connections on; `options` are those of the `server` line, `send-proxy-v2` for
    /// instance.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(server: SocketAddr, options: &str) -> Self {
        Self::configured(|port| {
            format!(
                "global\n    log stdout format raw local0\n\
                 defaults\n    mode tcp\n    log global\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n\
                 frontend dns\n    bind 127.0.0.1:{port}\n    unique-id-format %{{+X}}o%ci%cp\n    default_backend dns\n\
                 backend dns\n    server dns {server} {options}\n"
            )
        })
    }

    /// The same with more lines in the section `global`, and with options of the `bind` line: `ssl crt FILE` ends the
    /// clients' TLS.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn bound(server: SocketAddr, global: &str, bind: &str) -> Self {
        Self::configured(|port| {
            format!(
                "global\n    log stdout format raw local0\n    {global}\n\
                 defaults\n    mode tcp\n    log global\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n\
                 frontend dns\n    bind 127.0.0.1:{port} {bind}\n    default_backend dns\n\
                 backend dns\n    server dns {server}\n"
            )
        })
    }

    /// Starts it in front of a `server` that speaks HTTP: any client's request may go over any connection that is idle, and
    /// is tried again where that was closed meanwhile.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn pooling(server: SocketAddr) -> Self {
        Self::configured(|port| {
            format!(
                "global\n    maxconn 1000\n    nbthread 2\n\
                 defaults\n    mode http\n    timeout connect 5s\n    timeout client 30s\n    timeout server 30s\n    retries 3\n\
                 frontend front\n    bind 127.0.0.1:{port}\n    default_backend back\n\
                 backend back\n    http-reuse always\n    retry-on conn-failure empty-response\n\
                 \x20   server one {server} pool-purge-delay 60s\n"
            )
        })
    }

    #[track_caller]
    fn configured(config: impl Fn(u16) -> String) -> Self {
        let dir = TempDir::new("haproxy");
        let (process, port, ()) = process::start_on_free_port("haproxy", |port| {
            let file = dir.write("haproxy.cfg", &config(port)).display().to_string();
            // -db: in the foreground, one process.
            (Process::start("haproxy", "haproxy", &["-db", "-f", &file]), ())
        });
        Self { process, address: super::loopback(port), _dir: dir }
    }
}
