//! The format as a whole: the full file of the contract, its defaults, and what is printed is read again.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use proptest::prelude::*;

use super::error::Problem;
use super::schema::{FORMAT, Key, Shape, State};
use super::*;

/// The intended configuration: every section, every key, every default.
const FULL: &str = include_str!("../../tests/data/counterfoil.toml");

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

/// All keys below `keys` of this state, by full path.
fn paths(keys: &[Key], state: State, prefix: &str, out: &mut Vec<String>) {
    for key in keys {
        let path = format!("{prefix}{}", key.name);
        match key.shape {
            Shape::Value(of_key) if of_key == state => out.push(path),
            Shape::Value(_) => {}
            Shape::Table(keys) | Shape::Tables(keys) => paths(keys, state, &format!("{path}."), out),
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
    paths(FORMAT, State::Works, "", &mut in_schema);
    paths(FORMAT, State::NotYet, "", &mut in_schema);
    in_file.sort();
    in_schema.sort();
    assert_eq!(in_schema, in_file);
}

/// The README's table has the keys that work, with the defaults of the full file, and its list all others.
#[test]
fn the_readme_has_every_key() {
    let (_, section) = README.split_once("\n## Configuration\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let (table, list) = section.split_once("\"not supported yet\"").unwrap();
    let full: toml::Value = FULL.parse::<toml::Table>().unwrap().into();
    let mut in_table = Vec::new();
    for row in table.lines().filter_map(|line| line.strip_prefix("| `")) {
        let mut cells = row.split(" | ");
        let key = cells.next().unwrap().trim_end_matches('`');
        in_table.push(key.to_owned());
        let Some(default) = cells.next().and_then(|cell| cell.strip_prefix('`')?.strip_suffix('`')) else { continue };
        let element = |value: toml::Value| value.get(0).cloned().unwrap_or(value);
        let value = key.split('.').fold(full.clone(), |value, part| element(value).get(part).unwrap().clone());
        let expected = if key == "pool.backend.health.mode" { "\"up\"".to_owned() } else { value.to_string() };
        assert_eq!(default, expected, "{key}");
    }
    let mut works = Vec::new();
    paths(FORMAT, State::Works, "", &mut works);
    assert_eq!(in_table, works, "in the order of the format");
    let in_list: Vec<&str> = list.split('`').skip(1).step_by(2).filter(|key| key.contains('.')).collect();
    let mut not_yet = Vec::new();
    paths(FORMAT, State::NotYet, "", &mut not_yet);
    assert_eq!(in_list, not_yet, "in the order of the format");
}

#[test]
fn the_readme_s_example_is_a_configuration() {
    let (_, example) = README.split_once("```toml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let config = from_str("README.md", example).unwrap();
    assert_eq!(config.pools.first().unwrap().proxy_protocol.as_ref().unwrap().identity, Identity::Address);
}

/// Every key of the full file that does not work is refused, at its own line, and nothing else is.
#[test]
fn the_full_file_is_refused_for_what_does_not_work_yet() {
    let errors = from_str("full.toml", FULL).unwrap_err();
    let mut refused = Vec::new();
    for error in errors.iter() {
        let key = error.key.clone().unwrap();
        let line = FULL.lines().nth(error.position.unwrap().line - 1).unwrap();
        assert!(line.starts_with(key.rsplit('.').next().unwrap()), "{error}: {line}");
        match &error.problem {
            Problem::NotSupportedYet => refused.push(key),
            Problem::ValueNotSupportedYet { value: "auto", .. } => assert_eq!(key, "pool.backend.health.mode"),
            _ => panic!("{error}"),
        }
    }
    let mut not_yet = Vec::new();
    paths(FORMAT, State::NotYet, "", &mut not_yet);
    refused.sort();
    not_yet.sort();
    assert_eq!(refused, not_yet);
}

/// The full file without the lines of keys that do not work, and with a mode that does.
fn full_without_what_is_refused() -> String {
    let refused: Vec<usize> = from_str("full.toml", FULL)
        .unwrap_err()
        .iter()
        .filter(|error| error.problem == Problem::NotSupportedYet)
        .map(|error| error.position.unwrap().line)
        .collect();
    let mut text = String::new();
    for (index, line) in FULL.lines().enumerate() {
        // Tables of which nothing is left are refused even when they are empty.
        let empty = ["[overload]", "[listener.accept_proxy]", "[listener.tls]", "[pool.backend.tls]"];
        if !refused.contains(&(index + 1)) && !empty.iter().any(|table| line.starts_with(table)) {
            text.push_str(&line.replace("\"auto\"                      # auto: a real", "\"up\" # "));
            text.push('\n');
        }
    }
    text
}

#[test]
fn the_defaults_are_those_of_the_full_file() {
    let full = from_str("full.toml", &full_without_what_is_refused()).unwrap();
    let minimal = from_str("minimal.toml", MINIMAL).unwrap();
    assert_eq!(full.server, Server::default());
    assert_eq!(full.connections, Connections::default());
    assert_eq!(full.kernel, Kernel::default());
    assert_eq!(full.watchdog, Watchdog::default());
    assert_eq!(full.admin, Admin::default());
    let mut tlvs = TlvSet::default();
    tlvs.push(0xe0, "{qname_label:1}".parse().unwrap()).unwrap();
    let proxy = full.pools.first().unwrap().proxy_protocol.clone();
    assert_eq!(proxy, Some(ProxyProtocol { tlvs, ..ProxyProtocol::default() }));
    let mut pools = full.pools.clone();
    pools.first_mut().unwrap().proxy_protocol = None;
    assert_eq!(Config { pools, ..full }, minimal, "and a key that is left out has its default");
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
    let text = format!("{MINIMAL}[admin]\nhttp = \"\"\nsocket = \"\"\n");
    assert_eq!(from_str("f", &text).unwrap().admin, Admin { http: None, socket: None });
}

#[test]
fn inline_tables_dotted_keys_and_a_byte_order_mark() {
    let text = "\u{feff}listener = [{ name = \"dns\", address = \"127.0.0.1:5300\", pool = \"resolvers\" }]\n\
                pool = [{ name = \"resolvers\", backend = [{ name = \"unbound-1\", address = \"127.0.0.1:15302\", \
                health.mode = \"down\" }] }]\n";
    let config = from_str("f", text).unwrap();
    let mut expected = from_str("f", MINIMAL).unwrap();
    expected.pools.first_mut().unwrap().backends.first_mut().unwrap().health = Health::Down;
    assert_eq!(config, expected);
}

#[test]
fn ipv4_addresses_written_as_ipv6_are_ipv4() {
    let text = MINIMAL.replace("127.0.0.1:15302", "[::ffff:127.0.0.1]:15302") + "source = [\"::ffff:127.0.0.9\"]\n";
    let config = from_str("f", &text).unwrap();
    let backend = config.pools.first().unwrap().backends.first().unwrap();
    assert_eq!(backend.address, SocketAddr::from(([127, 0, 0, 1], 15302)));
    assert_eq!(backend.source, [IpAddr::from([127, 0, 0, 9])]);
}

#[test]
fn a_file_is_read() {
    let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/counterfoil.toml"));
    let errors = load(path).unwrap_err();
    let first = errors.iter().next().unwrap().to_string();
    let file = path.display();
    assert_eq!(first, format!("{file}:11:1: key `overload.threshold`: not supported yet"));
}

/// Strings that may be names.
fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9._-]{1,64}".prop_filter("taken", |name| name != "drill" && name != "unknown")
}

fn duration(min: u64) -> impl Strategy<Value = Duration> {
    let max = u64::try_from(units::MAX_DURATION.as_millis()).unwrap();
    prop_oneof![min..=10_000, min..=max, Just(60_000)].prop_map(Duration::from_millis)
}

fn template() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just("{client_ip}".to_owned()),
        Just("{client_port}".to_owned()),
        Just("{listener}".to_owned()),
        Just("{qname}".to_owned()),
        Just("{qname_label:127}".to_owned()),
        Just("{qtype}".to_owned()),
        Just("{uuid}".to_owned()),
        Just("{{}}".to_owned()),
        "[^{}]{0,8}",
    ];
    prop_oneof![
        prop::collection::vec(part, 0..4)
            .prop_map(|parts| parts.concat())
            .prop_filter("hex", |t| !t.starts_with("hex:")),
        prop::collection::vec("[0-9a-fA-F]{2}", 0..8).prop_map(|bytes| format!("hex:{}", bytes.concat())),
    ]
}

fn identity() -> impl Strategy<Value = Identity> {
    prop_oneof![
        Just(Identity::Connection),
        Just(Identity::Address),
        (1..=32u8, 1..=128u8).prop_map(|(v4, v6)| Identity::Subnet { v4, v6 }),
        Just(Identity::Forwarder),
    ]
}

prop_compose! {
    fn proxy_protocol()(
        identity in identity(),
        max_header in 4096..=65_551usize,
        tlvs in prop::collection::vec((0xe0..=0xefu8, template()), 0..4),
    ) -> ProxyProtocol {
        let mut set = TlvSet::default();
        for (kind, template) in tlvs {
            set.push(kind, template.parse().unwrap()).unwrap();
        }
        ProxyProtocol { identity, max_header, tlvs: set }
    }
}

prop_compose! {
    fn backend()(
        port in 1..=u16::MAX,
        v6 in any::<bool>(),
        max_in_flight in 1..=65_536usize,
        max_connections in 1..=100_000usize,
        connect_timeout in duration(1),
        sources in prop::collection::btree_set(1..=250u8, 0..4),
        one_shot_close in prop_oneof![Just(OneShotClose::Reset), Just(OneShotClose::Fin)],
        health in prop_oneof![Just(Health::Up), Just(Health::Down)],
    ) -> Backend {
        let ip = |host: u8| -> IpAddr {
            if v6 { format!("2001:db8::{host:x}").parse().unwrap() } else { IpAddr::from([192, 0, 2, host]) }
        };
        Backend {
            max_in_flight,
            max_connections,
            connect_timeout,
            source: sources.into_iter().map(ip).collect(),
            one_shot_close,
            health,
            ..Backend::new("", SocketAddr::new(ip(251), port))
        }
    }
}

prop_compose! {
    fn pool()(
        query_timeout in duration(1),
        retries in 0..=10u8,
        proxy_protocol in prop::option::of(proxy_protocol()),
        mut backends in prop::collection::vec(backend(), 1..4),
    ) -> Pool {
        backends.sort_by_key(|backend| backend.address);
        backends.dedup_by_key(|backend| backend.address);
        Pool { query_timeout, retries, proxy_protocol, ..Pool::new("", backends) }
    }
}

prop_compose! {
    fn listener(pools: usize)(
        address in any::<[u8; 3]>(),
        port in any::<u16>(),
        pool in 0..pools,
        numbers in (1..=100_000usize, 1..=65_536usize),
        timeouts in (duration(1), duration(1), duration(1)),
    ) -> Listener {
        let [a, b, c] = address;
        Listener {
            max_connections_per_client: numbers.0,
            max_in_flight: numbers.1,
            idle_timeout: timeouts.0,
            message_timeout: timeouts.1,
            write_timeout: timeouts.2,
            ..Listener::new("", SocketAddr::from(([127, a, b, c], port)), pool)
        }
    }
}

prop_compose! {
    fn connections()(
        times in (duration(1), duration(1), duration(0), duration(10)),
        counts in (0..=100usize, 1..=100usize, 1..=100_000usize, 0..=1000usize),
        max_opens_per_client in 0..=1_000_000u32,
    ) -> Connections {
        Connections {
            idle_timeout: times.0,
            max_age: times.1,
            max_wait: times.2,
            cleanup_interval: times.3,
            max_idle_per_backend: counts.0,
            max_owned_per_client: counts.1,
            max_total: counts.2,
            max_waiting: counts.3,
            max_opens_per_client,
        }
    }
}

prop_compose! {
    fn watchdog()(
        times in (duration(10), duration(0), duration(10)),
        sweeps in 1..=1000u32,
        reap in prop_oneof![Just(ReapMode::Off), Just(ReapMode::DryRun), Just(ReapMode::On)],
        max_reaps_per_minute in 1..=1_000_000u32,
        classes in prop::sample::subsequence(Class::ALL.to_vec(), 1..=7).prop_shuffle(),
    ) -> Watchdog {
        Watchdog {
            interval: times.0,
            grace: times.1,
            crosscheck_interval: times.2,
            sweeps,
            reap,
            max_reaps_per_minute,
            classes,
        }
    }
}

prop_compose! {
    fn shape()(pools in prop::collection::vec(pool(), 1..4))(
        listeners in prop::collection::vec(listener(pools.len()), 1..4),
        pools in Just(pools),
    ) -> (Vec<Listener>, Vec<Pool>) {
        (listeners, pools)
    }
}

prop_compose! {
    fn config()(
        (mut listeners, mut pools) in shape(),
        names in prop::collection::hash_set(name(), 12),
        server in (1..=1024usize, duration(0), 1..=1_000_000usize),
        connections in connections(),
        kernel in (
            prop_oneof![Just(View::Auto), Just(View::Ebpf), Just(View::SockDiag), Just(View::None)],
            1..=1_000_000u32,
        ),
        watchdog in watchdog(),
        http in prop::option::of(any::<u16>()),
        socket in prop::option::of("[^\u{0}]{1,26}"),
    ) -> Config {
        listeners.sort_by_key(|listener| listener.address);
        listeners.dedup_by_key(|listener| listener.address);
        // Twelve are enough for all backends; listeners and pools have name spaces of their own.
        for (listener, name) in listeners.iter_mut().zip(&names) {
            listener.name.clone_from(name);
        }
        for (pool, name) in pools.iter_mut().zip(&names) {
            pool.name.clone_from(name);
        }
        for (backend, name) in pools.iter_mut().flat_map(|pool| &mut pool.backends).zip(&names) {
            backend.name.clone_from(name);
        }
        let (workers, drain_timeout, max_connections) = server;
        Config {
            server: Server { workers, drain_timeout, max_connections, log: "warn,counterfoil::watchdog=debug".to_owned() },
            listeners,
            pools,
            connections,
            kernel: Kernel { view: kernel.0, max_sockets: kernel.1 },
            watchdog,
            admin: Admin {
                http: http.map(|port| SocketAddr::from(([127, 0, 0, 1], port))),
                socket: socket.map(PathBuf::from),
            },
        }
    }
}

proptest! {
    #[test]
    fn what_is_printed_is_read_again(config in config()) {
        let text = print::to_toml(&config);
        match from_str("printed.toml", &text) {
            Ok(read) => prop_assert_eq!(read, config),
            Err(errors) => prop_assert!(false, "{errors}\n{text}"),
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        drop(from_str("f", &text));
    }

    /// Text of the right words in any order: gets further than noise.
    #[test]
    fn any_words_are_read_or_refused(words in prop::collection::vec(
        prop_oneof![
            prop::sample::select(FULL.split_inclusive(['\n', ' ', '"', '=', '.', ':']).collect::<Vec<_>>()),
            prop::sample::select(vec!["\n", "[[", "]]", "=", "\"", "{", "}", ",", "-1", "0xE0", "\u{e9}", "\r\n"]),
        ],
        0..40,
    )) {
        drop(from_str("f", &words.concat()));
    }

    /// The full file with a piece cut out or replaced.
    #[test]
    fn a_damaged_file_is_read_or_refused(at in 0..FULL.len(), length in 0..80usize, patch in "[\\x00-\\x7f]{0,3}") {
        let (start, end) = (FULL.floor_char_boundary(at), FULL.floor_char_boundary(at + length));
        let text = format!("{}{patch}{}", FULL.get(..start).unwrap(), FULL.get(end..).unwrap());
        if let Err(errors) = from_str("f", &text) {
            prop_assert!(errors.iter().all(|error| error.position.is_some()));
        }
    }
}
