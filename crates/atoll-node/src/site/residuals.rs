//! What the codec of the way up has not delivered, kept for the site's next process: a file for each fragment, whose
//! bytes [`residual`] explains. It is written anew after a contribution, seldom enough not to wear the disk, and again
//! when the site stops; between two writings every partial contribution adds what it has sent. A process that is killed
//! loses what was learnt since the last writing and not sent:
//!
//! ```text
//! killed when a contribution is …   in the model?   the next process takes up, at most,
//! encoded, not in the file          never           what was left before it
//! in the file, perhaps sent         no              what was left before it
//!                                   yes             what was left before it, where it has not spoken
//! decided on, and the file written  yes             what it has left
//!                                   no              what was left before it
//! ```
//!
//! Whether a file may be used is decided by what it says, never by its being there: nothing here needs to be synced, and
//! a disk that fails costs what it should have kept, not the training.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_core::codec;
use atoll_core::delta::residual::{self, Residual};
use atoll_core::delta::{Local, norm};
use atoll_core::hash::Digest;
use atoll_core::manifest::{FragmentId, Manifest};

/// The files of a site.
pub(super) struct Residuals {
    folder: PathBuf,
    layout: Digest,
    pause: Duration,
    files: Vec<Fragment>,
}

struct Fragment {
    /// Number of its weights.
    len: usize,
    /// The file, as long as all that was sent since it was written is in it.
    file: Option<File>,
    /// When it was last written; not before what it told was taken up.
    written: Option<Instant>,
}

/// What may be written while the site trains: 350 GB a day, if a round takes less time than that.
const BYTES_PER_SECOND: f64 = 4e6;

impl Residuals {
    /// The files in a site's folder `dir`.
    ///
    /// # Errors
    /// If there can be none.
    pub(super) fn open(dir: &Path, manifest: &Manifest) -> Result<Self> {
        let folder = dir.join("undelivered");
        fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let pause = Duration::from_secs_f64(4.0 * manifest.parameters() as f64 / BYTES_PER_SECOND);
        let fragment = |id| Fragment { len: manifest.fragment_len(id).unwrap_or(0), file: None, written: None };
        Ok(Self { folder, layout: manifest.fingerprint(), pause, files: manifest.fragments().map(fragment).collect() })
    }

    /// Takes up what earlier processes have left, given each fragment's last contribution in the model.
    pub(super) fn recall(&mut self, local: &mut Local, delivered: &[Option<Digest>]) {
        let (mut fragments, mut square) = (0, 0.0);
        for (id, &delivered) in self.ids().zip(delivered) {
            if let Some(residual) = delivered.and_then(|delivered| self.read(id, delivered)) {
                (fragments, square) = (fragments + 1, square + norm(&residual.values).powi(2));
                local.recall(id, residual);
            }
            self.write(local, id, 1);
        }
        if fragments > 0 {
            let length = square.sqrt();
            tracing::info!("takes up what an earlier process has not delivered of {fragments} fragments: {length:.3e}");
        }
    }

    /// A contribution has been encoded. Nobody is told of it before this returns.
    pub(super) fn sent(&mut self, id: FragmentId, payload: &[u8]) {
        let Fragment { len, file, .. } = &mut self.files[id.index()];
        let Some(mut open) = file.take() else { return };
        let parsed = codec::Payload::parse(payload, *len);
        // One that speaks of every weight leaves nothing of what the file tells, once it is in the model.
        if parsed.is_ok_and(|payload| payload.codec().is_partial()) {
            match open.write_all(&residual::sent(payload)) {
                Ok(()) => *file = Some(open),
                Err(error) => complain(&self.path(id), &error),
            }
        }
    }

    /// It is decided whether a contribution is in the model, and `local` knows it.
    pub(super) fn settled(&mut self, local: &Local, id: FragmentId) {
        if self.files[id.index()].written.is_none_or(|written| written.elapsed() >= self.pause) {
            self.write(local, id, 1);
        }
    }

    /// The site stops: writes all there is to be known, or nothing if the run is finished. A file that was not read yet
    /// stays as an earlier process has left it.
    pub(super) fn close(&mut self, local: &Local, finished: bool) {
        if finished {
            gone(fs::remove_dir_all(&self.folder), &self.folder);
            return;
        }
        let read = self.ids().filter(|id| self.files[id.index()].written.is_some());
        read.collect::<Vec<_>>().into_iter().for_each(|id| self.write(local, id, 2));
    }

    fn read(&self, id: FragmentId, delivered: Digest) -> Option<Residual> {
        let path = self.path(id);
        let file = match fs::read(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!("{} cannot be read, so what it kept is lost: {error}", path.display());
                return None;
            }
        };
        let residual = residual::recall(&file, self.layout, self.files[id.index()].len, delivered);
        if residual.is_none() {
            tracing::info!("{} knows nothing of the last contribution to {id}: what that left is lost", path.display());
        }
        residual
    }

    /// Writes down at most so many residuals of a fragment. What cannot be written leaves an older file, which knows
    /// nothing of later contributions.
    fn write(&mut self, local: &Local, id: FragmentId, most: usize) {
        let path = self.path(id);
        let residuals: Vec<&Residual> = local.residuals(id).take(most).collect();
        let file = if residuals.is_empty() {
            gone(fs::remove_file(&path), &path);
            None
        } else {
            self.replace(&path, &residuals).map_err(|error| complain(&path, &error)).ok()
        };
        let fragment = &mut self.files[id.index()];
        (fragment.file, fragment.written) = (file, Some(Instant::now()));
    }

    fn replace(&self, path: &Path, residuals: &[&Residual]) -> io::Result<File> {
        let new = self.folder.join("new");
        let mut file = File::create(&new)?;
        file.write_all(&residual::file(self.layout))?;
        residuals.iter().try_for_each(|residual| file.write_all(&residual::left(residual)))?;
        fs::rename(&new, path)?;
        Ok(file)
    }

    fn ids(&self) -> impl Iterator<Item = FragmentId> + use<> {
        (0..self.files.len()).map(|index| FragmentId(index as u16))
    }

    fn path(&self, id: FragmentId) -> PathBuf {
        self.folder.join(id.index().to_string())
    }
}

/// Complains if something could not be removed.
fn gone(removed: io::Result<()>, path: &Path) {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!("{} cannot be removed: {error}", path.display());
        }
        _ => {}
    }
}

fn complain(path: &Path, error: &io::Error) {
    tracing::warn!("{} cannot be written, so what is not delivered may be lost: {error}", path.display());
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::codec::Codec;
    use atoll_core::delta::{Feedback, Follow};
    use atoll_core::model::{Tensor, TensorKind};
    use atoll_core::team::Alone;

    const ID: FragmentId = FragmentId(0);

    fn manifest() -> Manifest {
        Manifest::balanced(vec![Tensor::new("a", &[8], TensorKind::Vector)], 1)
    }

    fn start(dir: &Path, delivered: Digest) -> (Residuals, Local) {
        let mut residuals = Residuals::open(dir, &manifest()).unwrap();
        let mut local = Local::new(&manifest(), Follow::Carry, Feedback::Weights);
        residuals.recall(&mut local, &[Some(delivered)]);
        local.install(ID, vec![0.0; 8]).unwrap();
        (residuals, local)
    }

    fn contribute(residuals: &mut Residuals, local: &mut Local, codec: Codec, weights: [f32; 8]) -> Digest {
        let payload = local.contribute(ID, weights.to_vec(), codec, &Alone).unwrap();
        residuals.sent(ID, &payload.bytes);
        payload.digest
    }

    fn owed(local: &Local) -> Vec<Residual> {
        local.residuals(ID).cloned().collect()
    }

    /// A quarter of the weights, for which there are 2 bits each.
    const SPARSE: Codec = Codec::Sparse(1024);
    const WEIGHTS: [f32; 8] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];

    #[test]
    fn a_stopped_process_hands_over_what_either_outcome_of_its_last_contribution_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let (mut residuals, mut local) = start(dir.path(), Digest::default());
        let first = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        local.delivered(ID);
        residuals.settled(&local, ID);
        let second = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        residuals.close(&local, false);
        let known = owed(&local);
        assert_eq!(known.iter().map(|residual| residual.after).collect::<Vec<_>>(), [first, second]);
        for (delivered, residual) in [first, second].into_iter().zip(known) {
            let copy = tempfile::tempdir().unwrap();
            fs::create_dir(copy.path().join("undelivered")).unwrap();
            fs::copy(residuals.path(ID), copy.path().join("undelivered/0")).unwrap();
            assert_eq!(owed(&start(copy.path(), delivered).1), [residual]);
        }
    }

    #[test]
    fn a_killed_process_that_was_killed_while_writing_delivers_nothing_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (mut residuals, mut local) = start(dir.path(), Digest::default());
        contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        local.delivered(ID);
        residuals.pause = Duration::MAX;
        residuals.write(&local, ID, 1);
        let before = owed(&local).remove(0);
        let second = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        fs::write(dir.path().join("undelivered/new"), b"half a file").unwrap();
        let (_, next) = start(dir.path(), second);
        let [after] = &owed(&next)[..] else { panic!("what the first left and the second did not send is owed") };
        let changed = after.values.iter().zip(&before.values).filter(|(after, before)| after != before);
        assert!(changed.clone().count() > 0 && changed.into_iter().all(|(after, _)| *after == 0.0));
    }

    #[test]
    fn a_file_that_has_missed_a_contribution_is_not_believed_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut residuals, mut local) = start(dir.path(), Digest::default());
        let first = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        local.delivered(ID);
        residuals.pause = Duration::MAX;
        residuals.write(&local, ID, 1);
        contribute(&mut residuals, &mut local, Codec::F32, WEIGHTS); // Is not written down.
        let third = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        let file = fs::read(residuals.path(ID)).unwrap();
        assert!(residual::recall(&file, residuals.layout, 8, first).is_some(), "the others were dropped");
        assert_eq!(owed(&start(dir.path(), third).1), []);
    }

    #[test]
    fn a_process_that_stops_before_it_has_heard_of_the_run_leaves_all_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (mut residuals, mut local) = start(dir.path(), Digest::default());
        let first = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        local.delivered(ID);
        residuals.close(&local, false);
        let mut unheard = Residuals::open(dir.path(), &manifest()).unwrap();
        unheard.close(&Local::new(&manifest(), Follow::Carry, Feedback::Weights), false);
        assert_eq!(owed(&start(dir.path(), first).1), owed(&local));
    }

    #[test]
    fn contributions_that_are_refused_again_and_again_do_not_fill_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (mut residuals, mut local) = start(dir.path(), Digest::default());
        let first = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        local.delivered(ID);
        residuals.settled(&local, ID);
        residuals.pause = Duration::ZERO;
        for _ in 0..10 {
            contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
            local.rebase(ID);
            residuals.settled(&local, ID);
        }
        let file = fs::read(residuals.path(ID)).unwrap();
        let left = residual::left(&owed(&local)[0]);
        assert_eq!(file, [residual::file(residuals.layout), left].concat());
        assert_eq!(owed(&start(dir.path(), first).1), owed(&local), "exact again, as if they had never been");
    }

    #[test]
    fn what_is_owed_outlasts_a_commit_that_overwrites_steps() {
        let dir = tempfile::tempdir().unwrap();
        let mut residuals = Residuals::open(dir.path(), &manifest()).unwrap();
        let mut local = Local::new(&manifest(), Follow::Overwrite, Feedback::Weights);
        residuals.recall(&mut local, &[None]);
        local.install(ID, vec![0.0; 8]).unwrap();
        let first = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        local.delivered(ID);
        residuals.settled(&local, ID);
        let left = owed(&local);
        local.commit(ID, Codec::F32.encode(&[1.0; 8]).unwrap(), &Alone).unwrap();
        residuals.close(&local, false);
        assert_eq!((owed(&start(dir.path(), first).1), left.len()), (left, 1));
    }

    #[test]
    fn a_disk_that_fails_does_not_stop_the_site() {
        let dir = tempfile::tempdir().unwrap();
        let (mut residuals, mut local) = start(dir.path(), Digest::default());
        fs::remove_dir_all(dir.path().join("undelivered")).unwrap();
        let first = contribute(&mut residuals, &mut local, SPARSE, WEIGHTS);
        local.delivered(ID);
        residuals.settled(&local, ID);
        residuals.close(&local, false);
        assert_eq!(owed(&start(dir.path(), first).1), []);
    }
}
