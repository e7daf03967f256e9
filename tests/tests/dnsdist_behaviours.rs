//! What dnsdist's own tests ask of listeners, limits and incoming PROXY headers, asked of this program from outside. Where
//! it does something else on purpose, the comment says what and why. `dnsdist_scenarios.rs` has the backends' side.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::proxy_header::v2;

const SOON: Duration = Duration::from_secs(5);
const CLIENT: &str = "192.0.2.7:4007";
const SERVICE: &str = "198.51.100.53:53";

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"300ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

/// PROXY headers from 127.0.0.1 and to the backend.
fn proxied(backend: SocketAddr) -> Config {
    config(backend).identity("connection").accept_proxy(&["127.0.0.1"])
}

#[track_caller]
fn expect_served(client: &mut Client) {
    Load::default().run(client).assert_all_answered(1);
}

#[test]
fn header_expected_but_missing() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&proxied(backend.address));
    let mut client = counterfoil.client();
    client.ask(1, "missing.example.test", qtype::A);
    client.assert_closed(SOON);
    assert_eq!(backend.accepted(), 0);
    counterfoil.assert_quiescent();
}

/// What dnsdist's rules see, a template does: IPv6 in a header over IPv4.
#[test]
fn the_addresses_of_the_header_are_those_that_count() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&proxied(backend.address).tlv(0xe0, "{client_ip}"));
    let (source, destination) = ("[2001:db8::9]:999", "[2001:db8::53]:53");
    let mut client = counterfoil.client_behind("127.0.0.1", &v2(source, destination, &[]));
    assert_eq!(client.told(), format!("{source} {destination} e0=2001:db8::9"));
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn incoming_and_added_tlvs_are_forwarded() {
    let backend = FakeBackend::telling();
    let config = proxied(backend.address).tlv(0x00, "nul").tlv(0x01, "dns").tlv(0x2a, "static").tlv(0xef, "{listener}");
    let counterfoil = Counterfoil::start(&config);
    // (There it is 3 and 255: the one would be a checksum that is wrong, the other is reserved.)
    let mut client = counterfoil.client_behind("127.0.0.1", &v2(CLIENT, SERVICE, &[(2, b"foo"), (3 + 0xe0, b"bar")]));
    assert_eq!(client.told(), format!("{CLIENT} {SERVICE} 02=foo e3=bar 00=nul 01=dns 2a=static ef=dns"));
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn an_override_replaces_all_tlvs() {
    let backend = FakeBackend::telling();
    let config = proxied(backend.address).set("pool.proxy_protocol", "pass_incoming_tlvs", "false").tlv(0xe5, "new");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client_behind("127.0.0.1", &v2(CLIENT, SERVICE, &[(2, b"foo"), (0xe5, b"old")]));
    assert_eq!(client.told(), format!("{CLIENT} {SERVICE} e5=new"));
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn several_queries_on_one_connection_with_one_header() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&proxied(backend.address).tlv(0xe0, "added"));
    let mut client = counterfoil.client_behind("127.0.0.1", &v2(CLIENT, SERVICE, &[(2, b"foo"), (0xe3, b"bar")]));
    for _ in 0..6 {
        assert_eq!(client.told(), format!("{CLIENT} {SERVICE} 02=foo e3=bar e0=added"), "none is accumulated");
    }
    assert_eq!(backend.accepted(), 1);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn not_in_the_acl_and_no_header() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).accept_proxy(&["127.0.0.99"]));
    expect_served(&mut counterfoil.client());
    counterfoil.assert_quiescent();
}

#[test]
fn not_in_the_acl_but_a_header() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).accept_proxy(&["127.0.0.99"]));
    let mut client = counterfoil.client_behind("127.0.0.1", &v2(CLIENT, SERVICE, &[]));
    client.ask(1, "sent-with-a-header.example.test", qtype::A);
    client.assert_closed(SOON);
    assert_eq!(backend.accepted(), 0);
    counterfoil.assert_quiescent();
}

#[test]
fn disabled_on_the_listener_and_no_header() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    expect_served(&mut counterfoil.client());
    counterfoil.assert_quiescent();
}

#[test]
fn disabled_on_the_listener_but_a_header() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client_behind("127.0.0.1", &v2(CLIENT, SERVICE, &[]));
    client.ask(1, "sent-with-a-header.example.test", qtype::A);
    client.assert_closed(SOON);
    assert_eq!(backend.accepted(), 0);
    counterfoil.assert_quiescent();
}

#[test]
fn a_header_in_many_reads_an_invalid_one_and_one_that_stops() {
    let backend = FakeBackend::answering(false);
    let config =
        config(backend.address).accept_proxy(&["127.0.0.1"]).set("listener.accept_proxy", "timeout", "\"500ms\"");
    let counterfoil = Counterfoil::start(&config);
    let header = v2(CLIENT, SERVICE, &[(0xe0, b"value")]);
    let mut split = counterfoil.client();
    header.iter().for_each(|octet| split.send_raw(&[*octet]).unwrap());
    expect_served(&mut split);
    let mut invalid = header.clone();
    invalid[12] = 0x25;
    counterfoil.client_behind("127.0.0.1", &invalid).assert_closed(SOON);
    counterfoil.client_behind("127.0.0.1", &header[..20]).assert_closed(SOON);
    let refused = |reason| counterfoil.metrics().sum("client_connections_refused_total", &[("reason", reason)]);
    assert_eq!((refused("proxy_invalid"), refused("proxy_timeout")), (1.0, 1.0));
    drop(split);
    counterfoil.assert_quiescent();
}

#[test]
fn max_queries_per_connection() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_queries_per_connection", 5));
    // One after another, then all at once: five are answered, the sixth is not.
    let mut client = counterfoil.client();
    Load { count: 5, ..Load::default() }.run(&mut client).assert_all_answered(5);
    client.assert_closed(SOON);
    let mut client = counterfoil.client();
    let queries: Vec<u8> =
        (0..6).flat_map(|id| message::framed(&message::query(id, "six.example.test", qtype::A))).collect();
    client.send_raw(&queries).unwrap();
    let mut ids = [0; 5].map(|_: u16| message::id(&client.receive(SOON).message()));
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2, 3, 4]);
    client.assert_closed(SOON);
    drop(client);
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("client_connections_closed_total", &[("reason", "max_queries")]), 2.0);
    assert_eq!(metrics.sum("queries_total", &[]), 10.0);
}

#[test]
fn max_connections_per_client() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_connections_per_client", 3));
    let mut clients: Vec<Client> = (0..3).map(|_| counterfoil.client()).collect();
    clients.iter_mut().for_each(expect_served);
    counterfoil.client().assert_closed(SOON);
    clients.iter_mut().for_each(expect_served);
    drop(clients);
    counterfoil.assert_quiescent();
}

/// A client that sends an octet now and then, and whole queries too slowly for anything but its duration to end it.
#[test]
fn max_connection_duration_with_a_slow_drip() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address)
        .set("listener", "max_connection_duration", "\"2s\"")
        .set("listener", "message_timeout", "\"1m\"")
        .set("listener", "idle_timeout", "\"1m\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let start = Instant::now();
    expect_served(&mut client);
    let query = message::framed(&message::query(1, &format!("{}.example.test", "s".repeat(60)), qtype::A));
    let ended = client.drip(&query, Duration::from_millis(100));
    let taken = start.elapsed();
    assert!(matches!(ended, Received::Closed | Received::Reset), "{ended:?}");
    assert!(taken >= Duration::from_millis(1900) && taken < Duration::from_secs(4), "{taken:?}");
    drop(client);
    counterfoil.assert_quiescent();
    let reason = [("reason", "max_duration")];
    assert_eq!(counterfoil.metrics().sum("client_connections_closed_total", &reason), 1.0);
}

/// dnsdist counts reads per query and bans who needs too many. Here the time of a message is what is limited, so that the
/// cost of a drip is bounded without a ban, which would hit all who share the address.
#[test]
fn a_drip_is_closed() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "message_timeout", "\"500ms\""));
    let mut client = counterfoil.client();
    let start = Instant::now();
    let query = message::framed(&message::query(1, &format!("{}.example.test", "s".repeat(60)), qtype::A));
    let ended = client.drip(&query, Duration::from_millis(50));
    assert!(matches!(ended, Received::Closed | Received::Reset) && start.elapsed() < SOON, "{ended:?}");
    expect_served(&mut counterfoil.client());
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn connection_rate() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).set("listener", "connection_rate_per_client", 5).set(
        "listener",
        "ban_duration",
        "\"30s\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let mut clients: Vec<Client> = (0..12).map(|_| counterfoil.client()).collect();
    expect_served(&mut clients[0]);
    clients[11].assert_closed(SOON);
    for _ in 0..3 {
        counterfoil.client().assert_closed(SOON);
    }
    expect_served(&mut counterfoil.client_from("127.0.0.2"));
    let refused = |reason| counterfoil.metrics().sum("client_connections_refused_total", &[("reason", reason)]);
    assert_eq!(refused("connection_rate"), 1.0);
    assert!(refused("banned") >= 3.0);
    drop(clients);
    counterfoil.assert_quiescent();
}

#[test]
fn max_connections_of_a_listener() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_connections", 10));
    let mut clients: Vec<Client> = (0..10).map(|n| counterfoil.client_from(&format!("127.0.0.{}", n + 1))).collect();
    clients.iter_mut().for_each(expect_served);
    counterfoil.client_from("127.0.0.11").assert_closed(SOON);
    assert_eq!(counterfoil.metrics().sum("client_connections_refused_total", &[("reason", "per_listener")]), 1.0);
    clients.pop();
    counterfoil.wait_metrics("a place is free", SOON, |metrics| metrics.sum("client_connections", &[]) == 9.0);
    expect_served(&mut counterfoil.client_from("127.0.0.11"));
    drop(clients);
    counterfoil.assert_quiescent();
}

/// Answers of the program's own: FORMERR for a question that cannot be read, NOTIMP for DSO.
#[test]
fn own_answers_keep_the_connection() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    // A DSO message with ID 0 wants no answer.
    for id in 1..6 {
        let mut dso = message::query(id, "", qtype::A)[..message::HEADER_LEN].to_vec();
        (dso[2], dso[5]) = (6 << 3, 0);
        client.send_raw(&message::framed(&dso)).unwrap();
        assert_eq!(message::response_code(&client.receive(SOON).message()), 4, "NOTIMP");
        let mut broken = message::query(id, "broken.example.test", qtype::A);
        broken.truncate(20);
        client.send_raw(&message::framed(&broken)).unwrap();
        assert_eq!(message::response_code(&client.receive(SOON).message()), 1, "FORMERR");
    }
    expect_served(&mut client);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn servfail_keeps_the_connection() {
    let backend = FakeBackend::answering(false);
    backend.refuse();
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 0));
    let mut client = counterfoil.client();
    for id in 0..5 {
        let answer = client.exchange(id, "nobody.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// dnsdist closes. Here such a message is counted and gets no answer, and what else the client asks is answered: it may be
/// a forwarder that carries the queries of many.
#[test]
fn a_query_that_says_it_is_an_answer() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let mut message = message::query(1, "answer.example.test", qtype::A);
    message[2] |= 0x80;
    client.send_raw(&message::framed(&message)).unwrap();
    client.exchange(2, "query.example.test", qtype::A);
    assert_eq!(backend.queries(), 1);
    assert_eq!(counterfoil.metrics().sum("messages_ignored_total", &[]), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn fifty_connections_with_four_queries_each_interleaved() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut clients: Vec<Client> = (0..50).map(|_| counterfoil.client()).collect();
    for id in 0..4 {
        for (n, client) in clients.iter_mut().enumerate() {
            client.ask(id, &format!("c{n}.example.test"), qtype::A);
        }
    }
    for (n, client) in clients.iter_mut().enumerate() {
        let mut ids = [0; 4].map(|_: u16| {
            let answer = client.receive(SOON).message();
            assert_eq!(message::question_name(&answer), Some(format!("c{n}.example.test")));
            message::id(&answer)
        });
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3]);
    }
    drop(clients);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("answers_total", &[]), 200.0);
}

/// Its read timeout is `message_timeout` here: who has queries in flight and does not send may take his time.
#[test]
fn answers_come_to_a_client_that_stays_silent() {
    let backend = FakeBackend::start(|connection| {
        let queries: Vec<_> = (0..2).map_while(|_| connection.query()).collect();
        std::thread::sleep(Duration::from_millis(1200));
        for query in &queries {
            connection.send(&message::answer_to(query, [192, 0, 2, 53]));
        }
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let config = config(backend.address).set("listener", "idle_timeout", "\"500ms\"").set(
        "listener",
        "message_timeout",
        "\"500ms\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    client.ask(1, "silent.example.test", qtype::A);
    client.ask(2, "silent.example.test", qtype::A);
    let mut ids = [0; 2].map(|_: u16| message::id(&client.receive(SOON).message()));
    ids.sort_unstable();
    assert_eq!(ids, [1, 2]);
    client.exchange(3, "goes-on.example.test", qtype::A);
    drop(client);
    counterfoil.assert_quiescent();
}

/// A backend that makes its answers by this, and the clients' view of them. All come over one connection of either side.
#[track_caller]
fn expect_passed(made: fn(&[u8]) -> Vec<u8>, codes: &[u8], expected: fn(&[u8], u8) -> Vec<u8>) {
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            connection.send(&made(&query));
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for (id, code) in (1..).zip(codes) {
        // The code that is to come back is the query's first label.
        let query = message::query(id, &format!("{code}.example.test"), qtype::A);
        client.send_raw(&message::framed(&query)).unwrap();
        assert_eq!(client.receive(SOON).message(), expected(&query, *code));
    }
    assert_eq!((backend.accepted(), backend.queries()), (1, codes.len()));
    assert_eq!(counterfoil.metrics().sum("answers_total", &[]), codes.len() as f64);
    drop(client);
    counterfoil.assert_quiescent();
}

/// The code in the query's first label, and TC if it is above 15.
fn flagged(query: &[u8], mut answer: Vec<u8>) -> Vec<u8> {
    let code: u8 = message::question_name(query).unwrap().split('.').next().unwrap().parse().unwrap();
    answer[2] |= 0x80 | (code >> 4) << 1;
    answer[3] = 0x80 | code & 0x0f;
    answer
}

/// TC=1 means nothing over TCP (RFC 7766 section 5 has no more to offer), and is the client's to judge. (There it leads to
/// another try over TCP, where the query came by UDP.)
#[test]
fn an_answer_that_says_it_is_truncated() {
    let made = |query: &[u8]| flagged(query, message::answer_to(query, [192, 0, 2, 53]));
    expect_passed(made, &[16, 18, 19, 16], |query, code| {
        let mut answer = message::answer_to(query, [192, 0, 2, 53]);
        (answer[2], answer[3]) = (answer[2] | 0x82, 0x80 | code & 0x0f);
        answer
    });
}

/// Nothing but a header: errors pass, as there; what has no error passes, too, for it is matched by its ID. (There it is
/// dropped, unless `setAllowEmptyResponse` is set.)
#[test]
fn header_only_answers() {
    let made = |query: &[u8]| {
        let mut header = query[..12].to_vec();
        header[4..].fill(0);
        flagged(query, header)
    };
    expect_passed(made, &[rcode::SERVFAIL, 5, rcode::NOERROR, 3, 1, 16, 18], |query, code| {
        vec![query[0], query[1], query[2] | 0x80 | (code >> 4) << 1, 0x80 | code & 0x0f, 0, 0, 0, 0, 0, 0, 0, 0]
    });
}
