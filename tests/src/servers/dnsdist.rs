//! dnsdist 1.7.3 in four roles: as a backend that tells what was in the PROXY header, as the forwarder whose leak the
//! scenarios must be able to see, as one that speaks DNS over TLS, and as one without any setting.

use std::net::SocketAddr;
use std::path::Path;

use super::ADDRESS;
use crate::certificates::Certificate;
use crate::process::{self, Process};
use crate::tempdir::TempDir;

/// dnsdist as a backend: the answer to a TXT query holds the source and the TLVs of the PROXY header as it received them.
#[derive(Debug)]
pub struct TlvOracle {
    /// The process.
    pub process: Process,
    /// Where it listens; it wants a PROXY header there.
    pub address: SocketAddr,
    _dir: TempDir,
}

/// What the oracle's TXT answer tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Source address and port of the header.
    pub source: String,
    /// Destination address and port of the header.
    pub destination: String,
    /// `type=value` of each TLV, type in lower-case hexadecimal, sorted by type.
    pub tlvs: Vec<String>,
}

impl TlvOracle {
    /// Starts it.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_at(|port| format!("setLocal(\"127.0.0.1:{port}\")"))
    }

    /// Starts it with DNS over TLS alone. Version 1.7 wants the PROXY header inside.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_dot(certificate: &Certificate) -> Self {
        let Certificate { certificate, key } = certificate;
        let (certificate, key) = (certificate.display(), key.display());
        Self::start_at(|port| {
            // Without an address for clear text it would listen at port 53.
            let plain = process::free_port();
            format!("setLocal(\"127.0.0.1:{plain}\")\naddTLSLocal(\"127.0.0.1:{port}\", \"{certificate}\", \"{key}\")")
        })
    }

    #[track_caller]
    fn start_at(local: impl Fn(u16) -> String) -> Self {
        let dir = TempDir::new("oracle");
        let (process, address) = start("dnsdist (oracle)", "dnsdist", &dir, |port| {
            let local = local(port);
            format!(
                "{local}\n{COMMON}setProxyProtocolACL({{\"127.0.0.0/8\"}})\n{ORACLE}\
                 addAction(AllRule(), SpoofAction(\"{ADDRESS}\"))\n"
            )
        });
        Self { process, address, _dir: dir }
    }
}

impl Told {
    /// Reads the oracle's TXT answer.
    ///
    /// # Panics
    /// If it is no such answer.
    #[track_caller]
    pub fn read(answer: &[u8]) -> Self {
        let texts = crate::message::texts(answer);
        let [text] = texts.as_slice() else { panic!("one text was expected: {texts:?}") };
        let mut parts = text.split(';').map(str::to_owned);
        let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
            panic!("no addresses in {text:?}")
        };
        let mut tlvs: Vec<String> = parts.filter(|part| !part.is_empty()).collect();
        tlvs.sort();
        Self { source, destination, tlvs }
    }
}

/// dnsdist as the forwarder, with a TLV that differs per query: the failure this project is about (issue 15218 of
/// PowerDNS/pdns).
#[derive(Debug)]
pub struct LeakyFront {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub address: SocketAddr,
    /// Where its metrics are.
    pub web: SocketAddr,
    _dir: TempDir,
}

impl LeakyFront {
    /// Starts it in front of `backend`; TLV 0xE0 is the first label of the name asked.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(backend: SocketAddr) -> Self {
        Self::start_with("dnsdist", backend, "")
    }

    /// The same program at another path, by whose last part the kernel calls the process, and with more lines in its
    /// configuration.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start_with(program: &str, backend: SocketAddr, more: &str) -> Self {
        Self::with_options(program, backend, more, "")
    }

    /// Like [`Self::start`], with DNS over TLS to the backend, whose certificate must be for this name and from the
    /// authority in this file. The PROXY header is the first that goes through TLS.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn over_tls(backend: SocketAddr, ca: &Path, name: &str) -> Self {
        let tls = format!(", tls=\"openssl\", caStore=\"{}\", subjectName=\"{name}\"", ca.display());
        Self::with_options("dnsdist", backend, "", &tls)
    }

    #[track_caller]
    fn with_options(program: &str, backend: SocketAddr, more: &str, options: &str) -> Self {
        let dir = TempDir::new("dnsdist");
        let mut web = 0;
        let (process, address) = start("dnsdist (front)", program, &dir, |port| {
            web = process::free_port();
            format!(
                "setLocal(\"127.0.0.1:{port}\")\n{COMMON}{more}\
                 webserver(\"127.0.0.1:{web}\")\n\
                 setWebserverConfig({{statsRequireAuthentication=false, acl=\"127.0.0.0/8\"}})\n\
                 newServer({{address=\"{backend}\", useProxyProtocol=true{options}}})\ngetServer(0):setUp()\n\
                 addAction(AllRule(), LuaAction(function(dq)\n\
                 dq:setProxyProtocolValues({{[0xE0] = dq.qname:toString():match(\"^[^.]+\")}})\n\
                 return DNSAction.None, \"\"\nend))\n"
            )
        });
        Self { process, address, web: super::loopback(web), _dir: dir }
    }
}

/// dnsdist as a forwarder that speaks DNS over TLS to its clients.
#[derive(Debug)]
pub struct DotFront {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub address: SocketAddr,
    _dir: TempDir,
}

impl DotFront {
    /// Starts it in front of `backend`, with a certificate and its key from these files.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(backend: SocketAddr, certificate: &str, key: &str) -> Self {
        let dir = TempDir::new("dnsdist-dot");
        let (process, address) = start("dnsdist (DoT)", "dnsdist", &dir, |port| {
            format!(
                "addTLSLocal(\"127.0.0.1:{port}\", \"{certificate}\", \"{key}\", {{maxInFlight=1000}})\n{COMMON}\
                 newServer({{address=\"{backend}\"}})\ngetServer(0):setUp()\n"
            )
        });
        Self { process, address, _dir: dir }
    }
}

/// dnsdist as a forwarder without any setting of its own: it works on one query at a time for each connection of a client.
#[derive(Debug)]
pub struct SerialFront {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub address: SocketAddr,
    _dir: TempDir,
}

impl SerialFront {
    /// Starts it in front of `backend`.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn start(backend: SocketAddr) -> Self {
        let dir = TempDir::new("dnsdist-serial");
        let (process, address) = start("dnsdist (serial)", "dnsdist", &dir, |port| {
            format!(
                "setLocal(\"127.0.0.1:{port}\")\n{COMMON}newServer({{address=\"{backend}\"}})\ngetServer(0):setUp()\n"
            )
        });
        Self { process, address, _dir: dir }
    }
}

fn start(name: &str, program: &str, dir: &TempDir, mut config: impl FnMut(u16) -> String) -> (Process, SocketAddr) {
    let (process, port, ()) = process::start_on_free_port(name, |port| {
        let file = dir.write("dnsdist.conf", &config(port)).display().to_string();
        (Process::start(name, program, &["--supervised", "--disable-syslog", "-C", &file]), ())
    });
    (process, super::loopback(port))
}

/// `setSecurityPollSuffix("")`: without it dnsdist asks the internet for its own security status.
const COMMON: &str = "setSecurityPollSuffix(\"\")\nsetACL({\"0.0.0.0/0\"})\nsetVerboseHealthChecks(false)\n";

/// The answer is made from what the header said; dnsdist 1.7.3 adds a value of type 0 with no content by itself.
const ORACLE: &str = r#"
addAction(QTypeRule(DNSQType.TXT), LuaAction(function(dq)
  local text = dq.remoteaddr:toStringWithPort() .. ";" .. dq.localaddr:toStringWithPort()
  for kind, value in pairs(dq:getProxyProtocolValues()) do
    if kind ~= 0 or #value > 0 then
      text = text .. ";" .. string.format("%02x", kind) .. "=" .. value
    end
  end
  return DNSAction.SpoofRaw, string.char(#text) .. text
end))
"#;
