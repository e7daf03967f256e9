//! The peers whose connections are counted.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use counterfoil_common::Peer;

/// Addresses and ports, IPv4 in IPv6 as IPv4.
#[derive(Clone, Debug)]
pub(super) struct Peers(HashSet<(IpAddr, u16)>);

impl Peers {
    pub(super) fn new(peers: &[SocketAddr]) -> Self {
        Self(peers.iter().copied().map(end).collect())
    }

    pub(super) fn contains(&self, address: SocketAddr) -> bool {
        self.0.contains(&end(address))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// In the form in which the eBPF program compares them.
    pub(super) fn keys(&self) -> impl Iterator<Item = Peer> {
        self.0.iter().map(|(ip, port)| {
            let address = match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => *v6,
            };
            Peer { address: address.octets(), port: *port, ..Peer::default() }
        })
    }

    /// The port that all of them have, else 0.
    pub(super) fn port(&self) -> u16 {
        let mut ports = self.0.iter().map(|(_, port)| *port);
        let first = ports.next().unwrap_or(0);
        if ports.all(|port| port == first) { first } else { 0 }
    }
}

/// Without the scope of a link-local address, which the kernel gives elsewhere.
pub(super) fn end(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    #[test]
    fn a_mapped_address_is_the_ipv4_one() {
        let peers = Peers::new(&[at("[::ffff:192.0.2.1]:53"), at("[fe80::1%3]:53")]);
        assert!(peers.contains(at("192.0.2.1:53")));
        assert!(peers.contains(at("[::ffff:192.0.2.1]:53")));
        assert!(peers.contains(at("[fe80::1]:53")));
        assert!(!peers.contains(at("192.0.2.1:54")));
        assert!(!peers.contains(at("192.0.2.2:53")));
    }

    #[test]
    fn only_a_common_port_is_one() {
        assert_eq!(Peers::new(&[at("192.0.2.1:53"), at("[2001:db8::1]:53")]).port(), 53);
        assert_eq!(Peers::new(&[at("192.0.2.1:53"), at("192.0.2.1:853")]).port(), 0);
        assert_eq!(Peers::new(&[]).port(), 0);
    }
}
