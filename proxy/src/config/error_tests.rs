//! One test per kind of error, each against the whole text.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use super::contract_tests::MINIMAL;
use super::{from_str, load};

/// The errors of a text, one per line.
fn errors(text: &str) -> String {
    from_str("f.toml", text).unwrap_err().to_string()
}

/// The errors of the minimal configuration with this behind it; its own first line is 13.
fn with(text: &str) -> String {
    assert_eq!(MINIMAL.lines().count(), 12);
    errors(&format!("{MINIMAL}{text}"))
}

/// The error of this value of a key of a table, at line 14.
fn value(table: &str, line: &str) -> String {
    with(&format!("{table}\n{line}\n"))
}

/// A configuration with this pool and backend, from line 6 and line 8.
fn pool(pool: &str, backend: &str) -> String {
    errors(&format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n[[pool]]\n{pool}\n[[pool.backend]]\n{backend}\n"
    ))
}

const POOL: &str = "name = \"p\"";
const BACKEND: &str = "name = \"b\"\naddress = \"192.0.2.1:53\"";

#[test]
fn not_toml() {
    assert_eq!(errors("a = \nb = 1 2\n"), {
        "f.toml:1:5: string values must be quoted, expected literal string\n\
         f.toml:2:5: string values must be quoted, expected literal string"
    });
}

#[test]
fn given_twice() {
    assert_eq!(with("[server]\nworkers = 1\n workers = 2\n"), "f.toml:15:2: key `workers`: is given twice");
}

#[test]
fn unknown_keys() {
    assert_eq!(
        value("[server]", "worker = 1"),
        "f.toml:14:1: key `server.worker`: unknown key; did you mean `workers`?"
    );
    assert_eq!(with("[[severs]]\n"), "f.toml:13:3: key `severs`: unknown key; did you mean `server`?");
    assert_eq!(with("[colours]\n"), "f.toml:13:2: key `colours`: unknown key");
    assert_eq!(
        value("[server]", "\"a\\u001bb\" = 1"),
        "f.toml:14:1: key `server.\"a\\u{1b}b\"`: unknown key",
        "what could garble a terminal is escaped"
    );
    assert_eq!(
        pool("name = \"p\"\nidle_timeout = \"1s\"", BACKEND),
        "f.toml:7:1: key `pool.idle_timeout`: unknown key; did you mean `overload.idle_timeout` or \
         `listener.idle_timeout` or `connections.idle_timeout`?"
    );
}

#[test]
fn wrong_types() {
    for (table, line, message) in [
        ("[server]", "workers = \"2\"", "14:11: key `server.workers`: expected a whole number, found string"),
        ("[server]", "workers = 2.0", "14:11: key `server.workers`: expected a whole number, found float"),
        ("[server]", "log = true", "14:7: key `server.log`: expected a string, found boolean"),
        (
            "[server]",
            "drain_timeout = 30",
            "14:17: key `server.drain_timeout`: expected a duration, such as \"10s\", found integer",
        ),
        (
            "[pool.proxy_protocol]",
            "max_header = 512",
            "14:14: key `pool.proxy_protocol.max_header`: expected a size, such as \"512B\", found integer",
        ),
        ("[watchdog]", "classes = \"orphan\"", "14:11: key `watchdog.classes`: expected a list, found string"),
        ("[watchdog]", "classes = [1]", "14:12: key `watchdog.classes`: expected a string, found integer"),
    ] {
        assert_eq!(value(table, line), format!("f.toml:{message}"));
    }
    assert_eq!(with("[[server]]\n"), "f.toml:13:1: key `server`: expected a table in single brackets, found array");
    assert_eq!(
        errors("pool = 3\n[listener]\nname = \"x\"\n"),
        "f.toml:1:8: key `pool`: expected tables in double brackets, found integer\n\
         f.toml:2:1: key `listener`: expected tables in double brackets, found table"
    );
    assert_eq!(
        errors("pool = [3]\nlistener = [{name = \"a\", address = \"[::]:53\", pool = \"p\"}]\n"),
        "f.toml:1:9: key `pool`: expected tables in double brackets, found integer"
    );
}

#[test]
fn missing() {
    assert_eq!(errors(""), "f.toml:1:1: key `pool`: is missing\nf.toml:1:1: key `listener`: is missing");
    assert_eq!(
        errors("[[listener]]\n[[pool]]\n[[pool.backend]]\n[[pool.backend]]\n[[pool.proxy_protocol.tlv]]\n"),
        "f.toml:1:1: key `listener.name`: is missing\n\
         f.toml:1:1: key `listener.pool`: is missing\n\
         f.toml:1:1: key `listener.address`: is missing\n\
         f.toml:2:1: key `pool.name`: is missing\n\
         f.toml:3:1: key `pool.backend[0].name`: is missing\n\
         f.toml:3:1: key `pool.backend[0].address`: is missing\n\
         f.toml:4:1: key `pool.backend[1].name`: is missing\n\
         f.toml:4:1: key `pool.backend[1].address`: is missing\n\
         f.toml:5:1: key `pool.proxy_protocol.tlv.type`: is missing\n\
         f.toml:5:1: key `pool.proxy_protocol.tlv.value`: is missing"
    );
    assert_eq!(
        errors("[[listener]]\nname = \"dns\"\naddress = \"[::1]:53\"\npool = \"p\"\n[[pool]]\nname = \"p\"\n"),
        "f.toml:5:1: key `pool.backend`: is missing"
    );
}

#[test]
fn empty_lists() {
    assert_eq!(
        errors("listener = []\npool = [{ name = \"p\", backend = [] }]\n"),
        "f.toml:1:12: key `listener`: must not be empty\nf.toml:2:33: key `pool.backend`: must not be empty"
    );
    assert_eq!(
        value("[watchdog]", "classes = []"),
        "f.toml:14:11: key `watchdog.classes`: must not be empty; `reap = \"off\"` is the way to act on none"
    );
}

#[test]
fn units() {
    assert_eq!(
        value("[server]", "drain_timeout = \"30\""),
        "f.toml:14:17: key `server.drain_timeout`: \"30\" has no unit; the units are ms, s, m and h"
    );
    assert_eq!(
        value("[pool.proxy_protocol]", "max_header = \"1KB\""),
        "f.toml:14:14: key `pool.proxy_protocol.max_header`: there is no unit \"KB\"; the units are B, KiB and MiB"
    );
}

#[test]
fn out_of_range() {
    for (table, line, at, key, range) in [
        ("[server]", "workers = 1025", 11, "server.workers", "0 to 1024"),
        ("[server]", "workers = -1", 11, "server.workers", "0 to 1024"),
        ("[server]", "workers = 99999999999999999999999999999999999999999", 11, "server.workers", "0 to 1024"),
        ("[server]", "max_connections = 0", 19, "server.max_connections", "1 to 1048576"),
        ("[overload]", "threshold = 0", 13, "overload.threshold", "1 to 100"),
        ("[overload]", "threshold = 101", 13, "overload.threshold", "1 to 100"),
        ("[overload]", "idle_timeout = \"0s\"", 16, "overload.idle_timeout", "\"1ms\" to \"8760h\""),
        ("[connections]", "max_owned_per_client = 0", 24, "connections.max_owned_per_client", "1 to 1048576"),
        ("[connections]", "idle_timeout = \"0s\"", 16, "connections.idle_timeout", "\"1ms\" to \"8760h\""),
        ("[connections]", "cleanup_interval = \"9ms\"", 20, "connections.cleanup_interval", "\"10ms\" to \"8760h\""),
        ("[kernel]", "max_sockets = 0", 15, "kernel.max_sockets", "1 to 1048576"),
        ("[watchdog]", "sweeps = 0", 10, "watchdog.sweeps", "1 to 1000"),
        ("[watchdog]", "interval = \"0s\"", 12, "watchdog.interval", "\"10ms\" to \"8760h\""),
        ("[pool.proxy_protocol]", "subnet_v4 = 33", 13, "pool.proxy_protocol.subnet_v4", "1 to 32"),
        ("[pool.proxy_protocol]", "subnet_v6 = 0", 13, "pool.proxy_protocol.subnet_v6", "1 to 128"),
        (
            "[pool.proxy_protocol]",
            "max_header = \"51B\"",
            14,
            "pool.proxy_protocol.max_header",
            "\"52B\" to \"65551B\"",
        ),
        ("[[pool.proxy_protocol.tlv]]", "value = \"\"\ntype = 256", 8, "pool.proxy_protocol.tlv.type", "0 to 255"),
    ] {
        let line_number = if table.contains("tlv") { 15 } else { 14 };
        assert_eq!(value(table, line), format!("f.toml:{line_number}:{at}: key `{key}`: must be from {range}"));
    }
    assert_eq!(
        pool("name = \"p\"\nretries = 11\nquery_timeout = \"0s\"", BACKEND),
        "f.toml:7:11: key `pool.retries`: must be from 0 to 10\n\
         f.toml:8:17: key `pool.query_timeout`: must be from \"1ms\" to \"8760h\""
    );
    assert_eq!(
        pool(POOL, &format!("{BACKEND}\nmax_in_flight = 65537\nmax_connections = 0\nconnect_timeout = \"0s\"")),
        "f.toml:10:17: key `pool.backend.max_in_flight`: must be from 1 to 65536\n\
         f.toml:11:19: key `pool.backend.max_connections`: must be from 1 to 1048576\n\
         f.toml:12:19: key `pool.backend.connect_timeout`: must be from \"1ms\" to \"8760h\""
    );
}

#[test]
fn limits_out_of_range() {
    for (line, at, range) in [
        ("max_connections = 1048577", 19, "0 to 1048576"),
        ("max_connections_per_client = 0", 30, "1 to 1048576"),
        ("client_mask_v4 = 0", 18, "1 to 32"),
        ("client_mask_v4 = 33", 18, "1 to 32"),
        ("client_mask_v6 = 129", 18, "1 to 128"),
        ("max_queries_per_connection = -1", 30, "0 to 4294967295"),
        ("max_pending_answers = \"511B\"", 23, "\"512B\" to \"1024MiB\""),
        ("connection_rate_per_client = 1000001", 30, "0 to 1000000"),
    ] {
        let (key, _) = line.split_once(' ').unwrap();
        let text = MINIMAL.replacen("pool = \"resolvers\"\n", &format!("pool = \"resolvers\"\n{line}\n"), 1);
        assert_eq!(errors(&text), format!("f.toml:6:{at}: key `listener.{key}`: must be from {range}"));
    }
    for key in ["max_connection_duration", "ban_duration"] {
        let text = MINIMAL.replacen("pool = \"resolvers\"\n", &format!("pool = \"resolvers\"\n{key} = \"9999h\"\n"), 1);
        assert!(errors(&text).starts_with(&format!("f.toml:6:{}: key `listener.{key}`: ", key.len() + 4)));
        assert!(from_str("f", &text.replace("9999h", "0s")).is_ok(), "zero: none");
    }
}

#[test]
fn choices() {
    assert_eq!(
        value("[watchdog]", "reap = \"yes\""),
        "f.toml:14:8: key `watchdog.reap`: expected \"off\", \"dry-run\" or \"on\", found \"yes\""
    );
    assert_eq!(
        value("[kernel]", "view = \"bpf\""),
        "f.toml:14:8: key `kernel.view`: expected \"auto\", \"ebpf\", \"sock-diag\" or \"none\", found \"bpf\""
    );
    assert_eq!(
        value("[pool.proxy_protocol]", "identity = \"client\""),
        "f.toml:14:12: key `pool.proxy_protocol.identity`: expected \"connection\", \"address\", \"subnet\" or \
         \"forwarder\", found \"client\""
    );
    assert_eq!(
        value("[watchdog]", "classes = [\"orphan\", \"leak\"]"),
        "f.toml:14:22: key `watchdog.classes[1]`: expected \"orphan\", \"ghost\", \"zombie\", \"hoard\", \"stuck\", \
         \"embryo\" or \"lingering\", found \"leak\""
    );
    assert_eq!(
        pool("name = \"p\"\non_failure = \"drop\"", &format!("{BACKEND}\nwrite_timeout = \"0s\"")),
        "f.toml:7:14: key `pool.on_failure`: expected \"servfail\" or \"close\", found \"drop\"\n\
         f.toml:11:17: key `pool.backend.write_timeout`: must be from \"1ms\" to \"8760h\""
    );
    assert_eq!(
        pool("name = \"p\"\npolicy = \"leastOutstanding\"", &format!("{BACKEND}\nweight = 0")),
        "f.toml:7:10: key `pool.policy`: expected \"least-outstanding\", \"round-robin\", \"weighted-random\", \
         \"consistent-hash\" or \"first-available\", found \"leastOutstanding\"\n\
         f.toml:11:10: key `pool.backend.weight`: must be from 1 to 1000"
    );
    assert_eq!(
        pool(POOL, &format!("{BACKEND}\none_shot_close = \"rst\"\nhealth.mode = \"on\"")),
        "f.toml:10:18: key `pool.backend.one_shot_close`: expected \"reset\" or \"fin\", found \"rst\"\n\
         f.toml:11:15: key `pool.backend.health.mode`: expected \"auto\", \"lazy\", \"up\" or \"down\", found \"on\""
    );
}

#[test]
fn health_checks() {
    assert_eq!(
        with("[pool.backend.health]\ninterval = \"9ms\"\ntimeout = \"0s\"\nname = \"a..b\"\nrise = 0\nfall = 1001\n"),
        "f.toml:14:12: key `pool.backend.health.interval`: must be from \"10ms\" to \"8760h\"\n\
         f.toml:15:11: key `pool.backend.health.timeout`: must be from \"1ms\" to \"8760h\"\n\
         f.toml:16:8: key `pool.backend.health.name`: is no domain name: a label is empty\n\
         f.toml:17:8: key `pool.backend.health.rise`: must be from 1 to 1000\n\
         f.toml:18:8: key `pool.backend.health.fall`: must be from 1 to 1000"
    );
}

#[test]
fn addresses() {
    let address = |address: &str| pool(POOL, &format!("name = \"b\"\naddress = \"{address}\""));
    let at = "f.toml:9:11: key `pool.backend.address`:";
    assert_eq!(
        address("localhost:53"),
        format!("{at} \"localhost:53\" is not an address with a port, such as \"127.0.0.1:53\" or \"[::1]:53\"")
    );
    assert_eq!(address("0.0.0.0:53"), format!("{at} 0.0.0.0 is not the address of one host"));
    assert_eq!(address("[ff02::1]:53"), format!("{at} ff02::1 is not the address of one host"));
    assert_eq!(address("192.0.2.1:0"), format!("{at} port 0 cannot be connected to"));
    assert_eq!(
        address("127.0.0.1:53"),
        format!("{at} 127.0.0.1:53 is where listener \"dns\" listens: every query would come back")
    );
    assert_eq!(
        value("[admin]", "http = \"9120\""),
        "f.toml:14:8: key `admin.http`: \"9120\" is not an address with a port, such as \"127.0.0.1:53\" or \"[::1]:53\""
    );
    assert_eq!(
        with("[[listener]]\nname = \"m\"\naddress = \"224.0.0.1:53\"\npool = \"resolvers\"\n"),
        "f.toml:15:11: key `listener[1].address`: 224.0.0.1 is not the address of one host"
    );
}

#[test]
fn a_listener_on_all_addresses_is_a_loop_too() {
    let text = MINIMAL.replace("127.0.0.1:5300", "0.0.0.0:15302");
    assert_eq!(
        errors(&text),
        "f.toml:12:11: key `pool.backend.address`: 127.0.0.1:15302 is where listener \"dns\" listens: every query \
         would come back"
    );
}

#[test]
fn sources() {
    let source = |source: &str| pool(POOL, &format!("{BACKEND}\nsource = {source}"));
    let at = "f.toml:10:11: key `pool.backend.source`:";
    assert_eq!(
        source("[\"eth0\"]"),
        format!("{at} \"eth0\" is not an IP address, such as \"192.0.2.1\" or \"2001:db8::1\"")
    );
    assert_eq!(source("[\"0.0.0.0\"]"), format!("{at} 0.0.0.0 is not the address of one host"));
    assert_eq!(
        source("[\"2001:db8::1\"]"),
        format!("{at} 2001:db8::1 and the backend's address 192.0.2.1:53 are of different families")
    );
    assert_eq!(
        source("[\"192.0.2.9\", \"192.0.2.9\"]"),
        "f.toml:10:24: key `pool.backend.source[1]`: 192.0.2.9 is already at line 10"
    );
    let text = MINIMAL.replace("127.0.0.1:15302", "[2001:db8::53]:53") + "source = [\"192.0.2.1\"]\n";
    assert_eq!(
        errors(&text),
        "f.toml:13:11: key `pool.backend.source`: 192.0.2.1 and the backend's address [2001:db8::53]:53 are of \
         different families"
    );
}

#[test]
fn names() {
    for name in ["", "a b", "a\\u001b", "é", &"x".repeat(65)] {
        let text = pool(POOL, &format!("name = \"{name}\"\naddress = \"192.0.2.1:53\""));
        let shown = format!("{:?}", name.replace("\\u001b", "\u{1b}"));
        assert_eq!(
            text,
            format!(
                "f.toml:8:8: key `pool.backend.name`: {shown} is no name: 1 to 64 letters, digits, '.', '_', '-' are"
            )
        );
    }
    for name in ["drill", "unknown"] {
        assert_eq!(
            pool(POOL, &format!("name = \"{name}\"\naddress = \"192.0.2.1:53\"")),
            format!("f.toml:8:8: key `pool.backend.name`: the name \"{name}\" is taken: metrics use it")
        );
    }
}

#[test]
fn duplicates() {
    assert_eq!(
        with("[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:5300\"\npool = \"resolvers\"\n"),
        "f.toml:14:8: key `listener[1].name`: \"dns\" is already at line 3\n\
         f.toml:15:11: key `listener[1].address`: 127.0.0.1:5300 is already at line 4"
    );
    assert_eq!(
        with("[[pool.backend]]\nname = \"two\"\naddress = \"127.0.0.1:15302\"\n"),
        "f.toml:15:11: key `pool.backend[1].address`: 127.0.0.1:15302 is already at line 12"
    );
    assert_eq!(
        with("[[pool]]\nname = \"resolvers\"\n[[pool.backend]]\nname = \"unbound-1\"\naddress = \"192.0.2.1:53\"\n"),
        "f.toml:14:8: key `pool[1].name`: \"resolvers\" is already at line 8\n\
         f.toml:16:8: key `pool[1].backend.name`: \"unbound-1\" is already at line 11",
        "names of backends are unique over all pools"
    );
    assert_eq!(
        value("[watchdog]", "classes = [\"ghost\", \"ghost\"]"),
        "f.toml:14:21: key `watchdog.classes[1]`: \"ghost\" is already at line 14"
    );
    let port_0 = "[[listener]]\nname = \"a\"\naddress = \"127.0.0.1:0\"\npool = \"resolvers\"\n";
    let text = MINIMAL.replace("5300", "0") + port_0;
    assert!(from_str("f.toml", &text).is_ok(), "port 0 is another port each time");
}

#[test]
fn a_pool_that_is_not_there() {
    assert_eq!(
        errors(&MINIMAL.replace("pool = \"resolvers\"", "pool = \"resolver\"")),
        "f.toml:5:8: key `listener.pool`: there is no pool \"resolver\"; the pools are \"resolvers\""
    );
}

#[test]
fn log_filters() {
    assert_eq!(
        value("[server]", "log = \"counterfoil=loud\""),
        "f.toml:14:7: key `server.log`: \"counterfoil=loud\" is no log filter: error parsing level filter: \
         expected one of \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\", or a number 0-5"
    );
}

#[test]
fn socket_paths() {
    let path = "x".repeat(108);
    assert_eq!(
        value("[admin]", &format!("socket = \"{path}\"")),
        "f.toml:14:10: key `admin.socket`: the path has 108 bytes; the kernel takes at most 107"
    );
}

#[test]
fn tlvs() {
    let tlv =
        |kind: &str, text: &str| value("[[pool.proxy_protocol.tlv]]", &format!("type = {kind}\nvalue = \"{text}\""));
    assert_eq!(
        tlv("0x03", ""),
        "f.toml:14:8: key `pool.proxy_protocol.tlv.type`: TLV type 0x03 (CRC32C) cannot be set here; types for private \
         use are 0xE0 to 0xEF"
    );
    assert_eq!(
        tlv("0xF8", ""),
        "f.toml:14:8: key `pool.proxy_protocol.tlv.type`: TLV type 0xf8 is reserved for later versions of the protocol; \
         types for private use are 0xE0 to 0xEF"
    );
    assert_eq!(
        tlv("0xE0", "a{client_ip"),
        "f.toml:15:9: key `pool.proxy_protocol.tlv.value`: this field has no closing brace; a brace itself is written \
         {{ (at character 2)"
    );
    assert_eq!(
        tlv("0xE0", "hex:0g"),
        "f.toml:15:9: key `pool.proxy_protocol.tlv.value`: not a hexadecimal digit (at character 6)"
    );
}

/// The errors of these keys of `[listener.accept_proxy]`, from line 6.
fn accept_proxy(keys: &str) -> String {
    let (listener, rest) = MINIMAL.split_once("\n[[pool]]").unwrap();
    errors(&format!("{listener}[listener.accept_proxy]\n{keys}\n[[pool]]{rest}"))
}

#[test]
fn who_may_speak_for_others() {
    assert_eq!(accept_proxy(""), "f.toml:6:1: key `listener.accept_proxy.from`: is missing");
    assert_eq!(
        accept_proxy("from = []"),
        "f.toml:7:8: key `listener.accept_proxy.from`: must not be empty; without `[listener.accept_proxy]` PROXY \
         headers are taken from nobody"
    );
    assert_eq!(
        accept_proxy("from = [\"127.0.0.1/8\", \"lb\", \"::/129\", \"::1\", \"::1/128\", 7]"),
        "f.toml:7:9: key `listener.accept_proxy.from[0]`: \"127.0.0.1/8\" has bits behind its prefix; the network is \
         127.0.0.0/8\n\
         f.toml:7:24: key `listener.accept_proxy.from[1]`: \"lb\" is not a network, such as \"192.0.2.0/24\" or \
         \"2001:db8::/32\", nor an address\n\
         f.toml:7:30: key `listener.accept_proxy.from[2]`: \"::/129\" has a prefix of more than 128 bits\n\
         f.toml:7:47: key `listener.accept_proxy.from[4]`: ::1 is already at line 7\n\
         f.toml:7:58: key `listener.accept_proxy.from[5]`: expected a string, found integer"
    );
    let trusted = "from = [\"::1\"]\n";
    assert_eq!(
        accept_proxy(&format!("{trusted}max_header = \"106B\"\ntimeout = \"0s\"\noutside_tls = 1")),
        "f.toml:8:14: key `listener.accept_proxy.max_header`: must be from \"107B\" to \"65551B\"\n\
         f.toml:9:11: key `listener.accept_proxy.timeout`: must be from \"1ms\" to \"8760h\"\n\
         f.toml:10:15: key `listener.accept_proxy.outside_tls`: expected true or false, found integer"
    );
    assert_eq!(
        value("[pool.proxy_protocol]", "pass_incoming_tlvs = 1"),
        "f.toml:14:22: key `pool.proxy_protocol.pass_incoming_tlvs`: expected true or false, found integer"
    );
}

#[test]
fn a_header_that_is_always_too_long() {
    let text = format!(
        "[pool.proxy_protocol]\nmax_header = \"64B\"\n[[pool.proxy_protocol.tlv]]\ntype = 0xE0\nvalue = \"{}\"\n",
        "x".repeat(34)
    );
    assert_eq!(
        with(&text),
        "f.toml:14:14: key `pool.proxy_protocol.max_header`: the shortest header of this pool has 65 bytes, more than \
         64B: every query would fail"
    );
    assert!(from_str("f", &format!("{MINIMAL}{}", text.replace("\"x", "\""))).is_ok(), "64 bytes fit");
}

#[test]
fn all_errors_of_a_file_are_reported_in_its_order() {
    let text = "pools = 1\n[watchdog]\nsweeps = 0\nreap = 1\n[admin]\ntoken_file = 1\n[[listener]]\nname = \"a b\"\n";
    assert_eq!(
        errors(text),
        "f.toml:1:1: key `pools`: unknown key; did you mean `pool`?\n\
         f.toml:1:1: key `pool`: is missing\n\
         f.toml:3:10: key `watchdog.sweeps`: must be from 1 to 1000\n\
         f.toml:4:8: key `watchdog.reap`: expected a string, found integer\n\
         f.toml:6:14: key `admin.token_file`: expected a string, found integer\n\
         f.toml:7:1: key `listener.pool`: is missing\n\
         f.toml:7:1: key `listener.address`: is missing\n\
         f.toml:8:8: key `listener.name`: \"a b\" is no name: 1 to 64 letters, digits, '.', '_', '-' are"
    );
}

/// A directory of this test's own, gone with it.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("counterfoil-config-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn load(&self, bytes: &[u8]) -> String {
        let path = self.0.join("c.toml");
        std::fs::write(&path, bytes).unwrap();
        load(&path).unwrap_err().to_string().replace(&path.display().to_string(), "c.toml")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[test]
fn files_that_cannot_be_read() {
    let scratch = Scratch::new("unreadable");
    assert_eq!(
        load(&scratch.0.join("none")).unwrap_err().to_string(),
        format!("{}: cannot be read: No such file or directory (os error 2)", scratch.0.join("none").display())
    );
    assert_eq!(
        load(&scratch.0).unwrap_err().to_string(),
        format!("{}: is a directory, where a regular file must be", scratch.0.display())
    );
    assert_eq!(scratch.load(b"[server]\nlog = \"\xff\"\n"), "c.toml:2:8: is not UTF-8 from here on");
    assert_eq!(scratch.load(&[b'\n'; (1 << 20) + 1]), "c.toml: is longer than 1048576 bytes");
}

/// It is looked for where the configuration is, and looked at, as the start would do.
#[test]
fn a_token_file_that_cannot_be_relied_on() {
    use std::os::unix::fs::PermissionsExt as _;
    let scratch = Scratch::new("token");
    let text = format!("{MINIMAL}[admin]\ntoken_file = \"token\"\n");
    let token = scratch.0.join("token");
    let place = format!("c.toml:14:14: key `admin.token_file`: {}: ", token.display());
    let write = |text: &str, mode: u32| {
        std::fs::write(&token, text).unwrap();
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    assert_eq!(scratch.load(text.as_bytes()), format!("{place}cannot be read: No such file or directory (os error 2)"));
    write("0123456789abcdef\n", 0o644);
    assert_eq!(scratch.load(text.as_bytes()), format!("{place}others may access it (mode 0644): `chmod o=` it"));
    write("short\n", 0o600);
    assert!(scratch.load(text.as_bytes()).starts_with(&format!("{place}it must hold one line of 16 ")));
    write("0123456789abcdef\n", 0o600);
    let config = load(&scratch.0.join("c.toml")).unwrap();
    assert_eq!(config.admin.token_file, Some(token));
}
