//! Another process that opens and closes at random, in all ways, while it is watched.

use std::collections::BTreeSet;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use counterfoil::config::View;
use counterfoil::kernel::{KernelSnapshot, Who};
use socket2::{Domain, SockRef, Socket, Type};

use crate::puppet::{Home, Puppet, cookie};
use crate::{beside, held, refusing, until};

const THREADS: usize = 3;
const STEPS: usize = 400;
const ROUNDS: usize = 6;

/// What the puppet does at the order `churn`: random steps of several threads. Returns what is open in the end.
pub(super) fn churn(mut open: Vec<Socket>, backend: SocketAddr, refusing: SocketAddr) -> Vec<Socket> {
    let mut parts: Vec<Vec<Socket>> = (0..THREADS).map(|_| Vec::new()).collect();
    for (index, socket) in open.drain(..).enumerate() {
        parts[index % THREADS].push(socket);
    }
    thread::scope(|scope| {
        let threads: Vec<_> =
            parts.into_iter().map(|part| scope.spawn(move || steps(part, backend, refusing))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn steps(mut open: Vec<Socket>, backend: SocketAddr, refusing: SocketAddr) -> Vec<Socket> {
    for _ in 0..STEPS {
        if open.len() < 40 || (open.len() < 120 && fastrand::bool()) {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            if fastrand::u8(..) < 16 {
                socket.connect(&refusing.into()).unwrap_err();
            } else {
                socket.connect(&backend.into()).unwrap();
                if fastrand::u8(..) < 16 {
                    socket.shutdown(Shutdown::Write).unwrap();
                }
            }
            open.push(socket);
        } else {
            let socket = open.swap_remove(fastrand::usize(..open.len()));
            // No TIME_WAIT: ten thousand of them would use up the ports.
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    open
}

/// Ends the thread that accepts, also when the test fails.
struct Wake<'a>(&'a TcpListener);

impl Drop for Wake<'_> {
    fn drop(&mut self) {
        let _ = SockRef::from(self.0).shutdown(Shutdown::Both);
    }
}

#[test]
fn membership_is_exact_while_sockets_come_and_go() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, refusing) = (listener.local_addr().unwrap(), refusing());
    let mut puppet = Puppet::start("puppet-churn", &Home::Here);
    thread::scope(|scope| {
        let _wake = Wake(&listener);
        scope.spawn(|| {
            // The youngest belong to living sockets.
            let mut accepted: Vec<TcpStream> = Vec::new();
            while let Ok((socket, _)) = listener.accept() {
                accepted.push(socket);
                if accepted.len() > 4000 {
                    accepted.drain(100..1100);
                }
            }
        });
        let stable: BTreeSet<u64> = (0..100).map(|_| puppet.cookie(&format!("connect {address}"))).collect();
        let mut view = beside(View::Ebpf, &Who::Pid(puppet.pid), &[address, refusing]);
        let (mut between, mut missed, mut faults) = (0, 0, Vec::new());
        let mut check = |good: &dyn Fn(&BTreeSet<u64>) -> bool| {
            let snapshot: KernelSnapshot = view.snapshot().unwrap();
            let seen: BTreeSet<u64> = held(&snapshot).into_keys().collect();
            missed = snapshot.missed;
            if let Some(reason) = snapshot.uncertain {
                faults.push(format!("uncertain: {reason}"));
            } else if !good(&seen) {
                faults.push(format!("wrong set of {} sockets", seen.len()));
            }
        };
        for _ in 0..ROUNDS {
            let done = AtomicBool::new(false);
            let open = thread::scope(|scope| {
                let order = scope.spawn(|| {
                    let open = puppet.tell(&format!("churn {address},{refusing}"));
                    done.store(true, Ordering::SeqCst);
                    open
                });
                while !done.load(Ordering::SeqCst) {
                    check(&|seen| stable.is_subset(seen));
                    between += 1;
                    // A pause between two snapshots, as the watchdog makes one: the churn needs the processors.
                    thread::park_timeout(Duration::from_millis(5));
                }
                order.join().unwrap()
            });
            let mut expected: BTreeSet<u64> = open.split(',').map(|cookie| cookie.parse().unwrap()).collect();
            assert!(expected.len() >= THREADS * 40, "only {} sockets", expected.len());
            expected.extend(&stable);
            check(&|seen| *seen == expected);
        }
        println!("{} steps, {between} snapshots between, {missed} missed", ROUNDS * THREADS * STEPS);
        let check = view.crosscheck().unwrap();
        assert_eq!((check.disagreement, check.found, check.held_elsewhere), (None, vec![], vec![]));
        drop(puppet);
        until(view.as_mut(), "nothing left", |snapshot| held(snapshot).is_empty());
        assert!(faults.is_empty(), "{} faults: {:#?}", faults.len(), &faults[..faults.len().min(5)]);
        assert!(between >= ROUNDS, "snapshots must be taken during the churn, were {between}");
    });
}

/// The cookies of all, for an answer.
pub(super) fn cookies(open: &[Socket]) -> String {
    open.iter().map(|socket| cookie(socket).to_string()).collect::<Vec<_>>().join(",")
}
