//! The pool against a naive model: a list of connections, searched from one end to the other for every answer.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::Script;
use crate::backend::pending::Answered;
use crate::backend::pool::{Assigned, Conn, ConnKey, NewConn, Phase, Pool};
use crate::clock::Mono;
use crate::close::CloseReason;
use crate::ledger::caps::Caps;
use crate::ledger::{BackendIndex, ConnKind};
use crate::worker::queries::QueryKey;

const BACKENDS: BackendIndex = 2;

/// More than this many connections make a slow run and no new case.
const MOST: usize = 64;

/// Headers with their digests. Two have the same: the header decides, not the digest.
const HEADERS: [(&[u8], u64); 3] = [(b"one", 1), (b"two", 1), (b"three", 3)];

/// Clients that places count for.
const CLIENTS: u8 = 3;

/// As long as the model needs a difference to tell `max_age` from the rest.
const MAX_AGE: Duration = Duration::from_secs(60);

/// What there is in a pool; a spare connection becomes one of the others.
const KINDS: [ConnKind; 5] = [ConnKind::Shared, ConnKind::Keyed, ConnKind::Owned, ConnKind::OneShot, ConnKind::Spare];

struct Known {
    key: ConnKey,
    backend: BackendIndex,
    kind: ConnKind,
    header: usize,
    phase: Phase,
    retire: Option<CloseReason>,
    /// For suspects: found by nobody.
    apart: bool,
    max_in_flight: usize,
    /// The client that its place counts for.
    holder: Option<IpAddr>,
    /// Since when its place can be had, counted in events.
    turn_since: Option<u64>,
    in_flight: Vec<(u16, QueryKey)>,
    quarantined: Vec<u16>,
    /// When it became idle, counted in events.
    idle_since: Option<u64>,
}

impl Known {
    fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing(_))
    }

    fn has_room(&self) -> bool {
        let unanswered = self.in_flight.len() + self.quarantined.len();
        !self.is_closing() && self.retire.is_none() && unanswered < self.max_in_flight
    }

    /// Its place is not on its way to be free.
    fn stays(&self) -> bool {
        !self.is_closing() && self.retire.is_none()
    }

    fn is_common(&self) -> bool {
        matches!(self.kind, ConnKind::Shared | ConnKind::Keyed)
    }

    /// Nobody's yet.
    fn is_spare(&self) -> bool {
        self.kind == ConnKind::Spare && !self.is_closing()
    }
}

#[derive(Default)]
struct Model {
    /// In the order in which they were opened.
    known: Vec<Known>,
    events: u64,
    queries: u32,
    closing: Vec<ConnKey>,
    /// When each client has used a place of a backend last, counted in events.
    used: BTreeMap<(BackendIndex, IpAddr), u64>,
}

impl Model {
    fn at(&self, backend: BackendIndex) -> impl Iterator<Item = &Known> {
        self.known.iter().filter(move |conn| conn.backend == backend)
    }

    /// What follows for a connection from the event that it had.
    fn settle(&mut self, at: usize) {
        let conn = &mut self.known[at];
        if let Some(reason) = conn.retire
            && conn.in_flight.is_empty()
            && !conn.is_closing()
        {
            conn.phase = Phase::Closing(reason);
            self.closing.push(conn.key);
        }
        let idle = conn.phase == Phase::Open && conn.in_flight.is_empty();
        if idle != conn.idle_since.is_some()
            && !conn.is_closing()
            && let Some(holder) = conn.holder
        {
            self.used.insert((conn.backend, holder), self.events);
        }
        conn.idle_since = idle.then(|| conn.idle_since.unwrap_or(self.events));
        let takes_turns = conn.stays()
            && !conn.apart
            && conn.phase == Phase::Open
            && matches!(conn.kind, ConnKind::Shared | ConnKind::Keyed | ConnKind::Owned);
        conn.turn_since = takes_turns.then(|| conn.turn_since.unwrap_or(self.events));
    }

    fn check(&self, pool: &Pool) {
        assert_eq!((pool.len(), pool.is_empty()), (self.known.len(), self.known.is_empty()));
        for known in &self.known {
            check_conn(known, pool.get(known.key).expect("the pool has it"));
        }
        for backend in 0..BACKENDS {
            self.check_backend(pool, backend);
        }
        let spare = (0..BACKENDS).find_map(|backend| self.at(backend).find(|conn| conn.is_spare()));
        let first = self.known.iter().filter(|conn| conn.idle_since.is_some()).min_by_key(|conn| conn.idle_since);
        assert_eq!(pool.longest_idle_of_all(), spare.or(first).map(|conn| conn.key));
        assert_eq!(pool.all_closing(), self.known.iter().filter(|conn| conn.is_closing()).count());
    }

    fn check_backend(&self, pool: &Pool, backend: BackendIndex) {
        let idle = || self.at(backend).filter(|conn| conn.idle_since.is_some());
        assert_eq!(pool.outstanding(backend), self.at(backend).map(|conn| conn.in_flight.len()).sum::<usize>());
        assert_eq!(pool.closing(backend), self.at(backend).filter(|conn| conn.is_closing()).count());
        assert_eq!(pool.idle_common(backend), idle().filter(|conn| conn.is_common()).count());
        let spares = || self.at(backend).filter(|conn| conn.is_spare());
        let missed_least = spares().next().or_else(|| idle().min_by_key(|conn| conn.idle_since));
        assert_eq!(pool.longest_idle(backend), missed_least.map(|conn| conn.key));
        assert_eq!(pool.spares(backend), spares().count());
        let ready = || spares().filter(|conn| conn.has_room());
        let open = ready().find(|conn| conn.phase == Phase::Open);
        assert_eq!(pool.ready_spare(backend), open.or_else(|| ready().next()).map(|conn| conn.key));
        self.check_places(pool, backend);
        let with_room = |kind| self.at(backend).filter(move |conn| conn.kind == kind && conn.has_room() && !conn.apart);
        let found = pool.shared(backend);
        let mut fitting = with_room(ConnKind::Shared);
        assert!(
            found.map_or_else(|| fitting.next().is_none(), |key| with_room(ConnKind::Shared).any(|c| c.key == key))
        );
        let fewest = |kind, header: Option<usize>| {
            let fits = with_room(kind).filter(|conn| header.is_none_or(|header| conn.header == header));
            fits.map(|conn| conn.in_flight.len() + conn.quarantined.len()).min()
        };
        let unanswered = |key| pool.get(key).map(Conn::unanswered);
        assert_eq!(pool.least_shared(backend).and_then(unanswered), fewest(ConnKind::Shared, None));
        for (number, (header, digest)) in HEADERS.into_iter().enumerate() {
            let fits = |conn: &&Known| conn.header == number;
            let least = pool.least_keyed(backend, digest, header);
            assert_eq!(least.and_then(unanswered), fewest(ConnKind::Keyed, Some(number)));
            let found = pool.keyed(backend, digest, header);
            let mut fitting = with_room(ConnKind::Keyed).filter(fits);
            match found {
                None => assert!(fitting.next().is_none(), "a connection has room and is not found"),
                Some(key) => assert!(fitting.any(|conn| conn.key == key), "one without room, or of another header"),
            }
        }
    }
}

impl Model {
    /// Who holds how many places, and whose can be had.
    fn check_places(&self, pool: &Pool, backend: BackendIndex) {
        let staying = || self.at(backend).filter(|conn| conn.stays());
        assert_eq!(pool.leaving(Some(backend)), self.at(backend).count() - staying().count());
        let held = |client| self.at(backend).filter(|conn| conn.holder == Some(client)).count();
        let clients: Vec<IpAddr> = (0..CLIENTS).map(client).collect();
        let holders = pool.line(backend).holders();
        for client in &clients {
            assert_eq!(holders.of(*client) as usize, held(*client));
        }
        let most = clients.iter().map(|client| held(*client)).max().unwrap_or(0);
        assert_eq!(holders.most() as usize, most);
        assert_eq!(holders.clients(), clients.iter().filter(|client| held(**client) > 0).count());
        let occupied = |conn: &&Known| conn.idle_since.is_none() && !conn.is_closing();
        assert_eq!(pool.occupied(Some(backend)), self.at(backend).filter(occupied).count());
        assert_eq!(pool.occupied(None), self.known.iter().filter(occupied).count());
        let turns = || self.at(backend).filter(|conn| conn.turn_since.is_some());
        for client in clients {
            let others = self.used.iter().filter(|((at, of), _)| *at == backend && *of != client);
            let used = others.map(|(_, at)| Mono(1_000_000_000_000 + at)).max();
            assert_eq!(pool.line(backend).used_by_another(client), used);
            let first = turns().filter(|conn| conn.holder == Some(client)).min_by_key(|conn| conn.turn_since);
            let found = pool.in_turn(backend, |conn| conn.holder == Some(client));
            assert_eq!(found, first.map(|conn| conn.key).ok_or(turns().count()));
            let held = held(client);
            let mut way: Vec<&Known> = self.at(backend).filter(|conn| conn.idle_since.is_some()).collect();
            way.sort_by_key(|conn| conn.idle_since);
            let all = self.at(backend).count();
            let (others, share) = (all - held, holders.clients());
            let own = way.iter().find(|conn| conn.holder == Some(client));
            assert_eq!(pool.own_idle(backend, client), own.map(|conn| conn.key));
            let expected = match own.filter(|_| held * share > all) {
                Some(own) => Some(own.key),
                None if others > 0 && held >= 3 * others => None,
                None => {
                    let spare = self.at(backend).find(|conn| conn.is_spare());
                    let counts = |conn: &Known| {
                        conn.holder.map_or(0, |of| self.at(backend).filter(|conn| conn.holder == Some(of)).count())
                    };
                    let fullest = way.iter().take(16).min_by_key(|conn| usize::MAX - counts(conn));
                    // What is idle here has been so for some nanoseconds.
                    let rests =
                        |conn: &&&Known| conn.holder.is_none() || conn.holder == Some(client) || counts(conn) > held;
                    spare.or(fullest.filter(rests).or(own).copied()).map(|conn| conn.key)
                }
            };
            assert_eq!(pool.makes_way(backend, client, Mono(1_000_000_000_000 + self.events)), expected);
        }
    }
}

fn client(number: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, number])
}

/// The client that a place of this kind counts for.
fn holder(script: &mut Script<'_>, kind: ConnKind) -> Option<IpAddr> {
    let counts = !matches!(kind, ConnKind::Shared | ConnKind::Spare);
    counts.then(|| client(script.octet().unwrap_or(0) % CLIENTS))
}

fn check_conn(known: &Known, conn: &Conn) {
    assert_eq!(
        (conn.backend, conn.kind, conn.phase, conn.retire),
        (known.backend, known.kind, known.phase, known.retire)
    );
    assert_eq!(conn.pending.in_flight(), known.in_flight.len());
    assert_eq!(conn.pending.quarantined(), known.quarantined.len());
    assert_eq!((conn.has_room(), conn.is_idle()), (known.has_room(), known.idle_since.is_some()));
    assert_eq!(conn.is_closing(), known.is_closing());
}

/// Any sequence of what happens to connections: the pool finds, counts and gives up what the model does (I5).
pub fn pool(bytes: &[u8]) {
    let (mut script, mut pool, mut model) = (Script::new(bytes), Pool::new(usize::from(BACKENDS)), Model::default());
    let caps = Arc::new(Caps::new(vec![MOST; usize::from(BACKENDS)], MOST));
    while let Some(event) = script.octet() {
        model.events += 1;
        let now = Mono(1_000_000_000_000 + model.events);
        let at = match event % 13 {
            0 => open(&mut script, &mut pool, &mut model, &caps, now),
            1 => one(&mut script, &model).inspect(|at| connected(&mut pool, &mut model.known[*at], now)),
            2..=4 => one(&mut script, &model).inspect(|at| assign(&mut pool, &mut model, *at, now)),
            5 => one(&mut script, &model).inspect(|at| answer(&mut script, &mut pool, &mut model.known[*at], now)),
            6 => one(&mut script, &model).inspect(|at| abandon(&mut script, &mut pool, &mut model.known[*at], now)),
            7 => one(&mut script, &model).inspect(|at| {
                let conn = &mut model.known[*at];
                conn.retire.get_or_insert(CloseReason::MaxAge);
                pool.retire(conn.key, CloseReason::MaxAge, now);
            }),
            8 => one(&mut script, &model).inspect(|at| {
                let conn = &mut model.known[*at];
                if !conn.is_closing() {
                    conn.phase = Phase::Closing(CloseReason::PeerClosed);
                    model.closing.push(conn.key);
                }
                pool.close(conn.key, CloseReason::PeerClosed, now);
            }),
            11 => one(&mut script, &model).inspect(|at| {
                model.known[*at].apart = false;
                pool.release(model.known[*at].key, now);
            }),
            9 => give_spare(&mut script, &mut pool, &mut model, now),
            10 => one(&mut script, &model).inspect(|at| {
                let conn = &mut model.known[*at];
                conn.max_in_flight = 1 + usize::from(script.octet().unwrap_or(0) & 7);
                pool.allow(conn.key, conn.max_in_flight, now);
            }),
            _ => {
                if let Some(at) = one(&mut script, &model) {
                    remove(&mut pool, &mut model, at);
                }
                None
            }
        };
        if let Some(at) = at {
            model.settle(at);
        }
        model.check(&pool);
    }
    // Those that must close are told so, each once.
    let mut told: Vec<ConnKey> = std::iter::from_fn(|| pool.next_closing()).collect();
    told.sort_unstable();
    model.closing.sort_unstable();
    assert_eq!(told, model.closing);
    while !model.known.is_empty() {
        remove(&mut pool, &mut model, 0);
        model.check(&pool);
    }
    assert_eq!(caps.total().1, 0, "every place was given back");
}

fn one(script: &mut Script<'_>, model: &Model) -> Option<usize> {
    usize::from(script.octet()?).checked_rem(model.known.len())
}

fn open(script: &mut Script<'_>, pool: &mut Pool, model: &mut Model, caps: &Arc<Caps>, now: Mono) -> Option<usize> {
    let shape = script.octet()?;
    let backend = BackendIndex::from(shape & 1);
    let (_, kind) = script.pick(&KINDS)?;
    let header = usize::from(shape >> 1) % HEADERS.len();
    let max_in_flight = 1 + usize::from(shape >> 4);
    // Spare connections are nobody's, so they are not for suspects.
    let apart = kind != ConnKind::Spare && script.octet().unwrap_or(0) & 3 == 0;
    let permit = caps.acquire(backend).ok()?;
    let holder = holder(script, kind);
    let (bytes, header_digest) = HEADERS[header];
    let key = pool.open(
        NewConn {
            backend,
            kind,
            owner: None,
            owner_serial: 0,
            holder,
            header_digest,
            header: Rc::from(bytes),
            apart,
            permit,
            max_in_flight,
            seed: u32::from(shape),
            max_age: MAX_AGE,
        },
        now,
    );
    let conn = pool.get(key).expect("just opened");
    assert!((now.after(MAX_AGE * 9 / 10)..=now.after(MAX_AGE)).contains(&conn.expires), "spread by 10 %");
    model.used.extend(holder.map(|holder| ((backend, holder), model.events)));
    model.known.push(Known {
        key,
        backend,
        kind,
        header,
        phase: Phase::Connecting,
        retire: None,
        apart,
        max_in_flight,
        holder,
        turn_since: None,
        in_flight: Vec::new(),
        quarantined: Vec::new(),
        idle_since: None,
    });
    Some(model.known.len() - 1)
}

fn give_spare(script: &mut Script<'_>, pool: &mut Pool, model: &mut Model, now: Mono) -> Option<usize> {
    let shape = script.octet()?;
    let key = pool.ready_spare(BackendIndex::from(shape & 1))?;
    let (_, kind) = script.pick(&KINDS[..4])?;
    let holder = holder(script, kind);
    let header = usize::from(shape >> 1) % HEADERS.len();
    let (bytes, header_digest) = HEADERS[header];
    let max_in_flight = 1 + usize::from(shape >> 4);
    let bytes = Rc::from(bytes);
    let to = Assigned {
        kind,
        owner: None,
        owner_serial: 0,
        holder,
        header_digest,
        header: bytes,
        apart: false,
        max_in_flight,
    };
    pool.give_spare(key, to, now);
    let at = model.known.iter().position(|conn| conn.key == key).expect("the model has it");
    let conn = &mut model.known[at];
    (conn.kind, conn.header, conn.max_in_flight, conn.holder) = (kind, header, max_in_flight, holder);
    model.used.extend(holder.map(|holder| ((conn.backend, holder), model.events)));
    if script.octet().unwrap_or(0) & 1 == 1 {
        // A handshake comes first.
        pool.reconnects(key, now);
        if conn.phase == Phase::Open {
            conn.phase = Phase::Connecting;
        }
    }
    Some(at)
}

fn connected(pool: &mut Pool, conn: &mut Known, now: Mono) {
    pool.connected(conn.key, now);
    if conn.phase == Phase::Connecting {
        conn.phase = Phase::Open;
    }
}

fn assign(pool: &mut Pool, model: &mut Model, at: usize, now: Mono) {
    model.queries += 1;
    let (query, conn) = (QueryKey { index: model.queries, generation: 0 }, &mut model.known[at]);
    let id = pool.assign(conn.key, query, now);
    assert_eq!(id.is_some(), conn.has_room());
    conn.in_flight.extend(id.map(|id| (id, query)));
}

fn answer(script: &mut Script<'_>, pool: &mut Pool, conn: &mut Known, now: Mono) {
    let late = conn.quarantined.clone();
    if let Some((at, (id, query))) = script.pick(&conn.in_flight) {
        conn.in_flight.swap_remove(at);
        assert_eq!(pool.answered(conn.key, id, now), Answered::Query(query));
    } else if let Some((at, id)) = script.pick(&late) {
        conn.quarantined.swap_remove(at);
        assert_eq!(pool.answered(conn.key, id, now), Answered::Late);
    }
}

fn abandon(script: &mut Script<'_>, pool: &mut Pool, conn: &mut Known, now: Mono) {
    if let Some((at, (id, _))) = script.pick(&conn.in_flight) {
        conn.in_flight.swap_remove(at);
        conn.quarantined.push(id);
        pool.abandon(conn.key, id, now);
    }
}

fn remove(pool: &mut Pool, model: &mut Model, at: usize) {
    let known = model.known.remove(at);
    let mut conn = pool.remove(known.key).expect("the pool has it");
    let mut left: Vec<(u16, QueryKey)> = conn.pending.drain().collect();
    left.sort_unstable_by_key(|(id, _)| *id);
    let mut expected = known.in_flight;
    expected.sort_unstable_by_key(|(id, _)| *id);
    assert_eq!(left, expected, "what was in flight is handed over");
    assert!(pool.get(known.key).is_none() && pool.remove(known.key).is_none());
}
