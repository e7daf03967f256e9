//! What the log says of connections, and what it does not: names.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, field, message, program};
use counterfoil_tests::driver::{Client, Load, Tls};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self as dns, qtype, rcode};
use counterfoil_tests::process::Process;
use counterfoil_tests::proxy_header::v2;
use counterfoil_tests::tempdir::TempDir;
use rustix::process::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);
/// The type of a question for a zone transfer.
const AXFR: u16 = 252;

/// The lines, as objects.
fn lines(counterfoil: &Counterfoil) -> Vec<Value> {
    counterfoil.process.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Each line about a connection has its number: that of the client's in `session`, the backend's cookie in `conn`.
#[test]
fn each_line_of_a_connection_has_its_number() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").set("server", "log", "\"counterfoil=debug\"");
    let config = config.tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&config);
    let mut clients = [counterfoil.client(), counterfoil.client()];
    for client in &mut clients {
        Load { count: 3, ..Load::default() }.run(client).assert_all_answered(3);
    }
    // Too short for a message.
    clients[0].send_raw(&[0, 1, 0]).unwrap();
    drop(clients);
    counterfoil.assert_quiescent();
    let mut seen = std::collections::BTreeMap::new();
    for line in lines(&counterfoil) {
        let target = line["target"].as_str().unwrap();
        let said = line["fields"]["message"].as_str().unwrap().to_owned();
        let of_client = target.starts_with("counterfoil::client") || target.starts_with("counterfoil::worker");
        if of_client && said != "accept" {
            assert!(line["fields"]["session"].is_u64(), "{line}");
        }
        if target.starts_with("counterfoil::backend::conn") {
            assert!(line["fields"]["conn"].is_u64(), "{line}");
        }
        *seen.entry(said).or_insert(0) += 1;
    }
    let count = |said: &str| seen.get(said).copied().unwrap_or(0);
    for (said, times) in [
        ("client connection opened", 2),
        ("client connection closed", 2),
        ("backend connection opened", 6),
        ("backend connection closed", 6),
        ("malformed message", 1),
    ] {
        assert_eq!(count(said), times, "{said}: {seen:?}");
    }
}

/// A connection has its number before anything is known of its client: what is said of its PROXY header and of TLS has the
/// number of what is said of its end.
#[test]
fn what_comes_before_the_first_query_has_the_number_too() {
    let backend = FakeBackend::answering(false);
    let authority = Authority::new();
    let config = Config::new(backend.address)
        .tls(&authority.issue("dns", &["dns.example"]))
        .accept_proxy(&["127.0.0.2"])
        .set("server", "log", "\"counterfoil=debug\"");
    let mut counterfoil = Counterfoil::start(&config.settles_soon());
    let header = v2("192.0.2.7:4007", "198.51.100.53:53", &[]);
    let number = |line: &str, said: &str| message(line, said)?["session"].as_u64();

    // Not a header; then a query in the clear behind one.
    let mut broken = header.clone();
    broken[12] = 0x22;
    counterfoil.client_behind("127.0.0.2", &broken).assert_closed(SOON);
    let first = counterfoil.process.wait_for_line(SOON, "the header", |line| number(line, "PROXY header"));
    let refused = counterfoil.process.wait_for_line(SOON, "its end", |line| number(line, "client connection refused"));
    assert_eq!(first, refused);
    let mut clear = counterfoil.client_behind("127.0.0.2", &header);
    clear.ask(1, "clear.example.test", qtype::A);
    let second = counterfoil.process.wait_for_line(SOON, "the handshake", |line| number(line, "TLS handshake"));
    assert!(second > first, "{first}, {second}");
    drop(clear);

    // A session whose client breaks TLS: one octet that is no record.
    let tls = Tls::new(&authority.ca, "dns.example");
    let mut client = counterfoil.client_behind("127.0.0.2", &header).over_tls(&tls).unwrap();
    client.assert_served();
    client.tcp().write_all(b"this is no record of TLS").unwrap();
    let broken = counterfoil.process.wait_for_line(SOON, "what is wrong", |line| number(line, "TLS"));
    let ended = counterfoil.process.wait_for_line(SOON, "its end", |line| number(line, "client connection closed"));
    let behind = counterfoil.process.wait_for_line(SOON, "its client", |line| number(line, "client behind PROXY"));
    assert!(broken == ended && ended == behind && ended > second, "{second}, {behind}, {broken}, {ended}");
    drop(client);
    counterfoil.assert_quiescent();
}

/// At `info` no line has a name that was asked for, whatever goes wrong with the query.
#[test]
fn no_name_is_told_whatever_goes_wrong() {
    let backend = FakeBackend::start(|connection| {
        let Some(_) = connection.header() else { return };
        while let Some(query) = connection.query() {
            let name = dns::question_name(&query).unwrap_or_default();
            let mut answer = dns::answer_to(&query, [192, 0, 2, 53]);
            match name.split('.').next() {
                Some("closed") => return,
                Some("reset") => return connection.reset(),
                Some("silent") => continue,
                Some("short") => answer.truncate(5),
                Some("other") => answer[13] ^= 1,
                Some("unasked") => connection.send(&answer),
                _ => {}
            }
            connection.send(&answer);
        }
    });
    let config = Config::new(backend.address)
        .settles_soon()
        .identity("address")
        .tlv(0xe0, "{qname}")
        .set("pool.proxy_protocol", "max_header", "\"100B\"")
        .set("pool", "query_timeout", "\"500ms\"")
        .set("server", "log", "\"info\"");
    let counterfoil = Counterfoil::start(&config);
    let long = "l".repeat(60);
    let mut failed = 0;
    for (id, first) in ["good", "closed", "reset", "silent", "short", "other", "unasked", &long].into_iter().enumerate()
    {
        for kind in [qtype::A, AXFR] {
            let mut client = counterfoil.client();
            client.ask(id as u16, &format!("{first}.secret.example.test"), kind);
            let answer = client.receive(SOON).message();
            failed += usize::from(dns::response_code(&answer) == rcode::SERVFAIL);
        }
    }
    assert!(failed >= 8, "{failed}");
    // Names that cannot be read, two of them, and an update; then what is no message.
    let query = dns::query(1, "secret.example.test", qtype::A);
    let mut client = counterfoil.client();
    let mut two = query.clone();
    two[5] = 2;
    two.extend_from_within(12..);
    let mut update = query.clone();
    update[2] = 5 << 3;
    for message in [&query[..query.len() - 6], &two, &update] {
        client.send_raw(&dns::framed(message)).unwrap();
        client.receive(SOON).message();
    }
    client.send_raw(&[&[0, 5][..], b"secret.example.test"].concat()).unwrap();
    client.assert_closed(SOON);
    counterfoil.assert_quiescent();
    assert!(lines(&counterfoil).len() > 5, "{}", counterfoil.process.tail());
    assert!(!counterfoil.process.lines().iter().any(|line| line.contains("secret")), "{}", counterfoil.process.tail());
}

/// Without `--log-format json`: level, module, message and the same fields; and each module has its own level.
#[test]
fn lines_for_people_say_the_same() {
    let backend = FakeBackend::answering(true);
    let dir = TempDir::new("text");
    let config = Config::new(backend.address).identity("connection").text("");
    let file = dir.write("counterfoil.toml", &config).display().to_string();
    let filter = "warn,counterfoil::app=info,counterfoil::worker=debug,counterfoil::backend=debug";
    let program = program().display().to_string();
    let mut process = Process::start("counterfoil", &program, &["run", "--config", &file, "--log", filter]);
    let address: SocketAddr = process.wait_for_line(SOON, "its listener", |line| {
        line.split_once(" INFO counterfoil::app: listening listener=\"dns\" address=")?.1.trim().parse().ok()
    });
    let mut client = Client::connect(address, None);
    let own = client.local_addr();
    Load { count: 3, ..Load::default() }.run(&mut client).assert_all_answered(3);
    drop(client);
    for said in [
        format!("DEBUG counterfoil::worker::core: client connection opened session=1 client={own} listener=\"dns\""),
        "DEBUG counterfoil::worker::core: client connection closed session=1 reason=\"".to_owned(),
        "DEBUG counterfoil::backend::conn: backend connection opened conn=".to_owned(),
        "DEBUG counterfoil::backend::conn: backend connection closed conn=".to_owned(),
    ] {
        process.wait_for_line(SOON, &said, |line| line.contains(&said).then_some(()));
    }
    let others: Vec<_> = process.lines().into_iter().filter(|line| line.contains("counterfoil::privilege")).collect();
    assert!(others.is_empty(), "its level is warn: {others:?}");
}

/// A backend that refuses is said, not for each of thousands of attempts, and how many lines were held back is said, too.
/// No line has a name that was asked for.
#[test]
fn a_storm_of_trouble_is_held_back_and_counted_and_no_name_is_told() {
    // One backend's share of what a place in the code may write: ten, and then one each second.
    const LIMIT: usize = 10;
    // Closes each connection with an answer that is none.
    let backend = FakeBackend::start(|connection| {
        if connection.query().is_some() {
            connection.send(&[0; 12]);
        }
    });
    let config = Config::new(backend.address).set("pool", "retries", 0).backend_key("max_in_flight", 1);
    let mut counterfoil = Counterfoil::start(&config);
    let began = Instant::now();
    let mut client = counterfoil.client();
    let name = |n: usize| format!("n{n}.secret.example.test");
    let outcome = Load { count: 1000, in_flight: 20, name: &name, ..Load::default() }.run(&mut client);
    assert_eq!(outcome.failed.values().sum::<usize>(), 1000, "{outcome:?}");
    let told = counterfoil.process.wait_for_line(SOON, "that lines were held back", |line| {
        message(line, "log lines held back")
            .filter(|fields| fields["place"].as_str().unwrap().contains("worker::shell"))
    });
    let written = lines(&counterfoil).iter().filter(|line| line["fields"]["message"] == "backend connection").count();
    let allowed = LIMIT + began.elapsed().as_secs() as usize + 1;
    assert!((LIMIT..=allowed).contains(&written), "{written} lines, {allowed} allowed");
    assert!(told["lines"].as_u64().unwrap() >= 1000 - allowed as u64, "{told}");
    assert!(!counterfoil.process.lines().iter().any(|line| line.contains("secret")), "{}", counterfoil.process.tail());
    drop(client);
    counterfoil.assert_quiescent();
}

/// Whoever reads the log has stopped to: everybody is served all the same, and what was lost is told once somebody reads.
#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    const CLIENTS: usize = 1000;
    let backend = FakeBackend::answering(false);
    let dir = TempDir::new("unread");
    let config = Config::new(backend.address).set("listener", "max_connections_per_client", CLIENTS).text("");
    let file = dir.write("counterfoil.toml", &config).display().to_string();
    let program = program().display().to_string();
    let (read, write) = std::io::pipe().unwrap();
    let script = "exec \"$@\" 2>&0 </dev/null";
    let arguments =
        ["-c", script, "sh", &program, "run", "--config", &file, "--log-format", "json", "--log", "counterfoil=trace"];
    let mut process = Process::start_with("counterfoil", "sh", &arguments, std::os::fd::OwnedFd::from(write).into());
    let mut log = std::io::BufReader::new(read).lines().map(Result::unwrap);
    let listening = log.find_map(|line| field(&message(&line, "listening")?, "address")).unwrap();
    log.find(|line| message(line, "ready").is_some()).unwrap();
    let address: SocketAddr = listening.parse().unwrap();
    // Two lines of each are more than a pipe holds.
    let began = Instant::now();
    for _ in 0..CLIENTS {
        Client::connect(address, None).assert_served();
    }
    println!("{CLIENTS} clients in {:?}", began.elapsed());
    assert_eq!(backend.queries(), CLIENTS);
    let told = "log lines lost: standard error did not take them";
    let lost = log.find_map(|line| message(&line, told)?["lines"].as_u64()).unwrap();
    assert!(lost > 100, "{lost}");
    // What comes now is written again, and so is the end.
    process.signal(Signal::TERM);
    assert!(log.any(|line| message(&line, "drained").is_some()));
    assert_eq!(process.wait_exit(SOON).code(), Some(0));
}

/// A reload changes what is logged.
#[test]
fn the_filter_can_be_reloaded() {
    let backend = FakeBackend::answering(false);
    let config = |log: &str| Config::new(backend.address).set("server", "log", format!("\"{log}\""));
    let mut counterfoil = Counterfoil::start(&config("info"));
    let opened = |line: &str| message(line, "client connection opened");
    drop(counterfoil.client());
    counterfoil.rewrite_with(&config("info,counterfoil::worker=debug"));
    let (ok, output) = counterfoil.ctl(&["reload"], SOON);
    assert!(ok, "{output}");
    assert!(counterfoil.process.find_line(Duration::ZERO, opened).is_none(), "not asked for before");
    let client = counterfoil.client();
    counterfoil.process.wait_for_line(SOON, "a client", opened);
    drop(client);
}

/// What a configuration will cost is said at the start as it is by `check-config`.
#[test]
fn warnings_of_the_configuration_are_logged_at_the_start() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("address").tlv(0xe0, "{uuid}");
    let mut counterfoil = Counterfoil::start(&config);
    let note = |line: &str| message(line, "configuration").and_then(|fields| field(&fields, "note"));
    let said = counterfoil.process.wait_for_line(SOON, "what it will cost", note);
    assert_eq!(said, "key `pool.proxy_protocol.tlv`: `{uuid}` differs per query: every query opens a connection");
}
