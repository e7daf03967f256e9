//! `cargo xtask bench --cost`: what the kernel view costs, with and without it in turn.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Arguments;
use super::measure::{self, Plan, Sample};
use super::process::{Process, TempDir};
use super::report::{median, percentile};
use super::scenario::{self, Scenario};
use super::subject::Subject;
use super::tools::Tools;
use crate::command::say;

/// The load under which its share is measured.
const SCENARIOS: [&str; 2] = ["A", "D"];
/// What the two take turns with.
const WITH: &str = "ebpf";
const WITHOUT: &str = "none";

/// All samples.
#[derive(Debug, Serialize)]
pub(super) struct Cost {
    inside: Inside,
    shares: Vec<Share>,
}

/// What the program `kernel_cost` measures inside itself.
#[derive(Debug, Serialize, Deserialize)]
struct Inside {
    sockets: u64,
    sweep: Times,
    crosscheck: Times,
    connect_without: Times,
    connect_with: Times,
}

/// One value for each time that it was done, in microseconds.
#[derive(Debug, Serialize, Deserialize)]
struct Times {
    wall_us: Vec<f64>,
    cpu_us: Vec<f64>,
}

/// Counterfoil in one scenario: in each round once with the view and once without.
#[derive(Debug, Serialize)]
struct Share {
    scenario: &'static str,
    rounds: Vec<Round>,
}

#[derive(Debug, Serialize)]
struct Round {
    with: Sample,
    without: Sample,
}

/// Measures everything.
pub(super) fn measure(tools: &Tools, arguments: &Arguments) -> Result<Cost> {
    let inside = inside(tools)?;
    let mut shares = Vec::new();
    for scenario in scenario::choose(&SCENARIOS.map(str::to_owned))? {
        let rounds = (1..=arguments.rounds).map(|number| round(tools, arguments, scenario, number));
        shares.push(Share { scenario: scenario.name, rounds: rounds.collect::<Result<_>>()? });
    }
    Ok(Cost { inside, shares })
}

fn inside(tools: &Tools) -> Result<Inside> {
    say("cost: sweeps, and connections with and without the programs");
    let directory = TempDir::new()?;
    let mut program = Process::start("kernel_cost", &mut tools.own("kernel_cost"), directory.path())?;
    let inside: Inside = program.read().context("the cost of the eBPF view")?;
    let ended = program.finish()?;
    ensure!(ended.success(), "kernel_cost ended with {ended}");
    Ok(inside)
}

/// Who begins changes from round to round.
fn round(tools: &Tools, arguments: &Arguments, scenario: &Scenario, number: u32) -> Result<Round> {
    let run = |kernel_view: &'static str| {
        say(format_args!(
            "cost: {} round {number} of {}, kernel.view = {kernel_view}",
            scenario.name, arguments.rounds
        ));
        let plan = Plan { tools, seconds: arguments.seconds, syscalls: false, kernel_view };
        measure::sample(&plan, scenario, Subject::Counterfoil)
    };
    let with_first = number.is_multiple_of(2);
    let before = if with_first { Some(run(WITH)?) } else { None };
    let without = run(WITHOUT)?;
    let with = before.map_or_else(|| run(WITH), Ok)?;
    Ok(Round { with, without })
}

/// The table.
pub(super) fn table(cost: &Cost, arguments: &Arguments) -> String {
    let Inside { sockets, sweep, crosscheck, connect_without, connect_with } = &cost.inside;
    let mut text =
        format!("\nCost of the kernel view (eBPF)\n{:<34}{:>12}{:>12}{:>12}{:>12}\n", "", "wall", "p99", "CPU", "p99");
    for (what, times) in [("sweep", sweep), ("cross-check", crosscheck)] {
        let _ = writeln!(
            text,
            "{:<34}{:>9.2} ms{:>9.2} ms{:>9.2} ms{:>9.2} ms",
            format!("{what} of {sockets} sockets"),
            median(times.wall_us.iter().copied()) / 1e3,
            percentile(&times.wall_us, 0.99) / 1e3,
            median(times.cpu_us.iter().copied()) / 1e3,
            percentile(&times.cpu_us, 0.99) / 1e3,
        );
    }
    for (what, times) in
        [("connect and close, not attached", connect_without), ("connect and close, attached", connect_with)]
    {
        let _ = writeln!(
            text,
            "{what:<34}{:>9.2} us{:>9.2} us{:>9.2} us{:>9.2} us",
            median(times.wall_us.iter().copied()),
            percentile(&times.wall_us, 0.99),
            median(times.cpu_us.iter().copied()),
            percentile(&times.cpu_us, 0.99),
        );
    }
    let ratio = |with: &[f64], without: &[f64]| median(with.iter().zip(without).map(|(with, without)| with / without));
    let _ = writeln!(
        text,
        "attached / not attached, median of the ratios within a round: wall {:.3}, CPU {:.3}",
        ratio(&connect_with.wall_us, &connect_without.wall_us),
        ratio(&connect_with.cpu_us, &connect_without.cpu_us)
    );
    let _ = writeln!(
        text,
        "\n{:<12}{:>16}{:>16}{:>14}{:>22}{:>8}\nmedian of {} rounds of {} s; x: median of the ratios within a round",
        "scenario",
        "CPU us/q, ebpf",
        "CPU us/q, none",
        "x (ebpf/none)",
        "watchdog's thread",
        "others",
        arguments.rounds,
        arguments.seconds
    );
    for share in &cost.shares {
        let of = |figure: fn(&Round) -> f64| median(share.rounds.iter().map(figure));
        let _ = writeln!(
            text,
            "{:<12}{:>16.2}{:>16.2}{:>14.3}{:>15.2} % CPU{:>9.2}",
            share.scenario,
            of(|round| round.with.cpu_us),
            of(|round| round.without.cpu_us),
            of(|round| round.with.cpu_us / round.without.cpu_us),
            of(|round| 100.0 * round.with.watchdog_share.unwrap_or_default()),
            of(|round| round.with.disturbance.max(round.without.disturbance)),
        );
    }
    text
}
