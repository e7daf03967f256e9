//! The operator's side: `/metrics`, `/healthz`, `/readyz`, a status page and `/api/v1/` over HTTP, and commands over a unix
//! socket.
//!
//! One thread with a runtime of its own. It reads atomics and the watchdog's reports, so it can neither block a worker
//! nor be blocked by one; what a peer can make it hold is bounded ([`guard`]).

mod api;
mod drain;
mod guard;
mod http;
mod order;
mod page;
mod places;
mod ready;
mod reload;
mod scrape;
mod show;
mod socket;
mod token;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::LocalSet;
use tokio::time::timeout;

use crate::app::order::Orders;
use crate::config;
use crate::drill::Setup;
use crate::metrics::Metrics;
use crate::watchdog::{Handle, Live};
use api::Api;
pub(crate) use guard::serve as serve_router;
pub(crate) use scrape::scrape;
use socket::Bound;
pub(crate) use token::Token;
pub use token::TokenError;

/// For the last answers at the socket when the process ends.
const FAREWELL: std::time::Duration = std::time::Duration::from_millis(500);

/// Why the admin side cannot start; names the address or the path.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The HTTP address cannot be bound.
    #[error("admin.http {address}: {cause}")]
    Http {
        /// `[admin] http`
        address: SocketAddr,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The unix socket cannot be made.
    #[error("admin.socket {}: {cause}", .path.display())]
    Socket {
        /// `[admin] socket`
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The token cannot be had.
    #[error("admin.token_file {}: {cause}", .path.display())]
    Token {
        /// `[admin] token_file`
        path: PathBuf,
        /// What is wrong with it.
        cause: TokenError,
    },
    /// The thread or its runtime cannot be started, or the drill's shard is taken.
    #[error("admin: {0}")]
    Start(io::Error),
}

impl From<io::Error> for AdminError {
    fn from(error: io::Error) -> Self {
        Self::Start(error)
    }
}

/// The running admin side; ends, and removes its socket, when it is dropped.
pub struct Admin {
    http: Option<SocketAddr>,
    socket: Option<PathBuf>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("http", &self.http).field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Admin {
    /// Where HTTP is served, with the real port.
    pub fn http(&self) -> Option<SocketAddr> {
        self.http
    }

    /// The unix socket.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // Dropping the sender is the signal.
        self.stop.take();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the admin thread has panicked");
        }
    }
}

/// What requests are answered from.
#[derive(Clone, Debug)]
pub struct Served {
    /// What there is to be seen.
    pub live: Live,
    /// The watchdog's answers.
    pub watchdog: Handle,
    /// What `/metrics` shows.
    pub metrics: Arc<Metrics>,
    /// The way to the main thread.
    pub orders: Orders,
}

/// What `[admin]` asks for, bound but not served yet.
#[derive(Debug)]
pub struct Doors {
    http: Option<TcpListener>,
    token: Option<Token>,
    socket: Option<Bound>,
}

impl Doors {
    /// Binds both and reads the token: this may take privileges that the threads of the process do not have later.
    ///
    /// # Errors
    /// An address or a path cannot be bound, or the token cannot be relied on.
    pub fn bind(config: &config::Admin) -> Result<Self, AdminError> {
        let http = config.http.map(bind_http).transpose()?;
        let token = |path: &PathBuf| Token::read(path).map_err(|cause| AdminError::Token { path: path.clone(), cause });
        let token = config.token_file.as_ref().map(token).transpose()?;
        let socket = match &config.socket {
            None => None,
            Some(path) => Some(Bound::new(path).map_err(|cause| AdminError::Socket { path: path.clone(), cause })?),
        };
        Ok(Self { http, token, socket })
    }
}

/// Starts the thread that serves behind `doors`. Drills belong to it, too.
///
/// # Errors
/// The thread cannot be started.
pub fn start(served: Served, drill: Setup, doors: Doors) -> Result<Admin, AdminError> {
    let Doors { http, token, socket: bound } = doors;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let address = http.as_ref().map(TcpListener::local_addr).transpose()?;
    let path = bound.as_ref().map(|bound| bound.path().to_owned());
    let (stop, stopped) = oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
        if let Err(error) = serve(&runtime, served, http.map(|http| (http, token)), bound, drill, stopped) {
            tracing::error!(%error, "the admin side has ended");
        }
    })?;
    Ok(Admin { http: address, socket: path, stop: Some(stop), thread: Some(thread) })
}

fn bind_http(address: SocketAddr) -> Result<TcpListener, AdminError> {
    TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|cause| AdminError::Http { address, cause })
}

/// Until `stopped` resolves. Everything that was spawned ends with the `LocalSet`.
fn serve(
    runtime: &Runtime,
    served: Served,
    http: Option<(TcpListener, Option<Token>)>,
    bound: Option<Bound>,
    drill: Setup,
    stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let local = LocalSet::new();
    local.block_on(runtime, async {
        let drill = drill.start(served.live.clone(), served.watchdog.clone(), Arc::clone(&served.metrics))?;
        let places = Arc::new(Semaphore::new(socket::MAX_CONNECTIONS));
        if let Some((listener, token)) = http {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let api = Api::new(served.clone(), Rc::clone(&drill), Arc::clone(&places), token);
            tokio::task::spawn_local(http::serve(listener, served.clone(), api));
        }
        if let Some(bound) = bound {
            tokio::task::spawn_local(socket::serve(bound.listen()?, served, Rc::clone(&drill), Arc::clone(&places)));
        }
        // The sender is never used, only dropped.
        let _ = stopped.await;
        // Who waits for the end is told of it: an answer that is under way gets there, all places are free then.
        let _ = timeout(FAREWELL, places.acquire_many(socket::MAX_CONNECTIONS as u32)).await;
        Ok(())
    })
}

#[cfg(test)]
#[path = "admin_tests.rs"]
mod tests;
