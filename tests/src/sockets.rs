//! What the kernel says of a process's TCP sockets, by `sock_diag` and `/proc/PID/fd`.
//!
//! This is the tests' own witness: it shares no code with the program's kernel view. (`/proc/net/tcp` would do, but takes
//! seconds where 100,000 sockets are in TIME_WAIT.)

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net;

use crate::netns;

/// State numbers of `include/net/tcp_states.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[expect(missing_docs, reason = "the kernel's names")]
pub enum State {
    Established = 1,
    SynSent = 2,
    SynRecv = 3,
    FinWait1 = 4,
    FinWait2 = 5,
    TimeWait = 6,
    Close = 7,
    CloseWait = 8,
    LastAck = 9,
    Listen = 10,
    Closing = 11,
}

impl State {
    fn from_number(number: u8) -> Option<Self> {
        use State::{
            Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent, TimeWait,
        };
        [Established, SynSent, SynRecv, FinWait1, FinWait2, TimeWait, Close, CloseWait, LastAck, Listen, Closing]
            .into_iter()
            .find(|state| *state as u8 == number)
    }
}

/// One row of the kernel's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Socket {
    /// Local port.
    pub local_port: u16,
    /// Remote port; 0 for a listener.
    pub remote_port: u16,
    /// TCP state.
    pub state: State,
    /// Inode of the descriptor; 0 when nobody holds one any more.
    pub inode: u64,
}

/// Every state of a connection that somebody may hold a descriptor of.
const CONNECTED: [State; 8] = [
    State::Established,
    State::SynSent,
    State::SynRecv,
    State::FinWait1,
    State::FinWait2,
    State::CloseWait,
    State::LastAck,
    State::Closing,
];

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// `struct nlmsghdr` of `linux/netlink.h`, and the two parts of a `sock_diag` dump (`linux/inet_diag.h`).
const NLMSG_HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
/// `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// `struct inet_diag_msg`: where the local and remote port and the inode are.
const DIAG_MESSAGE: usize = 72;
const PORTS_AT: usize = 4;
const INODE_AT: usize = 68;

/// TCP sockets, v4 and v6, of the calling thread's network namespace in these states; a port of 0 means any.
fn dump(states: &[State], local_port: u16, remote_port: u16) -> Vec<Socket> {
    let mut found = Vec::new();
    dump_with(states, local_port, remote_port, 0, |message| found.extend(parse_socket(message)));
    found
}

/// The same, with these extensions of `linux/inet_diag.h`, as a mask; each answer goes to `take`.
fn dump_with(states: &[State], local_port: u16, remote_port: u16, extensions: u8, mut take: impl FnMut(&[u8])) {
    let mask = states.iter().fold(0_u32, |mask, state| mask | 1 << *state as u8);
    for family in [AF_INET, AF_INET6] {
        let mut request = Vec::with_capacity(NLMSG_HEADER + REQUEST);
        request.extend_from_slice(&((NLMSG_HEADER + REQUEST) as u32).to_ne_bytes());
        request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        request.extend_from_slice(&[family, IPPROTO_TCP, extensions, 0]);
        request.extend_from_slice(&mask.to_ne_bytes());
        request.extend_from_slice(&local_port.to_be_bytes());
        request.extend_from_slice(&remote_port.to_be_bytes());
        request.resize(NLMSG_HEADER + REQUEST, 0);
        let socket = net::socket_with(
            net::AddressFamily::NETLINK,
            net::SocketType::RAW,
            net::SocketFlags::CLOEXEC,
            Some(net::netlink::SOCK_DIAG),
        )
        .expect("a netlink socket");
        net::send(&socket, &request, net::SendFlags::empty()).expect("the kernel reads netlink requests");
        let mut buffer = vec![0; 1 << 16];
        loop {
            let (received, _) = net::recv(&socket, &mut buffer[..], net::RecvFlags::empty()).expect("a netlink answer");
            if !parse_messages(&buffer[..received], &mut take) {
                break;
            }
        }
    }
}

/// Takes what one read brought; `false` after the last message of the dump.
fn parse_messages(mut rest: &[u8], take: &mut impl FnMut(&[u8])) -> bool {
    while rest.len() >= NLMSG_HEADER {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        match u16::from_ne_bytes([rest[4], rest[5]]) {
            NLMSG_DONE => return false,
            NLMSG_ERROR => panic!("sock_diag refused: {:?}", &rest[NLMSG_HEADER..length]),
            _ => take(rest.get(NLMSG_HEADER..length).unwrap_or_default()),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    true
}

fn parse_socket(message: &[u8]) -> Option<Socket> {
    let message: &[u8; DIAG_MESSAGE] = message.first_chunk()?;
    let port = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let inode = message[INODE_AT..].first_chunk()?;
    Some(Socket {
        local_port: port(PORTS_AT),
        remote_port: port(PORTS_AT + 2),
        state: State::from_number(message[1])?,
        inode: u64::from(u32::from_ne_bytes(*inode)),
    })
}

/// Inodes of the sockets of which `pid` holds a descriptor.
pub fn held_inodes(pid: u32) -> HashSet<u64> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return HashSet::new() };
    entries
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter_map(|target| socket_inode(&target))
        .collect()
}

fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Does `pid` listen on `port`?
pub fn listens(pid: u32, port: u16) -> bool {
    let held = held_inodes(pid);
    in_network_of(pid, || dump(&[State::Listen], port, 0)).iter().any(|s| held.contains(&s.inode))
}

/// Sockets that `pid` holds a descriptor of and whose peer is at `remote_port`. Those in state CLOSE are not in the
/// kernel's table and so not here.
pub fn towards(pid: u32, remote_port: u16) -> Vec<Socket> {
    in_network_of(pid, || held_towards(pid, remote_port))
}

fn held_towards(pid: u32, remote_port: u16) -> Vec<Socket> {
    // Sockets first: one that is closed in between then has no descriptor, and is not counted.
    let mut sockets = dump(&CONNECTED, 0, remote_port);
    let held = held_inodes(pid);
    sockets.retain(|socket| held.contains(&socket.inode));
    sockets
}

/// Connections, whoever is their peer, that `pid` holds a descriptor of; not those that it accepted at these ports.
pub fn connected(pid: u32, except: &[u16]) -> Vec<Socket> {
    let mut sockets = in_network_of(pid, || held_towards(pid, 0));
    sockets.retain(|socket| !except.contains(&socket.local_port));
    sockets
}

/// How many sockets in state TIME_WAIT (nobody holds these) point at `remote_port`, as seen from `pid`'s namespace.
pub fn time_wait_towards(pid: u32, remote_port: u16) -> usize {
    in_network_of(pid, || dump(&[State::TimeWait], 0, remote_port).len())
}

/// What the kernel keeps for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The connection.
    pub socket: Socket,
    /// Of what was received and not read, its own bookkeeping included, bytes.
    pub received: usize,
    /// Of what was written and not acknowledged, its own bookkeeping included, bytes.
    pub to_send: usize,
}

/// What the kernel keeps for the connections of the calling thread's network namespace at this local port, whoever holds
/// them, and if nobody does any more.
pub fn memory_at(local_port: u16) -> Vec<Memory> {
    /// `INET_DIAG_SKMEMINFO`: which bit of the request asks for it, and the number of its attribute.
    const SKMEMINFO: u16 = 7;
    /// `SK_MEMINFO_RMEM_ALLOC` and `SK_MEMINFO_WMEM_QUEUED` of `linux/sock_diag.h`.
    const RECEIVED: usize = 0;
    const TO_SEND: usize = 5;
    let mut found = Vec::new();
    dump_with(&CONNECTED, local_port, 0, 1 << (SKMEMINFO - 1), |message| {
        let Some(socket) = parse_socket(message) else { return };
        let mut rest = message.get(DIAG_MESSAGE..).unwrap_or_default();
        // `struct rtattr`: length with these four octets, type.
        while let Some([l0, l1, t0, t1]) = rest.first_chunk() {
            let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
            if u16::from_ne_bytes([*t0, *t1]) == SKMEMINFO {
                let number = |at: usize| {
                    let octets = rest.get(4 + 4 * at..).and_then(<[u8]>::first_chunk).expect("the kernel's attribute");
                    u32::from_ne_bytes(*octets) as usize
                };
                found.push(Memory { socket, received: number(RECEIVED), to_send: number(TO_SEND) });
            }
            rest = rest.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
        }
    });
    found
}

/// Runs `work` where the network is that of process `pid`.
fn in_network_of<T: Send>(pid: u32, work: impl FnOnce() -> T + Send) -> T {
    let theirs = format!("/proc/{pid}/ns/net");
    if std::fs::read_link(&theirs).ok() == std::fs::read_link("/proc/thread-self/ns/net").ok() {
        return work();
    }
    netns::run_in(&theirs, work)
}

/// What a [`Sampler`] saw.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Looks taken.
    pub samples: usize,
    /// Most sockets at once, all states.
    pub most: usize,
    /// Most sockets in CLOSE_WAIT at once.
    pub most_close_wait: usize,
    /// The longest time that one socket was seen in CLOSE_WAIT without a look in between that saw it elsewhere.
    pub longest_close_wait: Duration,
    /// Distinct sockets seen.
    pub distinct: usize,
}

/// Looks at the sockets of a process towards one port, again and again, until it is stopped.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Observed>>,
}

/// Pause between two looks of a [`Sampler`].
const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);

impl Sampler {
    /// Starts to look at the held sockets of `pid` towards `remote_port`.
    pub fn start(pid: u32, remote_port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let look = move || {
            let mut observed = Observed::default();
            let mut seen = HashSet::new();
            let mut close_wait: HashMap<u64, Instant> = HashMap::new();
            while !stopped.load(Ordering::Relaxed) {
                let sockets = held_towards(pid, remote_port);
                let now = Instant::now();
                observed.samples += 1;
                observed.most = observed.most.max(sockets.len());
                let waiting: HashSet<u64> =
                    sockets.iter().filter(|s| s.state == State::CloseWait).map(|s| s.inode).collect();
                observed.most_close_wait = observed.most_close_wait.max(waiting.len());
                close_wait.retain(|inode, _| waiting.contains(inode));
                for inode in waiting {
                    let since = *close_wait.entry(inode).or_insert(now);
                    observed.longest_close_wait = observed.longest_close_wait.max(now - since);
                }
                seen.extend(sockets.iter().map(|s| s.inode));
                std::thread::sleep(SAMPLE_INTERVAL);
            }
            observed.distinct = seen.len();
            observed
        };
        let thread = std::thread::spawn(move || in_network_of(pid, look));
        Self { stop, thread: Some(thread) }
    }

    /// Ends the looking and says what was seen.
    ///
    /// # Panics
    /// If the looking thread panicked.
    pub fn finish(mut self) -> Observed {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("finished once").join().expect("the sampling thread does not panic")
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn sees_every_state_of_an_own_connection() {
        let me = std::process::id();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(me, port));
        assert!(towards(me, port).is_empty());
        let ours = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        assert_eq!(towards(me, port).iter().map(|s| s.state).collect::<Vec<_>>(), [State::Established]);
        drop(theirs);
        crate::wait::until("CLOSE_WAIT after the peer's FIN", Duration::from_secs(2), || {
            towards(me, port).iter().map(|s| s.state).eq([State::CloseWait])
        });
        drop(ours);
        crate::wait::until("gone", Duration::from_secs(2), || towards(me, port).is_empty());
    }
}
