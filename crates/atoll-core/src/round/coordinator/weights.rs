//! What each contribution weighs in the merge, and what is kept for those who are absent.

use std::collections::BTreeMap;

use super::Coordinator;
use crate::data::DatasetId;
use crate::journal::{Accepted, FragmentBook, USUAL_MAX};
use crate::outer::{Guard, Usual};
use crate::round::Receipt;
use crate::site::SiteId;

/// Commits after which it is known what is usual: while rates warm up, lengths grow much faster than steps.
const TAUGHT_MIN: u64 = 8;

impl Coordinator {
    /// Gives each dataset that is present the weight that its sites usually have; returns the share that these
    /// datasets have of all. Sites with the same data stand in for one another.
    pub(super) fn reserve(&self, index: usize, contributions: &mut [Accepted]) -> f64 {
        let usual = &self.book.fragments[index].usual;
        let dataset = |site: &SiteId| self.book.sites.get(site).filter(|member| member.open)?.dataset;
        let mut all: BTreeMap<DatasetId, f64> = BTreeMap::new();
        for (site, usual) in usual {
            if let Some(dataset) = dataset(site) {
                *all.entry(dataset).or_default() += usual;
            }
        }
        let mut present: BTreeMap<DatasetId, f64> = BTreeMap::new();
        for accepted in contributions.iter_mut() {
            let Some(dataset) = dataset(&accepted.site) else { continue };
            match usual.get(&accepted.site) {
                Some(usual) => accepted.weight = accepted.weight.min(USUAL_MAX * usual),
                // A newcomer is its own measure.
                None => *all.entry(dataset).or_default() += accepted.work(),
            }
            *present.entry(dataset).or_default() += accepted.weight;
        }
        let total: f64 = all.values().sum();
        let here: f64 = present.keys().filter_map(|dataset| all.get(dataset)).sum();
        for accepted in contributions.iter_mut() {
            let Some(dataset) = dataset(&accepted.site) else { continue };
            let (usual, weight) = (all.get(&dataset).copied().unwrap_or(0.0), present[&dataset]);
            if weight > 0.0 {
                accepted.weight *= usual / weight;
            }
        }
        if total > 0.0 { here / total } else { 1.0 }
    }

    /// How the merge of fragment number `index` protects itself.
    pub(super) fn guard(&self, index: usize) -> Guard {
        let FragmentBook { typical: (norm, steps), taught, .. } = self.book.fragments[index];
        // Of those in use the sparsest: whoever says more at once may be longer.
        let usual = Usual { norm, steps, density: self.thinnest_up().density() };
        Guard { usual: Some(usual).filter(|usual| usual.norm > 0.0 && taught >= TAUGHT_MIN), ..self.sync.guard() }
    }
}

/// Weight tokens²/steps, divided by one plus the versions that it is behind.
pub(super) fn accept(site: &SiteId, number: u64, receipt: &Receipt, norm: f64, version: u64) -> Accepted {
    let staleness = version - 1 - receipt.base.min(version - 1);
    let mut accepted = Accepted {
        site: site.clone(),
        number,
        payload: receipt.payload,
        base: receipt.base,
        steps: receipt.steps,
        tokens: receipt.tokens,
        weight: 0.0,
        norm,
        trust: 0.0,
        quality: 0.0,
        ranges: receipt.ranges.clone(),
    };
    accepted.weight = accepted.work() / (1.0 + staleness as f64);
    accepted
}
