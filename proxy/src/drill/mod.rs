//! Drills: one bounded, labelled leak of a class in the running process, to prove that detection, alarm and reaping work.
//!
//! This module alone may break I1 and I2, on purpose. Its peer is a listener inside the process, its shard is the
//! ledger's last one, and nothing in the watchdog knows that a socket is a drill's: its backend is one more backend,
//! whose timeouts happen to be short. Whatever happens, the leak ends with its [`Leak`](leak::Leak) value.

mod client;
mod follow;
mod holder;
mod leak;

use std::cell::Cell;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::sync::mpsc::UnboundedReceiver;

pub use client::client;
pub(crate) use client::{SILENCE, request};
pub(crate) use follow::Drill;

use crate::control::Control;
use crate::metrics::Metrics;
use crate::watchdog::{Handle, Live};
use holder::Holder;

/// Drills at once, each with one connection.
pub(crate) const AT_ONCE: usize = 32;

/// Which leak is asked for.
#[derive(Clone, Debug, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// orphan, ghost, zombie, hoard, stuck, embryo or lingering.
    pub class: String,
    /// Its owner does nothing when the reaper asks it to close: shutdown(2) and SOCK_DESTROY have to do.
    #[arg(long)]
    #[serde(default)]
    pub deaf: bool,
}

/// What drills need from the start of the process: their peer's listener, and the requests to the owner of their shard.
#[derive(Debug)]
pub struct Setup {
    listener: TcpListener,
    controls: UnboundedReceiver<Control>,
}

impl Setup {
    /// Binds the peer's listener to a free port of 127.0.0.1. `controls` receives for the ledger's last shard.
    ///
    /// # Errors
    /// No port can be bound.
    pub fn bind(controls: UnboundedReceiver<Control>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, controls })
    }

    /// Where the peer listens. It is the last backend of the policy, and one of the kernel view's listeners.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Takes the drill's shard and begins to answer requests to its owner. On a `LocalSet` only.
    pub(crate) fn start(self, live: Live, watchdog: Handle, metrics: Arc<Metrics>) -> io::Result<Rc<Drill>> {
        let address = self.address()?;
        let listener = Mutex::new(tokio::net::TcpListener::from_std(self.listener)?);
        let observed = live.now();
        let shard = observed.ledger.shards().saturating_sub(1);
        let writer = observed
            .ledger
            .writer(shard)
            .ok_or_else(|| io::Error::other(format!("the ledger's shard {shard} has an owner already")))?;
        let holder = Rc::new(Holder::default());
        tokio::task::spawn_local(Rc::clone(&holder).answer(self.controls));
        let backend = observed.policy.drill();
        let site = leak::Site { listener, address, writer, backend, holder };
        Ok(Rc::new(Drill { live, watchdog, metrics, site, running: Cell::new(0) }))
    }
}
