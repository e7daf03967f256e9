//! What the fuzz targets assert of outside input, and of the state machines under any sequence of events. Built for
//! tests and fuzzers only.
//!
//! Each function takes any bytes and panics if a promise is broken. The fuzz targets in `proxy/fuzz` call them with
//! what the fuzzer invents, the property tests with what `proptest` invents, and the tests at the end of this file with
//! every file in `proxy/fuzz/corpus`, so that what was found once is tried again on every run of the tests.

#![expect(clippy::expect_used, clippy::panic, reason = "a broken promise is to stop the fuzzer")]

mod configuration;
mod hop;
mod pending;
mod pool;
mod transfer;
mod wire;

pub use configuration::configuration;
pub use hop::hop;
pub use pending::pending;
pub use pool::pool;
pub use transfer::transfer;
pub use wire::{frame, header_against_ppp, header_out, proxy_in, question, template};

/// A bound on work: so many steps for each octet, and so many for a message without any.
struct Linear(usize, usize);

/// What a walk through a message may cost: a few walks over its names and options, and the steps for following names.
const LINEAR: Linear = Linear(8, 64);

impl Linear {
    fn of(&self, bytes: &[u8]) -> usize {
        self.0 * bytes.len() + self.1
    }
}

/// Events of a state machine from a fuzzer's bytes, until they are used up. A number takes as few octets as it can, so
/// that a changed octet changes one event and not the meaning of all that follow.
struct Script<'a> {
    bytes: std::slice::Iter<'a, u8>,
}

impl<'a> Script<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes: bytes.iter() }
    }

    /// The next octet.
    fn octet(&mut self) -> Option<u8> {
        self.bytes.next().copied()
    }

    /// Two octets, zero where none are left.
    fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.octet().unwrap_or(0), self.octet().unwrap_or(0)])
    }

    /// One of these, if there is one.
    fn pick<T: Copy>(&mut self, among: &[T]) -> Option<(usize, T)> {
        let at = usize::from(self.octet()?).checked_rem(among.len())?;
        among.get(at).map(|one| (at, *one))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Every file of a target's corpus; a target without one fails, so that none is forgotten.
    fn replay(target: &str, body: impl Fn(&[u8])) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut files = 0;
        for entry in std::fs::read_dir(&directory).expect("the corpus of the target") {
            let path = entry.expect("a directory entry").path();
            println!("{}", path.display());
            body(&std::fs::read(&path).expect("a corpus file"));
            files += 1;
        }
        assert!(files > 0, "{} is empty", directory.display());
    }

    /// One test for each target, and no target without its test.
    macro_rules! corpora {
        ($($test:ident: $target:ident,)*) => {
            $(
                #[test]
                fn $test() {
                    replay(stringify!($target), super::$target);
                }
            )*

            #[test]
            fn every_target_has_its_corpus_replayed() {
                let targets = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
                for entry in std::fs::read_dir(targets).expect("the targets") {
                    let path = entry.expect("a directory entry").path();
                    let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
                    assert!([$(stringify!($target)),*].contains(&name.as_str()), "{name}");
                }
            }
        };
    }

    corpora! {
        corpus_of_configuration: configuration,
        corpus_of_frame: frame,
        corpus_of_header_out: header_out,
        corpus_of_hop: hop,
        corpus_of_pending: pending,
        corpus_of_pool: pool,
        corpus_of_proxy_in: proxy_in,
        corpus_of_question: question,
        corpus_of_template: template,
        corpus_of_transfer: transfer,
    }
}
