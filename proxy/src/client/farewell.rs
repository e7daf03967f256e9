//! The end of a client connection that we end and the client may not have noticed yet.
//!
//! To close a socket with octets unread, or to get some after it is closed, makes the kernel send a reset, and a reset
//! throws away answers that were not sent yet. So the sending side is shut down first, and what still comes is read and
//! thrown away until the client closes.
//!
//! What the kernel still holds of a socket that is closed in order counts as nobody's, and stays for minutes if the client
//! does not read. So the descriptor is kept until the client has taken everything, as long as it takes something
//! within its listener's `write_timeout`; after that the connection is reset, which frees the memory at once.

use std::io;
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::Shutdown;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::limits::Admitted;
use super::socket::Now;
use crate::close::ClientCloseReason;
use crate::kernel::sys;
use crate::tls::Channel;
use crate::worker::shell::Shell;

/// How long a client may take to close.
const LONGEST: Duration = Duration::from_secs(1);
/// Octets thrown away at a time.
const AT_A_TIME: usize = 4096;
/// How often it is looked what a client has taken: soon at first, as most have taken everything.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(64);

/// A client's socket that is about to be closed: by reset if the kernel holds something that the client has not taken.
#[derive(Debug)]
struct Parting(TcpStream);

impl Drop for Parting {
    fn drop(&mut self) {
        if has_untaken(&self.0) {
            reset(&self.0);
        }
    }
}

/// Whether the kernel holds something that the client has not acknowledged. A socket that cannot tell is dead.
pub(crate) fn has_untaken(stream: &TcpStream) -> bool {
    sys::unacknowledged(stream.as_fd()).is_ok_and(|octets| octets > 0)
}

/// Closing the socket will be a reset: what was not sent is thrown away.
pub(crate) fn reset(stream: &TcpStream) {
    // It can fail on a dead socket only, of which nothing is left.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Whether a connection that is closed for this reason deserves a farewell. The others are closed by the client, or
/// idle: what was sent on them has arrived long ago.
pub(crate) fn is_due(reason: ClientCloseReason) -> bool {
    use ClientCloseReason::{Drained, Malformed, MaxDuration, MaxQueries, NotForwarded, TransferBroken};
    matches!(reason, Drained | Malformed | MaxDuration | MaxQueries | NotForwarded | TransferBroken)
}

/// Takes leave of a client, to which nothing more is written once `channel` has said what it still has to say. It may take
/// nothing for as long as `patience`. The connection counts as admitted until the end.
pub(crate) async fn take_leave(
    shell: Rc<Shell>,
    stream: TcpStream,
    mut channel: Channel,
    admitted: Admitted,
    patience: Duration,
) {
    let _leaving = shell.leaving();
    // Also if the worker ends meanwhile.
    let parting = Parting(stream);
    let stream = &parting.0;
    let leave = async {
        while channel.flush(&mut Now(stream)).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            if stream.writable().await.is_err() {
                break;
            }
        }
        // A connection that the client has reset has no sending side any more; the reading then tells.
        let _ = rustix::net::shutdown(stream, Shutdown::Write);
        discard(stream).await;
    };
    let _ = tokio::time::timeout(LONGEST, leave).await;
    taken(stream, patience).await;
    drop((parting, admitted));
}

/// Waits until the client has taken what the kernel holds for it, or nothing of it for this long.
async fn taken(stream: &TcpStream, patience: Duration) {
    let mut left = usize::MAX;
    let mut since = Instant::now();
    let mut pause = FIRST_LOOK;
    while matches!(stream.take_error(), Ok(None))
        && let Ok(now_left @ 1..) = sys::unacknowledged(stream.as_fd())
    {
        if now_left < left {
            (left, since) = (now_left, Instant::now());
        } else if since.elapsed() >= patience {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
    }
}

async fn discard(stream: &TcpStream) {
    let mut octets = [0; AT_A_TIME];
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut octets) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
