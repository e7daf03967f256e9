//! From the text of a configuration to a [`Config`], or to everything that is wrong with it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use toml::de::DeTable;
use tracing_subscriber::EnvFilter;

use super::error::{ConfigErrors, Problem};
use super::pools::Pools;
use super::section::{Section, Value};
use super::source::{Path, Source};
use super::text::{MAX_FILE, Text, without_mark};
use super::{Admin, Class, Config, Connections, Kernel, Overload, Server, Watchdog, defaults, listeners, schema};
use crate::admin::Token;
use crate::file::FileFault;

/// Most worker threads; more than any machine has cores.
const MAX_WORKERS: usize = 1024;

/// Most of what is counted one by one (connections, sockets, queries): as many descriptors as the kernel lets one process
/// have (`fs.nr_open`, 1,048,576 unless it was raised). Tables of this size must still fit the memory.
pub(super) const MAX_COUNT: usize = 1 << 20;

/// Most connections kept ready for each backend and worker.
const MAX_SPARES: usize = 1000;

/// The shortest of the timeouts that must not be zero, and of the intervals.
pub(super) const MILLISECOND: Duration = Duration::from_millis(1);

/// The shortest interval of sweeps and clean-ups: they walk every connection.
const SHORTEST_SWEEP: Duration = Duration::from_millis(10);

/// The longest log filter, bytes: each of its directives is compared with the others.
const MAX_LOG_FILTER: usize = 4096;

/// `sun_path` of `sockaddr_un` without its closing zero byte (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Reads and checks a file.
///
/// # Errors
///
/// All that is wrong with it.
pub fn load(path: &FilePath) -> Result<Config, ConfigErrors> {
    Text::read(path)?.parse()
}

/// Reads and checks a text. `name` is what errors call it. Files that it names are not read, so that no text can make
/// the program open one.
///
/// # Errors
///
/// All that is wrong with it. A text that is not TOML is not checked further.
pub fn from_str(name: &str, text: &str) -> Result<Config, ConfigErrors> {
    parse(name, text, None)
}

pub(super) fn parse(name: &str, text: &str, directory: Option<&FilePath>) -> Result<Config, ConfigErrors> {
    let text = without_mark(text);
    let source = Source::new(name, text).reading_from(directory);
    if text.len() as u64 > MAX_FILE {
        source.push(None, None, || FileFault::TooLong(MAX_FILE).into());
        source.result()?;
    }
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let span = error.span().unwrap_or(text.len()..text.len());
        let is_twice = error.message() == "duplicate key";
        // What is no TOML may be anything, a file with a key too: nothing of it is quoted but the words of the format.
        match text.get(span.clone()).filter(|key| is_twice && schema::has_word(key)) {
            Some(key) => source.fail(span.start, &Path::root().key(key), Problem::GivenTwice),
            None if is_twice => {
                source.push(Some(span.start), None, || Problem::Syntax("a key is given twice".to_owned()))
            }
            None => source.push(Some(span.start), None, || Problem::Syntax(error.message().to_owned())),
        }
    }
    source.result()?;
    schema::check_root(&source, root.get_ref());
    source.result()?;
    schema::check(&source, root.get_ref());
    let config = read(&Section::root(&source, root.get_ref()));
    source.result()?;
    Ok(config)
}

fn read(root: &Section<'_, '_>) -> Config {
    let server = read_server(&root.table("server"));
    let pools = Pools::read(root);
    let listeners = listeners::read(root, &pools);
    pools.check_loops(&listeners);
    pools.check_headers(&listeners);
    Config {
        server,
        overload: read_overload(&root.table("overload")),
        listeners,
        pools: pools.into_pools(),
        connections: read_connections(&root.table("connections")),
        kernel: read_kernel(&root.table("kernel")),
        watchdog: read_watchdog(&root.table("watchdog")),
        admin: read_admin(&root.table("admin")),
    }
}

fn read_server(section: &Section<'_, '_>) -> Server {
    let default = Server::default();
    let workers = match section.integer("workers", 0, 0..=MAX_WORKERS) {
        0 => defaults::workers(),
        workers => workers,
    };
    Server {
        workers,
        drain_delay: section.duration("drain_delay", default.drain_delay, Duration::ZERO),
        drain_timeout: section.duration("drain_timeout", default.drain_timeout, Duration::ZERO),
        max_connections: section.integer("max_connections", default.max_connections, 1..=MAX_COUNT),
        log: section.value("log").and_then(|value| log_filter(&value)).unwrap_or(default.log),
    }
}

fn read_overload(section: &Section<'_, '_>) -> Overload {
    let default = Overload::default();
    Overload {
        threshold: section.integer("threshold", default.threshold, 1..=100),
        idle_timeout: section.duration("idle_timeout", default.idle_timeout, MILLISECOND),
        max_connection_duration: section.duration(
            "max_connection_duration",
            default.max_connection_duration,
            Duration::ZERO,
        ),
    }
}

fn log_filter(value: &Value<'_, '_>) -> Option<String> {
    let text = value.string()?;
    if text.len() > MAX_LOG_FILTER {
        value.fail(Problem::LongLogFilter(MAX_LOG_FILTER));
        return None;
    }
    match EnvFilter::builder().parse(text) {
        Ok(_) => Some(text.to_owned()),
        Err(error) => {
            value.fail(Problem::LogFilter { value: text.to_owned(), reason: error.to_string() });
            None
        }
    }
}

fn read_connections(section: &Section<'_, '_>) -> Connections {
    let default = Connections::default();
    let count = |key, default, min| section.integer(key, default, min..=MAX_COUNT);
    Connections {
        idle_timeout: section.duration("idle_timeout", default.idle_timeout, MILLISECOND),
        tcp_keepalive: section.duration("tcp_keepalive", default.tcp_keepalive, Duration::ZERO),
        max_age: section.duration("max_age", default.max_age, MILLISECOND),
        max_idle_per_backend: count("max_idle_per_backend", default.max_idle_per_backend, 0),
        max_owned_per_client: count("max_owned_per_client", default.max_owned_per_client, 1),
        max_total: count("max_total", default.max_total, 1),
        max_opens_per_client: section.integer("max_opens_per_client", default.max_opens_per_client, 0..=1_000_000),
        max_waiting: count("max_waiting", default.max_waiting, 0),
        max_wait: section.duration("max_wait", default.max_wait, Duration::ZERO),
        spares_per_backend: section.integer("spares_per_backend", default.spares_per_backend, 0..=MAX_SPARES),
        spare_idle_timeout: section.duration("spare_idle_timeout", default.spare_idle_timeout, MILLISECOND),
        cleanup_interval: section.duration("cleanup_interval", default.cleanup_interval, SHORTEST_SWEEP),
    }
}

fn read_kernel(section: &Section<'_, '_>) -> Kernel {
    let default = Kernel::default();
    Kernel {
        view: section.choice("view", default.view),
        max_sockets: section.integer("max_sockets", default.max_sockets, 1..=1 << 20),
    }
}

fn read_watchdog(section: &Section<'_, '_>) -> Watchdog {
    let default = Watchdog::default();
    Watchdog {
        interval: section.duration("interval", default.interval, SHORTEST_SWEEP),
        grace: section.duration("grace", default.grace, Duration::ZERO),
        sweeps: section.integer("sweeps", default.sweeps, 1..=1000),
        crosscheck_interval: section.duration("crosscheck_interval", default.crosscheck_interval, SHORTEST_SWEEP),
        reap: section.choice("reap", default.reap),
        max_reaps_per_minute: section.integer("max_reaps_per_minute", default.max_reaps_per_minute, 1..=1_000_000),
        classes: section.value("classes").and_then(|value| read_classes(&value)).unwrap_or(default.classes),
    }
}

fn read_classes(value: &Value<'_, '_>) -> Option<Vec<Class>> {
    let mut seen = Unique::default();
    let elements = value.list()?;
    if elements.is_empty() {
        value.fail(Problem::Empty("; `reap = \"off\"` is the way to act on none"));
    }
    let mut class = |element: Value<'_, '_>| {
        let class: Class = element.choice()?;
        seen.add(&element, &format!("{:?}", class.name()));
        Some(class)
    };
    Some(elements.into_iter().filter_map(&mut class).collect())
}

fn read_admin(section: &Section<'_, '_>) -> Admin {
    let default = Admin::default();
    let mut admin = default;
    if let Some(value) = section.value("http") {
        admin.http = match value.string() {
            None | Some("") => None,
            Some(_) => value.socket_address(),
        };
    }
    if let Some(value) = section.value("token_file") {
        let named = value.string().filter(|path| !path.is_empty());
        admin.token_file = named.map(|named| token_file(section, &value, named));
    }
    if let Some(value) = section.value("socket") {
        let path = value.string().unwrap_or_default();
        let length = path.len();
        if length > MAX_SOCKET_PATH {
            value.fail(Problem::SocketPath { length, max: MAX_SOCKET_PATH });
        }
        admin.socket = (length > 0).then(|| PathBuf::from(path));
    }
    admin
}

/// Where the file of the token is. Like all files that are named it is looked for where the configuration is, and looked at.
fn token_file(section: &Section<'_, '_>, value: &Value<'_, '_>, named: &str) -> PathBuf {
    let Some(path) = section.files().map(|files| files.path(named)) else { return PathBuf::from(named) };
    if let Err(fault) = Token::read(&path) {
        value.fail(Problem::Token { file: path.clone(), fault });
    }
    // As it is printed: the same file wherever that is read again.
    std::path::absolute(&path).unwrap_or(path)
}

/// Values that may be given once only, with the line of the first.
#[derive(Default)]
pub(super) struct Unique {
    lines: HashMap<String, usize>,
}

impl Unique {
    /// Reports a value that was there before.
    pub(super) fn add(&mut self, value: &Value<'_, '_>, what: &str) {
        if let Some(line) = self.lines.get(what) {
            value.fail(Problem::Duplicate { value: what.to_owned(), line: *line });
        } else {
            self.lines.insert(what.to_owned(), value.line());
        }
    }

    /// A name: a label in metrics, hence short and of harmless characters, and unique.
    pub(super) fn name<'a>(&mut self, value: &Value<'a, '_>) -> Option<&'a str> {
        let name = value.string()?;
        let harmless = |octet: u8| octet.is_ascii_alphanumeric() || b"._-".contains(&octet);
        if !(1..=64).contains(&name.len()) || !name.bytes().all(harmless) {
            value.fail(Problem::BadName(name.to_owned()));
            return None;
        }
        self.add(value, &format!("{name:?}"));
        Some(name)
    }
}

/// Whether one host can have this address.
pub(super) fn is_host(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !(ip.is_unspecified() || ip.is_multicast() || broadcast)
}
