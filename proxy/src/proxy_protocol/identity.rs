//! Whom a header names: the choice that decides which queries may share a backend connection.
//!
//! The specification forbids to carry several clients over a connection whose header names one of them (section 2).
//! It does not forbid a header that is exact for several, and port 0 or a network address says that it is.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::network::masked;

/// Who is named as the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The client's address and port: the backend connection belongs to that one client connection.
    Connection,
    /// The client's address, port 0: shared by all connections of that address.
    Address,
    /// The client's network, port 0: shared by all clients of that network.
    Subnet {
        /// Prefix length for IPv4, 0 to 32. More counts as 32.
        v4: u8,
        /// Prefix length for IPv6, 0 to 128. More counts as 128.
        v6: u8,
    },
    /// The forwarder's own side of the backend connection, port 0: shared by every client with equal TLVs. Never
    /// AF_UNSPEC, which PowerDNS Recursor and dnsdist refuse.
    Forwarder,
}

impl Identity {
    /// Whether a header names one client connection, so that the backend connection must end with it.
    pub fn is_per_connection(self) -> bool {
        self == Self::Connection
    }

    /// Source and destination for the header.
    ///
    /// `client` is the client's address and port. `listener` is where it connected to; for [`Identity::Connection`]
    /// that may be the accepted socket's own address, otherwise it should be the configured one, lest a wildcard
    /// listener gives each of its addresses another header. `forwarder` is the local end of the backend connection,
    /// of which only the address is used.
    ///
    /// IPv4 addresses that a dual-stack listener mapped into IPv6 are given as IPv4.
    pub fn endpoints(
        self,
        client: SocketAddr,
        listener: SocketAddr,
        forwarder: SocketAddr,
    ) -> (SocketAddr, SocketAddr) {
        let client_ip = client.ip().to_canonical();
        let source = match self {
            Self::Connection => SocketAddr::new(client_ip, client.port()),
            Self::Address => SocketAddr::new(client_ip, 0),
            Self::Subnet { v4, v6 } => SocketAddr::new(masked(client_ip, v4, v6), 0),
            Self::Forwarder => SocketAddr::new(forwarder.ip().to_canonical(), 0),
        };
        let destination = match (source.ip(), listener.ip().to_canonical()) {
            // `[::]` means IPv4 too. Naming 0.0.0.0 keeps the header in the family of the client.
            (IpAddr::V4(_), IpAddr::V6(any)) if any.is_unspecified() => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            (_, ip) => ip,
        };
        (source, SocketAddr::new(destination, listener.port()))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use std::net::Ipv6Addr;

    use super::*;
    use proptest::prelude::*;

    const SUBNET: Identity = Identity::Subnet { v4: 24, v6: 56 };

    fn ends(identity: Identity, client: &str, listener: &str, forwarder: &str) -> (String, String) {
        let parse = |text: &str| text.parse().expect("an address");
        let (source, destination) = identity.endpoints(parse(client), parse(listener), parse(forwarder));
        (source.to_string(), destination.to_string())
    }

    #[test]
    fn the_table_of_identities() {
        for (identity, source) in [
            (Identity::Connection, "192.0.2.77:4000"),
            (Identity::Address, "192.0.2.77:0"),
            (SUBNET, "192.0.2.0:0"),
            (Identity::Forwarder, "10.0.0.9:0"),
        ] {
            let seen = ends(identity, "192.0.2.77:4000", "198.51.100.1:53", "10.0.0.9:55555");
            assert_eq!(seen, (source.to_owned(), "198.51.100.1:53".to_owned()));
        }
    }

    #[test]
    fn subnets_of_ipv6() {
        let (source, _) = ends(SUBNET, "[2001:db8:1:2345:6::7]:9", "[::1]:53", "[::1]:1");
        assert_eq!(source, "[2001:db8:1:2300::]:0");
    }

    #[test]
    fn prefix_lengths_at_their_ends() {
        let all = IpAddr::V4(Ipv4Addr::BROADCAST);
        assert_eq!(masked(all, 0, 0), IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        assert_eq!(masked(all, 32, 0), all);
        assert_eq!(masked(all, 255, 0), all);
        let v6 = IpAddr::V6(Ipv6Addr::from_bits(u128::MAX));
        assert_eq!(masked(v6, 0, 0), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        assert_eq!(masked(v6, 0, 128), v6);
        assert_eq!(masked(v6, 0, 255), v6);
    }

    #[test]
    fn clients_of_a_dual_stack_listener_are_ipv4() {
        let seen = ends(Identity::Address, "[::ffff:192.0.2.1]:5", "[::]:53", "10.0.0.1:1");
        assert_eq!(seen, ("192.0.2.1:0".to_owned(), "0.0.0.0:53".to_owned()));
        let seen = ends(SUBNET, "[::ffff:192.0.2.1]:5", "[::ffff:198.51.100.1]:53", "10.0.0.1:1");
        assert_eq!(seen, ("192.0.2.0:0".to_owned(), "198.51.100.1:53".to_owned()));
    }

    proptest! {
        /// All that a header may not depend on does not change it.
        #[test]
        fn shared_identities_do_not_tell_clients_apart(
            client in any::<SocketAddr>(),
            port in any::<u16>(),
            host in any::<u8>(),
            listener in any::<SocketAddr>(),
            forwarder in any::<SocketAddr>(),
        ) {
            let other_port = SocketAddr::new(client.ip(), port);
            let neighbour = match client.ip().to_canonical() {
                IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from_bits((ip.to_bits() & !0xff) | u32::from(host))),
                IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits((ip.to_bits() & !0xff) | u128::from(host))),
            };
            let neighbour = SocketAddr::new(neighbour, port);
            let stranger = SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(u32::from(port))), port);
            let of = |identity: Identity, client| identity.endpoints(client, listener, forwarder);
            prop_assert_eq!(of(Identity::Address, client), of(Identity::Address, other_port));
            prop_assert_eq!(of(SUBNET, client), of(SUBNET, neighbour));
            prop_assert_eq!(of(Identity::Forwarder, client), of(Identity::Forwarder, stranger));
            prop_assert_eq!(of(Identity::Connection, client).0.port(), client.port());
        }
    }
}
