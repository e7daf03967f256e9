//! The programs that are compared, and how each is configured for a scenario.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::certificate::SERVER_NAME;
use super::measure::Plan;
use super::process::{self, Process, TempDir};
use super::scenario::{Header, Scenario};
use super::tools::Tools;

/// How often a peer may lose the port that was chosen for it to somebody else.
const ATTEMPTS: u32 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Subject {
    /// Copies octets and knows no DNS: the floor
    Relay,
    Haproxy,
    Dnsdist,
    /// An older build of Counterfoil
    #[value(skip)]
    Before,
    Counterfoil,
}

/// A subject that listens.
pub(super) struct Running {
    pub(super) process: Process,
    pub(super) address: SocketAddrV4,
    subject: Subject,
}

impl Running {
    /// CPU time of Counterfoil's watchdog so far, in nanoseconds.
    pub(super) fn watchdog_cpu(&self) -> Result<Option<u64>> {
        if !self.subject.is_ours() {
            return Ok(None);
        }
        self.process.thread_cpu("watchdog").map(Some)
    }

    /// Ends it. Counterfoil must have drained cleanly.
    pub(super) fn stop(mut self) -> Result<()> {
        if self.subject.is_ours() {
            let status = self.process.terminate()?;
            ensure!(status.success(), "counterfoil ended with {status} after SIGTERM");
        }
        Ok(())
    }
}

impl Subject {
    pub(super) const ALL: [Self; 4] = [Self::Relay, Self::Haproxy, Self::Dnsdist, Self::Counterfoil];

    /// Whether it is a build of Counterfoil.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Before | Self::Counterfoil)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Haproxy => "haproxy",
            Self::Dnsdist => "dnsdist",
            Self::Before => "before",
            Self::Counterfoil => "counterfoil",
        }
    }

    /// The relay knows no TLS. HAProxy in TCP mode sees no queries; Debian's sends no TLVs of one's own either.
    pub(super) fn can(self, scenario: &Scenario) -> bool {
        match self {
            Self::Relay => !scenario.tls && !scenario.backend_tls,
            Self::Haproxy => scenario.header != Header::Label,
            // It has no way to name the forwarder instead of the client.
            Self::Dnsdist => scenario.identity == "connection",
            Self::Before | Self::Counterfoil => true,
        }
    }

    /// Starts it in front of `backend`, with its files in `directory`, and waits until it listens.
    pub(super) fn start(
        self,
        plan: &Plan<'_>,
        scenario: &Scenario,
        backend: SocketAddrV4,
        directory: &TempDir,
    ) -> Result<Running> {
        let tools = plan.tools;
        let (process, address) = match self {
            Self::Relay => {
                let mode = match scenario.header {
                    Header::None => "copy",
                    Header::Address => "proxy",
                    Header::Label => "per-query",
                };
                let mut relay = tools.own("relay");
                relay.args([&backend.to_string(), "--mode", mode]);
                let mut process = Process::start("relay", &mut relay, directory.path())?;
                let Listening { address } = process.read()?;
                (process, address)
            }
            Self::Haproxy => on_free_port(|address| {
                let file = directory.write("haproxy.cfg", &haproxy(plan, scenario, address, backend))?;
                // -db: in the foreground, one process.
                Process::start("haproxy", tools.peer("haproxy")?.args(["-db", "-f"]).arg(file), directory.path())
            })?,
            Self::Dnsdist => on_free_port(|address| {
                let file = directory.write("dnsdist.conf", &dnsdist(plan, scenario, address, backend))?;
                let mut dnsdist = tools.peer("dnsdist")?;
                dnsdist.args(["--supervised", "--disable-syslog", "-C"]).arg(file);
                Process::start("dnsdist", &mut dnsdist, directory.path())
            })?,
            Self::Before | Self::Counterfoil => {
                let config = counterfoil(plan, scenario, backend, directory.path());
                return start_counterfoil(tools, self, &config, directory);
            }
        };
        Ok(Running { process, address, subject: self })
    }
}

/// Starts the build of Counterfoil that `subject` names with this configuration, and waits until it is ready.
pub(super) fn start_counterfoil(tools: &Tools, subject: Subject, config: &str, directory: &TempDir) -> Result<Running> {
    let file = directory.write("counterfoil.toml", config)?;
    let mut command = tools.counterfoil(subject);
    command.args(["run", "--log-format", "json", "--config"]).arg(file);
    let mut process = Process::start(subject.name(), &mut command, directory.path())?;
    let log = process.wait_for("it was ready", ready_log)?;
    let address = listening_address(&log).context("no `listening` line in its log")?;
    Ok(Running { process, address, subject })
}

/// What our own programs say first.
#[derive(Deserialize)]
pub(super) struct Listening {
    pub(super) address: SocketAddrV4,
}

/// Starts a peer that must be told its port.
fn on_free_port(start: impl Fn(SocketAddrV4) -> Result<Process>) -> Result<(Process, SocketAddrV4)> {
    let mut attempt = 1;
    loop {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, process::free_port()?);
        let mut process = start(address)?;
        match process.wait_for("it listened", |_| process::listens(address).then_some(())) {
            Ok(()) => return Ok((process, address)),
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(_) => attempt += 1,
        }
    }
}

/// Two threads, as Counterfoil has two workers.
fn haproxy(plan: &Plan<'_>, scenario: &Scenario, address: SocketAddrV4, backend: SocketAddrV4) -> String {
    let header = if scenario.header == Header::Address { "send-proxy-v2" } else { "" };
    let certificate = plan.tools.certificate();
    let tls = if scenario.tls {
        format!("ssl crt {} alpn dot ssl-min-ver TLSv1.3", certificate.both().display())
    } else {
        String::new()
    };
    let backend_tls = if scenario.backend_tls {
        let ca = certificate.certificate();
        format!("ssl verify required ca-file {} sni str({SERVER_NAME}) alpn dot", ca.display())
    } else {
        String::new()
    };
    format!(
        "global\n    nbthread 2\n    maxconn 9500\n\
         defaults\n    mode tcp\n    timeout connect 5s\n    timeout client 120s\n    timeout server 120s\n\
         frontend dns\n    bind {address} {tls}\n    default_backend answerer\n\
         backend answerer\n    server answerer {backend} {header} {backend_tls}\n"
    )
}

/// Two TCP threads, 1,000 queries in flight on each side. Without the poll suffix it would ask the internet for its own
/// security status.
fn dnsdist(plan: &Plan<'_>, scenario: &Scenario, address: SocketAddrV4, backend: SocketAddrV4) -> String {
    const LISTENER: &str = "maxInFlight=1000, tcpListenQueueSize=4096";
    let proxy = scenario.header != Header::None;
    let certificate = plan.tools.certificate();
    let listener = if scenario.tls {
        format!(
            "addTLSLocal(\"{address}\", \"{}\", \"{}\", {{provider=\"openssl\", minTLSVersion=\"tls1.3\", {LISTENER}}})",
            certificate.certificate().display(),
            certificate.key().display()
        )
    } else {
        format!("addLocal(\"{address}\", {{{LISTENER}}})")
    };
    let tls = if scenario.backend_tls {
        let ca = certificate.certificate();
        format!(", tls=\"openssl\", subjectName=\"{SERVER_NAME}\", caStore=\"{}\"", ca.display())
    } else {
        String::new()
    };
    let rule = match scenario.header {
        Header::None | Header::Address => "",
        Header::Label => {
            "addAction(AllRule(), LuaAction(function(dq)\n\
             dq:setProxyProtocolValues({[0xE0] = dq.qname:toString():match(\"^[^.]+\")})\n\
             return DNSAction.None, \"\"\nend))\n"
        }
    };
    format!(
        "setSecurityPollSuffix(\"\")\nsetACL({{\"127.0.0.0/8\"}})\nsetMaxTCPClientThreads(2)\n\
         setTCPRecvTimeout(120)\nsetMaxCachedTCPConnectionsPerDownstream(1000)\nsetTCPInternalPipeBufferSize(1048576)\n\
         {listener}\n\
         newServer({{address=\"{backend}\", useProxyProtocol={proxy}, maxInFlight=1000{tls}}})\n\
         getServer(0):setUp()\n{rule}"
    )
}

/// Limits that no scenario reaches, idle timeouts longer than any run; the watchdog, metrics and the kernel view are on.
fn counterfoil(plan: &Plan<'_>, scenario: &Scenario, backend: SocketAddrV4, directory: &Path) -> String {
    let proxy = match scenario.header {
        Header::None => String::new(),
        Header::Address | Header::Label => format!("[pool.proxy_protocol]\nidentity = \"{}\"\n", scenario.identity),
    };
    let tlv = match scenario.header {
        Header::None | Header::Address => "",
        Header::Label => "[[pool.proxy_protocol.tlv]]\ntype = 0xE0\nvalue = \"{qname_label:1}\"\n",
    };
    let certificate = plan.tools.certificate();
    let tls = if scenario.tls {
        format!(
            "[listener.tls]\ncertificate = \"{}\"\nkey = \"{}\"\nmax_handshakes = 15000\n",
            certificate.certificate().display(),
            certificate.key().display()
        )
    } else {
        String::new()
    };
    let backend_tls = if scenario.backend_tls {
        let ca = certificate.certificate();
        format!("[pool.backend.tls]\nserver_name = \"{SERVER_NAME}\"\nca = \"{}\"\n", ca.display())
    } else {
        String::new()
    };
    let socket = directory.join("counterfoil.sock");
    format!(
        "[server]\nworkers = {}\nmax_connections = 15000\n\
         [[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:0\"\npool = \"answerers\"\n\
         max_connections_per_client = 15000\nmax_in_flight = 1000\nidle_timeout = \"120s\"\n{tls}\
         [[pool]]\nname = \"answerers\"\n{proxy}{tlv}\
         [[pool.backend]]\nname = \"answerer\"\naddress = \"{backend}\"\nmax_in_flight = 1000\n\
         max_connections = 15000\n{backend_tls}[pool.backend.health]\nmode = \"up\"\n\
         [connections]\nidle_timeout = \"120s\"\nmax_owned_per_client = 64\nmax_total = 15000\n\
         max_idle_per_backend = 15000\nspares_per_backend = {}\n\
         [admin]\nhttp = \"127.0.0.1:0\"\nsocket = \"{}\"\n\
         [kernel]\nview = \"{}\"\n",
        scenario.workers,
        scenario.spares,
        socket.display(),
        plan.kernel_view
    )
}

/// Counterfoil's log once it is ready.
fn ready_log(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    let ready = text.lines().any(|line| message(line).is_some_and(|fields| fields["message"] == "ready"));
    ready.then_some(text)
}

fn listening_address(log: &str) -> Option<SocketAddrV4> {
    let fields = log.lines().filter_map(message).find(|fields| fields["message"] == "listening")?;
    fields["address"].as_str()?.parse().ok()
}

fn message(line: &str) -> Option<serde_json::Value> {
    serde_json::from_str::<serde_json::Value>(line).ok()?.get_mut("fields").map(serde_json::Value::take)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_in_the_log() {
        let log = "{\"level\":\"INFO\",\"fields\":{\"message\":\"starting\"}}\nnot json\n\
                   {\"level\":\"INFO\",\"fields\":{\"message\":\"listening\",\"listener\":\"dns\",\
                   \"address\":\"127.0.0.1:4711\"}}\n";
        assert_eq!(listening_address(log), Some(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4711)));
        assert_eq!(listening_address("{\"fields\":{\"message\":\"ready\"}}"), None);
    }
}
