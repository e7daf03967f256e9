use super::*;
use crate::fake_backend::FakeBackend;

fn load(backend: &FakeBackend, count: usize, in_flight: usize) -> Outcome {
    let mut client = Client::connect(backend.address, None);
    Load { count, in_flight, stall: Duration::from_millis(300), ..Load::default() }.run(&mut client)
}

#[test]
fn counts_every_answer_at_any_depth() {
    let backend = FakeBackend::answering(false);
    for in_flight in [1, 7, 1000] {
        load(&backend, 2000, in_flight).assert_all_answered(2000);
    }
    assert_eq!((backend.accepted(), backend.queries()), (3, 6000));
}

#[test]
fn keeps_to_its_rate() {
    let backend = FakeBackend::answering(false);
    let mut client = Client::connect(backend.address, None);
    let outcome = Load { count: 200, in_flight: 10, rate: Some(500.0), ..Load::default() }.run(&mut client);
    outcome.assert_all_answered(200);
    assert!(outcome.elapsed >= Duration::from_millis(390), "{:?}", outcome.elapsed);
}

#[test]
fn notices_what_is_missing_wrong_or_failed() {
    // Query 3 is never answered.
    let forgetful = FakeBackend::start(|connection| {
        let mut number = 0;
        while let Some(query) = connection.query() {
            if number != 3 {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
            number += 1;
        }
    });
    let outcome = load(&forgetful, 10, 4);
    assert_eq!((outcome.answered, outcome.missing.as_slice()), (9, &[3][..]), "{outcome:?}");
    assert!(outcome.ended.is_some());

    // Answers come for the other of two queries, then twice.
    let crossed = FakeBackend::start(|connection| {
        let (Some(first), Some(second)) = (connection.query(), connection.query()) else { return };
        let mut answer = message::answer_to(&second, [192, 0, 2, 53]);
        answer[..2].copy_from_slice(&first[..2]);
        connection.send(&answer);
        let good = message::answer_to(&second, [192, 0, 2, 53]);
        connection.send(&good);
        connection.send(&good);
        connection.wait_closed();
    });
    let outcome = load(&crossed, 2, 2);
    assert_eq!((outcome.answered, outcome.foreign.len()), (1, 2), "{outcome:?}");

    let failing = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            answer[3] |= rcode::SERVFAIL;
            connection.send(&answer);
        }
    });
    let outcome = load(&failing, 5, 1);
    assert_eq!((outcome.answered, outcome.failed.get(&rcode::SERVFAIL)), (0, Some(&5)), "{outcome:?}");

    let closing = FakeBackend::start(|connection| {
        connection.query();
        connection.reset();
    });
    let outcome = load(&closing, 5, 5);
    assert_eq!((outcome.missing.len(), outcome.ended.as_deref()), (5, Some("Reset")), "{outcome:?}");
}
