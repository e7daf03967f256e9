//! Two network namespaces with a veth pair between them: a network of the test's own, where ports and TIME_WAIT count
//! as they do between two machines.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::thread::LinkNameSpaceType;

use crate::process::{self, Process};

const DEADLINE: Duration = Duration::from_secs(10);

/// One end: a network namespace with loopback and one veth interface up. Removed on drop.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    /// Its address on the veth pair, in a /24.
    pub address: Ipv4Addr,
}

/// Makes a pair of namespaces that can reach each other. Needs root.
///
/// # Panics
/// If `ip` fails.
#[track_caller]
pub fn pair() -> (Namespace, Namespace) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let unique = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let left = Namespace { name: format!("cf-{unique}-a"), address: Ipv4Addr::new(10, 77, 0, 1) };
    ip(&["netns", "add", &left.name]);
    let right = Namespace { name: format!("cf-{unique}-b"), address: Ipv4Addr::new(10, 77, 0, 2) };
    ip(&["netns", "add", &right.name]);
    // Both ends are born inside: the machine's own network never sees them.
    ip(&["-n", &left.name, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", &right.name]);
    for end in [&left, &right] {
        ip(&["-n", &end.name, "address", "add", &format!("{}/24", end.address), "dev", "veth0"]);
        ip(&["-n", &end.name, "link", "set", "lo", "up"]);
        ip(&["-n", &end.name, "link", "set", "veth0", "up"]);
    }
    (left, right)
}

#[track_caller]
fn ip(args: &[&str]) {
    let (ok, output) = process::run("ip", args, DEADLINE);
    assert!(ok, "ip {}: {output}", args.join(" "));
}

impl Namespace {
    /// As `ip netns` has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts a command inside.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(&self, name: &str, command: &[&str]) -> Process {
        // `ip netns exec` becomes the command, so the process id is the command's.
        let args: Vec<&str> = ["netns", "exec", &self.name].into_iter().chain(command.iter().copied()).collect();
        Process::start(name, "ip", &args)
    }

    /// The command line that starts `command` inside.
    pub fn wrap(&self, command: &[&str]) -> Vec<String> {
        ["ip", "netns", "exec", &self.name].iter().chain(command).map(|&word| word.to_owned()).collect()
    }

    /// Runs ip(8) inside, such as `link set veth0 down`.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn ip(&self, command: &str) {
        let words: Vec<&str> = ["-n", &self.name].into_iter().chain(command.split_whitespace()).collect();
        ip(&words);
    }

    /// Runs nft(8) inside with these commands, one a line, and returns what it says.
    ///
    /// # Panics
    /// If it fails, as it does on a kernel without nf_tables.
    #[track_caller]
    pub fn nft(&self, commands: &str) -> String {
        let (ok, output) = self.run(|| process::run("nft", &[commands], DEADLINE));
        assert!(ok, "nft {commands}: {output}");
        output
    }

    /// Sets one of the `net` sysctls, such as `ipv4/ip_local_port_range`; each namespace has its own.
    ///
    /// # Panics
    /// If the kernel refuses.
    #[track_caller]
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{name}");
        self.run(|| std::fs::write(&path, value).unwrap_or_else(|e| panic!("{path} = {value}: {e}")));
    }

    /// Runs `work` on a thread that lives inside; sockets it makes belong to the namespace.
    ///
    /// # Panics
    /// If `work` panics or the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        run_in(&format!("/run/netns/{}", self.name), work)
    }
}

/// Runs `work` on a thread in the network namespace that `path` names (as below `/run/netns`, or `/proc/PID/ns/net`).
///
/// # Panics
/// If `work` panics or the namespace cannot be entered.
pub fn run_in<T: Send>(path: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .unwrap_or_else(|e| panic!("cannot open {path}: {e}"));
            let network = std::os::fd::AsFd::as_fd(&namespace);
            rustix::thread::move_into_link_name_space(network, Some(LinkNameSpaceType::Network))
                .expect("root may enter a network namespace");
            work()
        });
        match inside.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Both ends of a veth pair go with the first namespace.
        let _ = std::process::Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_two_ends_reach_each_other_and_leave_nothing() {
        let (left, right) = pair();
        let address = right.address;
        let listener = right.run(|| TcpListener::bind((address, 0)).unwrap());
        let port = listener.local_addr().unwrap().port();
        let client = left.run(|| TcpStream::connect((address, port)).unwrap());
        let (mut accepted, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip(), std::net::IpAddr::from(left.address));
        drop(client);
        assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
        let path = format!("/run/netns/{}", left.name);
        assert!(std::path::Path::new(&path).exists());
        drop((left, right));
        assert!(!std::path::Path::new(&path).exists());
    }
}
