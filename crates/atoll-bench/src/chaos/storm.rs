//! The storm as a plan: which faults, where, when and for how long. It follows from a seed.
//!
//! Faults may overlap, with two exceptions: two sites are always as they should be, with a linked and running process,
//! and one coordinator is out at a time, so that there is somebody to take over.

use std::fmt;

use atoll_core::rng::Rng;
use serde::{Deserialize, Serialize};

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Kind {
    /// A site's process dies and is started again.
    KillSite,
    /// A site's process is stopped and goes on later.
    PauseSite,
    /// A site has no link.
    CutSite,
    /// A site has a link of [`SLOW_MBIT`].
    SlowSite,
    /// The leading coordinator's process dies and is started again, as a standby.
    KillLeader,
    /// The leading coordinator's process is stopped and goes on later, when it may not lead any more.
    PauseLeader,
}

/// What a slow link carries.
pub(super) const SLOW_MBIT: u32 = 10;

/// All kinds, the share of each in the storm, and how many seconds it lasts.
pub(super) const KINDS: [(Kind, f64, (f64, f64)); 6] = [
    (Kind::KillSite, 0.26, (2.0, 5.0)),
    (Kind::PauseSite, 0.2, (5.0, 20.0)),
    (Kind::CutSite, 0.2, (5.0, 20.0)),
    (Kind::SlowSite, 0.14, (30.0, 60.0)),
    (Kind::KillLeader, 0.12, (2.0, 5.0)),
    (Kind::PauseLeader, 0.08, (5.0, 20.0)),
];

impl Kind {
    /// Whether it happens to the leader, whoever that is then.
    pub(super) fn is_of_leader(self) -> bool {
        matches!(self, Self::KillLeader | Self::PauseLeader)
    }

    /// Whether the site cannot take part meanwhile.
    pub(super) fn takes_site_out(self) -> bool {
        matches!(self, Self::KillSite | Self::PauseSite | Self::CutSite)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::KillSite => "site killed",
            Self::PauseSite => "site paused",
            Self::CutSite => "site cut off",
            Self::SlowSite => "site at 10 Mbit/s",
            Self::KillLeader => "leader killed",
            Self::PauseLeader => "leader paused",
        })
    }
}

/// A fault to come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fault {
    /// Seconds after the storm's beginning.
    pub(super) at: f64,
    pub(super) kind: Kind,
    /// Number of the site; for the leader it says nothing.
    pub(super) site: usize,
    /// How long it lasts.
    pub(super) seconds: f64,
}

/// So many sites are always as they should be.
const WELL_MIN: usize = 2;
/// A site that was out counts as out for so many seconds more.
const SITE_RECOVERS: f64 = 5.0;
/// A coordinator that was out is not yet a standby for so many seconds.
const LEADER_RECOVERS: f64 = 15.0;
/// At the end of the storm no fault begins for so many seconds, so that the last ones are seen to end.
const CALMING: f64 = 25.0;
/// Places that are tried for a fault before it is left out.
const TRIES: usize = 10_000;

/// A storm of so many seconds, with so many faults per hour, over so many sites.
pub(super) fn storm(seed: u64, seconds: f64, per_hour: f64, sites: usize) -> Vec<Fault> {
    let mut rng = Rng::new(seed);
    let mut faults: Vec<Fault> = Vec::new();
    for kind in deck(&mut rng, (per_hour * seconds / 3600.0).round() as usize) {
        let candidates = (0..TRIES).map(|_| draw(&mut rng, kind, seconds - CALMING, sites));
        let found = candidates.into_iter().find(|candidate| fits(&faults, candidate, sites));
        faults.extend(found);
    }
    faults.sort_by(|a, b| a.at.total_cmp(&b.at));
    faults
}

/// So many kinds, each with its share, in a random order.
fn deck(rng: &mut Rng, count: usize) -> Vec<Kind> {
    let mut dealt = 0.0;
    let mut deck: Vec<Kind> = Vec::new();
    for (kind, share, _) in KINDS {
        dealt += share;
        deck.resize((dealt * count as f64).round() as usize, kind);
    }
    for index in (1..deck.len()).rev() {
        deck.swap(index, rng.below(index as u64 + 1) as usize);
    }
    deck
}

fn draw(rng: &mut Rng, kind: Kind, seconds: f64, sites: usize) -> Fault {
    let (least, most) = KINDS.iter().find(|(known, ..)| *known == kind).map_or((0.0, 0.0), |(_, _, lasts)| *lasts);
    let mut uniform = |least: f64, most: f64| least + (most - least) * rng.unit();
    let (at, lasts) = (uniform(0.0, seconds.max(0.0)), uniform(least, most));
    Fault { at, kind, site: rng.below(sites as u64) as usize, seconds: lasts }
}

/// Whether a fault may happen beside the others.
fn fits(others: &[Fault], new: &Fault, sites: usize) -> bool {
    let beside: Vec<&Fault> = others.iter().filter(|other| overlap(other, new)).collect();
    match new.kind {
        kind if kind.is_of_leader() => !beside.iter().any(|other| other.kind.is_of_leader()),
        Kind::SlowSite => !beside.iter().any(|other| other.kind == Kind::SlowSite && other.site == new.site),
        _ => {
            let out: Vec<&&Fault> = beside.iter().filter(|other| other.kind.takes_site_out()).collect();
            out.iter().all(|other| other.site != new.site) && out.len() < sites - WELL_MIN
        }
    }
}

fn overlap(a: &Fault, b: &Fault) -> bool {
    a.at < b.at + b.lasts() && b.at < a.at + a.lasts()
}

impl Fault {
    /// Seconds until all is as it was.
    fn lasts(&self) -> f64 {
        let recovers = if self.kind.is_of_leader() { LEADER_RECOVERS } else { SITE_RECOVERS };
        self.seconds + recovers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_storm() {
        assert_eq!(storm(7, 1800.0, 125.0, 4), storm(7, 1800.0, 125.0, 4));
        assert_ne!(storm(7, 1800.0, 125.0, 4), storm(8, 1800.0, 125.0, 4));
    }

    #[test]
    fn a_storm_has_as_many_faults_as_it_should_and_all_kinds() {
        for seed in 0..20 {
            let faults = storm(seed, 1800.0, 125.0, 4);
            assert_eq!(faults.len(), 63);
            assert!(KINDS.iter().all(|(kind, ..)| faults.iter().filter(|fault| fault.kind == *kind).count() > 3));
            assert!(faults.iter().all(|fault| fault.at <= 1800.0 - CALMING));
        }
    }

    #[test]
    fn two_sites_and_one_coordinator_are_always_well() {
        for seed in 0..50 {
            let faults = storm(seed, 240.0, 400.0, 4);
            for tenth in 0..3000 {
                let at = f64::from(tenth) / 10.0;
                let now = faults.iter().filter(|fault| fault.at <= at && at < fault.at + fault.seconds);
                let (leaders, others): (Vec<&Fault>, Vec<&Fault>) = now.partition(|fault| fault.kind.is_of_leader());
                let out: Vec<usize> =
                    others.iter().filter(|fault| fault.kind.takes_site_out()).map(|fault| fault.site).collect();
                assert!(leaders.len() <= 1 && out.len() <= 2, "{at}");
                assert!(out.len() < 2 || out[0] != out[1], "a site has one such fault at a time");
            }
        }
    }
}
