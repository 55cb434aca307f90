//! The ledger: for each dataset, which positions are in the model. Every position ever handed out is
//! in exactly one place: held by one site, back in the pool, or consumed by a commit.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::data::Ranges;
use crate::hash::Digest;
use crate::site::SiteId;

/// Names a dataset by its content: sites that bring the same text share its positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DatasetId(pub Digest);

impl fmt::Display for DatasetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dataset {}", self.0.short())
    }
}

/// A movement of positions that would break exactly-once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// No site has declared this dataset.
    #[error("{0} is unknown")]
    UnknownDataset(DatasetId),
    /// The positions are not held by that site: never leased to it, returned, or consumed before.
    #[error("{site} does not hold all of the samples that it says it trained on")]
    NotHeld {
        /// The site.
        site: SiteId,
    },
    /// The positions are neither fresh nor in the pool.
    #[error("these samples cannot be leased to {site}: they are not free")]
    NotFree {
        /// The site.
        site: SiteId,
    },
}

/// The positions of one dataset.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Samples in one epoch.
    pub samples: u64,
    /// The lowest position never leased.
    pub fresh: u64,
    /// Leased before and free again.
    pub returned: Ranges,
    /// Leased and not yet settled, by site.
    pub held: BTreeMap<SiteId, Ranges>,
    /// In the model.
    pub consumed: Ranges,
}

/// All datasets of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    pools: BTreeMap<DatasetId, Pool>,
}

impl Ledger {
    /// Makes a dataset known. Declaring it again changes nothing.
    pub fn declare(&mut self, dataset: DatasetId, samples: u64) {
        self.pools.entry(dataset).or_insert_with(|| Pool { samples, ..Pool::default() });
    }

    /// The positions of `dataset`.
    pub fn pool(&self, dataset: DatasetId) -> Option<&Pool> {
        self.pools.get(&dataset)
    }

    /// All datasets.
    pub fn pools(&self) -> impl Iterator<Item = (DatasetId, &Pool)> {
        self.pools.iter().map(|(&dataset, pool)| (dataset, pool))
    }

    /// What a lease of `count` samples would be: returned positions first, so that none is forgotten.
    /// Changes nothing; [`lease`](Self::lease) does.
    pub fn offer(&self, dataset: DatasetId, count: u64) -> Ranges {
        let Some(pool) = self.pools.get(&dataset) else { return Ranges::new() };
        let mut offer = pool.returned.clone().take_first(count);
        offer.insert_span(pool.fresh, pool.fresh + (count - offer.len()));
        offer
    }

    /// Leases `ranges` to `site`.
    ///
    /// # Errors
    /// If some of them are not free, and then nothing changes.
    pub fn lease(&mut self, site: &SiteId, dataset: DatasetId, ranges: &Ranges) -> Result<(), LedgerError> {
        let pool = self.pools.get_mut(&dataset).ok_or(LedgerError::UnknownDataset(dataset))?;
        let mut new = ranges.clone();
        new.remove(&pool.returned);
        let end = pool.fresh + new.len();
        if new != Ranges::span(pool.fresh, end) {
            return Err(LedgerError::NotFree { site: site.clone() });
        }
        pool.fresh = end;
        pool.returned.remove(ranges);
        pool.held.entry(site.clone()).or_default().insert(ranges);
        Ok(())
    }

    /// Moves `ranges` from what `site` holds into the model.
    ///
    /// # Errors
    /// If the site does not hold all of them, and then nothing changes.
    pub fn consume(&mut self, site: &SiteId, dataset: DatasetId, ranges: &Ranges) -> Result<(), LedgerError> {
        self.take_held(site, dataset, ranges)?.consumed.insert(ranges);
        Ok(())
    }

    /// Moves `ranges` from what `site` holds back into the pool.
    ///
    /// # Errors
    /// If the site does not hold all of them, and then nothing changes.
    pub fn release(&mut self, site: &SiteId, dataset: DatasetId, ranges: &Ranges) -> Result<(), LedgerError> {
        self.take_held(site, dataset, ranges)?.returned.insert(ranges);
        Ok(())
    }

    /// What `site` holds of `dataset`.
    pub fn held(&self, site: &SiteId, dataset: DatasetId) -> Ranges {
        self.pools.get(&dataset).and_then(|pool| pool.held.get(site)).cloned().unwrap_or_default()
    }

    /// Samples in the model, over all datasets.
    pub fn consumed(&self) -> u64 {
        self.pools.values().map(|pool| pool.consumed.len()).sum()
    }

    /// The invariant: held, returned and consumed positions are disjoint and together are all that
    /// was ever leased.
    ///
    /// # Errors
    /// Which dataset has a gap or an overlap.
    pub fn verify(&self) -> Result<(), String> {
        for (dataset, pool) in &self.pools {
            let parts: Vec<&Ranges> = pool.held.values().chain([&pool.returned, &pool.consumed]).collect();
            let mut union = Ranges::new();
            for part in &parts {
                union.insert(part);
            }
            let counted: u64 = parts.iter().map(|part| part.len()).sum();
            if union != Ranges::span(0, pool.fresh) || counted != pool.fresh {
                return Err(format!("{dataset}: {counted} positions are accounted for, {} were leased", pool.fresh));
            }
        }
        Ok(())
    }

    fn take_held(&mut self, site: &SiteId, dataset: DatasetId, ranges: &Ranges) -> Result<&mut Pool, LedgerError> {
        let pool = self.pools.get_mut(&dataset).ok_or(LedgerError::UnknownDataset(dataset))?;
        let refusal = || LedgerError::NotHeld { site: site.clone() };
        if !ranges.is_empty() {
            let held = pool.held.get_mut(site).filter(|held| held.contains(ranges)).ok_or_else(refusal)?;
            held.remove(ranges);
            if held.is_empty() {
                pool.held.remove(site);
            }
        }
        Ok(pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dataset() -> DatasetId {
        DatasetId(Digest::of(b"text"))
    }

    fn site(index: u8) -> SiteId {
        format!("site-{}", index % 3).parse().unwrap()
    }

    proptest! {
        /// Any schedule of leases, commits and returns leaves each position in exactly one place.
        #[test]
        fn no_gap_and_no_overlap(steps in prop::collection::vec((0u8..3, any::<u8>(), 1u64..50), 0..60)) {
            let mut ledger = Ledger::default();
            ledger.declare(dataset(), 100);
            for (action, who, count) in steps {
                let site = site(who);
                match action {
                    0 => {
                        let offer = ledger.offer(dataset(), count);
                        prop_assert_eq!(offer.len(), count);
                        ledger.lease(&site, dataset(), &offer).unwrap();
                    }
                    1 => {
                        let part = ledger.held(&site, dataset()).take_first(count);
                        ledger.consume(&site, dataset(), &part).unwrap();
                    }
                    _ => {
                        let part = ledger.held(&site, dataset()).take_first(count);
                        ledger.release(&site, dataset(), &part).unwrap();
                    }
                }
                prop_assert_eq!(ledger.verify(), Ok(()));
            }
        }
    }

    #[test]
    fn nothing_is_consumed_twice_or_by_the_wrong_site() {
        let mut ledger = Ledger::default();
        ledger.declare(dataset(), 100);
        let lease = ledger.offer(dataset(), 10);
        ledger.lease(&site(0), dataset(), &lease).unwrap();
        let refusal = |s| Err(LedgerError::NotHeld { site: s });
        assert_eq!(ledger.consume(&site(1), dataset(), &lease), refusal(site(1)));
        ledger.consume(&site(0), dataset(), &lease).unwrap();
        assert_eq!(ledger.consume(&site(0), dataset(), &lease), refusal(site(0)));
        assert_eq!(ledger.lease(&site(1), dataset(), &lease), Err(LedgerError::NotFree { site: site(1) }));
        assert_eq!(ledger.consumed(), 10);
    }
}
