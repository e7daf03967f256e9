use super::*;

/// A clock of a machine that has run for a while.
fn at(millis: u64) -> Mono {
    Mono(3_600_000_000_000).after(Duration::from_millis(millis))
}

fn client(number: u32) -> IpAddr {
    IpAddr::from(std::net::Ipv4Addr::from_bits(number))
}

/// A client's connection of its own, opened and closed without an answer at this time.
fn turns_away(backoff: &mut Backoff, number: u32, now: Mono) {
    backoff.tries(client(number), now);
    backoff.turned_away(Some(client(number)), Whose::Own, now, now, 0.0);
}

fn holds(backoff: &Backoff, number: u32, now: Mono) -> bool {
    backoff.holds_back(|| client(number), now)
}

#[test]
fn connections_that_do_not_come_about_make_everybody_wait() {
    let mut backoff = Backoff::default();
    for _ in 0..2 {
        backoff.failed(at(0), at(0), 0.0);
    }
    assert!(!holds(&backoff, 1, at(0)), "two in a row are tolerated");
    backoff.failed(at(0), at(0), 0.0);
    assert!(holds(&backoff, 1, at(74)) && holds(&backoff, 2, at(74)) && !holds(&backoff, 1, at(75)));
    backoff.tries(client(1), at(75));
    assert!(holds(&backoff, 2, at(76)), "one is tried alone");
    backoff.heard(at(80));
    backoff.succeeded(|| Some(client(1)));
    assert!(!holds(&backoff, 2, at(80)));
}

/// Each of them is held back, and nobody else, as long as anybody is answered.
#[test]
fn however_many_are_turned_away_others_are_not_held_back() {
    let mut backoff = Backoff::default();
    for round in 0..100 {
        let now = at(round * 250);
        backoff.heard(now);
        for number in 1..=200 {
            if !holds(&backoff, number, now) {
                turns_away(&mut backoff, number, now);
            }
        }
        assert!(!holds(&backoff, 1_000, now), "round {round}");
    }
    let held = (1..=200).filter(|number| holds(&backoff, *number, at(24_751))).count();
    assert!(held >= 180, "{held} of 200 are held back");
}

/// Nobody is answered: known clients wait for each other, and only a few strangers may try in each pause.
#[test]
fn a_backend_that_answers_nobody_is_left_alone() {
    let mut backoff = Backoff::default();
    let (mut tried, mut next) = (0, 0);
    for millis in 0..10_000 {
        next += 1;
        for number in [next, next % 50] {
            if !holds(&backoff, number, at(millis)) {
                turns_away(&mut backoff, number, at(millis));
                tried += u32::from(millis >= 2_000);
            }
        }
    }
    assert!((1..=8 * (STRANGERS + 2)).contains(&tried), "{tried} in 8 s");
    backoff.heard(at(10_000));
    backoff.succeeded(|| None);
    assert!(!holds(&backoff, next + 1, at(10_000)));
}

/// What brought down a shared connection is found out; only when there is no answer in between at all it is the backend.
#[test]
fn deaths_of_shared_connections_say_nothing_while_others_are_answered() {
    let mut backoff = Backoff::default();
    let dies = |backoff: &mut Backoff, client, now| backoff.turned_away(client, Whose::Shared, now, now, 0.0);
    for millis in 0..5_000 {
        if millis % 20 == 0 {
            backoff.heard(at(millis));
        }
        dies(&mut backoff, (millis % 2 == 0).then(|| client(7)), at(millis));
        assert!(!holds(&backoff, 7, at(millis)) && !holds(&backoff, 8, at(millis)));
    }
    for _ in 0..DEATHS + 3 {
        dies(&mut backoff, None, at(5_000));
    }
    assert!(holds(&backoff, 8, at(5_001)));
    let mut backoff = Backoff::default();
    for _ in 0..3 {
        dies(&mut backoff, Some(client(7)), at(0));
    }
    assert!(holds(&backoff, 7, at(1)) && !holds(&backoff, 8, at(1)), "nobody else has tried");
}

#[test]
fn in_a_shortage_one_is_tried_after_the_other() {
    let mut shortage = Shortage::default();
    assert!(!shortage.holds(at(0)) && !shortage.ends());
    shortage.tries(at(0));
    assert!(!shortage.is_felt());
    shortage.felt(at(0));
    assert!(shortage.holds(at(19)) && !shortage.holds(at(20)));
    shortage.tries(at(20));
    assert!(shortage.holds(at(39)), "alone");
    assert!(shortage.ends() && !shortage.is_felt() && !shortage.holds(at(21)));
}
