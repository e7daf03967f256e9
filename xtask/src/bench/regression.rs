//! `cargo xtask bench --before PROGRAM`: whether a build is worse than an older one, measured in the same rounds.
//!
//! What is looked at are ratios within a round, new to old, of figures of which less is better. Their median's 95 %
//! interval is that of order statistics: it assumes nothing of how the ratios are distributed.

use std::fmt::Write as _;

use anyhow::{Result, ensure};

use super::measure::{Outcome, Sample};
use super::report::{median, samples};
use super::scenario::{Figure, Scenario};
use super::subject::Subject;

/// Above this the new build counts as worse.
const TOLERATED: f64 = 1.03;
/// How sure the interval is.
const CONFIDENCE: f64 = 0.95;

/// A figure of which less is better.
struct Measured {
    name: &'static str,
    of: fn(&Sample) -> f64,
    /// Whether the new build must not be worse. Tails vary too much from run to run to tell.
    decides: bool,
}

/// What is compared in a scenario.
fn measured(scenario: &Scenario) -> Vec<Measured> {
    if let Figure::Memory { .. } = scenario.figure {
        let of = |sample: &Sample| sample.kib_per_client.unwrap_or_default();
        return vec![Measured { name: "memory per client", of, decides: true }];
    }
    // At a fixed rate the time per query is what was asked for.
    let closed = !scenario.load.iter().any(|option| option.starts_with("--rate"));
    vec![
        Measured { name: "time per query", of: |sample| 1.0 / sample.qps, decides: closed },
        Measured { name: "CPU per query", of: |sample| sample.cpu_us, decides: true },
        Measured { name: "p99", of: |sample| sample.latency_us.p99, decides: false },
    ]
}

/// The median of ratios, and between which values it lies with a confidence of 95 %; none: too few rounds to tell.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ratio {
    median: f64,
    interval: Option<(f64, f64)>,
    rounds: usize,
}

fn ratio(scenario: &Scenario, outcomes: &[Outcome], of: fn(&Sample) -> f64) -> Option<Ratio> {
    let (new, old) = (samples(outcomes, scenario, Subject::Counterfoil), samples(outcomes, scenario, Subject::Before));
    let in_round = |round: u32| old.iter().find(|(other, _)| *other == round).map(|(_, sample)| of(sample));
    let ratios: Vec<f64> = new.iter().filter_map(|(round, sample)| Some(of(sample) / in_round(*round)?)).collect();
    let rounds = ratios.len();
    (rounds > 0).then(|| Ratio { median: median(ratios.iter().copied()), interval: interval(ratios), rounds })
}

/// The shortest pair of order statistics, equally far from both ends, between which the median of what the values were
/// drawn from lies with [`CONFIDENCE`]: it is below the k-th smallest of n values if fewer than k of them are below it,
/// and each is so with a probability of one half.
fn interval(mut values: Vec<f64>) -> Option<(f64, f64)> {
    values.sort_by(f64::total_cmp);
    let n = values.len() as u32;
    // The probability that exactly so many of n are below the median, and that fewer than k are.
    let (mut exactly, mut fewer, mut outermost) = (0.5_f64.powi(n as i32), 0.0, None);
    for k in 0..n.div_ceil(2) {
        fewer += exactly;
        if 2.0 * fewer > 1.0 - CONFIDENCE {
            break;
        }
        outermost = Some(k as usize);
        exactly *= f64::from(n - k) / f64::from(k + 1);
    }
    let k = outermost?;
    Some((values[k], values[values.len() - 1 - k]))
}

/// The lines of one scenario; nothing if there is no older build.
pub(super) fn table(scenario: &Scenario, outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for Measured { name, of, .. } in measured(scenario) {
        let Some(Ratio { median, interval, rounds }) = ratio(scenario, outcomes, of) else { continue };
        let interval = match interval {
            Some((low, high)) => format!("95 % interval {low:.3} to {high:.3}"),
            None => "no interval: it takes 6 rounds".to_owned(),
        };
        let _ = writeln!(text, "counterfoil / before: {name} {median:.3}, {interval}, {rounds} rounds");
    }
    text
}

/// # Errors
///
/// A scenario in which the new build is surely worse.
pub(super) fn verdict(scenarios: &[&'static Scenario], outcomes: &[Outcome]) -> Result<()> {
    let mut worse = Vec::new();
    for scenario in scenarios {
        for Measured { name, of, .. } in measured(scenario).into_iter().filter(|measured| measured.decides) {
            let interval = ratio(scenario, outcomes, of).and_then(|ratio| ratio.interval);
            if let Some((low, high)) = interval.filter(|(low, _)| *low > TOLERATED) {
                worse.push(format!("{}: {name} {low:.3} to {high:.3}", scenario.name));
            }
        }
    }
    ensure!(worse.is_empty(), "worse than before by more than 3 %: {}", worse.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::super::measure::tests::sample;
    use super::super::scenario;
    use super::*;

    #[test]
    fn the_interval_is_that_of_order_statistics() {
        let of = |n: u32| interval((1..=n).rev().map(f64::from).collect());
        // By the tables of the sign test: ranks (1, 6), (1, 8), (2, 9), (2, 10), (6, 15), (10, 21).
        assert_eq!(of(0), None);
        assert_eq!(of(5), None);
        assert_eq!(of(6), Some((1.0, 6.0)));
        assert_eq!(of(8), Some((1.0, 8.0)));
        assert_eq!(of(9), Some((2.0, 8.0)));
        assert_eq!(of(10), Some((2.0, 9.0)));
        assert_eq!(of(20), Some((6.0, 15.0)));
        assert_eq!(of(30), Some((10.0, 21.0)));
    }

    fn outcomes(ratios: &[f64]) -> Vec<Outcome> {
        let of = |subject, round, cpu_us| Outcome {
            scenario: "A",
            subject,
            round,
            sample: Ok(Sample { cpu_us, ..sample() }),
        };
        let round = |(at, ratio): (usize, &f64)| {
            let round = at as u32 + 1;
            // A machine whose speed drifts changes both alike.
            let drift = 10.0 * f64::from(round);
            [of(Subject::Before, round, drift), of(Subject::Counterfoil, round, drift * ratio)]
        };
        ratios.iter().enumerate().flat_map(round).collect()
    }

    #[test]
    fn only_what_is_surely_worse_fails() {
        let scenarios = scenario::choose(&["A".to_owned()]).unwrap();
        let verdict = |ratios: &[f64]| verdict(&scenarios, &outcomes(ratios)).map_err(|error| error.to_string());
        assert_eq!(verdict(&[1.0, 1.1, 0.9, 1.2, 1.02, 1.05]), Ok(()), "the interval reaches below");
        assert_eq!(verdict(&[1.2; 5]), Ok(()), "too few rounds to tell");
        let worse = verdict(&[1.04, 1.1, 1.06, 1.2, 1.05, 1.05]).unwrap_err();
        assert_eq!(worse, "worse than before by more than 3 %: A: CPU per query 1.040 to 1.200");
    }

    #[test]
    fn the_lines_say_what_was_found() {
        let scenario = scenario::choose(&["A".to_owned()]).unwrap()[0];
        assert_eq!(table(scenario, &[]), "");
        let lines = table(scenario, &outcomes(&[0.5, 1.5]));
        assert!(lines.contains("before: CPU per query 1.000, no interval: it takes 6 rounds, 2 rounds\n"), "{lines}");
        let lines = table(scenario, &outcomes(&[1.0, 1.1, 0.9, 1.2, 1.02, 1.06]));
        assert!(lines.contains("CPU per query 1.040, 95 % interval 0.900 to 1.200, 6 rounds\n"), "{lines}");
    }
}
