//! `ctl drain`: the end of the process, followed until every worker has ended.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::sleep;

use super::Served;
use crate::app::order::Order;
use crate::stats::Tally;

/// Between two events.
const PROGRESS: Duration = Duration::from_secs(1);

/// Orders it and sends its events, the last one is `done`. If the client goes, the draining goes on.
pub(super) async fn drain(served: &Served, events: &UnboundedSender<Value>) {
    // A client that is gone needs to know nothing.
    let send = |event| drop(events.send(event));
    let done = |ok: bool, message: &str| send(json!({"event": "done", "ok": ok, "message": message}));
    let mut orders = served.orders.clone();
    if !orders.give(Order::Drain) {
        return done(false, "the process is about to end already");
    }
    loop {
        let Tally { clients, queries } = Tally::of(&served.live.now().stats);
        send(json!({"event": "draining", "client_connections": clients, "queries_in_flight": queries}));
        tokio::select! {
            () = sleep(PROGRESS) => {}
            drained = orders.drained() => {
                return if drained { done(true, "drained") } else { done(false, "it ended before it was drained") };
            }
        }
    }
}
