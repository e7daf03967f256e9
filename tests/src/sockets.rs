//! What the kernel says of a process's TCP sockets, read from `/proc/PID/net/tcp` and `/proc/PID/fd`.
//!
//! This is the tests' own witness: it shares no code with the program's kernel view.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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

/// All TCP sockets, v4 and v6, in the network namespace of process `pid`.
pub fn all(pid: u32) -> Vec<Socket> {
    ["tcp", "tcp6"]
        .into_iter()
        .filter_map(|table| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).ok())
        .flat_map(|text| text.lines().skip(1).filter_map(parse_row).collect::<Vec<_>>())
        .collect()
}

/// `sl local_address rem_address st tx:rx tr:tm retrnsmt uid timeout inode ...`
fn parse_row(row: &str) -> Option<Socket> {
    let fields: Vec<&str> = row.split_ascii_whitespace().collect();
    let port = |field: &str| u16::from_str_radix(field.rsplit_once(':')?.1, 16).ok();
    Some(Socket {
        local_port: port(fields.get(1)?)?,
        remote_port: port(fields.get(2)?)?,
        state: State::from_number(u8::from_str_radix(fields.get(3)?, 16).ok()?)?,
        inode: fields.get(9)?.parse().ok()?,
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
    let candidates = all(pid).into_iter().filter(|s| s.state == State::Listen && s.local_port == port);
    let held = held_inodes(pid);
    candidates.into_iter().any(|s| held.contains(&s.inode))
}

/// Sockets that `pid` holds a descriptor of and whose peer is at `remote_port`.
pub fn towards(pid: u32, remote_port: u16) -> Vec<Socket> {
    let held = held_inodes(pid);
    all(pid).into_iter().filter(|s| s.remote_port == remote_port && held.contains(&s.inode)).collect()
}

/// How many sockets in state TIME_WAIT (nobody holds these) point at `remote_port`, as seen from `pid`'s namespace.
pub fn time_wait_towards(pid: u32, remote_port: u16) -> usize {
    all(pid).into_iter().filter(|s| s.remote_port == remote_port && s.state == State::TimeWait).count()
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
        let thread = std::thread::spawn(move || {
            let mut observed = Observed::default();
            let mut seen = HashSet::new();
            let mut close_wait: HashMap<u64, Instant> = HashMap::new();
            while !stopped.load(Ordering::Relaxed) {
                let now = Instant::now();
                let sockets = towards(pid, remote_port);
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
        });
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
