#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use super::*;
use crate::config::from_str;

const NOW: Mono = Mono(1_000_000_000);

/// Two listeners with these lines, and these before them.
fn limits(head: &str, listener: &str) -> Arc<ClientLimits> {
    let mut text = head.to_owned();
    for name in ["a", "b"] {
        text.push_str(&format!(
            "\n[[listener]]\nname = \"{name}\"\naddress = \"127.0.0.1:0\"\npool = \"p\"\n{listener}\n"
        ));
    }
    text.push_str("[[pool]]\nname = \"p\"\n[[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:9\"\n");
    ClientLimits::new(&from_str("test", &text).unwrap())
}

impl ClientLimits {
    fn come(self: &Arc<Self>, listener: u16, client: &str) -> Result<Admitted, Refusal> {
        self.enter(listener)?.admit(client.parse().unwrap(), NOW)
    }

    fn open(&self) -> usize {
        self.total.open.load(Ordering::Relaxed)
    }

    /// Nothing is counted, and nothing is kept of clients that left.
    fn assert_empty(&self) {
        assert_eq!(self.open(), 0);
        for listener in &self.listeners {
            assert_eq!(listener.all.open.load(Ordering::Relaxed), 0);
            assert!(listener.clients.lock().unwrap().open.is_empty());
        }
    }
}

#[test]
fn limits_hold_and_places_come_back() {
    let limits = limits("[server]\nmax_connections = 3", "max_connections_per_client = 2");
    let a = limits.come(0, "192.0.2.1").unwrap();
    let b = limits.come(0, "::ffff:192.0.2.1").unwrap();
    assert_eq!(limits.come(0, "192.0.2.1").err(), Some(Refusal::PerClient));
    assert_eq!(limits.open(), 2, "a refusal is not counted");
    let c = limits.come(0, "192.0.2.2").unwrap();
    assert_eq!(limits.come(1, "192.0.2.2").err(), Some(Refusal::MaxConnections));
    drop(a);
    assert!(limits.come(0, "192.0.2.1").is_ok());
    drop((b, c));
    limits.assert_empty();
}

#[test]
fn each_listener_has_its_own_limits() {
    let limits = limits("", "max_connections = 2\nmax_connections_per_client = 1");
    let all: Vec<_> = [(0, "192.0.2.1"), (0, "192.0.2.2"), (1, "192.0.2.1"), (1, "192.0.2.2")]
        .map(|(listener, client)| limits.come(listener, client).unwrap())
        .into();
    assert_eq!(limits.come(0, "192.0.2.3").err(), Some(Refusal::PerListener));
    assert_eq!(limits.open(), 4, "a refusal is not counted");
    drop(all);
    limits.assert_empty();
}

#[test]
fn networks_can_count_as_one_client() {
    let of = |masks: &str, first: &str, second: &str| {
        let limits = limits("", &format!("max_connections_per_client = 1\n{masks}"));
        let _first = limits.come(0, first).unwrap();
        limits.come(0, second).err()
    };
    let same = Some(Refusal::PerClient);
    assert_eq!(of("", "192.0.2.1", "192.0.2.2"), None);
    assert_eq!(of("client_mask_v4 = 24", "192.0.2.1", "192.0.2.2"), same);
    assert_eq!(of("client_mask_v4 = 24", "192.0.2.1", "192.0.3.1"), None);
    assert_eq!(of("", "2001:db8::1", "2001:db8::ffff:2"), same, "a /64 is a client by default");
    assert_eq!(of("", "2001:db8::1", "2001:db8:0:1::1"), None);
    assert_eq!(of("client_mask_v6 = 128", "2001:db8::1", "2001:db8::2"), None);
    assert_eq!(of("client_mask_v6 = 32", "2001:db8::1", "2001:db8:ffff::1"), same);
}

#[test]
fn who_connects_too_often_is_banned_on_that_listener() {
    let limits = limits("", "connection_rate_per_client = 2\nban_duration = \"10s\"");
    drop((limits.come(0, "192.0.2.1").unwrap(), limits.come(0, "192.0.2.1").unwrap()));
    assert_eq!(limits.come(0, "192.0.2.1").err(), Some(Refusal::ConnectionRate));
    assert_eq!(limits.come(0, "192.0.2.1").err(), Some(Refusal::Banned));
    assert!(limits.come(1, "192.0.2.1").is_ok() && limits.come(0, "192.0.2.2").is_ok());
    let later = NOW.after(Duration::from_millis(10_001));
    assert!(limits.enter(0).unwrap().admit("192.0.2.1".parse().unwrap(), later).is_ok());
    limits.assert_empty();
}

#[test]
fn connections_are_restricted_near_any_limit() {
    /// How many come unrestricted and how many restricted before the first is refused.
    fn counts(head: &str, listener: &str) -> (usize, usize) {
        let limits = limits(head, listener);
        let all: Vec<Admitted> = (0..1000).map_while(|_| limits.come(0, "192.0.2.1").ok()).collect();
        let restricted = all.iter().filter(|admitted| admitted.is_restricted()).count();
        assert!(all.iter().rev().take(restricted).all(Admitted::is_restricted), "the last ones");
        (all.len() - restricted, restricted)
    }
    let many = "max_connections_per_client = 500";
    assert_eq!(counts("[server]\nmax_connections = 100", many), (90, 10));
    assert_eq!(counts("", &format!("{many}\nmax_connections = 10")), (9, 1));
    assert_eq!(counts("", "max_connections_per_client = 20"), (18, 2));
    assert_eq!(counts("", "max_connections_per_client = 1"), (1, 0), "one is not near one");
    assert_eq!(counts("[overload]\nthreshold = 50", "max_connections_per_client = 20"), (10, 10));
    assert_eq!(counts("[overload]\nthreshold = 100", "max_connections_per_client = 20"), (20, 0), "never");
}

#[test]
fn limits_hold_over_threads() {
    let limits = limits("[server]\nmax_connections = 50", "max_connections = 40\nmax_connections_per_client = 15");
    let most = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (limits, most) = (&limits, &most);
            scope.spawn(move || {
                let mut held = Vec::new();
                for round in 0..2000_usize {
                    let client = format!("192.0.2.{}", (thread + round) % 5);
                    held.extend(limits.come((round % 2) as u16, &client).ok());
                    most.fetch_max(limits.open(), Ordering::Relaxed);
                    for listener in &limits.listeners {
                        assert!(listener.all.open.load(Ordering::Relaxed) <= 40);
                        assert!(listener.clients.lock().unwrap().open.values().all(|open| *open <= 15));
                    }
                    if round % 7 == 0 {
                        held.clear();
                    }
                }
            });
        }
    });
    assert!((1..=50).contains(&most.into_inner()));
    limits.assert_empty();
}

#[test]
fn those_who_wait_have_half_of_the_places_at_most() {
    let accepts = "[listener.accept_proxy]\nfrom = [\"127.0.0.1\"]\nmax_pending = 3";
    let most = |head: &str, listener: &str| {
        let limits = limits(head, &format!("{listener}\n{accepts}"));
        let waiting: Vec<_> =
            (1..=20).map(|host| limits.wait_for(0, Stage::ProxyHeader, IpAddr::from([192, 0, 2, host]))).collect();
        let held = limits.pending(0, Stage::ProxyHeader).held();
        drop(waiting);
        assert_eq!(limits.pending(0, Stage::ProxyHeader).held(), 0);
        held
    };
    assert_eq!(most("", ""), 3);
    assert_eq!(most("", "max_connections = 5"), 2);
    assert_eq!(most("[server]\nmax_connections = 4", ""), 2);
    assert_eq!(most("[server]\nmax_connections = 1", ""), 1);
}
