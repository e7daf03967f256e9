//! What `counterfoil ctl show` is answered with: a fresh reading of both halves, and the watchdog's last report.
//!
//! A reply is bounded: lists that grow with the number of sockets come in pages of [`PAGE`], each from a reading of its
//! own. Nothing here touches a worker: the watchdog's thread reads, this one formats.

mod backends;
mod clients;
mod connections;
mod leaks;
mod tlvs;
mod view;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::timeout;

use super::Served;
use crate::clock::{self, Mono};
use crate::watchdog::{Look, Observed};

pub(super) use leaks::reaped;

/// Objects in one reply.
const PAGE: usize = 500;

/// For the watchdog's thread to read both halves; it may be in the middle of a sweep.
const PATIENCE: Duration = Duration::from_secs(10);

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum What {
    /// Per backend, the ledger beside the kernel.
    Backends,
    /// The join, socket by socket.
    Connections,
    /// Who owns connections.
    Clients,
    /// Headers and the types of their TLVs.
    Tlvs,
    /// What is wrong now.
    Findings,
    /// What was reaped lately.
    Reaps,
    /// The kernel view and the watchdog.
    View,
}

impl What {
    /// As it is asked for.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Backends => "backends",
            Self::Connections => "connections",
            Self::Clients => "clients",
            Self::Tlvs => "tlvs",
            Self::Findings => "findings",
            Self::Reaps => "reaps",
            Self::View => "view",
        }
    }
}

/// A part of a list.
#[derive(Debug, Default)]
struct Page {
    rows: Vec<Value>,
    /// Where the next page begins: behind this key. None: this is the last one.
    next: Option<u64>,
}

impl Page {
    /// One object, which cannot fail: these are plain structs with text keys.
    fn push(&mut self, row: impl Serialize) {
        self.rows.extend(serde_json::to_value(row).ok());
    }

    /// Whether one more would be too many; then the list goes on behind `last`.
    fn is_full(&mut self, last: u64) -> bool {
        let full = self.rows.len() >= PAGE;
        if full {
            self.next = Some(last);
        }
        full
    }
}

/// What the rows are made from.
struct Context<'a> {
    look: &'a Look,
    observed: &'a Observed,
    now: Mono,
}

impl Context<'_> {
    /// Seconds since then.
    fn ago(&self, at: Mono) -> f64 {
        seconds(self.now.since(at))
    }

    fn label(&self, backend: Option<u16>) -> String {
        self.observed.policy.label(backend).to_owned()
    }
}

/// Seconds, to the millisecond.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}

/// A header's digest as text; none: no header.
fn digest(header: u64) -> Option<String> {
    (header != 0).then(|| format!("{header:016x}"))
}

/// Sends one page, and `done` with what the reader has to know of the whole.
pub(super) async fn show(what: What, after: u64, served: &Served, events: &UnboundedSender<Value>) {
    let send = |event: Value| {
        // The client is gone: then nobody needs to know.
        let _ = events.send(event);
    };
    let look = match timeout(PATIENCE, served.watchdog.look()).await {
        Ok(Ok(look)) => look,
        Ok(Err(_)) | Err(_) => {
            return send(json!({"event": "done", "ok": false, "message": "the watchdog does not answer"}));
        }
    };
    let context = Context { look: &look, observed: &served.live.now(), now: clock::now() };
    let page = page(what, after, &context);
    page.rows.into_iter().for_each(send);
    let uncertain = match &look.kernel {
        Ok(kernel) => kernel.uncertain.clone(),
        Err(error) => Some(error.clone()),
    };
    send(json!({
        "event": "done",
        "ok": true,
        "message": "",
        "next": page.next,
        "source": look.report.source.as_str(),
        "uncertain": uncertain,
    }));
}

fn page(what: What, after: u64, context: &Context<'_>) -> Page {
    match what {
        What::Backends => backends::page(context),
        What::Connections => connections::page(context, after),
        What::Clients => clients::page(context, after),
        What::Tlvs => tlvs::page(context),
        What::Findings => leaks::findings(context, after),
        What::Reaps => leaks::reaps(context, after),
        What::View => view::page(context),
    }
}

#[cfg(test)]
#[path = "show_tests.rs"]
mod tests;
