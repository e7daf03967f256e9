//! `/metrics`, `/healthz` and `/readyz`, beside the status page and `/api/v1/`.

use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use super::api::Api;
use super::guard::Guarded;
use super::{Served, page};
use crate::metrics;

/// Serves until its task is dropped.
pub(super) async fn serve(listener: TcpListener, served: Served, api: Api) {
    let page = Router::new().route("/", get(page::page)).with_state(api.clone());
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .with_state(served)
        .merge(page)
        .merge(api.routes());
    serve_router(listener, router).await;
}

/// Serves a router's routes, to a limited number of clients, until its task is dropped.
pub(crate) async fn serve_router(listener: TcpListener, router: Router) {
    // Never returns: errors of `accept(2)` are handled by the listener.
    if let Err(error) = axum::serve(Guarded::new(listener), router).await {
        tracing::error!(%error, "admin: http has ended");
    }
}

async fn metrics(State(served): State<Served>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], served.metrics.render())
}

/// Alive: this thread answers, and at least one worker runs.
async fn health(State(served): State<Served>) -> (StatusCode, &'static str) {
    let stalled = &served.watchdog.report().stalled;
    if !stalled.is_empty() && stalled.iter().all(|stalled| *stalled) {
        return (StatusCode::SERVICE_UNAVAILABLE, "every worker is stalled\n");
    }
    (StatusCode::OK, "ok\n")
}

/// Ready: clients are being served, and a backend is up.
async fn ready(State(served): State<Served>) -> (StatusCode, &'static str) {
    let observed = served.live.now();
    if !observed.serving.load(Ordering::Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, "not serving\n");
    }
    if !observed.health.is_any_up() {
        return (StatusCode::SERVICE_UNAVAILABLE, "no backend is up\n");
    }
    (StatusCode::OK, "ready\n")
}
