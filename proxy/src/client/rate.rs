//! How often a client connects, and who has done so too often. A pure state machine (I13) of bounded size.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::clock::Mono;

/// Clients that are remembered, in each of the two tables: 6 MiB when both are full.
pub const MAX_REMEMBERED: usize = 1 << 16;

/// A second, in which connections are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// Whether a client may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Welcome,
    /// This is one too many in this second: it is banned from now on.
    TooOften,
    /// It was banned before.
    Banned,
}

/// The connections of the current second, and the bans.
#[derive(Debug)]
pub struct Rates {
    /// Connections per second, never 0.
    limit: u32,
    ban: Duration,
    since: Mono,
    counts: HashMap<IpAddr, u32, foldhash::fast::RandomState>,
    /// Until when.
    bans: HashMap<IpAddr, Mono, foldhash::fast::RandomState>,
    /// Bans in the order of their ends, as all last equally long.
    ends: VecDeque<(Mono, IpAddr)>,
}

impl Rates {
    /// At most `limit` connections per second; who exceeds that is banned for this long.
    pub fn new(limit: u32, ban: Duration) -> Self {
        Self {
            limit,
            ban,
            since: Mono::ZERO,
            counts: HashMap::default(),
            bans: HashMap::default(),
            ends: VecDeque::new(),
        }
    }

    /// Whether these are its limit and the length of its bans.
    pub fn is(&self, limit: u32, ban: Duration) -> bool {
        (self.limit, self.ban) == (limit, ban)
    }

    /// A client connects.
    pub fn connects(&mut self, client: IpAddr, now: Mono) -> Verdict {
        while let Some((end, banned)) = self.ends.front().copied().filter(|(end, _)| *end <= now) {
            self.ends.pop_front();
            if self.bans.get(&banned) == Some(&end) {
                self.bans.remove(&banned);
            }
        }
        if self.bans.contains_key(&client) {
            return Verdict::Banned;
        }
        if now.since(self.since) >= WINDOW {
            self.since = now;
            self.counts.clear();
        }
        if self.counts.len() >= MAX_REMEMBERED && !self.counts.contains_key(&client) {
            // More clients within a second than are counted: the total limit and theirs hold all the same.
            return Verdict::Welcome;
        }
        let count = self.counts.entry(client).or_default();
        *count = count.saturating_add(1);
        if *count <= self.limit {
            return Verdict::Welcome;
        }
        if !self.ban.is_zero() {
            self.counts.remove(&client);
            self.ban(client, now);
        }
        Verdict::TooOften
    }

    fn ban(&mut self, client: IpAddr, now: Mono) {
        if self.bans.len() >= MAX_REMEMBERED
            && let Some((_, first)) = self.ends.pop_front()
        {
            // The one that would have ended first.
            self.bans.remove(&first);
        }
        let end = now.after(self.ban);
        self.bans.insert(client, end);
        self.ends.push_back((end, client));
    }

    /// Clients that are banned, as far as it has been noticed that a ban is over.
    pub fn banned(&self) -> usize {
        self.bans.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAN: Duration = Duration::from_secs(10);

    fn at(millis: u64) -> Mono {
        Mono(1_000_000_000).after(Duration::from_millis(millis))
    }

    fn client(n: u32) -> IpAddr {
        IpAddr::from(n.to_be_bytes())
    }

    #[test]
    fn the_limit_is_per_second_and_client() {
        let mut rates = Rates::new(3, BAN);
        for millis in [0, 10, 20] {
            assert_eq!(rates.connects(client(1), at(millis)), Verdict::Welcome);
        }
        assert_eq!(rates.connects(client(2), at(30)), Verdict::Welcome);
        for millis in [1000, 1400, 1999] {
            assert_eq!(rates.connects(client(1), at(millis)), Verdict::Welcome, "the next second");
        }
        assert_eq!(rates.connects(client(1), at(1999)), Verdict::TooOften);
        assert_eq!(rates.connects(client(2), at(1999)), Verdict::Welcome);
    }

    #[test]
    fn a_ban_ends_after_its_time_however_often_the_client_tries() {
        let mut rates = Rates::new(1, BAN);
        assert_eq!(rates.connects(client(1), at(0)), Verdict::Welcome);
        assert_eq!(rates.connects(client(1), at(1)), Verdict::TooOften);
        for millis in (100..10_000).step_by(100) {
            assert_eq!(rates.connects(client(1), at(millis)), Verdict::Banned);
        }
        assert_eq!(rates.banned(), 1);
        assert_eq!(rates.connects(client(1), at(10_001)), Verdict::Welcome);
        assert_eq!((rates.banned(), rates.ends.len()), (0, 0));
    }

    #[test]
    fn a_ban_of_no_time_refuses_the_rest_of_the_burst_only() {
        let mut rates = Rates::new(2, Duration::ZERO);
        let mut verdict = |millis| rates.connects(client(1), at(millis));
        assert_eq!([verdict(0), verdict(1), verdict(2)], [Verdict::Welcome, Verdict::Welcome, Verdict::TooOften]);
        assert_eq!(verdict(3), Verdict::TooOften);
        assert_eq!(verdict(1000), Verdict::Welcome);
    }

    #[test]
    fn neither_table_grows_beyond_its_bound() {
        let most = MAX_REMEMBERED as u32;
        let mut rates = Rates::new(1, Duration::from_secs(3600));
        for n in 0..most + 1000 {
            assert_eq!(rates.connects(client(n), at(0)), Verdict::Welcome);
        }
        assert_eq!(rates.counts.len(), MAX_REMEMBERED);
        // Ban more than fit, second by second.
        for n in 0..most + 1000 {
            let now = at(2000 + u64::from(n) * 1000);
            rates.connects(client(n), now);
            rates.connects(client(n), now);
            if n == 10 {
                assert_eq!(rates.banned(), 11);
            }
        }
        assert!(rates.banned() <= MAX_REMEMBERED && rates.ends.len() <= MAX_REMEMBERED);
        assert!(rates.counts.len() <= 1);
    }

    #[test]
    fn when_there_are_too_many_bans_the_first_ends_early() {
        let most = MAX_REMEMBERED as u32;
        let mut rates = Rates::new(1, BAN);
        for n in 0..=most {
            rates.connects(client(n), at(0));
            rates.connects(client(n), at(0));
        }
        assert_eq!((rates.banned(), rates.ends.len()), (MAX_REMEMBERED, MAX_REMEMBERED));
        assert_eq!(rates.connects(client(0), at(1)), Verdict::Welcome);
        assert_eq!(rates.connects(client(1), at(1)), Verdict::Banned);
        assert_eq!(rates.connects(client(most), at(1)), Verdict::Banned);
    }
}
