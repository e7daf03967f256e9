//! Making a leak of each class, out of real sockets.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::holder::{Held, Holder};
use crate::clock::{self, Mono};
use crate::close::CloseReason;
use crate::config::Class;
use crate::kernel::sys;
use crate::ledger::{BackendIndex, ConnKind, OpenInfo, RowState, ShardWriter, Tracked};

/// For the handshake over loopback.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// What a stuck connection waits for the answer to: `. NS`, with its length (RFC 1035 section 4.2.2).
const QUERY: [u8; 19] = [0, 17, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];

/// Where leaks are made.
#[derive(Debug)]
pub(super) struct Site {
    /// The peer. Locked from `connect(2)` to `accept(2)`, so that no drill takes another's connection.
    pub(super) listener: Mutex<TcpListener>,
    pub(super) address: SocketAddr,
    pub(super) writer: ShardWriter,
    pub(super) backend: BackendIndex,
    pub(super) holder: Rc<Holder>,
}

/// One leak. It ends when this is dropped, whoever drops it.
#[derive(Debug)]
pub(super) struct Leak {
    holder: Rc<Holder>,
    /// What is at the peer's end.
    _peer: Peer,
    /// `SO_COOKIE`.
    pub(super) cookie: u64,
    /// Our end.
    pub(super) local: SocketAddr,
    /// The peer's end.
    pub(super) remote: SocketAddr,
    /// From when on nothing has happened on it.
    pub(super) quiet_since: Mono,
}

/// The peer's end: it may stay open, have closed, or never answer.
#[derive(Debug, Default)]
struct Peer {
    _stream: Option<TcpStream>,
    _full: Option<AsyncFd<Arc<Socket>>>,
}

impl Leak {
    /// Ends it. False if the owner had let it go before.
    pub(super) fn release(&self) -> bool {
        self.holder.release(self.cookie, CloseReason::OwnerGone)
    }
}

impl Drop for Leak {
    fn drop(&mut self) {
        self.release();
    }
}

impl Site {
    /// Leaks one socket, or one row, of this class. A deaf leak's owner does nothing when it is asked to close.
    pub(super) async fn leak(&self, class: Class, deaf: bool) -> io::Result<Leak> {
        let listener = self.listener.lock().await;
        if class == Class::Orphan {
            let socket = new_socket()?;
            let (peer, local) = self.connect(&listener, &socket).await?;
            let cookie = socket.cookie()?;
            let peer = Peer { _stream: Some(peer), _full: None };
            return Ok(self.keep(cookie, Held::Orphan(socket), deaf, peer, (local, self.address)));
        }
        let info = OpenInfo { backend: self.backend, kind: ConnKind::Shared, owner: 0, header: 0, client_tls: None };
        let reservation = self.writer.reserve(info).map_err(io::Error::other)?;
        let (socket, entry) = reservation.bind(new_socket()?, clock::now())?;
        let tracked = Tracked::new(socket, entry);
        let cookie = tracked.entry().cookie();
        if class == Class::Embryo {
            let (full, remote) = full_listener().await?;
            let local = begin_to_connect(tracked.io(), remote)?;
            if tracked.io().peer_addr().is_ok() {
                return Err(io::Error::other("a listener with a full backlog has taken one more connection"));
            }
            let peer = Peer { _stream: None, _full: Some(full) };
            return Ok(self.keep(cookie, Held::Both(tracked), deaf, peer, (local, remote)));
        }
        let (peer, local) = self.connect(&listener, tracked.io()).await?;
        let entry = tracked.entry();
        entry.set_state(RowState::Idle);
        entry.set_activity(clock::now(), 0, 0);
        let mut peer = Peer { _stream: Some(peer), _full: None };
        let held = match class {
            Class::Ghost => {
                peer = Peer::default();
                let (socket, entry) = tracked.into_parts();
                drop(socket);
                Held::Ghost(entry)
            }
            Class::Zombie => {
                // Without its peer it is in CLOSE_WAIT.
                peer = Peer::default();
                Held::Both(tracked)
            }
            Class::Stuck => {
                tracked.io().send(&QUERY)?;
                entry.set_state(RowState::Busy);
                entry.set_activity(clock::now(), 1, 0);
                Held::Both(tracked)
            }
            Class::Lingering => {
                // The peer does not close its side: FIN_WAIT2.
                tracked.io().shutdown(Shutdown::Write)?;
                entry.set_state(RowState::Draining);
                Held::Both(tracked)
            }
            Class::Hoard | Class::Orphan | Class::Embryo => Held::Both(tracked),
        };
        Ok(self.keep(cookie, held, deaf, peer, (local, self.address)))
    }

    fn keep(&self, cookie: u64, held: Held, deaf: bool, peer: Peer, ends: (SocketAddr, SocketAddr)) -> Leak {
        self.holder.keep(cookie, held, deaf);
        let (local, remote) = ends;
        Leak { holder: Rc::clone(&self.holder), _peer: peer, cookie, local, remote, quiet_since: clock::now() }
    }

    /// Connects to the peer inside the process and accepts the other end.
    async fn connect(&self, listener: &TcpListener, socket: &Socket) -> io::Result<(TcpStream, SocketAddr)> {
        let local = begin_to_connect(socket, self.address)?;
        let accepted = async {
            loop {
                let (stream, from) = listener.accept().await?;
                // Anybody on this machine can connect to the listener; what is not ours is closed at once.
                if from == local {
                    return io::Result::Ok(stream);
                }
            }
        };
        let stream = timeout(CONNECT_TIMEOUT, accepted).await.map_err(|_| io::ErrorKind::TimedOut)??;
        Ok((stream, local))
    }
}

#[expect(clippy::disallowed_methods, reason = "drills break I1 on purpose; the peer is inside the process")]
fn new_socket() -> io::Result<Socket> {
    Socket::new(Domain::IPV4, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
}

/// Connects without waiting. Our end.
#[expect(clippy::disallowed_methods, reason = "drills break I1 on purpose; the peer is inside the process")]
fn begin_to_connect(socket: &Socket, address: SocketAddr) -> io::Result<SocketAddr> {
    match socket.connect(&address.into()) {
        Ok(()) => {}
        // The handshake goes on without us.
        Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    Ok(socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?)
}

/// A listener on loopback whose backlog is full: the kernel drops each SYN to it, so whoever connects stays in SYN_SENT.
async fn full_listener() -> io::Result<(AsyncFd<Arc<Socket>>, SocketAddr)> {
    let listener = new_socket()?;
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    // The kernel takes one connection more than it is told to.
    listener.listen(0)?;
    let address = listener.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    let listener = sys::register(Arc::new(listener), Interest::READABLE)?;
    let filling = new_socket()?;
    begin_to_connect(&filling, address)?;
    // Readable: there is something to accept, and that is all that there is room for.
    timeout(CONNECT_TIMEOUT, listener.readable()).await.map_err(|_| io::ErrorKind::TimedOut)??.retain_ready();
    // Reset, so that nothing is left of it on our side. On the other side it waits to be accepted, for ever.
    filling.set_linger(Some(Duration::ZERO))?;
    drop(filling);
    Ok((listener, address))
}
