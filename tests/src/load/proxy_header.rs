//! PROXY protocol v2 headers: what the relay writes and how the answerer reads them.

use std::net::{Ipv4Addr, SocketAddrV4};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const PREAMBLE: usize = 16;
const VERSION_2_LOCAL: u8 = 0x20;
const VERSION_2_PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// Longest header that is accepted, in octets. PowerDNS Recursor and dnsdist refuse more than 512 by default.
const MAX_HEADER: usize = 512;

/// The type of the TLV that carries the first label of a query in the E scenarios.
pub const LABEL_TLV: u8 = 0xE0;

/// What the answerer needs of a header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// The client's port; `None` for LOCAL.
    pub source_port: Option<u16>,
    /// The client's IPv4 address.
    pub source_ip: Option<Ipv4Addr>,
    /// Value of the first TLV of type [`LABEL_TLV`].
    pub label: Option<Vec<u8>>,
}

/// Appends a header for TCP over IPv4.
pub fn push(out: &mut Vec<u8>, source: SocketAddrV4, destination: SocketAddrV4, label: Option<&[u8]>) {
    let tlv = label.map_or(0, |value| 3 + value.len());
    out.extend_from_slice(&SIGNATURE);
    out.extend_from_slice(&[VERSION_2_PROXY, TCP_OVER_IPV4]);
    out.extend_from_slice(&(12 + tlv as u16).to_be_bytes());
    out.extend_from_slice(&source.ip().octets());
    out.extend_from_slice(&destination.ip().octets());
    out.extend_from_slice(&source.port().to_be_bytes());
    out.extend_from_slice(&destination.port().to_be_bytes());
    if let Some(value) = label {
        out.push(LABEL_TLV);
        out.extend_from_slice(&(value.len() as u16).to_be_bytes());
        out.extend_from_slice(value);
    }
}

/// Reads the header at the start of `octets`: `Ok(None)` while it is not complete, else it and its length.
///
/// # Errors
/// Says what is wrong with it. All of the header is checked: signature, version, command, family, an IPv4 source inside
/// the loopback network, and TLVs that end exactly where the header does.
pub fn parse(octets: &[u8]) -> Result<Option<(Header, usize)>, &'static str> {
    let known = octets.len().min(SIGNATURE.len());
    if octets[..known] != SIGNATURE[..known] {
        return Err("no PROXY v2 signature");
    }
    let Some(preamble) = octets.first_chunk::<PREAMBLE>() else { return Ok(None) };
    let length = PREAMBLE + usize::from(u16::from_be_bytes([preamble[14], preamble[15]]));
    if length > MAX_HEADER {
        return Err("PROXY header longer than 512 octets");
    }
    let Some(body) = octets.get(PREAMBLE..length) else { return Ok(None) };
    let (source_ip, source_port, tlvs) = match (preamble[12], preamble[13]) {
        (VERSION_2_LOCAL, _) => return Ok(Some((Header::default(), length))),
        (VERSION_2_PROXY, TCP_OVER_IPV4) => {
            let addresses: &[u8; 12] = body.first_chunk().ok_or("IPv4 addresses cut off")?;
            let source = Ipv4Addr::new(addresses[0], addresses[1], addresses[2], addresses[3]);
            if !source.is_loopback() {
                return Err("PROXY source address is not on loopback");
            }
            (Some(source), u16::from_be_bytes([addresses[8], addresses[9]]), &body[12..])
        }
        (VERSION_2_PROXY, TCP_OVER_IPV6) => {
            let addresses: &[u8; 36] = body.first_chunk().ok_or("IPv6 addresses cut off")?;
            (None, u16::from_be_bytes([addresses[32], addresses[33]]), &body[36..])
        }
        (VERSION_2_PROXY, _) => return Err("PROXY family is not TCP over IPv4 or IPv6"),
        _ => return Err("PROXY version or command unknown"),
    };
    Ok(Some((Header { source_port: Some(source_port), source_ip, label: label_of(tlvs)? }, length)))
}

/// Walks all TLVs and returns the value of the first with the label.
fn label_of(mut tlvs: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    let mut label = None;
    while let Some((&[kind, high, low], rest)) = tlvs.split_first_chunk() {
        let value =
            rest.get(..usize::from(u16::from_be_bytes([high, low]))).ok_or("TLV beyond the end of the header")?;
        if kind == LABEL_TLV && label.is_none() {
            label = Some(value.to_vec());
        }
        tlvs = &rest[value.len()..];
    }
    if tlvs.is_empty() { Ok(label) } else { Err("octets left after the last TLV") }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use ppp::v2;

    const SOURCE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4321);
    const DESTINATION: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53);

    fn header(label: Option<&[u8]>) -> Vec<u8> {
        let mut out = Vec::new();
        push(&mut out, SOURCE, DESTINATION, label);
        out
    }

    #[test]
    fn another_implementation_reads_what_is_written() {
        let octets = header(Some(b"tenant"));
        let parsed = v2::Header::try_from(octets.as_slice()).unwrap();
        assert_eq!(parsed.addresses, v2::Addresses::IPv4(v2::IPv4::new(*SOURCE.ip(), *DESTINATION.ip(), 4321, 53)));
        let tlvs: Vec<_> = parsed.tlvs().map(Result::unwrap).collect();
        assert_eq!(tlvs, [v2::TypeLengthValue::new(LABEL_TLV, b"tenant")]);
    }

    #[test]
    fn a_header_is_read_whole_or_not_yet() {
        let octets = header(Some(b"tenant"));
        for length in 0..octets.len() {
            assert_eq!(parse(&octets[..length]), Ok(None), "{length} octets");
        }
        let source = Header { source_port: Some(4321), source_ip: Some(Ipv4Addr::LOCALHOST), label: None };
        let expected = Header { label: Some(b"tenant".to_vec()), ..source.clone() };
        assert_eq!(parse(&octets), Ok(Some((expected, octets.len()))));
        assert_eq!(parse(&header(None)).unwrap().unwrap().0, source);
    }

    #[test]
    fn faults_are_refused() {
        for (at, octet, fault) in [
            (0, 0, "no PROXY v2 signature"),
            (12, 0x11, "PROXY version or command unknown"),
            (13, 0x12, "PROXY family is not TCP over IPv4 or IPv6"),
            (14, 2, "PROXY header longer than 512 octets"),
            (16, 10, "PROXY source address is not on loopback"),
            (30, 200, "TLV beyond the end of the header"),
            (30, 4, "octets left after the last TLV"),
        ] {
            let mut octets = header(Some(b"tenant"));
            octets[at] = octet;
            assert_eq!(parse(&octets), Err(fault), "octet {at}");
        }
    }
}
