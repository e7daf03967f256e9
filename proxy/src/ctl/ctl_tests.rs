//! The client's side without a server: its arguments, its errors, and what it makes of an answer.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;

use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    ctl: CtlArgs,
}

fn parse(arguments: &[&str]) -> Result<CtlArgs, clap::Error> {
    Cli::try_parse_from([&["ctl"], arguments].concat()).map(|cli| cli.ctl)
}

#[test]
fn options_go_before_and_after_the_command() {
    let before = parse(&["-o", "json", "--socket", "/x", "show", "leaks"]).unwrap();
    let after = parse(&["show", "leaks", "--socket", "/x", "-o", "json"]).unwrap();
    for args in [before, after] {
        assert_eq!((args.socket.as_path(), args.output), (Path::new("/x"), Output::Json));
        assert!(matches!(args.command, Command::Show { what: What::Leaks }));
    }
    assert!(matches!(parse(&["reap", "0x1f"]).unwrap().command, Command::Reap { cookie: 31 }));
    assert!(matches!(parse(&["reap", "31"]).unwrap().command, Command::Reap { cookie: 31 }));
    for bad in [&["show", "nothing"][..], &["reap", "x"], &["reap", "-1"], &["reap"], &["show", "view", "-o", "xml"]] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

/// Answers one request per element, with these lines.
fn server(answers: Vec<Vec<Value>>) -> (PathBuf, std::thread::JoinHandle<Vec<Value>>) {
    let path = std::env::temp_dir().join(format!("counterfoil-ctl-{}-{}.sock", std::process::id(), fastrand::u64(..)));
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for lines in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            BufReader::new(&stream).read_line(&mut request).unwrap();
            requests.push(serde_json::from_str(&request).unwrap());
            for line in lines {
                writeln!(stream, "{line}").unwrap();
            }
        }
        requests
    });
    (path, thread)
}

fn args(socket: &Path, arguments: &[&str]) -> CtlArgs {
    parse(&[&["--socket", socket.to_str().unwrap()], arguments].concat()).unwrap()
}

fn shown(args: &CtlArgs) -> Result<String> {
    let Command::Show { what } = args.command else { bail!("not to show") };
    let mut output = Vec::new();
    show(what, args, &mut output)?;
    Ok(String::from_utf8(output).unwrap())
}

#[test]
fn a_list_is_read_page_by_page() {
    let page = |cookie: u64, next: Value| {
        let connection = json!({"event": "connection", "cookie": cookie, "tcp_state": "established"});
        vec![connection, json!({"event": "done", "ok": true, "next": next, "source": "ebpf", "uncertain": null})]
    };
    let (path, thread) = server(vec![page(7, json!(7)), page(9, json!(9)), page(11, json!(null))]);
    let text = shown(&args(&path, &["show", "connections", "-o", "json"])).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let cookies: Vec<_> = json["connections"].as_array().unwrap().iter().map(|row| row["cookie"].as_u64()).collect();
    assert_eq!(cookies, [Some(7), Some(9), Some(11)]);
    assert_eq!((&json["source"], &json["uncertain"]), (&json!("ebpf"), &json!(null)));
    let requests = thread.join().unwrap();
    let after: Vec<_> = requests.iter().map(|request| request["after"].as_u64()).collect();
    assert_eq!(after, [Some(0), Some(7), Some(9)]);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_page_that_leads_nowhere_ends_the_list() {
    let done = json!({"event": "done", "ok": true, "next": 0, "uncertain": "storage failed"});
    let (path, thread) = server(vec![vec![done]]);
    let text = shown(&args(&path, &["show", "connections"])).unwrap();
    assert_eq!(text, "no connections\n\nThe kernel view is not to be relied on: storage failed\n");
    thread.join().unwrap();
    std::fs::remove_file(path).unwrap();
}

#[test]
fn errors_name_the_socket() {
    let nowhere = Path::new("/nonexistent/counterfoil.sock");
    let error = format!("{:#}", shown(&args(nowhere, &["show", "view"])).unwrap_err());
    assert!(error.contains("/nonexistent/counterfoil.sock: is counterfoil running"), "{error}");
    let refused = json!({"event": "done", "ok": false, "message": "the request cannot be read"});
    for (answer, what) in
        [(vec![refused], "the request cannot be read"), (vec![], "the connection ended before the answer did")]
    {
        let (path, thread) = server(vec![answer]);
        let error = format!("{:#}", shown(&args(&path, &["show", "view"])).unwrap_err());
        assert!(error.contains(what) && error.contains(path.to_str().unwrap()), "{error}");
        thread.join().unwrap();
        std::fs::remove_file(path).unwrap();
    }
}
