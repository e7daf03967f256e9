//! `counterfoil query`: a small DNS-over-TCP client with an optional PROXY v2 header, for trying things out.

mod print;

use std::io::{self, Read as _, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use tokio::time::Instant;

use crate::dns::message::{peek, question_matches};
use crate::dns::{frame, rtype};
use crate::proxy_protocol::encode::HeaderWriter;
use crate::proxy_protocol::{MAX_LEN, TLV_OVERHEAD};
use crate::scope::{self, ScopeError};
use crate::stdout::Stdout;

/// Port of a server that was given without one.
const DNS_PORT: u16 = 53;

/// Ask one question over TCP and print the answer.
#[derive(Args, Clone, Debug)]
pub struct QueryArgs {
    /// The name to ask for.
    name: String,

    /// The type to ask for: a mnemonic or TYPE65.
    #[arg(default_value = "A", value_name = "TYPE", value_parser = parse_type)]
    rtype: u16,

    /// The server: IP, IP:PORT or IP#PORT; the port is 53 if not given.
    #[arg(long, value_name = "ADDR", value_parser = parse_server)]
    server: SocketAddr,

    /// Send a PROXY v2 header first that names these two ends, each IP#PORT or IP:PORT.
    #[arg(long, value_name = "SRC-DST", value_parser = parse_ends)]
    proxy: Option<(SocketAddr, SocketAddr)>,

    /// A TLV for the PROXY header, as 0xE0=text or 0xE0=hex:01ff; may be given several times.
    #[arg(long, value_name = "TYPE=VALUE", requires = "proxy", value_parser = parse_tlv)]
    tlv: Vec<Tlv>,

    /// How long connecting and the answer may take together, such as 500ms, 5s or 1m.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Tlv {
    kind: u8,
    value: Vec<u8>,
}

/// Asks, prints the answer to standard output or the error to standard error, and says whether there was an answer:
/// whatever its RCODE, it counts as one.
pub fn run(args: &QueryArgs) -> ExitCode {
    let mut output = Stdout::lock();
    let mut printed = |answer| print::answer(&answer, &mut output).and_then(|()| output.flush());
    match ask(args).and_then(|answer| Ok(printed(answer)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if standard error is closed.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// An answer and how it came.
struct Answer {
    message: Message,
    octets: usize,
    server: SocketAddr,
    took: Duration,
}

fn ask(args: &QueryArgs) -> Result<Answer> {
    let server = args.server;
    let query = encode_query(args)?;
    let mut out = Vec::new();
    if let Some((source, destination)) = args.proxy {
        encode_header(source, destination, &args.tlv, &mut out)?;
    }
    if !frame::append(&mut out, &query) {
        bail!("the query is too long");
    }

    let begin = Instant::now();
    let deadline = begin + args.timeout;
    let mut stream = connect(server, args.timeout)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream
        .write_all(&out)
        .map_err(|error| explain(error, args.timeout))
        .with_context(|| format!("sending to {server}"))?;
    let answer = read_message(&mut stream, deadline)
        .map_err(|error| explain(error, args.timeout))
        .with_context(|| format!("waiting for the answer of {server}"))?;
    let took = begin.elapsed();

    let header = peek(&answer).context("the answer has no header")?;
    if !header.qr || Some(header.id) != peek(&query).map(|query| query.id) || !question_matches(&query, &answer) {
        bail!("{server} answered something that was not asked");
    }
    let message = Message::from_vec(&answer).with_context(|| format!("the answer of {server} cannot be read"))?;
    Ok(Answer { message, octets: answer.len(), server, took })
}

#[expect(clippy::disallowed_methods, reason = "a client of its own, outside of the forwarder: no ledger is running")]
fn connect(server: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    TcpStream::connect_timeout(&server, timeout)
        .map_err(|error| explain(error, timeout))
        .with_context(|| format!("connecting to {server}"))
}

fn encode_query(args: &QueryArgs) -> Result<Vec<u8>> {
    if matches!(args.rtype, rtype::AXFR | rtype::IXFR) {
        bail!("zone transfers are not supported: their answer is more than one message");
    }
    let mut name = Name::from_ascii(&args.name).with_context(|| format!("{:?} is not a name", args.name))?;
    name.set_fqdn(true);
    let mut query = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name, RecordType::from(args.rtype)));
    query.to_vec().with_context(|| format!("{:?} cannot be asked for", args.name))
}

fn encode_header(source: SocketAddr, destination: SocketAddr, tlvs: &[Tlv], out: &mut Vec<u8>) -> Result<()> {
    let mut raw = Vec::with_capacity(tlvs.iter().map(|tlv| TLV_OVERHEAD + tlv.value.len()).sum());
    for Tlv { kind, value } in tlvs {
        let length = u16::try_from(value.len()).with_context(|| format!("the value of TLV {kind:#04x} is too long"))?;
        raw.push(*kind);
        raw.extend_from_slice(&length.to_be_bytes());
        raw.extend_from_slice(value);
    }
    HeaderWriter::proxy(out, source, destination).raw_tlvs(&raw).finish(MAX_LEN)?;
    Ok(())
}

fn read_message(stream: &mut TcpStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut length = [0; frame::PREFIX_LEN];
    read_exact(stream, &mut length, deadline)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    read_exact(stream, &mut message, deadline)?;
    Ok(message)
}

/// As [`io::Read::read_exact`], but with a deadline for all of it.
fn read_exact(stream: &mut TcpStream, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => buffer = buffer.get_mut(read..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What is left until `deadline`; never zero, which would mean forever.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Puts the kernel's words into ours where these say more.
fn explain(error: io::Error, timeout: Duration) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => anyhow::anyhow!("no answer within {timeout:?}"),
        io::ErrorKind::UnexpectedEof => anyhow::anyhow!("the server closed the connection without an answer"),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            anyhow::anyhow!("the server reset the connection without an answer")
        }
        io::ErrorKind::ConnectionRefused => anyhow::anyhow!("connection refused: nothing listens there"),
        _ => error.into(),
    }
}

fn parse_type(text: &str) -> Result<u16, String> {
    rtype::parse(text).ok_or_else(|| "not a record type; use a mnemonic or TYPE65".to_owned())
}

fn parse_server(text: &str) -> Result<SocketAddr, String> {
    let (ip, port) = match text.split_once('#') {
        Some((ip, port)) => (ip.trim_start_matches('[').trim_end_matches(']'), port.parse().ok()),
        None => (text, Some(DNS_PORT)),
    };
    let alone = scope::ip_address(ip).and_then(|mut address| {
        address.set_port(port.ok_or(ScopeError::Syntax)?);
        Ok(address)
    });
    let address = match alone {
        Err(ScopeError::Syntax) => scope::socket_address(text),
        address => address,
    };
    address.map_err(|error| match error {
        ScopeError::Syntax => format!("{text:?} is not IP, IP:PORT, [IP6]:PORT or IP#PORT"),
        error => error.to_string(),
    })
}

/// `IP:PORT`, `[IP6]:PORT` or `IP#PORT`.
fn parse_end(text: &str) -> Result<SocketAddr, String> {
    let hash = text.split_once('#').and_then(|(ip, port)| {
        let ip = ip.trim_start_matches('[').trim_end_matches(']');
        Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?))
    });
    hash.or_else(|| text.parse().ok()).ok_or_else(|| format!("{text:?} is not IP:PORT, [IP6]:PORT or IP#PORT"))
}

fn parse_ends(text: &str) -> Result<(SocketAddr, SocketAddr), String> {
    let (source, destination) = text.split_once('-').ok_or("two addresses with a dash between them are needed")?;
    Ok((parse_end(source)?, parse_end(destination)?))
}

fn parse_tlv(text: &str) -> Result<Tlv, String> {
    let (kind, value) = text.split_once('=').ok_or("TYPE=VALUE is needed")?;
    let hex = kind.strip_prefix("0x").or_else(|| kind.strip_prefix("0X"));
    let kind = match hex {
        Some(digits) => u8::from_str_radix(digits, 16),
        None => kind.parse(),
    };
    let kind = kind.map_err(|_| "the type is a number from 0x00 to 0xFF")?;
    let value = match value.strip_prefix("hex:") {
        Some(digits) => bytes_of(digits).ok_or("hex: needs an even number of hexadecimal digits")?,
        None => value.as_bytes().to_vec(),
    };
    Ok(Tlv { kind, value })
}

fn bytes_of(digits: &str) -> Option<Vec<u8>> {
    let nibble = |digit: &u8| char::from(*digit).to_digit(16);
    let (pairs, odd) = digits.as_bytes().as_chunks::<2>();
    let byte = |[high, low]: &[u8; 2]| u8::try_from(nibble(high)? << 4 | nibble(low)?).ok();
    if odd.is_empty() { pairs.iter().map(byte).collect() } else { None }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "m" => Duration::from_secs(60),
        _ => return Err("a number with ms, s or m is needed, such as 5s".to_owned()),
    };
    let duration = number.parse().ok().and_then(|number| unit.checked_mul(number));
    duration.filter(|duration| !duration.is_zero()).ok_or_else(|| "a time above zero is needed".to_owned())
}

#[cfg(test)]
mod tests;
