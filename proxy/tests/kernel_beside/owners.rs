//! Whose a socket is, when there are several processes.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;

use counterfoil::config::View;
use counterfoil::kernel::{TcpState, Who};

use crate::puppet::{Home, Puppet, kill};
use crate::{VIEWS, beside, held, own_name, pids, until};

const ESTABLISHED: TcpState = TcpState::Established;

/// A process that a puppet started: killed on drop.
struct Child(u32);

impl Child {
    fn of(puppet: &mut Puppet, cookie: u64) -> Self {
        Self(puppet.tell(&format!("inherit {cookie}")).parse().unwrap())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        kill(self.0);
    }
}

/// A cgroup of version 2 with one below it. Removed on drop, when all of its processes have ended.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap_or_else(|| {
            panic!("no cgroup2 file system is mounted, and this test needs one: mount -t cgroup2 none DIRECTORY")
        });
        let group = PathBuf::from(line.split(' ').nth(4).unwrap()).join(format!("counterfoil-{}", std::process::id()));
        fs::create_dir_all(group.join("below")).unwrap();
        Self(group)
    }

    fn add(&self, puppet: &Puppet) {
        fs::write(self.0.join("below/cgroup.procs"), puppet.pid.to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let end = std::time::Instant::now() + crate::DEADLINE;
        // A process leaves its cgroup a moment after it was killed.
        while fs::remove_dir(self.0.join("below")).and_then(|()| fs::remove_dir(&self.0)).is_err() {
            if std::time::Instant::now() > end || !self.0.exists() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

#[test]
fn processes_with_one_name_keep_their_sockets_apart() {
    for choice in VIEWS {
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = backend.local_addr().unwrap();
        let name = own_name("twins");
        let mut first = Puppet::start(&name, &Home::Here);
        let mut view = beside(choice, &Who::Name(name.clone()), &[address]);
        let mut second = Puppet::start(&name, &Home::Here);
        let other = Puppet::start(&own_name("other"), &Home::Here);
        let mut expected = BTreeMap::new();
        for connection in 0..3 {
            let puppet = if connection == 1 { &mut second } else { &mut first };
            expected.insert(puppet.cookie(&format!("connect {address}")), (puppet.pid, ESTABLISHED));
        }
        let snapshot = until(view.as_mut(), "both", |snapshot| held(snapshot) == expected);
        assert_eq!(pids(&snapshot), [first.pid, second.pid], "the oldest first");

        expected.retain(|_, (pid, _)| *pid == second.pid);
        drop(first);
        let snapshot = until(view.as_mut(), "the second", |snapshot| held(snapshot) == expected);
        assert_eq!(pids(&snapshot), [second.pid]);
        drop((second, other));
        until(view.as_mut(), "none", |snapshot| snapshot.processes.is_empty() && held(snapshot).is_empty());
    }
}

#[test]
fn a_cgroup_is_watched_with_all_below_it() {
    for choice in VIEWS {
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = backend.local_addr().unwrap();
        let cgroup = Cgroup::new();
        let mut view = beside(choice, &Who::Cgroup(cgroup.0.clone()), &[address]);
        assert_eq!(pids(&view.snapshot().unwrap()), [0; 0]);

        let mut inside = Puppet::start("puppet-cgroup", &Home::Here);
        let mut outside = Puppet::start("puppet-cgroup", &Home::Here);
        let early = inside.cookie(&format!("connect {address}"));
        outside.cookie(&format!("connect {address}"));
        cgroup.add(&inside);
        let late = inside.cookie(&format!("connect {address}"));
        let expected = [early, late].map(|cookie| (cookie, (inside.pid, ESTABLISHED))).into();
        let snapshot = until(view.as_mut(), "the one inside", |snapshot| held(snapshot) == expected);
        assert_eq!(pids(&snapshot), [inside.pid]);

        // A child is in its parent's cgroup: a socket that both hold is its parent's, until that ends.
        let child = Child::of(&mut inside, late);
        let snapshot = until(view.as_mut(), "a child", |snapshot| snapshot.processes.len() == 2);
        assert_eq!(held(&snapshot), expected, "{choice:?}");
        assert_eq!(pids(&snapshot), [inside.pid, child.0]);
        drop(inside);
        let inherited = BTreeMap::from([(late, (child.0, ESTABLISHED))]);
        until(view.as_mut(), "inherited", |snapshot| held(snapshot) == inherited);
        drop(child);
        until(view.as_mut(), "none", |snapshot| snapshot.processes.is_empty() && held(snapshot).is_empty());
        drop(outside);
    }
}

#[test]
fn a_socket_that_only_a_stranger_holds_is_its_owners_as_long_as_that_lives() {
    let backend = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = backend.local_addr().unwrap();
    let mut puppet = Puppet::start("puppet-giver", &Home::Here);
    let who = Who::Pid(puppet.pid);
    let (mut ebpf, mut diag) = (beside(View::Ebpf, &who, &[address]), beside(View::SockDiag, &who, &[address]));
    let cookie = puppet.cookie(&format!("connect {address}"));
    let expected = BTreeMap::from([(cookie, (puppet.pid, ESTABLISHED))]);
    let child = Child::of(&mut puppet, cookie);
    for view in [&mut ebpf, &mut diag] {
        until(view.as_mut(), "held by both", |snapshot| held(snapshot) == expected);
    }
    puppet.tell(&format!("close {cookie}"));
    until(ebpf.as_mut(), "held by the child", |snapshot| held(snapshot) == expected);
    until(diag.as_mut(), "it has no descriptor", |snapshot| held(snapshot).is_empty());
    let check = ebpf.crosscheck().unwrap();
    assert_eq!((check.held_elsewhere, check.disagreement), (vec![cookie], None));

    drop(puppet);
    until(ebpf.as_mut(), "nobody's", |snapshot| snapshot.sockets.is_empty());
    drop((child, backend));
}
