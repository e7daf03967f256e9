//! edns-tcp-keepalive (RFC 7828) from outside: what clients are told, what backends see and tell, and that it is so.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::wait;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(5);
const KEEPALIVE: u16 = 11;
const COOKIE: u16 = 10;
const FORMERR: u8 = 1;

type Options<'a> = &'a [(u16, &'a [u8])];

/// Clients of this listener are told; an idle connection is kept for 30 s.
fn config(backend: SocketAddr) -> Config {
    plain(backend).set("listener", "edns_tcp_keepalive", "true").set("listener", "idle_timeout", "\"30s\"")
}

fn plain(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"300ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

fn options(options: Options<'_>) -> Vec<u8> {
    let option = |(code, value): &(u16, &[u8])| {
        [&code.to_be_bytes()[..], &u16::try_from(value.len()).unwrap().to_be_bytes(), value].concat()
    };
    options.iter().flat_map(option).collect()
}

/// The message with an OPT record behind it.
fn with_opt(mut message: Vec<u8>, list: Options<'_>) -> Vec<u8> {
    let data = options(list);
    message[11] += 1;
    message.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0x80, 0]);
    message.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
    [message, data].concat()
}

fn query(id: u16) -> Vec<u8> {
    message::query(id, "kept.example.test", qtype::A)
}

/// A TSIG record, or what looks like one, behind everything else.
fn signed(mut message: Vec<u8>) -> Vec<u8> {
    message[11] += 1;
    message.extend_from_slice(b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\x04mac!");
    message
}

fn timeout(units: u16) -> [u8; 2] {
    units.to_be_bytes()
}

/// A backend that answers each query with an A record and the OPT record that it got, with `told` as its options; it
/// keeps what it has seen.
fn telling(told: &'static [(u16, &'static [u8])]) -> (FakeBackend, Arc<Mutex<Vec<Vec<u8>>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            let answer = answer_to(&query, told);
            record.lock().unwrap().push(query);
            connection.send(&answer);
        }
    });
    (backend, seen)
}

fn answer_to(query: &[u8], told: Options<'_>) -> Vec<u8> {
    let mut plain = self::query(message::id(query));
    plain[11] = 0;
    let answer = message::answer_to(&plain, [192, 0, 2, 53]);
    if query[11] == 0 { answer } else { with_opt(answer, told) }
}

#[track_caller]
fn exchange(client: &mut Client, message: &[u8]) -> Vec<u8> {
    client.send_raw(&message::framed(message)).unwrap();
    let answer = client.receive(SOON).message();
    assert_eq!(message::id(&answer), message::id(message));
    answer
}

/// What a query that asks is told, in units of 100 ms; none: nothing.
#[track_caller]
fn told(client: &mut Client, id: u16) -> Option<u16> {
    let answer = exchange(client, &with_opt(query(id), &[(KEEPALIVE, b"")]));
    let [.., 0, 11, 0, 2, high, low] = answer[..] else { return None };
    Some(u16::from_be_bytes([high, low]))
}

#[test]
fn rfc7828_3_3_2_a_client_that_asks_is_told_its_idle_timeout_and_it_is_so() {
    let (backend, seen) = telling(&[(COOKIE, b"cookies!")]);
    let config = config(backend.address).set("listener", "idle_timeout", "\"750ms\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let asking = with_opt(query(1), &[(COOKIE, b"cookies?"), (KEEPALIVE, b"")]);
    let answer = exchange(&mut client, &asking);
    let begin = Instant::now();
    let expected = answer_to(&asking, &[(COOKIE, b"cookies!"), (KEEPALIVE, &timeout(7))]);
    assert_eq!(answer, expected, "rounded down, behind what the backend said, and nothing else is changed");
    let arrived = seen.lock().unwrap().pop().unwrap();
    assert_eq!(arrived[2..], with_opt(query(1), &[(COOKIE, b"cookies?")])[2..], "section 3: it ends at this hop");
    client.assert_closed(SOON);
    let kept = begin.elapsed();
    assert!(kept >= Duration::from_millis(700), "{kept:?}");
    counterfoil.assert_quiescent();
}

#[test]
fn rfc7828_3_3_2_who_does_not_ask_or_has_no_opt_record_is_told_nothing() {
    let (backend, seen) = telling(&[]);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for query in [query(1), with_opt(query(2), &[]), with_opt(query(3), &[(COOKIE, b"cookies?")])] {
        assert_eq!(exchange(&mut client, &query), answer_to(&query, &[]));
        assert_eq!(seen.lock().unwrap().pop().unwrap()[2..], query[2..]);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// RFC 6891 section 7: a server without EDNS answers without an OPT record. None is made for it.
#[test]
fn an_answer_without_an_opt_record_stays_without_one() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&self::query(message::id(&query)), [192, 0, 2, 53]));
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let asking = with_opt(query(1), &[(KEEPALIVE, b"")]);
    assert_eq!(exchange(&mut client, &asking), message::answer_to(&query(1), [192, 0, 2, 53]));
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn rfc7828_3_2_1_an_option_with_a_value_in_a_query_is_a_format_error() {
    let (backend, _) = telling(&[]);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for value in [&b"\0"[..], b"\0\x64", b"\0\x64\0"] {
        let answer = exchange(&mut client, &with_opt(query(7), &[(KEEPALIVE, value)]));
        assert_eq!(message::response_code(&answer), FORMERR);
    }
    assert_eq!(backend.queries(), 0);
    assert_eq!(told(&mut client, 8), Some(300), "the connection is as good as before");
    drop(client);
    counterfoil.assert_quiescent();
}

/// Neither query nor answer, whoever signed it.
#[test]
fn rfc8945_5_5_signed_messages_pass_to_the_last_octet() {
    let signed_answer = |query: &[u8]| signed(answer_to(query, &[(KEEPALIVE, &timeout(9))]));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            let answer = signed_answer(&query);
            record.lock().unwrap().push(query);
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let asking = with_opt(query(1), &[(KEEPALIVE, b"")]);
    for query in [signed(asking.clone()), asking] {
        assert_eq!(exchange(&mut client, &query), signed_answer(&query));
        let arrived = seen.lock().unwrap().pop().unwrap();
        let expected = if query[11] == 2 { query } else { with_opt(self::query(1), &[]) };
        assert_eq!(arrived[2..], expected[2..]);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// Also if the client has not asked: it is no time of its own connection.
#[test]
fn rfc7828_5_a_backend_s_time_is_not_told_to_the_client() {
    let (backend, _) = telling(&[(KEEPALIVE, &[0, 9]), (COOKIE, b"cookies!")]);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for list in [&[(KEEPALIVE, &b""[..])][..], &[], &[(COOKIE, b"cookies?")]] {
        let query = with_opt(query(1), list);
        let expected = answer_to(&query, &[(KEEPALIVE, &timeout(300)), (COOKIE, b"cookies!")]);
        assert_eq!(exchange(&mut client, &query), expected);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn rfc7828_3_3_2_near_a_limit_the_shorter_time_is_told_and_it_is_so() {
    let (backend, _) = telling(&[]);
    let config = config(backend.address)
        .set("server", "max_connections", 2)
        .set("overload", "threshold", 50)
        .set("overload", "idle_timeout", "\"600ms\"")
        .set("overload", "max_connection_duration", "\"1h\"");
    let counterfoil = Counterfoil::start(&config);
    let mut first = counterfoil.client();
    let normal = told(&mut first, 1);
    let mut second = counterfoil.client();
    let restricted = told(&mut second, 2);
    assert_eq!((normal, restricted), (Some(300), Some(6)));
    second.assert_closed(Duration::from_secs(3));
    assert_eq!(told(&mut first, 3), Some(300));
    drop(first);
    counterfoil.assert_quiescent();
}

/// What is left of the connection's life, if that is less; and zero with the last query.
#[test]
fn rfc7828_3_3_2_a_connection_that_ends_soon_says_so() {
    let (backend, _) = telling(&[]);
    let ends = config(backend.address).set("listener", "max_connection_duration", "\"20s\"");
    let counterfoil = Counterfoil::start(&ends);
    let mut client = counterfoil.client();
    let units = told(&mut client, 1).unwrap();
    assert!((100..200).contains(&units), "{units}");
    drop(client);
    counterfoil.assert_quiescent();
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_queries_per_connection", 2));
    let mut client = counterfoil.client();
    assert_eq!((told(&mut client, 1), told(&mut client, 2)), (Some(300), Some(0)));
    client.assert_closed(SOON);
    counterfoil.assert_quiescent();
}

#[test]
fn rfc7828_3_3_2_a_process_that_drains_asks_its_clients_to_close() {
    let (backend, _) = telling(&[]);
    // So long that nothing is closed while the test runs.
    let mut counterfoil = Counterfoil::start(&config(backend.address).set("server", "drain_timeout", "\"24h\""));
    let mut client = counterfoil.client();
    assert_eq!(told(&mut client, 1), Some(300));
    counterfoil.process.signal(Signal::TERM);
    wait::until("the client is told", SOON, || told(&mut client, 2) == Some(0));
    drop(client);
    assert!(counterfoil.process.wait_exit(Duration::from_secs(30)).success());
}

#[test]
fn an_answer_of_our_own_tells_it_too() {
    let backend = FakeBackend::answering(false);
    backend.refuse();
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 0));
    let mut client = counterfoil.client();
    let answer = exchange(&mut client, &with_opt(query(1), &[(KEEPALIVE, b"")]));
    assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    assert!(answer.ends_with(&[0, 11, 0, 2, 1, 44]), "{answer:02x?}");
    drop(client);
    counterfoil.assert_quiescent();
}

/// A backend that tells TIMEOUT 0 gets no more queries on that connection, which closes when all answers are in.
#[test]
fn rfc7828_3_2_2_a_backend_that_tells_zero_is_left_once_all_answers_are_in() {
    let backend = FakeBackend::start(|connection| {
        let Some(first) = connection.query() else { return };
        let second = if connection.number == 0 { connection.query() } else { None };
        connection.send(&answer_to(&first, &[(KEEPALIVE, &timeout(0))]));
        if let Some(second) = second {
            // A third query must not come meanwhile; this answer is still awaited.
            assert!(connection.query_within(Duration::from_millis(300)).is_err());
            connection.send(&answer_to(&second, &[]));
        }
        assert_eq!(connection.query(), None);
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("connections", "idle_timeout", "\"30s\""));
    let mut client = counterfoil.client();
    let asking = |id| message::framed(&with_opt(query(id), &[]));
    client.send_raw(&[asking(1), asking(2)].concat()).unwrap();
    let ours = answer_to(&with_opt(query(1), &[]), &[(KEEPALIVE, &timeout(300))]);
    assert_eq!(client.receive(SOON).message(), ours);
    client.send_raw(&asking(3)).unwrap();
    let mut ids = [0, 0].map(|_: u16| message::id(&client.receive(SOON).message()));
    ids.sort_unstable();
    assert_eq!((ids, backend.accepted()), ([2, 3], 2));
    drop(client);
    counterfoil.assert_quiescent();
    let closed = counterfoil.metrics().sum("backend_connections_closed_total", &[("reason", "asked_to_close")]);
    assert_eq!(closed, 2.0);
}

/// Its time is shorter than ours, so the connection is closed by us before it is over.
#[test]
fn rfc7828_3_2_2_a_backend_s_time_is_kept() {
    let (backend, _) = telling(&[(KEEPALIVE, &[0, 20])]);
    let counterfoil = Counterfoil::start(&config(backend.address).set("connections", "idle_timeout", "\"60s\""));
    let mut client = counterfoil.client();
    exchange(&mut client, &with_opt(query(1), &[]));
    let begin = Instant::now();
    wait::until("we close", Duration::from_secs(10), || backend.open() == 0);
    let kept = begin.elapsed();
    assert!(kept >= Duration::from_millis(1500), "{kept:?}");
    drop(client);
    counterfoil.assert_quiescent();
    let closed = counterfoil.metrics().sum("backend_connections_closed_total", &[("reason", "idle_timeout")]);
    assert_eq!(closed, 1.0);
}

/// Off is the default: then the option is an option like any other.
#[test]
fn rfc6891_6_2_6_when_it_is_off_the_option_passes_to_the_last_octet() {
    let (backend, seen) = telling(&[(KEEPALIVE, &[0, 0])]);
    let counterfoil = Counterfoil::start(&plain(backend.address));
    let mut client = counterfoil.client();
    for value in [&b""[..], b"\0\x64"] {
        let query = with_opt(query(1), &[(KEEPALIVE, value), (COOKIE, b"cookies?")]);
        assert_eq!(exchange(&mut client, &query), answer_to(&query, &[(KEEPALIVE, &timeout(0))]));
        assert_eq!(seen.lock().unwrap().pop().unwrap()[2..], query[2..]);
    }
    assert_eq!(backend.accepted(), 1);
    drop(client);
    counterfoil.assert_quiescent();
}
