//! Zone transfers from real primaries through Counterfoil: the same octets as without it, with TSIG and without.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::servers::{Knot, PowerDns};
use counterfoil_tests::zone::{self, fetch, kdig, without_ids};

const SOON: Duration = Duration::from_secs(10);
const REFUSED: u8 = 5;
const NOTAUTH: u8 = 9;

/// So many that a transfer takes dozens of messages.
const HOSTS: usize = 6000;

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon()
}

fn from(server: SocketAddr, source: &str) -> Client {
    Client::connect(server, Some(source.parse::<IpAddr>().unwrap()))
}

fn transfers(counterfoil: &Counterfoil, kind: &str, outcome: &str) -> f64 {
    counterfoil.metrics().sum("transfers_total", &[("kind", kind), ("outcome", outcome)])
}

/// The same messages through Counterfoil as directly, but for their IDs; and nothing comes after them.
#[track_caller]
fn assert_same(direct: &mut Client, through: &mut Client, query: &[u8], soas: usize) -> usize {
    let expected = fetch(direct, query, soas);
    let mut other_id = query.to_vec();
    other_id[..2].copy_from_slice(&[0xca, 0xfe]);
    let got = fetch(through, &other_id, soas);
    assert!(got.iter().all(|message| message::id(message) == 0xcafe));
    let count = got.len();
    let (got, expected) = (without_ids(got), without_ids(expected));
    assert_eq!(got.len(), expected.len());
    let differs = got.iter().zip(&expected).position(|(one, other)| one != other);
    assert_eq!(differs, None, "another message than directly");
    // The connection goes on to be used.
    through.exchange(7, &format!("host1.{}", zone::NAME), qtype::A);
    count
}

/// PowerDNS wants a PROXY header from Counterfoil, and none from 127.0.0.3.
#[test]
fn powerdns_axfr_and_ixfr_byte_for_byte() {
    let primary = PowerDns::start(2026, HOSTS);
    for identity in ["connection", "address"] {
        let counterfoil = Counterfoil::start(&config(primary.address).identity(identity));
        let (mut direct, mut through) = (from(primary.address, "127.0.0.3"), counterfoil.client_from("127.0.0.3"));
        let messages = assert_same(&mut direct, &mut through, &zone::query(1, None), 2);
        assert!(messages > 5, "{messages}");
        assert_eq!(transfers(&counterfoil, "axfr", "complete"), 1.0);
        // It has no differences: all of the zone, or one SOA for who is up to date.
        assert_eq!(assert_same(&mut direct, &mut through, &zone::query(2, Some(2025)), 2), messages);
        assert_eq!(transfers(&counterfoil, "ixfr", "complete"), 1.0);
        assert_eq!(assert_same(&mut direct, &mut through, &zone::query(3, Some(2026)), 1), 1);
        assert_eq!(transfers(&counterfoil, "ixfr", "up_to_date"), 1.0);
        for what in ["AXFR", "IXFR=2025", "IXFR=2026"] {
            let printed = kdig(counterfoil.address, "127.0.0.3", what, false);
            assert_eq!(printed, kdig(primary.address, "127.0.0.3", what, false), "{what}");
            // kdig takes the first message, which has one SOA, for an IXFR's last.
            let records = if what == "AXFR" { 4 + 2 * HOSTS } else { 1 };
            assert_eq!(printed.lines().count(), records, "{what}");
        }
        drop((direct, through));
        counterfoil.assert_quiescent();
    }
}

/// kdig checks the signature of each message against those before it (RFC 8945 section 5.3.1).
#[test]
fn powerdns_with_tsig() {
    let primary = PowerDns::start(2026, HOSTS);
    let counterfoil = Counterfoil::start(&config(primary.address).identity("connection"));
    for what in ["AXFR", "IXFR=2025"] {
        // 127.0.0.9 may not transfer the zone without a key.
        let printed = kdig(counterfoil.address, "127.0.0.9", what, true);
        assert_eq!(without_signatures(&printed), kdig(primary.address, "127.0.0.3", what, false), "{what}");
    }
    counterfoil.assert_quiescent();
}

fn without_signatures(printed: &str) -> String {
    let records: Vec<&str> = printed.lines().filter(|line| !line.contains("\tTSIG\t")).collect();
    records.join("\n")
}

/// It is the header that says who asks: the primary's list of who may transfer holds.
#[test]
fn the_primary_sees_who_asks() {
    let primary = PowerDns::start(2026, 10);
    let counterfoil = Counterfoil::start(&config(primary.address).identity("connection"));
    let mut allowed = counterfoil.client_from("127.0.0.5");
    let whole = fetch(&mut allowed, &zone::query(1, None), 2);
    assert!(whole.iter().all(|message| message::response_code(message) == rcode::NOERROR));
    let mut stranger = counterfoil.client_from("127.0.0.9");
    let refused = fetch(&mut stranger, &zone::query(1, None), 2);
    let code = message::response_code(&refused[0]);
    assert!(refused.len() == 1 && (code == REFUSED || code == NOTAUTH), "{refused:02x?}");
    assert_eq!(transfers(&counterfoil, "axfr", "declined"), 1.0);
    let answer = stranger.exchange(2, &format!("host1.{}", zone::NAME), qtype::A);
    assert_eq!(message::response_code(&answer), rcode::NOERROR);
    drop((allowed, stranger));
    counterfoil.assert_quiescent();
}

/// Knot has differences: one sequence, several, and none any more.
#[test]
fn knot_axfr_and_ixfr_byte_for_byte() {
    let mut primary = Knot::start(100, HOSTS);
    for (serial, hosts) in [(101, HOSTS + 2000), (102, HOSTS), (104, HOSTS + 1)] {
        primary.load(serial, hosts);
    }
    let counterfoil = Counterfoil::start(&config(primary.address));
    let (mut direct, mut through) = (from(primary.address, "127.0.0.3"), counterfoil.client());
    let messages = assert_same(&mut direct, &mut through, &zone::query(1, None), 2);
    assert!(messages > 3, "{messages}");
    // SOAs: the newest, two for each sequence, the newest.
    for (since, soas) in [(103, 2), (102, 4), (101, 6), (100, 8), (104, 1), (105, 1)] {
        assert_same(&mut direct, &mut through, &zone::query(2, Some(since)), soas);
    }
    assert_eq!(transfers(&counterfoil, "ixfr", "complete"), 4.0);
    assert_eq!(transfers(&counterfoil, "ixfr", "up_to_date"), 2.0);
    for what in ["AXFR", "IXFR=100", "IXFR=102", "IXFR=104"] {
        let printed = kdig(counterfoil.address, "127.0.0.3", what, false);
        assert_eq!(printed, kdig(primary.address, "127.0.0.3", what, false), "{what}");
        let signed = kdig(counterfoil.address, "127.0.0.3", what, true);
        assert_eq!(without_signatures(&signed), printed, "{what}");
    }
    drop((direct, through));
    counterfoil.assert_quiescent();
}

/// Several transfers at once on one connection, from a real primary, with queries between them (RFC 9103 section 6.1).
#[test]
fn several_transfers_at_once_on_one_connection() {
    let primary = Knot::start(100, HOSTS);
    let counterfoil = Counterfoil::start(&config(primary.address));
    let expected = fetch(&mut from(primary.address, "127.0.0.3"), &zone::query(1, None), 2);
    let mut client = counterfoil.client();
    let mut burst = Vec::new();
    for id in 0..5 {
        burst.extend(message::framed(&zone::query(id, None)));
        burst.extend(message::framed(&message::query(100 + id, &format!("host{id}.{}", zone::NAME), qtype::A)));
    }
    client.send_raw(&burst).unwrap();
    let mut streams = vec![Vec::new(); 5];
    let mut answers = 0;
    while answers < 5 || streams.iter().any(|stream| stream.len() < expected.len()) {
        let answer = client.receive(SOON).message();
        match message::id(&answer) {
            id @ 0..5 => streams[usize::from(id)].push(answer),
            id => {
                let name = format!("host{}.{}", id - 100, zone::NAME);
                assert_eq!(message::question_name(&answer).as_deref(), Some(name.as_str()));
                answers += 1;
            }
        }
    }
    let expected = without_ids(expected);
    for stream in streams {
        assert!(without_ids(stream) == expected, "a stream is not what the primary sends");
    }
    // One for each transfer, and one for the queries.
    assert_eq!(counterfoil.metrics().sum("backend_connections_opened_total", &[]), 6.0);
    drop(client);
    counterfoil.assert_quiescent();
}
