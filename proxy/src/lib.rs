//! Counterfoil.
#![deny(unsafe_code)]
// They panic when their reader is gone: stdout.rs and the log do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod admin;
pub mod app;
pub mod backend;
#[cfg(feature = "test-hooks")]
pub mod churn;
pub mod cli;
pub mod client;
pub mod clock;
pub mod close;
pub mod config;
pub mod control;
pub mod ctl;
pub mod demo;
pub mod distinct;
pub mod dns;
pub mod drill;
pub mod file;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod health;
pub mod kernel;
pub mod ledger;
pub mod logging;
pub mod metrics;
pub mod privilege;
pub mod proxy_protocol;
pub mod query;
pub mod responder;
pub mod scope;
pub mod stats;
mod stderr;
mod stdout;
pub mod systemd;
pub mod table;
mod tcp;
pub mod tls;
pub mod watch;
pub mod watchdog;
pub mod worker;
