//! Alertmanager 0.25, which hands Prometheus' alerts to a webhook of the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::metrics;
use crate::process::{self, Process};
use crate::tempdir::TempDir;
use crate::wait;

/// For one request of Alertmanager's, which comes in one piece from the same machine.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A running Alertmanager with one receiver, which is told of each alert by itself, at once, when it begins and when it
/// is over.
#[derive(Debug)]
pub struct Alertmanager {
    /// The process.
    pub process: Process,
    /// Where Prometheus sends alerts.
    pub address: SocketAddr,
    /// What the receiver was told.
    pub webhook: Webhook,
    _dir: TempDir,
}

impl Alertmanager {
    /// Starts it, and the receiver.
    ///
    /// # Panics
    /// If it does not get ready.
    #[track_caller]
    pub fn start() -> Self {
        let webhook = Webhook::start();
        let dir = TempDir::new("alertmanager");
        let config = format!(
            "route: {{receiver: test, group_by: ['...'], group_wait: 0s, group_interval: 500ms, repeat_interval: 1h}}\n\
             receivers:\n- name: test\n  webhook_configs: [{{url: \"http://{}/\", send_resolved: true}}]\n",
            webhook.address
        );
        let config = format!("--config.file={}", dir.write("alertmanager.yml", &config).display());
        let storage = format!("--storage.path={}", dir.path().join("data").display());
        let (process, port, ()) = process::start_on_free_port("alertmanager", |port| {
            let listen = format!("--web.listen-address=127.0.0.1:{port}");
            // Without an address for its cluster it is one alone.
            let arguments = [config.as_str(), &storage, &listen, "--cluster.listen-address="];
            (Process::start("alertmanager", "prometheus-alertmanager", &arguments), ())
        });
        let address = super::loopback(port);
        wait::until("alertmanager is ready", Duration::from_secs(20), || {
            metrics::get(address, "/-/ready").is_ok_and(|(head, _)| head.contains(" 200 "))
        });
        Self { process, address, webhook, _dir: dir }
    }
}

/// One alert in one notification.
#[derive(Clone, Debug)]
pub struct Notified {
    /// When it came.
    pub at: Instant,
    /// `firing` or `resolved`.
    pub status: String,
    /// Its label `alertname`.
    pub name: String,
    /// The alert: `labels`, `annotations`, `startsAt`, `endsAt`.
    pub alert: Value,
}

impl Notified {
    /// One of its labels, empty if it has none of that name.
    pub fn label(&self, name: &str) -> &str {
        self.alert["labels"][name].as_str().unwrap_or_default()
    }
}

#[derive(Debug, Default)]
struct Received {
    stop: AtomicBool,
    alerts: Mutex<Vec<Notified>>,
    errors: Mutex<Vec<String>>,
}

/// The receiver: an HTTP server that takes notifications and keeps them.
#[derive(Debug)]
pub struct Webhook {
    address: SocketAddr,
    received: Arc<Received>,
    acceptor: Option<JoinHandle<()>>,
}

impl Webhook {
    fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let received = Arc::new(Received::default());
        let acceptor = {
            let received = Arc::clone(&received);
            std::thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    if received.stop.load(Ordering::SeqCst) {
                        break;
                    }
                    match serve(stream) {
                        Ok(alerts) => received.alerts.lock().unwrap().extend(alerts),
                        Err(error) => received.errors.lock().unwrap().push(error),
                    }
                }
            })
        };
        Self { address, received, acceptor: Some(acceptor) }
    }

    /// Everything that came so far, in the order of arrival.
    ///
    /// # Panics
    /// If something came that is no notification.
    #[track_caller]
    pub fn alerts(&self) -> Vec<Notified> {
        let errors = self.received.errors.lock().unwrap().clone();
        assert!(errors.is_empty(), "{errors:?}");
        self.received.alerts.lock().unwrap().clone()
    }

    /// Waits for the first notification that is as wanted.
    ///
    /// # Panics
    /// With all that came, if it does not come by the deadline.
    #[track_caller]
    pub fn wait_for(&self, what: &str, deadline: Duration, wanted: impl Fn(&Notified) -> bool) -> Notified {
        match wait::poll(deadline, || self.alerts().into_iter().find(&wanted)) {
            Some(found) => found,
            None => panic!("not within {deadline:?}: {what}; notifications: {:#?}", self.alerts()),
        }
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        self.received.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; if it has ended by itself, there is nobody to wake.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Takes one request and its alerts.
fn serve(stream: TcpStream) -> Result<Vec<Notified>, String> {
    let fail = |error: std::io::Error| format!("webhook: {error}");
    stream.set_read_timeout(Some(REQUEST_TIMEOUT)).map_err(fail)?;
    let mut reader = BufReader::new(&stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).map_err(fail)? == 0 {
            return Err("webhook: the request ended within its head".to_owned());
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().map_err(|e| format!("webhook: {line:?}: {e}"))?;
            }
            None if line.trim_end().is_empty() => break,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).map_err(fail)?;
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    (&stream).write_all(answer.as_bytes()).map_err(fail)?;
    let notification: Value = serde_json::from_slice(&body).map_err(|e| format!("webhook: {e}"))?;
    let alerts = notification["alerts"].as_array().ok_or_else(|| format!("webhook: no alerts: {notification}"))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let notified = |alert: &Value| Notified {
        at: Instant::now(),
        status: text(&alert["status"]),
        name: text(&alert["labels"]["alertname"]),
        alert: alert.clone(),
    };
    Ok(alerts.iter().map(notified).collect())
}
