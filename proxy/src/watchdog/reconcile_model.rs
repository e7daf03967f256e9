//! The join at random, against a model that knows which connection is healthy and which leaks since when.

use proptest::prelude::*;

use super::tests::{SECOND, policy};
use super::world::{MILLI, Model, Step, Weather, World, steps};
use super::*;

/// A leak is a finding from the sweep on that has seen it often and long enough, and not before. True if it is one now.
fn expected(conn: &mut Model, pauses: &[Pause], taken: u64) -> bool {
    let policy = policy();
    let Some((class, since)) = conn.ill_since(pauses) else { return false };
    // Closed after the kernel was read, it might just be a close.
    if taken < since || class == Class::Orphan && conn.closed.is_some() && taken == since {
        conn.seen = None;
        return false;
    }
    let (first, sweeps) = conn.seen.map_or((taken, 1), |(first, sweeps)| (first, sweeps + 1));
    conn.seen = Some((first, sweeps));
    let timed = matches!(class, Class::Hoard | Class::Stuck | Class::Embryo) || conn.closed.is_some();
    sweeps >= policy.sweeps && taken - if timed { since } else { first } >= nanos(policy.grace)
}

/// The findings of each sweep: class, cookie, and whether they may be acted on.
type Sweeps = Vec<Vec<(Class, u64, bool)>>;

/// Runs the world, one sweep per step.
fn run(steps: &[Step], weather: Weather, shuffle: bool) -> Result<Sweeps, TestCaseError> {
    let start = 1000 * SECOND;
    let mut world = World::new(start);
    let mut history = History::default();
    let (mut all, mut last, mut calm) = (Vec::new(), start, 0);
    for step in steps {
        // What is closed and forgotten by the kernel is history.
        world.conns.retain(|conn| conn.leak.is_some() || conn.closed.is_none_or(|at| at >= last));
        if step.stall > 0 {
            world.stalled_until = world.now + step.stall;
        }
        let (stop_before, stop_between) = if step.stop_between { (0, step.stop) } else { (step.stop, 0) };
        world.pass(&step.before, stop_before);
        let mut kernel = world.kernel(step.uncertain);
        let taken = kernel.taken_ns;
        if taken - last > nanos(policy().max_pause) {
            world.conns.iter_mut().for_each(|conn| conn.seen = None);
        }
        last = taken;
        let mut known: Vec<Model> = world.conns.clone();
        world.pass(&step.between, stop_between);
        let mut ledger = world.ledger();
        if shuffle {
            kernel.sockets.reverse();
            ledger.rows.reverse();
            ledger.tombstones.reverse();
        }
        let findings = reconcile(&Joined::new(&kernel, Trust::Full, &ledger), &mut history, &policy());
        let undisturbed = !step.uncertain && step.stop == 0 && world.now >= world.stalled_until + SECOND;
        calm = if undisturbed { calm + 1 } else { 0 };
        for (conn, before) in world.conns.iter_mut().zip(&mut known) {
            let found = findings.iter().find(|finding| finding.cookie == conn.cookie);
            // The ledger was read later: an orphan's row is gone already.
            let leaks = before.leak.is_some() || matches!(conn.leak, Some((Class::Orphan, _)));
            if !leaks {
                let allowed = weather == Weather::Storm && found.is_some_and(|finding| finding.held_back.is_some());
                prop_assert!(found.is_none() || allowed, "healthy at {}: {:?} {:?}", taken, conn, found);
                continue;
            }
            let expected = expected(conn, &world.pauses, taken);
            let leak = conn.leak.map(|(class, _)| class);
            prop_assert_eq!(found.map(|finding| finding.class), leak.filter(|_| expected), "at {}: {:?}", taken, conn);
            if calm > policy().sweeps + 1 {
                prop_assert_eq!(found.and_then(|finding| finding.held_back), None, "at {}: {:?}", taken, conn);
            }
        }
        all.push(findings.iter().map(|found| (found.class, found.cookie, found.held_back.is_none())).collect());
        // The next sweep comes an interval later, whatever happened in between.
        world.advance(world.now + SECOND - 180 * MILLI);
    }
    Ok(all)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_healthy_connection_is_ever_a_finding(steps in steps(Weather::Calm, false, 1..80)) {
        run(&steps, Weather::Calm, false)?;
    }

    #[test]
    fn nor_when_the_process_is_stopped_now_and_then(steps in steps(Weather::Stops, false, 1..80)) {
        run(&steps, Weather::Stops, false)?;
    }

    #[test]
    fn none_is_acted_on_when_workers_stall_and_the_view_is_uncertain(steps in steps(Weather::Storm, false, 1..80)) {
        run(&steps, Weather::Storm, false)?;
    }

    #[test]
    fn every_leak_becomes_a_finding_in_time_and_nothing_else_does(steps in steps(Weather::Calm, true, 40..80)) {
        run(&steps, Weather::Calm, false)?;
    }

    #[test]
    fn and_so_it_does_in_a_storm(steps in steps(Weather::Storm, true, 40..80)) {
        run(&steps, Weather::Storm, false)?;
    }

    #[test]
    fn the_order_of_the_snapshots_does_not_matter(steps in steps(Weather::Storm, true, 1..50)) {
        prop_assert_eq!(run(&steps, Weather::Storm, false)?, run(&steps, Weather::Storm, true)?);
    }
}
