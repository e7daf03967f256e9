//! Each class by example.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;

use super::*;
use crate::close::CloseReason;
use crate::ledger::{RowId, RowState};
use crate::watchdog::policy::BackendPolicy;

pub(super) const SECOND: u64 = 1_000_000_000;
const BACKEND: &str = "127.0.0.1:15302";

pub(super) fn policy() -> Policy {
    let backend = |name: &str, address: &str| BackendPolicy {
        name: name.to_owned(),
        address: address.parse().unwrap(),
        former: Vec::new(),
        configured: true,
        hoard_after: Duration::from_secs(31),
        spent_after: Duration::from_secs(1),
        spare_after: Duration::from_secs(2),
        stuck_after: Duration::from_secs(31),
        embryo_after: Duration::from_secs(3),
        check_after: Duration::from_secs(21),
        paused_after: Duration::from_secs(6),
    };
    Policy {
        backends: vec![backend("unbound", BACKEND), backend("drill", "127.0.0.1:1")],
        drill: 1,
        workers: 1,
        grace: Duration::from_secs(3),
        sweeps: 3,
        stalled_after: Duration::from_secs(3),
        max_pause: Duration::from_secs(5),
    }
}

pub(super) fn socket(cookie: u64, state: TcpState, last: u64) -> KernelSocket {
    KernelSocket {
        cookie,
        state,
        held: true,
        opened: Some(SECOND),
        local: "127.0.0.1:40000".parse::<SocketAddr>().unwrap(),
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

pub(super) fn row(cookie: u64, opened: u64, last: u64) -> LedgerRow {
    LedgerRow {
        id: RowId { shard: 0, slot: 0, generation: 2 },
        cookie,
        backend: 0,
        kind: ConnKind::Shared,
        state: RowState::Idle,
        opened: Mono(opened),
        last_byte: Mono(last),
        in_flight: 0,
        queries: 1,
        owner: 0,
        header: 0,
        client_tls: None,
    }
}

pub(super) fn kernel(at: u64, sockets: Vec<KernelSocket>) -> KernelSnapshot {
    KernelSnapshot { taken_ns: at, sockets, ..KernelSnapshot::default() }
}

/// A ledger read just after `at`, whose worker has just shown that it runs.
pub(super) fn ledger(at: u64, rows: Vec<LedgerRow>) -> LedgerSnapshot {
    LedgerSnapshot { taken: Mono(at), rows, heartbeats: vec![Mono(at), Mono::ZERO], ..LedgerSnapshot::default() }
}

/// Sweeps once a second with the same two halves; the time of the first finding, and the finding.
fn sweep_until_found(
    from: u64,
    trust: Trust,
    halves: impl Fn(u64) -> (KernelSnapshot, LedgerSnapshot),
) -> Option<(u64, Finding)> {
    let mut history = History::default();
    (0..60).find_map(|sweep| {
        let at = from + sweep * SECOND;
        let (kernel, ledger) = halves(at);
        let finding = reconcile(&Joined::new(&kernel, trust, &ledger), &mut history, &policy()).pop()?;
        Some((at, finding))
    })
}

#[test]
fn each_class_is_found_after_grace_and_sweeps() {
    let start = 100 * SECOND;
    let fresh = |at: u64| at;
    // (class, socket and row, earliest time)
    type Case = (Class, fn(u64) -> (Option<KernelSocket>, Option<LedgerRow>), u64);
    let cases: [Case; 8] = [
        (Class::Orphan, |at| (Some(socket(7, TcpState::Established, at)), None), start + 3 * SECOND),
        (Class::Ghost, |_| (None, Some(row(7, SECOND, SECOND))), start + 3 * SECOND),
        (Class::Zombie, |at| (Some(socket(7, TcpState::CloseWait, at)), Some(row(7, SECOND, at))), start + 3 * SECOND),
        // Held after a reset: TCP's state is CLOSE, and `sock_diag` would not even show it.
        (Class::Zombie, |at| (Some(socket(7, TcpState::Close, at)), Some(row(7, SECOND, at))), start + 3 * SECOND),
        // The ledger says that a byte moved just now; the kernel knows better.
        (
            Class::Hoard,
            |at| (Some(socket(7, TcpState::Established, 100 * SECOND)), Some(row(7, SECOND, at))),
            start + 34 * SECOND,
        ),
        (
            Class::Stuck,
            |at| {
                let busy = LedgerRow { in_flight: 1, ..row(7, SECOND, at) };
                (Some(socket(7, TcpState::Established, 100 * SECOND)), Some(busy))
            },
            start + 34 * SECOND,
        ),
        (
            Class::Embryo,
            |at| {
                let opened = Some(100 * SECOND);
                (Some(KernelSocket { opened, ..socket(7, TcpState::SynSent, at) }), Some(row(7, SECOND, at)))
            },
            start + 6 * SECOND,
        ),
        (
            Class::Lingering,
            |at| (Some(socket(7, TcpState::FinWait2, at)), Some(row(7, SECOND, at))),
            start + 3 * SECOND,
        ),
    ];
    for (class, halves, earliest) in cases {
        let (at, finding) = sweep_until_found(start, Trust::Full, |at| {
            let (socket, row) = halves(fresh(at));
            (kernel(at, socket.into_iter().collect()), ledger(at, row.into_iter().collect()))
        })
        .unwrap();
        assert_eq!(finding.class, class);
        assert_eq!(at, earliest, "{class:?}");
        assert_eq!(finding.backend, Some(0), "{class:?}");
        assert_eq!(finding.held_back, None, "{class:?}");
    }
}

#[test]
fn a_spent_one_shot_connection_is_a_hoard_at_once() {
    let start = 100 * SECOND;
    let (at, finding) = sweep_until_found(start, Trust::Full, |at| {
        let spent = LedgerRow { kind: ConnKind::OneShot, ..row(7, SECOND, at) };
        (kernel(at, vec![socket(7, TcpState::Established, start)]), ledger(at, vec![spent]))
    })
    .unwrap();
    assert_eq!((finding.class, at), (Class::Hoard, start + 4 * SECOND));
}

/// It is hoarded once it is idle for longer than a spare one may be, whatever other connections may.
#[test]
fn a_spare_connection_has_a_timeout_of_its_own() {
    let start = 100 * SECOND;
    let (at, finding) = sweep_until_found(start, Trust::Full, |at| {
        let spare = LedgerRow { kind: ConnKind::Spare, queries: 0, ..row(7, SECOND, at) };
        (kernel(at, vec![socket(7, TcpState::Established, start)]), ledger(at, vec![spare]))
    })
    .unwrap();
    assert_eq!((finding.class, at), (Class::Hoard, start + 5 * SECOND));
}

/// It may take as long as `health.timeout` to connect, which may be longer than `connect_timeout`. Reaped before that, it
/// would never fail, and its backend never go down.
#[test]
fn a_health_check_that_connects_has_a_timeout_of_its_own() {
    let start = 100 * SECOND;
    let (at, finding) = sweep_until_found(start, Trust::Full, |at| {
        let check = LedgerRow { kind: ConnKind::Check, queries: 0, ..row(7, start, start) };
        let socket = KernelSocket { opened: Some(start), ..socket(7, TcpState::SynSent, start) };
        (kernel(at, vec![socket]), ledger(at, vec![check]))
    })
    .unwrap();
    assert_eq!((finding.class, at), (Class::Embryo, start + 24 * SECOND));
}

/// A zone transfer whose client reads now and then, as the ledger says, may wait for as long as that goes on: its backend
/// can send nothing, or has closed long ago. The same row without news from the client is found.
#[test]
fn a_paused_transfer_is_healthy_as_long_as_its_client_reads() {
    let start = 100 * SECOND;
    let paused =
        |at| LedgerRow { kind: ConnKind::OneShot, state: RowState::Paused, in_flight: 1, ..row(7, SECOND, at) };
    let found = |state, last: fn(u64) -> u64| {
        sweep_until_found(start, Trust::Full, |at| {
            (kernel(at, vec![socket(7, state, start)]), ledger(at, vec![paused(last(at))]))
        })
        .map(|(at, finding)| (finding.class, (at - start) / SECOND))
    };
    for state in [TcpState::CloseWait, TcpState::Close, TcpState::Established] {
        assert_eq!(found(state, |at| at - 5 * SECOND), None, "{state:?}");
    }
    // Its client has last read at the start: 6 s, or 31 s, and the time of grace.
    assert_eq!(found(TcpState::CloseWait, |_| 100 * SECOND), Some((Class::Zombie, 9)));
    assert_eq!(found(TcpState::Close, |_| 100 * SECOND), Some((Class::Zombie, 9)));
    assert_eq!(found(TcpState::Established, |_| 100 * SECOND), Some((Class::Stuck, 34)));
    // A busy one has no such excuse.
    let busy = sweep_until_found(start, Trust::Full, |at| {
        let row = LedgerRow { state: RowState::Busy, ..paused(at) };
        (kernel(at, vec![socket(7, TcpState::CloseWait, start)]), ledger(at, vec![row]))
    });
    assert_eq!(busy.map(|(at, finding)| (finding.class, (at - start) / SECOND)), Some((Class::Zombie, 3)));
}

#[test]
fn a_young_row_and_a_young_tombstone_explain() {
    let at = 100 * SECOND;
    let taken = Mono(at);
    let row = row(7, at, at);
    assert_eq!(condition(&Pair { row: Some(&row), ..Pair::default() }, taken, Trust::Full, &policy()), None);
    let socket = socket(7, TcpState::Established, at);
    let tombstone = |closed| Tombstone { cookie: 7, backend: 0, closed, reason: CloseReason::MaxAge };
    let young = tombstone(Mono(at + 1));
    let pair = Pair { socket: Some(&socket), tombstone: Some(&young), ..Pair::default() };
    assert_eq!(condition(&pair, taken, Trust::Full, &policy()), None);
    let old = tombstone(Mono(at - 1));
    let pair = Pair { socket: Some(&socket), tombstone: Some(&old), ..Pair::default() };
    let orphan = Condition { class: Class::Orphan, since: Some(old.closed) };
    assert_eq!(condition(&pair, taken, Trust::Full, &policy()), Some(orphan));
}

#[test]
fn an_orphan_that_we_closed_says_why() {
    let closed = 100 * SECOND;
    let (at, finding) = sweep_until_found(closed + 1, Trust::Full, |at| {
        let mut ledger = ledger(at, Vec::new());
        let reason = CloseReason::MaxAge;
        ledger.tombstones.push(Tombstone { cookie: 7, backend: 1, closed: Mono(closed), reason });
        (kernel(at, vec![socket(7, TcpState::Established, at)]), ledger)
    })
    .unwrap();
    assert_eq!(at, closed + 1 + 3 * SECOND, "the grace counts from the close");
    assert_eq!(finding.tombstone.map(|tombstone| tombstone.reason), Some(CloseReason::MaxAge));
    assert_eq!(finding.backend, Some(1), "the ledger's word on the backend");
}

#[test]
fn an_unheld_socket_is_no_socket() {
    let unheld = |at| KernelSocket { held: false, ..socket(7, TcpState::FinWait2, at) };
    let found = |rows: fn() -> Vec<LedgerRow>| {
        sweep_until_found(100 * SECOND, Trust::Full, |at| (kernel(at, vec![unheld(at)]), ledger(at, rows())))
    };
    assert!(found(Vec::new).is_none());
    assert_eq!(found(|| vec![row(7, SECOND, SECOND)]).map(|(_, finding)| finding.class), Some(Class::Ghost));
}

#[test]
fn without_ebpf_the_ledger_tells_the_time_and_only_zombies_are_reaped() {
    let start = 100 * SECOND;
    let silent = |at| KernelSocket { last_received_ns: None, ..socket(7, TcpState::Established, at) };
    let (_, hoard) = sweep_until_found(start, Trust::Fallback, |at| {
        (kernel(at, vec![silent(at)]), ledger(at, vec![row(7, SECOND, start)]))
    })
    .unwrap();
    assert_eq!((hoard.class, hoard.held_back), (Class::Hoard, Some(HeldBack::Fallback)));
    let (_, zombie) = sweep_until_found(start, Trust::Fallback, |at| {
        (kernel(at, vec![socket(7, TcpState::CloseWait, at)]), ledger(at, vec![row(7, SECOND, start)]))
    })
    .unwrap();
    assert_eq!((zombie.class, zombie.held_back), (Class::Zombie, None));
}

#[test]
fn an_uncertain_view_reports_and_holds_back_until_it_was_whole_for_long_enough() {
    let mut history = History::default();
    let mut held = Vec::new();
    for sweep in 0..12 {
        let at = (100 + sweep) * SECOND;
        let mut kernel = kernel(at, vec![socket(7, TcpState::CloseWait, at)]);
        kernel.uncertain = (sweep == 6).then(|| "storage failed".to_owned());
        let ledger = ledger(at, vec![row(7, SECOND, SECOND)]);
        let findings = reconcile(&Joined::new(&kernel, Trust::Full, &ledger), &mut history, &policy());
        held.push(findings.first().map(|finding| finding.held_back));
    }
    let uncertain = Some(Some(HeldBack::Uncertain));
    let free = Some(None);
    assert_eq!(
        held,
        [None, None, None, free, free, free, uncertain, uncertain, uncertain, free, free, free],
        "three whole sweeps after the doubt"
    );
}

#[test]
fn a_worker_that_has_not_run_since_is_not_reaped() {
    let start = 100 * SECOND;
    let hung = |beat: u64, shard: usize, with_row: bool| {
        let halves = move |at| {
            let mut row = row(7, SECOND, SECOND);
            row.id.shard = shard;
            let mut ledger = ledger(at, if with_row { vec![row] } else { Vec::new() });
            ledger.heartbeats = vec![Mono(beat), Mono::ZERO];
            (kernel(at, vec![socket(7, TcpState::CloseWait, at)]), ledger)
        };
        sweep_until_found(start, Trust::Full, halves).unwrap().1.held_back
    };
    assert_eq!(hung(start, 0, true), Some(HeldBack::WorkerStalled(0)));
    assert_eq!(hung(start, 0, false), Some(HeldBack::WorkerStalled(0)), "an orphan might be anybody's");
    assert_eq!(hung(start, 1, true), None, "the drill's shard has no worker");
    assert_eq!(hung(start + 2 * SECOND, 0, true), None, "it ran after the condition began");
    let mut quiet = ledger(start, Vec::new());
    quiet.heartbeats = vec![Mono::ZERO];
    assert_eq!(stalled(&quiet, Mono(start - 2 * SECOND), &policy()), [false], "it has only just started");
    assert_eq!(stalled(&quiet, Mono(start - 4 * SECOND), &policy()), [true]);
    quiet.heartbeats = vec![Mono::MAX];
    assert_eq!(stalled(&quiet, Mono::ZERO, &policy()), [false], "it has drained and ended");
}

#[test]
fn what_came_while_the_owner_did_not_run_counts_from_when_it_ran_again() {
    let found = |pauses: Vec<Pause>| {
        let halves = |at| {
            let ledger = LedgerSnapshot { pauses: vec![pauses.clone()], ..ledger(at, vec![row(7, SECOND, at)]) };
            (kernel(at, vec![socket(7, TcpState::Established, 100 * SECOND)]), ledger)
        };
        sweep_until_found(100 * SECOND, Trust::Full, halves).map(|(at, finding)| (finding.class, at / SECOND))
    };
    let pause = |from: u64, to: u64| Pause { from: Mono(from * SECOND), to: Mono(to * SECOND) };
    assert_eq!(found(Vec::new()), Some((Class::Hoard, 134)));
    assert_eq!(found(vec![pause(90, 99), pause(100, 110), pause(111, 120)]), Some((Class::Hoard, 144)));
    assert_eq!(found(vec![pause(101, 140)]), Some((Class::Hoard, 134)), "it had been read before");
}

#[test]
fn a_worker_that_has_just_come_back_has_time_to_put_things_right() {
    let mut history = History::default();
    let held: Vec<_> = (0..12)
        .map(|sweep| {
            let at = (100 + sweep) * SECOND;
            let mut ledger = ledger(at, vec![row(7, SECOND, SECOND)]);
            // It stands still until the eighth sweep.
            ledger.heartbeats = vec![if sweep < 8 { Mono(100 * SECOND) } else { Mono(at) }];
            let kernel = kernel(at, vec![socket(7, TcpState::CloseWait, at)]);
            let findings = reconcile(&Joined::new(&kernel, Trust::Full, &ledger), &mut history, &policy());
            findings.first().map(|finding| finding.held_back)
        })
        .collect();
    let stalled = Some(Some(HeldBack::WorkerStalled(0)));
    let free = Some(None);
    assert_eq!(held[..3], [None; 3]);
    assert_eq!(held[3..], [stalled, stalled, stalled, stalled, stalled, stalled, stalled, free, free]);
}

#[test]
fn a_pause_of_the_whole_process_starts_the_count_again() {
    let mut history = History::default();
    let mut sweep = |at: u64| {
        let ledger = ledger(at, vec![row(7, SECOND, SECOND)]);
        let kernel = kernel(at, vec![socket(7, TcpState::CloseWait, at)]);
        reconcile(&Joined::new(&kernel, Trust::Full, &ledger), &mut history, &policy()).len()
    };
    assert_eq!([sweep(100 * SECOND), sweep(101 * SECOND)], [0, 0]);
    let later = 200 * SECOND;
    assert_eq!([0, 1, 2, 3].map(|n| sweep(later + n * SECOND)), [0, 0, 0, 1]);
}

#[test]
fn a_foreign_peer_is_reported_and_left_alone() {
    let (_, finding) = sweep_until_found(100 * SECOND, Trust::Full, |at| {
        let foreign = KernelSocket { remote: "192.0.2.1:443".parse().unwrap(), ..socket(7, TcpState::Established, at) };
        (kernel(at, vec![foreign]), ledger(at, Vec::new()))
    })
    .unwrap();
    assert_eq!((finding.backend, finding.held_back), (None, Some(HeldBack::ForeignPeer)));
}
