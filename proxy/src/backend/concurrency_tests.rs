#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::VecDeque;

use super::*;

/// How a backend works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One query at a time on each connection.
    Serial,
    /// All of them side by side.
    SideBySide,
    /// The same, but the answers of a connection are sent in the order of their queries.
    InOrder,
    /// One query at a time altogether.
    OneProcessor,
}

/// How long it works on a query, ms.
type Work = fn(usize) -> u64;

/// Clients that ask their next question when they have the answer to the one before, and a worker that places them as
/// `worker/route.rs` does.
struct Trace {
    kind: Kind,
    work: Work,
    /// Queries of a connection that the worker packs; none: it watches the backend.
    fixed: Option<usize>,
    concurrency: Concurrency,
    conns: Vec<Conn>,
    asked: usize,
    answered: usize,
    /// When the one processor is free.
    free: u64,
}

#[derive(Default)]
struct Conn {
    answers: Answers,
    carried: u64,
    /// Queries in flight: turn, sent, answer.
    pending: VecDeque<(u64, u64, u64)>,
    /// When the last answer goes out.
    done: u64,
}

impl Trace {
    fn new(kind: Kind, work: Work, fixed: Option<usize>) -> Self {
        let concurrency = Concurrency::default();
        Self { kind, work, fixed, concurrency, conns: Vec::new(), asked: 0, answered: 0, free: 0 }
    }

    /// The connection for a query.
    fn place(&mut self) -> usize {
        let least = (0..self.conns.len()).min_by_key(|at| self.conns[*at].pending.len());
        if let Some(most) = self.fixed {
            return least.filter(|at| self.conns[*at].pending.len() < most).unwrap_or_else(|| self.open());
        }
        let packed = self.conns.iter().rposition(|conn| conn.pending.len() < 32);
        match (packed, least) {
            (Some(packed), Some(least)) => {
                if self.conns[packed].pending.is_empty() || !self.concurrency.prefers_alone() {
                    return packed;
                }
                if self.conns[least].pending.is_empty() || !self.concurrency.takes_credit() {
                    return least;
                }
                self.open()
            }
            _ => self.open(),
        }
    }

    fn open(&mut self) -> usize {
        self.conns.push(Conn::default());
        self.conns.len() - 1
    }

    fn ask(&mut self, now: u64) {
        let at = self.place();
        let work = (self.work)(self.asked) * 1000;
        self.asked += 1;
        let conn = &mut self.conns[at];
        let done = match self.kind {
            Kind::Serial => conn.done.max(now) + work,
            Kind::SideBySide => now + work,
            Kind::InOrder => conn.done.max(now + work),
            Kind::OneProcessor => {
                self.free = self.free.max(now) + work;
                self.free
            }
        };
        conn.done = conn.done.max(done);
        conn.carried += 1;
        conn.pending.push_back((conn.carried, now, done));
    }

    /// So many clients for so many seconds.
    fn run(mut self, clients: usize, seconds: u64) -> Self {
        (0..clients).for_each(|_| self.ask(0));
        self.go_on(seconds * 1_000_000);
        self
    }

    fn go_on(&mut self, end: u64) {
        loop {
            let all = self.conns.iter().enumerate();
            let pending =
                all.flat_map(|(at, conn)| conn.pending.iter().enumerate().map(move |(n, query)| (query.2, at, n)));
            let Some((now, at, n)) = pending.min() else { return };
            if now > end {
                return;
            }
            let conn = &mut self.conns[at];
            let (turn, sent, _) = conn.pending.remove(n).unwrap();
            // Times of zero mean never.
            let micros = |time: u64| Mono((time + 1) * 1000);
            if let Some(came) = conn.answers.came(turn, micros(sent), micros(now)) {
                self.concurrency.answered(came);
            }
            self.answered += 1;
            self.ask(now);
        }
    }
}

/// Constant, variable by little, by much, and a few that are very slow.
const WORKS: [Work; 4] =
    [|_| 15, |n| 10 + mixed(n) % 10, |n| 1 + mixed(n) % 40, |n| if mixed(n).is_multiple_of(20) { 200 } else { 5 }];

fn mixed(n: usize) -> u64 {
    let bits = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (bits ^ (bits >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40
}

/// At least 0.8 of what one query for each connection gives, which is the best there is.
#[test]
fn a_serial_backend_gets_a_connection_for_each_query() {
    for clients in [2, 3, 10, 40] {
        for (number, work) in WORKS.into_iter().enumerate() {
            let best = Trace::new(Kind::Serial, work, Some(1)).run(clients, 20);
            let trace = Trace::new(Kind::Serial, work, None).run(clients, 20);
            assert!(
                10 * trace.answered >= 8 * best.answered && trace.conns.len() <= clients,
                "{clients} clients, work {number}: {} of {}, {} connections",
                trace.answered,
                best.answered,
                trace.conns.len()
            );
        }
    }
}

/// From the first query on: 10 clients and 150 ms, 5 s.
#[test]
fn it_is_noticed_soon() {
    let answered = |fixed| Trace::new(Kind::Serial, |_| 150, fixed).run(10, 5).answered;
    let (packed, best, trace) = (answered(Some(32)), answered(Some(1)), answered(None));
    assert_eq!((packed, best), (33, 330));
    assert!(10 * trace >= 8 * best, "{trace} of {best}");
}

/// Whatever the times: they are packed as before, but for one connection on which it is tried and a few of a mistake.
#[test]
fn a_backend_that_works_side_by_side_keeps_its_connection() {
    for clients in [2, 3, 10, 30] {
        for (number, work) in WORKS.into_iter().enumerate() {
            let trace = Trace::new(Kind::SideBySide, work, None).run(clients, 20);
            assert!(trace.conns.len() <= 6, "{clients} clients, work {number}: {} connections", trace.conns.len());
        }
    }
}

/// More connections would bring nothing: it gets no more of them once that is seen, however many clients there are.
#[test]
fn a_backend_without_computing_power_gets_few_connections() {
    for clients in [2, 10, 30, 100] {
        for (number, work) in WORKS.into_iter().enumerate() {
            let trace = Trace::new(Kind::OneProcessor, work, None).run(clients, 20);
            assert!(trace.conns.len() <= 24, "{clients} clients, work {number}: {} connections", trace.conns.len());
        }
    }
}

/// It answers in order, yet works side by side: where a slow name holds up the others, connections bring something.
#[test]
fn answers_in_order_alone_are_no_proof() {
    let trace = Trace::new(Kind::InOrder, |_| 15, None).run(10, 20);
    assert!(trace.conns.len() <= 2, "{} connections", trace.conns.len());
}

/// The backend is another one, behind the same address.
#[test]
fn what_was_found_out_is_found_out_again() {
    let mut trace = Trace::new(Kind::Serial, WORKS[1], None).run(10, 20);
    assert!(trace.concurrency.is_serial);
    trace.kind = Kind::SideBySide;
    trace.go_on(60_000_000);
    assert!(!trace.concurrency.is_serial);
    trace.kind = Kind::Serial;
    let before = trace.answered;
    trace.go_on(80_000_000);
    let best = Trace::new(Kind::Serial, WORKS[1], Some(1)).run(10, 20).answered;
    assert!(10 * (trace.answered - before) >= 8 * best, "{} of {best}", trace.answered - before);
}

/// A cold cache: the first answer took long.
#[test]
fn a_slow_beginning_is_forgotten() {
    let work: Work = |n| if n == 0 { 1000 } else { 15 };
    let best = Trace::new(Kind::Serial, work, Some(1)).run(10, 6).answered;
    let trace = Trace::new(Kind::Serial, work, None).run(10, 6);
    assert!(10 * trace.answered >= 8 * best, "{} of {best}", trace.answered);
}

#[test]
fn answers_in_one_batch_are_no_sign_of_one_at_a_time() {
    let mut concurrency = Concurrency::default();
    concurrency.answered(Came::Alone(Duration::from_millis(20)));
    for _ in 0..100 {
        concurrency.answered(Came::Behind { waited: Duration::from_millis(20), gap: Duration::ZERO });
        assert!(!concurrency.is_serial);
    }
}

#[test]
fn what_an_answer_says_depends_on_those_before_it() {
    let mut answers = Answers::default();
    let mut came = |turn, sent, now| answers.came(turn, Mono(sent), Mono(now));
    let nanos = Duration::from_nanos;
    assert_eq!(came(1, 10, 15), Some(Came::Alone(nanos(5))));
    assert_eq!(came(2, 15, 20), Some(Came::Alone(nanos(5))), "sent when the one before had come");
    assert_eq!(came(3, 17, 29), Some(Came::Behind { waited: nanos(3), gap: nanos(9) }));
    assert_eq!(came(5, 30, 40), None, "the fourth is still to come");
    assert_eq!(came(4, 30, 41), Some(Came::OutOfOrder));
    assert_eq!(came(6, 50, 60), Some(Came::Alone(nanos(10))));
}

#[test]
fn logarithms_grow_with_times() {
    let logs: Vec<i32> = [0, 1, 2, 3, 4, 1000, 1500, u64::MAX].map(|nanos| log(Duration::from_nanos(nanos))).into();
    assert!(logs.is_sorted(), "{logs:?}");
    assert_eq!((logs[0], logs[1], logs[2], logs[4]), (0, 0, OCTAVE, 2 * OCTAVE));
    assert_eq!(log(Duration::from_secs(2)) - log(Duration::from_secs(1)), OCTAVE);
}
