//! Both ends of TLS against each other, in memory.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};

use super::super::fixture::{Pair, pair};
use super::super::{ALPN_DOT, CIPHER, Channel, provider};
use super::*;

/// A wire with nobody at its other end yet: what was written can be read, and then it would block.
#[derive(Debug, Default)]
struct Wire {
    octets: Vec<u8>,
    /// Octets that it takes before it would block.
    room: Option<usize>,
    closed: bool,
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = into.len().min(self.octets.len());
        if count == 0 && !self.closed {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        into[..count].copy_from_slice(&self.octets[..count]);
        self.octets.drain(..count);
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let count = octets.len().min(self.room.unwrap_or(usize::MAX));
        if count == 0 && !octets.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room = self.room.map(|room| room - count);
        self.octets.extend_from_slice(&octets[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A client and a server, and what is on its way between them.
struct Ends {
    client: Channel,
    server: Channel,
    up: Wire,
    down: Wire,
}

struct Configs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

fn configs(versions: &[&'static rustls::SupportedProtocolVersion], alpn: &[&[u8]]) -> Configs {
    let Pair { certificate, key } = pair("dns.example");
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let mut server = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap())
        .unwrap();
    server.alpn_protocols = vec![ALPN_DOT.to_vec()];
    Configs { client: Arc::new(client), server: Arc::new(server) }
}

impl Ends {
    fn new(configs: &Configs) -> Self {
        let name = ServerName::try_from("dns.example").unwrap();
        Self {
            client: Channel::Tls(Box::new(TlsStream::client(Arc::clone(&configs.client), name).unwrap())),
            server: Channel::Tls(Box::new(TlsStream::server(Arc::clone(&configs.server)).unwrap())),
            up: Wire::default(),
            down: Wire::default(),
        }
    }

    fn shaken(configs: &Configs) -> Self {
        let mut ends = Self::new(configs);
        ends.shake_hands().unwrap();
        ends
    }

    /// Carries octets to and fro until the handshake is over, or fails at one of the ends.
    fn shake_hands(&mut self) -> io::Result<()> {
        for _ in 0..10 {
            self.client.flush(&mut self.up)?;
            assert_eq!(read(&mut self.server, &mut self.up, CIPHER)?, b"");
            self.server.flush(&mut self.down)?;
            assert_eq!(read(&mut self.client, &mut self.down, CIPHER)?, b"");
            if !self.client.is_handshaking() && !self.server.is_handshaking() {
                self.server.flush(&mut self.down)?;
                return Ok(());
            }
        }
        panic!("no end to it");
    }
}

/// All plaintext that can be had, with reads of at most this many octets of ciphertext.
fn read(channel: &mut Channel, wire: &mut Wire, at_a_time: usize) -> io::Result<Vec<u8>> {
    let (mut all, mut room, mut cipher) = (Vec::new(), vec![0; CIPHER + SLACK], vec![0; at_a_time]);
    loop {
        match channel.read(&mut room, &mut cipher, wire) {
            Ok(0) => return Ok(all),
            Ok(count) => all.extend_from_slice(&room[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(all),
            Err(error) => return Err(error),
        }
    }
}

fn write(channel: &mut Channel, mut octets: &[u8], wire: &mut Wire) {
    while !octets.is_empty() {
        let written = channel.write(octets, wire).unwrap();
        octets = &octets[written..];
    }
}

#[test]
fn what_is_written_is_read_at_the_other_end() {
    for versions in [[&TLS12], [&TLS13]] {
        let mut ends = Ends::shaken(&configs(&versions, &[ALPN_DOT]));
        for length in [1, 100, RECORD, RECORD + 1, 70_000, 300_000] {
            let message: Vec<u8> = (0..length).map(|at| at as u8).collect();
            write(&mut ends.client, &message, &mut ends.up);
            assert_eq!(read(&mut ends.server, &mut ends.up, CIPHER).unwrap(), message, "{length}");
            write(&mut ends.server, &message, &mut ends.down);
            assert_eq!(read(&mut ends.client, &mut ends.down, CIPHER).unwrap(), message, "{length}");
        }
        let Channel::Tls(server) = &ends.server else { unreachable!() };
        assert!(!server.has_outgoing() && server.unsent == 0);
    }
}

/// Behaviour 44: wherever the network cuts it, also in the handshake.
#[test]
fn octet_by_octet_it_is_the_same() {
    for versions in [[&TLS12], [&TLS13]] {
        let mut ends = Ends::new(&configs(&versions, &[]));
        for _ in 0..10 {
            ends.client.flush(&mut ends.up).unwrap();
            assert_eq!(read(&mut ends.server, &mut ends.up, 1).unwrap(), b"");
            ends.server.flush(&mut ends.down).unwrap();
            assert_eq!(read(&mut ends.client, &mut ends.down, 1).unwrap(), b"");
        }
        assert!(!ends.client.is_handshaking() && !ends.server.is_handshaking());
        let message: Vec<u8> = (0..20_000).map(|at| at as u8).collect();
        write(&mut ends.client, &message, &mut ends.up);
        assert_eq!(read(&mut ends.server, &mut ends.up, 1).unwrap(), message);
    }
}

#[test]
fn what_was_agreed_on_is_told() {
    let ends = Ends::shaken(&configs(&[&TLS13], &[b"h2", ALPN_DOT]));
    let seen = ends.server.negotiated().unwrap();
    let server_name = Some("dns.example".to_owned());
    let (alpn, cipher) = (Some(ALPN_DOT.to_vec()), "TLS_AES_256_GCM_SHA384");
    assert_eq!(seen, Negotiated { version: Version::Tls13, cipher, alpn, server_name, resumed: false });
    assert_eq!(ends.client.negotiated().unwrap().server_name, None);

    let ends = Ends::shaken(&configs(&[&TLS12], &[]));
    let seen = ends.server.negotiated().unwrap();
    assert_eq!((seen.version, seen.alpn), (Version::Tls12, None), "a client without ALPN is served");
    assert_eq!(seen.cipher, "ECDHE-ECDSA-AES256-GCM-SHA384");
}

#[test]
fn every_suite_has_a_name() {
    for suite in &provider().cipher_suites {
        assert_ne!(cipher_name(suite.suite()), "unknown", "{suite:?}");
    }
}

#[test]
fn a_client_of_another_protocol_is_told_so() {
    let mut ends = Ends::new(&configs(&[&TLS13], &[b"h2"]));
    let error = ends.shake_hands().unwrap_err();
    assert_eq!(fault(&error), Some(&TlsFault::Tls(rustls::Error::NoApplicationProtocol)));
    ends.server.flush(&mut ends.down).unwrap();
    let error = read(&mut ends.client, &mut ends.down, CIPHER).unwrap_err();
    let alert = rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol);
    assert_eq!(fault(&error), Some(&TlsFault::Tls(alert)));
}

#[test]
fn what_is_no_tls_is_an_error_and_not_read_on() {
    let configs = configs(&[&TLS13], &[]);
    // A query in the clear, the beginning of HTTP, and zeros.
    for octets in [&b"\0\x1d\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a"[..], b"GET / HTTP/1.1\r\n\r\n", &[0; 64]] {
        let mut ends = Ends::new(&configs);
        ends.up.octets.extend_from_slice(octets);
        let error = read(&mut ends.server, &mut ends.up, CIPHER).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(fault(&error).is_some(), "{error}");
        // It stays one.
        ends.up.octets.extend_from_slice(octets);
        assert!(read(&mut ends.server, &mut ends.up, CIPHER).is_err());
    }
}

#[test]
fn until_a_record_has_left_its_plaintext_counts_as_not_written() {
    let mut ends = Ends::shaken(&configs(&[&TLS13], &[]));
    read(&mut ends.client, &mut ends.down, CIPHER).unwrap();
    let message = vec![7; 3 * RECORD];
    ends.down.room = Some(100);
    for _ in 0..5 {
        let error = ends.server.write(&message, &mut ends.down).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(ends.server.has_outgoing());
    }
    ends.down.room = Some(RECORD);
    // The rest of the first record, and no more than that.
    assert_eq!(ends.server.write(&message, &mut ends.down).unwrap(), RECORD);
    ends.down.room = None;
    write(&mut ends.server, &message[RECORD..], &mut ends.down);
    assert_eq!(read(&mut ends.client, &mut ends.down, CIPHER).unwrap(), message, "nothing twice, nothing lost");
}

#[test]
fn nothing_is_written_before_the_handshake_is_over() {
    let mut ends = Ends::new(&configs(&[&TLS13], &[]));
    let error = ends.client.write(b"query", &mut ends.up).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(!ends.up.octets.is_empty(), "but the handshake begins");
    ends.shake_hands().unwrap();
    write(&mut ends.client, b"query", &mut ends.up);
    assert_eq!(read(&mut ends.server, &mut ends.up, CIPHER).unwrap(), b"query");
}

#[test]
fn close_notify_ends_one_direction() {
    for versions in [[&TLS12], [&TLS13]] {
        let mut ends = Ends::shaken(&configs(&versions, &[]));
        write(&mut ends.client, b"last", &mut ends.up);
        ends.client.close();
        ends.client.close();
        ends.client.flush(&mut ends.up).unwrap();
        ends.up.octets.extend_from_slice(b"what comes behind it is nothing");
        let (mut room, mut cipher) = (vec![0; CIPHER + SLACK], vec![0; CIPHER]);
        assert_eq!(ends.server.read(&mut room, &mut cipher, &mut ends.up).unwrap(), 4);
        for _ in 0..3 {
            assert_eq!(ends.server.read(&mut room, &mut cipher, &mut ends.up).unwrap(), 0);
        }
        // The other direction is open.
        write(&mut ends.server, b"answer", &mut ends.down);
        assert_eq!(read(&mut ends.client, &mut ends.down, CIPHER).unwrap(), b"answer");
    }
}

#[test]
fn an_end_without_close_notify_is_an_end() {
    let mut ends = Ends::shaken(&configs(&[&TLS13], &[]));
    ends.up.closed = true;
    assert_eq!(ends.server.read(&mut vec![0; CIPHER + SLACK], &mut [0; CIPHER], &mut ends.up).unwrap(), 0);
    let Channel::Tls(server) = &ends.server else { unreachable!() };
    assert!(!server.peer_has_closed());
}

/// F42: who asks for new keys again and again without saying anything is not obeyed for ever.
#[test]
fn a_flood_of_key_updates_is_refused() {
    let mut ends = Ends::shaken(&configs(&[&TLS13], &[]));
    let mut refused = false;
    for _ in 0..100 {
        let Channel::Tls(client) = &mut ends.client else { unreachable!() };
        client.conn.refresh_traffic_keys().unwrap();
        ends.client.flush(&mut ends.up).unwrap();
        if read(&mut ends.server, &mut ends.up, CIPHER).is_err() {
            refused = true;
            break;
        }
        ends.server.flush(&mut ends.down).unwrap();
        assert!(ends.down.octets.len() < 4096, "nor is it answered at length");
        ends.down.octets.clear();
    }
    assert!(refused);
}

#[test]
fn plain_is_the_socket_itself() {
    let (mut channel, mut wire) = (Channel::default(), Wire::default());
    assert_eq!(channel.write(b"query", &mut wire).unwrap(), 5);
    assert_eq!(read(&mut channel, &mut wire, 0).unwrap(), b"query");
    channel.close();
    channel.flush(&mut wire).unwrap();
    assert!(!channel.has_outgoing() && !channel.is_handshaking() && channel.negotiated().is_none());
}
