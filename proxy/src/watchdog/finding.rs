//! A finding: one socket in one unhealthy class, with the evidence of both views.

use std::fmt::Write as _;

use super::flight::Flight;
use crate::clock::Mono;
use crate::config::Class;
use crate::kernel::KernelSocket;
use crate::ledger::{BackendIndex, LedgerRow, Tombstone};

/// One socket in one unhealthy class, seen often and long enough.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What is wrong.
    pub class: Class,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Towards which backend; none: its peer is no configured backend.
    pub backend: Option<BackendIndex>,
    /// The kernel's half, if it has one.
    pub socket: Option<KernelSocket>,
    /// The ledger's half, if it has one.
    pub row: Option<LedgerRow>,
    /// What the ledger remembers of a connection that it closed.
    pub tombstone: Option<Tombstone>,
    /// When the condition began, by the best proof there is.
    pub since: Mono,
    /// The first of the consecutive sweeps that saw it.
    pub first_seen: Mono,
    /// In how many consecutive sweeps it was seen.
    pub sweeps: u32,
    /// The last changes of its state; the join leaves them empty, the watchdog's thread fills them in.
    pub flight: Flight,
    /// Why nothing may be done about it; none: it may be reaped.
    pub held_back: Option<HeldBack>,
}

/// Why a finding is not acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeldBack {
    /// The view was uncertain in one of the last sweeps.
    #[error("the kernel view is or was uncertain")]
    Uncertain,
    /// Without eBPF only zombies are reaped.
    #[error("without eBPF only zombies are reaped")]
    Fallback,
    /// The worker has not run since the condition began, or not for long enough, so it could not have put it right.
    #[error("worker {0} has shown no sign of life since, or too few")]
    WorkerStalled(usize),
    /// Its peer is no configured backend: somebody else's connection in this process.
    #[error("its peer is no configured backend")]
    ForeignPeer,
    /// An orphan without a connection: SOCK_DESTROY cannot reach it, and nobody knows its descriptor.
    #[error("it has no connection left to sever")]
    NoConnection,
}

impl Finding {
    /// When the socket was opened, as far as either view knows.
    pub fn opened(&self) -> Option<Mono> {
        self.row.map(|row| row.opened).or_else(|| self.socket.as_ref()?.opened.map(Mono))
    }

    /// Who holds it: the client connection that a row names, or the id of another process; 0: nobody in particular.
    pub fn owner(&self) -> u64 {
        let process = || self.socket.as_ref().map_or(0, |socket| u64::from(socket.owner));
        self.row.map_or_else(process, |row| row.owner)
    }

    /// The types of the TLVs in its header: those of its pool, given by backend index, if it has a header.
    pub fn tlv_types<'a>(&self, by_backend: &'a [Vec<u8>]) -> &'a [u8] {
        match (self.row, self.backend) {
            (Some(row), Some(backend)) if row.header != 0 => {
                by_backend.get(usize::from(backend)).map(Vec::as_slice).unwrap_or_default()
            }
            _ => &[],
        }
    }

    /// What both views say of it, for the log.
    pub fn evidence(&self, now: Mono) -> String {
        let ago = |at: Mono| now.since(at).as_secs_f64();
        let mut text = String::with_capacity(160);
        // Writing to a string cannot fail.
        let _ = match &self.socket {
            Some(socket) => write!(text, "kernel: {}", socket.state),
            None => write!(text, "kernel: no held socket"),
        };
        if let Some(socket) = &self.socket {
            if let Some(last) = socket.last_received_ns.max(socket.last_sent_ns) {
                let _ = write!(text, ", last byte {:.1} s ago", ago(Mono(last)));
            }
            if let Some(unread) = socket.unread {
                let _ = write!(text, ", {unread} B unread");
            }
        }
        let _ = match (&self.row, &self.tombstone) {
            (Some(row), _) => write!(
                text,
                "; ledger: {} {}, {} in flight, {} carried, last byte {:.1} s ago",
                row.kind.label(),
                row.state.label(),
                row.in_flight,
                row.queries,
                ago(row.last_byte)
            ),
            (None, Some(tombstone)) => {
                write!(text, "; ledger: closed {:.1} s ago ({})", ago(tombstone.closed), tombstone.reason.label())
            }
            (None, None) if self.class == Class::Orphan => write!(text, "; ledger: never heard of it"),
            // Another process's: there is no ledger.
            (None, None) => Ok(()),
        };
        text
    }
}
