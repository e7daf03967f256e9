//! One backend connection per query: what different TLVs on every query cost at least.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;

use super::super::message::{LABEL_AT, LABEL_LEN};
use super::super::poll::{Poller, READ, WRITE};
use super::super::proxy_header;
use super::super::slots::Slots;
use super::super::stream::{self, Frames, Output};
use super::{Relay, read};

/// All connections of one relay, clients' and backends'.
pub(super) struct PerQuery {
    target: SocketAddrV4,
    connections: Slots<Connection>,
}

struct Connection {
    socket: OwnedFd,
    output: Output,
    frames: Frames,
    peer: Peer,
}

#[derive(Clone, Copy)]
enum Peer {
    Client {
        source: SocketAddrV4,
        destination: SocketAddrV4,
    },
    /// With the client that waits for the answer.
    Backend {
        client: u64,
    },
}

impl PerQuery {
    pub(super) fn new(target: SocketAddrV4) -> Self {
        Self { target, connections: Slots::new() }
    }

    fn add(&mut self, poller: &Poller, socket: OwnedFd, output: Output, peer: Peer) -> io::Result<()> {
        let interest = if output.is_empty() { READ } else { READ | WRITE };
        let key = self.connections.insert(Connection { socket, output, frames: Frames::default(), peer });
        match self.connections.get_mut(key) {
            Some(connection) => poller.add(&connection.socket, key, interest),
            None => Ok(()),
        }
    }

    /// Opens a connection for one query.
    fn forward(&mut self, poller: &Poller, client: u64, query: &[u8], header: Vec<u8>) -> io::Result<()> {
        let mut octets = header;
        octets.extend_from_slice(&(query.len() as u16).to_be_bytes());
        octets.extend_from_slice(query);
        let socket = stream::connect(self.target, None)?;
        let mut output = Output::default();
        // Refused or reset: the client misses its answer and says so.
        if output.send(&socket, &octets) {
            self.add(poller, socket, output, Peer::Backend { client })?;
        }
        Ok(())
    }
}

impl Relay for PerQuery {
    fn opened(&mut self, poller: &Poller, client: OwnedFd) -> io::Result<()> {
        let (Ok(source), Ok(destination)) = (stream::peer_address(&client), stream::local_address(&client)) else {
            // The client has left already.
            return Ok(());
        };
        self.add(poller, client, Output::default(), Peer::Client { source, destination })
    }

    fn ready(&mut self, poller: &Poller, token: u64, ready: EventFlags, buffer: &mut [u8]) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(token) else { return Ok(()) };
        if ready.contains(WRITE) {
            if !connection.output.send(&connection.socket, &[]) {
                self.connections.remove(token);
                return Ok(());
            }
            if connection.output.is_empty() {
                poller.modify(&connection.socket, token, READ)?;
            }
        }
        if !ready.intersects(!WRITE) {
            return Ok(());
        }
        let Some(octets) = read(&connection.socket, buffer) else {
            self.connections.remove(token);
            return Ok(());
        };
        let mut frames: Vec<Vec<u8>> = Vec::new();
        let Ok(()) = connection.frames.feed(octets, |frame| {
            frames.push(frame.to_vec());
            Ok::<(), Infallible>(())
        });
        let peer = connection.peer;
        for frame in frames {
            match peer {
                Peer::Client { source, destination } => {
                    let mut header = Vec::with_capacity(128);
                    proxy_header::push(&mut header, source, destination, frame.get(LABEL_AT..LABEL_AT + LABEL_LEN));
                    self.forward(poller, token, &frame, header)?;
                }
                Peer::Backend { client } => {
                    if let Some(backend) = self.connections.remove(token) {
                        stream::reset(backend.socket);
                    }
                    self.answer(poller, client, &frame)?;
                }
            }
        }
        Ok(())
    }
}

impl PerQuery {
    fn answer(&mut self, poller: &Poller, client: u64, answer: &[u8]) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(client) else { return Ok(()) };
        let mut octets = Vec::with_capacity(2 + answer.len());
        octets.extend_from_slice(&(answer.len() as u16).to_be_bytes());
        octets.extend_from_slice(answer);
        if !connection.output.send(&connection.socket, &octets) {
            self.connections.remove(client);
        } else if !connection.output.is_empty() {
            poller.modify(&connection.socket, client, READ | WRITE)?;
        }
        Ok(())
    }
}
