//! `SOCK_DESTROY`: the reaper's last rung.
//!
//! The kernel resets the connection and wakes its owner with ECONNABORTED. It frees no descriptor: the socket stays held
//! in state CLOSE until its owner closes it. A socket that is in state CLOSE already is out of reach.

use std::io;

use super::netlink::SockDiag;
use super::{KernelSocket, ViewError};

/// What the kernel answered. What came of it only a later snapshot shows.
#[derive(Debug)]
pub enum Destroyed {
    /// Done: the connection is reset.
    Severed,
    /// There is no such socket in the table of connections (any more), or it is in another network namespace.
    Gone,
    /// CAP_NET_ADMIN is missing.
    NotPermitted,
    /// The kernel was built without CONFIG_INET_DIAG_DESTROY.
    NotOffered,
    /// Any other answer.
    Refused(io::Error),
}

impl Destroyed {
    /// Why the socket was not destroyed, and what to do about it; none if it was.
    ///
    /// # Errors
    /// It was not.
    pub fn result(self) -> io::Result<()> {
        let why = match self {
            Self::Severed => return Ok(()),
            Self::Gone => "there is no such connection any more",
            Self::NotPermitted => {
                "CAP_NET_ADMIN is missing; grant it to the process (systemd: `AmbientCapabilities=CAP_NET_ADMIN`)"
            }
            Self::NotOffered => {
                "the kernel was built without CONFIG_INET_DIAG_DESTROY; boot one that has it (Debian's and Ubuntu's do), \
                 or expect no orphan to be severed"
            }
            Self::Refused(error) => return Err(error),
        };
        Err(io::Error::other(why))
    }
}

/// Destroys exactly this socket in this thread's network namespace: both ends and the cookie must match.
///
/// # Errors
/// Netlink failed, so that it is not known what the kernel did.
pub fn destroy(socket: &KernelSocket) -> Result<Destroyed, ViewError> {
    destroy_by(&mut SockDiag::open()?, socket)
}

/// The same in the network namespace of `diag`.
pub(super) fn destroy_by(diag: &mut SockDiag, socket: &KernelSocket) -> Result<Destroyed, ViewError> {
    Ok(match diag.destroy(socket.local, socket.remote, socket.cookie)? {
        Ok(()) => Destroyed::Severed,
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT) => Destroyed::Gone,
            Some(libc::EPERM | libc::EACCES) => Destroyed::NotPermitted,
            Some(libc::EOPNOTSUPP) => Destroyed::NotOffered,
            _ => Destroyed::Refused(error),
        },
    })
}
