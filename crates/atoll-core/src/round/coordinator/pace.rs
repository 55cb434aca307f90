//! How fast everybody goes: inner steps of each site, the codecs that its link can carry, the grace window, and the
//! arithmetic behind them.

use std::fmt;

use super::census::Footing;
use super::{Coordinator, Forecast, View};
use crate::codec::Codec;
use crate::plan::{self, Bound, Codecs, Load, Rung};
use crate::round::{Phase, Setting, Sync};
use crate::site::{SiteId, Time};

/// Share of a usual round for which those who are there wait for those who are about to come.
const GRACE_SHARE: f64 = 0.5;
/// Steps by which a site may be later than it said.
const STEPS_SLACK: f64 = 1.0;
/// Share of its time in which a coordinator merges.
const MERGE_SHARE: f64 = 0.5;
/// Times that its way may take longer than its link promises.
const WAY_SLACK: f64 = 2.0;

/// What all others go by: the fastest site, and the thinnest link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Lead {
    /// Inner steps between two contributions of a fragment.
    pub(super) steps: u32,
    /// Seconds per step; 0 if no site has taken one.
    step_seconds: f64,
    /// The rung of the ladder that every link carries.
    rung: usize,
}

impl Lead {
    /// Before any site is known.
    pub(super) const NONE: Self = Self { steps: plan::STEPS, step_seconds: 0.0, rung: 0 };

    /// Whether the lead is the same after a connected site stood there `before` and stands here now: it has not
    /// overtaken the others in anything, and where it was the one that leads, it still is.
    pub(super) fn outlasts(&self, before: Footing, after: Footing) -> bool {
        let is_kept = |lead: f64, before: f64, after: f64| after >= lead && (before > lead || after == lead);
        self.step_seconds > 0.0
            && is_kept(self.step_seconds, before.step_seconds, after.step_seconds)
            && is_kept(-(self.rung as f64), -(before.rung as f64), -(after.rung as f64))
            && is_kept(-f64::from(self.steps), -f64::from(before.steps), -f64::from(after.steps))
    }
}

/// What there is to choose from for fragments of these lengths, richest first; never nothing.
pub(super) fn ladder(sync: &Sync, lens: &[usize]) -> Vec<Rung> {
    let chosen = |setting: Setting<Codec>, rung: Codec| match setting {
        Setting::Is(codec) => codec,
        Setting::Auto => rung,
    };
    let bytes = |codec: Codec| lens.iter().map(|&len| codec.payload_len(len) as u64).sum();
    let rung = |(up, down)| {
        let codecs @ (up, down) = (chosen(sync.up, up), chosen(sync.down, down));
        Rung { codecs, load: Load { up: bytes(up), down: bytes(down), fragments: lens.len() } }
    };
    let mut ladder = plan::LADDER.map(rung).to_vec();
    ladder.dedup();
    ladder
}

impl Coordinator {
    /// Seconds a round may stay open after its quorum.
    pub(super) fn grace(&self, live: &[SiteId]) -> f64 {
        let mut rounds: Vec<f64> = live.iter().filter_map(|site| self.round_seconds(site)).collect();
        rounds.sort_by(f64::total_cmp);
        GRACE_SHARE * rounds.get(rounds.len() / 2).copied().unwrap_or(0.0)
    }

    /// When the contribution of `site` to the open round of a fragment should be here, if it is known to be coming, and
    /// when it is given up: the site's own count of steps tells, and then it has to be sent.
    pub(super) fn expected(&self, site: &SiteId, index: usize) -> Option<(Time, Time)> {
        let view = self.views.get(site)?;
        let is_sent = self.rounds[index].pending.keys().any(|(owner, _)| owner == site);
        let steps = if is_sent { 0 } else { view.status.due.get(index).copied().flatten()? };
        let link = &view.status.vitals.link;
        let (sending, _) = plan::way_seconds(link, &self.load_on(self.rung(site)));
        let way = sending / self.lens.len().max(1) as f64 + link.rtt;
        let seconds = f64::from(steps) * view.step_seconds() + way;
        // Its report may be from any moment of a step, and what it has just been told to do comes after that step.
        let slack = STEPS_SLACK * view.step_seconds() + WAY_SLACK * way + view.interval.min(1.0);
        Some((view.heard.after(seconds), view.heard.after(seconds + slack)))
    }

    /// Seconds that `site` takes for the steps between two contributions of a fragment.
    pub(super) fn round_seconds(&self, site: &SiteId) -> Option<f64> {
        let view = self.views.get(site)?;
        Some(f64::from(self.steps_for(site)) * view.status.vitals.step_seconds)
    }

    pub(super) fn steps_for(&self, site: &SiteId) -> u32 {
        let own = self.views.get(site).map_or(0.0, View::step_seconds);
        plan::steps_for(self.lead.steps, own, self.lead.step_seconds)
    }

    /// Looks who leads, at every site.
    pub(super) fn look_who_leads(&mut self) {
        let steps = self.views.values().map(View::step_seconds).filter(|&seconds| seconds > 0.0);
        self.lead.step_seconds = steps.reduce(f64::min).unwrap_or(0.0);
        self.lead.steps = self.connected().map(|view| self.steps_wished(view).0).max().unwrap_or(self.lead.steps);
        // All sites get the same bytes, so the thinnest link decides.
        self.lead.rung = self.connected().map(|view| self.rung_of(view)).max().unwrap_or(self.ladder.len() - 1);
    }

    /// Where the site of that view stands.
    pub(super) fn footing(&self, view: &View) -> Footing {
        let step_seconds = Some(view.step_seconds()).filter(|&seconds| seconds > 0.0).unwrap_or(f64::INFINITY);
        Footing { step_seconds, steps: self.steps_wished(view).0, rung: self.rung_of(view) }
    }

    /// Inner steps between two contributions of a fragment at the fastest site, as this site's link and processors call for,
    /// and the coordinator, whose merges are to leave it time for everything else.
    fn steps_wished(&self, view: &View) -> (u32, Bound) {
        let seconds = self.lead.step_seconds;
        match self.sync.steps {
            Setting::Is(steps) => (steps, Bound::Asked),
            Setting::Auto if seconds <= 0.0 => (plan::STEPS, Bound::Unmeasured),
            Setting::Auto => {
                let merging = self.lens.len() as f64 * self.pace.merge / MERGE_SHARE;
                let (least, bound) = view.least_seconds();
                let link = plan::best_steps(&self.ladder, &view.status.vitals.link, seconds, least);
                let steps = |needed: f64| plan::steps_to_hide(needed, seconds, least);
                plan::longest((steps(0.0), bound), [(steps(merging), Bound::Merging), (link, Bound::Link)])
            }
        }
    }

    /// The codec in which `site` is to contribute now.
    pub(super) fn up(&self, site: &SiteId) -> Codec {
        self.of_this_phase(self.codecs(site).0)
    }

    /// The codec of the way up of the thinnest link.
    pub(super) fn thinnest_up(&self) -> Codec {
        self.ladder[self.lead.rung].codecs.0
    }

    /// The codec in which commits are broadcast now.
    pub(super) fn down(&self) -> Codec {
        self.of_this_phase(self.ladder[self.lead.rung].codecs.1)
    }

    /// The codec of this phase where `wished` is that of the others.
    fn of_this_phase(&self, wished: Codec) -> Codec {
        if self.phase == Phase::Closing { plan::last_of_all(wished) } else { wished }
    }

    /// The codecs for `site` while the run goes on.
    fn codecs(&self, site: &SiteId) -> Codecs {
        (self.ladder[self.rung(site)].codecs.0, self.ladder[self.lead.rung].codecs.1)
    }

    fn rung(&self, site: &SiteId) -> usize {
        self.views.get(site).map_or(self.ladder.len() - 1, |view| self.rung_of(view))
    }

    /// The richest rung that hides behind a round's computing on a site's link.
    fn rung_of(&self, view: &View) -> usize {
        let seconds = f64::from(self.lead.steps) * self.lead.step_seconds;
        plan::richest_hidden(&self.ladder, &view.status.vitals.link, seconds)
    }

    fn connected(&self) -> impl Iterator<Item = &View> {
        self.views.values().filter(|view| view.connected)
    }

    /// What a site whose link carries this rung moves while every fragment is synchronized once.
    fn load_on(&self, rung: usize) -> Load {
        Load { up: self.ladder[rung].load.up, ..self.ladder[self.lead.rung].load }
    }

    /// The arithmetic behind a site's number of steps and its codecs, if it has ever been heard of.
    pub fn forecast(&self, site: &SiteId) -> Option<Forecast> {
        let view = self.views.get(site)?;
        let (codecs, load) = (self.codecs(site), self.load_on(self.rung(site)));
        let (steps, link) = (self.steps_for(site), view.status.vitals.link);
        let (sending, receiving) = plan::way_seconds(&link, &load);
        let turn = plan::turn_seconds(&link, &load) + self.pace.quorum + self.pace.merge;
        let computing = f64::from(steps) * view.step_seconds();
        let (wished, bound) = self.steps_wished(view);
        let bound = if wished < self.lead.steps { Bound::Others } else { bound };
        Some(Forecast { steps, bound, computing, codecs, load, link, sending, receiving, turn })
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Forecast { steps, bound, computing, codecs: (up, down), load, link, sending, receiving, .. } = self;
        write!(f, "{steps} steps take {computing:.2} s, {bound}")?;
        if link.up <= 0.0 || link.down <= 0.0 {
            return write!(f, "; the link is not measured yet");
        }
        let mbit = |rate: f64| rate * 8e-6;
        let (kb_up, kb_down) = (load.up as f64 / 1e3, load.down as f64 / 1e3);
        write!(f, "; beside them {kb_up:.0} kB of {up} go up in {sending:.2} s at {:.0} Mbit/s", mbit(link.up))?;
        write!(f, " and {kb_down:.0} kB of {down} come down in {receiving:.2} s at {:.0} Mbit/s", mbit(link.down))?;
        let share = sending.max(*receiving) / computing.max(1e-9);
        write!(f, ": the link is busy {:.0} % of the time", 100.0 * share)
    }
}
