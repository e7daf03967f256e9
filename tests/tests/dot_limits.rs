//! The limits on clients hold over TLS as without it, and the handshake has its own.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received, Tls};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::proxy_header::{v1, v2};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);
const NAME: &str = "dns.example";

/// A DoT listener in front of a backend, and how its clients speak.
fn config(backend: SocketAddr) -> (Authority, Config, Tls) {
    let authority = Authority::new();
    let config = Config::new(backend)
        .set("connections", "idle_timeout", "\"300ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .tls(&authority.issue("dns", &[NAME]));
    let tls = Tls::new(&authority.ca, NAME).offering(&["dot"]);
    (authority, config, tls)
}

/// Silent clients, one that drips its hello, and one that says hello and then nothing: each has its time, and who is in is
/// served meanwhile (CVE-2024-28854). `isolation_handshakes.rs` has what becomes of those who come when all places are taken.
#[test]
fn f02_slow_and_silent_handshakes() {
    const PLACES: usize = 6;
    const TIME: Duration = Duration::from_secs(2);
    let backend = FakeBackend::answering(false);
    let (_files, config, tls) = config(backend.address);
    let config = config.set("server", "workers", 2).set("listener.tls", "max_handshakes", PLACES).set(
        "listener.tls",
        "handshake_timeout",
        "\"2s\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let mut served = Client::connect_tls(counterfoil.address, None, &tls);
    served.assert_served();

    let begun = Instant::now();
    let mut slow: Vec<Client> = (0..PLACES).map(|_| counterfoil.client()).collect();
    slow[4].send_raw(&tls.hello()).unwrap();
    counterfoil.wait_metrics("all places are taken", SOON, |metrics| {
        metrics.sum("client_connections_pending", &[("stage", "tls_handshake")]) == PLACES as f64
    });
    let hello = tls.hello();
    let mut dripped = 0;
    while begun.elapsed() < TIME && dripped < hello.len() {
        served.assert_served();
        if slow[5].send_raw(&hello[dripped..=dripped]).is_err() {
            break;
        }
        dripped += 1;
        // The pace of the drip, not a wait for something.
        std::thread::sleep(Duration::from_millis(50));
    }
    for client in &mut slow {
        let mut rest = Vec::new();
        let end = client.read_to_end(&mut rest, SOON);
        assert!(matches!(end, Received::Closed | Received::Reset), "{end:?}");
    }
    assert!(begun.elapsed() >= TIME && begun.elapsed() < 3 * TIME, "{:?}", begun.elapsed());
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("tls_handshake_failures_total", &[("reason", "timeout")]), PLACES as f64);
    // The places are free again.
    Client::connect_tls(counterfoil.address, None, &tls).assert_served();
    served.assert_served();
    drop(served);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("client_connections_pending", &[]), 0.0);
}

/// dnsdist's behaviour 30 over TLS, and the limit of one client, whose handshakes count.
#[test]
fn connections_are_limited() {
    let backend = FakeBackend::answering(false);
    let (_files, config, tls) = config(backend.address);
    let config = config.set("listener", "max_connections", 10).set("listener", "max_connections_per_client", 4).set(
        "overload",
        "threshold",
        100,
    );
    let counterfoil = Counterfoil::start(&config);
    let connect = |source: &str| counterfoil.client_from(source).over_tls(&tls);
    let mut clients: Vec<Client> = (0..4).map(|_| connect("127.0.0.2").unwrap()).collect();
    clients.iter_mut().for_each(Client::assert_served);
    assert!(connect("127.0.0.2").is_err());
    assert_eq!(counterfoil.refused("per_client"), 1.0);
    // Two that do not even begin their handshake, and four that do.
    let silent = [counterfoil.client_from("127.0.0.3"), counterfoil.client_from("127.0.0.3")];
    counterfoil.wait_metrics("they count", SOON, |metrics| metrics.sum("client_connections_pending", &[]) == 2.0);
    clients.extend((0..2).map(|_| connect("127.0.0.3").unwrap()));
    assert!(connect("127.0.0.3").is_err(), "the handshakes that it does not go on with are its own");
    clients.extend((0..2).map(|_| connect("127.0.0.4").unwrap()));
    assert!(connect("127.0.0.5").is_err());
    assert_eq!((counterfoil.refused("per_client"), counterfoil.refused("per_listener")), (2.0, 1.0));
    clients.iter_mut().for_each(Client::assert_served);
    drop((clients, silent));
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("tls_handshake_failures_total", &[("reason", "closed")]), 2.0);
    connect("127.0.0.5").unwrap().assert_served();
}

/// Each end that the server makes is said by close_notify.
#[test]
fn times_and_numbers_are_limited_and_the_end_is_orderly() {
    let backend = FakeBackend::answering(false);
    let partial = &message::framed(&message::query(1, "partial.example.test", qtype::A))[..20];
    for (key, value, octets, reason) in [
        ("idle_timeout", "\"500ms\"", &b""[..], "idle_timeout"),
        ("message_timeout", "\"500ms\"", partial, "message_timeout"),
        ("max_connection_duration", "\"1s\"", &[][..], "max_duration"),
        ("max_queries_per_connection", "1", &[][..], "max_queries"),
        ("max_in_flight", "1", &[0, 5, 1, 2, 3, 4, 5], "malformed"),
    ] {
        let (_files, config, tls) = config(backend.address);
        let counterfoil = Counterfoil::start(&config.set("listener", key, value));
        let mut client = Client::connect_tls(counterfoil.address, None, &tls);
        client.assert_served();
        // What is over already may be closed.
        let _ = client.send_raw(octets);
        assert_eq!(client.receive(SOON), Received::Closed, "{reason}");
        counterfoil.wait_metrics(reason, SOON, |metrics| {
            metrics.sum("client_connections_closed_total", &[("reason", reason)]) == 1.0
        });
        drop(client);
        counterfoil.assert_quiescent();
    }
}

#[test]
fn max_in_flight_holds_and_loses_nothing() {
    let backend = FakeBackend::start(|connection| {
        let mut held = Vec::new();
        loop {
            match connection.query_within(Duration::from_millis(100)) {
                Ok(Some(query)) => held.push(query),
                Ok(None) => return,
                Err(_) => {
                    assert!(held.len() <= 4, "{} at once", held.len());
                    for query in held.drain(..) {
                        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                    }
                }
            }
        }
    });
    let (_files, config, tls) = config(backend.address);
    let counterfoil = Counterfoil::start(&config.set("listener", "max_in_flight", 4));
    let mut client = Client::connect_tls(counterfoil.address, None, &tls);
    Load { count: 40, in_flight: 40, ..Load::default() }.run(&mut client).assert_all_answered(40);
    drop(client);
    counterfoil.assert_quiescent();
}

/// It is closed after `write_timeout`, keeps little memory until then, and nobody else waits for it.
#[test]
fn a_client_that_does_not_read_is_closed() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            answer.resize(answer.len() + 30_000, 0);
            connection.send(&answer);
        }
    });
    let (_files, config, tls) = config(backend.address);
    let counterfoil = Counterfoil::start(&config.set("listener", "write_timeout", "\"1s\""));
    let before = counterfoil.process.resident_bytes();
    let mut deaf = Client::connect_tls(counterfoil.address, None, &tls);
    let queries: Vec<u8> = (0..2000u16)
        .flat_map(|n| message::framed(&message::query(n, &format!("n{n}.example.test"), qtype::A)))
        .collect();
    deaf.send_raw(&queries).unwrap();
    let mut other = Client::connect_tls(counterfoil.address, None, &tls);
    counterfoil.wait_metrics("the deaf client is closed", Duration::from_secs(20), |metrics| {
        let start = Instant::now();
        other.exchange(1, "other.example.test", qtype::A);
        assert!(start.elapsed() < Duration::from_secs(2), "others wait for it: {:?}", start.elapsed());
        metrics.sum("client_connections_closed_total", &[("reason", "write_timeout")]) == 1.0
    });
    let grown = counterfoil.process.resident_bytes().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} octets of memory");
    drop((deaf, other));
    counterfoil.assert_quiescent();
}

/// SIGTERM: what is in flight is answered, who is idle hears close_notify, who is in its handshake may end it, and who is
/// silent does not hold it up.
#[test]
fn draining_ends_in_order() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            if message::question_name(&query).is_some_and(|name| name.starts_with("slow")) {
                // Nobody else asks on this connection.
                assert!(connection.query_within(Duration::from_secs(1)).is_err());
            }
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let (_files, config, tls) = config(backend.address);
    let mut counterfoil = Counterfoil::start(&config.set("server", "drain_timeout", "\"5s\""));
    let mut idle = Client::connect_tls(counterfoil.address, None, &tls);
    idle.assert_served();
    let mut asking = Client::connect_tls(counterfoil.address, None, &tls);
    asking.ask(1, "slow.example.test", qtype::A);
    wait::until("the query is there", SOON, || backend.queries() == 2);
    let silent = counterfoil.client();
    counterfoil.wait_metrics("it is in", SOON, |metrics| metrics.sum("client_connections_pending", &[]) == 1.0);
    counterfoil.process.signal(rustix::process::Signal::TERM);
    assert_eq!(message::response_code(&asking.receive(SOON).message()), rcode::NOERROR);
    assert_eq!((asking.receive(SOON), idle.receive(SOON)), (Received::Closed, Received::Closed));
    let status = counterfoil.process.wait_exit(Duration::from_secs(15));
    assert!(status.success(), "{status}");
    drop(silent);
}

/// A ClientHello whose version field says this, with a cipher suite of TLS 1.0 and, if any, these extensions.
fn hello(version: [u8; 2], extensions: &[u8]) -> Vec<u8> {
    let mut body = [&version[..], &[7; 32], &[0, 0, 2, 0xc0, 0x13, 1, 0]].concat();
    if !extensions.is_empty() {
        body.extend_from_slice(&u16::try_from(extensions.len()).unwrap().to_be_bytes());
        body.extend_from_slice(extensions);
    }
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let message = [&[1][..], &length[1..], &body].concat();
    [&[22, 3, 1][..], &u16::try_from(message.len()).unwrap().to_be_bytes(), &message].concat()
}

/// Clients of SSL 3, TLS 1.0 and 1.1 have no common version with us, whatever else they lack; one of TLS 1.2 lacks something
/// else.
#[test]
fn clients_of_old_versions_are_counted_as_such() {
    /// `supported_groups` with secp256r1, and `supported_versions` with TLS 1.1 and 1.0.
    const GROUPS: &[u8] = &[0, 10, 0, 4, 0, 2, 0, 23];
    const OLD_VERSIONS: &[u8] = &[0, 43, 0, 5, 4, 3, 2, 3, 1];
    /// `signature_algorithms` with ecdsa_secp256r1_sha256.
    const SIGNATURES: &[u8] = &[0, 13, 0, 4, 0, 2, 4, 3];
    let backend = FakeBackend::answering(false);
    let (_files, config, tls) = config(backend.address);
    let counterfoil = Counterfoil::start(&config);
    let all = [GROUPS, SIGNATURES, OLD_VERSIONS].concat();
    let with_signatures = [GROUPS, SIGNATURES].concat();
    let old = [
        hello([3, 0], &[]),
        hello([3, 1], &[]),
        hello([3, 1], GROUPS),
        hello([3, 2], GROUPS),
        hello([3, 2], &with_signatures),
        hello([3, 3], &all),
    ];
    let failed = |reason| counterfoil.metrics().sum("tls_handshake_failures_total", &[("reason", reason)]);
    for (number, hello) in old.iter().enumerate() {
        // At once, and cut where the version is.
        for cut in [hello.len(), 10] {
            let mut client = counterfoil.client();
            client.send_raw(&hello[..cut]).unwrap();
            client.send_raw(&hello[cut..]).unwrap();
            client.read_to_end(&mut Vec::new(), SOON);
        }
        assert_eq!(failed("version"), 2.0 * (number + 1) as f64, "{hello:02x?}");
    }
    let mut client = counterfoil.client();
    client.send_raw(&hello([3, 3], GROUPS)).unwrap();
    client.read_to_end(&mut Vec::new(), SOON);
    assert_eq!((failed("incompatible"), failed("version")), (1.0, 2.0 * old.len() as f64));
    Client::connect_tls(counterfoil.address, None, &tls).assert_served();
    counterfoil.assert_quiescent();
}

/// A load balancer speaks PROXY to a listener that expects none, or not from it: said by that name, as in the clear, and
/// not as a client that speaks no TLS.
#[test]
fn a_proxy_header_in_front_of_tls_is_not_taken_from_everybody() {
    let backend = FakeBackend::answering(false);
    let headers = [v2("192.0.2.1:4", "198.51.100.1:853", &[]), v1("192.0.2.1:4", "198.51.100.1:853")];
    for accepts in [false, true] {
        let (_files, config, tls) = config(backend.address);
        let counterfoil = Counterfoil::start(&if accepts { config.accept_proxy(&["127.0.0.9"]) } else { config });
        for (number, header) in headers.iter().enumerate() {
            // With the hello behind it, and in pieces.
            let all = [&header[..], &tls.hello()].concat();
            for cut in [all.len(), 3] {
                let mut client = counterfoil.client_from("127.0.0.5");
                client.send_raw(&all[..cut]).unwrap();
                let _ = client.send_raw(&all[cut..]);
                client.assert_ended(SOON);
            }
            assert_eq!(counterfoil.refused("proxy_untrusted"), 2.0 * (number + 1) as f64);
        }
        assert_eq!(counterfoil.metrics().sum("tls_handshake_failures_total", &[]), 0.0);
        // One that speaks no TLS is told apart.
        let mut plain = counterfoil.client_from("127.0.0.5");
        plain.send_raw(b"POST / HTTP/1.1\r\n\r\n").unwrap();
        plain.assert_ended(SOON);
        assert_eq!(counterfoil.metrics().sum("tls_handshake_failures_total", &[("reason", "not_tls")]), 1.0);
        drop(plain);
        counterfoil.assert_quiescent();
    }
}
