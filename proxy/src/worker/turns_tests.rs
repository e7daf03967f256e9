//! Places where they are short: no client and no worker takes them from the others for long, whatever it does.

#![expect(clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::collections::BTreeMap;
use std::time::Duration;

use super::sim::Sim;
use super::turns::TIMES_LEFT;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::close::{ClientCloseReason, CloseReason, FailReason};
use crate::control::Control;
use crate::stats::Counter;

const CONNECTION: &str = "identity = \"connection\"\n";
const ADDRESS: &str = "identity = \"address\"\n";
const LABEL: &str = "identity = \"address\"\n[[pool.proxy_protocol.tlv]]\ntype = 0xe0\nvalue = \"{qname_label:1}\"";

fn configuration(workers: usize, places: usize, proxy: &str, connections: &str) -> String {
    format!(
        "[server]\nworkers = {workers}\n\
         [[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\nmax_pending_answers = \"1024MiB\"\n[connections]\n{connections}\n\
         [[pool]]\nname = \"p\"\nretries = 0\n[pool.proxy_protocol]\n{proxy}\n\
         [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\nmax_connections = {places}\nmax_in_flight = 32\n"
    )
}

fn connect(sim: &mut Sim, host: u8, port: u16) -> SessionKey {
    sim.connect_client(&format!("192.0.2.{host}:{port}"))
}

/// A client connection that always has so many queries in flight.
struct Busy {
    session: SessionKey,
    in_flight: u64,
}

impl Busy {
    fn ask(&self, sim: &mut Sim) {
        let client = &sim.clients[&self.session];
        let open = client.asked - client.answers.len() as u64;
        for n in open..self.in_flight {
            let number = sim.clients[&self.session].asked;
            sim.ask(self.session, n as u16, &format!("n{number}.test"));
        }
    }
}

/// The backend answers one query on each connection, and those who are busy ask again. How many it has answered.
fn round(sim: &mut Sim, busy: &[Busy]) -> usize {
    sim.accept_all();
    let asked: Vec<ConnKey> =
        sim.wires.iter().filter(|(_, wire)| !wire.unanswered.is_empty()).map(|(at, _)| *at).collect();
    for key in &asked {
        sim.answer(*key, 0);
    }
    busy.iter().for_each(|busy| busy.ask(sim));
    sim.accept_all();
    sim.pass(Duration::from_micros(100));
    asked.len()
}

fn answers(sim: &Sim, session: SessionKey) -> usize {
    sim.clients[&session].answers.len()
}

fn failed(sim: &Sim, session: SessionKey) -> usize {
    sim.clients[&session].answers.iter().filter(|answer| answer[3] & 15 != 0).count()
}

/// So many answers went to others before this query had its own.
fn wait_of(sim: &mut Sim, session: SessionKey, busy: &[Busy]) -> usize {
    let before = answers(sim, session);
    sim.ask(session, 1, "neighbour.test");
    let mut served = 0;
    while answers(sim, session) == before {
        served += round(sim, busy);
        assert!(served < 10_000, "it is never served");
    }
    served
}

/// Many connections of one address, each with as much in flight as it may, have both places; a neighbour waits no longer
/// than it takes to answer what is in flight, and keeps its place.
#[test]
fn one_address_with_many_connections_leaves_a_neighbour_its_place() {
    let mut sim = Sim::new(&configuration(1, 2, CONNECTION, "max_waiting = 1000"));
    let busy: Vec<Busy> = (0..14).map(|n| Busy { session: connect(&mut sim, 66, 1000 + n), in_flight: 100 }).collect();
    busy.iter().for_each(|busy| busy.ask(&mut sim));
    assert_eq!(sim.core.stats.waiting.get(), 1000);
    let neighbour = connect(&mut sim, 1, 1);
    let wait = wait_of(&mut sim, neighbour, &busy);
    assert!(wait <= 3 * 33, "{wait}: what was in flight on two connections, and on one that had its turn before");
    for _ in 0..100 {
        let wait = wait_of(&mut sim, neighbour, &busy);
        assert!(wait <= 2, "{wait}: it has a place of its own");
    }
    // The other connections of the same address have their turns, too: what is in flight on one is answered, then it is
    // the next one's.
    for _ in 0..2 * 14 * 33 {
        round(&mut sim, &busy);
    }
    let served = busy.iter().filter(|busy| answers(&sim, busy.session) > failed(&sim, busy.session)).count();
    // 1,000 queries wait: those of ten connections.
    assert!(served >= 10 && failed(&sim, neighbour) == 0, "{served}");
    sim.assert_quiescent();
}

/// With one place, clients take turns, and so do connections of one client.
#[test]
fn one_place_goes_round() {
    for hosts in [[1, 2, 3], [7, 7, 7]] {
        let mut sim = Sim::new(&configuration(1, 1, CONNECTION, ""));
        let busy: Vec<Busy> = (0..3)
            .map(|n| Busy { session: connect(&mut sim, hosts[usize::from(n)], 1000 + n), in_flight: 24 })
            .collect();
        busy.iter().for_each(|busy| busy.ask(&mut sim));
        let mut last = BTreeMap::new();
        for turn in 0..2000_usize {
            let before: Vec<usize> = busy.iter().map(|busy| answers(&sim, busy.session)).collect();
            round(&mut sim, &busy);
            for (number, busy) in busy.iter().enumerate() {
                if answers(&sim, busy.session) > before[number] {
                    last.insert(number, turn);
                }
                let waits = turn - last.get(&number).copied().unwrap_or(0);
                // Of two others, each has a turn, and what is in flight at its end.
                assert!(waits <= 2 * (16 + 32) + 4, "connection {number} waits for {waits} answers");
            }
        }
        let opened = sim.opened;
        assert!(
            opened <= 2000 / 16 + 3,
            "{opened} connections for 2000 answers: they take it from each other too soon"
        );
        assert!(busy.iter().all(|busy| failed(&sim, busy.session) == 0));
        sim.assert_quiescent();
    }
}

/// Who is alone may have all places, busy or idle.
#[test]
fn a_lone_client_uses_everything() {
    let mut sim = Sim::new(&configuration(1, 8, LABEL, ""));
    let client = connect(&mut sim, 1, 1000);
    for n in 0..20 {
        sim.ask(client, n, &format!("n{n}.test"));
    }
    sim.accept_all();
    assert_eq!((sim.wires.len(), sim.core.stats.waiting.get()), (8, 12));
    sim.answer_all();
    assert_eq!((answers(&sim, client), failed(&sim, client)), (20, 0));
    sim.assert_quiescent();
}

/// One address asks for more slow names than there are places, each in a connection of its own; a neighbour is the next to
/// get a place, and what is idle of its own is not taken from it.
#[test]
fn slow_names_of_one_address_leave_others_the_next_place() {
    let mut sim = Sim::new(&configuration(1, 16, LABEL, ""));
    let attacker = Busy { session: connect(&mut sim, 66, 1000), in_flight: 100 };
    attacker.ask(&mut sim);
    sim.accept_all();
    let neighbour = connect(&mut sim, 1, 1);
    sim.ask(neighbour, 1, "neighbour.test");
    assert_eq!(answers(&sim, neighbour), 0);
    let first = *sim.wires.keys().next().expect("all places are taken");
    sim.answer(first, 0);
    sim.accept_all();
    let own: Vec<ConnKey> = sim.wires.iter().filter(|(_, wire)| is_for(wire, "neighbour")).map(|(at, _)| *at).collect();
    assert_eq!(own.len(), 1, "one answer was enough");
    sim.answer(own[0], 0);
    assert_eq!(answers(&sim, neighbour), 1);
    // Its connection is idle now, and everything else is busy.
    for _ in 0..10 {
        sim.pass(Duration::from_millis(25));
        attacker.ask(&mut sim);
    }
    assert!(sim.wires.contains_key(&own[0]), "who has all the rest does not take this one");
    sim.answer_all();
    sim.assert_quiescent();
}

/// The backend's places that are for this name.
fn places_for(sim: &Sim, name: &str) -> Vec<ConnKey> {
    sim.wires.iter().filter(|(_, wire)| is_for(wire, name)).map(|(at, _)| *at).collect()
}

/// A client asks for a name of its own and is answered, while nothing else is and nobody new has to wait.
fn is_served_at_once(sim: &mut Sim, client: SessionKey, name: &str) {
    let (before, waiting) = (answers(sim, client), sim.core.stats.waiting.get());
    sim.ask(client, 1, name);
    assert_eq!(sim.core.stats.waiting.get(), waiting, "{name}: it waits, or somebody is served in its place");
    sim.accept_all();
    let own = places_for(sim, name);
    assert_eq!(own.len(), 1, "{name}");
    sim.answer(own[0], 0);
    assert_eq!((answers(sim, client), failed(sim, client)), (before + 1, 0));
}

/// One address asks for more slow names than there are places, none of which is answered: as long as there are others,
/// there is a place for each of their queries at once, for those too who come anew; then it has everything.
#[test]
fn slow_names_of_one_address_leave_places_for_others() {
    let mut sim = Sim::new(&configuration(1, 16, LABEL, "max_wait = \"4s\""));
    let neighbour = connect(&mut sim, 1, 1);
    is_served_at_once(&mut sim, neighbour, "first");
    let attacker = Busy { session: connect(&mut sim, 66, 1000), in_flight: 100 };
    attacker.ask(&mut sim);
    sim.accept_all();
    assert_eq!(
        (sim.wires.len(), sim.core.stats.waiting.get()),
        (12 + 1, 88),
        "with 13, there were fewer than 13 / 4 + 1"
    );
    for turn in 0..20 {
        // Less than what makes it quiet, and more than what keeps a connection that is idle.
        sim.pass(Duration::from_millis(150));
        is_served_at_once(&mut sim, neighbour, &format!("n{turn}x"));
        let other = connect(&mut sim, 2 + turn, 1);
        is_served_at_once(&mut sim, other, &format!("other{turn}x"));
    }
    assert_eq!((answers(&sim, attacker.session), sim.core.stats.waiting.get()), (0, 88));
    // Those are idle that were used last: four, which are left to who may come back.
    assert_eq!(sim.wires.len(), 16);
    sim.answer(places_for(&sim, "\u{2}n0")[0], 0);
    sim.accept_all();
    assert_eq!((sim.wires.len(), sim.core.stats.waiting.get()), (16, 87), "its own place it may use again");
    sim.answer_all();
    assert_eq!(failed(&sim, attacker.session), 0);
    sim.assert_quiescent();
}

/// Who waits because others were there has their places when they have been quiet for a second.
#[test]
fn who_is_left_alone_gets_everything() {
    let unique = "identity = \"address\"\n[[pool.proxy_protocol.tlv]]\ntype = 0xe0\nvalue = \"{uuid}\"";
    for places in [2, 10, 64] {
        let mut sim = Sim::new(&configuration(1, places, unique, "max_wait = \"2s\"\nmax_owned_per_client = 100"));
        let neighbour = connect(&mut sim, 1, 1);
        is_served_at_once(&mut sim, neighbour, "first");
        let attacker = Busy { session: connect(&mut sim, 66, 1000), in_flight: 100 };
        attacker.ask(&mut sim);
        sim.accept_all();
        // Of a one-shot connection nothing is left, and yet a place is.
        let share = sim.wires.len();
        let left = places - share;
        assert!(left >= 1 && share >= TIMES_LEFT * (left - 1) && share < TIMES_LEFT * left + 1, "{places}: {share}");
        sim.pass(Duration::from_millis(990));
        assert_eq!(sim.wires.len(), share);
        sim.pass(Duration::from_millis(30));
        assert_eq!((sim.wires.len(), answers(&sim, attacker.session)), (places, 0), "nothing happened but the time");
        sim.answer_all();
        assert_eq!(failed(&sim, attacker.session), 0);
        sim.assert_quiescent();
    }
}

/// Whatever the number of places and of those who want them all: as long as somebody has none yet, there is one left, and
/// who wants all have the same.
#[test]
fn a_place_is_left_whoever_wants_them_all() {
    for (places, clients) in (2..=40).flat_map(|places| (1..=6).map(move |clients| (places, clients))) {
        let mut sim = Sim::new(&configuration(1, places, LABEL, ""));
        let neighbour = connect(&mut sim, 1, 1);
        is_served_at_once(&mut sim, neighbour, "first");
        let greedy: Vec<SessionKey> = (0..clients).map(|host| connect(&mut sim, 60 + host, 1000)).collect();
        for query in 0..40 {
            for (number, client) in greedy.iter().enumerate() {
                sim.ask(*client, query, &format!("g{number}x{query}.test"));
            }
        }
        sim.accept_all();
        let held: Vec<usize> = (0..greedy.len()).map(|number| places_for(&sim, &format!("g{number}x")).len()).collect();
        let (most, fewest) = (held.iter().max().copied(), held.iter().min().copied());
        let (sum, most, fewest) = (held.iter().sum::<usize>(), most.unwrap_or(0), fewest.unwrap_or(0));
        assert!(most <= fewest + 1, "{places} places: {held:?}");
        let left = places - sum;
        // One more of each had been too much, and the last one was not.
        assert!(most == 40 || fewest >= TIMES_LEFT * left.saturating_sub(1), "{places} places: {held:?}");
        assert!(most <= 1 || most <= TIMES_LEFT * left, "{places} places: {held:?}");
        if left > 0 {
            is_served_at_once(&mut sim, neighbour, "second");
            let late = connect(&mut sim, 2, 1);
            is_served_at_once(&mut sim, late, "late");
        } else {
            assert!(most == 1, "{places} places: {held:?}");
        }
        sim.answer_all();
        assert!(greedy.iter().all(|client| failed(&sim, *client) == 0));
        sim.assert_quiescent();
    }
}

/// Clients of another worker count as others, and find a place at once.
#[test]
fn slow_names_in_one_worker_leave_places_for_the_other() {
    let mut two = Two::new(16, LABEL, "");
    let neighbour = connect(&mut two.sims[1], 1, 1);
    is_served_at_once(&mut two.sims[1], neighbour, "first");
    let attacker = Busy { session: connect(&mut two.sims[0], 66, 1000), in_flight: 100 };
    attacker.ask(&mut two.sims[0]);
    two.sims[0].accept_all();
    two.talk();
    assert_eq!((two.sims[0].wires.len(), two.sims[0].core.stats.waiting.get()), (12, 88));
    for number in 2..5 {
        let neighbour = connect(&mut two.sims[1], number, 1);
        is_served_at_once(&mut two.sims[1], neighbour, "anew");
    }
    two.sims.iter_mut().for_each(|sim| sim.answer_all());
    two.talk();
    two.assert_quiescent();
}

fn is_for(wire: &super::sim::Wire, name: &str) -> bool {
    wire.unanswered.iter().any(|arrived| arrived.message.windows(name.len()).any(|part| part == name.as_bytes()))
}

/// A full queue: who has most of it gives up its newest for one that has less.
#[test]
fn a_full_queue_sheds_from_who_has_most() {
    let mut sim = Sim::new(&configuration(1, 1, ADDRESS, "max_waiting = 10"));
    let attacker = connect(&mut sim, 66, 1000);
    for id in 0..60 {
        sim.ask(attacker, id, "a.test");
    }
    sim.accept_all();
    assert_eq!((answers(&sim, attacker), sim.core.stats.waiting.get()), (60 - 32 - 10, 10), "its own are too many");
    let neighbours: Vec<SessionKey> = (1..=4).map(|host| connect(&mut sim, host, 1)).collect();
    for neighbour in &neighbours {
        sim.ask(*neighbour, 1, "b.test");
        sim.ask(*neighbour, 2, "b.test");
    }
    assert!(neighbours.iter().all(|neighbour| answers(&sim, *neighbour) == 0), "all of them wait");
    assert_eq!((sim.core.stats.waiting.get(), answers(&sim, attacker)), (10, 60 - 32 - 10 + 8));
    let newest = sim.clients[&attacker].answers.last().map(|answer| answer[1]);
    assert_eq!(newest, Some(32 + 2), "the newest first: two are left");
    // All have as many now.
    let last = connect(&mut sim, 9, 1);
    for id in 0..3 {
        sim.ask(last, id, "c.test");
    }
    assert_eq!((answers(&sim, last), sim.core.stats.waiting.get()), (2, 10), "one of its own is in");
    sim.answer_all();
    let refused = neighbours.iter().map(|neighbour| failed(&sim, *neighbour)).sum::<usize>();
    assert!(refused <= 1 && neighbours.iter().all(|neighbour| answers(&sim, *neighbour) == 2));
    sim.assert_quiescent();
}

/// Two workers and what they tell each other.
struct Two {
    sims: [Sim; 2],
}

impl Two {
    fn new(places: usize, proxy: &str, connections: &str) -> Self {
        let first = Sim::new(&configuration(2, places, proxy, connections));
        let second = Sim::beside(&first, 1);
        Self { sims: [first, second] }
    }

    /// Delivers what they have to tell, until they have nothing more to say.
    fn talk(&mut self) {
        for _ in 0..1000 {
            let mut told = Vec::new();
            for (from, sim) in self.sims.iter_mut().enumerate() {
                let wakes = &mut sim.core.wakes;
                let rooms = wakes.ask_for_room.drain(..).map(|(backend, cap, clients)| {
                    (1 - from, Control::MakeRoom { backend, cap, worker: Some((from, clients)) })
                });
                told.extend(rooms);
                told.extend(std::mem::take(&mut wakes.ask_to_shed).then_some((1 - from, Control::Shed)));
                told.extend(std::mem::take(&mut wakes.tell_capacity).then_some((1 - from, Control::CapacityFreed)));
            }
            if told.is_empty() {
                let [first, second] = &self.sims;
                let (limit, used) = first.core.shared.caps.total();
                assert!(used <= limit && used == first.core.pool.len() + second.core.pool.len());
                return;
            }
            for (to, control) in told {
                let sim = &mut self.sims[to];
                let now = sim.now;
                match control {
                    Control::MakeRoom { backend, cap, worker } => sim.core.asked_for_room(backend, cap, worker, now),
                    Control::Shed => sim.core.shed_excess(),
                    _ => sim.core.capacity_freed(now),
                }
                sim.settle();
            }
        }
        panic!("they talk for ever");
    }

    fn round(&mut self, busy: [&[Busy]; 2]) -> usize {
        let mut served = 0;
        for (at, busy) in busy.into_iter().enumerate() {
            served += round(&mut self.sims[at], busy);
            self.talk();
        }
        served
    }

    fn assert_quiescent(mut self) {
        for sim in &mut self.sims {
            sim.assert_quiescent();
        }
        assert_eq!(self.sims[0].core.shared.caps.total().1, 0);
        assert_eq!(self.sims[0].core.shared.waiting.load(std::sync::atomic::Ordering::Relaxed), 0);
    }
}

/// One worker keeps a backend's places busy, and the other one has single queries: each has a place when what was in flight
/// on one connection is answered. The same where the total is short, and where one has clients enough for ten places.
#[test]
fn a_busy_worker_gives_up_places() {
    for (places, connections, clients) in [(1, "", 1), (10, "", 12), (512, "max_total = 10", 12)] {
        let mut two = Two::new(places, CONNECTION, connections);
        let busy: Vec<Busy> = (0..clients)
            .map(|host| Busy { session: connect(&mut two.sims[0], 60 + host, 1000), in_flight: 24 })
            .collect();
        busy.iter().for_each(|busy| busy.ask(&mut two.sims[0]));
        two.round([&busy, &[]]);
        for number in 0..50 {
            let single = connect(&mut two.sims[1], 1, 1000 + number);
            two.sims[1].ask(single, 1, "neighbour.test");
            two.talk();
            let mut rounds = 0;
            while answers(&two.sims[1], single) == 0 {
                two.round([&busy, &[]]);
                rounds += 1;
                // A turn, what is in flight at its end, and the query itself.
                assert!(rounds <= 16 + 32 + 2, "{places} places, query {number}");
            }
            assert_eq!(failed(&two.sims[1], single), 0);
            two.sims[1].close_client(single, ClientCloseReason::ClientClosed);
            two.talk();
        }
        assert!(busy.iter().all(|busy| failed(&two.sims[0], busy.session) == 0));
        two.assert_quiescent();
    }
}

/// Both are busy: each has half, and with one place they take turns.
#[test]
fn workers_have_the_same_share() {
    for places in [1, 4, 5] {
        let mut two = Two::new(places, CONNECTION, "");
        let busy = |sim: &mut Sim| -> Vec<Busy> {
            (0..6).map(|host| Busy { session: connect(sim, 10 + host, 1000), in_flight: 24 }).collect()
        };
        let busy = [busy(&mut two.sims[0]), busy(&mut two.sims[1])];
        for (sim, busy) in two.sims.iter_mut().zip(&busy) {
            busy.iter().for_each(|busy| busy.ask(sim));
        }
        two.talk();
        let mut fewest = usize::MAX;
        for turn in 0..3000 {
            two.round([&busy[0], &busy[1]]);
            if turn >= 200 {
                fewest = fewest.min(two.sims.iter().map(|sim| sim.core.pool.len()).min().unwrap_or(0));
            }
        }
        let served = [0, 1].map(|at| busy[at].iter().map(|busy| answers(&two.sims[at], busy.session)).sum::<usize>());
        assert!(served[0].abs_diff(served[1]) * 4 <= served[0] + served[1], "{places} places: {served:?}");
        assert!(places == 1 || fewest >= places / 2 - 1, "{places} places: {fewest}");
        let failures = |at: usize| busy[at].iter().map(|busy| failed(&two.sims[at], busy.session)).sum::<usize>();
        assert_eq!([failures(0), failures(1)], [0, 0]);
        two.assert_quiescent();
    }
}

/// One worker's queries fill the queue; the other one has its share of it.
#[test]
fn a_queue_that_one_worker_has_filled_leaves_the_other_its_share() {
    let mut two = Two::new(1, ADDRESS, "max_waiting = 10");
    let attacker = connect(&mut two.sims[0], 66, 1000);
    for id in 0..60 {
        two.sims[0].ask(attacker, id, "a.test");
    }
    two.sims[0].accept_all();
    let neighbours: Vec<SessionKey> = (1..=6).map(|host| connect(&mut two.sims[1], host, 1)).collect();
    for neighbour in &neighbours {
        two.sims[1].ask(*neighbour, 1, "b.test");
        // It is told of later.
    }
    assert_eq!(two.sims[0].core.shared.waiting.load(std::sync::atomic::Ordering::Relaxed), 15);
    two.talk();
    let shared = &two.sims[0].core.shared;
    assert!(shared.waiting.load(std::sync::atomic::Ordering::Relaxed) <= 10);
    let refused = neighbours.iter().map(|neighbour| answers(&two.sims[1], *neighbour)).sum::<usize>();
    assert_eq!(refused, 1, "its share is five");
    for _ in 0..100 {
        two.round([&[], &[]]);
    }
    let served =
        neighbours.iter().map(|neighbour| answers(&two.sims[1], *neighbour) - failed(&two.sims[1], *neighbour));
    assert_eq!(served.sum::<usize>(), 5);
    let no_capacity = &two.sims[0].core.stats.listeners[0].failed[FailReason::NoCapacity as usize];
    assert!(Counter::get(no_capacity) >= 60 - 32 - 10 + 5);
    two.assert_quiescent();
}

/// A reload moves a full backend: the new address has all its places at once, and the old connections count in the total.
#[test]
fn a_backend_that_moves_has_all_its_places() {
    let before = configuration(1, 2, CONNECTION, "max_total = 4");
    let mut sim = Sim::new(&before);
    let old: Vec<SessionKey> = (1..=2).map(|host| connect(&mut sim, host, 1)).collect();
    for client in &old {
        sim.ask(*client, 1, "old.test");
    }
    sim.accept_all();
    sim.reconfigure(&before.replace("127.0.0.1:1053", "127.0.0.1:1054"));
    let new: Vec<SessionKey> = (11..=13).map(|host| connect(&mut sim, host, 1)).collect();
    for client in &new {
        sim.ask(*client, 1, "new.test");
    }
    sim.accept_all();
    assert_eq!((sim.wires.len(), sim.core.stats.waiting.get()), (4, 1), "two old ones, two new ones");
    assert_eq!(sim.core.shared.caps.backend(0), Some((2, 2)));
    sim.answer_all();
    assert!(old.iter().chain(&new).all(|client| answers(&sim, *client) == 1 && failed(&sim, *client) == 0));
    assert!(sim.closed.get(&CloseReason::Reconfigured) == Some(&2));
    sim.assert_quiescent();
}
