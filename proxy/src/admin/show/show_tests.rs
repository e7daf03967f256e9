//! Replies from scripted readings.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::sync::Arc;

use super::*;
use crate::close::CloseReason;
use crate::config::{Class, ReapMode};
use crate::kernel::{Crosscheck, KernelSnapshot, KernelSocket, Source, TcpState, Witness};
use crate::ledger::{ConnKind, LedgerRow, LedgerSnapshot, RowId, RowState, Tombstone};
use crate::tls::Version;
use crate::watchdog::report::{Checked, Report};
use crate::watchdog::{Finding, fixture};

const NOW: Mono = Mono(100_000_000_000);
const UNBOUND: &str = "127.0.0.1:9";

fn socket(cookie: u64, state: TcpState, remote: &str) -> KernelSocket {
    KernelSocket {
        cookie,
        state,
        held: true,
        opened: Some(90_000_000_000),
        local: "127.0.0.1:40000".parse().unwrap(),
        remote: remote.parse().unwrap(),
        last_received_ns: Some(97_000_000_000),
        last_sent_ns: Some(98_000_000_000),
        bytes_sent: Some(40),
        bytes_received: Some(60),
        unread: Some(2),
        owner: 0,
        netns: 0,
    }
}

fn row(cookie: u64, kind: ConnKind, owner: u64, header: u64) -> LedgerRow {
    LedgerRow {
        id: RowId { shard: 0, slot: cookie as u32, generation: 2 },
        cookie,
        backend: 0,
        kind,
        state: RowState::Idle,
        opened: Mono(90_000_000_000),
        last_byte: Mono(98_500_000_000),
        in_flight: 1,
        queries: 5,
        owner,
        header,
        client_tls: None,
    }
}

fn finding(cookie: u64, class: Class) -> Finding {
    Finding {
        class,
        cookie,
        backend: Some(0),
        socket: Some(socket(cookie, TcpState::CloseWait, UNBOUND)),
        row: Some(row(cookie, ConnKind::Owned, 3, 7)),
        tombstone: None,
        since: Mono(95_000_000_000),
        first_seen: Mono(95_000_000_000),
        sweeps: 4,
        flight: Default::default(),
        held_back: None,
    }
}

fn look(sockets: Vec<KernelSocket>, rows: Vec<LedgerRow>) -> Look {
    Look {
        kernel: Ok(KernelSnapshot { taken_ns: NOW.0, sockets, missed: 3, ..KernelSnapshot::default() }),
        ledger: LedgerSnapshot { taken: NOW, rows, tombstones: Vec::new(), heartbeats: vec![NOW], pauses: Vec::new() },
        report: Arc::new(Report::new(Source::Ebpf, 1)),
    }
}

fn ask(what: What, after: u64, look: &Look) -> Page {
    let (observed, ..) = fixture::observed(fixture::config(ReapMode::Off, None));
    page(what, after, &Context { look, observed: &observed, now: NOW })
}

#[test]
fn a_connection_is_what_both_views_say_of_one_cookie() {
    let unheld = KernelSocket { held: false, ..socket(4, TcpState::FinWait2, UNBOUND) };
    let sockets = vec![socket(1, TcpState::Established, UNBOUND), socket(2, TcpState::Close, "192.0.2.1:1"), unheld];
    let mut look = look(sockets, vec![row(1, ConnKind::Owned, 3, 0xab), row(3, ConnKind::Shared, 0, 0)]);
    let closed = Tombstone { cookie: 2, backend: 0, closed: Mono(99_000_000_000), reason: CloseReason::MaxAge };
    look.ledger.tombstones = vec![closed, Tombstone { cookie: 99, ..closed }];
    let mut report = Report::new(Source::Ebpf, 1);
    report.findings = vec![finding(1, Class::Zombie)];
    look.report = Arc::new(report);
    let page = ask(What::Connections, 0, &look);
    assert_eq!((page.rows.len(), page.next), (4, None));
    let expected = json!({
        "event": "connection", "cookie": 1, "backend": "unbound", "local": "127.0.0.1:40000", "remote": UNBOUND,
        "tcp_state": "established", "held": true, "kind": "owned", "ledger_state": "idle", "worker": 0,
        "in_flight": 1, "carried": 5, "age_seconds": 10.0, "kernel_last_byte_seconds": 2.0,
        "ledger_last_byte_seconds": 1.5, "bytes_sent": 40, "bytes_received": 60, "unread": 2, "owner": 3,
        "header": "00000000000000ab", "closed_seconds": null, "close_reason": null, "finding": "zombie",
        "held_back": null,
    });
    assert_eq!(page.rows[0], expected);
    let [_, orphan, ghost, unheld] = page.rows.try_into().unwrap();
    assert_eq!(
        (&orphan["backend"], &orphan["close_reason"], &orphan["kind"]),
        (&json!("unbound"), &json!("max_age"), &json!(null))
    );
    assert_eq!((&ghost["tcp_state"], &ghost["kind"], &ghost["owner"]), (&json!(null), &json!("shared"), &json!(null)));
    assert_eq!((&unheld["held"], &unheld["tcp_state"]), (&json!(false), &json!("fin_wait2")));
}

#[test]
fn long_lists_come_in_pages_that_miss_and_repeat_nothing() {
    let rows: Vec<LedgerRow> = (1..=1234).map(|cookie| row(cookie * 3, ConnKind::Owned, cookie * 3, cookie)).collect();
    let mut look = look(Vec::new(), rows);
    let mut report = Report::new(Source::Ebpf, 1);
    report.findings = (1..=1234).rev().map(|cookie| finding(cookie * 3, Class::Ghost)).collect();
    look.report = Arc::new(report);
    for (what, event, key) in [
        (What::Connections, "connection", "cookie"),
        (What::Clients, "client", "owner"),
        (What::Findings, "finding", "cookie"),
    ] {
        let (mut seen, mut after, mut pages) = (BTreeSet::new(), 0, 0);
        loop {
            let page = ask(what, after, &look);
            assert!(page.rows.len() <= PAGE);
            let rows = page.rows.iter().filter(|row| row["event"] == event);
            assert!(rows.map(|row| row[key].as_u64().unwrap()).all(|cookie| seen.insert(cookie)), "{what:?}");
            pages += 1;
            match page.next {
                Some(next) => after = next,
                None => break,
            }
        }
        assert_eq!((seen.len(), pages), (1234, 3), "{what:?}");
    }
}

#[test]
fn backends_have_ledger_and_kernel_side_by_side() {
    let sockets = vec![
        socket(1, TcpState::Established, UNBOUND),
        socket(2, TcpState::CloseWait, UNBOUND),
        KernelSocket { held: false, ..socket(3, TcpState::FinWait2, UNBOUND) },
        socket(4, TcpState::Established, "192.0.2.1:53"),
    ];
    let look = look(sockets, vec![row(1, ConnKind::Keyed, 0, 9), row(2, ConnKind::Owned, 3, 9)]);
    let rows = ask(What::Backends, 0, &look).rows;
    assert_eq!(
        rows.iter().map(|row| row["event"].as_str().unwrap()).collect::<Vec<_>>(),
        ["backend", "backend", "backend", "total"]
    );
    assert_eq!(rows[0]["ledger"], json!({"keyed": {"idle": 1}, "owned": {"idle": 1}}));
    assert_eq!(rows[0]["kernel"], json!({"established": 1, "close_wait": 1}));
    assert_eq!((&rows[0]["unheld"], &rows[0]["limit"]), (&json!({"fin_wait2": 1}), &json!(100)));
    assert_eq!(
        (&rows[0]["connections"], &rows[0]["sockets"], &rows[0]["in_flight"]),
        (&json!(2), &json!(2), &json!(2))
    );
    assert_eq!(
        (&rows[1]["backend"], &rows[1]["sockets"], &rows[1]["pool"]),
        (&json!("drill"), &json!(0), &json!(null))
    );
    assert_eq!((&rows[2]["backend"], &rows[2]["sockets"]), (&json!("unknown"), &json!(1)));
    assert_eq!((&rows[3]["connections"], &rows[3]["sockets"]), (&json!(2), &json!(3)));
}

#[test]
fn headers_are_counted_by_digest() {
    let mut rows: Vec<LedgerRow> = (1..=150).map(|cookie| row(cookie, ConnKind::Owned, 3, cookie)).collect();
    rows.extend([row(200, ConnKind::Owned, 4, 77), row(201, ConnKind::Shared, 0, 0)]);
    let rows = ask(What::Tlvs, 0, &look(Vec::new(), rows)).rows;
    assert_eq!(rows.len(), 1, "one backend");
    let headers = &rows[0];
    assert_eq!((&headers["connections"], &headers["without_header"]), (&json!(152), &json!(1)));
    assert_eq!((&headers["distinct_headers"], &headers["headers_left_out"]), (&json!(150), &json!(50)));
    let listed = headers["headers"].as_array().unwrap();
    assert_eq!(listed.len(), 100);
    assert_eq!(
        (&listed[0]["header"], &listed[0]["connections"]),
        (&json!("000000000000004d"), &json!(2)),
        "most first"
    );
    assert_eq!((&headers["identity"], &headers["tlvs"]), (&json!(null), &json!([])), "this pool sends none");
}

#[test]
fn the_witness_that_is_wrong_is_named() {
    let mut look = look(Vec::new(), Vec::new());
    let mut report = (*look.report).clone();
    let result = Crosscheck {
        compared: [3, 2, 1],
        liar: Some(Witness::ProcFd),
        disagreement: Some("proc_fd contradicts".to_owned()),
        ..Crosscheck::default()
    };
    report.crosscheck = Some(Checked { at: 7.5, result });
    look.report = Arc::new(report);
    let rows = ask(What::View, 0, &look).rows;
    let expected = json!({
        "time": 7.5, "view": 3, "descriptors": 2, "sock_diag": 1, "found": 0, "held_elsewhere": 0,
        "disagreement": "proc_fd contradicts", "liar": "proc_fd",
    });
    assert_eq!(rows[0]["crosscheck"], expected);
}

#[test]
fn a_view_that_cannot_be_read_is_said() {
    let mut look = look(Vec::new(), vec![row(1, ConnKind::Shared, 0, 0)]);
    look.kernel = Err("netlink: no".to_owned());
    let rows = ask(What::View, 0, &look).rows;
    assert_eq!((&rows[0]["uncertain"], &rows[0]["connections"]), (&json!("netlink: no"), &json!(1)));
    assert_eq!((&rows[0]["crosscheck"], &rows[0]["workers"][0]["stalled"]), (&json!(null), &json!(false)));
    assert_eq!(ask(What::Connections, 0, &look).rows.len(), 1, "the ledger is shown all the same");
}

#[test]
fn a_client_is_shown_with_its_version_of_tls() {
    let over = |cookie, owner, client_tls| LedgerRow { client_tls, ..row(cookie, ConnKind::Owned, owner, cookie) };
    let rows = vec![over(1, 3, Some(Version::Tls13)), over(2, 3, Some(Version::Tls13)), over(4, 5, None)];
    let rows = ask(What::Clients, 0, &look(Vec::new(), rows)).rows;
    let shown: Vec<_> =
        rows.iter().filter(|row| row["event"] == "client").map(|row| (&row["owner"], &row["tls"])).collect();
    assert_eq!(shown, [(&json!(3), &json!("1.3")), (&json!(5), &json!(null))]);
}
