//! A backend that keeps its answers until it is told, and counts what it has to do.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::fake_backend::FakeBackend;
use crate::message;

/// Connections in the life of one, at most.
const CONNECTIONS: usize = 256;

/// A backend that keeps queries whose name begins with `held` until it is told to answer them; answers all others at once.
#[derive(Debug)]
pub struct Holding {
    /// The backend itself.
    pub backend: FakeBackend,
    release: Arc<AtomicBool>,
    /// By connection, those that it has and has not answered: now, and at most.
    held: Arc<[(AtomicUsize, AtomicUsize); CONNECTIONS]>,
}

impl Holding {
    /// Starts it.
    pub fn start() -> Self {
        let (release, held) = (Arc::new(AtomicBool::new(false)), Arc::new(std::array::from_fn(|_| Default::default())));
        let (signal, counts): (_, Arc<[(AtomicUsize, AtomicUsize); CONNECTIONS]>) =
            (Arc::clone(&release), Arc::clone(&held));
        let backend = FakeBackend::start(move |connection| {
            let (now, most) = &counts[connection.number];
            let mut held = HashMap::new();
            let mut order = Vec::new();
            loop {
                match connection.query_within(Duration::from_millis(20)) {
                    Ok(Some(query)) if message::question_name(&query).is_some_and(|name| name.starts_with("held")) => {
                        let id = message::id(&query);
                        order.push(id);
                        assert!(held.insert(id, query).is_none(), "wire ID {id} is in use");
                        now.store(held.len(), Ordering::SeqCst);
                        most.fetch_max(held.len(), Ordering::SeqCst);
                    }
                    Ok(Some(query)) => {
                        assert!(!held.contains_key(&message::id(&query)), "its wire ID is in use");
                        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                    }
                    Ok(None) => return now.store(0, Ordering::SeqCst),
                    Err(_) => {}
                }
                if signal.load(Ordering::SeqCst) {
                    for id in order.drain(..) {
                        connection.send(&message::answer_to(&held[&id], [192, 0, 2, 53]));
                    }
                    held.clear();
                    now.store(0, Ordering::SeqCst);
                }
            }
        });
        Self { backend, release, held }
    }

    /// From now on it answers everything, beginning with what it has.
    pub fn release(&self) {
        self.release.store(true, Ordering::SeqCst);
    }

    /// How many queries it has on a connection, the first one being 0.
    pub fn held(&self, connection: usize) -> usize {
        self.held[connection].0.load(Ordering::SeqCst)
    }

    /// Whether it has no query that it has not answered.
    pub fn is_done(&self) -> bool {
        (0..CONNECTIONS).all(|connection| self.held(connection) == 0)
    }

    /// The most queries that it had on one connection at a time.
    pub fn most(&self) -> usize {
        self.held.iter().map(|(_, most)| most.load(Ordering::SeqCst)).max().unwrap()
    }
}
