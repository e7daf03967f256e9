//! Which number stands for which pool and which backend, in the ledger, in counters and on the way of a query.
//!
//! A name keeps its number while the configuration has it, and for a while after that ([`KEPT_FOR`], [`KEPT`]): connections
//! and counters of before a reload still mean what they meant, and a backend that comes back in time goes on counting. Then
//! the name is forgotten, unless something is still under way there; its number is vacant, and goes to a name that is new.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::Config;
use crate::clock::Mono;
use crate::ledger::BackendIndex;

/// Numbers are below this one.
const MAX: usize = BackendIndex::MAX as usize;

/// For how long a name is kept that the configuration has no more: a few windows of the rules for Prometheus, which look
/// back over five minutes.
pub const KEPT_FOR: Duration = Duration::from_secs(15 * 60);

/// How many such names are kept, of pools and of backends each: those that went last.
pub const KEPT: usize = 100;

/// No number is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there are {MAX} names of {0}, those included that went with the last reloads: wait a minute and reload again, or \
     restart"
)]
pub struct TooMany(&'static str);

/// Whose a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numbered {
    /// A pool's.
    Pool(u16),
    /// A backend's.
    Backend(BackendIndex),
}

/// The numbers of all names of the configuration, and of those that went lately.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    pools: Names,
    backends: Names,
    drill: Option<BackendIndex>,
}

/// Names by number, and back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Names {
    slots: Vec<Slot>,
    by_name: HashMap<String, u16>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Slot {
    /// Empty: the number is vacant, or the drill's.
    name: String,
    /// A backend's, as last configured.
    pool: String,
    /// When the configuration was first without it.
    gone: Option<Mono>,
}

impl Names {
    fn number(&self, name: &str) -> Option<u16> {
        self.by_name.get(name).copied()
    }

    fn name(&self, number: usize) -> Option<&str> {
        self.slots.get(number).map(|slot| slot.name.as_str()).filter(|name| !name.is_empty())
    }

    /// The configuration has these names, with their pools, and no others. False: no number is left.
    fn take<'a>(
        &mut self,
        wanted: impl Iterator<Item = (&'a str, &'a str)> + Clone,
        drill: Option<u16>,
        now: Mono,
    ) -> bool {
        let has: HashSet<&str> = wanted.clone().map(|(name, _)| name).collect();
        let mut vacant = Vec::new();
        for (number, slot) in (0..).zip(&mut self.slots) {
            if slot.name.is_empty() {
                vacant.extend((Some(number) != drill).then_some(number));
            } else if has.contains(slot.name.as_str()) {
                slot.gone = None;
            } else {
                slot.gone.get_or_insert(now);
            }
        }
        // The smallest one first.
        vacant.reverse();
        for (name, pool) in wanted {
            let number = match self.number(name) {
                Some(number) => number,
                None => {
                    let next = vacant.pop().or_else(|| u16::try_from(self.slots.len()).ok());
                    let Some(number) = next.filter(|number| usize::from(*number) < MAX) else { return false };
                    if usize::from(number) == self.slots.len() {
                        self.slots.push(Slot::default());
                    }
                    self.by_name.insert(name.to_owned(), number);
                    number
                }
            };
            let slot = &mut self.slots[usize::from(number)];
            if slot.name.is_empty() {
                *slot = Slot { name: name.to_owned(), ..Slot::default() };
            }
            pool.clone_into(&mut slot.pool);
        }
        true
    }

    /// The numbers whose names have had their time.
    fn due(&self, now: Mono) -> Vec<u16> {
        let mut gone: Vec<(Mono, u16)> =
            (0..).zip(&self.slots).filter_map(|(number, slot)| Some((slot.gone?, number))).collect();
        gone.sort_unstable();
        let too_many = gone.len().saturating_sub(KEPT);
        let over = |(at, (gone, _)): &(usize, &(Mono, u16))| *at < too_many || gone.after(KEPT_FOR) <= now;
        gone.iter().enumerate().filter(over).map(|(_, (_, number))| *number).collect()
    }

    fn forget(&mut self, number: u16) {
        let slot = std::mem::take(&mut self.slots[usize::from(number)]);
        self.by_name.remove(&slot.name);
    }
}

impl Numbers {
    /// In the order of the configuration; the drill's peer comes behind its backends.
    pub fn new(config: &Config) -> Self {
        let mut numbers = Self::default();
        // The configuration allows fewer than there are numbers.
        let _ = numbers.take(config, Mono::ZERO);
        numbers.drill = BackendIndex::try_from(numbers.backends.slots.len()).ok();
        numbers.backends.slots.push(Slot::default());
        numbers
    }

    /// With those of another configuration: new names take vacant numbers, or are behind the others. What is vacant here must
    /// be in nobody's use: everybody has taken the configuration that these numbers are of.
    ///
    /// # Errors
    /// No number is left.
    pub fn with(&self, config: &Config, now: Mono) -> Result<Self, TooMany> {
        let mut numbers = self.clone();
        numbers.take(config, now)?;
        Ok(numbers)
    }

    fn take(&mut self, config: &Config, now: Mono) -> Result<(), TooMany> {
        let pools = config.pools.iter().map(|pool| (pool.name.as_str(), ""));
        let backends = config
            .pools
            .iter()
            .flat_map(|pool| pool.backends.iter().map(move |backend| (backend.name.as_str(), pool.name.as_str())));
        if !self.pools.take(pools, None, now) {
            return Err(TooMany("pools"));
        }
        if !self.backends.take(backends, self.drill, now) {
            return Err(TooMany("backends"));
        }
        Ok(())
    }

    /// What would be forgotten now if nothing is under way there.
    pub fn due(&self, now: Mono) -> Vec<Numbered> {
        let pools = self.pools.due(now).into_iter().map(Numbered::Pool);
        pools.chain(self.backends.due(now).into_iter().map(Numbered::Backend)).collect()
    }

    /// Without these names, which the configuration has no more.
    #[must_use]
    pub fn without(&self, names: impl IntoIterator<Item = Numbered>) -> Self {
        let mut numbers = self.clone();
        for name in names {
            match name {
                Numbered::Pool(number) => numbers.pools.forget(number),
                Numbered::Backend(number) => numbers.backends.forget(number),
            }
        }
        numbers
    }

    /// The numbers that are vacant there and have a name here.
    pub fn taken_since(&self, before: &Self) -> Vec<Numbered> {
        let taken = |now: &Names, before: &Names| -> Vec<u16> {
            let numbers = (0..u16::MAX).zip(&before.slots).filter(|(_, slot)| slot.name.is_empty());
            numbers.filter(|(number, _)| now.name(usize::from(*number)).is_some()).map(|(number, _)| number).collect()
        };
        let pools = taken(&self.pools, &before.pools).into_iter().map(Numbered::Pool);
        pools.chain(taken(&self.backends, &before.backends).into_iter().map(Numbered::Backend)).collect()
    }

    /// A pool's.
    pub fn pool(&self, name: &str) -> Option<u16> {
        self.pools.number(name)
    }

    /// A backend's.
    pub fn backend(&self, name: &str) -> Option<BackendIndex> {
        self.backends.number(name)
    }

    /// That of the drill's peer.
    pub fn drill(&self) -> Option<BackendIndex> {
        self.drill
    }

    /// The pools, those that went lately too, with their numbers.
    pub fn pools(&self) -> impl Iterator<Item = (usize, &str)> {
        let names = self.pools.slots.iter().map(|slot| slot.name.as_str()).enumerate();
        names.filter(|(_, name)| !name.is_empty())
    }

    /// One more than the largest number of a pool.
    pub fn pool_count(&self) -> usize {
        self.pools.slots.len()
    }

    /// One more than the largest number of a backend, the drill's peer included.
    pub fn backends(&self) -> usize {
        self.backends.slots.len()
    }

    /// The names of the backends, by number; that of the drill's peer, and vacant ones, are empty.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.backends.slots.iter().map(|slot| slot.name.as_str())
    }

    /// Whether a backend's number is nobody's.
    pub fn is_vacant(&self, backend: usize) -> bool {
        self.backends.name(backend).is_none() && self.drill.is_none_or(|drill| usize::from(drill) != backend)
    }

    /// The pool of a backend; none: it is the drill's peer, or nobody.
    pub fn pool_of(&self, backend: usize) -> Option<&str> {
        self.backends.slots.get(backend).map(|slot| slot.pool.as_str()).filter(|pool| !pool.is_empty())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use crate::config;

    /// Pools with the names of their backends.
    fn config(pools: &[(&str, &[&str])]) -> Config {
        let mut text =
            format!("[[listener]]\nname = \"l\"\naddress = \"127.0.0.1:0\"\npool = \"{}\"\n", pools.first().unwrap().0);
        for (pool, backends) in pools {
            text += &format!("[[pool]]\nname = \"{pool}\"\n");
            for (at, backend) in backends.iter().enumerate() {
                let port = 100 + text.len() + at;
                text += &format!("[[pool.backend]]\nname = \"{backend}\"\naddress = \"127.0.0.1:{port}\"\n");
            }
        }
        config::from_str("test", &text).unwrap()
    }

    #[test]
    fn names_keep_their_numbers_whatever_comes_and_goes() {
        let first = Numbers::new(&config(&[("p", &["a", "b"])]));
        assert_eq!((first.backend("a"), first.backend("b"), first.drill()), (Some(0), Some(1), Some(2)));
        let second = first.with(&config(&[("q", &["c", "b"]), ("p", &["d"])]), Mono::ZERO).unwrap();
        assert_eq!((second.pool("p"), second.pool("q")), (Some(0), Some(1)));
        let numbers = |numbers: &Numbers| ["a", "b", "c", "d"].map(|name| numbers.backend(name));
        assert_eq!(numbers(&second), [Some(0), Some(1), Some(3), Some(4)], "2 is the drill's");
        assert_eq!(second.drill(), Some(2));
        assert_eq!((second.pool_of(0), second.pool_of(1), second.pool_of(2)), (Some("p"), Some("q"), None));
        let third = second.with(&config(&[("p", &["a", "b"])]), Mono::ZERO).unwrap();
        assert_eq!((numbers(&third), third.backends()), (numbers(&second), 5), "what comes back is what it was");
    }

    #[test]
    fn the_drill_has_no_name_that_a_backend_could_have() {
        let numbers = Numbers::new(&config(&[("p", &["a"])]));
        assert_eq!((numbers.backend(""), numbers.backend("drill")), (None, None));
    }

    fn minutes(minutes: u64) -> Mono {
        Mono::ZERO.after(Duration::from_secs(60 * minutes))
    }

    #[test]
    fn a_name_that_is_gone_is_kept_for_a_while_and_then_its_number_is_vacant() {
        let first = Numbers::new(&config(&[("p", &["a"]), ("q", &["b"])]));
        let second = first.with(&config(&[("p", &["a"])]), minutes(1)).unwrap();
        assert!(second.due(minutes(15)).is_empty());
        let back = second.with(&config(&[("p", &["a"]), ("q", &["b"])]), minutes(15)).unwrap();
        assert_eq!((back.backend("b"), back.due(minutes(100))), (Some(1), Vec::new()), "it has come back in time");
        // It was gone at one time before, and the time since then counts once more.
        let gone = back.with(&config(&[("p", &["a"])]), minutes(20)).unwrap();
        assert!(gone.due(minutes(34)).is_empty());
        let due = gone.due(minutes(35));
        assert_eq!(due, [Numbered::Pool(1), Numbered::Backend(1)]);
        let after = gone.without(due);
        assert_eq!((after.backend("b"), after.pool("q"), after.due(minutes(100))), (None, None, Vec::new()));
        assert!(after.is_vacant(1) && !after.is_vacant(2), "2 is the drill's");
        assert_eq!(after.pools().collect::<Vec<_>>(), [(0, "p")]);
        let next = after.with(&config(&[("p", &["a", "c"]), ("r", &["d"])]), minutes(36)).unwrap();
        assert_eq!((next.backend("c"), next.backend("d"), next.pool("r")), (Some(1), Some(3), Some(1)));
        assert_eq!((next.drill(), next.pool_of(1), next.pool_of(2)), (Some(2), Some("p"), None));
        assert_eq!(next.taken_since(&after), [Numbered::Pool(1), Numbered::Backend(1)]);
    }

    #[test]
    fn any_number_of_names_one_after_another_takes_few_numbers() {
        let mut numbers = Numbers::new(&config(&[("p", &["a0"])]));
        for round in 1..2 * MAX as u64 / 50 {
            let name = format!("a{round}");
            let now = Mono::ZERO.after(Duration::from_secs(round));
            let due = numbers.due(now);
            numbers = numbers.without(due).with(&config(&[("p", &[name.as_str()])]), now).unwrap();
            assert_eq!(
                numbers.backend(&name).map(|number| numbers.names().nth(usize::from(number)).unwrap()),
                Some(name.as_str())
            );
            assert!(numbers.backends() <= KEPT + 4, "{round}: {}", numbers.backends());
        }
        assert_eq!(numbers.names().filter(|name| !name.is_empty()).count(), KEPT + 2, "the last ones");
    }
}
