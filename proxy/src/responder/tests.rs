#![expect(clippy::expect_used, clippy::disallowed_methods, reason = "tests panic, and are the responder's clients")]

use super::*;
use crate::dns::frame;
use crate::proxy_protocol::encode::HeaderWriter;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(10);

fn start(options: ResponderOptions) -> Running {
    let addr = SocketAddr::from(([127, 0, 0, 1], 0));
    Responder::bind(addr, options).and_then(Responder::start).expect("a responder on loopback")
}

fn connect(responder: &Running) -> TcpStream {
    let stream = TcpStream::connect(responder.addr()).expect("the responder listens");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    stream
}

fn header() -> Vec<u8> {
    let mut out = Vec::new();
    let source = SocketAddr::from(([192, 0, 2, 1], 4000));
    let destination = SocketAddr::from(([192, 0, 2, 2], 53));
    HeaderWriter::proxy(&mut out, source, destination).raw_tlvs(b"\xe0\0\x03one").finish(536).expect("short");
    out
}

/// A framed query for `whoami.counterfoil. TXT`.
fn query(id: u16) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend_from_slice(b"\x01\0\0\x01\0\0\0\0\0\0\x06whoami\x0bcounterfoil\0\0\x10\0\x01");
    let mut out = Vec::new();
    assert!(frame::append(&mut out, &message));
    out
}

fn read_answer(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("an answer's length");
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).expect("an answer");
    answer
}

fn ids(stream: &mut TcpStream, count: usize) -> Vec<u16> {
    (0..count).map(|_| read_answer(stream)).map(|answer| u16::from_be_bytes([answer[0], answer[1]])).collect()
}

fn has(answer: &[u8], text: &str) -> bool {
    answer.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The peer has closed: nothing more to read, or a reset.
fn closed(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => rest.is_empty(),
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn header_and_queries_octet_by_octet() {
    let responder = start(ResponderOptions::default());
    let mut stream = connect(&responder);
    stream.set_nodelay(true).expect("an option");
    let bytes = [header(), query(1), query(2)].concat();
    for octet in bytes {
        stream.write_all(&[octet]).expect("sent");
    }
    let first = read_answer(&mut stream);
    assert!(has(&first, "source=192.0.2.1:4000") && has(&first, "tlv=0xE0:one") && has(&first, "query=1"));
    let second = read_answer(&mut stream);
    assert!(has(&second, "connection=1") && has(&second, "query=2"));
    assert_eq!(second[..2], [0, 2]);
}

#[test]
fn many_queries_in_one_write_and_then_the_end() {
    let responder = start(ResponderOptions::default());
    let mut stream = connect(&responder);
    let bytes: Vec<u8> = header().into_iter().chain((0..500).flat_map(query)).collect();
    stream.write_all(&bytes).expect("sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half closed");
    assert_eq!(ids(&mut stream, 500), (0..500).collect::<Vec<_>>());
    assert!(closed(&mut stream));
    assert_eq!(responder.counters().queries(), 500);
    assert_eq!((responder.counters().accepted(), responder.counters().bad_headers()), (1, 0));
}

#[test]
fn answers_may_be_late_and_out_of_order() {
    let delay = Duration::from_millis(50);
    let responder = start(ResponderOptions { order: Order::Reversed, delay, ..Default::default() });
    let mut stream = connect(&responder);
    let begin = std::time::Instant::now();
    // One write arrives in one piece on loopback.
    stream.write_all(&[header(), query(1), query(2), query(3)].concat()).expect("sent");
    stream.shutdown(std::net::Shutdown::Write).expect("half closed");
    assert_eq!(ids(&mut stream, 3), [3, 2, 1]);
    assert!(begin.elapsed() >= delay);
}

#[test]
fn without_the_required_header_the_connection_is_closed() {
    let responder = start(ResponderOptions { header_timeout: Duration::from_millis(100), ..Default::default() });
    let mut plain = connect(&responder);
    plain.write_all(&query(1)).expect("sent");
    assert!(closed(&mut plain));
    let mut silent = connect(&responder);
    silent.write_all(&header()[..20]).expect("sent");
    assert!(closed(&mut silent));
    assert_eq!(responder.counters().bad_headers(), 2);
    assert_eq!(responder.counters().queries(), 0);
}

#[test]
fn an_optional_header_may_be_left_out() {
    let responder = start(ResponderOptions { proxy: ProxyMode::Optional, ..Default::default() });
    let mut plain = connect(&responder);
    plain.write_all(&query(1)).expect("sent");
    assert!(has(&read_answer(&mut plain), "command=none"));
    let mut with = connect(&responder);
    with.write_all(&[header(), query(1)].concat()).expect("sent");
    assert!(has(&read_answer(&mut with), "command=PROXY"));
}

#[test]
fn where_no_header_is_understood_one_is_an_unanswered_message() {
    let responder = start(ResponderOptions { proxy: ProxyMode::None, ..Default::default() });
    let mut plain = connect(&responder);
    plain.write_all(&query(1)).expect("sent");
    assert!(has(&read_answer(&mut plain), "command=none"));
    let mut with = connect(&responder);
    with.write_all(&[header(), query(1)].concat()).expect("sent");
    with.shutdown(std::net::Shutdown::Write).expect("half closed");
    assert!(closed(&mut with), "the signature announces 3338 octets that never come");
}

#[test]
fn a_wrong_length_closes() {
    let responder = start(ResponderOptions::default());
    let mut stream = connect(&responder);
    stream.write_all(&[&header()[..], b"\0\x05hello"].concat()).expect("sent");
    assert!(closed(&mut stream));
}

#[test]
fn idle_connections_are_closed() {
    let responder = start(ResponderOptions { idle_timeout: Duration::from_millis(50), ..Default::default() });
    let mut stream = connect(&responder);
    stream.write_all(&header()).expect("sent");
    assert!(closed(&mut stream));
}

#[test]
fn no_more_connections_than_allowed_are_served() {
    let responder = start(ResponderOptions { max_connections: 1, ..Default::default() });
    let mut first = connect(&responder);
    first.write_all(&[header(), query(1)].concat()).expect("sent");
    assert!(has(&read_answer(&mut first), "connection=1"));
    let mut second = connect(&responder);
    second.write_all(&[header(), query(1)].concat()).expect("sent");
    assert_eq!(responder.counters().accepted(), 1);
    drop(first);
    assert!(has(&read_answer(&mut second), "connection=2"));
    assert_eq!(responder.counters().open_max(), 1);
}

#[test]
fn stopping_closes_everything() {
    let responder = start(ResponderOptions::default());
    let addr = responder.addr();
    let counters = Arc::clone(&responder.counters);
    let mut busy = connect(&responder);
    busy.write_all(&[header(), query(1)].concat()).expect("sent");
    read_answer(&mut busy);
    let mut silent = connect(&responder);
    drop(responder);
    assert!(closed(&mut busy) && closed(&mut silent));
    assert_eq!(counters.open(), 0);
    assert!(TcpStream::connect(addr).is_err());
}
