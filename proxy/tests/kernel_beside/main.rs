//! The kernel view of other processes, which do what they are told ([`puppet`]). Needs root.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]
#![expect(clippy::disallowed_methods, reason = "these sockets are the test's own, and nothing pauses its clock")]

#[path = "../apart/mod.rs"]
mod apart;
mod churn;
mod owners;
mod privileges;
mod puppet;
mod states;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use counterfoil::config::View;
use counterfoil::kernel::{Destroyed, KernelSnapshot, KernelSocket, KernelView, TcpState, Who, open_beside};

use self::puppet::{Home, Puppet};

const DEADLINE: Duration = Duration::from_secs(10);

fn beside(choice: View, who: &Who, peers: &[SocketAddr]) -> Box<dyn KernelView> {
    let (view, source, reason) = open_beside(choice, who, peers, 4096).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(view.source(), source, "{reason}");
    view
}

/// Takes snapshots until one satisfies the condition.
#[track_caller]
fn until(view: &mut dyn KernelView, what: &str, condition: impl Fn(&KernelSnapshot) -> bool) -> KernelSnapshot {
    let end = Instant::now() + DEADLINE;
    loop {
        let snapshot = view.snapshot().unwrap();
        if condition(&snapshot) {
            assert_eq!(snapshot.uncertain, None);
            return snapshot;
        }
        assert!(Instant::now() < end, "{what}: {snapshot:#?}");
        thread::yield_now();
    }
}

/// Cookie, owner and state of all sockets.
fn states(snapshot: &KernelSnapshot) -> BTreeMap<u64, (u32, TcpState)> {
    let states: BTreeMap<_, _> = snapshot.sockets.iter().map(|s| (s.cookie, (s.owner, s.state))).collect();
    assert_eq!(states.len(), snapshot.sockets.len(), "a cookie appears twice");
    states
}

fn pids(snapshot: &KernelSnapshot) -> Vec<u32> {
    snapshot.processes.iter().map(|process| process.pid).collect()
}

fn socket(snapshot: &KernelSnapshot, cookie: u64) -> KernelSocket {
    snapshot.sockets.iter().find(|socket| socket.cookie == cookie).unwrap().clone()
}

/// An address of loopback that refuses.
fn refusing() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The held sockets, with owner and state.
fn held(snapshot: &KernelSnapshot) -> BTreeMap<u64, (u32, TcpState)> {
    let held = snapshot.sockets.iter().filter(|socket| socket.held).cloned().collect();
    states(&KernelSnapshot { sockets: held, ..KernelSnapshot::default() })
}

/// A name for puppets of this test run only: others may run at the same time.
fn own_name(word: &str) -> String {
    format!("{word}-{}", std::process::id())
}

/// Which views are tried.
const VIEWS: [View; 2] = [View::Ebpf, View::SockDiag];

#[test]
fn ebpf_sees_into_other_namespaces() {
    a_process_in_namespaces_of_its_own_is_seen(View::Ebpf);
}

#[test]
fn sock_diag_sees_into_other_namespaces() {
    a_process_in_namespaces_of_its_own_is_seen(View::SockDiag);
}

fn a_process_in_namespaces_of_its_own_is_seen(choice: View) {
    let mut puppet = Puppet::start("puppet-apart", &Home::Apart);
    assert_ne!(puppet.tell("id"), puppet.pid.to_string(), "a pid namespace of its own");
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(puppet.tell("namespace net"), own.display().to_string(), "a network namespace of its own");
    let backend: SocketAddr = puppet.tell("listen 127.0.0.1:0").parse().unwrap();
    let early = puppet.cookie(&format!("connect {backend}"));

    let mut view = beside(choice, &Who::Pid(puppet.pid), &[backend]);
    let waiting = puppet.cookie(&format!("connect {backend}"));
    let reset = puppet.cookie(&format!("connect {backend}"));
    let established = |cookies: &[u64], snapshot: &KernelSnapshot| {
        states(snapshot) == cookies.iter().map(|cookie| (*cookie, (puppet.pid, TcpState::Established))).collect()
    };
    let snapshot = until(view.as_mut(), "established", |s| established(&[early, waiting, reset], s));
    assert_eq!(pids(&snapshot), [puppet.pid]);
    assert_eq!(socket(&snapshot, early).remote, backend);

    puppet.tell(&format!("peer-closes {waiting}"));
    puppet.tell(&format!("peer-resets {reset}"));
    let all = BTreeMap::from([
        (early, (puppet.pid, TcpState::Established)),
        (waiting, (puppet.pid, TcpState::CloseWait)),
        (reset, (puppet.pid, TcpState::Close)),
    ]);
    let snapshot = until(view.as_mut(), "by state", |snapshot| states(snapshot) == all);
    assert!(snapshot.sockets.iter().all(|socket| socket.held));

    let zombie = socket(&snapshot, waiting);
    assert!(matches!(view.destroy(&KernelSocket { cookie: early, ..zombie.clone() }), Ok(Destroyed::Gone)));
    assert!(matches!(view.destroy(&zombie), Ok(Destroyed::Severed)));
    until(view.as_mut(), "severed", |s| states(s).get(&waiting) == Some(&(puppet.pid, TcpState::Close)));
    assert_eq!(puppet.tell(&format!("error {waiting}")), rustix::io::Errno::CONNABORTED.raw_os_error().to_string());

    for cookie in [early, waiting, reset] {
        puppet.tell(&format!("close {cookie}"));
    }
    until(view.as_mut(), "all closed", |snapshot| snapshot.sockets.iter().all(|socket| !socket.held));
    drop(puppet);
    until(view.as_mut(), "ended", |snapshot| snapshot.processes.is_empty());
}

#[test]
fn a_restart_is_followed_by_name_and_not_by_id() {
    for choice in VIEWS {
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = backend.local_addr().unwrap();
        let name = own_name("again");
        let mut by_name = beside(choice, &Who::Name(name.clone()), &[address]);
        assert_eq!(pids(&by_name.snapshot().unwrap()), [0; 0], "not yet");

        let mut first = Puppet::start(&name, &Home::Here);
        let mut by_id = beside(choice, &Who::Pid(first.pid), &[address]);
        let cookie = first.cookie(&format!("connect {address}"));
        let expected = BTreeMap::from([(cookie, (first.pid, TcpState::Established))]);
        for view in [&mut by_name, &mut by_id] {
            let snapshot = until(view.as_mut(), "the first", |snapshot| states(snapshot) == expected);
            assert_eq!(pids(&snapshot), [first.pid]);
        }
        drop(first);
        for view in [&mut by_name, &mut by_id] {
            until(view.as_mut(), "ended", |s| s.processes.is_empty() && s.sockets.iter().all(|s| !s.held));
        }

        let mut second = Puppet::start(&name, &Home::Here);
        let cookie = second.cookie(&format!("connect {address}"));
        let expected = BTreeMap::from([(cookie, (second.pid, TcpState::Established))]);
        let snapshot = until(by_name.as_mut(), "the second", |snapshot| held(snapshot) == expected);
        assert_eq!(pids(&snapshot), [second.pid]);
        assert_eq!(pids(&by_id.snapshot().unwrap()), [0; 0], "the end of a process is final");
        drop(backend);
    }
}

#[test]
fn only_the_peers_of_the_watch_are_counted() {
    for choice in VIEWS {
        let mut puppet = Puppet::start("puppet-peers", &Home::Here);
        let own: SocketAddr = puppet.tell("listen 127.0.0.1:0").parse().unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut view = beside(choice, &Who::Pid(puppet.pid), &[own, refusing()]);
        let mine = puppet.cookie(&format!("connect {own}"));
        puppet.cookie(&format!("connect {}", other.local_addr().unwrap()));
        // Of another process, towards the same peer.
        let stranger = std::net::TcpStream::connect(own).unwrap();
        let snapshot = until(view.as_mut(), "one", |snapshot| !snapshot.sockets.is_empty());
        assert_eq!(states(&snapshot), BTreeMap::from([(mine, (puppet.pid, TcpState::Established))]));
        drop((stranger, other));
    }
}

#[test]
fn a_watcher_in_namespaces_of_its_own_sees_as_much() {
    apart::repeat_apart(&[
        "ebpf_sees_into_other_namespaces",
        "sock_diag_sees_into_other_namespaces",
        "a_restart_is_followed_by_name_and_not_by_id",
        "only_the_peers_of_the_watch_are_counted",
        "owners::processes_with_one_name_keep_their_sockets_apart",
    ]);
}
