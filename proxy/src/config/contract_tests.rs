//! The format as a whole: the full file of the contract, its defaults, and what the README says of both.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use super::schema::{FORMAT, Key, Shape};
use super::*;

/// The intended configuration: every section, every key, every default.
pub(super) const FULL: &str = include_str!("../../tests/data/counterfoil.toml");

const README: &str = include_str!("../../../README.md");

/// The least that is a configuration.
pub(super) const MINIMAL: &str = r#"
[[listener]]
name = "dns"
address = "127.0.0.1:5300"
pool = "resolvers"

[[pool]]
name = "resolvers"

[[pool.backend]]
name = "unbound-1"
address = "127.0.0.1:15302"
"#;

/// All keys below `keys`, by full path.
fn paths(keys: &[Key], prefix: &str, out: &mut Vec<String>) {
    for key in keys {
        let path = format!("{prefix}{}", key.name);
        match key.shape {
            Shape::Value => out.push(path),
            Shape::Table(keys) | Shape::Tables(keys) => paths(keys, &format!("{path}."), out),
        }
    }
}

/// All keys of a parsed file, by full path.
fn keys_of(table: &toml::Table, prefix: &str, out: &mut Vec<String>) {
    for (key, value) in table {
        let path = format!("{prefix}{key}");
        match value {
            toml::Value::Table(table) => keys_of(table, &format!("{path}."), out),
            toml::Value::Array(elements) if elements.iter().any(toml::Value::is_table) => {
                for element in elements {
                    keys_of(element.as_table().unwrap(), &format!("{path}."), out);
                }
            }
            _ => out.push(path),
        }
    }
}

#[test]
fn the_schema_has_the_keys_of_the_full_file_and_no_others() {
    let mut in_file = Vec::new();
    keys_of(&FULL.parse().unwrap(), "", &mut in_file);
    let mut in_schema = Vec::new();
    paths(FORMAT, "", &mut in_schema);
    in_file.sort();
    in_schema.sort();
    assert_eq!(in_schema, in_file);
}

/// The README's table has all keys, with the defaults of the full file.
#[test]
fn the_readme_has_every_key() {
    let (_, section) = README.split_once("\n## Configuration\n").unwrap();
    let (table, _) = section.split_once("\n## ").unwrap();
    let full: toml::Value = FULL.parse::<toml::Table>().unwrap().into();
    let mut in_table = Vec::new();
    for row in table.lines().filter_map(|line| line.strip_prefix("| `")) {
        let mut cells = row.split(" | ");
        let key = cells.next().unwrap().trim_end_matches('`');
        in_table.push(key.to_owned());
        let Some(default) = cells.next().and_then(|cell| cell.strip_prefix('`')?.strip_suffix('`')) else { continue };
        let element = |value: toml::Value| value.get(0).cloned().unwrap_or(value);
        let value = key.split('.').fold(full.clone(), |value, part| element(value).get(part).unwrap().clone());
        assert_eq!(default, value.to_string(), "{key}");
    }
    let mut in_schema = Vec::new();
    paths(FORMAT, "", &mut in_schema);
    assert_eq!(in_table, in_schema, "in the order of the format");
}

#[test]
fn the_readme_s_example_is_a_configuration() {
    let (_, example) = README.split_once("```toml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let config = from_str("README.md", example).unwrap();
    assert_eq!(config.pools.first().unwrap().proxy_protocol.as_ref().unwrap().identity, Identity::Address);
}

#[test]
fn the_defaults_are_those_of_the_full_file() {
    let full = from_str("full.toml", FULL).unwrap();
    let minimal = from_str("minimal.toml", MINIMAL).unwrap();
    assert_eq!(full.server, Server::default());
    assert_eq!(full.overload, Overload::default());
    assert_eq!(full.connections, Connections::default());
    assert_eq!(full.kernel, Kernel::default());
    assert_eq!(full.watchdog, Watchdog::default());
    assert_eq!(full.admin, Admin::default());
    let mut tlvs = TlvSet::default();
    tlvs.push(0xe0, "{qname_label:1}".parse().unwrap()).unwrap();
    let proxy = full.pools.first().unwrap().proxy_protocol.clone();
    assert_eq!(proxy, Some(ProxyProtocol { tlvs, ..ProxyProtocol::default() }));
    let from = vec!["127.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()];
    let accept_proxy = full.listeners.first().unwrap().accept_proxy.clone();
    assert_eq!(accept_proxy, Some(AcceptProxy { from, ..AcceptProxy::default() }));
    let tls = ListenerTls { certificate: "cert.pem".into(), key: "key.pem".into(), ..ListenerTls::default() };
    assert_eq!(full.listeners.first().unwrap().tls, Some(tls));
    let (mut listeners, mut pools) = (full.listeners.clone(), full.pools.clone());
    listeners.first_mut().unwrap().accept_proxy = None;
    listeners.first_mut().unwrap().tls = None;
    pools.first_mut().unwrap().proxy_protocol = None;
    // What is refused depends on whether the pool's headers say who asks.
    assert_eq!(listeners.first().unwrap().refuse, Refusable::default_for(full.pools.first().unwrap()));
    listeners.first_mut().unwrap().refuse = Refusable::default_for(pools.first().unwrap());
    let tls = pools.first_mut().unwrap().backends.first_mut().unwrap().tls.take().unwrap();
    assert_eq!((tls.server_name.to_str().as_ref(), tls.proxy_outside_tls), ("unbound-1.example", true));
    assert_eq!(Config { listeners, pools, ..full }, minimal, "and a key that is left out has its default");
}

#[test]
fn workers_are_as_many_as_there_are_cores() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let workers = |line: &str| from_str("f", &format!("server.workers = {line}\n{MINIMAL}")).unwrap().server.workers;
    assert_eq!(workers("0"), cores);
    assert_eq!(workers("7"), 7);
    assert_eq!(from_str("f", MINIMAL).unwrap().server.workers, cores);
}

#[test]
fn empty_strings_turn_the_admin_interfaces_off() {
    let text = format!("{MINIMAL}[admin]\nhttp = \"\"\ntoken_file = \"\"\nsocket = \"\"\n");
    assert_eq!(from_str("f", &text).unwrap().admin, Admin { http: None, token_file: None, socket: None });
}

#[test]
fn inline_tables_dotted_keys_and_a_byte_order_mark() {
    let text = "\u{feff}listener = [{ name = \"dns\", address = \"127.0.0.1:5300\", pool = \"resolvers\" }]\n\
                pool = [{ name = \"resolvers\", backend = [{ name = \"unbound-1\", address = \"127.0.0.1:15302\", \
                health.mode = \"down\" }] }]\n";
    let config = from_str("f", text).unwrap();
    let mut expected = from_str("f", MINIMAL).unwrap();
    expected.pools.first_mut().unwrap().backends.first_mut().unwrap().health.mode = HealthMode::Down;
    assert_eq!(config, expected);
}

#[test]
fn ipv4_addresses_written_as_ipv6_are_ipv4() {
    let text = MINIMAL.replace("127.0.0.1:15302", "[::ffff:127.0.0.1]:15302") + "source = [\"::ffff:127.0.0.9\"]\n";
    let config = from_str("f", &text).unwrap();
    let backend = config.pools.first().unwrap().backends.first().unwrap();
    assert_eq!(backend.address, SocketAddr::from(([127, 0, 0, 1], 15302)));
    assert_eq!(backend.source, [SocketAddr::from(([127, 0, 0, 9], 0))]);
}

#[test]
fn a_file_is_read() {
    let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/counterfoil.toml"));
    let errors = load(path).unwrap_err();
    let first = errors.iter().next().unwrap().to_string();
    let certificate = path.with_file_name("cert.pem");
    let text = std::fs::read_to_string(path).unwrap();
    let line = 1 + text.lines().position(|line| line.starts_with("certificate = ")).unwrap();
    assert_eq!(
        first,
        format!(
            "{}:{line}:15: key `listener.tls.certificate`: {} cannot be read: No such file or directory (os error 2)",
            path.display(),
            certificate.display()
        )
    );
}

#[test]
fn addresses_of_one_link_keep_their_zone() {
    let text = MINIMAL.replace("127.0.0.1:5300", "[fe80::1%lo]:5300").replace("127.0.0.1:15302", "[fe80::2%lo]:15302")
        + "source = [\"fe80::3%lo\"]\n";
    let config = from_str("f", &text).unwrap();
    let printed = print::to_toml(&config);
    for line in ["address = \"[fe80::1%lo]:5300\"", "address = \"[fe80::2%lo]:15302\"", "source = [\"fe80::3%lo\"]"] {
        assert!(printed.contains(line), "{line}: {printed}");
    }
    assert_eq!(from_str("f", &printed).unwrap(), config);
    let errors = from_str("f", &text.replace("%lo", "%nosuch0")).unwrap_err().to_string();
    let lines: Vec<&str> = errors.lines().collect();
    assert_eq!(
        lines.first().copied(),
        Some("f:4:11: key `listener.address`: there is no interface `nosuch0` here; `ip link` lists them")
    );
    assert!(lines.len() == 3 && lines.iter().all(|line| line.contains("`nosuch0`")), "{errors}");
}
