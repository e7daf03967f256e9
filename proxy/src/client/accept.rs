//! Accepting client connections. A listener never ends while the worker runs, whatever `accept(2)` says.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::handshake::Link;
use super::introduction::Stranger;
use super::limits::{Admitted, ClientLimits};
use super::session::{Addresses, Origin, Pace};
use super::task::SessionTask;
use crate::backend::connect::is_shortage;
use crate::stats::{ListenerStats, Refusal};
use crate::tls::server::ServerTls;
use crate::worker::plan::ListenerPlan;
use crate::worker::shell::Shell;

/// How long a listener rests when no descriptor or no memory is left.
const REST: Duration = Duration::from_millis(50);
/// Connections shed at one go when no descriptor is left.
const SHED: usize = 64;

/// Accepts on one listener until the worker drains.
pub(crate) struct Acceptor {
    pub(crate) listener: TcpListener,
    /// Somebody else will accept what is in the queue at the end.
    pub(crate) leaves_queue: bool,
    pub(crate) door: Rc<Door>,
}

/// What a listener does with those who come.
pub(crate) struct Door {
    pub(crate) shell: Rc<Shell>,
    pub(crate) index: u16,
    /// Where its clients connect to, if that is the same for all.
    pub(crate) local: Option<SocketAddr>,
    pub(crate) limits: Arc<ClientLimits>,
    pub(crate) tls: Arc<ServerTls>,
}

/// A connection whose client is known.
pub(super) struct Entrant {
    /// With what has been read from it already.
    pub(super) link: Link,
    pub(super) ends: Addresses,
    pub(super) admitted: Admitted,
    pub(super) origin: Origin,
}

impl Door {
    pub(super) fn stats(&self) -> &ListenerStats {
        &self.shell.stats.listeners[usize::from(self.index)]
    }

    /// What the configuration in force says of the listener.
    fn plan<T>(&self, of: impl FnOnce(&ListenerPlan) -> T) -> T {
        of(&self.shell.core.borrow().plan.listeners[usize::from(self.index)])
    }

    /// Whether a client at this address may come.
    pub(super) fn allows(&self, client: IpAddr) -> bool {
        self.plan(|listener| listener.allow_from.iter().any(|network| network.contains(client)))
    }

    /// Somebody has connected. `stop` is done when the worker drains.
    fn admit(self: &Rc<Self>, stream: TcpStream, client: SocketAddr, stop: &watch::Receiver<bool>) {
        let Some(local) = self.local.or_else(|| stream.local_addr().ok()) else { return };
        let proxy = self.plan(|listener| listener.accept_proxy.clone()).filter(|proxy| proxy.trusts(client.ip()));
        // Whoever speaks for others says for whom first.
        let allowed = proxy.is_some() || self.allows(client.ip());
        let place = match if allowed { self.limits.enter(self.index) } else { Err(Refusal::NotAllowed) } {
            Ok(place) => place,
            Err(refusal) => return self.refuse(client, None, refusal),
        };
        let session = self.shell.core.borrow().next_serial();
        let ends = Addresses { client, local };
        let tls = self.tls.greeting(self.index);
        if proxy.is_some() || tls.is_some() {
            let (door, accepted) = (Rc::clone(self), Instant::now());
            let stranger = Stranger { door, proxy, tls, stream, session, ends, place, accepted, stop: stop.clone() };
            tokio::task::spawn_local(stranger.introduce());
            return;
        }
        match place.admit(client.ip(), crate::clock::now()) {
            Ok(admitted) => {
                self.begin(Entrant { link: Link::new(stream, session), ends, admitted, origin: Origin::default() });
            }
            Err(refusal) => self.refuse(client, Some(session), refusal),
        }
    }

    /// The client's session begins.
    pub(super) fn begin(&self, entrant: Entrant) {
        let Entrant { link, ends, admitted, origin } = entrant;
        let pace = if admitted.is_restricted() { Pace::Restricted } else { Pace::Normal };
        let now = crate::clock::now();
        let key = self.shell.core.borrow_mut().session_opened(self.index, link.session, ends, origin, pace, now);
        tokio::task::spawn_local(SessionTask::new(Rc::clone(&self.shell), key, link, admitted));
    }

    /// Counts a connection that is closed before its session, of this number if it has one, begins.
    pub(super) fn refuse(&self, peer: SocketAddr, session: Option<u64>, refusal: Refusal) {
        self.stats().refused[refusal as usize].add(1);
        if refusal.is_suspicious() {
            self.shell.complain_client(peer, session, refusal.label());
        }
    }
}

impl Acceptor {
    /// Runs until `stop` is done; then takes what the kernel has queued already, so that no client that was told it is
    /// connected is lost, unless it is left to the next process.
    pub(crate) async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut reserve = File::open("/dev/null").ok();
        let mut sockets = self.door.plan(|listener| listener.sockets);
        loop {
            let accepted = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, client)) => {
                    let planned = self.door.plan(|listener| listener.sockets);
                    if sockets != planned {
                        // After a reload: it could not be told before somebody came.
                        sockets = planned;
                        let _ = sockets.apply(SockRef::from(&self.listener));
                        let _ = sockets.apply(SockRef::from(&stream));
                    }
                    self.door.admit(stream, client, &stop);
                }
                Err(error) => self.failed(&error, &mut reserve).await,
            }
        }
        while !self.leaves_queue
            && let Some(Ok((stream, client))) = poll_once(self.listener.accept()).await
        {
            self.door.admit(stream, client, &stop);
        }
    }

    /// Without descriptors `accept(2)` fails and the connection stays in the queue: asking again at once would spin.
    /// The reserve descriptor is given up to take such connections out and close them, so their clients know. Without
    /// memory that fails, too: they wait in the queue, and once that is full the kernel answers nobody any more.
    async fn failed(&self, error: &io::Error, reserve: &mut Option<File>) {
        if !is_shortage(error) {
            // The connection was reset in the queue, or the network had a passing fault: on to the next one.
            tracing::debug!(%error, "accept");
            return;
        }
        self.door.shell.complain_accept(error);
        self.door.stats().accept_failures.add(1);
        drop(reserve.take());
        let mut shed = 0;
        while shed < SHED
            && let Some(Ok((stream, _))) = poll_once(self.listener.accept()).await
        {
            drop(stream);
            shed += 1;
        }
        self.door.stats().refused[Refusal::Descriptors as usize].add(shed as u64);
        *reserve = File::open("/dev/null").ok();
        tokio::time::sleep(REST).await;
    }
}

/// The future's value if it is there now.
async fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(match future.as_mut().poll(cx) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}
