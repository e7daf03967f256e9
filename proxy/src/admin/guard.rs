//! HTTP for a limited number of clients: how many there are at once ([`super::places`]), how long one may be silent, and how
//! long it may stay.

use std::future::Future as _;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::places::{Gone, Place, Places};

/// Connections at once: some are left however many orders are being carried out.
pub(super) const MAX_CONNECTIONS: usize = super::socket::MAX_CONNECTIONS + 24;

/// Without a byte in either direction, or until the header of a request is whole, from the first octet or the last answer
/// on. Longer than Prometheus' default scrape interval would keep its connection, but it opens a new one without complaint.
const SILENCE: Duration = Duration::from_secs(10);

/// In all, so that a byte now and then does not hold a place for ever.
const LIFETIME: Duration = Duration::from_secs(120);

/// Pause after `accept(2)` has failed, mostly for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves a router's routes until its task is dropped.
pub(crate) async fn serve(listener: TcpListener, router: Router) {
    let places = Places::new(MAX_CONNECTIONS);
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (place, gone) = places.enter(Some(canonical(peer.ip()))).await;
                tokio::spawn(connection(stream, place, gone, router.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "admin: accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One peer has one address, whichever way it came.
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

async fn connection(stream: TcpStream, place: Place, gone: Gone, router: Router) {
    let state = Arc::new(State { place, complete: AtomicBool::new(false) });
    let io = Limited::new(stream, Arc::clone(&state));
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |request: Request<Incoming>| {
        state.place.begins();
        let (answer, state) = (router.call(request), Arc::clone(&state));
        async move {
            // Who has sent several requests at once gets one answer in a turn.
            tokio::task::yield_now().await;
            answer.await.map(|answer: Response<Body>| answer.map(|body| Watched { body, state }))
        }
    });
    let mut http = http1::Builder::new();
    let http = http.timer(TokioTimer::new()).header_read_timeout(SILENCE).serve_connection(TokioIo::new(io), service);
    tokio::select! {
        ended = http => if let Err(error) = ended {
            tracing::debug!(%error, "admin: http");
        },
        _ = gone => {}
    }
}

/// What a connection's socket and its answers know of each other.
#[derive(Debug)]
struct State {
    place: Place,
    /// The last octet of the answer has been made, but perhaps not sent.
    complete: AtomicBool,
}

/// The body of an answer, whose end is noticed.
#[derive(Debug)]
struct Watched {
    body: Body,
    state: Arc<State>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.state.complete.store(true, Ordering::Relaxed);
    }
}

/// A connection that fails with `TimedOut` when it was silent, or stayed, for too long.
#[derive(Debug)]
struct Limited {
    stream: TcpStream,
    silence: Pin<Box<Sleep>>,
    end: Instant,
    state: Arc<State>,
    /// The last write had to wait.
    stuck: bool,
}

impl Limited {
    fn new(stream: TcpStream, state: Arc<State>) -> Self {
        let now = Instant::now();
        let silence = Box::pin(sleep_until(now + SILENCE));
        Self { stream, silence, end: now + LIFETIME, state, stuck: false }
    }

    /// Bytes were moved.
    fn moved(&mut self) {
        let until = (Instant::now() + SILENCE).min(self.end);
        self.silence.as_mut().reset(until);
    }

    /// What a pending operation comes to: pending, or too late.
    fn wait<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        self.silence.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn is_stuck(&mut self, stuck: bool) {
        if std::mem::replace(&mut self.stuck, stuck) != stuck {
            self.state.place.stuck(stuck);
        }
    }
}

impl AsyncRead for Limited {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Pending => self.wait(cx),
            Poll::Ready(done) => {
                self.moved();
                Poll::Ready(done)
            }
        }
    }
}

impl AsyncWrite for Limited {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, data);
        self.is_stuck(written.is_pending());
        match written {
            Poll::Pending => self.wait(cx),
            Poll::Ready(done) => {
                self.moved();
                Poll::Ready(done)
            }
        }
    }

    /// Called when all that hyper had to write is written.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.state.complete.swap(false, Ordering::Relaxed) {
            self.state.place.ends();
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
