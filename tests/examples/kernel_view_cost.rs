//! What the kernel view costs: a snapshot of many sockets, and a connect with its close, with the programs attached and
//! without, in CPU time of the calling thread. Needs what the eBPF view needs. Prints a table; nothing is asserted.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use counterfoil::config::View;
use counterfoil::kernel::{KernelView, open};
use socket2::{Domain, SockRef, Socket, Type};

const MAX_SOCKETS: u32 = 65_536;
/// Rounds per figure; the median is printed.
const ROUNDS: usize = 21;
/// Connects in one round.
const CONNECTS: usize = 2_000;
/// Connections that one listener's queue holds: nobody accepts, so that the peers need no descriptors here.
const QUEUE: i32 = 4_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut listeners = Vec::new();
    let mut sockets = Vec::new();
    for count in [0, 1_000, 10_000] {
        while sockets.len() < count {
            if sockets.len() >= listeners.len() * QUEUE as usize {
                listeners.push(listener()?);
            }
            let address: &SocketAddr = &listeners[listeners.len() - 1].1;
            sockets.push(TcpStream::connect(address)?);
        }
        for choice in [View::Ebpf, View::SockDiag] {
            let (mut view, source, _) = open(choice, &[], MAX_SOCKETS)?;
            let snapshot = median(|| view.snapshot().map(drop))?;
            let check = median(|| view.crosscheck().map(drop))?;
            println!("{count:>6} sockets, {source}: snapshot {snapshot:?}, cross-check {check:?}");
        }
    }
    for socket in &sockets {
        SockRef::from(socket).set_linger(Some(Duration::ZERO))?;
    }
    drop(sockets);

    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(connects()?);
        let view: Box<dyn KernelView> = open(View::Ebpf, &[], MAX_SOCKETS)?.0;
        with.push(connects()?);
        drop(view);
    }
    without.sort_unstable();
    with.sort_unstable();
    println!("connect and close, CPU: {:?} without, {:?} with", without[ROUNDS / 2], with[ROUNDS / 2]);
    Ok(())
}

fn listener() -> io::Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(QUEUE)?;
    let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    Ok((socket, address))
}

/// CPU time of one run.
fn median<E>(mut run: impl FnMut() -> Result<(), E>) -> Result<Duration, E> {
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = cpu();
        run()?;
        times.push(cpu().saturating_sub(start));
    }
    times.sort_unstable();
    Ok(times[ROUNDS / 2])
}

/// CPU time of this thread for one connect with its close by reset, both ends.
fn connects() -> io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let start = cpu();
    for _ in 0..CONNECTS {
        let client = TcpStream::connect(address)?;
        let (server, _) = listener.accept()?;
        SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
        drop(client);
        drop(server);
    }
    Ok((cpu() - start) / CONNECTS as u32)
}

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
