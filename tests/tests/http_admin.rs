//! The HTTP side of the admin interface as an operator's tools use it: reading takes nothing, changing takes POST and the
//! token.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{self, Counterfoil};
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::metrics;
use counterfoil_tests::process;
use counterfoil_tests::tempdir::TempDir;
use serde_json::Value;

/// For a drill to end on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const TOKEN: &str = "0123456789abcdef-token";

/// A file with this in it and this mode.
fn token_file(dir: &TempDir, text: &str, mode: u32) -> PathBuf {
    let path = dir.write("token", text);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path
}

fn config(backend: SocketAddr, token_file: Option<&PathBuf>) -> Config {
    let config = Config::new(backend).set("connections", "idle_timeout", "\"300ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    );
    match token_file {
        Some(path) => config.set("admin", "token_file", format!("\"{}\"", path.display())),
        None => config,
    }
}

/// Status and body of an answer; chunks are put together.
#[track_caller]
fn ask(counterfoil: &Counterfoil, method: &str, path: &str, token: Option<&str>, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(counterfoil.admin.unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let token = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\n{token}connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, mut rest) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (status, rest.to_owned());
    }
    let mut body = String::new();
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            break;
        }
        body.push_str(&after[..length]);
        rest = &after[length + 2..];
    }
    (status, body)
}

fn events(body: &str) -> Vec<Value> {
    body.lines().filter(|line| !line.is_empty()).map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn what_ctl_shows_can_be_read_by_get() {
    let backend = FakeBackend::answering(true);
    let config = config(backend.address, None).identity("connection").set("connections", "idle_timeout", "\"60s\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load { count: 3, ..Load::default() }.run(&mut client).assert_all_answered(3);
    let read = |path: &str| -> Value {
        let (status, body) = ask(&counterfoil, "GET", path, None, "");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap_or_else(|e| panic!("{path}: {e}: {body}"))
    };
    let backends = read("/api/v1/backends");
    assert_eq!((&backends["backends"][0]["backend"], &backends["total"]["sockets"]), (&"backend-0".into(), &1.into()));
    let connections = read("/api/v1/connections");
    let connection = &connections["connections"][0];
    assert_eq!((&connection["carried"], &connections["next"]), (&3.into(), &Value::Null));
    let cookie = connection["cookie"].as_u64().unwrap();
    assert_eq!(read(&format!("/api/v1/connections?after={cookie}"))["connections"].as_array().unwrap().len(), 0);
    assert_eq!(read("/api/v1/clients")["clients"].as_array().unwrap().len(), 1);
    assert_eq!(read("/api/v1/view")["view"]["source"], "ebpf");
    for (path, key) in [("tlvs", "tlvs"), ("findings", "findings"), ("reaps", "reaps")] {
        let shown = read(&format!("/api/v1/{path}"));
        assert!(shown.get(key).is_some_and(Value::is_array), "{path}: {shown}");
    }
    for (path, status) in [("connections?after=x", 400), ("connections?before=1", 400), ("everything", 404)] {
        assert_eq!(ask(&counterfoil, "GET", &format!("/api/v1/{path}"), None, "").0, status, "{path}");
    }
    let (status, page) = ask(&counterfoil, "GET", "/", None, "");
    assert_eq!(status, 200);
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("backend-0"), "{page}");
    drop(client);
}

/// What a scraper accepts it gets; promtool reads the text format without a complaint.
#[test]
fn metrics_come_in_the_format_and_encoding_that_are_accepted() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address, None));
    counterfoil.client().exchange(1, "a.example.test", 1);
    let get = |fields: &str| {
        let (head, body) = metrics::get_accepting(counterfoil.admin.unwrap(), "/metrics", fields).unwrap();
        (head.to_ascii_lowercase(), body)
    };
    let (head, text) = get("");
    assert!(head.contains("\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{head}");
    assert!(head.contains("\r\nvary: accept, accept-encoding\r\n"), "{head}");
    let text = String::from_utf8(text).unwrap();
    for line in [
        "# TYPE counterfoil_queries_total counter",
        "counterfoil_queries_total{listener=\"dns\"} 1",
        "# TYPE counterfoil_build_info gauge",
        "# TYPE counterfoil_query_duration_seconds histogram",
    ] {
        assert!(text.lines().any(|have| have == line), "{line}: {text}");
    }
    assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
    let dir = TempDir::new("metrics");
    let file = dir.write("metrics.txt", &text);
    let check = format!("promtool check metrics <{}", file.display());
    assert_eq!(process::run("sh", &["-c", &check], Duration::from_secs(5)), (true, String::new()));

    let (head, openmetrics) = get("Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n");
    assert!(
        head.contains("\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"),
        "{head}"
    );
    assert!(openmetrics.ends_with(b"# EOF\n"));

    let (head, packed) = get("Accept-Encoding: gzip\r\n");
    assert!(head.contains("\r\ncontent-encoding: gzip\r\n"), "{head}");
    let mut unpacked = String::new();
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_string(&mut unpacked).unwrap();
    assert!(unpacked.contains("counterfoil_queries_total{listener=\"dns\"} 1\n"), "{unpacked}");
    assert!(packed.len() * 4 < unpacked.len(), "{} octets of {}", packed.len(), unpacked.len());
    counterfoil.assert_quiescent();
}

#[test]
fn nothing_is_changed_without_a_token_file() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address, None));
    for order in ["drain", "reload", "reap", "drill"] {
        let path = format!("/api/v1/{order}");
        assert_eq!(ask(&counterfoil, "POST", &path, Some(TOKEN), "").0, 403, "{order}");
        assert_eq!(ask(&counterfoil, "GET", &path, Some(TOKEN), "").0, 405, "{order}");
    }
    counterfoil.client().exchange(1, "still.example.test", 1);
    counterfoil.assert_quiescent();
}

#[test]
fn a_change_takes_post_and_the_token() {
    let dir = TempDir::new("token");
    let file = token_file(&dir, &format!("{TOKEN}\n"), 0o600);
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address, Some(&file)));
    for wrong in [None, Some(""), Some("0123456789abcdef-tokem"), Some("0123456789abcdef-token0"), Some("0123")] {
        let (status, body) = ask(&counterfoil, "POST", "/api/v1/reload", wrong, "");
        assert_eq!(status, 401, "{wrong:?}: {body}");
        assert!(!body.contains(TOKEN));
    }
    let reloads = |counterfoil: &Counterfoil| counterfoil.metrics().sum("config_reloads_total", &[]);
    assert_eq!(reloads(&counterfoil), 0.0);
    assert_eq!(ask(&counterfoil, "GET", "/api/v1/reload", Some(TOKEN), "").0, 405);
    let (status, body) = ask(&counterfoil, "POST", "/api/v1/reload", Some(TOKEN), "");
    assert_eq!((status, &events(&body).last().unwrap()["ok"]), (200, &true.into()), "{body}");
    assert_eq!(reloads(&counterfoil), 1.0);
    for bad in ["no json", "[]", "{\"cookie\":\"x\"}", "{\"cookie\":1,\"more\":2}", "{\"cmd\":\"drain\"}"] {
        let (status, body) = ask(&counterfoil, "POST", "/api/v1/reap", Some(TOKEN), bad);
        assert_eq!(status, 400, "{bad}: {body}");
    }
    let (status, body) = ask(&counterfoil, "POST", "/api/v1/reap", Some(TOKEN), "{\"cookie\":1}");
    assert_eq!((status, &events(&body)[0]["ok"]), (200, &false.into()), "there is no such finding: {body}");
    let log = counterfoil.process.lines().concat();
    assert!(log.contains("not the token") && !log.contains(TOKEN), "{log}");
    counterfoil.assert_quiescent();
}

/// Its steps come as they happen; some of them take longer than a connection may be silent.
#[test]
fn a_drill_by_post_is_told_step_by_step() {
    let dir = TempDir::new("token");
    let file = token_file(&dir, TOKEN, 0o640);
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address, Some(&file)));
    let (status, body) = ask(&counterfoil, "POST", "/api/v1/drill", Some(TOKEN), "{\"class\":\"zombie\"}");
    let events = events(&body);
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((status, &events.last().unwrap()["ok"]), (200, &true.into()), "{body}");
    assert!(["leaked", "finding", "outcome", "done"].iter().all(|name| names.contains(name)), "{names:?}");
    counterfoil.assert_quiescent();
}

#[test]
fn draining_by_post_is_told_to_its_end() {
    let dir = TempDir::new("token");
    let file = token_file(&dir, TOKEN, 0o600);
    let backend = FakeBackend::answering(false);
    let config = config(backend.address, Some(&file)).set("server", "drain_timeout", "\"2s\"");
    let mut counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    client.exchange(1, "before.example.test", 1);
    let (status, body) = ask(&counterfoil, "POST", "/api/v1/drain", Some(TOKEN), "");
    let events = events(&body);
    assert_eq!((status, &events[0]["event"]), (200, &"draining".into()), "{body}");
    let done = events.last().unwrap();
    assert_eq!((&done["message"], &done["ok"]), (&"drained".into(), &true.into()), "{body}");
    assert!(counterfoil.process.wait_exit(PATIENCE).success());
}

/// The error names the file, and the program does not start.
#[test]
fn a_token_file_that_cannot_be_relied_on_is_refused_at_the_start() {
    for (text, mode, said) in [
        (TOKEN, 0o644, "others may access it (mode 0644)"),
        (TOKEN, 0o602, "others may access it (mode 0602)"),
        ("short", 0o600, "16 to 4096"),
        ("", 0o600, "16 to 4096"),
    ] {
        let dir = TempDir::new("token");
        let file = token_file(&dir, text, mode);
        let socket = dir.path().join("admin.sock").display().to_string();
        let text = config("127.0.0.1:9".parse().unwrap(), Some(&file)).text(&socket);
        let path = dir.write("counterfoil.toml", &text).display().to_string();
        let program = counterfoil::program().display().to_string();
        let (ok, output) = process::run(&program, &["run", "--config", &path], PATIENCE);
        let named = format!("key `admin.token_file`: {}: ", file.display());
        assert!(!ok && output.contains(said) && output.contains(&named), "{output}");
    }
}
