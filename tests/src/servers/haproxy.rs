//! HAProxy as a TCP proxy: in front of the program it speaks for its clients by PROXY headers.

use std::net::SocketAddr;

use crate::process::{self, Process};
use crate::tempdir::TempDir;

/// A running HAProxy that passes connections on to one server.
#[derive(Debug)]
pub struct Haproxy {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub address: SocketAddr,
    _dir: TempDir,
}

impl Haproxy {
    /// Starts it in front of `server`; `options` are those of the `server` line, `send-proxy-v2` for instance.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(server: SocketAddr, options: &str) -> Self {
        let dir = TempDir::new("haproxy");
        let (process, port, ()) = process::start_on_free_port("haproxy", |port| {
            let config = format!(
                "global\n    log stdout format raw local0\n\
                 defaults\n    mode tcp\n    log global\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n\
                 frontend dns\n    bind 127.0.0.1:{port}\n    unique-id-format %{{+X}}o%ci%cp\n    default_backend dns\n\
                 backend dns\n    server dns {server} {options}\n"
            );
            let file = dir.write("haproxy.cfg", &config).display().to_string();
            // -db: in the foreground, one process.
            (Process::start("haproxy", "haproxy", &["-db", "-f", &file]), ())
        });
        Self { process, address: super::loopback(port), _dir: dir }
    }
}
