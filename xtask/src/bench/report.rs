//! Medians, ratios to the relay, a table to read and the samples as JSON.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};

use super::Arguments;
use super::measure::{Handshakes, Outcome, Sample};
use super::regression;
use super::scenario::{Figure, Scenario};
use super::subject::Subject;
use super::tools::Tools;
use crate::command;
use crate::workspace;

/// The table of one scenario.
pub(super) fn table(scenario: &Scenario, subjects: &[Subject], outcomes: &[Outcome], arguments: &Arguments) -> String {
    let (rounds, seconds) = (arguments.rounds, arguments.seconds);
    let floor = if Subject::Relay.can(scenario) { Subject::Relay } else { Subject::Haproxy };
    let mut text = format!(
        "\n{}: {}\nmedian of {rounds} rounds of {seconds} s; x: median of the ratios to {} within a round; load, others: \
         cores that the load generator and other processes took\n",
        scenario.name,
        scenario.about,
        floor.name()
    );
    let [qps, cpu, ratio] = ["qps", "CPU us/q", "x"];
    let _ = writeln!(
        text,
        "{:<12}{qps:>11}{ratio:>8}{cpu:>10}{ratio:>8}{:>10}{:>10}{:>10}{:>9}{:>7}{:>6}{:>9}{:>6}{:>8}",
        "", "p50 us", "p99 us", "p99.9 us", "conns/q", "most", "left", "RSS MiB", "load", "others"
    );
    let floor = samples(outcomes, scenario, floor);
    let able = || subjects.iter().copied().filter(|subject| subject.can(scenario));
    for subject in able() {
        let own = samples(outcomes, scenario, subject);
        let runs = outcomes.iter().filter(|it| it.scenario == scenario.name && it.subject == subject).count();
        let _ = write!(text, "{:<12}", subject.name());
        if own.is_empty() {
            let _ = writeln!(text, " FAILED in all {runs} runs");
            continue;
        }
        text.push_str(&figures(&own, &floor));
        text.push_str(&more_figures(&own, scenario, arguments));
        if own.len() < runs {
            let _ = write!(text, "  FAILED in {} of {runs} runs", runs - own.len());
        }
        text.push('\n');
    }
    for peer in able().filter(|&peer| !peer.is_ours()) {
        let (own, other) = (samples(outcomes, scenario, Subject::Counterfoil), samples(outcomes, scenario, peer));
        text.push_str(&beside(&own, peer, &other));
    }
    text + &regression::table(scenario, outcomes)
}

/// The columns that all scenarios have.
fn figures(own: &[(u32, &Sample)], floor: &[(u32, &Sample)]) -> String {
    let of = |figure: fn(&Sample) -> f64| median(own.iter().map(|(_, sample)| figure(sample)));
    let ratio = |figure: fn(&Sample) -> f64| match median_ratio(own, floor, figure) {
        Some(ratio) => format!("{ratio:.2}"),
        None => "-".to_owned(),
    };
    let left = if own.iter().any(|(_, sample)| sample.left_open.is_some()) {
        format!("{:.0}", of(|sample| sample.left_open.unwrap_or_default() as f64))
    } else {
        "-".to_owned()
    };
    format!(
        "{:>11}{:>8}{:>10.2}{:>8}{:>10.0}{:>10.0}{:>10.0}{:>9.4}{:>7.0}{left:>6}{:>9.1}{:>6.2}{:>8.2}",
        thousands(of(|sample| sample.qps)),
        ratio(|sample| sample.qps),
        of(|sample| sample.cpu_us),
        ratio(|sample| sample.cpu_us),
        of(|sample| sample.latency_us.p50),
        of(|sample| sample.latency_us.p99),
        of(|sample| sample.latency_us.p999),
        of(|sample| sample.opened_per_query),
        of(|sample| sample.max_open as f64),
        of(|sample| sample.resident_kib as f64 / 1024.0),
        of(|sample| sample.generator_cores),
        of(|sample| sample.disturbance),
    )
}

/// What only some scenarios and runs have.
fn more_figures(own: &[(u32, &Sample)], scenario: &Scenario, arguments: &Arguments) -> String {
    let of = |figure: fn(&Sample) -> f64| median(own.iter().map(|(_, sample)| figure(sample)));
    let mut text = String::new();
    if scenario.tls {
        let of = |kind: fn(&Handshakes) -> u64| {
            median(own.iter().filter_map(|(_, sample)| sample.handshakes.as_ref()).map(|it| kind(it) as f64))
        };
        let (new, resumed) = (of(|it| it.new), of(|it| it.resumed));
        let _ = write!(text, "  handshakes: {new:.0} new, {resumed:.0} resumed");
    }
    if arguments.syscalls {
        let count = of(|sample| sample.syscalls_per_query.unwrap_or_default());
        let _ = write!(text, "  {count:.2} system calls per query");
    }
    if let Figure::Memory { .. } = scenario.figure {
        let _ = write!(text, "  {:.2} KiB per client", of(|sample| sample.kib_per_client.unwrap_or_default()));
    }
    text
}

/// Counterfoil's figures as ratios to those of one other; nothing if one of both was not measured.
fn beside(own: &[(u32, &Sample)], peer: Subject, other: &[(u32, &Sample)]) -> String {
    let ratio = |figure: fn(&Sample) -> f64| median_ratio(own, other, figure);
    let (Some(qps), Some(cpu), Some(p99)) =
        (ratio(|sample| sample.qps), ratio(|sample| sample.cpu_us), ratio(|sample| sample.latency_us.p99))
    else {
        return String::new();
    };
    format!("counterfoil / {}: qps {qps:.2}, CPU {cpu:.2}, p99 {p99:.2}\n", peer.name())
}

/// Everything, with what is needed to judge it later.
pub(super) fn json(
    tools: &Tools,
    arguments: &Arguments,
    outcomes: &[Outcome],
    others: Value,
    time: u64,
) -> Result<Value> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let git = command::output(
        command::program("git").args(["describe", "--always", "--dirty"]).current_dir(workspace::root()),
    );
    let mut report = json!({
        "unix_time": time,
        "commit": git.ok().map(|text| text.trim().to_owned()),
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "cpu": model.map(|(_, name)| name),
        "cpus": std::thread::available_parallelism()?.get(),
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "haproxy": tools.version("haproxy", "-v"),
        "dnsdist": tools.version("dnsdist", "--version"),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "runs": outcomes.iter().map(run).collect::<Vec<_>>(),
    });
    if let (Value::Object(report), Value::Object(others)) = (&mut report, others) {
        report.extend(others);
    }
    Ok(report)
}

/// A run: its sample, or why there is none.
fn run(outcome: &Outcome) -> Value {
    let (sample, error) = match &outcome.sample {
        Ok(sample) => (Some(sample), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    json!({
        "scenario": outcome.scenario, "subject": outcome.subject, "round": outcome.round,
        "sample": sample, "error": error,
    })
}

/// The good samples of a subject, with their rounds.
pub(super) fn samples<'a>(outcomes: &'a [Outcome], scenario: &Scenario, subject: Subject) -> Vec<(u32, &'a Sample)> {
    outcomes
        .iter()
        .filter(|outcome| outcome.scenario == scenario.name && outcome.subject == subject)
        .filter_map(|outcome| Some((outcome.round, outcome.sample.as_ref().ok()?)))
        .collect()
}

fn median_ratio(own: &[(u32, &Sample)], relay: &[(u32, &Sample)], figure: fn(&Sample) -> f64) -> Option<f64> {
    let ratios: Vec<f64> = own
        .iter()
        .filter_map(|(round, sample)| {
            let (_, floor) = relay.iter().find(|(other, _)| other == round)?;
            Some(figure(sample) / figure(floor))
        })
        .collect();
    if ratios.is_empty() { None } else { Some(median(ratios)) }
}

/// The middle value, or the mean of both middle values; 0 of nothing.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (None, _) => 0.0,
        (Some(value), 1) => *value,
        (Some(value), _) => (values[middle - 1] + value) / 2.0,
    }
}

/// The smallest value that so large a part of all values does not exceed; 0 of nothing.
pub(super) fn percentile(values: &[f64], part: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * part).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// 1234567.8 is 1,234,568.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::measure::tests::sample;
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([]), 0.0);
    }

    #[test]
    fn a_run_has_all_its_figures_or_its_error() {
        let outcome = |sample| Outcome { scenario: "A", subject: Subject::Haproxy, round: 2, sample };
        let good = run(&outcome(Ok(sample())));
        assert_eq!((&good["scenario"], &good["subject"], &good["round"]), (&json!("A"), &json!("haproxy"), &json!(2)));
        assert_eq!(good["error"], Value::Null);
        for (figure, value) in [
            ("answers", json!(1000)),
            ("qps", json!(500.0)),
            ("cpu_us", json!(11.5)),
            ("opened_per_query", json!(0.05)),
            ("max_open", json!(50)),
            ("left_open", json!(0)),
            ("resident_kib", json!(2048)),
            ("syscalls_per_query", json!(4.25)),
        ] {
            assert_eq!(good["sample"][figure], value, "{figure}");
        }
        assert_eq!(good["sample"]["latency_us"]["p999"], json!(99.0));
        let bad = run(&outcome(Err(anyhow::anyhow!("1 wrong"))));
        assert_eq!((&bad["sample"], &bad["error"]), (&Value::Null, &json!("1 wrong")));
    }

    #[test]
    fn the_table_has_medians_ratios_and_failures() {
        let scenario = super::super::scenario::choose(&["A".to_owned()]).into_iter().flatten().next();
        let Some(scenario) = scenario else { unreachable!("there is a scenario A") };
        let of = |subject, round, cpu_us| Outcome {
            scenario: scenario.name,
            subject,
            round,
            sample: Ok(Sample { cpu_us, ..sample() }),
        };
        let mut outcomes = vec![of(Subject::Relay, 1, 10.0), of(Subject::Relay, 2, 20.0)];
        outcomes.extend([of(Subject::Counterfoil, 1, 5.0), of(Subject::Counterfoil, 2, 30.0)]);
        let subjects = [Subject::Relay, Subject::Counterfoil, Subject::Dnsdist];
        outcomes.push(Outcome {
            scenario: scenario.name,
            subject: Subject::Dnsdist,
            round: 1,
            sample: Err(anyhow::anyhow!("1 missing")),
        });
        let arguments = <super::super::tests::Alone as clap::Parser>::parse_from(["bench", "--syscalls"]).arguments;
        let table = table(scenario, &subjects, &outcomes, &arguments);
        let line = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        // Ratios are those within a round: 0.5 and 1.5.
        let own: Vec<String> = line("counterfoil ").split_whitespace().map(str::to_owned).collect();
        assert_eq!(own[1..5], ["500", "1.00", "17.50", "1.00"], "{table}");
        assert!(line("counterfoil ").contains("4.25 system calls per query"), "{table}");
        assert!(line("dnsdist").contains("FAILED in all 1 runs"), "{table}");
        assert!(table.contains("counterfoil / relay: qps 1.00, CPU 1.00, p99 1.00"), "{table}");
    }

    #[test]
    fn percentiles() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(
            (percentile(&values, 0.99), percentile(&values, 0.5), percentile(&values, 1.0)),
            (198.0, 100.0, 200.0)
        );
        assert_eq!((percentile(&[3.0], 0.99), percentile(&[], 0.99)), (3.0, 0.0));
    }

    #[test]
    fn large_numbers_are_readable() {
        assert_eq!([0.4, 999.0, 1000.0, 1_234_567.8].map(thousands), ["0", "999", "1,000", "1,234,568"]);
    }
}
