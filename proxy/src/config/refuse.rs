//! What a listener can refuse to forward.

use super::Pool;
use super::choices::Choice;
use crate::dns::message::{OPCODE_NOTIFY, OPCODE_QUERY, OPCODE_UPDATE};
use crate::dns::rtype::{AXFR, IXFR};
use crate::proxy_protocol::identity::Identity;

/// A kind of message, by the name of its type or opcode (IANA's registry "DNS Parameters").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusable {
    /// A full zone transfer (RFC 5936).
    Axfr,
    /// An incremental one (RFC 1995).
    Ixfr,
    /// Opcode 1, obsolete (RFC 3425).
    Iquery,
    /// Opcode 2.
    Status,
    /// Opcode 4 (RFC 1996).
    Notify,
    /// Opcode 5 (RFC 2136).
    Update,
    /// Opcodes that nobody has assigned: 3, and those from 7 on.
    Unassigned,
}

impl Refusable {
    /// What a backend does for those whom it trusts, by their address.
    const OF_TRUST: [Self; 4] = [Self::Axfr, Self::Ixfr, Self::Notify, Self::Update];

    /// What a listener in front of this pool refuses if it is not said: nothing where a backend sees who asks, else what
    /// it may do for this host only.
    pub fn default_for(pool: &Pool) -> Vec<Self> {
        if pool.hides_clients() { Self::OF_TRUST.to_vec() } else { Vec::new() }
    }

    /// Whether this is such a message: by its opcode, and the type of its question if that can be read.
    pub fn covers(self, opcode: u8, qtype: Option<u16>) -> bool {
        match self {
            Self::Axfr => opcode == OPCODE_QUERY && qtype == Some(AXFR),
            Self::Ixfr => opcode == OPCODE_QUERY && qtype == Some(IXFR),
            Self::Iquery => opcode == 1,
            Self::Status => opcode == 2,
            Self::Notify => opcode == OPCODE_NOTIFY,
            Self::Update => opcode == OPCODE_UPDATE,
            Self::Unassigned => opcode == 3 || opcode >= 7,
        }
    }
}

impl Choice for Refusable {
    const ALL: &'static [Self] =
        &[Self::Axfr, Self::Ixfr, Self::Iquery, Self::Status, Self::Notify, Self::Update, Self::Unassigned];

    fn word(self) -> &'static str {
        match self {
            Self::Axfr => "axfr",
            Self::Ixfr => "ixfr",
            Self::Iquery => "iquery",
            Self::Status => "status",
            Self::Notify => "notify",
            Self::Update => "update",
            Self::Unassigned => "unassigned",
        }
    }
}

impl Pool {
    /// Whether its backends see this host in the place of every client.
    pub fn hides_clients(&self) -> bool {
        self.proxy_protocol.as_ref().is_none_or(|proxy| proxy.identity == Identity::Forwarder)
    }
}
