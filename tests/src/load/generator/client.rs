//! One client: its connection, its queries in flight, and what it makes of the answers.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use super::super::histogram::Histogram;
use super::super::message;
use super::super::poll::{self, Poller, READ, WRITE};
use super::super::stream::{self, Frames, Output, Read};
use super::names::Names;
use super::tls::{Handshakes, Tls};
use super::window::{Fault, Window};

/// Counts of one run.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Right answers and their latencies.
    pub(super) latency: Histogram,
    /// Answers that differ from what they must be.
    pub(super) wrong: u64,
    /// Answers that nobody waited for: doubled, late or to another client.
    pub(super) unexpected: u64,
    /// Queries whose connection ended, or whose answer did not come in time.
    pub(super) missing: u64,
    /// Connections that the other side ended.
    pub(super) closed: u64,
    /// TLS handshakes.
    pub(super) handshakes: Handshakes,
    /// The first thing that went wrong, in words.
    pub(super) first_fault: Option<String>,
    /// When the last right answer came, in nanoseconds of the monotonic clock.
    pub(super) last_answer: u64,
}

impl Tally {
    fn fault(&mut self, fault: &Fault) {
        match fault {
            Fault::Unexpected(id) => {
                self.unexpected += 1;
                self.first_fault.get_or_insert_with(|| format!("answer with ID {id}, which is not in flight"));
            }
            Fault::Wrong(part) => {
                self.wrong += 1;
                self.first_fault.get_or_insert_with(|| format!("wrong answer: {part}"));
            }
        }
    }
}

/// A client and its connection, if it has one.
#[derive(Debug)]
pub(super) struct Client {
    token: u64,
    socket: Option<OwnedFd>,
    tls: Option<Tls>,
    port: u16,
    frames: Frames,
    output: Output,
    window: Window,
    /// Queries of this client so far, on all its connections.
    sequence: u64,
    /// Queries on this connection so far.
    sent_here: u64,
}

impl Client {
    /// A client without a connection, with room for `in_flight` queries. Its epoll token is `token`. With `tls` it speaks
    /// TLS on all its connections.
    pub(super) fn new(token: u64, in_flight: u16, tls: Option<Tls>) -> Self {
        Self {
            token,
            socket: None,
            tls,
            port: 0,
            frames: Frames::default(),
            output: Output::default(),
            window: Window::new(in_flight),
            sequence: 0,
            sent_here: 0,
        }
    }

    /// Starts a new connection in place of the old one, if any.
    ///
    /// # Errors
    /// If the socket cannot be opened, bound or connected.
    pub(super) fn connect(
        &mut self,
        poller: &Poller,
        target: SocketAddrV4,
        source: Option<Ipv4Addr>,
    ) -> io::Result<()> {
        self.close()?;
        let socket = stream::connect(target, source)?;
        if let Some(tls) = &mut self.tls {
            tls.connect()?;
        }
        self.port = stream::local_address(&socket)?.port();
        poller.add(&socket, self.token, READ)?;
        (self.frames, self.output, self.sent_here) = (Frames::default(), Output::default(), 0);
        self.socket = Some(socket);
        Ok(())
    }

    /// Ends the connection, if there is one, in TLS by its last record (RFC 8446 section 6.1).
    fn close(&mut self) -> io::Result<()> {
        if let (Some(socket), Some(tls)) = (&self.socket, &mut self.tls) {
            // All answers are there. Whether it can still be sent makes no difference to them.
            let _ = self.output.send(socket, tls.end()?);
        }
        self.socket = None;
        Ok(())
    }

    /// Whether queries can be sent at all.
    pub(super) fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    /// How many more queries may be sent.
    pub(super) fn room(&self) -> usize {
        if self.socket.is_some() { self.window.room() } else { 0 }
    }

    /// How many queries are in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.window.in_flight()
    }

    /// Queries that were sent on the present connection.
    pub(super) fn sent_here(&self) -> u64 {
        self.sent_here
    }

    /// Appends a query that is due at `since`, if there is room. With `shared` names no port is in them.
    pub(super) fn push_query(&mut self, batch: &mut Vec<u8>, names: &Names, shared: bool, since: u64) -> bool {
        let port = if shared { 0 } else { self.port };
        let label = message::label(port, names.number(self.sequence));
        let Some(id) = self.window.take(label, since) else { return false };
        message::push_query(batch, id, &label);
        self.sequence += 1;
        self.sent_here += 1;
        true
    }

    /// Sends a batch of queries.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`. A dead connection is no error but is counted.
    pub(super) fn send(&mut self, poller: &Poller, batch: &[u8], tally: &mut Tally) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let waited = !self.output.is_empty();
        let octets = match &mut self.tls {
            Some(tls) => tls.seal(batch)?,
            None => batch,
        };
        if !self.output.send(socket, octets) {
            self.lose(tally);
        } else if !waited && !self.output.is_empty() {
            poller.modify(socket, self.token, READ | WRITE)?;
        }
        Ok(())
    }

    /// Sends what waited for the connection or for room.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`. A dead connection is no error but is counted.
    pub(super) fn flush(&mut self, poller: &Poller, tally: &mut Tally) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        if !self.output.send(socket, &[]) {
            self.lose(tally);
        } else if self.output.is_empty() {
            poller.modify(socket, self.token, READ)?;
        }
        Ok(())
    }

    /// Reads and checks answers, and sends what TLS has to say to them. Returns the time after the read.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`. A dead connection is no error but is counted.
    pub(super) fn receive(&mut self, poller: &Poller, buffer: &mut [u8], tally: &mut Tally) -> io::Result<u64> {
        let Some(socket) = &self.socket else { return Ok(poll::now()) };
        let read = stream::read(socket, buffer);
        let now = poll::now();
        match read {
            Read::Empty => {}
            Read::Closed => self.lose(tally),
            Read::Data(length) => {
                self.take(&buffer[..length], now, tally);
                if self.tls.as_ref().is_some_and(Tls::wants_write) {
                    self.send(poller, &[], tally)?;
                }
            }
        }
        Ok(now)
    }

    /// Checks the answers in what was received at `now`.
    fn take(&mut self, received: &[u8], now: u64, tally: &mut Tally) {
        let opened = match &mut self.tls {
            Some(tls) => tls.open(received, &mut tally.handshakes),
            None => Ok(received),
        };
        let octets = match opened {
            Ok(octets) => octets,
            Err(error) => {
                tally.first_fault.get_or_insert_with(|| format!("TLS: {error:#}"));
                return self.lose(tally);
            }
        };
        let window = &mut self.window;
        let Ok(()) = self.frames.feed(octets, |answer| {
            match window.answered(answer) {
                Ok(since) => {
                    tally.latency.record(now.saturating_sub(since));
                    tally.last_answer = now;
                }
                Err(fault) => tally.fault(&fault),
            }
            Ok::<(), std::convert::Infallible>(())
        });
    }

    /// Gives up what is still in flight.
    pub(super) fn give_up(&mut self, tally: &mut Tally) {
        let lost = self.window.clear() as u64;
        tally.missing += lost;
        if lost > 0 {
            tally.first_fault.get_or_insert_with(|| format!("{lost} queries of one client without an answer"));
        }
    }

    fn lose(&mut self, tally: &mut Tally) {
        self.socket = None;
        tally.closed += 1;
        let sent = self.sent_here;
        tally.first_fault.get_or_insert_with(|| format!("connection ended by the other side after {sent} queries"));
        self.give_up(tally);
    }
}
