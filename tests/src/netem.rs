//! A loopback interface that delays, reorders and corrupts packets by chance: the kernel's netem (tc-netem(8)), asked for by
//! rtnetlink(7).

use std::time::Duration;

use crate::netlink;

/// Of `linux/rtnetlink.h`, `linux/netlink.h` and `linux/pkt_sched.h`.
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const NLM_F_CREATE_REPLACE: u16 = 0x500;
const TC_H_ROOT: u32 = u32::MAX;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_NETEM_REORDER: u16 = 3;
const TCA_NETEM_CORRUPT: u16 = 4;
const TCA_NETEM_LATENCY64: u16 = 10;
const TCA_NETEM_JITTER64: u16 = 11;
/// In every network namespace.
const LOOPBACK: u32 = 1;
/// Packets that wait at once; more are lost.
const LIMIT: u32 = 10_000;

/// What happens to packets.
#[derive(Clone, Copy, Debug)]
pub struct Trouble {
    /// How late they are, on average.
    pub delay: Duration,
    /// How much earlier or later.
    pub jitter: Duration,
    /// Of a hundred, so many are not delayed at all, and overtake the others.
    pub reorder: u32,
    /// Of a hundred, so many have one bit wrong.
    pub corrupt: u32,
}

/// A loopback interface in trouble, until this is dropped.
#[derive(Debug)]
pub struct Netem(());

impl Netem {
    /// The loopback interface of the calling thread's network namespace is in trouble from now on.
    ///
    /// # Panics
    /// If the kernel has no netem, or the caller is not root.
    pub fn on_loopback(trouble: Trouble) -> Self {
        let mut options = Vec::new();
        // `struct tc_netem_qopt`: latency, limit, loss, gap (every packet may overtake), duplicate, jitter.
        [0, LIMIT, 0, 1, 0, 0_u32].iter().for_each(|field| options.extend_from_slice(&field.to_ne_bytes()));
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).expect("a short time").to_ne_bytes();
        attribute(&mut options, TCA_NETEM_LATENCY64, &nanoseconds(trouble.delay));
        attribute(&mut options, TCA_NETEM_JITTER64, &nanoseconds(trouble.jitter));
        attribute(&mut options, TCA_NETEM_REORDER, &chance(trouble.reorder));
        attribute(&mut options, TCA_NETEM_CORRUPT, &chance(trouble.corrupt));
        let mut attributes = Vec::new();
        attribute(&mut attributes, TCA_KIND, b"netem\0");
        attribute(&mut attributes, TCA_OPTIONS, &options);
        change(RTM_NEWQDISC, NLM_F_CREATE_REPLACE, &attributes).unwrap_or_else(|e| panic!("netem: {e}"));
        Self(())
    }
}

impl Drop for Netem {
    fn drop(&mut self) {
        // What it holds back is lost with it.
        if let Err(error) = change(RTM_DELQDISC, 0, &[]) {
            eprintln!("netem stays: {error}");
        }
    }
}

/// Probability and correlation, as fractions of 2^32.
fn chance(percent: u32) -> [u8; 8] {
    let probability = u32::try_from(u64::from(u32::MAX) * u64::from(percent) / 100).expect("at most a hundred");
    let mut chance = [0; 8];
    chance[..4].copy_from_slice(&probability.to_ne_bytes());
    chance
}

fn attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("a short attribute");
    to.extend_from_slice(&length.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// One request about the root queue of the loopback interface.
fn change(kind: u16, flags: u16, attributes: &[u8]) -> std::io::Result<()> {
    // `struct tcmsg`: family with padding, interface, handle, parent, information.
    let mut body: Vec<u8> = [0, LOOPBACK, 0, TC_H_ROOT, 0].iter().flat_map(|field: &u32| field.to_ne_bytes()).collect();
    body.extend_from_slice(attributes);
    netlink::request(None, kind, flags, &body)
}
