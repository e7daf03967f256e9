//! Zone transfers through the worker's state machine: whose connection, whose time, and what becomes of the client.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use proptest::prelude::*;

use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::close::{ClientCloseReason, CloseReason, FailReason, TransferEnd};
use crate::dns::message::set_id;
use crate::dns::rtype::{AXFR, IXFR};
use crate::ledger::ConnKind;
use crate::stats::{Counter, TransferKind};
use crate::worker::sim::{Arrived, Sim, query};

const SECOND: Duration = Duration::from_secs(1);
/// So long a client waits that asks for more before the first answer has told how long answers are.
const FIRST_ANSWER: Duration = Duration::from_millis(50);
const ZONE: &str = "zone.test";

fn configuration(more: &str) -> String {
    format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\nmax_pending_answers = \"16KiB\"\n\
         refuse = []\nwrite_timeout = \"7s\"\n[[pool]]\nname = \"p\"\nquery_timeout = \"5s\"\nretries = 3\n{more}\n\
         [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\n"
    )
}

const OWNED: &str = "[pool.proxy_protocol]\nidentity = \"connection\"\n";

fn transfer(id: u16, qtype: u16) -> Vec<u8> {
    let mut message = query(id, ZONE);
    let at = message.len() - 4;
    message[at..at + 2].copy_from_slice(&qtype.to_be_bytes());
    if qtype == IXFR {
        message[9] = 1;
        message.extend_from_slice(&record(6, 3));
    }
    message
}

/// A SOA with this serial, or a TXT record of so many octets.
fn record(rtype: u16, number: u32) -> Vec<u8> {
    let data = match rtype {
        6 => [&[0, 0][..], &number.to_be_bytes(), &[0; 16]].concat(),
        _ => vec![0; number as usize],
    };
    let head = [&[0xc0, 12][..], &rtype.to_be_bytes(), &[0, 1, 0, 0, 0, 60], &(data.len() as u16).to_be_bytes()];
    [&head.concat(), data.as_slice()].concat()
}

fn message(asked: &Arrived, records: &[Vec<u8>]) -> Vec<u8> {
    let question = asked.message[12..].iter().position(|octet| *octet == 0).unwrap() + 12 + 5;
    let mut message = asked.message[..question].to_vec();
    (message[2], message[7], message[9]) = (0x84, u8::try_from(records.len()).unwrap(), 0);
    set_id(&mut message, asked.id);
    message.extend(records.concat());
    message
}

fn soa() -> Vec<u8> {
    record(6, 9)
}

fn text(octets: u32) -> Vec<u8> {
    record(16, octets)
}

/// Asks for the zone; its connection, accepted, and the query as the backend has it.
fn begin(sim: &mut Sim, client: SessionKey, id: u16, qtype: u16) -> (ConnKey, Arrived) {
    let before: Vec<ConnKey> = sim.wires.keys().copied().collect();
    sim.say(client, &transfer(id, qtype));
    sim.accept_all();
    let new = sim.wires.keys().copied().find(|key| !before.contains(key)).unwrap();
    let asked = sim.wires.get_mut(&new).unwrap().unanswered.pop_front().unwrap();
    assert_eq!(sim.core.pool.get(new).unwrap().kind, ConnKind::OneShot);
    (new, asked)
}

fn ended(sim: &Sim, kind: TransferKind, end: TransferEnd) -> u64 {
    sim.core.stats.listeners[0].transfers[kind as usize][end as usize].get()
}

fn failed(sim: &Sim, reason: FailReason) -> u64 {
    sim.core.stats.listeners[0].failed[reason as usize].get()
}

fn closed(sim: &Sim, reason: ClientCloseReason) -> u64 {
    sim.core.stats.listeners[0].closed[reason as usize].get()
}

fn rcode(answer: &[u8]) -> u8 {
    answer[3] & 15
}

/// Each transfer has a connection of its own, and its messages, with the client's ID, come among other answers.
#[test]
fn streams_and_answers_are_intermingled() {
    for more in ["", OWNED, "[pool.proxy_protocol]\nidentity = \"address\"\n"] {
        let mut sim = Sim::new(&configuration(more));
        let client = sim.connect_client("192.0.2.1:1000");
        sim.ask(client, 1, "first.test");
        sim.answer_all();
        let (one, first) = begin(&mut sim, client, 7, AXFR);
        let (other, second) = begin(&mut sim, client, 7, IXFR);
        sim.send(one, &[message(&first, &[soa(), text(9)])]);
        sim.send(other, &[message(&second, &[soa()])]);
        sim.ask(client, 2, "second.test");
        sim.answer_all();
        assert_eq!(sim.opened, 3, "queries use the connection that they have");
        sim.send(other, &[message(&second, &[record(6, 3), soa(), text(8), soa()])]);
        sim.send(one, &[message(&first, &[text(7)]), message(&first, &[soa()])]);
        let answers = &sim.clients[&client].answers;
        let ids: Vec<u16> = answers.iter().map(|answer| u16::from_be_bytes([answer[0], answer[1]])).collect();
        assert_eq!(ids, [1, 7, 7, 2, 7, 7, 7]);
        for (at, records) in [(1, vec![soa(), text(9)]), (5, vec![text(7)]), (6, vec![soa()])] {
            assert_eq!(answers[at][2..], message(&first, &records)[2..], "no octet but the ID changes");
        }
        assert_eq!(sim.closed[&CloseReason::OneShotDone], 2);
        assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Complete), 1);
        assert_eq!(ended(&sim, TransferKind::Ixfr, TransferEnd::Complete), 1);
        assert_eq!(sim.core.stats.listeners[0].answers.get(), 4, "a stream is one answer");
        assert_eq!(sim.core.stats.listeners[0].transfer_messages.get(), 5);
        sim.assert_quiescent();
    }
}

/// RFC 1995 section 2; and an error, and nothing at all.
#[test]
fn short_answers_end_it() {
    let mut sim = Sim::new(&configuration(""));
    let client = sim.connect_client("192.0.2.1:1000");
    for (records, rcode, end) in [
        (vec![record(6, 3)], 0, TransferEnd::UpToDate),
        (vec![], 5, TransferEnd::Declined),
        (vec![], 0, TransferEnd::Declined),
    ] {
        let before = ended(&sim, TransferKind::Ixfr, end);
        let (conn, asked) = begin(&mut sim, client, 7, IXFR);
        let mut answer = message(&asked, &records);
        answer[3] = rcode;
        sim.send(conn, &[answer]);
        assert_eq!(ended(&sim, TransferKind::Ixfr, end), before + 1);
        assert!(!sim.wires.contains_key(&conn));
    }
    assert_eq!(sim.clients[&client].answers.len(), 3);
    sim.assert_quiescent();
}

/// dnsdist 55: what comes after the end is nobody's.
#[test]
fn messages_after_the_end_are_not_passed_on() {
    let mut sim = Sim::new(&configuration(""));
    let client = sim.connect_client("192.0.2.1:1000");
    let (conn, asked) = begin(&mut sim, client, 7, AXFR);
    let last = message(&asked, &[soa(), soa()]);
    sim.send(conn, &[last.clone(), last.clone(), message(&asked, &[text(5)])]);
    assert_eq!((sim.clients[&client].answers.len(), sim.closed[&CloseReason::OneShotDone]), (1, 1));
    sim.assert_quiescent();
}

/// RFC 1995 section 3; CVE-2026-40209.
#[test]
fn an_ixfr_whose_soa_cannot_be_read_opens_nothing() {
    let mut sim = Sim::new(&configuration(""));
    let good = transfer(7, IXFR);
    let cuts = transfer(7, AXFR).len()..good.len();
    for cut in cuts.clone() {
        // One each: a client that sends nothing else is let go.
        let client = sim.connect_client("192.0.2.1:1000");
        sim.say(client, &good[..cut]);
        let answers = &sim.clients[&client].answers;
        assert!(answers.len() == 1 && rcode(&answers[0]) == 1, "cut at {cut}");
    }
    assert_eq!(failed(&sim, FailReason::Malformed), cuts.len() as u64);
    assert_eq!(sim.opened, 0);
    sim.assert_quiescent();
}

/// The time runs from message to message: a long transfer is no slow one.
#[test]
fn each_message_has_its_own_time() {
    let mut sim = Sim::new(&configuration(""));
    let client = sim.connect_client("192.0.2.1:1000");
    let (conn, asked) = begin(&mut sim, client, 7, AXFR);
    sim.pass(SECOND * 4);
    sim.send(conn, &[message(&asked, &[soa()])]);
    for _ in 0..20 {
        sim.pass(SECOND * 4);
        sim.ask(client, 1, "meanwhile.test");
        sim.answer_all();
        sim.send(conn, &[message(&asked, &[text(1)])]);
    }
    assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Broken), 0);
    sim.pass(SECOND * 5);
    assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Broken), 1);
    assert_eq!((failed(&sim, FailReason::Timeout), closed(&sim, ClientCloseReason::TransferBroken)), (1, 1));
    assert!(!sim.wires.contains_key(&conn));
    sim.assert_quiescent();
}

/// Before its first message a transfer may still fail with an answer of our own; it is not tried again.
#[test]
fn what_has_not_begun_is_servfail_and_not_retried() {
    for how in 0..4 {
        let mut sim = Sim::new(&configuration(""));
        let client = sim.connect_client("192.0.2.1:1000");
        let (conn, asked) = begin(&mut sim, client, 7, AXFR);
        let reason = match how {
            0 => {
                sim.hang_up(conn);
                FailReason::BackendClosed
            }
            1 => {
                sim.pass(SECOND * 5);
                FailReason::Timeout
            }
            2 => {
                sim.send(conn, &[message(&asked, &[text(3), soa()])]);
                FailReason::BadAnswer
            }
            _ => {
                let mut wrong = message(&asked, &[soa()]);
                wrong[13] ^= 1;
                sim.send(conn, &[wrong]);
                FailReason::BadAnswer
            }
        };
        assert_eq!((failed(&sim, reason), ended(&sim, TransferKind::Axfr, TransferEnd::Failed)), (1, 1), "{how}");
        assert_eq!((sim.clients[&client].answers.len(), rcode(&sim.clients[&client].answers[0])), (1, 2));
        assert_eq!((sim.opened, sim.wires.len()), (1, 0), "{how}");
        sim.assert_quiescent();
    }
}

/// what came is delivered, then the client's connection ends, and its other transfers with it.
#[test]
fn what_breaks_off_ends_the_clients_connection() {
    for how in 0..4 {
        let mut sim = Sim::new(&configuration(OWNED));
        let client = sim.connect_client("192.0.2.1:1000");
        let (other, second) = begin(&mut sim, client, 8, AXFR);
        sim.pass(FIRST_ANSWER);
        let (conn, asked) = begin(&mut sim, client, 7, AXFR);
        sim.send(conn, &[message(&asked, &[soa()])]);
        sim.send(other, &[message(&second, &[soa()])]);
        sim.clients.get_mut(&client).unwrap().deaf = true;
        sim.send(conn, &[message(&asked, &[text(100)])]);
        let mut last = message(&asked, &[text(2)]);
        match how {
            0 => sim.hang_up(conn),
            1 => sim.send(conn, &[last[..last.len() - 1].to_vec()]),
            2 => {
                set_id(&mut last, asked.id ^ 1);
                sim.send(conn, &[last]);
            }
            _ => {
                last[13] ^= 1;
                sim.send(conn, &[last]);
            }
        }
        assert!(sim.core.pool.get(other).unwrap().paused, "nothing more may come");
        assert_eq!(sim.clients[&client].answers.len(), 2);
        sim.pass(SECOND * 6);
        assert_eq!(sim.clients.len(), 1, "it may take its time to read");
        sim.read(client, usize::MAX);
        assert_eq!((sim.clients.len(), closed(&sim, ClientCloseReason::TransferBroken)), (0, 1), "{how}");
        assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Broken), 1);
        assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Abandoned), 1);
        assert_eq!(sim.opened, 2, "nothing was tried again");
        sim.assert_quiescent();
    }
}

/// A client that does not read stops its transfers and nobody else; the time counts again once it reads.
#[test]
fn a_slow_reader_stops_its_own_transfer_only() {
    let mut sim = Sim::new(&configuration(OWNED));
    let slow = sim.connect_client("192.0.2.1:1000");
    let quick = sim.connect_client("192.0.2.2:1000");
    let (conn, asked) = begin(&mut sim, slow, 7, AXFR);
    let (other, theirs) = begin(&mut sim, quick, 7, AXFR);
    sim.clients.get_mut(&slow).unwrap().deaf = true;
    sim.send(conn, &[message(&asked, &[soa()]), message(&asked, &[text(3000)])]);
    sim.send(conn, &[message(&asked, &[text(4000)]), message(&asked, &[text(4000)])]);
    assert!(!sim.core.transfer_reads(conn), "above a quarter of max_pending_answers");
    let mut times = 0;
    while sim.core.pool.get(conn).unwrap().paused && times < 100 {
        // All of it takes far longer than query_timeout.
        sim.pass(SECOND * 4);
        sim.read(slow, 500);
        sim.send(other, &[message(&theirs, &[if times == 0 { soa() } else { text(4000) }])]);
        assert!(sim.core.transfer_reads(other));
        times += 1;
    }
    assert!((14..=18).contains(&times), "{times}: {} octets are left", sim.core.sessions[slow.0].out.len());
    sim.pass(SECOND * 4);
    sim.send(conn, &[message(&asked, &[soa()])]);
    assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Complete), 1);
    sim.read(slow, usize::MAX);
    assert_eq!(sim.clients[&slow].answers.len(), 5);
    sim.assert_quiescent();
}

/// One that reads nothing at all ends by the listener's `write_timeout`, and its backend's connection with it.
#[test]
fn a_client_that_reads_nothing_is_ended() {
    let mut sim = Sim::new(&configuration(""));
    let client = sim.connect_client("192.0.2.1:1000");
    let (conn, asked) = begin(&mut sim, client, 7, AXFR);
    sim.clients.get_mut(&client).unwrap().deaf = true;
    sim.send(conn, &[message(&asked, &[soa()]), message(&asked, &[text(5000)])]);
    assert!(!sim.core.transfer_reads(conn));
    sim.pass(SECOND * 6);
    assert!(sim.wires.contains_key(&conn), "longer than query_timeout");
    sim.pass(SECOND * 2);
    assert_eq!(closed(&sim, ClientCloseReason::WriteTimeout), 1);
    assert_eq!((sim.wires.len(), sim.closed[&CloseReason::OwnerGone]), (0, 1));
    assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Abandoned), 1);
    sim.assert_quiescent();
}

/// RFC 9103 section 6.3.3. A place is left for other queries.
#[test]
fn beyond_its_limit_a_transfer_is_servfail() {
    for more in ["", OWNED] {
        let mut sim = Sim::new(&(configuration(more) + "[connections]\nmax_owned_per_client = 4\n"));
        let client = sim.connect_client("192.0.2.1:1000");
        let begun = [0, 1, 2].map(|id| {
            let begun = begin(&mut sim, client, id, AXFR);
            sim.pass(FIRST_ANSWER);
            begun
        });
        sim.say(client, &transfer(3, AXFR));
        assert_eq!(sim.clients[&client].answers.iter().map(|answer| rcode(answer)).collect::<Vec<_>>(), [2]);
        assert_eq!(failed(&sim, FailReason::NoCapacity), 1);
        sim.ask(client, 9, "other.test");
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers.len(), 2, "queries are answered");
        sim.send(begun[0].0, &[message(&begun[0].1, &[soa(), soa()])]);
        begin(&mut sim, client, 4, AXFR);
        sim.assert_quiescent();
    }
}

/// No spare connection, as its peer may have closed it and a transfer is not retried.
#[test]
fn a_transfer_takes_no_spare_connection() {
    let mut sim = Sim::new(&(configuration("") + "[connections]\nspares_per_backend = 2\n"));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "first.test");
    sim.answer_all();
    assert_eq!(sim.opened, 3);
    sim.say(client, &transfer(7, AXFR));
    assert_eq!(sim.opened, 4);
    sim.assert_quiescent();
}

/// Age, a reload and the client's own limits wait for the end of a transfer.
#[test]
fn age_and_reload_do_not_break_a_transfer_off() {
    let base = configuration("");
    let mut sim = Sim::new(&(base.clone() + "[connections]\nmax_age = \"3s\"\nidle_timeout = \"2s\"\n"));
    let client = sim.connect_client("192.0.2.1:1000");
    let (conn, asked) = begin(&mut sim, client, 7, AXFR);
    sim.send(conn, &[message(&asked, &[soa()])]);
    for round in 0..5 {
        sim.pass(SECOND * 4);
        if round == 2 {
            sim.reconfigure(&base.replace("1053", "1054"));
        }
        sim.send(conn, &[message(&asked, &[text(1)])]);
    }
    sim.send(conn, &[message(&asked, &[soa()])]);
    assert_eq!(ended(&sim, TransferKind::Axfr, TransferEnd::Complete), 1);
    assert_eq!(sim.clients[&client].answers.len(), 7);
    sim.assert_quiescent();
}

#[derive(Clone, Debug)]
enum Op {
    Connect,
    Transfer(usize, bool),
    Ask(usize),
    Records(usize, u8),
    Read(usize, u16),
    Slow(usize),
    Leave(usize),
    HangUp(usize),
    Pass(u16),
}

fn op() -> impl Strategy<Value = Op> {
    let at = 0..16usize;
    prop_oneof![
        2 => Just(Op::Connect),
        5 => (at.clone(), any::<bool>()).prop_map(|(client, full)| Op::Transfer(client, full)),
        4 => at.clone().prop_map(Op::Ask),
        20 => (at.clone(), any::<u8>()).prop_map(|(wire, what)| Op::Records(wire, what)),
        4 => (at.clone(), 1..6000u16).prop_map(|(client, octets)| Op::Read(client, octets)),
        2 => at.clone().prop_map(Op::Slow),
        1 => at.clone().prop_map(Op::Leave),
        1 => at.prop_map(Op::HangUp),
        3 => (1..4000u16).prop_map(Op::Pass),
    ]
}

/// Whatever happens, every query is accounted for at every step (the sim checks I8 and the caps), a paused connection is
/// one whose client has much to read, and nothing is left.
fn storm(more: &str, ops: Vec<Op>) {
    let mut sim = Sim::new(&(configuration(more) + "max_connections = 6\n[connections]\nmax_owned_per_client = 3\n"));
    let mut next = 0;
    for op in ops {
        let clients: Vec<SessionKey> = sim.clients.keys().copied().collect();
        let wires: Vec<ConnKey> = sim.wires.keys().copied().collect();
        next += 1;
        match op {
            Op::Connect if clients.len() < 5 => drop(sim.connect_client(&format!("192.0.2.{}:1000", next % 250))),
            Op::Transfer(client, full) if !clients.is_empty() => {
                sim.say(clients[client % clients.len()], &transfer(next, if full { AXFR } else { IXFR }));
            }
            Op::Ask(client) if !clients.is_empty() => sim.ask(clients[client % clients.len()], next, "a.test"),
            Op::Records(wire, what) if !wires.is_empty() => {
                let key = wires[wire % wires.len()];
                sim.accept(key);
                let Some(conn) = sim.core.pool.get(key) else { continue };
                let is_transfer = conn.transfer.is_some();
                let paused = !sim.core.transfer_reads(key);
                let Some(asked) = sim.wires.get(&key).and_then(|wire| wire.unanswered.front()).cloned() else {
                    continue;
                };
                match what % 16 {
                    _ if paused => {}
                    _ if !is_transfer => sim.answer(key, 0),
                    0 => sim.send(key, &[vec![0; 12]]),
                    1..5 => sim.send(key, &[message(&asked, &[soa()])]),
                    5 => sim.send(key, &[message(&asked, &[record(6, 3)])]),
                    6 => sim.send(key, &[message(&asked, &[soa(), text(10), soa()])]),
                    size => sim.send(key, &[message(&asked, &[text(u32::from(size) * 200)])]),
                }
            }
            Op::Read(client, octets) if !clients.is_empty() => {
                sim.read(clients[client % clients.len()], usize::from(octets));
            }
            Op::Slow(client) if !clients.is_empty() => {
                let client = sim.clients.get_mut(&clients[client % clients.len()]).unwrap();
                client.deaf = !client.deaf;
            }
            Op::Leave(client) if !clients.is_empty() => {
                sim.close_client(clients[client % clients.len()], ClientCloseReason::ClientReset);
            }
            Op::HangUp(wire) if !wires.is_empty() => sim.hang_up(wires[wire % wires.len()]),
            Op::Pass(millis) => sim.pass(Duration::from_millis(u64::from(millis))),
            _ => {}
        }
        for (key, session) in &sim.core.sessions {
            let paused = |conn: &ConnKey| sim.core.pool.get(*conn).is_some_and(|conn| conn.paused);
            let ends = session.ending == Some(ClientCloseReason::TransferBroken);
            assert!(!session.paused || session.is_busy_reading(), "session {key} waits for nothing");
            assert!(session.paused || ends || !session.owned.iter().any(paused), "nobody would wake it");
            // A message more than the mark, and answers to queries.
            assert!(session.out.len() < 4096 + 3300 + 4096, "{}", session.out.len());
        }
    }
    // A transfer whose backend or client does nothing ends in time.
    for _ in 0..100 {
        sim.pass(SECOND);
    }
    assert_eq!(sim.core.queries.len(), 0);
    let stats = &sim.core.stats.listeners[0];
    let transfers: u64 = stats.transfers.iter().flatten().map(Counter::get).sum();
    assert!(transfers <= stats.queries.get());
    sim.assert_quiescent();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_transfer_ends_and_is_counted(ops in prop::collection::vec(op(), 0..300)) {
        storm("", ops);
    }

    #[test]
    fn so_does_every_owned_one(ops in prop::collection::vec(op(), 0..300)) {
        storm(OWNED, ops);
    }
}
