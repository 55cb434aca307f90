//! Read-only memory maps: the one place of this crate that needs `unsafe`.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// The bytes of a file, paged in as they are read.
#[derive(Debug)]
pub(crate) struct Map(memmap2::Mmap);

impl Map {
    /// Maps the file at `path`.
    #[allow(unsafe_code)]
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is only read, as plain bytes of which any value is valid. What remains is that
        // another process could cut the file while it is mapped. Atoll itself never does: its files are
        // written under another name, renamed when whole, and replaced by renaming or unlinking, which
        // leave a mapped file intact.
        unsafe { memmap2::Mmap::map(&file) }.map(Self)
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
