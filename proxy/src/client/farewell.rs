//! The end of a client connection that we end and the client may not have noticed yet.
//!
//! To close a socket with octets unread, or to get some after it is closed, makes the kernel send a reset, and a reset
//! throws away answers that were not sent yet. So the sending side is shut down first, and what still comes is read and
//! thrown away until the client closes.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::Shutdown;
use tokio::net::TcpStream;

use super::limits::Admitted;
use super::socket::Now;
use crate::close::ClientCloseReason;
use crate::tls::Channel;
use crate::worker::shell::Shell;

/// How long a client may take to close.
const LONGEST: Duration = Duration::from_secs(1);
/// Octets thrown away at a time.
const AT_A_TIME: usize = 4096;

/// Whether a connection that is closed for this reason deserves a farewell. The others are closed by the client, or
/// idle: what was sent on them has arrived long ago.
pub(crate) fn is_due(reason: ClientCloseReason) -> bool {
    use ClientCloseReason::{Drained, Malformed, MaxDuration, MaxQueries, TransferBroken};
    matches!(reason, Drained | Malformed | MaxDuration | MaxQueries | TransferBroken)
}

/// Takes leave of a client all of whose answers are written, once `channel` has said what it still has to say. The
/// connection counts as admitted until then.
pub(crate) async fn take_leave(shell: Rc<Shell>, stream: TcpStream, mut channel: Channel, admitted: Admitted) {
    let _leaving = shell.leaving();
    let leave = async {
        while channel.flush(&mut Now(&stream)).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            if stream.writable().await.is_err() {
                break;
            }
        }
        // A connection that the client has reset has no sending side any more; the reading then tells.
        let _ = rustix::net::shutdown(&stream, Shutdown::Write);
        discard(&stream).await;
    };
    let _ = tokio::time::timeout(LONGEST, leave).await;
    drop((stream, admitted));
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
