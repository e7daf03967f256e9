//! `/readyz`: whether clients are served, and which of them would be served by nobody.
//!
//! A pool that is down is no reason to take the others out of a load balancer: the process is ready while one listener can
//! be served. Who asks for one listener or one pool (`?listener=NAME`, `?pool=NAME`) hears of that one.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use axum::http::{StatusCode, Uri};

use crate::config::Pool;
use crate::watchdog::Observed;

/// Of whom the question is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked<'a> {
    All,
    Listener(&'a str),
    Pool(&'a str),
}

impl<'a> Asked<'a> {
    /// None: the query says something else. Names need no percent-encoding (RFC 3986 section 2.3).
    fn read(uri: &'a Uri) -> Option<Self> {
        match uri.query().map(|query| query.split_once('=')) {
            None => Some(Self::All),
            Some(Some(("listener", name))) => Some(Self::Listener(name)),
            Some(Some(("pool", name))) => Some(Self::Pool(name)),
            Some(_) => None,
        }
    }
}

/// The answer to a request for `/readyz`.
pub(super) fn ready(observed: &Observed, uri: &Uri) -> (StatusCode, String) {
    let Some(asked) = Asked::read(uri) else {
        return (StatusCode::BAD_REQUEST, "the only parameters are listener=NAME or pool=NAME\n".to_owned());
    };
    let config = &observed.config;
    let up = |pool: &Pool| observed.is_up(pool);
    let listeners = || config.listeners.iter().filter_map(|it| Some((it.name.as_str(), config.pools.get(it.pool)?)));
    let (ready, lines): (bool, Vec<String>) = match asked {
        Asked::All => {
            let cut_off = listeners().filter(|(_, pool)| !up(pool)).map(|(name, pool)| listener_line(name, &pool.name));
            let dead = config.pools.iter().filter(|pool| !up(pool)).map(|pool| pool_line(&pool.name));
            (listeners().any(|(_, pool)| up(pool)), cut_off.chain(dead).collect())
        }
        Asked::Listener(name) => match listeners().find(|(listener, _)| *listener == name) {
            None => return (StatusCode::NOT_FOUND, "there is no listener of this name\n".to_owned()),
            Some((_, pool)) if up(pool) => (true, Vec::new()),
            Some((name, pool)) => (false, vec![listener_line(name, &pool.name), pool_line(&pool.name)]),
        },
        Asked::Pool(name) => match config.pools.iter().find(|pool| pool.name == name) {
            None => return (StatusCode::NOT_FOUND, "there is no pool of this name\n".to_owned()),
            Some(pool) if up(pool) => (true, Vec::new()),
            Some(pool) => (false, vec![pool_line(&pool.name)]),
        },
    };
    if !observed.serving.load(Ordering::Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, "not serving\n".to_owned());
    }
    let mut body = if ready { "ready\n" } else { "not ready\n" }.to_owned();
    for line in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(body, "{line}");
    }
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body)
}

fn listener_line(listener: &str, pool: &str) -> String {
    format!("listener {listener}: cannot be served, its pool is {pool}")
}

fn pool_line(pool: &str) -> String {
    format!("pool {pool}: no backend is known to be up")
}
