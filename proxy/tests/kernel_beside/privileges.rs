//! What a watch says when it may not.

use std::thread;

use counterfoil::config::View;
use counterfoil::kernel::{KernelSocket, ViewError, Who, open_beside};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::puppet::{Home, Puppet};
use crate::{beside, until};

/// Runs `work` on a thread that has all capabilities but these.
fn without<T: Send>(missing: CapabilitySet, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            let mut sets = capabilities(None).unwrap();
            sets.effective.remove(missing);
            set_capabilities(None, sets).unwrap();
            work()
        });
        inside.join().unwrap()
    })
}

fn says(error: &ViewError, all: &[&str]) {
    let text = error.to_string();
    assert!(all.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn each_missing_capability_is_named() {
    let mut puppet = Puppet::start("puppet-guarded", &Home::Apart);
    let backend = puppet.tell("listen 127.0.0.1:0").parse().unwrap();
    let open = |choice| open_beside(choice, &Who::Pid(puppet.pid), &[backend], 16).map(drop);

    let (bpf, ptrace, admin) = (CapabilitySet::BPF, CapabilitySet::SYS_PTRACE, CapabilitySet::SYS_ADMIN);
    let error = without(bpf | admin, || open(View::Ebpf)).unwrap_err();
    assert!(matches!(error, ViewError::NotPermitted { .. }), "{error}");
    says(&error, &["lacks CAP_BPF;"]);

    let error = without(ptrace, || open(View::SockDiag)).unwrap_err();
    assert!(matches!(error, ViewError::Unreadable { .. }), "{error}");
    says(&error, &[&puppet.pid.to_string(), "CAP_SYS_PTRACE", "setcap"]);

    let error = without(admin, || open(View::SockDiag)).unwrap_err();
    assert!(matches!(error, ViewError::NotEntered { .. }), "{error}");
    says(&error, &["CAP_SYS_ADMIN", "nsenter"]);

    // eBPF needs neither to count.
    let mut view = without(ptrace | admin, || beside(View::Ebpf, &Who::Pid(puppet.pid), &[backend]));
    puppet.cookie(&format!("connect {backend}"));
    let sockets = without(ptrace | admin, || view.snapshot()).unwrap().sockets;
    assert_eq!(sockets.len(), 1);
    let socket: &KernelSocket = &sockets[0];
    says(&without(ptrace, || view.destroy(socket)).unwrap_err(), &["CAP_SYS_PTRACE"]);
    says(&without(admin, || view.destroy(socket)).unwrap_err(), &["CAP_SYS_ADMIN"]);
    let answer = without(CapabilitySet::NET_ADMIN, || view.destroy(socket)).unwrap();
    let refused = answer.result().unwrap_err().to_string();
    assert!(refused.contains("CAP_NET_ADMIN"), "{refused}");
    view.destroy(socket).unwrap().result().unwrap();
    until(view.as_mut(), "severed", |snapshot| snapshot.sockets[0].state == counterfoil::kernel::TcpState::Close);
}

#[test]
fn a_process_that_is_not_there_is_an_error() {
    let error = open_beside(View::SockDiag, &Who::Pid(4_194_305), &[], 16).map(drop).unwrap_err();
    says(&error, &["no process with id 4194305", "hidepid"]);
}
