//! Comparing the eBPF view with its two witnesses: reading all three, and what follows from their vote. How those of other
//! processes are read is in `beside/crosscheck.rs`.
//!
//! What the readings prove is in `evidence.rs`, the vote in `witness.rs`; both are pure.

use std::collections::{BTreeMap, HashMap};

use counterfoil_common::{SocketRecord, flags};

use super::evidence::{Readings, Records, excuse};
use super::netlink::{Row, SockDiag};
use super::procfd::{self, Asked};
use super::reader::now_ns;
use super::view::{EbpfView, is_listening};
use super::witness::{Testimony, Verdict, is_disputed, vote};
use super::{Crosscheck, TcpState, ViewError, Witness, convert};

/// How many of the sockets in question a message names.
const NAMED: usize = 3;

/// One round of readings.
pub(super) struct Gathered {
    pub(super) readings: Readings,
    /// The TCP sockets behind descriptors as the iterator met them first.
    pub(super) descriptors: Vec<SocketRecord>,
    /// As in [`Crosscheck::compared`].
    pub(super) compared: [usize; 3],
    /// Tagged sockets that found no room.
    pub(super) overflowed: u32,
}

/// What the witnesses say together. `again` makes a second round, with the number of missed events that excuse eBPF;
/// `named` counts the liars, by [`Witness`].
pub(super) fn judge(
    gathered: &Gathered,
    named: &mut [u64; 3],
    again: impl FnOnce() -> Result<(Readings, u64), ViewError>,
) -> Result<Crosscheck, ViewError> {
    let mut check = Crosscheck {
        compared: gathered.compared,
        held_elsewhere: gathered.readings.held_elsewhere(),
        ..Crosscheck::default()
    };
    // With an overflow sockets are missing, that is known already, and a vote would only repeat it.
    if gathered.overflowed == 0 {
        let disputed = disputed(&gathered.readings, again)?;
        match vote(disputed.values()) {
            Verdict::Agreed => {}
            Verdict::Liar(liar) => {
                named[liar as usize] += 1;
                check.liar = Some(liar);
                check.disagreement = Some(format!("{liar} contradicts the two others about {}", name(&disputed)));
            }
            Verdict::Open => {
                check.disagreement = Some(format!("one witness against another, about {}", name(&disputed)));
            }
        }
    }
    check.named = *named;
    Ok(check)
}

/// The sockets over which the witnesses contradict each other, twice in a row.
fn disputed(
    readings: &Readings,
    again: impl FnOnce() -> Result<(Readings, u64), ViewError>,
) -> Result<BTreeMap<u64, Testimony>, ViewError> {
    let mut disputed = readings.testimonies();
    disputed.retain(|_, testimony| is_disputed(testimony));
    if !disputed.is_empty() {
        let (again, missed) = again()?;
        let again = again.testimonies();
        disputed.retain(|cookie, testimony| again.get(cookie) == Some(testimony));
        excuse(&mut disputed, missed);
        disputed.retain(|_, testimony| is_disputed(testimony));
    }
    Ok(disputed)
}

impl EbpfView {
    /// One comparison, and its verdict.
    pub(super) fn compare(&mut self) -> Result<Crosscheck, ViewError> {
        let misses = self.reader.misses()?;
        let gathered = self.gather()?;
        let mut named = self.named;
        let mut check = judge(&gathered, &mut named, || Ok((self.gather()?.readings, self.missed_since_search()?)))?;
        self.named = named;
        // Only now: the vote is about what the view knew by itself.
        let taken_up = self.take_up(&gathered.descriptors)?;
        check.found = taken_up.found.iter().map(|record| record.cookie).collect();
        check.unconnected = taken_up.unconnected.iter().map(|record| record.cookie).collect();
        self.settle(&taken_up, misses, check.doubt())?;
        Ok(check)
    }

    /// One round of readings, in the order that `evidence.rs` relies on.
    fn gather(&mut self) -> Result<Gathered, ViewError> {
        let before = self.reader.descriptors()?;
        let listed_before = list();
        let first = self.reader.sweep()?;
        let rows = self.diag.as_mut().and_then(|diag| heard(diag.dump()));
        let listening = {
            let descriptors = before.iter().filter(|record| is_listening(record)).map(convert::local);
            let rows = rows.iter().flatten().filter(|row| row.state == TcpState::Listen).map(|row| row.local);
            let listed = listed_before.iter().flatten().filter(|socket| socket.state() == TcpState::Listen);
            descriptors.chain(rows).chain(listed.map(|socket| socket.local)).collect::<Vec<_>>()
        };
        self.listeners.saw(listening, now_ns());

        let mut readings = Readings { netns: [self.netns].into(), ..Readings::default() };
        readings.dump = rows.as_ref().map(|rows| rows.iter().map(|row| (row.cookie, row.inode != 0)).collect());
        readings.descriptors[0] = by_cookie(before.iter().filter(|record| self.is_outgoing(record)));
        readings.sweeps[0] = by_cookie(&first.records);
        let is_outgoing = |socket: &&Asked| {
            let tagged =
                readings.descriptors[0].get(&socket.cookie).is_some_and(|record| record.flags & flags::TAGGED != 0);
            tagged
                || readings.sweeps[0].contains_key(&socket.cookie)
                || socket.state() != TcpState::Listen && !self.listeners.accepted(socket.local)
        };
        let listed_before: Option<HashMap<_, _>> =
            listed_before.map(|sockets| states(sockets.iter().filter(is_outgoing)));
        if let Some(before) = listed_before {
            readings.proc_fd = Some([before, HashMap::new()]);
        }
        if let Some(diag) = &mut self.diag {
            look_up(&mut readings, |record| find(diag, record));
        }
        readings.between = self.reader.descriptors()?.iter().map(|record| record.cookie).collect();
        let second = self.reader.sweep()?;
        let listed_after = list();
        let after = self.reader.descriptors()?;
        let compared =
            [second.records.len(), listed_after.as_ref().map_or(0, Vec::len), rows.as_ref().map_or(0, Vec::len)];
        readings.sweeps[1] = by_cookie(&second.records);
        readings.descriptors[1] = by_cookie(after.iter().filter(|record| self.is_outgoing(record)));
        readings.proc_fd = readings.proc_fd.zip(listed_after).map(|([before, _], after)| [before, states(&after)]);
        Ok(Gathered { readings, descriptors: before, compared, overflowed: first.overflowed.max(second.overflowed) })
    }
}

/// Asks `sock_diag` for each socket that it should have had in its dump: a dump steps over some while others come and go.
/// `find` is the look-up; none if `sock_diag` cannot witness.
pub(super) fn look_up(readings: &mut Readings, mut find: impl FnMut(&SocketRecord) -> Option<Option<Row>>) {
    for record in readings.due() {
        let Some(dump) = &mut readings.dump else { return };
        let Some(row) = find(&record) else {
            readings.dump = None;
            return;
        };
        readings.looked_up.insert(record.cookie);
        if let Some(row) = row {
            dump.insert(record.cookie, row.inode != 0);
        }
    }
}

/// The row of exactly this socket.
pub(super) fn find(diag: &mut SockDiag, record: &SocketRecord) -> Option<Option<Row>> {
    heard(diag.find(convert::local(record), convert::remote(record), record.cookie))
}

/// What `sock_diag` answers; none, with a line in the log, if it cannot witness.
pub(super) fn heard<T>(answer: Result<T, ViewError>) -> Option<T> {
    answer.inspect_err(|error| tracing::warn!(%error, "sock_diag cannot witness")).ok()
}

/// What `/proc` lists; none, with a line in the log, if it cannot witness.
fn list() -> Option<Vec<Asked>> {
    procfd::sockets().inspect_err(|error| tracing::warn!(%error, "/proc/self/fd cannot witness")).ok()
}

pub(super) fn by_cookie<'a>(records: impl IntoIterator<Item = &'a SocketRecord>) -> Records {
    records.into_iter().map(|record| (record.cookie, *record)).collect()
}

fn states<'a>(sockets: impl IntoIterator<Item = &'a Asked>) -> HashMap<u64, TcpState> {
    sockets.into_iter().map(|socket| (socket.cookie, socket.state())).collect()
}

/// Some of the sockets with their number, and what is said of the first one, for a message.
fn name(disputed: &BTreeMap<u64, Testimony>) -> String {
    let some: Vec<String> = disputed.keys().take(NAMED).map(u64::to_string).collect();
    let more = if disputed.len() > NAMED { ", ..." } else { "" };
    let says = disputed.values().next().map(|testimony| {
        let words = Witness::ALL.map(|witness| format!("{witness}: {}", testimony[witness as usize].word()));
        words.join(", ")
    });
    format!("{} (cookies {}{more}; {})", disputed.len(), some.join(", "), says.unwrap_or_default())
}
