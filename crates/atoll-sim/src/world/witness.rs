//! An observer who believes nobody's bookkeeping.

use std::collections::{BTreeMap, BTreeSet};

use atoll_core::data::{DatasetId, Ranges};
use atoll_core::hash::Digest;
use atoll_core::journal::{Commit, Entry};
use atoll_core::manifest::FragmentId;
use atoll_core::round::Standing;
use atoll_core::site::SiteId;

use super::site::Island;

/// Why payloads are refused that the world itself has spoilt.
pub(super) const SPOILT: &str = "the simulator says so";

#[derive(Default)]
pub(super) struct Witness {
    /// Digest of each version of each fragment, as first seen.
    digests: BTreeMap<(FragmentId, u64), Digest>,
    /// Samples that engines really trained on, by site.
    trained: BTreeMap<(SiteId, DatasetId), BTreeSet<u64>>,
    /// Samples that commits say are in the model.
    consumed: BTreeSet<(DatasetId, u64)>,
    /// What of it came from which site.
    shares: BTreeMap<SiteId, Share>,
    /// Highest version of each fragment ever announced.
    announced: BTreeMap<usize, u64>,
}

/// What one site got into the model.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Share {
    pub(super) samples: u64,
    pub(super) contributions: u64,
    /// Contributions merged into a later version than the one after their base.
    pub(super) late: u64,
}

impl Witness {
    /// A copy of a fragment at `version` has this digest; all others must have it too.
    pub(super) fn see_copy(&mut self, fragment: FragmentId, version: u64, digest: Digest) -> Result<(), String> {
        let known = *self.digests.entry((fragment, version)).or_insert(digest);
        check(known == digest, || format!("{fragment} has two versions {version}"))
    }

    /// An engine has taken steps on `ranges`.
    pub(super) fn see_training(&mut self, island: &Island, ranges: &Ranges) {
        let residence = &island.residence;
        let seen = self.trained.entry((residence.name.clone(), residence.dataset)).or_default();
        seen.extend(ranges.spans().flat_map(|(start, end)| start..end));
    }

    /// A standing goes out.
    pub(super) fn see_standing(&mut self, standing: &Standing) {
        for (index, &(version, _)) in standing.fragments.iter().enumerate() {
            let announced = self.announced.entry(index).or_default();
            *announced = version.max(*announced);
        }
    }

    /// A coordinator that starts knows these versions, one per fragment.
    pub(super) fn see_start(&self, versions: &[u64]) -> Result<(), String> {
        for (&fragment, &version) in &self.announced {
            let durable = versions[fragment];
            check(durable >= version, || format!("fragment {fragment} was announced at {version}, is at {durable}"))?;
        }
        Ok(())
    }

    /// Checks a commit against what really happened.
    pub(super) fn see_entry(&mut self, entry: &Entry, sites: &[Island]) -> Result<(), String> {
        match entry {
            Entry::Committed(commit) => {
                self.see_copy(commit.fragment, commit.version, commit.digest)?;
                self.see_commit(commit, sites)
            }
            // All sites are honest here.
            Entry::Refused { why, .. } => check(why == SPOILT, || format!("an honest contribution was refused: {why}")),
            _ => Ok(()),
        }
    }

    fn see_commit(&mut self, commit: &Commit, sites: &[Island]) -> Result<(), String> {
        for accepted in &commit.contributions {
            let island = sites.iter().find(|island| island.residence.name == accepted.site);
            let dataset = island.ok_or("a commit of a stranger")?.residence.dataset;
            let key = (accepted.site.clone(), dataset);
            for position in accepted.ranges.spans().flat_map(|(start, end)| start..end) {
                let trained = self.trained.get(&key).is_some_and(|trained| trained.contains(&position));
                check(trained, || format!("{} never trained on sample {position}", accepted.site))?;
                let new = self.consumed.insert((dataset, position));
                check(new, || format!("sample {position} is in the model twice"))?;
            }
            let share = self.shares.entry(accepted.site.clone()).or_default();
            share.samples += accepted.ranges.len();
            share.contributions += 1;
            share.late += u64::from(accepted.base + 1 < commit.version);
        }
        Ok(())
    }

    /// What `site` got into the model.
    pub(super) fn share_of(&self, site: &SiteId) -> Share {
        self.shares.get(site).copied().unwrap_or_default()
    }
}

pub(super) fn check(holds: bool, broken: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(broken()) }
}
