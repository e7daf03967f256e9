//! One backend connection per client connection.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;

use super::super::poll::{Poller, READ, WRITE};
use super::super::proxy_header;
use super::super::slots::Slots;
use super::super::stream::{self, Output};
use super::{Relay, read};

/// All pairs of one relay.
pub(super) struct Pairs {
    target: SocketAddrV4,
    proxy: bool,
    pairs: Slots<[Side; 2]>,
}

/// One of the two connections of a pair: the client's is number 0, the backend's number 1.
struct Side {
    socket: OwnedFd,
    /// What goes out on this side.
    output: Output,
    interest: EventFlags,
}

impl Side {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, output: Output::default(), interest: READ }
    }
}

impl Pairs {
    pub(super) fn new(target: SocketAddrV4, proxy: bool) -> Self {
        Self { target, proxy, pairs: Slots::new() }
    }
}

impl Relay for Pairs {
    fn opened(&mut self, poller: &Poller, client: OwnedFd) -> io::Result<()> {
        let mut sides = [Side::new(client), Side::new(stream::connect(self.target, None)?)];
        if self.proxy {
            let mut header = Vec::new();
            let (Ok(source), Ok(destination)) =
                (stream::peer_address(&sides[0].socket), stream::local_address(&sides[0].socket))
            else {
                // The client has left already.
                return Ok(());
            };
            proxy_header::push(&mut header, source, destination, None);
            // It goes out in one write with the first octets of the client.
            sides[1].output.push(&header);
        }
        let key = self.pairs.insert(sides);
        if let Some(sides) = self.pairs.get_mut(key) {
            for (number, side) in sides.iter().enumerate() {
                poller.add(&side.socket, key << 1 | number as u64, READ)?;
            }
        }
        Ok(())
    }

    fn ready(&mut self, poller: &Poller, token: u64, ready: EventFlags, buffer: &mut [u8]) -> io::Result<()> {
        let key = token >> 1;
        let Some(sides) = self.pairs.get_mut(key) else { return Ok(()) };
        let [client, backend] = sides;
        let (this, other) = if token & 1 == 0 { (client, backend) } else { (backend, client) };

        let mut alive = true;
        if ready.contains(WRITE) {
            alive = this.output.send(&this.socket, &[]);
        }
        if alive && ready.intersects(!WRITE) {
            alive = match read(&this.socket, buffer) {
                Some([]) => true,
                Some(octets) => other.output.send(&other.socket, octets),
                None => false,
            };
        }
        if !alive {
            self.pairs.remove(key);
            return Ok(());
        }
        // A side is read only while the other takes what comes: nothing piles up here.
        for (number, wanted) in [(0, interest(sides, 0)), (1, interest(sides, 1))] {
            let side = &mut sides[number];
            if side.interest != wanted {
                side.interest = wanted;
                poller.modify(&side.socket, key << 1 | number as u64, wanted)?;
            }
        }
        Ok(())
    }
}

fn interest(sides: &[Side; 2], number: usize) -> EventFlags {
    let mut wanted = EventFlags::empty();
    if sides[1 - number].output.is_empty() {
        wanted |= READ;
    }
    if !sides[number].output.is_empty() {
        wanted |= WRITE;
    }
    wanted
}
