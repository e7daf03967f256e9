//! Making a leak, holding it as its owner would, and ending it.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;

use crate::clock;
use crate::close::CloseReason;
use crate::config::Class;
use crate::control::Control;
use crate::ledger::{BackendIndex, ConnKind, Entry, OpenInfo, RowState, ShardWriter, Tracked};

/// For the handshake over loopback.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Where leaks are made.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) listener: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) writer: ShardWriter,
    pub(super) backend: BackendIndex,
    pub(super) holder: Rc<Holder>,
}

/// What is leaked.
#[derive(Debug)]
enum Held {
    /// Socket and row, as they should be.
    Both(Tracked<Arc<Socket>>),
    /// A socket that the ledger never heard of.
    Orphan(Socket),
    /// A row whose socket is closed.
    Ghost(Entry),
}

impl Held {
    fn release(self, reason: CloseReason) {
        match self {
            Self::Both(tracked) => tracked.close(reason),
            Self::Orphan(socket) => drop(socket),
            Self::Ghost(entry) => entry.retire(reason),
        }
    }
}

/// The owner of the drill's shard: it closes when it is asked to, as a worker would.
#[derive(Debug, Default)]
pub(super) struct Holder {
    held: RefCell<Option<Held>>,
}

impl Holder {
    /// Answers requests until nobody can send any.
    pub(super) async fn answer(self: Rc<Self>, mut controls: UnboundedReceiver<Control>) {
        while let Some(control) = controls.recv().await {
            if let Control::Close { row, reason } = control
                && matches!(&*self.held.borrow(), Some(Held::Both(tracked)) if tracked.entry().id() == row)
            {
                self.release(reason);
            }
        }
    }

    fn release(&self, reason: CloseReason) -> bool {
        let held = self.held.borrow_mut().take();
        let had = held.is_some();
        if let Some(held) = held {
            held.release(reason);
        }
        had
    }
}

/// One leak. It ends when this is dropped, whoever drops it.
#[derive(Debug)]
pub(super) struct Leak {
    holder: Rc<Holder>,
    /// The peer's end; a hoard's stays open.
    _peer: Option<TcpStream>,
    /// `SO_COOKIE`.
    pub(super) cookie: u64,
    /// Our end.
    pub(super) local: SocketAddr,
}

impl Leak {
    /// Ends it. False if the owner had let it go before.
    pub(super) fn release(&self) -> bool {
        self.holder.release(CloseReason::OwnerGone)
    }
}

impl Drop for Leak {
    fn drop(&mut self) {
        self.release();
    }
}

impl Site {
    /// Leaks one socket, or one row, of this class. Only the four classes that can be drilled.
    pub(super) async fn leak(&self, class: Class) -> io::Result<Leak> {
        let (held, peer, cookie, local) = if class == Class::Orphan {
            let socket = new_socket()?;
            let (peer, local) = self.connect(&socket).await?;
            let cookie = socket.cookie()?;
            (Held::Orphan(socket), Some(peer), cookie, local)
        } else {
            let info = OpenInfo { backend: self.backend, kind: ConnKind::Shared, owner: 0, header: 0 };
            let reservation = self.writer.reserve(info).map_err(io::Error::other)?;
            let (socket, entry) = reservation.bind(new_socket()?, clock::now())?;
            let tracked = Tracked::new(socket, entry);
            let (peer, local) = self.connect(tracked.io()).await?;
            let entry = tracked.entry();
            entry.set_state(RowState::Idle);
            entry.set_activity(clock::now(), 0, 0);
            let cookie = entry.cookie();
            match class {
                Class::Ghost => {
                    let (socket, entry) = tracked.into_parts();
                    drop(socket);
                    (Held::Ghost(entry), None, cookie, local)
                }
                // Without its peer it is in CLOSE_WAIT.
                Class::Zombie => (Held::Both(tracked), None, cookie, local),
                Class::Hoard => (Held::Both(tracked), Some(peer), cookie, local),
                other => return Err(io::Error::other(format!("there is no drill for the class {}", other.name()))),
            }
        };
        *self.holder.held.borrow_mut() = Some(held);
        Ok(Leak { holder: Rc::clone(&self.holder), _peer: peer, cookie, local })
    }

    /// Connects to the peer inside the process and accepts the other end.
    #[expect(clippy::disallowed_methods, reason = "drills break I1 on purpose; the peer is inside the process")]
    async fn connect(&self, socket: &Socket) -> io::Result<(TcpStream, SocketAddr)> {
        match socket.connect(&self.address.into()) {
            Ok(()) => {}
            // EINPROGRESS: the handshake goes on without us.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
        let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        let accepted = async {
            loop {
                let (stream, from) = self.listener.accept().await?;
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
