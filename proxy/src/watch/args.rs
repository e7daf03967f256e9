//! The flags of `counterfoil watch`, and what they come to.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::samples::Selector;
use super::userspace::Page;
use crate::config::choices::Choice as _;
use crate::config::units::{format_duration, parse_duration};
use crate::config::{Class, ReapMode, View, Watchdog};
use crate::kernel::Who;
use crate::watchdog::{Policy, Subject};

/// Classes that exist without a ledger.
const CLASSES: [Class; 4] = [Class::Zombie, Class::Hoard, Class::Embryo, Class::Lingering];

/// Shorter times ask more of the machine than they tell.
const LEAST: Duration = Duration::from_millis(50);

/// The second witness is asked this often.
const CROSSCHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Whose connections to which backends are watched, what counts as a finding, and what is done about it.
#[derive(Args, Clone, Debug)]
#[command(group(ArgGroup::new("who").required(true).args(["pid", "name", "cgroup"])))]
pub struct WatchArgs {
    /// The process with this id; when it has ended, nothing is watched any more.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,

    /// All processes of this name (as in /proc/PID/comm), also those that are started later.
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    name: Option<String>,

    /// All processes of this cgroup (version 2) and below, such as /system.slice/dnsdist.service; also those of later.
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// A backend: connections to it are watched. Several can be given, all others are left alone.
    #[arg(long, value_name = "ADDR:PORT", required = true, num_args = 1..)]
    backend: Vec<SocketAddr>,

    /// Sever findings of these classes: zombie, hoard, embryo, lingering. Without a list: zombie.
    #[arg(long, value_name = "CLASS,...", num_args = 0..=1, default_missing_value = "zombie", value_delimiter = ',',
          value_parser = parse_class)]
    reap: Option<Vec<Class>>,

    /// Sever nothing, log and count what would be: the default. With --reap, only of its classes.
    #[arg(long)]
    dry_run: bool,

    /// Severed at most.
    #[arg(long, value_name = "N", default_value_t = 6000, value_parser = clap::value_parser!(u32).range(1..))]
    max_reaps_per_minute: u32,

    /// Without a byte for longer, a connection is a hoard, or lingering; longer than the slowest answer takes.
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = parse_time)]
    idle: Duration,

    /// Not established after this long, a connection is an embryo.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    connect_timeout: Duration,

    /// Between sweeps.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = parse_time)]
    interval: Duration,

    /// A finding has been seen in so many consecutive sweeps,
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    sweeps: u32,

    /// and for this long.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    grace: Duration,

    /// The process's own count of these connections: the sum of the samples NAME or NAME{label="value"} of the metrics
    /// at URL (http only).
    #[arg(long, num_args = 2, value_names = ["URL", "NAME"])]
    userspace_metric: Option<Vec<String>>,

    /// Where /metrics, /healthz and /readyz are; `off`: nowhere.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:9121", value_parser = parse_http)]
    http: Http,

    /// How the kernel is asked: auto, ebpf or sock-diag.
    #[arg(long, default_value = "auto", value_parser = parse_view)]
    view: View,
}

/// `--http`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Http(Option<SocketAddr>);

/// What the flags come to.
#[derive(Debug)]
pub struct Plan {
    /// Whose sockets.
    pub(super) who: Who,
    /// Towards whom.
    pub(super) backends: Vec<SocketAddr>,
    /// By which view.
    pub(super) view: View,
    /// For the watchdog.
    pub(super) subject: Subject,
    /// The other half of the count.
    pub(super) userspace: Option<(Page, Selector)>,
    /// Where metrics are served.
    pub(super) http: Option<SocketAddr>,
}

impl WatchArgs {
    /// # Errors
    /// What clap cannot see: a sentence for the user.
    pub fn plan(&self) -> Result<Plan, String> {
        let who = match (&self.pid, &self.name, &self.cgroup) {
            (Some(pid), ..) => Who::Pid(*pid),
            (_, Some(name), _) => Who::Name(name.clone()),
            (_, _, Some(path)) => Who::Cgroup(path.clone()),
            (None, None, None) => return Err("one of --pid, --name and --cgroup is needed".to_owned()),
        };
        let backends = self.backends()?;
        let settings = Watchdog {
            interval: self.interval,
            grace: self.grace,
            sweeps: self.sweeps,
            crosscheck_interval: CROSSCHECK_INTERVAL,
            reap: if self.reap.is_some() && !self.dry_run { ReapMode::On } else { ReapMode::DryRun },
            max_reaps_per_minute: self.max_reaps_per_minute,
            classes: self.reap.clone().unwrap_or_else(|| CLASSES.to_vec()),
        };
        let policy = Policy::beside(&settings, &backends, self.idle, self.connect_timeout);
        let userspace = match self.userspace_metric.as_deref() {
            Some([url, name]) => {
                let page = Page::parse(url).map_err(|error| format!("--userspace-metric: {error}"))?;
                let selector = Selector::parse(name).map_err(|error| format!("--userspace-metric: {error}"))?;
                Some((page, selector))
            }
            _ => None,
        };
        let subject = Subject::beside(settings, policy);
        Ok(Plan { who, backends, view: self.view, subject, userspace, http: self.http.0 })
    }

    fn backends(&self) -> Result<Vec<SocketAddr>, String> {
        let mut seen = BTreeSet::new();
        for backend in &self.backend {
            let address = SocketAddr::new(backend.ip().to_canonical(), backend.port());
            if address.port() == 0 || address.ip().is_unspecified() {
                return Err(format!("--backend: {backend} is nobody's address"));
            }
            if !seen.insert(address) {
                return Err(format!("--backend: {backend} is given twice"));
            }
        }
        Ok(seen.into_iter().collect())
    }
}

fn parse_class(text: &str) -> Result<Class, String> {
    CLASSES.into_iter().find(|class| class.name() == text).ok_or_else(|| {
        let reason = match Class::ALL.iter().find(|class| class.name() == text) {
            Some(_) => "there is none without a ledger",
            None => "there is no such class",
        };
        format!("{reason}; zombie, hoard, embryo or lingering")
    })
}

fn parse_view(text: &str) -> Result<View, String> {
    let views = [View::Auto, View::Ebpf, View::SockDiag];
    views.into_iter().find(|view| view.word() == text).ok_or_else(|| "auto, ebpf or sock-diag".to_owned())
}

fn parse_time(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Ok(time) if time < LEAST => Err(format!("at least {}", format_duration(LEAST))),
        Ok(time) => Ok(time),
        Err(error) => Err(error.to_string()),
    }
}

fn parse_http(text: &str) -> Result<Http, String> {
    match text {
        "off" => Ok(Http(None)),
        address => address.parse().map(|address| Http(Some(address))).map_err(|_| "an ADDR:PORT, or off".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: WatchArgs,
    }

    /// The plan of these flags after `--pid 7 --backend 127.0.0.1:53`.
    fn plan(flags: &str) -> Plan {
        parse(&format!("--pid 7 --backend 127.0.0.1:53 {flags}")).unwrap()
    }

    fn parse(flags: &str) -> Result<Plan, String> {
        let words = ["watch"].into_iter().chain(flags.split_ascii_whitespace());
        Cli::try_parse_from(words).map_err(|error| error.to_string())?.args.plan()
    }

    fn reaping(flags: &str) -> (ReapMode, Vec<Class>) {
        let settings = plan(flags).subject.settings;
        (settings.reap, settings.classes)
    }

    #[test]
    fn nothing_is_severed_unless_it_is_said() {
        assert_eq!(reaping(""), (ReapMode::DryRun, CLASSES.to_vec()));
        assert_eq!(reaping("--dry-run"), (ReapMode::DryRun, CLASSES.to_vec()));
        assert_eq!(reaping("--reap"), (ReapMode::On, vec![Class::Zombie]));
        assert_eq!(reaping("--reap --idle 2s"), (ReapMode::On, vec![Class::Zombie]));
        assert_eq!(reaping("--reap zombie"), (ReapMode::On, vec![Class::Zombie]));
        assert_eq!(reaping("--reap zombie,hoard --idle 2s"), (ReapMode::On, vec![Class::Zombie, Class::Hoard]));
        assert_eq!(reaping("--reap hoard --dry-run"), (ReapMode::DryRun, vec![Class::Hoard]));
    }

    #[test]
    fn every_flag_and_its_default_is_documented() {
        use clap::CommandFactory as _;
        let documented = include_str!("../../../docs/watch.md");
        let rows: Vec<&str> = documented.lines().filter(|line| line.starts_with("| `--")).collect();
        let mut flags = 0;
        for flag in Cli::command().get_arguments().filter(|flag| flag.get_id() != "help") {
            let name = format!("| `--{}", flag.get_long().unwrap());
            let row = rows.iter().find(|row| row.starts_with(&name)).unwrap_or_else(|| panic!("{name}"));
            for default in flag.get_default_values().iter().filter(|default| *default != "false") {
                assert!(row.contains(&format!("`{}`", default.to_str().unwrap())), "{row}");
            }
            flags += 1;
        }
        // Those of the log are the command line's.
        assert_eq!(rows.len(), flags + 2);
    }

    #[test]
    fn thresholds_and_places_are_as_given() {
        let plan = plan(
            "--idle 2s --connect-timeout 4s --grace 250ms --sweeps 2 --interval 500ms --http off --view sock-diag",
        );
        let backend = &plan.subject.policy.backends[0];
        assert_eq!((backend.name.as_str(), backend.hoard_after), ("127.0.0.1:53", Duration::from_secs(2)));
        assert_eq!(backend.embryo_after, Duration::from_secs(4));
        assert_eq!((plan.subject.policy.grace, plan.subject.policy.sweeps), (Duration::from_millis(250), 2));
        assert_eq!((plan.http, plan.view, plan.userspace.is_none()), (None, View::SockDiag, true));
        assert_eq!(self::plan("").http, Some("127.0.0.1:9121".parse().unwrap()));
        let both = parse("--name dnsdist --backend 127.0.0.1:53 [::ffff:10.0.0.1]:53 --backend [::1]:53").unwrap();
        assert_eq!(both.who, Who::Name("dnsdist".to_owned()));
        let canonical: Vec<String> = both.backends.iter().map(ToString::to_string).collect();
        assert_eq!(canonical, ["10.0.0.1:53", "127.0.0.1:53", "[::1]:53"]);
    }

    #[test]
    fn bad_usage_is_said() {
        let rest = "--backend 127.0.0.1:53";
        for (flags, said) in [
            (rest.to_owned(), "--pid"),
            (format!("--pid 7 --name a {rest}"), "cannot be used with"),
            (format!("--pid 0 {rest}"), "0 is not in 1.."),
            ("--pid 7".to_owned(), "--backend"),
            ("--pid 7 --backend localhost:53".to_owned(), "invalid socket address"),
            ("--pid 7 --backend 127.0.0.1:0".to_owned(), "127.0.0.1:0 is nobody's address"),
            (format!("--pid 7 {rest} [::ffff:127.0.0.1]:53"), "is given twice"),
            (format!("--pid 7 {rest} --reap orphan"), "there is none without a ledger"),
            (format!("--pid 7 {rest} --reap zombies"), "there is no such class"),
            (format!("--pid 7 {rest} --idle 2"), "unit"),
            (format!("--pid 7 {rest} --interval 1ms"), "at least 50ms"),
            (format!("--pid 7 {rest} --sweeps 0"), "0 is not in 1.."),
            (format!("--pid 7 {rest} --reap --max-reaps-per-minute 0"), "0 is not in 1.."),
            (format!("--pid 7 {rest} --http here"), "an ADDR:PORT, or off"),
            (format!("--pid 7 {rest} --view none"), "auto, ebpf or sock-diag"),
            (format!("--pid 7 {rest} --userspace-metric http://127.0.0.1/metrics"), "2 values required"),
            (format!("--pid 7 {rest} --userspace-metric https://127.0.0.1/metrics a"), "http://"),
            (format!("--pid 7 {rest} --userspace-metric http://127.0.0.1/metrics a{{"), "is neither NAME nor"),
        ] {
            let error = parse(&flags).unwrap_err();
            assert!(error.contains(said), "{flags}: {error}");
        }
    }
}
