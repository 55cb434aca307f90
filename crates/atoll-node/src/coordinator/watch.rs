//! What the operator sees: who is here, what every round measured, and the files that tell of both. `status.json` and
//! `report.json` are the [`Report`]; `events.jsonl` has a line for everything that happens, one for each commit among
//! them. Nothing here decides anything.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use atoll_core::journal::Commit;
use atoll_core::manifest::FragmentId;
use atoll_core::outer::{Measures, Reason, Verdict};
use atoll_core::plan;
use atoll_core::round::{Coordinator, Merged, Status, Waiting};
use atoll_core::site::{SiteId, Time};
use atoll_core::wire::{Hello, Purpose};
use serde_json::json;

use crate::link::Traffic;
use crate::report::{FragmentReport, Report, SiteReport};
use crate::run::RunDir;

/// Weight of the newest value in what is smoothed over rounds.
const SHARE: f64 = 0.2;

/// The report and what it is made of.
pub(super) struct Watch {
    dir: RunDir,
    pub(super) report: Report,
    peers: BTreeMap<SiteId, Peer>,
    /// What the latest outer step of each fragment showed, until its commit is on disk.
    measured: BTreeMap<FragmentId, Measures>,
    events: fs::File,
}

/// What has been heard of a site.
#[derive(Default)]
struct Peer {
    /// What is told of it; counters of this session only, sums are made when it is looked at.
    seen: SiteReport,
    /// Of its living connections.
    traffic: Vec<(Purpose, Arc<Traffic>)>,
    /// Bytes over closed connections.
    sent_before: u64,
    received_before: u64,
    control_before: u64,
    steps_before: u64,
    session: u64,
    /// What the guard had against its latest contribution.
    reason: Option<Reason>,
    /// Whether the latest that it said of itself cannot be.
    nonsense: bool,
}

/// Letters of a name that a site gives its engine or device.
const NAME_MAX: usize = 60;

impl Watch {
    /// Goes on from what an earlier coordinator told.
    ///
    /// # Errors
    /// If `events.jsonl` cannot be written.
    pub(super) fn open(dir: &RunDir, run: String, listen: String, parameters: u64) -> Result<Self> {
        let old = Report::load(&dir.status()).ok();
        let peers = old.iter().flat_map(|report| &report.sites).filter_map(Peer::remembered).collect();
        let report = Report { run, listen: Some(listen), parameters, ..old.unwrap_or_default() };
        let events = fs::OpenOptions::new().create(true).append(true).open(dir.events());
        let events = events.with_context(|| format!("{} cannot be written", dir.events().display()))?;
        Ok(Self { dir: dir.clone(), report, peers, measured: BTreeMap::new(), events })
    }

    /// Adds a line to `events.jsonl`.
    pub(super) fn note(&mut self, now: Time, mut event: serde_json::Value) {
        event["at"] = (now.0 as f64 / 1e6).into();
        // At once: who follows the file is to see whole lines.
        if let Err(error) = self.events.write_all(format!("{event}\n").as_bytes()) {
            tracing::warn!("events.jsonl cannot be written: {error}");
        }
    }

    /// A connection of a site was let in.
    pub(super) fn greeted(&mut self, site: &SiteId, hello: &Hello, traffic: Arc<Traffic>) {
        let peer = self.peers.entry(site.clone()).or_default();
        peer.traffic.push((hello.purpose, traffic));
        if !hello.engine.is_empty() {
            (peer.seen.engine, peer.seen.device) = (shown(&hello.engine), shown(&hello.device));
        }
    }

    /// A status came.
    pub(super) fn heard(&mut self, site: &SiteId, status: &Status) {
        self.peers.entry(site.clone()).or_default().hear(status);
    }

    /// Notes whether what a site says of itself is nonsense; tells whether it has just become so.
    pub(super) fn is_new_nonsense(&mut self, site: &SiteId, nonsense: bool) -> bool {
        let peer = self.peers.entry(site.clone()).or_default();
        !std::mem::replace(&mut peer.nonsense, nonsense) && nonsense
    }

    /// A contribution was refused.
    pub(super) fn refused(&mut self, site: &SiteId, why: &str) {
        let seen = &mut self.peers.entry(site.clone()).or_default().seen;
        (seen.refused, seen.refusal) = (seen.refused + 1, why.to_string());
    }

    /// An outer step was computed.
    pub(super) fn merged(&mut self, merged: &Merged) {
        self.measured.insert(merged.fragment, merged.measures.clone());
    }

    /// A commit is on disk.
    pub(super) fn committed(&mut self, now: Time, commit: &Commit, machine: &Coordinator) {
        let measures = self.measured.remove(&commit.fragment).unwrap_or_default();
        let total: f64 = commit.contributions.iter().map(|accepted| accepted.weight).sum();
        let (mut sites, mut guarded) = (Vec::new(), Vec::new());
        for (index, accepted) in commit.contributions.iter().enumerate() {
            let staleness = commit.version - 1 - accepted.base.min(commit.version - 1);
            let of = |values: &[f64]| values.get(index).copied().unwrap_or(0.0);
            let (cosine, corrected) = (of(&measures.cosines), of(&measures.corrections));
            let bytes = measures.bytes.get(index).copied().unwrap_or(0);
            let verdict = measures.verdicts.get(index).copied().unwrap_or(Verdict::WHOLE);
            let peer = self.peers.entry(accepted.site.clone()).or_default();
            sites.push(json!({
                "site": accepted.site, "steps": accepted.steps, "tokens": accepted.tokens, "bytes": bytes,
                "weight": if total > 0.0 { accepted.weight / total } else { 0.0 }, "norm": accepted.norm,
                "staleness": staleness, "cosine": cosine, "corrected": corrected,
                "guard": verdict.factor(), "guarded_for": verdict.reason,
                "exposed_seconds": peer.seen.exposed_seconds, "hidden_seconds": peer.seen.hidden_seconds,
                "round_seconds": peer.seen.round_seconds,
                "round_seconds_expected": machine.forecast(&accepted.site).map(|forecast| forecast.turn),
                "codec": measures.codecs.get(index),
            }));
            peer.contributed(staleness, cosine, bytes);
            if peer.guarded(&verdict) {
                guarded.push((&accepted.site, verdict));
            }
        }
        let index = commit.fragment.index();
        self.report.fragments.resize_with(self.report.fragments.len().max(index + 1), FragmentReport::default);
        let fragment = &mut self.report.fragments[index];
        let since = commit.seconds - fragment.committed_at;
        *fragment = FragmentReport {
            version: commit.version,
            quorum: sites.len(),
            round_seconds: if fragment.version > 0 { since } else { 0.0 },
            committed_at: commit.seconds,
            norm: measures.norm,
            rho: measures.rho,
            effective_step: measures.effective_step,
            residual: measures.residual,
            bytes: commit.bytes,
        };
        let line = json!({
            "event": "commit", "fragment": commit.fragment, "version": commit.version, "quorum": sites.len(),
            "sites": sites, "bytes": commit.bytes, "codec": commit.recipe.codec, "digest": commit.digest,
            "seconds": commit.seconds, "round_seconds": fragment.round_seconds, "norm": measures.norm, "rho": measures.rho,
            "effective_step": measures.effective_step, "residual": measures.residual,
        });
        self.note(now, line);
        for (site, Verdict { weight, length, reason, .. }) in guarded {
            let why = reason.map_or_else(String::new, |reason| reason.to_string());
            tracing::warn!(
                "the guard counts {weight:.2} of the weight and {length:.2} of the length of what {site} sent: {why}"
            );
            let line = json!({
                "event": "guarded", "site": site, "fragment": commit.fragment, "version": commit.version,
                "why": reason, "weight": weight, "length": length,
            });
            self.note(now, line);
        }
    }

    /// Brings the report up to date. `connected` tells who has a control connection.
    pub(super) fn look(&mut self, now: Time, state: &str, machine: &Coordinator, connected: &dyn Fn(&SiteId) -> bool) {
        let live: BTreeMap<&SiteId, bool> = machine.sites(now).map(|(site, _, living)| (site, living)).collect();
        let book = machine.book();
        let sites = book.sites.iter().map(|(site, member)| {
            let mut seen = self.peers.get_mut(site).map(Peer::look).unwrap_or_default();
            (seen.name, seen.tokens, seen.contributions) = (site.to_string(), member.tokens, member.contributions);
            (seen.trust, seen.quality) = (member.trust, member.quality);
            seen.state = match (connected(site), live.get(site)) {
                _ if book.is_revoked(site) => "revoked",
                (false, _) => "away",
                (true, None) => "loading",
                (true, Some(true)) => "training",
                (true, Some(false)) => "silent",
            }
            .to_string();
            if let Some(forecast) = machine.forecast(site) {
                (seen.steps_per_round, seen.round_seconds_expected) = (forecast.steps, forecast.turn);
                seen.pace = forecast.to_string();
            }
            seen
        });
        let report = &mut self.report;
        report.sites = sites.collect();
        report.state = state.to_string();
        (report.tokens, report.commits, report.digest) = (book.tokens, book.commits(), book.digest());
        (report.seconds, report.progress) = (machine.seconds(), machine.progress());
        report.at = now.0 as f64 / 1e6;
        report.seconds_left =
            (report.progress > 0.01).then(|| report.seconds * (1.0 - report.progress) / report.progress);
        report.rounds = (0..book.fragments.len()).map(|index| wait_text(&machine.waiting(now, index), now)).collect();
        let seen = self.peers.values().filter(|peer| peer.seen.steps > 0);
        let losses: Vec<f64> = seen.map(|peer| peer.seen.loss).collect();
        if !losses.is_empty() {
            report.note_loss(losses.iter().sum::<f64>() / losses.len() as f64);
        }
    }

    /// Writes `status.json`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn write_status(&self) -> Result<()> {
        let new = self.dir.0.join(".status.json.new");
        let write =
            fs::write(&new, serde_json::to_vec(&self.report)?).and_then(|()| fs::rename(&new, self.dir.status()));
        write.with_context(|| format!("{} cannot be written\nhint: is the disk full?", self.dir.status().display()))
    }
}

impl Peer {
    /// What an earlier coordinator had counted.
    fn remembered(site: &SiteReport) -> Option<(SiteId, Peer)> {
        let peer = Peer {
            sent_before: site.bytes_sent,
            received_before: site.bytes_received,
            control_before: site.bytes_control,
            steps_before: site.steps,
            seen: SiteReport { steps: 0, ..site.clone() },
            ..Peer::default()
        };
        Some((site.name.parse().ok()?, peer))
    }

    fn hear(&mut self, status: &Status) {
        let (seen, vitals) = (&mut self.seen, &status.vitals);
        if self.session != status.session {
            (self.steps_before, seen.steps, self.session) = (self.steps_before + seen.steps, 0, status.session);
        }
        seen.steps = vitals.steps;
        seen.digest_mismatches = seen.digest_mismatches.max(vitals.digest_mismatches);
        if vitals.wall_seconds > 0.0 {
            seen.tokens_per_second = vitals.tokens as f64 / vitals.wall_seconds;
            seen.utilization = vitals.busy_seconds / vitals.wall_seconds;
        }
        if vitals.steps > 0 {
            seen.loss = vitals.loss;
        }
        (seen.exposed_seconds, seen.hidden_seconds) = (vitals.exposed_seconds, vitals.hidden_seconds);
        (seen.round_seconds, seen.agreement) = (vitals.round_seconds, vitals.agreement);
        (seen.payload_sent, seen.payload_received) = vitals.payload_bytes;
        (seen.up_mbit, seen.down_mbit) = (vitals.link.up * 8e-6, vitals.link.down * 8e-6);
        seen.rtt_seconds = vitals.link.rtt;
    }

    /// A contribution of this site is in the model.
    fn contributed(&mut self, staleness: u64, cosine: f64, bytes: u64) {
        let seen = &mut self.seen;
        seen.staleness += SHARE * (staleness as f64 - seen.staleness);
        seen.cosine = plan::smooth(seen.cosine, cosine, SHARE);
        seen.contribution_bytes = bytes;
    }

    /// The guard has looked at a contribution; tells whether it has something new against this site.
    fn guarded(&mut self, verdict: &Verdict) -> bool {
        let seen = &mut self.seen;
        seen.guard_factor = verdict.factor();
        let reason = verdict.reason.filter(|&reason| reason > Reason::Heavy);
        seen.guarded += u64::from(reason.is_some());
        if let Some(reason) = reason {
            seen.guarded_for = reason.to_string();
        }
        std::mem::replace(&mut self.reason, reason) != reason && reason.is_some()
    }

    fn look(&mut self) -> SiteReport {
        // What the coordinator receives is what the site sends. Closed connections are summed up.
        let (mut sent, mut received, mut control) = (self.sent_before, self.received_before, self.control_before);
        self.traffic.retain(|(purpose, traffic)| {
            let closed = Arc::strong_count(traffic) == 1;
            let (out, back) = (traffic.received.load(Ordering::Relaxed), traffic.sent.load(Ordering::Relaxed));
            let both = if *purpose == Purpose::Control { out + back } else { 0 };
            (sent, received, control) = (sent + out, received + back, control + both);
            if closed {
                self.sent_before += out;
                self.received_before += back;
                self.control_before += both;
            }
            !closed
        });
        let steps = self.steps_before + self.seen.steps;
        SiteReport { steps, bytes_sent: sent, bytes_received: received, bytes_control: control, ..self.seen.clone() }
    }
}

/// A name from outside, as a terminal can show it.
fn shown(name: &str) -> String {
    name.chars().filter(|letter| !letter.is_control()).take(NAME_MAX).collect()
}

fn wait_text(waiting: &Waiting, now: Time) -> String {
    match waiting {
        Waiting::Contributions => "waits for contributions".to_string(),
        Waiting::Quorum { here, needed } => format!("waits for a quorum: {here} of {needed} sites"),
        Waiting::Grace { until, missing } => {
            let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
            format!("gives {} another {:.1} s", names.join(", "), until.seconds_since(now))
        }
        Waiting::Merge => "is being merged".to_string(),
    }
}
