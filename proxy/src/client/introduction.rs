//! The task of a connection that needs more than to be accepted before its client can ask: a PROXY header that says for
//! whom its peer speaks, a TLS handshake, or both, in either order.
//!
//! Until its client is known the connection counts towards the limits in total and of the listener only; the client's own
//! limits are those of the address that the header names. A handshake is the client's, and so is behind its limits, unless
//! the header is inside.
//!
//! Both have places of their own, which those who wait hold in turn ([`Shares`](super::shares::Shares)): headers by their
//! peer's address, handshakes by client, or by the peer's address where the header is inside.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::accept::{Door, Entrant};
use super::handshake::{HandshakeFailure, Link, SessionKind};
use super::limits::{Admitted, Place, Waiting};
use super::preface::{Introduced, Opening, Preface, Progress};
use super::session::{Addresses, ClientTls, Origin, Via};
use crate::config::AcceptProxy;
use crate::proxy_protocol::parse::Invalid;
use crate::stats::{Refusal, Stage};
use crate::tls::TlsStream;
use crate::tls::server::Greeting;
use crate::worker::shell::Shell;

/// What is left of a timeout once the worker drains: what is under way arrives within this time.
const DRAINING: Duration = Duration::from_secs(1);

/// A connection that was accepted, and cannot be served yet.
pub(super) struct Stranger {
    pub(super) door: Rc<Door>,
    /// Its peer must send a header.
    pub(super) proxy: Option<Rc<AcceptProxy>>,
    pub(super) tls: Option<Greeting>,
    pub(super) stream: TcpStream,
    /// The number of the session that it may become.
    pub(super) session: u64,
    pub(super) ends: Addresses,
    pub(super) place: Place,
    pub(super) accepted: Instant,
    /// Done when the worker drains. While it is held, the worker has not stopped accepting.
    pub(super) stop: watch::Receiver<bool>,
}

/// Who the client is, and what it is limited by, as far as that is known.
enum Guest {
    Unknown(Place),
    Known(Admitted),
}

impl Stranger {
    /// Waits for what must come; then the client's session begins, or the connection is closed.
    pub(super) async fn introduce(self) {
        let Self { door, proxy, tls, stream, session, ends, place, accepted, stop } = self;
        let peer = ends.client;
        let mut link = Link::new(stream, session);
        let arrival = Arrival { door: &door, proxy, tls, ends, place, accepted, stop };
        match arrival.wait(&mut link).await {
            Ok((ends, admitted, origin)) => door.begin(Entrant { link, ends, admitted, origin }),
            // It is counted before the peer can know.
            Err((client, refusal)) => door.refuse(client.unwrap_or(peer), Some(session), refusal),
        }
    }
}

/// All of a [`Stranger`] but its connection.
struct Arrival<'a> {
    door: &'a Rc<Door>,
    proxy: Option<Rc<AcceptProxy>>,
    tls: Option<Greeting>,
    ends: Addresses,
    place: Place,
    accepted: Instant,
    stop: watch::Receiver<bool>,
}

impl Arrival<'_> {
    /// # Errors
    ///
    /// Why it is refused, with the client's address if that is not the peer's.
    async fn wait(self, link: &mut Link) -> Result<(Addresses, Admitted, Origin), (Option<SocketAddr>, Refusal)> {
        let Self { door, proxy, tls, mut ends, place, accepted, mut stop } = self;
        let mut origin = Origin::default();
        let outside = proxy.as_ref().filter(|proxy| tls.is_none() || proxy.outside_tls);
        let inside = proxy.as_ref().filter(|_| outside.is_none());
        if let Some(proxy) = outside {
            origin.via = Some(introduce(door, link, proxy, accepted, &mut stop, &mut ends).await?);
        }
        let known = |place: Place, client: SocketAddr| {
            let allowed = if door.allows(client.ip()) { Ok(place) } else { Err(Refusal::NotAllowed) };
            let admitted = allowed.and_then(|place| place.admit(client.ip(), crate::clock::now()));
            admitted.map_err(|refusal| (Some(client), refusal))
        };
        let guest = match inside {
            None => Guest::Known(known(place, ends.client)?),
            Some(_) => Guest::Unknown(place),
        };
        if let Some(greeting) = tls {
            let holder = match &guest {
                Guest::Known(_) => door.limits.client(door.index, ends.client.ip()),
                Guest::Unknown(_) => ends.client.ip(),
            };
            let shaken = waits(door, Stage::TlsHandshake, shake_hands(door, link, greeting, holder, &mut stop)).await;
            origin.tls = Some(Box::new(shaken.map_err(|refusal| (Some(ends.client), refusal))?));
        }
        if let Some(proxy) = inside {
            origin.via = Some(introduce(door, link, proxy, Instant::now(), &mut stop, &mut ends).await?);
        }
        let admitted = match guest {
            Guest::Known(admitted) => admitted,
            Guest::Unknown(place) => known(place, ends.client)?,
        };
        Ok((ends, admitted, origin))
    }
}

/// The header, from `begin` on: from then on `ends` are those that it names.
async fn introduce(
    door: &Door,
    link: &mut Link,
    proxy: &AcceptProxy,
    begin: Instant,
    stop: &mut watch::Receiver<bool>,
    ends: &mut Addresses,
) -> Result<Box<Via>, (Option<SocketAddr>, Refusal)> {
    let peer = ends.client;
    let waiting = door.limits.wait_for(door.index, Stage::ProxyHeader, peer.ip());
    let end = begin + waiting.time(proxy.timeout);
    let header = header(link, &door.shell, proxy.max_header);
    let introduced = match waits(door, Stage::ProxyHeader, within(stop, end, &waiting, header)).await {
        Ok(introduced) => introduced,
        Err(Cut::Late) => Err(Refusal::ProxyTimeout),
        Err(Cut::Evicted) => Err(Refusal::ProxyEvicted),
    };
    let introduced = introduced.map_err(|refusal| (None, refusal))?;
    let (client, local) = introduced.ends.unwrap_or((ends.client, ends.local));
    *ends = Addresses { client, local };
    link.rest = introduced.rest;
    Ok(Box::new(Via { peer, tlvs: introduced.tlvs }))
}

/// What `work` comes to; meanwhile the connection counts as one that waits for this.
async fn waits<T>(door: &Door, stage: Stage, work: impl Future<Output = T>) -> T {
    let pending = &door.stats().pending[stage as usize];
    pending.add(1);
    let done = work.await;
    pending.sub(1);
    done
}

/// Why something did not come to its end.
enum Cut {
    /// Its time is over.
    Late,
    /// Another connection has its place.
    Evicted,
}

/// What `work` comes to by `end`, as long as it has its place. A worker that drains has less patience.
async fn within<T>(
    stop: &mut watch::Receiver<bool>,
    end: Instant,
    place: &Waiting,
    work: impl Future<Output = T>,
) -> Result<T, Cut> {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        done = &mut work => Ok(done),
        () = place.evicted() => Err(Cut::Evicted),
        () = tokio::time::sleep_until(end) => Err(Cut::Late),
        _ = stop.wait_for(|stop| *stop) => {
            tokio::time::timeout_at(end.min(Instant::now() + DRAINING), work).await.map_err(|_| Cut::Late)
        }
    }
}

/// The handshake, in one of the places for it, which is this client's.
async fn shake_hands(
    door: &Door,
    link: &mut Link,
    greeting: Greeting,
    client: IpAddr,
    stop: &mut watch::Receiver<bool>,
) -> Result<ClientTls, Refusal> {
    let waiting = door.limits.wait_for(door.index, Stage::TlsHandshake, client);
    let end = Instant::now() + waiting.time(greeting.timeout);
    let shake = async {
        let opening = link.opening(&door.shell).await?;
        if opening == Opening::Header {
            return Ok(Err(Refusal::ProxyUntrusted));
        }
        let tls = TlsStream::server(greeting.config).map_err(|_| HandshakeFailure::Protocol)?;
        link.shake_hands(&door.shell, tls, opening).await?;
        let negotiated = link.channel.negotiated().ok_or(HandshakeFailure::Protocol)?;
        let kind = SessionKind { version: negotiated.version, resumed: negotiated.resumed };
        door.stats().tls_sessions[kind.index()].add(1);
        Ok(Ok(ClientTls::new(&negotiated)))
    };
    match within(stop, end, &waiting, shake).await {
        Ok(Ok(done)) => done,
        Err(Cut::Evicted) => Err(Refusal::HandshakeEvicted),
        Ok(Err(failure)) => Err(fail(door, failure)),
        Err(Cut::Late) => Err(fail(door, HandshakeFailure::Timeout)),
    }
}

/// Counts a handshake that failed.
fn fail(door: &Door, failure: HandshakeFailure) -> Refusal {
    door.stats().tls_failures[failure as usize].add(1);
    Refusal::TlsHandshake
}

/// Reads until the header is complete, or cannot be any more.
async fn header(link: &mut Link, shell: &Shell, max_header: usize) -> Result<Introduced, Refusal> {
    let mut preface = Preface::new(max_header);
    let early = std::mem::take(&mut link.rest);
    let mut progress = preface.take(&early);
    loop {
        match progress {
            Progress::NeedMore => {}
            Progress::Done(introduced) => return Ok(introduced),
            Progress::Refuse(reason) => {
                tracing::debug!(session = link.session, %reason, "PROXY header");
                let missing = reason == Invalid::Signature;
                return Err(if missing { Refusal::ProxyMissing } else { Refusal::ProxyInvalid });
            }
        }
        let came = link.read(shell, |bytes| (!bytes.is_empty()).then(|| preface.take(bytes))).await;
        // Load balancers that look whether the port is open close it.
        progress = came.ok().flatten().ok_or(Refusal::ProxyClosed)?;
    }
}
