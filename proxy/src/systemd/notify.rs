//! sd_notify(3): one datagram per message, to a path or to a name in the abstract namespace.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::clock;

/// A manager that does not read must not hold up the process.
const PATIENCE: Duration = Duration::from_millis(500);

/// Tells the service manager how the process is. Without a manager, nobody.
#[derive(Debug)]
pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// Speaks to `address`, the value of `NOTIFY_SOCKET`.
    ///
    /// # Errors
    /// It is no address of a unix socket.
    pub fn new(address: Option<&OsStr>) -> io::Result<Self> {
        let Some(address) = address else { return Ok(Self { to: None }) };
        let bytes = address.as_bytes();
        let to = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None if bytes.starts_with(b"/") => SocketAddr::from_pathname(address)?,
            None => {
                let kinds = "neither a path nor a name in the abstract namespace (`@...`)";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, kinds));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { to: Some((socket, to)) })
    }

    /// Clients are being served: after the start, and after each reload, carried out or refused.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// The configuration is being read again. The time tells the manager which of its requests this answers.
    pub fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", clock::now().0 / 1000));
    }

    /// The end has begun.
    pub fn stopping(&self, status: &str) {
        self.send(&format!("STOPPING=1\nSTATUS={}", one_line(status)));
    }

    /// How it is, for people.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", one_line(status)));
    }

    /// The process lives: every worker of it.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, message: &str) {
        if let Some((socket, to)) = &self.to
            && let Err(error) = socket.send_to_addr(message.as_bytes(), to)
        {
            tracing::warn!(%error, "the service manager cannot be told");
        }
    }
}

/// A line break would begin another message.
fn one_line(status: &str) -> String {
    status.replace(['\n', '\r'], "; ")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::ffi::OsString;

    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 1024];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_name_in_the_abstract_namespace_hears_all() {
        let name = format!("counterfoil-notify-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let notifier = Notifier::new(Some(&OsString::from(format!("@{name}")))).unwrap();
        notifier.ready("serving");
        assert_eq!(receive(&manager), "READY=1\nSTATUS=serving");
        let before = clock::now().0 / 1000;
        notifier.reloading();
        let reloading = receive(&manager);
        let at: u64 = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().parse().unwrap();
        assert!((before..=clock::now().0 / 1000).contains(&at));
        notifier.status("two\nlines\r\nWATCHDOG=1");
        assert_eq!(receive(&manager), "STATUS=two; lines; ; WATCHDOG=1");
        notifier.alive();
        assert_eq!(receive(&manager), "WATCHDOG=1");
        notifier.stopping("draining");
        assert_eq!(receive(&manager), "STOPPING=1\nSTATUS=draining");
    }

    #[test]
    fn nobody_is_told_where_nobody_listens() {
        Notifier::new(None).unwrap().ready("serving");
        Notifier::new(Some(OsStr::new("/nowhere/at/all"))).unwrap().ready("serving");
        assert!(Notifier::new(Some(OsStr::new("vsock:2:1234"))).is_err());
    }
}
