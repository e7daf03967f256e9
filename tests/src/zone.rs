//! The zone that is transferred, and transfers as a client does them.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use hickory_proto::op::Message;
use hickory_proto::rr::RData;
use hickory_proto::serialize::binary::BinDecodable as _;

use crate::driver::Client;
use crate::message;

/// Its name.
pub const NAME: &str = "zone.example";
/// Its TSIG key (RFC 8945) as kdig's `-y` has it: algorithm, name and secret.
pub const KEY: (&str, &str, &str) = ("hmac-sha256", "transfer", "c29tZXRoaW5nIHRoYXQgbm9ib2R5IGtub3dzIQ==");

/// QTYPE of a full transfer (RFC 5936).
pub const AXFR: u16 = 252;
/// QTYPE of an incremental one (RFC 1995).
pub const IXFR: u16 = 251;
const SOA: u16 = 6;

const PATIENCE: Duration = Duration::from_secs(20);

/// A zone file with so many hosts, each with an address and a text.
///
/// # Panics
/// Never in practice: writing into a string does not fail.
pub fn file(serial: u32, hosts: usize) -> String {
    let mut text = format!("$ORIGIN {NAME}.\n$TTL 60\n@ IN SOA ns host {serial} 3600 600 86400 60\n@ IN NS ns\n");
    writeln!(text, "ns IN A 192.0.2.53").unwrap();
    for host in 0..hosts {
        let (high, low) = (host / 250 % 250, host % 250);
        writeln!(text, "host{host} IN A 10.1.{high}.{low}\nhost{host} IN TXT \"the text of host number {host}\"")
            .unwrap();
    }
    text
}

/// A query for a transfer of [`NAME`]; since this serial, if it is an IXFR.
pub fn query(id: u16, since: Option<u32>) -> Vec<u8> {
    let mut query = message::query(id, NAME, if since.is_some() { IXFR } else { AXFR });
    // RD means nothing to an authoritative server, and Knot says so.
    query[2] = 0;
    if let Some(serial) = since {
        query[9] = 1;
        query.extend_from_slice(&record(SOA, &soa(serial)));
    }
    query
}

/// A record of the zone's own name, for messages that begin with a question for it.
///
/// # Panics
/// If the data are longer than 65,535 octets.
pub fn record(rtype: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).expect("data of a record").to_be_bytes();
    [&[0xc0, 12][..], &rtype.to_be_bytes(), &[0, 1, 0, 0, 0, 60], &length, data].concat()
}

/// The data of a SOA.
pub fn soa(serial: u32) -> Vec<u8> {
    [&[0, 0][..], &serial.to_be_bytes(), &[0; 16]].concat()
}

/// A message that answers `query` with these records: SOAs by serial, and texts.
///
/// # Panics
/// If there are more than 65,535 records, or `query` has no question.
pub fn message(query: &[u8], records: &[Rr]) -> Vec<u8> {
    let name_end = 12 + query[12..].iter().position(|octet| *octet == 0).expect("a name");
    let mut answer = query[..name_end + 5].to_vec();
    (answer[2], answer[3], answer[9]) = (0x84, 0, 0);
    answer[6..8].copy_from_slice(&u16::try_from(records.len()).expect("few records").to_be_bytes());
    for rr in records {
        match rr {
            Rr::Soa(serial) => answer.extend_from_slice(&record(SOA, &soa(*serial))),
            Rr::Text(octets) => answer.extend_from_slice(&record(message::qtype::TXT, &text(*octets))),
        }
    }
    answer
}

fn text(octets: usize) -> Vec<u8> {
    let strings = vec![b'x'; octets];
    strings.chunks(255).flat_map(|chunk| [&[chunk.len() as u8][..], chunk].concat()).collect()
}

/// A record of a made-up transfer.
#[derive(Clone, Copy, Debug)]
pub enum Rr {
    /// The zone's SOA with this serial.
    Soa(u32),
    /// A TXT record of about so many octets.
    Text(usize),
}

/// Reads messages until so many SOAs of the zone have come, or an error code.
///
/// # Panics
/// If the connection ends before, or nothing comes.
#[track_caller]
pub fn fetch(client: &mut Client, query: &[u8], soas: usize) -> Vec<Vec<u8>> {
    client.send_raw(&message::framed(query)).expect("the server reads");
    let (mut messages, mut seen) = (Vec::new(), 0);
    while seen < soas {
        let answer = client.receive(PATIENCE).message();
        assert_eq!(message::id(&answer), message::id(query));
        let parsed = Message::from_bytes(&answer).unwrap_or_else(|e| panic!("{e}: {answer:02x?}"));
        seen += parsed.answers.iter().filter(|record| matches!(record.data, RData::SOA(_))).count();
        let error = message::response_code(&answer) != 0;
        messages.push(answer);
        if error {
            break;
        }
    }
    messages
}

/// The same messages with an ID of zero: what must not change on the way.
pub fn without_ids(mut messages: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    messages.iter_mut().for_each(|message| message[..2].fill(0));
    messages
}

/// What `kdig` prints of a transfer: all records, in order. `what` is `AXFR` or `IXFR=SERIAL`; `signed` by [`KEY`], which
/// kdig then demands of the answers, too.
///
/// # Panics
/// If kdig is not content.
#[track_caller]
pub fn kdig(server: SocketAddr, source: &str, what: &str, signed: bool) -> String {
    let key = format!("{}:{}:{}", KEY.0, KEY.1, KEY.2);
    let options = ["-y", &key];
    kdig_with(server, source, what, if signed { &options } else { &[] })
}

/// The same over TLS, from a server of this name with a certificate of this authority.
///
/// # Panics
/// If kdig is not content.
#[track_caller]
pub fn kdig_over_tls(server: SocketAddr, source: &str, what: &str, ca: &Path, name: &str) -> String {
    let (ca, name) = (format!("+tls-ca={}", ca.display()), format!("+tls-hostname={name}"));
    kdig_with(server, source, what, &["+tls", &ca, &name])
}

#[track_caller]
fn kdig_with(server: SocketAddr, source: &str, what: &str, options: &[&str]) -> String {
    let (port, at) = (server.port().to_string(), format!("@{}", server.ip()));
    let common = [at.as_str(), "-p", &port, "-b", source, NAME, what, "+noall", "+answer", "+retry=0", "+timeout=15"];
    let args = [&common[..], options].concat();
    let (ok, output) = crate::process::run("kdig", &args, Duration::from_secs(60));
    assert!(ok && !output.contains(";;"), "{args:?}: {output}");
    output
}
