//! The files that the program reads: a configuration and what it names. Whatever they are, and on whatever file system, the
//! process that serves goes on to serve, to hear signals and to tell that it is alive.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests panic")]

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options, program};
use counterfoil_tests::driver::{Client, Tls};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::tempdir::TempDir;
use counterfoil_tests::{process, wait};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

/// Far above what it takes, but for the limit of a reload, which is 10 s.
const SOON: Duration = Duration::from_secs(30);

fn make_fifo(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

/// Each file that can be named, as a FIFO, by `check-config`, by `run` and by a reload.
#[test]
fn a_fifo_is_refused_and_nobody_waits_for_its_other_end() {
    let (dir, authority) = (TempDir::new("fifos"), Authority::new());
    let (fifo, certificate) = (dir.path().join("fifo"), authority.issue("server", &["dns.example.test"]));
    make_fifo(&fifo);
    let backend = FakeBackend::answering(false);
    let good = Config::new(backend.address).tls(&certificate);
    let named = format!("{:?}", fifo.display().to_string());
    let counterfoil = Counterfoil::start(&good);
    let program = program().display().to_string();
    for (name, config) in [
        ("listener.tls.certificate", good.clone().set("listener.tls", "certificate", &named)),
        ("listener.tls.key", good.clone().set("listener.tls", "key", &named)),
        (
            "pool.backend.tls.ca",
            good.clone().backend_key("tls.server_name", "\"a.example\"").backend_key("tls.ca", &named),
        ),
        ("admin.token_file", good.clone().set("admin", "token_file", &named)),
    ] {
        let file = dir.write("c.toml", &config.text("")).display().to_string();
        let expected = format!("key `{name}`: {}", fifo.display());
        for arguments in [&["check-config", &file][..], &["run", "--config", &file]] {
            let (ok, said) = process::run(&program, arguments, SOON);
            assert!(!ok && said.contains(&expected) && said.contains("is a FIFO"), "{arguments:?}: {said}");
        }
        counterfoil.rewrite_with(&config);
        let (ok, said) = counterfoil.ctl(&["reload"], SOON);
        assert!(!ok && said.contains(&expected) && said.contains("is a FIFO"), "{name}: {said}");
    }
    let fifo = fifo.display().to_string();
    for arguments in [&["check-config", fifo.as_str()][..], &["run", "--config", &fifo]] {
        let (ok, said) = process::run(&program, arguments, SOON);
        assert!(!ok && said.contains(&format!("error: {fifo}: is a FIFO")), "{arguments:?}: {said}");
    }
    std::fs::remove_file(counterfoil.file()).unwrap();
    make_fifo(&counterfoil.file());
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(!ok && said.contains("is a FIFO"), "{said}");
    std::fs::remove_file(counterfoil.file()).unwrap();
    counterfoil.rewrite_with(&good);
    assert!(counterfoil.ctl(&["reload"], SOON).0);
    counterfoil.assert_quiescent();
}

/// A file system whose server never answers: opening a file on it takes for ever, as with NFS when its server is gone.
struct Hanging {
    place: PathBuf,
    /// The other end; closing it would end the wait of those who wait.
    _server: File,
}

impl Hanging {
    fn mount(dir: &TempDir) -> Self {
        let place = dir.path().join("hanging");
        std::fs::create_dir(&place).unwrap();
        let device = Path::new("/dev/fuse");
        let device = if device.exists() {
            device.to_owned()
        } else {
            // In a container without it.
            let made = dir.path().join("fuse");
            mknodat(CWD, &made, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, rustix::fs::makedev(10, 229))
                .unwrap();
            made
        };
        let server = File::options().read(true).write(true).open(device).expect("a kernel with FUSE");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        mount("hanging", &place, "fuse", MountFlags::NODEV | MountFlags::NOSUID, Some(options.as_c_str())).unwrap();
        Self { place, _server: server }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        let _ = unmount(&self.place, UnmountFlags::DETACH);
    }
}

/// A service manager, which reads what it is told as it comes: the kernel keeps but a few messages for it.
fn manager(path: &Path) -> mpsc::Receiver<String> {
    let socket = UnixDatagram::bind(path).unwrap();
    let (lines, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(length) = socket.recv(&mut bytes) {
            let message = String::from_utf8_lossy(&bytes[..length]).into_owned();
            if !message.lines().all(|line| lines.send(line.to_owned()).is_ok()) {
                return;
            }
        }
    });
    told
}

/// The reload is refused when its time is over, with the name of the file. Until then, and while its thread hangs on, the
/// process answers, shows signs of life, refuses the next reload at once, and takes one when the file can be read again.
#[test]
fn a_file_system_that_hangs_holds_up_nothing_but_the_reload() {
    let (dir, authority) = (TempDir::new("hanging"), Authority::new());
    let path = dir.path().join("notify");
    let manager = manager(&path);
    let path = path.display().to_string();
    let environment = [("NOTIFY_SOCKET", path.as_str()), ("WATCHDOG_USEC", "2000000")];
    let options = Options { environment: &environment, ..Options::default() };
    let certificate = authority.issue("server", &["dns.example.test"]);
    let backend = FakeBackend::answering(false);
    let good = Config::new(backend.address).settles_soon().tls(&certificate);
    let mut counterfoil = Counterfoil::start_with(&good, options);

    let hanging = Hanging::mount(&dir);
    let file = hanging.place.join("key.pem");
    counterfoil.rewrite_with(&good.clone().set("listener.tls", "key", format!("{:?}", file.display().to_string())));
    manager.try_iter().for_each(drop);
    counterfoil.process.signal(Signal::HUP);
    let mut heard = Vec::new();
    wait::until("the reload has begun", SOON, || {
        heard.extend(manager.try_iter());
        heard.iter().any(|line| line == "RELOADING=1")
    });
    // A second one waits for the first, and is refused with it or at once behind it.
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    let refused = format!("{} could not be read within 10 s", file.display());
    assert!(!ok && said.contains(&refused), "{said}");
    heard.extend(manager.try_iter());
    // One each half second; four seconds without any would be the end.
    let signs = heard.iter().filter(|line| *line == "WATCHDOG=1").count();
    assert!(signs >= 5, "{signs} signs of life: {heard:?}");
    assert!(heard.iter().any(|line| line.contains("the last configuration was refused: ")), "{heard:?}");
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("config_last_reload_successful", &[]), 0.0);
    // Its thread hangs still.
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(!ok && said.contains(&refused), "{said}");
    let mut client = Client::connect_tls(counterfoil.address, None, &Tls::new(&authority.ca, "dns.example.test"));
    assert_eq!(message::response_code(&client.exchange(1, "a.example.test", qtype::A)), rcode::NOERROR);
    drop(client);

    drop(hanging);
    counterfoil.rewrite_with(&good);
    wait::until("a reload", SOON, || counterfoil.ctl(&["reload"], SOON).0);
    counterfoil.assert_quiescent();
}

/// In the middle of a reload that hangs the process ends as if there were none.
#[test]
fn the_end_can_be_asked_for_while_a_reload_hangs() {
    let dir = TempDir::new("hanging");
    let backend = FakeBackend::answering(false);
    let good = Config::new(backend.address);
    let mut counterfoil = Counterfoil::start(&good);
    let hanging = Hanging::mount(&dir);
    let file = format!("{:?}", hanging.place.join("token").display().to_string());
    counterfoil.rewrite_with(&good.set("admin", "token_file", file));
    let mut events = counterfoil.begin(&serde_json::json!({"cmd": "reload"}));
    wait::until("a thread hangs", SOON, || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", counterfoil.pid())).unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.into_iter().any(|name| name.trim() == "reload")
    });
    let failures = counterfoil.metrics().sum("config_reload_failures_total", &[]);
    assert_eq!(failures, 0.0, "it is under way still");
    counterfoil.process.signal(Signal::TERM);
    let done = events.wait();
    assert_eq!((&done["ok"], done["message"].as_str()), (&false.into(), Some("the process is about to end")), "{done}");
    assert_eq!(counterfoil.process.wait_exit(SOON).code(), Some(0), "{}", counterfoil.process.tail());
}

/// Root reads everything at the start, but the process gives up the capability for it before it serves: what it could not
/// read again is told at once, by `check-config` and by `run`, and is what the reload says then.
#[test]
fn a_file_that_a_reload_cannot_read_is_told_at_the_start() {
    const ANOTHER: u32 = 1;
    let (dir, authority) = (TempDir::new("later"), Authority::new());
    let certificate = authority.issue("server", &["dns.example.test"]);
    let token = dir.write("token", "0123456789abcdef\n");
    std::fs::set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
    std::fs::set_permissions(&certificate.key, Permissions::from_mode(0o600)).unwrap();
    let backend = FakeBackend::answering(false);
    let config = Config::new(backend.address).tls(&certificate).set("admin", "token_file", format!("{token:?}"));
    let program = program().display().to_string();
    let warned = |config: &Config| {
        let file = dir.write("c.toml", &config.text("")).display().to_string();
        let (ok, said) = process::run(&program, &["check-config", &file], SOON);
        assert!(ok, "{said}");
        said.lines().filter(|line| line.contains("every reload will be refused")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(warned(&config).is_empty(), "what belongs to root root can read");
    for file in [&certificate.key, &token] {
        std::os::unix::fs::chown(file, Some(ANOTHER), None).unwrap();
    }
    let lines = warned(&config);
    assert_eq!(lines.len(), 2, "{lines:?}");
    for (line, (key, file)) in lines.iter().zip([("listener.tls.key", &certificate.key), ("admin.token_file", &token)])
    {
        let expected = format!("key `{key}`: {} cannot be read: Permission denied (os error 13)", file.display());
        assert!(line.contains(&expected) && line.contains("let user 0, as whom this runs, read it"), "{line}");
    }
    let counterfoil = Counterfoil::start(&config);
    let notes = |key: &str| {
        let lines = counterfoil.process.lines();
        lines.iter().filter(|line| line.contains(key) && line.contains("every reload will be refused")).count()
    };
    assert_eq!((notes("`listener.tls.key`"), notes("`admin.token_file`")), (1, 1), "{}", counterfoil.process.tail());
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(!ok && said.contains("cannot be read: Permission denied"), "{said}");
    // As the words say.
    for file in [&certificate.key, &token] {
        std::os::unix::fs::chown(file, Some(0), None).unwrap();
    }
    assert!(counterfoil.ctl(&["reload"], SOON).0);
    counterfoil.assert_quiescent();
}
