//! What TCP sockets are told before they carry anything: how much the kernel may keep for a peer that does not read, and
//! when a peer is given up of which nothing is heard.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

use crate::config::Listener;

/// The least that a socket may keep, octets: below that each answer waits for the one before, and each query too.
const LEAST_BUFFER: usize = 16 << 10;
/// Probes that must get no answer before the peer is given up.
const PROBES: u32 = 3;
/// The kernel takes whole seconds, up to this many (`MAX_TCP_KEEPIDLE` of `include/net/tcp.h`).
const MAX_SECONDS: u64 = 32_767;

/// What the sockets of a listener's clients are like. Linux hands it on from the socket that listens, so that no client
/// costs a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClientSockets {
    /// In each direction.
    buffer: usize,
    keepalive: Option<Keepalive>,
}

impl ClientSockets {
    /// Those of this listener.
    pub(crate) fn new(listener: &Listener) -> Self {
        Self {
            // The kernel doubles it, as half of what it counts is its own bookkeeping (SO_SNDBUF and SO_RCVBUF of socket(7)).
            buffer: (listener.max_pending_answers / 2).max(LEAST_BUFFER),
            keepalive: Keepalive::new(listener.tcp_keepalive, listener.write_timeout),
        }
    }

    /// Of this socket, and of all that it accepts from now on.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub(crate) fn apply(&self, socket: SockRef<'_>) -> io::Result<()> {
        // It may give less (`net.core.wmem_max` and `rmem_max`), and says nothing of that.
        socket.set_send_buffer_size(self.buffer)?;
        socket.set_recv_buffer_size(self.buffer)?;
        // A client that reads has as much on its way as the path takes; of the rest no more than this leaves the process.
        socket.set_tcp_notsent_lowat(u32::try_from(self.buffer).unwrap_or(u32::MAX))?;
        match &self.keepalive {
            Some(keepalive) => keepalive.apply(&socket),
            None => socket.set_keepalive(false).and_then(|()| socket.set_tcp_user_timeout(None)),
        }
    }
}

/// When a peer is asked whether it is still there, and when it is given up (RFC 1122 section 4.2.3.6, RFC 5482).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keepalive {
    idle: Duration,
    interval: Duration,
    /// Also for octets that the peer does not acknowledge, or has no room for.
    given_up: Duration,
}

impl Keepalive {
    /// After so much silence, rounded up to whole seconds; none for no time. A peer that does not read is given `write_timeout`
    /// at least: that is for others to see to.
    pub(crate) fn new(silence: Duration, write_timeout: Duration) -> Option<Self> {
        if silence.is_zero() {
            return None;
        }
        let whole = |time: Duration| time.as_secs() + u64::from(time.subsec_nanos() > 0);
        let idle = Duration::from_secs(whole(silence).min(MAX_SECONDS));
        let interval = Duration::from_secs(whole(idle / 6));
        // The kernel looks when it probes: at the last one.
        let given_up = (idle + interval * PROBES).max(write_timeout);
        Some(Self { idle, interval, given_up })
    }

    /// Of this socket.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub(crate) fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        let probes = TcpKeepalive::new().with_time(self.idle).with_interval(self.interval).with_retries(PROBES);
        socket.set_tcp_keepalive(&probes)?;
        socket.set_tcp_user_timeout(Some(self.given_up))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_whole_seconds_that_the_kernel_takes() {
        let of = |silence: Duration, write| {
            Keepalive::new(silence, Duration::from_secs(write))
                .map(|found| (found.idle.as_secs(), found.interval.as_secs(), found.given_up.as_secs()))
        };
        assert_eq!(of(Duration::ZERO, 5), None);
        assert_eq!(of(Duration::from_millis(1), 1), Some((1, 1, 4)));
        assert_eq!(of(Duration::from_secs(60), 5), Some((60, 10, 90)));
        assert_eq!(of(Duration::from_secs(60), 600), Some((60, 10, 600)), "a client that does not read");
        assert_eq!(of(Duration::from_secs(1 << 20), 5), Some((32_767, 5462, 32_767 + 3 * 5462)));
    }
}
