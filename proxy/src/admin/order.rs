//! `ctl reap`: one reaping on an operator's order, followed to its end.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, sleep, timeout};

use super::{Served, show};
use crate::clock;
use crate::watchdog::Outcome;

/// For the watchdog's thread to take the order; it may be in the middle of a sweep.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longer than a reaping can last: [`GIVE_UP`](crate::watchdog::ladder::GIVE_UP) and all rungs.
const END: Duration = Duration::from_secs(45);

/// Between two looks at the watchdog's report.
const LOOK: Duration = Duration::from_millis(50);

/// Orders it and sends its events, the last one is `done`. If the client goes, the reaping goes on.
pub(super) async fn reap(cookie: u64, served: &Served, events: &UnboundedSender<Value>) {
    let done = |ok: bool, message: String| {
        // The client is gone: then nobody needs to know.
        let _ = events.send(json!({"event": "done", "ok": ok, "message": message}));
    };
    let ordered = match timeout(PATIENCE, served.watchdog.order(cookie)).await {
        Ok(Ok(Ok(ordered))) => ordered,
        Ok(Ok(Err(refused))) => return done(false, format!("not reaped: {refused}")),
        Ok(Err(_)) | Err(_) => return done(false, "the watchdog does not answer".to_owned()),
    };
    let finding = &ordered.finding;
    let _ = events.send(json!({
        "event": "ordered",
        "cookie": cookie,
        "class": finding.class.name(),
        "evidence": finding.evidence(clock::now()),
    }));
    let deadline = Instant::now() + END;
    let record = loop {
        let report = served.watchdog.report();
        let found =
            report.recent.iter().rev().find(|record| record.cookie == cookie && record.serial >= ordered.serial);
        if let Some(record) = found {
            break record.clone();
        }
        if Instant::now() >= deadline {
            return done(false, format!("the reaping has not ended within {END:?}"));
        }
        sleep(LOOK).await;
    };
    let _ = events.send(show::reaped(&record, &served.live.now()));
    match record.outcome {
        Some(outcome @ (Outcome::Released | Outcome::Severed)) => done(true, outcome.label().to_owned()),
        Some(outcome) => done(false, format!("{}: {}", outcome.label(), record.note)),
        None => done(false, format!("withdrawn: {}", record.note)),
    }
}
