#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::config::choices::Choice as _;

fn candidate(weight: u32, outstanding: usize) -> Candidate {
    Candidate { weight, outstanding, rank: Some(0), name: 0 }
}

/// Candidates of these weights, with names of their own.
fn weights(weights: &[u32]) -> Vec<Candidate> {
    let name = |at: usize| digest(format!("backend-{at}").as_bytes());
    weights.iter().enumerate().map(|(at, weight)| Candidate { name: name(at), ..candidate(*weight, 0) }).collect()
}

fn random() -> fastrand::Rng {
    fastrand::Rng::with_seed(1)
}

#[test]
fn the_fewest_outstanding_by_weight_and_of_equals_each_in_turn() {
    let mut chooser = Chooser::new(Policy::LeastOutstanding, 3);
    let mut of = |candidates: [Candidate; 3]| chooser.choose(|at| candidates[at], 0, &mut random()).unwrap();
    assert_eq!(of([candidate(1, 2), candidate(1, 1), candidate(1, 3)]), 1);
    // 6/2 against 4/1 and 5/1.
    assert_eq!(of([candidate(1, 4), candidate(1, 3), candidate(2, 5)]), 2);
    let equal = [candidate(1, 7); 3];
    assert_eq!([of(equal), of(equal), of(equal), of(equal)], [0, 1, 2, 0]);
}

#[test]
fn round_robin_is_spread_evenly() {
    let mut chooser = Chooser::new(Policy::RoundRobin, 3);
    let candidates = weights(&[5, 1, 1]);
    let order: Vec<usize> = (0..7).map(|_| chooser.choose(|at| candidates[at], 0, &mut random()).unwrap()).collect();
    assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
}

#[test]
fn random_follows_the_weights() {
    let mut chooser = Chooser::new(Policy::WeightedRandom, 3);
    let (candidates, mut random) = (weights(&[1, 2, 5]), random());
    let mut counts = [0u32; 3];
    for _ in 0..8_000 {
        counts[chooser.choose(|at| candidates[at], 0, &mut random).unwrap()] += 1;
    }
    for (count, expected) in counts.iter().zip([1_000u32, 2_000, 5_000]) {
        assert!(count.abs_diff(expected) < 200, "{counts:?}");
    }
}

#[test]
fn names_are_spread_by_weight_and_stay_where_they_are() {
    let mut chooser = Chooser::new(Policy::ConsistentHash, 4);
    let mut candidates = weights(&[1, 1, 2, 4]);
    let names: Vec<u64> = (0..8_000).map(|n| digest(format!("host{n}.example").as_bytes())).collect();
    let mut place = |candidates: &[Candidate]| -> Vec<usize> {
        let at = |name: &u64| chooser.choose(|at| candidates[at], *name, &mut random()).unwrap();
        names.iter().map(at).collect()
    };
    let before = place(&candidates);
    for (at, expected) in [1_000usize, 1_000, 2_000, 4_000].into_iter().enumerate() {
        let count = before.iter().filter(|chosen| **chosen == at).count();
        assert!(count.abs_diff(expected) < 200, "{count} of {expected}");
    }
    candidates[2].rank = None;
    let after = place(&candidates);
    let mut moved: HashMap<usize, usize> = HashMap::new();
    for (before, after) in before.iter().zip(&after) {
        if *before != 2 {
            assert_eq!(before, after, "only the names of the one that went move");
        } else {
            *moved.entry(*after).or_default() += 1;
        }
    }
    assert!(moved[&3] > moved[&0] && moved[&0] > 200, "to all others, by weight: {moved:?}");
    candidates[2].rank = Some(0);
    assert_eq!(place(&candidates), before, "and come back");
}

#[test]
fn the_digest_ignores_case_and_does_not_change_between_versions() {
    assert_eq!(digest(b"\x03WWW\x07example\0"), digest(b"\x03www\x07EXAMPLE\0"));
    assert_ne!(digest(b"\x03www\x07example\0"), digest(b"\x03ww2\x07example\0"));
    assert_eq!(digest(b""), 0xf52a_15e9_a9b5_e89b);
}

#[test]
fn a_client_keeps_its_backend_unless_others_have_far_fewer_outstanding() {
    let mut of = [candidate(1, 17), candidate(1, 0)];
    let least = Chooser::new(Policy::LeastOutstanding, 2);
    assert!(least.keeps(0, |at| of[at]));
    of[0].outstanding = 18;
    assert!(!least.keeps(0, |at| of[at]));
    of[1].outstanding = 1;
    assert!(least.keeps(0, |at| of[at]));
    for (policy, keeps) in [
        (Policy::RoundRobin, true),
        (Policy::WeightedRandom, true),
        (Policy::FirstAvailable, false),
        (Policy::ConsistentHash, false),
    ] {
        assert_eq!(Chooser::new(policy, 2).keeps(0, |at| of[at]), keeps, "{policy:?}");
    }
    for rank in [None, Some(1)] {
        of[0].rank = rank;
        assert!(!Chooser::new(Policy::RoundRobin, 2).keeps(0, |at| of[at]), "a better one is there");
    }
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let one = (1..1000u32, 0..100usize, prop::option::of(0..3u8), any::<u64>())
        .prop_map(|(weight, outstanding, rank, name)| Candidate { weight, outstanding, rank, name });
    prop::collection::vec(one, 0..8)
}

proptest! {
    /// Whatever the policy: one of the best rank, or none if there is none; and what the policy says.
    #[test]
    fn one_of_the_best_is_chosen(
        policy in prop::sample::select(Policy::ALL),
        steps in prop::collection::vec((candidates(), any::<u64>()), 1..20),
        seed in any::<u64>(),
    ) {
        let count = steps.iter().map(|(candidates, _)| candidates.len()).min().unwrap();
        let (mut chooser, mut random) = (Chooser::new(policy, count), fastrand::Rng::with_seed(seed));
        for (candidates, question) in steps {
            let candidates = &candidates[..count];
            let chosen = chooser.choose(|at| candidates[at], question, &mut random);
            let best = candidates.iter().filter_map(|candidate| candidate.rank).min();
            prop_assert_eq!(chosen.map(|at| candidates[at].rank.unwrap()), best);
            let Some(chosen) = chosen else { continue };
            let eligible = |at: &usize| candidates[*at].rank == best;
            match policy {
                Policy::FirstAvailable => prop_assert_eq!((0..count).find(eligible), Some(chosen)),
                Policy::LeastOutstanding => {
                    let load = |at: usize| (candidates[at].outstanding + 1) as f64 / f64::from(candidates[at].weight);
                    prop_assert!((0..count).filter(eligible).all(|at| load(chosen) <= load(at) + 1e-9));
                }
                _ => {}
            }
        }
    }

    /// In as many steps as the weights add up to, each comes as often as its weight says.
    #[test]
    fn round_robin_gives_each_its_weight(given in prop::collection::vec(1..20u32, 1..6)) {
        let (mut chooser, of) = (Chooser::new(Policy::RoundRobin, given.len()), weights(&given));
        for _ in 0..3 {
            let mut counts = vec![0u32; given.len()];
            for _ in 0..given.iter().sum::<u32>() {
                counts[chooser.choose(|at| of[at], 0, &mut random()).unwrap()] += 1;
            }
            prop_assert_eq!(&counts, &given);
        }
    }

    /// A name goes where it goes: neither the load nor what was asked before changes that.
    #[test]
    fn the_hash_depends_on_names_and_weights_only(candidates in candidates(), question in any::<u64>()) {
        let mut chooser = Chooser::new(Policy::ConsistentHash, candidates.len());
        let first = chooser.choose(|at| candidates[at], question, &mut random());
        chooser.choose(|at| candidates[at], !question, &mut random());
        let busy = |at: usize| Candidate { outstanding: candidates[at].outstanding * 31 + at, ..candidates[at] };
        prop_assert_eq!(chooser.choose(busy, question, &mut random()), first);
    }
}
