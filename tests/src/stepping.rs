//! A backend whose work goes on in steps: how much gets done in one is counted, not timed.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::fake_backend::FakeBackend;
use crate::message;

/// How it works on the queries of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Works {
    /// On one after the other: a step answers the first.
    OneByOne,
    /// On all of them: a step answers them all.
    SideBySide,
}

/// How long a step lasts at least.
const STEP: Duration = Duration::from_millis(20);

/// How often a connection looks whether there was a step.
const LOOK: Duration = Duration::from_millis(1);

/// A backend that answers in steps. A step begins when as many queries are there as [expected](Self::expect), and ends when
/// every connection has answered what it was to answer.
#[derive(Debug)]
pub struct Stepping {
    /// The backend itself.
    pub backend: FakeBackend,
    shared: Arc<Shared>,
    clock: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    expected: AtomicUsize,
    steps: AtomicUsize,
    /// By connection: the last step that it has seen, and the queries that it has.
    connections: Mutex<HashMap<usize, (usize, usize)>>,
    /// Answers, by step.
    answers: Mutex<Vec<usize>>,
}

impl Stepping {
    /// Starts it, with or without a PROXY header in front of its connections.
    pub fn start(works: Works, proxy_header: bool) -> Self {
        let shared = Arc::new(Shared { expected: usize::MAX.into(), ..Shared::default() });
        let script = Arc::clone(&shared);
        let backend = FakeBackend::start(move |connection| {
            if proxy_header && connection.header().is_none() {
                return;
            }
            let number = connection.number;
            let note = |seen, queries| script.connections.lock().unwrap().insert(number, (seen, queries));
            let (mut seen, mut queries) = (script.steps.load(Ordering::SeqCst), VecDeque::new());
            loop {
                match connection.query_within(LOOK) {
                    Ok(Some(query)) => queries.push_back(query),
                    Ok(None) => break,
                    Err(_) => {}
                }
                let steps = script.steps.load(Ordering::SeqCst);
                if steps != seen {
                    seen = steps;
                    let count = if works == Works::OneByOne { queries.len().min(1) } else { queries.len() };
                    let answers: Vec<_> = queries.drain(..count).collect();
                    script.answers.lock().unwrap()[steps - 1] += count;
                    note(seen, queries.len());
                    answers.iter().for_each(|query| connection.send(&message::answer_to(query, [192, 0, 2, 53])));
                } else {
                    note(seen, queries.len());
                }
            }
            script.connections.lock().unwrap().remove(&number);
        });
        let clock = Arc::clone(&shared);
        Self { backend, shared, clock: Some(std::thread::spawn(move || clock.run())) }
    }

    /// From now on a step begins when so many queries are there. Before this there is none.
    pub fn expect(&self, queries: usize) {
        self.shared.expected.store(queries, Ordering::SeqCst);
    }

    /// How many steps there were.
    pub fn steps(&self) -> usize {
        self.shared.steps.load(Ordering::SeqCst)
    }

    /// How many queries were answered in these steps.
    ///
    /// # Panics
    /// If there were not so many.
    pub fn answers(&self, steps: Range<usize>) -> usize {
        self.shared.answers.lock().unwrap()[steps].iter().sum()
    }
}

impl Shared {
    fn run(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            std::thread::sleep(STEP);
            let steps = self.steps.load(Ordering::SeqCst);
            let connections = self.connections.lock().unwrap();
            let queries: usize = connections.values().map(|(_, queries)| queries).sum();
            let is_over = connections.values().all(|(seen, queries)| *seen == steps || *queries == 0);
            drop(connections);
            if is_over && queries >= self.expected.load(Ordering::SeqCst) {
                self.answers.lock().unwrap().push(0);
                self.steps.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

impl Drop for Stepping {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(clock) = self.clock.take() {
            let _ = clock.join();
        }
    }
}
