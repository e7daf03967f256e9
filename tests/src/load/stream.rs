//! Non-blocking TCP sockets, pending output, and the length-prefixed frames of RFC 1035 section 4.2.2.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType, ipproto, sockopt,
};

use super::message::ANSWER_LEN;

/// Octets that one read takes at most.
pub const READ_LEN: usize = 64 * 1024;

/// The longest queue that the kernel allows.
const BACKLOG: i32 = 65_535;

/// What a read found.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// So many octets.
    Data(usize),
    /// Nothing now.
    Empty,
    /// The peer has closed or reset the connection.
    Closed,
}

/// Opens a listener on 127.0.0.1 at a port of the kernel's choice, or at `port`.
///
/// # Errors
/// As `socket(2)`, `bind(2)` and `listen(2)`.
pub fn listen(port: u16) -> io::Result<(OwnedFd, SocketAddrV4)> {
    let socket = tcp_socket(SocketFlags::NONBLOCK)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    // Several threads share the port, each with a queue of its own.
    sockopt::set_socket_reuseport(&socket, true)?;
    net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))?;
    net::listen(&socket, BACKLOG)?;
    let address = local_address(&socket)?;
    Ok((socket, address))
}

/// Takes the next client, if there is one. Answers go out at once (`TCP_NODELAY`).
///
/// # Errors
/// As `accept4(2)`.
pub fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        Ok(socket) => {
            sockopt::set_tcp_nodelay(&socket, true)?;
            Ok(Some(socket))
        }
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Starts a connection from `source` (`None`: as the kernel chooses). It may not be established yet: output waits.
///
/// # Errors
/// As `socket(2)`, `bind(2)` and `connect(2)`.
pub fn connect(target: SocketAddrV4, source: Option<Ipv4Addr>) -> io::Result<OwnedFd> {
    let socket = tcp_socket(SocketFlags::NONBLOCK)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    if let Some(address) = source {
        net::bind(&socket, &SocketAddrV4::new(address, 0))?;
    }
    match net::connect(&socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// The socket's own address.
///
/// # Errors
/// As `getsockname(2)`, or if it is not IPv4.
pub fn local_address(socket: impl AsFd) -> io::Result<SocketAddrV4> {
    ipv4(net::getsockname(socket)?)
}

/// The address of the other side.
///
/// # Errors
/// As `getpeername(2)`, or if it is not IPv4.
pub fn peer_address(socket: impl AsFd) -> io::Result<SocketAddrV4> {
    ipv4(net::getpeername(socket)?.ok_or(Errno::NOTCONN)?)
}

/// Closes by reset, which leaves no TIME_WAIT on this side. What is still in the queue is lost.
pub fn reset(socket: OwnedFd) {
    // Without the option it is closed all the same, only by FIN.
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
}

/// Reads once.
pub fn read(socket: impl AsFd, buffer: &mut [u8]) -> Read {
    match net::recv(socket, buffer, RecvFlags::empty()) {
        Ok((0, _)) => Read::Closed,
        Ok((length, _)) => Read::Data(length),
        Err(Errno::AGAIN | Errno::INTR) => Read::Empty,
        Err(_) => Read::Closed,
    }
}

/// Octets that the kernel did not take yet.
#[derive(Debug, Default)]
pub struct Output(Vec<u8>);

impl Output {
    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keeps `octets` for later.
    pub fn push(&mut self, octets: &[u8]) {
        self.0.extend_from_slice(octets);
    }

    /// Sends what waits and then `octets`, and keeps what the kernel does not take. `false`: the connection is dead.
    pub fn send(&mut self, socket: impl AsFd, octets: &[u8]) -> bool {
        if self.0.is_empty() {
            let Some(sent) = write(socket, octets) else { return false };
            self.0.extend_from_slice(&octets[sent..]);
        } else {
            self.0.extend_from_slice(octets);
            let Some(sent) = write(socket, &self.0) else { return false };
            self.0.drain(..sent);
        }
        true
    }
}

/// Cuts a stream of octets into frames, whatever the reads' borders are.
#[derive(Debug, Default)]
pub struct Frames {
    /// The start of a frame that was not complete at the end of the last read.
    rest: Vec<u8>,
}

impl Frames {
    /// Calls `each` with the content of every complete frame in what came before and `octets`; stops at its error.
    ///
    /// # Errors
    /// Those of `each`.
    pub fn feed<E>(&mut self, octets: &[u8], mut each: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if self.rest.is_empty() {
            let used = cut(octets, &mut each)?;
            self.rest.extend_from_slice(&octets[used..]);
        } else {
            let mut joined = std::mem::take(&mut self.rest);
            joined.extend_from_slice(octets);
            let used = cut(&joined, &mut each)?;
            joined.drain(..used);
            self.rest = joined;
        }
        Ok(())
    }
}

fn cut<E>(octets: &[u8], each: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<usize, E> {
    let mut used = 0;
    while let Some((prefix, rest)) = octets[used..].split_first_chunk::<2>() {
        let Some(frame) = rest.get(..usize::from(u16::from_be_bytes(*prefix))) else { break };
        each(frame)?;
        used += 2 + frame.len();
    }
    Ok(used)
}

/// Sends once: how much was taken, 0 if nothing can be now, `None` if the connection is dead.
fn write(socket: impl AsFd, octets: &[u8]) -> Option<usize> {
    match net::send(socket, octets, SendFlags::NOSIGNAL) {
        Ok(sent) => Some(sent),
        // A connection that is not established yet says AGAIN as well.
        Err(Errno::AGAIN | Errno::INTR) => Some(0),
        Err(_) => None,
    }
}

fn tcp_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    Ok(net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, Some(ipproto::TCP))?)
}

fn ipv4(address: SocketAddrAny) -> io::Result<SocketAddrV4> {
    SocketAddrV4::try_from(address).map_err(|_| io::Error::other("not an IPv4 address"))
}

/// Answers that one read may hold: what an output buffer should have room for.
#[must_use]
pub const fn answers_per_read() -> usize {
    READ_LEN / super::message::QUERY_LEN * (2 + ANSWER_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_do_not_depend_on_where_reads_end() {
        let stream = b"\0\x03abc\0\0\0\x01d\0\x05efghi";
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let mut frames = Frames::default();
                let mut seen = Vec::new();
                for part in [&stream[..first], &stream[first..second], &stream[second..]] {
                    let fed: Result<(), ()> = frames.feed(part, |frame| {
                        seen.push(frame.to_vec());
                        Ok(())
                    });
                    assert_eq!(fed, Ok(()));
                }
                assert_eq!(seen, [&b"abc"[..], b"", b"d", b"efghi"], "reads end at {first} and {second}");
            }
        }
    }
}
