//! Framing of DNS messages on a stream: two octets of length, most significant first, then the message
//! (RFC 1035, section 4.2.2; RFC 7766, section 8).
//!
//! Nothing here does I/O. The caller keeps the bytes that it has read so far, takes the whole messages out of them and
//! moves the incomplete tail to the front of its buffer. A message may be split anywhere, also between the two octets
//! of its length: RFC 7766, section 8 forbids to close because the first read does not hold all of it.

use thiserror::Error;

/// Octets of the length in front of each message.
pub const PREFIX_LEN: usize = 2;

/// Octets of a DNS header, hence of the shortest message (RFC 1035, section 4.1.1).
pub const MIN_MESSAGE: usize = 12;

/// Octets of the longest message that a length can announce.
pub const MAX_MESSAGE: usize = u16::MAX as usize;

/// Why a stream cannot be split any further.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// The announced length, in octets, has no room for a DNS header. What follows cannot be trusted to be a frame.
    #[error("a DNS message of {0} octets is announced, the shortest has 12")]
    TooShort(u16),
}

/// Splits what was read so far into whole messages.
///
/// Invariant: `consumed <= buffer.len()`, and it lies on the boundary of a frame.
#[derive(Clone, Debug)]
pub struct Frames<'a> {
    buffer: &'a [u8],
    consumed: usize,
    failed: bool,
}

impl<'a> Frames<'a> {
    /// Starts at the first octet of `buffer`, which must be the first octet of a frame.
    pub fn new(buffer: &'a [u8]) -> Self {
        Self { buffer, consumed: 0, failed: false }
    }

    /// Octets of the whole frames that were yielded, their lengths included.
    pub fn consumed(&self) -> usize {
        self.consumed
    }

    /// What was not yielded yet: after the last item the incomplete frame, or the frame with the wrong length.
    pub fn rest(&self) -> &'a [u8] {
        self.buffer.get(self.consumed..).unwrap_or_default()
    }
}

/// Yields each message without its length. An error is the last item.
impl<'a> Iterator for Frames<'a> {
    type Item = Result<&'a [u8], FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let rest = self.rest();
        match first_frame(rest) {
            Ok(Some(total)) => {
                self.consumed += total;
                rest.get(PREFIX_LEN..total).map(Ok)
            }
            Ok(None) => None,
            Err(error) => {
                self.failed = true;
                Some(Err(error))
            }
        }
    }
}

impl std::iter::FusedIterator for Frames<'_> {}

/// Octets of the first frame, its length included, if `bytes` holds all of it.
///
/// # Errors
///
/// As soon as both octets of a length below 12 are there.
pub fn first_frame(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(total) = needed(bytes) else { return Ok(None) };
    let length = total - PREFIX_LEN;
    if length < MIN_MESSAGE {
        return Err(FrameError::TooShort(length as u16));
    }
    Ok((bytes.len() >= total).then_some(total))
}

/// Octets of the frame that `rest` begins with, its length included; `None` while that is not known.
pub fn needed(rest: &[u8]) -> Option<usize> {
    let length = rest.first_chunk::<PREFIX_LEN>()?;
    Some(PREFIX_LEN + usize::from(u16::from_be_bytes(*length)))
}

/// The two octets that go in front of `message`; `None` if it is longer than [`MAX_MESSAGE`].
pub fn prefix(message: &[u8]) -> Option<[u8; PREFIX_LEN]> {
    u16::try_from(message.len()).ok().map(u16::to_be_bytes)
}

/// Appends `message` with its length in front. Returns whether it fitted; if not, `out` is as before.
pub fn append(out: &mut Vec<u8>, message: &[u8]) -> bool {
    let Some(prefix) = prefix(message) else { return false };
    out.extend_from_slice(&prefix);
    out.extend_from_slice(message);
    true
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn stream(messages: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for message in messages {
            assert!(append(&mut bytes, message));
        }
        bytes
    }

    #[test]
    fn lengths_without_room_for_a_header_are_errors() {
        for length in 0..12u16 {
            let mut bytes = length.to_be_bytes().to_vec();
            bytes.extend(std::iter::repeat_n(0, 64));
            let mut frames = Frames::new(&bytes);
            assert_eq!(frames.next(), Some(Err(FrameError::TooShort(length))));
            assert_eq!(frames.next(), None);
            assert_eq!(frames.consumed(), 0);
        }
    }

    #[test]
    fn one_octet_of_a_length_says_nothing() {
        assert_eq!(needed(&[]), None);
        assert_eq!(needed(&[0]), None);
        assert_eq!(needed(&[1, 0]), Some(258));
        assert_eq!(first_frame(&[0]), Ok(None));
    }

    #[test]
    fn the_longest_message_fits_and_one_more_octet_does_not() {
        let mut out = Vec::new();
        assert!(!append(&mut out, &vec![0; MAX_MESSAGE + 1]));
        assert!(out.is_empty());
        assert!(append(&mut out, &vec![7; MAX_MESSAGE]));
        assert_eq!(Frames::new(&out).next().map(|message| message.map(<[u8]>::len)), Some(Ok(MAX_MESSAGE)));
    }

    proptest! {
        /// T-02: split at every point, the messages are the same as in one piece.
        #[test]
        fn a_split_anywhere_yields_the_same(messages in vec(vec(any::<u8>(), 12..80), 0..6)) {
            let bytes = stream(&messages);
            for cut in 0..=bytes.len() {
                let mut head = Frames::new(&bytes[..cut]);
                let mut seen: Vec<&[u8]> = head.by_ref().map(|m| m.expect("valid")).collect();
                prop_assert_eq!(head.consumed() + head.rest().len(), cut);
                let mut tail = Frames::new(&bytes[head.consumed()..]);
                seen.extend(tail.by_ref().map(|m| m.expect("valid")));
                prop_assert_eq!(&seen, &messages.iter().map(Vec::as_slice).collect::<Vec<_>>());
                prop_assert!(tail.rest().is_empty());
            }
        }

        #[test]
        fn arbitrary_bytes_stay_in_bounds(bytes in vec(any::<u8>(), 0..300)) {
            let mut frames = Frames::new(&bytes);
            let mut total = 0;
            let mut failed = false;
            for item in frames.by_ref() {
                prop_assert!(!failed, "an error is the last item");
                match item {
                    Ok(message) => total += PREFIX_LEN + message.len(),
                    Err(FrameError::TooShort(length)) => {
                        prop_assert!(length < 12);
                        failed = true;
                    }
                }
            }
            prop_assert_eq!(frames.consumed(), total);
            prop_assert_eq!(frames.rest(), &bytes[total..]);
            if !failed {
                prop_assert!(needed(frames.rest()).is_none_or(|needed| needed > frames.rest().len()));
            }
        }
    }
}
