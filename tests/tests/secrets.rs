//! No error, log line or reply quotes a file that holds a secret: a key, the token, either of them where another file was
//! meant, whole or damaged.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, program};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::process::{self, Process};
use counterfoil_tests::tempdir::TempDir;
use counterfoil_tests::wait;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(30);

/// So many octets of a secret give it away.
const RUN: usize = 8;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Runs of a secret in all forms in which a program prints octets.
struct Secret {
    forms: BTreeSet<Vec<u8>>,
}

impl Secret {
    /// Of this text, and of what it stands for.
    fn new(text: &[u8], meant: &[u8]) -> Self {
        let mut forms = BTreeSet::new();
        for secret in [text, meant] {
            secret.windows(RUN).for_each(|run| forms.extend(written(run)));
        }
        Self { forms }
    }

    /// Every run is looked for at every place.
    fn assert_not_in(&self, output: &[u8], what: &str) {
        // Forms by their first octets, so that it takes no longer than the output is long.
        const KEY: usize = 8;
        let keys: BTreeSet<&[u8]> = self.forms.iter().map(|form| &form[..KEY.min(form.len())]).collect();
        for at in 0..output.len() {
            let rest = &output[at..];
            if !keys.contains(&rest[..KEY.min(rest.len())]) {
                continue;
            }
            let mut found = self.forms.range(rest[..KEY].to_vec()..).take_while(|form| form.starts_with(&rest[..KEY]));
            if let Some(form) = found.find(|form| rest.starts_with(form)) {
                let [form, output] = [form.as_slice(), output].map(String::from_utf8_lossy);
                panic!("{what}: a secret is told as {form:?} in\n{output}");
            }
        }
    }
}

/// As text, in lists and rows of numbers, in base64 of whatever surroundings, in escapes, in UTF-16.
fn written(run: &[u8]) -> Vec<Vec<u8>> {
    let row = |format: &dyn Fn(&u8) -> String, between: &str| {
        run.iter().map(format).collect::<Vec<_>>().join(between).into_bytes()
    };
    let mut forms = vec![
        run.to_vec(),
        row(&|octet| format!("{octet}"), ", "),
        row(&|octet| format!("{octet}"), ","),
        row(&|octet| format!("{octet}"), " "),
        row(&|octet| format!("\\u{{{octet:x}}}"), ""),
        row(&|octet| format!("\\u{octet:04x}"), ""),
        row(&|octet| format!("\\{octet:03o}"), ""),
        run.iter().flat_map(|octet| [*octet, 0]).collect(),
        run.iter().flat_map(|octet| [0, *octet]).collect(),
        format!("{:?}", String::from_utf8_lossy(run)).trim_matches('"').as_bytes().to_vec(),
        run.escape_ascii().to_string().into_bytes(),
    ];
    for between in ["", " ", ":", ", ", ","] {
        forms.push(row(&|octet| format!("{octet:02x}"), between));
        forms.push(row(&|octet| format!("{octet:02X}"), between));
        forms.push(row(&|octet| format!("0x{octet:02x}"), between));
        forms.push(row(&|octet| format!("0x{octet:02X}"), between));
        forms.push(row(&|octet| format!("{octet:x}"), between));
    }
    for lead in ["\\x", "%"] {
        forms.push(row(&|octet| format!("{lead}{octet:02x}"), ""));
        forms.push(row(&|octet| format!("{lead}{octet:02X}"), ""));
    }
    forms.extend(base64(run));
    // Too short a form would be found anywhere.
    forms.retain(|form| form.len() >= RUN);
    forms
}

/// The characters that depend on the run alone, for each place that it can have in groups of three octets, in both alphabets.
fn base64(run: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = Vec::new();
    for before in 0..3 {
        let bits: String = run.iter().fold(String::new(), |mut bits, octet| {
            let _ = write!(bits, "{octet:08b}");
            bits
        });
        let skipped = (6 - before * 8 % 6) % 6;
        let standard: Vec<u8> = bits.as_bytes()[skipped..]
            .chunks_exact(6)
            .map(|six| BASE64[usize::from_str_radix(std::str::from_utf8(six).unwrap(), 2).unwrap()])
            .collect();
        let url = standard.iter().map(|letter| match letter {
            b'+' => b'-',
            b'/' => b'_',
            letter => *letter,
        });
        forms.push(url.collect());
        forms.push(standard);
    }
    forms
}

/// What base64 stands for; other characters are left out.
fn decoded(text: &str) -> Vec<u8> {
    let values = text.bytes().filter_map(|letter| BASE64.iter().position(|it| *it == letter));
    let values: Vec<usize> = values.collect();
    let group = |group: &[usize]| {
        let bits = group.iter().fold(0, |bits, value| bits << 6 | value) << (6 * (4 - group.len()));
        bits.to_be_bytes()[5..].iter().take(group.len() * 3 / 4).copied().collect::<Vec<u8>>()
    };
    values.chunks(4).flat_map(group).collect()
}

/// A key in PEM as it comes out of editors, variables of the environment and templates.
fn damaged(key: &str) -> Vec<(&'static str, Vec<u8>)> {
    let lines: Vec<&str> = key.lines().collect();
    let utf16 = |to: fn(u16) -> [u8; 2]| std::iter::once(0xfeff).chain(key.encode_utf16()).flat_map(to).collect();
    let text = |text: String| text.into_bytes();
    vec![
        ("whole", text(key.to_owned())),
        ("\\n for line breaks", text(key.replace('\n', "\\n"))),
        ("spaces for line breaks", text(key.replace('\n', " "))),
        ("one line", text(key.replace('\n', ""))),
        ("one line after the first", text(format!("{} {}\n", lines[0], lines[1..lines.len() - 1].concat()))),
        ("no last line", text(lines[..lines.len() - 1].join("\n"))),
        ("another last line", text(key.replace("END PRIVATE", "END RSA PRIVATE"))),
        ("four dashes", text(key.replacen("KEY-----", "KEY----", 1))),
        ("in quotes", text(format!("\"{}\"\n", key.trim()))),
        ("indented", text(key.replace('\n', "\n  "))),
        ("without its lines", text(lines[1..lines.len() - 1].join("\n"))),
        ("behind a name", text(format!("key = \"\"\"{key}"))),
        ("as a value", text(format!("key = '''{key}'''\n"))),
        ("as a name", text(format!("\"{}\" = 1\n", lines[1]))),
        ("as a name twice", text(format!("\"{0}\" = 1\n\"{0}\" = 1\n", lines[1]))),
        ("as a table", text(format!("[\"{0}\"]\n[\"{0}\"]\n", lines[1]))),
        ("an octet that is no base64", text(key.replacen('\n', "\n!", 1))),
        ("cut in base64", text(key.replacen(&lines[1][20..], "", 1))),
        ("UTF-16, little endian", utf16(u16::to_le_bytes)),
        ("UTF-16, big endian", utf16(u16::to_be_bytes)),
        ("DER", decoded(&lines[1..lines.len() - 1].concat())),
    ]
}

/// All that `check-config` says of a file.
fn checked(file: &str) -> Vec<u8> {
    let program = program().display().to_string();
    let (_, said) = process::run(&program, &["check-config", file], SOON);
    said.into_bytes()
}

/// All that a start says that fails, at the level `trace` and in both formats.
fn started(file: &str) -> Vec<u8> {
    let program = program().display().to_string();
    let mut said = Vec::new();
    for format in ["text", "json"] {
        let arguments = ["run", "--config", file, "--log", "trace", "--log-format", format];
        let (ok, output) = process::run(&program, &arguments, SOON);
        assert!(!ok, "{output}");
        said.extend(output.into_bytes());
    }
    said
}

/// What is between the dashes of a key.
fn secret_of(key: &str) -> Secret {
    let body: String = key.lines().filter(|line| !line.starts_with('-')).collect();
    // The first octets say what kind of key it is, and are no secret.
    Secret::new(&body.as_bytes()[48..], &decoded(&body)[36..])
}

#[test]
fn the_scan_finds_what_it_looks_for() {
    let secret = Secret::new(b"0123456789abcdef", &[0x10, 0x9f, 0xff, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd]);
    let is_told = |output: &str| {
        let output = output.as_bytes().to_vec();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| secret.assert_not_in(&output, "here"))).is_err()
    };
    for told in [
        "x 23456789 y",
        "[50, 51, 52, 53, 54, 55, 56, 57]",
        "10:9F:FF:23:45:67:89:AB",
        "[0x10, 0x9f, 0xff, 0x23, 0x45, 0x67, 0x89, 0xab]",
        "\\x10\\x9f\\xff\\x23\\x45\\x67\\x89\\xab",
        "\\020\\237\\377\\043\\105\\147\\211\\253",
        // The octets behind none, one and two others.
        "EJ//I0VniavN",
        "ABCf/yNFZ4mrzQ==",
        "AAAQn_8jRWeJq80=",
        "2\u{0}3\u{0}4\u{0}5\u{0}6\u{0}7\u{0}8\u{0}9\u{0}",
    ] {
        assert!(is_told(told), "{told:?}");
    }
    assert!(!is_told("234567 and no more, [50, 51, 52, 53, 54, 55]"));
    assert_eq!(decoded("AAAQn/8jRWeJq80="), [0, 0, 0x10, 0x9f, 0xff, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd]);
}

/// As the file of the key, of the certificate, of the authority, of the token, and as the configuration itself.
#[test]
fn a_damaged_key_is_never_quoted() {
    let (dir, authority) = (TempDir::new("secrets"), Authority::new());
    let certificate = authority.issue("server", &["dns.example.test"]);
    let key = std::fs::read_to_string(&certificate.key).unwrap();
    let secret = secret_of(&key);
    let file = dir.path().join("key.pem");
    let named = file.display().to_string();
    let base = || Config::new(SocketAddr::from(([127, 0, 0, 1], 1)));
    let good = base().tls(&certificate);
    let path = format!("{named:?}");
    let configurations = [
        good.clone().set("listener.tls", "key", &path),
        good.clone().set("listener.tls", "certificate", &path),
        base().backend_key("tls.server_name", "\"a.example\"").backend_key("tls.ca", &path),
        base().set("admin", "token_file", &path),
    ];
    let configurations = configurations.map(|config| config.text(""));
    let configuration = dir.path().join("c.toml").display().to_string();
    for (form, octets) in damaged(&key) {
        std::fs::write(&file, &octets).unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        for (text, names) in configurations.iter().zip(["key", "certificate", "ca", "token_file"]) {
            std::fs::write(&configuration, text).unwrap();
            let said = checked(&configuration);
            secret.assert_not_in(&said, &format!("{form}, as {names}, check-config"));
            let said = String::from_utf8_lossy(&said).into_owned();
            let is_good = names == "key" && form == "whole";
            assert!(is_good || said.contains(&format!("{names}`: ")), "{form}: {said}");
        }
        let said = checked(&named);
        secret.assert_not_in(&said, &format!("{form}, as the configuration, check-config"));
        assert!(said.starts_with(format!("error: {named}:").as_bytes()), "{form}: {}", String::from_utf8_lossy(&said));
    }
    // The key in place of its file's name.
    let text = good.set("listener.tls", "key", format!("'''{key}'''")).text("");
    std::fs::write(&configuration, text).unwrap();
    secret.assert_not_in(&checked(&configuration), "the key itself");
    // A start says the same with a log.
    for (form, octets) in damaged(&key).into_iter().filter(|(form, _)| form.contains("line")) {
        std::fs::write(&file, octets).unwrap();
        std::fs::write(&configuration, &configurations[0]).unwrap();
        secret.assert_not_in(&started(&configuration), &format!("{form}, run"));
        secret.assert_not_in(&started(&named), &format!("{form}, as the configuration, run"));
    }
}

/// A running process says it in its log and to `ctl`, at whatever level.
#[test]
fn a_reload_does_not_quote_a_key_nor_the_token() {
    const TOKEN: &str = "f3Vq0Zs81LdPjW6c=nB7uTy42KxRmEh9";
    let (dir, authority) = (TempDir::new("secrets"), Authority::new());
    let certificate = authority.issue("server", &["dns.example.test"]);
    let key = std::fs::read_to_string(&certificate.key).unwrap();
    let secrets = [secret_of(&key), Secret::new(TOKEN.as_bytes(), b"")];
    let token = dir.write("token", &format!("{TOKEN}\n")).display().to_string();
    std::fs::set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
    let backend = FakeBackend::answering(false);
    let config = Config::new(backend.address).tls(&certificate).set("admin", "token_file", format!("{token:?}"));
    let config = config.set("server", "log", "\"trace\"");
    let counterfoil = Counterfoil::start(&config);
    let reload = |what: &str| {
        let (ok, said) = counterfoil.ctl(&["reload"], SOON);
        secrets.iter().for_each(|secret| secret.assert_not_in(said.as_bytes(), what));
        ok
    };
    assert!(reload("as it is"));
    for (form, octets) in damaged(&key) {
        std::fs::write(&certificate.key, octets).unwrap();
        assert_eq!(reload(form), form == "whole", "{form}");
    }
    std::fs::write(&certificate.key, &key).unwrap();
    for damaged in [format!("{TOKEN} \n"), format!("{TOKEN}\n{TOKEN}"), format!("\u{e9}{TOKEN}")] {
        std::fs::write(&token, damaged).unwrap();
        assert!(!reload("a damaged token"));
    }
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    // Other files in place of the configuration.
    for text in [
        format!("{TOKEN}\n"),
        format!("{}=1\n", &TOKEN[..16]),
        format!("[{TOKEN}]\n"),
        key.clone(),
        key.replace('\n', "=\n"),
    ] {
        counterfoil.rewrite(&text);
        assert!(!reload("as the configuration"));
    }
    counterfoil.rewrite_with(&config);
    assert!(reload("as it was"));
    counterfoil.assert_quiescent();
    let log = counterfoil.process.lines().join("\n").into_bytes();
    assert!(log.len() > 10_000, "the log is at the level trace");
    secrets.iter().for_each(|secret| secret.assert_not_in(&log, "the log"));
}

/// The log for people, too.
#[test]
fn the_other_format_of_the_log_does_not_either() {
    let (dir, authority) = (TempDir::new("secrets"), Authority::new());
    let certificate = authority.issue("server", &["dns.example.test"]);
    let key = std::fs::read_to_string(&certificate.key).unwrap();
    let secret = secret_of(&key);
    let socket = dir.path().join("admin.sock").display().to_string();
    let backend = FakeBackend::answering(false);
    let file = dir.write("c.toml", &Config::new(backend.address).tls(&certificate).text(&socket)).display().to_string();
    let mut process = Process::start("counterfoil", program(), &["run", "--config", &file, "--log", "trace"]);
    process.wait_for_line(SOON, "that it is ready", |line| line.contains("ready").then_some(()));
    for (form, octets) in damaged(&key).into_iter().skip(1) {
        std::fs::write(&certificate.key, octets).unwrap();
        let refused =
            |process: &Process| process.lines().iter().filter(|line| line.contains("configuration refused")).count();
        let before = refused(&process);
        process.signal(Signal::HUP);
        wait::until(form, SOON, || refused(&process) > before);
    }
    secret.assert_not_in(process.lines().join("\n").as_bytes(), "the log");
}
