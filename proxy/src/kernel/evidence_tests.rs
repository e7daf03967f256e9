//! A kernel with sockets that come and go while it is read, and three witnesses who tell the truth about it, or not.

use std::ops::Range;

use counterfoil_common::AF_INET;
use proptest::prelude::*;

use super::super::witness::{Verdict, is_disputed, vote};
use super::*;

const NETNS: u32 = 17;

/// When each reading is made. A sweep is one moment; in all others each socket has its own.
const DESCRIPTORS: [Range<i32>; 2] = [0..10, 50..60];
const PROC_FD: [Range<i32>; 2] = [10..20, 40..50];
const SWEEPS: [i32; 2] = [20, 40];
const DUMP: Range<i32> = 20..30;
const LOOK_UP: Range<i32> = 30..40;

/// One socket of this process, and when what happens to it.
#[derive(Clone, Debug)]
struct Life {
    born: i32,
    /// `connect()`: tagged, and in SYN_SENT.
    connects: i32,
    /// In the kernel's table.
    hashed: i32,
    established: i32,
    /// By its peer.
    reset: i32,
    /// This process's descriptor.
    closed: i32,
    /// The descriptor that another process has.
    closed_elsewhere: i32,
    /// The closing handshake.
    over: i32,
    netns: u32,
    /// Both programs missed it, and counted that.
    missed: bool,
    /// The dump steps over it.
    stepped_over: bool,
    /// Where in each of the readings that are no single moment.
    jitter: [i32; 6],
}

impl Life {
    /// Established all the time, and nothing excuses whoever lacks it.
    fn is_solid(&self) -> bool {
        self.established < 0 && self.reset.min(self.closed) >= 60 && self.netns == NETNS && !self.missed
    }

    fn has_descriptor(&self, at: i32) -> bool {
        (self.born..self.closed).contains(&at)
    }

    fn is_held(&self, at: i32) -> bool {
        (self.born..self.closed.max(self.closed_elsewhere)).contains(&at)
    }

    fn exists(&self, at: i32) -> bool {
        self.is_held(at) || self.is_hashed(at)
    }

    fn is_hashed(&self, at: i32) -> bool {
        let end = if self.is_held(at) { i32::MAX } else { self.over };
        (self.hashed..self.reset.min(end)).contains(&at)
    }

    fn state(&self, at: i32) -> TcpState {
        match at {
            _ if at < self.connects || at >= self.reset => TcpState::Close,
            _ if at < self.established => TcpState::SynSent,
            _ if self.is_held(at) => TcpState::Established,
            _ => TcpState::FinWait1,
        }
    }

    fn record(&self, cookie: u64, at: i32) -> SocketRecord {
        let held = if self.is_held(at) { flags::HELD } else { 0 };
        let state = self.state(at) as u8;
        SocketRecord { cookie, state, family: AF_INET, netns: self.netns, flags: held, ..SocketRecord::EMPTY }
    }

    fn moment(&self, reading: usize, within: &Range<i32>) -> i32 {
        within.start + self.jitter[reading]
    }
}

fn life() -> impl Strategy<Value = Life> {
    let step = || prop_oneof![4 => 0..30, 2 => 0..120, 1 => Just(0)];
    let times = (-120..60i32, step(), step(), step(), step(), step(), step(), step());
    let rarely = || prop::bool::weighted(0.2);
    (times, [rarely(), rarely(), rarely()], any::<[bool; 2]>(), prop::array::uniform6(0..10i32)).prop_map(
        |(times, [foreign, missed, stepped_over], [resets, elsewhere], jitter)| {
            let (born, connects, hashed, established, reset, closed, closed_elsewhere, over) = times;
            let connects = born + connects;
            let (hashed, established) = (connects + hashed % 5, connects + hashed % 5 + established % 20);
            let closed = born + 10 + closed + established % 7;
            let closed_elsewhere = if elsewhere { closed + closed_elsewhere } else { closed };
            Life {
                born,
                connects,
                hashed,
                established,
                reset: if resets { hashed + reset } else { i32::MAX },
                closed,
                closed_elsewhere,
                over: closed.max(closed_elsewhere) + over,
                netns: if foreign { NETNS + 1 } else { NETNS },
                missed,
                stepped_over,
                jitter,
            }
        },
    )
}

/// What a witness hides, and which sockets it makes up.
#[derive(Clone, Debug)]
struct Lie {
    by: Witness,
    hidden: Vec<bool>,
    invented: u64,
}

impl Lie {
    fn hides(&self, witness: Witness, cookie: u64) -> bool {
        self.by == witness && self.hidden.get(cookie as usize) == Some(&true)
    }
}

fn lie() -> impl Strategy<Value = Lie> {
    let invented = prop_oneof![3 => Just(0), 1 => 1..5u64];
    (prop::sample::select(&Witness::ALL), prop::collection::vec(any::<bool>(), 1..40), invented)
        .prop_map(|(by, hidden, invented)| Lie { by, hidden, invented })
}

/// Reads the world as `crosscheck.rs` reads the kernel.
fn read(world: &[Life], lie: Option<&Lie>) -> Readings {
    let told = |witness, cookie| !lie.is_some_and(|lie| lie.hides(witness, cookie));
    let lives = || (0u64..).zip(world);
    let invented = |witness| {
        let count = lie.filter(|lie| lie.by == witness).map_or(0, |lie| lie.invented);
        let life = Life { established: -9, ..world[0].clone() };
        (1_000_000..1_000_000 + count).map(move |cookie| {
            let record = life.record(cookie, 0);
            (cookie, SocketRecord { state: TcpState::Established as u8, flags: flags::HELD, netns: NETNS, ..record })
        })
    };
    let descriptors = |index: usize| {
        let met = lives().map(|(cookie, life)| (cookie, life, life.moment(index, &DESCRIPTORS[index])));
        met.filter(|(_, life, at)| life.has_descriptor(*at))
            .map(|(cookie, life, at)| (cookie, life.record(cookie, at)))
            .collect()
    };
    let proc_fd = |index: usize| {
        let listed = lives().map(|(cookie, life)| (cookie, life, life.moment(2 + index, &PROC_FD[index])));
        listed
            .filter(|(cookie, life, at)| life.has_descriptor(*at) && told(Witness::ProcFd, *cookie))
            .map(|(cookie, life, at)| (cookie, life.state(at)))
            .chain(invented(Witness::ProcFd).map(|(cookie, _)| (cookie, TcpState::Established)))
            .collect()
    };
    let sweep = |at: i32| {
        let tagged = lives().filter(|(_, life)| life.exists(at) && life.connects <= at && !life.missed);
        tagged
            .filter(|(cookie, _)| told(Witness::Ebpf, *cookie))
            .map(|(cookie, life)| (cookie, life.record(cookie, at)))
            .chain(invented(Witness::Ebpf))
            .collect()
    };
    let seen = |life: &Life, at| life.is_hashed(at) && life.netns == NETNS;
    let dumped = lives()
        .map(|(cookie, life)| (cookie, life, life.moment(4, &DUMP)))
        .filter(|(cookie, life, at)| seen(life, *at) && !life.stepped_over && told(Witness::SockDiag, *cookie))
        .map(|(cookie, life, at)| (cookie, life.is_held(at)));
    let between = lives().filter(|(_, life)| life.has_descriptor(life.moment(5, &LOOK_UP)));
    let mut readings = Readings {
        descriptors: [descriptors(0), descriptors(1)],
        proc_fd: Some([proc_fd(0), HashMap::new()]),
        sweeps: [sweep(SWEEPS[0]), HashMap::new()],
        between: between.map(|(cookie, _)| cookie).collect(),
        dump: Some(dumped.collect()),
        looked_up: HashSet::new(),
        netns: [NETNS].into(),
    };
    for record in readings.due() {
        readings.looked_up.insert(record.cookie);
        let Some(life) = world.get(record.cookie as usize) else { continue };
        let at = life.moment(5, &LOOK_UP);
        if let Some(dump) = readings.dump.as_mut().filter(|_| seen(life, at) && told(Witness::SockDiag, record.cookie))
        {
            dump.insert(record.cookie, life.is_held(at));
        }
    }
    readings.sweeps[1] = sweep(SWEEPS[1]);
    if let Some([_, after]) = &mut readings.proc_fd {
        *after = proc_fd(1);
    }
    readings
}

/// What remains after eBPF has admitted what it missed.
fn disputed(world: &[Life], readings: &Readings) -> BTreeMap<u64, Testimony> {
    let mut disputed = readings.testimonies();
    disputed.retain(|_, testimony| is_disputed(testimony));
    excuse(&mut disputed, 2 * world.iter().filter(|life| life.missed).count() as u64);
    disputed.retain(|_, testimony| is_disputed(testimony));
    disputed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever happens between and during the readings: no two who tell the truth contradict each other.
    #[test]
    fn races_make_no_dispute(world in prop::collection::vec(life(), 1..40)) {
        let readings = read(&world, None);
        prop_assert_eq!(disputed(&world, &readings), BTreeMap::new());
    }

    /// One who lies is named as soon as both others know better of one socket, and nobody else ever is.
    #[test]
    fn the_liar_is_named_among_races(world in prop::collection::vec(life(), 1..40), lie in lie()) {
        let readings = read(&world, Some(&lie));
        let disputed = disputed(&world, &readings);
        let verdict = vote(disputed.values());
        let innocent = Witness::ALL.into_iter().filter(|witness| *witness != lie.by);
        for witness in innocent {
            prop_assert_ne!(verdict, Verdict::Liar(witness), "{:?}", disputed);
        }
        // Where eBPF admits misses, a lie may pass for one.
        let provable = lie.by != Witness::Ebpf || world.iter().all(|life| !life.missed);
        let exposed = (0u64..).zip(&world).any(|(cookie, life)| life.is_solid() && lie.hides(lie.by, cookie));
        if provable && exposed {
            prop_assert_eq!(verdict, Verdict::Liar(lie.by), "{:?}", disputed);
        }
    }

    /// Only a socket that another process holds is said to be held elsewhere.
    #[test]
    fn held_elsewhere_is_what_no_descriptor_of_ours_refers_to(world in prop::collection::vec(life(), 1..40)) {
        for cookie in read(&world, None).held_elsewhere() {
            let life = &world[cookie as usize];
            prop_assert!(!life.missed && life.is_held(SWEEPS[0]) && life.is_held(SWEEPS[1]));
            prop_assert!(life.closed < SWEEPS[1] && SWEEPS[1] < life.closed_elsewhere, "{life:?}");
        }
    }
}

/// Established, with a descriptor here, all the time.
fn solid() -> Life {
    Life {
        born: -99,
        connects: -90,
        hashed: -80,
        established: -70,
        reset: i32::MAX,
        closed: 99,
        closed_elsewhere: 99,
        over: 99,
        netns: NETNS,
        missed: false,
        stepped_over: false,
        jitter: [0; 6],
    }
}

fn verdict_of(life: Life, by: Witness) -> Verdict {
    let world = [life];
    let readings = read(&world, Some(&Lie { by, hidden: vec![true], invented: 0 }));
    vote(disputed(&world, &readings).values())
}

#[test]
fn each_liar_is_named_over_a_socket_that_all_know() {
    for witness in Witness::ALL {
        assert_eq!(verdict_of(solid(), witness), Verdict::Liar(witness));
    }
}

#[test]
fn who_cannot_know_does_not_vote() {
    let reset = || Life { reset: -5, ..solid() };
    assert_eq!(verdict_of(reset(), Witness::SockDiag), Verdict::Agreed, "in no table: there is nothing to hide");
    assert_eq!(verdict_of(reset(), Witness::ProcFd), Verdict::Open, "eBPF alone contradicts");
    assert_eq!(verdict_of(reset(), Witness::Ebpf), Verdict::Agreed, "it might never have been connected");
    let foreign = || Life { netns: NETNS + 1, ..solid() };
    assert_eq!(verdict_of(foreign(), Witness::SockDiag), Verdict::Agreed);
    assert_eq!(verdict_of(foreign(), Witness::Ebpf), Verdict::Open);
    let elsewhere = || Life { closed: -5, ..solid() };
    assert_eq!(verdict_of(elsewhere(), Witness::ProcFd), Verdict::Agreed);
    assert_eq!(verdict_of(elsewhere(), Witness::SockDiag), Verdict::Open);
}

#[test]
fn a_witness_that_could_not_be_asked_says_nothing() {
    let mut readings = read(&[solid()], None);
    assert_eq!(readings.testimonies()[&0], [Says::Present; 3]);
    readings.dump = None;
    assert_eq!(readings.testimonies()[&0], [Says::Present, Says::Unknown, Says::Present]);
    readings.proc_fd = None;
    assert_eq!(readings.testimonies()[&0], [Says::Present, Says::Unknown, Says::Unknown]);
}

#[test]
fn what_was_missed_and_counted_is_no_lie() {
    let mut missed = BTreeMap::from([(1, [Says::Absent, Says::Present, Says::Present])]);
    let before = missed.clone();
    excuse(&mut missed, 1);
    assert_eq!(missed, before, "both programs must have missed it");
    excuse(&mut missed, 2);
    assert_eq!(missed[&1], [Says::Unknown, Says::Present, Says::Present]);
}
