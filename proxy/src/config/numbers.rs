//! Which number stands for which pool and which backend, in the ledger, in counters and on the way of a query.
//!
//! A name keeps its number as long as the process lives, and a number is never given to another name: connections and
//! counters of before a reload still mean what they meant, and a backend that comes back goes on counting.

use super::Config;
use crate::ledger::BackendIndex;

/// Numbers are below this one.
const MAX: usize = BackendIndex::MAX as usize;

/// There were too many names since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there were {MAX} names of {0} since the start of the process: restart it")]
pub struct TooMany(&'static str);

/// The numbers of all names that there have been.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    pools: Vec<String>,
    /// By number: name and pool, as last configured.
    backends: Vec<(String, String)>,
    drill: Option<BackendIndex>,
}

impl Numbers {
    /// In the order of the configuration; the drill's peer comes behind its backends.
    pub fn new(config: &Config) -> Self {
        let mut numbers = Self::default();
        numbers.take(config);
        // The configuration allows fewer.
        numbers.drill = BackendIndex::try_from(numbers.backends.len()).ok();
        numbers.backends.push((String::new(), String::new()));
        numbers
    }

    /// With those of another configuration, new names behind the others.
    ///
    /// # Errors
    /// No number is left.
    pub fn with(&self, config: &Config) -> Result<Self, TooMany> {
        let mut numbers = self.clone();
        numbers.take(config);
        if numbers.pools.len() >= MAX {
            return Err(TooMany("pools"));
        }
        if numbers.backends.len() >= MAX { Err(TooMany("backends")) } else { Ok(numbers) }
    }

    fn take(&mut self, config: &Config) {
        for pool in &config.pools {
            if self.pool(&pool.name).is_none() {
                self.pools.push(pool.name.clone());
            }
            for backend in &pool.backends {
                match self.backend(&backend.name) {
                    Some(number) => self.backends[usize::from(number)].1.clone_from(&pool.name),
                    None => self.backends.push((backend.name.clone(), pool.name.clone())),
                }
            }
        }
    }

    /// A pool's.
    pub fn pool(&self, name: &str) -> Option<u16> {
        number(self.pools.iter().position(|pool| pool == name))
    }

    /// A backend's.
    pub fn backend(&self, name: &str) -> Option<BackendIndex> {
        number(self.backends.iter().position(|(backend, _)| backend == name && !name.is_empty()))
    }

    /// That of the drill's peer.
    pub fn drill(&self) -> Option<BackendIndex> {
        self.drill
    }

    /// The names of the pools, by number.
    pub fn pools(&self) -> &[String] {
        &self.pools
    }

    /// How many backends there have been, the drill's peer included.
    pub fn backends(&self) -> usize {
        self.backends.len()
    }

    /// The names of the backends, by number; that of the drill's peer is empty.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.backends.iter().map(|(name, _)| name.as_str())
    }

    /// The pool of a backend; none: it is the drill's peer.
    pub fn pool_of(&self, backend: usize) -> Option<&str> {
        self.backends.get(backend).map(|(_, pool)| pool.as_str()).filter(|pool| !pool.is_empty())
    }
}

fn number(position: Option<usize>) -> Option<u16> {
    position.and_then(|position| u16::try_from(position).ok())
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
        let second = first.with(&config(&[("q", &["c", "b"]), ("p", &["d"])])).unwrap();
        assert_eq!((second.pool("p"), second.pool("q")), (Some(0), Some(1)));
        let numbers = |numbers: &Numbers| ["a", "b", "c", "d"].map(|name| numbers.backend(name));
        assert_eq!(numbers(&second), [Some(0), Some(1), Some(3), Some(4)], "2 is the drill's");
        assert_eq!(second.drill(), Some(2));
        assert_eq!((second.pool_of(0), second.pool_of(1), second.pool_of(2)), (Some("p"), Some("q"), None));
        let third = second.with(&config(&[("p", &["a", "b"])])).unwrap();
        assert_eq!((numbers(&third), third.backends()), (numbers(&second), 5), "what comes back is what it was");
    }

    #[test]
    fn the_drill_has_no_name_that_a_backend_could_have() {
        let numbers = Numbers::new(&config(&[("p", &["a"])]));
        assert_eq!((numbers.backend(""), numbers.backend("drill")), (None, None));
    }
}
