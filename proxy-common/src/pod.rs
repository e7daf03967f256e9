//! `aya::Pod` for the structures that cross the boundary. The orphan rule forces it to be here.
#![expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]

use crate::{FieldOffsets, Owner, PassHeader, Peer, SocketRecord, SocketTag, Walk};

// SAFETY: `repr(C)`, integers only and no padding (sizes and offsets are asserted in `layout`), so that every byte is
// initialised and every bit pattern is a value.
unsafe impl aya::Pod for SocketTag {}
// SAFETY: as above.
unsafe impl aya::Pod for SocketRecord {}
// SAFETY: as above.
unsafe impl aya::Pod for PassHeader {}
// SAFETY: as above.
unsafe impl aya::Pod for Owner {}
// SAFETY: as above.
unsafe impl aya::Pod for FieldOffsets {}
// SAFETY: as above.
unsafe impl aya::Pod for Peer {}
// SAFETY: as above.
unsafe impl aya::Pod for Walk {}
