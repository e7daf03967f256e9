//! The tests' own ground: what they start is what xtask has unpacked, as itself, whatever this machine has installed.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use counterfoil_tests::documents;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::netns;
use counterfoil_tests::process::{self, Process};
use counterfoil_tests::servers::{
    Alertmanager, Haproxy, Knot, LeakyFront, PowerDns, Prometheus, Recursor, TlvOracle, Unbound,
};
use counterfoil_tests::tempdir::TempDir;

const SOON: Duration = Duration::from_secs(30);

/// Cargo's directory, where this test was built.
fn target() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists()).unwrap().to_owned()
}

/// The root that xtask has unpacked, below Cargo's directory.
const ROOT: &str = "test-tools/root";

/// The file of this path in it.
fn unpacked(path: &Path) -> PathBuf {
    // The kernel calls files of a process with mounts of its own, as `ip netns exec` makes them, by their names outside.
    let path = path.to_str().unwrap();
    let inside = path.rsplit_once(ROOT).map_or(path, |(_, inside)| inside);
    target().join(ROOT).join(inside.trim_start_matches('/'))
}

/// Which file it is, whatever it is called.
fn identity(path: impl AsRef<Path>) -> (u64, u64) {
    let metadata = fs::metadata(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()));
    (metadata.dev(), metadata.ino())
}

/// The process that was started has become this program of the unpacked root, and sees that root.
#[track_caller]
fn assert_itself(process: &Process, program: &str) {
    let of = |what: &str| PathBuf::from(format!("/proc/{}/{what}", process.pid()));
    let path = fs::read_link(of("exe")).unwrap();
    assert_eq!(path.file_name().unwrap(), program);
    assert_eq!(identity(of("exe")), identity(unpacked(&path)), "{}", path.display());
    assert_eq!(identity(of("root")), identity(unpacked(Path::new("/"))), "{program}");
    // The kernel keeps 15 octets of a name.
    assert_eq!(fs::read_to_string(of("comm")).unwrap().trim_end(), &program[..program.len().min(15)]);
    // So are its libraries: device, as major and minor number in hexadecimal, inode and name of each file in its memory.
    let maps = fs::read_to_string(of("maps")).unwrap();
    let mut libraries = 0;
    for fields in maps.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()) {
        if let [_, _, _, device, inode, file] = fields[..]
            && file.contains(".so")
        {
            let (device_there, inode_there) = identity(unpacked(Path::new(file)));
            let (major, minor) = (rustix::fs::major(device_there), rustix::fs::minor(device_there));
            assert_eq!((device, inode), (&*format!("{major:02x}:{minor:02x}"), &*inode_there.to_string()), "{file}");
            libraries += 1;
        }
    }
    assert!(libraries > 0, "{maps}");
}

#[test]
fn servers_are_started_as_themselves_from_the_unpacked_root() {
    let backend = FakeBackend::answering(false);
    let address = backend.address;
    assert_itself(&Unbound::start(false).process, "unbound");
    assert_itself(&Recursor::start(false).process, "pdns_recursor");
    assert_itself(&PowerDns::start(1, 1).process, "pdns_server");
    assert_itself(&Knot::start(1, 1).process, "knotd");
    assert_itself(&TlvOracle::start().process, "dnsdist");
    assert_itself(&LeakyFront::start(address).process, "dnsdist");
    assert_itself(&Haproxy::start(address, "").process, "haproxy");
    assert_itself(&Alertmanager::start().process, "prometheus-alertmanager");
    assert_itself(&Prometheus::start(address, &[], None).process, "prometheus");
    let (left, _right) = netns::pair();
    assert_itself(&Unbound::start_in(&left, left.address).process, "unbound");
}

/// Programs that other machines have installed, or once did.
const INSTALLED: [&str; 3] = ["/usr/sbin/unbound", "/usr/bin/dnsdist", "/usr/bin/kdig"];

/// Runs a shell script where other programs are installed in place of these, and come first in `PATH`, too.
fn on_another_machine(script: &str) -> (bool, String) {
    let dir = TempDir::new("decoys");
    let mut prepare = String::new();
    for installed in INSTALLED {
        let name = installed.rsplit('/').next().unwrap();
        let decoy = dir.write(name, "#!/bin/sh\necho the one that is installed\nexit 1\n");
        fs::set_permissions(&decoy, fs::Permissions::from_mode(0o755)).unwrap();
        prepare += &format!("mount --bind {} {installed} && ", decoy.display());
    }
    let script = format!("{prepare} PATH={}:$PATH && {script}", dir.path().display());
    process::run("unshare", &["--mount", "sh", "-c", &script], SOON)
}

/// Started by the tests below.
#[test]
#[ignore = "what the others start"]
fn tells_its_programs() {
    for program in ["unbound", "dnsdist", "kdig"] {
        println!("{program} says {}", process::run(program, &["-V"], SOON).1);
    }
}

/// The command that starts [`tells_its_programs`].
fn telling() -> String {
    format!("{} --exact tells_its_programs --ignored --nocapture", std::env::current_exe().unwrap().display())
}

#[test]
fn what_is_installed_on_the_machine_is_not_used() {
    let (_, said) = on_another_machine(&INSTALLED.map(|program| format!("{program} -V")).join("; "));
    assert_eq!(said.matches("the one that is installed").count(), INSTALLED.len(), "they are installed: {said}");
    let (_, said) = on_another_machine("unbound -V; dnsdist -V; kdig -V");
    assert_eq!(said.matches("the one that is installed").count(), INSTALLED.len(), "and first in PATH: {said}");
    let runner = documents::root().canonicalize().unwrap().join("xtask/runner");
    let (ok, said) = on_another_machine(&format!("{} {}", runner.display(), telling()));
    assert!(ok && !said.contains("the one that is installed"), "{said}");
    for version in ["unbound says Version 1.", "dnsdist says dnsdist 1.", "kdig says kdig (Knot DNS)"] {
        assert!(said.contains(version), "{version}: {said}");
    }
}

/// What the script that enters the root takes from this machine, besides `/bin/sh` and, for an error, `umount`. Every Debian
/// has them: they are of coreutils and util-linux, which are essential, and of mount, which is required.
const ENTERED_BY: [&str; 6] = ["chroot", "findmnt", "id", "mkdir", "mount", "unshare"];

#[test]
fn the_root_is_entered_with_what_every_debian_has() {
    let enter = documents::root().canonicalize().unwrap().join("xtask/enter");
    let entered = |programs: &[&str]| {
        let dir = TempDir::new("path");
        for program in programs {
            let place = ["/usr/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(program));
            let place = place.iter().find(|place| place.exists()).unwrap();
            std::os::unix::fs::symlink(place, dir.path().join(program)).unwrap();
        }
        let script = format!("PATH={} exec {} {} true", dir.path().display(), enter.display(), target().display());
        process::run("sh", &["-c", &script], SOON)
    };
    assert_eq!(entered(&ENTERED_BY), (true, String::new()));
    for left_out in ENTERED_BY {
        let others: Vec<&str> = ENTERED_BY.into_iter().filter(|program| *program != left_out).collect();
        let (ok, said) = entered(&others);
        assert!(!ok || !said.is_empty(), "without {left_out}: {said}");
    }
}

/// All others go through [`Process`], which looks where it is.
#[test]
fn nothing_else_is_started_by_name() {
    let call = ["Command", "new("].join("::");
    let mut named = Vec::new();
    for folder in ["tests/src", "tests/tests", "tests/src/servers"] {
        for file in fs::read_dir(documents::root().join(folder)).unwrap() {
            let path = file.unwrap().path();
            let Ok(source) = fs::read_to_string(&path) else { continue };
            let behind = source.split(&call).skip(1).filter_map(|rest| rest.strip_prefix('"'));
            named.extend(behind.filter_map(|rest| Some(rest.split('"').next()?.to_owned())));
        }
    }
    named.sort();
    assert_eq!(named, ["ip", "setpriv"], "of the root, where only a test that is in it comes to");
}

/// Whatever it would find there.
#[test]
fn a_test_outside_of_the_root_starts_nothing() {
    let (ok, said) = on_another_machine(&format!("mount --bind /dev/null /etc/debian_chroot && {}", telling()));
    assert!(!ok && !said.contains("says"), "{said}");
    assert!(said.contains("`cargo xtask tools` unpacks it"), "{said}");
}
