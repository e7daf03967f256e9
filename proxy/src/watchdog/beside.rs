//! The sockets of a process that keeps no ledger: what their state and the kernel's times alone can prove.
//!
//! Nobody says what a connection is for, whether an answer is awaited on it, or who will close it. So whatever has moved
//! a byte lately is healthy, in every state of TCP: a peer that has closed may still be sent to, and a connection that
//! was half closed may still bring an answer.

use super::policy::Policy;
use super::reconcile::Condition;
use crate::clock::Mono;
use crate::config::Class;
use crate::kernel::{KernelSocket, TcpState};

/// The unhealthy condition of a socket when the kernel was read, if it has one. Orphans and ghosts do not exist here,
/// and a connection on which an answer is overdue is a hoard like any other that is silent.
pub(super) fn condition(socket: &KernelSocket, taken: Mono, policy: &Policy) -> Option<Condition> {
    let backend = policy.backend(policy.backend_of(socket)?)?;
    let quiet_since = socket.last_received_ns.max(socket.last_sent_ns).max(socket.opened).map(Mono);
    let quiet_for = |limit| quiet_since.is_none_or(|at| at.after(limit) <= taken);
    // From when it is first seen so: when the peer closed, or the socket was reset, the kernel does not tell.
    let seen = |class| Some(Condition { class, since: None });
    match socket.state {
        TcpState::Close => seen(Class::Zombie),
        // What came with the peer's FIN, or before it, is still to be read.
        TcpState::CloseWait if socket.unread.unwrap_or(0) > 0 && !quiet_for(backend.hoard_after) => None,
        TcpState::CloseWait if quiet_for(policy.grace) => seen(Class::Zombie),
        TcpState::FinWait1 | TcpState::FinWait2 | TcpState::Closing | TcpState::LastAck => {
            Condition::overdue(Class::Lingering, quiet_since?, backend.hoard_after, taken)
        }
        TcpState::SynSent | TcpState::SynRecv => {
            Condition::overdue(Class::Embryo, Mono(socket.opened?), backend.embryo_after, taken)
        }
        TcpState::Established => Condition::overdue(Class::Hoard, quiet_since?, backend.hoard_after, taken),
        TcpState::CloseWait
        | TcpState::TimeWait
        | TcpState::Listen
        | TcpState::NewSynRecv
        | TcpState::BoundInactive => None,
    }
}

#[cfg(test)]
#[path = "beside_tests.rs"]
mod tests;
