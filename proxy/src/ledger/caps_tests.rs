use super::*;

#[test]
fn limits_hold_and_places_come_back() {
    let caps = Arc::new(Caps::new([2, 5], 3));
    let first = caps.acquire(0);
    let second = caps.acquire(0);
    assert!(first.is_ok() && second.is_ok());
    assert_eq!(caps.acquire(0).err(), Some(AtCap::Backend));
    let third = caps.acquire(1);
    assert!(third.is_ok());
    assert_eq!(caps.acquire(1).err(), Some(AtCap::Total));
    assert!(!caps.has_place(0) && !caps.has_place(1));
    assert_eq!(caps.backend(1), Some((5, 1)), "a refusal by the total leaves the backend's count alone");
    drop(first);
    assert!(caps.has_place(0) && caps.has_place(1) && !caps.has_place(7));
    assert!(caps.acquire(1).is_ok());
    drop((second, third));
    assert_eq!(caps.total(), (3, 0));
    assert_eq!(caps.acquire(7).err(), Some(AtCap::Backend));
}

#[test]
fn limits_change_while_they_are_in_use() {
    let caps = Arc::new(Caps::new([2], 9));
    let held = [caps.acquire(0), caps.acquire(0)];
    caps.set_backend(0, 1);
    assert_eq!((caps.backend(0), caps.acquire(0).err()), (Some((1, 2)), Some(AtCap::Backend)));
    drop(held);
    let held = caps.acquire(0);
    assert!(held.is_ok() && caps.acquire(0).is_err());
    caps.set_backend(0, 2);
    caps.set_total(1);
    assert_eq!(caps.acquire(0).err(), Some(AtCap::Total));
    caps.set_backend(40, 1);
    caps.set_total(2);
    assert!(caps.acquire(40).is_ok(), "a backend that came later");
}

#[test]
fn what_a_backend_takes_counts_if_it_is_less() {
    let caps = Arc::new(Caps::new([3], 9));
    let first = caps.acquire(0);
    caps.find(0, Some(1));
    assert_eq!((caps.backend(0), caps.has_place(0)), (Some((1, 1)), false));
    assert_eq!(caps.acquire(0).err(), Some(AtCap::Backend));
    let check = caps.acquire_to_find(0);
    assert!(first.is_ok() && check.is_ok());
    drop(check);
    assert_eq!(caps.ended(0), 1);
    for takes in [Some(7), None] {
        caps.find(0, takes);
        assert_eq!(caps.backend(0), Some((3, 1)));
    }
}

#[test]
fn drills_are_beside_the_total() {
    let caps = Arc::new(Caps::new([5], 2).with_drill(1, 1));
    let drill = caps.acquire(1);
    assert!(drill.is_ok());
    assert_eq!(caps.acquire(1).err(), Some(AtCap::Backend));
    let kept = [caps.acquire(0), caps.acquire(0)];
    assert_eq!(caps.acquire(0).err(), Some(AtCap::Total));
    assert_eq!(caps.total(), (2, 2));
    drop(kept);
    drop(drill);
    assert_eq!((caps.total(), caps.backend(1)), ((2, 0), Some((1, 0))));
}

const NOW: Mono = Mono(1_000_000_000);

/// Two workers have the places of one backend.
fn shared(limit: usize, total: usize) -> Arc<Caps> {
    Arc::new(Caps::new([limit], total).shared_by(2))
}

#[test]
fn one_place_goes_round() {
    let caps = shared(1, 9);
    let mut holder = caps.acquire_for(0, 0, 0, NOW).ok();
    assert!(holder.is_some());
    for turn in 1..9 {
        let (has, wants) = ((turn + 1) % 2, turn % 2);
        assert_eq!(caps.acquire_for(wants, 0, 0, NOW).err(), Some(AtCap::Backend));
        caps.claim(wants, 0, AtCap::Backend, NOW);
        assert_eq!(caps.due(has, wants, Some(0)), Due { excess: 0, in_turn: 1 });
        drop(holder.take());
        caps.claim(has, 0, AtCap::Backend, NOW);
        assert_eq!(caps.acquire_for(has, 0, 0, NOW).err(), Some(AtCap::Backend), "it is for who claims it");
        holder = caps.acquire_for(wants, 0, 0, NOW).ok();
        assert!(holder.is_some());
    }
}

#[test]
fn who_holds_least_is_next_and_who_holds_most_gives() {
    let caps = Arc::new(Caps::new([9], 9).shared_by(3));
    let take = |worker| caps.acquire_for(worker, 0, 0, NOW);
    let mut held = vec![take(0), take(0), take(0), take(0), take(1), take(1), take(1), take(1), take(2)];
    assert!(held.iter().all(Result::is_ok));
    caps.claim(2, 0, AtCap::Total, NOW);
    let due = |worker| caps.due(worker, 2, None);
    assert_eq!((due(0), due(1)), (Due { excess: 1, in_turn: 0 }, Due::default()), "one gives");
    held.pop();
    held.truncate(7);
    assert!(take(0).is_ok(), "there are two, and one of them is not claimed");
    drop(held);
    assert_eq!(caps.total(), (9, 0));
    assert_eq!(caps.due(0, 1, Some(0)), Due::default());
}

/// What somebody claims who does not come back for it is not kept for ever, nor is what is claimed no more.
#[test]
fn claims_end() {
    let caps = shared(1, 1);
    caps.claim(1, 0, AtCap::Total, NOW);
    let held = caps.acquire_for(0, 0, 0, NOW);
    assert!(held.is_ok(), "of equals the one with the lower number");
    drop(held);
    assert_eq!(caps.acquire_for(0, 0, 0, NOW).err(), Some(AtCap::Total));
    assert!(caps.acquire_for(0, 0, 0, NOW.after(CLAIM)).is_ok());
    caps.claim(1, 0, AtCap::Total, NOW);
    caps.withdraw(1, 0);
    assert!(caps.acquire_for(0, 0, 0, NOW).is_ok());
    assert!(caps.acquire(0).is_ok(), "a health check claims nothing, and takes what is free");
}

/// Who has got a place lately is there still, and who claims one.
#[test]
fn other_workers_are_there_while_they_take_or_claim() {
    let caps = shared(3, 9);
    assert!(![0, 1].iter().any(|worker| caps.others_want(*worker, 0, NOW)));
    let held = caps.acquire_for(1, 0, 0, NOW);
    assert!(held.is_ok());
    assert_eq!([0, 1].map(|worker| caps.others_want(worker, 0, NOW)), [true, false], "not of itself");
    let quiet = NOW.after(RECENTLY);
    assert!(caps.others_want(0, 0, Mono(quiet.0 - 1)) && !caps.others_want(0, 0, quiet));
    caps.claim(1, 0, AtCap::Backend, quiet);
    assert!(caps.others_want(0, 0, quiet) && !caps.others_want(0, 0, quiet.after(CLAIM)));
}

#[test]
fn what_is_connected_to_a_former_address_counts_in_the_total_only() {
    let caps = shared(2, 5);
    let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
    caps.place(0, address(53));
    let old = [caps.acquire_for(0, 0, 0, NOW), caps.acquire_for(1, 0, 0, NOW)];
    caps.place(0, address(53));
    assert_eq!((caps.moves(0), caps.backend(0)), (0, Some((2, 2))));
    caps.place(0, address(54));
    assert_eq!((caps.moves(0), caps.backend(0), caps.total()), (1, Some((2, 0)), (5, 2)));
    assert!(caps.acquire_for(0, 0, 0, NOW).is_err(), "a worker that does not know yet opens none to where it was");
    let new = [caps.acquire_for(0, 0, 1, NOW), caps.acquire_for(0, 0, 1, NOW)];
    assert!(new.iter().all(Result::is_ok) && caps.acquire_for(1, 0, 1, NOW).is_err());
    drop(old);
    assert_eq!((caps.backend(0), caps.total()), (Some((2, 2)), (5, 2)));
    assert_eq!(caps.due(0, 1, Some(0)), Due { excess: 1, in_turn: 0 }, "what it holds there");
    drop(new);
    assert_eq!((caps.backend(0), caps.total()), (Some((2, 0)), (5, 0)));
}
