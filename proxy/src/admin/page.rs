//! The status page: what `ctl show backends` and `ctl show leaks` print, for whoever has a browser at hand.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde_json::Map;

use super::api::Api;
use super::show::What;
use crate::ctl;

/// Before and behind the text. It loads itself again, and nothing else.
const HEAD: &str = "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
                    <meta http-equiv=\"refresh\" content=\"10\">\n<title>Counterfoil</title>\n</head>\n<body>\n\
                    <h1>Counterfoil</h1>\n<pre>\n";
const FOOT: &str = "</pre>\n<p><a href=\"/metrics\">/metrics</a> <a href=\"/healthz\">/healthz</a> \
                    <a href=\"/readyz\">/readyz</a> <a href=\"/api/v1/backends\">/api/v1/backends</a> \
                    <a href=\"/api/v1/connections\">connections</a> <a href=\"/api/v1/clients\">clients</a> \
                    <a href=\"/api/v1/tlvs\">tlvs</a> <a href=\"/api/v1/findings\">findings</a> \
                    <a href=\"/api/v1/reaps\">reaps</a> <a href=\"/api/v1/view\">view</a></p>\n</body>\n</html>\n";

/// `/`
pub(super) async fn page(State(api): State<Api>) -> Response {
    let mut text = Vec::new();
    for what in [What::Backends, What::Findings, What::Reaps] {
        let mut shown = Map::new();
        let done = api.read(what, 0, &mut shown).await;
        let Some(done) = done.filter(|done| done["ok"] == true) else {
            return (StatusCode::SERVICE_UNAVAILABLE, "the watchdog does not answer\n").into_response();
        };
        let printed = ctl::print(&shown, &done, &mut text);
        if let Err(error) = printed {
            // Memory does not fail to be written.
            tracing::debug!(%error, "status page");
        }
        text.push(b'\n');
    }
    let page = format!("{HEAD}{}{FOOT}", escaped(&String::from_utf8_lossy(&text)));
    let headers = [(CONTENT_TYPE, "text/html; charset=utf-8"), (CONTENT_SECURITY_POLICY, "default-src 'none'")];
    (headers, page).into_response()
}

/// Text in HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
