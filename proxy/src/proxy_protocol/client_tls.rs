//! What a client agreed on over TLS, as TLVs (section 2.2.6 of the specification, and 2.2.1 and 2.2.2 for ALPN and
//! AUTHORITY).

use super::{tlv, tlv_type};
use crate::tls::Negotiated;

/// The client came over TLS (PP2_CLIENT_SSL). It showed no certificate: none is asked for.
const CLIENT_SSL: u8 = 0x01;
/// Anything but zero: no certificate was verified.
const NOT_VERIFIED: u32 = 1;

/// Octets of the TLVs of a client that says nothing of itself and agreed on what has the shortest names.
pub const SHORTEST: usize = 43;

/// ALPN, AUTHORITY and SSL, as far as there is something to say, as a header holds them.
pub fn tlvs(negotiated: &Negotiated) -> Vec<u8> {
    let mut out = Vec::new();
    if let Some(alpn) = &negotiated.alpn {
        tlv::push(&mut out, tlv_type::ALPN, alpn);
    }
    if let Some(name) = &negotiated.server_name {
        tlv::push(&mut out, tlv_type::AUTHORITY, name.as_bytes());
    }
    let mut ssl = vec![CLIENT_SSL];
    ssl.extend_from_slice(&NOT_VERIFIED.to_be_bytes());
    tlv::push(&mut ssl, tlv_type::SSL_VERSION, negotiated.version.name().as_bytes());
    tlv::push(&mut ssl, tlv_type::SSL_CIPHER, negotiated.cipher.as_bytes());
    tlv::push(&mut out, tlv_type::SSL, &ssl);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::Version;

    #[test]
    fn what_there_is_to_say_is_said() {
        let mut negotiated = Negotiated {
            version: Version::Tls13,
            cipher: "TLS_AES_256_GCM_SHA384",
            alpn: Some(b"dot".to_vec()),
            server_name: Some("dns.example".to_owned()),
            resumed: true,
        };
        let ssl = b"\x20\0\x28\x01\0\0\0\x01\x21\0\x07TLSv1.3\x23\0\x16TLS_AES_256_GCM_SHA384";
        let all = [&b"\x01\0\x03dot\x02\0\x0bdns.example"[..], ssl].concat();
        assert_eq!(tlvs(&negotiated), all);
        (negotiated.alpn, negotiated.server_name) = (None, None);
        assert_eq!(tlvs(&negotiated), all[3 + 3 + 3 + 11..]);
        negotiated.cipher = "TLS_AES_128_GCM_SHA256";
        assert_eq!(tlvs(&negotiated).len(), SHORTEST);
    }
}
