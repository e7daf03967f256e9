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

/// Destroys exactly this socket: both ends and the cookie must match.
///
/// # Errors
/// Netlink failed, so that it is not known what the kernel did.
pub fn destroy(socket: &KernelSocket) -> Result<Destroyed, ViewError> {
    let answer = SockDiag::open()?.destroy(socket.local, socket.remote, socket.cookie)?;
    Ok(match answer {
        Ok(()) => Destroyed::Severed,
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT) => Destroyed::Gone,
            Some(libc::EPERM | libc::EACCES) => Destroyed::NotPermitted,
            Some(libc::EOPNOTSUPP) => Destroyed::NotOffered,
            _ => Destroyed::Refused(error),
        },
    })
}
