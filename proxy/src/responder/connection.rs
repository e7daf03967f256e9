//! One connection of the responder: header, then queries as they come and answers as they are due.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::zone::{self, Received};
use super::{Open, Order, ProxyMode, ResponderOptions};
use crate::dns::frame::{self, Frames};
use crate::proxy_protocol::SIGNATURE;
use crate::proxy_protocol::parse::{ParseError, Parsed, parse};

/// Answers that wait for their time on one connection; at this many its queries are not read any more.
const MAX_WAITING: usize = 10_000;

/// Octets that are read at once.
const READ_SIZE: usize = 64 * 1024;

/// Serves a connection to its end, whatever that is.
pub(super) async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    serial: u64,
    open: Open,
    options: ResponderOptions,
    stop: watch::Receiver<()>,
) {
    if let Err(error) = try_serve(stream, peer, serial, &open, options, stop).await {
        tracing::debug!(%peer, connection = serial, %error, "the responder closes a connection");
    }
}

async fn try_serve(
    mut stream: TcpStream,
    peer: SocketAddr,
    serial: u64,
    open: &Open,
    options: ResponderOptions,
    mut stop: watch::Receiver<()>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    let header = tokio::select! {
        header = read_header(&mut stream, &mut buffer, options) => header,
        _ = stop.changed() => return Ok(()),
    };
    let header = header.inspect_err(|_| {
        open.0.bad_headers.fetch_add(1, Ordering::Relaxed);
    })?;
    let local = stream.local_addr()?;
    let mut received = Received { header, peer, local, connection: serial, query: 0 };

    let mut waiting = Waiting::default();
    let mut eof = false;
    let mut idle_since = Instant::now();
    loop {
        let fresh = answer_frames(&mut buffer, &mut received, options.order)?;
        open.0.queries.fetch_add(fresh.len() as u64, Ordering::Relaxed);
        let due = Instant::now() + options.delay;
        waiting.0.extend(fresh.into_iter().map(|answer| (due, answer)));
        let out = waiting.take_due(Instant::now());
        if !out.is_empty() {
            timeout(options.write_timeout, stream.write_all(&out)).await??;
            idle_since = Instant::now();
        }
        let next = waiting.0.front().map(|(due, _)| *due);
        if eof && next.is_none() {
            return stream.shutdown().await;
        }
        let wake = next.unwrap_or(idle_since + options.idle_timeout);
        tokio::select! {
            biased;
            _ = stop.changed() => return stream.shutdown().await,
            read = stream.read_buf(&mut buffer), if !eof && waiting.0.len() < MAX_WAITING => {
                eof = read? == 0;
                idle_since = Instant::now();
                buffer.reserve(READ_SIZE);
            }
            () = sleep_until(wake) => {
                if next.is_none() {
                    return stream.shutdown().await;
                }
            }
        }
    }
}

/// Answers with the time before which they are not sent, oldest first.
#[derive(Default)]
struct Waiting(VecDeque<(Instant, Vec<u8>)>);

impl Waiting {
    /// All answers that are due, framed, for one write.
    fn take_due(&mut self, now: Instant) -> Vec<u8> {
        let mut out = Vec::new();
        while let Some((_, answer)) = self.0.pop_front_if(|(due, _)| *due <= now) {
            // An answer fits: `zone` bounds what it puts into one.
            frame::append(&mut out, &answer);
        }
        out
    }
}

/// Answers all whole messages in `buffer` and leaves the incomplete one.
fn answer_frames(buffer: &mut Vec<u8>, received: &mut Received, order: Order) -> io::Result<Vec<Vec<u8>>> {
    let mut frames = Frames::new(buffer);
    let mut answers = Vec::new();
    for message in frames.by_ref() {
        let message = message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        received.query += 1;
        answers.push(zone::answer(message, received));
    }
    let consumed = frames.consumed();
    buffer.drain(..consumed);
    if order == Order::Reversed {
        answers.reverse();
    }
    Ok(answers)
}

/// Reads the PROXY header, if there is to be one, and leaves in `buffer` what came behind it.
async fn read_header(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    options: ResponderOptions,
) -> io::Result<Option<Parsed>> {
    if options.proxy == ProxyMode::None {
        return Ok(None);
    }
    let deadline = Instant::now() + options.header_timeout;
    loop {
        buffer.reserve(READ_SIZE);
        let read = timeout_at(deadline, stream.read_buf(buffer)).await;
        if options.proxy == ProxyMode::Optional && !could_be_header(buffer) {
            return Ok(None);
        }
        let read = read.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no PROXY header in time"))??;
        match parse(buffer, options.max_header) {
            Ok(parsed) => {
                buffer.drain(..parsed.len);
                return Ok(Some(parsed));
            }
            Err(ParseError::NeedMore) if read == 0 => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the connection ended inside its PROXY header",
                ));
            }
            Err(ParseError::NeedMore) => {}
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}

/// Whether the octets so far are those of a header. Empty input is not: the peer may have closed without a word.
fn could_be_header(bytes: &[u8]) -> bool {
    let compared = bytes.len().min(SIGNATURE.len());
    compared > 0 && bytes.get(..compared) == SIGNATURE.get(..compared)
}
