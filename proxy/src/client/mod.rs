//! Towards the clients: accepting, who they are behind a PROXY header, the limits on them, and the task of each connection.

pub(crate) mod accept;
pub(crate) mod farewell;
pub mod handshake;
mod introduction;
pub mod limits;
pub mod preface;
pub mod rate;
pub mod session;
pub mod shares;
mod socket;
pub(crate) mod task;
