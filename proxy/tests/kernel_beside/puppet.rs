//! A process that does what it is told: opens, closes and holds connections, in namespaces of its own if need be.
//!
//! It is this test program again, running only the test [`puppet`], and takes one order per line on its standard input.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;
use std::{env, fs, io, thread};

use socket2::{Domain, SockRef, Socket, Type};

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
                let apart = ["--net", "--pid", "--fork", "sh", "-c", &up, "sh"];
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
        let _ = Command::new("kill").args(["-9", &self.pid.to_string()]).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program, or the applet of busybox where that is all there is.
fn tool(name: &'static str) -> Vec<&'static str> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).chain(["/sbin".into(), "/usr/sbin".into()]).any(|p| p.join(name).exists());
    if found { vec![name] } else { vec!["busybox", name] }
}

fn words(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
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
    listener: Option<TcpListener>,
    /// Client ends by cookie.
    clients: BTreeMap<u64, OwnedFd>,
    /// The ends that its own listener accepted, by the cookies of the clients.
    servers: BTreeMap<u64, TcpStream>,
    copies: Vec<OwnedFd>,
    children: Vec<Child>,
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
    for mut child in open.children {
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Open {
    fn obey(&mut self, order: &str, what: &str) -> String {
        match order {
            // Listens at a free port of this address.
            "listen" => {
                let listener = TcpListener::bind(what).unwrap();
                let address = listener.local_addr().unwrap();
                self.listener = Some(listener);
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
                self.copies.push(self.clients[&what.parse().unwrap()].try_clone().unwrap());
                "done".to_owned()
            }
            // A child of another name that inherits this one.
            "inherit" => {
                let socket = self.clients[&what.parse().unwrap()].try_clone().unwrap();
                let mut command = words(&["sh", "-c", "read -r line"]);
                // Ends when the puppet does, as its input does.
                let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(socket).spawn().unwrap();
                let pid = child.id();
                self.children.push(child);
                pid.to_string()
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
        let own = self.listener.as_ref().and_then(|listener| listener.local_addr().ok());
        match (connected, own) {
            (Ok(()), Some(own)) if own.port() == address.port() => {
                let server = self.listener.as_ref().unwrap().accept().unwrap().0;
                self.servers.insert(cookie, server);
            }
            // Refused: it is kept as it is.
            _ => thread::yield_now(),
        }
        self.clients.insert(cookie, socket.into());
        cookie
    }
}

fn cookie(socket: &impl AsFd) -> u64 {
    SockRef::from(socket).cookie().unwrap()
}
