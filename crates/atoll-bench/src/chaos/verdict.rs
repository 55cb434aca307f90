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
    /// Share of the storm's site-seconds in which the site's process was there and not stopped: more tokens cannot be.
    pub(super) available_share: f64,
    /// See [`participation`].
    pub(super) participation: f64,
    /// The longest time that a site took no step though it was running and linked all the while.
    pub(super) longest_stall: f64,
    /// The same for sites while they were cut off.
    pub(super) longest_stall_cut: f64,
    /// Contributions that sites were told are in the model: what the next two rest on.
    pub(super) contributions_told: usize,
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
    /// From the fault to the first commit without the site or, if it is well again by then, the first at all.
    pub(super) commit: Option<f64>,
    /// The same from the detection.
    pub(super) commit_after_detection: Option<f64>,
    /// Whether a coordinator led all the while from the fault to that commit.
    pub(super) is_led: bool,
    /// From the end of the fault to the first step of the site that sets out from the model as it was then, or later: the
    /// version of a fragment that is in the contribution of [`Self::rejoin_commit`], or an earlier one that is new enough.
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
        available_share: available_share(evidence),
        participation: participation(evidence, &commits),
        longest_stall: stalls(|(living, _)| living),
        longest_stall_cut: stalls(|(_, cut)| cut),
        contributions_told: told(sites).len(),
        tokens_lost: lost(evidence, context),
        commits_lost: commits_lost(sites, entries),
        states_wiped: wiped(evidence),
        digest_mismatches: notes.mismatches.values().sum(),
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

fn available_share(evidence: &Evidence) -> f64 {
    let Evidence { notes, sites, .. } = evidence;
    let is_gone = |fault: &&Happened| matches!(fault.kind, Kind::KillSite | Kind::PauseSite);
    let faults = notes.faults.iter().filter(is_gone).map(|fault| (fault.began, fault.ended));
    let ends = notes.ends.iter().filter(|end| sites.iter().any(|site| site.name == end.place));
    let spans = faults.chain(ends.map(|end| (end.at, end.again)));
    let gone: f64 = spans.map(|(from, to)| (to.min(notes.storm.1) - from.max(notes.storm.0)).max(0.0)).sum();
    1.0 - gone / (length(notes.storm) * sites.len().max(1) as f64)
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
        is_led: true,
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
    let is_survivors = |(at, commit): &&Timed<'_>| at > ended || !has(commit, place);
    let next = |after: f64| commits.iter().filter(|(at, _)| *at >= after).find(is_survivors).map(|(at, _)| *at);
    let detected = detected(evidence, fault);
    aftermath.detection = detected.map(|at| at - began);
    aftermath.commit = next(*began).map(|at| at - began);
    aftermath.commit_after_detection = detected.and_then(|at| Some(next(at)? - at));
    let until = began + [aftermath.detection, aftermath.commit_after_detection].into_iter().flatten().sum::<f64>();
    let mut leaders = evidence.notes.faults.iter().filter(|other| other.kind.is_of_leader());
    let lead = |other: &Happened| (other.began, takeover(&evidence.entries, other.began).unwrap_or(other.ended));
    aftermath.is_led = !leaders.any(|other| touch(lead(other), (*began, until)));
    if let Some(back) = contributes_again(commits, place, *ended).filter(|back| back.at < next_fault) {
        aftermath.rejoin_commit = Some(back.at - ended);
        aftermath.rejoin = trains_again(evidence, fault, &back).map(|at| at - ended);
    }
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

/// The first contribution that set out from the model as it was at some moment, or later.
struct Back {
    /// When it was committed.
    at: f64,
    fragment: u16,
    /// Commits of the fragment between that moment and the version that it set out from.
    newer: usize,
}

fn contributes_again(commits: &[Timed<'_>], site: &str, since: f64) -> Option<Back> {
    let version = |fragment: u16| {
        let earlier = commits.iter().filter(|(at, commit)| *at <= since && commit.fragment.0 == fragment);
        earlier.map(|(_, commit)| commit.version).max().unwrap_or(0)
    };
    let mut later = commits.iter().filter(|(at, _)| *at > since);
    later.find_map(|(at, commit)| {
        let fragment = commit.fragment.0;
        let newer = contribution(commit, site)?.base.checked_sub(version(fragment))?;
        Some(Back { at: *at, fragment, newer: newer as usize })
    })
}

/// The first step after the site had taken in the version of that moment. It takes in one after the other, so that is as
/// many writes before the contribution was taken as there are newer ones in it.
fn trains_again(evidence: &Evidence, fault: &Happened, back: &Back) -> Option<f64> {
    let site = evidence.sites.iter().find(|site| site.name == fault.place)?;
    let (read, write) = (Act::Read(back.fragment), Act::Write(back.fragment));
    // A read before a write serves the write.
    let pairs = site.moments.windows(2).filter(|pair| pair[0].act == read && pair[1].act != write);
    let taken = pairs.map(|pair| pair[0].begin).take_while(|at| *at < back.at).last()?;
    let since = |moment: &&crate::emulated::Moment| moment.begin > fault.began && moment.begin < taken;
    let writes: Vec<f64> =
        site.moments.iter().filter(since).filter(|moment| moment.act == write).map(|moment| moment.end).collect();
    let current = writes.len().checked_sub(1 + back.newer).map_or(fault.ended, |index| writes[index]);
    let mut steps = site.moments.iter().filter(|moment| moment.act == Act::Step);
    steps.find(|step| step.begin > current.max(fault.ended)).map(|step| step.begin)
}

// ---- what must not be ----

/// A contribution: its site, the session and its number there.
type Contribution = (String, u64, u64);

/// The contributions that sites were told are in the model, with the version that has them.
fn told(sites: &[SiteEvidence]) -> BTreeMap<Contribution, u64> {
    let told = sites.iter().flat_map(|site| site.told.iter().map(move |told| (&site.name, told)));
    let committed = told.flat_map(|(site, told)| {
        let versions = told.settled.iter().filter_map(|(number, settled)| match settled {
            Settled::Committed(version) => Some((*number, *version)),
            Settled::Refused(_) => None,
        });
        versions.map(move |(number, version)| ((site.clone(), told.session, number), version))
    });
    committed.collect()
}

/// Tokens that a site was told are in the model and that are in no commit of the journal, by contribution and version; and
/// tokens that are in several commits. A contribution that is not in the journal counts as many as a usual one.
fn lost(evidence: &Evidence, context: u64) -> f64 {
    let mut sessions: BTreeMap<String, (u64, Option<DatasetId>)> = BTreeMap::new();
    let mut settled: BTreeMap<Contribution, u64> = BTreeMap::new();
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
    let told = told(&evidence.sites);
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

#[cfg(test)]
mod tests {
    use atoll_core::codec::Codec;
    use atoll_core::manifest::FragmentId;
    use atoll_core::outer::{Averaging, Guard, OuterRule, Recipe};

    use super::*;
    use crate::chaos::weather::{Notes, Seen};
    use crate::emulated::Moment;
    use atoll_node::site::told::Told;

    const CONTEXT: u64 = 8;

    fn began() -> (f64, Entry) {
        let (layout, theta) = (Digest::of(b"layout"), vec![Digest::of(b"theta")]);
        (0.0, Entry::Began { run: "r".to_string(), seed: 1, context: CONTEXT, layout, theta })
    }

    fn joined(at: f64, site: &str, session: u64) -> (f64, Entry) {
        let dataset = DatasetId(Digest::of(b"data"));
        (at, Entry::Joined { site: site.parse().unwrap(), session, dataset, samples: 1000 })
    }

    /// A commit of these contributions: site, number, base and samples.
    fn commit(at: f64, version: u64, contributions: &[(&str, u64, u64, (u64, u64))]) -> (f64, Entry) {
        let contributions = contributions.iter().map(|(site, number, base, (from, to))| Accepted {
            site: site.parse().unwrap(),
            number: *number,
            payload: Digest::of(b"payload"),
            base: *base,
            steps: 1,
            tokens: 8,
            weight: 1.0,
            norm: 1.0,
            trust: 0.0,
            quality: 0.0,
            ranges: Ranges::span(*from, *to),
        });
        let commit = Commit {
            fragment: FragmentId(0),
            version,
            contributions: contributions.collect(),
            recipe: Recipe {
                merge: Averaging::Radial,
                rule: OuterRule::default(),
                codec: Codec::F32,
                share: 1.0,
                guard: Guard::default(),
            },
            delta: Digest::of(b"delta"),
            bytes: 1,
            digest: digest(version),
            agreements: Vec::new(),
            seconds: at,
        };
        (at, Entry::Committed(commit))
    }

    fn digest(version: u64) -> Digest {
        Digest::of(&version.to_le_bytes())
    }

    fn site(name: &str, acts: &[(Act, f64)]) -> SiteEvidence {
        let moment = |(act, end): &(Act, f64)| Moment { act: *act, begin: end - STEP_SECONDS, end: *end };
        SiteEvidence { name: name.to_string(), moments: acts.iter().map(moment).collect(), told: Vec::new() }
    }

    fn fault(kind: Kind, place: &str, began: f64, ended: f64) -> Happened {
        Happened { kind, place: place.to_string(), began, ended }
    }

    fn evidence(entries: Vec<(f64, Entry)>, sites: Vec<SiteEvidence>, faults: Vec<Happened>) -> Evidence {
        let starts = sites.iter().map(|site| (site.name.clone(), 0.0)).collect();
        let notes = Notes { calm: (0.0, 10.0), storm: (10.0, 30.0), faults, starts, ..Notes::default() };
        Evidence { notes, entries, sites, gone: Vec::new() }
    }

    #[test]
    fn tokens_are_compared_with_the_time_without_faults() {
        let entries = vec![
            began(),
            commit(5.0, 1, &[("a", 1, 0, (0, 10))]),
            commit(15.0, 2, &[("a", 2, 1, (10, 20))]),
            commit(25.0, 3, &[("a", 3, 2, (20, 25))]),
            commit(35.0, 4, &[("a", 4, 3, (25, 90))]),
        ];
        let verdict = judge(&evidence(entries, vec![site("a", &[])], Vec::new()));
        assert_eq!(verdict.calm_tokens_per_second, 8.0);
        assert_eq!(verdict.tokens_share, 15.0 * 8.0 / (8.0 * 20.0));
        assert_eq!(verdict.commits, 2);
    }

    #[test]
    fn only_sites_that_lived_throughout_a_round_are_missed() {
        let all = [("a", 1, 0, (0, 1)), ("b", 1, 0, (1, 2)), ("c", 1, 0, (2, 3))];
        let entries = vec![began(), commit(12.0, 1, &all), commit(14.0, 2, &all[..1]), commit(16.0, 3, &all[..2])];
        let sites = || ["a", "b", "c"].map(|name| site(name, &[])).into();
        let share = |faults| judge(&evidence(entries.clone(), sites(), faults)).participation;
        // The first commit has no round before it.
        assert_eq!(share(Vec::new()), (1.0 / 3.0 + 2.0 / 3.0) / 2.0);
        let killed = fault(Kind::KillSite, "c", 13.0, 15.0);
        assert_eq!(share(vec![killed]), f64::midpoint(1.0 / 2.0, 1.0));
        let slow = fault(Kind::SlowSite, "c", 11.0, 20.0);
        assert_eq!(share(vec![slow]), (1.0 / 3.0 + 2.0 / 3.0) / 2.0);
    }

    #[test]
    fn a_stall_is_a_living_sites() {
        let steps = [11.0, 12.03, 15.06, 15.09, 20.12].map(|end| (Act::Step, end));
        let stalls = |faults| {
            let verdict = judge(&evidence(vec![began()], vec![site("a", &steps)], faults));
            [verdict.longest_stall, verdict.longest_stall_cut].map(|stall| (stall * 1e3).round() / 1e3)
        };
        assert_eq!(stalls(Vec::new()), [5.0, 0.0]);
        assert_eq!(stalls(vec![fault(Kind::PauseSite, "a", 16.0, 19.0)]), [3.0, 0.0]);
        assert_eq!(stalls(vec![fault(Kind::CutSite, "a", 16.0, 19.0)]), [3.0, 5.0]);
        assert_eq!(stalls(vec![fault(Kind::CutSite, "b", 16.0, 19.0)]), [5.0, 0.0]);
    }

    #[test]
    fn a_killed_site_is_missed_then_trains_then_contributes() {
        let (a, b) = (("a", 1, 2, (0, 1)), ("b", 1, 2, (1, 2)));
        let entries = vec![
            began(),
            commit(11.0, 1, &[a, b]),
            commit(12.5, 2, &[a, b]),
            commit(14.0, 3, &[b]),
            commit(16.0, 4, &[("a", 1, 1, (0, 1)), b]),
            commit(18.0, 5, &[("a", 1, 3, (0, 1)), b]),
        ];
        let acts =
            [(Act::Step, 12.0), (Act::Write(0), 15.0), (Act::Step, 15.5), (Act::Read(0), 17.0), (Act::Step, 17.5)];
        let sites = vec![site("a", &acts), site("b", &[])];
        let mut evidence = evidence(entries, sites, vec![fault(Kind::KillSite, "a", 12.1, 14.5)]);
        evidence.gone = vec![(12.2, "hub".to_string(), "a".to_string())];
        let aftermath = judge(&evidence).aftermaths[0].clone();
        let rounded = |seconds: Option<f64>| (seconds.unwrap() * 1e3).round() / 1e3;
        assert_eq!(rounded(aftermath.detection), 0.1);
        assert_eq!(rounded(aftermath.commit), 1.9, "the commit at 12.5 still had its contribution");
        assert_eq!(rounded(aftermath.commit_after_detection), 1.8);
        assert_eq!(rounded(aftermath.rejoin), 0.97);
        assert_eq!(rounded(aftermath.rejoin_commit), 3.5, "the one at 16 set out from before");
        assert_eq!(aftermath.takeover, None);
    }

    #[test]
    fn a_site_that_was_cut_off_is_back_with_a_commit() {
        let b = ("b", 1, 0, (1, 2));
        let entries = vec![
            began(),
            commit(11.0, 1, &[b]),
            commit(13.0, 2, &[b]),
            commit(16.6, 3, &[b]),
            commit(18.5, 4, &[("a", 1, 3, (0, 1)), b]),
        ];
        let acts = [
            (Act::Step, 13.0),
            (Act::Write(0), 15.2),
            (Act::Step, 16.0),
            (Act::Write(0), 16.8),
            (Act::Step, 17.5),
            (Act::Read(0), 18.0),
            (Act::Step, 18.2),
        ];
        let mut evidence = evidence(entries, vec![site("a", &acts)], vec![fault(Kind::CutSite, "a", 12.0, 15.0)]);
        evidence.notes.seen = vec![Seen { at: 14.5, site: "a".to_string(), state: "silent".to_string() }];
        let aftermath = judge(&evidence).aftermaths[0].clone();
        assert_eq!(aftermath.detection, Some(2.5));
        assert!((aftermath.rejoin.unwrap() - 0.97).abs() < 1e-9, "the first write was of what the others had then");
        assert_eq!(aftermath.rejoin_commit, Some(3.5));
    }

    #[test]
    fn a_takeover_ends_with_a_commit_of_the_next_leader() {
        let contribution = [("a", 1, 0, (0, 1))];
        let leads = |at, epoch| (at, Entry::Leads { epoch, holder: Digest::of(b"a process") });
        let entries = vec![
            began(),
            leads(0.0, 1),
            commit(11.0, 1, &contribution),
            commit(12.1, 2, &contribution),
            leads(14.0, 2),
            commit(15.0, 3, &contribution),
        ];
        let faults = vec![fault(Kind::KillLeader, "hub", 12.0, 16.0)];
        let verdict = judge(&evidence(entries, vec![site("a", &[])], faults));
        assert_eq!(verdict.aftermaths[0].takeover, Some(3.0));
        assert_eq!(verdict.aftermaths[0].commit, None);
    }

    #[test]
    fn what_a_site_was_told_must_be_in_the_journal() {
        let entries = vec![began(), joined(1.0, "a", 7), commit(12.0, 1, &[("a", 1, 0, (0, 10))])];
        let told = |session, settled, fragments| Told { session, settled, fragments };
        let judged = |told| {
            let sites = vec![SiteEvidence { told: vec![told], ..site("a", &[]) }];
            let verdict = judge(&evidence(entries.clone(), sites, Vec::new()));
            (verdict.tokens_lost, verdict.commits_lost)
        };
        let (known, first) = (vec![(1, digest(1))], vec![(0, Digest::of(b"theta"))]);
        assert_eq!(judged(told(7, vec![(1, Settled::Committed(1))], known.clone())), (0.0, 0));
        assert_eq!(judged(told(7, vec![(2, Settled::Refused("x".to_string()))], first)), (0.0, 0));
        assert_eq!(judged(told(7, vec![(2, Settled::Committed(1))], known.clone())), (80.0, 0), "another contribution");
        assert_eq!(judged(told(8, vec![(1, Settled::Committed(1))], known)), (80.0, 0), "of another session");
        assert_eq!(judged(told(7, Vec::new(), vec![(2, digest(2))])), (0.0, 1), "a commit that is not there");
        assert_eq!(judged(told(7, Vec::new(), vec![(1, digest(2))])), (0.0, 1), "with another digest");
    }

    #[test]
    fn tokens_that_count_twice_are_lost_too() {
        let entries = vec![
            began(),
            joined(1.0, "a", 7),
            commit(12.0, 1, &[("a", 1, 0, (0, 10))]),
            commit(13.0, 2, &[("a", 2, 0, (6, 12))]),
        ];
        assert_eq!(judge(&evidence(entries, vec![site("a", &[])], Vec::new())).tokens_lost, 32.0);
    }

    #[test]
    fn a_session_more_than_processes_is_a_wiped_state() {
        let entries = vec![began(), joined(1.0, "a", 1), joined(15.0, "a", 2), joined(20.0, "a", 3)];
        let mut evidence = evidence(entries, vec![site("a", &[])], Vec::new());
        assert_eq!(judge(&evidence).states_wiped, 2);
        evidence.notes.starts.push(("a".to_string(), 14.0));
        assert_eq!(judge(&evidence).states_wiped, 1);
    }
}
