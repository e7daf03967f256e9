//! Other processes without eBPF: `/proc/PID/fd` joined with `sock_diag` in their network namespaces, by inode.
//!
//! The kernel lists no socket in state CLOSE, and nobody else can ask its descriptor. So one that was reset is seen only if
//! an earlier snapshot saw it alive (its inode is still behind a descriptor), and one that was refused, or reset between two
//! snapshots, not at all. Nor is a socket that no watched process holds any more.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;

use super::super::diag::listed;
use super::super::netlink::Row;
use super::super::peers::Peers;
use super::super::reader::now_ns;
use super::super::{Crosscheck, Destroyed, KernelSnapshot, KernelSocket, KernelView, Source, TcpState, ViewError};
use super::namespace::Namespaces;
use super::process::{self, Process};
use super::who::{Finder, Who};

/// The view of other processes through `sock_diag`.
pub(in super::super) struct DiagBeside {
    finder: Finder,
    peers: Peers,
    namespaces: Namespaces,
    /// The sockets of the last snapshot by the inodes of their files.
    known: HashMap<u64, KernelSocket>,
}

/// What `/proc` says of the watched processes.
#[derive(Default)]
struct Holders {
    processes: BTreeSet<Process>,
    /// The oldest process that holds the socket with this inode.
    by_inode: HashMap<u64, Process>,
    netns: HashSet<u32>,
    /// A process that could not be read.
    unreadable: Option<ViewError>,
}

impl DiagBeside {
    /// Opens the view.
    ///
    /// # Errors
    /// There is no such process, or one of them may not be read.
    pub(in super::super) fn open(who: &Who, peers: &[SocketAddr]) -> Result<Self, ViewError> {
        let mut view = Self {
            finder: Finder::new(who)?,
            peers: Peers::new(peers),
            namespaces: Namespaces::new()?,
            known: HashMap::new(),
        };
        match view.holders()?.unreadable {
            Some(error) => Err(error),
            None => Ok(view),
        }
    }

    fn holders(&mut self) -> Result<Holders, ViewError> {
        let mut holders = Holders::default();
        for process in self.finder.find()? {
            let (sockets, netns) =
                match process::sockets(process).and_then(|sockets| Ok((sockets, self.namespaces.of(process.pid)?))) {
                    Ok((Some(sockets), Some(netns))) => (sockets, netns),
                    // It has ended meanwhile.
                    Ok(_) => continue,
                    Err(error) => {
                        holders.processes.insert(process);
                        holders.unreadable.get_or_insert(error);
                        continue;
                    }
                };
            holders.processes.insert(process);
            holders.netns.insert(netns);
            for inode in sockets {
                // The oldest comes first.
                holders.by_inode.entry(inode).or_insert(process);
            }
        }
        Ok(holders)
    }

    /// A socket of the last snapshot that is still behind a descriptor, and that the dump lacks: the dump has stepped over
    /// it while others came and went, or it is in no table of the kernel any more.
    fn look_up(&mut self, old: &KernelSocket) -> Result<KernelSocket, ViewError> {
        let row = match self.namespaces.get(old.netns) {
            Some(diag) if old.state != TcpState::Close => diag.find(old.local, old.remote, old.cookie)?,
            _ => None,
        };
        Ok(match row {
            Some(row) => listed(&row, now_ns(), old.netns),
            None => KernelSocket { state: TcpState::Close, unread: None, ..old.clone() },
        })
    }
}

impl KernelView for DiagBeside {
    fn source(&self) -> Source {
        Source::SockDiag
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        let taken_ns = now_ns();
        // Descriptors first: a socket in the dump with an inode seen before was held when the snapshot began.
        let holders = self.holders()?;
        // A process may hold a socket of a namespace that it has left.
        let left = self.known.values().map(|socket| socket.netns);
        self.namespaces.keep(&holders.netns.iter().copied().chain(left).collect());

        let mut sockets: HashMap<u64, KernelSocket> = HashMap::new();
        let port = self.peers.port();
        for (netns, diag) in self.namespaces.each() {
            // It tells times as so long ago.
            let dumped_ns = now_ns();
            let rows: Vec<Row> = diag.dump_to(port)?;
            for row in rows.iter().filter(|row| self.peers.contains(row.remote)) {
                let inode = u64::from(row.inode);
                if let Some(holder) = holders.by_inode.get(&inode) {
                    sockets.insert(inode, KernelSocket { owner: holder.pid, ..listed(row, dumped_ns, netns) });
                }
            }
        }
        let mut undumped = std::mem::take(&mut self.known);
        undumped.retain(|inode, _| !sockets.contains_key(inode));
        for (inode, old) in undumped {
            if let Some(holder) = holders.by_inode.get(&inode) {
                let socket = self.look_up(&old)?;
                sockets.insert(inode, KernelSocket { owner: holder.pid, ..socket });
            }
        }
        self.known.clone_from(&sockets);
        Ok(KernelSnapshot {
            taken_ns,
            sockets: sockets.into_values().collect(),
            processes: holders.processes.into_iter().collect(),
            missed: 0,
            uncertain: holders.unreadable.map(|error| error.to_string()),
        })
    }

    /// There is no other witness than the two that the snapshot joins.
    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        let snapshot = self.snapshot()?;
        let count = snapshot.sockets.len();
        Ok(Crosscheck { compared: [count, count, count], ..Crosscheck::default() })
    }

    fn destroy(&mut self, socket: &KernelSocket) -> Result<Destroyed, ViewError> {
        self.namespaces.destroy(socket)
    }
}
