//! `counterfoil check-config` from outside: what it prints is a configuration again, and its forecast goes by this machine.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{message, program};
use counterfoil_tests::process::{self, Process};
use counterfoil_tests::tempdir::TempDir;

const SOON: Duration = Duration::from_secs(20);
const README: &str = include_str!("../../README.md");

/// What it says of this text, with this RLIMIT_NOFILE: first what it warns of, then the rest.
fn checked(text: &str, descriptors: u32) -> Vec<String> {
    let dir = TempDir::new("check");
    let file = dir.write("counterfoil.toml", text).display().to_string();
    let (limit, program) = (format!("--nofile={descriptors}"), program().display().to_string());
    let (ok, output) = process::run("prlimit", &[&limit, "--", &program, "check-config", &file], SOON);
    assert!(ok, "{output}");
    let output = output.replace(&file, "FILE");
    let (mut lines, rest): (Vec<_>, Vec<_>) =
        output.lines().map(str::to_owned).partition(|line| line.starts_with("warning: "));
    lines.extend(rest);
    lines
}

fn config() -> Config {
    Config::new(SocketAddr::from(([192, 0, 2, 1], 53)))
}

#[track_caller]
fn assert_said(lines: &[String], expected: &str) {
    assert!(lines.iter().any(|line| line == expected), "{expected:?} is not in {lines:#?}");
}

/// The README's least configuration: it works, and what is printed for it is the same configuration with all of its keys.
#[test]
fn the_least_configuration_is_printed_whole_and_can_be_read_again() {
    let (_, rest) = README.split_once("```toml\n[[listener]]").unwrap();
    let least = format!("[[listener]]{}", rest.split_once("```").unwrap().0);
    let lines = checked(&least, 20_000);
    for said in ["max_owned_per_client = 8", "query_timeout = \"5s\"", "identity = \"address\"", "reap = \"on\""] {
        assert_said(&lines, said);
    }
    assert_said(
        &lines,
        "# forecast: pool \"resolvers\": keyed connections: shared by the client connections of one address, for queries \
         whose TLVs are equal",
    );
    let printed: Vec<&str> = lines.iter().map(String::as_str).filter(|line| !line.starts_with("warning: ")).collect();
    assert_eq!(checked(&printed.join("\n"), 20_000), lines);
}

#[test]
fn a_header_that_differs_per_query_is_forecast() {
    let lines = checked(&config().identity("address").tlv(0xe0, "{uuid}").text(""), 20_000);
    let sentence = "`{uuid}` differs per query: every query opens a connection";
    assert_said(&lines, &format!("warning: FILE: key `pool.proxy_protocol.tlv`: {sentence}"));
    assert_said(&lines, &format!("# forecast: pool \"resolvers\": one-shot connections: {sentence}"));
}

/// Files of nearly the greatest length that are made to cost more: 24,000 backends, 110,000 keys that are unknown, 300,000
/// tables with nothing in them. Looking each one up among the others takes minutes of the processor; the limit ends that.
#[test]
fn a_large_file_takes_no_minutes() {
    let backend = |number: u16| {
        let [high, low] = number.to_be_bytes();
        format!("{{name='{number}',address='10.0.{high}.{low}:1'}},")
    };
    let backends: String = (0..24_000).map(backend).collect();
    let keys: String = (0..110_000).map(|number| format!("k{number}=1\n")).collect();
    let listener = "listener=[{name='l',address='127.0.0.1:0',pool='p'}]";
    let dir = TempDir::new("large");
    let program = program().display().to_string();
    for (text, good, errors) in [
        (format!("{listener}\npool=[{{name='p',backend=[{backends}]}}]"), true, 0),
        (format!("[server]\n{keys}"), false, 110_002),
        (format!("pool=[{}]", "{},".repeat(300_000)), false, 600_001),
    ] {
        let file = dir.write("counterfoil.toml", &text).display().to_string();
        let (ok, output) = process::run("prlimit", &["--cpu=60", "--", &program, "check-config", &file], SOON * 10);
        assert_eq!(ok, good, "{}", output.lines().last().unwrap_or_default());
        let said: Vec<&str> = output.lines().filter(|line| line.starts_with("error: ")).collect();
        if errors > 0 {
            assert_eq!(said.len(), 101);
            assert!(
                said[100].ends_with(&format!(" {} more errors; they are not listed", errors - 100)),
                "{}",
                said[100]
            );
        }
    }
}

/// Descriptors by RLIMIT_NOFILE, ports by the kernel's range.
#[test]
fn descriptors_and_ports_are_those_of_this_machine() {
    let config = config()
        .identity("address")
        .tlv(0xe0, "{uuid}")
        .set("server", "max_connections", 3000)
        .backend_key("max_connections", 1000)
        .backend_key("one_shot_close", "\"fin\"")
        .backend_key("source", "[\"127.0.0.5\", \"127.0.0.6\"]");
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let ends: Vec<u64> = range.split_whitespace().map(|end| end.parse().unwrap()).collect();
    let ports = 2 * (ends[1] - ends[0] + 1);
    let rate = ports / 60;
    // 64 of its own, and five of its one worker and its listener.
    for (limit, enough) in [(4069, true), (4068, false)] {
        let lines = checked(&config.text(""), limit);
        assert_said(
            &lines,
            &format!(
                "# forecast: descriptors: 3000 for clients, 1000 to backends, 69 others: at most 4069 of {limit} \
                 (RLIMIT_NOFILE)"
            ),
        );
        let warned = lines.iter().any(|line| line.contains("key `server.max_connections`") && line.contains("RLIMIT"));
        assert_eq!(warned, !enough, "{limit}: {lines:#?}");
        assert_said(
            &lines,
            "# forecast: pool \"resolvers\": at most 1000 connections (`max_connections` of its backends); \
             queries beyond wait, for `connections.max_wait`",
        );
        assert_said(
            &lines,
            &format!(
                "# forecast: backend \"backend-0\": at most 1000 of {ports} ports (2 source address(es)), and each \
                 query's port for 60 s more: {rate} queries a second at most"
            ),
        );
    }
}

/// Started with a soft limit below the hard one, as shells and service managers do.
#[test]
fn the_soft_limit_of_descriptors_is_raised() {
    let dir = TempDir::new("limit");
    let file = dir.write("counterfoil.toml", &config().text("")).display().to_string();
    let program = program().display().to_string();
    let command = ["--nofile=256:5000", "--", &program, "run", "--config", &file, "--log-format", "json"];
    let mut process = Process::start("counterfoil", "prlimit", &command);
    process.wait_for_line(SOON, "that it is ready", |line| message(line, "ready"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.pid())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().collect::<Vec<_>>(), ["Max", "open", "files", "5000", "5000", "files"]);
}

/// What the system says is in the last line of a start that fails, and once.
#[test]
fn a_start_that_fails_says_why_once() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let dir = TempDir::new("taken");
    let program = program().display().to_string();
    let in_use = "Address already in use (os error 98)";
    let nowhere = dir.write("file", "").join("admin.sock").display().to_string();
    for (config, socket, words) in [
        (config().listen(address), "", "listens there already"),
        (config().set("admin", "http", format!("\"{address}\"")), "", in_use),
        (config(), nowhere.as_str(), "File exists (os error 17)"),
    ] {
        let file = dir.write("counterfoil.toml", &config.text(socket)).display().to_string();
        let (ok, output) = process::run(&program, &["run", "--config", &file], SOON);
        let last = output.lines().last().unwrap();
        assert!(!ok && last.contains("stopped"), "{output}");
        assert_eq!(last.matches(words).count(), 1, "{last}");
    }
}
