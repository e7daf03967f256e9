//! TCP states as the kernel numbers them (`include/net/tcp_states.h`; part of its stable interface).

use std::fmt;

/// State of a TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum TcpState {
    /// Open in both directions.
    Established = 1,
    /// `connect()` waits for the peer.
    SynSent,
    /// Simultaneous open, or an embryo of a listener.
    SynRecv,
    /// We have closed; the peer has not acknowledged that.
    FinWait1,
    /// We have closed; the peer may still send.
    FinWait2,
    /// Both have closed; the pair of addresses rests.
    TimeWait,
    /// No connection: never opened, reset, refused or over.
    Close,
    /// The peer has closed, we have not.
    CloseWait,
    /// Both have closed; the peer has not acknowledged ours.
    LastAck,
    /// A listener.
    Listen,
    /// Both closed at once.
    Closing,
    /// An embryo of a listener (the kernel's own state for request sockets).
    NewSynRecv,
    /// Bound but hidden from `bind` conflicts (Linux 6.8 and later, in `sock_diag` only).
    BoundInactive,
}

impl TcpState {
    /// All states in the kernel's order.
    pub const ALL: [Self; 13] = [
        Self::Established,
        Self::SynSent,
        Self::SynRecv,
        Self::FinWait1,
        Self::FinWait2,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::Closing,
        Self::NewSynRecv,
        Self::BoundInactive,
    ];

    /// The state of a kernel number, if there is one.
    pub const fn from_kernel(number: u8) -> Option<Self> {
        match number {
            0 => None,
            n if n as usize <= Self::ALL.len() => Some(Self::ALL[n as usize - 1]),
            _ => None,
        }
    }

    /// The word of `ss` in snake case, as in metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::SynSent => "syn_sent",
            Self::SynRecv => "syn_recv",
            Self::FinWait1 => "fin_wait1",
            Self::FinWait2 => "fin_wait2",
            Self::TimeWait => "time_wait",
            Self::Close => "close",
            Self::CloseWait => "close_wait",
            Self::LastAck => "last_ack",
            Self::Listen => "listen",
            Self::Closing => "closing",
            Self::NewSynRecv => "new_syn_recv",
            Self::BoundInactive => "bound_inactive",
        }
    }

    /// Whether the socket is in the kernel's table of connections, so that `sock_diag` shows it.
    pub const fn is_hashed(self) -> bool {
        matches!(
            self,
            Self::Established
                | Self::SynSent
                | Self::SynRecv
                | Self::FinWait1
                | Self::FinWait2
                | Self::CloseWait
                | Self::LastAck
                | Self::Closing
        )
    }

    /// Whether the peer's FIN has arrived, which counts as one sequence number but is no byte.
    pub const fn has_fin(self) -> bool {
        matches!(self, Self::CloseWait | Self::LastAck | Self::Closing | Self::TimeWait)
    }
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        for (index, state) in TcpState::ALL.into_iter().enumerate() {
            assert_eq!(state as usize, index + 1);
            assert_eq!(TcpState::from_kernel(state as u8), Some(state));
        }
        assert_eq!(TcpState::from_kernel(0), None);
        assert_eq!(TcpState::from_kernel(14), None);
        assert_eq!(TcpState::from_kernel(255), None);
        assert_eq!(TcpState::Close as u8, 7);
        assert_eq!(TcpState::CloseWait as u8, 8);
    }

    #[test]
    fn words_are_those_of_ss() {
        let words: Vec<_> = TcpState::ALL.into_iter().take(11).map(|s| s.to_string()).collect();
        assert_eq!(
            words,
            [
                "established",
                "syn_sent",
                "syn_recv",
                "fin_wait1",
                "fin_wait2",
                "time_wait",
                "close",
                "close_wait",
                "last_ack",
                "listen",
                "closing"
            ]
        );
    }
}
