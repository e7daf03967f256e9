//! A churn of backend connections through the one opener, for the test that ledger and kernel view agree exactly.
//!
//! Threads open connections to peers that hold, close, reset or refuse them, and close some themselves. At barriers they
//! stand still, and the two views are compared as sets of cookies.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::SockRef;

use tokio::io::Interest;

use crate::backend::connect::{self, FastOpen, Io};
use crate::clock;
use crate::close::CloseReason;
use crate::kernel::{KernelView, TcpState};
use crate::ledger::caps::Caps;
use crate::ledger::{Claim, ConnKind, Ledger, OpenInfo, Tracked};

/// How much is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Churn {
    /// Threads that open connections, each with its own shard.
    pub threads: usize,
    /// Connections opened in all.
    pub connects: usize,
    /// How often the views are compared.
    pub barriers: usize,
    /// Connections that each thread keeps at least.
    pub keep: usize,
    /// Every nth row is left out of the ledger on purpose; zero: none.
    pub forget_every: u32,
    /// Of all random choices.
    pub seed: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Comparisons made.
    pub barriers: usize,
    /// Connections opened.
    pub connects: usize,
    /// Fewest sockets alive at a comparison.
    pub fewest: usize,
    /// Fewest sockets at a comparison that were in CLOSE with their descriptor held.
    pub fewest_close_held: usize,
    /// Cookies in one view only, at any comparison: (barrier, cookie, whether the kernel had it).
    pub differences: Vec<(usize, u64, bool)>,
    /// Events that the kernel view says it has missed.
    pub missed: u64,
}

/// Runs the churn against a view that sees this process.
///
/// # Errors
///
/// A peer can't listen, a connection can't be opened for another reason than a refusal, or the view fails.
pub fn run(churn: Churn, view: &mut dyn KernelView) -> anyhow::Result<Seen> {
    let caps = Arc::new(Caps::new([usize::MAX], usize::MAX));
    let ledger = Ledger::new(churn.threads, 4 * churn.keep + 64, 1, caps);
    let peers = Peers::start()?;
    let barrier = Arc::new(Barrier::new(churn.threads + 1));
    let mut threads = Vec::new();
    for shard in 0..churn.threads {
        let claim = ledger.claim(shard).ok_or_else(|| anyhow::anyhow!("shard {shard} is taken"))?;
        let (barrier, targets) = (Arc::clone(&barrier), peers.all());
        threads.push(std::thread::spawn(move || work(churn, shard, claim, &targets, &barrier)));
    }
    let mut seen = Seen { fewest: usize::MAX, fewest_close_held: usize::MAX, ..Seen::default() };
    let mut failed = None;
    for number in 0..churn.barriers {
        barrier.wait();
        // The kernel first, then the ledger, as in a sweep.
        if let Err(error) = compare(number, view, &ledger, &mut seen) {
            failed.get_or_insert(error);
        }
        barrier.wait();
    }
    for thread in threads {
        seen.connects += thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    failed.map_or(Ok(seen), Err)
}

fn compare(number: usize, view: &mut dyn KernelView, ledger: &Ledger, seen: &mut Seen) -> anyhow::Result<()> {
    let snapshot = view.snapshot()?;
    let rows: BTreeSet<u64> = ledger.snapshot(clock::now()).rows.iter().map(|row| row.cookie).collect();
    let held = snapshot.sockets.iter().filter(|socket| socket.held);
    let kernel: BTreeSet<u64> = held.clone().map(|socket| socket.cookie).collect();
    let closed = held.filter(|socket| socket.state == TcpState::Close).count();
    seen.barriers += 1;
    seen.fewest = seen.fewest.min(kernel.len());
    seen.fewest_close_held = seen.fewest_close_held.min(closed);
    seen.missed = snapshot.missed;
    for cookie in kernel.symmetric_difference(&rows) {
        seen.differences.push((number, *cookie, kernel.contains(cookie)));
    }
    Ok(())
}

fn work(churn: Churn, shard: usize, claim: Claim, targets: &[SocketAddr], barrier: &Barrier) -> anyhow::Result<usize> {
    let ledger = claim.writer();
    ledger.forget_every(churn.forget_every);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let _here = runtime.enter();
    let mut random = fastrand::Rng::with_seed(churn.seed ^ shard as u64);
    let mut open: Vec<Tracked<Io>> = Vec::new();
    let (mut connects, mut failed) = (0, None);
    let per_round = churn.connects.div_ceil(churn.threads * churn.barriers);
    for _ in 0..churn.barriers {
        for _ in 0..per_round {
            while open.len() > churn.keep && (open.len() > 3 * churn.keep || random.bool()) {
                let conn = open.swap_remove(random.usize(..open.len()));
                if random.u8(..) < 230 {
                    // Without it the ports of the machine would be in TIME_WAIT before the end.
                    let _ = conn.io().get_ref().set_linger(Some(Duration::ZERO));
                }
                conn.close(CloseReason::Evicted);
            }
            let info = OpenInfo { backend: 0, kind: ConnKind::Owned, owner: 1, header: 0, client_tls: None };
            let target = targets[random.usize(..targets.len())];
            let permit = ledger.caps().acquire(0).map_err(|cap| anyhow::anyhow!("{cap:?}"));
            let opened = permit.and_then(|permit| {
                let (opened, _) = connect::connect(&ledger, permit, info, target, None, FastOpen::Off, clock::now())?;
                Ok(connect::register(opened, Interest::READABLE | Interest::WRITABLE)?)
            });
            match opened {
                Ok(conn) => {
                    if random.u8(..) < 16 {
                        let _ = conn.io().get_ref().shutdown(std::net::Shutdown::Write);
                    }
                    open.push(conn);
                    connects += 1;
                }
                // The barriers must be passed all the same, or the others would wait for ever.
                Err(error) => failed = Some(error.context(format!("to {target}"))),
            }
        }
        barrier.wait();
        barrier.wait();
    }
    for conn in open {
        conn.close(CloseReason::Drained);
    }
    failed.map_or(Ok(connects), Err)
}

/// Peers on loopback: some hold, some close, some reset, some refuse.
struct Peers {
    /// Those that accept.
    targets: Vec<SocketAddr>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    refusing: Vec<SocketAddr>,
}

/// Connections that a holding peer keeps; the oldest is closed, which its client may never read.
const HELD: usize = 2000;

impl Peers {
    fn all(&self) -> Vec<SocketAddr> {
        [self.targets.as_slice(), &self.refusing].concat()
    }

    fn start() -> io::Result<Self> {
        let mut peers = Self { targets: Vec::new(), stop: Arc::default(), threads: Vec::new(), refusing: Vec::new() };
        for host in 1..=4u8 {
            for manner in [Manner::Hold, Manner::Hold, Manner::Close, Manner::Reset] {
                let listener = TcpListener::bind((std::net::Ipv4Addr::new(127, 0, 0, host), 0))?;
                peers.targets.push(listener.local_addr()?);
                let stop = Arc::clone(&peers.stop);
                peers.threads.push(std::thread::spawn(move || manner.serve(&listener, &stop)));
            }
            // tcpmux: nobody listens there. A socket that holds a port without listening would be seen by the view.
            peers.refusing.push(SocketAddr::from(([127, 0, 1, host], 1)));
        }
        Ok(peers)
    }
}

impl Drop for Peers {
    #[expect(clippy::disallowed_methods, reason = "wakes the peers' accept, so that they end")]
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for target in &self.targets {
            let _ = TcpStream::connect(target);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[derive(Clone, Copy)]
enum Manner {
    Hold,
    Close,
    Reset,
}

impl Manner {
    fn serve(self, listener: &TcpListener, stop: &AtomicBool) {
        let mut held = std::collections::VecDeque::new();
        while let Ok((stream, _)) = listener.accept() {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            match self {
                Self::Hold => held.push_back(stream),
                Self::Close => drop(stream),
                Self::Reset => {
                    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                }
            }
            if held.len() > HELD {
                held.pop_front();
            }
        }
    }
}
