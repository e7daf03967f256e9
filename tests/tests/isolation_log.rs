//! The log is shared by all of whom it tells: what one client causes to be written is bounded, and hides no other's.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::counterfoil::{Counterfoil, message};
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::proxy_header::v2;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
/// Lines that one client may cause at one place in the code, at once; then one each second.
const SHARE: usize = 10;

/// What the log says at `info` and above, as objects.
fn lines(counterfoil: &Counterfoil) -> Vec<Value> {
    counterfoil.process.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Clients that do all that is told: no header, one that is none, one where none may be; messages that cannot be read, and
/// resets. Then another is refused once, and that is told.
fn flood(setting: Setting) {
    const ROUNDS: usize = 100;
    let backend = FakeBackend::answering(setting.identity.is_some());
    let scene = Scene::new(setting);
    let config =
        scene.config(backend.address).accept_proxy(&["127.0.0.2", "127.0.0.3"]).set("server", "log", "\"info\"");
    let mut counterfoil = Counterfoil::start(&config);
    let (attacker, other): (IpAddr, IpAddr) = ("127.0.0.2".parse().unwrap(), "127.0.0.3".parse().unwrap());
    let header = v2("192.0.2.7:4007", "198.51.100.53:53", &[]);
    let mut broken = header.clone();
    broken[12] = 0x22;
    let began = Instant::now();
    let said = lines(&counterfoil).len();
    for _ in 0..ROUNDS {
        for octets in [&b"this is no header"[..], &broken, &[&header[..], &header, &[0, 1, 0]].concat()] {
            let mut client = Client::connect(counterfoil.address, Some(attacker));
            // Refused at the first octet that is wrong.
            let _ = client.send_raw(octets);
            client.assert_ended(SOON);
        }
        // Behind no header that counts, from anywhere.
        let Ok(mut client) = Client::try_connect(counterfoil.address, Some("127.0.0.9".parse().unwrap())) else {
            continue;
        };
        let _ = client.send_raw(&header);
        client.assert_ended(SOON);
    }
    let mut client = Client::connect(counterfoil.address, Some(other));
    let _ = client.send_raw(&broken);
    client.assert_ended(SOON);
    let told = |line: &str| {
        let peer = message(line, "client connection refused")?["peer"].as_str()?.to_owned();
        peer.starts_with("127.0.0.3:").then_some(())
    };
    counterfoil.process.wait_for_line(SOON, "that another client was refused", told);
    // One share at each place that tells of a client, and what is told of lines that were held back.
    let written = lines(&counterfoil).len() - said;
    let allowed = 2 * (SHARE + 1 + began.elapsed().as_secs() as usize) + 1 + 10;
    println!("{setting:?}: {written} lines for {} connections, {allowed} are allowed", 4 * ROUNDS + 1);
    assert!(written <= allowed, "{written}\n{}", counterfoil.process.tail());
    counterfoil.assert_quiescent();
}

#[test]
fn nobody_hides_what_is_said_of_others() {
    flood(Setting::identity("address"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_nobody_hides_what_is_said_of_others() {
    Setting::all().for_each(flood);
}
