//! The watchdog's thread over a scripted kernel view and a real ledger with real sockets.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests panic, and make sockets")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use super::*;
use crate::config::ReapMode;
use crate::kernel::{Crosscheck, TcpState, Witness};
use crate::ledger::{ConnKind, Entry, OpenInfo, RowState, ShardWriter};
use crate::watchdog::fixture;
use crate::watchdog::{Outcome, report::Published};

/// What the view says, changed while the watchdog runs.
#[derive(Clone, Debug, Default)]
struct Script {
    sockets: Vec<KernelSocket>,
    uncertain: Option<String>,
    disagreement: Option<String>,
    liar: Option<Witness>,
    broken: bool,
    crosschecks: usize,
}

struct View(Arc<Mutex<Script>>);

impl KernelView for View {
    fn source(&self) -> Source {
        Source::Ebpf
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        let script = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if script.broken {
            return Err(ViewError::Netlink("scripted".to_owned()));
        }
        let taken_ns = clock::now().0;
        Ok(KernelSnapshot {
            taken_ns,
            sockets: script.sockets,
            uncertain: script.uncertain,
            ..KernelSnapshot::default()
        })
    }

    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        let mut script = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        script.crosschecks += 1;
        if script.broken {
            return Err(ViewError::Netlink("scripted".to_owned()));
        }
        Ok(Crosscheck { disagreement: script.disagreement.clone(), liar: script.liar, ..Crosscheck::default() })
    }
}

/// The watchdog, driven sweep by sweep instead of by its thread.
struct Bench {
    task: Task,
    script: Arc<Mutex<Script>>,
    writer: ShardWriter,
    requests: tokio::sync::mpsc::UnboundedReceiver<Control>,
}

impl Bench {
    fn new() -> Self {
        let mut config = fixture::config(ReapMode::On, None);
        config.watchdog.grace = Duration::ZERO;
        config.watchdog.sweeps = 2;
        let (observed, _setup, requests) = fixture::observed(config);
        let script = Arc::new(Mutex::new(Script::default()));
        let published = Arc::new(Published::new(Report::new(Source::Ebpf, 1)));
        let writer = observed.ledger.writer(0).unwrap();
        let task = Task::new(observed.subject(), Box::new(View(Arc::clone(&script))), published);
        Self { task, script, writer, requests }
    }

    fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    /// A socket of the ledger, unconnected: what the kernel says of it is the script's affair.
    fn open(&self) -> (Arc<Socket>, Entry) {
        let info = OpenInfo { backend: 0, kind: ConnKind::Shared, owner: 0, header: 0, client_tls: None };
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let (socket, entry) = self.writer.reserve(info).unwrap().bind(socket, clock::now()).unwrap();
        entry.set_state(RowState::Idle);
        (socket, entry)
    }

    /// One sweep with a worker that is alive, and one step of the reaper if it has something to do.
    fn sweep(&mut self) -> Arc<Report> {
        self.writer.beat(clock::now());
        self.task.sweep();
        if self.task.reaper.is_busy() {
            self.task.reap();
        }
        self.task.published.get()
    }
}

fn socket(cookie: u64, state: TcpState) -> KernelSocket {
    KernelSocket {
        cookie,
        state,
        held: true,
        opened: Some(1),
        local: "127.0.0.1:40000".parse().unwrap(),
        remote: "127.0.0.1:9".parse().unwrap(),
        last_received_ns: Some(clock::now().0),
        last_sent_ns: None,
        bytes_sent: None,
        bytes_received: None,
        unread: None,
        owner: 0,
        netns: 0,
    }
}

#[test]
fn a_finding_is_published_before_its_owner_is_asked() {
    let mut bench = Bench::new();
    let (_socket, entry) = bench.open();
    bench.script(|script| script.sockets = vec![socket(entry.cookie(), TcpState::CloseWait)]);
    assert!(bench.sweep().findings.is_empty(), "once is not enough");
    assert_eq!(bench.sweep().findings.len(), 1);
    assert!(bench.requests.try_recv().is_err(), "published, and nothing done yet");
    bench.sweep();
    let asked = bench.requests.try_recv().unwrap();
    assert!(matches!(asked, Control::Close { row, reason: CloseReason::Reaped } if row == entry.id()), "{asked:?}");
}

#[test]
fn a_broken_view_is_said_and_nothing_is_concluded_from_it() {
    let mut bench = Bench::new();
    let (_socket, entry) = bench.open();
    let zombie = socket(entry.cookie(), TcpState::CloseWait);
    bench.script(|script| script.sockets = vec![zombie]);
    bench.sweep();
    let before = bench.sweep();
    assert!(before.last_success > 0.0 && before.findings.len() == 1);
    bench.script(|script| script.broken = true);
    let during = bench.sweep();
    assert_eq!((during.sweeps, during.findings.len()), (before.sweeps + 1, 0));
    assert_eq!(during.last_success.to_bits(), before.last_success.to_bits(), "no success");
    assert!(during.uncertain.as_deref().unwrap().contains("scripted"));
    bench.script(|script| script.broken = false);
    assert!(bench.sweep().findings.is_empty(), "the sweeps count from the start again");
    let after = bench.sweep();
    assert_eq!((after.findings.len(), after.uncertain.as_ref()), (1, None));
}

#[test]
fn disagreeing_witnesses_hold_everything_back_until_they_agree() {
    let mut bench = Bench::new();
    let (_socket, entry) = bench.open();
    let zombie = socket(entry.cookie(), TcpState::CloseWait);
    bench.script(|script| {
        script.sockets = vec![zombie];
        script.disagreement = Some("one cookie more".to_owned());
    });
    // Nobody has asked the witnesses yet: the cross-check is due by its interval only.
    bench.task.next_crosscheck = Mono::ZERO;
    for _ in 0..5 {
        let report = bench.sweep();
        assert_eq!(report.uncertain.as_deref(), Some("one cookie more"));
        assert!(report.findings.iter().all(|finding| finding.held_back.is_some()));
    }
    assert!(bench.requests.try_recv().is_err());
    assert!(bench.script.lock().unwrap().crosschecks >= 5, "asked again in each sweep");
    bench.script(|script| script.disagreement = None);
    for _ in 0..3 {
        bench.sweep();
    }
    assert!(bench.requests.try_recv().is_ok());
}

#[test]
fn the_view_is_believed_unless_it_is_the_liar() {
    for liar in Witness::ALL {
        let mut bench = Bench::new();
        let (_socket, entry) = bench.open();
        bench.script(|script| {
            script.sockets = vec![socket(entry.cookie(), TcpState::CloseWait)];
            script.disagreement = Some("two against one".to_owned());
            script.liar = Some(liar);
        });
        bench.task.next_crosscheck = Mono::ZERO;
        for _ in 0..3 {
            bench.sweep();
        }
        let report = bench.sweep();
        let believed = liar != Witness::Ebpf;
        assert_eq!(report.uncertain.is_none(), believed, "{liar}");
        assert_eq!(bench.requests.try_recv().is_ok(), believed, "{liar}");
        assert_eq!(report.crosscheck.as_ref().unwrap().result.liar, Some(liar));
        let asked = bench.script.lock().unwrap().crosschecks;
        assert_eq!(asked > 1, !believed, "asked again at once only if the view is in doubt");
    }
}

#[test]
fn tombstones_go_when_the_kernel_lacks_them_and_the_view_is_whole() {
    let mut bench = Bench::new();
    let (descriptor, entry) = bench.open();
    let cookie = entry.cookie();
    drop(descriptor);
    entry.retire(CloseReason::MaxAge);
    let tombstones = |bench: &Bench| bench.task.subject.ledger.snapshot(clock::now()).tombstones.len();
    bench.script(|script| script.sockets = vec![socket(cookie, TcpState::Established)]);
    bench.sweep();
    let held = bench.sweep();
    assert_eq!(held.findings[0].tombstone.map(|tombstone| tombstone.reason), Some(CloseReason::MaxAge));
    assert_eq!(tombstones(&bench), 1, "the kernel still has it");
    bench.script(|script| {
        script.sockets.clear();
        script.uncertain = Some("storage failed".to_owned());
    });
    bench.sweep();
    assert_eq!(tombstones(&bench), 1, "the view might be wrong");
    bench.script(|script| script.uncertain = None);
    bench.sweep();
    assert_eq!(tombstones(&bench), 0);
}

#[test]
fn a_ghost_whose_socket_exists_is_none() {
    let mut bench = Bench::new();
    let (_socket, entry) = bench.open();
    for _ in 0..3 {
        bench.sweep();
    }
    let rows = bench.task.subject.ledger.snapshot(clock::now()).rows;
    assert_eq!(rows.iter().map(|row| row.cookie).collect::<Vec<_>>(), [entry.cookie()], "the row stays");
    bench.task.reap();
    let report = bench.sweep();
    let record = report.recent.back().unwrap();
    assert_eq!((record.class, record.outcome), (Class::Ghost, Some(Outcome::Ineffective)));
    assert!(bench.script.lock().unwrap().crosschecks > 0, "the witnesses are asked");
}

#[test]
fn a_crosscheck_that_fails_settles_no_doubt() {
    let mut bench = Bench::new();
    bench.task.doubt = true;
    bench.script(|script| script.broken = true);
    assert!(bench.sweep().uncertain.is_some());
    bench.script(|script| script.broken = false);
    assert!(bench.sweep().uncertain.is_none());
    bench.sweep();
    assert_eq!(bench.script.lock().unwrap().crosschecks, 2, "until the witnesses have been asked, and no longer");
}

#[test]
fn the_thread_sweeps_at_its_interval_and_on_request_and_ends() {
    let config = fixture::config(ReapMode::Off, None);
    let (observed, _setup, _requests) = fixture::observed(config);
    let published = Arc::new(Published::new(Report::new(Source::Ebpf, 1)));
    let task = Task::new(observed.subject(), Box::new(View(Arc::default())), Arc::clone(&published));
    let (requests, received) = channel();
    let thread = std::thread::spawn(move || task.run(&received));
    let deadline = clock::now().after(Duration::from_secs(20));
    while published.get().sweeps < 3 {
        assert!(clock::now() < deadline);
        std::thread::yield_now();
    }
    let asked = published.get().sweeps + 20;
    for _ in 0..20 {
        requests.send(Request::Sweep).unwrap();
    }
    while published.get().sweeps < asked {
        assert!(clock::now() < deadline);
        std::thread::yield_now();
    }
    requests.send(Request::Stop).unwrap();
    thread.join().unwrap();
}

#[test]
fn an_order_is_for_findings_that_may_be_acted_on() {
    let mut bench = Bench::new();
    bench.task.reaper = Reaper::new(&fixture::config(ReapMode::DryRun, None).watchdog);
    let (_socket, entry) = bench.open();
    let (_healthy, well) = bench.open();
    let zombie = socket(entry.cookie(), TcpState::CloseWait);
    let established = socket(well.cookie(), TcpState::Established);
    bench.script(|script| script.sockets = vec![zombie, established]);
    bench.sweep();
    let refused = |bench: &mut Bench, cookie| bench.task.order(cookie).unwrap_err();
    assert!(refused(&mut bench, entry.cookie()).contains("looks like a zombie, but not in enough sweeps"));
    bench.sweep();
    assert!(refused(&mut bench, well.cookie()).contains("nothing is wrong with it"));
    assert!(refused(&mut bench, u64::MAX).contains("neither view has"));
    bench.script(|script| script.uncertain = Some("storage failed".to_owned()));
    bench.sweep();
    assert!(refused(&mut bench, entry.cookie()).contains("uncertain: storage failed"));
    bench.script(|script| script.uncertain = None);
    bench.sweep();
    assert!(refused(&mut bench, entry.cookie()).contains("held back"), "it was uncertain in one of the last sweeps");
    bench.sweep();
    assert!(bench.requests.try_recv().is_err(), "dry run: nobody is asked");
    let ordered = bench.task.order(entry.cookie()).unwrap();
    assert_eq!((ordered.finding.cookie, ordered.finding.class), (entry.cookie(), Class::Zombie));
    assert!(refused(&mut bench, entry.cookie()).contains("being reaped already"));
    bench.task.reap();
    let asked = bench.requests.try_recv().unwrap();
    assert!(matches!(asked, Control::Close { row, reason: CloseReason::Reaped } if row == entry.id()), "{asked:?}");
    drop(entry);
    bench.script(|script| script.sockets.clear());
    bench.task.reap();
    let report = bench.task.published.get();
    let record = report.recent.back().unwrap();
    assert!(record.ordered && record.serial >= ordered.serial);
    assert_eq!(record.outcome, Some(Outcome::Released));
    let states: Vec<_> = record.finding.flight.changes().iter().map(|change| (change.tcp, change.row)).collect();
    assert_eq!(states, [(Some(TcpState::CloseWait), Some(RowState::Idle)), (None, None)], "from the sweeps to the end");
}

#[test]
fn a_look_reads_both_halves_and_is_no_sweep() {
    let mut bench = Bench::new();
    let (_socket, entry) = bench.open();
    bench.script(|script| script.sockets = vec![socket(entry.cookie(), TcpState::CloseWait)]);
    for _ in 0..10 {
        let look = bench.task.look();
        assert_eq!(look.kernel.unwrap().sockets[0].cookie, entry.cookie());
        assert_eq!(look.ledger.rows[0].cookie, entry.cookie());
    }
    bench.script(|script| script.broken = true);
    let look = bench.task.look();
    assert!(look.kernel.unwrap_err().contains("scripted"));
    assert_eq!(look.ledger.rows.len(), 1, "the ledger needs no kernel");
    bench.script(|script| script.broken = false);
    assert!(bench.sweep().findings.is_empty(), "this was the first sweep");
}

#[test]
fn shorter_intervals_of_a_new_configuration_count_at_once() {
    let mut config = fixture::config(ReapMode::Off, None);
    (config.watchdog.interval, config.watchdog.crosscheck_interval) =
        (Duration::from_secs(3600), Duration::from_secs(7200));
    let (observed, ..) = fixture::observed(config);
    let script = Arc::new(Mutex::new(Script::default()));
    let watchdog = crate::watchdog::start(observed.subject(), Box::new(View(Arc::clone(&script)))).unwrap();
    let until = |done: &dyn Fn() -> bool| {
        let deadline = clock::now().after(Duration::from_secs(10));
        while !done() {
            assert!(clock::now() < deadline, "{} sweeps", watchdog.handle().report().sweeps);
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    until(&|| watchdog.handle().report().sweeps == 1);
    let mut subject = observed.subject();
    let interval = Duration::from_millis(10);
    (subject.settings.interval, subject.settings.crosscheck_interval) = (interval, interval);
    watchdog.handle().adopt(subject);
    until(&|| watchdog.handle().report().sweeps > 3 && script.lock().unwrap().crosschecks > 1);
}

/// Counts the lines of the log.
struct Lines(Arc<AtomicUsize>);

impl<S: tracing::Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        self.0.fetch_add(usize::from(event.metadata().target().ends_with("watchdog::task")), Ordering::Relaxed);
    }
}

#[test]
fn a_view_that_stays_broken_is_said_once() {
    let lines = Arc::new(AtomicUsize::new(0));
    let _guard = tracing_subscriber::registry().with(Lines(Arc::clone(&lines))).set_default();
    let mut bench = Bench::new();
    bench.script(|script| script.broken = true);
    (0..5).for_each(|_| drop(bench.sweep()));
    assert_eq!(lines.load(Ordering::Relaxed), 1);
    bench.script(|script| script.broken = false);
    (0..5).for_each(|_| drop(bench.sweep()));
    assert_eq!(lines.load(Ordering::Relaxed), 2, "and that it is whole again");
}
