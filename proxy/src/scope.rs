//! IPv6 addresses with a zone: `[fe80::1%eth0]:53`, by the interface's name or number (RFC 4007 section 11.2). An address of
//! one link says nothing without it.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use thiserror::Error;

/// A text that is no address that can be used here.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ScopeError {
    /// No address, or no port where there must be one.
    #[error("not an address")]
    Syntax,
    /// The zone is none of this host's interfaces.
    #[error("there is no interface `{0}` here; `ip link` lists them")]
    NoInterface(String),
    /// An address that means another host on each link.
    #[error("{0} is an address of one link only: name the interface, as in {0}%eth0")]
    NoZone(Ipv6Addr),
    /// A zone on an address that is the same on all links.
    #[error("{0} is not a link-local address: leave out the zone")]
    NotLinkLocal(IpAddr),
}

/// Reads an address with a port.
///
/// # Errors
/// It is none, or not without its zone, or its zone is not here.
pub fn socket_address(text: &str) -> Result<SocketAddr, ScopeError> {
    let Some((before, rest)) = text.split_once('%') else {
        return checked(text.parse().map_err(|_| ScopeError::Syntax)?);
    };
    let (zone, after) = rest.split_once(']').ok_or(ScopeError::Syntax)?;
    let address: SocketAddr = format!("{before}]{after}").parse().map_err(|_| ScopeError::Syntax)?;
    with_zone(address, zone)
}

/// Reads an address; the port of the result is 0.
///
/// # Errors
/// It is none, or not without its zone, or its zone is not here.
pub fn ip_address(text: &str) -> Result<SocketAddr, ScopeError> {
    let ip = |text: &str| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, 0)).map_err(|_| ScopeError::Syntax);
    match text.split_once('%') {
        None => checked(ip(text)?),
        Some((address, zone)) => with_zone(ip(address)?, zone),
    }
}

/// An address that needs no zone.
fn checked(address: SocketAddr) -> Result<SocketAddr, ScopeError> {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => Err(ScopeError::NoZone(*v6.ip())),
        address => Ok(address),
    }
}

fn with_zone(address: SocketAddr, zone: &str) -> Result<SocketAddr, ScopeError> {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
            let index = interface(zone).ok_or_else(|| ScopeError::NoInterface(zone.to_owned()))?;
            Ok(SocketAddr::V6(SocketAddrV6::new(*v6.ip(), v6.port(), 0, index)))
        }
        address => Err(ScopeError::NotLinkLocal(address.ip())),
    }
}

/// The number of this interface, which is given by its name, or by its number.
fn interface(zone: &str) -> Option<u32> {
    let by_number = zone.parse().ok().filter(|index| *index != 0 && name_of(*index).is_some());
    by_number.or_else(|| netdevice::name_to_index(kernel()?, zone).ok())
}

/// The name of the interface with this number.
fn name_of(index: u32) -> Option<String> {
    netdevice::index_to_name(kernel()?, index).ok()
}

/// Any socket: the kernel answers questions about interfaces on it.
#[expect(clippy::disallowed_methods, reason = "it is never connected")]
fn kernel() -> Option<OwnedFd> {
    socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()
}

/// An address with a port as a configuration has it: with its zone by name.
#[derive(Clone, Copy, Debug)]
pub struct WithZone(pub SocketAddr);

impl fmt::Display for WithZone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match zone_of(self.0) {
            Some(zone) => write!(f, "[{}%{zone}]:{}", self.0.ip(), self.0.port()),
            None => self.0.fmt(f),
        }
    }
}

/// The same without the port.
#[derive(Clone, Copy, Debug)]
pub struct IpWithZone(pub SocketAddr);

impl fmt::Display for IpWithZone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match zone_of(self.0) {
            Some(zone) => write!(f, "{}%{zone}", self.0.ip()),
            None => self.0.ip().fmt(f),
        }
    }
}

/// By name; by number if the interface is gone.
fn zone_of(address: SocketAddr) -> Option<String> {
    match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => {
            Some(name_of(v6.scope_id()).unwrap_or_else(|| v6.scope_id().to_string()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn addresses_with_and_without_zones() {
        // The loopback interface is there in every network namespace.
        let index = interface("lo").unwrap();
        let expected = SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, index));
        for text in ["[fe80::1%lo]:53".to_owned(), format!("[fe80::1%{index}]:53")] {
            let address = socket_address(&text).unwrap();
            assert_eq!(address, expected);
            assert_eq!(WithZone(address).to_string(), "[fe80::1%lo]:53");
        }
        let ip = ip_address("fe80::1%lo").unwrap();
        assert_eq!((ip.ip(), ip.port(), IpWithZone(ip).to_string()), (expected.ip(), 0, "fe80::1%lo".to_owned()));
        for text in ["127.0.0.1:53", "[::1]:53", "[2001:db8::1]:853", "0.0.0.0:0"] {
            assert_eq!(WithZone(socket_address(text).unwrap()).to_string(), text);
        }
        assert_eq!(IpWithZone(ip_address("192.0.2.1").unwrap()).to_string(), "192.0.2.1");
        // One that went away is shown by its number.
        let gone = SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, u32::MAX >> 1));
        assert_eq!(WithZone(gone).to_string(), format!("[fe80::1%{}]:53", u32::MAX >> 1));
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let error = |text: &str| socket_address(text).unwrap_err().to_string();
        for text in
            ["", "%", "[fe80::1%lo:53", "fe80::1%lo", "[fe80::1%lo]", "[fe80::1%lo]53", "[x%lo]:53", "localhost:53"]
        {
            assert_eq!(error(text), "not an address", "{text}");
        }
        for zone in ["nosuch0", "", "4294967295", "0", "a-name-longer-than-any-interface-has", "lo\0"] {
            let said = format!("there is no interface `{zone}` here; `ip link` lists them");
            assert_eq!(error(&format!("[fe80::1%{zone}]:53")), said);
            assert_eq!(ip_address(&format!("fe80::1%{zone}")).unwrap_err().to_string(), said);
        }
        assert_eq!(
            error("[fe80::1]:53"),
            "fe80::1 is an address of one link only: name the interface, as in fe80::1%eth0"
        );
        assert_eq!(error("[::1%lo]:53"), "::1 is not a link-local address: leave out the zone");
        assert_eq!(error("[2001:db8::1%lo]:53"), "2001:db8::1 is not a link-local address: leave out the zone");
        assert_eq!(
            ip_address("192.0.2.1%lo").unwrap_err().to_string(),
            "192.0.2.1 is not a link-local address: leave out the zone"
        );
    }
}
