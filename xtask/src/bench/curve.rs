//! `cargo xtask bench --curves`: what a query costs Counterfoil as one thing grows. The cost must not grow with it.

use std::fmt::Write as _;

use serde::Serialize;

use super::Arguments;
use super::measure::{self, Plan, Sample};
use super::report::median;
use super::scenario::{self, Header, Scenario};
use super::subject::Subject;
use crate::command::say;

/// What grows, and under which load.
struct Curve {
    about: &'static str,
    workers: u32,
    header: Header,
    identity: &'static str,
    /// The same load goes to the backend itself, too, to show how much of a growth is not Counterfoil's.
    bare: bool,
    /// How much of it, and what the load generator is told.
    points: &'static [(u32, &'static [&'static str])],
}

const CURVES: [Curve; 3] = [
    Curve {
        about: "client connections, 1 in flight on each, PROXY, identity = address",
        workers: 2,
        header: Header::Address,
        identity: "address",
        bare: true,
        points: &[
            (1, &["--clients=1"]),
            (10, &["--clients=10"]),
            (100, &["--clients=100"]),
            (1000, &["--clients=1000"]),
            (10_000, &["--clients=10000", "--patience=30"]),
        ],
    },
    Curve {
        about: "queries in flight on each of 10 client connections, PROXY, owned connections",
        workers: 2,
        header: Header::Address,
        identity: "connection",
        bare: true,
        points: &[
            (1, &["--clients=10"]),
            (3, &["--clients=10", "--in-flight=3"]),
            (10, &["--clients=10", "--in-flight=10"]),
            (30, &["--clients=10", "--in-flight=30"]),
            (100, &["--clients=10", "--in-flight=100"]),
        ],
    },
    Curve {
        about: "TLV sets in rotation over 50 clients, 1 in flight, identity = forwarder, one worker",
        // Each worker has a connection for each set: with two, 10,000 sets would be 20,000 connections, more than many
        // machines allow a process, and more than half of the ports that it has towards one backend.
        workers: 1,
        header: Header::Label,
        identity: "forwarder",
        bare: false,
        points: &[
            (1, &["--names=rotate:1", "--shared-names"]),
            (10, &["--names=rotate:10", "--shared-names"]),
            (100, &["--names=rotate:100", "--shared-names"]),
            (1000, &["--names=rotate:1000", "--shared-names"]),
            // Long enough that opening the connections does not count for much.
            (10_000, &["--names=rotate:10000", "--shared-names", "--seconds=20", "--patience=30"]),
        ],
    },
];

/// The samples of one point of a curve.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    about: &'static str,
    at: u32,
    samples: Vec<Sample>,
    /// CPU time per query of the backend when it is asked directly, in microseconds.
    bare_us: Vec<f64>,
    errors: Vec<String>,
}

impl Point {
    pub(super) fn failed(&self) -> usize {
        self.errors.len()
    }
}

/// Measures all points. In each round each curve is walked from one end to the other, so that a machine whose speed
/// drifts bends it elsewhere in each round.
pub(super) fn measure(plan: &Plan<'_>, arguments: &Arguments) -> Vec<Point> {
    let mut measured = Vec::new();
    for curve in &CURVES {
        let point = |(at, _): &(u32, _)| Point {
            about: curve.about,
            at: *at,
            samples: Vec::new(),
            bare_us: Vec::new(),
            errors: Vec::new(),
        };
        let mut points: Vec<Point> = curve.points.iter().map(point).collect();
        for round in 1..=arguments.rounds {
            for (point, (_, load)) in points.iter_mut().zip(curve.points) {
                say(format_args!("curve round {round} of {}: {} {}", arguments.rounds, point.at, curve.about));
                let scenario = Scenario {
                    header: curve.header,
                    identity: curve.identity,
                    workers: curve.workers,
                    load,
                    ..scenario::BASE
                };
                let sample = measure::sample(plan, &scenario, Subject::Counterfoil);
                let bare = curve.bare.then(|| measure::bare(plan, load)).transpose();
                for error in [sample.as_ref().err(), bare.as_ref().err()].into_iter().flatten() {
                    say(format_args!("{} {} failed: {error:#}", point.at, curve.about));
                    point.errors.push(format!("{error:#}"));
                }
                point.samples.extend(sample);
                point.bare_us.extend(bare.ok().flatten());
            }
        }
        measured.extend(points);
    }
    measured
}

/// The tables.
pub(super) fn tables(points: &[Point], arguments: &Arguments) -> String {
    let mut text = String::new();
    for curve in &CURVES {
        let _ = writeln!(
            text,
            "\nCurve: {}\nmedian of {} rounds of {} s; x: CPU per query / that of the first point; bare: CPU per query of the backend, asked directly",
            curve.about, arguments.rounds, arguments.seconds,
        );
        let _ = writeln!(
            text,
            "{:>8}{:>11}{:>10}{:>8}{:>10}{:>8}{:>10}{:>10}{:>9}{:>7}{:>8}",
            "", "qps", "CPU us/q", "x", "bare us/q", "x", "p50 us", "p99 us", "conns/q", "most", "others"
        );
        let own = || points.iter().filter(|point| point.about == curve.about);
        let first = own().next();
        for point in own() {
            text.push_str(&line(point, first));
        }
    }
    text
}

fn cpu(point: &Point) -> f64 {
    median(point.samples.iter().map(|sample| sample.cpu_us))
}

fn bare(point: &Point) -> f64 {
    median(point.bare_us.iter().copied())
}

fn line(point: &Point, first: Option<&Point>) -> String {
    if point.samples.is_empty() {
        return format!("{:>8} FAILED in all {} runs\n", point.at, point.errors.len());
    }
    let of = |figure: fn(&Sample) -> f64| median(point.samples.iter().map(figure));
    let bare = match point.bare_us.is_empty() {
        true => format!("{:>10}{:>8}", "-", "-"),
        false => format!("{:>10.2}{:>8.2}", bare(point), bare(point) / first.map_or(f64::NAN, bare)),
    };
    let failed = if point.errors.is_empty() { String::new() } else { format!("  FAILED {} times", point.errors.len()) };
    format!(
        "{:>8}{:>11.0}{:>10.2}{:>8.2}{bare}{:>10.0}{:>10.0}{:>9.4}{:>7.0}{:>8.2}{failed}\n",
        point.at,
        of(|sample| sample.qps),
        cpu(point),
        cpu(point) / first.map_or(f64::NAN, cpu),
        of(|sample| sample.latency_us.p50),
        of(|sample| sample.latency_us.p99),
        of(|sample| sample.opened_per_query),
        of(|sample| sample.max_open as f64),
        of(|sample| sample.disturbance),
    )
}
