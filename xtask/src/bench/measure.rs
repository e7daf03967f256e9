//! One run of one subject in one scenario.

use std::net::SocketAddrV4;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::process::{self, Process, TempDir};
use super::scenario::{Figure, Header, Scenario};
use super::subject::{Listening, Subject};
use super::syscalls::Counter;
use super::tools::Tools;

/// After so long nothing of a one-query connection may be left.
const SETTLE: Duration = Duration::from_secs(1);

/// What all runs have in common.
pub(super) struct Plan<'a> {
    pub(super) tools: &'a Tools,
    pub(super) seconds: f64,
    pub(super) syscalls: bool,
    /// `kernel.view` of Counterfoil.
    pub(super) kernel_view: &'static str,
}

/// A run and what came of it.
pub(super) struct Outcome {
    pub(super) scenario: &'static str,
    pub(super) subject: Subject,
    pub(super) round: u32,
    pub(super) sample: Result<Sample>,
}

/// The figures of one run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Sample {
    pub(super) answers: u64,
    pub(super) qps: f64,
    /// CPU time of the subject's process per query, in microseconds.
    pub(super) cpu_us: f64,
    /// The part of it that Counterfoil's watchdog took.
    pub(super) watchdog_share: Option<f64>,
    pub(super) latency_us: Latency,
    /// Connections to the backend, per query.
    pub(super) opened_per_query: f64,
    /// Connections to the backend open at the same time.
    pub(super) max_open: u64,
    /// Of these, those open 1 s after the last answer, the clients still being there; in scenarios with TLVs.
    pub(super) left_open: Option<u64>,
    /// Resident memory at the end of the load, in KiB.
    pub(super) resident_kib: u64,
    /// Growth of the resident memory per client, in KiB, in scenarios that ask for it.
    pub(super) kib_per_client: Option<f64>,
    /// CPU that processes outside of the benchmark took meanwhile, in cores: how far to trust the rest.
    pub(super) disturbance: f64,
    /// CPU that the load generator took, in cores. It has one thread: near 1 it is what limits `qps`.
    pub(super) generator_cores: f64,
    /// TLS handshakes, in scenarios with TLS.
    pub(super) handshakes: Option<Handshakes>,
    /// System calls of the subject's process per query, if they were counted.
    pub(super) syscalls_per_query: Option<f64>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Latency {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

/// Of the connections between clients and subject, as the clients saw them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Handshakes {
    /// Full ones.
    pub(super) new: u64,
    /// Those that took up an earlier session.
    pub(super) resumed: u64,
}

/// What the load generator says.
#[derive(Deserialize)]
struct Load {
    queries: u64,
    answers: u64,
    qps: f64,
    latency_us: Latency,
    wrong: u64,
    unexpected: u64,
    missing: u64,
    closed: u64,
    handshakes: Option<Handshakes>,
    first_fault: Option<String>,
}

/// What the answerer says.
#[derive(Default, Deserialize)]
struct Counts {
    opened: u64,
    open: u64,
    max_open: u64,
    answers: u64,
    faults: u64,
    first_fault: Option<String>,
}

/// Starts backend, subject and load, measures, and stops them.
pub(super) fn sample(plan: &Plan, scenario: &Scenario, subject: Subject) -> Result<Sample> {
    let directory = TempDir::new()?;
    let mut command = plan.tools.own("answerer");
    command.args(scenario.checks());
    if scenario.backend_tls {
        command.arg("--tls").arg(plan.tools.certificate().directory());
    }
    let mut answerer = Process::start("answerer", &mut command, directory.path())?;
    let Listening { address: backend } = answerer.read()?;
    let running = subject.start(plan, scenario, backend, &directory)?;

    let counter = if plan.syscalls { Some(Counter::start(&running.process, &directory)?) } else { None };
    let (start, machine_before, answerer_before) = (Instant::now(), process::machine_cpu()?, answerer.cpu()?);
    let watchdog_before = running.watchdog_cpu()?;
    let (cpu_before, resident_before) = (running.process.cpu()?, running.process.resident()?);
    let mut command = load_generator(plan, running.address, scenario.load);
    if scenario.tls {
        command.arg("--tls").arg(plan.tools.certificate().certificate());
    }
    let mut generator = Process::start("loadgen", &mut command, directory.path())?;
    let load: Load = generator.read()?;
    let (cpu_after, resident) = (running.process.cpu()?, running.process.resident()?);
    let watchdog = running.watchdog_cpu()?.zip(watchdog_before).map(|(after, before)| after.saturating_sub(before));
    let (machine_after, answerer_after) = (process::machine_cpu()?, answerer.cpu()?);
    let cpu = cpu_after.saturating_sub(cpu_before);
    let generator_cpu = generator.cpu()?;
    let ours = cpu + answerer_after.saturating_sub(answerer_before) + generator_cpu;
    let others = machine_after.saturating_sub(machine_before).saturating_sub(ours);
    let elapsed = start.elapsed().as_nanos() as f64;
    let syscalls = counter.map(Counter::finish).transpose()?;
    let counts = ask(&mut answerer)?;
    let left_open = match scenario.header {
        Header::None | Header::Address => None,
        Header::Label => {
            std::thread::sleep(SETTLE);
            Some(ask(&mut answerer)?.open)
        }
    };
    let ended = generator.finish()?;
    check(&load, &counts)?;
    if let Some(handshakes) = load.handshakes {
        check_handshakes(scenario, subject, handshakes)?;
    }
    if !ended.success() {
        bail!("the load generator ended with {ended}");
    }
    running.stop()?;

    let answers = load.answers as f64;
    Ok(Sample {
        answers: load.answers,
        qps: load.qps,
        cpu_us: cpu as f64 / 1000.0 / answers,
        watchdog_share: watchdog.map(|watchdog| watchdog as f64 / cpu as f64),
        latency_us: load.latency_us,
        opened_per_query: counts.opened as f64 / answers,
        max_open: counts.max_open,
        left_open,
        resident_kib: resident,
        disturbance: others as f64 / elapsed,
        generator_cores: generator_cpu as f64 / elapsed,
        handshakes: load.handshakes,
        syscalls_per_query: syscalls.map(|count| count as f64 / answers),
        kib_per_client: match scenario.figure {
            Figure::Speed => None,
            Figure::Memory { clients } => Some(resident.saturating_sub(resident_before) as f64 / f64::from(clients)),
        },
    })
}

/// Asks who listens at `address`; the connections stay open until it is told to end.
fn load_generator(plan: &Plan, address: SocketAddrV4, load: &[&str]) -> Command {
    let mut command = plan.tools.own("loadgen");
    command.arg(address.to_string()).arg("--hold");
    if !load.iter().any(|option| option.starts_with("--seconds")) {
        command.arg(format!("--seconds={}", plan.seconds));
    }
    command.args(load);
    command
}

/// The latency of a load generator's queries, all of which must have been answered.
pub(super) fn neighbours(generator: &mut Process) -> Result<Latency> {
    let load: Load = generator.read()?;
    check(&load, &Counts { answers: load.answers, ..Counts::default() })?;
    Ok(load.latency_us)
}

/// CPU time per query, in microseconds, of the backend itself when the clients ask it directly: one thread that reads and
/// writes. What it costs more as connections grow is the kernel's and the machine's.
pub(super) fn bare(plan: &Plan, load: &[&str]) -> Result<f64> {
    let directory = TempDir::new()?;
    let mut answerer = Process::start("answerer", &mut plan.tools.own("answerer"), directory.path())?;
    let Listening { address } = answerer.read()?;
    let before = answerer.cpu()?;
    let mut generator = Process::start("loadgen", &mut load_generator(plan, address, load), directory.path())?;
    let load: Load = generator.read()?;
    let cpu = answerer.cpu()?.saturating_sub(before);
    let counts = ask(&mut answerer)?;
    let ended = generator.finish()?;
    check(&load, &counts)?;
    if !ended.success() {
        bail!("the load generator ended with {ended}");
    }
    Ok(cpu as f64 / 1000.0 / load.answers as f64)
}

fn ask(answerer: &mut Process) -> Result<Counts> {
    answerer.write("counts")?;
    answerer.read().context("the answerer's counts")
}

/// Every query must have been answered, rightly and under the right header.
fn check(load: &Load, counts: &Counts) -> Result<()> {
    if counts.faults > 0 {
        let first = counts.first_fault.as_deref().unwrap_or("unknown");
        bail!("the backend refused {} connections, the first for: {first}", counts.faults);
    }
    let Load { queries, answers, wrong, unexpected, missing, closed, .. } = load;
    if wrong + unexpected + missing + closed > 0 || answers != queries {
        let first = load.first_fault.as_deref().unwrap_or("unknown");
        bail!(
            "of {queries} queries {answers} were answered rightly: {wrong} wrong, {unexpected} unexpected, \
             {missing} missing answers, {closed} connections lost; first: {first}"
        );
    }
    if *answers == 0 {
        bail!("no query was answered");
    }
    if counts.answers < *answers {
        bail!("{answers} answers reached the clients but the backend gave only {}", counts.answers);
    }
    Ok(())
}

/// Where sessions are to be resumed, only a client's first handshake may be a new one. The load generator makes no other
/// if it holds a ticket, so too many are the subject's doing: it gave none. dnsdist's OpenSSL gives two after a full
/// handshake and none after a resumed one, which makes one in three new.
fn check_handshakes(scenario: &Scenario, subject: Subject, handshakes: Handshakes) -> Result<()> {
    let Handshakes { new, resumed } = handshakes;
    let one_in_three = if subject == Subject::Dnsdist { resumed / 2 } else { 0 };
    if scenario.resumes() && new > scenario.clients() + one_in_three {
        bail!("{new} TLS handshakes were new and only {resumed} resumed");
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    pub(in crate::bench) fn sample() -> Sample {
        Sample {
            answers: 1000,
            qps: 500.0,
            cpu_us: 11.5,
            watchdog_share: None,
            latency_us: Latency { mean: 2.0, p50: 1.0, p99: 9.0, p999: 99.0, max: 100.0 },
            opened_per_query: 0.05,
            max_open: 50,
            left_open: Some(0),
            resident_kib: 2048,
            kib_per_client: None,
            disturbance: 0.1,
            generator_cores: 0.7,
            handshakes: None,
            syscalls_per_query: Some(4.25),
        }
    }

    #[test]
    fn a_run_with_a_wrong_or_missing_answer_fails() {
        let load = |changed: &str| -> Load {
            let mut load = serde_json::json!({
                "queries": 10, "answers": 10, "qps": 5.0, "wrong": 0, "unexpected": 0, "missing": 0, "closed": 0,
                "latency_us": {"mean": 1.0, "p50": 1.0, "p99": 1.0, "p999": 1.0, "max": 1.0},
            });
            if !changed.is_empty() {
                load[changed] = 1.into();
            }
            serde_json::from_value(load).unwrap()
        };
        let counts = |answers, faults| Counts { opened: 1, open: 0, max_open: 1, answers, faults, first_fault: None };
        let check = |load: &Load, counts: &Counts| check(load, counts).map_err(|error| error.to_string());
        assert_eq!(check(&load(""), &counts(10, 0)), Ok(()));
        for (changed, expected) in [
            ("wrong", "of 10 queries 10 were answered rightly: 1 wrong"),
            ("unexpected", "1 unexpected"),
            ("missing", "1 missing answers"),
            ("closed", "1 connections lost"),
            ("answers", "of 10 queries 1 were answered rightly"),
        ] {
            let failed = check(&load(changed), &counts(10, 0)).unwrap_err();
            assert!(failed.contains(expected), "{failed}");
        }
        assert!(check(&load(""), &counts(10, 2)).unwrap_err().contains("refused 2 connections"));
        assert!(check(&load(""), &counts(9, 0)).unwrap_err().contains("the backend gave only 9"));
        let nothing = Load { queries: 0, answers: 0, ..load("") };
        assert_eq!(check(&nothing, &counts(0, 0)), Err("no query was answered".to_owned()));
    }

    #[test]
    fn a_run_whose_sessions_are_not_resumed_fails() {
        let scenario = |name: &str| *super::super::scenario::choose(&[name.to_owned()]).unwrap().first().unwrap();
        let check = |name, subject, new, resumed| {
            check_handshakes(scenario(name), subject, Handshakes { new, resumed }).map_err(|error| error.to_string())
        };
        assert_eq!(check("Th-new", Subject::Haproxy, 1000, 0), Ok(()));
        assert_eq!(check("Th-res", Subject::Haproxy, 50, 950), Ok(()));
        let fault = Err("51 TLS handshakes were new and only 949 resumed".to_owned());
        assert_eq!(check("Th-res", Subject::Haproxy, 51, 949), fault);
        assert_eq!(check("Th-res", Subject::Dnsdist, 340, 660), Ok(()));
        assert!(check("Th-res", Subject::Dnsdist, 500, 500).is_err());
    }
}
