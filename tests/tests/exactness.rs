//! Ledger and kernel view are equal as sets of socket cookies, at every moment at which the process stands still.
#![expect(clippy::expect_used, reason = "tests panic")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use counterfoil::churn::{Churn, Seen, run};
use counterfoil::config::View;
use counterfoil::kernel;

/// The view sees every socket of this process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn churn(forget_every: u32) -> Seen {
    let (mut view, source, reason) = kernel::open(View::Ebpf, &[], 65_536).expect("the eBPF view");
    println!("kernel view: {source:?} ({reason})");
    let churn = Churn { threads: 4, connects: 100_000, barriers: 50, keep: 100, forget_every, seed: 0x00c0_ffee };
    let seen = run(churn, view.as_mut()).expect("the churn runs to its end");
    println!(
        "{} connects, {} barriers, at least {} alive and {} held in CLOSE, {} differences, {} events missed",
        seen.connects,
        seen.barriers,
        seen.fewest,
        seen.fewest_close_held,
        seen.differences.len(),
        seen.missed
    );
    assert_eq!(seen.barriers, 50);
    assert!(seen.connects >= 100_000);
    assert!(seen.fewest >= 200, "too few sockets alive for the comparison to mean much");
    assert!(seen.fewest_close_held > 0, "sockets that were reset or refused are part of it");
    seen
}

#[test]
fn ledger_and_kernel_agree_socket_by_socket() {
    let _alone = alone();
    let seen = churn(0);
    assert_eq!(seen.differences, []);
}

#[test]
fn a_ledger_that_forgets_one_row_in_a_thousand_is_found_out() {
    let _alone = alone();
    let seen = churn(1000);
    assert!(!seen.differences.is_empty(), "the comparison finds what the ledger lacks");
    assert!(seen.differences.iter().all(|(_, _, in_kernel)| *in_kernel), "it is the ledger that lacks them");
}
