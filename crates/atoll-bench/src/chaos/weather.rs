//! The storm as it happens: faults are done to the lab and undone, what ends by itself is started again as an init
//! system would, and everything is noted with its time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use atoll_node::report::Report;
use serde::{Deserialize, Serialize};

use super::storm::{Fault, Kind, SLOW_MBIT};
use super::{COORDINATORS, LINK_MBIT};
use crate::lab::Lab;
use crate::scenario::{now, run_dir};

/// What happened, on one clock: seconds since 1970.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Notes {
    pub(super) seed: u64,
    /// A stretch without faults.
    pub(super) calm: (f64, f64),
    /// The stretch with them.
    pub(super) storm: (f64, f64),
    pub(super) faults: Vec<Happened>,
    /// Processes that ended though nobody had killed them.
    pub(super) ends: Vec<End>,
    /// When a process was started at a place.
    pub(super) starts: Vec<(String, f64)>,
    /// What the leading coordinator said of each site, as it changed.
    pub(super) seen: Vec<Seen>,
    /// Times that a site's copy of the model had another digest than announced: the most that any of its processes said.
    pub(super) mismatches: BTreeMap<String, u64>,
    /// Why the lab's own clockwork is not to be trusted this time, if so.
    pub(super) doubts: Vec<String>,
    /// For segments of the journal in the object store, by their first entry: when they were put there.
    pub(super) segments: Vec<(u64, f64)>,
}

/// A fault.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Happened {
    pub(super) kind: Kind,
    pub(super) place: String,
    pub(super) began: f64,
    /// When its cause was gone: the process started or resumed, the link healed.
    pub(super) ended: f64,
}

/// A process ended by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct End {
    pub(super) place: String,
    pub(super) at: f64,
    pub(super) code: i32,
    /// When it was started again.
    pub(super) again: f64,
    /// Whether it ended because another coordinator had taken the lead, as it should.
    pub(super) deposed: bool,
}

/// The leader's word for what a site does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Seen {
    pub(super) at: f64,
    pub(super) site: String,
    pub(super) state: String,
}

/// An init system starts a process that ended after so many seconds.
const RESTART_SECONDS: f64 = 1.0;
/// What a coordinator says of itself is out of date after so many seconds.
const FRESH_SECONDS: f64 = 1.6;
/// A coordinator that was stopped finds out within so many seconds that it leads no more; what it says until then is old.
pub(super) const CONFUSED_SECONDS: f64 = 3.0;
/// Between two looks at everything.
const LOOK: Duration = Duration::from_millis(50);

/// A lab and what is done to it.
pub(super) struct Weather<'a> {
    lab: &'a mut Lab,
    folder: &'a Path,
    sites: Vec<String>,
    pub(super) notes: Notes,
    /// Faults that have begun: when they are to end, and their number.
    under_way: Vec<(f64, usize)>,
    /// Processes to be started again: when, and the number of their end.
    down: Vec<(f64, usize)>,
    /// What each coordinator said last.
    reports: BTreeMap<String, Report>,
    states: BTreeMap<String, String>,
}

impl<'a> Weather<'a> {
    pub(super) fn new(lab: &'a mut Lab, folder: &'a Path, sites: Vec<String>, notes: Notes) -> Self {
        let (reports, states) = (BTreeMap::new(), BTreeMap::new());
        Self { lab, folder, sites, notes, under_way: Vec::new(), down: Vec::new(), reports, states }
    }

    /// Lets the faults happen until that moment, and until all of them are over.
    pub(super) fn pass(&mut self, faults: Vec<Fault>, until: f64) -> Result<()> {
        let (began, mut to_come) = (now(), faults);
        while now() < until || !self.under_way.is_empty() || !self.down.is_empty() {
            self.lab.check()?;
            self.look();
            self.restart()?;
            self.end_faults()?;
            while let Some(fault) = self.next(&mut to_come, now() - began) {
                self.begin(&fault)?;
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Takes a fault that is due and can begin.
    fn next(&self, to_come: &mut Vec<Fault>, at: f64) -> Option<Fault> {
        let index = to_come.iter().position(|fault| fault.at <= at && self.can_begin(fault.kind))?;
        Some(to_come.remove(index))
    }

    /// A fault of the leader waits until there is one, with a standby behind it.
    fn can_begin(&self, kind: Kind) -> bool {
        !kind.is_of_leader() || (self.leader().is_some() && self.in_state("standby").is_some())
    }

    /// Which coordinator leads.
    pub(super) fn leader(&self) -> Option<String> {
        self.in_state("training")
    }

    fn in_state(&self, state: &str) -> Option<String> {
        let fresh = |report: &Report| now() - report.at < FRESH_SECONDS && report.state == state;
        self.reports.iter().find(|(_, report)| fresh(report)).map(|(place, _)| place.clone())
    }

    fn begin(&mut self, fault: &Fault) -> Result<()> {
        let place = if fault.kind.is_of_leader() { self.leader() } else { self.sites.get(fault.site).cloned() };
        let Some(place) = place else { return Ok(()) };
        let began = now();
        match fault.kind {
            Kind::KillSite | Kind::KillLeader => self.lab.kill(&place)?,
            Kind::PauseSite | Kind::PauseLeader => self.lab.pause(&place)?,
            Kind::CutSite => self.lab.cut(&place)?,
            Kind::SlowSite => self.lab.set_rate(&place, SLOW_MBIT)?,
        }
        println!("{:7.1} s  {place}: {}, for {:.1} s", began - self.notes.storm.0, fault.kind, fault.seconds);
        if fault.kind.is_of_leader() {
            self.reports.clear(); // Until somebody says again that it leads.
        }
        self.under_way.push((began + fault.seconds, self.notes.faults.len()));
        self.notes.faults.push(Happened { kind: fault.kind, place, began, ended: f64::INFINITY });
        Ok(())
    }

    fn end_faults(&mut self) -> Result<()> {
        let (over, going): (Vec<_>, Vec<_>) = self.under_way.iter().copied().partition(|(end, _)| now() >= *end);
        self.under_way = going;
        for (_, index) in over {
            let Happened { kind, place, .. } = self.notes.faults[index].clone();
            match kind {
                Kind::KillSite | Kind::KillLeader => self.start(&place)?,
                Kind::PauseSite | Kind::PauseLeader => self.lab.resume(&place)?,
                Kind::CutSite => self.lab.heal(&place)?,
                Kind::SlowSite => self.lab.set_rate(&place, LINK_MBIT)?,
            }
            self.notes.faults[index].ended = now();
        }
        Ok(())
    }

    fn start(&mut self, place: &str) -> Result<()> {
        self.notes.starts.push((place.to_string(), now()));
        self.lab.start_again(place)
    }

    /// Starts again what has ended by itself.
    fn restart(&mut self) -> Result<()> {
        for (place, code) in self.lab.ended() {
            let is_killed = |index: usize| {
                let Happened { kind, place: at, .. } = &self.notes.faults[index];
                matches!(kind, Kind::KillSite | Kind::KillLeader) && *at == place
            };
            if self.under_way.iter().any(|(_, index)| is_killed(*index)) {
                continue;
            }
            let deposed = self.is_deposed(&place);
            let end = End { place, at: now(), code, again: f64::INFINITY, deposed };
            let why = if deposed { "another coordinator leads" } else { "NOBODY KNOWS WHY, see its log" };
            println!("{:7.1} s  {}: ended with {code}, {why}", end.at - self.notes.storm.0, end.place);
            self.down.push((end.at + RESTART_SECONDS, self.notes.ends.len()));
            self.notes.ends.push(end);
        }
        let (due, waiting): (Vec<_>, Vec<_>) = self.down.iter().copied().partition(|(at, _)| now() >= *at);
        self.down = waiting;
        for (_, index) in due {
            let place = self.notes.ends[index].place.clone();
            self.start(&place)?;
            self.notes.ends[index].again = now();
        }
        Ok(())
    }

    fn is_deposed(&self, place: &str) -> bool {
        let log = fs::read_to_string(self.folder.join("lab").join(format!("{place}.log"))).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(5).collect();
        last.iter().any(|line| line.contains("another coordinator leads"))
    }

    /// Notes what coordinators say, but for those that were stopped and do not know yet what they missed.
    fn look(&mut self) {
        for place in COORDINATORS {
            let is_confused = |fault: &Happened| {
                let Happened { kind, place: at, began, ended } = fault;
                *kind == Kind::PauseLeader && at == place && (*began..ended + CONFUSED_SECONDS).contains(&now())
            };
            if self.notes.faults.iter().any(is_confused) {
                continue;
            }
            let Ok(report) = Report::load(&run_dir(self.folder, place).status()) else { continue };
            if self.reports.get(place).is_some_and(|known| known.at == report.at) || now() - report.at > FRESH_SECONDS {
                continue;
            }
            if report.state == "training" {
                self.hear(&report);
            }
            self.reports.insert(place.to_string(), report);
        }
    }

    fn hear(&mut self, report: &Report) {
        for site in &report.sites {
            let most = self.notes.mismatches.entry(site.name.clone()).or_default();
            *most = site.digest_mismatches.max(*most);
            if self.states.get(&site.name) != Some(&site.state) {
                self.states.insert(site.name.clone(), site.state.clone());
                let (site, state) = (site.name.clone(), site.state.clone());
                self.notes.seen.push(Seen { at: report.at, site, state });
            }
        }
    }
}
