//! The reaper against a scripted world: each rung has an effect on it, or none.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeMap;

use super::*;
use crate::kernel::{KernelSnapshot, TcpState};
use crate::ledger::{ConnKind, LedgerRow, LedgerSnapshot, RowState};
use crate::watchdog::policy::BackendPolicy;
use crate::watchdog::reconcile::{History, Trust, reconcile};

const SECOND: u64 = 1_000_000_000;

/// What a socket puts up with before its descriptor is closed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nature {
    ClosesWhenAsked,
    WakesFromShutdown,
    OnlySevered,
    Immovable,
}

struct World {
    now: u64,
    sockets: BTreeMap<u64, (KernelSocket, Nature)>,
    rows: BTreeMap<u64, LedgerRow>,
    asked: usize,
    destroyed: Vec<u64>,
}

impl World {
    fn add(&mut self, cookie: u64, state: TcpState, nature: Nature, in_ledger: bool) {
        let socket = KernelSocket {
            cookie,
            state,
            held: true,
            opened: Some(1),
            local: "127.0.0.1:40000".parse().unwrap(),
            remote: "127.0.0.1:15302".parse().unwrap(),
            last_received_ns: Some(1),
            last_sent_ns: None,
            bytes_sent: None,
            bytes_received: None,
            unread: None,
            owner: 0,
            netns: 0,
        };
        self.sockets.insert(cookie, (socket, nature));
        if in_ledger {
            self.add_row(cookie);
        }
    }

    fn add_row(&mut self, cookie: u64) {
        let id = RowId { shard: 0, slot: cookie as u32, generation: 2 };
        let row = LedgerRow {
            id,
            cookie,
            backend: 0,
            kind: ConnKind::Shared,
            state: RowState::Idle,
            opened: Mono(1),
            last_byte: Mono(1),
            in_flight: 0,
            queries: 1,
            owner: 0,
            header: 0,
            client_tls: None,
        };
        self.rows.insert(cookie, row);
    }

    fn snapshots(&self) -> (KernelSnapshot, LedgerSnapshot) {
        let sockets = self.sockets.values().map(|(socket, _)| socket.clone()).collect();
        let kernel = KernelSnapshot { taken_ns: self.now, sockets, ..KernelSnapshot::default() };
        let ledger = LedgerSnapshot {
            taken: Mono(self.now),
            rows: self.rows.values().copied().collect(),
            tombstones: Vec::new(),
            heartbeats: vec![Mono(self.now)],
            ..LedgerSnapshot::default()
        };
        (kernel, ledger)
    }

    fn close(&mut self, cookie: u64) {
        self.sockets.remove(&cookie);
        self.rows.remove(&cookie);
    }
}

impl Hands for World {
    fn ask(&mut self, row: RowId) -> bool {
        self.asked += 1;
        let cookie = u64::from(row.slot);
        if self.sockets.get(&cookie).is_some_and(|(_, nature)| *nature == Nature::ClosesWhenAsked) {
            self.close(cookie);
        }
        true
    }

    fn shut_down(&mut self, row: RowId) -> bool {
        let cookie = u64::from(row.slot);
        let Some((socket, nature)) = self.sockets.get_mut(&cookie) else { return false };
        if *nature == Nature::WakesFromShutdown {
            self.close(cookie);
        } else {
            socket.state = TcpState::LastAck;
        }
        true
    }

    fn destroy(&mut self, socket: &KernelSocket) -> io::Result<()> {
        self.destroyed.push(socket.cookie);
        match self.sockets.get_mut(&socket.cookie) {
            Some((_, Nature::Immovable)) => Err(io::Error::from(io::ErrorKind::PermissionDenied)),
            Some((socket, _)) => {
                socket.state = TcpState::Close;
                Ok(())
            }
            None => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
    }

    fn retire(&mut self, row: RowId, cookie: u64) -> bool {
        assert_eq!(u64::from(row.slot), cookie);
        self.rows.remove(&cookie).is_some()
    }
}

fn policy() -> Policy {
    Policy {
        backends: vec![BackendPolicy {
            name: "unbound".to_owned(),
            address: "127.0.0.1:15302".parse().unwrap(),
            former: Vec::new(),
            configured: true,
            hoard_after: Duration::from_secs(31),
            spent_after: Duration::from_secs(1),
            spare_after: Duration::from_secs(2),
            stuck_after: Duration::from_secs(31),
            embryo_after: Duration::from_secs(3),
            check_after: Duration::from_secs(21),
            paused_after: Duration::from_secs(6),
        }],
        drill: 1,
        workers: 1,
        grace: Duration::from_secs(3),
        sweeps: 3,
        stalled_after: Duration::from_secs(3),
        max_pause: Duration::from_secs(5),
    }
}

fn config(reap: ReapMode, per_minute: u32) -> Watchdog {
    Watchdog {
        interval: Duration::from_secs(1),
        grace: Duration::from_secs(3),
        sweeps: 3,
        crosscheck_interval: Duration::from_secs(60),
        reap,
        max_reaps_per_minute: per_minute,
        classes: Class::ALL.to_vec(),
    }
}

/// Sweeps and steps twice a second for as long as asked.
fn run(world: &mut World, reaper: &mut Reaper, seconds: u64) {
    let mut history = History::default();
    for _ in 0..seconds * 2 {
        let (kernel, ledger) = world.snapshots();
        let joined = Joined::new(&kernel, Trust::Full, &ledger);
        let findings = reconcile(&joined, &mut history, &policy());
        reaper.admit(&findings, &joined, &policy(), Mono(world.now));
        let now = Mono(world.now);
        reaper.step(&joined, &policy(), world, now);
        world.now += SECOND / 2;
    }
}

fn world() -> World {
    World { now: 100 * SECOND, sockets: BTreeMap::new(), rows: BTreeMap::new(), asked: 0, destroyed: Vec::new() }
}

fn endings(reaper: &Reaper) -> Vec<(u64, Option<Rung>, Option<Outcome>)> {
    let mut endings: Vec<_> = reaper.recent.iter().map(|record| (record.cookie, record.rung, record.outcome)).collect();
    endings.sort_unstable_by_key(|(cookie, ..)| *cookie);
    endings
}

#[test]
fn each_nature_ends_as_the_kernel_shows() {
    let mut world = world();
    world.add(1, TcpState::CloseWait, Nature::ClosesWhenAsked, true);
    world.add(2, TcpState::CloseWait, Nature::WakesFromShutdown, true);
    world.add(3, TcpState::Established, Nature::OnlySevered, false);
    world.add(4, TcpState::CloseWait, Nature::Immovable, true);
    world.add_row(5);
    let mut reaper = Reaper::new(&config(ReapMode::On, 600));
    run(&mut world, &mut reaper, 9);
    assert_eq!(
        endings(&reaper),
        [
            (1, Some(Rung::Ask), Some(Outcome::Released)),
            (2, Some(Rung::ShutDown), Some(Outcome::Released)),
            (3, Some(Rung::Destroy), Some(Outcome::Severed)),
            (4, Some(Rung::Destroy), Some(Outcome::Ineffective)),
            (5, Some(Rung::Retire), Some(Outcome::Released)),
        ]
    );
    assert_eq!(world.destroyed, [3, 4], "and each once");
    assert_eq!(reaper.counts[Class::Zombie as usize], [2, 0, 1, 0]);
    assert!(reaper.recent.iter().any(|record| record.note.contains("SOCK_DESTROY")));
    assert!(!reaper.is_busy());
}

#[test]
fn dry_run_counts_each_finding_once_and_touches_nothing() {
    let mut world = world();
    world.add(1, TcpState::CloseWait, Nature::ClosesWhenAsked, true);
    let mut reaper = Reaper::new(&config(ReapMode::DryRun, 600));
    run(&mut world, &mut reaper, 20);
    assert_eq!(reaper.counts[Class::Zombie as usize], [0, 0, 0, 1]);
    assert_eq!((world.asked, world.sockets.len()), (0, 1));
}

#[test]
fn off_and_classes_that_are_not_acted_on() {
    let mut world = world();
    world.add(1, TcpState::CloseWait, Nature::ClosesWhenAsked, true);
    let mut off = Reaper::new(&config(ReapMode::Off, 600));
    run(&mut world, &mut off, 10);
    let mut orphans = Reaper::new(&Watchdog { classes: vec![Class::Orphan], ..config(ReapMode::On, 600) });
    run(&mut world, &mut orphans, 10);
    assert!(off.recent.is_empty() && orphans.recent.is_empty());
    assert_eq!(world.asked, 0);
}

#[test]
fn the_rate_cap_holds_and_the_rest_follows_later() {
    let mut world = world();
    for cookie in 1..=5 {
        world.add(cookie, TcpState::CloseWait, Nature::ClosesWhenAsked, true);
    }
    let mut reaper = Reaper::new(&config(ReapMode::On, 2));
    run(&mut world, &mut reaper, 30);
    assert_eq!(reaper.counts[Class::Zombie as usize][Outcome::Released as usize], 2);
    run(&mut world, &mut reaper, 60);
    assert_eq!(reaper.counts[Class::Zombie as usize][Outcome::Released as usize], 4);
}

#[test]
fn what_stays_severed_is_not_reaped_again() {
    let mut world = world();
    world.add(3, TcpState::Established, Nature::OnlySevered, false);
    let mut reaper = Reaper::new(&config(ReapMode::On, 600));
    run(&mut world, &mut reaper, 200);
    assert_eq!(endings(&reaper), [(3, Some(Rung::Destroy), Some(Outcome::Severed))]);
    assert_eq!(world.sockets.len(), 1, "the descriptor still leaks and stays a finding");
}

#[test]
fn the_last_thousand_records_are_kept() {
    let mut world = world();
    for cookie in 1..=1500 {
        world.add(cookie, TcpState::CloseWait, Nature::ClosesWhenAsked, true);
    }
    let mut reaper = Reaper::new(&config(ReapMode::On, 1_000_000));
    run(&mut world, &mut reaper, 9);
    assert_eq!(reaper.counts[Class::Zombie as usize][Outcome::Released as usize], 1500);
    let serials: Vec<u64> = reaper.recent.iter().map(|record| record.serial).collect();
    assert_eq!((serials.len(), serials.first(), serials.last()), (RECENT, Some(&501), Some(&1500)));
}

#[test]
fn a_line_in_the_log_is_short_and_whole() {
    assert_eq!(type_list(&[0xe0, 0x0a]), "0xE0,0x0A");
    let mut flight = Flight::default();
    let change = |at, tcp, row| Change { at: Mono(at * SECOND), tcp, row };
    flight.record(change(1, Some(TcpState::Established), Some(RowState::Busy)));
    flight.record(change(3, Some(TcpState::CloseWait), None));
    assert_eq!(changes(&flight, Mono(4 * SECOND)), "3.0 s ago established/busy, 1.0 s ago close_wait/none");
}
