//! `/metrics`, in the format and the encoding that the client accepts.

use std::io::Write as _;

use axum::body::Body;
use axum::http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, VARY};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::metrics::{Format, Metrics};

/// The answer to a request with these header fields. It takes milliseconds of the thread, so there is one at a time, in turn,
/// and whoever else is served by the thread comes between two of them.
pub(crate) async fn scrape(headers: &HeaderMap, metrics: &Metrics) -> Response {
    let _turn = metrics.turn().await;
    tokio::task::yield_now().await;
    let format = format(&joined(headers, ACCEPT));
    let text = metrics.render(format);
    let mut answer = if takes_gzip(&joined(headers, ACCEPT_ENCODING)) {
        let mut answer = Response::new(Body::from(gzip(text.as_bytes())));
        answer.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        answer
    } else {
        Response::new(Body::from(text))
    };
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    answer.headers_mut().insert(VARY, HeaderValue::from_static("accept, accept-encoding"));
    answer
}

/// A field that comes several times is one list (RFC 9110 section 5.2).
fn joined(headers: &HeaderMap, name: HeaderName) -> String {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect::<Vec<_>>().join(",")
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Memory does not fail to be written.
    let _ = encoder.write_all(text);
    encoder.finish().unwrap_or_default()
}

/// One member of a list with weights (RFC 9110 section 12.4.2): in lower case, its parameters without the weight.
struct Member<'a> {
    name: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
    weight: f32,
}

fn members(list: &str) -> impl Iterator<Item = Member<'_>> {
    list.split(',').map(str::trim).filter(|member| !member.is_empty()).map(|member| {
        let mut parts = member.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let mut member = Member { name, parameters: Vec::new(), weight: 1.0 };
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            match key.trim() {
                // One that cannot be read is none.
                "q" => member.weight = value.trim().parse().unwrap_or(0.0),
                key => member.parameters.push((key, value.trim().trim_matches('"'))),
            }
        }
        member
    })
}

/// OpenMetrics for who asks for it by name and likes the text format no better; the text format for everybody else.
fn format(accept: &str) -> Format {
    let accept = accept.to_ascii_lowercase();
    let fits = |member: &Member<'_>, version: &str| {
        member.parameters.iter().all(|(key, value)| *key != "version" || *value == version)
    };
    let (mut openmetrics, mut text) = (0.0_f32, None::<(u8, f32)>);
    for member in members(&accept) {
        let rank = match member.name {
            "application/openmetrics-text" if fits(&member, "1.0.0") => {
                openmetrics = openmetrics.max(member.weight);
                continue;
            }
            "text/plain" if fits(&member, "0.0.4") => 2,
            "text/*" => 1,
            "*/*" => 0,
            _ => continue,
        };
        // The most specific range counts (RFC 9110 section 12.5.1).
        if text.is_none_or(|(before, _)| before <= rank) {
            text = Some((rank, member.weight));
        }
    }
    let text = text.map_or(0.0, |(_, weight)| weight);
    if openmetrics > 0.0 && openmetrics >= text { Format::OpenMetrics } else { Format::Text }
}

fn takes_gzip(accept_encoding: &str) -> bool {
    let accept_encoding = accept_encoding.to_ascii_lowercase();
    let (mut named, mut any) = (None, None);
    for member in members(&accept_encoding) {
        match member.name {
            "gzip" | "x-gzip" => named = Some(member.weight),
            "*" => any = Some(member.weight),
            _ => {}
        }
    }
    named.or(any).is_some_and(|weight| weight > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_for_who_asks_for_it() {
        for accept in [
            // Prometheus 2.42 and 3.
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
             text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.5,\
             */*;q=0.1",
            "Application/OpenMetrics-Text; Version=1.0.0",
            "application/openmetrics-text",
            "text/plain;q=0.2, application/openmetrics-text;q=0.3;version=\"1.0.0\"",
        ] {
            assert_eq!(format(accept), Format::OpenMetrics, "{accept}");
        }
        for accept in [
            "",
            "*/*",
            "text/plain",
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            "application/openmetrics-text;version=2.0.0",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=0.3,text/plain;q=0.4",
            "application/openmetrics-text;q=0.3,*/*",
            "application/openmetrics-text;q=nonsense",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited",
            ";;,=,;q",
        ] {
            assert_eq!(format(accept), Format::Text, "{accept}");
        }
    }

    #[test]
    fn gzip_is_for_who_takes_it() {
        for (accept, takes) in [
            ("gzip", true),
            ("deflate, GZIP;q=0.5, br", true),
            ("*", true),
            ("", false),
            ("identity", false),
            ("gzip;q=0", false),
            ("gzip;q=0, *", false),
            ("*;q=0", false),
        ] {
            assert_eq!(takes_gzip(accept), takes, "{accept}");
        }
    }
}
