//! Payloads on disk under their content address. A file is either whole or not there; what is read is
//! verified.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use atoll_core::hash::Digest;

use crate::data::file;

/// A folder of blobs.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// Opens the folder, making it if need be.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(folder: PathBuf) -> Result<Self> {
        file::make_folder(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        Ok(Self { folder })
    }

    /// Keeps `bytes`; when this returns they outlast a crash.
    ///
    /// # Errors
    /// If the disk does not take them.
    pub fn put(&self, digest: Digest, bytes: &[u8]) -> Result<()> {
        let path = self.path(digest);
        let kept = match self.get(digest) {
            // It may be the work of a process that died before it synced the name.
            Some(_) => file::sync_folder(&path),
            None => file::write(&path, bytes),
        };
        kept.with_context(|| format!("{} cannot be written\nhint: is the disk full?", path.display()))
    }

    /// The bytes of that address, if they are here and undamaged.
    pub fn get(&self, digest: Digest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(digest)).ok()?;
        (Digest::of(&bytes) == digest).then_some(bytes)
    }

    /// Drops one payload.
    pub fn remove(&self, digest: Digest) {
        // Whatever stays behind is swept up at the next snapshot.
        let _ = fs::remove_file(self.path(digest));
    }

    /// Drops everything that is not in `needed`.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn sweep(&self, needed: &BTreeSet<Digest>) -> Result<()> {
        let listing =
            fs::read_dir(&self.folder).with_context(|| format!("{} cannot be read", self.folder.display()))?;
        for file in listing.flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            let kept = name.parse().is_ok_and(|digest| needed.contains(&digest));
            if !kept {
                let _ = fs::remove_file(file.path());
            }
        }
        Ok(())
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_not_handed_out() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("payloads")).unwrap();
        let digest = Digest::of(b"bytes");
        store.put(digest, b"bytes").unwrap();
        assert_eq!(store.get(digest).as_deref(), Some(&b"bytes"[..]));
        fs::write(store.path(digest), b"bytez").unwrap();
        assert_eq!(store.get(digest), None);
    }

    #[test]
    fn what_is_kept_outlasts_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_path_buf()).unwrap();
        file::synced::take();
        for _ in 0..2 {
            store.put(Digest::of(b"bytes"), b"bytes").unwrap();
            assert_eq!(file::synced::take(), [folder.path()]);
        }
        let names = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, 1, "nothing else is left behind");
    }

    #[test]
    fn two_sites_may_bring_the_same_bytes_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_path_buf()).unwrap();
        for payload in 0..20u8 {
            let bytes = vec![payload; 1 << 16];
            let put = || store.put(Digest::of(&bytes), &bytes).unwrap();
            std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(put))));
            assert_eq!(store.get(Digest::of(&bytes)), Some(bytes));
        }
    }

    #[test]
    fn the_sweep_keeps_what_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_path_buf()).unwrap();
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        store.put(a, b"a").unwrap();
        store.put(b, b"b").unwrap();
        store.sweep(&BTreeSet::from([a])).unwrap();
        assert!(store.get(a).is_some() && store.get(b).is_none());
    }
}
