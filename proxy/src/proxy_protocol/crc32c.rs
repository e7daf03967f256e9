//! CRC32C (RFC 9260, appendix A): what a header's checksum is (section 2.2.3 of the specification).

/// The reflected polynomial.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What each octet does to the checksum.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut octet = 0;
    while octet < 256 {
        let mut crc = octet as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[octet] = crc;
        octet += 1;
    }
    table
};

/// The checksum of some octets.
pub(crate) fn crc32c(octets: impl Iterator<Item = u8>) -> u32 {
    !octets.fold(u32::MAX, |crc, octet| (crc >> 8) ^ TABLE[((crc ^ u32::from(octet)) & 0xff) as usize])
}
