//! The kernel's word alone: each class by example, and at random against a model that knows what is healthy.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::{ReapMode, Watchdog};
use crate::kernel::KernelSnapshot;
use crate::ledger::LedgerSnapshot;
use crate::watchdog::finding::{Finding, HeldBack};
use crate::watchdog::reconcile::{History, Joined, Trust, reconcile};

const SECOND: u64 = 1_000_000_000;
const MILLI: u64 = 1_000_000;
const BACKEND: &str = "127.0.0.1:15302";
const GRACE: u64 = 3 * SECOND;
const IDLE: u64 = 10 * SECOND;
const CONNECT: u64 = 5 * SECOND;

fn policy() -> Policy {
    let settings = Watchdog {
        interval: Duration::from_secs(1),
        grace: Duration::from_nanos(GRACE),
        sweeps: 3,
        crosscheck_interval: Duration::from_secs(60),
        reap: ReapMode::DryRun,
        max_reaps_per_minute: 600,
        classes: Class::ALL.to_vec(),
    };
    let (idle, connect) = (Duration::from_nanos(IDLE), Duration::from_nanos(CONNECT));
    Policy::beside(&settings, &[BACKEND.parse().unwrap()], idle, connect)
}

fn socket(cookie: u64, state: TcpState, last: u64) -> KernelSocket {
    KernelSocket {
        cookie,
        state,
        held: true,
        opened: Some(SECOND),
        local: "127.0.0.1:40000".parse().unwrap(),
        remote: BACKEND.parse().unwrap(),
        last_received_ns: Some(last),
        last_sent_ns: None,
        bytes_sent: None,
        bytes_received: None,
        unread: None,
        owner: 0,
        netns: 0,
    }
}

/// One sweep of what the kernel has, without any ledger.
fn sweep(at: u64, sockets: Vec<KernelSocket>, history: &mut History) -> Vec<Finding> {
    let kernel = KernelSnapshot { taken_ns: at, sockets, ..KernelSnapshot::default() };
    let ledger = LedgerSnapshot { taken: Mono(at), ..LedgerSnapshot::default() };
    reconcile(&Joined::new(&kernel, Trust::Beside, &ledger), history, &policy())
}

/// Sweeps once a second, from 2 s on, with a socket that stays as it is; when it is found, and the finding.
fn found(socket: &KernelSocket) -> Option<(u64, Finding)> {
    let mut history = History::default();
    (2..60).find_map(|second| {
        let mut findings = sweep(second * SECOND, vec![socket.clone()], &mut history);
        assert!(findings.len() <= 1);
        Some((second, findings.pop()?))
    })
}

#[test]
fn silence_makes_a_hoard_and_a_fin_a_zombie() {
    let last = 2 * SECOND;
    let (second, finding) = found(&socket(1, TcpState::Established, last)).unwrap();
    assert_eq!((finding.class, finding.backend, finding.held_back), (Class::Hoard, Some(0), None));
    assert_eq!(second * SECOND, last + IDLE + GRACE);
    let (second, finding) = found(&socket(1, TcpState::CloseWait, last)).unwrap();
    assert_eq!((finding.class, finding.held_back), (Class::Zombie, None));
    assert_eq!(second * SECOND, last + 2 * GRACE, "silent for the grace time, and then seen so for as long");
}

#[test]
fn an_answer_that_is_not_read_yet_counts_as_use() {
    let unread = KernelSocket { unread: Some(40), ..socket(1, TcpState::CloseWait, 2 * SECOND) };
    let (second, finding) = found(&unread).unwrap();
    assert_eq!((second * SECOND, finding.class), (2 * SECOND + IDLE + GRACE, Class::Zombie));
}

#[test]
fn what_was_reset_is_found_and_cannot_be_severed() {
    let (_, finding) = found(&socket(1, TcpState::Close, 2 * SECOND)).unwrap();
    assert_eq!((finding.class, finding.held_back), (Class::Zombie, Some(HeldBack::NoConnection)));
}

#[test]
fn half_closed_connections_linger_and_unanswered_ones_are_embryos() {
    for state in [TcpState::FinWait1, TcpState::FinWait2, TcpState::Closing, TcpState::LastAck] {
        let (second, finding) = found(&socket(1, state, 2 * SECOND)).unwrap();
        assert_eq!((second * SECOND, finding.class), (2 * SECOND + IDLE + GRACE, Class::Lingering), "{state}");
    }
    let connecting = KernelSocket { last_received_ns: None, ..socket(1, TcpState::SynSent, 0) };
    let (second, finding) = found(&connecting).unwrap();
    assert_eq!((second * SECOND, finding.class), (SECOND + CONNECT + GRACE, Class::Embryo));
}

#[test]
fn others_are_not_judged() {
    let elsewhere = KernelSocket { remote: "127.0.0.1:2".parse().unwrap(), ..socket(1, TcpState::CloseWait, SECOND) };
    assert!(found(&elsewhere).is_none(), "its peer is no backend");
    assert!(found(&socket(1, TcpState::Listen, SECOND)).is_none());
    let timeless = KernelSocket { opened: None, last_received_ns: None, ..socket(1, TcpState::Established, 0) };
    assert!(found(&timeless).is_none(), "nothing proves that it is silent");
    assert!(found(&KernelSocket { held: false, ..socket(1, TcpState::CloseWait, SECOND) }).is_none());
}

/// What happens to one connection of the watched process.
#[derive(Clone, Copy, Debug)]
enum Event {
    Open(usize),
    /// A byte moves, either way, in whatever state.
    Move(usize),
    /// The peer closes its half, with or without something left to read.
    PeerCloses(usize, bool),
    /// The process closes its half.
    ShutDown(usize),
    Close(usize),
    /// From now on nobody does anything about it.
    Leak(usize),
}

fn event() -> impl Strategy<Value = Event> {
    let index = 0..12usize;
    prop_oneof![
        4 => index.clone().prop_map(Event::Open),
        6 => index.clone().prop_map(Event::Move),
        2 => (index.clone(), any::<bool>()).prop_map(|(index, unread)| Event::PeerCloses(index, unread)),
        1 => index.clone().prop_map(Event::ShutDown),
        1 => index.clone().prop_map(Event::Close),
        1 => index.prop_map(Event::Leak),
    ]
}

#[derive(Clone, Debug)]
struct Model {
    socket: KernelSocket,
    /// It is as it is since then, for ever.
    leaked: Option<u64>,
}

/// A healthy process touches each of its connections at least this often.
const ATTENTION: u64 = 2 * SECOND;

#[derive(Debug, Default)]
struct World {
    now: u64,
    cookies: u64,
    connections: BTreeMap<usize, Model>,
}

impl World {
    fn apply(&mut self, event: Event) {
        let now = self.now;
        let (Event::Open(index)
        | Event::Move(index)
        | Event::PeerCloses(index, _)
        | Event::ShutDown(index)
        | Event::Close(index)
        | Event::Leak(index)) = event;
        let taken = self.connections.contains_key(&index);
        let place = self.connections.get_mut(&index).filter(|connection| connection.leaked.is_none());
        match (event, place) {
            (Event::Open(_), None) if !taken => {
                self.cookies += 1;
                let opened = KernelSocket { opened: Some(now), ..socket(self.cookies, TcpState::Established, now) };
                self.connections.insert(index, Model { socket: opened, leaked: None });
            }
            (Event::Move(_), Some(connection)) => connection.socket.last_sent_ns = Some(now),
            (Event::PeerCloses(_, unread), Some(Model { socket, .. })) => {
                socket.unread = Some(u32::from(unread));
                socket.state = match socket.state {
                    TcpState::Established => TcpState::CloseWait,
                    TcpState::FinWait2 => TcpState::Closing,
                    other => other,
                };
            }
            (Event::ShutDown(_), Some(Model { socket, .. })) => {
                socket.state = match socket.state {
                    TcpState::Established => TcpState::FinWait2,
                    TcpState::CloseWait => TcpState::LastAck,
                    other => other,
                };
            }
            (Event::Close(_), Some(_)) => drop(self.connections.remove(&index)),
            (Event::Leak(_), Some(connection)) => connection.leaked = Some(now),
            _ => {}
        }
    }

    /// The process does its work: no healthy connection is left alone for too long.
    fn attend(&mut self) {
        let now = self.now;
        for connection in self.connections.values_mut().filter(|connection| connection.leaked.is_none()) {
            let last = connection.socket.last_received_ns.max(connection.socket.last_sent_ns).unwrap();
            if now - last >= ATTENTION - SECOND {
                connection.socket.last_received_ns = Some(now);
            }
        }
    }

    fn sockets(&self) -> Vec<KernelSocket> {
        self.connections.values().map(|connection| connection.socket.clone()).collect()
    }
}

proptest! {
    /// Whatever states the connections of a process are in: one that moves bytes is never a finding, and one that does
    /// not any more is found when its limit, the grace time and the sweeps have passed.
    #[test]
    fn the_active_are_never_findings_and_leaks_are_in_time(
        steps in prop::collection::vec((prop::collection::vec(event(), 0..6), 0..SECOND), 1..60)
    ) {
        let mut world = World { now: 5 * SECOND, ..World::default() };
        let mut history = History::default();
        let mut check = |world: &World| {
            let findings = sweep(world.now, world.sockets(), &mut history);
            let found: BTreeMap<u64, Class> = findings.iter().map(|finding| (finding.cookie, finding.class)).collect();
            for Model { socket, leaked } in world.connections.values() {
                let class = found.get(&socket.cookie);
                let last = socket.last_received_ns.max(socket.last_sent_ns).unwrap();
                match leaked {
                    None => prop_assert!(class.is_none(), "{socket:?} is healthy: {class:?}"),
                    // The slowest class, and a sweep more, as the byte may have moved just after one.
                    Some(_) if world.now - last > IDLE + GRACE + 4 * SECOND => {
                        prop_assert!(class.is_some(), "{socket:?} leaks since {}", world.now - last);
                    }
                    Some(_) => {}
                }
            }
            Ok(())
        };
        for (events, phase) in steps {
            world.now += phase.max(MILLI);
            for event in events {
                world.apply(event);
            }
            world.attend();
            world.now += SECOND - phase;
            check(&world)?;
        }
        for _ in 0..20 {
            world.attend();
            world.now += SECOND;
            check(&world)?;
        }
    }
}
