//! The server's side: who a listener is, and what its connections begin with. Shared by all workers, so that a session
//! that one of them began can be resumed at any other.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::ring::Ticketer;
use rustls::server::{NoServerSessionStorage, ProducesTickets};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use super::pem::{self, PemError};
use super::{ALPN_DOT, TlsFault, provider, x509};
use crate::config::{Config, ListenerTls};

/// A certificate and its key.
#[derive(Clone)]
pub struct Identity(Arc<CertifiedKey>);

impl Identity {
    /// From PEM files.
    ///
    /// # Errors
    ///
    /// They cannot be read, or are of no use.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, PemError> {
        Ok(Self(Arc::new(pem::certified_key(certificate, key)?)))
    }

    /// The certificates in DER, the server's own first.
    pub fn certificates(&self) -> impl Iterator<Item = &[u8]> {
        self.0.cert.iter().map(|certificate| &**certificate)
    }

    /// When the server's own certificate ends, unix time; not those of the authorities behind it.
    pub fn not_after(&self) -> Option<i64> {
        x509::not_after(self.0.cert.first()?)
    }
}

/// That of the certificates, in which the key's public half is.
impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.0.cert == other.0.cert
    }
}

impl Eq for Identity {}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} certificates", self.0.cert.len())
    }
}

/// TLS on all listeners.
#[derive(Debug)]
pub struct ServerTls {
    listeners: Box<[OfListener]>,
}

#[derive(Debug)]
struct OfListener {
    /// Whether `greeting` is there: asked without a lock, as most listeners have none.
    on: AtomicBool,
    greeting: Mutex<Option<Greeting>>,
    /// Makes and reads the tickets by which sessions are resumed (RFC 8446 section 2.2, RFC 5077), with keys that change
    /// every six hours. It outlives the certificate.
    tickets: Arc<dyn ProducesTickets>,
}

/// What a new connection to a listener begins with.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// Certificate, versions, protocols.
    pub config: Arc<ServerConfig>,
    /// For the handshake.
    pub timeout: Duration,
}

impl ServerTls {
    /// That of a configuration.
    ///
    /// # Errors
    ///
    /// There are no random numbers, or the certificates were not read.
    pub fn new(config: &Config) -> Result<Arc<Self>, TlsFault> {
        let of_listener = |_| {
            let tickets = Ticketer::new()?;
            Ok(OfListener { on: AtomicBool::new(false), greeting: Mutex::default(), tickets })
        };
        let listeners = config.listeners.iter().map(of_listener).collect::<Result<_, TlsFault>>()?;
        let this = Self { listeners };
        this.adopt(config)?;
        Ok(Arc::new(this))
    }

    /// New connections have that of another configuration with the same listeners from now on. Those that are open are as
    /// they were, and tickets go on to be good.
    ///
    /// # Errors
    ///
    /// The certificates were not read. Nothing is changed then.
    pub fn adopt(&self, config: &Config) -> Result<(), TlsFault> {
        let places = || self.listeners.iter().zip(&config.listeners);
        let greet = |(ours, listener): (&OfListener, &crate::config::Listener)| {
            listener.tls.as_ref().map(|tls| ours.greet(tls)).transpose()
        };
        let greetings = places().map(greet).collect::<Result<Vec<_>, _>>()?;
        for ((ours, _), greeting) in places().zip(greetings) {
            ours.on.store(greeting.is_some(), Ordering::Relaxed);
            *ours.greeting.lock().unwrap_or_else(PoisonError::into_inner) = greeting;
        }
        Ok(())
    }

    /// For a new connection to this listener; none if it is in the clear.
    pub fn greeting(&self, listener: u16) -> Option<Greeting> {
        let ours = self.listeners.get(usize::from(listener))?;
        if !ours.on.load(Ordering::Relaxed) {
            return None;
        }
        ours.greeting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl OfListener {
    fn greet(&self, tls: &ListenerTls) -> Result<Greeting, TlsFault> {
        let Some(Identity(identity)) = &tls.identity else {
            return Err(rustls::Error::NoCertificatesPresented.into());
        };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::clone(identity))));
        config.alpn_protocols = vec![ALPN_DOT.to_vec()];
        config.ticketer = Arc::clone(&self.tickets);
        // Tickets only: clients keep what resumes their sessions, not we.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Greeting { config: Arc::new(config), timeout: tls.handshake_timeout })
    }
}
