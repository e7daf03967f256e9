//! PowerDNS Recursor 4.8 with `proxy-protocol-from`.

use std::net::SocketAddr;
use std::time::Duration;

use super::{ADDRESS, ZONE};
use crate::process::{self, Process};
use crate::tempdir::TempDir;

/// A running Recursor.
#[derive(Debug)]
pub struct Recursor {
    /// The process.
    pub process: Process,
    /// Where it listens; it wants a PROXY header there.
    pub address: SocketAddr,
    _dir: TempDir,
}

/// What the Recursor says of one query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Source address of the PROXY header.
    pub source: String,
    /// `type=value` of each TLV, type in lower-case hexadecimal, in the order received.
    pub tlvs: Vec<String>,
}

impl Recursor {
    /// Starts it with its default of 128 TCP clients. With `log_queries`, see [`Self::seen`].
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(log_queries: bool) -> Self {
        Self::start_for(log_queries, "0.0.0.0/0")
    }

    /// The same; it closes the connections of clients that are not in `allow_from`.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_for(log_queries: bool, allow_from: &str) -> Self {
        let dir = TempDir::new("recursor");
        let zone = dir.write(
            "zone",
            &format!("$ORIGIN {ZONE}.\n@ 60 IN SOA ns h 1 60 60 60 60\n@ 60 IN NS ns\n* 60 IN A {ADDRESS}\n"),
        );
        let script = dir.write("tags.lua", TAGS);
        let (process, port, ()) = process::start_on_free_port("pdns_recursor", |port| {
            // `dont-query`: it would look for the root servers on the internet.
            let mut config = format!(
                "local-address=127.0.0.1\nlocal-port={port}\nproxy-protocol-from=127.0.0.0/8\nallow-from={allow_from}\n\
                 auth-zones={ZONE}={zone}\ndaemon=no\nsocket-dir={dir}\nsecurity-poll-suffix=\nquiet=yes\nloglevel=6\n\
                 disable-syslog=yes\ndont-query=0.0.0.0/0\n",
                zone = zone.display(),
                dir = dir.path().display(),
            );
            if log_queries {
                config.push_str(&format!("lua-dns-script={}\n", script.display()));
            }
            dir.write("recursor.conf", &config);
            let config_dir = format!("--config-dir={}", dir.path().display());
            (Process::start("pdns_recursor", "pdns_recursor", &[config_dir]), ())
        });
        Self { process, address: super::loopback(port), _dir: dir }
    }

    /// What the Recursor saw of the connection that brought the query for `name`.
    ///
    /// # Panics
    /// If it logs no query for it in time.
    #[track_caller]
    pub fn seen(&mut self, name: &str) -> Seen {
        let marker = format!("seen {name}. ");
        self.process.wait_for_line(Duration::from_secs(5), &format!("a query for {name}"), |line| {
            let (_, rest) = line.split_once(&marker)?;
            // `... msg="seen n1.example.test. 127.0.0.2 e0=n1" subsystem="lua" ...`
            let mut words = rest.split('"').next()?.split(' ').map(str::to_owned);
            Some(Seen { source: words.next()?, tlvs: words.collect() })
        })
    }
}

const TAGS: &str = r#"
function gettag(remote, ednssubnet, localip, qname, qtype, ednsoptions, tcp, proxyprotocolvalues)
  local line = "seen " .. qname:toString() .. " " .. remote:toString()
  for _, value in ipairs(proxyprotocolvalues) do
    line = line .. " " .. string.format("%02x", value:getType()) .. "=" .. value:getContent()
  end
  pdnslog(line, pdns.loglevels.Notice)
  return 0
end
"#;
