//! Which backend of a pool a query goes to (`pool.policy`). A pure function of what is known of the backends and of
//! whose turn it is; it allocates nothing.
//!
//! The backend is chosen first and the connection looked for there, as dnsdist and HAProxy do: a policy that followed
//! the open connections would leave a backend that has come back without queries, and break `consistent-hash`. Owned
//! connections are the exception, like `option prefer-last-server` of HAProxy: they serve one client connection, so a
//! client whose queries went to every backend in turn would own as many connections as there are backends for each of
//! its headers. Under the policies that do not name one certain backend it keeps those that it has.

use crate::config::Policy;

/// Queries outstanding that a client's own connection may cost before `least-outstanding` has it open another one
/// elsewhere, beyond twice those of the backend that has the fewest.
const SLACK: u64 = 16;

/// What is known of one backend when a query needs one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// `pool.backend.weight`, 1 or more.
    pub weight: u32,
    /// Queries that it has not answered.
    pub outstanding: usize,
    /// Only those with the lowest rank are chosen from. None: not to be used at all.
    pub rank: Option<u8>,
    /// [`digest`] of its name: where `consistent-hash` puts it, whatever its place in the file.
    pub name: u64,
}

/// The policy of one pool, and whose turn it is.
#[derive(Debug)]
pub struct Chooser {
    policy: Policy,
    /// Of equals the first from here on is taken.
    turn: usize,
    /// What each backend has coming to it under `round-robin`.
    credit: Box<[i64]>,
}

impl Chooser {
    /// For a pool of so many backends.
    pub fn new(policy: Policy, backends: usize) -> Self {
        Self { policy, turn: 0, credit: vec![0; backends].into() }
    }

    /// Whether a client may stay with the backend that it owns a connection to: see [`Self::keeps`].
    pub fn is_sticky(&self) -> bool {
        matches!(self.policy, Policy::LeastOutstanding | Policy::RoundRobin | Policy::WeightedRandom)
    }

    /// Whether [`Self::choose`] looks at the question.
    pub fn needs_question(&self) -> bool {
        self.policy == Policy::ConsistentHash
    }

    /// The backend for a query. `of` tells what is known of each, `question` is the [`digest`] of its name.
    pub fn choose(
        &mut self,
        of: impl Fn(usize) -> Candidate,
        question: u64,
        random: &mut fastrand::Rng,
    ) -> Option<usize> {
        let count = self.credit.len();
        if count == 1 {
            return of(0).rank.map(|_| 0);
        }
        let best = best_rank(count, &of)?;
        let eligible = || (0..count).map(|at| (at, of(at))).filter(|(_, candidate)| candidate.rank == Some(best));
        match self.policy {
            Policy::FirstAvailable => eligible().next().map(|(at, _)| at),
            Policy::LeastOutstanding => {
                let turn = self.turn;
                let (later, earlier) =
                    (eligible().filter(move |(at, _)| *at >= turn), eligible().filter(move |(at, _)| *at < turn));
                let mut chosen: Option<(usize, Candidate)> = None;
                for (at, candidate) in later.chain(earlier) {
                    if chosen.is_none_or(|(_, chosen)| load(&candidate, &chosen) < load(&chosen, &candidate)) {
                        chosen = Some((at, candidate));
                    }
                }
                let (at, _) = chosen?;
                self.turn = at + 1;
                Some(at)
            }
            Policy::RoundRobin => {
                // Smooth weighted round-robin: in a row as long as the sum of all weights each comes as often as its
                // weight says, spread evenly.
                let mut total = 0;
                let mut chosen: Option<usize> = None;
                for (at, candidate) in eligible() {
                    self.credit[at] += i64::from(candidate.weight);
                    total += i64::from(candidate.weight);
                    if chosen.is_none_or(|chosen| self.credit[at] > self.credit[chosen]) {
                        chosen = Some(at);
                    }
                }
                self.credit[chosen?] -= total;
                chosen
            }
            Policy::WeightedRandom => {
                let total: u64 = eligible().map(|(_, candidate)| u64::from(candidate.weight)).sum();
                let mut point = random.u64(0..total.max(1));
                let mut weighed = eligible();
                weighed.find_map(|(at, candidate)| {
                    let weight = u64::from(candidate.weight);
                    if point < weight {
                        return Some(at);
                    }
                    point -= weight;
                    None
                })
            }
            Policy::ConsistentHash => {
                let scored = eligible().map(|(at, candidate)| (at, score(&candidate, question)));
                scored.max_by(|(_, one), (_, other)| one.total_cmp(other)).map(|(at, _)| at)
            }
        }
    }

    /// Whether a client that owns a connection to this backend stays there.
    pub fn keeps(&self, at: usize, of: impl Fn(usize) -> Candidate) -> bool {
        let count = self.credit.len();
        let (own, best) = (of(at), best_rank(count, &of));
        if own.rank.is_none() || own.rank != best {
            return false;
        }
        match self.policy {
            Policy::FirstAvailable | Policy::ConsistentHash => false,
            Policy::RoundRobin | Policy::WeightedRandom => true,
            Policy::LeastOutstanding => {
                let bearable =
                    |other: Candidate| load(&own, &other) <= 2 * load(&other, &own) + SLACK * u64::from(other.weight);
                (0..count).map(of).filter(|candidate| candidate.rank == best).all(bearable)
            }
        }
    }
}

fn best_rank(count: usize, of: &impl Fn(usize) -> Candidate) -> Option<u8> {
    (0..count).filter_map(|at| of(at).rank).min()
}

/// The load of `one` with the query on it, as a fraction over the same denominator as that of `other`.
fn load(one: &Candidate, other: &Candidate) -> u64 {
    (one.outstanding as u64 + 1) * u64::from(other.weight)
}

/// Weighted rendezvous hashing: for each name every backend draws a lot, and the highest wins. If one goes, only the
/// names that were its own move, and they are spread over all others by weight.
fn score(candidate: &Candidate, question: u64) -> f64 {
    // 53 bits are a fraction of 0 to 1 exactly; the half keeps it from being either.
    let lot = (mix(candidate.name ^ question) >> 11) as f64 + 0.5;
    f64::from(candidate.weight) / -(lot / (1u64 << 53) as f64).ln()
}

/// Spreads all bits over all bits (the finalizer of SplitMix64).
fn mix(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Digest of a name without regard to ASCII case (RFC 4343): FNV-1a, so that it is the same in each process and version.
pub fn digest(name: &[u8]) -> u64 {
    let hash = |hash: u64, octet: &u8| (hash ^ u64::from(octet.to_ascii_lowercase())).wrapping_mul(0x0100_0000_01b3);
    mix(name.iter().fold(0xcbf2_9ce4_8422_2325, hash))
}

#[cfg(test)]
#[path = "choose_tests.rs"]
mod tests;
