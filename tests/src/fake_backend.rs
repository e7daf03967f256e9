//! A backend that does what a scenario tells it: a script runs for each connection, on a thread of its own.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ppp::v2;
use rustls::ServerConnection;

use crate::message;
use crate::netns::Namespace;
use crate::wait;

mod tls;

pub use tls::{server_config, tls_versions};

/// How often a waiting script looks whether the backend is being stopped.
const STOP_POLL: Duration = Duration::from_millis(20);

/// A script that waits longer than this for its peer has met a hang: it gives up, as a closed connection would.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    accepted: AtomicUsize,
    open: AtomicUsize,
    most_open: AtomicUsize,
    queries: AtomicUsize,
    panics: Mutex<Vec<String>>,
}

/// A scripted backend on a port of 127.0.0.1.
#[derive(Debug)]
pub struct FakeBackend {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    listener: TcpListener,
    acceptor: Option<JoinHandle<()>>,
}

impl FakeBackend {
    /// Starts it; `script` runs for each accepted connection, which is closed (FIN) when the script returns.
    ///
    /// # Panics
    /// If there is no free port.
    pub fn start(script: impl Fn(&mut Connection) + Send + Sync + 'static) -> Self {
        Self::start_on(free_port(), script)
    }

    /// Like [`Self::start`], on a listener with options of its own.
    ///
    /// # Panics
    /// If it is not bound.
    pub fn start_on(listener: TcpListener, script: impl Fn(&mut Connection) + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared::default());
        let acceptor = {
            let (listener, shared) = (listener.try_clone().expect("a descriptor"), Arc::clone(&shared));
            std::thread::spawn(move || accept(&listener, &shared, &Arc::new(script)))
        };
        Self { address, shared, listener, acceptor: Some(acceptor) }
    }

    /// One that answers every query with an A record, in order, with or without a PROXY header in front.
    pub fn answering(proxy_header: bool) -> Self {
        Self::answering_on(free_port(), proxy_header)
    }

    /// The same at this namespace's address.
    ///
    /// # Panics
    /// If there is no free port.
    pub fn answering_in(namespace: &Namespace, proxy_header: bool) -> Self {
        let listener = namespace.run(|| TcpListener::bind((namespace.address, 0)).expect("a free port"));
        Self::answering_on(listener, proxy_header)
    }

    fn answering_on(listener: TcpListener, proxy_header: bool) -> Self {
        Self::start_on(listener, move |connection| {
            if proxy_header && connection.header().is_none() {
                return;
            }
            while let Some(query) = connection.query() {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        })
    }

    /// One whose answers have so many octets: zeros behind an A record.
    pub fn answering_at_length(octets: usize) -> Self {
        Self::start(move |connection| {
            while let Some(query) = connection.query() {
                let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
                answer.resize(octets, 0);
                connection.send(&answer);
            }
        })
    }

    /// One that needs PROXY headers and answers, and the headers that opened its connections.
    pub fn recording() -> (Self, Arc<Mutex<Vec<Header>>>) {
        let headers = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&headers);
        let backend = Self::start(move |connection| {
            let Some(header) = connection.header() else { return };
            seen.lock().expect("nobody panics with the lock").push(header);
            while let Some(query) = connection.query() {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        });
        (backend, headers)
    }

    /// One that needs PROXY headers and whose TXT answers tell the one that it got: source, destination, TLVs with their
    /// types in hex.
    pub fn telling() -> Self {
        Self::start(|connection| {
            let Some(header) = connection.header() else { return };
            let end = |end: Option<SocketAddr>| end.map_or_else(|| "none".to_owned(), |end| end.to_string());
            let mut told = format!("{} {}", end(header.source), end(header.destination));
            for (kind, value) in &header.tlvs {
                told.push_str(&format!(" {kind:02x}={}", String::from_utf8_lossy(value)));
            }
            while let Some(query) = connection.query() {
                connection.send(&message::text_answer_to(&query, &told));
            }
        })
    }

    /// From now on connections are refused; those that are open live on.
    ///
    /// # Panics
    /// If it goes on accepting.
    pub fn refuse(&self) {
        self.stop_listening();
        wait::until("connections are refused", PATIENCE, || TcpStream::connect(self.address).is_err());
    }

    /// Wakes the accepting thread, whatever network namespace its socket is in: accept(2) fails on a socket that was shut
    /// down.
    fn stop_listening(&self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Connections whose script runs.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Most connections open at once.
    pub fn most_open(&self) -> usize {
        self.shared.most_open.load(Ordering::SeqCst)
    }

    /// Whole queries read so far.
    pub fn queries(&self) -> usize {
        self.shared.queries.load(Ordering::SeqCst)
    }
}

fn free_port() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port")
}

fn accept(
    listener: &TcpListener,
    shared: &Arc<Shared>,
    script: &Arc<impl Fn(&mut Connection) + Send + Sync + 'static>,
) {
    let mut scripts = Vec::new();
    while let Ok((stream, peer)) = listener.accept() {
        let number = shared.accepted.fetch_add(1, Ordering::SeqCst);
        let open = shared.open.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_open.fetch_max(open, Ordering::SeqCst);
        let (shared, script) = (Arc::clone(shared), Arc::clone(script));
        scripts.retain(|thread: &JoinHandle<()>| !thread.is_finished());
        scripts.push(std::thread::spawn(move || {
            let mut connection = Connection {
                number,
                peer,
                stream: Some(stream),
                received: Vec::new(),
                tls: None,
                shared: Arc::clone(&shared),
            };
            let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| script(&mut connection)));
            if run.is_err() {
                shared.panics.lock().unwrap().push(format!("the script of connection {number} panicked"));
            }
            drop(connection);
            shared.open.fetch_sub(1, Ordering::SeqCst);
        }));
    }
    for thread in scripts {
        // A panic was caught and recorded inside.
        let _ = thread.join();
    }
}

impl Drop for FakeBackend {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.stop_listening();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        if !std::thread::panicking() {
            let panics = self.shared.panics.lock().unwrap();
            assert!(panics.is_empty(), "{panics:?}");
        }
    }
}

/// One accepted connection, as a script sees it.
#[derive(Debug)]
pub struct Connection {
    /// 0 for the first connection that was accepted, and so on.
    pub number: usize,
    /// The other end.
    pub peer: SocketAddr,
    stream: Option<TcpStream>,
    received: Vec<u8>,
    tls: Option<ServerConnection>,
    shared: Arc<Shared>,
}

/// A PROXY v2 header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// All octets as received.
    pub bytes: Vec<u8>,
    /// Source address and port; `None` for LOCAL.
    pub source: Option<SocketAddr>,
    /// Destination address and port; `None` for LOCAL.
    pub destination: Option<SocketAddr>,
    /// Type and value of each TLV, in order.
    pub tlvs: Vec<(u8, Vec<u8>)>,
}

/// Nothing whole came in time; the connection is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NothingYet;

impl Connection {
    /// Waits for more octets until `end`. `Ok(false)` when the peer has closed or the backend is being stopped.
    fn fill(&mut self, end: Instant) -> Result<bool, NothingYet> {
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let mut buffer = [0; 65536];
        while !self.shared.stop.load(Ordering::SeqCst) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NothingYet);
            }
            stream.set_read_timeout(Some(left.min(STOP_POLL))).expect("a timeout that is not zero");
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => return Ok(self.take(&buffer[..n])),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
                Err(_) => return Ok(false),
            }
        }
        Ok(false)
    }

    /// Reads the PROXY v2 header that opens the connection. `None` when the peer closes before it is whole.
    ///
    /// # Panics
    /// If what comes is no PROXY v2 header: that fails the scenario.
    pub fn header(&mut self) -> Option<Header> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Ok(header) = v2::Header::try_from(self.received.as_slice()) {
                let tlvs = header.tlvs().map(|tlv| tlv.expect("a well-formed TLV"));
                let (source, destination) = match header.addresses {
                    v2::Addresses::IPv4(a) => (
                        Some(SocketAddr::from((a.source_address, a.source_port))),
                        Some(SocketAddr::from((a.destination_address, a.destination_port))),
                    ),
                    v2::Addresses::IPv6(a) => (
                        Some(SocketAddr::from((a.source_address, a.source_port))),
                        Some(SocketAddr::from((a.destination_address, a.destination_port))),
                    ),
                    _ => (None, None),
                };
                let whole = Header {
                    bytes: header.as_bytes().to_vec(),
                    source,
                    destination,
                    tlvs: tlvs.map(|tlv| (tlv.kind, tlv.value.to_vec())).collect(),
                };
                self.received.drain(..whole.bytes.len());
                return Some(whole);
            }
            let prefix = v2::PROTOCOL_PREFIX;
            let common = self.received.len().min(prefix.len());
            assert_eq!(self.received[..common], prefix[..common], "a PROXY v2 header comes first");
            if self.fill(end) != Ok(true) {
                return None;
            }
        }
    }

    /// Reads the next query. `None` when the peer closes or the backend is being stopped.
    pub fn query(&mut self) -> Option<Vec<u8>> {
        self.query_within(PATIENCE).unwrap_or(None)
    }

    /// Like [`Self::query`].
    ///
    /// # Errors
    /// [`NothingYet`] if no whole query came within `timeout`.
    pub fn query_within(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, NothingYet> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(message) = self.take_frame() {
                self.shared.queries.fetch_add(1, Ordering::SeqCst);
                return Ok(Some(message));
            }
            if !self.fill(end)? {
                return Ok(None);
            }
        }
    }

    /// What one read(2) yields, as it came: how the peer cut its writes. `None` when the peer closes or the backend is
    /// being stopped.
    ///
    /// # Panics
    /// If octets that were read before wait to be taken.
    pub fn read_once(&mut self) -> Option<Vec<u8>> {
        assert!(self.received.is_empty(), "octets that were read before");
        (self.fill(Instant::now() + PATIENCE) == Ok(true)).then(|| std::mem::take(&mut self.received))
    }

    fn take_frame(&mut self) -> Option<Vec<u8>> {
        let len = usize::from(u16::from_be_bytes(self.received.get(..2)?.try_into().ok()?));
        let message = self.received.get(2..2 + len)?.to_vec();
        self.received.drain(..2 + len);
        Some(message)
    }

    /// Sends a message with its length prefix.
    pub fn send(&mut self, message: &[u8]) {
        self.send_raw(&message::framed(message));
    }

    /// Sends octets as they are, or over TLS if there is TLS. A peer that is gone is no error of the script.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        if let Some(tls) = &mut self.tls {
            tls.writer().write_all(bytes).expect("room in memory");
            self.flush_tls();
        } else {
            self.send_in_clear(bytes);
        }
    }

    /// Sends octets as they are, whether there is TLS or not.
    pub fn send_in_clear(&mut self, bytes: &[u8]) {
        if let Some(stream) = &mut self.stream {
            let _ = stream.write_all(bytes);
        }
    }

    /// All that has come and was not taken as a header or a query.
    pub fn received(&self) -> &[u8] {
        &self.received
    }

    /// Waits until the peer closes or the backend is stopped, and throws away what comes until then.
    pub fn wait_closed(&mut self) {
        let end = Instant::now() + PATIENCE;
        while self.fill(end) == Ok(true) {
            self.received.clear();
        }
    }

    /// Waits until the backend is stopped and never reads, so that the window closes.
    pub fn wait_without_reading(&self) {
        wait::poll(PATIENCE, || self.shared.stop.load(Ordering::SeqCst).then_some(()));
    }

    /// Sends FIN and goes on reading. A peer that is gone is no error of the script.
    pub fn finish_sending(&mut self) {
        if let Some(stream) = &mut self.stream {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
    }

    /// Closes with FIN.
    pub fn close(&mut self) {
        self.stream = None;
    }

    /// Closes with a reset.
    ///
    /// # Panics
    /// Never in practice: setting the option does not fail on a socket.
    pub fn reset(&mut self) {
        if let Some(stream) = self.stream.take() {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER on a TCP socket");
        }
    }
}
