//! A client that does its worst: what the neighbours of the benchmark's scenario N are measured beside.
//!
//! Each attack is a number of connections that do the same, from addresses of 127.9.0.0/16. One that is closed comes
//! again, after a rest: an attacker does not give up.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use serde_json::json;

/// Prints `{"attacking": true}` once every connection has begun, and ends with its standard input.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// Whom to attack.
    pub target: SocketAddrV4,
    /// How.
    #[arg(value_enum)]
    pub attack: Attack,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Attack {
    /// Messages of 64 KiB that are long to walk through: a chain of pointers to which all records point
    Pointers,
    /// Four queries a second on which the backend closes the connection
    Poison,
    /// 25 clients whose connections the backend closes, four queries a second each
    TurnedAway,
    /// 20 connections that ask for long answers and do not read
    Deaf,
    /// One connection with 24 queries in flight
    Busy,
    /// 14 connections of one address with 150 queries in flight each
    Crowd,
    /// 155 queries a second, of one address, which the backend answers late
    SlowNames,
    /// 200 connections of two addresses that say nothing
    Silent,
    /// Messages of another opcode with two questions, 200 a second
    Odd,
    /// Messages that cannot be read, one after the other
    Malformed,
}

/// What one connection does.
#[derive(Debug, Clone, Copy)]
struct Script {
    connections: u8,
    /// They come from so many addresses.
    addresses: u8,
    /// Makes the message with this number; none: nothing is ever sent.
    message: Option<fn(u64) -> Vec<u8>>,
    /// Between two messages of one connection; none: so many are in flight, and each answer is followed by the next one.
    pace: Result<Duration, usize>,
    reads: bool,
}

impl Attack {
    fn script(self) -> Script {
        let base = Script { connections: 1, addresses: 1, message: None, pace: Ok(Duration::ZERO), reads: true };
        let paced = |message: fn(u64) -> Vec<u8>, per_second: u32| Script {
            message: Some(message),
            pace: Ok(Duration::from_secs(1) / per_second),
            ..base
        };
        let in_flight =
            |message: fn(u64) -> Vec<u8>, queries: usize| Script { message: Some(message), pace: Err(queries), ..base };
        match self {
            Self::Pointers => Script { connections: 14, ..paced(pointer_chain, 8) },
            Self::Poison => paced(|number| query(b"drop", number), 4),
            Self::TurnedAway => Script { connections: 25, addresses: 25, ..paced(|number| query(b"name", number), 4) },
            Self::Deaf => {
                Script { connections: 20, reads: false, ..in_flight(|number| query(b"long", number), usize::MAX) }
            }
            Self::Busy => in_flight(|number| query(b"name", number), 24),
            Self::Crowd => Script { connections: 14, ..in_flight(|number| query(b"name", number), 150) },
            Self::SlowNames => paced(|number| query(b"slow", number), 155),
            Self::Silent => Script { connections: 200, addresses: 2, ..base },
            Self::Odd => paced(odd, 200),
            Self::Malformed => in_flight(malformed, 1),
        }
    }
}

/// A connection that was closed comes again after this time.
const REST: Duration = Duration::from_millis(20);

/// Attacks until standard input ends.
///
/// # Errors
/// If standard input cannot be read.
pub fn run(options: &Options) -> anyhow::Result<()> {
    // An attacker has a machine of its own: what it computes takes no time from who is attacked, or from the neighbours.
    rustix::process::nice(19).context("nice(2)")?;
    let script = options.attack.script();
    let begun = Arc::new(AtomicUsize::new(0));
    for number in 0..script.connections {
        let (target, begun) = (options.target, Arc::clone(&begun));
        let source = Ipv4Addr::new(127, 9, 0, 1 + number % script.addresses);
        thread::spawn(move || {
            let mut sent = 0;
            let mut first = true;
            loop {
                // Whatever ends it, it comes again.
                let _ = attack(script, source, target, &mut sent, || {
                    if std::mem::take(&mut first) {
                        begun.fetch_add(1, Ordering::SeqCst);
                    }
                });
                thread::sleep(REST);
            }
        });
    }
    while begun.load(Ordering::SeqCst) < usize::from(script.connections) {
        thread::sleep(Duration::from_millis(5));
    }
    println!("{}", json!({ "attacking": true }));
    io::stdin().read_to_end(&mut Vec::new()).context("read standard input")?;
    Ok(())
}

/// One connection, until it ends. `begun` is called once it does what it came for.
fn attack(
    script: Script,
    source: Ipv4Addr,
    target: SocketAddrV4,
    sent: &mut u64,
    mut begun: impl FnMut(),
) -> io::Result<()> {
    let mut stream = connect(source, target)?;
    let Some(message) = script.message else {
        begun();
        // Until the other side ends it.
        return stream.read(&mut [0]).map(drop);
    };
    let mut send = |stream: &mut TcpStream| {
        *sent += 1;
        stream.write_all(&message(*sent))
    };
    match script.pace {
        Ok(pace) => {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(pace.max(Duration::from_millis(1))))?;
            loop {
                send(&mut stream)?;
                begun();
                // The pace is kept by how long is waited for answers, which nobody looks at.
                wait_and_discard(&mut stream, pace)?;
            }
        }
        Err(_) if !script.reads => loop {
            // Blocks once the other side takes no more.
            send(&mut stream)?;
            begun();
        },
        Err(in_flight) => {
            for _ in 0..in_flight {
                send(&mut stream)?;
            }
            begun();
            let (mut frames, mut buffer) = (super::stream::Frames::default(), vec![0; super::stream::READ_LEN]);
            loop {
                let read = stream.read(&mut buffer)?;
                if read == 0 {
                    return Ok(());
                }
                let mut answers = 0;
                let counted: Result<(), ()> = frames.feed(&buffer[..read], |_| {
                    answers += 1;
                    Ok(())
                });
                debug_assert!(counted.is_ok());
                for _ in 0..answers {
                    send(&mut stream)?;
                }
            }
        }
    }
}

/// Reads for so long, whatever comes.
fn wait_and_discard(stream: &mut TcpStream, pace: Duration) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let until = super::poll::now() + pace.as_nanos() as u64;
    loop {
        let left = Duration::from_nanos(until.saturating_sub(super::poll::now()));
        if left < Duration::from_micros(100) {
            return Ok(());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
}

fn connect(source: Ipv4Addr, target: SocketAddrV4) -> io::Result<TcpStream> {
    let (family, kind) = (AddressFamily::INET, SocketType::STREAM);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(source, 0))?;
    rustix::net::connect(&socket, &target)?;
    Ok(TcpStream::from(socket))
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), message].concat()
}

/// RD set, with so many questions and records in the answer section.
fn header(number: u64, opcode: u8, questions: u16, answers: u16) -> Vec<u8> {
    let mut header = (number as u16).to_be_bytes().to_vec();
    header.extend_from_slice(&[opcode << 3 | 1, 0]);
    for count in [questions, answers, 0, 0] {
        header.extend_from_slice(&count.to_be_bytes());
    }
    header
}

/// `TAGNNNNNNNNNNNN.example.test. A`.
fn query(tag: &[u8; 4], number: u64) -> Vec<u8> {
    framed(&[header(number, 0, 1, 0), question(tag, number)].concat())
}

fn question(tag: &[u8; 4], number: u64) -> Vec<u8> {
    let label = [tag.as_slice(), format!("{number:012x}").as_bytes()].concat();
    [&[label.len() as u8][..], &label, b"\x07example\x04test\0\0\x01\0\x01"].concat()
}

fn odd(number: u64) -> Vec<u8> {
    const UNASSIGNED: u8 = 7;
    framed(&[header(number, UNASSIGNED, 2, 0), question(b"name", number), question(b"name", number)].concat())
}

/// A question that ends in the middle of its name.
fn malformed(number: u64) -> Vec<u8> {
    framed(&[header(number, 0, 1, 0), vec![63, b'x']].concat())
}

/// A question, a record whose data are a chain of pointers, each to the one before it, and records whose owner points at its
/// end, until the message is full.
fn pointer_chain(number: u64) -> Vec<u8> {
    // The last of them is still within reach of a pointer, which has 14 bits.
    const LINKS: usize = 8150;
    let question = question(b"name", number);
    let mut message = [header(number, 0, 1, 0), question].concat();
    let record = |owner: &[u8], length: usize| {
        // TYPE 65280 is for private use: nobody knows what is in it. CLASS IN, TTL 0.
        [owner, &[0xff, 0, 0, 1, 0, 0, 0, 0], &(length as u16).to_be_bytes()].concat()
    };
    message.extend_from_slice(&record(&[0], 2 * LINKS));
    let mut target = 12;
    for _ in 0..LINKS {
        let at = message.len();
        message.extend_from_slice(&(0xc000 | target as u16).to_be_bytes());
        target = at;
    }
    let chained = record(&(0xc000 | target as u16).to_be_bytes(), 0);
    let more = (usize::from(u16::MAX) - message.len()) / chained.len();
    message.extend(chained.iter().copied().cycle().take(more * chained.len()));
    message[6..8].copy_from_slice(&(more as u16 + 1).to_be_bytes());
    framed(&message)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn messages_are_what_they_are_called() {
        let message = hickory_proto::op::Message::from_vec(&query(b"drop", 7)[2..]).unwrap();
        assert_eq!(message.queries[0].name().to_string(), "drop000000000007.example.test.");
        assert!(hickory_proto::op::Message::from_vec(&malformed(1)[2..]).is_err());
        let odd = odd(1);
        assert_eq!((odd[4] >> 3 & 15, &odd[6..8]), (7, &[0, 2][..]));
        let chain = pointer_chain(1);
        assert!(chain.len() > 65_000 && usize::from(u16::from_be_bytes([chain[0], chain[1]])) == chain.len() - 2);
        // The last pointer points at the one before it, inside the record's data.
        assert!(u16::from_be_bytes([chain[8], chain[9]]) > 3000, "so many records");
    }
}
