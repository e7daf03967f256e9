//! What a service manager says to this process in its environment, and what it is told: sd_notify(3),
//! sd_watchdog_enabled(3), sd_listen_fds(3). Started in another way, there is none of it.

pub mod activation;
mod notify;

use std::ffi::OsString;
use std::time::Duration;

pub use notify::Notifier;

/// What the environment says, to this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `NOTIFY_SOCKET`: where the manager wants to hear of the process.
    pub notify: Option<OsString>,
    /// `WATCHDOG_USEC`: within this time the manager must hear that the process lives.
    pub watchdog: Option<Duration>,
    /// `LISTEN_FDS` and `LISTEN_FDNAMES`: the name of each descriptor that was passed; empty where it has none.
    pub listen: Vec<String>,
}

/// More descriptors than anybody passes.
const MAX_LISTEN: u64 = 4096;

impl Environment {
    /// Reads it.
    #[expect(
        clippy::disallowed_methods,
        reason = "this is how a service manager speaks; nothing else is taken from there"
    )]
    pub fn read() -> Self {
        Self::from(|name| std::env::var_os(name), std::process::id())
    }

    fn from(variable: impl Fn(&str) -> Option<OsString>, own_id: u32) -> Self {
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        // What was meant for a parent that passed its environment on is none of ours.
        let is_ours = |name: &str| number(name).is_none_or(|id| id == u64::from(own_id));
        Self {
            notify: variable("NOTIFY_SOCKET").filter(|address| !address.is_empty()),
            watchdog: number("WATCHDOG_USEC")
                .filter(|micros| *micros > 0 && is_ours("WATCHDOG_PID"))
                .map(Duration::from_micros),
            listen: match number("LISTEN_FDS") {
                Some(count @ 1..=MAX_LISTEN) if number("LISTEN_PID").is_some() && is_ours("LISTEN_PID") => {
                    let names =
                        variable("LISTEN_FDNAMES").and_then(|names| names.into_string().ok()).unwrap_or_default();
                    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
                    names.take(count as usize).collect()
                }
                _ => Vec::new(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        Environment::from(find, 77)
    }

    #[test]
    fn without_a_manager_there_is_nothing() {
        assert_eq!(environment(&[]), Environment::default());
        assert_eq!(environment(&[("NOTIFY_SOCKET", ""), ("WATCHDOG_USEC", "0")]), Environment::default());
    }

    #[test]
    fn a_watchdog_is_for_the_process_that_it_names() {
        let second = Some(Duration::from_secs(1));
        assert_eq!(environment(&[("WATCHDOG_USEC", "1000000")]).watchdog, second);
        assert_eq!(environment(&[("WATCHDOG_USEC", "1000000"), ("WATCHDOG_PID", "77")]).watchdog, second);
        assert_eq!(environment(&[("WATCHDOG_USEC", "1000000"), ("WATCHDOG_PID", "78")]).watchdog, None);
        assert_eq!(environment(&[("WATCHDOG_USEC", "a second")]).watchdog, None);
    }

    #[test]
    fn descriptors_are_for_the_process_that_they_name() {
        let ours = ("LISTEN_PID", "77");
        assert_eq!(environment(&[("LISTEN_FDS", "2"), ours]).listen, ["", ""]);
        assert_eq!(environment(&[("LISTEN_FDS", "2"), ours, ("LISTEN_FDNAMES", "a:b")]).listen, ["a", "b"]);
        assert_eq!(environment(&[("LISTEN_FDS", "2"), ours, ("LISTEN_FDNAMES", "a")]).listen, ["a", ""]);
        for others in
            [&[("LISTEN_FDS", "2"), ("LISTEN_PID", "78")][..], &[("LISTEN_FDS", "2")], &[("LISTEN_FDS", "-1"), ours]]
        {
            assert!(environment(others).listen.is_empty(), "{others:?}");
        }
    }
}
