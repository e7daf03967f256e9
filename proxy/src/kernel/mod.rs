//! What the kernel says of outgoing TCP sockets, this process's or another's: the second half of the count.
//!
//! A [`KernelView`] yields [`KernelSnapshot`]s of plain data; the ledger is joined with them by socket cookie
//! (`SO_COOKIE`), which the kernel never gives out twice. Two views exist:
//!
//! * **eBPF** ([`Source::Ebpf`]): every socket is tagged inside the kernel when this process connects it, and the tag
//!   lives and dies with the socket. Exact, whatever state the socket is in.
//! * **`sock_diag`** ([`Source::SockDiag`]): the sockets behind `/proc/self/fd`, with the states that the kernel's netlink
//!   dump gives. It needs no privilege, but sees only what this process still holds a descriptor of.
//!
//! [`open_beside`] opens either for other processes, in whatever network and pid namespaces they live.
//!
//! No aya type crosses this module's boundary, and `unsafe` is in `sys.rs` only.

use std::fmt;
use std::net::SocketAddr;

mod beside;
mod btf;
mod capability;
mod convert;
mod crosscheck;
mod destroy;
mod diag;
mod error;
mod evidence;
mod holder;
#[cfg(feature = "test-hooks")]
pub(crate) mod lies;
mod listeners;
mod loader;
mod log;
mod netlink;
mod open;
mod peers;
mod ports;
mod procfd;
mod reader;
mod state;
pub(crate) mod sys;
mod tcp_info;
mod view;
mod witness;

pub use beside::{Process, Who};
pub use btf::BtfError;
pub use destroy::{Destroyed, destroy};
pub use error::ViewError;
pub use holder::who_listens;
pub use open::{Opened, open, open_beside};
pub use ports::ports_in_use;
pub use state::TcpState;
pub use witness::Witness;

/// Reads the kernel's side of the count. One owner, on the watchdog's thread; a call blocks for milliseconds.
pub trait KernelView: Send {
    /// Where the data comes from.
    fn source(&self) -> Source;

    /// Reads all sockets.
    ///
    /// A missed event forces a search of this process's descriptors inside, an uncertain view a
    /// [`crosscheck`](Self::crosscheck); the verdict is in [`KernelSnapshot::uncertain`].
    ///
    /// # Errors
    /// The view could not be read at all: nothing is known of any socket.
    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError>;

    /// Compares the view with its witnesses, and takes up sockets that it did not know.
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot).
    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError>;

    /// Destroys exactly this socket (SOCK_DESTROY), in the network namespace where it lives.
    ///
    /// # Errors
    /// Netlink failed, so that it is not known what the kernel did.
    fn destroy(&mut self, socket: &KernelSocket) -> Result<Destroyed, ViewError> {
        destroy(socket)
    }
}

/// Where a kernel view's data comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// eBPF: socket storage, read by iterators.
    Ebpf,
    /// Netlink `sock_diag` and `/proc/self/fd`.
    SockDiag,
    /// No view: every snapshot is an error.
    None,
}

impl Source {
    /// The word in logs: `ebpf`, `sock-diag`, `none`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::SockDiag => "sock-diag",
            Self::None => "none",
        }
    }

    /// The word in metric labels: `ebpf`, `sock_diag`, `none`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::SockDiag => "sock_diag",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// All outgoing TCP sockets of this process, or of those that are watched towards their peers, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelSnapshot {
    /// When the read began, nanoseconds of `CLOCK_MONOTONIC`. A socket opened later may be missing; one that was
    /// open from before until after the read is in it exactly once.
    pub taken_ns: u64,
    /// In no order, each cookie once.
    pub sockets: Vec<KernelSocket>,
    /// The processes whose sockets these are, the oldest first; a view of this process itself names none. If there is
    /// none, those that were watched have ended: one with their name or cgroup is taken up by the next snapshot.
    pub processes: Vec<Process>,
    /// Since the view was opened: runs of the eBPF programs that the kernel skipped, tags that could not be stored,
    /// and sockets that were found without a tag. Misses are normal under load: the sockets are in the snapshot all the same.
    pub missed: u64,
    /// Why this snapshot must not be acted on; `None` if it is whole.
    pub uncertain: Option<String>,
}

/// One TCP socket as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSocket {
    /// `SO_COOKIE`: unique since boot, never reused.
    pub cookie: u64,
    /// Its state when it was read.
    pub state: TcpState,
    /// Some descriptor, of any process, still refers to it. Without one the kernel only finishes the closing handshake.
    pub held: bool,
    /// Whose it is: a watched process, by its id in the watcher's pid namespace. 0 if that has ended, and in a view of this
    /// process itself.
    pub owner: u32,
    /// When `connect()` began (the last one, if there were several), nanoseconds of `CLOCK_MONOTONIC`.
    /// `None`: before the view was opened, not connected yet, or not known to this view.
    pub opened: Option<u64>,
    /// Local end; address or port are zero while the kernel has not chosen them.
    /// IPv4 in IPv6 (`::ffff:a.b.c.d`) is given as IPv4, here and in `remote`.
    pub local: SocketAddr,
    /// The peer, also after the connection was reset or refused where the view can know it, else all zero.
    pub remote: SocketAddr,
    /// When the last payload byte came in, or, before the first one, when the handshake ended; nanoseconds of
    /// `CLOCK_MONOTONIC`, exact to one kernel tick (1 to 10 ms). `None` before the handshake.
    pub last_received_ns: Option<u64>,
    /// When payload was last sent (retransmission included), in the terms of `last_received_ns`.
    pub last_sent_ns: Option<u64>,
    /// Payload bytes sent, retransmitted ones counted again (`tcpi_bytes_sent`).
    pub bytes_sent: Option<u64>,
    /// Payload bytes received (`tcpi_bytes_received`).
    pub bytes_received: Option<u64>,
    /// Bytes received that the program has not read yet.
    pub unread: Option<u32>,
    /// Inode of its network namespace (`/proc/self/ns/net`), 0 if not known.
    pub netns: u32,
}

/// The outcome of a comparison with the witnesses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Crosscheck {
    /// Sockets that each has, of whatever kind: the view itself, this process's descriptors, `sock_diag`.
    pub compared: [usize; 3],
    /// Connected sockets that the view did not know and a witness did: taken up now, counted as missed.
    pub found: Vec<u64>,
    /// Sockets that were never connected: nobody could have tagged them. Taken up now, normal.
    pub unconnected: Vec<u64>,
    /// Held, but by no descriptor of this process: a child process, a socket in transit, `io_uring`.
    pub held_elsewhere: Vec<u64>,
    /// What the witnesses contradict each other about; `None` if they agree.
    pub disagreement: Option<String>,
    /// Which one is wrong: the two others say so. `None` with a disagreement: it is one against one.
    pub liar: Option<Witness>,
    /// How often each was named since the view was opened, this time included, by [`Witness`].
    pub named: [u64; Witness::ALL.len()],
}

impl Crosscheck {
    /// Why the view is not to be acted on. While two agree with each other and the view is one of them, it is.
    pub fn doubt(&self) -> Option<&str> {
        self.disagreement.as_deref().filter(|_| matches!(self.liar, None | Some(Witness::Ebpf)))
    }
}
