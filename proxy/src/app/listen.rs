//! The listeners' sockets: those that the service manager has passed, and for the other listeners new ones.
//!
//! # Who accepts on what
//!
//! A new listener has one socket per worker (SO_REUSEPORT), and the kernel spreads the connections. Sockets that were
//! passed stay in the manager's hands, so they are taken as they are: with as many of one address as there are workers,
//! each worker has its own; with more, some have two; with fewer, workers share one. Each of those who share it is woken
//! for each connection, which costs something per connection and nothing per query. A further socket of our own on the
//! same address would end that, but what is in its queue when the process ends would be reset.
//!
//! # Whose address it is
//!
//! SO_REUSEPORT alone would let a second process of the same user have the same address, and half of its clients. So the
//! first socket of an address is without it until it listens: listen(2) then fails if anybody else listens there, of two
//! processes that start at once for the later one (the kernel looks under a lock). After that it gets the option, too, so
//! that the others can join. An address that a wildcard of our own covers joins that one. All are bound early, while there
//! is the privilege, and listen late, when nothing else can fail any more: nobody connects to a process that ends at once.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::num::NonZero;

use anyhow::{Context as _, Result, bail};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::config::Listener;
use crate::kernel::{self, sys};
use crate::systemd::activation::Inherited;
use crate::tcp::ClientSockets;

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

/// All listeners, bound. Those of our own do not listen yet.
#[derive(Debug)]
pub(super) struct Listening {
    /// By worker.
    pub(super) sockets: Vec<Vec<Accepting>>,
    /// By listener, with the port that the kernel has chosen if the configuration leaves it open.
    pub(super) addresses: Vec<SocketAddr>,
    /// Nobody is refused while the process is started again: every socket was passed.
    pub(super) all_inherited: bool,
    /// Listeners with sockets of our own, a wildcard before those that it covers.
    own: Vec<Own>,
}

/// A listener that was not passed.
#[derive(Debug)]
struct Own {
    /// Its index.
    listener: u16,
    /// Its name.
    name: String,
    address: SocketAddr,
    /// A wildcard of our own has the address.
    covered: bool,
}

impl Listening {
    /// Listens. From now on clients can connect.
    ///
    /// # Errors
    /// Another process has come first at an address.
    pub(super) fn listen(&self) -> Result<()> {
        for Own { listener, name, address, covered } in &self.own {
            let sockets = self.sockets.iter().flatten().filter(|socket| socket.listener == *listener);
            for (at, Accepting { socket, .. }) in sockets.enumerate() {
                let socket = SockRef::from(socket);
                socket.listen(BACKLOG).map_err(|error| refused(name, *address, error))?;
                if at == 0 && !covered {
                    socket.set_reuse_port(true).with_context(|| format!("listener `{name}`"))?;
                }
            }
        }
        Ok(())
    }
}

/// What is wrong with an address that cannot be listened on, and who has it.
fn refused(name: &str, address: SocketAddr, error: io::Error) -> anyhow::Error {
    if error.kind() != io::ErrorKind::AddrInUse {
        return anyhow::Error::new(error).context(format!("listener `{name}` cannot listen on {address}"));
    }
    let who = match kernel::who_listens(address) {
        Some((pid, program)) => format!("process {pid} ({program})"),
        None => "another process".to_owned(),
    };
    anyhow::anyhow!(
        "listener `{name}` cannot listen on {address}: {who} listens there already. End it, choose another address, or \
         pass one socket on to both (socket activation)"
    )
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
    let mut own_listeners = Vec::new();
    for (index, passed) in passed.into_iter().enumerate() {
        let (name, inherited) = (&listeners[index].name, !passed.is_empty());
        all_inherited &= inherited;
        let own = if inherited {
            share(passed, workers).with_context(|| format!("listener `{name}`"))?
        } else {
            let address = addresses[index];
            let covered = listeners.iter().any(|other| covers(other.address, address));
            let (address, bound) = bind(address, covered, workers).map_err(|error| refused(name, address, error))?;
            addresses[index] = address;
            // Fewer than 65,536, as each has an address and a port.
            own_listeners.push(Own { listener: index as u16, name: name.clone(), address, covered });
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
        let client_sockets = ClientSockets::new(&listeners[index]);
        for (worker, socket) in own {
            // Linux hands it on to the connections that are accepted: a system call less for each. Answers are small and
            // must not wait for each other's acknowledgement (RFC 7766 section 8).
            let options = SockRef::from(&socket);
            let set = options.set_tcp_nodelay(true).and_then(|()| client_sockets.apply(options));
            set.with_context(|| format!("listener `{name}`: a socket option"))?;
            // Fewer than 65,536, as each has an address and a port.
            sockets[worker].push(Accepting { listener: index as u16, socket, inherited });
        }
    }
    own_listeners.sort_by_key(|own| own.covered);
    Ok(Listening { sockets, addresses, all_inherited, own: own_listeners })
}

/// Whether whoever listens on `wide` has `address`, too.
fn covers(wide: SocketAddr, address: SocketAddr) -> bool {
    let ip = match wide.ip() {
        IpAddr::V4(ip) => ip.is_unspecified() && address.is_ipv4(),
        // Of both families, unless the system says otherwise (`net.ipv6.bindv6only`).
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    ip && wide != address && wide.port() == address.port() && address.port() != 0
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

/// One socket per worker on the same address.
#[expect(clippy::disallowed_methods, reason = "sockets that listen are no backend sockets")]
fn bind(address: SocketAddr, covered: bool, workers: usize) -> io::Result<(SocketAddr, Vec<TcpListener>)> {
    let mut address = address;
    let mut sockets = Vec::with_capacity(workers);
    for worker in 0..workers {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
        // What is left of connections of a process before this one is in nobody's way.
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(covered || worker > 0)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
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
        listening.listen().unwrap();
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

    /// A process that does not start, for whatever reason, has had no client.
    #[test]
    fn nobody_can_connect_before_it_listens() {
        let listening = open(&[listener("a", "127.0.0.1:0")], 2, Vec::new()).unwrap();
        let refused = std::net::TcpStream::connect(listening.addresses[0]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        listening.listen().unwrap();
        let clients: Vec<_> = (0..64).map(|_| std::net::TcpStream::connect(listening.addresses[0]).unwrap()).collect();
        let accepted =
            listening.sockets.iter().map(|worker| std::iter::from_fn(|| worker[0].socket.accept().ok()).count());
        let accepted: Vec<usize> = accepted.collect();
        assert!(accepted.iter().all(|count| *count > 0), "each worker gets some: {accepted:?}");
        assert_eq!(accepted.iter().sum::<usize>(), clients.len());
    }

    #[test]
    fn of_two_that_start_at_once_one_has_the_address() {
        let first = open(&[listener("a", "127.0.0.1:0")], 2, Vec::new()).unwrap();
        let address = first.addresses[0];
        let second = open(&[listener("b", &address.to_string())], 2, Vec::new()).unwrap();
        second.listen().unwrap();
        let said = first.listen().unwrap_err().to_string();
        let itself = format!("process {} (", std::process::id());
        for part in ["listener `a` cannot listen on", &address.to_string(), &itself, "listens there already"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        // Who comes later does not even get so far.
        for address in [address, SocketAddr::from(([0, 0, 0, 0], address.port()))] {
            let said = open(&[listener("c", &address.to_string())], 1, Vec::new()).unwrap_err().to_string();
            assert!(said.contains("listener `c` cannot listen on") && said.contains(&itself), "{said}");
        }
    }

    #[test]
    fn a_wildcard_and_an_address_below_it_can_both_be_had() {
        // A port that nobody has, at any address.
        let port = open(&[listener("a", "0.0.0.0:0")], 1, Vec::new()).unwrap().addresses[0].port();
        let listeners = [listener("one", &format!("127.0.0.1:{port}")), listener("all", &format!("0.0.0.0:{port}"))];
        let listening = open(&listeners, 2, Vec::new()).unwrap();
        listening.listen().unwrap();
        let _client = std::net::TcpStream::connect(listening.addresses[0]).unwrap();
        let accepted = |at: usize| listening.sockets.iter().filter(|worker| worker[at].socket.accept().is_ok()).count();
        assert_eq!((accepted(0), accepted(1)), (1, 0), "the more exact one has it");
        let said = open(&listeners[..1], 1, Vec::new()).unwrap_err().to_string();
        assert!(said.contains("listens there already"), "{said}");
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
