//! The one place that opens backend sockets (I1). clippy's `disallowed-methods` keeps it the only one.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::clock::Mono;
use crate::close::CloseReason;
use crate::kernel::sys;
use crate::ledger::caps::Permit;
use crate::ledger::{ConnKind, OpenInfo, ReserveError, ShardWriter, Tracked};

/// A backend connection's descriptor, registered with the worker's event loop. The ledger holds a weak handle to the
/// socket, which the watchdog upgrades for one system call (I4).
pub(crate) type Io = AsyncFd<Arc<Socket>>;

/// How far `connect(2)` has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handshake {
    /// The SYN is on its way. Towards a near peer the handshake is over already: a write then says so.
    Begun,
    /// The SYN waits for the first write, which tells nothing of the peer.
    Deferred,
}

/// Why no socket was opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    #[error("socket: {0}")]
    Socket(io::Error),
    #[error("bind to {0}: {1}")]
    Bind(IpAddr, io::Error),
    #[error("connect: {0}")]
    Connect(io::Error),
    #[error("register: {0}")]
    Register(io::Error),
}

impl OpenError {
    /// Whether this host has no descriptor, no memory or no local port left for a socket, which says nothing of the backend.
    pub(crate) fn is_shortage(&self) -> bool {
        let (Self::Socket(error) | Self::Bind(_, error) | Self::Connect(error) | Self::Register(error)) = self else {
            return true;
        };
        // ip(7), connect(2): no port is free, or no address. epoll_ctl(2): no watch is left.
        let more = matches!(Errno::from_io_error(error), Some(Errno::ADDRNOTAVAIL | Errno::AGAIN | Errno::NOSPC));
        more || is_shortage(error)
    }

    /// Why the connection is closed that did not come about.
    pub(crate) fn reason(&self) -> CloseReason {
        if self.is_shortage() { CloseReason::HostShortage } else { CloseReason::ConnectFailed }
    }
}

/// Whether a system call failed because this process or this host has no descriptor or no memory left.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// Whether `connect(2)` may wait for the first write (`TCP_FASTOPEN_CONNECT`, tcp(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FastOpen {
    /// The SYN goes at once.
    Off,
    /// If the kernel has a cookie of the peer (RFC 7413), the SYN goes with what is written first, and carries it. It may
    /// reach the peer twice. Who asks for this must write at once.
    WithFirstWrite,
}

/// Begins to connect. The row is in the ledger before `connect(2)` is called, so the kernel never has a connection of
/// ours that the ledger has not (I2). What comes next is a first write, then [`register`].
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub(crate) fn connect(
    ledger: &ShardWriter,
    permit: Permit,
    info: OpenInfo,
    address: SocketAddr,
    source: Option<SocketAddr>,
    fast_open: FastOpen,
    now: Mono,
) -> Result<(Tracked<Arc<Socket>>, Handshake), OpenError> {
    let reservation = ledger.reserve_with(permit, info)?;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
        .map_err(OpenError::Socket)?;
    let (socket, entry) = reservation.bind(socket, now).map_err(OpenError::Socket)?;
    // From here on the pair is closed in order: the descriptor, then the row.
    let opened = Tracked::new(socket, entry);
    match begin(opened.io(), info.kind, address, source, fast_open) {
        Ok(handshake) => Ok((opened, handshake)),
        Err(error) => {
            opened.close(error.reason());
            Err(error)
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the second half of the one place")]
fn begin(
    socket: &Socket,
    kind: ConnKind,
    address: SocketAddr,
    source: Option<SocketAddr>,
    fast_open: FastOpen,
) -> Result<Handshake, OpenError> {
    if kind != ConnKind::OneShot {
        // Queries are small and must not wait for each other's acknowledgement (RFC 7766 section 8). A one-shot
        // connection writes once, which waits for nothing.
        socket.set_tcp_nodelay(true).map_err(OpenError::Socket)?;
    }
    if let Some(source) = source {
        sys::bind_address_no_port(socket).map_err(|error| OpenError::Bind(source.ip(), error))?;
        socket.bind(&source.into()).map_err(|error| OpenError::Bind(source.ip(), error))?;
    }
    if fast_open == FastOpen::WithFirstWrite {
        // Where `net.ipv4.tcp_fastopen` forbids it the kernel says so here, and the SYN goes as always.
        let _ = sys::fast_open_connect(socket);
    }
    match socket.connect(&address.into()) {
        // Only one that waits for the first write succeeds at once.
        Ok(()) => Ok(Handshake::Deferred),
        Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => Ok(Handshake::Begun),
        Err(error) => Err(OpenError::Connect(error)),
    }
}

/// Registers the socket with the worker's event loop.
pub(crate) fn register(opened: Tracked<Arc<Socket>>, interest: Interest) -> Result<Tracked<Io>, OpenError> {
    let (socket, entry) = opened.into_parts();
    match sys::register(socket, interest) {
        Ok(io) => Ok(Tracked::new(io, entry)),
        Err(error) => {
            let (socket, error) = error.into_parts();
            let error = OpenError::Register(error);
            Tracked::new(socket, entry).close(error.reason());
            Err(error)
        }
    }
}

/// This host's address on the way to `backend`: what a connection without a configured source will have. Asked of the
/// routing table by a UDP socket that sends nothing.
pub(crate) fn own_side(backend: SocketAddr, source: &[SocketAddr]) -> SocketAddr {
    if let Some(source) = source.first() {
        return *source;
    }
    let any = if backend.is_ipv4() { IpAddr::from([0u8; 4]) } else { IpAddr::from([0u8; 16]) };
    let routed = UdpSocket::bind(SocketAddr::new(any, 0)).and_then(|socket| {
        socket.connect(backend)?;
        socket.local_addr()
    });
    match routed {
        Ok(address) => SocketAddr::new(address.ip(), 0),
        Err(error) => {
            tracing::warn!(%backend, %error, "no route to the backend: PROXY headers can't name this host's side");
            SocketAddr::new(any, 0)
        }
    }
}
