//! The server's end of TLS on a scripted connection.

use std::sync::Arc;
use std::time::Instant;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, SupportedProtocolVersion};

use super::{Connection, FakeBackend, PATIENCE};
use crate::certificates::Certificate;
use crate::message;

/// TLS 1.2 and 1.3, one at a time.
pub fn tls_versions() -> [&'static SupportedProtocolVersion; 2] {
    [&rustls::version::TLS12, &rustls::version::TLS13]
}

/// What a server with this certificate does: these versions, sessions that can be resumed, ALPN `dot`.
///
/// # Panics
/// If the files hold no certificate with its key.
pub fn server_config(certificate: &Certificate, versions: &[&'static SupportedProtocolVersion]) -> Arc<ServerConfig> {
    let chain = CertificateDer::pem_file_iter(&certificate.certificate).expect("a file");
    let chain = chain.map(|certificate| certificate.expect("a certificate")).collect();
    let key = PrivateKeyDer::from_pem_file(&certificate.key).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(versions).expect("versions");
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key).expect("a pair");
    config.alpn_protocols = vec![b"dot".to_vec()];
    Arc::new(config)
}

impl FakeBackend {
    /// One that answers every query over TLS with an A record, in order. Who fails the handshake is left.
    pub fn answering_dot(config: &Arc<ServerConfig>) -> Self {
        let config = Arc::clone(config);
        Self::start(move |connection| {
            if connection.secure(&config) {
                connection.answer_all();
            }
        })
    }
}

impl Connection {
    /// Answers every query with an A record, in order.
    pub fn answer_all(&mut self) {
        while let Some(query) = self.query() {
            self.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    }

    /// Does the TLS handshake: from here on queries and answers go over it. False if it fails or the peer leaves.
    ///
    /// # Panics
    /// If the configuration is of no use.
    pub fn secure(&mut self, config: &Arc<ServerConfig>) -> bool {
        let end = Instant::now() + PATIENCE;
        self.tls = Some(ServerConnection::new(Arc::clone(config)).expect("a configuration"));
        // What came behind the header.
        let first = std::mem::take(&mut self.received);
        let mut goes_on = self.take(&first);
        while goes_on && self.tls().is_handshaking() {
            goes_on = self.fill(end) == Ok(true);
        }
        goes_on
    }

    /// The session.
    ///
    /// # Panics
    /// If there is none.
    pub fn tls(&mut self) -> &mut ServerConnection {
        self.tls.as_mut().expect("TLS")
    }

    /// Takes what the socket gave. False if that is no TLS although it should be.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> bool {
        let Some(tls) = &mut self.tls else {
            self.received.extend_from_slice(bytes);
            return true;
        };
        let mut is_tls = true;
        while is_tls && !bytes.is_empty() && matches!(tls.read_tls(&mut bytes), Ok(1..)) {
            is_tls = tls.process_new_packets().is_ok();
            // What it says when there is nothing is no matter.
            let _ = std::io::Read::read_to_end(&mut tls.reader(), &mut self.received);
        }
        let has_closed = tls.process_new_packets().is_ok_and(|state| state.peer_has_closed());
        self.flush_tls();
        is_tls && !has_closed
    }

    /// Sends what TLS has to say.
    pub fn flush_tls(&mut self) {
        if let (Some(tls), Some(stream)) = (&mut self.tls, &mut self.stream) {
            while tls.wants_write() && tls.write_tls(stream).is_ok() {}
        }
    }
}
