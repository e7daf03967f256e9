//! What can be wrong with `[listener.tls]`, and with the files that it names.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use super::contract_tests::MINIMAL;
use super::{from_str, load};
use crate::tls::fixture::{Pair, pair};
use crate::tls::pem::PemFault;
use crate::tls::server::ServerTls;

fn errors(text: &str) -> String {
    from_str("f.toml", text).unwrap_err().to_string()
}

/// The errors of these keys of `[listener.tls]`, from line 6.
fn tls(keys: &str) -> String {
    let (listener, rest) = MINIMAL.split_once("\n[[pool]]").unwrap();
    errors(&format!("{listener}[listener.tls]\n{keys}\n[[pool]]{rest}"))
}

#[test]
fn tls_towards_clients() {
    assert_eq!(
        tls("handshake_timeout = \"0s\"\nmax_handshakes = 0"),
        "f.toml:6:1: key `listener.tls.certificate`: is missing\n\
         f.toml:6:1: key `listener.tls.key`: is missing\n\
         f.toml:7:21: key `listener.tls.handshake_timeout`: must be from \"1ms\" to \"8760h\"\n\
         f.toml:8:18: key `listener.tls.max_handshakes`: must be from 1 to 1048576"
    );
    let listener = |port: u16, tls: &str| {
        errors(&MINIMAL.replace(":5300", &format!(":{port}")).replacen("\n[[pool]]", &format!("{tls}\n[[pool]]"), 1))
    };
    assert_eq!(
        listener(853, ""),
        "f.toml:4:11: key `listener.address`: port 853 is for DNS over TLS, never in the clear (RFC 7858 section 3.1): \
         [listener.tls] is missing"
    );
    assert_eq!(
        listener(53, "[listener.tls]\ncertificate = \"c\"\nkey = \"k\""),
        "f.toml:4:11: key `listener.address`: port 53 is for DNS in the clear, never over TLS (RFC 7858 section 3.1): \
         [listener.tls] has another port"
    );
    assert_eq!(
        errors(&format!("{MINIMAL}[pool.proxy_protocol]\nadvertise_tls = 1")),
        "f.toml:14:17: key `pool.proxy_protocol.advertise_tls`: expected true or false, found integer"
    );
}

/// Files are looked for where the configuration is; what is wrong with them is said at the key that names them.
#[test]
fn files_of_certificates() {
    let directory = std::env::temp_dir().join(format!("counterfoil-identity-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
    let (listener, rest) = MINIMAL.split_once("\n[[pool]]").unwrap();
    let text = format!("{listener}[listener.tls]\ncertificate = \"c.pem\"\nkey = \"k.pem\"\n[[pool]]{rest}");
    write("f.toml", &text);
    let file = directory.join("f.toml");
    let said = || load(&file).unwrap_err().to_string();
    let place = directory.display();
    let certificate = format!("{place}/f.toml:7:15: key `listener.tls.certificate`: {place}/c.pem");
    let key = format!("{place}/f.toml:8:7: key `listener.tls.key`: {place}/k.pem");
    assert_eq!(said(), format!("{certificate} cannot be read: No such file or directory (os error 2)"));
    let Pair { certificate: first, key: first_key } = pair("dns.example");
    write("c.pem", &first);
    assert_eq!(said(), format!("{key} cannot be read: No such file or directory (os error 2)"));
    write("k.pem", &first);
    assert_eq!(said(), format!("{key} holds no private key"));
    let second = pair("dns.example");
    write("k.pem", &second.key);
    assert_eq!(said(), format!("{key} {}", PemFault::OtherKey));
    write("k.pem", &first_key);
    let config = load(&file).unwrap();
    write("c.pem", &second.certificate);
    write("k.pem", &second.key);
    let renewed = load(&file).unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(config.listeners[0].tls.as_ref().unwrap().certificate.to_str(), Some("c.pem"), "printed as written");
    assert_ne!(config, renewed, "the files are the same, what is in them is not");
    // What a reload does: TLS is turned off and on again; without what is in the files nothing changes.
    let tls = ServerTls::new(&renewed).unwrap();
    let greeting = tls.greeting(0).unwrap();
    assert_eq!(greeting.timeout, std::time::Duration::from_secs(5));
    let unread = from_str("f.toml", &text).unwrap();
    assert!(tls.adopt(&unread).is_err() && ServerTls::new(&unread).is_err());
    assert!(std::sync::Arc::ptr_eq(&tls.greeting(0).unwrap().config, &greeting.config));
    tls.adopt(&from_str("f.toml", MINIMAL).unwrap()).unwrap();
    assert!(tls.greeting(0).is_none());
    tls.adopt(&config).unwrap();
    assert!(!std::sync::Arc::ptr_eq(&tls.greeting(0).unwrap().config, &greeting.config));
}

/// Certificate and key may be one file; then what is wrong tells which of the two keys is meant.
#[test]
fn one_file_without_a_key_lacks_the_key() {
    let directory = std::env::temp_dir().join(format!("counterfoil-one-file-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (listener, rest) = MINIMAL.split_once("\n[[pool]]").unwrap();
    let text = format!("{listener}[listener.tls]\ncertificate = \"c.pem\"\nkey = \"c.pem\"\n[[pool]]{rest}");
    std::fs::write(directory.join("f.toml"), text).unwrap();
    let Pair { certificate, key } = pair("dns.example");
    let said = |text: &str| {
        std::fs::write(directory.join("c.pem"), text).unwrap();
        load(&directory.join("f.toml")).unwrap_err().to_string()
    };
    let (no_key, no_certificate) = (said(&certificate), said(&key));
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(no_key.contains(":8:7: key `listener.tls.key`: ") && no_key.contains("no private key"), "{no_key}");
    assert!(no_certificate.contains(":7:15: key `listener.tls.certificate`: "), "{no_certificate}");
}
