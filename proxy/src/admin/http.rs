//! `/metrics`, `/healthz` and `/readyz`, beside the status page and `/api/v1/`.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::Response;
use axum::routing::get;
use tokio::net::TcpListener;

use super::api::Api;
use super::scrape::scrape;
use super::{Served, guard, page};

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
    guard::serve(listener, router).await;
}

async fn metrics(State(served): State<Served>, headers: HeaderMap) -> Response {
    scrape(&headers, &served.metrics).await
}

/// Alive: this thread answers, and at least one worker runs.
async fn health(State(served): State<Served>) -> (StatusCode, &'static str) {
    let stalled = &served.watchdog.report().stalled;
    if !stalled.is_empty() && stalled.iter().all(|stalled| *stalled) {
        return (StatusCode::SERVICE_UNAVAILABLE, "every worker is stalled\n");
    }
    (StatusCode::OK, "ok\n")
}

/// Ready: clients are being served, and there is a backend for some of them.
async fn ready(State(served): State<Served>, uri: Uri) -> (StatusCode, String) {
    super::ready::ready(&served.live.now(), &uri)
}
