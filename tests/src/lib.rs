//! Harness of the end-to-end scenarios: real processes, real sockets, and the kernel's own word on them.
//!
//! A scenario starts servers ([`servers`]), Counterfoil ([`counterfoil`]) or a scripted peer ([`fake_backend`]), drives
//! queries through it ([`driver`]), watches the sockets from outside ([`sockets`]) and reads the metrics
//! ([`metrics`]). Everything that was started is stopped by process id when its value is dropped; nothing waits for
//! a fixed time: a wait is for a condition, with a deadline, and a missed deadline panics with the captured log.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a harness reports by panicking, as its callers are tests"
)]

pub mod certificates;
pub mod config;
pub mod counterfoil;
pub mod documents;
pub mod drill;
pub mod driver;
pub mod failing;
pub mod fake_backend;
pub mod holding;
pub mod http;
pub mod isolation;
pub mod load;
pub mod message;
pub mod metrics;
pub mod netem;
pub mod netlink;
pub mod netns;
pub mod process;
pub mod proxy_header;
pub mod reuse;
pub mod servers;
pub mod snmp;
pub mod sockets;
pub mod stepping;
pub mod tempdir;
pub mod troubles;
pub mod wait;
pub mod watch;
pub mod zone;
