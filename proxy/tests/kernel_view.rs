//! The kernel view against real sockets, real eBPF and real `sock_diag`.
//!
//! Needs the eBPF object (`COUNTERFOIL_EBPF_OBJECT`) and the privileges to load it, and fails without. A view sees every outgoing
//! socket of the process, so these tests run one at a time ([`alone`]) and close all they open.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]
#![expect(clippy::disallowed_methods, reason = "these sockets are the test's own, and nothing pauses its clock")]

mod apart;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use counterfoil::config::View;
use counterfoil::kernel::{
    Destroyed, KernelSnapshot, KernelSocket, KernelView, Source, TcpState, ViewError, Witness, destroy, open,
};
use socket2::{Domain, SockRef, Socket, Type};

const MAX_SOCKETS: u32 = 16384;
const DEADLINE: Duration = Duration::from_secs(5);

/// One test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn view(choice: View, listeners: &[SocketAddr]) -> Box<dyn KernelView> {
    let (view, source, reason) = open(choice, listeners, MAX_SOCKETS).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(view.source(), source, "{reason}");
    view
}

fn ebpf(listeners: &[SocketAddr]) -> Box<dyn KernelView> {
    view(View::Ebpf, listeners)
}

fn cookie(socket: &impl AsFd) -> u64 {
    SockRef::from(socket).cookie().unwrap()
}

fn by_cookie(snapshot: &KernelSnapshot) -> HashMap<u64, &KernelSocket> {
    let map: HashMap<_, _> = snapshot.sockets.iter().map(|socket| (socket.cookie, socket)).collect();
    assert_eq!(map.len(), snapshot.sockets.len(), "a cookie appears twice");
    map
}

fn held(snapshot: &KernelSnapshot) -> BTreeSet<u64> {
    snapshot.sockets.iter().filter(|socket| socket.held).map(|socket| socket.cookie).collect()
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Takes snapshots until one satisfies the condition.
fn until(view: &mut dyn KernelView, what: &str, condition: impl Fn(&KernelSnapshot) -> bool) -> KernelSnapshot {
    let end = Instant::now() + DEADLINE;
    loop {
        let snapshot = view.snapshot().unwrap();
        if condition(&snapshot) {
            return snapshot;
        }
        assert!(Instant::now() < end, "{what}: {snapshot:#?}");
        thread::yield_now();
    }
}

fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn reset_on_close(socket: &impl AsFd) {
    SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
}

/// A socket whose connection was refused, still open.
fn refused(port: u16) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap_err();
    socket
}

fn unused_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One socket in each state that a process can hold.
struct Zoo {
    expected: BTreeMap<u64, (&'static str, TcpState, SocketAddr)>,
    closed: u64,
    listeners: Vec<SocketAddr>,
    _open: Vec<OwnedFd>,
}

impl Zoo {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listener6 = TcpListener::bind("[::1]:0").unwrap();
        let (address, address6) = (listener.local_addr().unwrap(), listener6.local_addr().unwrap());
        let port = unused_port();
        let mut expected = BTreeMap::new();
        let mut open: Vec<OwnedFd> = Vec::new();

        let (client, server) = pair(&listener);
        expected.insert(cookie(&client), ("established", TcpState::Established, address));
        open.extend([client.into(), server.into()]);

        let (client, server) = pair(&listener);
        drop(server);
        expected.insert(cookie(&client), ("peer closed", TcpState::CloseWait, address));
        open.push(client.into());

        let (client, server) = pair(&listener);
        reset_on_close(&server);
        drop(server);
        expected.insert(cookie(&client), ("peer reset", TcpState::Close, address));
        open.push(client.into());

        let socket = refused(port);
        expected.insert(cookie(&socket), ("refused", TcpState::Close, SocketAddr::from(([127, 0, 0, 1], port))));
        open.push(socket.into());

        let (client, server) = pair(&listener);
        client.shutdown(Shutdown::Write).unwrap();
        expected.insert(cookie(&client), ("shut down", TcpState::FinWait2, address));
        open.extend([client.into(), server.into()]);

        let (client, server) = pair(&listener);
        let copy = client.try_clone().unwrap();
        drop(client);
        expected.insert(cookie(&copy), ("duplicated", TcpState::Established, address));
        open.extend([copy.into(), server.into()]);

        let mapped = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        let target: SocketAddr = format!("[::ffff:127.0.0.1]:{}", address.port()).parse().unwrap();
        mapped.connect(&target.into()).unwrap();
        expected.insert(cookie(&mapped), ("v4-mapped", TcpState::Established, address));
        open.extend([mapped.into(), listener.accept().unwrap().0.into()]);

        let (client, server) = pair(&listener6);
        expected.insert(cookie(&client), ("IPv6", TcpState::Established, address6));
        open.extend([client.into(), server.into()]);

        let (client, server) = pair(&listener);
        let closed = cookie(&client);
        reset_on_close(&client);
        drop((client, server));

        open.extend([listener.into(), listener6.into()]);
        Self { expected, closed, listeners: vec![address, address6], _open: open }
    }

    /// Every socket is there, in its state, with its peer if `peers`; and no other one is held.
    fn check(&self, view: &mut dyn KernelView, peers: bool) {
        let expected: BTreeSet<u64> = self.expected.keys().copied().collect();
        let settled = |snapshot: &KernelSnapshot| {
            let sockets = by_cookie(snapshot);
            self.expected.iter().all(|(cookie, expected)| {
                sockets.get(cookie).is_some_and(|socket| socket.held && socket.state == expected.1)
            })
        };
        let snapshot = until(view, "all states", settled);
        assert_eq!(snapshot.uncertain, None);
        assert_eq!(held(&snapshot), expected);
        let sockets = by_cookie(&snapshot);
        assert!(!sockets.contains_key(&self.closed), "a closed socket is gone");
        for (cookie, (name, _, remote)) in &self.expected {
            let socket = sockets[cookie];
            assert_ne!(socket.netns, 0, "{name}");
            assert_ne!(socket.local.port(), 0, "{name}: {socket:?}");
            if peers {
                assert_eq!(socket.remote, *remote, "{name}");
            }
        }
    }
}

#[test]
fn ebpf_sees_every_state() {
    let _alone = alone();
    let mut view = ebpf(&[]);
    let before = now_ns();
    let zoo = Zoo::new();
    zoo.check(view.as_mut(), true);
    let snapshot = view.snapshot().unwrap();
    for socket in snapshot.sockets.iter().filter(|socket| socket.held) {
        let opened = socket.opened.unwrap_or_else(|| panic!("no time of opening: {socket:?}"));
        assert!((before..=snapshot.taken_ns).contains(&opened), "{socket:?}");
    }
    let check = view.crosscheck().unwrap();
    assert_eq!((check.disagreement, check.found, check.unconnected), (None, vec![], vec![]));
    assert!(check.compared.iter().all(|count| *count >= zoo.expected.len() - 2), "{:?}", check.compared);
}

#[test]
fn sock_diag_sees_the_same_states() {
    let _alone = alone();
    let mut view = view(View::SockDiag, &[]);
    let zoo = Zoo::new();
    // The kernel forgets the peer of a refused socket, and this view never saw it.
    zoo.check(view.as_mut(), false);
    let snapshot = view.snapshot().unwrap();
    for (cookie, socket) in by_cookie(&snapshot) {
        let (name, state, remote) = zoo.expected[&cookie];
        if state != TcpState::Close {
            assert_eq!(socket.remote, remote, "{name}");
        }
    }
}

#[test]
fn both_views_agree() {
    let _alone = alone();
    let zoo = Zoo::new();
    let mut ebpf = ebpf(&zoo.listeners);
    zoo.check(ebpf.as_mut(), false);
    let mut diag = view(View::SockDiag, &zoo.listeners);
    zoo.check(diag.as_mut(), false);
    let (kernel, fallback) = (ebpf.snapshot().unwrap(), diag.snapshot().unwrap());
    let fallback = by_cookie(&fallback);
    for socket in kernel.sockets.iter().filter(|socket| socket.held) {
        let other = fallback[&socket.cookie];
        assert_eq!((socket.state, socket.local, socket.netns), (other.state, other.local, other.netns));
        assert_eq!((socket.bytes_sent, socket.bytes_received), (other.bytes_sent, other.bytes_received));
        assert_eq!(socket.opened, None, "opened before the view");
    }
}

#[test]
fn accepted_sockets_are_not_outgoing() {
    let _alone = alone();
    for choice in [View::Ebpf, View::SockDiag] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let early = pair(&listener);
        // The listener is not named: the views meet it among this process's own sockets.
        let mut view = view(choice, &[]);
        let late = pair(&listener);
        let check = view.crosscheck().unwrap();
        assert_eq!((check.found, check.unconnected), (vec![], vec![]), "{choice:?}");
        let expected = BTreeSet::from([cookie(&early.0), cookie(&late.0)]);
        assert_eq!(held(&view.snapshot().unwrap()), expected, "{choice:?}");
        drop((early, late));
    }
}

#[test]
fn bytes_and_times_are_the_kernels() {
    let _alone = alone();
    for choice in [View::Ebpf, View::SockDiag] {
        let mut view = view(choice, &[]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut client, mut server) = pair(&listener);
        let cookie = cookie(&client);
        let before = now_ns();
        client.write_all(b"question").unwrap();
        server.read_exact(&mut [0; 8]).unwrap();
        // Spans of time, as this thread may have to wait for its turn anywhere.
        let sent = before..now_ns();
        // Coarser than any kernel tick, so that both times differ in any case.
        thread::sleep(Duration::from_millis(60));
        let before = now_ns();
        server.write_all(b"answer").unwrap();
        let received = before..now_ns();
        let snapshot = until(view.as_mut(), "six bytes", |snapshot| by_cookie(snapshot)[&cookie].unread == Some(6));
        let socket = by_cookie(&snapshot)[&cookie];
        assert_eq!((socket.bytes_sent, socket.bytes_received), (Some(8), Some(6)), "{choice:?}");
        let tick = 30_000_000;
        let near = |time: Option<u64>, when: &Range<u64>| (when.start - tick..when.end + tick).contains(&time.unwrap());
        assert!(near(socket.last_sent_ns, &sent), "{choice:?}: {socket:?}, sent {sent:?}");
        assert!(near(socket.last_received_ns, &received), "{choice:?}: {socket:?}, received {received:?}");

        client.read_exact(&mut [0; 6]).unwrap();
        drop(server);
        let done = |snapshot: &KernelSnapshot| by_cookie(snapshot)[&cookie].state == TcpState::CloseWait;
        let snapshot = until(view.as_mut(), "close_wait", done);
        assert_eq!(by_cookie(&snapshot)[&cookie].unread, Some(0), "a FIN is no byte ({choice:?})");
    }
}

#[test]
fn an_unheld_socket_is_told_from_a_held_one() {
    let _alone = alone();
    let mut view = ebpf(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut client, server) = pair(&listener);
    let cookie = cookie(&client);
    // The peer does not read: what it has no room for keeps the socket alive when its descriptor is closed.
    client.set_nonblocking(true).unwrap();
    while client.write(&[0; 65536]).is_ok() {}
    drop(client);
    let state = |snapshot: &KernelSnapshot| by_cookie(snapshot).get(&cookie).map(|s| (s.held, s.state));
    let snapshot = view.snapshot().unwrap();
    assert_eq!(state(&snapshot), Some((false, TcpState::FinWait1)));
    reset_on_close(&server);
    drop(server);
    until(view.as_mut(), "reset by the peer", |snapshot| state(snapshot).is_none());
}

#[test]
fn a_socket_held_by_another_process_is_reported() {
    let _alone = alone();
    let mut view = ebpf(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (client, server) = pair(&listener);
    let cookie = cookie(&client);
    // `cat` ends when the connection does.
    let mut child = Command::new("cat").stdin(OwnedFd::from(client)).stdout(Stdio::null()).spawn().unwrap();
    let check = view.crosscheck().unwrap();
    assert_eq!((check.held_elsewhere, check.disagreement), (vec![cookie], None));
    assert_eq!(held(&view.snapshot().unwrap()), BTreeSet::from([cookie]));
    drop(server);
    child.wait().unwrap();
    until(view.as_mut(), "the child is gone", |snapshot| held(snapshot).is_empty());
}

#[test]
fn a_socket_that_was_never_connected_is_taken_up() {
    let _alone = alone();
    let mut view = ebpf(&[]);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let cookie = cookie(&socket);
    assert_eq!(held(&view.snapshot().unwrap()), BTreeSet::new(), "nothing in the kernel told of it");
    let check = view.crosscheck().unwrap();
    assert_eq!((check.unconnected, check.found, check.disagreement), (vec![cookie], vec![], None));
    let snapshot = view.snapshot().unwrap();
    assert_eq!((held(&snapshot), snapshot.uncertain, snapshot.missed), (BTreeSet::from([cookie]), None, 0));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let before = now_ns();
    socket.connect(&listener.local_addr().unwrap().into()).unwrap();
    let snapshot = view.snapshot().unwrap();
    let connected = by_cookie(&snapshot)[&cookie];
    assert_eq!(connected.remote, listener.local_addr().unwrap());
    assert!(connected.opened.unwrap() >= before, "connect() replaces the tag");
}

#[test]
fn a_missed_socket_makes_the_view_uncertain_until_it_agrees_again() {
    let _alone = alone();
    let mut view = ebpf(&[]);
    // No tag can be missed on purpose. But a socket accepted from a listener that no cross-check has seen looks exactly
    // like a missed one: connected, and without a tag.
    let stray = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (client, server) = pair(&listener);
        reset_on_close(&server);
        drop(listener);
        drop(client);
        server
    };
    let check = view.crosscheck().unwrap();
    assert_eq!((check.found, check.liar), (vec![cookie(&stray)], Some(Witness::Ebpf)), "{:?}", check.disagreement);
    // The next snapshot compares again and finds nothing new.
    let snapshot = view.snapshot().unwrap();
    assert_eq!(held(&snapshot), BTreeSet::from([cookie(&stray)]));
    assert_eq!((snapshot.uncertain, snapshot.missed), (None, 1));
}

#[test]
fn more_sockets_than_fit_make_the_view_uncertain() {
    let _alone = alone();
    let (mut view, ..) = open(View::Ebpf, &[], 4).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut pairs: Vec<_> = (0..6).map(|_| pair(&listener)).collect();
    let snapshot = view.snapshot().unwrap();
    let reason = snapshot.uncertain.unwrap();
    assert!(reason.contains("2 sockets more than `kernel.max_sockets` = 4"), "{reason}");
    for (client, _) in &pairs {
        reset_on_close(client);
    }
    pairs.truncate(3);
    let snapshot = until(view.as_mut(), "three fit", |snapshot| snapshot.uncertain.is_none());
    assert_eq!(held(&snapshot).len(), 3);
}

#[test]
fn destroying_severs_exactly_that_socket() {
    let _alone = alone();
    let mut view = ebpf(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (zombie, peer) = pair(&listener);
    let healthy = pair(&listener);
    drop(peer);
    let (cookie, beside) = (cookie(&zombie), cookie(&healthy.0));
    let find = |snapshot: &KernelSnapshot, cookie| by_cookie(snapshot).get(&cookie).map(|s| (*s).clone());
    let snapshot = until(view.as_mut(), "close_wait", |snapshot| {
        find(snapshot, cookie).is_some_and(|socket| socket.state == TcpState::CloseWait)
    });
    let socket = find(&snapshot, cookie).unwrap();

    let wrong = KernelSocket { cookie: beside, ..socket.clone() };
    assert!(matches!(destroy(&wrong), Ok(Destroyed::Gone)), "the cookie must match");
    assert!(matches!(destroy(&socket), Ok(Destroyed::Severed)));
    let snapshot = view.snapshot().unwrap();
    let after = find(&snapshot, cookie).unwrap();
    assert_eq!((after.state, after.held), (TcpState::Close, true), "severed, its descriptor still open");
    assert_eq!(zombie.take_error().unwrap().and_then(|error| error.raw_os_error()), Some(libc_econnaborted()));
    assert_eq!(find(&snapshot, beside).unwrap().state, TcpState::Established);
    assert!(matches!(destroy(&after), Ok(Destroyed::Gone)), "what is closed is out of reach");
}

fn libc_econnaborted() -> i32 {
    rustix::io::Errno::CONNABORTED.raw_os_error()
}

#[test]
fn without_capabilities_the_error_says_which() {
    let _alone = alone();
    // Capabilities belong to the thread.
    let (ebpf, auto) = thread::spawn(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective = rustix::thread::CapabilitySet::empty();
        rustix::thread::set_capabilities(None, sets).unwrap();
        (open(View::Ebpf, &[], 16).map(drop), open(View::Auto, &[], 16).map(|(_, source, reason)| (source, reason)))
    })
    .join()
    .unwrap();
    let error = ebpf.unwrap_err();
    assert!(matches!(error, ViewError::NotPermitted { .. }), "{error}");
    assert!(
        error.to_string().contains("this process lacks CAP_BPF and CAP_PERFMON; grant it by `AmbientCapabilities="),
        "{error}"
    );
    let (source, reason) = auto.unwrap();
    assert_eq!(source, Source::SockDiag);
    assert!(reason.contains("eBPF is not available") && reason.contains("CAP_BPF"), "{reason}");
}

#[test]
fn in_namespaces_of_its_own_it_is_as_exact() {
    let _alone = alone();
    apart::repeat_apart(&[
        "ebpf_sees_every_state",
        "sock_diag_sees_the_same_states",
        "both_views_agree",
        "a_socket_held_by_another_process_is_reported",
        "destroying_severs_exactly_that_socket",
        "membership_is_exact_while_sockets_come_and_go",
    ]);
}

#[test]
fn the_view_that_is_off_knows_nothing() {
    let _alone = alone();
    let (mut view, source, _) = open(View::None, &[], 16).unwrap();
    assert_eq!(source, Source::None);
    assert!(matches!(view.snapshot(), Err(ViewError::Off)));
    assert!(matches!(view.crosscheck(), Err(ViewError::Off)));
}

const THREADS: usize = 4;
const BARRIERS: usize = 12;
const STEPS: usize = 250;
const STABLE: usize = 600;

/// Opens and closes at random, in all ways; at each barrier the two sets must be equal, and between the barriers no snapshot
/// may lose one of the sockets that stay.
#[test]
fn membership_is_exact_while_sockets_come_and_go() {
    let _alone = alone();
    let mut view = ebpf(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let dead_port = unused_port();
    let accepted = Mutex::new(Vec::new());
    let barrier = Barrier::new(THREADS + 1);
    let sets: Vec<Mutex<BTreeSet<u64>>> = (0..THREADS).map(|_| Mutex::default()).collect();
    let busy = AtomicUsize::new(0);
    let mut during = 0;
    let mut missed = 0;
    // Collected, not asserted: a panic inside the scope would leave the other threads waiting at the barrier.
    let mut faults = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| keep_accepting(&listener, &accepted));
        let stable: Vec<TcpStream> = (0..STABLE).map(|_| TcpStream::connect(address).unwrap()).collect();
        let stable_set: BTreeSet<u64> = stable.iter().map(cookie).collect();
        busy.store(THREADS, Ordering::SeqCst);
        for set in &sets {
            scope.spawn(|| {
                let mut open: Vec<Socket> = Vec::new();
                for _ in 0..BARRIERS {
                    churn(&mut open, address, dead_port);
                    *set.lock().unwrap() = open.iter().map(cookie).collect();
                    busy.fetch_sub(1, Ordering::SeqCst);
                    barrier.wait();
                    barrier.wait();
                }
                open.iter().for_each(reset_on_close);
            });
        }
        for round in 0..BARRIERS {
            while busy.load(Ordering::SeqCst) > 0 {
                faults.extend(check(view.as_mut(), |seen| stable_set.is_subset(seen)).err());
                faults.extend(agree(view.as_mut(), false).err());
                during += 1;
                // A pause between two snapshots, as the watchdog makes one: the churn needs the processors.
                thread::park_timeout(Duration::from_millis(5));
            }
            barrier.wait();
            let mut expected = stable_set.clone();
            for set in &sets {
                expected.extend(set.lock().unwrap().iter());
            }
            if expected.len() < STABLE + 200 {
                faults.push(format!("only {} sockets", expected.len()));
            }
            match check(view.as_mut(), |seen| *seen == expected) {
                Ok(snapshot) => missed = snapshot.missed,
                Err(fault) => faults.push(format!("barrier {round}: {fault}")),
            }
            faults.extend(agree(view.as_mut(), true).err().map(|fault| format!("barrier {round}: {fault}")));
            busy.store(THREADS, Ordering::SeqCst);
            barrier.wait();
        }
        stable.iter().for_each(reset_on_close);
        drop(stable);
        // Wakes the thread that accepts.
        SockRef::from(&listener).shutdown(Shutdown::Both).unwrap();
    });
    println!("{} steps, {BARRIERS} barriers, {during} snapshots between, {missed} missed", THREADS * BARRIERS * STEPS);
    assert!(faults.is_empty(), "{} faults: {:#?}", faults.len(), &faults[..faults.len().min(5)]);
    assert!(during >= BARRIERS, "snapshots must be taken during the churn, were {during}");
    drop(accepted);
    until(view.as_mut(), "nothing left", |snapshot| held(snapshot).is_empty());
}

/// A snapshot that is certain and whose held sockets satisfy the condition.
fn check(view: &mut dyn KernelView, good: impl Fn(&BTreeSet<u64>) -> bool) -> Result<KernelSnapshot, String> {
    let snapshot = view.snapshot().map_err(|error| error.to_string())?;
    let seen = held(&snapshot);
    match &snapshot.uncertain {
        Some(reason) => Err(format!("uncertain: {reason}")),
        None if good(&seen) => Ok(snapshot),
        None => Err(format!("wrong set of {} sockets", seen.len())),
    }
}

/// No witness contradicts another one, and if all is `quiet`, no socket was missed.
fn agree(view: &mut dyn KernelView, quiet: bool) -> Result<(), String> {
    match view.crosscheck() {
        Ok(check) if check.disagreement.is_none() && (!quiet || check.found.is_empty()) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// Accepts until the listener is shut down, and keeps what it accepted: all peers of living sockets are among the youngest.
fn keep_accepting(listener: &TcpListener, accepted: &Mutex<Vec<TcpStream>>) {
    while let Ok((socket, _)) = listener.accept() {
        let mut accepted = accepted.lock().unwrap();
        accepted.push(socket);
        // Those at the front belong to the sockets that stay.
        if accepted.len() > 4000 {
            accepted.drain(STABLE..STABLE + 1000);
        }
    }
}

/// Some hundred random steps on one thread's sockets.
fn churn(open: &mut Vec<Socket>, address: SocketAddr, dead_port: u16) {
    for _ in 0..STEPS {
        if open.len() < 60 || (open.len() < 150 && fastrand::bool()) {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            if fastrand::u8(..) < 16 {
                socket.connect(&SocketAddr::from(([127, 0, 0, 1], dead_port)).into()).unwrap_err();
            } else {
                socket.connect(&address.into()).unwrap();
                if fastrand::u8(..) < 16 {
                    socket.shutdown(Shutdown::Write).unwrap();
                }
            }
            open.push(socket);
        } else {
            let socket = open.swap_remove(fastrand::usize(..open.len()));
            // No TIME_WAIT: ten thousand of them would use up the ports.
            reset_on_close(&socket);
        }
    }
}
