//! Reuse although TLVs differ: a client that comes back to a header finds its connection again.

use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Load;
use counterfoil_tests::reuse;
use counterfoil_tests::servers::{Recursor, ZONE};
use counterfoil_tests::sockets::Sampler;

const QUERIES: usize = 10_000;

/// The program's default `max_owned_per_client`.
const CAP: usize = 8;

/// Sends queries whose TLV sets follow `sequence` over one client connection; how many backend connections that took.
fn opened_for(sequence: &[usize], in_flight: usize) -> usize {
    let recursor = Recursor::start(false);
    let config = Config::new(recursor.address).identity("connection").tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&config);
    let sampler = Sampler::start(counterfoil.pid(), recursor.address.port());
    let mut client = counterfoil.client();
    let name = |n: usize| format!("set-{}.{ZONE}", sequence[n]);
    let load = Load { count: sequence.len(), in_flight, name: &name, ..Load::default() };
    load.run(&mut client).assert_all_answered(sequence.len());
    let observed = sampler.finish();
    assert!(observed.most <= CAP, "{observed:?}");
    drop(client);
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("answers_total", &[]), sequence.len() as f64);
    metrics.sum("backend_connections_opened_total", &[]) as usize
}

#[test]
fn eight_in_rotation_take_eight_connections() {
    assert_eq!(opened_for(&reuse::rotation(8, QUERIES), 1), 8);
}

#[test]
fn eight_in_rotation_pipelined_take_eight_connections() {
    assert_eq!(opened_for(&reuse::rotation(8, QUERIES), 20), 8);
}

fn assert_near_optimum(sequence: &[usize]) {
    let best = reuse::best_hits(sequence, CAP);
    let reached = sequence.len() - opened_for(sequence, 1);
    println!("{reached} of {} found their connection; the best for a cap of {CAP} is {best}", sequence.len());
    assert!(reached * 100 >= best * 80, "{reached} of {best}");
}

#[test]
fn nine_in_rotation_reach_80_percent_of_the_optimum() {
    assert_near_optimum(&reuse::rotation(9, QUERIES));
}

#[test]
fn sixty_four_by_zipf_reach_80_percent_of_the_optimum() {
    assert_near_optimum(&reuse::zipf(64, QUERIES, 15218));
}

/// A template that differs per query by its nature: no connection is kept, not even at first.
#[test]
fn a_uuid_makes_every_connection_one_shot() {
    const COUNT: usize = 200;
    let recursor = Recursor::start(false);
    let config = Config::new(recursor.address).identity("address").tlv(0xe0, "{uuid}");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load { count: COUNT, in_flight: 4, ..Load::default() }.run(&mut client).assert_all_answered(COUNT);
    let one_shot = [("kind", "one_shot")];
    let metrics = counterfoil.wait_metrics("every one-shot closed", Duration::from_secs(1), |metrics| {
        metrics.sum("backend_connections", &[]) == 0.0
    });
    assert_eq!(metrics.sum("backend_connections_opened_total", &one_shot), COUNT as f64);
    assert_eq!(metrics.sum("backend_connections_opened_total", &[]), COUNT as f64);
    drop(client);
    counterfoil.assert_quiescent();
}
