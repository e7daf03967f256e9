//! The writing end of a shard, and the types that hold I2: no socket without a row, no row without a socket.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use socket2::Socket;

use super::caps::{AtCap, Caps, Permit};
use super::slot::{ConnKind, RowState, Shard};
use super::{BackendIndex, RowId};
use crate::clock::{self, Mono};
use crate::close::CloseReason;
use crate::tls::Version;

/// What is known of a connection before it is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenInfo {
    /// Which backend.
    pub backend: BackendIndex,
    /// Who may share it.
    pub kind: ConnKind,
    /// Serial number of the owning client connection; zero: nobody's alone.
    pub owner: u64,
    /// Digest of the PROXY header's bytes; zero: none.
    pub header: u64,
    /// What the owning client connection has agreed on; none: it is in the clear, or there is no owner.
    pub client_tls: Option<Version>,
}

/// Why no connection can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// A limit is reached.
    #[error("the limit of connections is reached ({0:?})")]
    AtCap(AtCap),
    /// Every slot is taken; cannot happen while a shard has as many slots as `max_total` allows.
    #[error("the ledger is full")]
    LedgerFull,
}

/// The one writer of a shard.
#[derive(Debug, Clone)]
pub struct ShardWriter {
    inner: Rc<Writer>,
}

#[derive(Debug)]
struct Writer {
    shard: Arc<Shard>,
    caps: Arc<Caps>,
    free: RefCell<Vec<u32>>,
    /// Slots below this one are in use or free.
    known: Cell<u32>,
    #[cfg(feature = "test-hooks")]
    forget: ForgetHook,
}

impl ShardWriter {
    pub(super) fn new(shard: Arc<Shard>, caps: Arc<Caps>) -> Self {
        let writer = Self {
            inner: Rc::new(Writer {
                shard,
                caps,
                free: RefCell::default(),
                known: Cell::new(0),
                #[cfg(feature = "test-hooks")]
                forget: ForgetHook::default(),
            }),
        };
        writer.use_new_slots();
        writer
    }

    /// Uses what [`Ledger::grow`](super::Ledger::grow) has made.
    pub fn use_new_slots(&self) {
        let slots = u32::try_from(self.inner.shard.len()).unwrap_or(u32::MAX);
        let known = self.inner.known.replace(slots);
        // Those that have been used before come first: their memory is warm.
        self.inner.free.borrow_mut().splice(0..0, (known..slots).rev());
    }

    /// Shows that the owner of this shard runs.
    pub fn beat(&self, now: Mono) {
        self.inner.shard.beat(now);
    }

    /// The limits and their use.
    pub fn caps(&self) -> &Arc<Caps> {
        &self.inner.caps
    }

    /// Takes a place under the limits and a slot for a connection that is about to be opened.
    pub fn reserve(&self, info: OpenInfo) -> Result<Reservation, ReserveError> {
        let permit = self.inner.caps.acquire(info.backend).map_err(ReserveError::AtCap)?;
        self.reserve_with(permit, info)
    }

    /// The same with a place that was taken before.
    pub fn reserve_with(&self, permit: Permit, info: OpenInfo) -> Result<Reservation, ReserveError> {
        let slot = self.inner.free.borrow_mut().pop().ok_or(ReserveError::LedgerFull)?;
        Ok(Reservation { slot: Slot { writer: Rc::clone(&self.inner), index: slot }, permit, info })
    }

    /// From now on every `nth` row is not written, as a ledger with a bug would: tests prove with it that they
    /// find such a bug. Zero: none.
    #[cfg(feature = "test-hooks")]
    pub fn forget_every(&self, nth: u32) {
        self.inner.forget.every.set(nth);
    }
}

#[cfg(feature = "test-hooks")]
#[derive(Debug, Default)]
struct ForgetHook {
    every: Cell<u32>,
    count: Cell<u32>,
}

/// A slot that goes back to the free list when it is dropped.
#[derive(Debug)]
struct Slot {
    writer: Rc<Writer>,
    index: u32,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.writer.free.borrow_mut().push(self.index);
    }
}

/// A place in the ledger for a socket that does not exist yet.
#[derive(Debug)]
pub struct Reservation {
    slot: Slot,
    permit: Permit,
    info: OpenInfo,
}

impl Reservation {
    /// Writes the row of a socket that was just made and is not connected yet. From here on kernel and ledger both
    /// know it.
    pub fn bind(self, socket: Socket, now: Mono) -> io::Result<(Arc<Socket>, Entry)> {
        let cookie = socket.cookie()?;
        let socket = Arc::new(socket);
        let Self { slot, permit, info } = self;
        let writer = &slot.writer;
        #[cfg(feature = "test-hooks")]
        let cookie = writer.forget.apply(cookie);
        let generation = writer.shard.fill(slot.index, cookie, &info, now, &socket);
        Ok((
            socket,
            Entry {
                slot,
                generation,
                cookie,
                owner: Cell::new(info.owner),
                header: Cell::new(info.header),
                kind: Cell::new(info.kind),
                client_tls: Cell::new(info.client_tls),
                reason: Cell::new(CloseReason::Dropped),
                permit,
            },
        ))
    }
}

#[cfg(feature = "test-hooks")]
impl ForgetHook {
    /// The cookie, or the zero of a row that nobody sees.
    fn apply(&self, cookie: u64) -> u64 {
        let (every, count) = (self.every.get(), self.count.get() + 1);
        self.count.set(count);
        if every != 0 && count.is_multiple_of(every) { 0 } else { cookie }
    }
}

/// The row of one open socket. Retired when it is dropped, which must be after the descriptor was closed: hold it
/// through [`Tracked`].
#[derive(Debug)]
pub struct Entry {
    slot: Slot,
    generation: u64,
    cookie: u64,
    // The parts of an `OpenInfo`, which alone would take more: each open connection has an entry.
    owner: Cell<u64>,
    header: Cell<u64>,
    kind: Cell<ConnKind>,
    client_tls: Cell<Option<Version>>,
    reason: Cell<CloseReason>,
    // Last: the place is given back when the descriptor and the row are gone.
    permit: Permit,
}

impl Entry {
    /// `SO_COOKIE`.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// What the connection was opened for.
    pub fn info(&self) -> OpenInfo {
        let (kind, owner, header) = (self.kind.get(), self.owner.get(), self.header.get());
        OpenInfo { backend: self.permit.backend(), kind, owner, header, client_tls: self.client_tls.get() }
    }

    /// A spare connection is given to somebody. The backend stays.
    pub fn assign(&self, info: OpenInfo) {
        self.kind.set(info.kind);
        self.owner.set(info.owner);
        self.header.set(info.header);
        self.client_tls.set(info.client_tls);
        self.slot.writer.shard.assign(self.slot.index, &info);
    }

    /// Where the row is.
    pub fn id(&self) -> RowId {
        // The shard's number is only known to the shard; readers fill it in as well.
        RowId { shard: self.slot.writer.shard.index(), slot: self.slot.index, generation: self.generation }
    }

    /// What the owner believes the connection does.
    pub fn set_state(&self, state: RowState) {
        self.slot.writer.shard.set_state(self.slot.index, state);
    }

    /// Bytes were moved, or the number of queries changed.
    pub fn set_activity(&self, last_byte: Mono, in_flight: u32, queries: u64) {
        self.slot.writer.shard.set_activity(self.slot.index, last_byte, in_flight, queries);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.slot.writer.shard.retire(self.id(), self.reason.get(), clock::now());
    }
}

/// A connection and its row. The fields are dropped in this order: the descriptor is closed first (I2).
#[derive(Debug)]
pub struct Tracked<Io> {
    io: Io,
    entry: Entry,
}

impl<Io> Tracked<Io> {
    /// Puts together what [`Reservation::bind`] gave, around whatever the socket was registered as.
    pub(crate) fn new(io: Io, entry: Entry) -> Self {
        Self { io, entry }
    }

    /// The socket.
    pub fn io(&self) -> &Io {
        &self.io
    }

    /// The row.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Closes the descriptor, then retires the row, for this one reason (I3).
    pub fn close(self, reason: CloseReason) {
        self.entry.reason.set(reason);
    }

    /// Takes descriptor and row apart. Only drills may, to make a leak on purpose.
    pub(crate) fn into_parts(self) -> (Io, Entry) {
        (self.io, self.entry)
    }
}

impl Entry {
    /// Retires a row whose descriptor is closed already, for this reason. Only drills may.
    pub(crate) fn retire(self, reason: CloseReason) {
        self.reason.set(reason);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use crate::ledger::Ledger;

    #[test]
    fn it_grows_under_its_writer() {
        let caps = Arc::new(Caps::new([9, 9], 9));
        let ledger = Ledger::new(1, 1, 1, caps);
        let writer = ledger.writer(0).unwrap();
        let reserve = |backend| {
            writer.reserve(OpenInfo { backend, kind: ConnKind::Shared, owner: 0, header: 0, client_tls: None })
        };
        let first = reserve(0).unwrap();
        assert_eq!(reserve(0).err(), Some(ReserveError::LedgerFull));
        ledger.grow(3, 40);
        writer.use_new_slots();
        let more = [reserve(1).unwrap(), reserve(1).unwrap()];
        assert_eq!(reserve(1).err(), Some(ReserveError::LedgerFull));
        // A configuration with fewer takes none away.
        ledger.grow(1, 1);
        writer.use_new_slots();
        drop((first, more));
        let again: Vec<_> = (0..3).map(|_| reserve(0).unwrap()).collect();
        assert_eq!(reserve(0).err(), Some(ReserveError::LedgerFull));
        drop(again);
        assert!(ledger.totals().len() >= 40, "counters for each backend");
    }

    #[test]
    fn a_row_says_how_its_owner_came() {
        let ledger = Ledger::new(1, 4, 2, Arc::new(Caps::new([9, 9], 9)));
        let writer = ledger.writer(0).unwrap();
        let open = |client_tls| {
            let info = OpenInfo { backend: 1, kind: ConnKind::Spare, owner: 0, header: 0, client_tls };
            let socket = Socket::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
            writer.reserve(info).unwrap().bind(socket, clock::now()).unwrap()
        };
        let versions = [None, Some(Version::Tls12), Some(Version::Tls13)];
        let open = versions.map(open);
        let shown = || {
            let rows = ledger.snapshot(clock::now()).rows;
            rows.iter().map(|row| (row.backend, row.kind, row.client_tls)).collect::<Vec<_>>()
        };
        assert_eq!(shown(), versions.map(|version| (1, ConnKind::Spare, version)));
        let (_, first) = &open[0];
        let given = OpenInfo { kind: ConnKind::Owned, owner: 7, client_tls: Some(Version::Tls13), ..first.info() };
        first.assign(given);
        assert_eq!(shown()[0], (1, ConnKind::Owned, Some(Version::Tls13)));
        assert_eq!((first.info().owner, first.info().client_tls), (7, Some(Version::Tls13)));
    }
}
