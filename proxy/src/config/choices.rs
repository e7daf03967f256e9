//! The words of the keys that know a few words only: one list for reading, writing and messages.

use super::{Class, HealthMode, OnFailure, OneShotClose, Policy, ReapMode, View};

/// A value that the file writes as one of a few words.
pub trait Choice: Copy + 'static {
    /// All that work, in the order in which they are listed.
    const ALL: &'static [Self];

    /// The word.
    fn word(self) -> &'static str;
}

impl Choice for Policy {
    const ALL: &'static [Self] =
        &[Self::LeastOutstanding, Self::RoundRobin, Self::WeightedRandom, Self::ConsistentHash, Self::FirstAvailable];

    fn word(self) -> &'static str {
        match self {
            Self::LeastOutstanding => "least-outstanding",
            Self::RoundRobin => "round-robin",
            Self::WeightedRandom => "weighted-random",
            Self::ConsistentHash => "consistent-hash",
            Self::FirstAvailable => "first-available",
        }
    }
}

impl Choice for OnFailure {
    const ALL: &'static [Self] = &[Self::Servfail, Self::Close];

    fn word(self) -> &'static str {
        match self {
            Self::Servfail => "servfail",
            Self::Close => "close",
        }
    }
}

impl Choice for OneShotClose {
    const ALL: &'static [Self] = &[Self::Reset, Self::Fin];

    fn word(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Fin => "fin",
        }
    }
}

impl Choice for HealthMode {
    const ALL: &'static [Self] = &[Self::Auto, Self::Lazy, Self::Up, Self::Down];

    fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Lazy => "lazy",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

impl Choice for View {
    const ALL: &'static [Self] = &[Self::Auto, Self::Ebpf, Self::SockDiag, Self::None];

    fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::SockDiag => "sock-diag",
            Self::None => "none",
        }
    }
}

impl Choice for ReapMode {
    const ALL: &'static [Self] = &[Self::Off, Self::DryRun, Self::On];

    fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::DryRun => "dry-run",
            Self::On => "on",
        }
    }
}

impl Choice for Class {
    const ALL: &'static [Self] = &Class::ALL;

    fn word(self) -> &'static str {
        self.name()
    }
}

/// The words of `identity`; the prefix lengths of `subnet` are keys of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdentityWord {
    /// The client's address and port.
    Connection,
    /// The client's address.
    Address,
    /// The client's network.
    Subnet,
    /// The forwarder's own address.
    Forwarder,
}

impl Choice for IdentityWord {
    const ALL: &'static [Self] = &[Self::Connection, Self::Address, Self::Subnet, Self::Forwarder];

    fn word(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Address => "address",
            Self::Subnet => "subnet",
            Self::Forwarder => "forwarder",
        }
    }
}

/// `"a", "b" and "c"`
pub(super) fn list<T: Choice>() -> String {
    let mut text = String::new();
    for (index, choice) in T::ALL.iter().enumerate() {
        let separator = match index {
            0 => "",
            _ if index + 1 == T::ALL.len() => " or ",
            _ => ", ",
        };
        text.push_str(&format!("{separator}{:?}", choice.word()));
    }
    text
}
