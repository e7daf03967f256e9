//! A process that does what it is told: opens, closes and holds connections, in namespaces of its own if need be.
//!
//! It is this test program again, running only the test [`puppet`], and takes one order per line on its standard input.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;
use std::{env, fs, io};

use socket2::{Domain, SockRef, Socket, Type};

use crate::apart::{tool, words};
use crate::churn;

/// Marks an answer among what the test framework prints.
const MARK: &str = "puppet: ";
/// The name under which a puppet runs; without it the test does nothing.
const NAME: &str = "PUPPET_NAME";

/// A puppet that runs. Killed on drop, with all that it started.
pub(super) struct Puppet {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Its id, as this process sees it.
    pub(super) pid: u32,
}

/// Where a puppet lives.
pub(super) enum Home {
    /// Where this process does.
    Here,
    /// In a network and a pid namespace of its own.
    Apart,
}

impl Puppet {
    /// Starts one whose `comm` is `name`.
    pub(super) fn start(name: &str, home: &Home) -> Self {
        let program = env::current_exe().unwrap();
        let program = [program.to_str().unwrap(), "--exact", "puppet::puppet", "--nocapture", "--include-ignored"];
        let mut command = match home {
            Home::Here => words(&program),
            Home::Apart => {
                let up = format!("{} link set lo up && exec \"$@\"", tool("ip").join(" "));
                let apart = ["-n", "-p", "-f", "sh", "-c", &up, "sh"];
                words(&tool("unshare").into_iter().chain(apart).chain(program).collect::<Vec<_>>())
            }
        };
        command.env(NAME, name).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut puppet = Self { pid: child.id(), child, orders, answers };
        assert_eq!(puppet.answer(), "ready");
        if matches!(home, Home::Apart) {
            puppet.pid = child_of(puppet.child.id());
        }
        puppet
    }

    /// Gives an order and waits for its answer.
    pub(super) fn tell(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        self.answer()
    }

    /// An order whose answer is a cookie.
    pub(super) fn cookie(&mut self, order: &str) -> u64 {
        self.tell(order).parse().unwrap()
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the puppet has ended");
            // The framework prints the name of the test first, without an end of line.
            if let Some((_, answer)) = line.split_once(MARK) {
                return answer.trim_end().to_owned();
            }
        }
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // Its end first, as it may be in a pid namespace that ends with it.
        kill(self.pid);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends a process that a puppet is or has started.
pub(super) fn kill(pid: u32) {
    let _ = words(&tool("kill")).args(["-9", &pid.to_string()]).status();
}

/// The one child of a process.
fn child_of(parent: u32) -> u32 {
    let is_child = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|id| id.trim() == parent.to_string()))
    };
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.into_iter().find(is_child).unwrap()
}

/// What a puppet has open.
#[derive(Default)]
struct Open {
    listeners: Vec<TcpListener>,
    /// Client ends by cookie.
    clients: BTreeMap<u64, TcpStream>,
    /// The ends that its own listener accepted, by the cookies of the clients.
    servers: BTreeMap<u64, TcpStream>,
    /// Accepted from elsewhere, and second descriptors.
    others: Vec<OwnedFd>,
    churned: Vec<Socket>,
}

/// The process itself.
#[test]
#[ignore = "started by the other tests"]
fn puppet() {
    let Ok(name) = env::var(NAME) else { return };
    fs::write("/proc/self/comm", name).unwrap();
    println!("{MARK}ready");
    let mut open = Open::default();
    for order in io::stdin().lines() {
        let order = order.unwrap();
        let words: Vec<&str> = order.split(' ').collect();
        println!("{MARK}{}", open.obey(words[0], words.get(1).copied().unwrap_or_default()));
    }
}

impl Open {
    fn obey(&mut self, order: &str, what: &str) -> String {
        match order {
            // Listens at a free port of this address.
            "listen" => {
                let listener = TcpListener::bind(what).unwrap();
                let address = listener.local_addr().unwrap();
                self.listeners.push(listener);
                address.to_string()
            }
            // Connects to an address; to its own listener it accepts as well.
            "connect" => self.connect(what.parse().unwrap()).to_string(),
            "shut-down" => {
                SockRef::from(&self.clients[&what.parse().unwrap()]).shutdown(Shutdown::Write).unwrap();
                "done".to_owned()
            }
            "peer-closes" => {
                self.servers.remove(&what.parse().unwrap());
                "done".to_owned()
            }
            "peer-resets" => {
                let server = self.servers.remove(&what.parse().unwrap()).unwrap();
                SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
                "done".to_owned()
            }
            // Eight bytes there, which are read.
            "send" => {
                let cookie = what.parse().unwrap();
                (&self.clients[&cookie]).write_all(b"question").unwrap();
                (&self.servers[&cookie]).read_exact(&mut [0; 8]).unwrap();
                "done".to_owned()
            }
            // Six bytes back, which nobody reads.
            "peer-sends" => {
                (&self.servers[&what.parse().unwrap()]).write_all(b"answer").unwrap();
                "done".to_owned()
            }
            // Takes a connection that somebody else opened to the last listener.
            "accept" => {
                let socket = self.listeners.last().unwrap().accept().unwrap().0;
                let cookie = cookie(&socket);
                self.others.push(socket.into());
                cookie.to_string()
            }
            "close" => {
                self.clients.remove(&what.parse().unwrap());
                "done".to_owned()
            }
            "error" => {
                let error = SockRef::from(&self.clients[&what.parse().unwrap()]).take_error().unwrap();
                error.and_then(|error| error.raw_os_error()).unwrap_or(0).to_string()
            }
            // A second descriptor of the same socket.
            "duplicate" => {
                self.others.push(self.clients[&what.parse().unwrap()].try_clone().unwrap().into());
                "done".to_owned()
            }
            // A child of another name that inherits this one, and lives on when the puppet ends.
            "inherit" => {
                let socket: OwnedFd = self.clients[&what.parse().unwrap()].try_clone().unwrap().into();
                let mut command = words(&tool("sleep"));
                command.arg("60").stdin(Stdio::null()).stdout(Stdio::null()).stderr(socket);
                command.spawn().unwrap().id().to_string()
            }
            // Opens and closes at random, towards one address that accepts and one that refuses.
            "churn" => {
                let (backend, refusing) = what.split_once(',').unwrap();
                let open = std::mem::take(&mut self.churned);
                self.churned = churn::churn(open, backend.parse().unwrap(), refusing.parse().unwrap());
                churn::cookies(&self.churned)
            }
            "id" => std::process::id().to_string(),
            "namespace" => fs::read_link(Path::new("/proc/self/ns").join(what)).unwrap().display().to_string(),
            other => panic!("unknown order {other}"),
        }
    }

    fn connect(&mut self, address: SocketAddr) -> u64 {
        let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM, None).unwrap();
        let connected = socket.connect(&address.into());
        let cookie = cookie(&socket);
        let canonical = SocketAddr::new(address.ip().to_canonical(), address.port());
        let own = self.listeners.iter().find(|listener| listener.local_addr().unwrap() == canonical);
        // One that is refused is kept as it is.
        if let (Ok(()), Some(listener)) = (connected, own) {
            self.servers.insert(cookie, listener.accept().unwrap().0);
        }
        self.clients.insert(cookie, socket.into());
        cookie
    }
}

pub(super) fn cookie(socket: &impl AsFd) -> u64 {
    SockRef::from(socket).cookie().unwrap()
}
