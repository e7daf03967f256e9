//! DNS messages as the forwarder needs them: framing, a peek at header and question, and the program's own answers.
//!
//! [`frame`], [`message`], [`rtype`] and [`transfer`] are the hot path: no allocation, no panic, no copy. They read only what the
//! forwarder must know and leave the rest of a message unread, so that it passes unchanged.
//! [`hop`] alone changes messages, where it was asked to, and then nothing but two options.
//! [`synth`] makes the answers that the program gives itself.

pub mod frame;
pub(crate) mod hop;
pub mod message;
pub mod name;
mod opt;
pub(crate) mod records;
pub mod rtype;
pub mod synth;
pub mod transfer;
