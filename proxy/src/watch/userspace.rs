//! The other half of the count: a metric of the watched process, read over HTTP.
//!
//! What cannot be read is said in the log and by a metric; nothing else depends on it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use axum::body::Bytes;
use axum::http::header::{ACCEPT, HOST, USER_AGENT};
use axum::http::uri::Scheme;
use axum::http::{Request, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::samples::Selector;
use super::watched::Watched;

/// For connecting, asking and the whole answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// It is not asked more often, whatever the interval between sweeps is.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);

/// A longer page is none of metrics.
const LONGEST: usize = 16 << 20;

/// Where a page of metrics is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    uri: Uri,
    /// As in the header `Host`.
    authority: String,
    host: String,
    port: u16,
}

impl Page {
    /// Reads `http://HOST[:PORT]/PATH`.
    ///
    /// # Errors
    /// It is something else.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no http://HOST[:PORT]/PATH; https and credentials are not supported");
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let authority = uri.authority().filter(|_| uri.scheme() == Some(&Scheme::HTTP)).ok_or_else(wrong)?;
        if authority.as_str().contains('@') {
            return Err(wrong());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let (authority, port) = (authority.to_string(), authority.port_u16().unwrap_or(80));
        Ok(Self { uri, authority, host, port })
    }

    #[expect(clippy::disallowed_methods, reason = "this is no backend connection, and there is no ledger here")]
    async fn fetch(&self) -> Result<String> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.context("connecting")?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::get(path)
            .header(HOST, &self.authority)
            .header(USER_AGENT, concat!("counterfoil/", env!("CARGO_PKG_VERSION")))
            .header(ACCEPT, "text/plain;version=0.0.4, application/openmetrics-text;q=0.5")
            .body(Empty::<Bytes>::new())?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            if !response.status().is_success() {
                bail!("HTTP status {}", response.status());
            }
            let body = Limited::new(response.into_body(), LONGEST).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
            Ok(String::from_utf8_lossy(&body).into_owned())
        };
        tokio::pin!(exchange);
        tokio::select! {
            page = &mut exchange => page,
            // It ends when the other end closes: whatever has come by then is all there will be.
            ended = connection => {
                let page = exchange.await;
                ended.context("the connection")?;
                page
            }
        }
    }

    /// # Errors
    /// The page is not there in time, or lacks the sample.
    async fn read(&self, selector: &Selector) -> Result<f64> {
        let page = timeout(TIMEOUT, self.fetch()).await.with_context(|| format!("no answer within {TIMEOUT:?}"))??;
        Ok(selector.sum(&page)?)
    }
}

/// Reads the metric about as often as the kernel is, for ever.
pub(super) async fn follow(page: Page, selector: Selector, every: Duration, watched: Arc<Watched>) {
    let mut ticks = interval(every.max(LEAST_INTERVAL));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // What was said last: nothing, that it can be read, or why it cannot.
    let mut said: Option<Option<String>> = None;
    loop {
        ticks.tick().await;
        let read = page.read(&selector).await;
        watched.set_userspace(read.as_ref().ok().copied());
        let error = read.as_ref().err().map(|error| format!("{error:#}"));
        if said.as_ref() == Some(&error) {
            continue;
        }
        let (url, metric) = (page.uri.to_string(), selector.to_string());
        match (&read, &error) {
            (_, Some(error)) => tracing::warn!(url, metric, error, "the user-space metric cannot be read"),
            (Ok(value), None) => tracing::info!(url, metric, value, "the user-space metric can be read"),
            (Err(_), None) => {}
        }
        said = Some(error);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_page_is_an_http_url() {
        let page = |text: &str| Page::parse(text).unwrap();
        let parts = |page: Page| (page.host, page.port, page.authority, page.uri.path().to_owned());
        let own = |a: &str, b, c: &str, d: &str| (a.to_owned(), b, c.to_owned(), d.to_owned());
        assert_eq!(parts(page("http://[::1]:8083/m?x=1")), own("::1", 8083, "[::1]:8083", "/m"));
        assert_eq!(parts(page("http://localhost")), own("localhost", 80, "localhost", "/"));
        for bad in
            ["", "/metrics", "127.0.0.1:80/m", "https://a/", "http://u:p@a/m", "http://", "ftp://a/", "http://a b/"]
        {
            assert!(Page::parse(bad).unwrap_err().contains("http://HOST[:PORT]/PATH"), "{bad}");
        }
    }

    /// What comes of a server that answers one request with `answer` and closes.
    async fn read(answer: &'static str) -> Result<f64> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let page = Page::parse(&format!("http://{address}/metrics?all=1")).unwrap();
        let value = page.read(&Selector::parse("x").unwrap()).await;
        let request = serving.await.unwrap();
        assert!(request.starts_with("GET /metrics?all=1 HTTP/1.1\r\n"), "{request}");
        assert!(request.contains(&format!("host: {address}\r\n")), "{request}");
        value
    }

    #[tokio::test]
    async fn a_sample_is_read() {
        assert_eq!(read("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nx 1\nx 2\n").await.unwrap(), 3.0);
        assert_eq!(read("HTTP/1.0 200 OK\r\n\r\nx 5\n").await.unwrap(), 5.0, "until the end of the connection");
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nx \r\n2\r\n7\n\r\n0\r\n\r\n";
        assert_eq!(read(chunked).await.unwrap(), 7.0);
    }

    #[tokio::test]
    async fn what_is_wrong_is_said() {
        for (answer, said) in [
            ("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "401"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ny 1\n", "no sample of x"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\nx 1\n", ""),
            ("what?\r\n\r\n", ""),
        ] {
            let error = format!("{:#}", read(answer).await.unwrap_err());
            assert!(error.contains(said), "{answer}: {error}");
        }
    }
}
