//! The coordinator's machine. For each fragment one round is always open; contributions gather in it
//! until a quorum and a grace window have passed, then it is merged and becomes a commit. A
//! contribution that comes too late is simply early for the next round.

mod census;
mod members;
mod pace;
mod receipts;
mod weights;

use std::collections::{BTreeMap, VecDeque};

use crate::codec::{Payload, Squares};
use crate::hash::Digest;
use crate::journal::{Accepted, Act, Book, Commit, Entry, Evaluated, Trial};
use crate::manifest::FragmentId;
use crate::outer::{Found, Measures, Recipe, guard};
use crate::plan::{self, Bound, Codecs, Link, Load, Rung};
use crate::round::{Absent, Goal, Phase, Receipt, Standing, Status, Sync};
use crate::site::{SiteId, Time};
use crate::team::Team;
use census::Census;
pub use members::Refusal;
use pace::Lead;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A status came from a site, over a connection authenticated as that site's.
    Heard(SiteId, Box<Status>),
    /// The last connection of a site ended.
    Gone(SiteId),
    /// All bytes of a site's payload are here, and this is what they are.
    Arrived(SiteId, Digest, Seen),
    /// A site's payload is here in full and is useless.
    Useless(SiteId, Digest, String),
    /// The operator wants something done about members, or this administrator does.
    Acted(Act, Option<SiteId>),
    /// A site that has the first of these keys wants the second in its place.
    Rekeyed(SiteId, Digest, Digest),
    /// A merge that was ordered is done.
    Merged(Merged),
    /// Contributions to a commit were tried on held-out text.
    Tried(Tried),
    /// A merge that was ordered failed on this payload.
    Unmergeable(FragmentId, Digest, String),
    /// Time has passed.
    Tick,
}

/// What the coordinator saw in a payload, whatever its site says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Weights that it is for.
    pub weights: usize,
    /// Euclidean length of what it says.
    pub norm: f64,
    /// The same chunk by chunk, for whoever merges it.
    pub squares: Squares,
}

impl Seen {
    /// Looks at a checked payload.
    pub fn of(payload: &Payload<'_>, team: &dyn Team) -> Self {
        let squares = Squares::of(payload, team);
        Self { weights: payload.count(), norm: squares.norm(), squares }
    }
}

/// What to do about it, in this order. Entries must be durable before anything after them is done.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// Append to the journal.
    Record(Entry),
    /// Send a site where the run stands.
    Tell(SiteId, Box<Standing>),
    /// Compute an outer step.
    Merge(Merge),
    /// Send a site this payload of a commit without being asked.
    Push(SiteId, Digest),
    /// This payload is not needed any more.
    Forget(Digest),
    /// The machine contradicts itself: stop before anything false is told. A restart takes the run up
    /// where the journal says it is.
    Halt(String),
}

/// An outer step to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct Merge {
    /// The fragment.
    pub fragment: FragmentId,
    /// The version that it will have.
    pub version: u64,
    /// What to merge, in this order.
    pub contributions: Vec<Accepted>,
    /// What was seen of each contribution's length when it came.
    pub squares: Vec<Squares>,
    /// How.
    pub recipe: Recipe,
}

/// A computed outer step.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// The fragment.
    pub fragment: FragmentId,
    /// Content address of the payload to broadcast.
    pub delta: Digest,
    /// Its bytes.
    pub bytes: u64,
    /// Digest of the fragment after the step.
    pub digest: Digest,
    /// What was seen on the way.
    pub measures: Measures,
}

/// What each contribution to a commit alone makes of the loss on text that nobody trains on.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    /// The fragment.
    pub fragment: FragmentId,
    /// The version that was being made.
    pub version: u64,
    /// Nats per token of the model without any of them.
    pub before: f64,
    /// With each one alone, and the inner steps in it.
    pub after: Vec<(SiteId, f64, u64)>,
}

/// The arithmetic behind a site's number of steps and its codecs, in seconds for one round of all fragments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Inner steps between two contributions of a fragment.
    pub steps: u32,
    /// Why these, or as many of them as this site takes while the fastest takes all.
    pub bound: Bound,
    /// Seconds that these take.
    pub computing: f64,
    /// How weights are written on the way up and down.
    pub codecs: Codecs,
    /// What is moved meanwhile.
    pub load: Load,
    /// Over what.
    pub link: Link,
    /// Seconds that the site sends.
    pub sending: f64,
    /// Seconds that it receives.
    pub receiving: f64,
    /// Seconds from a contribution of one fragment to its commit being applied, as expected.
    pub turn: f64,
}

/// Why a round is not merged yet.
#[derive(Debug, Clone, PartialEq)]
pub enum Waiting {
    /// Nobody has sent anything.
    Contributions,
    /// Too few sites have contributed.
    Quorum {
        /// Sites whose contribution is here.
        here: usize,
        /// Sites needed.
        needed: usize,
    },
    /// The quorum is there; these sites are expected by that moment.
    Grace {
        /// The end of the grace window.
        until: Time,
        /// Who may still make it.
        missing: Vec<SiteId>,
    },
    /// The outer step is being computed.
    Merge,
}

/// The coordinator.
#[derive(Debug)]
pub struct Coordinator {
    sync: Sync,
    goal: Goal,
    book: Book,
    /// Weights of each fragment.
    lens: Vec<usize>,
    views: BTreeMap<SiteId, View>,
    rounds: Vec<Round>,
    /// Payloads that are here and decode.
    arrived: BTreeMap<Digest, Seen>,
    /// Payloads that came before the contributions they belong to, by site and oldest first; with the reason those that
    /// are useless.
    early: BTreeMap<SiteId, VecDeque<(Digest, Option<String>)>>,
    phase: Phase,
    /// Seconds during which at least one site was training.
    seconds: f64,
    /// When [`Coordinator::advance`] last ran; none in this process.
    advanced: Option<Time>,
    /// Number of the last standing.
    number: u64,
    closing_since: Option<Time>,
    /// The first moment this coordinator saw.
    started: Option<Time>,
    evaluation: Evaluation,
    pace: Pace,
    /// Codecs to choose from.
    ladder: Vec<Rung>,
    lead: Lead,
    census: Census,
    /// When it was last looked who has been away for long.
    swept: Option<Time>,
}

/// What is known about a site only while the coordinator lives.
#[derive(Debug)]
struct View {
    status: Status,
    connected: bool,
    heard: Time,
    /// Smoothed seconds between two statuses.
    interval: f64,
    /// When its step count last grew.
    progressed: Time,
    /// For each fragment the latest version that is sent to it over its present connection unasked.
    pushed: Vec<u64>,
}

#[derive(Debug, Default)]
struct Round {
    pending: BTreeMap<(SiteId, u64), Receipt>,
    first: Option<Time>,
    quorum_since: Option<Time>,
    merging: Option<Merge>,
    closed: Option<Time>,
}

#[derive(Debug, Default)]
struct Evaluation {
    request: u64,
    asked: Option<(SiteId, u64)>,
    asked_at: Time,
    last_seconds: Option<f64>,
    /// Seconds that the last look took.
    took: f64,
    /// The look at the finished model: asked for, then answered.
    last_look: Option<bool>,
}

/// Smoothed seconds that parts of a round take.
#[derive(Debug, Default)]
struct Pace {
    quorum: f64,
    merge: f64,
}

/// Between two looks at the held-out loss lies so many times what one takes.
const LOOKS_APART: f64 = 10.0;
/// A site is sent commits unasked as long as it has not more than this many of a fragment before it.
const PUSHED_AHEAD: u64 = 2;
/// Commits of a fragment that one standing speaks of, beside the newest.
const NOTICES: u64 = 8;
/// A site that has been away for this many of its own rounds gives back its leases.
const ROUNDS_AWAY: f64 = 20.0;
/// … but not before this many seconds.
pub(super) const SECONDS_AWAY: f64 = 30.0;
/// Reports are followed by a look at who has been away only after this many seconds: each has a look at every site.
const SWEEP_SECONDS: f64 = 0.5;
/// A site is silent after this many of its own reporting intervals.
const INTERVALS_SILENT: f64 = 6.0;
/// A site is stalled after this many of its own step times without a step.
const STEPS_STALLED: f64 = 20.0;

impl Coordinator {
    /// Takes up a run where `book` says it is. `lens` are the weights of each fragment.
    pub fn new(sync: Sync, goal: Goal, book: Book, lens: Vec<usize>) -> Self {
        let rounds = book.fragments.iter().map(|_| Round::default()).collect();
        let phase = if book.finished { Phase::Finished } else { Phase::Training };
        let seconds = book.seconds;
        let mut machine = Self {
            ladder: pace::ladder(&sync, &lens),
            sync,
            goal,
            book,
            lens,
            views: BTreeMap::new(),
            rounds,
            arrived: BTreeMap::new(),
            early: BTreeMap::new(),
            phase,
            seconds,
            advanced: None,
            number: 0,
            closing_since: None,
            started: None,
            evaluation: Evaluation::default(),
            pace: Pace::default(),
            lead: Lead::NONE,
            census: Census::default(),
            swept: None,
        };
        machine.look_who_leads();
        machine
    }

    /// The lasting state.
    pub fn book(&self) -> &Book {
        &self.book
    }

    /// What the run is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Takes in what happened and says what to do.
    pub fn handle(&mut self, now: Time, event: Event) -> Vec<Order> {
        let mut orders = Vec::new();
        let is_report = matches!(event, Event::Heard(..));
        match event {
            Event::Heard(site, status) => self.hear(now, &site, *status, &mut orders),
            Event::Gone(site) => {
                if let Some(view) = self.views.get_mut(&site) {
                    (view.connected, view.pushed) = (false, Vec::new());
                }
                self.evaluation.asked.take_if(|(asked, _)| *asked == site);
                self.look_who_is_there();
            }
            Event::Arrived(site, payload, seen) => self.arrive(&site, payload, seen, &mut orders),
            Event::Useless(site, payload, why) => self.arrive_useless(&site, payload, why, &mut orders),
            Event::Acted(act, by) => self.act(act, by, &mut orders),
            Event::Rekeyed(site, from, to) => self.rekey(&site, from, to, &mut orders),
            Event::Merged(merged) => self.commit(now, &merged, &mut orders),
            Event::Tried(tried) => self.note_trial(&tried, &mut orders),
            Event::Unmergeable(fragment, payload, why) => self.give_up_merge(fragment, payload, &why, &mut orders),
            Event::Tick => {}
        }
        self.advance(now, is_report, &mut orders);
        orders
    }

    /// When [`Event::Tick`] should come even if nothing else happens, and what for.
    pub fn wake_at(&self, now: Time) -> (Time, &'static str) {
        let graces = (0..self.rounds.len()).filter_map(|index| match self.waiting(now, index) {
            Waiting::Grace { until, .. } => Some(until),
            _ => None,
        });
        match graces.min() {
            Some(until) if until < now.after(1.0) => (until.max(now), "a grace window ends"),
            _ => (now.after(1.0), "look for silent sites"),
        }
    }

    /// Why the round of fragment number `index` is not merged yet.
    pub fn waiting(&self, now: Time, index: usize) -> Waiting {
        let round = &self.rounds[index];
        if round.merging.is_some() {
            return Waiting::Merge;
        }
        let here = self.contributors(round);
        if here.is_empty() {
            return Waiting::Contributions;
        }
        let needed = self.quorum(self.count_awaited(now));
        if here.len() < needed {
            return Waiting::Quorum { here: here.len(), needed };
        }
        let awaited = self.awaited(now);
        let end = round.quorum_since.unwrap_or(now).after(self.grace(&awaited));
        let missing = awaited.into_iter().filter(|site| here.binary_search(&site).is_err());
        let expected = missing.filter_map(|site| Some((self.expected(&site, index)?, site)));
        let in_time = expected.filter(|((at, given_up), _)| *at <= end && *given_up > now);
        let (missing, times): (Vec<SiteId>, Vec<Time>) = in_time.map(|((_, given_up), site)| (site, given_up)).unzip();
        Waiting::Grace { until: times.into_iter().max().unwrap_or(now), missing }
    }

    /// The latest status of each site and whether it is living, for the operator.
    pub fn sites(&self, now: Time) -> impl Iterator<Item = (&SiteId, &Status, bool)> {
        self.views.iter().map(move |(site, view)| (site, &view.status, view.is_live(now)))
    }

    /// Seconds of training so far.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// How far the run has come towards its goal, 0 to 1.
    pub fn progress(&self) -> f64 {
        let by_tokens = self.goal.tokens.map(|goal| self.book.tokens as f64 / goal.max(1) as f64);
        let by_time = self.goal.minutes.map(|minutes| self.seconds / (minutes * 60.0).max(1e-9));
        by_tokens.unwrap_or(0.0).max(by_time.unwrap_or(0.0)).clamp(0.0, 1.0)
    }

    fn record(&mut self, entry: Entry, orders: &mut Vec<Order>) -> bool {
        if !matches!(entry, Entry::Leased { .. }) {
            self.census.forget();
        }
        match self.book.apply(&entry) {
            Ok(()) => orders.push(Order::Record(entry)),
            Err(error) => {
                orders.push(Order::Halt(format!("an entry does not follow from the journal: {error}")));
                return false;
            }
        }
        true
    }

    // ---- a status comes in ----

    fn hear(&mut self, now: Time, site: &SiteId, status: Status, orders: &mut Vec<Order>) {
        let Some(member) = self.book.sites.get(site).filter(|_| !self.book.is_revoked(site)) else { return };
        if !status.vitals.are_sane() {
            return; // Nothing can be planned on these; a site that says so is as good as silent.
        }
        if status.session < member.session || (status.session == member.session && !member.open) {
            let standing = self.standing(site, &status);
            orders.push(Order::Tell(site.clone(), Box::new(standing)));
            return;
        }
        if status.session > member.session {
            if self.is_merging(site) {
                return; // What is being merged must be booked to the old session; the site will ask again.
            }
            self.join(site, &status, orders);
        }
        let old = self.views.get(site).filter(|view| view.status.session == status.session);
        if old.is_some_and(|view| view.status.number > status.number) {
            return;
        }
        let leaving = status.leaving;
        self.register(site, &status, orders);
        self.note_evaluation(now, site, &status, orders);
        self.view(now, site, status);
        if leaving {
            self.give_back(site, "the site left", orders);
        } else if self.phase == Phase::Training {
            self.lease(site, orders);
        }
        self.tell(now, site, orders);
    }

    fn join(&mut self, site: &SiteId, status: &Status, orders: &mut Vec<Order>) {
        self.drop_pending(site, orders);
        let (session, dataset, samples) = (status.session, status.dataset, status.samples);
        self.record(Entry::Joined { site: site.clone(), session, dataset, samples }, orders);
        self.evaluation.asked.take_if(|(asked, _)| asked == site);
        self.views.remove(site);
        self.look_who_is_there();
    }

    fn view(&mut self, now: Time, site: &SiteId, status: Status) {
        let Some(view) = self.views.get(site) else {
            let pushed = Vec::new();
            let view = View { status, connected: true, heard: now, interval: 0.0, progressed: now, pushed };
            self.views.insert(site.clone(), view);
            self.look_who_is_there();
            return;
        };
        let footing = view.connected.then(|| self.footing(view));
        let was_awaited = self.is_awaited(now, site, view);
        let Some(view) = self.views.get_mut(site) else { return };
        view.interval = plan::smooth(view.interval, now.seconds_since(view.heard), 0.2);
        if status.vitals.steps > view.status.vitals.steps {
            view.progressed = now;
        }
        (view.heard, view.connected, view.status) = (now, true, status);
        self.look_again(now, site, was_awaited, footing);
    }

    /// Whether a contribution of `site` is in an outer step that is being computed.
    fn is_merging(&self, site: &SiteId) -> bool {
        let merges = self.rounds.iter().filter_map(|round| round.merging.as_ref());
        merges.flat_map(|merge| &merge.contributions).any(|accepted| &accepted.site == site)
    }

    fn lease(&mut self, site: &SiteId, orders: &mut Vec<Order>) {
        let (Some(view), Some(member)) = (self.views.get(site), self.book.sites.get(site)) else { return };
        let last = member.leases.last_key_value().map_or(0, |(number, _)| *number);
        let status = &view.status;
        // One unconfirmed lease at a time, so that the loss of messages never makes leases pile up.
        // And none before half is spent, so that leases stay few.
        if status.leases_seen < last || status.unspent >= status.wants / 2 {
            return;
        }
        let Some(dataset) = member.dataset else { return };
        let count = (status.wants - status.unspent).min(1 << 32);
        let ranges = self.book.ledger.offer(dataset, count);
        self.record(Entry::Leased { site: site.clone(), number: last + 1, ranges }, orders);
    }

    fn give_back(&mut self, site: &SiteId, why: &str, orders: &mut Vec<Order>) {
        if self.is_merging(site) {
            return; // Tried again with the next tick.
        }
        self.drop_pending(site, orders);
        self.record(Entry::Returned { site: site.clone(), why: why.to_string() }, orders);
        self.views.remove(site);
        self.look_who_is_there();
    }

    fn note_evaluation(&mut self, now: Time, site: &SiteId, status: &Status, orders: &mut Vec<Order>) {
        let Some((request, evaluated)) = status.evaluation else { return };
        if self.evaluation.asked == Some((site.clone(), request)) {
            self.evaluation.asked = None;
            self.evaluation.last_seconds = Some(self.seconds);
            self.evaluation.took = now.seconds_since(self.evaluation.asked_at);
            self.evaluation.last_look = self.evaluation.last_look.map(|_| true);
            if evaluated_is_sane(&evaluated) {
                self.record(Entry::Evaluated(evaluated), orders);
            }
        }
    }

    // ---- rounds ----

    /// Does whatever time or the latest event has made possible.
    fn advance(&mut self, now: Time, is_report: bool, orders: &mut Vec<Order>) {
        if self.views.values().any(|view| view.is_live(now) && view.status.vitals.steps > 0) {
            self.seconds += self.advanced.map_or(0.0, |before| now.seconds_since(before));
        }
        self.advanced = Some(now);
        if self.phase == Phase::Finished {
            return;
        }
        self.reset_empty_rounds();
        self.return_leases_of_the_revoked(orders);
        if !is_report || self.swept.is_none_or(|swept| now.seconds_since(swept) >= SWEEP_SECONDS) {
            self.swept = Some(now);
            self.return_leases_of_the_lost(now, orders);
        }
        self.keep_count(now);
        let awaited = self.count_awaited(now);
        for index in 0..self.rounds.len() {
            self.advance_round(now, index, awaited, orders);
        }
        self.advance_phase(now, orders);
    }

    /// A round whose contributions were all withdrawn begins anew.
    fn reset_empty_rounds(&mut self) {
        for round in self.rounds.iter_mut().filter(|round| round.pending.is_empty() && round.merging.is_none()) {
            (round.first, round.quorum_since) = (None, None);
        }
    }

    fn advance_round(&mut self, now: Time, index: usize, awaited: usize, orders: &mut Vec<Order>) {
        let here = self.contributors(&self.rounds[index]).len();
        let needed = self.quorum(awaited);
        let round = &mut self.rounds[index];
        if round.merging.is_some() {
            return;
        }
        if here > 0 {
            round.first.get_or_insert(now);
        }
        if here >= needed && round.quorum_since.is_none() {
            round.quorum_since = Some(now);
            let took = round.first.map_or(0.0, |first| now.seconds_since(first));
            self.pace.quorum = plan::smooth(self.pace.quorum, took, 0.2);
        }
        if let Waiting::Grace { until, missing } = self.waiting(now, index)
            && (missing.is_empty() || now >= until)
        {
            let merge = self.close(index);
            self.rounds[index].closed = Some(now);
            orders.push(Order::Merge(merge));
        }
    }

    /// Closes the round: what has arrived is merged, the rest stays pending for the next one.
    fn close(&mut self, index: usize) -> Merge {
        let fragment = FragmentId(index as u16);
        let version = self.book.fragments[index].version + 1;
        let pending = self.rounds[index].pending.iter();
        let mut contributions: Vec<Accepted> = pending
            .filter_map(|((site, number), receipt)| {
                let seen = self.arrived.get(&receipt.payload)?;
                let (trust, quality) =
                    self.book.sites.get(site).map_or((0.0, 0.0), |member| (member.trust, member.quality));
                Some(Accepted { trust, quality, ..weights::accept(site, *number, receipt, seen.norm, version) })
            })
            .collect();
        let share = match self.sync.absent {
            Absent::Ignore => 1.0,
            Absent::Reserve => self.reserve(index, &mut contributions),
        };
        let recipe = self.sync.recipe(self.down(), share, self.guard(index));
        let seen = |accepted: &Accepted| self.arrived.get(&accepted.payload).map(|seen| seen.squares.clone());
        let squares = contributions.iter().map(|accepted| seen(accepted).unwrap_or_default()).collect();
        let merge = Merge { fragment, version, contributions, squares, recipe };
        self.rounds[index].merging = Some(merge.clone());
        merge
    }

    fn commit(&mut self, now: Time, merged: &Merged, orders: &mut Vec<Order>) {
        let index = merged.fragment.index();
        let Some(merge) = self.rounds.get_mut(index).and_then(|round| round.merging.take()) else { return };
        let round = &mut self.rounds[index];
        let took = round.closed.map_or(0.0, |closed| now.seconds_since(closed));
        (round.first, round.quorum_since) = (None, None);
        self.pace.merge = plan::smooth(self.pace.merge, took, 0.2);
        self.look_who_leads();
        let round = &mut self.rounds[index];
        let payloads: Vec<Digest> = merge.contributions.iter().map(|accepted| accepted.payload).collect();
        merge.contributions.iter().for_each(|accepted| {
            round.pending.remove(&(accepted.site.clone(), accepted.number));
        });
        let commit = Commit {
            fragment: merge.fragment,
            version: merge.version,
            contributions: merge.contributions,
            recipe: merge.recipe,
            delta: merged.delta,
            bytes: merged.bytes,
            digest: merged.digest,
            agreements: merged.measures.verdicts.iter().map(|verdict| verdict.agreement).collect(),
            seconds: self.seconds,
        };
        if self.record(Entry::Committed(commit), orders) {
            payloads.into_iter().for_each(|payload| self.forget(payload, orders));
        }
        let connected: Vec<SiteId> =
            self.views.iter().filter(|(_, view)| view.connected).map(|(site, _)| site.clone()).collect();
        for site in &connected {
            self.push(site, index, merge.version, merged.delta, orders);
            self.tell(now, site, orders);
        }
    }

    fn note_trial(&mut self, tried: &Tried, orders: &mut Vec<Order>) {
        let quality = |site: &SiteId| self.book.sites.get(site).map_or(0.0, |member| member.quality);
        let alone = |(site, nats, steps): &(SiteId, f64, u64)| guard::Alone {
            nats: *nats,
            steps: *steps,
            quality: quality(site),
        };
        let all: Vec<guard::Alone> = tried.after.iter().map(alone).collect();
        let trials = tried.after.iter().zip(guard::help(tried.before, &all));
        let trials =
            trials.map(|((site, after, _), help)| Trial { site: site.clone(), after: guard::as_loss(*after), help });
        let contributions: Vec<Trial> = trials.filter(|trial| self.book.sites.contains_key(&trial.site)).collect();
        if tried.before.is_finite() && !contributions.is_empty() {
            let &Tried { fragment, version, before, .. } = tried;
            self.record(Entry::Tried { fragment, version, before, contributions }, orders);
        }
    }

    /// Sends a commit to a site before it asks, if it is about to need it.
    fn push(&mut self, site: &SiteId, index: usize, version: u64, delta: Digest, orders: &mut Vec<Order>) {
        let count = self.rounds.len();
        let Some(view) = self.views.get_mut(site) else { return };
        let Some((held, _)) = view.status.fragments.get(index).copied().flatten() else { return };
        view.pushed.resize(count, 0);
        let follows = held + 1 == version || view.pushed[index] + 1 == version;
        if follows && held + PUSHED_AHEAD >= version {
            view.pushed[index] = version;
            orders.push(Order::Push(site.clone(), delta));
        }
    }

    /// Sites with a contribution in `round` that could be merged now, ascending.
    fn contributors<'r>(&self, round: &'r Round) -> Vec<&'r SiteId> {
        let arrived = round.pending.iter().filter(|(_, receipt)| self.arrived.contains_key(&receipt.payload));
        let mut sites: Vec<&SiteId> = arrived.map(|((site, _), _)| site).collect();
        sites.dedup();
        sites
    }

    fn quorum(&self, live: usize) -> usize {
        let wished = match (self.phase, self.sync.quorum) {
            // At the end not every site has something left for every fragment.
            (Phase::Closing, _) => 1,
            (_, 0) => live / 2 + 1,
            (_, wished) => wished,
        };
        wished.clamp(1, live.max(1))
    }

    fn return_leases_of_the_lost(&mut self, now: Time, orders: &mut Vec<Order>) {
        let started = *self.started.get_or_insert(now);
        let is_patience_over = |site: &SiteId, view: &View| {
            let patience = (ROUNDS_AWAY * self.round_seconds(site).unwrap_or(0.0)).max(SECONDS_AWAY);
            now.seconds_since(view.heard) > patience
        };
        // Asked of every site, and often, so the cheap question comes first.
        let away =
            |site: &SiteId, view: &View| view.status.leaving || (!view.is_live(now) && is_patience_over(site, view));
        let seen = self.views.iter().filter(|(site, view)| away(site, view)).map(|(site, _)| site);
        // A site that died while no coordinator lived was never seen by this one.
        let silent = now.seconds_since(started) > SECONDS_AWAY;
        let members = self.book.sites.iter().filter(|_| silent);
        let open = members.filter(|(site, member)| member.open && !self.views.contains_key(site));
        let unseen = open.map(|(site, _)| site);
        let lost: Vec<SiteId> = seen.chain(unseen).cloned().collect();
        lost.iter().for_each(|site| self.give_back(site, "the site has been away for long", orders));
    }

    fn advance_phase(&mut self, now: Time, orders: &mut Vec<Order>) {
        if self.phase == Phase::Training && self.progress() >= 1.0 {
            (self.phase, self.closing_since) = (Phase::Closing, Some(now));
            self.tell_all(now, orders);
        }
        if self.phase != Phase::Closing {
            return;
        }
        let live = self.live(now);
        let merging = self.rounds.iter().any(|round| round.merging.is_some());
        let pending = self.rounds.iter().any(|round| !round.pending.is_empty());
        let drained = live.iter().all(|site| self.views.get(site).is_some_and(|view| view.status.drained));
        let patience =
            self.awaited(now).iter().filter_map(|site| self.round_seconds(site)).fold(SECONDS_AWAY, f64::max);
        let late = self.closing_since.is_some_and(|since| now.seconds_since(since) > patience);
        let quiet = !live.is_empty() && drained && !pending && !merging;
        if quiet && self.evaluation.last_look.is_none() {
            // All is in the model: one more look at it, then the run is finished.
            (self.evaluation.last_look, self.evaluation.last_seconds) = (Some(false), None);
            self.evaluation.asked = None;
            self.tell_all(now, orders);
        }
        if (quiet && self.evaluation.last_look == Some(true)) || (late && !merging) {
            self.record(Entry::Finished, orders);
            self.phase = Phase::Finished;
            self.tell_all(now, orders);
        }
    }

    // ---- what sites are told ----

    fn tell_all(&mut self, now: Time, orders: &mut Vec<Order>) {
        let sites: Vec<SiteId> = self.views.keys().cloned().collect();
        sites.iter().for_each(|site| self.tell(now, site, orders));
    }

    fn tell(&mut self, now: Time, site: &SiteId, orders: &mut Vec<Order>) {
        self.ask_for_evaluation(now, site);
        let Some(status) = self.views.get(site).map(|view| view.status.clone()) else { return };
        let standing = self.standing(site, &status);
        orders.push(Order::Tell(site.clone(), Box::new(standing)));
    }

    /// One site at a time looks at the held-out loss: the first that asks when it is due.
    fn ask_for_evaluation(&mut self, now: Time, site: &SiteId) {
        // Whoever looks takes no steps: that is not to be often, and it need not be live to be waited for.
        let pause = self.sync.evaluate_seconds.max(LOOKS_APART * self.evaluation.took);
        let due = self.evaluation.last_seconds.is_none_or(|last| self.seconds >= last + pause);
        let is_heard = |(asked, _): &(SiteId, u64)| self.views.get(asked).is_some_and(|view| view.is_heard(now));
        let is_asked = self.evaluation.asked.as_ref().is_some_and(is_heard);
        let is_fast = self.steps_for(site) >= self.lead.steps;
        let wanted = self.phase == Phase::Training || self.evaluation.last_look == Some(false);
        if wanted && due && !is_asked && is_fast && self.views.contains_key(site) {
            // Another one after each restart, so that no site takes it for an old one.
            self.evaluation.request = now.0.max(self.evaluation.request + 1);
            self.evaluation.asked = Some((site.clone(), self.evaluation.request));
            self.evaluation.asked_at = now;
        }
    }

    fn standing(&mut self, site: &SiteId, status: &Status) -> Standing {
        self.number += 1;
        let member = self.book.sites.get(site);
        let session = member.map_or(0, |member| member.session);
        let open = member.is_some_and(|member| member.open) && session == status.session;
        let fragments = &self.book.fragments;
        let is_news = |index: usize, newest: u64, version: u64| {
            let held = status.fragments.get(index).copied().flatten();
            let next = held.is_some_and(|(held, _)| version > held && version - held <= NOTICES);
            next || (version == newest && held.is_none_or(|(held, _)| version > held))
        };
        let outcome = |receipt: &Receipt| {
            let settled = member.filter(|_| !self.is_pending(site, receipt.number))?.outcome(receipt.number);
            settled.map(|settled| (receipt.number, settled))
        };
        let is_wanted = |receipt: &&Receipt| outcome(receipt).is_none() && !self.arrived.contains_key(&receipt.payload);
        let evaluate = self.evaluation.asked.as_ref().filter(|(asked, _)| asked == site).map(|(_, request)| *request);
        Standing {
            number: self.number,
            session,
            open,
            heard: status.number,
            phase: self.phase,
            progress: self.progress() as f32,
            steps: self.steps_for(site),
            up: self.up(site),
            pushed: self.views.get(site).map_or_else(Vec::new, |view| view.pushed.clone()),
            fragments: fragments.iter().map(|fragment| (fragment.version, fragment.digest)).collect(),
            notices: fragments
                .iter()
                .enumerate()
                .flat_map(|(index, fragment)| {
                    fragment.tail.iter().filter(move |n| is_news(index, fragment.version, n.version))
                })
                .cloned()
                .collect(),
            settled: status.outstanding.iter().filter_map(outcome).collect(),
            wanted: status.outstanding.iter().filter(is_wanted).map(|receipt| receipt.number).collect(),
            leases: member.map_or_else(Vec::new, |member| {
                let unseen = member.leases.range(status.leases_seen.saturating_add(1)..);
                unseen.map(|(number, ranges)| (*number, ranges.clone())).collect()
            }),
            evaluate,
            delivered: if status.fragments.iter().all(Option::is_none) {
                fragments.iter().map(|fragment| fragment.delivered.get(site).copied()).collect()
            } else {
                Vec::new()
            },
            successor: self.book.successor,
        }
    }
}

impl Merge {
    /// What an outer step is told of a contribution's payload, of which these are the bytes.
    pub fn found(&self, payload: Digest, bytes: Vec<u8>) -> Found {
        let index = self.contributions.iter().position(|accepted| accepted.payload == payload);
        let squares = index.and_then(|index| self.squares.get(index)).cloned().unwrap_or_default();
        Found { bytes, squares }
    }

    fn holds(&self, (site, number): &(SiteId, u64)) -> bool {
        self.contributions.iter().any(|accepted| accepted.site == *site && accepted.number == *number)
    }
}

impl View {
    fn step_seconds(&self) -> f64 {
        self.status.vitals.step_seconds
    }

    /// How long a round should last at least for the site's own part in it to be small, and which part that is.
    fn least_seconds(&self) -> (f64, Bound) {
        plan::least_seconds(self.status.vitals.coding_seconds, self.status.vitals.copying_seconds)
    }

    /// Connected, heard of lately, and taking steps: nobody waits for a site that is not.
    fn is_live(&self, now: Time) -> bool {
        self.live_until().is_some_and(|until| now <= until)
    }

    /// How long it counts as living if nothing more is heard of it; none if it does not.
    fn live_until(&self) -> Option<Time> {
        let Status { vitals, fragments, drained, .. } = &self.status;
        // Whoever has not finished a first step cannot be waited for.
        let stalled =
            (vitals.step_seconds > 0.0).then(|| self.progressed.after((STEPS_STALLED * vitals.step_seconds).max(5.0)));
        let moves = if *drained && vitals.steps > 0 { Some(self.heard_until()) } else { stalled };
        let is_whole = fragments.iter().all(Option::is_some);
        moves.filter(|_| self.connected && is_whole).map(|moves| moves.min(self.heard_until()))
    }

    /// Connected and heard of lately.
    fn is_heard(&self, now: Time) -> bool {
        self.connected && now <= self.heard_until()
    }

    fn heard_until(&self) -> Time {
        self.heard.after((INTERVALS_SILENT * self.interval).max(3.0))
    }
}

fn evaluated_is_sane(evaluated: &Evaluated) -> bool {
    evaluated.nats.is_finite() && evaluated.nats >= 0.0 && evaluated.tokens > 0 && evaluated.bytes > 0
}
