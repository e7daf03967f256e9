//! Real servers from Debian's packages, each with the smallest configuration that shows what a scenario needs.
//!
//! Knot and PowerDNS are primaries of the zone in `zone.rs`; the others are authoritative for `example.test` (any name
//! below it has an address). All listen on a port of 127.0.0.1 that the kernel chose, and demand PROXY v2 where they are
//! backends and can.

mod alertmanager;
mod dnsdist;
mod haproxy;
mod knot;
mod powerdns;
mod prometheus;
mod recursor;
mod unbound;

pub use alertmanager::{Alertmanager, Notified, Webhook};
pub use dnsdist::{DotFront, LeakyFront, SerialFront, TlvOracle, Told};
pub use haproxy::Haproxy;
pub use knot::Knot;
pub use powerdns::PowerDns;
pub use prometheus::Prometheus;
pub use recursor::{Recursor, Seen};
pub use unbound::Unbound;

use std::net::{Ipv4Addr, SocketAddr};

/// The zone that all servers know.
pub const ZONE: &str = "example.test";

/// The address of every name in [`ZONE`].
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}
