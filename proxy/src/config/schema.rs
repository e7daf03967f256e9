//! Every key of the configuration format, whether this version has it, and the check that a file holds no others.
//!
//! The format is a contract that is fulfilled step by step: a key that belongs to it but does nothing yet is refused
//! as such, so that nobody relies on a limit or a check that is not there.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::Problem;
use super::source::{Path, Source};
use Shape::{Table, Tables, Value};
use State::{NotYet, Works};

/// Whether a key does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It works.
    Works,
    /// It is refused as not supported yet.
    NotYet,
}

/// What a key holds.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// A string, number, boolean, or a list of such.
    Value(State),
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

const fn works(name: &'static str) -> Key {
    Key { name, shape: Value(Works) }
}

const fn not_yet(name: &'static str) -> Key {
    Key { name, shape: Value(NotYet) }
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

const SERVER: &[Key] = &[works("workers"), works("drain_timeout"), works("max_connections"), works("log")];

const OVERLOAD: &[Key] = &[works("threshold"), works("idle_timeout"), works("max_connection_duration")];

const LISTENER: &[Key] = &[
    works("name"),
    works("address"),
    works("pool"),
    works("max_connections"),
    works("max_connections_per_client"),
    works("client_mask_v4"),
    works("client_mask_v6"),
    works("max_in_flight"),
    works("max_queries_per_connection"),
    works("max_connection_duration"),
    works("idle_timeout"),
    works("message_timeout"),
    works("write_timeout"),
    works("max_pending_answers"),
    works("connection_rate_per_client"),
    works("ban_duration"),
    works("edns_tcp_keepalive"),
    works("tcp_fast_open"),
    table("accept_proxy", ACCEPT_PROXY),
    table("tls", LISTENER_TLS),
];

const ACCEPT_PROXY: &[Key] = &[works("from"), works("max_header"), works("timeout"), works("outside_tls")];

const LISTENER_TLS: &[Key] = &[works("certificate"), works("key"), works("handshake_timeout"), works("max_handshakes")];

const POOL: &[Key] = &[
    works("name"),
    works("policy"),
    works("query_timeout"),
    works("retries"),
    works("on_failure"),
    table("proxy_protocol", PROXY_PROTOCOL),
    tables("backend", BACKEND),
];

const PROXY_PROTOCOL: &[Key] = &[
    works("identity"),
    works("subnet_v4"),
    works("subnet_v6"),
    works("max_header"),
    works("crc32c"),
    works("unique_id"),
    works("advertise_tls"),
    works("pass_incoming_tlvs"),
    tables("tlv", TLV),
];

const TLV: &[Key] = &[works("type"), works("value")];

const BACKEND: &[Key] = &[
    works("name"),
    works("address"),
    works("weight"),
    works("max_in_flight"),
    works("max_connections"),
    works("connect_timeout"),
    works("write_timeout"),
    works("source"),
    works("tcp_fast_open"),
    works("one_shot_close"),
    table("tls", BACKEND_TLS),
    table("health", HEALTH),
];

const BACKEND_TLS: &[Key] = &[works("server_name"), works("ca"), works("proxy_outside_tls")];

const HEALTH: &[Key] =
    &[works("mode"), works("interval"), works("timeout"), works("name"), works("rise"), works("fall")];

const CONNECTIONS: &[Key] = &[
    works("idle_timeout"),
    works("max_age"),
    works("max_idle_per_backend"),
    works("max_owned_per_client"),
    works("max_total"),
    works("max_opens_per_client"),
    works("max_waiting"),
    works("max_wait"),
    works("spares_per_backend"),
    works("spare_idle_timeout"),
    works("cleanup_interval"),
];

const KERNEL: &[Key] = &[works("view"), works("max_sockets")];

const WATCHDOG: &[Key] = &[
    works("interval"),
    works("grace"),
    works("sweeps"),
    works("crosscheck_interval"),
    works("reap"),
    works("max_reaps_per_minute"),
    works("classes"),
];

const ADMIN: &[Key] = &[works("http"), not_yet("token_file"), works("socket")];

impl Key {
    /// Whether neither the key nor anything in it works.
    fn is_not_yet(&self) -> bool {
        match self.shape {
            Value(state) => state == NotYet,
            Table(keys) | Tables(keys) => keys.iter().all(Self::is_not_yet),
        }
    }
}

/// Reports unknown keys, keys that are not supported yet, and values where tables must be and the reverse.
pub(super) fn check(source: &Source<'_>, root: &DeTable<'_>) {
    check_table(source, root, FORMAT, &Path::root());
}

fn check_table(source: &Source<'_>, table: &DeTable<'_>, keys: &[Key], path: &Path) {
    for (name, value) in table.iter() {
        let path = path.key(name.get_ref());
        let at = name.span().start;
        match keys.iter().find(|key| key.name == name.get_ref()) {
            Some(key) => check_key(source, key, value, at, &path),
            None => source.fail(at, &path, Problem::UnknownKey { suggestion: suggest(name.get_ref(), keys) }),
        }
    }
}

fn check_key(source: &Source<'_>, key: &Key, value: &Spanned<DeValue<'_>>, at: usize, path: &Path) {
    let wrong_type = |expected, value: &Spanned<DeValue<'_>>| {
        source.fail(value.span().start, path, Problem::WrongType { expected, found: value.get_ref().type_str() });
    };
    match (key.shape, value.get_ref()) {
        (Value(Works), _) => {}
        (Value(NotYet), _) => source.fail(at, path, Problem::NotSupportedYet),
        (Table(_), DeValue::Table(table)) if table.is_empty() && key.is_not_yet() => {
            source.fail(at, path, Problem::NotSupportedYet);
        }
        (Table(keys), DeValue::Table(table)) => check_table(source, table, keys, path),
        (Table(_), _) => wrong_type("a table in single brackets", value),
        (Tables(keys), DeValue::Array(elements)) => {
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

/// Full names of all keys that are called so and work.
fn find(name: &str, keys: &[Key], prefix: &str, found: &mut Vec<String>) {
    for key in keys {
        if key.name == name && !key.is_not_yet() {
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
