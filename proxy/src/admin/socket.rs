//! The unix socket: one JSON object per line each way; one request per connection.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Interest};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::timeout;

use super::places::{Place, Places};
use super::show::{self, What};
use super::{Served, drain, order, reload};
use crate::drill::{self, Drill};
#[cfg(feature = "test-hooks")]
use crate::kernel::Witness;

/// Connections at once: some are left however many drills are running.
pub(super) const MAX_CONNECTIONS: usize = drill::AT_ONCE + 8;

/// What is answered when no more requests are carried out at once.
pub(super) const TOO_MANY: &str = "too many requests are being carried out";

/// Longest request, bytes.
const MAX_REQUEST: u64 = 4096;

/// For a request to arrive, and for a client to take a line of the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two looks at whether the client is still there.
const LOOK: Duration = Duration::from_millis(100);

/// A socket file that goes when this is dropped.
#[derive(Debug)]
pub(super) struct Bound {
    listener: Option<StdListener>,
    file: SocketFile,
}

/// The path and the inode behind it, so that nobody else's socket is removed.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Bound {
    /// Makes the socket, for its owner only, and the directory above it if it is missing. A file that nobody listens
    /// on any more is replaced.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        }
        if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.file_type().is_socket()) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is in the way"));
        }
        match StdStream::connect(path) {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on it")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
        // Made under another name, closed to others, then moved: nobody can connect in between, and a stale file is
        // replaced in one step.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let listener = StdListener::bind(&temporary)?;
        let moved = fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&temporary, path))
            .and_then(|()| inode(path));
        match moved {
            Ok(inode) => {
                listener.set_nonblocking(true)?;
                Ok(Self { listener: Some(listener), file: SocketFile { path: path.to_owned(), inode } })
            }
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.file.path
    }

    /// Registers the listener with the runtime.
    pub(super) fn listen(mut self) -> io::Result<Listening> {
        let listener = self.listener.take().ok_or(io::ErrorKind::NotConnected)?;
        Ok(Listening { listener: UnixListener::from_std(listener)?, _file: self.file })
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|now| now == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the admin socket cannot be removed");
        }
    }
}

/// The socket on the runtime.
#[derive(Debug)]
pub(super) struct Listening {
    listener: UnixListener,
    _file: SocketFile,
}

/// Serves until its task is dropped. As many requests are carried out at once as `requests` lets through.
pub(super) async fn serve(listening: Listening, served: Served, drill: Rc<Drill>, requests: Arc<Semaphore>) {
    let places = Places::new(MAX_CONNECTIONS);
    loop {
        match listening.listener.accept().await {
            Ok((stream, _)) => {
                let (place, gone) = places.enter(None).await;
                let (served, drill, requests) = (served.clone(), Rc::clone(&drill), Arc::clone(&requests));
                tokio::task::spawn_local(async move {
                    tokio::select! {
                        ended = session(stream, &served, drill, &requests, &place) => if let Err(error) = ended {
                            tracing::debug!(%error, "admin socket");
                        },
                        _ = gone => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "admin socket: accept");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// A request line.
#[derive(Debug, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Request {
    /// One drill.
    Drill(drill::Order),
    /// A page of what there is, behind the key `after`.
    Show {
        what: What,
        #[serde(default)]
        after: u64,
    },
    /// One reaping, on an operator's order.
    Reap { cookie: u64 },
    /// Another configuration, from the same file. (With braces: of a variant without them serde takes any field.)
    Reload {},
    /// The end of the process, when everything is answered.
    Drain {},
    /// Blocks a worker's thread, as a bug would.
    #[cfg(feature = "test-hooks")]
    Hang { worker: usize, millis: u64 },
    /// Ends a worker's clean-up, as a bug would.
    #[cfg(feature = "test-hooks")]
    Neglect { worker: usize },
    /// Makes a witness of the kernel view lie, and the others tell the truth; `null`: nobody lies.
    #[cfg(feature = "test-hooks")]
    Lie { witness: Option<String> },
}

async fn session(
    stream: UnixStream,
    served: &Served,
    drill: Rc<Drill>,
    requests: &Semaphore,
    place: &Place,
) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read.take(MAX_REQUEST));
    let mut line = String::new();
    timeout(PATIENCE, reader.read_line(&mut line)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    place.begins();
    let permit = requests.try_acquire();
    let (events, mut received) = unbounded_channel();
    let answer = async {
        match serde_json::from_str(&line) {
            Ok(_) if permit.is_err() => done(&events, false, TOO_MANY),
            Ok(request) => carry_out(request, served, drill, &events).await,
            Err(error) => {
                tracing::debug!(%error, "admin socket: bad request");
                done(&events, false, &format!("the request cannot be read: {error}"));
            }
        }
        drop(events);
        io::Result::Ok(())
    };
    let send = async {
        while let Some(event) = received.recv().await {
            // Others see it only while the client keeps this waiting.
            place.stuck(true);
            timeout(PATIENCE, write.write_all(format!("{event}\n").as_bytes()))
                .await
                .map_err(|_| io::ErrorKind::TimedOut)??;
            place.stuck(false);
        }
        io::Result::Ok(())
    };
    // When the client is gone, or too slow, the answer's future is dropped: a drill's leak ends with it.
    tokio::select! {
        biased;
        ended = async { tokio::try_join!(answer, send) } => ended.map(|((), ())| ()),
        gone = gone(reader.into_inner().into_inner()) => gone,
    }
}

/// Resolves when the client is gone; one that has only finished writing still listens.
async fn gone(read: OwnedReadHalf) -> io::Result<()> {
    while !read.ready(Interest::WRITABLE).await?.is_write_closed() {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Does what is asked for and sends its events, the last one is `done`.
pub(super) async fn carry_out(request: Request, served: &Served, drill: Rc<Drill>, events: &UnboundedSender<Value>) {
    match request {
        Request::Drill(order) => drill.run(&order, events).await,
        Request::Show { what, after } => show::show(what, after, served, events).await,
        Request::Reap { cookie } => order::reap(cookie, served, events).await,
        Request::Reload {} => reload::reload(served, events).await,
        Request::Drain {} => drain::drain(served, events).await,
        #[cfg(feature = "test-hooks")]
        Request::Hang { worker, millis } => {
            let hang = crate::control::Control::Hang(Duration::from_millis(millis));
            misbehave(worker, hang, served, events);
        }
        #[cfg(feature = "test-hooks")]
        Request::Neglect { worker } => misbehave(worker, crate::control::Control::Neglect, served, events),
        #[cfg(feature = "test-hooks")]
        Request::Lie { witness } => {
            let named = Witness::ALL.into_iter().find(|known| witness.as_deref() == Some(known.label()));
            crate::kernel::lies::lie(named);
            done(events, named.map(Witness::label) == witness.as_deref(), "it lies from now on");
        }
    }
}

#[cfg(feature = "test-hooks")]
fn misbehave(worker: usize, how: crate::control::Control, served: &Served, events: &UnboundedSender<Value>) {
    let sent = worker < served.live.now().policy.workers && served.live.now().controls.send(worker, how);
    done(events, sent, if sent { "sent" } else { "there is no such worker" });
}

fn done(events: &UnboundedSender<Value>, ok: bool, message: &str) {
    // The client is gone: then nobody needs to know.
    let _ = events.send(json!({"event": "done", "ok": ok, "message": message}));
}
