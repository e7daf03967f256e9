//! PROXY headers as peers send them, made by another encoder than the program's where there is one.

use std::net::SocketAddr;

use ppp::v2::{Builder, Command, Protocol, Version};

/// A header of version 2 for TCP from `source` to `destination`, with these TLVs.
///
/// # Panics
/// If an address or a TLV does not fit.
pub fn v2(source: &str, destination: &str, tlvs: &[(u8, &[u8])]) -> Vec<u8> {
    let addresses: (SocketAddr, SocketAddr) =
        (source.parse().expect("an address"), destination.parse().expect("an address"));
    let mut builder = Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses);
    for (kind, value) in tlvs {
        builder = builder.write_tlv(*kind, value).expect("a TLV that fits");
    }
    builder.build().expect("a header that fits")
}

/// A header of version 2 of these octets 13 and 14 and this payload, right or not.
///
/// # Panics
/// If the payload is longer than 65,535 octets.
pub fn raw(version_command: u8, family_transport: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = ppp::v2::PROTOCOL_PREFIX.to_vec();
    header.extend_from_slice(&[version_command, family_transport]);
    header.extend_from_slice(&u16::try_from(payload.len()).expect("a length field").to_be_bytes());
    header.extend_from_slice(payload);
    header
}

/// A header of version 1.
///
/// # Panics
/// If an address is none, or they are of different families.
pub fn v1(source: &str, destination: &str) -> Vec<u8> {
    let (from, to): (SocketAddr, SocketAddr) =
        (source.parse().expect("an address"), destination.parse().expect("an address"));
    assert_eq!(from.is_ipv4(), to.is_ipv4());
    let family = if from.is_ipv4() { 4 } else { 6 };
    format!("PROXY TCP{family} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port()).into_bytes()
}
