//! A DNS-over-TCP client of raw frames that checks every answer: known ID, the question it asked, the response code.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

pub use self::tls::{Tls, Wire};
use crate::message::{self, qtype, rcode};

/// One client connection.
#[derive(Debug)]
pub struct Client {
    wire: Wire,
    received: Vec<u8>,
}

/// What [`Client::receive`] came back with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// One whole message, without its length prefix.
    Message(Vec<u8>),
    /// The server ended the connection in order (FIN; over TLS with close_notify).
    Closed,
    /// The server ended a TLS connection without close_notify.
    Cut,
    /// The server reset the connection.
    Reset,
    /// Nothing whole came in time.
    Nothing,
}

impl Received {
    /// The message.
    ///
    /// # Panics
    /// If it is something else.
    #[track_caller]
    pub fn message(self) -> Vec<u8> {
        match self {
            Self::Message(message) => message,
            other => panic!("a message was expected, not {other:?}"),
        }
    }
}

impl Client {
    /// Connects to `server`; from address `source` where one is given (any of 127.0.0.0/8 works on loopback).
    ///
    /// # Panics
    /// If the connection is refused or takes over 5 s.
    #[track_caller]
    pub fn connect(server: SocketAddr, source: Option<IpAddr>) -> Self {
        Self::try_connect(server, source).unwrap_or_else(|e| panic!("cannot connect to {server}: {e}"))
    }

    /// Like [`Self::connect`], for servers that may refuse.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_connect(server: SocketAddr, source: Option<IpAddr>) -> std::io::Result<Self> {
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&server.into(), Duration::from_secs(5))?;
        socket.set_tcp_nodelay(true)?;
        Ok(Self { wire: Wire::Plain(socket.into()), received: Vec::new() })
    }

    /// Own address and port.
    ///
    /// # Panics
    /// If the socket has none.
    pub fn local_addr(&self) -> SocketAddr {
        self.wire.tcp().local_addr().expect("a connected socket has an address")
    }

    /// Sends octets as they are.
    ///
    /// # Errors
    /// The kernel's, such as a reset by the server.
    pub fn send_raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.wire.write_all(bytes)
    }

    /// Connects and shakes hands.
    ///
    /// # Panics
    /// If the connection is refused, or the handshake fails.
    #[track_caller]
    pub fn connect_tls(server: SocketAddr, source: Option<IpAddr>, tls: &Tls) -> Self {
        let client = Self::connect(server, source).over_tls(tls);
        client.unwrap_or_else(|e| panic!("no TLS with {server}: {e}"))
    }

    /// Shakes hands on a connection on which nothing was read yet.
    ///
    /// # Errors
    /// The server closes, or rustls's error, in which an alert of the server is.
    ///
    /// # Panics
    /// If that has been done already.
    pub fn over_tls(self, tls: &Tls) -> std::io::Result<Self> {
        let Wire::Plain(stream) = self.wire else { panic!("TLS in TLS") };
        Ok(Self { wire: Wire::shake_hands(stream, tls)?, received: self.received })
    }

    /// What the handshake has come to.
    ///
    /// # Panics
    /// Without TLS.
    #[track_caller]
    pub fn tls(&mut self) -> &mut rustls::ClientConnection {
        match &mut self.wire {
            Wire::Tls(tls) => &mut tls.conn,
            Wire::Plain(_) => panic!("no TLS"),
        }
    }

    /// The connection itself, below TLS.
    pub fn tcp(&self) -> &std::net::TcpStream {
        self.wire.tcp()
    }

    /// Sends one query with its length prefix, in one write.
    ///
    /// # Panics
    /// If the connection is broken.
    #[track_caller]
    pub fn ask(&mut self, id: u16, name: &str, qtype: u16) {
        self.send_raw(&message::framed(&message::query(id, name, qtype))).expect("the server reads");
    }

    /// Asks one question and waits for its answer.
    ///
    /// # Panics
    /// If no answer comes in 10 s, or it is the answer to something else.
    #[track_caller]
    pub fn exchange(&mut self, id: u16, name: &str, qtype: u16) -> Vec<u8> {
        self.ask(id, name, qtype);
        let answer = self.receive(Duration::from_secs(10)).message();
        assert!(message::is_response(&answer) && message::id(&answer) == id, "not an answer to {id}: {answer:02x?}");
        assert!(message::same_question(&message::query(id, name, qtype), &answer), "{name}: {answer:02x?}");
        answer
    }

    /// A query of this client is answered.
    ///
    /// # Panics
    /// Like [`Self::exchange`], and if the answer is an error.
    #[track_caller]
    pub fn assert_served(&mut self) {
        let answer = self.exchange(77, "served.example.test", message::qtype::A);
        assert_eq!(message::response_code(&answer), message::rcode::NOERROR);
    }

    /// What a [telling](crate::fake_backend::FakeBackend::telling) backend was told of this client.
    ///
    /// # Panics
    /// Like [`Self::exchange`].
    #[track_caller]
    pub fn told(&mut self) -> String {
        message::texts(&self.exchange(7, "told.example.test", qtype::TXT)).concat()
    }

    /// Sends octets one by one, until something comes; what that is. [`Received::Nothing`]: all were sent.
    #[track_caller]
    pub fn drip(&mut self, octets: &[u8], pace: Duration) -> Received {
        for octet in octets {
            if self.send_raw(&[*octet]).is_err() {
                return Received::Reset;
            }
            let received = self.receive(pace);
            if received != Received::Nothing {
                return received;
            }
        }
        Received::Nothing
    }

    /// Waits until the server has ended the connection.
    ///
    /// # Panics
    /// If anything else comes, or nothing within `patience`.
    #[track_caller]
    pub fn assert_closed(&mut self, patience: Duration) {
        let received = self.receive(patience);
        assert!(matches!(received, Received::Closed | Received::Reset), "{received:?}");
    }

    /// Waits until the server has ended the connection, over TLS also without close_notify.
    ///
    /// # Panics
    /// If anything else comes, or nothing within `patience`.
    #[track_caller]
    pub fn assert_ended(&mut self, patience: Duration) {
        let received = self.receive(patience);
        assert!(matches!(received, Received::Closed | Received::Cut | Received::Reset), "{received:?}");
    }

    /// Waits up to `timeout` for the next whole message.
    ///
    /// # Panics
    /// On an error of the kernel that is none of [`Received`].
    #[track_caller]
    pub fn receive(&mut self, timeout: Duration) -> Received {
        let end = Instant::now() + timeout;
        loop {
            if let Some(message) = self.take_frame() {
                return Received::Message(message);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Received::Nothing;
            }
            self.wire.tcp().set_read_timeout(Some(left)).expect("a timeout that is not zero");
            let mut buffer = [0; 65536];
            match self.wire.read(&mut buffer) {
                Ok(0) => return Received::Closed,
                Ok(n) => self.received.extend_from_slice(&buffer[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    return Received::Reset;
                }
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Received::Cut,
                Err(e) => panic!("reading from the server: {e}"),
            }
        }
    }

    /// What one read(2) yields, as it came: how the server cut its writes.
    ///
    /// # Panics
    /// If nothing comes within `timeout`.
    #[track_caller]
    pub fn read_once(&mut self, timeout: Duration) -> Vec<u8> {
        assert!(self.received.is_empty(), "octets that were read before");
        self.wire.tcp().set_read_timeout(Some(timeout)).expect("a timeout that is not zero");
        let mut buffer = vec![0; 1 << 17];
        let read = self.wire.read(&mut buffer).unwrap_or_else(|e| panic!("reading from the server: {e}"));
        buffer.truncate(read);
        buffer
    }

    /// Reads these octets, which need not be a message.
    ///
    /// # Panics
    /// If others come, or none within 10 s.
    #[track_caller]
    pub fn expect_raw(&mut self, octets: &[u8]) {
        self.wire.tcp().set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout that is not zero");
        let mut came = vec![0; octets.len()];
        self.wire.read_exact(&mut came).unwrap_or_else(|e| panic!("{octets:02x?} were expected: {e}"));
        assert_eq!(came, octets, "{came:02x?}");
    }

    /// Reads all that still comes, messages or not, and returns how it ended.
    ///
    /// # Panics
    /// As [`Self::receive`].
    #[track_caller]
    pub fn read_to_end(&mut self, all: &mut Vec<u8>, timeout: Duration) -> Received {
        loop {
            match self.receive(timeout) {
                Received::Message(message) => all.extend_from_slice(&message::framed(&message)),
                end => {
                    all.append(&mut self.received);
                    return end;
                }
            }
        }
    }

    fn take_frame(&mut self) -> Option<Vec<u8>> {
        let len = usize::from(u16::from_be_bytes(self.received.get(..2)?.try_into().ok()?));
        let message = self.received.get(2..2 + len)?.to_vec();
        self.received.drain(..2 + len);
        Some(message)
    }

    /// Says that no more queries follow (FIN), and keeps reading.
    ///
    /// # Panics
    /// If the connection is gone already.
    pub fn finish_sending(&self) {
        self.wire.tcp().shutdown(Shutdown::Write).expect("a connected socket");
    }

    /// Says by close_notify that no more queries follow, and keeps reading.
    ///
    /// # Panics
    /// If the connection is gone already, or without TLS.
    pub fn close_notify(&mut self) {
        let Wire::Tls(tls) = &mut self.wire else { panic!("no TLS") };
        tls.conn.send_close_notify();
        tls.conn.write_tls(&mut tls.sock).expect("a connected socket");
    }

    /// A second handle on the connection, to send from another thread while this one receives.
    ///
    /// # Panics
    /// If the process has no descriptor left, or it is a TLS connection.
    pub fn clone_for_writing(&self) -> Self {
        let Wire::Plain(stream) = &self.wire else { panic!("a TLS connection has one owner") };
        Self { wire: Wire::Plain(stream.try_clone().expect("a descriptor")), received: Vec::new() }
    }

    /// Leaves with a reset.
    ///
    /// # Panics
    /// Never in practice: setting the option does not fail on a socket.
    pub fn reset(self) {
        socket2::SockRef::from(self.wire.tcp()).set_linger(Some(Duration::ZERO)).expect("SO_LINGER on a TCP socket");
    }
}

/// A load of queries on one connection.
pub struct Load<'a> {
    /// How many queries in all.
    pub count: usize,
    /// How many may be unanswered at a time.
    pub in_flight: usize,
    /// Queries a second at most; `None`: as fast as answers come.
    pub rate: Option<f64>,
    /// The name asked by query number n.
    pub name: &'a dyn Fn(usize) -> String,
    /// Type of all queries.
    pub qtype: u16,
    /// Without any answer for this long, the connection counts as hung.
    pub stall: Duration,
    /// After this long in all it ends, whatever is open.
    pub deadline: Duration,
}

impl Default for Load<'_> {
    fn default() -> Self {
        Self {
            count: 1,
            in_flight: 1,
            rate: None,
            name: &|n| format!("n{n}.example.test"),
            qtype: qtype::A,
            stall: Duration::from_secs(15),
            deadline: Duration::from_secs(60),
        }
    }
}

/// What became of a [`Load`].
#[derive(Debug, Default)]
pub struct Outcome {
    /// Queries sent.
    pub sent: usize,
    /// Answers to what was asked, with NOERROR.
    pub answered: usize,
    /// Answers with another response code, by code.
    pub failed: HashMap<u8, usize>,
    /// Answers to nothing that was asked: unknown ID, or another question. Any is a defect of the worst sort.
    pub foreign: Vec<String>,
    /// Why it ended early, with the queries that were still open.
    pub ended: Option<String>,
    /// Numbers of the queries without an answer.
    pub missing: Vec<usize>,
    /// From the first query to the last answer.
    pub elapsed: Duration,
    /// The longest time that a query waited for its answer.
    pub slowest: Duration,
}

impl Outcome {
    /// # Panics
    /// Unless every query had its own answer with NOERROR.
    #[track_caller]
    pub fn assert_all_answered(&self, count: usize) {
        assert!(
            self.answered == count && self.foreign.is_empty() && self.failed.is_empty(),
            "{} of {count} answered: {self:?}",
            self.answered
        );
    }
}

impl Load<'_> {
    /// Sends the load over `client` and waits for the answers.
    ///
    /// # Panics
    /// On errors of the kernel; what servers do wrong is in the [`Outcome`].
    #[track_caller]
    pub fn run(&self, client: &mut Client) -> Outcome {
        assert!((1..=65536).contains(&self.in_flight), "in flight at once: as many as there are IDs");
        let start = Instant::now();
        let mut outcome = Outcome::default();
        let mut open: HashMap<u16, (usize, Vec<u8>, Instant)> = HashMap::new();
        let mut last_answer = Instant::now();
        let mut batch = Vec::new();
        while outcome.sent < self.count || !open.is_empty() {
            batch.clear();
            if start.elapsed() >= self.deadline {
                outcome.ended = Some(format!("not done after {:?}", self.deadline));
                break;
            }
            let due = self.rate.map_or(self.count, |rate| (start.elapsed().as_secs_f64() * rate) as usize + 1);
            while outcome.sent < self.count.min(due) && open.len() < self.in_flight {
                // Walks through all 65,536 IDs, so that one is reused only after all others.
                let id = (outcome.sent % 65536) as u16;
                if open.contains_key(&id) {
                    break;
                }
                if open.is_empty() {
                    last_answer = Instant::now();
                }
                let query = message::query(id, &(self.name)(outcome.sent), self.qtype);
                batch.extend_from_slice(&message::framed(&query));
                open.insert(id, (outcome.sent, query, Instant::now()));
                outcome.sent += 1;
            }
            if !batch.is_empty()
                && let Err(e) = client.send_raw(&batch)
            {
                outcome.ended = Some(format!("sending: {e}"));
                break;
            }
            let wait = match self.rate {
                Some(rate) if outcome.sent < self.count && open.len() < self.in_flight => {
                    let next = Duration::from_secs_f64(outcome.sent as f64 / rate);
                    next.saturating_sub(start.elapsed()).max(Duration::from_micros(100))
                }
                _ => self.stall,
            };
            match client.receive(wait) {
                Received::Message(answer) => {
                    last_answer = Instant::now();
                    outcome.take(&mut open, &answer);
                }
                Received::Nothing if !open.is_empty() && last_answer.elapsed() >= self.stall => {
                    outcome.ended = Some(format!("no answer for {:?}", self.stall));
                    break;
                }
                Received::Nothing => {}
                closed @ (Received::Closed | Received::Cut | Received::Reset) => {
                    outcome.ended = Some(format!("{closed:?}"));
                    break;
                }
            }
        }
        outcome.elapsed = start.elapsed();
        outcome.missing = open.values().map(|(number, ..)| *number).collect();
        outcome.missing.sort_unstable();
        outcome
    }
}

impl Outcome {
    fn take(&mut self, open: &mut HashMap<u16, (usize, Vec<u8>, Instant)>, answer: &[u8]) {
        if answer.len() < message::HEADER_LEN || !message::is_response(answer) {
            self.foreign.push(format!("not a response: {answer:02x?}"));
            return;
        }
        let id = message::id(answer);
        let Some((number, query, sent)) = open.get(&id) else {
            self.foreign.push(format!("ID {id} was not open: {:?}", message::question_name(answer)));
            return;
        };
        if !message::same_question(query, answer) {
            let name = message::question_name(answer);
            self.foreign.push(format!("query {number} got the answer to {name:?}"));
            return;
        }
        self.slowest = self.slowest.max(sent.elapsed());
        match message::response_code(answer) {
            rcode::NOERROR => self.answered += 1,
            other => *self.failed.entry(other).or_default() += 1,
        }
        open.remove(&id);
    }
}

mod tls;

#[cfg(test)]
mod tests;
