//! Towards the clients: accepting, the limits on them, and the task of each connection.

pub(crate) mod accept;
pub(crate) mod farewell;
pub mod limits;
pub mod session;
pub(crate) mod task;
