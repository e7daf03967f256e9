//! What is asked, by whom, and under which header.

use anyhow::{Result, bail};

/// One kind of load.
#[derive(Debug, PartialEq)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    /// PROXY v2 towards the backend.
    pub(super) header: Header,
    /// `[pool.proxy_protocol] identity` of Counterfoil.
    pub(super) identity: &'static str,
    /// `[connections] spares_per_backend` of Counterfoil.
    pub(super) spares: u32,
    /// `[server] workers` of Counterfoil.
    pub(super) workers: u32,
    /// The clients speak TLS.
    pub(super) tls: bool,
    /// The backend does.
    pub(super) backend_tls: bool,
    /// What the load generator is told.
    pub(super) load: &'static [&'static str],
    /// What the run is for.
    pub(super) figure: Figure,
    /// Part of a run without arguments.
    pub(super) default: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Header {
    None,
    Address,
    /// With TLV 0xE0, which holds the first label of the query.
    Label,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Figure {
    Speed,
    /// Memory per idle client: the load is so many clients with one query each.
    Memory {
        clients: u32,
    },
}

/// What a scenario has unless it says otherwise.
pub(super) const BASE: Scenario = Scenario {
    name: "",
    about: "",
    header: Header::None,
    identity: "connection",
    spares: 0,
    workers: 2,
    tls: false,
    backend_tls: false,
    load: &[],
    figure: Figure::Speed,
    default: false,
};

pub(super) const ALL: &[Scenario] = &[
    Scenario {
        name: "A",
        about: "50 clients, 1 in flight, PROXY, owned connections",
        header: Header::Address,
        load: &["--clients=50"],
        default: true,
        ..BASE
    },
    Scenario {
        name: "A15k",
        about: "as A, 15,000 queries per second offered (latency from the moment a query is due)",
        header: Header::Address,
        load: &["--clients=50", "--rate=15000"],
        ..BASE
    },
    Scenario {
        name: "B",
        about: "50 clients, 20 pipelined, PROXY, owned connections",
        header: Header::Address,
        load: &["--clients=50", "--in-flight=20"],
        default: true,
        ..BASE
    },
    Scenario {
        name: "C",
        about: "50 clients, 20 pipelined, no PROXY, shared connections (relay and HAProxy: 1 to 1)",
        load: &["--clients=50", "--in-flight=20"],
        default: true,
        ..BASE
    },
    Scenario {
        name: "D",
        about: "50 clients, a new connection per query, no PROXY",
        load: &["--clients=50", "--per-connection=1", "--sources=100"],
        ..BASE
    },
    Scenario {
        name: "Dp",
        about: "50 clients, a new connection per query, PROXY; Counterfoil with spare connections",
        header: Header::Address,
        spares: 50,
        load: &["--clients=50", "--per-connection=1", "--sources=100"],
        ..BASE
    },
    Scenario {
        name: "E1",
        about: "1 client, 1 in flight, another TLV on each query",
        header: Header::Label,
        load: &["--clients=1"],
        default: true,
        ..BASE
    },
    Scenario {
        name: "E50",
        about: "50 clients, 1 in flight, another TLV on each query",
        header: Header::Label,
        load: &["--clients=50"],
        ..BASE
    },
    Scenario {
        name: "E8",
        about: "50 clients, 1 in flight, 8 TLV sets in rotation on each connection (relay: a connection per query)",
        header: Header::Label,
        load: &["--clients=50", "--names=rotate:8"],
        ..BASE
    },
    Scenario {
        name: "E8f",
        about: "as E8, the same TLV sets for all clients, identity = forwarder",
        header: Header::Label,
        identity: "forwarder",
        load: &["--clients=50", "--names=rotate:8", "--shared-names"],
        ..BASE
    },
    Scenario {
        name: "T",
        about: "as A, the clients over TLS",
        header: Header::Address,
        tls: true,
        load: &["--clients=50"],
        ..BASE
    },
    Scenario {
        name: "Tb",
        about: "as B, the clients over TLS",
        header: Header::Address,
        tls: true,
        load: &["--clients=50", "--in-flight=20"],
        ..BASE
    },
    Scenario {
        name: "Td",
        about: "as C, the backend over TLS",
        backend_tls: true,
        load: &["--clients=50", "--in-flight=20"],
        ..BASE
    },
    Scenario {
        name: "Th-new",
        about: "as D over TLS: a full handshake per query (latency and CPU with connection and handshake)",
        tls: true,
        load: &["--clients=50", "--per-connection=1", "--sources=100"],
        ..BASE
    },
    Scenario {
        name: "Th-res",
        about: "as Th-new, but a client's later handshakes resume (dnsdist's: two of three, for want of tickets)",
        tls: true,
        load: &["--clients=50", "--per-connection=1", "--sources=100", "--resume"],
        ..BASE
    },
    Scenario {
        name: "Fp",
        about: "9,000 idle clients after one query each, PROXY",
        header: Header::Address,
        load: &["--clients=9000", "--count=9000", "--seconds=60", "--patience=30"],
        figure: Figure::Memory { clients: 9000 },
        ..BASE
    },
];

impl Scenario {
    /// How many clients there are: what the load generator is told, or its default.
    pub(super) fn clients(&self) -> u64 {
        let told = self.load.iter().find_map(|option| option.strip_prefix("--clients=")?.parse().ok());
        told.unwrap_or(50)
    }

    /// Whether clients resume TLS sessions.
    pub(super) fn resumes(&self) -> bool {
        self.load.contains(&"--resume")
    }

    /// What the answerer is to insist on.
    pub(super) fn checks(&self) -> &'static [&'static str] {
        match (self.header, self.identity) {
            (Header::None, _) => &[],
            (Header::Address, "connection") => &["--proxy", "--check-port"],
            (Header::Address, _) => &["--proxy"],
            (Header::Label, "connection") => &["--proxy", "--check-port", "--check-label"],
            (Header::Label, _) => &["--proxy", "--check-label"],
        }
    }
}

/// The name that stands for all of them.
pub(super) const EVERY: &str = "all";

/// The scenarios with these names, in the order of the list.
pub(super) fn choose(names: &[String]) -> Result<Vec<&'static Scenario>> {
    if let Some(unknown) = names.iter().find(|name| *name != EVERY && ALL.iter().all(|it| it.name != **name)) {
        bail!("no scenario {unknown}; `cargo xtask bench --list` lists them");
    }
    let all = names.iter().any(|name| name == EVERY);
    let wanted =
        |it: &&Scenario| if names.is_empty() { it.default } else { all || names.iter().any(|name| name == it.name) };
    Ok(ALL.iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    fn chosen(names: &[&str]) -> String {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        choose(&names).unwrap().iter().map(|it| it.name).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn scenarios_are_chosen_by_name() {
        assert_eq!(chosen(&[]), "A B C E1");
        assert_eq!(chosen(&["E50", "D"]), "D E50");
        assert_eq!(chosen(&["all"]).split(' ').count(), ALL.len());
        assert!(choose(&["Z".to_owned()]).unwrap_err().to_string().contains('Z'));
    }
}
