//! The admin side is shared by whoever can reach its port or its socket: those who hold connections and ask nothing, or take
//! no answer, give way to those who ask.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::qtype;
use counterfoil_tests::metrics;
use socket2::{Domain, Socket, Type};

/// More connections than either side has places for.
const CROWD: usize = 100;
/// Requests of the good neighbour.
const ASKED: usize = 5;
/// As a caller's own limit would be; nobody waits so long.
const SOON: Duration = Duration::from_secs(5);

fn start() -> (FakeBackend, Counterfoil) {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    (backend, counterfoil)
}

/// A connection to `admin.http` that can hold little of an answer.
fn connect(counterfoil: &Counterfoil) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&counterfoil.admin.unwrap().into()).unwrap();
    socket.into()
}

/// Of each, in order, whether it was closed by the other side.
fn closed<S: Read>(attackers: &mut [S]) -> Vec<bool> {
    let is_closed = |stream: &mut S| {
        let mut octets = [0; 65_536];
        loop {
            match stream.read(&mut octets) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != ErrorKind::WouldBlock,
            }
        }
    };
    attackers.iter_mut().map(is_closed).collect()
}

/// The good neighbour is answered each time; attackers made room, one for each connection that came when all places were
/// taken.
#[track_caller]
fn assert_gave_way(gone: &[bool], attack: &str) -> usize {
    let count = gone.iter().filter(|gone| **gone).count();
    assert!(count > ASKED && count < CROWD, "{attack}: {count} of {CROWD} gave way");
    count
}

/// It was the oldest of them.
#[track_caller]
fn assert_the_oldest_gave_way(gone: &[bool], attack: &str) {
    let count = assert_gave_way(gone, attack);
    assert!(gone[..count].iter().all(|gone| *gone), "{attack}: not the oldest ones: {gone:?}");
}

#[track_caller]
fn assert_answered(counterfoil: &Counterfoil, attack: &str) {
    for path in ["/healthz", "/readyz", "/metrics", "/", "/api/v1/view"].iter().take(ASKED) {
        let answer = metrics::get(counterfoil.admin.unwrap(), path);
        assert!(matches!(&answer, Ok((head, _)) if head.contains(" 200 ")), "{attack}: {path}: {answer:?}");
    }
}

#[test]
fn who_holds_connections_to_admin_http_gives_way() {
    let (_backend, counterfoil) = start();
    let metrics = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".repeat(8);
    let attacks: [(&str, &[u8]); 3] =
        [("silence", b""), ("half a header", b"GET /metrics HTTP/1.1\r\nx: "), ("reads no answer", &metrics)];
    for (attack, sent) in attacks {
        let mut attackers: Vec<TcpStream> = (0..CROWD)
            .map(|_| {
                let mut stream = connect(&counterfoil);
                stream.write_all(sent).unwrap();
                stream
            })
            .collect();
        for (round, stream) in attackers.iter_mut().enumerate() {
            stream.set_nonblocking(true).unwrap();
            // Octets that drip in make nobody younger; the first ones are closed already.
            if attack == "half a header" {
                let _ = stream.write(&[b'0' + (round % 10) as u8]);
            }
        }
        assert_answered(&counterfoil, attack);
        let gone = closed(&mut attackers);
        if attack == "reads no answer" {
            // Whoever is being answered stays until it is seen that it takes nothing, while a younger one may go.
            assert_gave_way(&gone, attack);
        } else {
            assert_the_oldest_gave_way(&gone, attack);
        }
    }
    counterfoil.client().exchange(1, "still.example.test", qtype::A);
    counterfoil.assert_quiescent();
}

#[test]
fn who_holds_connections_to_the_admin_socket_gives_way() {
    let (_backend, counterfoil) = start();
    for (attack, sent) in [("silence", ""), ("half a request", "{\"cmd\":")] {
        let mut attackers: Vec<UnixStream> = (0..CROWD)
            .map(|_| {
                let mut stream = UnixStream::connect(counterfoil.socket()).unwrap();
                stream.write_all(sent.as_bytes()).unwrap();
                stream.set_nonblocking(true).unwrap();
                stream
            })
            .collect();
        for _ in 0..ASKED {
            let (ok, output) = counterfoil.ctl(&["show", "view"], SOON);
            assert!(ok, "{attack}: {output}");
        }
        assert_the_oldest_gave_way(&closed(&mut attackers), attack);
    }
    counterfoil.assert_quiescent();
}
