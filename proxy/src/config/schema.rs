//! Every key of the configuration format, and the check that a file holds no others.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::effort;
use super::error::Problem;
use super::source::{Path, Source};
use Shape::{Table, Tables, Value};

/// What a key holds.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// A string, number, boolean, or a list of such.
    Value,
    /// `[name]`
    Table(&'static [Key]),
    /// `[[name]]`
    Tables(&'static [Key]),
}

/// A key of the format.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As in the file.
    pub name: &'static str,
    /// What it holds.
    pub shape: Shape,
}

const fn value(name: &'static str) -> Key {
    Key { name, shape: Value }
}

const fn table(name: &'static str, keys: &'static [Key]) -> Key {
    Key { name, shape: Table(keys) }
}

const fn tables(name: &'static str, keys: &'static [Key]) -> Key {
    Key { name, shape: Tables(keys) }
}

/// The whole format.
pub const FORMAT: &[Key] = &[
    table("server", SERVER),
    table("overload", OVERLOAD),
    tables("listener", LISTENER),
    tables("pool", POOL),
    table("connections", CONNECTIONS),
    table("kernel", KERNEL),
    table("watchdog", WATCHDOG),
    table("admin", ADMIN),
];

const SERVER: &[Key] =
    &[value("workers"), value("drain_delay"), value("drain_timeout"), value("max_connections"), value("log")];

const OVERLOAD: &[Key] = &[value("threshold"), value("idle_timeout"), value("max_connection_duration")];

const LISTENER: &[Key] = &[
    value("name"),
    value("address"),
    value("pool"),
    value("max_connections"),
    value("max_connections_per_client"),
    value("client_mask_v4"),
    value("client_mask_v6"),
    value("max_in_flight"),
    value("max_queries_per_connection"),
    value("max_connection_duration"),
    value("idle_timeout"),
    value("message_timeout"),
    value("write_timeout"),
    value("max_pending_answers"),
    value("connection_rate_per_client"),
    value("ban_duration"),
    value("edns_tcp_keepalive"),
    value("tcp_keepalive"),
    value("allow_from"),
    value("refuse"),
    value("tcp_fast_open"),
    table("accept_proxy", ACCEPT_PROXY),
    table("tls", LISTENER_TLS),
];

const ACCEPT_PROXY: &[Key] =
    &[value("from"), value("max_header"), value("timeout"), value("max_pending"), value("outside_tls")];

const LISTENER_TLS: &[Key] = &[value("certificate"), value("key"), value("handshake_timeout"), value("max_handshakes")];

const POOL: &[Key] = &[
    value("name"),
    value("policy"),
    value("query_timeout"),
    value("retries"),
    value("on_failure"),
    table("proxy_protocol", PROXY_PROTOCOL),
    tables("backend", BACKEND),
];

const PROXY_PROTOCOL: &[Key] = &[
    value("identity"),
    value("subnet_v4"),
    value("subnet_v6"),
    value("max_header"),
    value("crc32c"),
    value("unique_id"),
    value("advertise_tls"),
    value("pass_incoming_tlvs"),
    tables("tlv", TLV),
];

const TLV: &[Key] = &[value("type"), value("value")];

const BACKEND: &[Key] = &[
    value("name"),
    value("address"),
    value("weight"),
    value("max_in_flight"),
    value("max_connections"),
    value("connect_timeout"),
    value("write_timeout"),
    value("source"),
    value("tcp_fast_open"),
    value("one_shot_close"),
    table("tls", BACKEND_TLS),
    table("health", HEALTH),
];

const BACKEND_TLS: &[Key] = &[value("server_name"), value("ca"), value("proxy_outside_tls")];

const HEALTH: &[Key] =
    &[value("mode"), value("interval"), value("timeout"), value("name"), value("rise"), value("fall")];

const CONNECTIONS: &[Key] = &[
    value("idle_timeout"),
    value("tcp_keepalive"),
    value("max_age"),
    value("max_idle_per_backend"),
    value("max_owned_per_client"),
    value("max_total"),
    value("max_opens_per_client"),
    value("max_waiting"),
    value("max_wait"),
    value("spares_per_backend"),
    value("spare_idle_timeout"),
    value("cleanup_interval"),
];

const KERNEL: &[Key] = &[value("view"), value("max_sockets")];

const WATCHDOG: &[Key] = &[
    value("interval"),
    value("grace"),
    value("sweeps"),
    value("crosscheck_interval"),
    value("reap"),
    value("max_reaps_per_minute"),
    value("classes"),
];

const ADMIN: &[Key] = &[value("http"), value("token_file"), value("socket")];

/// Whether a key of the format is called so.
pub(super) fn has_word(name: &str) -> bool {
    let mut found = Vec::new();
    find(name, FORMAT, "", &mut found);
    !found.is_empty()
}

/// Reports a text that has nothing of a configuration. It may be another file, and a secret.
pub(super) fn check_root(source: &Source<'_>, root: &DeTable<'_>) {
    let is_known = |name: &str| FORMAT.iter().any(|key| key.name == name);
    if let Some((first, _)) = root.iter().next()
        && !root.iter().any(|(name, _)| is_known(name.get_ref()))
    {
        let tables: Vec<String> = FORMAT.iter().map(|key| format!("`{}`", key.name)).collect();
        source.push(Some(first.span().start), None, || Problem::Foreign(tables.join(", ")));
    }
}

/// Reports unknown keys, and values where tables must be and the reverse.
pub(super) fn check(source: &Source<'_>, root: &DeTable<'_>) {
    check_table(source, root, FORMAT, &Path::root());
}

fn check_table(source: &Source<'_>, table: &DeTable<'_>, keys: &[Key], path: &Path) {
    for (name, value) in table.iter() {
        effort::spend(1);
        let path = path.key(name.get_ref());
        let at = name.span().start;
        match keys.iter().find(|key| key.name == name.get_ref()) {
            Some(key) => check_key(source, key, value, &path),
            None => source.fail_with(at, &path, || Problem::UnknownKey { suggestion: suggest(name.get_ref(), keys) }),
        }
    }
}

fn check_key(source: &Source<'_>, key: &Key, value: &Spanned<DeValue<'_>>, path: &Path) {
    let wrong_type = |expected, value: &Spanned<DeValue<'_>>| {
        source.fail(value.span().start, path, Problem::WrongType { expected, found: value.get_ref().type_str() });
    };
    match (key.shape, value.get_ref()) {
        (Value, _) => {}
        (Table(keys), DeValue::Table(table)) => check_table(source, table, keys, path),
        (Table(_), _) => wrong_type("a table in single brackets", value),
        (Tables(keys), DeValue::Array(elements)) => {
            effort::spend(elements.len());
            for (index, element) in elements.iter().enumerate() {
                match element.get_ref() {
                    DeValue::Table(table) => check_table(source, table, keys, &path.element(index, elements.len())),
                    _ => wrong_type("tables in double brackets", element),
                }
            }
        }
        (Tables(_), _) => wrong_type("tables in double brackets", value),
    }
}

/// The key that was probably meant: one that is spelt nearly the same, or one of that name in another table.
fn suggest(name: &str, siblings: &[Key]) -> Option<String> {
    // A third of the letters may be wrong: more, and the guess confuses.
    let tolerance = (name.chars().count() / 3).clamp(1, 4);
    let nearest = siblings
        .iter()
        .map(|key| (distance(name, key.name), key.name))
        .filter(|(distance, _)| *distance <= tolerance)
        .min_by_key(|(distance, _)| *distance);
    if let Some((_, nearest)) = nearest {
        return Some(format!("`{nearest}`"));
    }
    let mut elsewhere = Vec::new();
    find(name, FORMAT, "", &mut elsewhere);
    (!elsewhere.is_empty()).then(|| elsewhere.join(" or "))
}

/// Full names of all keys that are called so.
fn find(name: &str, keys: &[Key], prefix: &str, found: &mut Vec<String>) {
    for key in keys {
        if key.name == name {
            found.push(format!("`{prefix}{}`", key.name));
        }
        if let Table(keys) | Tables(keys) = key.shape {
            find(name, keys, &format!("{prefix}{}.", key.name), found);
        }
    }
}

/// Letters to insert, leave out or change (Levenshtein). Bounded: a name longer than any key is far from all.
fn distance(given: &str, known: &str) -> usize {
    let given: Vec<char> = given.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=given.len()).collect();
    for (i, letter) in known.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (other, cell) in given.iter().zip(row.iter_mut().skip(1)) {
            let changed = diagonal + usize::from(*other != letter);
            diagonal = *cell;
            left = changed.min(diagonal + 1).min(left + 1);
            *cell = left;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (given, known, expected) in [
            ("", "", 0),
            ("retries", "retries", 0),
            ("retires", "retries", 2),
            ("retry", "retries", 3),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(given, known), expected, "{given} {known}");
        }
    }

    #[test]
    fn suggestions() {
        assert_eq!(suggest("idle_timout", LISTENER).as_deref(), Some("`idle_timeout`"));
        assert_eq!(
            suggest("idle_timeout", POOL).as_deref(),
            Some("`overload.idle_timeout` or `listener.idle_timeout` or `connections.idle_timeout`")
        );
        assert_eq!(suggest("identity", POOL).as_deref(), Some("`pool.proxy_protocol.identity`"));
        assert_eq!(suggest("colour", POOL), None);
        assert_eq!(suggest(&"x".repeat(10_000), POOL), None);
    }
}
