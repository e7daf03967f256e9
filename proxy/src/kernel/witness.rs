//! The vote of the three witnesses: who of them is wrong, if they contradict each other.
//!
//! Each says of a socket that this process holds it, that it does not, or that it cannot know. Two against one names the
//! one; where the third cannot know it is one against one, and nobody can tell. Over all sockets the liar is the one
//! witness whose lying alone explains every dispute.

use std::fmt;

/// Who tells which sockets a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Witness {
    /// The sweep of the tagged sockets.
    Ebpf,
    /// The netlink dump, or the look-up of one socket.
    SockDiag,
    /// The table of descriptors, `/proc/PID/fd`.
    ProcFd,
}

impl Witness {
    /// All, in the order of the declaration.
    pub const ALL: [Self; 3] = [Self::Ebpf, Self::SockDiag, Self::ProcFd];

    /// The word in logs and metric labels: `ebpf`, `sock_diag`, `proc_fd`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::SockDiag => "sock_diag",
            Self::ProcFd => "proc_fd",
        }
    }
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// What a witness says of one socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Says {
    /// The process holds it.
    Present,
    /// The process does not hold it.
    Absent,
    /// It cannot know, or it was asked at a moment that proves nothing.
    #[default]
    Unknown,
}

impl Says {
    /// The word in messages.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Absent => "absent",
            Self::Unknown => "cannot know",
        }
    }
}

/// What all say of one socket, by [`Witness`].
pub(super) type Testimony = [Says; 3];

/// Who is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nobody: no two contradict each other.
    Agreed,
    /// This one alone, and the two others say so.
    Liar(Witness),
    /// Somebody: one against one, or more than one.
    Open,
}

/// Whether two witnesses contradict each other.
pub(super) fn is_disputed(testimony: &Testimony) -> bool {
    testimony.contains(&Says::Present) && testimony.contains(&Says::Absent)
}

/// The vote over all sockets.
pub(super) fn vote<'a>(testimonies: impl IntoIterator<Item = &'a Testimony>) -> Verdict {
    let mut suspects = Witness::ALL.map(|_| true);
    let mut disputed = false;
    for testimony in testimonies.into_iter().filter(|testimony| is_disputed(testimony)) {
        disputed = true;
        for witness in Witness::ALL {
            suspects[witness as usize] &= alone_explains(testimony, witness);
        }
    }
    let mut named = Witness::ALL.into_iter().filter(|witness| suspects[*witness as usize]);
    match (disputed, named.next(), named.next()) {
        (false, ..) => Verdict::Agreed,
        (true, Some(witness), None) => Verdict::Liar(witness),
        (true, ..) => Verdict::Open,
    }
}

/// Whether the dispute is over if this witness lies and nobody else does.
fn alone_explains(testimony: &Testimony, liar: Witness) -> bool {
    let mut without = *testimony;
    without[liar as usize] = Says::Unknown;
    !is_disputed(&without)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Says::{Absent, Present, Unknown};
    use super::*;

    #[test]
    fn two_against_one_names_the_one() {
        for (witness, name) in Witness::ALL.into_iter().zip(["ebpf", "sock_diag", "proc_fd"]) {
            assert_eq!(witness.to_string(), name);
            for (truth, lie) in [(Present, Absent), (Absent, Present)] {
                let mut testimony = [truth; 3];
                assert_eq!(vote([&testimony]), Verdict::Agreed);
                testimony[witness as usize] = lie;
                assert_eq!(vote([&testimony, &[truth; 3]]), Verdict::Liar(witness));
            }
        }
    }

    #[test]
    fn one_against_one_is_open() {
        assert_eq!(vote([&[Present, Unknown, Absent]]), Verdict::Open);
        assert_eq!(vote([&[Absent, Present, Unknown]]), Verdict::Open);
        assert_eq!(vote([&[Present, Unknown, Unknown], &[Unknown, Absent, Unknown]]), Verdict::Agreed);
        assert_eq!(vote([]), Verdict::Agreed);
    }

    #[test]
    fn a_vote_elsewhere_closes_what_is_open() {
        assert_eq!(vote([&[Absent, Unknown, Present], &[Absent, Present, Present]]), Verdict::Liar(Witness::Ebpf));
        let by_two = [[Absent, Unknown, Present], [Absent, Present, Unknown]];
        assert_eq!(vote(&by_two), Verdict::Liar(Witness::Ebpf), "two contradict it, each of another socket");
    }

    #[test]
    fn two_liars_are_not_told_apart() {
        assert_eq!(vote([&[Absent, Present, Present], &[Present, Absent, Present]]), Verdict::Open);
        assert_eq!(vote([&[Absent, Present, Present], &[Unknown, Absent, Present]]), Verdict::Open);
    }

    /// What the three say of a socket that is held or not, if each can know or not, and none of them lies.
    fn honest() -> impl Strategy<Value = Testimony> {
        (any::<bool>(), any::<[bool; 3]>()).prop_map(|(held, knows)| {
            let truth = if held { Present } else { Absent };
            knows.map(|knows| if knows { truth } else { Unknown })
        })
    }

    proptest! {
        #[test]
        fn nobody_is_named_without_a_lie(testimonies in prop::collection::vec(honest(), 0..50)) {
            prop_assert_eq!(vote(&testimonies), Verdict::Agreed);
        }

        #[test]
        fn whoever_lies_is_named(
            sockets in prop::collection::vec((honest(), any::<bool>()), 1..50),
            liar in prop::sample::select(&Witness::ALL),
        ) {
            let mut testimonies = Vec::new();
            let mut contradicted = [false; 3];
            let mut twice = false;
            for (mut testimony, lies) in sockets {
                let word = testimony[liar as usize];
                let lie = match word {
                    _ if !lies => word,
                    Present => Absent,
                    Absent => Present,
                    Unknown => Unknown,
                };
                testimony[liar as usize] = lie;
                if lie != word {
                    let others = Witness::ALL.map(|w| w != liar && testimony[w as usize] != Unknown);
                    twice |= others.iter().filter(|contradicts| **contradicts).count() == 2;
                    for (all, this) in contradicted.iter_mut().zip(others) {
                        *all |= this;
                    }
                }
                testimonies.push(testimony);
            }
            let witnesses_against = contradicted.iter().filter(|against| **against).count();
            let expected = match witnesses_against {
                0 => Verdict::Agreed,
                1 => Verdict::Open,
                _ => Verdict::Liar(liar),
            };
            prop_assert!(!twice || expected == Verdict::Liar(liar));
            prop_assert_eq!(vote(&testimonies), expected);
        }
    }
}
