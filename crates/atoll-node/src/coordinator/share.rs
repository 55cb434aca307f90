//! The leader's care for what of its run lies in the object store: signs of life, snapshots, and what is dropped. The
//! heart decides when; each work here is a closure for a thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::Commit;

use super::log::deposed;
use crate::run::{CoordinatorSection, Keep, RunDir};
use crate::shared::{Beat, Shared, State};
use crate::snapshot::{self, Recovered};

/// What a leader has in the object store.
pub(super) struct Share {
    pub(super) shared: Arc<Shared>,
    holder: Digest,
    address: String,
    /// Signs of life so far.
    beats: u64,
    is_beating: bool,
    /// When the snapshot that is being put was begun.
    putting: Option<Instant>,
    /// When the next one is due.
    due: Instant,
    /// Contributions in the store, by the number of their commit's entry.
    payloads: BTreeMap<u64, Vec<Digest>>,
}

/// What a sign of life brought to light.
pub(super) struct Beaten {
    /// The entry that came next when it set out.
    next: u64,
    /// Whether somebody has put that entry.
    taken: bool,
}

/// Putting snapshots takes at most one part in so many of the time.
const REST: u32 = 10;

impl Share {
    /// What the coordinator has that leads from here on.
    pub(super) fn new(shared: Arc<Shared>, holder: Digest, address: String, recovered: &Recovered) -> Self {
        let payloads = recovered.payloads.clone();
        Self { shared, holder, address, beats: 0, is_beating: false, putting: None, due: Instant::now(), payloads }
    }

    /// Whether a snapshot is being put.
    pub(super) fn is_putting(&self) -> bool {
        self.putting.is_some()
    }

    /// Whether anything is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.is_beating || self.is_putting()
    }

    /// The work of a sign of life, unless one is under way. The entry that comes `next` is looked for too: a leader with
    /// nothing to append would not learn otherwise that it leads no more.
    pub(super) fn beat(
        &mut self,
        next: u64,
        epoch: u64,
        state: State,
    ) -> Option<impl FnOnce() -> Result<Beaten> + Send + use<>> {
        if self.is_beating {
            return None;
        }
        (self.is_beating, self.beats) = (true, self.beats + 1);
        let (shared, address) = (self.shared.clone(), self.address.clone());
        let beat = Beat { epoch, holder: self.holder, address, number: self.beats, state };
        Some(move || {
            let taken = shared.has_segment(next)?;
            if !taken {
                shared.beat(&beat)?;
            }
            Ok(Beaten { next, taken })
        })
    }

    /// A sign of life was given, when `next` is the entry to come.
    ///
    /// # Errors
    /// If another coordinator leads.
    pub(super) fn beaten(&mut self, beaten: Result<Beaten>, next: u64) -> Result<()> {
        self.is_beating = false;
        match beaten {
            // If it is not the next one any more, it was put from here.
            Ok(Beaten { taken: true, next: then }) if then == next => bail!(deposed()),
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!("{error:#}");
                Ok(())
            }
        }
    }

    /// The next snapshot is due, however lately there was one.
    pub(super) fn put_now(&mut self) {
        self.due = Instant::now();
    }

    /// The work of putting the newest snapshot, if one is due; it returns what the oldest one there sums up.
    pub(super) fn put_snapshot(
        &mut self,
        dir: &RunDir,
        policy: &CoordinatorSection,
        epoch: u64,
    ) -> Option<impl FnOnce() -> Result<u64> + Send + use<>> {
        if self.is_putting() || Instant::now() < self.due {
            return None;
        }
        let (entries, folder) = snapshot::list(dir).pop()?;
        let (shared, dir, keep) = (self.shared.clone(), dir.clone(), policy.snapshots);
        self.putting = Some(Instant::now());
        self.due = Instant::now() + Duration::from_secs_f64(policy.snapshot_seconds);
        let keeps_all = policy.keep == Keep::All;
        Some(move || {
            if shared.snapshots()?.last() != Some(&entries) {
                snapshot::verify(&folder)?;
                shared.save_snapshot(&dir, entries, snapshot::place(&folder)?.offset, epoch)?;
            }
            let oldest = shared.prune(keep)?;
            Ok(if keeps_all { 0 } else { oldest })
        })
    }

    /// A snapshot was put, or not; drops the contributions that nobody needs who begins with the oldest one there.
    pub(super) fn put(&mut self, put: &Result<u64>) {
        if let Some(began) = self.putting.take() {
            self.due = self.due.max(Instant::now() + REST * began.elapsed());
        }
        match put {
            Ok(oldest) => {
                let later = self.payloads.split_off(&(oldest + 1));
                let old = std::mem::replace(&mut self.payloads, later);
                // The same bytes may be in a later commit too.
                let needed: BTreeSet<Digest> = self.payloads.values().flatten().copied().collect();
                let unneeded = old.into_values().flatten().filter(|digest| !needed.contains(digest));
                self.drop_payloads(unneeded.collect());
            }
            Err(error) => tracing::warn!("{error:#}; the next snapshot may go better"),
        }
    }

    /// A commit is in the journal.
    pub(super) fn committed(&mut self, number: u64, commit: &Commit) {
        let payloads = commit.contributions.iter().map(|accepted| accepted.payload).collect();
        self.payloads.insert(number, payloads);
    }

    /// A contribution is in no commit and will be in none.
    pub(super) fn forget(&self, payload: Digest) {
        self.drop_payloads(vec![payload]);
    }

    fn drop_payloads(&self, payloads: Vec<Digest>) {
        let shared = self.shared.clone();
        if !payloads.is_empty() {
            tokio::task::spawn_blocking(move || shared.drop_payloads(&payloads));
        }
    }
}
