//! An observer who believes nobody's bookkeeping.

use std::collections::{BTreeMap, BTreeSet};

use atoll_core::codec::{Codec, Payload};
use atoll_core::data::{DatasetId, Ranges};
use atoll_core::delta::residual::Residual;
use atoll_core::delta::{Feedback, Follow};
use atoll_core::hash::Digest;
use atoll_core::journal::{Commit, Entry};
use atoll_core::manifest::FragmentId;
use atoll_core::outer::StepError;
use atoll_core::round::{Standing, Sync};
use atoll_core::site::SiteId;
use atoll_core::team::Alone;

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
    /// Contributions in the model, by their payloads.
    merged: BTreeSet<Digest>,
    /// What of it came from which site.
    shares: BTreeMap<SiteId, Share>,
    /// The epoch that is led, and who does.
    led: (u64, Option<Digest>),
    /// Highest version of each fragment ever announced.
    announced: BTreeMap<usize, u64>,
    /// What each site's contributions to a fragment have left, beginning with what its process has taken up.
    left: BTreeMap<(SiteId, FragmentId), Vec<Left>>,
    /// Fragments of which a site has handed everything over, because it had the time.
    handed_over: BTreeSet<(SiteId, FragmentId)>,
    /// Payloads in which bits have flipped.
    damaged: BTreeSet<Digest>,
}

/// What a contribution has left undelivered, its payload, and of which weights alone that spoke.
struct Left {
    residual: Residual,
    payload: Vec<u8>,
    spoken: BTreeSet<usize>,
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

    /// A site has encoded a contribution.
    pub(super) fn see_contribution(
        &mut self,
        site: &SiteId,
        fragment: FragmentId,
        payload: &[u8],
        residual: &Residual,
    ) -> Result<(), String> {
        let count = residual.values.len();
        let mut spoken = BTreeSet::new();
        let sound = Payload::check(payload, count, &Alone).map_err(|error| error.to_string())?;
        if !speaks_along_paths(&sound) {
            sound.visit(0..count, |place, _| _ = spoken.insert(place));
        }
        let left = Left { residual: residual.clone(), payload: payload.to_vec(), spoken };
        self.left.entry((site.clone(), fragment)).or_default().push(left);
        Ok(())
    }

    /// A process ends in good order.
    pub(super) fn see_stop(&mut self, site: &SiteId, fragments: impl Iterator<Item = FragmentId>) {
        self.handed_over.extend(fragments.map(|fragment| (site.clone(), fragment)));
    }

    /// The disk of a site has lost something.
    pub(super) fn see_loss(&mut self, site: &SiteId) {
        self.handed_over.retain(|(owner, _)| owner != site);
    }

    /// Bits of a payload have flipped.
    pub(super) fn see_damage(&mut self, payload: Digest) {
        self.damaged.insert(payload);
    }

    /// A process begins with what earlier ones have left after their last contribution that is in the model.
    pub(super) fn see_recall(
        &mut self,
        site: &SiteId,
        fragment: FragmentId,
        taken: Residual,
        sync: &Sync,
    ) -> Result<(), String> {
        let key = (site.clone(), fragment);
        let history = self.left.entry(key.clone()).or_default();
        if history.iter().any(|left| left.payload().as_ref().is_some_and(speaks_along_paths)) {
            let owed = is_owed_along_paths(history, &self.merged, &taken);
            check(owed, || format!("{site} takes up of {fragment} what it does not owe"))?;
        } else {
            for (place, &value) in taken.values.iter().enumerate().filter(|(_, value)| **value != 0.0) {
                let owed = is_owed(history, &self.merged, taken.after, place, value);
                check(owed, || format!("{site} takes up {value} of {fragment} that it does not owe"))?;
            }
        }
        // What is in weights that were overwritten is given up.
        let keeps = sync.feedback == Feedback::Buffer || sync.follow == Follow::Carry;
        let mut made = history.iter().filter(|left| left.residual.after == taken.after);
        if let (true, Some(left), None) = (self.handed_over.remove(&key) && keeps, made.next(), made.next()) {
            check(left.residual == taken, || format!("{site} has lost what it owed of {fragment}"))?;
        }
        *history = vec![Left { residual: taken, payload: Vec::new(), spoken: BTreeSet::new() }];
        Ok(())
    }

    /// A coordinator that leads in `epoch`, or is about to lead after it, has appended this.
    pub(super) fn see_author(&mut self, entry: &Entry, epoch: u64) -> Result<(), String> {
        let (led, _) = self.led;
        check(epoch == led, || format!("a coordinator of epoch {epoch} acts in epoch {led}"))?;
        if let Entry::Leads { epoch, holder } = entry {
            check(*epoch == led + 1, || format!("epoch {epoch} follows epoch {led}"))?;
            self.led = (*epoch, Some(*holder));
        }
        Ok(())
    }

    /// Who was the last to say that it leads.
    pub(super) fn leader(&self) -> Option<Digest> {
        self.led.1
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
            Entry::Refused { why, .. } => {
                let is_damaged = |payload: &Digest| *why == StepError::Missing(*payload).to_string();
                let is_spoilt = why == SPOILT || self.damaged.iter().any(is_damaged);
                check(is_spoilt, || format!("an honest contribution was refused: {why}"))
            }
            _ => Ok(()),
        }
    }

    fn see_commit(&mut self, commit: &Commit, sites: &[Island]) -> Result<(), String> {
        for accepted in &commit.contributions {
            self.merged.insert(accepted.payload);
            if let Some(history) = self.left.get(&(accepted.site.clone(), commit.fragment)) {
                let made = history.iter().skip(1).any(|left| left.residual.after == accepted.payload);
                check(made, || format!("{} has taken up what is in the model after all", accepted.site))?;
            }
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

impl Left {
    /// None of what a process has taken up.
    fn payload(&self) -> Option<Payload<'_>> {
        Payload::parse(&self.payload, self.residual.values.len()).ok()
    }
}

/// Whether a payload speaks of no weight alone, but of all along its paths.
fn speaks_along_paths(payload: &Payload<'_>) -> bool {
    matches!(payload.codec(), Codec::Tcq(_))
}

/// Whether a site owes what it has `taken` up: nothing, or what some contribution has left, but for what that has along the
/// paths of those since then that are in the model. Its file may speak of others, too, from some contribution on: it does not
/// know what became of these.
fn is_owed_along_paths(history: &[Left], merged: &BTreeSet<Digest>, taken: &Residual) -> bool {
    if taken.values.iter().all(|value| *value == 0.0) {
        return true;
    }
    let Some(last) = history.iter().rposition(|left| left.residual.after == taken.after) else { return false };
    let left_of = |first: usize, cut: usize| {
        let mut values = history[first].residual.values.clone();
        for (index, left) in history.iter().enumerate().take(last + 1).skip(first + 1) {
            let payload = left.payload().filter(|_| index >= cut || merged.contains(&left.residual.after));
            payload.inspect(|payload| payload.silence(&mut values));
        }
        values
    };
    let cuts = |first: usize| (first + 1..=last + 1).map(move |cut| (first, cut));
    (0..=last).flat_map(cuts).any(|(first, cut)| left_of(first, cut) == taken.values)
}

/// Whether a site owes `value` after a contribution: it must have been left then, or earlier if nothing in between has
/// spoken of that weight. What is not in the model has spoken in vain.
fn is_owed(history: &[Left], merged: &BTreeSet<Digest>, after: Digest, place: usize, value: f32) -> bool {
    let last = history.iter().rposition(|left| left.residual.after == after);
    let mut since = history.iter().take(last.map_or(0, |last| last + 1)).rev();
    let was_left = |left: &Left| left.residual.values[place] == value;
    let has_spoken = |left: &Left| left.spoken.contains(&place) && merged.contains(&left.residual.after);
    since.find(|left| was_left(left) || has_spoken(left)).is_some_and(was_left)
}

pub(super) fn check(holds: bool, broken: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(broken()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A contribution in one word of a path that spoke of this, and left as much.
    fn left(values: [f32; 4]) -> Left {
        let payload = Codec::Tcq(1).encode(&values).expect("finite values");
        let residual = Residual { after: Digest::of(&payload), values: values.to_vec() };
        Left { residual, payload, spoken: BTreeSet::new() }
    }

    #[test]
    fn nothing_is_owed_along_the_paths_of_what_is_in_the_model() {
        let history = [left([1.0, 2.0, 3.0, 4.0]), left([4.0, -1.0, 2.0, 0.5]), left([0.1, 0.7, -2.0, 1.0])];
        let address = |index: usize| history[index].residual.after;
        let merged = BTreeSet::from([address(0), address(2)]);
        let is_owed = |values: &[f32], after: usize| {
            let taken = Residual { after: address(after), values: values.to_vec() };
            is_owed_along_paths(&history, &merged, &taken)
        };
        let mut values = history[0].residual.values.clone();
        assert!(is_owed(&values, 0) && !is_owed(&values, 2), "what is in the model since has spoken");
        history[2].payload().expect("a payload").silence(&mut values);
        assert!(is_owed(&values, 2), "what is not in the model has spoken in vain");
        let mut values = history[0].residual.values.clone();
        history[1..].iter().filter_map(Left::payload).for_each(|payload| payload.silence(&mut values));
        assert!(is_owed(&values, 2), "but the site need not know that");
        assert!(is_owed(&[0.0; 4], 2) && is_owed(&history[2].residual.values, 2));
        assert!(!is_owed(&[9.0; 4], 2));
    }
}
