//! Every kind of socket and every state, of another process.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use counterfoil::config::View;
use counterfoil::kernel::{TcpState, Who, Witness};
use socket2::{Domain, Socket, Type};

use crate::puppet::{Home, Puppet};
use crate::{VIEWS, beside, held, refusing, socket, until};

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[test]
fn ebpf_sees_every_state_and_family() {
    every_state_and_family_is_seen(View::Ebpf);
}

#[test]
fn sock_diag_sees_every_state_and_family() {
    every_state_and_family_is_seen(View::SockDiag);
}

fn every_state_and_family_is_seen(choice: View) {
    let mut puppet = Puppet::start("puppet-states", &Home::Here);
    let v4: SocketAddr = puppet.tell("listen 127.0.0.1:0").parse().unwrap();
    let v6: SocketAddr = puppet.tell("listen [::1]:0").parse().unwrap();
    let mapped: SocketAddr = format!("[::ffff:127.0.0.1]:{}", v4.port()).parse().unwrap();
    let refusing = refusing();
    // Of two views one starts with the sockets open, the other sees them opened.
    let early = puppet.cookie(&format!("connect {v4}"));
    let early_v6 = puppet.cookie(&format!("connect {v6}"));
    let early_reset = puppet.cookie(&format!("connect {mapped}"));
    puppet.tell(&format!("peer-resets {early_reset}"));
    let mut view = beside(choice, &Who::Pid(puppet.pid), &[mapped, v6, refusing]);

    let before = now_ns();
    let mut connect = |puppet: &mut Puppet, peer: SocketAddr| {
        let cookie = puppet.cookie(&format!("connect {peer}"));
        // Without eBPF one that is reset before it is seen is never seen.
        view.snapshot().unwrap();
        cookie
    };
    let waiting = connect(&mut puppet, v4);
    puppet.tell(&format!("peer-closes {waiting}"));
    let reset = connect(&mut puppet, v6);
    puppet.tell(&format!("peer-resets {reset}"));
    let shut_down = connect(&mut puppet, v4);
    puppet.tell(&format!("shut-down {shut_down}"));
    let duplicated = connect(&mut puppet, v4);
    puppet.tell(&format!("duplicate {duplicated}"));
    puppet.tell(&format!("close {duplicated}"));
    let over_v6 = connect(&mut puppet, mapped);
    let refused = connect(&mut puppet, refusing);
    let closed = connect(&mut puppet, v4);
    puppet.tell(&format!("peer-resets {closed}"));
    puppet.tell(&format!("close {closed}"));

    let mut expected = BTreeMap::from([
        (early, (TcpState::Established, v4)),
        (early_v6, (TcpState::Established, v6)),
        (waiting, (TcpState::CloseWait, v4)),
        (reset, (TcpState::Close, v6)),
        (shut_down, (TcpState::FinWait2, v4)),
        (duplicated, (TcpState::Established, v4)),
        (over_v6, (TcpState::Established, v4)),
    ]);
    if choice == View::Ebpf {
        // The fallback cannot know them.
        expected.insert(early_reset, (TcpState::Close, v4));
        expected.insert(refused, (TcpState::Close, refusing));
    }
    let owned = expected.iter().map(|(cookie, (state, _))| (*cookie, (puppet.pid, *state))).collect();
    let snapshot = until(view.as_mut(), "all states", |snapshot| held(snapshot) == owned);
    for (cookie, (_, remote)) in &expected {
        let socket = socket(&snapshot, *cookie);
        assert_eq!(socket.remote, *remote, "{choice:?}: {socket:?}");
        assert_ne!((socket.netns, socket.local.port()), (0, 0), "{choice:?}: {socket:?}");
        let seen_opening = choice == View::Ebpf && ![early, early_v6, early_reset].contains(cookie);
        assert_eq!(socket.opened.is_some_and(|opened| opened >= before), seen_opening, "{choice:?}: {socket:?}");
    }
    let check = view.crosscheck().unwrap();
    assert_eq!((check.disagreement, check.found), (None, vec![]), "{choice:?}");
}

#[test]
fn bytes_and_times_are_the_kernels() {
    for choice in VIEWS {
        let mut puppet = Puppet::start("puppet-bytes", &Home::Here);
        let backend: SocketAddr = puppet.tell("listen 127.0.0.1:0").parse().unwrap();
        let mut view = beside(choice, &Who::Pid(puppet.pid), &[backend]);
        let cookie = puppet.cookie(&format!("connect {backend}"));
        let before = now_ns();
        puppet.tell(&format!("send {cookie}"));
        // Spans of time, as the puppet may have to wait for its turn anywhere.
        let sent = before..now_ns();
        // Coarser than any kernel tick, so that both times differ in any case.
        std::thread::sleep(Duration::from_millis(60));
        let before = now_ns();
        puppet.tell(&format!("peer-sends {cookie}"));
        let received = before..now_ns();
        let snapshot = until(view.as_mut(), "unread", |snapshot| socket(snapshot, cookie).unread == Some(6));
        // The times are as exact as a kernel tick, and as the reading takes.
        let slack = 30_000_000 + (now_ns() - snapshot.taken_ns);
        let socket = socket(&snapshot, cookie);
        assert_eq!((socket.bytes_sent, socket.bytes_received), (Some(8), Some(6)), "{choice:?}");
        let near = |time: Option<u64>, when: &std::ops::Range<u64>| {
            (when.start - slack..when.end + slack).contains(&time.unwrap())
        };
        assert!(near(socket.last_sent_ns, &sent), "{choice:?}: {socket:?}, sent {sent:?}");
        assert!(near(socket.last_received_ns, &received), "{choice:?}: {socket:?}, received {received:?}");
    }
}

#[test]
fn a_missed_socket_makes_the_view_uncertain_until_it_agrees_again() {
    let mut puppet = Puppet::start("puppet-missed", &Home::Here);
    // No tag can be missed on purpose. But a socket accepted from a client that has the address of a peer looks exactly like
    // a missed one: connected to it, and without a tag.
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    client.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let peer = client.local_addr().unwrap().as_socket().unwrap();
    let mut view = beside(View::Ebpf, &Who::Pid(puppet.pid), &[peer]);
    let listener: SocketAddr = puppet.tell("listen 127.0.0.1:0").parse().unwrap();
    client.connect(&listener.into()).unwrap();
    let stray = puppet.cookie("accept");
    let check = view.crosscheck().unwrap();
    assert_eq!(check.found, [stray]);
    assert_eq!(check.liar, Some(Witness::Ebpf), "the two others have it: {check:?}");
    // The next snapshot compares again and finds nothing new.
    let snapshot = view.snapshot().unwrap();
    assert_eq!(held(&snapshot), BTreeMap::from([(stray, (puppet.pid, TcpState::Established))]));
    assert_eq!(snapshot.uncertain, None);
    assert!(snapshot.missed >= 1);
}
