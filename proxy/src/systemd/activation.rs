//! sd_listen_fds(3): listening sockets that the service manager has opened before it starts this process, and keeps while
//! the process is started again. A client that connects meanwhile waits in the kernel's queue; nobody is refused.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use socket2::{Protocol, Socket};

use super::Environment;
use crate::kernel::sys;

/// The first descriptor that is passed (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// A listening socket that was passed.
#[derive(Debug)]
pub struct Inherited {
    /// Its name (`FileDescriptorName=`); empty without one.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Itself.
    pub socket: TcpListener,
}

/// Why what was passed cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// It is no open descriptor, or the kernel does not say what it is.
    #[error("descriptor {number} (`{name}`), passed by the service manager: {cause}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// Its name.
        name: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// Another kind of socket.
    #[error(
        "descriptor {number} (`{name}`), passed by the service manager, is no listening TCP socket: use `ListenStream=`"
    )]
    Kind {
        /// Its number.
        number: i32,
        /// Its name.
        name: String,
    },
}

/// The sockets that were passed, in order.
///
/// # Errors
/// One is no listening TCP socket.
pub fn sockets(environment: &Environment) -> Result<Vec<Inherited>, InheritError> {
    let names = environment.listen.iter().enumerate();
    names.map(|(index, name)| socket(FIRST.saturating_add(i32::try_from(index).unwrap_or(i32::MAX)), name)).collect()
}

fn socket(number: i32, name: &str) -> Result<Inherited, InheritError> {
    let failed = |cause| InheritError::Descriptor { number, name: name.to_owned(), cause };
    let socket = Socket::from(sys::duplicate(number).map_err(failed)?);
    let listens = socket.is_listener().unwrap_or(false) && socket.protocol().ok().flatten() == Some(Protocol::TCP);
    let address = socket.local_addr().ok().and_then(|address| address.as_socket()).filter(|_| listens);
    let Some(address) = address else { return Err(InheritError::Kind { number, name: name.to_owned() }) };
    socket.set_nonblocking(true).map_err(failed)?;
    Ok(Inherited { name: name.to_owned(), address, socket: OwnedFd::from(socket).into() })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn only_tcp_sockets_that_listen_are_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inherited = socket(listener.as_raw_fd(), "dns").unwrap();
        assert_eq!((inherited.name.as_str(), inherited.address), ("dns", listener.local_addr().unwrap()));
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let error = socket(datagrams.as_raw_fd(), "dns").unwrap_err().to_string();
        assert!(error.contains("no listening TCP socket"), "{error}");
        let local = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(matches!(socket(local.as_raw_fd(), "x"), Err(InheritError::Kind { .. })));
        assert!(matches!(socket(1 << 20, "x"), Err(InheritError::Descriptor { .. })));
    }
}
