//! A backend that answers every query at once with one A record, and notes who connects how often.
//!
//! It is meant to be far faster than any proxy in front of it, and to notice what a load generator cannot: a PROXY
//! header that is missing, malformed, or not the one of the query that follows it.

use std::collections::VecDeque;
use std::io::{self, BufRead as _};
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use rustls::{ServerConfig, ServerConnection};
use serde_json::json;

use super::certificate;
use super::message;
use super::poll::{self, Events, Poller, READ, WRITE};
use super::proxy_header::{self, Header};
use super::slots::Slots;
use super::stream::{self, Frames, Output, READ_LEN, Read};
use super::tls::Session;

/// Prints `{"address": ...}`, then its counts as one line of JSON for each line on its standard input, and ends with
/// that input. Binds 127.0.0.1 at a port of the kernel's choice.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// Every connection must begin with a PROXY v2 header.
    #[arg(long)]
    pub proxy: bool,
    /// The header's source port must be the one that the first label of every query begins with.
    #[arg(long, requires = "proxy")]
    pub check_port: bool,
    /// TLV 0xE0 of the header must be the first label of every query.
    #[arg(long, requires = "proxy")]
    pub check_label: bool,
    /// Speak TLS 1.3, ALPN `dot`, with `certificate.pem` and `key.pem` of this directory.
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "proxy")]
    pub tls: Option<PathBuf>,
    /// Some queries have answers of their own, by how their first label begins: `drop` closes the connection, `slow` is
    /// answered after `--delay`, `long` with 60,000 octets. Other opcodes than QUERY get a header that says NOTIMP.
    #[arg(long, conflicts_with = "tls")]
    pub scripted: bool,
    /// With `--scripted`: milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub delay: u64,
    /// Close connections whose header names a client of 127.9.0.0/16, as a server does that does not want them.
    #[arg(long, requires = "proxy")]
    pub turn_away: bool,
    /// Threads, each with a listener of its own on the same port.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

/// What all threads count.
#[derive(Debug, Default)]
struct Counts {
    opened: AtomicU64,
    open: AtomicU64,
    max_open: AtomicU64,
    answers: AtomicU64,
    faults: AtomicU64,
    first_fault: Mutex<Option<String>>,
}

impl Counts {
    fn open(&self) {
        self.opened.fetch_add(1, Relaxed);
        self.max_open.fetch_max(self.open.fetch_add(1, Relaxed) + 1, Relaxed);
    }

    fn fault(&self, text: &str) {
        self.faults.fetch_add(1, Relaxed);
        self.first_fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| text.to_owned());
    }

    fn print(&self) {
        let first_fault = self.first_fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let counts = json!({
            "opened": self.opened.load(Relaxed), "open": self.open.load(Relaxed),
            "max_open": self.max_open.load(Relaxed), "answers": self.answers.load(Relaxed),
            "faults": self.faults.load(Relaxed), "first_fault": first_fault,
        });
        println!("{counts}");
    }
}

/// Serves until standard input ends.
///
/// # Errors
/// If a listener cannot be opened or a thread's poll fails.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let counts = Arc::new(Counts::default());
    let tls = options.tls.as_deref().map(certificate::server).transpose()?.map(Arc::new);
    let (first, address) = stream::listen(0).context("open a listener on 127.0.0.1")?;
    let mut listeners = vec![first];
    for _ in 1..options.threads {
        listeners
            .push(stream::listen(address.port()).with_context(|| format!("open another listener on {address}"))?.0);
    }
    for listener in listeners {
        let worker =
            Worker::new(listener, options.clone(), tls.clone(), Arc::clone(&counts)).context("watch a listener")?;
        thread::spawn(move || {
            if let Err(error) = worker.serve() {
                eprintln!("answerer: {error}");
            }
        });
    }
    println!("{}", json!({ "address": SocketAddrV4::to_string(&address) }));
    for line in io::stdin().lock().lines() {
        line.context("read standard input")?;
        counts.print();
    }
    Ok(())
}

const LISTENER: u64 = u64::MAX;

/// One thread's connections.
struct Worker {
    listener: OwnedFd,
    poller: Poller,
    options: Options,
    tls: Option<Arc<ServerConfig>>,
    counts: Arc<Counts>,
    connections: Slots<Connection>,
    /// Answers to what one read brought.
    answers: Vec<u8>,
    /// Answers that are not due yet: when they are, and on which connection. All wait equally long.
    delayed: VecDeque<(u64, u64, Vec<u8>)>,
}

/// Why a connection is closed by this side.
enum End {
    /// It must not be like that.
    Fault(&'static str),
    /// It was asked for.
    OnPurpose,
}

impl From<&'static str> for End {
    fn from(fault: &'static str) -> Self {
        Self::Fault(fault)
    }
}

/// Octets of a long answer.
const LONG: u16 = 60_000;

struct Connection {
    socket: OwnedFd,
    tls: Option<Box<Session>>,
    /// `Err`: the octets of a header that is not complete.
    header: Result<Expected, Vec<u8>>,
    frames: Frames,
    output: Output,
}

/// What the first label of each query on a connection must be.
#[derive(Default)]
struct Expected {
    port_digits: Option<[u8; 4]>,
    label: Option<Vec<u8>>,
}

impl Worker {
    fn new(
        listener: OwnedFd,
        options: Options,
        tls: Option<Arc<ServerConfig>>,
        counts: Arc<Counts>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&listener, LISTENER, READ)?;
        let answers = Vec::with_capacity(stream::answers_per_read());
        Ok(Self {
            listener,
            poller,
            options,
            tls,
            counts,
            connections: Slots::new(),
            answers,
            delayed: VecDeque::new(),
        })
    }

    fn serve(mut self) -> io::Result<()> {
        let mut events = Events::new();
        let mut buffer = vec![0; READ_LEN];
        loop {
            let due = self.delayed.front().map(|(due, ..)| Duration::from_nanos(due.saturating_sub(poll::now())));
            self.poller.wait(&mut events, due)?;
            self.send_delayed()?;
            for (token, ready) in events.iter() {
                if token == LISTENER {
                    self.accept()?;
                } else if !self.serve_one(token, ready.contains(WRITE), &mut buffer)? {
                    self.connections.remove(token);
                    self.counts.open.fetch_sub(1, Relaxed);
                }
            }
        }
    }

    fn send_delayed(&mut self) -> io::Result<()> {
        while let Some((_, key, answer)) = self.delayed.pop_front_if(|(due, ..)| *due <= poll::now()) {
            let Some(connection) = self.connections.get_mut(key) else { continue };
            // A dead connection says so when it is read.
            let _ = connection.output.send(&connection.socket, &answer);
            if !connection.output.is_empty() {
                self.poller.modify(&connection.socket, key, WRITE)?;
            }
            self.counts.answers.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        while let Some(socket) = stream::accept(&self.listener)? {
            self.counts.open();
            let header = if self.options.proxy { Err(Vec::new()) } else { Ok(Expected::default()) };
            let tls = match &self.tls {
                Some(config) => {
                    let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                    Some(Box::new(Session::new(connection)))
                }
                None => None,
            };
            let connection = Connection { socket, tls, header, frames: Frames::default(), output: Output::default() };
            let key = self.connections.insert(connection);
            if let Some(connection) = self.connections.get_mut(key) {
                self.poller.add(&connection.socket, key, READ)?;
            }
        }
        Ok(())
    }

    /// Reads and answers, or sends what was left. `false`: the connection is over.
    fn serve_one(&mut self, key: u64, writable: bool, buffer: &mut [u8]) -> io::Result<bool> {
        let Some(connection) = self.connections.get_mut(key) else { return Ok(true) };
        if writable {
            if !connection.output.send(&connection.socket, &[]) {
                return Ok(false);
            }
            if connection.output.is_empty() {
                self.poller.modify(&connection.socket, key, READ)?;
            }
            return Ok(true);
        }
        let length = match stream::read(&connection.socket, buffer) {
            Read::Data(length) => length,
            Read::Empty => return Ok(true),
            Read::Closed => return Ok(false),
        };
        self.answers.clear();
        let mut tls = connection.tls.take();
        let octets = match &mut tls {
            None => &buffer[..length],
            Some(session) => match session.open(&buffer[..length]) {
                Ok(()) => session.opened(),
                Err(error) => {
                    self.counts.fault(&format!("TLS: {error}"));
                    return Ok(false);
                }
            },
        };
        let mut slow = Vec::new();
        let fed = connection.receive(octets, &self.options, &mut self.answers, &mut slow);
        let answers = match fed {
            Ok(answers) => answers,
            Err(End::OnPurpose) => return Ok(false),
            Err(End::Fault(fault)) => {
                self.counts.fault(fault);
                return Ok(false);
            }
        };
        let due = poll::now() + Duration::from_millis(self.options.delay).as_nanos() as u64;
        self.delayed.extend(slow.into_iter().map(|answer| (due, key, answer)));
        self.counts.answers.fetch_add(answers, Relaxed);
        let octets = match &mut tls {
            Some(session) => seal(session, &self.answers)?,
            None => &self.answers,
        };
        if !octets.is_empty() && !connection.output.send(&connection.socket, octets) {
            return Ok(false);
        }
        connection.tls = tls;
        if !connection.output.is_empty() {
            self.poller.modify(&connection.socket, key, WRITE)?;
        }
        Ok(true)
    }
}

/// Each answer in a record of its own, as name servers send them that write one after the other.
fn seal<'a>(session: &'a mut Session, mut answers: &[u8]) -> io::Result<&'a [u8]> {
    while let Some((length, _)) = answers.split_first_chunk::<2>() {
        let (answer, rest) = answers.split_at(2 + usize::from(u16::from_be_bytes(*length)));
        session.add(answer)?;
        answers = rest;
    }
    session.seal(&[])
}

impl Connection {
    /// Appends the answers to all queries that are complete now, but for those of slow ones, and says how many these are.
    fn receive(
        &mut self,
        octets: &[u8],
        options: &Options,
        answers: &mut Vec<u8>,
        slow: &mut Vec<Vec<u8>>,
    ) -> Result<u64, End> {
        let Err(start) = &mut self.header else { return self.answer(octets, options, answers, slow) };
        start.extend_from_slice(octets);
        let Some((header, length)) = proxy_header::parse(start)? else { return Ok(0) };
        if options.turn_away && header.source_ip.is_some_and(|source| source.octets()[..2] == [127, 9]) {
            return Err(End::OnPurpose);
        }
        let rest = start.split_off(length);
        self.header = Ok(Expected::of(header, options)?);
        self.answer(&rest, options, answers, slow)
    }

    fn answer(
        &mut self,
        octets: &[u8],
        options: &Options,
        answers: &mut Vec<u8>,
        slow: &mut Vec<Vec<u8>>,
    ) -> Result<u64, End> {
        let mut count = 0;
        let Ok(expected) = &self.header else { return Ok(0) };
        self.frames.feed(octets, |query| {
            if options.scripted && scripted(query, answers, slow)? {
                return Ok(());
            }
            expected.check(query)?;
            count += 1;
            message::push_answer(answers, query).map_err(End::Fault)
        })?;
        Ok(count)
    }
}

/// Deals with a query that has an answer of its own; whether it is one.
fn scripted(query: &[u8], answers: &mut Vec<u8>, slow: &mut Vec<Vec<u8>>) -> Result<bool, End> {
    const OPCODE: u8 = 0x78;
    if query.get(2).is_some_and(|flags| flags & OPCODE != 0) {
        message::push_not_implemented(answers, query);
        return Ok(true);
    }
    let start = answers.len();
    match query.get(message::LABEL_AT..message::LABEL_AT + 4) {
        Some(b"drop") => return Err(End::OnPurpose),
        Some(b"slow") => {
            let mut answer = Vec::new();
            message::push_answer(&mut answer, query)?;
            slow.push(answer);
        }
        Some(b"long") => {
            message::push_answer(answers, query)?;
            message::lengthen(answers, start, LONG);
        }
        _ => return Ok(false),
    }
    Ok(true)
}

impl Expected {
    fn of(header: Header, options: &Options) -> Result<Self, &'static str> {
        let port_digits = match header.source_port {
            Some(port) if options.check_port => message::label(port, 0).first_chunk().copied(),
            None if options.check_port => return Err("LOCAL header before a client's query"),
            _ => None,
        };
        let label = if options.check_label { Some(header.label.ok_or("header without TLV 0xE0")?) } else { None };
        Ok(Self { port_digits, label })
    }

    fn check(&self, query: &[u8]) -> Result<(), &'static str> {
        if self.port_digits.is_none() && self.label.is_none() {
            return Ok(());
        }
        let label = message::first_label(query).ok_or("query of another shape")?;
        if self.port_digits.is_some_and(|digits| label[..4] != digits) {
            return Err("query of another client than its PROXY header says");
        }
        if self.label.as_deref().is_some_and(|expected| expected != label) {
            return Err("query with another label than TLV 0xE0 of its PROXY header");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use std::net::Ipv4Addr;

    const BACKEND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53);

    /// Feeds a header with `tlv` from port 0x1234 and one query, in two parts cut at `cut`.
    fn one_query(tlv: Option<&[u8]>, label: &message::Label, cut: usize) -> Result<u64, &'static str> {
        let options = Options::parse_from(["answerer", "--proxy", "--check-port", "--check-label"]);
        let mut octets = Vec::new();
        proxy_header::push(&mut octets, SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0x1234), BACKEND, tlv);
        message::push_query(&mut octets, 7, label);
        let mut connection = Connection {
            socket: stream::listen(0).unwrap().0,
            tls: None,
            header: Err(Vec::new()),
            frames: Frames::default(),
            output: Output::default(),
        };
        let (mut answers, mut slow) = (Vec::new(), Vec::new());
        let (first, second) = octets.split_at(cut.min(octets.len()));
        let mut receive = |octets| match connection.receive(octets, &options, &mut answers, &mut slow) {
            Ok(count) => Ok(count),
            Err(End::Fault(fault)) => Err(fault),
            Err(End::OnPurpose) => Err("closed on purpose"),
        };
        Ok(receive(first)? + receive(second)?)
    }

    #[test]
    fn header_and_query_are_read_wherever_they_are_cut() {
        let label = message::label(0x1234, 5);
        for cut in 0..120 {
            assert_eq!(one_query(Some(&label), &label, cut), Ok(1), "cut at {cut}");
        }
    }

    #[test]
    fn a_query_under_the_wrong_header_is_a_fault() {
        let label = message::label(0x1234, 5);
        let foreign = message::label(0x1235, 5);
        assert_eq!(one_query(Some(&foreign), &foreign, 0), Err("query of another client than its PROXY header says"));
        assert_eq!(
            one_query(Some(&label), &message::label(0x1234, 6), 0),
            Err("query with another label than TLV 0xE0 of its PROXY header")
        );
        assert_eq!(one_query(None, &label, 0), Err("header without TLV 0xE0"));
    }
}
