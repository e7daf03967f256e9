//! The join at random, against a model that knows which connection is healthy and which leaks since when.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use proptest::prelude::*;

use super::tests::{SECOND, kernel, ledger, policy, row, socket};
use super::*;
use crate::close::CloseReason;
use crate::ledger::Tombstone;

/// What happens to the model's connections between two sweeps, or between the two reads of one.
#[derive(Clone, Debug)]
enum Event {
    Open,
    /// A byte moves.
    Move(usize),
    Close(usize),
    /// The peer closes; a healthy owner follows before the next sweep but one.
    PeerCloses(usize),
    /// The next kernel snapshot misses it, as an iterator over a changing table may.
    Miss(usize),
    Leak(usize, Class),
}

fn event(leaks: bool) -> impl Strategy<Value = Event> {
    let index = 0..32usize;
    let leak = prop::sample::select(vec![Class::Orphan, Class::Ghost, Class::Zombie, Class::Hoard]);
    prop_oneof![
        4 => Just(Event::Open),
        4 => index.clone().prop_map(Event::Move),
        3 => index.clone().prop_map(Event::Close),
        2 => index.clone().prop_map(Event::PeerCloses),
        2 => index.clone().prop_map(Event::Miss),
        u32::from(leaks) => (index, leak).prop_map(|(index, class)| Event::Leak(index, class)),
    ]
}

#[derive(Clone, Debug)]
struct Model {
    cookie: u64,
    opened: u64,
    moved: u64,
    /// Whether the kernel and the ledger have it.
    held: bool,
    row: bool,
    closed: Option<u64>,
    state: TcpState,
    /// The sweep by which a healthy owner follows the peer's close.
    follows: Option<u64>,
    /// Whether the next snapshot misses it, and how many did in a row.
    miss: bool,
    missed: u32,
    leak: Option<(Class, u64)>,
}

#[derive(Debug, Default)]
struct World {
    now: u64,
    conns: Vec<Model>,
}

impl World {
    fn alive(&mut self, index: usize) -> Option<&mut Model> {
        let mut alive: Vec<&mut Model> =
            self.conns.iter_mut().filter(|conn| conn.leak.is_none() && conn.closed.is_none()).collect();
        let index = index.checked_rem(alive.len())?;
        Some(alive.swap_remove(index))
    }

    fn apply(&mut self, event: &Event) {
        let now = self.now;
        match *event {
            Event::Open => self.conns.push(Model {
                cookie: self.conns.len() as u64 + 1,
                opened: now,
                moved: now,
                held: true,
                row: true,
                closed: None,
                state: TcpState::Established,
                follows: None,
                miss: false,
                missed: 0,
                leak: None,
            }),
            Event::Move(index) => {
                if let Some(conn) = self.alive(index) {
                    conn.moved = now;
                }
            }
            Event::Close(index) => {
                if let Some(conn) = self.alive(index) {
                    close(conn, now);
                }
            }
            Event::PeerCloses(index) => {
                if let Some(conn) = self.alive(index) {
                    conn.state = TcpState::CloseWait;
                    conn.follows.get_or_insert(now + SECOND);
                }
            }
            Event::Miss(index) => {
                if let Some(conn) = self.alive(index) {
                    conn.miss = true;
                }
            }
            Event::Leak(index, class) => {
                let Some(conn) = self.alive(index) else { return };
                if conn.state != TcpState::Established {
                    return;
                }
                conn.leak = Some((class, now));
                match class {
                    Class::Orphan => conn.row = false,
                    Class::Ghost => conn.held = false,
                    Class::Zombie => conn.state = TcpState::CloseWait,
                    // Nobody will close it.
                    _ => conn.moved = now,
                }
            }
        }
    }

    /// What healthy owners do in time.
    fn run_owners(&mut self) {
        let now = self.now;
        for conn in self.conns.iter_mut().filter(|conn| conn.leak.is_none() && conn.closed.is_none()) {
            if conn.follows.is_some_and(|by| by <= now) || now - conn.moved >= 31 * SECOND {
                close(conn, now);
            }
        }
    }

    fn kernel(&mut self) -> KernelSnapshot {
        let mut sockets = Vec::new();
        for conn in self.conns.iter_mut().filter(|conn| conn.held) {
            // An iterator may miss a socket now and then; not the same one in `sweeps` sweeps running.
            if std::mem::take(&mut conn.miss) && conn.leak.is_none() && conn.missed + 1 < policy().sweeps {
                conn.missed += 1;
            } else {
                conn.missed = 0;
                sockets.push(socket(conn.cookie, conn.state, conn.moved));
            }
        }
        kernel(self.now, sockets)
    }

    fn ledger(&self) -> LedgerSnapshot {
        let mut read = ledger(self.now, Vec::new());
        for conn in &self.conns {
            if conn.row {
                read.rows.push(row(conn.cookie, conn.opened, conn.moved));
            }
            if let Some(closed) = conn.closed {
                let reason = CloseReason::IdleTimeout;
                read.tombstones.push(Tombstone { cookie: conn.cookie, backend: 0, closed: Mono(closed), reason });
            }
        }
        read
    }
}

fn close(conn: &mut Model, now: u64) {
    (conn.held, conn.row, conn.closed) = (false, false, Some(now));
}

/// When a leak must have become a finding at the latest: grace or the sweeps, whichever is longer, and one interval
/// because it begins between two sweeps; a hoard is one only when its time is over.
fn due(class: Class, at: u64) -> u64 {
    let condition = if class == Class::Hoard { 31 } else { 0 };
    at + (condition + 3 + 1) * SECOND + SECOND / 10
}

/// The findings of each sweep, with its time.
type Sweeps = Vec<(u64, Vec<(Class, u64)>)>;

/// Runs the world, one list of events per sweep, half of each between the sweeps and half between the two reads.
fn run(steps: &[Vec<Event>], shuffle: bool) -> Result<Sweeps, TestCaseError> {
    let mut world = World { now: 1000 * SECOND, conns: Vec::new() };
    let mut history = History::default();
    let mut all = Vec::new();
    for events in steps {
        let (before, between) = events.split_at(events.len() / 2);
        for event in before {
            world.now += 1_000_000;
            world.apply(event);
        }
        world.run_owners();
        let mut kernel = world.kernel();
        for event in between {
            world.now += 1_000_000;
            world.apply(event);
        }
        let mut ledger = world.ledger();
        if shuffle {
            kernel.sockets.reverse();
            ledger.rows.reverse();
            ledger.tombstones.reverse();
        }
        let findings = reconcile(&Joined::new(&kernel, Trust::Full, &ledger), &mut history, &policy());
        for finding in &findings {
            let conn = world.conns.iter().find(|conn| conn.cookie == finding.cookie).unwrap();
            prop_assert_eq!(conn.leak.map(|(class, _)| class), Some(finding.class), "healthy: {:?}", conn);
        }
        for conn in &world.conns {
            if let Some((class, at)) = conn.leak
                && due(class, at) <= kernel.taken_ns
            {
                let found = findings.iter().any(|finding| finding.cookie == conn.cookie && finding.class == class);
                prop_assert!(found, "not found by {}: {:?}", kernel.taken_ns, conn);
            }
        }
        all.push((kernel.taken_ns, findings.iter().map(|finding| (finding.class, finding.cookie)).collect()));
        // Sweeps keep their rhythm whatever happens in between.
        world.now = (world.now / SECOND + 1) * SECOND;
    }
    Ok(all)
}

proptest! {
    #[test]
    fn no_healthy_connection_is_ever_a_finding(
        steps in prop::collection::vec(prop::collection::vec(event(false), 0..12), 1..60),
    ) {
        for (at, findings) in run(&steps, false)? {
            prop_assert!(findings.is_empty(), "at {}: {:?}", at, findings);
        }
    }

    #[test]
    fn every_leak_becomes_a_finding_in_time_and_nothing_else_does(
        steps in prop::collection::vec(prop::collection::vec(event(true), 0..12), 40..80),
    ) {
        run(&steps, false)?;
    }

    #[test]
    fn the_order_of_the_snapshots_does_not_matter(
        steps in prop::collection::vec(prop::collection::vec(event(true), 0..12), 1..50),
    ) {
        prop_assert_eq!(run(&steps, false)?, run(&steps, true)?);
    }
}
