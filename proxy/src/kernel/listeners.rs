//! Which sockets were accepted and not opened by this process.
//!
//! The kernel does not say so of a socket. But an accepted socket has the local address of its listener, and no outgoing
//! one ever has: the kernel picks no local port that somebody bound.

use std::collections::HashMap;
use std::net::SocketAddr;

/// How long a listener is remembered after it was last seen: its accepted sockets outlive it.
const REMEMBERED_NS: u64 = 600_000_000_000;

/// The addresses on which this process accepts.
#[derive(Debug)]
pub(super) struct Listeners {
    configured: Vec<SocketAddr>,
    /// Found among this process's own sockets, with the time when each was last seen.
    seen: HashMap<SocketAddr, u64>,
}

impl Listeners {
    /// Starts with those that are known from the configuration.
    pub(super) fn new(configured: &[SocketAddr]) -> Self {
        Self { configured: configured.iter().copied().map(canonical).collect(), seen: HashMap::new() }
    }

    /// Takes note of the listening sockets seen at `now_ns`, and forgets those not seen for long.
    pub(super) fn saw(&mut self, listening: impl IntoIterator<Item = SocketAddr>, now_ns: u64) {
        self.seen.extend(listening.into_iter().map(|address| (canonical(address), now_ns)));
        self.seen.retain(|_, seen_ns| now_ns.saturating_sub(*seen_ns) <= REMEMBERED_NS);
    }

    /// Whether a socket with this local address was accepted.
    pub(super) fn accepted(&self, local: SocketAddr) -> bool {
        let local = canonical(local);
        let matches = |listener: &SocketAddr| {
            listener.port() == local.port()
                && listener.port() != 0
                && (listener.ip().is_unspecified() || listener.ip() == local.ip())
        };
        self.configured.iter().any(matches) || self.seen.keys().any(matches)
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    #[test]
    fn a_local_address_of_a_listener_is_accepted() {
        let listeners = Listeners::new(&[at("127.0.0.1:5300"), at("[::]:853")]);
        assert!(listeners.accepted(at("127.0.0.1:5300")));
        assert!(listeners.accepted(at("[::ffff:127.0.0.1]:5300")));
        assert!(!listeners.accepted(at("127.0.0.2:5300")));
        assert!(!listeners.accepted(at("127.0.0.1:5301")));
        assert!(listeners.accepted(at("192.0.2.1:853")), "a wildcard listener takes every address");
        assert!(!listeners.accepted(at("0.0.0.0:0")));
    }

    #[test]
    fn a_listener_seen_is_remembered_for_a_while() {
        let mut listeners = Listeners::new(&[]);
        listeners.saw([at("127.0.0.1:40000")], 1);
        assert!(listeners.accepted(at("127.0.0.1:40000")));
        listeners.saw([], REMEMBERED_NS + 1);
        assert!(listeners.accepted(at("127.0.0.1:40000")));
        listeners.saw([], REMEMBERED_NS + 2);
        assert!(!listeners.accepted(at("127.0.0.1:40000")));
    }

    #[test]
    fn port_zero_is_no_listener() {
        assert!(!Listeners::new(&[at("127.0.0.1:0")]).accepted(at("127.0.0.1:0")));
    }
}
