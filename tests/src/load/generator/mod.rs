//! The load generator: clients that ask as fast as they are answered, or at a fixed rate, and check every answer.

mod client;
mod names;
mod tls;
mod window;

use std::collections::VecDeque;
use std::io::{self, Read as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde_json::{Value, json};

use super::poll::{self, Events, Poller, WRITE};
use super::stream::READ_LEN;
use client::{Client, Tally};
pub use names::Names;
use tls::Tls;

/// Prints its results as one line of JSON. Exit code 0 only if every query got its one right answer.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// The server to ask.
    pub target: SocketAddrV4,
    /// Clients, each with one connection at a time.
    #[arg(long, default_value_t = 50)]
    pub clients: usize,
    /// Queries that a client has in flight at most.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=32768))]
    pub in_flight: u16,
    /// How long to ask, in seconds.
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// Stop after so many queries, if that comes first.
    #[arg(long)]
    pub count: Option<u64>,
    /// Queries per second of all clients together. Latency then counts from the moment a query was due, whether or not
    /// it could be sent. Without it each answer is followed by the next query.
    #[arg(long)]
    pub rate: Option<f64>,
    /// Names to ask for: constant, unique, rotate:K, zipf:K.
    #[arg(long, default_value = "unique")]
    pub names: Names,
    /// The same names for all clients. Otherwise a name begins with its client's port.
    #[arg(long)]
    pub shared_names: bool,
    /// Queries on one connection; then the client closes it and opens the next.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub per_connection: Option<u64>,
    /// Connect from so many addresses in turn, 127.0.1.1 and following (TIME_WAIT keeps a port of each for a minute).
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=250))]
    pub sources: Option<u8>,
    /// Speak TLS 1.3, ALPN `dot`, to a server that has exactly the certificate in this file (PEM).
    #[arg(long, value_name = "CERTIFICATE")]
    pub tls: Option<PathBuf>,
    /// Clients keep the tickets that they are given and use each once: a handshake for which there is one must resume the
    /// session. Without it all handshakes are full.
    #[arg(long, requires = "tls")]
    pub resume: bool,
    /// Keep the connections open after the result, until standard input ends.
    #[arg(long)]
    pub hold: bool,
    /// How long to wait for the last answers, in seconds.
    #[arg(long, default_value_t = 5.0)]
    pub patience: f64,
}

/// Runs the load, prints the result, and says whether all was well.
///
/// # Errors
/// If the load could not be made at all; wrong and missing answers are counted instead.
pub fn run(options: &Options) -> anyhow::Result<bool> {
    ensure!(options.clients > 0, "--clients must be positive");
    ensure!(options.rate.is_none_or(|rate| rate > 0.0), "--rate must be positive");
    ensure!(
        options.rate.is_none() || options.per_connection.is_none(),
        "--rate and --per-connection exclude each other"
    );
    // The default of 50 µs would be added to every wait of a fixed rate.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).context("set the timer slack")?;

    let mut generator = Generator::new(options)?;
    generator.run()?;
    let result = generator.result();
    println!("{result}");
    if options.hold {
        io::stdin().read_to_end(&mut Vec::new()).context("read standard input")?;
    }
    Ok(generator.is_well())
}

struct Generator<'a> {
    options: &'a Options,
    poller: Poller,
    clients: Vec<Client>,
    tally: Tally,
    batch: Vec<u8>,
    connects: u64,
    /// Queries sent, or due at a fixed rate.
    issued: u64,
    /// At a fixed rate: when the queries were due that no client had room for yet.
    overdue: VecDeque<u64>,
    next_client: usize,
    start: u64,
    stop: u64,
}

impl<'a> Generator<'a> {
    fn new(options: &'a Options) -> anyhow::Result<Self> {
        let tls = options.tls.as_deref().map(tls::configure).transpose()?;
        let client = |token| {
            let tls = tls.as_ref().map(|config| Tls::new(config, options.resume)).transpose()?;
            anyhow::Ok(Client::new(token as u64, options.in_flight, tls))
        };
        let clients = (0..options.clients).map(client).collect::<anyhow::Result<_>>()?;
        let mut generator = Self {
            options,
            poller: Poller::new().context("create an epoll set")?,
            clients,
            tally: Tally::default(),
            batch: Vec::new(),
            connects: 0,
            issued: 0,
            overdue: VecDeque::new(),
            next_client: 0,
            start: 0,
            stop: 0,
        };
        for index in 0..options.clients {
            generator.connect(index)?;
        }
        Ok(generator)
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let patience = Duration::from_secs_f64(self.options.patience).as_nanos() as u64;
        self.start = poll::now();
        self.stop = self.start + Duration::from_secs_f64(self.options.seconds).as_nanos() as u64;
        if self.options.rate.is_none() {
            for index in 0..self.clients.len() {
                self.refill(index, poll::now())?;
            }
        }
        let mut events = Events::new();
        let mut buffer = vec![0; READ_LEN];
        let mut over_since = None;
        loop {
            let now = poll::now();
            let due = self.send_due(now)?;
            if self.is_over(now) {
                let since = *over_since.get_or_insert(now);
                if self.in_flight() == 0 && self.overdue.is_empty() || now > since + patience {
                    break;
                }
            }
            if !self.clients.iter().any(Client::is_connected) {
                break;
            }
            // At least ten looks a second at whether it is over.
            let wait = Duration::from_nanos(due.saturating_sub(now)).min(Duration::from_millis(100));
            self.poller.wait(&mut events, Some(wait)).context("wait for events")?;
            for (token, ready) in events.iter() {
                self.ready(token as usize, ready.contains(WRITE), ready.intersects(!WRITE), &mut buffer)?;
            }
        }
        for client in &mut self.clients {
            client.give_up(&mut self.tally);
        }
        self.tally.missing += self.overdue.len() as u64;
        Ok(())
    }

    fn ready(&mut self, index: usize, writable: bool, readable: bool, buffer: &mut [u8]) -> anyhow::Result<()> {
        let Some(client) = self.clients.get_mut(index) else { return Ok(()) };
        if writable {
            client.flush(&self.poller, &mut self.tally)?;
        }
        if !readable {
            return Ok(());
        }
        let now = client.receive(&self.poller, buffer, &mut self.tally).context("send records of TLS")?;
        if self.options.rate.is_some() {
            return self.send_overdue(now);
        }
        let finished = self.options.per_connection.is_some_and(|limit| client.sent_here() >= limit);
        if finished && client.in_flight() == 0 && client.is_connected() && !self.is_over(now) {
            self.connect(index)?;
            return self.refill(index, poll::now());
        }
        self.refill(index, now)
    }

    /// Sends as many queries as the client has room for.
    fn refill(&mut self, index: usize, now: u64) -> anyhow::Result<()> {
        if self.is_over(now) {
            return Ok(());
        }
        let client = &mut self.clients[index];
        let mut wanted = client.room() as u64;
        if let Some(limit) = self.options.per_connection {
            wanted = wanted.min(limit.saturating_sub(client.sent_here()));
        }
        if let Some(count) = self.options.count {
            wanted = wanted.min(count.saturating_sub(self.issued));
        }
        if wanted == 0 {
            return Ok(());
        }
        self.batch.clear();
        for _ in 0..wanted {
            client.push_query(&mut self.batch, &self.options.names, self.options.shared_names, now);
        }
        self.issued += wanted;
        client.send(&self.poller, &self.batch, &mut self.tally).context("send queries")
    }

    /// At a fixed rate: sends what is due by now. Returns when the next query is due, or the end.
    fn send_due(&mut self, now: u64) -> anyhow::Result<u64> {
        let Some(rate) = self.options.rate else { return Ok(u64::MAX) };
        loop {
            let due = self.start + (self.issued as f64 / rate * 1e9) as u64;
            if due > now || self.is_over(due) {
                self.send_overdue(now)?;
                return Ok(if self.is_over(due) { u64::MAX } else { due });
            }
            self.issued += 1;
            self.overdue.push_back(due);
        }
    }

    /// Gives overdue queries to clients with room, in turn.
    fn send_overdue(&mut self, now: u64) -> anyhow::Result<()> {
        let mut without_room = 0;
        while without_room < self.clients.len() {
            let Some(due) = self.overdue.front().copied() else { break };
            let client = &mut self.clients[self.next_client];
            self.next_client = (self.next_client + 1) % self.options.clients;
            if client.room() == 0 {
                without_room += 1;
                continue;
            }
            without_room = 0;
            self.overdue.pop_front();
            self.batch.clear();
            client.push_query(&mut self.batch, &self.options.names, self.options.shared_names, due.min(now));
            client.send(&self.poller, &self.batch, &mut self.tally).context("send a query")?;
        }
        Ok(())
    }

    fn connect(&mut self, index: usize) -> anyhow::Result<()> {
        let number = self.connects;
        let source = self.options.sources.map(|count| Ipv4Addr::new(127, 0, 1, 1 + (number % u64::from(count)) as u8));
        self.connects += 1;
        let target = self.options.target;
        self.clients[index]
            .connect(&self.poller, target, source)
            .with_context(|| format!("connect to {target} for the {}th time", number + 1))
    }

    /// Whether nothing new is to be sent.
    fn is_over(&self, now: u64) -> bool {
        now >= self.stop || self.options.count.is_some_and(|count| self.issued >= count)
    }

    fn in_flight(&self) -> usize {
        self.clients.iter().map(Client::in_flight).sum()
    }

    fn is_well(&self) -> bool {
        let tally = &self.tally;
        tally.wrong + tally.unexpected + tally.missing + tally.closed == 0 && tally.latency.total() == self.issued
    }

    fn result(&self) -> Value {
        let tally = &self.tally;
        let answers = tally.latency.total();
        let seconds = tally.last_answer.saturating_sub(self.start) as f64 / 1e9;
        let micros = |nanos: u64| nanos as f64 / 1000.0;
        let handshakes = self.options.tls.as_ref().map(|_| {
            let tls::Handshakes { new, resumed } = tally.handshakes;
            json!({ "new": new, "resumed": resumed })
        });
        json!({
            "queries": self.issued,
            "answers": answers,
            "seconds": seconds,
            "qps": if seconds > 0.0 { answers as f64 / seconds } else { 0.0 },
            "connections": self.connects,
            "latency_us": {
                "mean": micros(tally.latency.mean()),
                "p50": micros(tally.latency.quantile(0.5)),
                "p99": micros(tally.latency.quantile(0.99)),
                "p999": micros(tally.latency.quantile(0.999)),
                "max": micros(tally.latency.max()),
            },
            "wrong": tally.wrong,
            "unexpected": tally.unexpected,
            "missing": tally.missing,
            "closed": tally.closed,
            "handshakes": handshakes,
            "first_fault": tally.first_fault,
        })
    }
}
