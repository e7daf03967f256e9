//! Local ports in use towards a peer: what `connect(2)` runs out of, with EADDRNOTAVAIL.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::ViewError;
use super::netlink::SockDiag;
use super::peers::{Peers, end};

/// How many local ports are in use towards each of `peers`, in their order.
///
/// A port counts from `connect(2)` to the end of TIME_WAIT, whatever process of this network namespace took it: they all
/// draw from the same range. With several source addresses it counts once for each of them.
///
/// # Errors
/// `sock_diag` cannot be asked.
pub fn ports_in_use(peers: &[SocketAddr]) -> Result<Vec<u64>, ViewError> {
    if peers.is_empty() {
        return Ok(Vec::new());
    }
    // The kernel can leave out all but one port; a second walk through its table would cost more than that saves.
    let port = Peers::new(peers).port();
    let mut used: HashMap<(IpAddr, u16), u64> = HashMap::new();
    for row in SockDiag::open()?.dump_towards(port)? {
        *used.entry(end(row.remote)).or_insert(0) += 1;
    }
    Ok(peers.iter().map(|peer| used.get(&end(*peer)).copied().unwrap_or(0)).collect())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]
    #![expect(clippy::disallowed_methods, reason = "the test needs connections of its own")]

    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_port_counts_until_its_time_wait_is_over() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("[::1]:0").unwrap();
        let (here, there) = (listener.local_addr().unwrap(), other.local_addr().unwrap());
        let used = |peers: &[SocketAddr]| ports_in_use(peers).unwrap();
        assert_eq!(used(&[here]), [0]);
        let clients: Vec<_> = (0..3).map(|_| TcpStream::connect(here).unwrap()).collect();
        let servers: Vec<_> = clients.iter().map(|_| listener.accept().unwrap().0).collect();
        let v6 = TcpStream::connect(there).unwrap();
        assert_eq!(used(&[here]), [3]);
        assert_eq!(used(&[there, here]), [1, 3], "two ports, two families");
        // The client closes first, so TIME_WAIT is on its side.
        drop(clients);
        drop(servers);
        assert_eq!(used(&[here]), [3], "TIME_WAIT");
        drop(v6);
        assert_eq!(used(&[]), [0; 0]);
    }
}
