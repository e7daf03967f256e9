#![expect(clippy::unwrap_used, reason = "tests panic")]

use proptest::prelude::*;

use super::*;

fn key(index: u32) -> QueryKey {
    QueryKey { index, generation: 0 }
}

fn address(client: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, client])
}

/// Of a client with one connection.
fn waiter(client: u8, query: u32, until: u64) -> Waiter {
    waiter_on(client, usize::from(client), query, until)
}

fn waiter_on(client: u8, session: usize, query: u32, until: u64) -> Waiter {
    Waiter { client: address(client), session: SessionKey(session), query: key(query), until: Mono(until) }
}

fn queue(waiters: impl IntoIterator<Item = Waiter>) -> WaitQueue {
    let mut queue = WaitQueue::default();
    waiters.into_iter().for_each(|waiter| queue.push(waiter, Mono(1)));
    queue
}

/// All that wait, in the order in which they are served.
fn order(queue: &mut WaitQueue) -> Vec<u32> {
    std::iter::from_fn(|| queue.pop()).map(|(waiter, _)| waiter.query.index).collect()
}

#[test]
fn a_client_with_many_does_not_starve_one_with_few() {
    let mut queue = queue((0..5).map(|n| waiter(1, n, 10)).chain([waiter(2, 100, 10)]));
    assert_eq!(order(&mut queue), [0, 100, 1, 2, 3, 4]);
    assert!(queue.is_empty());
}

/// Many connections give a client no more turns, and each of them has its own.
#[test]
fn turns_go_by_client_and_then_by_connection() {
    let many = (0..3).flat_map(|session| (0..2).map(move |n| waiter_on(1, session, 10 * session as u32 + n, 10)));
    let mut queue = queue(many.chain((0..3).map(|n| waiter(9, 100 + n, 10))));
    assert_eq!(order(&mut queue), [0, 100, 10, 101, 20, 102, 1, 11, 21]);
}

#[test]
fn who_holds_least_is_next() {
    let mut queue = queue([waiter(1, 1, 10), waiter(1, 11, 10), waiter(2, 2, 10), waiter(3, 3, 10)]);
    for client in [1, 1, 2, 9] {
        queue.took(address(client), Mono(1));
    }
    assert_eq!((queue.holders().of(address(1)), queue.holders().most(), queue.clients()), (2, 2, 3));
    let first = queue.pop().unwrap();
    assert_eq!(first.0.query, key(3));
    queue.put_back(first, Mono(1));
    queue.took(address(3), Mono(1));
    queue.took(address(3), Mono(1));
    queue.gave(address(1));
    queue.gave(address(1));
    assert_eq!(queue.holders().most(), 2);
    assert_eq!(order(&mut queue), [1, 11, 2, 3]);
    queue.gave(address(2));
    queue.gave(address(3));
    queue.gave(address(3));
    queue.gave(address(9));
    assert_eq!(queue.holders().most(), 0);
}

#[test]
fn what_could_not_be_served_keeps_its_turn() {
    let mut queue = queue([waiter(1, 0, 10), waiter(1, 1, 10), waiter(2, 2, 10)]);
    let first = queue.pop().unwrap();
    queue.put_back(first, Mono(2));
    assert_eq!(order(&mut queue), [0, 2, 1]);
}

#[test]
fn a_client_is_served_out_of_turn_by_what_is_its_own() {
    let mut queue = queue([waiter(1, 0, 10), waiter(2, 1, 10), waiter(2, 2, 10)]);
    queue.push(waiter_on(2, 7, 3, 10), Mono(1));
    assert_eq!(queue.pop_of(address(2), None).map(|(waiter, _)| waiter.query), Some(key(1)));
    assert_eq!(queue.pop_of(address(2), Some(SessionKey(2))).map(|(waiter, _)| waiter.query), Some(key(2)));
    assert_eq!(queue.pop_of(address(2), Some(SessionKey(2))), None);
    assert_eq!(queue.pop_of(address(3), None), None);
    assert_eq!(order(&mut queue), [0, 3]);
}

#[test]
fn who_leaves_is_not_served() {
    let mut queue = queue([waiter(1, 0, 10), waiter(2, 1, 20)]);
    queue.remove(SessionKey(1), key(0));
    assert_eq!(queue.pop().map(|(waiter, _)| waiter), Some(waiter(2, 1, 20)));
    assert_eq!(queue.pop(), None);
}

/// What is shed is the newest of the connection with most, of the client with most.
#[test]
fn the_fullest_client_sheds_its_newest() {
    let many = [waiter_on(1, 0, 0, 10), waiter_on(1, 1, 1, 10), waiter_on(1, 1, 2, 10), waiter_on(1, 0, 3, 10)];
    let mut queue = queue(many.into_iter().chain([waiter_on(1, 1, 4, 10), waiter(2, 5, 10), waiter(2, 6, 10)]));
    assert_eq!((queue.waiting().most(), queue.waiting().of(address(2)), queue.waiting().of(address(3))), (5, 2, 0));
    assert_eq!(queue.last(), Some(key(4)));
    queue.remove(SessionKey(1), key(4));
    assert_eq!((queue.waiting().most(), queue.last().is_some()), (4, true));
    assert_eq!(order(&mut queue).len(), 6);
    assert_eq!((queue.waiting().most(), queue.last()), (0, None));
}

/// One that waits only a little longer, as it has waited elsewhere before, does not have those before it wait.
#[test]
fn waiting_ends_when_it_has_been_long_enough_for_each() {
    let mut queue = queue([waiter(1, 0, 10), waiter(2, 1, 30), waiter(3, 2, 20)]);
    assert_eq!(queue.expired(Mono(9)), None);
    let order: Vec<u32> = std::iter::from_fn(|| queue.expired(Mono(25))).map(|query| query.index).collect();
    assert_eq!(order, [0, 2]);
    assert_eq!(queue.next_deadline(), Some(Mono(30)));
}

#[test]
fn whose_turn_it_is_tries_again_and_others_are_asked_no_more_often() {
    let mut queue = queue([waiter(1, 0, u64::MAX)]);
    let due = Mono(1).after(AGAIN);
    assert_eq!((queue.next_deadline(), queue.is_due(Mono(1)), queue.is_due(due)), (Some(due), false, true));
    assert!(queue.asks(Mono(1)) && !queue.asks(Mono(2)) && queue.asks(due));
    queue.was_heard();
    assert!(queue.asks(due));
    let first = queue.pop().unwrap();
    assert_eq!((queue.next_deadline(), queue.is_due(Mono::MAX)), (None, false));
    queue.put_back(first, due);
    assert_eq!(queue.next_deadline(), Some(due.after(AGAIN)));
}

#[test]
fn what_others_want_is_forgotten_unless_they_ask_again() {
    let mut queue = WaitQueue::default();
    queue.ask(3, 2, false, Mono(1));
    let asked = queue.asked(Mono(2)).unwrap();
    assert_eq!((asked.worker, asked.clients, asked.of_all), (3, 2, false));
    assert_eq!(queue.asked(Mono(1).after(2 * AGAIN)), None);
    queue.searched(1000, Mono(5));
    assert!(!queue.searches(Mono(5).after(SEARCH)) && queue.searches(Mono(5).after(2 * SEARCH)));
}

/// Another mask, by a reload, makes another client of a connection: what waits of it stays together.
#[test]
fn a_connection_that_waits_stays_with_its_client() {
    let mut queue = queue([waiter_on(1, 5, 0, 10), waiter_on(2, 5, 1, 10)]);
    assert_eq!((queue.clients(), queue.pop_of(address(2), Some(SessionKey(5)))), (1, None));
    let first = queue.pop().unwrap();
    queue.put_back(first, Mono(1));
    assert_eq!(order(&mut queue), [0, 1]);
    queue.push(waiter_on(2, 5, 2, 10), Mono(1));
    queue.remove(SessionKey(5), key(2));
    assert!(queue.is_empty() && queue.waiting().most() == 0);
}

/// A client as it waits and holds, in the naive model.
#[derive(Clone, Default)]
struct Known {
    held: u32,
    /// In the order of their turns, each connection with its queries.
    sessions: Vec<(usize, Vec<u32>)>,
    turn: u64,
}

proptest! {
    /// Against clients in a plain list that is searched for who holds least and came first.
    #[test]
    fn agrees_with_the_model(events in prop::collection::vec((0..5_u8, 0..4_u8, 0..3_usize), 0..300)) {
        let (mut queue, mut known, mut turn) = (WaitQueue::default(), vec![Known::default(); 4], 0);
        for (number, (event, client, session)) in events.into_iter().enumerate() {
            let (at, session) = (usize::from(client), 4 * session + usize::from(client));
            match event {
                0 | 1 => {
                    queue.push(waiter_on(client, session, number as u32, u64::MAX), Mono(1));
                    let of_client = &mut known[at];
                    if of_client.sessions.is_empty() {
                        turn += 1;
                        of_client.turn = turn;
                    }
                    match of_client.sessions.iter_mut().find(|(of, _)| *of == session) {
                        Some((_, line)) => line.push(number as u32),
                        None => of_client.sessions.push((session, vec![number as u32])),
                    }
                }
                2 => {
                    queue.took(address(client), Mono(1));
                    known[at].held += 1;
                }
                3 => {
                    queue.gave(address(client));
                    known[at].held = known[at].held.saturating_sub(1);
                }
                _ => {
                    let waits = known.iter_mut().filter(|of_client| !of_client.sessions.is_empty());
                    let expected = waits.min_by_key(|of_client| (of_client.held, of_client.turn)).map(|of_client| {
                        let (session, mut line) = of_client.sessions.remove(0);
                        let query = line.remove(0);
                        if !line.is_empty() {
                            of_client.sessions.push((session, line));
                        }
                        turn += 1;
                        of_client.turn = turn;
                        query
                    });
                    prop_assert_eq!(queue.pop().map(|(waiter, _)| waiter.query.index), expected);
                }
            }
            for (client, of_client) in (0..).zip(&known) {
                let mut waits = known.iter().filter(|of_client| !of_client.sessions.is_empty());
                let is_next = waits.all(|other| of_client.held < other.held);
                prop_assert_eq!(queue.is_next(address(client)), is_next);
            }
            prop_assert_eq!(queue.is_empty(), known.iter().all(|of_client| of_client.sessions.is_empty()));
            prop_assert_eq!(queue.holders().most(), known.iter().map(|of_client| of_client.held).max().unwrap_or(0));
        }
    }
}

proptest! {
    /// Against the last time of each client.
    #[test]
    fn others_are_there_while_they_wait_or_have_used_a_place(
        events in prop::collection::vec((0..4_u8, any::<bool>(), 0..600_u64), 1..100),
    ) {
        let (mut queue, mut used, mut waiting) = (WaitQueue::default(), [None; 4], [0_u32; 4]);
        let mut now = Mono(1_000_000_000);
        for (number, (client, waits, passes)) in (0..).zip(events) {
            now = now.after(Duration::from_millis(passes));
            let at = usize::from(client);
            if !waits {
                queue.used(address(client), now);
                used[at] = Some(now);
            } else if waiting[at] == 0 {
                queue.push(waiter(client, number, u64::MAX), now);
                waiting[at] = number + 1;
            } else {
                queue.remove(SessionKey(at), key(waiting[at] - 1));
                waiting[at] = 0;
            }
            for client in 0..4_u8 {
                let others = || (0..4).filter(|other| *other != usize::from(client));
                let last = others().filter_map(|other| used[other]).max();
                prop_assert_eq!(queue.used_by_another(address(client)), last);
                let are_there = others().any(|other| {
                    waiting[other] > 0 || used[other].is_some_and(|at| now.since(at) < RECENTLY)
                });
                prop_assert_eq!(queue.others_want(address(client), now), are_there);
            }
        }
    }
}
