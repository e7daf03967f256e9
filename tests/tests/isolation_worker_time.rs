//! A worker's time is shared by all clients that it serves: what one of them sends costs no more than its octets, and nobody
//! has more than a turn while others wait.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::servers::{Unbound, ZONE};
use counterfoil_tests::wait;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(20);
const ATTACKER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 2, 0, 1));
const NEIGHBOURS: u8 = 4;
/// Messages on one connection: with two more that are not forwarded it would be closed.
const ROW: usize = 30;
/// The messages of an attacker's turn.
const TURN: usize = 128;

/// A message of 64 KiB: a chain of compression pointers in the data of a record, and as many records as there is room for,
/// each of which is called what the last pointer leads to.
fn pointers(opcode: u8, chain: usize) -> Vec<u8> {
    let mut message = vec![0, 7, 1 | opcode << 3, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    message.extend_from_slice(&[0, 0xff, 0, 0, 1, 0, 0, 0, 0]);
    message.extend_from_slice(&u16::try_from(1 + 2 * chain).unwrap().to_be_bytes());
    let mut last = message.len();
    message.push(0);
    for _ in 0..chain {
        let at = message.len();
        message.extend_from_slice(&u16::try_from(0xc000 | last).unwrap().to_be_bytes());
        last = at;
    }
    let pointer = u16::try_from(0xc000 | last).unwrap().to_be_bytes();
    let one = [&pointer[..], &[0xff, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    let count = (usize::from(u16::MAX) - message.len()) / one.len();
    message.extend_from_slice(&one.repeat(count));
    message[10..12].copy_from_slice(&u16::try_from(count + 1).unwrap().to_be_bytes());
    message
}

/// What is worst for whoever follows names, whoever makes an answer, and whoever does something for each message.
fn worst() -> [(&'static str, Vec<u8>); 4] {
    [
        ("a query with a long chain", pointers(0, 8_176)),
        ("DSO with a long chain", pointers(6, 8_176)),
        ("a query with a chain as long as it may be", pointers(0, 40)),
        ("a query of a header alone", vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]),
    ]
}

/// The attacker sends as fast as it is served; so many octets of each message.
fn attack(setting: Setting, octets: usize) {
    // Unbound here wants a header.
    let (unbound, fake) = match setting.identity {
        Some(_) => (Some(Unbound::start(false)), None),
        None => (None, Some(FakeBackend::answering(false))),
    };
    let address = unbound.as_ref().map(|unbound| unbound.address).or(fake.as_ref().map(|fake| fake.address)).unwrap();
    let scene = Scene::new(setting);
    let counterfoil = Counterfoil::start(&scene.config(address));
    for (what, message) in worst() {
        let served = Arc::new(AtomicUsize::new(0));
        let neighbours = scene.neighbours(&counterfoil, NEIGHBOURS, &served);
        wait::until("the neighbours are served", SOON, || neighbours.answered() > 100);
        let before = neighbours.answered();
        let count = (octets / message.len()).min(3_000);
        let mut left = count;
        while left > 0 {
            let now = ROW.min(left);
            let mut attacker = scene.connect(counterfoil.address, ATTACKER);
            attacker.send_raw(&message::framed(&message).repeat(now)).unwrap();
            for _ in 0..now {
                assert!(matches!(attacker.receive(SOON), Received::Message(_)), "{what}");
                served.fetch_add(message.len(), Ordering::SeqCst);
            }
            left -= now;
        }
        let meanwhile = neighbours.answered() - before;
        let wait = neighbours.finish();
        println!("{what}: {count} messages, {meanwhile} answers to neighbours meanwhile, {wait:?}");
        assert_eq!(wait.failed, 0, "{what}: {wait:?}");
        // In octets: those of the attacker's that were served while one query of a neighbour's waited.
        assert!(wait.longest <= count * message.len() / 4, "{what}: {wait:?}");
    }
    counterfoil.assert_quiescent();
}

#[test]
fn the_worst_message_costs_no_more_than_its_octets() {
    attack(Setting::identity("forwarder"), 200 * 65_536);
}

#[test]
#[ignore = "soak"]
fn soak_isolation_the_worst_message_costs_no_more_than_its_octets() {
    Setting::all().for_each(|setting| attack(setting, 1_000 * 65_536));
}

/// The names that came to the backend, in order.
fn recording() -> (FakeBackend, Arc<Mutex<Vec<String>>>) {
    let names = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&names);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            seen.lock().unwrap().push(message::question_name(&query).unwrap());
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    (backend, names)
}

/// So many queries of one client are there when a worker looks, on one connection or on many, then one of another's: a turn
/// goes before it, not all.
fn pipelined(setting: Setting, connections: usize) {
    const QUERIES: usize = 5_000;
    let (backend, names) = recording();
    let scene = Scene::new(setting);
    let config = scene
        .config(backend.address)
        .set("listener", "max_in_flight", 2 * QUERIES)
        .set("listener", "max_pending_answers", "\"4MiB\"")
        .backend_key("max_in_flight", 2 * QUERIES);
    let mut counterfoil = Counterfoil::start(&config);
    let mut attackers: Vec<_> = (0..connections).map(|_| scene.connect(counterfoil.address, ATTACKER)).collect();
    let mut neighbour = scene.connect(counterfoil.address, IpAddr::from([127, 1, 0, 1]));
    attackers.iter_mut().for_each(|attacker| attacker.assert_served());
    neighbour.assert_served();
    // Each sends while nobody looks, so that all of it is there at once.
    counterfoil.process.signal(Signal::STOP);
    let sent = Arc::new(AtomicUsize::new(0));
    let attack = |mut attacker: Client| {
        let sending = Arc::clone(&sent);
        std::thread::spawn(move || {
            for number in 0..QUERIES / connections {
                let query = message::query(number as u16, &format!("a.{ZONE}"), qtype::A);
                attacker.send_raw(&message::framed(&query)).unwrap();
                sending.fetch_add(1, Ordering::SeqCst);
            }
            for _ in 0..QUERIES / connections {
                assert_eq!(message::response_code(&attacker.receive(SOON).message()), rcode::NOERROR);
            }
        })
    };
    let threads: Vec<_> = attackers.into_iter().map(attack).collect();
    wait::until("ten turns are there", SOON, || sent.load(Ordering::SeqCst) >= 10 * TURN);
    names.lock().unwrap().clear();
    neighbour.ask(1, &format!("n.{ZONE}"), qtype::A);
    counterfoil.process.signal(Signal::CONT);
    assert_eq!(message::response_code(&neighbour.receive(SOON).message()), rcode::NOERROR);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let names = names.lock().unwrap();
    assert_eq!(names.len(), QUERIES + 1);
    let before = names.iter().position(|name| name.starts_with("n.")).unwrap();
    println!("{setting:?}, {connections} connections: {before} queries of the other client went before");
    assert!(before <= 2 * TURN, "{setting:?}, {connections} connections: {before}");
    drop(neighbour);
    counterfoil.assert_quiescent();
}

#[test]
fn who_sends_without_end_has_a_turn_and_then_the_others() {
    pipelined(Setting::SHARED, 1);
}

/// Turns are a client's, not a connection's.
#[test]
fn who_sends_on_many_connections_has_no_more_turns() {
    pipelined(Setting::SHARED, 20);
}

/// Where all clients share one connection, in which the order is seen.
#[test]
#[ignore = "soak"]
fn soak_isolation_who_sends_without_end_has_a_turn_and_then_the_others() {
    for setting in [Setting::SHARED, Setting::SHARED.over_tls()] {
        pipelined(setting, 1);
        pipelined(setting, 20);
    }
}
