//! Without eBPF: the kernel view by `sock_diag` and `/proc/self/fd`, which says so and reaps zombies only; and none.
#![expect(clippy::expect_used, reason = "tests panic")]

use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, field, message};
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;

fn start(backend: &FakeBackend, view: &str) -> Counterfoil {
    let config = Config::new(backend.address)
        .identity("connection")
        .set("kernel", "view", format!("\"{view}\""))
        .set("watchdog", "reap", "\"on\"")
        .settles_soon();
    Counterfoil::start(&config)
}

#[test]
fn sock_diag_sees_the_same_sockets() {
    let backend = FakeBackend::answering(true);
    let counterfoil = start(&backend, "sock-diag");
    let mut client = counterfoil.client();
    Load { count: 5, ..Load::default() }.run(&mut client).assert_all_answered(5);
    let labels = [("backend", "backend-0"), ("tcp_state", "established")];
    let metrics = counterfoil.wait_metrics("the kernel's count", Duration::from_secs(3), |metrics| {
        metrics.sum("kernel_backend_sockets", &labels) == 1.0
    });
    assert_eq!(metrics.sum("kernel_view_info", &[("source", "sock_diag")]), 1.0);
    assert_eq!(metrics.sum("kernel_view_info", &[]), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn sock_diag_reaps_a_zombie() {
    let backend = FakeBackend::answering(true);
    reaps_a_zombie(&start(&backend, "sock-diag"));
}

fn reaps_a_zombie(counterfoil: &Counterfoil) {
    let (ok, output) = counterfoil.drill("zombie", Duration::from_secs(60));
    println!("{output}");
    assert!(ok, "{output}");
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("reaped_total", &[("class", "zombie")]), 1.0);
    assert_eq!(metrics.sum("reaped_total", &[]), 1.0);
    counterfoil.assert_quiescent();
}

/// Nobody asked for the fallback: the program takes it by itself, and says what eBPF would need.
#[test]
#[ignore = "needs a kernel before 5.15: `cargo xtask kernels 5.10`"]
fn an_old_kernel_gets_the_fallback_and_the_reason() {
    let backend = FakeBackend::answering(true);
    let mut counterfoil = start(&backend, "auto");
    let view = counterfoil.process.find_line(Duration::ZERO, |line| message(line, "kernel view"));
    let view = view.expect("the log names the view");
    println!("{view}");
    assert_eq!(field(&view, "source").as_deref(), Some("sock-diag"));
    let reason = field(&view, "reason").expect("a reason");
    assert!(reason.starts_with("eBPF is not available: ") && reason.contains("Linux 5.15 or later"), "{reason}");
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("kernel_view_info", &[("source", "sock_diag")]), 1.0);
    assert_eq!(metrics.sum("kernel_view_info", &[]), 1.0);
    reaps_a_zombie(&counterfoil);
}

/// It is found, but on this view's word alone it is not acted on; the drill cleans up after itself.
#[test]
fn sock_diag_reports_an_orphan_and_leaves_it() {
    let backend = FakeBackend::answering(true);
    let counterfoil = start(&backend, "sock-diag");
    let (_, output) = counterfoil.drill("orphan", Duration::from_secs(90));
    println!("{output}");
    // The drill looks for the alarm in the process's own metrics: it may last for less than two scrapes of ours.
    assert!(output.contains("counterfoil_discrepancy_sockets{backend=\"drill\",class=\"orphan\"}"), "{output}");
    assert!(output.contains("without eBPF only zombies are reaped"), "{output}");
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[]), 0.0);
    counterfoil.assert_quiescent();
}

#[test]
fn no_view_is_said_and_forwards() {
    let backend = FakeBackend::answering(true);
    let counterfoil = start(&backend, "none");
    let mut client = counterfoil.client();
    Load { count: 50, in_flight: 5, ..Load::default() }.run(&mut client).assert_all_answered(50);
    drop(client);
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("kernel_view_info", &[("source", "none")]), 1.0);
    assert_eq!(metrics.sum("reaped_total", &[]), 0.0);
}
