//! The fallback without eBPF: `sock_diag` joined with `/proc/self/fd`.
//!
//! The table of descriptors says which sockets this process holds, the netlink dump in which state they are, and
//! `getsockopt` speaks for those that no table of the kernel lists (reset, refused, never connected). It cannot see a socket
//! whose last descriptor this process has closed or given away.

use std::collections::HashMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;

use super::listeners::Listeners;
use super::netlink::{Row, SockDiag};
use super::procfd::{self, Asked};
use super::reader::now_ns;
use super::{Crosscheck, KernelSnapshot, KernelSocket, KernelView, Source, TcpState, ViewError};

/// The kernel's view through `sock_diag`.
pub(super) struct DiagView {
    diag: SockDiag,
    listeners: Listeners,
    netns: u32,
    /// Peer and kind of each socket of the last snapshot: the kernel forgets the peer of a socket in state CLOSE.
    known: HashMap<u64, Known>,
}

#[derive(Clone, Copy)]
struct Known {
    remote: SocketAddr,
    accepted: bool,
}

impl DiagView {
    /// Opens the view.
    pub(super) fn open(listeners: &[SocketAddr]) -> Result<Self, ViewError> {
        let netns =
            fs::metadata("/proc/thread-self/ns/net").map_err(ViewError::io("reading /proc/thread-self/ns/net"))?.ino();
        let mut view = Self {
            diag: SockDiag::open()?,
            listeners: Listeners::new(listeners),
            netns: netns as u32,
            known: HashMap::new(),
        };
        view.snapshot()?;
        Ok(view)
    }

    /// Whether a socket was accepted: decided when it is first seen, since its listener may be closed later.
    fn classify(&self, cookie: u64, local: SocketAddr, remote: SocketAddr) -> Known {
        match self.known.get(&cookie) {
            Some(known) if remote.port() == 0 => *known,
            Some(known) => Known { remote, ..*known },
            None => Known { remote, accepted: self.listeners.accepted(local) },
        }
    }
}

impl KernelView for DiagView {
    fn source(&self) -> Source {
        Source::SockDiag
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        let taken_ns = now_ns();
        // Descriptors first: a socket in the dump with an inode seen before was held when the snapshot began.
        let descriptors = socket_descriptors()?;
        // It tells times as so long ago.
        let dumped_ns = now_ns();
        let rows = self.diag.dump()?;
        let listening = rows.iter().filter(|row| row.state == TcpState::Listen).map(|row| row.local);
        self.listeners.saw(listening, taken_ns);

        let mut known = HashMap::new();
        let mut sockets = Vec::new();
        let mut by_inode = HashMap::new();
        for row in &rows {
            by_inode.insert(u64::from(row.inode), row);
        }
        for (inode, fd) in &descriptors {
            let mut socket = match by_inode.get(inode) {
                Some(row) if row.state == TcpState::Listen => continue,
                Some(row) => listed(row, dumped_ns, self.netns),
                None => match procfd::ask(*fd) {
                    Some(socket) => closed(&socket, taken_ns, self.netns),
                    None => continue,
                },
            };
            let kind = self.classify(socket.cookie, socket.local, socket.remote);
            socket.remote = kind.remote;
            known.insert(socket.cookie, kind);
            if !kind.accepted && socket.state != TcpState::Listen {
                sockets.push(socket);
            }
        }
        self.known = known;
        Ok(KernelSnapshot { taken_ns, sockets, ..KernelSnapshot::default() })
    }

    /// There is no other witness than the two that the snapshot joins.
    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        let snapshot = self.snapshot()?;
        let count = snapshot.sockets.len();
        Ok(Crosscheck { compared: [count, count, count], ..Crosscheck::default() })
    }
}

/// A held socket of the network namespace `netns` as the kernel lists it.
pub(super) fn listed(row: &Row, taken_ns: u64, netns: u32) -> KernelSocket {
    let ago = |ms: u32| taken_ns.saturating_sub(u64::from(ms) * 1_000_000);
    // Before the handshake the kernel counts from boot.
    let info = row.info.filter(|_| row.state != TcpState::SynSent);
    KernelSocket {
        cookie: row.cookie,
        state: row.state,
        held: true,
        owner: 0,
        opened: None,
        local: row.local,
        remote: row.remote,
        last_received_ns: info.map(|info| ago(info.since_received_ms)),
        last_sent_ns: info.map(|info| ago(info.since_sent_ms)),
        bytes_sent: info.and_then(|info| info.bytes_sent),
        bytes_received: info.and_then(|info| info.bytes_received),
        unread: Some(row.unread.saturating_sub(u32::from(row.state.has_fin()))),
        netns,
    }
}

/// The sockets in this process's table of descriptors: one descriptor for each inode.
fn socket_descriptors() -> Result<HashMap<u64, RawFd>, ViewError> {
    let what = "reading /proc/self/fd";
    let mut sockets = HashMap::new();
    for entry in fs::read_dir("/proc/self/fd").map_err(ViewError::io(what))? {
        let entry = entry.map_err(ViewError::io(what))?;
        // Closed meanwhile: then it is not held.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let inode = target.to_str().and_then(|name| name.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let fd = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (Some(inode), Some(fd)) = (inode, fd) {
            sockets.insert(inode, fd);
        }
    }
    Ok(sockets)
}

/// A socket that the kernel lists nowhere: its peer is not known (`getpeername` refuses).
fn closed(socket: &Asked, taken_ns: u64, netns: u32) -> KernelSocket {
    let ago = |ms: u32| taken_ns.saturating_sub(u64::from(ms) * 1_000_000);
    // Without a byte the kernel's times are those of the boot.
    let moved = socket.info.bytes_received.unwrap_or(0) + socket.info.bytes_sent.unwrap_or(0) > 0;
    KernelSocket {
        cookie: socket.cookie,
        state: socket.state(),
        held: true,
        owner: 0,
        opened: None,
        local: socket.local,
        remote: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        last_received_ns: moved.then(|| ago(socket.info.since_received_ms)),
        last_sent_ns: moved.then(|| ago(socket.info.since_sent_ms)),
        bytes_sent: socket.info.bytes_sent,
        bytes_received: socket.info.bytes_received,
        unread: None,
        netns,
    }
}
