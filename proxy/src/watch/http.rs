//! `/metrics`, `/healthz` and `/readyz` of a watch.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::get;

use super::watched::Watched;
use crate::metrics::Metrics;
use crate::watchdog::Handle;
use crate::{admin, clock};

/// What is served.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) metrics: Arc<Metrics>,
    pub(super) watched: Arc<Watched>,
    pub(super) watchdog: Handle,
    /// Between sweeps.
    pub(super) interval: Duration,
}

pub(super) fn router(served: Served) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .with_state(served)
}

async fn metrics(State(served): State<Served>, headers: HeaderMap) -> Response {
    admin::scrape(&headers, &served.metrics).await
}

/// Alive: this thread answers, and the watchdog reads the kernel.
async fn health(State(served): State<Served>) -> (StatusCode, &'static str) {
    let late = clock::now().since(served.watchdog.report().taken) > served.interval * 3 + Duration::from_secs(10);
    if late {
        return (StatusCode::SERVICE_UNAVAILABLE, "the watchdog has not read the kernel of late\n");
    }
    (StatusCode::OK, "ok\n")
}

/// Ready: there is a process to watch.
async fn ready(State(served): State<Served>) -> (StatusCode, &'static str) {
    if served.watched.processes().count == 0 {
        return (StatusCode::SERVICE_UNAVAILABLE, "there is no process to watch\n");
    }
    (StatusCode::OK, "ready\n")
}
