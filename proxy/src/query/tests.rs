#![expect(clippy::expect_used, reason = "tests panic")]

use super::*;
use crate::responder::{ProxyMode, Responder, ResponderOptions, Running};
use clap::Parser;
use std::net::TcpListener;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    query: QueryArgs,
}

fn args(line: &str) -> Result<QueryArgs, clap::Error> {
    Cli::try_parse_from(std::iter::once("query").chain(line.split(' '))).map(|cli| cli.query)
}

fn responder(proxy: ProxyMode) -> Running {
    let addr = SocketAddr::from(([127, 0, 0, 1], 0));
    let options = ResponderOptions { proxy, ..Default::default() };
    Responder::bind(addr, options).and_then(Responder::start).expect("a responder on loopback")
}

fn printed(line: &str) -> String {
    let answer = ask(&args(line).expect("valid arguments")).expect("an answer");
    let mut out = Vec::new();
    print::answer(&answer, &mut out).expect("a Vec takes all");
    String::from_utf8(out).expect("text")
}

fn failure(line: &str) -> String {
    match ask(&args(line).expect("valid arguments")) {
        Ok(_) => unreachable!("an answer to {line}"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn an_answer_is_printed_as_kdig_does() {
    let responder = responder(ProxyMode::None);
    let addr = responder.addr();
    let text = printed(&format!("whoami.counterfoil txt --server {addr}"));
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with(";; ->>HEADER<<- opcode: QUERY; status: NOERROR; id: "), "{text}");
    assert_eq!(lines[1], ";; Flags: qr aa rd; QUERY: 1; ANSWER: 1; AUTHORITY: 0; ADDITIONAL: 0");
    assert_eq!(lines[3..5], [";; QUESTION SECTION:", ";; whoami.counterfoil.\t\tIN\tTXT"]);
    assert_eq!(lines[6], ";; ANSWER SECTION:");
    assert!(lines[7].starts_with("whoami.counterfoil.\t0\tIN\tTXT\t\"source=127.0.0.1:"), "{text}");
    assert!(lines[7].ends_with("\"command=none\" \"connection=1\" \"query=1\""), "{text}");
    assert!(
        lines[9].starts_with(";; Received ")
            && lines[10].starts_with(&format!(";; From 127.0.0.1@{}(TCP) in ", addr.port()))
    );
}

#[test]
fn the_proxy_header_arrives() {
    let responder = responder(ProxyMode::Required);
    let text = printed(&format!(
        "whoami.counterfoil. TXT --server 127.0.0.1#{} --proxy 192.0.2.1#4000-[2001:db8::1]:53 --tlv 0xE0=one --tlv 225=hex:00ff",
        responder.addr().port()
    ));
    for string in
        ["source=[::ffff:192.0.2.1]:4000", "destination=[2001:db8::1]:53", "tlv=0xE0:one", "tlv=0xE1:hex:00ff"]
    {
        assert!(text.contains(&format!("\"{string}\"")), "{text}");
    }
}

#[test]
fn other_records_and_codes() {
    let responder = responder(ProxyMode::None);
    let addr = responder.addr();
    assert!(printed(&format!("x.counterfoil --server {addr}")).contains("x.counterfoil.\t0\tIN\tA\t192.0.2.1\n"));
    let empty = printed(&format!("x.counterfoil TYPE65280 --server {addr}"));
    assert!(
        empty.contains(";; x.counterfoil.\t\tIN\tTYPE65280\n")
            && empty.contains("\tIN\tSOA\tcounterfoil. counterfoil. 1 ")
    );
    assert!(printed(&format!("example. A --server {addr}")).contains("status: REFUSED"));
}

#[test]
fn failures_say_what_happened() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = listener.local_addr().expect("an address");
    let text = failure(&format!("x. A --server {silent} --timeout 50ms"));
    assert_eq!(text, format!("waiting for the answer of {silent}: no answer within 50ms"));
    drop(listener);
    let text = failure(&format!("x. A --server {silent}"));
    assert_eq!(text, format!("connecting to {silent}: connection refused: nothing listens there"));

    let responder = responder(ProxyMode::Required);
    let text = failure(&format!("x.counterfoil. A --server {}", responder.addr()));
    assert!(text.ends_with("the connection without an answer"), "{text}");

    assert!(failure("x. AXFR --server 192.0.2.1").contains("zone transfers"));
    assert!(failure("x..y A --server 192.0.2.1").contains("\"x..y\" is not a name"));
}

#[test]
fn an_answer_to_another_question_is_none() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("an address");
    let liar = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the client");
        let query = read_message(&mut stream, Instant::now() + Duration::from_secs(10)).expect("a query");
        let mut answer = query.clone();
        answer[2] |= 0x80;
        answer[13] ^= 1; // one letter of the name
        let mut out = Vec::new();
        assert!(frame::append(&mut out, &answer));
        stream.write_all(&out).expect("sent");
    });
    assert!(failure(&format!("abc. A --server {addr}")).contains("answered something that was not asked"));
    liar.join().expect("the thread ended well");
}

#[test]
fn arguments() {
    let parsed = args("x --server ::1").expect("valid");
    assert_eq!(
        (parsed.server, parsed.rtype, parsed.timeout),
        ("[::1]:53".parse().expect("an address"), 1, Duration::from_secs(5))
    );
    assert_eq!(args("x --server ::1#54").expect("valid").server.port(), 54);
    for line in [
        "x",
        "x --server localhost",
        "x --server 1.2.3.4:99999",
        "x NOTYPE --server ::1",
        "x --server ::1 --timeout 5",
        "x --server ::1 --timeout 0s",
        "x --server ::1 --timeout 99999999999999999999s",
        "x --server ::1 --proxy 1.2.3.4:5",
        "x --server ::1 --proxy 1.2.3.4-5.6.7.8",
        "x --server ::1 --tlv 0xE0=one",
        "x --server ::1 --proxy 1.1.1.1:1-2.2.2.2:2 --tlv 0x100=one",
        "x --server ::1 --proxy 1.1.1.1:1-2.2.2.2:2 --tlv 0xE0",
        "x --server ::1 --proxy 1.1.1.1:1-2.2.2.2:2 --tlv 0xE0=hex:0",
        "x --server ::1 --proxy 1.1.1.1:1-2.2.2.2:2 --tlv 0xE0=hex:+1",
    ] {
        assert!(args(line).is_err(), "{line}");
    }
}

#[test]
fn a_header_that_cannot_be_is_refused() {
    let long = "x".repeat(65_536);
    let line = format!("x --server 192.0.2.1 --proxy 1.1.1.1:1-2.2.2.2:2 --tlv 0xE0={long}");
    assert!(failure(&line).contains("the value of TLV 0xe0 is too long"));
    let most = format!("x --server 192.0.2.1 --proxy 1.1.1.1:1-2.2.2.2:2 --tlv 0xE0={}", &long[1..]);
    assert!(failure(&most).contains("longer than the 65551 allowed"));
}
