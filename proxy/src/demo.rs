//! `counterfoil run` without a configuration: a forwarder and a name server to try it on, on loopback only.

use std::fmt::Write as _;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use rustix::fs::{Access, access};

use crate::config::{self, Config};
use crate::responder::{Responder, ResponderOptions};

/// Where things are unless the place is taken.
const LISTENER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 5300);
const RESPONDER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15302);
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9120);
const SOCKET: &str = "/run/counterfoil/counterfoil.sock";

/// A demo that is ready to run.
#[derive(Debug)]
pub struct Demo {
    /// The configuration of the forwarder.
    pub config: Config,
    /// The only backend in it. Listens already, must still be run or started.
    pub responder: Responder,
    listener: SocketAddr,
    admin: SocketAddr,
    socket: PathBuf,
}

impl Demo {
    /// Starts the responder's listening and chooses free ports.
    ///
    /// # Errors
    ///
    /// If there is no free port on 127.0.0.1.
    pub fn prepare() -> Result<Self> {
        let responder = Responder::bind(RESPONDER, ResponderOptions::default())
            .or_else(|error| match error.kind() {
                io::ErrorKind::AddrInUse => Responder::bind(any_port(RESPONDER), ResponderOptions::default()),
                _ => Err(error),
            })
            .with_context(|| format!("the demo's name server cannot listen on {RESPONDER}"))?;
        let listener = free_port(LISTENER).with_context(|| format!("the demo cannot listen on {LISTENER}"))?;
        let admin = free_port(ADMIN).with_context(|| format!("the demo cannot listen on {ADMIN}"))?;
        let socket = free_socket(Path::new(SOCKET));
        let text = configuration(listener, responder.addr(), admin, &socket);
        let config = config::from_str("the demo's configuration", &text).map_err(|errors| anyhow!("{errors}"))?;
        Ok(Self { config, responder, listener, admin, socket })
    }

    /// What the newcomer is told: what runs, and three commands to try, with `program` as they would call it.
    pub fn instructions(&self, program: &Path) -> String {
        let Self { listener, admin, socket, .. } = self;
        let responder = self.responder.addr();
        let program = quoted(program);
        let drill_socket =
            if socket == Path::new(SOCKET) { String::new() } else { format!(" --socket {}", quoted(socket)) };
        let mut text = format!(
            "\
No configuration was given, so this is a demo, on loopback only: a forwarder on {listener} and, behind it, a small name
server on {responder} that demands a PROXY v2 header and answers with what it was told. Try, in another terminal:

  # Ask through the forwarder. The header names you; its TLVs hold the listener's name and the first label.
  {program} query whoami.counterfoil TXT --server {listener}

  # Leak one connection on purpose, and watch it being found and reaped.
  {program} drill zombie{drill_socket}

  # Ask the name server without the forwarder, with a header of your own.
  {program} query hello.counterfoil TXT --server {responder} --proxy 192.0.2.1:4000-192.0.2.2:53 --tlv 0xE0=hello

Metrics are on http://{admin}/metrics. Stop it with Ctrl-C.
"
        );
        if *listener != LISTENER || *admin != ADMIN || responder != RESPONDER {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "Some of the usual ports (5300, 9120, 15302) are taken, so others were chosen.");
        }
        text
    }
}

/// The configuration as a file would have it.
fn configuration(listener: SocketAddr, responder: SocketAddr, admin: SocketAddr, socket: &Path) -> String {
    let socket = toml::Value::from(socket.to_string_lossy().into_owned());
    format!(
        r#"
[[listener]]
name = "demo"
address = "{listener}"
pool = "demo"

[[pool]]
name = "demo"

[pool.proxy_protocol]
identity = "connection"

[[pool.proxy_protocol.tlv]]
type = 0xE0
value = "{{listener}}"

[[pool.proxy_protocol.tlv]]
type = 0xE1
value = "{{qname_label:1}}"

[[pool.backend]]
name = "responder"
address = "{responder}"

[pool.backend.health]
mode = "up"

[admin]
http = "{admin}"
socket = {socket}
"#
    )
}

fn any_port(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip(), 0)
}

/// `preferred` if it can be listened on, else the same address with a free port. Somebody else may take the port before
/// the forwarder does, which it then reports.
fn free_port(preferred: SocketAddr) -> io::Result<SocketAddr> {
    match TcpListener::bind(preferred) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => TcpListener::bind(any_port(preferred)),
        other => other,
    }?
    .local_addr()
}

/// `preferred` if we may create it and no other process answers on it, else a path of our own.
fn free_socket(preferred: &Path) -> PathBuf {
    let may_create = preferred.parent().is_some_and(|directory| {
        std::fs::create_dir_all(directory).is_ok() && access(directory, Access::WRITE_OK | Access::EXEC_OK).is_ok()
    });
    if may_create && UnixStream::connect(preferred).is_err() {
        return preferred.to_owned();
    }
    std::env::temp_dir().join(format!("counterfoil-{}.sock", std::process::id()))
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;
    use crate::config::ReapMode;
    use crate::proxy_protocol::identity::Identity;

    #[test]
    fn two_demos_can_run_at_once() {
        let first = Demo::prepare().expect("a demo");
        let held = TcpListener::bind(first.listener).expect("the port is free");
        let second = Demo::prepare().expect("another demo");
        assert_ne!(first.responder.addr(), second.responder.addr());
        assert_ne!(first.listener, second.listener);
        drop(held);
        for demo in [&first, &second] {
            assert_eq!(demo.config.listeners[0].address, demo.listener);
            let [pool] = demo.config.pools.as_slice() else { unreachable!("one pool") };
            assert_eq!(pool.backends[0].address, demo.responder.addr());
            let proxy = pool.proxy_protocol.as_ref().expect("a header");
            assert_eq!((proxy.identity, proxy.tlvs.iter().count()), (Identity::Connection, 2));
            assert_eq!(demo.config.watchdog.reap, ReapMode::On);
            assert_eq!(demo.config.admin.http, Some(demo.admin));
            assert_eq!(demo.config.admin.socket.as_deref(), Some(demo.socket.as_path()));
        }
        let text = second.instructions(Path::new("/opt/it's/counterfoil"));
        assert!(text.contains(&format!(
            "'/opt/it'\\''s/counterfoil' query whoami.counterfoil TXT --server {}",
            second.listener
        )));
        assert!(text.contains("others were chosen"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("  '/opt")).count(), 3);
    }

    #[test]
    fn a_taken_port_is_replaced_and_a_free_one_kept() {
        let taken = TcpListener::bind(any_port(LISTENER)).expect("a port");
        let addr = taken.local_addr().expect("an address");
        let other = free_port(addr).expect("another port");
        assert_ne!(other, addr);
        drop(taken);
        assert_eq!(free_port(addr).expect("free again"), addr);
    }

    #[test]
    fn a_socket_that_cannot_be_had_is_replaced() {
        let ours = std::env::temp_dir().join(format!("counterfoil-{}.sock", std::process::id()));
        assert_eq!(free_socket(Path::new("/proc/no/such.sock")), ours);
        let directory = std::env::temp_dir().join(format!("counterfoil-demo-{}", std::process::id()));
        let socket = directory.join("a.sock");
        assert_eq!(free_socket(&socket), socket);
        let held = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        assert_eq!(free_socket(&socket), ours);
        drop(held);
        assert_eq!(free_socket(&socket), socket, "nobody answers on it any more");
        std::fs::remove_dir_all(&directory).expect("our own directory");
    }

    #[test]
    fn paths_are_quoted_for_the_shell() {
        for (path, text) in
            [("/usr/bin/counterfoil", "/usr/bin/counterfoil"), ("a b", "'a b'"), ("$x", "'$x'"), ("", "''")]
        {
            assert_eq!(quoted(Path::new(path)), text);
        }
    }
}
