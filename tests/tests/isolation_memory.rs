//! Memory for clients that do not read: bounded while they are there, in the kernel too, and gone with them.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting, Wait};
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::sockets::{self, Memory};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(30);
const ATTACKERS: usize = 20;
/// `max_pending_answers` by default, octets.
const PENDING: usize = 256 << 10;
/// What one piece of data may bring above a limit that is looked at before it is taken, octets.
const ONE_MORE: usize = 96 << 10;
const QUERIES: u16 = 1000;
/// Octets of an answer.
const LONG: usize = 60_000;

/// Answers at length whatever is called `long...`; counts these in `served`.
fn backend(header: bool, served: &Arc<AtomicUsize>) -> FakeBackend {
    let served = Arc::clone(served);
    FakeBackend::start(move |connection| {
        if header && connection.header().is_none() {
            return;
        }
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if message::question_name(&query).is_some_and(|name| name.starts_with("long")) {
                answer.resize(LONG, 0);
                served.fetch_add(1, Ordering::SeqCst);
            }
            connection.send(&answer);
        }
    })
}

/// It asks for long answers, as much as is taken, and reads none of them.
fn deaf(scene: &Scene, listener: SocketAddr) -> Client {
    let mut client = scene.connect(listener, IpAddr::from(Ipv4Addr::new(127, 0, 0, 2)));
    let queries: Vec<u8> = (0..QUERIES)
        .flat_map(|id| message::framed(&message::query(id, &format!("long{id}.example.test"), qtype::A)))
        .collect();
    client.send_raw(&queries).unwrap();
    client
}

/// Twenty clients of one address do not read. What is kept for each is bounded, and when they are closed for that, though
/// they keep their end open, nothing is left.
fn clients_that_do_not_read(setting: Setting) {
    let scene = Scene::new(setting);
    let served = Arc::new(AtomicUsize::new(0));
    let backend = backend(scene.has_header(), &served);
    let counterfoil = Counterfoil::start(&scene.config(backend.address).set("listener", "write_timeout", "\"3s\""));
    let neighbours = scene.neighbours(&counterfoil, 4, &served);
    wait::until("the neighbours are served", SOON, || neighbours.answered() > 100);

    let attackers: Vec<Client> = (0..ATTACKERS).map(|_| deaf(&scene, counterfoil.address)).collect();
    let ports: Vec<u16> = attackers.iter().map(|client| client.local_addr().port()).collect();
    let theirs = || -> Vec<Memory> {
        let all = sockets::memory_at(counterfoil.address.port());
        all.into_iter().filter(|memory| ports.contains(&memory.socket.remote_port)).collect()
    };
    let (mut most, mut most_received) = (0, 0);
    let closed = |metrics: &counterfoil_tests::metrics::Metrics| {
        for memory in theirs() {
            most = most.max(memory.to_send);
            most_received = most_received.max(memory.received);
        }
        metrics.sum("client_connections_closed_total", &[("reason", "write_timeout")]) == ATTACKERS as f64
    };
    counterfoil.wait_metrics("all of them are closed", SOON, closed);
    println!("{setting:?}: at most {most} octets to send, {most_received} received");
    assert!(most > PENDING / 4, "they did their worst: {most} octets");
    assert!(most <= PENDING + ONE_MORE, "{most} octets are kept in the kernel for one client that does not read");
    assert!(most_received <= PENDING + ONE_MORE, "{most_received} octets that are not read yet");
    wait::until("the kernel keeps nothing for them", Duration::from_secs(2), || theirs().is_empty());

    let before = neighbours.answered();
    wait::until("the neighbours go on", SOON, || neighbours.answered() > before + 100);
    let Wait { failed, longest, .. } = neighbours.finish();
    println!("a neighbour waited for {longest} answers to others");
    assert_eq!(failed, 0);
    // At worst for what all of them may have in flight, once.
    assert!(longest <= ATTACKERS * 100, "a neighbour waited for {longest} answers to others");
    drop(attackers);
    counterfoil.assert_quiescent();
}

#[test]
fn clients_that_do_not_read_keep_no_more_than_is_said() {
    clients_that_do_not_read(Setting::SHARED);
}

#[test]
#[ignore = "soak"]
fn soak_isolation_memory() {
    Setting::all().for_each(clients_that_do_not_read);
}

/// One that has sent its FIN and asks for more than is ever read: its session has nothing more to do once all is written,
/// and yet it counts as the client's until it is gone.
#[test]
fn a_client_that_closed_its_side_and_does_not_read_is_let_go_with_everything() {
    let served = Arc::new(AtomicUsize::new(0));
    let backend = backend(false, &served);
    let config = Scene::new(Setting::SHARED).config(backend.address).set("listener", "write_timeout", "\"2s\"");
    let counterfoil = Counterfoil::start(&config.set("listener", "max_connections_per_client", 1));
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    // The kernel takes little for it on this side.
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&counterfoil.address.into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    // One answer fits the other side's buffer.
    socket.send(&message::framed(&message::query(1, "long.example.test", qtype::A))).unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    counterfoil.wait_metrics("the session is over", SOON, |metrics| {
        metrics.sum("client_connections_closed_total", &[("reason", "client_closed")]) == 1.0
    });
    let kept = || sockets::memory_at(counterfoil.address.port()).into_iter().find(|m| m.socket.remote_port == port);
    assert!(kept().unwrap().to_send > 0, "it has not read");
    counterfoil.client().assert_closed(SOON);
    assert_eq!(counterfoil.refused("per_client"), 1.0, "it still counts");
    wait::until("it is gone", SOON, || kept().is_none());
    counterfoil.client().assert_served();
    drop(socket);
    counterfoil.assert_quiescent();
}

/// A slow one is not cut short: it gets every octet, however long that takes, as long as it reads.
#[test]
fn a_client_that_closed_its_side_and_reads_slowly_gets_everything() {
    const PACE: Duration = Duration::from_millis(300);
    let served = Arc::new(AtomicUsize::new(0));
    let backend = backend(false, &served);
    let config = Scene::new(Setting::SHARED).config(backend.address).set("listener", "write_timeout", "\"1s\"");
    let counterfoil = Counterfoil::start(&config);
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&counterfoil.address.into()).unwrap();
    socket.send(&message::framed(&message::query(1, "long.example.test", qtype::A))).unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let mut stream = std::net::TcpStream::from(socket);
    let mut all = Vec::new();
    let mut octets = [0; 6000];
    loop {
        match std::io::Read::read(&mut stream, &mut octets).unwrap() {
            0 => break,
            count => all.extend_from_slice(&octets[..count]),
        }
        // The pace of a slow reader, longer in all than any time that a client has.
        std::thread::sleep(PACE);
    }
    assert_eq!(all.len(), 2 + LONG);
    drop(stream);
    counterfoil.assert_quiescent();
}
