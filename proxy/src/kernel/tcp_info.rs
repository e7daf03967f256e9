//! The fields of `struct tcp_info` (`include/uapi/linux/tcp.h`) that matter here. Kernels only append to it.

/// What the kernel tells of a connection, here by netlink or `getsockopt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TcpInfo {
    /// Kernel number of the state.
    pub(super) state: u8,
    /// Milliseconds since payload was last sent.
    pub(super) since_sent_ms: u32,
    /// Milliseconds since payload last came in, or since the handshake.
    pub(super) since_received_ms: u32,
    /// Payload received, bytes (Linux 4.1).
    pub(super) bytes_received: Option<u64>,
    /// Payload sent, bytes (Linux 4.19).
    pub(super) bytes_sent: Option<u64>,
}

impl TcpInfo {
    /// Reads the structure; `None` if not even its oldest part is there.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            state: *bytes.first()?,
            since_sent_ms: u32::from_ne_bytes(at(bytes, 44)?),
            since_received_ms: u32::from_ne_bytes(at(bytes, 52)?),
            bytes_received: at(bytes, 128).map(u64::from_ne_bytes),
            bytes_sent: at(bytes, 200).map(u64::from_ne_bytes),
        })
    }
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..).and_then(|tail| tail.first_chunk()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_kernel_puts_them() {
        let mut bytes = [0u8; 240];
        bytes[0] = 8;
        bytes[44..48].copy_from_slice(&5u32.to_ne_bytes());
        bytes[52..56].copy_from_slice(&6u32.to_ne_bytes());
        bytes[128..136].copy_from_slice(&7u64.to_ne_bytes());
        bytes[200..208].copy_from_slice(&9u64.to_ne_bytes());
        let info =
            TcpInfo { state: 8, since_sent_ms: 5, since_received_ms: 6, bytes_received: Some(7), bytes_sent: Some(9) };
        assert_eq!(TcpInfo::parse(&bytes), Some(info));
        assert_eq!(TcpInfo::parse(&bytes[..104]), Some(TcpInfo { bytes_received: None, bytes_sent: None, ..info }));
        assert_eq!(TcpInfo::parse(&bytes[..55]), None);
        assert_eq!(TcpInfo::parse(&[]), None);
    }
}
