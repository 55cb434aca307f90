//! Payloads of which some bytes are here, by site. A site says how long each is and where its bytes belong; that is
//! checked before anything is made room for.

use std::collections::BTreeMap;
use std::sync::Mutex;

use atoll_core::codec::Codec;
use atoll_core::data::Ranges;
use atoll_core::hash::Digest;
use atoll_core::site::SiteId;

use super::shelf::lock;

/// What is arriving from all sites.
pub(crate) struct Arriving {
    /// Bytes of the largest payload that there can be.
    largest: u64,
    /// Payloads that a site may have under way.
    most: usize,
    sites: Mutex<BTreeMap<SiteId, BTreeMap<Digest, Assembly>>>,
}

/// Some bytes of a payload.
struct Assembly {
    buffer: Vec<u8>,
    here: Ranges,
}

/// What became of some bytes.
#[derive(Debug, PartialEq)]
pub(crate) enum Added {
    /// There are more to come.
    Part,
    /// The site has too many payloads under way.
    NoRoom,
    /// All are here.
    Whole(Vec<u8>),
}

impl Arriving {
    /// Nothing yet, for fragments of so many weights.
    pub(crate) fn new(fragment_lens: &[usize]) -> Self {
        let largest = fragment_lens.iter().map(|&len| Codec::F32.payload_len(len) as u64).max().unwrap_or(0);
        // Two payloads per fragment are more than a site ever has under way.
        Self { largest, most: 2 * fragment_lens.len() + 2, sites: Mutex::default() }
    }

    /// Drops what a site has left half sent; it will send it again.
    pub(crate) fn drop_all(&self, site: &SiteId) {
        lock(&self.sites).remove(site);
    }

    /// Adds bytes to a payload.
    ///
    /// # Errors
    /// Why there can be no such bytes; then the payload is dropped.
    pub(crate) fn add(
        &self,
        site: &SiteId,
        digest: Digest,
        total: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<Added, String> {
        let mut sites = lock(&self.sites);
        let mine = sites.entry(site.clone()).or_default();
        let announced = mine.get(&digest).map_or(total, |assembly| assembly.buffer.len() as u64);
        let end = offset.saturating_add(bytes.len() as u64);
        if let Err(why) = self.check(announced, total, end) {
            mine.remove(&digest);
            return Err(why);
        }
        if !mine.contains_key(&digest) && mine.len() >= self.most {
            return Ok(Added::NoRoom);
        }
        let begin = || Assembly { buffer: vec![0; total as usize], here: Ranges::new() };
        let assembly = mine.entry(digest).or_insert_with(begin);
        assembly.buffer[offset as usize..end as usize].copy_from_slice(bytes);
        assembly.here.insert_span(offset, end);
        let is_whole = assembly.here.contains_span(0, total);
        let whole = if is_whole { mine.remove(&digest) } else { None };
        Ok(whole.map_or(Added::Part, |assembly| Added::Whole(assembly.buffer)))
    }

    fn check(&self, announced: u64, total: u64, end: u64) -> Result<(), String> {
        if announced != total {
            return Err(format!("it was said to have {announced} bytes, and then {total}"));
        }
        if total > self.largest {
            let largest = self.largest;
            return Err(format!("it has {total} bytes, and no payload of this model has more than {largest}"));
        }
        if end > total {
            return Err(format!("it has bytes up to {end} and is said to have {total}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_in_any_order_and_lies_about_them_are_told() {
        let (site, digest) = ("a".parse().unwrap(), Digest::of(b"x"));
        let arriving = Arriving::new(&[2, 1]);
        let add = |total, offset, bytes: &[u8]| arriving.add(&site, digest, total, offset, bytes);
        assert_eq!(add(5, 3, &[3, 4]), Ok(Added::Part));
        assert_eq!(add(5, 0, &[0, 1, 2]), Ok(Added::Whole(vec![0, 1, 2, 3, 4])));
        assert_eq!(add(0, 0, &[]), Ok(Added::Whole(Vec::new())), "the codec will refuse it");
        assert!(add(14, 0, &[1]).unwrap_err().contains("has more than 13"));
        assert!(add(u64::MAX, u64::MAX, &[1]).unwrap_err().contains("has more than 13"));
        assert!(add(5, 4, &[1, 2]).unwrap_err().contains("bytes up to 6"));
        assert_eq!(add(5, 0, &[1]), Ok(Added::Part));
        assert!(add(6, 0, &[1]).unwrap_err().contains("5 bytes, and then 6"));
    }

    #[test]
    fn a_site_has_room_for_so_many_payloads() {
        let site = "a".parse().unwrap();
        let arriving = Arriving::new(&[2]);
        let add = |number: u8| arriving.add(&site, Digest::of(&[number]), 5, 0, &[number]);
        assert_eq!(
            [add(0), add(1), add(2), add(3)],
            [Ok(Added::Part), Ok(Added::Part), Ok(Added::Part), Ok(Added::Part)]
        );
        assert_eq!(add(4), Ok(Added::NoRoom));
        arriving.drop_all(&site);
        assert_eq!(add(4), Ok(Added::Part));
    }
}
