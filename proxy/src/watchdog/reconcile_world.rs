//! The world of the join's model: connections, their worker, the process, and what kernel and ledger say of them.
//!
//! The worker does what a real one does: it beats, reads what came, closes what its peer has closed, gives up what has
//! no answer, and cleans up; an eighth of a second later than it beats, so that a sweep can fall in between. It can
//! stall, the whole process can be stopped, and the kernel view can miss sockets or be uncertain.

use proptest::prelude::*;

use super::tests::{SECOND, kernel, ledger, policy, row, socket};
use super::*;
use crate::close::CloseReason;

pub(super) const MILLI: u64 = SECOND / 1000;
/// Between a beat and the work, and between the work and the next beat.
const TICK: u64 = 125 * MILLI;
/// Longer without a beat is a pause, and so much before it belongs to it: the ledger's numbers.
const LATE: u64 = 500 * MILLI;
/// What the thresholds of [`policy`] are made of.
const IDLE: u64 = 30 * SECOND;
const QUERY: u64 = 5 * SECOND;
const CONNECT: u64 = 2 * SECOND;
const CLEANUP: u64 = SECOND;

/// What happens to the model's connections between two sweeps, or between the two reads of one.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// The worker begins to open one.
    Open(ConnKind),
    /// The peer accepts.
    Accept(usize),
    /// The worker sends a query.
    Ask(usize),
    /// The peer answers.
    Answer(usize),
    /// The client of its queries leaves.
    Abandon(usize),
    /// The worker closes the descriptor; its books follow with its next work.
    Close(usize),
    PeerCloses(usize),
    PeerResets(usize),
    /// The next kernel snapshot misses it, as an iterator over a changing table may.
    Miss(usize),
    Leak(usize, Class),
}

fn event(leaks: bool) -> impl Strategy<Value = Event> {
    let index = 0..32usize;
    let kind = prop::sample::select(vec![ConnKind::Shared, ConnKind::OneShot]);
    let leak = prop::sample::select(Class::ALL.to_vec());
    prop_oneof![
        4 => kind.prop_map(Event::Open),
        4 => index.clone().prop_map(Event::Accept),
        4 => index.clone().prop_map(Event::Ask),
        3 => index.clone().prop_map(Event::Answer),
        1 => index.clone().prop_map(Event::Abandon),
        1 => index.clone().prop_map(Event::Close),
        1 => index.clone().prop_map(Event::PeerCloses),
        1 => index.clone().prop_map(Event::PeerResets),
        2 => index.clone().prop_map(Event::Miss),
        2 * u32::from(leaks) => (index, leak).prop_map(|(index, class)| Event::Leak(index, class)),
    ]
}

/// What comes between two sweeps, and the second of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Step {
    pub(super) before: Vec<Event>,
    pub(super) between: Vec<Event>,
    /// The whole process is stopped for so long, before the sweep or between its two reads.
    pub(super) stop: u64,
    pub(super) stop_between: bool,
    /// The worker is stuck for so long from here on.
    pub(super) stall: u64,
    /// The sweep's view is uncertain, and lacks half of the sockets.
    pub(super) uncertain: bool,
}

/// How much goes wrong beside the leaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weather {
    Calm,
    /// The process is stopped now and then.
    Stops,
    /// The worker stalls and the view is uncertain, too.
    Storm,
}

pub(super) fn steps(weather: Weather, leaks: bool, count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Step>> {
    let length = || prop::sample::select(vec![300, 700, 1500, 2500, 4500, 6000, 35_000]).prop_map(|ms: u64| ms * MILLI);
    let stops = u32::from(weather != Weather::Calm);
    let storms = u32::from(weather == Weather::Storm);
    let stop = prop_oneof![12 => Just(0), stops => length()];
    let stall = prop_oneof![12 => Just(0), storms => length()];
    let uncertain = prop_oneof![12 => Just(false), storms => Just(true)];
    let events = || prop::collection::vec(event(leaks), 0..6);
    let step = (events(), events(), stop, any::<bool>(), stall, uncertain).prop_map(
        |(before, between, stop, stop_between, stall, uncertain)| Step {
            before,
            between,
            stop,
            stop_between,
            stall,
            uncertain,
        },
    );
    prop::collection::vec(step, count)
}

#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) cookie: u64,
    kind: ConnKind,
    opened: u64,
    state: TcpState,
    /// Whether the kernel and the ledger have it.
    held: bool,
    row: bool,
    pub(super) closed: Option<u64>,
    /// The last byte, as the kernel knows it and as the worker has noticed.
    moved: u64,
    noticed: u64,
    /// Since when a query is in flight, and whether it was answered.
    asked: Option<u64>,
    answered: bool,
    carried: u64,
    /// Whether the next snapshot misses it, and how many did in a row.
    miss: bool,
    missed: u32,
    /// Whether the last snapshot had it.
    shown: bool,
    pub(super) leak: Option<(Class, u64)>,
    /// The first of the consecutive sweeps that saw the leak's condition, and how many did.
    pub(super) seen: Option<(u64, u32)>,
}

impl Model {
    fn close(&mut self, now: u64) {
        (self.held, self.row, self.closed) = (false, false, Some(now));
    }

    fn is_open(&self) -> bool {
        self.held && self.state == TcpState::Established
    }

    /// When the condition of its leak begins.
    pub(super) fn ill_since(&self, pauses: &[Pause]) -> Option<(Class, u64)> {
        let (class, at) = self.leak?;
        let covered = pauses.iter().find(|pause| (pause.from.0..=pause.to.0).contains(&self.moved));
        let silent = covered.map_or(self.moved, |pause| pause.to.0);
        let since = match class {
            // The ledger is read after the kernel: its row is gone even if it went in between.
            Class::Orphan if self.closed.is_none() => 0,
            Class::Orphan | Class::Ghost | Class::Zombie | Class::Lingering => at,
            Class::Hoard if self.kind == ConnKind::OneShot && self.carried > 0 => silent + CLEANUP,
            Class::Hoard | Class::Stuck => silent + IDLE + CLEANUP,
            Class::Embryo => self.opened + CONNECT + CLEANUP,
        };
        Some((class, since))
    }
}

#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) now: u64,
    pub(super) conns: Vec<Model>,
    beat: u64,
    pub(super) pauses: Vec<Pause>,
    pub(super) stalled_until: u64,
    works_next: bool,
    stopped: bool,
    next_cleanup: u64,
    swept: u64,
    /// How many were opened.
    opened: u64,
}

impl World {
    pub(super) fn new(now: u64) -> Self {
        Self { now, beat: now, ..Self::default() }
    }

    fn runs(&self) -> bool {
        !self.stopped && self.now >= self.stalled_until
    }

    /// Time passes, and the worker has its turns.
    pub(super) fn advance(&mut self, to: u64) {
        while self.now < to {
            let tick = (self.now / TICK + 1) * TICK;
            self.now = tick.min(to);
            if self.now == tick && self.runs() {
                // After a stall it goes on where it was.
                if self.works_next {
                    self.work()
                } else {
                    self.beat()
                }
                self.works_next = !self.works_next;
            }
        }
    }

    fn beat(&mut self) {
        if self.now - self.beat > LATE {
            self.pauses.push(Pause { from: Mono(self.beat - LATE), to: Mono(self.now) });
        }
        self.beat = self.now;
    }

    fn work(&mut self) {
        let now = self.now;
        let cleans = now >= self.next_cleanup;
        if cleans {
            self.next_cleanup = now + CLEANUP;
        }
        for conn in self.conns.iter_mut().filter(|conn| conn.leak.is_none() && conn.closed.is_none()) {
            if conn.row && !conn.held {
                // Half-way through opening or closing.
                if conn.state == TcpState::Close {
                    conn.close(now);
                } else {
                    (conn.held, conn.moved, conn.noticed) = (true, now, now);
                }
                continue;
            }
            if conn.moved > conn.noticed {
                conn.noticed = now;
            }
            if conn.answered {
                (conn.asked, conn.answered) = (None, false);
            }
            let unanswered = conn.asked.is_some_and(|asked| asked + QUERY <= now);
            let unconnected = conn.state == TcpState::SynSent && conn.opened + CONNECT <= now;
            let spent = conn.kind == ConnKind::OneShot && conn.carried > 0 && conn.asked.is_none();
            let idle = cleans && conn.is_open() && conn.asked.is_none() && conn.noticed + IDLE <= now;
            let over = matches!(conn.state, TcpState::CloseWait | TcpState::Close);
            if unanswered || unconnected || spent || idle || over {
                conn.close(now);
            }
        }
    }

    fn pick(&mut self, index: usize, wanted: impl Fn(&Model) -> bool) -> Option<&mut Model> {
        let healthy = |conn: &&mut Model| conn.leak.is_none() && conn.closed.is_none() && wanted(conn);
        let mut wanted: Vec<&mut Model> = self.conns.iter_mut().filter(healthy).collect();
        let index = index.checked_rem(wanted.len())?;
        Some(wanted.swap_remove(index))
    }

    fn apply(&mut self, event: &Event) {
        let (now, runs) = (self.now, self.runs());
        let open = |conn: &Model| conn.is_open();
        match *event {
            Event::Open(kind) if runs => {
                let cookie = self.next_cookie();
                self.conns.push(Model {
                    cookie,
                    kind,
                    opened: now,
                    state: TcpState::SynSent,
                    held: false,
                    row: true,
                    closed: None,
                    moved: now,
                    noticed: now,
                    asked: None,
                    answered: false,
                    carried: 0,
                    miss: false,
                    missed: 0,
                    shown: false,
                    leak: None,
                    seen: None,
                })
            }
            Event::Accept(index) => {
                if let Some(conn) = self.pick(index, |conn| conn.held && conn.state == TcpState::SynSent) {
                    (conn.state, conn.moved) = (TcpState::Established, now);
                }
            }
            Event::Ask(index) if runs => {
                if let Some(conn) = self.pick(index, |conn| {
                    conn.is_open() && conn.asked.is_none() && (conn.kind != ConnKind::OneShot || conn.carried == 0)
                }) {
                    (conn.asked, conn.moved, conn.noticed) = (Some(now), now, now);
                    conn.carried += 1;
                }
            }
            Event::Answer(index) => {
                if let Some(conn) = self.pick(index, |conn| conn.is_open() && conn.asked.is_some()) {
                    (conn.answered, conn.moved) = (true, now);
                }
            }
            Event::Abandon(index) if runs => {
                if let Some(conn) = self.pick(index, |conn| conn.is_open() && conn.asked.is_some()) {
                    conn.asked = None;
                }
            }
            Event::Close(index) if runs => {
                if let Some(conn) = self.pick(index, |conn| conn.is_open() && conn.missed == 0) {
                    (conn.held, conn.state) = (false, TcpState::Close);
                }
            }
            Event::PeerCloses(index) => {
                if let Some(conn) = self.pick(index, open) {
                    conn.state = TcpState::CloseWait;
                }
            }
            Event::PeerResets(index) => {
                let alive = |conn: &Model| conn.held && conn.state != TcpState::Close;
                if let Some(conn) = self.pick(index, alive) {
                    conn.state = TcpState::Close;
                }
            }
            Event::Miss(index) => {
                if let Some(conn) = self.pick(index, |conn| conn.held) {
                    conn.miss = true;
                }
            }
            Event::Leak(index, class) if runs => self.leak(index, class),
            _ => {}
        }
    }

    fn next_cookie(&mut self) -> u64 {
        self.opened += 1;
        self.opened
    }

    fn leak(&mut self, index: usize, class: Class) {
        let now = self.now;
        let (embryo, stuck) = (class == Class::Embryo, class == Class::Stuck);
        let fits = |conn: &Model| {
            conn.held
                && conn.shown
                && conn.state == if embryo { TcpState::SynSent } else { TcpState::Established }
                && conn.asked.is_some() == stuck
                && !conn.answered
                && conn.moved + if conn.kind == ConnKind::OneShot && conn.carried > 0 { CLEANUP } else { IDLE } > now
                && (!embryo || conn.opened + CONNECT > now)
        };
        let Some(conn) = self.pick(index, fits) else { return };
        conn.leak = Some((class, now));
        match class {
            Class::Orphan => {
                conn.row = false;
                // Half of them were closed, says the ledger.
                conn.closed = conn.cookie.is_multiple_of(2).then_some(now);
            }
            Class::Ghost => conn.held = false,
            Class::Zombie => conn.state = if conn.carried > 0 { TcpState::CloseWait } else { TcpState::Close },
            Class::Lingering => conn.state = TcpState::FinWait2,
            // Nobody will close it, and the kernel's time of its last byte counts.
            Class::Hoard | Class::Stuck | Class::Embryo => {}
        }
    }

    pub(super) fn kernel(&mut self, uncertain: bool) -> KernelSnapshot {
        self.swept = self.now;
        let mut sockets = Vec::new();
        for conn in &mut self.conns {
            conn.shown = false;
            if !conn.held {
                conn.missed += u32::from(conn.row);
                continue;
            }
            let healthy = conn.leak.is_none();
            // An iterator may miss a socket now and then; not the same one in `sweeps` sweeps running.
            if std::mem::take(&mut conn.miss) && healthy && conn.missed + 1 < policy().sweeps {
                conn.missed += 1;
            } else {
                conn.missed = 0;
                conn.shown = !(uncertain && healthy && conn.cookie.is_multiple_of(2));
                if conn.shown {
                    let opened = Some(conn.opened);
                    sockets.push(KernelSocket { opened, ..socket(conn.cookie, conn.state, conn.moved) });
                }
            }
        }
        let mut kernel = kernel(self.now, sockets);
        kernel.uncertain = uncertain.then(|| "storage failed".to_owned());
        kernel
    }

    pub(super) fn ledger(&self) -> LedgerSnapshot {
        let mut read = ledger(self.now, Vec::new());
        read.heartbeats = vec![Mono(self.beat)];
        read.pauses = vec![self.pauses.clone()];
        for conn in &self.conns {
            // Closed while the ledger was being read: half of the rows were read before.
            let both = conn.closed.is_some_and(|at| at >= self.swept) && conn.cookie.is_multiple_of(4);
            if conn.row || both && conn.leak.is_none() {
                read.rows.push(LedgerRow {
                    kind: conn.kind,
                    in_flight: u32::from(conn.asked.is_some()),
                    queries: conn.carried,
                    // A leaking worker believes that all is well.
                    last_byte: Mono(if conn.leak.is_some() { self.now } else { conn.noticed }),
                    ..row(conn.cookie, conn.opened, 0)
                });
            }
            if let Some(closed) = conn.closed {
                let reason = CloseReason::IdleTimeout;
                read.tombstones.push(Tombstone { cookie: conn.cookie, backend: 0, closed: Mono(closed), reason });
            }
        }
        read
    }

    pub(super) fn pass(&mut self, events: &[Event], stop: u64) {
        self.stopped = stop > 0;
        let gap = if stop > 0 { stop / (events.len() as u64 + 1) } else { 30 * MILLI };
        for event in events {
            self.advance(self.now + gap);
            self.apply(event);
        }
        if stop > 0 {
            self.advance(self.now + gap);
        }
        self.stopped = false;
    }
}
