//! Attackers beside good neighbours: what `docs/isolation.md` promises, seen from the neighbours' side.
//!
//! A scenario takes a [`Scene`] (how clients come and who shares backend connections), starts [`Neighbours`] that ask one
//! question after the other, does its worst as an attacker, and looks at the [`Wait`] of the neighbours: none of their
//! queries may fail, and how long they waited is told in what the attacker was served meanwhile, never by a clock.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::certificates::Authority;
use crate::config::Config;
use crate::counterfoil::Counterfoil;
use crate::driver::{Client, Received, Tls};
use crate::message::{self, qtype, rcode};
use crate::servers::ZONE;

/// The name in the certificate of a listener over TLS.
const NAME: &str = "dns.example";

/// Whom a backend connection belongs to, and how clients come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// `[pool.proxy_protocol] identity`; none: no header, all clients share.
    pub identity: Option<&'static str>,
    /// Clients come over TLS.
    pub tls: bool,
}

impl Setting {
    /// No header: everybody shares; over TCP.
    pub const SHARED: Self = Self { identity: None, tls: false };

    /// This identity, over TCP.
    pub const fn identity(identity: &'static str) -> Self {
        Self { identity: Some(identity), tls: false }
    }

    /// The same over TLS.
    #[must_use]
    pub const fn over_tls(self) -> Self {
        Self { tls: true, ..self }
    }

    /// No header and all four identities, over TCP and over TLS: what `soak` runs.
    pub fn all() -> impl Iterator<Item = Self> {
        let identities = [None, Some("connection"), Some("address"), Some("subnet"), Some("forwarder")];
        identities.into_iter().flat_map(|identity| [false, true].map(|tls| Self { identity, tls }))
    }
}

/// A [`Setting`] with what it takes: certificates, if there is TLS.
#[derive(Debug)]
pub struct Scene {
    setting: Setting,
    tls: Option<(Authority, Tls)>,
}

impl Scene {
    /// Makes what the setting takes.
    ///
    /// # Panics
    /// If a file cannot be written.
    pub fn new(setting: Setting) -> Self {
        let tls = setting.tls.then(|| {
            let authority = Authority::new();
            let tls = Tls::new(&authority.ca, NAME).offering(&["dot"]);
            (authority, tls)
        });
        Self { setting, tls }
    }

    /// Whether the backend must expect PROXY headers.
    pub fn has_header(&self) -> bool {
        self.setting.identity.is_some()
    }

    /// A listener and a pool with this backend, one worker that all clients share; it comes to rest soon.
    pub fn config(&self, backend: SocketAddr) -> Config {
        let config = Config::new(backend).settles_soon();
        let config = match self.setting.identity {
            Some(identity) => config.identity(identity),
            None => config,
        };
        match &self.tls {
            Some((authority, _)) => config.tls(&authority.issue("dns", &[NAME])),
            None => config,
        }
    }

    /// A client from `source`, an address of 127.0.0.0/8.
    ///
    /// # Panics
    /// If it is not served.
    #[track_caller]
    pub fn connect(&self, listener: SocketAddr, source: IpAddr) -> Client {
        match &self.tls {
            Some((_, tls)) => Client::connect_tls(listener, Some(source), tls),
            None => Client::connect(listener, Some(source)),
        }
    }

    /// The client's side of the handshake on a connection that is there already; nothing without TLS.
    ///
    /// # Errors
    /// It fails.
    pub fn shake_hands(&self, client: Client) -> std::io::Result<Client> {
        match &self.tls {
            Some((_, tls)) => client.over_tls(tls),
            None => Ok(client),
        }
    }

    /// So many good clients, each from an address of its own (127.1.0.1 and on), which ask one question after the other until
    /// they are [finished](Neighbours::finish). `served` is what the attacker has been served so far, in whatever the
    /// scenario counts: messages, queries, octets.
    ///
    /// # Panics
    /// If one is not let in.
    #[track_caller]
    pub fn neighbours(&self, counterfoil: &Counterfoil, count: u8, served: &Arc<AtomicUsize>) -> Neighbours {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicUsize::new(0));
        let threads = (1..=count).map(|number| {
            let client = self.connect(counterfoil.address, IpAddr::from(Ipv4Addr::new(127, 1, 0, number)));
            let (stop, served, answered) = (Arc::clone(&stop), Arc::clone(served), Arc::clone(&answered));
            std::thread::spawn(move || ask_on(client, number, &stop, &served, &answered))
        });
        Neighbours { threads: threads.collect(), stop, answered }
    }
}

/// Asks until it is told to stop.
fn ask_on(mut client: Client, number: u8, stop: &AtomicBool, served: &AtomicUsize, answered: &AtomicUsize) -> Wait {
    let mut wait = Wait::default();
    while !stop.load(Ordering::SeqCst) {
        let name = format!("n{number}-{}.{ZONE}", wait.answered + wait.failed);
        let before = served.load(Ordering::SeqCst);
        let answer = client.exchange(u16::from(number), &name, qtype::A);
        let meanwhile = served.load(Ordering::SeqCst).saturating_sub(before);
        if message::response_code(&answer) == rcode::NOERROR {
            wait.answered += 1;
            answered.fetch_add(1, Ordering::SeqCst);
        } else {
            wait.failed += 1;
        }
        wait.longest = wait.longest.max(meanwhile);
    }
    wait
}

/// Good clients that ask.
#[derive(Debug)]
pub struct Neighbours {
    threads: Vec<JoinHandle<Wait>>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
}

/// What became of the neighbours' queries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wait {
    /// Queries with a good answer.
    pub answered: usize,
    /// Queries with an error.
    pub failed: usize,
    /// The most that the attacker was served while one of them waited.
    pub longest: usize,
}

impl Neighbours {
    /// Queries that have been answered so far.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::SeqCst)
    }

    /// They ask no more, and leave.
    ///
    /// # Panics
    /// If one of them was cut off, or had no answer in 10 s.
    #[track_caller]
    pub fn finish(mut self) -> Wait {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Wait::default();
        for thread in self.threads.drain(..) {
            let wait = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            all.answered += wait.answered;
            all.failed += wait.failed;
            all.longest = all.longest.max(wait.longest);
        }
        all
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Clients that always have as much in flight as they may, until they are dropped; what becomes of their queries is no
/// matter.
#[derive(Debug)]
pub struct Flood {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Scene {
    /// A [`Flood`] from these addresses, a connection from each, with so many queries in flight; the names begin with
    /// `label`, and none comes twice.
    ///
    /// # Panics
    /// If one is not let in.
    #[track_caller]
    pub fn flood(
        &self,
        counterfoil: &Counterfoil,
        sources: impl IntoIterator<Item = IpAddr>,
        in_flight: u16,
        label: &str,
    ) -> Flood {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = sources.into_iter().enumerate().map(|(number, source)| {
            let mut client = self.connect(counterfoil.address, source);
            let (stop, label) = (Arc::clone(&stop), format!("{label}{number}"));
            std::thread::spawn(move || {
                // The ID of an answer is that of the next query.
                let mut free: Vec<u16> = (0..in_flight).collect();
                let mut asked = 0;
                while !stop.load(Ordering::SeqCst) {
                    let mut batch = Vec::new();
                    for id in free.drain(..) {
                        asked += 1;
                        let name = format!("{label}-{asked}.{ZONE}");
                        batch.extend_from_slice(&message::framed(&message::query(id, &name, qtype::A)));
                    }
                    if client.send_raw(&batch).is_err() {
                        return;
                    }
                    match client.receive(FLOOD_POLL) {
                        Received::Message(answer) => free.push(message::id(&answer)),
                        Received::Nothing => {}
                        Received::Closed | Received::Reset | Received::Cut => return,
                    }
                }
            })
        });
        Flood { threads: threads.collect(), stop }
    }
}

/// How often a [`Flood`] looks whether it is to end.
const FLOOD_POLL: Duration = Duration::from_millis(100);

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
