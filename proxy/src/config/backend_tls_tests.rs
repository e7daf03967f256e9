//! What can be wrong with `[pool.backend.tls]`, in the file and in those that it names.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use super::contract_tests::MINIMAL;
use super::{from_str, load};

/// The errors of the minimal configuration with this in the table, from line 14.
fn tls(lines: &str) -> String {
    from_str("f.toml", &format!("{MINIMAL}[pool.backend.tls]\n{lines}\n")).unwrap_err().to_string()
}

#[test]
fn names_and_addresses() {
    assert_eq!(tls(""), "f.toml:13:1: key `pool.backend.tls.server_name`: is missing");
    assert_eq!(
        tls("server_name = \"-a-.example\""),
        "f.toml:14:15: key `pool.backend.tls.server_name`: \"-a-.example\" is neither a host name nor an IP address"
    );
    assert_eq!(
        tls("server_name = \"a.example\"\nca = 1\nproxy_outside_tls = \"yes\""),
        "f.toml:15:6: key `pool.backend.tls.ca`: expected a string, found integer\n\
         f.toml:16:21: key `pool.backend.tls.proxy_outside_tls`: expected true or false, found string"
    );
    let port =
        |port: &str, more: &str| from_str("f.toml", &(MINIMAL.replace("15302", port) + more)).unwrap_err().to_string();
    assert_eq!(
        port("853", ""),
        "f.toml:12:11: key `pool.backend.address`: port 853 is for DNS over TLS, never in the clear (RFC 7858 section 3.1): \
         [pool.backend.tls] is missing"
    );
    assert_eq!(
        port("53", "tls.server_name = \"a.example\""),
        "f.toml:12:11: key `pool.backend.address`: port 53 is for DNS in the clear, never over TLS (RFC 7858 section 3.1): \
         [pool.backend.tls] has another port"
    );
}

/// Files are looked for where the configuration is, and named as they are opened.
#[test]
fn files_of_issuers() {
    let directory = std::env::temp_dir().join(format!("counterfoil-trust-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let file = directory.join("f.toml");
    let tls = "[pool.backend.tls]\nserver_name = \"a.example\"\nca = \"ca.pem\"\n";
    std::fs::write(&file, format!("{MINIMAL}{tls}")).unwrap();
    let said = || load(&file).unwrap_err().to_string();
    let (place, ca) = (file.display(), directory.join("ca.pem"));
    let head = format!("{place}:15:6: key `pool.backend.tls.ca`:");
    assert_eq!(said(), format!("{head} {} cannot be read: No such file or directory (os error 2)", ca.display()));
    std::fs::write(&ca, "nothing").unwrap();
    assert_eq!(said(), format!("{head} {} holds no certificate", ca.display()));
    std::fs::write(&ca, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    assert!(said().starts_with(&format!("{head} certificate 1 of {} is damaged, ", ca.display())), "{}", said());
    std::fs::write(&ca, crate::tls::fixture::pair("a.example").certificate).unwrap();
    let first = load(&file).unwrap();
    let mut second = load(&file).unwrap();
    assert_eq!(first, second);
    std::fs::write(&ca, crate::tls::fixture::pair("a.example").certificate).unwrap();
    let third = load(&file).unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert_ne!(first, third, "the file is the same, what is in it is not");
    second.keep_sessions_of(&first);
    assert_eq!(first, second);
}
