//! `ctl reload`: the configuration is read again, as SIGHUP has it, and the answer is what came of it.

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::Served;
use crate::app::order::Order;

/// Orders it and sends its events, the last one is `done`.
pub(super) async fn reload(served: &Served, events: &UnboundedSender<Value>) {
    // A client that is gone needs to know nothing.
    let send = |event| drop(events.send(event));
    let done = |ok: bool, message: &str| send(json!({"event": "done", "ok": ok, "message": message}));
    let (answer, reloaded) = oneshot::channel();
    served.orders.give(Order::Reload(answer));
    match reloaded.await {
        Ok(Ok(notes)) => {
            notes.iter().for_each(|note| send(json!({"event": "note", "message": note})));
            done(true, "reloaded");
        }
        Ok(Err(errors)) => {
            errors.iter().for_each(|error| send(json!({"event": "error", "message": error})));
            done(false, "refused, nothing is changed");
        }
        Err(_) => done(false, "the process is about to end"),
    }
}
