//! `sock_diag` in the network namespaces of other processes.
//!
//! A netlink socket stays in the namespace in which it was made. So a thread that lives only for this enters the namespace
//! and opens one, and the thread that asks stays where it is.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::super::netlink::SockDiag;
use super::super::{Destroyed, KernelSocket, ViewError, destroy};
use super::process::is_gone;

/// One `sock_diag` socket for each network namespace in which somebody is watched.
pub(super) struct Namespaces {
    /// The inode of the watcher's own.
    own: u32,
    /// By the inode of the namespace. Each keeps its namespace alive.
    open: HashMap<u32, SockDiag>,
}

impl Namespaces {
    pub(super) fn new() -> Result<Self, ViewError> {
        let path = "/proc/thread-self/ns/net";
        let own = fs::metadata(path).map_err(ViewError::io("reading /proc/thread-self/ns/net"))?;
        // Namespace inodes are 32 bits wide in the kernel.
        Ok(Self { own: own.ino() as u32, open: HashMap::new() })
    }

    /// The network namespace of a process, ready to be asked; `None` if the process has ended.
    pub(super) fn of(&mut self, pid: u32) -> Result<Option<u32>, ViewError> {
        let path = format!("/proc/{pid}/ns/net");
        let unreadable = |source| ViewError::unreadable(pid, "network namespace (/proc/PID/ns/net)", source);
        let netns = match fs::metadata(&path) {
            Ok(namespace) => namespace.ino() as u32,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        if self.open.contains_key(&netns) {
            return Ok(Some(netns));
        }
        if netns == self.own {
            self.open.insert(netns, SockDiag::open()?);
            return Ok(Some(netns));
        }
        let namespace = match File::open(&path) {
            Ok(namespace) => namespace,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        // It may have gone to another one since.
        let netns = namespace.metadata().map_err(unreadable)?.ino() as u32;
        self.open.insert(netns, open_inside(pid, namespace)?);
        Ok(Some(netns))
    }

    /// The one with this inode.
    pub(super) fn get(&mut self, netns: u32) -> Option<&mut SockDiag> {
        self.open.get_mut(&netns)
    }

    /// Those that can be asked.
    pub(super) fn each(&mut self) -> impl Iterator<Item = (u32, &mut SockDiag)> {
        self.open.iter_mut().map(|(netns, diag)| (*netns, diag))
    }

    /// Leaves all others.
    pub(super) fn keep(&mut self, netns: &HashSet<u32>) {
        self.open.retain(|open, _| netns.contains(open));
    }

    /// Destroys a socket in its own network namespace.
    pub(super) fn destroy(&mut self, socket: &KernelSocket) -> Result<Destroyed, ViewError> {
        match self.open.get_mut(&socket.netns) {
            Some(diag) => destroy::destroy_by(diag, socket),
            // Nobody who is watched lives there any more.
            None => Ok(Destroyed::Gone),
        }
    }
}

fn open_inside(pid: u32, namespace: File) -> Result<SockDiag, ViewError> {
    let enter = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|error| ViewError::not_entered(pid, error.into()))?;
        SockDiag::open()
    };
    let name = "netns".to_owned();
    let thread = thread::Builder::new().name(name).spawn(enter).map_err(ViewError::io("starting a thread"))?;
    thread.join().unwrap_or_else(|_| Err(ViewError::Netlink("the thread that opens it has panicked".to_owned())))
}
