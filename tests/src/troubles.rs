//! Backends that are slow, shut, full or moody, as real ones are at times. Nothing that they do makes a connection to
//! them unhealthy, as long as the forwarder does its part.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::fake_backend::{Connection, FakeBackend};
use crate::message;

/// The backends of one scenario.
#[derive(Debug)]
pub struct Troubles {
    backends: Vec<FakeBackend>,
    refusing: Refusing,
    tardy: Tardy,
}

impl Troubles {
    /// Starts all of them. `slow` is how long the slow one takes for an answer.
    pub fn start(slow: Duration) -> Self {
        let backends = vec![
            FakeBackend::start(moody),
            FakeBackend::start_on(narrow(), inattentive),
            FakeBackend::start(move |connection| sluggish(connection, slow)),
        ];
        Self { backends, refusing: Refusing::start(), tardy: Tardy::start() }
    }

    /// Where they are.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let others = [self.refusing.address, self.tardy.address];
        self.backends.iter().map(|backend| backend.address).chain(others).collect()
    }
}

/// A connection that answers, and at times ends in one of the ways that TCP has.
fn moody(connection: &mut Connection) {
    let mut random = fastrand::Rng::new();
    if random.u8(..) < 8 {
        return connection.reset();
    }
    if connection.header().is_none() {
        return;
    }
    while let Some(query) = connection.query() {
        let answer = message::answer_to(&query, [192, 0, 2, 53]);
        match random.u8(..) {
            0..160 => connection.send(&answer),
            // FIN right behind the answer, whatever else is in flight.
            160..190 => return connection.send(&answer),
            // FIN behind the answer, and reading on until the other side closes.
            190..210 => {
                connection.send(&answer);
                connection.finish_sending();
                return connection.wait_closed();
            }
            // FIN or a reset instead of the answer.
            210..220 => return,
            220..230 => return connection.reset(),
            // An answer in two parts.
            230..240 => {
                let bytes = message::framed(&answer);
                connection.send_raw(&bytes[..5]);
                std::thread::sleep(Duration::from_millis(random.u64(1..30)));
                connection.send_raw(&bytes[5..]);
            }
            240..252 => {
                std::thread::sleep(Duration::from_millis(random.u64(1..200)));
                connection.send(&answer);
            }
            // Never answered.
            _ => {}
        }
    }
}

/// A connection that does not read for a while now and then: its window closes.
fn inattentive(connection: &mut Connection) {
    if connection.header().is_none() {
        return;
    }
    while let Some(query) = connection.query() {
        if fastrand::u8(..) < 4 {
            std::thread::sleep(Duration::from_millis(fastrand::u64(100..1000)));
        }
        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
    }
}

/// A connection that takes its time for every answer.
fn sluggish(connection: &mut Connection, time: Duration) {
    if connection.header().is_none() {
        return;
    }
    while let Some(query) = connection.query() {
        std::thread::sleep(time);
        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
    }
}

/// A listener whose connections have the smallest receive buffer that the kernel allows.
fn narrow() -> TcpListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(1).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    socket.listen(1024).unwrap();
    socket.into()
}

/// A port that refuses every connection, and that nobody else can take meanwhile.
#[derive(Debug)]
struct Refusing {
    address: SocketAddr,
    _bound: Socket,
}

impl Refusing {
    fn start() -> Self {
        let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        bound.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        let address = bound.local_addr().unwrap().as_socket().unwrap();
        Self { address, _bound: bound }
    }
}

/// A backend that accepts too rarely, so that connects to it hang, some of them until they are given up.
#[derive(Debug)]
struct Tardy {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tardy {
    fn start() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        // The kernel takes one more than that, and lets the others try again.
        socket.listen(1).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let listener = TcpListener::from(socket);
            listener.set_nonblocking(true).unwrap();
            let mut accepted = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(700));
                // Those of the last time are closed unanswered.
                accepted.clear();
                while let Ok((stream, _)) = listener.accept() {
                    accepted.push(stream);
                }
            }
        });
        Self { address, stop, thread: Some(thread) }
    }
}

impl Drop for Tardy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
