//! This process's descriptors, as `/proc/self/fd` has them, and what the sockets behind them say of themselves.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;

use super::tcp_info::TcpInfo;
use super::{TcpState, ViewError, sys};

/// A TCP socket, asked by its descriptor.
pub(super) struct Asked {
    pub(super) cookie: u64,
    pub(super) local: SocketAddr,
    pub(super) info: TcpInfo,
}

impl Asked {
    /// Its state; CLOSE for a number that no kernel of today has.
    pub(super) fn state(&self) -> TcpState {
        TcpState::from_kernel(self.info.state).unwrap_or(TcpState::Close)
    }
}

/// The TCP sockets behind all descriptors; one with several is there as often.
pub(super) fn sockets() -> Result<Vec<Asked>, ViewError> {
    let what = "reading /proc/self/fd";
    let mut sockets = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").map_err(ViewError::io(what))? {
        let entry = entry.map_err(ViewError::io(what))?;
        let fd = entry.file_name().to_str().and_then(|name| name.parse().ok());
        sockets.extend(fd.and_then(ask));
    }
    #[cfg(feature = "test-hooks")]
    super::lies::hide(super::Witness::ProcFd, &mut sockets);
    Ok(sockets)
}

/// Asks a descriptor; `None` if it is no TCP socket, or was closed or reused meanwhile.
pub(super) fn ask(fd: RawFd) -> Option<Asked> {
    let ask = || {
        let cookie = sys::cookie(fd)?;
        let tcp = sys::is_tcp(fd)?;
        let socket = (cookie, tcp, sys::local_address(fd), sys::tcp_info(fd));
        Ok::<_, io::Error>((socket, sys::cookie(fd)?))
    };
    let ((cookie, tcp, local, info), cookie_after) = ask().ok()?;
    if !tcp || cookie != cookie_after {
        return None;
    }
    let local = local.ok()?;
    let info = TcpInfo::parse(&info.ok()?)?;
    Some(Asked { cookie, local: SocketAddr::new(local.ip().to_canonical(), local.port()), info })
}
