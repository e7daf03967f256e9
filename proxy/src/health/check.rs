//! One check: a query over a connection of its own, which is in the ledger like every other (I1, I2).

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::sync::Notify;

use super::task::Target;
use super::wire::Wire;
use crate::backend::connect::{self, FastOpen, Io, OpenError};
use crate::clock;
use crate::close::CloseReason;
use crate::dns::frame::{PREFIX_LEN, first_frame};
use crate::dns::message::{self, RCODE_SERVFAIL};
use crate::ledger::caps::AtCap;
use crate::ledger::{ConnKind, OpenInfo, ShardWriter, Tracked};

/// How a check came out.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The backend answered.
    Passed,
    /// It did not.
    Failed(Failure),
    /// No connection was opened: the limit is reached.
    NoPlace(AtCap),
    /// No connection was opened: this host has no descriptor or no memory left.
    NoMeans(OpenError),
    /// It was broken off: the process ends, or the watchdog asked.
    BrokenOff,
}

/// Why a backend fails a check.
#[derive(Debug)]
pub(super) enum Failure {
    Open(OpenError),
    Io(io::Error),
    /// During the TLS handshake.
    Handshake,
    Tls {
        reason: CloseReason,
        words: String,
    },
    Closed,
    Timeout(Duration),
    Wrong(&'static str),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(error) => error.fmt(f),
            Self::Io(error) => error.fmt(f),
            Self::Handshake => f.write_str("it closed the connection during the TLS handshake"),
            Self::Tls { words, .. } => f.write_str(words),
            Self::Closed => f.write_str("it closed the connection without an answer"),
            Self::Timeout(after) => write!(f, "no answer within {after:?}"),
            Self::Wrong(what) => f.write_str(what),
        }
    }
}

impl Failure {
    /// Whether a backend without a place for one more connection does the same: it lets it wait, resets it, or accepts and
    /// closes it. What it says or refuses is its own word on the check, beside which answers to others count for nothing:
    /// an answer may have been in its cache, while the check's name says that it cannot resolve; and where nobody listens,
    /// or the certificate is wrong, no new connection comes about, whatever the old ones still bring.
    pub(super) fn is_for_want_of_a_place(&self) -> bool {
        match self {
            Self::Timeout(_) | Self::Closed | Self::Handshake | Self::Io(_) => true,
            Self::Open(_) | Self::Tls { .. } | Self::Wrong(_) => false,
        }
    }

    fn reason(&self) -> CloseReason {
        match self {
            Self::Open(_) => CloseReason::ConnectFailed,
            Self::Io(_) => CloseReason::PeerReset,
            Self::Handshake => CloseReason::HandshakeFailed,
            Self::Tls { reason, .. } => *reason,
            Self::Closed => CloseReason::PeerClosed,
            Self::Timeout(_) => CloseReason::Unresponsive,
            Self::Wrong(_) => CloseReason::ProtocolViolation,
        }
    }
}

/// Makes one check of `target`, which `cancel` can break off.
pub(super) async fn run(
    ledger: &ShardWriter,
    target: &Target,
    source: Option<SocketAddr>,
    cancel: &Rc<Cancel>,
) -> Outcome {
    let now = clock::now();
    let permit = match ledger.caps().acquire_to_find(target.backend) {
        Ok(permit) => permit,
        Err(cap) => return Outcome::NoPlace(cap),
    };
    let info = OpenInfo { backend: target.backend, kind: ConnKind::Check, owner: 0, header: 0, client_tls: None };
    let opened = connect::connect(ledger, permit, info, target.address, source, FastOpen::Off, now)
        .and_then(|(socket, _)| connect::register(socket, Interest::READABLE | Interest::WRITABLE));
    let io = match opened {
        Ok(io) => io,
        Err(error) if error.is_shortage() => return Outcome::NoMeans(error),
        Err(error) => return Outcome::Failed(Failure::Open(error)),
    };
    cancel.row.set(Some(io.entry().id()));
    let outcome = tokio::select! {
        result = tokio::time::timeout(target.timeout, ask(&io, target)) => match result {
            Ok(Ok(())) => Outcome::Passed,
            Ok(Err(Failure::Io(error))) if connect::is_shortage(&error) => Outcome::NoMeans(OpenError::Socket(error)),
            Ok(Err(failure)) => Outcome::Failed(failure),
            Err(_elapsed) => Outcome::Failed(Failure::Timeout(target.timeout)),
        },
        () = cancel.notify.notified() => Outcome::BrokenOff,
    };
    cancel.row.set(None);
    let reason = match &outcome {
        Outcome::Passed => {
            // The answer is complete, so nothing can be lost, and no side keeps TIME_WAIT.
            let _ = io.io().get_ref().set_linger(Some(Duration::ZERO));
            CloseReason::Checked
        }
        Outcome::Failed(failure) => failure.reason(),
        Outcome::NoPlace(_) | Outcome::NoMeans(_) | Outcome::BrokenOff => cancel.reason.get(),
    };
    io.close(reason);
    outcome
}

/// The way to break a check off.
#[derive(Debug)]
pub(super) struct Cancel {
    pub(super) notify: Notify,
    pub(super) reason: std::cell::Cell<CloseReason>,
    /// The connection's place in the ledger while there is one.
    pub(super) row: std::cell::Cell<Option<crate::ledger::RowId>>,
    /// There are to be no more checks.
    pub(super) ended: std::cell::Cell<bool>,
}

impl Cancel {
    /// The check that is under way, if one is, ends for this reason.
    pub(super) fn break_off(&self, reason: CloseReason) {
        self.reason.set(reason);
        self.notify.notify_waiters();
    }
}

impl Default for Cancel {
    fn default() -> Self {
        Self { notify: Notify::new(), reason: CloseReason::Drained.into(), row: None.into(), ended: false.into() }
    }
}

/// Sends the query and waits for its answer.
async fn ask(io: &Tracked<Io>, target: &Target) -> Result<(), Failure> {
    let id = fastrand::u16(..);
    let mut out = target.bytes.clone();
    if let Some(octets) = out.get_mut(target.query + PREFIX_LEN..) {
        message::set_id(octets, id);
    }
    let mut wire = Wire::new(io, target);
    wire.ask(&out).await?;
    let mut answer = Vec::new();
    loop {
        wire.receive(&mut answer).await?;
        match first_frame(&answer) {
            Ok(Some(end)) => {
                let query = out.get(target.query + PREFIX_LEN..).unwrap_or_default();
                return judge(query, answer.get(PREFIX_LEN..end).unwrap_or_default());
            }
            Ok(None) => {}
            Err(_) => return Err(Failure::Wrong("it sent a length too short for a DNS message")),
        }
    }
}

/// Any answer to this query will do but SERVFAIL: a server that refuses the name or does not know it can serve others.
fn judge(query: &[u8], answer: &[u8]) -> Result<(), Failure> {
    let (Some(asked), Some(got)) = (message::peek(query), message::peek(answer)) else {
        return Err(Failure::Wrong("it sent no DNS message"));
    };
    if !got.qr || got.id != asked.id || !message::question_matches(query, answer) {
        return Err(Failure::Wrong("it sent something that is no answer to the query"));
    }
    if got.rcode == RCODE_SERVFAIL {
        return Err(Failure::Wrong("it answered SERVFAIL"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01";

    fn answer(change: impl Fn(&mut Vec<u8>)) -> bool {
        let mut answer = QUERY.to_vec();
        answer[2] |= 0x80;
        change(&mut answer);
        judge(QUERY, &answer).is_ok()
    }

    #[test]
    fn every_answer_passes_but_servfail_and_what_was_not_asked() {
        for rcode in 0..=15 {
            assert_eq!(answer(|answer| answer[3] |= rcode), rcode != RCODE_SERVFAIL, "{rcode}");
        }
        assert!(answer(|answer| answer[13] = b'A'), "the case of names is no matter");
        assert!(!answer(|answer| answer[0] = 0), "ID");
        assert!(!answer(|answer| answer[2] = 1), "QR");
        assert!(!answer(|answer| answer[13] = b'b'), "name");
        assert!(!answer(|answer| answer.truncate(3)), "length");
    }
}
