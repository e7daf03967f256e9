//! `cargo xtask bench N`: what good clients notice of a bad one. For each attack Counterfoil runs with it and without it in
//! turn, under the same configuration and with the same neighbours.

use std::fmt::Write as _;
use std::net::SocketAddrV4;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use super::Arguments;
use super::measure::{self, Latency};
use super::process::{Process, TempDir};
use super::report::median;
use super::subject::{self, Listening, Subject};
use super::tools::Tools;
use crate::command::say;

/// The name of the scenario.
pub(super) const NAME: &str = "N";
/// What `--list` says of it.
pub(super) const ABOUT: &str =
    "eight good clients beside each attack of docs/isolation.md, with it and without it in turn";

/// With an attack p99 is at most so many times what it is without...
const TIMES: f64 = 2.0;
/// ... or this, where that is more, in microseconds.
const AT_LEAST: f64 = 5000.0;

/// One attack, and the configuration in which it hurts most.
#[derive(Debug)]
struct Attack {
    /// As the attacker calls it.
    name: &'static str,
    workers: u32,
    /// Keys of the listener, of the pool, of the backend, and of `[connections]`.
    listener: &'static str,
    pool: &'static str,
    backend: &'static str,
    connections: &'static str,
    tls: bool,
    /// What the backend is told.
    answerer: &'static [&'static str],
    /// What the neighbours' load generator is told.
    load: &'static [&'static str],
}

const BASE: Attack = Attack {
    name: "",
    workers: 1,
    listener: "",
    pool: "",
    backend: "",
    connections: "",
    tls: false,
    answerer: &["--scripted"],
    load: &["--clients=8", "--rate=2000", "--sources=8"],
};

const BY_CONNECTION: &str = "[pool.proxy_protocol]\nidentity = \"connection\"\n";
const BY_LABEL: &str = "[pool.proxy_protocol]\nidentity = \"address\"\n\
                        [[pool.proxy_protocol.tlv]]\ntype = 0xE0\nvalue = \"{qname_label:1}\"\n";

const ATTACKS: [Attack; 11] = [
    Attack { name: "pointers", ..BASE },
    Attack { name: "poison", ..BASE },
    Attack { name: "turned-away", pool: BY_CONNECTION, answerer: &["--scripted", "--proxy", "--turn-away"], ..BASE },
    Attack { name: "deaf", ..BASE },
    Attack { name: "busy", workers: 2, backend: "max_connections = 1\n", ..BASE },
    Attack { name: "crowd", backend: "max_connections = 2\n", ..BASE },
    Attack {
        name: "slow-names",
        pool: BY_LABEL,
        // Taken after half a second.
        backend: "max_connections = 64\n",
        answerer: &["--scripted", "--proxy", "--delay=4000"],
        // A name of its own for each query is a connection of its own.
        load: &["--clients=8", "--rate=200", "--sources=8"],
        ..BASE
    },
    Attack {
        name: "silent",
        tls: true,
        listener: "tls.max_handshakes = 200\n",
        load: &["--clients=4", "--per-connection=1", "--sources=8"],
        ..BASE
    },
    Attack { name: "silent", listener: "accept_proxy.from = [\"127.9.0.0/16\"]\nmax_connections = 400\n", ..BASE },
    Attack { name: "odd", ..BASE },
    Attack { name: "malformed", ..BASE },
];

impl Attack {
    /// What it is called in the table.
    fn title(&self) -> String {
        match (self.name, self.tls) {
            ("silent", true) => "silent, TLS handshakes".to_owned(),
            ("silent", false) => "silent, PROXY headers".to_owned(),
            (name, _) => name.to_owned(),
        }
    }

    fn config(&self, tools: &Tools, backend: SocketAddrV4, directory: &TempDir) -> String {
        let Self { workers, listener, pool, backend: keys, connections, .. } = self;
        let certificate = tools.certificate();
        let tls = if self.tls {
            format!(
                "tls.certificate = \"{}\"\ntls.key = \"{}\"\n",
                certificate.certificate().display(),
                certificate.key().display()
            )
        } else {
            String::new()
        };
        let socket = directory.path().join("counterfoil.sock");
        format!(
            "[server]\nworkers = {workers}\n\
             [[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:0\"\npool = \"answerers\"\nidle_timeout = \"60s\"\n\
             {listener}{tls}\
             [[pool]]\nname = \"answerers\"\n{pool}\
             [[pool.backend]]\nname = \"answerer\"\naddress = \"{backend}\"\n{keys}health.mode = \"up\"\n\
             [connections]\nidle_timeout = \"60s\"\n{connections}\
             [admin]\nhttp = \"127.0.0.1:0\"\nsocket = \"{}\"\n",
            socket.display()
        )
    }
}

/// One round of one attack.
#[derive(Debug, Serialize)]
struct Round {
    with: Latency,
    without: Latency,
}

/// All rounds of one attack.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    attack: String,
    rounds: Vec<Round>,
    errors: Vec<String>,
}

impl Measured {
    fn median(&self, of: fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(of))
    }

    /// What the neighbours' p99 may be under the attack, in microseconds.
    fn bound(&self) -> f64 {
        (TIMES * self.median(|round| round.without.p99)).max(AT_LEAST)
    }

    fn is_good(&self) -> bool {
        self.errors.is_empty() && self.median(|round| round.with.p99) <= self.bound()
    }
}

/// Measures every attack.
pub(super) fn measure(tools: &Tools, arguments: &Arguments) -> Vec<Measured> {
    let of = |attack: &Attack| {
        let mut measured = Measured { attack: attack.title(), rounds: Vec::new(), errors: Vec::new() };
        for number in 1..=arguments.rounds {
            say(format_args!("{NAME} round {number} of {}: {}", arguments.rounds, measured.attack));
            match round(tools, arguments, attack, number) {
                Ok(round) => measured.rounds.push(round),
                Err(error) => {
                    say(format_args!("{NAME} {} failed: {error:#}", measured.attack));
                    measured.errors.push(format!("{error:#}"));
                }
            }
        }
        measured
    };
    ATTACKS.iter().map(of).collect()
}

/// Who begins changes from round to round.
fn round(tools: &Tools, arguments: &Arguments, attack: &Attack, number: u32) -> Result<Round> {
    let run = |attacked| run(tools, arguments, attack, attacked);
    let first = run(number.is_multiple_of(2))?;
    let second = run(!number.is_multiple_of(2))?;
    let (with, without) = if number.is_multiple_of(2) { (first, second) } else { (second, first) };
    Ok(Round { with, without })
}

/// The neighbours' latency, with an attacker or without. All of their queries must be answered.
fn run(tools: &Tools, arguments: &Arguments, attack: &Attack, attacked: bool) -> Result<Latency> {
    let directory = TempDir::new()?;
    let mut answerer = Process::start("answerer", tools.own("answerer").args(attack.answerer), directory.path())?;
    let Listening { address: backend } = answerer.read()?;
    let config = attack.config(tools, backend, &directory);
    let running = subject::start_counterfoil(tools, Subject::Counterfoil, &config, &directory)?;

    let attacker = if attacked {
        let mut command = tools.own("attacker");
        let mut attacker =
            Process::start("attacker", command.arg(running.address.to_string()).arg(attack.name), directory.path())?;
        let said: serde_json::Value = attacker.read().with_context(|| format!("the attack {}", attack.name))?;
        ensure!(said["attacking"] == true, "the attacker said {said}");
        Some(attacker)
    } else {
        None
    };
    let mut load = tools.own("loadgen");
    load.arg(running.address.to_string()).arg(format!("--seconds={}", arguments.seconds)).args(attack.load);
    if attack.tls {
        load.arg("--tls").arg(tools.certificate().certificate());
    }
    let mut generator = Process::start("loadgen", &mut load, directory.path())?;
    let latency = measure::neighbours(&mut generator)?;
    let ended = generator.finish()?;
    ensure!(ended.success(), "the load generator ended with {ended}");
    drop(attacker);
    running.stop()?;
    Ok(latency)
}

/// The table.
pub(super) fn table(measured: &[Measured], arguments: &Arguments) -> String {
    let mut text = format!(
        "\n{NAME}: {ABOUT}\nmedian of {} rounds of {} s, us; p99 with an attack is at most {TIMES} times \
         what it is without, or {AT_LEAST:.0}\n{:<26}{:>12}{:>12}{:>12}{:>12}{:>12}\n",
        arguments.rounds, arguments.seconds, "", "p50", "attacked", "p99", "attacked", "at most"
    );
    for attack in measured {
        let _ = write!(text, "{:<26}", attack.attack);
        if attack.rounds.is_empty() {
            let _ = writeln!(text, " FAILED in all {} rounds: {}", attack.errors.len(), attack.errors.join("; "));
            continue;
        }
        let verdict = if attack.is_good() { "" } else { "  FAILED" };
        let _ = writeln!(
            text,
            "{:>12.0}{:>12.0}{:>12.0}{:>12.0}{:>12.0}{verdict}",
            attack.median(|round| round.without.p50),
            attack.median(|round| round.with.p50),
            attack.median(|round| round.without.p99),
            attack.median(|round| round.with.p99),
            attack.bound(),
        );
        if let Some(error) = attack.errors.first() {
            let _ = writeln!(text, "    failed in {} rounds, first: {error}", attack.errors.len());
        }
    }
    text
}

/// # Errors
///
/// Neighbours were not served, or too late.
pub(super) fn verdict(measured: &[Measured]) -> Result<()> {
    let bad: Vec<&str> =
        measured.iter().filter(|attack| !attack.is_good()).map(|attack| attack.attack.as_str()).collect();
    ensure!(bad.is_empty(), "{NAME}: neighbours suffer from: {}", bad.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(with: &[f64], without: &[f64], errors: usize) -> Measured {
        let latency = |p99| Latency { mean: 1.0, p50: 1.0, p99, p999: p99, max: p99 };
        let rounds = with.iter().zip(without);
        Measured {
            attack: "crowd".to_owned(),
            rounds: rounds.map(|(with, without)| Round { with: latency(*with), without: latency(*without) }).collect(),
            errors: vec!["of 9 queries 8 were answered rightly".to_owned(); errors],
        }
    }

    #[test]
    fn neighbours_may_wait_twice_as_long_or_five_milliseconds() {
        for (with, without, errors, good) in [
            (4999.0, 100.0, 0, true),
            (5001.0, 100.0, 0, false),
            (7999.0, 4000.0, 0, true),
            (8001.0, 4000.0, 0, false),
            (100.0, 100.0, 1, false),
        ] {
            let measured = measured(&[with; 3], &[without; 3], errors);
            assert_eq!(verdict(&[measured]).is_ok(), good, "{with} {without} {errors}");
        }
        assert!(verdict(&[measured(&[1.0, 9000.0, 2.0], &[1.0; 3], 0)]).is_ok(), "medians count");
        let text = table(
            &[measured(&[9000.0], &[1.0], 0)],
            &<super::super::tests::Alone as clap::Parser>::parse_from(["bench"]).arguments,
        );
        assert!(text.contains("FAILED"), "{text}");
    }
}
