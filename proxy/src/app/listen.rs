//! The listeners' sockets: those that the service manager has passed, and for the other listeners new ones.
//!
//! # Who accepts on what
//!
//! A new listener has one socket per worker (SO_REUSEPORT), and the kernel spreads the connections. Sockets that were
//! passed stay in the manager's hands, so they are taken as they are: with as many of one address as there are workers,
//! each worker has its own; with more, some have two; with fewer, workers share one. Each of those who share it is woken
//! for each connection, which costs something per connection and nothing per query. A further socket of our own on the
//! same address would end that, but what is in its queue when the process ends would be reset.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;

use anyhow::{Context as _, Result, bail};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::config::Listener;
use crate::kernel::sys;
use crate::systemd::activation::Inherited;

/// Connections that the kernel keeps ready for `accept(2)`; it may allow fewer (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// A socket on which one worker accepts.
#[derive(Debug)]
pub struct Accepting {
    /// Index of its listener.
    pub listener: u16,
    /// Itself.
    pub socket: TcpListener,
    /// The service manager has it, too: what is in its queue when this process ends waits for the next one.
    pub inherited: bool,
}

/// All listeners, bound.
#[derive(Debug)]
pub(super) struct Listening {
    /// By worker.
    pub(super) sockets: Vec<Vec<Accepting>>,
    /// By listener, with the port that the kernel has chosen if the configuration leaves it open.
    pub(super) addresses: Vec<SocketAddr>,
    /// Nobody is refused while the process is started again: every socket was passed.
    pub(super) all_inherited: bool,
}

/// Takes the sockets that were passed, and binds what is left.
///
/// # Errors
/// A socket was passed that belongs to no listener, or an address can't be listened on.
pub(super) fn open(listeners: &[Listener], workers: usize, inherited: Vec<Inherited>) -> Result<Listening> {
    let mut passed: Vec<Vec<TcpListener>> = listeners.iter().map(|_| Vec::new()).collect();
    let mut addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.address).collect();
    for Inherited { name, address, socket } in inherited {
        let index = whose(listeners, &name, address)?;
        if !passed[index].is_empty() && addresses[index] != address {
            bail!("listener `{}` was passed sockets on {} and on {address}", listeners[index].name, addresses[index]);
        }
        addresses[index] = address;
        passed[index].push(socket);
    }
    let mut sockets: Vec<Vec<Accepting>> = (0..workers).map(|_| Vec::new()).collect();
    let mut all_inherited = true;
    for (index, passed) in passed.into_iter().enumerate() {
        let (name, inherited) = (&listeners[index].name, !passed.is_empty());
        all_inherited &= inherited;
        let own = if inherited {
            share(passed, workers).with_context(|| format!("listener `{name}`"))?
        } else {
            let address = addresses[index];
            let failed = || format!("listener `{name}` cannot listen on {address}");
            let (address, bound) = bind(address, workers).with_context(failed)?;
            addresses[index] = address;
            bound.into_iter().enumerate().collect()
        };
        // Data are taken from SYNs (RFC 7413) if `net.ipv4.tcp_fastopen` has servers do so, else the kernel ignores it.
        if let Some(queue) = NonZero::new(listeners[index].tcp_fast_open) {
            for (_, socket) in &own {
                if let Err(error) = sys::fast_open_listen(&SockRef::from(socket), queue.get()) {
                    tracing::warn!(listener = name, %error, "the kernel knows no TCP fast open");
                }
            }
        }
        for (worker, socket) in own {
            // Linux hands it on to the connections that are accepted: a system call less for each. Answers are small and
            // must not wait for each other's acknowledgement (RFC 7766 section 8).
            SockRef::from(&socket).set_tcp_nodelay(true).with_context(|| format!("listener `{name}`"))?;
            // Fewer than 65,536, as each has an address and a port.
            sockets[worker].push(Accepting { listener: index as u16, socket, inherited });
        }
    }
    Ok(Listening { sockets, addresses, all_inherited })
}

/// The listener with this address; where the configuration leaves the port open, the one with this name.
fn whose(listeners: &[Listener], name: &str, address: SocketAddr) -> Result<usize> {
    let by_address = listeners.iter().position(|listener| listener.address == address);
    let by_name = listeners.iter().position(|listener| listener.name == name);
    match (by_address, by_name) {
        (Some(index), None) => Ok(index),
        (Some(index), Some(named)) if index == named => Ok(index),
        (None, Some(named)) if listeners[named].address.port() == 0 => Ok(named),
        (_, Some(named)) => bail!(
            "a socket on {address} was passed by the name of listener `{name}`, whose address is {}",
            listeners[named].address
        ),
        (None, None) => {
            bail!(
                "a socket on {address} (`{name}`) was passed by the service manager, but no listener has this address"
            )
        }
    }
}

/// Deals sockets to workers: each worker gets one at least, and no socket is left over.
fn share(sockets: Vec<TcpListener>, workers: usize) -> io::Result<Vec<(usize, TcpListener)>> {
    let copies = (sockets.len()..workers).map(|worker| Ok((worker, sockets[worker % sockets.len()].try_clone()?)));
    let copies: Vec<_> = copies.collect::<io::Result<_>>()?;
    Ok(sockets.into_iter().enumerate().map(|(at, socket)| (at % workers, socket)).chain(copies).collect())
}

/// One listening socket per worker on the same address.
#[expect(clippy::disallowed_methods, reason = "sockets that listen are no backend sockets")]
fn bind(address: SocketAddr, workers: usize) -> io::Result<(SocketAddr, Vec<TcpListener>)> {
    let mut address = address;
    let mut sockets = Vec::with_capacity(workers);
    for _ in 0..workers {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from(socket);
        address = listener.local_addr()?;
        sockets.push(listener);
    }
    Ok((address, sockets))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests panic, and are clients")]

    use super::*;
    use crate::config::ReapMode;
    use crate::watchdog::fixture;

    fn listener(name: &str, address: &str) -> Listener {
        let [listener] = &fixture::config(ReapMode::Off, None).listeners[..] else { unreachable!("one listener") };
        Listener { name: name.to_owned(), address: address.parse().unwrap(), ..listener.clone() }
    }

    fn passed(name: &str) -> Inherited {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        Inherited { name: name.to_owned(), address: socket.local_addr().unwrap(), socket }
    }

    /// Per worker, how many sockets it has.
    fn dealt(sockets: usize, workers: usize) -> Vec<usize> {
        let first = passed("dns");
        let more = (1..sockets).map(|_| Inherited {
            name: "dns".to_owned(),
            address: first.address,
            socket: first.socket.try_clone().unwrap(),
        });
        let more: Vec<_> = more.collect();
        let listening = open(&[listener("dns", "127.0.0.1:0")], workers, [first].into_iter().chain(more).collect());
        listening.unwrap().sockets.iter().map(Vec::len).collect()
    }

    #[test]
    fn every_worker_accepts_and_every_socket_is_accepted_on() {
        assert_eq!(dealt(1, 3), [1, 1, 1]);
        assert_eq!(dealt(2, 3), [1, 1, 1]);
        assert_eq!(dealt(3, 3), [1, 1, 1]);
        assert_eq!(dealt(4, 3), [2, 1, 1]);
        assert_eq!(dealt(7, 2), [4, 3]);
    }

    /// No system call per connection sets it.
    #[test]
    fn connections_inherit_tcp_nodelay() {
        let listening = open(&[listener("a", "127.0.0.1:0")], 1, Vec::new()).unwrap();
        let address = listening.addresses[0];
        let client = std::net::TcpStream::connect(address).unwrap();
        let socket = &listening.sockets[0][0].socket;
        socket.set_nonblocking(false).unwrap();
        let (accepted, peer) = socket.accept().unwrap();
        assert!(accepted.nodelay().unwrap());
        assert_eq!((peer, accepted.local_addr().unwrap()), (client.local_addr().unwrap(), address));
    }

    #[test]
    fn what_was_not_passed_is_bound() {
        let given = passed("");
        let listeners = [listener("a", &given.address.to_string()), listener("b", "127.0.0.1:0")];
        let address = given.address;
        let listening = open(&listeners, 2, vec![given]).unwrap();
        assert_eq!(listening.addresses[0], address);
        assert_ne!(listening.addresses[1].port(), 0);
        assert!(!listening.all_inherited);
        for worker in &listening.sockets {
            let kinds: Vec<_> = worker.iter().map(|socket| (socket.listener, socket.inherited)).collect();
            assert_eq!(kinds, [(0, true), (1, false)]);
        }
    }

    #[test]
    fn a_socket_of_no_listener_is_refused_by_its_address() {
        let error =
            |listeners: &[Listener], passed: Inherited| open(listeners, 1, vec![passed]).unwrap_err().to_string();
        let given = passed("counterfoil.socket");
        let address = given.address;
        let said = error(&[listener("dns", "127.0.0.1:1")], given);
        assert!(said.contains(&address.to_string()) && said.contains("no listener has this address"), "{said}");
        let said = error(&[listener("dns", "127.0.0.1:1")], passed("dns"));
        assert!(said.contains("whose address is 127.0.0.1:1"), "{said}");
        let two = vec![passed("dns"), passed("dns")];
        let said = open(&[listener("dns", "127.0.0.1:0")], 1, two).unwrap_err().to_string();
        assert!(said.contains("was passed sockets on"), "{said}");
    }
}
