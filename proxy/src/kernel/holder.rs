//! Which process listens on an address, for errors that say so.

use std::net::{IpAddr, SocketAddr};

use super::beside;
use super::netlink::SockDiag;
use super::state::TcpState;

/// A process that listens on `address`, or on a wildcard that has it, or on an address of it if it is a wildcard: its id and
/// its name. None if that cannot be known: it lives in another pid namespace, or this process may not look at it.
pub fn who_listens(address: SocketAddr) -> Option<(u32, String)> {
    let rows = SockDiag::open().ok()?.dump().ok()?;
    let listens = rows.iter().filter(|row| row.state == TcpState::Listen && overlap(row.local, address));
    let inodes: Vec<u64> = listens.map(|row| u64::from(row.inode)).filter(|inode| *inode != 0).collect();
    beside::holder_of(&inodes)
}

fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let (a, b) = (one.ip().to_canonical(), other.ip().to_canonical());
    let has = |wide: IpAddr, ip: IpAddr| wide.is_unspecified() && (wide.is_ipv6() || ip.is_ipv4());
    one.port() == other.port() && (a == b || has(a, b) || has(b, a))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn this_process_is_found_by_its_listener() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        for asked in [address, SocketAddr::from(([0, 0, 0, 0], address.port()))] {
            assert_eq!(who_listens(asked).unwrap().0, std::process::id(), "{asked}");
        }
        assert_eq!(who_listens(SocketAddr::from(([127, 99, 0, 1], address.port()))), None);
    }

    #[test]
    fn wildcards_have_what_they_cover() {
        for (one, other, both) in [
            ("0.0.0.0:53", "127.0.0.1:53", true),
            ("127.0.0.1:53", "0.0.0.0:53", true),
            ("[::]:53", "127.0.0.1:53", true),
            ("0.0.0.0:53", "[::1]:53", false),
            ("127.0.0.1:53", "127.0.0.2:53", false),
            ("[::]:53", "[::]:54", false),
        ] {
            assert_eq!(overlap(one.parse().unwrap(), other.parse().unwrap()), both, "{one} {other}");
        }
    }
}
