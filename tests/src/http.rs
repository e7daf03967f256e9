//! A backend that speaks as much HTTP/1.1 as a proxy's pool of connections needs, and a client for it. The answer to
//! `GET /x` is `/x`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a connection may take to say something before the test is over.
const PATIENCE: Duration = Duration::from_secs(30);

/// The backend.
#[derive(Debug)]
pub struct Backend {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// Connections accepted so far.
    accepted: AtomicUsize,
    /// It closes a connection after so many requests,
    requests: usize,
    /// or after so long without one.
    idle: Duration,
}

impl Backend {
    /// Starts it. It closes each connection after `requests` of them, without a word before, and after `idle` without one.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start(requests: usize, idle: Duration) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), accepted: AtomicUsize::new(0), requests, idle });
        let accepting = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || {
            let mut serving = Vec::new();
            while let Ok((stream, _)) = listener.accept() {
                if accepting.stop.load(Ordering::SeqCst) {
                    break;
                }
                accepting.accepted.fetch_add(1, Ordering::Relaxed);
                let shared = Arc::clone(&accepting);
                serving.push(std::thread::spawn(move || shared.serve(&stream)));
            }
            for thread in serving {
                let _ = thread.join();
            }
        });
        Self { address, shared, acceptor: Some(acceptor) }
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// An error ends the connection: the proxy has left.
    fn serve(&self, stream: &TcpStream) {
        if stream.set_read_timeout(Some(self.idle)).is_err() || stream.set_nodelay(true).is_err() {
            return;
        }
        let mut reader = BufReader::new(stream);
        for _ in 0..self.requests {
            let Some(path) = read_head(&mut reader).and_then(|head| Some(head.split(' ').nth(1)?.to_owned())) else {
                return;
            };
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{path}", path.len());
            if self.stop.load(Ordering::SeqCst) || (&mut &*stream).write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; those that serve end with their connections, or at the idle time.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Asks `count` times over one connection, for paths of its own, and checks each answer.
///
/// # Errors
/// The first thing that was not as it should be.
pub fn ask(server: SocketAddr, who: &str, count: usize) -> Result<(), String> {
    let fail = |what: &str, error: &dyn std::fmt::Display| format!("{who}: {what}: {error}");
    let stream = TcpStream::connect(server).map_err(|e| fail("connecting", &e))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|e| fail("timeout", &e))?;
    stream.set_nodelay(true).map_err(|e| fail("nodelay", &e))?;
    let mut reader = BufReader::new(&stream);
    for number in 0..count {
        let path = format!("/{who}/{number}");
        let request = format!("GET {path} HTTP/1.1\r\nHost: backend\r\n\r\n");
        (&stream).write_all(request.as_bytes()).map_err(|e| fail("sending", &e))?;
        let head = read_head(&mut reader).ok_or_else(|| fail("reading", &path))?;
        let status = head.lines().next().unwrap_or_default();
        let length = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body).map_err(|e| fail("the body", &e))?;
        if !status.contains(" 200 ") || body != path.as_bytes() {
            return Err(format!("{who}: {path}: {status}: {:?}", String::from_utf8_lossy(&body)));
        }
    }
    Ok(())
}

/// The first line and the headers; none: the connection has ended.
fn read_head(reader: &mut impl BufRead) -> Option<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    Some(head)
}
