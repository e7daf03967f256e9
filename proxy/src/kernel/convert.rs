//! From what the eBPF program wrote to [`KernelSocket`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use counterfoil_common::{AF_INET6, PassHeader, SocketRecord, flags};

use super::{KernelSocket, TcpState, ViewError};

/// The kernel's tick counter and its clock, read together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticks {
    /// Nanoseconds of one tick.
    pub(super) length_ns: u64,
    /// Low half of the tick counter.
    pub(super) now: u32,
    /// `CLOCK_MONOTONIC` at that tick, nanoseconds.
    pub(super) now_ns: u64,
}

impl Ticks {
    /// The moment at which a sweep began.
    pub(super) fn of_pass(pass: &PassHeader, length_ns: u64) -> Self {
        // The kernel's own timestamps are the low half of the counter as well.
        Self { length_ns, now: pass.started_ticks as u32, now_ns: pass.started_ns }
    }

    /// A tick timestamp as nanoseconds of `CLOCK_MONOTONIC`; `None` for zero, which means never.
    fn to_ns(self, ticks: u32) -> Option<u64> {
        /// A timestamp may be this much later than `now`: packets come in during the sweep.
        const AHEAD: u32 = 1 << 16;
        if ticks == 0 {
            return None;
        }
        let age = match self.now.wrapping_sub(ticks) {
            ahead if ahead > u32::MAX - AHEAD => 0,
            age => age,
        };
        Some(self.now_ns.saturating_sub(u64::from(age) * self.length_ns))
    }
}

/// The local end of a record.
pub(super) fn local(record: &SocketRecord) -> SocketAddr {
    address(record.family, record.local, record.local_port)
}

/// The peer of a record.
pub(super) fn remote(record: &SocketRecord) -> SocketAddr {
    address(record.family, record.remote, record.remote_port)
}

/// The state of a record.
pub(super) fn state(record: &SocketRecord) -> Result<TcpState, ViewError> {
    TcpState::from_kernel(record.state).ok_or_else(|| ViewError::Incomplete {
        what: "the sockets",
        detail: format!("unknown TCP state {} of the socket with cookie {}", record.state, record.cookie),
    })
}

/// A record in the terms of the rest of the program.
pub(super) fn socket(record: &SocketRecord, ticks: Ticks) -> Result<KernelSocket, ViewError> {
    let state = state(record)?;
    // Read while packets come in, so it can be behind by a little: a huge number is a negative one.
    let unread = i32::try_from(record.unread).unwrap_or(0).cast_unsigned();
    Ok(KernelSocket {
        cookie: record.cookie,
        state,
        held: record.flags & flags::HELD != 0,
        owner: 0,
        opened: (record.opened_ns != 0).then_some(record.opened_ns),
        local: local(record),
        remote: remote(record),
        last_received_ns: ticks.to_ns(record.received_ticks),
        last_sent_ns: ticks.to_ns(record.sent_ticks),
        bytes_sent: Some(record.bytes_sent),
        bytes_received: Some(record.bytes_received),
        unread: Some(unread.saturating_sub(u32::from(state.has_fin()))),
        netns: record.netns,
    })
}

fn address(family: u16, bytes: [u8; 16], port: u16) -> SocketAddr {
    let ip = if family == AF_INET6 {
        IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
    } else {
        let [a, b, c, d, ..] = bytes;
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    SocketAddr::new(ip, port)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use counterfoil_common::AF_INET;

    use super::*;

    const TICKS: Ticks = Ticks { length_ns: 4_000_000, now: 1000, now_ns: 50_000_000_000 };

    fn record() -> SocketRecord {
        let mut local = [0; 16];
        local[..4].copy_from_slice(&[127, 0, 0, 1]);
        SocketRecord { cookie: 7, family: AF_INET, local, local_port: 53, state: 1, ..SocketRecord::EMPTY }
    }

    #[test]
    fn times_are_counted_back_from_the_sweep() {
        let socket = socket(&SocketRecord { received_ticks: 900, sent_ticks: 1000, ..record() }, TICKS).unwrap();
        assert_eq!(socket.last_received_ns, Some(50_000_000_000 - 400_000_000));
        assert_eq!(socket.last_sent_ns, Some(50_000_000_000));
    }

    #[test]
    fn a_byte_during_the_sweep_is_now_and_an_old_one_is_old() {
        assert_eq!(TICKS.to_ns(1001), Some(TICKS.now_ns));
        // The counter wraps after 49 days at the earliest, and five minutes after boot.
        let wrapped = Ticks { now: 5, now_ns: u64::MAX / 2, ..TICKS };
        assert_eq!(wrapped.to_ns(u32::MAX), Some(u64::MAX / 2 - 6 * 4_000_000));
        assert_eq!(wrapped.to_ns(7), Some(u64::MAX / 2));
        assert_eq!(wrapped.to_ns(6 + (1 << 16)), Some(u64::MAX / 2 - (u64::from(u32::MAX) - (1 << 16)) * 4_000_000));
        assert_eq!(wrapped.to_ns(0), None);
    }

    #[test]
    fn a_fin_is_no_unread_byte() {
        let unread = |state, unread| socket(&SocketRecord { state, unread, ..record() }, TICKS).unwrap().unread;
        assert_eq!(unread(1, 3), Some(3));
        assert_eq!(unread(8, 3), Some(2));
        assert_eq!(unread(8, 0), Some(0), "the FIN was read too");
        assert_eq!(unread(1, u32::MAX), Some(0), "behind by one while packets come in");
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        let v6 = |ip: &str| ip.parse::<Ipv6Addr>().unwrap().octets();
        let mapped = SocketRecord { family: AF_INET6, remote: v6("::ffff:192.0.2.1"), remote_port: 853, ..record() };
        assert_eq!(remote(&mapped), "192.0.2.1:853".parse().unwrap());
        let native = SocketRecord { family: AF_INET6, remote: v6("2001:db8::1"), remote_port: 53, ..record() };
        assert_eq!(remote(&native), "[2001:db8::1]:53".parse().unwrap());
        assert_eq!(local(&record()), "127.0.0.1:53".parse().unwrap());
    }

    #[test]
    fn an_unknown_state_is_an_error() {
        assert!(socket(&SocketRecord { state: 14, ..record() }, TICKS).is_err());
        assert!(socket(&SocketRecord { state: 0, ..record() }, TICKS).is_err());
    }
}
