//! Texts of nearly the greatest length, made to cost more than their length: each is read in steps that grow with the length
//! only, and what is said of it is bounded.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use super::check::{self, Limits};
use super::contract_tests::MINIMAL;
use super::error::{MOST, Problem};
use super::{Config, ConfigErrors, Numbers, effort, forecast, from_str};

/// What it takes to read a text, in steps for each octet; without [`MOST`] times its longest line for the places of errors.
const PER_OCTET: u64 = 20;

fn read(text: &str) -> Result<Config, ConfigErrors> {
    let before = effort::spent();
    let read = from_str("f.toml", text);
    let (steps, length) = (effort::spent() - before, text.len() as u64);
    let longest = text.lines().map(str::len).max().unwrap_or(0) as u64;
    let most = PER_OCTET * length + MOST as u64 * longest;
    assert!(steps <= most, "{steps} steps for {length} octets, more than {most}");
    read
}

/// How many errors there are: those that are told are bounded in number and length, and the last one says how many more.
fn count(text: &str) -> usize {
    let errors = read(text).unwrap_err();
    let errors: Vec<_> = errors.iter().collect();
    assert_eq!(errors.len(), MOST + 1);
    assert!(errors[..MOST].is_sorted_by_key(|error| error.position));
    assert!(errors.iter().all(|error| error.to_string().len() < 4096));
    let Problem::More(more) = errors[MOST].problem else { panic!("{}", errors[MOST]) };
    assert_eq!(errors[MOST].to_string(), format!("f.toml: {more} more errors; they are not listed"));
    MOST + more
}

#[test]
fn many_backends() {
    let backend = |number: u16| {
        let [high, low] = number.to_be_bytes();
        format!("{{name='{number}',address='10.0.{high}.{low}:1'}},")
    };
    let backends: String = (0..24_000).map(backend).collect();
    let listener = "listener=[{name='l',address='127.0.0.1:0',pool='p'}]";
    let text = format!("{listener}\npool=[{{name='p',backend=[{backends}]}}]");
    let config = read(&text).unwrap();
    assert_eq!(forecast::lines(&config, Limits::default()).len(), 2 * 24_000 + 3);
    check::warnings(&config, Limits::default());
    let numbers = Numbers::new(&config);
    assert_eq!(numbers.backend("23999"), Some(23_999));
}

#[test]
fn many_pools_and_many_listeners_of_one_with_long_headers() {
    let mut text = String::new();
    for number in 0..4_500 {
        text += &format!(
            "[[listener]]\nname='{number}'\naddress='127.0.0.1:0'\npool='{}'\n[[pool]]\nname='{number}'\n\
             [pool.proxy_protocol]\nmax_header='61000B'\n[[pool.backend]]\nname='{number}'\naddress='10.0.0.1:1'\n",
            number * (number % 2)
        );
    }
    let long = format!("[[pool.proxy_protocol.tlv]]\ntype=0xE0\nvalue='{}'\n", "x".repeat(60_000));
    text = text.replacen("[[pool.backend]]", &format!("{long}[[pool.backend]]"), 1);
    let config = read(&text).unwrap();
    assert_eq!(forecast::lines(&config, Limits::default()).len(), 4 * 4_500 + 1);
    check::warnings(&config, Limits::default());
}

#[test]
fn many_unknown_keys() {
    let keys: String = (0..110_000).map(|number| format!("k{number}=1\n")).collect();
    let text = format!("[server]\n{keys}");
    assert!(text.len() < 1 << 20);
    // Two more: there is no listener and no pool.
    assert_eq!(count(&text), 110_000 + 2);
    // In one line, where the column of each is far.
    let keys: Vec<String> = (0..110_000).map(|number| format!("k{number}=1")).collect();
    assert_eq!(count(&format!("server={{{}}}", keys.join(","))), 110_000 + 2);
}

#[test]
fn many_empty_tables() {
    // Each lacks its name and its backends.
    let text = format!("pool=[{}]", "{},".repeat(300_000));
    assert_eq!(count(&text), 2 * 300_000 + 1);
    let text = format!("listener=[{}]", "{},".repeat(300_000));
    assert_eq!(count(&text), 3 * 300_000 + 1);
    let text = "[[pool]]\n".repeat(110_000);
    assert_eq!(count(&text), 2 * 110_000 + 1);
    let text = format!("pool=[{{name='p',backend=[{}]}}]", "{},".repeat(300_000));
    assert_eq!(count(&text), 2 * 300_000 + 1);
}

#[test]
fn many_listeners_that_name_no_pool_and_the_same_address() {
    let listeners: String =
        (0..10_000).map(|number| format!("[[listener]]\nname='{number}'\naddress='[::1]:1'\npool='p'\n")).collect();
    let pools: String = (0..10_000).map(|number| format!("[[pool]]\nname='{number}'\n")).collect();
    let text = listeners + &pools;
    // No pool, the address of another; no backends.
    assert_eq!(count(&text), 2 * 10_000 - 1 + 10_000);
}

#[test]
fn much_that_is_no_toml() {
    assert!(count(&"=\n".repeat(500_000)) >= 500_000);
    assert_eq!(count(&"pool=1\n".repeat(140_000)), 139_999);
}

#[test]
fn a_long_value_is_not_told_whole() {
    let long = "x".repeat(200_000);
    let text = format!("[server]\nlog='{long}='\nworkers='{long}'\n{long}=1\n[watchdog]\nreap='{long}'\n{MINIMAL}");
    let errors = read(&text).unwrap_err();
    assert_eq!(errors.iter().count(), 4);
    assert!(errors.iter().all(|error| error.to_string().len() < 4096), "{}", errors.iter().count());
}

/// What is no configuration may be a secret: nothing of it is said but where it fails.
#[test]
fn another_file_is_not_quoted() {
    for (text, said) in [
        ("0123456789abcdef=1", "f.toml:1:1: is no configuration of this program, which has the tables `server`, "),
        ("secret0=1\nsecret0=1", "f.toml:2:1: a key is given twice"),
        ("[server]\nworkers=1\nworkers=1", "f.toml:3:1: key `workers`: is given twice"),
        ("-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQ==\n", "f.toml:1:12: "),
    ] {
        let errors = read(text).unwrap_err().to_string();
        assert!(errors.starts_with(said), "{errors}");
        assert!(!errors.contains("0123456789") && !errors.contains("secret0") && !errors.contains("MIGH"), "{errors}");
    }
}
