//! Accepting client connections. A listener never ends while the worker runs, whatever `accept(2)` says.

use std::fs::File;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};

use super::limits::ClientLimits;
use super::session::Addresses;
use super::task::SessionTask;
use crate::stats::Refusal;
use crate::worker::shell::Shell;

/// How long a listener rests when no descriptor is left, and nothing was there to be shed.
const REST: Duration = Duration::from_millis(50);
/// Connections shed at one go when no descriptor is left.
const SHED: usize = 64;

/// Accepts on one listener until the worker drains.
pub(crate) struct Acceptor {
    pub(crate) shell: Rc<Shell>,
    pub(crate) listener: TcpListener,
    pub(crate) index: u16,
    /// Somebody else will accept what is in the queue at the end.
    pub(crate) leaves_queue: bool,
    pub(crate) limits: std::sync::Arc<ClientLimits>,
    pub(crate) max_per_client: usize,
}

impl Acceptor {
    /// Runs until `stop` is done; then takes what the kernel has queued already, so that no client that was told it is
    /// connected is lost, unless it is left to the next process.
    pub(crate) async fn run(self, mut stop: tokio::sync::watch::Receiver<bool>) {
        let mut reserve = File::open("/dev/null").ok();
        loop {
            let accepted = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.admit(stream),
                Err(error) => self.failed(&error, &mut reserve).await,
            }
        }
        while !self.leaves_queue
            && let Some(Ok((stream, _))) = poll_once(self.listener.accept()).await
        {
            self.admit(stream);
        }
    }

    fn admit(&self, stream: TcpStream) {
        let (Ok(client), Ok(local)) = (stream.peer_addr(), stream.local_addr()) else {
            // It was reset while it waited in the queue.
            return;
        };
        let stats = &self.shell.stats.listeners[usize::from(self.index)];
        let admitted = match self.limits.admit(self.index, client.ip(), self.max_per_client) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                stats.refused[refusal as usize].add(1);
                return;
            }
        };
        let _ = stream.set_nodelay(true);
        let now = crate::clock::now();
        let key = self.shell.core.borrow_mut().session_opened(self.index, Addresses { client, local }, now);
        tokio::task::spawn_local(SessionTask::new(Rc::clone(&self.shell), key, stream, admitted));
    }

    /// Without descriptors `accept(2)` fails and the connection stays in the queue: asking again at once would spin.
    /// The reserve descriptor is given up to take such connections out and close them, so their clients know.
    async fn failed(&self, error: &io::Error, reserve: &mut Option<File>) {
        let out_of_descriptors = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM]
            .iter()
            .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
        if !out_of_descriptors {
            // The connection was reset in the queue, or the network had a passing fault: on to the next one.
            tracing::debug!(%error, "accept");
            return;
        }
        self.shell.complain_accept(error);
        drop(reserve.take());
        let mut shed = 0;
        while shed < SHED
            && let Some(Ok((stream, _))) = poll_once(self.listener.accept()).await
        {
            drop(stream);
            shed += 1;
        }
        self.shell.stats.listeners[usize::from(self.index)].refused[Refusal::Descriptors as usize].add(shed as u64);
        *reserve = File::open("/dev/null").ok();
        tokio::time::sleep(REST).await;
    }
}

/// The future's value if it is there now.
async fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(match future.as_mut().poll(cx) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}
