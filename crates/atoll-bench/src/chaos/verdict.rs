//! From what is known of a storm to figures. All is arithmetic over times; nothing is looked at here.

use std::collections::BTreeMap;

use atoll_core::data::{DatasetId, Ranges};
use atoll_core::hash::Digest;
use atoll_core::journal::{Accepted, Commit, Entry, Settled};

use super::evidence::{Evidence, SiteEvidence};
use super::storm::Kind;
use super::weather::{CONFUSED_SECONDS, Happened};
use crate::emulated::Act;
use crate::scenario::STEP_SECONDS;

/// What the storm did.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Verdict {
    /// What became of each fault.
    pub(super) aftermaths: Vec<Aftermath>,
    /// Commits in the storm.
    pub(super) commits: usize,
    /// Tokens that entered the model per second without faults.
    pub(super) calm_tokens_per_second: f64,
    /// Share of the time without faults that sites spent in inner steps, on the mean.
    pub(super) calm_utilization: f64,
    /// Tokens that entered the model in the storm, over those that would have at the rate without faults.
    pub(super) tokens_share: f64,
    /// See [`participation`].
    pub(super) participation: f64,
    /// The longest time that a site took no step though it was running and linked all the while.
    pub(super) longest_stall: f64,
    /// The same for sites while they were cut off.
    pub(super) longest_stall_cut: f64,
    /// See [`lost`].
    pub(super) tokens_lost: f64,
    /// Commits that sites were told of and that are not in the journal.
    pub(super) commits_lost: usize,
    /// See [`wiped`].
    pub(super) states_wiped: usize,
    /// Times that a site's copy of the model was not the announced one.
    pub(super) digest_mismatches: u64,
    /// Processes that ended by themselves for no good reason.
    pub(super) crashes: usize,
}

/// What became of a fault. Seconds; none if it did not come to that before the next fault of the same place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Aftermath {
    pub(super) kind: Kind,
    /// From the fault to the moment at which the leader knew that the site takes no part.
    pub(super) detection: Option<f64>,
    /// From the fault to the first commit without the site.
    pub(super) commit: Option<f64>,
    /// From the detection to the first commit without the site.
    pub(super) commit_after_detection: Option<f64>,
    /// From the end of the fault to the first step of the site that follows the present model: after loading it, for a
    /// process that was started anew; else after taking in a commit.
    pub(super) rejoin: Option<f64>,
    /// From the end of the fault to the first commit with a contribution of the site that set out from the version which
    /// its fragment had then, or from a later one.
    pub(super) rejoin_commit: Option<f64>,
    /// From a fault of the leader to the first commit under its successor.
    pub(super) takeover: Option<f64>,
}

/// A stretch of time.
type Span = (f64, f64);

/// A commit and when it was in the journal.
type Timed<'a> = (f64, &'a Commit);

/// Judges.
pub(super) fn judge(evidence: &Evidence) -> Verdict {
    let Evidence { notes, entries, sites, .. } = evidence;
    let commits = commits(entries);
    let context = context(entries);
    let stalls = |of: fn((f64, f64)) -> f64| sites.iter().map(|site| of(stalls(evidence, site))).fold(0.0, f64::max);
    let calm_tokens_per_second = tokens(&commits, context, notes.calm) / length(notes.calm);
    let utilizations = sites.iter().map(|site| steps(site, notes.calm) as f64 * STEP_SECONDS / length(notes.calm));
    Verdict {
        aftermaths: notes.faults.iter().map(|fault| aftermath(evidence, &commits, fault)).collect(),
        commits: commits.iter().filter(|(at, _)| within(*at, notes.storm)).count(),
        calm_tokens_per_second,
        calm_utilization: utilizations.sum::<f64>() / sites.len().max(1) as f64,
        tokens_share: tokens(&commits, context, notes.storm) / (calm_tokens_per_second * length(notes.storm)),
        participation: participation(evidence, &commits),
        longest_stall: stalls(|(living, _)| living),
        longest_stall_cut: stalls(|(_, cut)| cut),
        tokens_lost: lost(evidence, context),
        commits_lost: commits_lost(sites, entries),
        states_wiped: wiped(evidence),
        digest_mismatches: evidence.mismatches,
        crashes: notes.ends.iter().filter(|end| !end.deposed).count(),
    }
}

fn within(at: f64, span: Span) -> bool {
    span.0 < at && at <= span.1
}

fn length(span: Span) -> f64 {
    span.1 - span.0
}

fn touch(a: Span, b: Span) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

/// All commits of a journal.
pub(super) fn commits(entries: &[(f64, Entry)]) -> Vec<Timed<'_>> {
    let timed = entries.iter().filter_map(|(at, entry)| match entry {
        Entry::Committed(commit) => Some((*at, commit)),
        _ => None,
    });
    timed.collect()
}

/// Tokens of a sample.
pub(super) fn context(entries: &[(f64, Entry)]) -> u64 {
    let context =
        |(_, entry): &(f64, Entry)| if let Entry::Began { context, .. } = entry { Some(*context) } else { None };
    entries.iter().find_map(context).unwrap_or(0)
}

/// Tokens that entered the model in that stretch, each once.
pub(super) fn tokens(commits: &[Timed<'_>], context: u64, span: Span) -> f64 {
    let inside = commits.iter().filter(|(at, _)| within(*at, span));
    let samples: u64 = inside.flat_map(|(_, commit)| &commit.contributions).map(|accepted| accepted.ranges.len()).sum();
    (samples * context) as f64
}

fn steps(site: &SiteEvidence, span: Span) -> usize {
    site.moments.iter().filter(|moment| moment.act == Act::Step && within(moment.end, span)).count()
}

// ---- who could take part ----

/// When a site was out: its process dead or stopped, its link cut, or its process ended by itself.
fn out(evidence: &Evidence, site: &str) -> Vec<Span> {
    let notes = &evidence.notes;
    let faults = notes.faults.iter().filter(|fault| fault.place == site && fault.kind.takes_site_out());
    let ends = notes.ends.iter().filter(|end| end.place == site).map(|end| (end.at, end.again));
    faults.map(|fault| (fault.began, fault.ended)).chain(ends).collect()
}

/// The mean over the storm's commits of: sites whose contribution is in it, among those that were living throughout its
/// round. The round of a commit begins with the commit of the same fragment before it. A site lives that has a process
/// which is neither stopped nor cut off; one that was just started and is still loading the model counts as living, and
/// so does one whose link is slow.
fn participation(evidence: &Evidence, commits: &[Timed<'_>]) -> f64 {
    let out: Vec<(&str, Vec<Span>)> =
        evidence.sites.iter().map(|site| (site.name.as_str(), out(evidence, &site.name))).collect();
    let mut begun: BTreeMap<u16, f64> = BTreeMap::new();
    let mut shares = Vec::new();
    for (at, commit) in commits {
        let Some(began) = begun.insert(commit.fragment.0, *at).filter(|_| within(*at, evidence.notes.storm)) else {
            continue;
        };
        let living = out.iter().filter(|(_, out)| !out.iter().any(|span| touch(*span, (began, *at))));
        let living: Vec<&str> = living.map(|(site, _)| *site).collect();
        let took_part = living.iter().filter(|site| has(commit, site)).count();
        if !living.is_empty() {
            shares.push(took_part as f64 / living.len() as f64);
        }
    }
    shares.iter().sum::<f64>() / shares.len().max(1) as f64
}

fn has(commit: &Commit, site: &str) -> bool {
    contribution(commit, site).is_some()
}

fn contribution<'a>(commit: &'a Commit, site: &str) -> Option<&'a Accepted> {
    commit.contributions.iter().find(|accepted| accepted.site.to_string() == site)
}

/// The longest times between two steps of a site in the storm, a step's own time aside: while it was living, and while it
/// was cut off. A time in which the process was dead or stopped is neither; what the site needs after that is in
/// [`Aftermath::rejoin`].
fn stalls(evidence: &Evidence, site: &SiteEvidence) -> (f64, f64) {
    let steps = site.moments.iter().filter(|moment| moment.act == Act::Step);
    let ends: Vec<f64> = steps.map(|step| step.end).filter(|end| within(*end, evidence.notes.storm)).collect();
    let of_site = |fault: &&Happened| fault.place == site.name;
    let spans = |is: fn(Kind) -> bool| -> Vec<Span> {
        let faults = evidence.notes.faults.iter().filter(of_site).filter(|fault| is(fault.kind));
        faults.map(|fault| (fault.began, fault.ended)).collect()
    };
    let (mut dead, cut) =
        (spans(|kind| kind.takes_site_out() && kind != Kind::CutSite), spans(|kind| kind == Kind::CutSite));
    dead.extend(evidence.notes.ends.iter().filter(|end| end.place == site.name).map(|end| (end.at, end.again)));
    let (mut living, mut cut_off) = (0.0, 0.0);
    for pair in ends.windows(2) {
        let (span, stall) = ((pair[0], pair[1]), pair[1] - pair[0] - STEP_SECONDS);
        let is_in = |spans: &[Span]| spans.iter().any(|other| touch(*other, span));
        match (is_in(&dead), is_in(&cut)) {
            (true, _) => {}
            (false, true) => cut_off = f64::max(cut_off, stall),
            (false, false) => living = f64::max(living, stall),
        }
    }
    (living, cut_off)
}

// ---- faults ----

fn aftermath(evidence: &Evidence, commits: &[Timed<'_>], fault: &Happened) -> Aftermath {
    let Happened { kind, place, began, ended } = fault;
    let mut aftermath = Aftermath {
        kind: *kind,
        detection: None,
        commit: None,
        commit_after_detection: None,
        rejoin: None,
        rejoin_commit: None,
        takeover: None,
    };
    if kind.is_of_leader() {
        aftermath.takeover = takeover(&evidence.entries, *began).map(|at| at - began);
    }
    if !kind.takes_site_out() {
        return aftermath;
    }
    let next_fault = next_fault(evidence, fault);
    let without =
        |after: f64| commits.iter().find(|(at, commit)| *at >= after && !has(commit, place)).map(|(at, _)| *at);
    let detected = detected(evidence, fault);
    aftermath.detection = detected.map(|at| at - began);
    aftermath.commit = without(*began).filter(|at| *at < next_fault).map(|at| at - began);
    aftermath.commit_after_detection = detected.and_then(|at| Some(without(at)? - at));
    aftermath.rejoin = trains_again(evidence, fault).filter(|at| *at < next_fault).map(|at| at - ended);
    aftermath.rejoin_commit =
        contributes_again(commits, place, *ended).filter(|at| *at < next_fault).map(|at| at - ended);
    aftermath
}

/// When the next fault of the same place takes it out.
fn next_fault(evidence: &Evidence, fault: &Happened) -> f64 {
    let later = evidence
        .notes
        .faults
        .iter()
        .filter(|other| other.place == fault.place && other.began > fault.began && other.kind.takes_site_out());
    later.map(|other| other.began).fold(f64::INFINITY, f64::min)
}

/// When the leader knew that the site takes no part: its connection was gone, or it counted as silent. What a coordinator
/// said that had been stopped, and did not know yet what it had missed, does not count.
fn detected(evidence: &Evidence, fault: &Happened) -> Option<f64> {
    let notes = &evidence.notes;
    let is_confused = |place: &str, at: f64| {
        let pauses = notes.faults.iter().filter(|other| other.kind == Kind::PauseLeader && other.place == place);
        pauses.into_iter().any(|pause| within(at, (pause.began, pause.ended + CONFUSED_SECONDS)))
    };
    let gone = evidence.gone.iter().filter(|(at, place, site)| *site == fault.place && !is_confused(place, *at));
    let seen = notes.seen.iter().filter(|seen| seen.site == fault.place && seen.state != "training");
    let known = gone.map(|(at, ..)| *at).chain(seen.map(|seen| seen.at));
    known.filter(|at| within(*at, (fault.began, fault.ended + CONFUSED_SECONDS))).reduce(f64::min)
}

/// The first commit under the next leader.
fn takeover(entries: &[(f64, Entry)], began: f64) -> Option<f64> {
    let mut later = entries.iter().skip_while(|(at, entry)| *at < began || !matches!(entry, Entry::Leads { .. }));
    later.find(|(_, entry)| matches!(entry, Entry::Committed(_))).map(|(at, _)| *at)
}

/// The first step that follows the model as it is.
fn trains_again(evidence: &Evidence, fault: &Happened) -> Option<f64> {
    let site = evidence.sites.iter().find(|site| site.name == fault.place)?;
    let mut later = site.moments.iter().filter(|moment| moment.begin > fault.ended);
    if fault.kind != Kind::KillSite {
        later.find(|moment| matches!(moment.act, Act::Write(_)))?;
    }
    later.find(|moment| moment.act == Act::Step).map(|moment| moment.begin)
}

/// The first commit with a contribution that set out from the model as it was then, or is later.
fn contributes_again(commits: &[Timed<'_>], site: &str, since: f64) -> Option<f64> {
    let version = |fragment: u16| {
        let earlier = commits.iter().filter(|(at, commit)| *at <= since && commit.fragment.0 == fragment);
        earlier.map(|(_, commit)| commit.version).max().unwrap_or(0)
    };
    let later = commits.iter().filter(|(at, _)| *at > since);
    let is_new = |commit: &Commit| {
        contribution(commit, site).is_some_and(|accepted| accepted.base >= version(commit.fragment.0))
    };
    later.into_iter().find(|(_, commit)| is_new(commit)).map(|(at, _)| *at)
}

// ---- what must not be ----

/// Tokens that a site was told are in the model and that are in no commit of the journal, by contribution and version; and
/// tokens that are in several commits. A contribution that is not in the journal counts as many as a usual one.
fn lost(evidence: &Evidence, context: u64) -> f64 {
    let mut sessions: BTreeMap<String, (u64, Option<DatasetId>)> = BTreeMap::new();
    let mut settled: BTreeMap<(String, u64, u64), u64> = BTreeMap::new();
    let mut consumed: BTreeMap<Option<DatasetId>, Ranges> = BTreeMap::new();
    let (mut twice, mut samples) = (0, 0);
    for (_, entry) in &evidence.entries {
        match entry {
            Entry::Joined { site, session, dataset, .. } => {
                sessions.insert(site.to_string(), (*session, Some(*dataset)));
            }
            Entry::Committed(commit) => {
                for accepted in &commit.contributions {
                    let site = accepted.site.to_string();
                    let (session, dataset) = sessions.get(&site).copied().unwrap_or_default();
                    settled.insert((site, session, accepted.number), commit.version);
                    let all = consumed.entry(dataset).or_default();
                    let before = all.len();
                    all.insert(&accepted.ranges);
                    samples += accepted.ranges.len();
                    twice += accepted.ranges.len() - (all.len() - before);
                }
            }
            _ => {}
        }
    }
    let usual = samples as f64 / settled.len().max(1) as f64;
    let told = evidence.sites.iter().flat_map(|site| site.told.iter().map(move |told| (&site.name, told)));
    let committed = told.flat_map(|(site, told)| {
        let versions = told.settled.iter().filter_map(|(number, settled)| match settled {
            Settled::Committed(version) => Some((*number, *version)),
            Settled::Refused(_) => None,
        });
        versions.map(move |(number, version)| ((site.clone(), told.session, number), version))
    });
    let told: BTreeMap<(String, u64, u64), u64> = committed.collect();
    let missing = told.iter().filter(|(contribution, version)| settled.get(contribution) != Some(version)).count();
    (twice as f64 + missing as f64 * usual) * context as f64
}

/// Versions of fragments that sites were told of, with their digests, and that are not in the journal.
fn commits_lost(sites: &[SiteEvidence], entries: &[(f64, Entry)]) -> usize {
    let commits = commits(entries);
    let first =
        entries.iter().find_map(|(_, entry)| if let Entry::Began { theta, .. } = entry { Some(theta) } else { None });
    let first = first.into_iter().flatten().zip(0..).map(|(digest, fragment)| ((fragment, 0), *digest));
    let later = commits.iter().map(|(_, commit)| ((commit.fragment.0, commit.version), commit.digest));
    let known: BTreeMap<(u16, u64), Digest> = first.chain(later).collect();
    let told = sites.iter().flat_map(|site| &site.told).flat_map(|told| {
        (0..).zip(&told.fragments).map(|(fragment, (version, digest))| ((fragment, *version), *digest))
    });
    let told: std::collections::BTreeSet<((u16, u64), Digest)> = told.collect();
    told.iter().filter(|(version, digest)| known.get(version) != Some(digest)).count()
}

/// Sessions that a site began though its process lived on: it had been given up, and lost its leases, its unsent work and
/// its copy of the model. And times that the run itself was begun anew or taken back.
fn wiped(evidence: &Evidence) -> usize {
    let mut wiped = 0;
    for site in &evidence.sites {
        let starts: Vec<f64> =
            evidence.notes.starts.iter().filter(|(place, _)| *place == site.name).map(|(_, at)| *at).collect();
        let process = |at: f64| starts.iter().filter(|start| **start <= at).count();
        let joins = evidence.entries.iter().filter_map(|(at, entry)| match entry {
            Entry::Joined { site: who, .. } if who.to_string() == site.name => Some(process(*at)),
            _ => None,
        });
        let mut joins: Vec<usize> = joins.collect();
        let sessions = joins.len();
        joins.dedup();
        wiped += sessions - joins.len();
    }
    let begins = evidence.entries.iter().filter(|(_, entry)| matches!(entry, Entry::Began { .. })).count();
    let rolled_back = evidence.entries.iter().filter(|(_, entry)| matches!(entry, Entry::RolledBack { .. })).count();
    wiped + begins.saturating_sub(1) + rolled_back
}
