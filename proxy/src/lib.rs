//! Counterfoil.
#![deny(unsafe_code)]

pub mod clock;
pub mod close;
pub mod control;
pub mod ledger;
pub mod stats;
