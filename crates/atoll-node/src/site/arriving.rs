//! Weights that are being fetched, on disk as well, so that neither a lost connection nor a killed process fetches them
//! twice. There is one file for each fragment, for one version of it: no more than the model in all.
//!
//! ```text
//! name      COORDINATOR/FRAGMENT-VERSION-DIGEST           (weights of another run are of no use, and go)
//! file      | offset: u64 | bytes: u32 | bytes … |  …        (little endian; in the order in which they came)
//! ```
//!
//! A file stays when all of it is here: a process that starts anew begins from it, and from the commits since. Nothing
//! is believed of what it says until the hash of the whole is the one in its name.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use atoll_core::data::Ranges;
use atoll_core::hash::Digest;
use atoll_core::manifest::FragmentId;

/// The files of a site.
#[derive(Debug, Clone)]
pub(super) struct Arriving {
    folder: PathBuf,
}

/// Weights of which some bytes are here.
#[derive(Debug)]
pub(super) struct Partial {
    path: PathBuf,
    /// None if the disk does not take more: they are then kept in memory only.
    file: Option<File>,
}

/// Which weights are in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Weights {
    pub(super) fragment: FragmentId,
    pub(super) version: u64,
    pub(super) digest: Digest,
}

const HEAD: usize = 12;

impl Arriving {
    /// The files in a site's folder `dir`, of the run whose coordinator has this fingerprint.
    ///
    /// # Errors
    /// If there can be none.
    pub(super) fn open(dir: &Path, coordinator: Digest) -> Result<Self> {
        let all = dir.join("arriving");
        let folder = all.join(coordinator.to_string());
        fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        for other in entries(&all).filter(|path| *path != folder) {
            gone(fs::remove_dir_all(&other), &other);
        }
        Ok(Self { folder })
    }

    /// Version and digest of the weights of each fragment of which earlier processes have fetched some.
    pub(super) fn begun(&self, fragments: usize) -> Vec<Option<(u64, Digest)>> {
        let mut begun = vec![None; fragments];
        for weights in self.all() {
            if let Some(place) = begun.get_mut(weights.fragment.index()) {
                *place = Some((weights.version, weights.digest));
            }
        }
        begun
    }

    /// Goes on with a fetch of `buffer.len()` bytes, of which it puts those that are here into `buffer` and `here`; files
    /// of other versions are removed.
    pub(super) fn go_on(&self, weights: Weights, buffer: &mut [u8], here: &mut Ranges) -> Partial {
        let others = self.all().filter(|other| other.fragment == weights.fragment && *other != weights);
        others.map(|other| self.path(&other)).for_each(|path| gone(fs::remove_file(&path), &path));
        let path = self.path(&weights);
        let sound = match fs::read(&path) {
            Ok(bytes) => take_up(&bytes, buffer, here),
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => {
                complain(&path, &error);
                0
            }
        };
        let opened = File::options().create(true).append(true).open(&path).and_then(|file| {
            file.set_len(sound)?; // What a crash has cut short goes.
            Ok(file)
        });
        Partial { file: opened.map_err(|error| complain(&path, &error)).ok(), path }
    }

    /// The run is finished.
    pub(super) fn clear(&self) {
        gone(fs::remove_dir_all(&self.folder), &self.folder);
    }

    fn all(&self) -> impl Iterator<Item = Weights> {
        entries(&self.folder).filter_map(|path| Weights::parse(path.file_name()?.to_str()?))
    }

    fn path(&self, weights: &Weights) -> PathBuf {
        let Weights { fragment, version, digest } = weights;
        self.folder.join(format!("{}-{version}-{digest}", fragment.0))
    }
}

impl Weights {
    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.splitn(3, '-');
        let fragment = FragmentId(parts.next()?.parse().ok()?);
        Some(Self { fragment, version: parts.next()?.parse().ok()?, digest: parts.next()?.parse().ok()? })
    }
}

impl Partial {
    /// Some more bytes have come.
    pub(super) fn add(&mut self, offset: u64, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&offset.to_le_bytes());
        head[8..].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        if let Err(error) = file.write_all(&head).and_then(|()| file.write_all(bytes)) {
            complain(&self.path, &error);
            self.give_up();
        }
    }

    /// The bytes are not what their name says.
    pub(super) fn give_up(&mut self) {
        self.file = None;
        gone(fs::remove_file(&self.path), &self.path);
    }
}

/// Puts what a file tells into `buffer`; returns how much of the file is sound.
fn take_up(file: &[u8], buffer: &mut [u8], here: &mut Ranges) -> u64 {
    let mut rest = file;
    while let Some((offset, bytes, behind)) = take_part(rest) {
        let Some(place) = offset.checked_add(bytes.len()).and_then(|end| buffer.get_mut(offset..end)) else { break };
        place.copy_from_slice(bytes);
        here.insert_span(offset as u64, (offset + bytes.len()) as u64);
        rest = behind;
    }
    (file.len() - rest.len()) as u64
}

fn take_part(bytes: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    let offset = u64::from_le_bytes(*head.first_chunk()?);
    let length = u32::from_le_bytes(*head.last_chunk()?);
    let (bytes, rest) = rest.split_at_checked(length as usize)?;
    Some((usize::try_from(offset).ok()?, bytes, rest))
}

/// What is in a folder, as far as it can be read.
fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let listed = fs::read_dir(folder).map_err(|error| complain(folder, &error));
    listed.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

/// Complains if something could not be removed.
fn gone(removed: io::Result<()>, path: &Path) {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => complain(path, &error),
        _ => {}
    }
}

/// A file that cannot be used costs a second fetch, nothing else.
fn complain(path: &Path, error: &io::Error) {
    tracing::warn!("{}: {error}; if this site starts again it fetches these weights again", path.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: Digest = Digest([8; 32]);

    fn weights(fragment: u16, version: u64) -> Weights {
        Weights { fragment: FragmentId(fragment), version, digest: Digest([version as u8; 32]) }
    }

    fn go_on(arriving: &Arriving, weights: Weights) -> (Partial, Vec<u8>, Vec<(u64, u64)>) {
        let (mut buffer, mut here) = (vec![0; 10], Ranges::new());
        let partial = arriving.go_on(weights, &mut buffer, &mut here);
        (partial, buffer, here.spans().collect())
    }

    #[test]
    fn a_later_process_goes_on_where_an_earlier_one_was_killed() {
        let dir = tempfile::tempdir().unwrap();
        let arriving = Arriving::open(dir.path(), RUN).unwrap();
        let (mut partial, _, here) = go_on(&arriving, weights(1, 7));
        assert!(here.is_empty());
        partial.add(2, &[1, 2, 3]);
        partial.add(8, &[4, 5]);
        assert_eq!(arriving.begun(2), [None, Some((7, Digest([7; 32])))]);

        // The last part is cut short.
        let path = arriving.path(&weights(1, 7));
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let (mut partial, buffer, here) = go_on(&arriving, weights(1, 7));
        assert_eq!((buffer, here), (vec![0, 0, 1, 2, 3, 0, 0, 0, 0, 0], vec![(2, 5)]));
        partial.add(0, &[9, 9]);
        let (mut partial, buffer, here) = go_on(&arriving, weights(1, 7));
        assert_eq!((buffer, here), (vec![9, 9, 1, 2, 3, 0, 0, 0, 0, 0], vec![(0, 5)]));
        partial.give_up();
        assert_eq!(arriving.begun(2), [None, None]);
    }

    #[test]
    fn there_is_one_version_of_a_fragment() {
        let dir = tempfile::tempdir().unwrap();
        let arriving = Arriving::open(dir.path(), RUN).unwrap();
        [weights(0, 3), weights(1, 3), weights(1, 4)].into_iter().for_each(|weights| drop(go_on(&arriving, weights)));
        assert_eq!(arriving.begun(2), [Some((3, Digest([3; 32]))), Some((4, Digest([4; 32])))]);
        assert_eq!(arriving.begun(1).len(), 1, "a run with fewer fragments");
        arriving.clear();
        assert_eq!(fs::read_dir(dir.path().join("arriving")).unwrap().count(), 0);
    }

    #[test]
    fn weights_of_another_run_go() {
        let dir = tempfile::tempdir().unwrap();
        drop(go_on(&Arriving::open(dir.path(), RUN).unwrap(), weights(0, 3)));
        assert!(Arriving::open(dir.path(), RUN).unwrap().begun(1)[0].is_some());
        assert_eq!(Arriving::open(dir.path(), Digest([9; 32])).unwrap().begun(1), [None]);
        assert_eq!(Arriving::open(dir.path(), RUN).unwrap().begun(1), [None]);
    }

    #[test]
    fn a_file_that_speaks_of_other_places_is_not_believed() {
        let (mut buffer, mut here) = (vec![0; 4], Ranges::new());
        let part = |offset: u64, bytes: &[u8]| {
            [&offset.to_le_bytes()[..], &(bytes.len() as u32).to_le_bytes(), bytes].concat()
        };
        let file = [part(0, &[1]), part(3, &[1, 1]), part(1, &[1])].concat();
        assert_eq!(take_up(&file, &mut buffer, &mut here), 13);
        assert_eq!(take_up(&part(u64::MAX, &[1, 1]), &mut buffer, &mut here), 0);
        assert_eq!(buffer, [1, 0, 0, 0]);
    }
}
