//! A small authoritative name server that tells what reached it: the backend of the demo, of drills and of tests.
//!
//! It serves the zone `counterfoil.` over TCP and speaks PROXY v2 (see [`zone`] for its answers). It accepts only and
//! never opens a connection. One task serves one connection; every wait in it has a limit.

mod connection;
pub mod zone;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

/// Whether connections start with a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyMode {
    /// A connection without a header is closed.
    Required,
    /// A header is read if there is one. The specification forbids to guess (section 2); this is for tests.
    Optional,
    /// A header is not understood: its first octets are taken for a message.
    None,
}

/// In which order the answers to queries that arrived in one piece are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the queries came.
    AsAsked,
    /// The last query first: RFC 7766, section 7 allows any order.
    Reversed,
}

/// How the responder behaves. [`ResponderOptions::default`] is what the demo uses.
#[derive(Clone, Copy, Debug)]
pub struct ResponderOptions {
    /// Whether connections start with a PROXY header.
    pub proxy: ProxyMode,
    /// How long the header may take. The specification asks for three seconds at least (section 2).
    pub header_timeout: Duration,
    /// Longest header, in octets.
    pub max_header: usize,
    /// A connection without traffic for this long is closed.
    pub idle_timeout: Duration,
    /// How long a peer may take to read what is sent to it.
    pub write_timeout: Duration,
    /// Connections at the same time; others wait in the listen queue.
    pub max_connections: usize,
    /// How long each answer is held back.
    pub delay: Duration,
    /// Order of answers.
    pub order: Order,
}

impl Default for ResponderOptions {
    fn default() -> Self {
        Self {
            proxy: ProxyMode::Required,
            header_timeout: Duration::from_secs(3),
            max_header: 4096,
            idle_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(5),
            max_connections: 1024,
            delay: Duration::ZERO,
            order: Order::AsAsked,
        }
    }
}

/// What the responder has seen so far. Read at any time from any thread.
#[derive(Debug, Default)]
pub struct Counters {
    accepted: AtomicU64,
    open: AtomicU64,
    open_max: AtomicU64,
    bad_headers: AtomicU64,
    queries: AtomicU64,
}

impl Counters {
    /// Connections accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Connections open now.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Most connections open at one time.
    pub fn open_max(&self) -> u64 {
        self.open_max.load(Ordering::Relaxed)
    }

    /// Connections closed because their PROXY header was missing, late or wrong.
    pub fn bad_headers(&self) -> u64 {
        self.bad_headers.load(Ordering::Relaxed)
    }

    /// Messages answered or about to be.
    pub fn queries(&self) -> u64 {
        self.queries.load(Ordering::Relaxed)
    }
}

/// Counts a connection as open until it is dropped.
struct Open(Arc<Counters>);

impl Open {
    fn new(counters: Arc<Counters>) -> (Self, u64) {
        let serial = counters.accepted.fetch_add(1, Ordering::Relaxed) + 1;
        let open = counters.open.fetch_add(1, Ordering::Relaxed) + 1;
        counters.open_max.fetch_max(open, Ordering::Relaxed);
        (Self(counters), serial)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A responder that listens, but does not accept yet.
#[derive(Debug)]
pub struct Responder {
    listener: TcpListener,
    addr: SocketAddr,
    options: ResponderOptions,
    counters: Arc<Counters>,
}

impl Responder {
    /// Listens on `addr`; port 0 lets the kernel choose.
    ///
    /// # Errors
    ///
    /// If the address cannot be had.
    pub fn bind(addr: SocketAddr, options: ResponderOptions) -> io::Result<Self> {
        Self::from_listener(TcpListener::bind(addr)?, options)
    }

    /// Takes over a socket that listens already.
    ///
    /// # Errors
    ///
    /// If the socket has no local address or cannot be made non-blocking.
    pub fn from_listener(listener: TcpListener, options: ResponderOptions) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        Ok(Self { listener, addr, options, counters: Arc::default() })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it has seen; stays readable after it ended.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Serves until `shutdown` is ready, then sends the answers that are due and closes all connections.
    ///
    /// # Errors
    ///
    /// If the socket cannot be registered with the runtime. Failures of single connections end these only.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let (stop, stopped) = watch::channel(());
        let mut connections = JoinSet::new();
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept(), if connections.len() < self.options.max_connections => match accepted {
                    Ok((stream, peer)) => {
                        let (open, serial) = Open::new(Arc::clone(&self.counters));
                        let stop = stopped.clone();
                        connections.spawn(connection::serve(stream, peer, serial, open, self.options, stop));
                    }
                    Err(error) => {
                        // Out of descriptors, most likely: trying again at once would spin.
                        tracing::warn!(%error, "the responder cannot accept");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
            }
        }
        drop((listener, stop));
        while connections.join_next().await.is_some() {}
        Ok(())
    }

    /// Serves on a thread of its own until the result is dropped.
    ///
    /// # Errors
    ///
    /// If the thread or its runtime cannot be had.
    pub fn start(self) -> io::Result<Running> {
        let (addr, counters) = (self.addr, self.counters());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("responder".to_owned()).spawn(move || {
            // An error means that `stop` was dropped, which is the signal as well.
            let shutdown = async { drop(stopped.await) };
            if let Err(error) = runtime.block_on(self.run(shutdown)) {
                tracing::error!(%error, "the responder cannot run");
            }
        })?;
        Ok(Running { addr, counters, stop: Some(stop), thread: Some(thread) })
    }
}

/// A responder on its own thread. Dropping it stops it and waits for its end.
#[derive(Debug)]
pub struct Running {
    addr: SocketAddr,
    counters: Arc<Counters>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it has seen.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the panic hook.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests;
