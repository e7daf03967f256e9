//! Which query it was that brought down a connection. A pure state machine, one for each backend of a worker.
//!
//! Some servers close the connection on which they meet a query that they do not want. All that was in flight there is
//! *suspect* then, and asked again apart from everything else: half of it on one connection, half on another, so that each
//! death halves a group or *convicts* a query that was alone. What survives was innocent, and its connection becomes one
//! like all others.
//!
//! A client that was convicted is *marked* for a while: its queries are asked apart from the beginning, on a connection of
//! its own. So others meet its next such query no more. The same is done with messages that no server need know, and with
//! those that may not be asked twice, as they could not be saved from another's death.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use super::by_client::ByClient;
use crate::backend::pool::ConnKey;
use crate::clock::Mono;
use crate::worker::queries::QueryKey;

/// Connections that suspects are tried on at a time.
pub(crate) const AT_A_TIME: usize = 2;
/// Of these, for marked clients: their trials do not hold up those of others.
const MARKED_AT_A_TIME: usize = 1;
/// Marked clients are given no more new connections than one in this time, however many of their queries die.
const PACE: Duration = Duration::from_millis(10);
/// A trial that has lasted this much longer than twice the time in which the connection died before is over: slow names
/// would keep their place for as long as they are slow.
const SLACK: Duration = Duration::from_millis(20);
/// How long a client is marked after the last conviction.
const MARKED_FOR: Duration = Duration::from_secs(60);
/// Groups of a class that may wait before a query that comes fails, as far as it does not join one.
const MOST_FRESH: usize = 256;
/// A group that could not be tried, for want of a place under a limit, is tried again after this time, whatever happens.
const AGAIN: Duration = Duration::from_millis(20);

/// Who is in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Queries of clients that were not convicted lately.
    Clear,
    /// Queries of those that were.
    Marked,
}

/// Queries that are to be tried together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) queries: Vec<QueryKey>,
    pub(crate) class: Class,
    /// How long the connection lived on which they became suspects, after the last of them was sent.
    pub(crate) took: Duration,
    /// They came from this client and have been in no death yet: what comes from it meanwhile joins them, and the
    /// connection is for this client from then on.
    pub(crate) of: Option<IpAddr>,
}

/// A connection that suspects are on.
#[derive(Clone, Copy, Debug)]
struct Trial {
    conn: ConnKey,
    class: Class,
    took: Duration,
    /// The only client that it is for.
    of: Option<IpAddr>,
    /// When it has survived. Before it is connected: never.
    until: Mono,
}

/// A client that was convicted.
#[derive(Clone, Copy, Debug)]
struct Mark {
    until: Mono,
    took: Duration,
}

/// The suspects of one backend.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    clear: VecDeque<Group>,
    marked: VecDeque<Group>,
    trials: Vec<Trial>,
    marks: ByClient<Mark>,
    /// Before this no new connection is opened for marked clients.
    paced: Mono,
    /// When a group that could not be tried is tried again.
    again: Mono,
    /// When it was looked for something to do last.
    looked: Mono,
}

impl Suspects {
    /// How many groups wait.
    pub(crate) fn waiting(&self) -> usize {
        self.clear.len() + self.marked.len()
    }

    /// Trials that are not over.
    #[cfg(test)]
    pub(crate) fn trials(&self, now: Mono) -> usize {
        self.trials.iter().filter(|trial| now < trial.until).count()
    }

    /// A group is to be tried.
    pub(crate) fn push(&mut self, group: Group) {
        self.queue(group.class).push_back(group);
    }

    /// A query comes that may not be on a connection of others. False: too many wait already.
    pub(crate) fn push_fresh(&mut self, query: QueryKey, client: IpAddr, now: Mono) -> bool {
        let mark = self.marks.get(client).filter(|mark| now < mark.until).copied();
        let class = if mark.is_some() { Class::Marked } else { Class::Clear };
        let queue = self.queue(class);
        if let Some(group) = queue.iter_mut().find(|group| group.of == Some(client)) {
            group.queries.push(query);
            return true;
        }
        if queue.len() >= MOST_FRESH {
            return false;
        }
        let took = mark.map_or(Duration::ZERO, |mark| mark.took);
        queue.push_back(Group { queries: vec![query], class, took, of: Some(client) });
        true
    }

    /// The group whose turn it is, if there is a place for its trial: others go before marked clients.
    pub(crate) fn next(&mut self, now: Mono) -> Option<Group> {
        self.looked = now;
        let under_way = |class| self.trials.iter().filter(|trial| trial.class == class && now < trial.until).count();
        let (clear, marked) = (under_way(Class::Clear), under_way(Class::Marked));
        if clear + marked >= AT_A_TIME {
            return None;
        }
        let group = self.clear.pop_front();
        group.or_else(|| if marked < MARKED_AT_A_TIME && self.paced <= now { self.marked.pop_front() } else { None })
    }

    /// The group that [`Self::next`] gave could not be tried now: others of its class have their turn.
    pub(crate) fn put_back(&mut self, group: Group, now: Mono) {
        self.again = now.after(AGAIN);
        self.queue(group.class).push_back(group);
    }

    fn queue(&mut self, class: Class) -> &mut VecDeque<Group> {
        match class {
            Class::Clear => &mut self.clear,
            Class::Marked => &mut self.marked,
        }
    }

    /// A connection was opened for a group.
    pub(crate) fn began(&mut self, conn: ConnKey, group: &Group, now: Mono) {
        let Group { class, took, of, .. } = *group;
        self.trials.push(Trial { conn, class, took, of, until: Mono::MAX });
        if class == Class::Marked {
            self.paced = now.after(PACE);
        }
    }

    /// It is connected: what is on it reaches the backend now.
    pub(crate) fn connected(&mut self, conn: ConnKey, now: Mono) {
        if let Some(trial) = self.trials.iter_mut().find(|trial| trial.conn == conn) {
            trial.until = now.after(trial.took * 2 + SLACK);
        }
    }

    /// All that was on it is answered. True: it is a connection like all others from now on.
    pub(crate) fn survived(&mut self, conn: ConnKey) -> bool {
        let Some(at) = self.trials.iter().position(|trial| trial.conn == conn) else { return true };
        if self.trials[at].of.is_none() {
            self.trials.swap_remove(at);
            return true;
        }
        self.trials[at].until = Mono::ZERO;
        false
    }

    /// It is closed.
    pub(crate) fn closed(&mut self, conn: ConnKey) {
        self.trials.retain(|trial| trial.conn != conn);
    }

    /// Connections for this client alone that have survived.
    pub(crate) fn survivors(&self, client: IpAddr, now: Mono) -> impl Iterator<Item = ConnKey> {
        let survivors = self.trials.iter().filter(move |trial| trial.of == Some(client) && trial.until <= now);
        survivors.map(|trial| trial.conn)
    }

    /// A query of this client brought down a connection that it had for itself.
    pub(crate) fn convict(&mut self, client: IpAddr, took: Duration, now: Mono) {
        self.marks.insert(client, Mark { until: now.after(MARKED_FOR), took }, now);
    }

    /// Whether this client was convicted lately.
    pub(crate) fn is_marked(&self, client: impl FnOnce() -> IpAddr, now: Mono) -> bool {
        !self.marks.is_unused() && self.marks.get(client()).is_some_and(|mark| now < mark.until)
    }

    /// The backend is another one.
    pub(crate) fn forget_marks(&mut self) {
        self.marks = ByClient::default();
    }

    /// When there may be something to do for those that wait; none: not before something happens.
    pub(crate) fn next_deadline(&self) -> Option<Mono> {
        if self.waiting() == 0 {
            return None;
        }
        let trials = self.trials.iter().map(|trial| trial.until);
        trials.chain([self.paced, self.again]).filter(|at| *at > self.looked && *at < Mono::MAX).min()
    }

    /// What died together on a connection, as groups to be tried apart: marked clients from others, then clients from each
    /// other, then the queries of one client, the last ones from those before.
    pub(crate) fn split(&self, queries: &[(QueryKey, IpAddr)], took: Duration, now: Mono) -> [Option<Group>; 2] {
        let is_marked = |client: IpAddr| self.is_marked(|| client, now);
        let (marked, clear): (Vec<_>, Vec<_>) = queries.iter().copied().partition(|(_, client)| is_marked(*client));
        let [one, other] = if marked.is_empty() || clear.is_empty() { halves(queries) } else { [clear, marked] };
        let group = |half: Vec<(QueryKey, IpAddr)>| {
            let class = match half.first() {
                Some((_, client)) if is_marked(*client) => Class::Marked,
                Some(_) => Class::Clear,
                None => return None,
            };
            let queries = half.into_iter().map(|(query, _)| query).collect();
            Some(Group { queries, class, took, of: None })
        };
        [group(one), group(other)]
    }
}

/// Two halves: each has half of the clients, or, if there is but one, half of its queries. The second one is empty if there
/// is but one query.
fn halves(queries: &[(QueryKey, IpAddr)]) -> [Vec<(QueryKey, IpAddr)>; 2] {
    let mut clients: Vec<IpAddr> = queries.iter().map(|(_, client)| *client).collect();
    clients.sort_unstable();
    clients.dedup();
    match clients.get(clients.len() / 2).filter(|_| clients.len() > 1) {
        Some(middle) => queries.iter().partition(|(_, client)| client < middle).into(),
        None => {
            let (one, other) = queries.split_at(queries.len().div_ceil(2));
            [one.to_vec(), other.to_vec()]
        }
    }
}

#[cfg(test)]
#[path = "suspects_tests.rs"]
mod tests;
