//! `sock_diag` over netlink: dump, look up and destroy TCP sockets of this network namespace.
//!
//! It shows the sockets in the kernel's table of connections with their cookies. A socket in state CLOSE is in no table.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

use super::tcp_info::TcpInfo;
use super::{TcpState, ViewError};

/// The kernel answers at once; this only bounds a kernel that does not.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Larger than any single answer of the kernel (32 KiB).
const BUFFER: usize = 128 * 1024;

/// One socket as `sock_diag` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) cookie: u64,
    pub(super) state: TcpState,
    /// Canonical, like `remote`.
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// Inode of the socket's file, 0 if no descriptor refers to it.
    pub(super) inode: u32,
    pub(super) unread: u32,
    pub(super) info: Option<TcpInfo>,
}

/// A netlink socket that talks `sock_diag`.
pub(super) struct SockDiag {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    /// Reading an answer has failed: the rest of it is still to come.
    broken_off: bool,
}

impl SockDiag {
    /// Opens the socket. Its network namespace is the calling thread's.
    pub(super) fn open() -> Result<Self, ViewError> {
        let refused = |cause| ViewError::NoSockDiag {
            what: "opening a sock_diag socket",
            cause,
            remedy: "netlink sockets must be allowed (systemd: `RestrictAddressFamilies=` with AF_NETLINK; seccomp filters alike)",
        };
        let open = || {
            let socket = Socket::new(NETLINK_SOCK_DIAG)?;
            socket2::SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
            Ok(socket)
        };
        open().map(|socket| Self { socket, sequence: 0, buffer: vec![0; BUFFER], broken_off: false }).map_err(refused)
    }

    /// All sockets of the table of connections, and the listeners, IPv4 and IPv6.
    pub(super) fn dump(&mut self) -> Result<Vec<Row>, ViewError> {
        self.dump_as(request)
    }

    /// All connections towards a port (0: any), those in TIME_WAIT included, IPv4 and IPv6; without their
    /// [`Row::info`], since there may be very many.
    pub(super) fn dump_towards(&mut self, port: u16) -> Result<Vec<Row>, ViewError> {
        self.dump_as(|family, id| InetRequest {
            states: StateFlags::all() - StateFlags::SYN_RECV - StateFlags::LISTEN - StateFlags::CLOSE,
            extensions: ExtensionFlags::empty(),
            ..request(family, SocketId { destination_port: port, ..id })
        })
    }

    /// All sockets towards a port (0: any), IPv4 and IPv6. No listeners.
    pub(super) fn dump_to(&mut self, port: u16) -> Result<Vec<Row>, ViewError> {
        self.dump_as(|family, id| {
            let request = request(family, SocketId { destination_port: port, ..id });
            InetRequest { states: request.states - StateFlags::LISTEN, ..request }
        })
    }

    fn dump_as(&mut self, request: impl Fn(u8, SocketId) -> InetRequest) -> Result<Vec<Row>, ViewError> {
        let mut rows = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
            let request = SockDiagMessage::InetRequest(request(family, id));
            self.send(request, NLM_F_REQUEST | NLM_F_DUMP)?;
            let answer = loop {
                if let Some(answer) = self.receive(&mut rows)? {
                    break answer;
                }
            };
            answer.map_err(cannot_dump)?;
        }
        #[cfg(feature = "test-hooks")]
        super::lies::hide(super::Witness::SockDiag, &mut rows);
        Ok(rows)
    }

    /// The socket with these ends and cookie; `None` if there is none.
    pub(super) fn find(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        cookie: u64,
    ) -> Result<Option<Row>, ViewError> {
        let (family, id) = identity(local, remote, cookie);
        self.send(SockDiagMessage::InetRequest(request(family, id)), NLM_F_REQUEST | NLM_F_ACK)?;
        let mut rows = Vec::new();
        loop {
            match self.receive(&mut rows)? {
                Some(Ok(())) => {
                    #[cfg(feature = "test-hooks")]
                    super::lies::hide(super::Witness::SockDiag, &mut rows);
                    return Ok(rows.pop());
                }
                Some(Err(error)) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
                Some(Err(cause)) => return Err(ViewError::Io { what: "looking up a socket by sock_diag", cause }),
                None => {}
            }
        }
    }

    /// Destroys the socket with these ends and cookie; the kernel's answer.
    ///
    /// # Errors
    /// Netlink itself failed: nobody knows what the kernel did.
    pub(super) fn destroy(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        cookie: u64,
    ) -> Result<io::Result<()>, ViewError> {
        let (family, id) = identity(local, remote, cookie);
        let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(request(family, id)));
        self.send(request, NLM_F_REQUEST | NLM_F_ACK)?;
        loop {
            if let Some(answer) = self.receive(&mut Vec::new())? {
                return Ok(answer);
            }
        }
    }

    fn send<M>(&mut self, message: M, flags: u16) -> Result<(), ViewError>
    where
        M: NetlinkSerializable,
        NetlinkPayload<M>: From<M>,
    {
        if self.broken_off {
            self.discard()?;
        }
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop).map_err(ViewError::io("asking sock_diag"))
    }

    /// Reads the rest of an answer that was broken off: before that the kernel begins no other dump (EBUSY).
    fn discard(&mut self) -> Result<(), ViewError> {
        loop {
            let mut target = &mut self.buffer[..];
            match self.socket.recv(&mut target, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(ViewError::io("reading from sock_diag")(error)),
            }
        }
        self.broken_off = false;
        Ok(())
    }

    /// Reads one datagram of answers to the last request and adds its sockets; `Some` when the answer is over, with
    /// the error that the kernel reports, if any.
    fn receive(&mut self, rows: &mut Vec<Row>) -> Result<Option<io::Result<()>>, ViewError> {
        let received = self.receive_datagram(rows);
        self.broken_off = received.is_err();
        received
    }

    fn receive_datagram(&mut self, rows: &mut Vec<Row>) -> Result<Option<io::Result<()>>, ViewError> {
        let mut target = &mut self.buffer[..];
        // With MSG_TRUNC the true length is returned: a cut answer is seen.
        let len = self.socket.recv(&mut target, libc::MSG_TRUNC).map_err(ViewError::io("reading from sock_diag"))?;
        let mut rest = self
            .buffer
            .get(..len)
            .ok_or_else(|| ViewError::Netlink(format!("an answer of {len} bytes does not fit into {BUFFER}")))?;
        while !rest.is_empty() {
            let damaged = |error: &dyn std::fmt::Display| ViewError::Netlink(format!("damaged answer: {error}"));
            let buffer = NetlinkBuffer::new_checked(&rest).map_err(|error| damaged(&error))?;
            let message_len = buffer.length() as usize;
            if buffer.sequence_number() == self.sequence {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(|error| damaged(&error))?;
                match message.payload {
                    NetlinkPayload::Done(done) => return Ok(Some(result(done.code))),
                    NetlinkPayload::Error(error) => return Ok(Some(result(error.code.map_or(0, Into::into)))),
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                        rows.extend(row(&response))
                    }
                    _ => {}
                }
            }
            // Messages are aligned to four bytes; a last one may be without its padding.
            rest = rest.get(message_len.next_multiple_of(4).max(4)..).unwrap_or_default();
        }
        Ok(None)
    }
}

/// ENOENT is the kernel's word for a protocol that nobody offers.
fn cannot_dump(cause: io::Error) -> ViewError {
    let what = "dumping sockets by sock_diag";
    match cause.raw_os_error() {
        Some(libc::ENOENT) => ViewError::NoSockDiag {
            what,
            cause,
            remedy: "this kernel has no sock_diag for TCP: load its module (`modprobe tcp_diag`), or boot a kernel with \
                     CONFIG_INET_DIAG",
        },
        _ => ViewError::Io { what, cause },
    }
}

/// The kernel's result: zero or a negative error number.
fn result(code: i32) -> io::Result<()> {
    if code < 0 { Err(io::Error::from_raw_os_error(code.saturating_neg())) } else { Ok(()) }
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    // TIME_WAIT and embryos are no sockets: nobody can hold them.
    let states = StateFlags::all() - StateFlags::TIME_WAIT - StateFlags::SYN_RECV;
    InetRequest { family, protocol: IPPROTO_TCP, extensions: ExtensionFlags::INFO, states, socket_id }
}

fn identity(local: SocketAddr, remote: SocketAddr, cookie: u64) -> (u8, SocketId) {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let id = SocketId {
        source_port: local.port(),
        destination_port: remote.port(),
        source_address: local.ip(),
        destination_address: remote.ip(),
        interface_id: scope(local).max(scope(remote)),
        // Two 32-bit halves, the low one first.
        cookie: join_halves(cookie),
    };
    (family, id)
}

/// The kernel gives and takes a cookie as two words in host byte order, the low one first.
fn join_halves(cookie: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&(cookie as u32).to_ne_bytes());
    bytes[4..].copy_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

fn split_halves([a, b, c, d, e, f, g, h]: [u8; 8]) -> u64 {
    u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
}

fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V6(v6) => v6.scope_id(),
        SocketAddr::V4(_) => 0,
    }
}

/// `None` for a state that this program does not know: it is none that a connection of ours can be in.
fn row(response: &InetResponse) -> Option<Row> {
    let header = &response.header;
    let id = &header.socket_id;
    let end = |ip: IpAddr, port| SocketAddr::new(ip.to_canonical(), port);
    Some(Row {
        cookie: split_halves(id.cookie),
        state: TcpState::from_kernel(header.state)?,
        local: end(id.source_address, id.source_port),
        remote: end(id.destination_address, id.destination_port),
        inode: header.inode,
        unread: header.recv_queue,
        info: response.nlas.iter().find_map(|nla| match nla {
            Nla::TcpInfo(bytes) => TcpInfo::parse(bytes),
            _ => None,
        }),
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]
    #![expect(clippy::disallowed_methods, reason = "the test needs a connection of its own")]

    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_cookie_survives_both_ways() {
        assert_eq!(split_halves(join_halves(0x1122_3344_5566_7788)), 0x1122_3344_5566_7788);
        assert_eq!(join_halves(1), [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn finds_a_socket_by_its_ends_and_in_the_dump() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let cookie = socket2::SockRef::from(&client).cookie().unwrap();
        let mut diag = SockDiag::open().unwrap();

        let row = diag.find(local, remote, cookie).unwrap().unwrap();
        assert_eq!((row.cookie, row.state, row.local, row.remote), (cookie, TcpState::Established, local, remote));
        assert_ne!(row.inode, 0);
        assert!(row.info.is_some());
        assert!(diag.dump().unwrap().iter().any(|other| other.cookie == cookie && other.inode == row.inode));

        assert_eq!(diag.find(local, remote, cookie + 1).unwrap(), None, "another cookie is another socket");
        drop(client);
        assert_eq!(diag.find(local, remote, cookie).unwrap().filter(|row| row.inode != 0), None);
    }
}
