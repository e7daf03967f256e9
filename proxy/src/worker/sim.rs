//! A worker without sockets: clients and backends that are plain tables, for tests of [`Core`].

#![expect(clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::answer::Partial;
use super::core::{Core, Shared};
use super::plan::Plan;
use super::suspects::AT_A_TIME;
use super::turn::Turn;
use crate::backend::pool::{ConnKey, Phase};
use crate::client::session::{Addresses, Origin, Pace, Session, SessionKey};
use crate::clock::Mono;
use crate::close::{ClientCloseReason, CloseReason};
use crate::config::{self, Config, Numbers};
use crate::dns::frame::Frames;
use crate::health::Board;
use crate::ledger::caps::{Caps, Permit};
use crate::stats::WorkerStats;

/// A query as the backend got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) id: u16,
    pub(crate) message: Vec<u8>,
}

/// The backend's side of a connection.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    pub(crate) header: Vec<u8>,
    pub(crate) unanswered: VecDeque<Arrived>,
    bytes: Vec<u8>,
    connected: bool,
    /// How often the backend had moved when it was opened.
    moves: u32,
    _permit: Option<Permit>,
}

/// The client's side of a connection.
#[derive(Debug, Default)]
pub(crate) struct Client {
    /// Messages that were not taken yet.
    backlog: Vec<u8>,
    pub(crate) answers: Vec<Vec<u8>>,
    pub(crate) asked: u64,
    /// It does not read.
    pub(crate) deaf: bool,
    /// Part of a message.
    part: Vec<u8>,
}

impl Client {
    /// Octets that were sent and not taken.
    pub(crate) fn backlog(&self) -> usize {
        self.backlog.len()
    }
}

/// The worker and what surrounds it.
pub(crate) struct Sim {
    pub(crate) core: Core,
    pub(crate) now: Mono,
    pub(crate) clients: BTreeMap<SessionKey, Client>,
    pub(crate) wires: BTreeMap<ConnKey, Wire>,
    pub(crate) opened: usize,
    pub(crate) closed: HashMap<CloseReason, usize>,
    pub(crate) most_owned: usize,
    /// Places that others have: other workers, health checks.
    pub(crate) elsewhere: Vec<Permit>,
    /// Queries that wait in other workers.
    waiting_elsewhere: usize,
    header: bool,
    proxy_len: fn(&[u8]) -> Option<usize>,
    max_owned: usize,
    max_per_backend: Vec<usize>,
    /// What may have been in flight on a connection before a reload.
    max_in_flight: usize,
    /// There is no other worker.
    is_alone: bool,
    config: Config,
    numbers: Numbers,
}

impl Sim {
    pub(crate) fn new(configuration: &str) -> Self {
        let config: Config = config::from_str("test", configuration).expect("a good configuration");
        let caps = config.pools.iter().flat_map(|pool| &pool.backends).map(|backend| backend.max_connections);
        let addresses = config.pools.iter().flat_map(|pool| &pool.backends).map(|backend| backend.address);
        let caps = Caps::new(caps, config.connections.max_total).at(addresses).shared_by(config.server.workers);
        let shared = Arc::new(Shared {
            caps: Arc::new(caps),
            waiting: AtomicUsize::new(0),
            health: Arc::new(Board::new(&config)),
            digests: foldhash::fast::RandomState::default(),
            serial: AtomicU64::new(0),
        });
        Self::on(config, shared, 0)
    }

    /// Another worker of the same process.
    pub(crate) fn beside(other: &Self, worker: usize) -> Self {
        Self::on(other.config.clone(), Arc::clone(&other.core.shared), worker)
    }

    fn on(config: Config, shared: Arc<Shared>, worker: usize) -> Self {
        let plan = Rc::new(Plan::new(&config, |_, _| SocketAddr::from(([127, 0, 0, 9], 0))));
        let stats = Arc::new(WorkerStats::new(plan.listeners.len(), plan.pools.len(), plan.backends.len()));
        let now = Mono(1_000_000_000);
        Self {
            max_owned: config.connections.max_owned_per_client,
            max_per_backend: config.pools[0].backends.iter().map(|backend| backend.max_connections).collect(),
            header: config.pools[0].proxy_protocol.is_some(),
            core: Core::new(plan, stats, shared, 7, now).numbered(worker),
            is_alone: config.server.workers == 1,
            now,
            clients: BTreeMap::new(),
            wires: BTreeMap::new(),
            numbers: Numbers::new(&config),
            max_in_flight: 0,
            config,
            opened: 0,
            closed: HashMap::new(),
            most_owned: 0,
            elsewhere: Vec::new(),
            waiting_elsewhere: 0,
            proxy_len: |bytes| {
                let length = bytes.get(14..16)?;
                let len = 16 + usize::from(u16::from_be_bytes([length[0], length[1]]));
                (bytes.len() >= len).then_some(len)
            },
        }
    }

    /// Another configuration is in force. What was allowed before may still be there.
    pub(crate) fn reconfigure(&mut self, configuration: &str) {
        let config = config::from_str("test", configuration).expect("a good configuration");
        self.numbers = self.numbers.with(&config, Mono::ZERO).expect("few names");
        self.max_owned = self.max_owned.max(config.connections.max_owned_per_client);
        let before = self.config.pools.iter().flat_map(|pool| &pool.backends).map(|backend| backend.max_in_flight);
        self.max_in_flight = before.fold(self.max_in_flight, usize::max);
        self.max_per_backend.resize(self.numbers.backends(), 0);
        for backend in config.pools.iter().flat_map(|pool| &pool.backends) {
            let number = self.numbers.backend(&backend.name).expect("a number");
            let limit = &mut self.max_per_backend[usize::from(number)];
            *limit = backend.max_connections.max(*limit);
            self.core.shared.caps.set_backend(number, backend.max_connections);
            self.core.shared.caps.place(number, backend.address);
        }
        self.core.shared.caps.set_total(config.connections.max_total);
        self.core.shared.health.adopt(&self.config, &config, &self.numbers);
        let plan = self.core.plan.next(&config, &self.numbers, |_, _| SocketAddr::from(([127, 0, 0, 9], 0)));
        self.core.reconfigure(Rc::new(plan), self.now);
        self.config = config;
        self.settle();
    }

    pub(crate) fn connect_client(&mut self, address: &str) -> SessionKey {
        let addresses =
            Addresses { client: address.parse().expect("an address"), local: SocketAddr::from(([127, 0, 0, 1], 53)) };
        let serial = self.core.next_serial();
        let key = self.core.session_opened(0, serial, addresses, Origin::default(), Pace::Normal, self.now);
        self.clients.insert(key, Client::default());
        key
    }

    pub(crate) fn ask(&mut self, key: SessionKey, id: u16, name: &str) {
        self.say(key, &query(id, name));
    }

    /// The client sends a message.
    pub(crate) fn say(&mut self, key: SessionKey, message: &[u8]) {
        let client = self.clients.get_mut(&key).expect("a client");
        client.backlog.extend_from_slice(&(message.len() as u16).to_be_bytes());
        client.backlog.extend_from_slice(message);
        client.asked += 1;
        self.run_session(key);
        self.settle();
    }

    /// What a session's task does.
    fn run_session(&mut self, key: SessionKey) {
        self.core.resume(key, self.now);
        let Some(mut client) = self.clients.get_mut(&key) else { return };
        loop {
            let taken = self.core.client_bytes(key, &client.backlog, &mut Turn::default(), self.now);
            client.backlog.drain(..taken);
            let (rest, most) = (client.backlog.len(), if client.deaf { 0 } else { usize::MAX });
            let written = self.write(key, most);
            // Writing may have made room for more.
            let takes = self.core.sessions.get(key.0).is_some_and(Session::takes_messages);
            match self.clients.get_mut(&key).filter(|_| (written > 0 || taken > 0) && rest > 0 && takes) {
                Some(again) => client = again,
                None => break,
            }
        }
        self.core.settle_session(key);
        if let Some(reason) = self.core.sessions[key.0].finished() {
            self.close_client(key, reason);
        }
    }

    /// A slow client reads so many octets.
    pub(crate) fn read(&mut self, key: SessionKey, octets: usize) {
        self.write(key, octets);
        self.core.wake_session(key);
        self.settle();
    }

    fn write(&mut self, key: SessionKey, most: usize) -> usize {
        let Core { sessions, spares, .. } = &mut self.core;
        let (Some(session), Some(client)) = (sessions.get_mut(key.0), self.clients.get_mut(&key)) else { return 0 };
        let out = session.out.pending();
        let written = out.len().min(most);
        client.part.extend_from_slice(&out[..written]);
        session.out.advance(written, spares);
        session.wrote(written > 0, self.now);
        if written > 0 && session.paused {
            self.core.client_took(key, self.now);
        }
        let mut frames = Frames::new(&client.part);
        client.answers.extend(frames.by_ref().map(|frame| frame.expect("whole frames").to_vec()));
        let consumed = frames.consumed();
        client.part.drain(..consumed);
        written
    }

    pub(crate) fn close_client(&mut self, key: SessionKey, reason: ClientCloseReason) {
        if self.clients.remove(&key).is_some() {
            self.core.session_closed(key, reason, self.now);
        }
        self.settle();
    }

    /// Runs all tasks that were woken, until none is.
    pub(crate) fn settle(&mut self) {
        for _ in 0..100_000 {
            self.core.tell_closing();
            if let Some(key) = self.core.wakes.open.pop() {
                let permit = self.core.pool.get_mut(key).and_then(|conn| conn.permit.take());
                assert!(permit.is_some(), "a connection is opened under the caps");
                let backend = permit.as_ref().map_or(0, Permit::backend);
                assert!(self.core.shared.health.is_usable(backend), "none is opened to a backend that is down");
                let moves = self.core.moves[usize::from(backend)];
                self.wires.insert(key, Wire { moves, _permit: permit, ..Wire::default() });
                self.opened += 1;
                // As its task does while it connects.
                self.core.settle_conn(key);
            } else if let Some(key) = self.core.wakes.conns.pop() {
                if let Some(conn) = self.core.pool.get_mut(key) {
                    conn.woken = false;
                }
                self.run_conn(key);
            } else if let Some(key) = self.core.wakes.sessions.pop() {
                self.run_session(key);
            } else {
                self.check();
                return;
            }
        }
        panic!("tasks wake each other for ever");
    }

    /// What a connection's task does, but for reading.
    fn run_conn(&mut self, key: ConnKey) {
        let Some(conn) = self.core.pool.get(key) else { return };
        if let Phase::Closing(reason) = conn.phase {
            self.close_wire(key, reason, Partial::None);
            return;
        }
        let connecting = conn.phase == Phase::Connecting;
        let Some(wire) = self.wires.get_mut(&key) else { return };
        if connecting {
            // Still, or again: a TLS handshake is to come.
            wire.connected = false;
        }
        if !wire.connected {
            return;
        }
        let Core { pool, spares, .. } = &mut self.core;
        let Some(conn) = pool.get_mut(key) else { return };
        wire.bytes.extend_from_slice(conn.out.pending());
        let len = conn.out.len();
        conn.out.advance(len, spares);
        if self.header && wire.header.is_empty() && !wire.bytes.is_empty() {
            let len = (self.proxy_len)(&wire.bytes).expect("the header comes in one piece, and first");
            wire.header = wire.bytes.drain(..len).collect();
        }
        let mut frames = Frames::new(&wire.bytes);
        for message in frames.by_ref() {
            let message = message.expect("whole frames").to_vec();
            wire.unanswered.push_back(Arrived { id: u16::from_be_bytes([message[0], message[1]]), message });
        }
        let consumed = frames.consumed();
        wire.bytes.drain(..consumed);
    }

    fn close_wire(&mut self, key: ConnKey, reason: CloseReason, partial: Partial) {
        // The descriptor first: its place is free before anybody is told.
        drop(self.wires.remove(&key));
        *self.closed.entry(reason).or_default() += 1;
        self.core.conn_closed(key, reason, partial, self.now);
    }

    /// This host has no means for a connection that was to be opened.
    pub(crate) fn starve(&mut self, key: ConnKey) {
        if self.wires.get(&key).is_some_and(|wire| !wire.connected) {
            self.close_wire(key, CloseReason::HostShortage, Partial::None);
            self.settle();
        }
    }

    pub(crate) fn accept(&mut self, key: ConnKey) {
        if let Some(wire) = self.wires.get_mut(&key)
            && !wire.connected
        {
            wire.connected = true;
            self.core.conn_opened(key, self.now);
            self.core.conn_connected(key, self.now);
            self.run_conn(key);
        }
        self.settle();
    }

    pub(crate) fn accept_all(&mut self) {
        loop {
            let Some(key) = self.wires.iter().find(|(_, wire)| !wire.connected).map(|(key, _)| *key) else { return };
            self.accept(key);
        }
    }

    /// The backend answers the `nth` query that it has on a connection.
    pub(crate) fn answer(&mut self, key: ConnKey, nth: usize) {
        self.answer_at_length(key, nth, 0);
    }

    /// The same, with so many octets more.
    pub(crate) fn answer_at_length(&mut self, key: ConnKey, nth: usize, more: usize) {
        let Some(wire) = self.wires.get_mut(&key) else { return };
        let Some(arrived) = wire.unanswered.remove(nth) else { return };
        let mut bytes = answer_to(&arrived.message);
        bytes.resize(bytes.len() + more, 0);
        let length = (bytes.len() - 2) as u16;
        bytes[..2].copy_from_slice(&length.to_be_bytes());
        match self.core.backend_bytes(key, &bytes, self.now) {
            Ok(taken) => assert_eq!(taken, bytes.len()),
            Err(violation) => panic!("a right answer was refused: {violation}"),
        }
        self.settle();
    }

    /// The backend sends these messages; the connection is closed if they are not what it may send.
    pub(crate) fn send(&mut self, key: ConnKey, messages: &[Vec<u8>]) {
        assert!(self.core.transfer_reads(key), "nothing is read from a paused connection");
        let framed = messages.iter().flat_map(|message| {
            (message.len() as u16).to_be_bytes().into_iter().chain(message.iter().copied()).collect::<Vec<u8>>()
        });
        let bytes: Vec<u8> = framed.collect();
        match self.core.backend_bytes(key, &bytes, self.now) {
            Ok(taken) => assert_eq!(taken, bytes.len()),
            Err(_) => self.close_wire(key, CloseReason::ProtocolViolation, Partial::None),
        }
        self.settle();
    }

    pub(crate) fn answer_all(&mut self) {
        for _ in 0..1_000_000 {
            self.accept_all();
            let Some(key) = self.wires.iter().find(|(_, wire)| !wire.unanswered.is_empty()).map(|(key, _)| *key) else {
                return;
            };
            self.answer(key, 0);
        }
        panic!("queries without end");
    }

    /// The backend closes a connection, or refuses it.
    pub(crate) fn hang_up(&mut self, key: ConnKey) {
        let Some(wire) = self.wires.get(&key) else { return };
        let reason = if wire.connected { CloseReason::PeerClosed } else { CloseReason::ConnectFailed };
        let reason = self.core.pool.get(key).map_or(reason, |conn| conn.precisely(reason));
        self.close_wire(key, reason, Partial::None);
        self.settle();
    }

    /// A connection does not come about, for this reason.
    pub(crate) fn refuse(&mut self, key: ConnKey, reason: CloseReason) {
        self.close_wire(key, reason, Partial::None);
        self.settle();
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        let end = self.now.after(time);
        // From deadline to deadline, as the housekeeper does.
        while self.core.next_deadline() <= end {
            self.now = self.now.max(self.core.next_deadline());
            self.core.tick(self.now);
            self.settle();
        }
        self.now = end;
    }

    /// The connections to a backend.
    pub(crate) fn to_backend(&self, backend: usize) -> Vec<ConnKey> {
        let to = |key: &ConnKey| self.core.pool.get(*key).is_some_and(|conn| usize::from(conn.backend) == backend);
        self.wires.keys().copied().filter(to).collect()
    }

    /// So many queries wait in other workers from now on.
    pub(crate) fn waiting_elsewhere(&mut self, count: usize) {
        self.core.shared.waiting.fetch_sub(self.waiting_elsewhere, Ordering::Relaxed);
        self.core.shared.waiting.fetch_add(count, Ordering::Relaxed);
        self.waiting_elsewhere = count;
    }

    /// What must hold at all times.
    fn check(&mut self) {
        for (_, conn) in self.core.pool.iter() {
            let unanswered = conn.pending.in_flight() + conn.pending.quarantined();
            assert!(
                unanswered <= (conn.max_in_flight as usize).max(self.max_in_flight),
                "more than the backend may have to do"
            );
        }
        for suspects in &self.core.suspects {
            assert!(suspects.trials(self.now) <= AT_A_TIME, "more connections for suspects than at a time");
        }
        let waiting = self.core.suspects.iter().filter(|suspects| suspects.waiting() > 0).count();
        assert_eq!(self.core.suspected.len(), waiting, "backends at which suspects wait");
        for (_, session) in &self.core.sessions {
            assert!(session.owned.len() <= self.max_owned, "a client owns more than it may");
            assert!(session.in_flight() <= session.limits.max_in_flight);
            self.most_owned = self.most_owned.max(session.owned.len());
        }
        for (backend, limit) in self.max_per_backend.iter().enumerate() {
            // Those to where it was before a reload do not count.
            let moves = self.core.moves[backend];
            let here = |key: &&ConnKey| self.wires[*key].moves == moves;
            let open = self.to_backend(backend);
            assert!(open.iter().filter(here).count() <= *limit, "more connections than the backend's limit");
        }
        self.check_places();
        let stats = &self.core.stats.listeners[0];
        let failed: u64 = stats.failed.iter().map(crate::stats::Counter::get).sum();
        assert_eq!(
            stats.queries.get(),
            stats.answers.get() + failed + stats.abandoned.get() + self.core.queries.len() as u64,
            "accepted = answered + failed + abandoned + in flight (I8)"
        );
        assert_eq!(stats.in_flight.get(), self.core.queries.len() as u64);
        let waiting = self.core.stats.waiting.get() as usize + self.waiting_elsewhere;
        assert!(!self.is_alone || self.core.shared.waiting.load(Ordering::Relaxed) == waiting);
    }

    /// Each place counts for who holds it until its connection is closed.
    fn check_places(&self) {
        let (pool, caps) = (&self.core.pool, &self.core.shared.caps);
        assert!(!self.is_alone || caps.total().1 == pool.len() + self.elsewhere.len());
        for backend in 0..self.core.plan.backends.len() as u16 {
            let (mut held, mut leaving) = (BTreeMap::new(), 0);
            for (_, conn) in pool.iter().filter(|(_, conn)| conn.backend == backend) {
                leaving += usize::from(conn.is_closing() || conn.retire.is_some());
                if let Some(holder) = conn.holder {
                    *held.entry(holder).or_insert(0_u32) += 1;
                }
            }
            assert_eq!(pool.leaving(Some(backend)), leaving);
            let holders = pool.line(backend).holders();
            assert_eq!((holders.clients(), holders.most()), (held.len(), held.values().max().copied().unwrap_or(0)));
            assert!(held.iter().all(|(client, count)| holders.of(*client) == *count));
        }
    }

    /// Everybody leaves: nothing may be left.
    pub(crate) fn assert_quiescent(&mut self) {
        for key in self.clients.keys().copied().collect::<Vec<_>>() {
            self.close_client(key, ClientCloseReason::ClientClosed);
        }
        self.core.close_all(self.now);
        self.settle();
        // Groups of which nobody is left go when their turn comes.
        self.pass(Duration::from_millis(100));
        assert!(self.core.suspected.is_empty());
        assert!(self.wires.is_empty() && self.core.pool.is_empty() && self.core.sessions.is_empty());
        assert_eq!(self.core.queries.len(), 0);
        assert!(!self.is_alone || self.core.shared.caps.total().1 == 0);
        assert_eq!(self.core.stats.waiting.get(), 0);
        assert!(self.core.pool.lines().all(crate::backend::wait::WaitQueue::is_empty));
    }
}

/// A query for the A record of `name`.
pub(crate) fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message[..2].copy_from_slice(&id.to_be_bytes());
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    message
}

/// A framed answer without records.
pub(crate) fn answer_to(query: &[u8]) -> Vec<u8> {
    let mut answer = (query.len() as u16).to_be_bytes().to_vec();
    answer.extend_from_slice(query);
    answer[4] |= 0x80;
    answer
}
