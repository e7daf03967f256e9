//! `cargo xtask bench`: Counterfoil beside a relay that knows no DNS, HAProxy and dnsdist, on loopback.
//!
//! Everything shares the machine's cores and the numbers drift by a third within an hour, so the subjects take turns and
//! only ratios within one run count. A wrong or missing answer fails the benchmark.

mod certificate;
mod cost;
mod curve;
mod measure;
mod neighbours;
mod process;
mod regression;
mod report;
mod scenario;
mod subject;
mod syscalls;
mod tools;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::command::say;
use curve::Point;
use measure::{Outcome, Plan};
use scenario::Scenario;
use subject::Subject;
use tools::Tools;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Scenarios to run, by name; `all` is every one. Without any: A B C E1
    scenarios: Vec<String>,
    /// Rounds; in each, every program runs every scenario once
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of load in each run
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Only these programs, separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Subject>,
    /// Measure this Counterfoil instead of building one
    #[arg(long, value_name = "PROGRAM")]
    counterfoil: Option<PathBuf>,
    /// Measure this older build of Counterfoil, too, and fail where the new one is more than 3 % worse, surely: where the 95 %
    /// interval of the ratio's median, which takes 6 rounds, lies wholly above 1.03
    #[arg(long, value_name = "PROGRAM")]
    before: Option<PathBuf>,
    /// Build Counterfoil without the eBPF program
    #[arg(long, conflicts_with = "counterfoil")]
    no_ebpf: bool,
    /// Count system calls too, by `perf` (Debian: linux-perf); the counting costs the programs some time
    #[arg(long)]
    syscalls: bool,
    /// Measure what the kernel view costs; without scenarios, only that. Part of `all`
    #[arg(long, conflicts_with = "no_ebpf")]
    cost: bool,
    /// Measure what a query costs Counterfoil as connections, queries in flight and TLV sets grow; without scenarios, only
    /// that
    #[arg(long)]
    curves: bool,
    /// List the scenarios and stop
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.list {
        for scenario in scenario::ALL {
            println!("{:<7} {}", scenario.name, scenario.about);
        }
        println!("{:<7} {}", neighbours::NAME, neighbours::ABOUT);
        return Ok(());
    }
    let (attacked, names): (Vec<String>, Vec<String>) =
        arguments.scenarios.iter().cloned().partition(|name| name == neighbours::NAME);
    let attacked = !attacked.is_empty() || names.iter().any(|name| name == scenario::EVERY);
    let only_own = (arguments.cost || arguments.curves || attacked) && names.is_empty();
    let scenarios = if only_own { Vec::new() } else { scenario::choose(&names)? };
    let mut subjects = match () {
        () if only_own => vec![Subject::Counterfoil],
        () if arguments.only.is_empty() => Subject::ALL.to_vec(),
        () => arguments.only.clone(),
    };
    if arguments.before.is_some() && !only_own {
        let beside = subjects.iter().position(|subject| *subject == Subject::Counterfoil).unwrap_or(subjects.len());
        subjects.insert(beside, Subject::Before);
    }
    let wants_cost =
        arguments.cost || !arguments.no_ebpf && arguments.scenarios.iter().any(|name| name == scenario::EVERY);
    process::raise_descriptor_limit()?;
    let tools = Tools::get(arguments, &subjects, wants_cost)?;
    let plan = Plan { tools: &tools, seconds: arguments.seconds, syscalls: arguments.syscalls, kernel_view: "auto" };

    let mut outcomes = Vec::new();
    for scenario in &scenarios {
        outcomes.extend(run_scenario(&plan, scenario, &subjects, arguments.rounds));
        print!("{}", report::table(scenario, &subjects, &outcomes, arguments));
    }
    let cost = if wants_cost { Some(cost::measure(&tools, arguments)?) } else { None };
    if let Some(cost) = &cost {
        print!("{}", cost::table(cost, arguments));
    }
    let neighbours = if attacked { neighbours::measure(&tools, arguments) } else { Vec::new() };
    if attacked {
        print!("{}", neighbours::table(&neighbours, arguments));
    }
    let curves = if arguments.curves { curve::measure(&plan, arguments) } else { Vec::new() };
    if arguments.curves {
        print!("{}", curve::tables(&curves, arguments));
    }
    let others = json!({ "cost": cost, "curves": curves, "neighbours": neighbours });
    let path = save(&tools, arguments, &outcomes, others)?;
    say(format_args!("all samples are in {}", path.display()));
    verdict(&outcomes, &curves)?;
    neighbours::verdict(&neighbours)?;
    regression::verdict(&scenarios, &outcomes)
}

/// # Errors
///
/// A run failed.
fn verdict(outcomes: &[Outcome], curves: &[Point]) -> Result<()> {
    let failed = outcomes.iter().filter(|outcome| outcome.sample.is_err()).count();
    let failed = failed + curves.iter().map(Point::failed).sum::<usize>();
    ensure!(failed == 0, "{failed} runs failed");
    Ok(())
}

/// The subjects take turns, round by round.
fn run_scenario(plan: &Plan, scenario: &'static Scenario, subjects: &[Subject], rounds: u32) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for round in 1..=rounds {
        // A machine that is faster at first, or later, favours nobody.
        let turns: Vec<&Subject> =
            if round % 2 == 0 { subjects.iter().rev().collect() } else { subjects.iter().collect() };
        for &subject in turns.into_iter().filter(|subject| subject.can(scenario)) {
            say(format_args!("{} round {round} of {rounds}: {}", scenario.name, subject.name()));
            let sample = measure::sample(plan, scenario, subject);
            if let Err(error) = &sample {
                say(format_args!("{} with {} failed: {error:#}", scenario.name, subject.name()));
            }
            outcomes.push(Outcome { scenario: scenario.name, subject, round, sample });
        }
    }
    outcomes
}

fn save(tools: &Tools, arguments: &Arguments, outcomes: &[Outcome], others: serde_json::Value) -> Result<PathBuf> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let contents = serde_json::to_vec_pretty(&report::json(tools, arguments, outcomes, others, now)?)?;
    let directory = tools.target().join("bench");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let path = directory.join(format!("{now}.json"));
    for path in [&path, &directory.join("latest.json")] {
        std::fs::write(path, &contents).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    use measure::tests::sample;

    /// The command line of this command alone.
    #[derive(clap::Parser)]
    pub(super) struct Alone {
        #[command(flatten)]
        pub(super) arguments: Arguments,
    }

    #[test]
    fn one_failed_run_among_many_fails_the_bench() {
        let outcome = |round, sample| Outcome { scenario: "A", subject: Subject::Counterfoil, round, sample };
        let mut outcomes: Vec<Outcome> = (1..=3).map(|round| outcome(round, Ok(sample()))).collect();
        assert!(verdict(&outcomes, &[]).is_ok());
        outcomes.push(outcome(4, Err(anyhow::anyhow!("of 9 queries 8 were answered rightly"))));
        assert!(verdict(&outcomes, &[]).is_err_and(|error| error.to_string() == "1 runs failed"));
    }
}
