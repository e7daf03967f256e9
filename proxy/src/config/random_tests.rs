//! Any configuration is printed so that it is read again; any text is read or refused, without a panic.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use proptest::prelude::*;

use super::contract_tests::FULL;
use super::error::Problem;
use super::pools::DOT_PORT;
use super::*;
use crate::proxy_protocol::seal::Seal;

/// Strings that may be names.
fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9._-]{1,64}".prop_filter("taken", |name| name != "drill" && name != "unknown")
}

fn duration(min: u64) -> impl Strategy<Value = Duration> {
    let max = u64::try_from(units::MAX_DURATION.as_millis()).unwrap();
    prop_oneof![min..=10_000, min..=max, Just(60_000)].prop_map(Duration::from_millis)
}

fn template() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just("{client_ip}".to_owned()),
        Just("{client_port}".to_owned()),
        Just("{listener}".to_owned()),
        Just("{qname}".to_owned()),
        Just("{qname_label:127}".to_owned()),
        Just("{qtype}".to_owned()),
        Just("{uuid}".to_owned()),
        Just("{sni}".to_owned()),
        Just("{edns:65001}".to_owned()),
        any::<u8>().prop_map(|kind| format!("{{incoming:{kind:#04X}}}")),
        Just("{{}}".to_owned()),
        "[^{}]{0,8}",
    ];
    prop_oneof![
        prop::collection::vec(part, 0..4)
            .prop_map(|parts| parts.concat())
            .prop_filter("hex", |t| !t.starts_with("hex:")),
        prop::collection::vec("[0-9a-fA-F]{2}", 0..8).prop_map(|bytes| format!("hex:{}", bytes.concat())),
    ]
}

fn identity() -> impl Strategy<Value = Identity> {
    prop_oneof![
        Just(Identity::Connection),
        Just(Identity::Address),
        (1..=32u8, 1..=128u8).prop_map(|(v4, v6)| Identity::Subnet { v4, v6 }),
        Just(Identity::Forwarder),
    ]
}

prop_compose! {
    fn proxy_protocol()(
        identity in identity(),
        max_header in 4096..=65_551usize,
        (crc32c, unique_id) in any::<(bool, bool)>(),
        (pass_incoming_tlvs, advertise_tls) in any::<(bool, bool)>(),
        tlvs in prop::collection::vec((0xe0..=0xefu8, template()), 0..4),
    ) -> ProxyProtocol {
        let mut set = TlvSet::default();
        for (kind, template) in tlvs {
            set.push(kind, template.parse().unwrap()).unwrap();
        }
        let seal = Seal { crc32c, unique_id };
        ProxyProtocol { identity, max_header, seal, advertise_tls, pass_incoming_tlvs, tlvs: set }
    }
}

prop_compose! {
    fn health()(
        mode in prop::sample::select(<HealthMode as choices::Choice>::ALL),
        times in (duration(10), duration(1)),
        name in "[a-z0-9_-]{1,63}(\\.[a-z0-9_-]{1,20}){0,5}\\.?",
        counts in (1..=1000u32, 1..=1000u32),
    ) -> Health {
        let (interval, timeout) = times;
        Health { mode, interval, timeout, name: name.parse().unwrap(), rise: counts.0, fall: counts.1 }
    }
}

prop_compose! {
    fn backend_tls()(
        server_name in "[a-z][a-z0-9]{0,8}(\\.[a-z][a-z0-9-]{0,8}[a-z]){0,3}|192\\.0\\.2\\.[1-9]|2001:db8::[1-9]",
        ca in prop::option::of("\\PC{1,20}"),
        proxy_outside_tls in any::<bool>(),
    ) -> BackendTls {
        let server_name = ServerName::try_from(server_name).unwrap();
        BackendTls { server_name, ca: ca.map(PathBuf::from), proxy_outside_tls, trust: Trust::default() }
    }
}

prop_compose! {
    fn backend()(
        port in 1..=u16::MAX,
        weight in 1..=1000u32,
        v6 in any::<bool>(),
        max_in_flight in 1..=65_536usize,
        max_connections in 1..=100_000usize,
        timeouts in (duration(1), duration(1)),
        sources in prop::collection::btree_set(1..=250u8, 0..4),
        one_shot_close in prop_oneof![Just(OneShotClose::Reset), Just(OneShotClose::Fin)],
        tls in prop::option::of(backend_tls()),
        tcp_fast_open: bool,
        health in health(),
    ) -> Backend {
        let ip = |host: u8| -> IpAddr {
            if v6 { format!("2001:db8::{host:x}").parse().unwrap() } else { IpAddr::from([192, 0, 2, host]) }
        };
        Backend {
            weight,
            max_in_flight,
            max_connections,
            connect_timeout: timeouts.0,
            write_timeout: timeouts.1,
            source: sources.into_iter().map(|host| SocketAddr::new(ip(host), 0)).collect(),
            one_shot_close,
            tls,
            tcp_fast_open,
            health,
            ..Backend::new("", SocketAddr::new(ip(251), if [53, DOT_PORT].contains(&port) { 5300 } else { port }))
        }
    }
}

prop_compose! {
    fn pool()(
        policy in prop::sample::select(<Policy as choices::Choice>::ALL),
        query_timeout in duration(1),
        retries in 0..=10u8,
        on_failure in prop::sample::select(<OnFailure as choices::Choice>::ALL),
        proxy_protocol in prop::option::of(proxy_protocol()),
        mut backends in prop::collection::vec(backend(), 1..4),
    ) -> Pool {
        backends.sort_by_key(|backend| backend.address);
        backends.dedup_by_key(|backend| backend.address);
        Pool { policy, query_timeout, retries, on_failure, proxy_protocol, ..Pool::new("", backends) }
    }
}

prop_compose! {
    fn network()(bits in any::<u32>(), v6 in any::<bool>(), prefix in 0..=32u8) -> Network {
        let ip = if v6 { IpAddr::from([0x2001, 0xdb8, 0, (bits >> 16) as u16, bits as u16, 0, 0, 0]) } else { bits.to_be_bytes().into() };
        let prefix = if v6 { prefix + 48 } else { prefix };
        format!("{}/{prefix}", network::masked(ip, prefix, prefix)).parse().unwrap()
    }
}

prop_compose! {
    fn accept_proxy()(
        from in prop::collection::hash_set(network(), 1..4),
        max_header in 107..=65_551usize,
        timeout in duration(1),
        max_pending in 1..=100_000usize,
        outside_tls in any::<bool>(),
    ) -> AcceptProxy {
        AcceptProxy { from: from.into_iter().collect(), max_header, timeout, max_pending, outside_tls }
    }
}

prop_compose! {
    fn tls()(
        files in ("[^\u{0}]{1,26}", "[^\u{0}]{1,26}"),
        handshake_timeout in duration(1),
        max_handshakes in 1..=100_000usize,
    ) -> ListenerTls {
        let (certificate, key) = (files.0.into(), files.1.into());
        ListenerTls { certificate, key, identity: None, handshake_timeout, max_handshakes }
    }
}

prop_compose! {
    fn listener(pools: usize)(
        address in any::<[u8; 3]>(),
        port in any::<u16>(),
        pool in 0..pools,
        numbers in (1..=100_000usize, 1..=65_536usize, 0..=100_000usize, 512..=(1usize << 30)),
        limits in (1..=32u8, 1..=128u8, any::<u32>(), 0..=1_000_000u32),
        timeouts in (duration(1), duration(1), duration(1), duration(0), duration(0), duration(0)),
        allow_from in prop::collection::hash_set(network(), 1..4),
        refuse in prop::sample::subsequence(<Refusable as choices::Choice>::ALL.to_vec(), 0..=7).prop_shuffle(),
        tcp in (any::<bool>(), 0..=65_535u32),
        accept_proxy in prop::option::of(accept_proxy()),
        tls in prop::option::of(tls()),
    ) -> Listener {
        let [a, b, c] = address;
        // Neither is a port for the other.
        let port = if [53, 853].contains(&port) { 5300 } else { port };
        Listener {
            max_connections_per_client: numbers.0,
            max_in_flight: numbers.1,
            max_connections: numbers.2,
            max_pending_answers: numbers.3,
            client_mask_v4: limits.0,
            client_mask_v6: limits.1,
            max_queries_per_connection: limits.2,
            connection_rate_per_client: limits.3,
            max_connection_duration: timeouts.3,
            ban_duration: timeouts.4,
            idle_timeout: timeouts.0,
            message_timeout: timeouts.1,
            write_timeout: timeouts.2,
            tcp_keepalive: timeouts.5,
            allow_from: allow_from.into_iter().collect(),
            refuse,
            edns_tcp_keepalive: tcp.0,
            tcp_fast_open: tcp.1,
            accept_proxy,
            tls,
            ..Listener::new("", SocketAddr::from(([127, a, b, c], port)), pool)
        }
    }
}

prop_compose! {
    fn connections()(
        times in (duration(1), duration(1), duration(0), duration(10), duration(1), duration(0)),
        spares_per_backend in 0..=1000usize,
        counts in (0..=100usize, 1..=100usize, 1..=100_000usize, 0..=1000usize),
        max_opens_per_client in 0..=1_000_000u32,
    ) -> Connections {
        Connections {
            idle_timeout: times.0,
            max_age: times.1,
            max_wait: times.2,
            cleanup_interval: times.3,
            spare_idle_timeout: times.4,
            tcp_keepalive: times.5,
            spares_per_backend,
            max_idle_per_backend: counts.0,
            max_owned_per_client: counts.1,
            max_total: counts.2,
            max_waiting: counts.3,
            max_opens_per_client,
        }
    }
}

prop_compose! {
    fn watchdog()(
        times in (duration(10), duration(0), duration(10)),
        sweeps in 1..=1000u32,
        reap in prop_oneof![Just(ReapMode::Off), Just(ReapMode::DryRun), Just(ReapMode::On)],
        max_reaps_per_minute in 1..=1_000_000u32,
        classes in prop::sample::subsequence(Class::ALL.to_vec(), 1..=7).prop_shuffle(),
    ) -> Watchdog {
        Watchdog {
            interval: times.0,
            grace: times.1,
            crosscheck_interval: times.2,
            sweeps,
            reap,
            max_reaps_per_minute,
            classes,
        }
    }
}

prop_compose! {
    fn shape()(pools in prop::collection::vec(pool(), 1..4))(
        listeners in prop::collection::vec(listener(pools.len()), 1..4),
        pools in Just(pools),
    ) -> (Vec<Listener>, Vec<Pool>) {
        (listeners, pools)
    }
}

prop_compose! {
    fn config()(
        (mut listeners, mut pools) in shape(),
        names in prop::collection::hash_set(name(), 12),
        server in (1..=1024usize, duration(0), 1..=1_000_000usize),
        overload in (1..=100u8, duration(1), duration(0)),
        connections in connections(),
        kernel in (
            prop_oneof![Just(View::Auto), Just(View::Ebpf), Just(View::SockDiag), Just(View::None)],
            1..=1_000_000u32,
        ),
        watchdog in watchdog(),
        http in prop::option::of(any::<u16>()),
        token_file in prop::option::of("[^\u{0}]{1,26}"),
        socket in prop::option::of("[^\u{0}]{1,26}"),
    ) -> Config {
        listeners.sort_by_key(|listener| listener.address);
        listeners.dedup_by_key(|listener| listener.address);
        // Twelve are enough for all backends; listeners and pools have name spaces of their own.
        for (listener, name) in listeners.iter_mut().zip(&names) {
            listener.name.clone_from(name);
        }
        for (pool, name) in pools.iter_mut().zip(&names) {
            pool.name.clone_from(name);
        }
        for (backend, name) in pools.iter_mut().flat_map(|pool| &mut pool.backends).zip(&names) {
            backend.name.clone_from(name);
        }
        let (workers, drain_timeout, max_connections) = server;
        Config {
            server: Server {
                workers,
                drain_delay: overload.1,
                drain_timeout,
                max_connections,
                log: "warn,counterfoil::watchdog=debug".to_owned(),
            },
            overload: Overload {
                threshold: overload.0,
                idle_timeout: overload.1,
                max_connection_duration: overload.2,
            },
            listeners,
            pools,
            connections,
            kernel: Kernel { view: kernel.0, max_sockets: kernel.1 },
            watchdog,
            admin: Admin {
                http: http.map(|port| SocketAddr::from(([127, 0, 0, 1], port))),
                token_file: token_file.map(PathBuf::from),
                socket: socket.map(PathBuf::from),
            },
        }
    }
}

proptest! {
    #[test]
    fn what_is_printed_is_read_again(config in config()) {
        let text = print::to_toml(&config);
        match from_str("printed.toml", &text) {
            Ok(read) => prop_assert_eq!(read, config),
            Err(errors) => prop_assert!(false, "{errors}\n{text}"),
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        drop(from_str("f", &text));
    }

    /// Text of the right words in any order: gets further than noise.
    #[test]
    fn any_words_are_read_or_refused(words in prop::collection::vec(
        prop_oneof![
            prop::sample::select(FULL.split_inclusive(['\n', ' ', '"', '=', '.', ':']).collect::<Vec<_>>()),
            prop::sample::select(vec!["\n", "[[", "]]", "=", "\"", "{", "}", ",", "-1", "0xE0", "\u{e9}", "\r\n"]),
        ],
        0..40,
    )) {
        drop(from_str("f", &words.concat()));
    }

    /// The full file with a piece cut out or replaced.
    #[test]
    fn a_damaged_file_is_read_or_refused(at in 0..FULL.len(), length in 0..80usize, patch in "[\\x00-\\x7f]{0,3}") {
        let (start, end) = (FULL.floor_char_boundary(at), FULL.floor_char_boundary(at + length));
        let text = format!("{}{patch}{}", FULL.get(..start).unwrap(), FULL.get(end..).unwrap());
        if let Err(errors) = from_str("f", &text) {
            let more = |problem: &Problem| matches!(problem, Problem::More(_));
            prop_assert!(errors.iter().all(|error| error.position.is_some() || more(&error.problem)));
        }
    }
}
