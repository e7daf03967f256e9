//! Towards the backends: the pool of connections, the table of queries in flight on each, and the task of each.

pub mod choose;
pub mod concurrency;
pub(crate) mod conn;
mod conn_tls;
pub(crate) mod connect;
pub mod history;
pub mod pending;
pub mod pool;
pub mod tls;
pub mod wait;
