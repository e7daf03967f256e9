//! `/api/v1/`: what the unix socket offers, over HTTP. Reading takes nothing, changing takes POST and the token.
//!
//! Requests are carried out by the same code on the same thread as the socket's, and so are the drills, which end when
//! their client is gone.

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::body::Frame;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Interval, interval};

use super::Served;
use super::show::What;
use super::socket::{self, Request};
use super::token::Token;
use crate::ctl;
use crate::drill::Drill;

/// Octets of the longest request.
const MAX_REQUEST: usize = 4096;

/// Between two signs of life while nothing happens: connections that are silent for longer are closed.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// What can be read.
const LISTS: [What; 7] =
    [What::Backends, What::Connections, What::Clients, What::Tlvs, What::Findings, What::Reaps, What::View];

/// What can be ordered.
const ORDERS: [&str; 4] = ["drain", "reload", "reap", "drill"];

/// A request on its way to the thread's own tasks, and where its events go.
type Job = (Request, UnboundedSender<Value>);

/// The way to them.
#[derive(Clone, Debug)]
pub(super) struct Api {
    jobs: UnboundedSender<Job>,
    places: Arc<Semaphore>,
    token: Option<Arc<Token>>,
}

impl Api {
    /// Requests are carried out from now on, as many at once as there are `places`. On a `LocalSet` only.
    pub(super) fn new(served: Served, drill: Rc<Drill>, places: Arc<Semaphore>, token: Option<Token>) -> Self {
        let (jobs, received) = unbounded_channel();
        tokio::task::spawn_local(carry_out(received, served, drill));
        Self { jobs, places, token: token.map(Arc::new) }
    }

    /// Everything below `/api/v1/`.
    pub(super) fn routes(self) -> Router {
        let mut router = Router::new();
        for what in LISTS {
            let handler = async move |State(api): State<Self>, uri: Uri| api.list(what, &uri).await;
            router = router.route(&format!("/api/v1/{}", what.name()), get(handler));
        }
        for name in ORDERS {
            let handler =
                async move |State(api): State<Self>, headers: HeaderMap, body: Bytes| api.order(name, &headers, &body);
            router = router.route(&format!("/api/v1/{name}"), post(handler));
        }
        router.layer(DefaultBodyLimit::max(MAX_REQUEST)).with_state(self)
    }

    /// Hands a request over. None if too many are being carried out.
    fn begin(&self, request: Request) -> Option<Events> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let (events, received) = unbounded_channel();
        self.jobs.send((request, events)).ok()?;
        Some(Events { received, signs: interval(SIGN_OF_LIFE), _place: place })
    }

    /// All rows of a page of a list, and what ends the page. None if too many requests are being carried out.
    pub(super) async fn read(&self, what: What, after: u64, shown: &mut Map<String, Value>) -> Option<Value> {
        ctl::begin(what.name(), shown);
        let mut events = self.begin(Request::Show { what, after })?;
        while let Some(event) = events.received.recv().await {
            if event["event"] == "done" {
                return Some(event);
            }
            ctl::gather(&event, shown);
        }
        None
    }

    async fn list(&self, what: What, uri: &Uri) -> Response {
        let after = match uri.query().map(|query| query.strip_prefix("after=").and_then(|after| after.parse().ok())) {
            None => 0,
            Some(Some(after)) => after,
            Some(None) => return refuse(StatusCode::BAD_REQUEST, "the only parameter is after=NUMBER"),
        };
        let mut shown = Map::new();
        let Some(done) = self.read(what, after, &mut shown).await else { return busy() };
        if done["ok"] != true {
            return refuse(StatusCode::SERVICE_UNAVAILABLE, done["message"].as_str().unwrap_or("not now"));
        }
        ctl::single_out(&mut shown);
        for name in ["next", "source", "uncertain"] {
            shown.insert(name.to_owned(), done[name].clone());
        }
        ([(CONTENT_TYPE, "application/json")], format!("{}\n", Value::Object(shown))).into_response()
    }

    fn order(&self, name: &str, headers: &HeaderMap, body: &[u8]) -> Response {
        let Some(token) = &self.token else {
            return refuse(StatusCode::FORBIDDEN, "nothing can be changed over HTTP: `admin.token_file` is not set");
        };
        let given = headers.get(AUTHORIZATION).map(|header| header.as_bytes());
        if !given.is_some_and(|header| token.is_in(header)) {
            tracing::warn!(order = name, with_token = given.is_some(), "order over HTTP refused: not the token");
            let mut refused = refuse(StatusCode::UNAUTHORIZED, "the token of `admin.token_file` is needed");
            refused.headers_mut().insert(WWW_AUTHENTICATE, axum::http::HeaderValue::from_static("Bearer"));
            return refused;
        }
        let request = match request(name, body) {
            Ok(request) => request,
            Err(error) => return refuse(StatusCode::BAD_REQUEST, &format!("the request cannot be read: {error}")),
        };
        let Some(events) = self.begin(request) else { return busy() };
        tracing::info!(order = name, "order over HTTP");
        ([(CONTENT_TYPE, "application/x-ndjson")], Body::new(events)).into_response()
    }
}

/// The socket's request of this name; its fields are in the body, a JSON object. An empty body has none.
fn request(name: &str, body: &[u8]) -> Result<Request, serde_json::Error> {
    let mut fields = if body.is_empty() { Map::new() } else { serde_json::from_slice(body)? };
    fields.insert("cmd".to_owned(), json!(name));
    serde_json::from_value(Value::Object(fields))
}

fn refuse(status: StatusCode, message: &str) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], format!("{}\n", json!({"ok": false, "message": message})))
        .into_response()
}

fn busy() -> Response {
    refuse(StatusCode::SERVICE_UNAVAILABLE, socket::TOO_MANY)
}

/// Until every [`Api`] is gone.
async fn carry_out(mut jobs: UnboundedReceiver<Job>, served: Served, drill: Rc<Drill>) {
    while let Some((request, events)) = jobs.recv().await {
        let (served, drill) = (served.clone(), Rc::clone(&drill));
        tokio::task::spawn_local(async move {
            // When the client is gone the answer's future is dropped: a drill's leak ends with it.
            tokio::select! {
                biased;
                () = socket::carry_out(request, &served, drill, &events) => {}
                () = events.closed() => {}
            }
        });
    }
}

/// The events of an order as a response, one JSON object in a line, as on the socket. An empty line says that more come.
#[derive(Debug)]
struct Events {
    received: UnboundedReceiver<Value>,
    signs: Interval,
    /// Given back when the client has all of them.
    _place: OwnedSemaphorePermit,
}

impl HttpBody for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let line = match self.received.poll_recv(cx) {
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(event)) => format!("{event}\n"),
            Poll::Pending => match self.signs.poll_tick(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(_) => "\n".to_owned(),
            },
        };
        self.signs.reset();
        Poll::Ready(Some(Ok(Frame::data(line.into()))))
    }
}
