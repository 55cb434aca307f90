//! Who takes part, who is waited for, and who leads. Every event asks for it, so it is not looked up at every site each time:
//! what a round costs would grow with the square of the sites. What one report changes is compared with what is known, and
//! only where that may be otherwise now does anybody look at all sites again.

use super::{Coordinator, View};
use crate::journal::Member;
use crate::site::{SiteId, Time};

/// How many sites rounds wait for.
#[derive(Debug, Default)]
pub(super) struct Census {
    awaited: usize,
    /// Until when that holds if nothing is heard; none if it has to be counted again.
    until: Option<Time>,
}

impl Census {
    /// Something has happened after which it has to be counted again.
    pub(super) fn forget(&mut self) {
        self.until = None;
    }

    fn holds(&self, now: Time) -> bool {
        self.until.is_some_and(|until| now <= until)
    }
}

impl Coordinator {
    /// Sites that take part.
    pub(super) fn live(&self, now: Time) -> Vec<SiteId> {
        self.views.iter().filter(|(_, view)| view.is_live(now)).map(|(site, _)| site.clone()).collect()
    }

    /// Sites that a round waits for.
    pub(super) fn awaited(&self, now: Time) -> Vec<SiteId> {
        let awaited = self.views.iter().filter(|(site, view)| self.is_awaited(now, site, view));
        awaited.map(|(site, _)| site.clone()).collect()
    }

    /// Whether rounds wait for a site: it takes part, and the latest that came from it was not refused. Whoever sends
    /// nothing but nonsense would hold up everybody; the next good contribution counts all the same.
    pub(super) fn is_awaited(&self, now: Time, site: &SiteId, view: &View) -> bool {
        view.is_live(now) && !self.book.sites.get(site).is_some_and(Member::is_refused)
    }

    /// How many sites a round waits for.
    pub(super) fn count_awaited(&self, now: Time) -> usize {
        if !self.census.holds(now) {
            return self.recount(now).awaited;
        }
        debug_assert_eq!(self.census.awaited, self.recount(now).awaited, "somebody came or went unnoticed");
        self.census.awaited
    }

    /// Sees to it that [`count_awaited`](Self::count_awaited) knows.
    pub(super) fn keep_count(&mut self, now: Time) {
        if !self.census.holds(now) {
            self.census = self.recount(now);
        }
    }

    fn recount(&self, now: Time) -> Census {
        let mut census = Census { awaited: 0, until: Some(Time(u64::MAX)) };
        for (_, view) in self.views.iter().filter(|(site, view)| self.is_awaited(now, site, view)) {
            census.awaited += 1;
            census.until = census.until.min(view.live_until());
        }
        census
    }

    /// A site has come or gone.
    pub(super) fn look_who_is_there(&mut self) {
        self.census.forget();
        self.look_who_leads();
    }

    /// A report of `site` is in its view; before, it was awaited or not, and stood there, if it was connected.
    pub(super) fn look_again(&mut self, now: Time, site: &SiteId, was_awaited: bool, before: Option<Footing>) {
        let Some(view) = self.views.get(site) else { return };
        let after = self.footing(view);
        if self.is_awaited(now, site, view) != was_awaited {
            self.census.forget();
        } else if was_awaited {
            self.census.until = self.census.until.min(view.live_until());
        }
        let is_known = before.is_some_and(|before| self.lead.outlasts(before, after));
        if is_known && !cfg!(debug_assertions) {
            return;
        }
        let lead = self.lead;
        self.look_who_leads();
        debug_assert!(!is_known || self.lead == lead, "{:?} leads unnoticed, not {lead:?}", self.lead);
    }
}

/// Where a site stands among the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Footing {
    /// Seconds per step; infinite as long as it has taken none.
    pub(super) step_seconds: f64,
    /// Inner steps between two contributions of a fragment that it wishes for.
    pub(super) steps: u32,
    /// The rung of the ladder that its link carries meanwhile.
    pub(super) rung: usize,
}
