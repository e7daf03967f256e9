//! What the eBPF view costs, measured inside a process that holds many sockets; for `cargo xtask bench --cost`.
//!
//! Prints one line of JSON: for each figure all samples, in microseconds. Needs what the eBPF view needs.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use clap::Parser;
use counterfoil::config::View;
use counterfoil::kernel::open;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use socket2::{Domain, SockRef, Socket, Type};

const MAX_SOCKETS: u32 = 65_536;

/// Connections that one listener's queue holds: nobody accepts, so that the peers need no descriptors here.
const QUEUE: i32 = 4_000;

#[derive(Parser)]
#[command(about = "What the eBPF view costs", version)]
struct Options {
    /// Connections that are open while sweeps are measured
    #[arg(long, default_value_t = 10_000)]
    sockets: usize,
    /// Sweeps
    #[arg(long, default_value_t = 300)]
    sweeps: usize,
    /// Cross-checks
    #[arg(long, default_value_t = 30)]
    crosschecks: usize,
    /// Rounds of connections, each without the programs and with them
    #[arg(long, default_value_t = 21)]
    rounds: usize,
    /// Connections in a round
    #[arg(long, default_value_t = 2_000)]
    connects: u32,
}

/// Samples of wall-clock time and of CPU time of the calling thread.
#[derive(Default)]
struct Samples {
    wall_us: Vec<f64>,
    cpu_us: Vec<f64>,
}

impl Samples {
    /// Measures one run that does `units` of something.
    fn take<E>(&mut self, units: u32, run: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let (wall, before) = (Instant::now(), cpu());
        run()?;
        let per_unit = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(units);
        self.cpu_us.push(per_unit(cpu().saturating_sub(before)));
        self.wall_us.push(per_unit(wall.elapsed()));
        Ok(())
    }

    fn json(&self) -> Value {
        json!({"wall_us": self.wall_us, "cpu_us": self.cpu_us})
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let (sweep, crosscheck) = sweeps(&options)?;
    let (without, with) = connections(&options)?;
    let result = json!({
        "sockets": options.sockets,
        "sweep": sweep.json(),
        "crosscheck": crosscheck.json(),
        "connect_without": without.json(),
        "connect_with": with.json(),
    });
    println!("{result}");
    Ok(())
}

/// Sweeps and cross-checks with so many sockets open.
fn sweeps(options: &Options) -> anyhow::Result<(Samples, Samples)> {
    let (mut view, ..) = open(View::Ebpf, &[], MAX_SOCKETS)?;
    let mut listeners = Vec::new();
    let mut sockets = Vec::new();
    while sockets.len() < options.sockets {
        if sockets.len() >= listeners.len() * QUEUE as usize {
            listeners.push(listener()?);
        }
        let address: &SocketAddr = &listeners[listeners.len() - 1].1;
        sockets.push(TcpStream::connect(address)?);
    }
    let (mut sweep, mut crosscheck) = (Samples::default(), Samples::default());
    for _ in 0..options.sweeps {
        sweep.take(1, || view.snapshot().map(drop))?;
    }
    for _ in 0..options.crosschecks {
        crosscheck.take(1, || view.crosscheck().map(drop))?;
    }
    let held = view.snapshot()?.sockets.iter().filter(|socket| socket.held).count();
    anyhow::ensure!(held == options.sockets, "the view has {held} of {} sockets", options.sockets);
    // No TIME_WAIT: what follows needs the ports.
    for socket in &sockets {
        SockRef::from(socket).set_linger(Some(Duration::ZERO))?;
    }
    Ok((sweep, crosscheck))
}

fn listener() -> io::Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(QUEUE)?;
    let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    Ok((socket, address))
}

/// Connections without the programs and with them, in turn; who begins changes from round to round.
fn connections(options: &Options) -> anyhow::Result<(Samples, Samples)> {
    let (mut without, mut with) = (Samples::default(), Samples::default());
    for round in 0..options.rounds {
        for attached in [round % 2 == 0, round % 2 != 0] {
            let view = if attached { Some(open(View::Ebpf, &[], MAX_SOCKETS)?) } else { None };
            let samples = if attached { &mut with } else { &mut without };
            let listener = TcpListener::bind("127.0.0.1:0")?;
            samples.take(options.connects, || connect(&listener, options.connects))?;
            drop(view);
        }
    }
    Ok((without, with))
}

/// Connections one after the other, each closed by reset, both ends in this thread.
fn connect(listener: &TcpListener, connects: u32) -> io::Result<()> {
    let address = listener.local_addr()?;
    for _ in 0..connects {
        let client = TcpStream::connect(address)?;
        let (server, _) = listener.accept()?;
        SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
        drop(client);
        drop(server);
    }
    Ok(())
}

/// CPU time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
