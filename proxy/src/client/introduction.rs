//! The task of a connection whose peer must say first for whom it speaks: it reads the PROXY header, then the connection
//! is that of the client behind it.
//!
//! Until then the connection counts towards the limits in total and of the listener only. The client's own limits are
//! those of the address that the header names.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::accept::{Door, Entrant};
use super::limits::Place;
use super::preface::{Introduced, Preface, Progress};
use super::session::{Addresses, Via};
use crate::config::AcceptProxy;
use crate::proxy_protocol::parse::Invalid;
use crate::stats::{Refusal, Stage};

/// Octets read at a time.
const AT_A_TIME: usize = 2048;
/// What is left of the timeout once the worker drains: a header that is under way arrives within this time.
const DRAINING: Duration = Duration::from_secs(1);

/// A connection that was accepted from a trusted peer.
pub(super) struct Stranger {
    pub(super) door: Rc<Door>,
    pub(super) proxy: Rc<AcceptProxy>,
    pub(super) stream: TcpStream,
    pub(super) ends: Addresses,
    pub(super) place: Place,
    pub(super) accepted: Instant,
    /// Done when the worker drains. While it is held, the worker has not stopped accepting.
    pub(super) stop: watch::Receiver<bool>,
}

impl Stranger {
    /// Waits for the header; then the client's session begins, or the connection is closed.
    pub(super) async fn introduce(mut self) {
        let pending = Stage::ProxyHeader as usize;
        self.door.stats().pending[pending].add(1);
        let introduced = self.wait().await;
        self.door.stats().pending[pending].sub(1);
        let Self { door, stream, ends, place, .. } = self;
        match introduced {
            Ok(Introduced { ends: named, tlvs, rest }) => {
                let (client, local) = named.unwrap_or((ends.client, ends.local));
                let via = Some(Box::new(Via { peer: ends.client, tlvs }));
                door.begin(Entrant { stream, ends: Addresses { client, local }, place, via, rest });
            }
            Err(refusal) => door.refuse(ends.client, refusal),
        }
    }

    async fn wait(&mut self) -> Result<Introduced, Refusal> {
        let end = self.accepted + self.proxy.timeout;
        let mut reading = std::pin::pin!(read(&self.stream, Preface::new(self.proxy.max_header)));
        tokio::select! {
            biased;
            introduced = &mut reading => introduced,
            () = tokio::time::sleep_until(end) => Err(Refusal::ProxyTimeout),
            _ = self.stop.wait_for(|stop| *stop) => {
                let end = end.min(Instant::now() + DRAINING);
                tokio::time::timeout_at(end, reading).await.unwrap_or(Err(Refusal::ProxyTimeout))
            }
        }
    }
}

/// Reads until the header is complete, or cannot be any more.
async fn read(stream: &TcpStream, mut preface: Preface) -> Result<Introduced, Refusal> {
    let mut octets = [0; AT_A_TIME];
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut octets) {
            Ok(0) => break,
            Ok(count) => match preface.take(octets.get(..count).unwrap_or_default()) {
                Progress::NeedMore => {}
                Progress::Done(introduced) => return Ok(introduced),
                Progress::Refuse(reason) => {
                    tracing::debug!(%reason, "PROXY header");
                    return Err(if reason == Invalid::Signature {
                        Refusal::ProxyMissing
                    } else {
                        Refusal::ProxyInvalid
                    });
                }
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => break,
        }
    }
    // Load balancers that look whether the port is open do so.
    Err(Refusal::ProxyClosed)
}
