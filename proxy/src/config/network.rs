//! Networks, as the configuration names those who are trusted: "192.0.2.0/24", "2001:db8::/32", "192.0.2.1".

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;

/// An address with a prefix length; the bits behind it are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// A text that is no network.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NetworkError {
    /// No address, or something other than a number of bits behind the slash.
    #[error("{0:?} is not a network, such as \"192.0.2.0/24\" or \"2001:db8::/32\", nor an address")]
    Syntax(String),
    /// More bits than an address of this family has.
    #[error("{0:?} has a prefix of more than {1} bits")]
    Prefix(String, u8),
    /// Bits that the network does not fix: an address was meant, or another prefix.
    #[error("{0:?} has bits behind its prefix; the network is {1}")]
    HostBits(String, Network),
}

impl Network {
    /// Whether `ip` is in it. An IPv4 address that was mapped into IPv6 counts as IPv4.
    pub fn contains(&self, ip: IpAddr) -> bool {
        masked(ip.to_canonical(), self.prefix, self.prefix) == self.address
            && ip.to_canonical().is_ipv4() == self.address.is_ipv4()
    }
}

/// The address with all bits behind the prefix zero: `v4` bits of IPv4, `v6` of IPv6. More than there are count as all.
pub fn masked(ip: IpAddr, v4: u8, v6: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let host_bits = 32 - u32::from(v4.min(32));
            let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask))
        }
        IpAddr::V6(ip) => {
            let host_bits = 128 - u32::from(v6.min(128));
            let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask))
        }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let syntax = || NetworkError::Syntax(text.to_owned());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| syntax())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match bits {
            None => most,
            Some(bits) if bits.bytes().all(|octet| octet.is_ascii_digit()) => {
                let bits: u8 = bits.parse().map_err(|_| syntax())?;
                if bits > most {
                    return Err(NetworkError::Prefix(text.to_owned(), most));
                }
                bits
            }
            Some(_) => return Err(syntax()),
        };
        let network = Self { address: masked(address, prefix, prefix), prefix };
        if network.address != address {
            return Err(NetworkError::HostBits(text.to_owned(), network));
        }
        // Peers that connect by IPv4 to a dual-stack listener are compared as IPv4.
        Ok(match (address.to_canonical(), prefix.checked_sub(96)) {
            (address @ IpAddr::V4(_), Some(prefix)) if network.address.is_ipv6() => Self { address, prefix },
            _ => network,
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = if self.address.is_ipv4() { 32 } else { 128 };
        if self.prefix == all { write!(f, "{}", self.address) } else { write!(f, "{}/{}", self.address, self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;

    fn contains(network: &str, ip: &str) -> bool {
        let network: Network = network.parse().expect("a network");
        network.contains(ip.parse().expect("an address"))
    }

    #[test]
    fn members() {
        assert!(contains("127.0.0.0/8", "127.255.0.1") && !contains("127.0.0.0/8", "128.0.0.1"));
        assert!(contains("192.0.2.1", "192.0.2.1") && !contains("192.0.2.1", "192.0.2.2"));
        assert!(contains("0.0.0.0/0", "203.0.113.9") && !contains("0.0.0.0/0", "::1"));
        assert!(contains("::/0", "2001:db8::1") && !contains("::/0", "203.0.113.9"));
        assert!(contains("2001:db8::/33", "2001:db8:7fff::1") && !contains("2001:db8::/33", "2001:db8:8000::1"));
        assert!(contains("127.0.0.0/8", "::ffff:127.0.0.1"), "through a dual-stack listener");
        assert!(contains("::ffff:192.0.2.0/120", "192.0.2.7"));
    }

    #[test]
    fn texts() {
        for text in ["127.0.0.0/8", "::1", "2001:db8::/32", "192.0.2.1", "0.0.0.0/0", "::/0"] {
            assert_eq!(text.parse::<Network>().expect("a network").to_string(), text);
        }
        assert_eq!("192.0.2.1/32".parse::<Network>().expect("a network").to_string(), "192.0.2.1");
        let error = |text: &str| text.parse::<Network>().expect_err("no network").to_string();
        for text in ["", "/8", "127.0.0.1/", "127.0.0.1/x", "127.0.0.1/+8", "localhost", "127.0.0.0/256", "::1/8/8"] {
            assert!(error(text).contains("is not a network"), "{text}");
        }
        assert_eq!(error("127.0.0.0/33"), "\"127.0.0.0/33\" has a prefix of more than 32 bits");
        assert_eq!(error("::/129"), "\"::/129\" has a prefix of more than 128 bits");
        assert_eq!(error("127.0.0.1/8"), "\"127.0.0.1/8\" has bits behind its prefix; the network is 127.0.0.0/8");
    }
}
