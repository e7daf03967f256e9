//! `cargo xtask soak`: what takes too long for CI, in parts of at most an hour on two cores.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::command::{self, say};
use crate::test::Cargo;
use crate::{fuzz, kernels};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only these parts, see --list; all of them if none is named
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(PARTS.map(|part| part.name)))]
    parts: Vec<String>,
    /// List the parts instead
    #[arg(long)]
    list: bool,
    /// Leave the eBPF program out; tests that need it fail
    #[arg(long)]
    no_ebpf: bool,
}

/// One part.
struct Part {
    name: &'static str,
    /// What is done; a row of README.md.
    what: &'static str,
    /// About how long it takes once everything is built, minutes.
    minutes: u64,
    run: Run,
}

enum Run {
    /// The tests whose names begin with `soak_`, the part's name and `_`.
    Tests,
    Fuzz,
    Kernels,
}

/// A part that takes longer is divided.
const LIMIT: Duration = Duration::from_secs(3600);

/// `#[ignore = "soak"]` keeps them out of `cargo test`, and the name puts them into a part.
const PREFIX: &str = "soak_";

const PARTS: [Part; 8] = [
    Part { name: "drills", what: "1,000 drills under 2,500 queries a second", minutes: 10, run: Run::Tests },
    Part {
        name: "healthy",
        what: "a million connections of healthy clients, with a harsh watchdog and with its defaults: nothing is found",
        minutes: 40,
        run: Run::Tests,
    },
    Part {
        name: "namespaces",
        what: "240,000 connections to one address over a veth pair: no port is left in TIME_WAIT",
        minutes: 3,
        run: Run::Tests,
    },
    Part {
        name: "dnsdist",
        what: "`watch --reap` beside dnsdist, which leaks a connection for each of 5,000 queries",
        minutes: 10,
        run: Run::Tests,
    },
    Part { name: "transfers", what: "a zone transfer of a million messages", minutes: 3, run: Run::Tests },
    Part {
        name: "isolation",
        what: "each attack of docs/isolation.md with every identity, over TCP and TLS",
        minutes: 30,
        run: Run::Tests,
    },
    Part { name: "fuzz", what: "each fuzz target for 60 s", minutes: 15, run: Run::Fuzz },
    Part { name: "kernels", what: "all kernels of `cargo xtask kernels`", minutes: 15, run: Run::Kernels },
];

/// Runs the parts, whatever becomes of those before.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.list {
        for Part { name, what, minutes, .. } in &PARTS {
            println!("{name:<11} {minutes:>3} min  {what}");
        }
        return Ok(());
    }
    let wanted = |part: &&Part| arguments.parts.is_empty() || arguments.parts.iter().any(|name| name == part.name);
    let mut cargo = None;
    let mut failed = Vec::new();
    for part in PARTS.iter().filter(wanted) {
        say(format_args!("soak: {}: {}", part.name, part.what));
        if cargo.is_none() && matches!(part.run, Run::Tests) {
            cargo = Some(Cargo::prepare(arguments.no_ebpf, None)?);
        }
        let begin = Instant::now();
        let outcome = match (&part.run, &cargo) {
            (Run::Fuzz, _) => fuzz::soak(),
            (Run::Kernels, _) => kernels::boot(&[], false),
            (Run::Tests, cargo) => cargo.as_ref().map_or(Ok(()), |cargo| tests(cargo, part)),
        };
        let took = begin.elapsed();
        let outcome =
            outcome.and_then(|()| if took > LIMIT { bail!("longer than an hour: divide it") } else { Ok(()) });
        let minutes = took.as_secs_f64() / 60.0;
        match outcome {
            Ok(()) => say(format_args!("soak: {}: passed, {minutes:.0} min", part.name)),
            Err(error) => {
                say(format_args!("soak: {}: FAILED after {minutes:.0} min: {error:#}", part.name));
                failed.push(part.name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("soak failed: {}", failed.join(", ")) }
}

fn tests(cargo: &Cargo, part: &Part) -> Result<()> {
    let filter = format!("{PREFIX}{}_", part.name);
    cargo.require_a_test(&filter, &["--ignored"])?;
    // One at a time: they load the machine, and some measure.
    let mut test = cargo.test();
    command::run(test.args(["--no-fail-fast", "--", "--ignored", "--nocapture", "--test-threads=1", &filter]))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use crate::{tidy, workspace};

    /// Names and attributes of the tests that `cargo test` leaves out as too long, and whatever is named like them.
    fn soaks() -> Vec<(String, bool)> {
        let mut found = Vec::new();
        for path in tidy::sources().unwrap() {
            let source = std::fs::read_to_string(path).unwrap();
            let lines: Vec<&str> = source.lines().collect();
            for (at, line) in lines.iter().enumerate() {
                let Some((name, _)) = line.trim().strip_prefix("fn ").and_then(|rest| rest.split_once('(')) else {
                    continue;
                };
                let attributes = lines[..at].iter().rev().take_while(|line| line.trim().starts_with("#["));
                let ignored = attributes.clone().any(|line| line.trim() == "#[ignore = \"soak\"]");
                let is_test = attributes.clone().any(|line| line.trim() == "#[test]");
                if ignored || is_test && name.starts_with(PREFIX) {
                    found.push((name.to_owned(), ignored));
                }
            }
        }
        found
    }

    #[test]
    fn each_soak_test_belongs_to_exactly_one_part() {
        let of = |part: &Part, name: &str| name.starts_with(&format!("{PREFIX}{}_", part.name));
        let tests = soaks();
        for (name, ignored) in &tests {
            let parts: Vec<&str> = PARTS.iter().filter(|part| of(part, name)).map(|part| part.name).collect();
            assert_eq!(
                (parts.len(), ignored),
                (1, &true),
                "{name}, in {parts:?}: `#[ignore = \"soak\"]` and soak_PART_..."
            );
        }
        for part in PARTS.iter().filter(|part| matches!(part.run, Run::Tests)) {
            assert!(tests.iter().any(|(name, _)| of(part, name)), "no test in {}", part.name);
        }
    }

    #[test]
    fn the_readme_has_each_part_and_none_is_too_long() {
        let readme = std::fs::read_to_string(workspace::root().join("README.md")).unwrap();
        for Part { name, what, minutes, .. } in &PARTS {
            let row = format!("| `{name}` | {what} | {minutes} min |");
            assert!(readme.lines().any(|line| line == row), "README.md lacks this row: {row}");
            assert!(Duration::from_secs(minutes * 60) < LIMIT, "{name}");
        }
    }
}
