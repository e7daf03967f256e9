//! The floor of the benchmarks: one epoll thread that copies octets each way and knows no DNS.

mod pairs;
mod per_query;

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use rustix::event::epoll::EventFlags;
use serde_json::json;

use super::poll::{Events, Poller, READ};
use super::stream::{self, READ_LEN, Read};

/// Prints `{"address": ...}` and relays until its standard input ends. Binds 127.0.0.1 at a port of the kernel's choice.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// Where to connect to.
    pub target: SocketAddrV4,
    /// What a backend connection carries.
    #[arg(long, value_enum, default_value_t = Mode::Copy)]
    pub mode: Mode,
}

/// How client and backend connections belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// One backend connection per client connection.
    Copy,
    /// The same, opened by a PROXY v2 header.
    Proxy,
    /// One backend connection per query, opened by a PROXY v2 header whose TLV 0xE0 is the query's first label.
    PerQuery,
}

/// What a relay does with its sockets.
trait Relay {
    /// A client has come.
    fn opened(&mut self, poller: &Poller, client: OwnedFd) -> io::Result<()>;
    /// The socket with this token is ready. `buffer` is free for use.
    fn ready(&mut self, poller: &Poller, token: u64, ready: EventFlags, buffer: &mut [u8]) -> io::Result<()>;
}

/// Relays until standard input ends.
///
/// # Errors
/// If the listener cannot be opened, or for want of descriptors.
pub fn run(options: &Options) -> anyhow::Result<()> {
    match options.mode {
        Mode::Copy => serve(pairs::Pairs::new(options.target, false)),
        Mode::Proxy => serve(pairs::Pairs::new(options.target, true)),
        Mode::PerQuery => serve(per_query::PerQuery::new(options.target)),
    }
}

const LISTENER: u64 = u64::MAX;
const STDIN: u64 = u64::MAX - 1;

fn serve(mut relay: impl Relay) -> anyhow::Result<()> {
    let (listener, address) = stream::listen(0).context("open a listener on 127.0.0.1")?;
    let poller = Poller::new().context("create an epoll set")?;
    poller.add(&listener, LISTENER, READ).context("watch the listener")?;
    let stdin = io::stdin();
    poller.add(&stdin, STDIN, READ).context("watch standard input, which must be a pipe")?;
    println!("{}", json!({ "address": address.to_string() }));

    let mut events = Events::new();
    let mut buffer = vec![0; READ_LEN];
    loop {
        poller.wait(&mut events, None).context("wait for events")?;
        for (token, ready) in events.iter() {
            match token {
                STDIN => return Ok(()),
                LISTENER => {
                    while let Some(client) = stream::accept(&listener).context("accept")? {
                        relay.opened(&poller, client).context("connect to the target")?;
                    }
                }
                _ => relay.ready(&poller, token, ready, &mut buffer).context("relay")?,
            }
        }
    }
}

/// Reads for a relay: `None` when the connection is over.
fn read<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    match stream::read(socket, buffer) {
        Read::Data(length) => Some(&buffer[..length]),
        Read::Empty => Some(&[]),
        Read::Closed => None,
    }
}
