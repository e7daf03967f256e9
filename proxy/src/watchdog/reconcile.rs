//! The join of the two halves (I9): a pure function of kernel snapshot, ledger snapshot, time and policy.
//!
//! The kernel is read first and the ledger second. A row is made before `connect(2)` and becomes a tombstone after the
//! descriptor was closed, so a socket of the kernel snapshot is a row or a tombstone of the ledger snapshot; one that
//! is neither is an orphan. The other way round the two reads can race: a row that is younger than the kernel snapshot
//! is ignored, and whatever is seen must be seen again, in `sweeps` consecutive sweeps and past `grace`.
//!
//! Nothing here acts. A finding says whether it may be acted on, and if not, why it is held back.

use std::collections::HashMap;
use std::time::Duration;

use super::beside;
use super::finding::{Finding, HeldBack};
use super::flight::Flight;
use super::policy::Policy;
use crate::clock::{Mono, nanos};
use crate::config::Class;
use crate::kernel::{KernelSnapshot, KernelSocket, TcpState};
use crate::ledger::{BackendIndex, ConnKind, LedgerRow, LedgerSnapshot, Pause, RowState, Tombstone};

/// How much of the kernel view can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// eBPF: membership is exact, and the kernel's own times are known.
    Full,
    /// `sock_diag` and `/proc/self/fd`: only zombies are acted on.
    Fallback,
    /// Another process's sockets, by either view: there is no ledger, so a socket without a row is judged by its state in
    /// the kernel and by the kernel's times alone.
    Beside,
}

/// What earlier sweeps saw: the value that goes in and out of the join.
#[derive(Clone, Debug, Default)]
pub struct History {
    tracks: HashMap<u64, Track>,
    last: Mono,
}

#[derive(Clone, Copy, Debug)]
struct Track {
    class: Class,
    first_seen: Mono,
    sweeps: u32,
    /// The last ones of these in which the view was whole.
    certain: u32,
    /// In how many of these, since the last one in which its owner was stalled, that had given another sign of life.
    attended: u32,
    /// The last of these signs.
    beat: Mono,
    /// The worker that was stalled.
    absent: Option<usize>,
}

impl History {
    /// Starts all counts again: the next sweep follows none.
    pub fn interrupt(&mut self) {
        self.tracks.clear();
    }
}

/// An unhealthy condition of one socket now, however short it has held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which.
    pub class: Class,
    /// When it began, if some clock proves that; else it began when it was first seen.
    pub since: Option<Mono>,
}

impl Condition {
    /// If more than `limit` has passed from `start` until `taken`.
    pub(super) fn overdue(class: Class, start: Mono, limit: Duration, taken: Mono) -> Option<Self> {
        let since = start.after(limit);
        (since <= taken).then_some(Self { class, since: Some(since) })
    }
}

/// What both views have under one cookie.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pair<'a> {
    /// The kernel's half; only held sockets count.
    pub socket: Option<&'a KernelSocket>,
    /// The ledger's half.
    pub row: Option<&'a LedgerRow>,
    /// What the ledger remembers.
    pub tombstone: Option<&'a Tombstone>,
    /// When the owner of the row did not run.
    pub pauses: &'a [Pause],
}

impl Pair<'_> {
    /// Whether either view has it.
    pub fn exists(&self) -> bool {
        self.socket.is_some() || self.row.is_some()
    }
}

/// Both halves under each cookie.
#[derive(Debug)]
pub struct Joined<'a> {
    /// In the order of the cookies. For each there is a live socket: a hash table would take twice the memory.
    pairs: Vec<(u64, Pair<'a>)>,
    kernel: &'a KernelSnapshot,
    ledger: &'a LedgerSnapshot,
    trust: Trust,
}

impl<'a> Joined<'a> {
    /// Joins two snapshots by cookie; the ledger's must have been taken after the kernel's.
    pub fn new(kernel: &'a KernelSnapshot, trust: Trust, ledger: &'a LedgerSnapshot) -> Self {
        let sockets = kernel.sockets.iter().filter(|socket| socket.held);
        let mut pairs: Vec<(u64, Pair<'a>)> = Vec::with_capacity(kernel.sockets.len().max(ledger.rows.len()));
        pairs.extend(sockets.map(|socket| (socket.cookie, Pair { socket: Some(socket), ..Pair::default() })));
        pairs.sort_unstable_by_key(|(cookie, _)| *cookie);
        // None is there twice, the reader sees to that; if one were, one of them would count.
        pairs.dedup_by_key(|(cookie, _)| *cookie);
        let known = pairs.len();
        for row in &ledger.rows {
            let pauses = ledger.pauses.get(row.id.shard).map(Vec::as_slice).unwrap_or_default();
            match find(&pairs[..known], row.cookie) {
                Some(at) => (pairs[at].1.row, pairs[at].1.pauses) = (Some(row), pauses),
                None => pairs.push((row.cookie, Pair { row: Some(row), pauses, ..Pair::default() })),
            }
        }
        pairs.sort_unstable_by_key(|(cookie, _)| *cookie);
        for tombstone in &ledger.tombstones {
            if let Some(at) = find(&pairs, tombstone.cookie) {
                let pair = &mut pairs[at].1;
                // Closed while the ledger was being read: the row is history.
                pair.row = None;
                pair.tombstone = Some(tombstone);
            }
        }
        Self { pairs, kernel, ledger, trust }
    }

    /// Each cookie with both halves, in the order of the cookies.
    pub fn pairs(&self) -> impl Iterator<Item = (u64, &Pair<'a>)> {
        self.pairs.iter().map(|(cookie, pair)| (*cookie, pair))
    }

    /// Both halves of one socket.
    pub fn pair(&self, cookie: u64) -> Pair<'a> {
        find(&self.pairs, cookie).map(|at| self.pairs[at].1).unwrap_or_default()
    }

    /// Whether the kernel view can be relied on.
    pub fn is_whole(&self) -> bool {
        self.kernel.uncertain.is_none()
    }

    /// When the kernel was read.
    pub fn taken(&self) -> Mono {
        Mono(self.kernel.taken_ns)
    }

    /// The unhealthy condition of one socket, if it has one.
    pub fn condition(&self, cookie: u64, policy: &Policy) -> Option<Condition> {
        condition(&self.pair(cookie), self.taken(), self.trust, policy)
    }

    /// The worker that could have put a condition right but has not run since it was first seen, or is stalled.
    pub fn stalled_owner(&self, row: Option<&LedgerRow>, first_seen: Mono, policy: &Policy) -> Option<usize> {
        self.last_sign(row, first_seen, policy).err()
    }

    /// The last sign of life of the worker that could have put a condition right, [`Mono::MAX`] if none need be waited
    /// for; or the worker, if it has not run since the condition was first seen, or is stalled. Nobody owns an orphan,
    /// so it might be any worker's that stopped half-way through its books.
    fn last_sign(&self, row: Option<&LedgerRow>, first_seen: Mono, policy: &Policy) -> Result<Mono, usize> {
        let suspects = match row {
            Some(row) => row.id.shard..row.id.shard.saturating_add(1),
            None => 0..policy.workers,
        };
        let limit = self.ledger.taken.0.saturating_sub(nanos(policy.stalled_after));
        suspects.filter(|shard| *shard < policy.workers).try_fold(Mono::MAX, |earliest, shard| {
            let beat = self.ledger.heartbeats.get(shard).copied().unwrap_or(Mono::ZERO);
            if beat > first_seen && beat.0 > limit { Ok(earliest.min(beat)) } else { Err(shard) }
        })
    }
}

/// Where a cookie is.
fn find(pairs: &[(u64, Pair<'_>)], cookie: u64) -> Option<usize> {
    pairs.binary_search_by_key(&cookie, |(cookie, _)| *cookie).ok()
}

/// The condition of one pair when the kernel was read, if it is unhealthy. The class's predicate, evaluated by the join
/// in each sweep, and by the reaper again before each rung of its ladder (I10).
pub fn condition(pair: &Pair<'_>, taken: Mono, trust: Trust, policy: &Policy) -> Option<Condition> {
    match (pair.socket, pair.row) {
        (Some(socket), None) if trust == Trust::Beside => beside::condition(socket, taken, policy),
        (Some(socket), None) => match pair.tombstone {
            Some(tombstone) if tombstone.closed >= taken => None,
            _ if matches!(socket.state, TcpState::Listen | TcpState::NewSynRecv) => None,
            tombstone => Some(Condition { class: Class::Orphan, since: tombstone.map(|tombstone| tombstone.closed) }),
        },
        (_, Some(row)) if row.opened >= taken => None,
        (None, Some(_)) => Some(Condition { class: Class::Ghost, since: None }),
        (Some(socket), Some(row)) => both(socket, row, pair.pauses, taken, trust, policy),
        (None, None) => None,
    }
}

/// Both views know it: its state in the kernel decides, and how long no byte has moved.
fn both(
    socket: &KernelSocket,
    row: &LedgerRow,
    pauses: &[Pause],
    taken: Mono,
    trust: Trust,
    policy: &Policy,
) -> Option<Condition> {
    let backend = policy.backend(row.backend)?;
    let overdue = |class: Class, start: Mono, limit: Duration| Condition::overdue(class, start, limit, taken);
    let paused = row.state == RowState::Paused;
    match socket.state {
        // It may have sent all that it had: what is not read yet is the client's all the same, as long as it reads.
        TcpState::CloseWait | TcpState::Close if paused => overdue(Class::Zombie, row.last_byte, backend.paused_after),
        TcpState::CloseWait | TcpState::Close => Some(Condition { class: Class::Zombie, since: None }),
        TcpState::FinWait1 | TcpState::FinWait2 | TcpState::Closing | TcpState::LastAck => {
            Some(Condition { class: Class::Lingering, since: None })
        }
        TcpState::SynSent | TcpState::SynRecv => {
            let limit = if row.kind == ConnKind::Check { backend.check_after } else { backend.embryo_after };
            overdue(Class::Embryo, socket.opened.map_or(row.opened, Mono), limit)
        }
        TcpState::Established => {
            let last = last_byte(socket, row, pauses, trust);
            if paused {
                // The backend cannot send: for as long as the client reads.
                overdue(Class::Stuck, last.max(row.last_byte), backend.stuck_after.max(backend.paused_after))
            } else if row.in_flight > 0 {
                overdue(Class::Stuck, last, backend.stuck_after)
            } else if row.kind == ConnKind::OneShot && row.queries > 0 {
                overdue(Class::Hoard, last, backend.spent_after)
            } else if row.kind == ConnKind::Spare {
                overdue(Class::Hoard, last, backend.spare_after)
            } else {
                overdue(Class::Hoard, last, backend.hoard_after)
            }
        }
        TcpState::TimeWait | TcpState::Listen | TcpState::NewSynRecv | TcpState::BoundInactive => None,
    }
}

/// When a byte last moved: the kernel's time. The ledger's only where the view has none.
///
/// What came while the owner did not run was news to it when it ran again, and it counts from there.
fn last_byte(socket: &KernelSocket, row: &LedgerRow, pauses: &[Pause], trust: Trust) -> Mono {
    match (trust, socket.last_received_ns.max(socket.last_sent_ns)) {
        (Trust::Full, Some(at)) => {
            let at = Mono(at);
            pauses.iter().find(|pause| (pause.from..=pause.to).contains(&at)).map_or(at, |pause| pause.to)
        }
        _ => row.last_byte,
    }
}

/// One sweep.
pub fn reconcile(joined: &Joined<'_>, history: &mut History, policy: &Policy) -> Vec<Finding> {
    let taken = joined.taken();
    if taken.since(history.last) > policy.max_pause {
        history.tracks.clear();
    }
    history.last = taken;
    let mut tracks = HashMap::new();
    let mut findings = Vec::new();
    for (cookie, pair) in &joined.pairs {
        let Some(condition) = condition(pair, taken, joined.trust, policy) else { continue };
        let earlier = history.tracks.get(cookie).filter(|track| track.class == condition.class);
        let first_seen = earlier.map_or(taken, |track| track.first_seen);
        // Whether the owner has run since is a question from the second sweep on.
        let sign = joined.last_sign(pair.row, earlier.map_or(Mono::ZERO, |track| track.first_seen), policy);
        let before = earlier.map_or((0, Mono::ZERO), |track| (track.attended, track.beat));
        let (attended, beat) = match sign {
            Ok(beat) if beat > before.1 || beat == Mono::MAX => (before.0.saturating_add(1), beat),
            Ok(_) => before,
            Err(_) => (0, before.1),
        };
        let track = Track {
            class: condition.class,
            first_seen,
            sweeps: earlier.map_or(0, |track| track.sweeps).saturating_add(1),
            certain: match (joined.is_whole(), earlier) {
                (true, earlier) => earlier.map_or(0, |track| track.certain).saturating_add(1),
                (false, _) => 0,
            },
            attended,
            beat,
            absent: sign.err().or_else(|| earlier.and_then(|track| track.absent)),
        };
        tracks.insert(*cookie, track);
        let since = condition.since.unwrap_or(track.first_seen);
        if track.sweeps < policy.sweeps || taken.since(since) < policy.grace {
            continue;
        }
        let backend = match (pair.row, pair.tombstone, pair.socket) {
            (Some(row), _, _) => Some(row.backend),
            (_, Some(tombstone), _) => Some(tombstone.backend),
            (_, _, Some(socket)) => policy.backend_of(socket),
            (None, None, None) => None,
        };
        findings.push(Finding {
            class: condition.class,
            cookie: *cookie,
            backend,
            socket: pair.socket.cloned(),
            row: pair.row.copied(),
            tombstone: pair.tombstone.copied(),
            since,
            first_seen: track.first_seen,
            sweeps: track.sweeps,
            flight: Flight::default(),
            held_back: held_back(joined, pair, &track, backend, policy),
        });
    }
    history.tracks = tracks;
    findings.sort_unstable_by_key(|finding| (finding.class, finding.cookie));
    findings
}

fn held_back(
    joined: &Joined<'_>,
    pair: &Pair<'_>,
    track: &Track,
    backend: Option<BackendIndex>,
    policy: &Policy,
) -> Option<HeldBack> {
    if track.certain < policy.sweeps {
        return Some(HeldBack::Uncertain);
    }
    if joined.trust == Trust::Fallback && track.class != Class::Zombie {
        return Some(HeldBack::Fallback);
    }
    if backend.is_none() {
        return Some(HeldBack::ForeignPeer);
    }
    let severed_only = track.class == Class::Orphan || joined.trust == Trust::Beside;
    if severed_only && pair.socket.is_some_and(|socket| socket.state == TcpState::Close) {
        return Some(HeldBack::NoConnection);
    }
    // One that has only just come back has not had the time to put it right.
    track.absent.filter(|_| track.attended < policy.sweeps).map(HeldBack::WorkerStalled)
}

/// Workers that have shown no sign of life for too long; those that never did count from `started`.
pub fn stalled(ledger: &LedgerSnapshot, started: Mono, policy: &Policy) -> Vec<bool> {
    (0..policy.workers)
        .map(|worker| {
            let beat = ledger.heartbeats.get(worker).copied().unwrap_or(Mono::ZERO).max(started);
            ledger.taken.since(beat) > policy.stalled_after
        })
        .collect()
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "reconcile_world.rs"]
mod world;

#[cfg(test)]
#[path = "reconcile_model.rs"]
mod model;
