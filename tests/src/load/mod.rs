//! Load tools of the benchmarks: a load generator, a backend that answers at once, and the byte relay that is the floor
//! every proxy is measured against. Each is one binary (`loadgen`, `answerer`, `relay`) around a module of this one.
//!
//! They share nothing with the program under test: framing, PROXY headers and messages are made and checked here by
//! other code, so that an error of the one is not hidden by the same error in the other.

pub mod answerer;
pub mod attacker;
pub mod certificate;
pub mod histogram;
pub mod message;
pub mod poll;
pub mod proxy_header;
pub mod relay;
pub mod slots;
pub mod stream;
pub mod tls;
pub mod tool;

pub mod generator;
