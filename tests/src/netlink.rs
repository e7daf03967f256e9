//! Requests to the kernel over netlink(7) that are answered by yes or no.

use std::io;

use rustix::net::{self, Protocol};

/// Of `linux/netlink.h`.
const HEADER: usize = 16;
const ERROR: u16 = 2;
const REQUEST_ACKNOWLEDGE: u16 = 0x5;

/// Sends one request and returns what the kernel says of it. No protocol is `NETLINK_ROUTE`.
///
/// # Errors
/// The kernel's.
pub(crate) fn request(protocol: Option<Protocol>, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(HEADER + body.len()).expect("a short request");
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(REQUEST_ACKNOWLEDGE | flags).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(body);
    let socket =
        net::socket_with(net::AddressFamily::NETLINK, net::SocketType::RAW, net::SocketFlags::CLOEXEC, protocol)?;
    net::send(&socket, &request, net::SendFlags::empty())?;
    let mut buffer = [0; 4096];
    let (received, _) = net::recv(&socket, &mut buffer[..], net::RecvFlags::empty())?;
    let answer = &buffer[..received];
    let error = answer.get(HEADER..).and_then(|rest| rest.first_chunk()).map(|error| i32::from_ne_bytes(*error));
    match error.filter(|_| answer[4..6] == ERROR.to_ne_bytes()) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::Error::other("the kernel's answer is none")),
    }
}

/// Makes the connection tracking of the calling thread's network namespace forget all connections, as a firewall does that
/// is started again.
///
/// # Panics
/// If the kernel has none, or the caller is not root.
pub fn forget_connections() {
    /// Of `linux/netfilter/nfnetlink.h` and `nfnetlink_conntrack.h`: `NFNL_SUBSYS_CTNETLINK`, `IPCTNL_MSG_CT_DELETE`.
    const DELETE: u16 = 1 << 8 | 2;
    // `struct nfgenmsg`: any family, and nothing that says which ones.
    let all = [0; 4];
    request(Some(net::netlink::NETFILTER), DELETE, 0, &all).unwrap_or_else(|e| panic!("connection tracking: {e}"));
}
