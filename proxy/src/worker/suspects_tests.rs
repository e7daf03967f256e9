#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn at(millis: u64) -> Mono {
    Mono(3_600_000_000_000).after(Duration::from_millis(millis))
}

fn client(number: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, number])
}

fn query(index: u32) -> QueryKey {
    QueryKey { index, generation: 0 }
}

fn group(class: Class, first: u32) -> Group {
    Group { queries: vec![query(first)], class, took: Duration::from_millis(1), of: None }
}

fn indexes(group: Option<&Group>) -> Vec<u32> {
    group.map(|group| group.queries.iter().map(|query| query.index).collect()).unwrap_or_default()
}

#[test]
fn clients_are_parted_before_their_queries() {
    let suspects = Suspects::default();
    let dead = [(0, 1), (1, 1), (2, 1), (3, 2), (4, 3), (5, 3)].map(|(index, from)| (query(index), client(from)));
    let [one, other] = suspects.split(&dead, Duration::ZERO, at(0));
    assert_eq!((indexes(one.as_ref()), indexes(other.as_ref())), (vec![0, 1, 2], vec![3, 4, 5]));
    let [one, other] = suspects.split(&dead[..3], Duration::ZERO, at(0));
    assert_eq!((indexes(one.as_ref()), indexes(other.as_ref())), (vec![0, 1], vec![2]));
    let [one, other] = suspects.split(&dead[..1], Duration::ZERO, at(0));
    assert_eq!((indexes(one.as_ref()), other), (vec![0], None));
}

#[test]
fn a_marked_client_is_parted_from_all_others_first() {
    let mut suspects = Suspects::default();
    suspects.convict(client(2), Duration::from_millis(3), at(0));
    assert!(suspects.is_marked(|| client(2), at(59_999)) && !suspects.is_marked(|| client(2), at(60_000)));
    let dead = [(0, 1), (1, 2), (2, 3), (3, 2)].map(|(index, from)| (query(index), client(from)));
    let [one, other] = suspects.split(&dead, Duration::ZERO, at(1)).map(Option::unwrap);
    assert_eq!((indexes(Some(&one)), one.class), (vec![0, 2], Class::Clear));
    assert_eq!((indexes(Some(&other)), other.class), (vec![1, 3], Class::Marked));
}

#[test]
fn two_are_tried_at_a_time_and_marked_clients_last() {
    let mut suspects = Suspects::default();
    for (class, first) in [(Class::Marked, 0), (Class::Marked, 1), (Class::Clear, 2), (Class::Clear, 3)] {
        suspects.push(group(class, first));
    }
    let begin = |suspects: &mut Suspects, now| {
        let group = suspects.next(now)?;
        suspects.began(ConnKey(group.queries[0].index as usize), &group, now);
        Some(group.queries[0].index)
    };
    assert_eq!((begin(&mut suspects, at(0)), begin(&mut suspects, at(0))), (Some(2), Some(3)));
    assert_eq!(begin(&mut suspects, at(0)), None);
    suspects.closed(ConnKey(2));
    assert_eq!(begin(&mut suspects, at(1)), Some(0));
    assert!(suspects.survived(ConnKey(3)), "it is one like all others");
    assert_eq!(begin(&mut suspects, at(2)), None, "one place is for others");
    suspects.closed(ConnKey(0));
    assert_eq!((begin(&mut suspects, at(10)), suspects.next_deadline()), (None, Some(at(11))));
    assert_eq!(begin(&mut suspects, at(11)), Some(1), "no more than one in 10 ms");
    assert_eq!((suspects.waiting(), suspects.next_deadline()), (0, None));
}

/// Slow names do not keep a place for as long as they are slow.
#[test]
fn a_trial_is_over_when_it_has_lasted_clearly_longer_than_the_death() {
    let mut suspects = Suspects::default();
    let slow = Group { took: Duration::from_millis(40), ..group(Class::Clear, 0) };
    suspects.began(ConnKey(0), &slow, at(0));
    assert_eq!(suspects.trials(at(5_000)), 1, "it is not connected yet");
    suspects.connected(ConnKey(0), at(5_000));
    assert_eq!((suspects.trials(at(5_099)), suspects.trials(at(5_100))), (1, 0));
}

#[test]
fn what_comes_from_a_client_is_asked_on_its_connection() {
    let mut suspects = Suspects::default();
    suspects.convict(client(1), Duration::from_millis(1), at(0));
    assert!(suspects.push_fresh(query(0), client(1), at(1)) && suspects.push_fresh(query(1), client(1), at(1)));
    assert!(suspects.push_fresh(query(2), client(2), at(1)));
    assert_eq!(suspects.waiting(), 2, "one for each client");
    let unusual = suspects.next(at(1)).unwrap();
    assert_eq!((unusual.class, unusual.of), (Class::Clear, Some(client(2))));
    let marked = suspects.next(at(1)).unwrap();
    assert_eq!((indexes(Some(&marked)), marked.class), (vec![0, 1], Class::Marked));
    suspects.began(ConnKey(7), &marked, at(1));
    suspects.connected(ConnKey(7), at(1));
    assert_eq!(suspects.survivors(client(1), at(2)).next(), None);
    assert!(!suspects.survived(ConnKey(7)), "nobody else gets it");
    assert_eq!(suspects.survivors(client(1), at(2)).next(), Some(ConnKey(7)));
    assert_eq!(suspects.survivors(client(2), at(2)).next(), None);
    suspects.closed(ConnKey(7));
    assert_eq!(suspects.survivors(client(1), at(2)).next(), None);
}

#[test]
fn no_more_than_so_many_wait() {
    let mut suspects = Suspects::default();
    let push = |suspects: &mut Suspects, number: u16| {
        let [high, low] = number.to_be_bytes();
        suspects.push_fresh(query(number.into()), IpAddr::from([10, 0, high, low]), at(0))
    };
    let taken = (0..1_000).filter(|number| push(&mut suspects, *number)).count();
    assert_eq!((taken, suspects.waiting()), (MOST_FRESH, MOST_FRESH));
    assert!(push(&mut suspects, 0), "its client has one already");
}

#[test]
fn what_could_not_be_tried_is_tried_again() {
    let mut suspects = Suspects::default();
    suspects.push(group(Class::Clear, 0));
    suspects.push(group(Class::Clear, 1));
    let first = suspects.next(at(0)).unwrap();
    suspects.put_back(first, at(0));
    assert_eq!(suspects.next_deadline(), Some(at(20)));
    assert_eq!(indexes(suspects.next(at(20)).as_ref()), [1], "the other one has its turn");
}

proptest! {
    /// Against the naive model: some of these queries bring down whatever they are on. All of them are found, and nobody
    /// else, with at most two trials at a time, and no more deaths than halving takes.
    #[test]
    fn each_death_convicts_one_or_halves_a_group(
        from in prop::collection::vec(0..6u8, 1..60),
        poison in prop::collection::btree_set(0..60u32, 0..4),
    ) {
        let poison: BTreeSet<u32> = poison.into_iter().filter(|index| (*index as usize) < from.len()).collect();
        let all: Vec<_> = (0..).zip(&from).map(|(index, from)| (query(index), client(*from))).collect();
        let client_of = |query: &QueryKey| all[query.index as usize].1;
        let mut suspects = Suspects::default();
        let (mut convicted, mut answered, mut deaths) = (BTreeSet::new(), BTreeSet::new(), 0);
        suspects.split(&all, Duration::ZERO, at(0)).into_iter().flatten().for_each(|group| suspects.push(group));
        let (mut now, mut under_way) = (0, Vec::new());
        loop {
            now += 20;
            while let Some(group) = suspects.next(at(now)) {
                let conn = ConnKey(now as usize * 2 + under_way.len());
                suspects.began(conn, &group, at(now));
                under_way.push((conn, group));
            }
            prop_assert!(under_way.len() <= AT_A_TIME);
            prop_assert_eq!(suspects.trials(at(now)), under_way.len());
            if under_way.is_empty() {
                break;
            }
            for (conn, group) in under_way.drain(..) {
                if group.queries.iter().any(|query| poison.contains(&query.index)) {
                    deaths += 1;
                    suspects.closed(conn);
                    if let [alone] = group.queries[..] {
                        convicted.insert(alone.index);
                        suspects.convict(client_of(&alone), group.took, at(now));
                        continue;
                    }
                    let dead: Vec<_> = group.queries.iter().map(|query| (*query, client_of(query))).collect();
                    let groups = suspects.split(&dead, group.took, at(now));
                    prop_assert!(groups.iter().flatten().all(|half| half.queries.len() < group.queries.len()));
                    groups.into_iter().flatten().for_each(|group| suspects.push(group));
                } else {
                    answered.extend(group.queries.iter().map(|query| query.index));
                    prop_assert!(suspects.survived(conn));
                }
            }
        }
        prop_assert_eq!(&convicted, &poison);
        prop_assert_eq!(answered.len() + convicted.len(), from.len());
        // Six clients are halved three times, 60 queries six times; once more for marked ones.
        prop_assert!(deaths <= poison.len() * 11, "{} deaths for {}", deaths, poison.len());
        prop_assert_eq!((suspects.waiting(), suspects.next_deadline()), (0, None));
    }
}
