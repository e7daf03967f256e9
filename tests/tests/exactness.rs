//! Ledger and kernel view are equal as sets of socket cookies, at every moment at which the process stands still.
#![expect(clippy::expect_used, reason = "tests panic")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use counterfoil::churn::{Churn, Seen, run};
use counterfoil::config::View;
use counterfoil::kernel;

/// How many connections a churn opens.
const CONNECTS: usize = 100_000;

/// The same where a connection costs far more: fewer between two comparisons, of which there are as many.
const CONNECTS_EMULATED: usize = 20_000;

/// The view sees every socket of this process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn churn(connects: usize, forget_every: u32) -> Seen {
    let (mut view, source, reason) = kernel::open(View::Ebpf, &[], 65_536).expect("the eBPF view");
    println!("kernel view: {source:?} ({reason})");
    let churn = Churn { threads: 4, connects, barriers: 50, keep: 100, forget_every, seed: 0x00c0_ffee };
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
    assert!(seen.connects >= connects);
    assert!(seen.fewest >= 200, "too few sockets alive for the comparison to mean much");
    assert!(seen.fewest_close_held > 0, "sockets that were reset or refused are part of it");
    seen
}

fn agree(connects: usize) {
    let _alone = alone();
    let seen = churn(connects, 0);
    assert_eq!(seen.differences, []);
}

fn a_forgetful_ledger_is_found_out(connects: usize) {
    let _alone = alone();
    let seen = churn(connects, 1000);
    assert!(!seen.differences.is_empty(), "the comparison finds what the ledger lacks");
    assert!(seen.differences.iter().all(|(_, _, in_kernel)| *in_kernel), "it is the ledger that lacks them");
}

#[test]
fn ledger_and_kernel_agree_socket_by_socket() {
    agree(CONNECTS);
}

#[test]
fn a_ledger_that_forgets_one_row_in_a_thousand_is_found_out() {
    a_forgetful_ledger_is_found_out(CONNECTS);
}

#[test]
#[ignore = "for the emulated machines of `cargo xtask kernels`"]
fn emulated_ledger_and_kernel_agree() {
    agree(CONNECTS_EMULATED);
}

#[test]
#[ignore = "for the emulated machines of `cargo xtask kernels`"]
fn emulated_forgetful_ledger_is_found_out() {
    a_forgetful_ledger_is_found_out(CONNECTS_EMULATED);
}
