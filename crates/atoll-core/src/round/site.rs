//! The site's machine. It trains whenever it may, contributes each fragment when its steps are done,
//! and follows commits beside its inner steps. It never waits for the network: what has not been
//! answered is outstanding, and training goes on as long as leased samples last.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::codec::Codec;
use crate::data::{DatasetId, Ranges};
use crate::engine::Progress;
use crate::hash::Digest;
use crate::journal::{Evaluated, Notice, Settled, TAIL};
use crate::manifest::FragmentId;
use crate::plan::{self, Link};
use crate::round::{Phase, Receipt, SECONDS_AWAY, Standing, Status, Vitals};
use crate::site::Time;

/// What happened at the site.
#[derive(Debug, Clone, PartialEq)]
pub enum SiteEvent {
    /// There is a connection to the coordinator.
    Connected,
    /// There is none any more; what was travelling is lost.
    Disconnected,
    /// The coordinator said where the run stands.
    Standing(Box<Standing>),
    /// The inner steps that were ordered are done.
    Stepped {
        /// What they amounted to.
        progress: Progress,
        /// The samples they were taken on.
        trained: Ranges,
        /// How long they took.
        seconds: f64,
    },
    /// A contribution that was ordered is encoded.
    Contributed {
        /// Its fragment.
        fragment: FragmentId,
        /// Content address of its payload.
        payload: Digest,
        /// Bytes of its payload.
        bytes: u64,
        /// Length of what it says.
        norm: f64,
        /// Smoothed cosine of the site's own steps to the latest commit.
        agreement: f64,
    },
    /// The coordinator has all bytes of a payload, or will not get them now.
    Uploaded(Digest, bool),
    /// Bytes that were fetched are here, or will not come now.
    Fetched(Digest, bool),
    /// A commit or new weights that were ordered are in place. A commit that leaves the steps since the last contribution alone
    /// may be reported before it is, if it will be by the time that weights are read again: so a site whose steps are long
    /// follows any number of commits within one.
    Applied {
        /// The fragment.
        fragment: FragmentId,
        /// The version it is meant to be.
        version: u64,
        /// The digest it has.
        digest: Digest,
        /// Whether the steps since the last contribution are gone.
        overwritten: bool,
    },
    /// A refused contribution's work is given up.
    Rebased(FragmentId),
    /// What the shell has counted and measured so far.
    Measured(Measured),
    /// An evaluation that was ordered is done.
    Evaluated(u64, Evaluated),
    /// The operator wants the site to stop.
    Leave,
    /// Time has passed.
    Tick,
}

/// What the site should do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum SiteOrder {
    /// Take these inner steps; answer with [`SiteEvent::Stepped`].
    Train(u32),
    /// Hand these leased samples to the engine's feed.
    Grant(Ranges),
    /// Tell the feed how far the run has come.
    Progress(f32),
    /// Take back all leased samples that the engine has not used.
    DropLeases,
    /// Encode what was learnt on a fragment up to this moment; answer with [`SiteEvent::Contributed`].
    Contribute(FragmentId, Codec),
    /// Take up what earlier processes of this site have not delivered, given the payload of its last contribution to
    /// each fragment that is in the model.
    Recall(Vec<Option<Digest>>),
    /// The last contribution of a fragment is in the model.
    Delivered(FragmentId),
    /// Give up a contribution's work, refused for this reason; answer with [`SiteEvent::Rebased`].
    Rebase(FragmentId, String),
    /// Apply a fetched commit; answer with [`SiteEvent::Applied`].
    Commit(Notice),
    /// Start a fragment over from fetched weights; answer with [`SiteEvent::Applied`].
    Install(FragmentId, u64, Digest),
    /// Look at the held-out loss of the global model; answer with [`SiteEvent::Evaluated`].
    Evaluate(u64),
    /// Send this payload; answer with [`SiteEvent::Uploaded`].
    Upload(Digest),
    /// Get bytes by their address; answer with [`SiteEvent::Fetched`].
    Fetch {
        /// The address.
        digest: Digest,
        /// How many bytes there will be.
        bytes: u64,
        /// Whether the coordinator sends them unasked.
        pushed: bool,
        /// Whose weights they are, and which version; none for the payload of a commit.
        weights: Option<(FragmentId, u64)>,
    },
    /// This payload is settled.
    Forget(Digest),
    /// Send the coordinator this.
    Report(Box<Status>),
    /// There is nothing more to do.
    Stop(Stop),
}

/// What only the shell knows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// See [`Vitals::exposed_seconds`].
    pub exposed_seconds: f64,
    /// See [`Vitals::hidden_seconds`].
    pub hidden_seconds: f64,
    /// Usual seconds of encoding and decoding one fragment.
    pub coding_seconds: f64,
    /// Usual seconds of copying one fragment's weights and adding to them.
    pub copying_seconds: f64,
    /// See [`Vitals::payload_bytes`].
    pub payload_bytes: (u64, u64),
    /// See [`Vitals::link`].
    pub link: Link,
}

/// Why a site is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The run is finished.
    Finished,
    /// The operator wanted it.
    Left,
    /// Another process has joined as this site.
    Superseded,
}

/// What a site is doing, for the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteState {
    /// Fetching the model.
    Loading,
    /// Taking inner steps.
    Training,
    /// Out of leased samples, usually because the coordinator is away.
    Starved,
    /// Handing in the last work.
    Closing,
    /// Done.
    Finished,
}

/// What makes a site's work different from another's.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteSettings {
    /// Weights of each fragment.
    pub fragment_lens: Vec<usize>,
    /// The dataset it brings.
    pub dataset: DatasetId,
    /// Samples in one epoch of it.
    pub samples: u64,
    /// Samples that one inner step uses.
    pub samples_per_step: u64,
    /// A session number higher than any before, such as the time of day.
    pub session: u64,
    /// Version and digest of weights of each fragment that an earlier process began to fetch.
    pub begun: Vec<Option<(u64, Digest)>>,
}

/// A site.
#[derive(Debug)]
pub struct Site {
    settings: SiteSettings,
    fragments: Vec<Fragment>,
    outstanding: BTreeMap<u64, Outstanding>,
    number: u64,
    contributions: u64,
    seen: u64,
    leases_seen: u64,
    unspent: u64,
    /// Trained on and in no contribution yet.
    trained: Ranges,
    steps_per_round: u32,
    up: Codec,
    phase: Phase,
    connected: bool,
    leaving: bool,
    busy: bool,
    stopped: bool,
    progress: f32,
    vitals: Vitals,
    started: Option<Time>,
    evaluation: Option<(u64, Evaluated)>,
    evaluating: u64,
    reported: Option<Time>,
    news: bool,
    /// The last delta that could not be fetched.
    lost: Option<Digest>,
    /// What earlier processes have not delivered is taken up.
    recalled: bool,
    /// The end of the session, heard of during a step.
    postponed: Option<Box<Standing>>,
    /// A look at the held-out loss that is wanted between two steps.
    look: Option<u64>,
}

#[derive(Debug, Default)]
struct Fragment {
    held: Option<(u64, Digest)>,
    /// Number of the first report that tells of it.
    told: u64,
    /// Step and token counts when its last contribution was taken.
    since: (u64, u64),
    /// Step count at which the next contribution is due.
    due: u64,
    /// A new contribution needs at least this version, which holds the last one.
    needs: u64,
    moving: Option<Move>,
    /// Weights of which some bytes may be here.
    begun: Option<(u64, Digest)>,
    /// The bytes are here and the engine has been told to take them.
    applying: bool,
    /// The contribution being encoded.
    taken: Option<Taken>,
    /// Refused contributions whose work is being given up.
    rebasing: u32,
    /// When, and after how many steps, the contribution was taken that the next settled version holds.
    sent: Option<(Time, u64)>,
    /// Smoothed steps from a contribution to the commit that holds it.
    turn: f64,
}

/// What a contribution that is being encoded stands for.
#[derive(Debug)]
struct Taken {
    base: u64,
    steps: u64,
    tokens: u64,
    ranges: Ranges,
}

/// Bytes under way that will change a fragment.
#[derive(Debug, Clone)]
enum Move {
    Commit(Notice),
    Install(u64, Digest),
}

impl Move {
    fn digest(&self) -> Digest {
        match self {
            Move::Commit(notice) => notice.delta,
            Move::Install(_, digest) => *digest,
        }
    }

    fn version(&self) -> u64 {
        match self {
            Move::Commit(Notice { version, .. }) | Move::Install(version, _) => *version,
        }
    }
}

#[derive(Debug)]
struct Outstanding {
    receipt: Receipt,
    upload: Upload,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Upload {
    Idle,
    Moving,
    /// The coordinator had it before it heard this status.
    Done(u64),
}

/// Seconds between two reports when nothing in particular happens.
const REPORT_SECONDS: f64 = 0.5;
/// Rounds for which a site would like to hold leases …
const ROUNDS_IN_HAND: u64 = 3;
/// … and seconds. It gets new ones when half is spent: whoever has no coordinator trains on until it would be given up.
const SECONDS_IN_HAND: f64 = 2.0 * SECONDS_AWAY;
/// Weight of the newest value in the smoothed steps that a contribution is under way.
const TURN_SHARE: f64 = 0.2;

/// Whether weights of version `begun`, older than the `newest` commit's, are worth going on with: the commits since then
/// weigh less than half of all weights, and will still be there when these have come.
fn is_in_reach(begun: u64, newest: &Notice, most: u64) -> bool {
    let Some(behind) = newest.version.checked_sub(begun) else { return false };
    let is_light = newest.bytes.saturating_mul(behind) <= most / 2;
    (1..=TAIL as u64 / 2).contains(&behind) && is_light
}

impl Site {
    /// A site that knows nothing of the run yet.
    pub fn new(settings: SiteSettings) -> Self {
        let begun = settings.begun.iter().copied().chain(std::iter::repeat(None));
        let fragment = |(_, begun): (&usize, Option<(u64, Digest)>)| Fragment { begun, ..Fragment::default() };
        let fragments = settings.fragment_lens.iter().zip(begun).map(fragment).collect();
        Self {
            settings,
            fragments,
            outstanding: BTreeMap::new(),
            number: 0,
            contributions: 0,
            seen: 0,
            leases_seen: 0,
            unspent: 0,
            trained: Ranges::new(),
            steps_per_round: 1,
            up: Codec::F32,
            phase: Phase::Training,
            connected: false,
            leaving: false,
            busy: false,
            stopped: false,
            progress: 0.0,
            vitals: Vitals::default(),
            started: None,
            evaluation: None,
            evaluating: 0,
            reported: None,
            news: true,
            lost: None,
            recalled: false,
            postponed: None,
            look: None,
        }
    }

    /// What the site is doing.
    pub fn state(&self) -> SiteState {
        match self.phase {
            Phase::Finished => SiteState::Finished,
            Phase::Closing => SiteState::Closing,
            Phase::Training if !self.is_whole() => SiteState::Loading,
            Phase::Training if self.busy || self.unspent >= self.settings.samples_per_step => SiteState::Training,
            Phase::Training => SiteState::Starved,
        }
    }

    /// How the site is doing.
    pub fn vitals(&self) -> &Vitals {
        &self.vitals
    }

    /// How far the run has come, as last heard.
    pub fn progress(&self) -> f32 {
        self.progress
    }

    /// Version and digest of each fragment held.
    pub fn held(&self) -> impl Iterator<Item = Option<(u64, Digest)>> + '_ {
        self.fragments.iter().map(|fragment| fragment.held)
    }

    /// Takes in what happened and says what to do.
    pub fn handle(&mut self, now: Time, event: SiteEvent) -> Vec<SiteOrder> {
        self.handle_all(now, [event])
    }

    /// Takes in all that happened until this moment and says what to do: when a step ends, what was worked out during it
    /// is in place before anybody says what comes next.
    pub fn handle_all(&mut self, now: Time, events: impl IntoIterator<Item = SiteEvent>) -> Vec<SiteOrder> {
        let mut orders = Vec::new();
        for event in events {
            self.take_in(now, event, &mut orders);
        }
        self.advance(now, &mut orders);
        orders
    }

    fn take_in(&mut self, now: Time, event: SiteEvent, orders: &mut Vec<SiteOrder>) {
        match event {
            SiteEvent::Connected => self.connect(),
            SiteEvent::Disconnected => self.disconnect(),
            // What a step uses cannot be taken back while it is under way.
            SiteEvent::Standing(standing)
                if self.busy && !standing.open && standing.session <= self.settings.session =>
            {
                self.postponed = Some(standing);
            }
            SiteEvent::Standing(standing) => self.hear(&standing, orders),
            SiteEvent::Stepped { progress, trained, seconds } => {
                self.step(now, progress, &trained, seconds);
                if let Some(standing) = self.postponed.take() {
                    self.hear(&standing, orders);
                }
            }
            SiteEvent::Contributed { fragment, payload, bytes, norm, agreement } => {
                self.vitals.agreement = agreement;
                self.contributed(fragment, payload, bytes, norm, orders);
            }
            SiteEvent::Rebased(fragment) => {
                let rebasing = &mut self.fragments[fragment.index()].rebasing;
                *rebasing = rebasing.saturating_sub(1);
            }
            SiteEvent::Measured(measured) => self.measured(&measured),
            SiteEvent::Uploaded(payload, done) => self.uploaded(payload, done),
            SiteEvent::Fetched(digest, done) => self.fetched(digest, done, orders),
            SiteEvent::Applied { fragment, version, digest, overwritten } => {
                self.applied(now, fragment, (version, digest), overwritten);
            }
            SiteEvent::Evaluated(request, evaluated) => {
                self.evaluation = Some((request, evaluated));
                self.news = true;
            }
            SiteEvent::Leave => (self.leaving, self.news) = (true, true),
            SiteEvent::Tick => {}
        }
    }

    fn connect(&mut self) {
        self.disconnect(); // Whatever an earlier connection was carrying is lost.
        // Standings of one connection arrive in order; a restarted coordinator counts from the start.
        (self.connected, self.seen, self.news) = (true, 0, true);
    }

    fn disconnect(&mut self) {
        (self.connected, self.postponed) = (false, None);
        let travelling = self.fragments.iter_mut().filter(|fragment| !fragment.applying);
        travelling.for_each(|fragment| fragment.moving = None);
        for outstanding in self.outstanding.values_mut().filter(|o| o.upload == Upload::Moving) {
            outstanding.upload = Upload::Idle;
        }
    }

    // ---- the coordinator speaks ----

    fn hear(&mut self, standing: &Standing, orders: &mut Vec<SiteOrder>) {
        if standing.number <= self.seen || standing.session < self.settings.session {
            return;
        }
        self.seen = standing.number;
        if standing.session > self.settings.session {
            self.stopped = true;
            orders.push(SiteOrder::Stop(Stop::Superseded));
            return;
        }
        if !standing.open {
            self.settle(standing, orders);
            self.start_over(standing.session + 1, orders);
            return;
        }
        if !std::mem::replace(&mut self.recalled, true) {
            orders.push(SiteOrder::Recall(standing.delivered.clone()));
        }
        self.phase = standing.phase;
        (self.steps_per_round, self.up) = (standing.steps.max(1), standing.up);
        for fragment in &mut self.fragments {
            fragment.due = fragment.due.min(self.vitals.steps + u64::from(self.steps_per_round));
        }
        self.progress = standing.progress;
        orders.push(SiteOrder::Progress(standing.progress));
        self.take_leases(standing, orders);
        self.settle(standing, orders);
        self.resend(standing, orders);
        self.follow(standing, orders);
        if let Some(request) = standing.evaluate.filter(|&request| request != self.evaluating && self.is_whole()) {
            (self.evaluating, self.look) = (request, Some(request));
        }
    }

    /// The session was closed while the site was away: its unsettled work went back to the pool.
    fn start_over(&mut self, session: u64, orders: &mut Vec<SiteOrder>) {
        const WHY: &str = "the session ended while the site was away";
        self.settings.session = session;
        for (_, outstanding) in std::mem::take(&mut self.outstanding) {
            orders.push(SiteOrder::Forget(outstanding.receipt.payload));
            self.give_up(outstanding.receipt.fragment, WHY, orders);
        }
        for index in 0..self.fragments.len() {
            if self.fragments[index].taken.is_some() {
                self.give_up(FragmentId(index as u16), WHY, orders);
            }
        }
        self.trained = Ranges::new();
        (self.leases_seen, self.unspent, self.number, self.contributions) = (0, 0, 0, 0);
        orders.push(SiteOrder::DropLeases);
        for fragment in &mut self.fragments {
            (fragment.held, fragment.moving, fragment.taken, fragment.needs) = (None, None, None, 0);
        }
        (self.news, self.evaluation, self.evaluating, self.look) = (true, None, 0, None);
    }

    /// Orders that a contribution's work is given up.
    fn give_up(&mut self, id: FragmentId, why: &str, orders: &mut Vec<SiteOrder>) {
        let fragment = &mut self.fragments[id.index()];
        (fragment.rebasing, fragment.sent) = (fragment.rebasing + 1, None);
        orders.push(SiteOrder::Rebase(id, why.to_string()));
    }

    fn take_leases(&mut self, standing: &Standing, orders: &mut Vec<SiteOrder>) {
        for (number, ranges) in &standing.leases {
            if *number == self.leases_seen + 1 {
                self.leases_seen = *number;
                self.unspent += ranges.len();
                self.news = true;
                orders.push(SiteOrder::Grant(ranges.clone()));
            }
        }
    }

    fn settle(&mut self, standing: &Standing, orders: &mut Vec<SiteOrder>) {
        for (number, settled) in &standing.settled {
            let Some(outstanding) = self.outstanding.remove(number) else { continue };
            let fragment = outstanding.receipt.fragment;
            let payload = outstanding.receipt.payload;
            // Two contributions may have been encoded to the same bytes.
            if self.outstanding.values().all(|other| other.receipt.payload != payload) {
                orders.push(SiteOrder::Forget(payload));
            }
            match settled {
                Settled::Committed(version) => {
                    self.fragments[fragment.index()].needs = *version;
                    orders.push(SiteOrder::Delivered(fragment));
                }
                Settled::Refused(why) => self.give_up(fragment, why, orders),
            }
            self.news = true;
        }
    }

    fn resend(&mut self, standing: &Standing, orders: &mut Vec<SiteOrder>) {
        for number in &standing.wanted {
            let Some(outstanding) = self.outstanding.get_mut(number) else { continue };
            let lost = match outstanding.upload {
                Upload::Idle => true,
                Upload::Moving => false,
                Upload::Done(before) => standing.heard >= before,
            };
            if lost {
                outstanding.upload = Upload::Moving;
                orders.push(SiteOrder::Upload(outstanding.receipt.payload));
            }
        }
    }

    /// Fetches what each fragment needs next: the next delta if it is to be had, else all weights.
    fn follow(&mut self, standing: &Standing, orders: &mut Vec<SiteOrder>) {
        for (index, &(version, digest)) in standing.fragments.iter().enumerate().take(self.fragments.len()) {
            let id = FragmentId(index as u16);
            let fragment = &mut self.fragments[index];
            if fragment.moving.is_some() {
                continue;
            }
            let most = Codec::F32.payload_len(self.settings.fragment_lens[index]) as u64;
            let next = fragment.held.map(|(held, _)| held + 1);
            let notice = standing.notices.iter().find(|notice| notice.fragment == id && Some(notice.version) == next);
            // Many deltas may weigh more than the weights themselves.
            let is_light = |held: u64, notice: &Notice| notice.bytes.saturating_mul(version - held) <= most;
            let step = match (fragment.held, notice) {
                (Some((held, own)), _) if held == version && own != digest => Move::Install(version, digest),
                (Some((held, _)), _) if held >= version => continue,
                (Some((held, _)), Some(notice)) if self.lost != Some(notice.delta) && is_light(held, notice) => {
                    Move::Commit(notice.clone())
                }
                // It was said before the coordinator heard what is held here: the deltas since then are still to be told of.
                (Some(_), None) if standing.heard < fragment.told => continue,
                _ => {
                    let newest = standing.notices.iter().find(|n| n.fragment == id && n.version == version);
                    let is_near = |begun: u64| newest.is_some_and(|newest| is_in_reach(begun, newest, most));
                    let is_ahead = |begun: u64| fragment.held.is_none_or(|(held, _)| begun > held);
                    let begun = fragment.begun.filter(|&(begun, _)| is_ahead(begun) && is_near(begun));
                    let (version, digest) = *fragment.begun.insert(begun.unwrap_or((version, digest)));
                    Move::Install(version, digest)
                }
            };
            let (bytes, weights) = match &step {
                Move::Commit(notice) => (notice.bytes, None),
                Move::Install(version, _) => (self.settings.fragment_lens[index] as u64 * 4, Some((id, *version))),
            };
            let last_pushed = standing.pushed.get(index).copied().unwrap_or(0);
            let pushed = matches!(&step, Move::Commit(notice) if notice.version <= last_pushed);
            orders.push(SiteOrder::Fetch { digest: step.digest(), bytes, pushed, weights });
            fragment.moving = Some(step);
        }
    }

    // ---- the engine and the network answer ----

    fn step(&mut self, now: Time, progress: Progress, trained: &Ranges, seconds: f64) {
        self.busy = false;
        let steps = f64::from(progress.steps.max(1));
        let began = self.started.get_or_insert(Time(now.0.saturating_sub((seconds * 1e6) as u64)));
        let vitals = &mut self.vitals;
        vitals.wall_seconds = now.seconds_since(*began);
        vitals.steps += u64::from(progress.steps);
        vitals.tokens += progress.tokens;
        vitals.busy_seconds += seconds;
        vitals.step_seconds = plan::smooth(vitals.step_seconds, seconds / steps, 0.1);
        vitals.loss = plan::smooth(vitals.loss, progress.loss, 0.1);
        self.unspent = self.unspent.saturating_sub(trained.len());
        self.trained.insert(trained);
    }

    fn measured(&mut self, measured: &Measured) {
        let Measured { exposed_seconds, hidden_seconds, coding_seconds, copying_seconds, payload_bytes, link } =
            *measured;
        let fragments = self.fragments.len() as f64;
        let vitals = &mut self.vitals;
        (vitals.exposed_seconds, vitals.hidden_seconds) = (exposed_seconds, hidden_seconds);
        (vitals.coding_seconds, vitals.copying_seconds) = (fragments * coding_seconds, fragments * copying_seconds);
        (vitals.payload_bytes, vitals.link) = (payload_bytes, link);
    }

    fn contributed(&mut self, id: FragmentId, payload: Digest, bytes: u64, norm: f64, orders: &mut Vec<SiteOrder>) {
        let Some(taken) = self.fragments[id.index()].taken.take() else {
            // The session that it was made for is over.
            if self.outstanding.values().all(|other| other.receipt.payload != payload) {
                orders.push(SiteOrder::Forget(payload));
            }
            return;
        };
        self.contributions += 1;
        let receipt = Receipt {
            number: self.contributions,
            fragment: id,
            base: taken.base,
            steps: taken.steps,
            tokens: taken.tokens,
            norm,
            payload,
            bytes,
            ranges: taken.ranges,
        };
        let upload = if self.connected { Upload::Moving } else { Upload::Idle };
        self.outstanding.insert(receipt.number, Outstanding { receipt, upload });
        self.news = true;
        if self.connected {
            self.report_now(orders);
            orders.push(SiteOrder::Upload(payload));
        }
    }

    fn uploaded(&mut self, payload: Digest, done: bool) {
        let next = self.number + 1;
        for outstanding in self.outstanding.values_mut().filter(|o| o.receipt.payload == payload) {
            outstanding.upload = if done { Upload::Done(next) } else { Upload::Idle };
            self.news = true;
        }
    }

    fn fetched(&mut self, digest: Digest, done: bool, orders: &mut Vec<SiteOrder>) {
        for (index, fragment) in self.fragments.iter_mut().enumerate() {
            let Some(step) = fragment.moving.as_ref().filter(|step| step.digest() == digest) else { continue };
            if fragment.applying {
                continue;
            }
            fragment.applying = done;
            match (done, step) {
                (false, step) => {
                    // A delta that is not to be had is no reason to stand still: fetch the weights instead.
                    self.lost = matches!(step, Move::Commit(_)).then_some(digest).or(self.lost);
                    (fragment.moving, fragment.begun) = (None, fragment.begun.filter(|(_, begun)| *begun != digest));
                }
                (true, Move::Commit(notice)) => orders.push(SiteOrder::Commit(notice.clone())),
                (true, Move::Install(version, digest)) => {
                    orders.push(SiteOrder::Install(FragmentId(index as u16), *version, *digest));
                }
            }
            self.news = true;
        }
    }

    fn applied(&mut self, now: Time, id: FragmentId, (version, digest): (u64, Digest), overwritten: bool) {
        let stagger = self.stagger(id);
        let now_at = (self.vitals.steps, self.vitals.tokens);
        let fragment = &mut self.fragments[id.index()];
        fragment.applying = false;
        let Some(step) = fragment.moving.take_if(|step| step.version() == version) else {
            // Of a session that is over. What has come meanwhile for this one was not taken; it is fetched again.
            fragment.moving = None;
            return;
        };
        self.news = true;
        let announced = match &step {
            Move::Commit(notice) => notice.digest,
            Move::Install(_, digest) => {
                fragment.begun = None;
                *digest
            }
        };
        if digest != announced {
            self.vitals.digest_mismatches += 1;
            fragment.held = None;
            return;
        }
        if overwritten {
            fragment.since = now_at;
        }
        if matches!(step, Move::Install(..)) {
            fragment.due = now_at.0 + stagger;
        }
        (fragment.held, fragment.told) = (Some((version, digest)), self.number + 1);
        if version >= fragment.needs
            && fragment.needs > 0
            && let Some((sent, steps)) = fragment.sent.take()
        {
            self.vitals.round_seconds = plan::smooth(self.vitals.round_seconds, now.seconds_since(sent), 0.2);
            self.align(id.index(), now_at.0 - steps, overwritten);
        }
    }

    /// Sets when the fragment is due next, `turn` steps after its last contribution, of which an `overwritten` one has
    /// nothing left. A commit reaches all sites at about the same time, so whoever counts from it is in step with the
    /// others, and nobody misses a round for having begun at another moment.
    fn align(&mut self, index: usize, turn: u64, overwritten: bool) {
        let (round, steps) = (u64::from(self.steps_per_round), self.vitals.steps);
        let spacing = round / self.fragments.len() as u64;
        let before = index.checked_sub(1).map(|before| self.fragments[before].due);
        let fragment = &mut self.fragments[index];
        fragment.turn = plan::smooth(fragment.turn, turn.min(round) as f64, TURN_SHARE);
        let done = if overwritten { 0 } else { fragment.turn.round() as u64 };
        fragment.due = steps + round.saturating_sub(done);
        // Fragments that have come to be due together part again, a step a round.
        if let Some(before) = before.filter(|_| spacing > 1) {
            let behind = (fragment.due + round - before % round) % round;
            if behind + 1 < spacing {
                fragment.due += 1;
            } else if behind > spacing + 1 {
                fragment.due -= 1;
            }
        }
    }

    /// First due step of a fragment, so that fragments are spread evenly over a round.
    fn stagger(&self, id: FragmentId) -> u64 {
        let count = self.fragments.len() as u64;
        (u64::from(self.steps_per_round) * (id.index() as u64 + 1)).div_ceil(count)
    }

    // ---- what to do next ----

    fn advance(&mut self, now: Time, orders: &mut Vec<SiteOrder>) {
        if self.stopped {
            return;
        }
        if self.leaving || self.phase == Phase::Finished {
            self.report_now(orders);
            self.stopped = true;
            orders.push(SiteOrder::Stop(if self.leaving { Stop::Left } else { Stop::Finished }));
            return;
        }
        for index in 0..self.fragments.len() {
            if self.is_due(index) {
                self.take(now, index);
                orders.push(SiteOrder::Contribute(FragmentId(index as u16), self.up));
            }
        }
        let overdue = self.reported.is_none_or(|at| now.seconds_since(at) >= REPORT_SECONDS);
        if self.connected && (self.news || overdue) {
            self.reported = Some(now);
            self.report_now(orders);
        }
        if !self.busy
            && let Some(request) = self.look.take()
        {
            orders.push(SiteOrder::Evaluate(request));
        }
        if self.may_train() {
            self.busy = true;
            orders.push(SiteOrder::Train(1));
        }
    }

    /// Notes what a contribution of fragment number `index` stands for at this moment.
    fn take(&mut self, now: Time, index: usize) {
        let round = u64::from(self.steps_per_round);
        let fragment = &mut self.fragments[index];
        let (steps, tokens) = (self.vitals.steps, self.vitals.tokens);
        fragment.taken = Some(Taken {
            base: fragment.held.map_or(0, |(version, _)| version),
            steps: steps - fragment.since.0,
            tokens: tokens - fragment.since.1,
            ranges: std::mem::take(&mut self.trained),
        });
        (fragment.since, fragment.sent) = ((steps, tokens), Some((now, steps)));
        // Keep the stagger unless the fragment has fallen behind by a whole round.
        fragment.due = if fragment.due + round > steps { fragment.due + round } else { steps + round };
    }

    /// Whether the fragment's steps are done, its last contribution is behind it, and nothing is about to change
    /// the weights from which the next one would be read.
    fn is_due(&self, index: usize) -> bool {
        let fragment = &self.fragments[index];
        let steps = self.vitals.steps - fragment.since.0;
        let time = self.vitals.steps >= fragment.due || self.phase == Phase::Closing;
        let still = !self.busy && fragment.taken.is_none() && !fragment.applying && fragment.rebasing == 0;
        steps > 0 && self.is_settled(index) && time && still
    }

    /// Whether the fragment's last contribution is decided on and what came of it is here.
    fn is_settled(&self, index: usize) -> bool {
        let fragment = &self.fragments[index];
        fragment.held.is_some_and(|(version, _)| version >= fragment.needs)
            && !self.outstanding.values().any(|o| o.receipt.fragment.index() == index)
    }

    /// Steps to the next contribution of each fragment, as far as that is known.
    fn due(&self) -> Vec<Option<u32>> {
        let steps = |fragment: &Fragment| match fragment.taken {
            Some(_) => 0, // It is being encoded.
            None => fragment.due.saturating_sub(self.vitals.steps).min(u64::from(u32::MAX)) as u32,
        };
        let fragments = self.fragments.iter().enumerate();
        fragments.map(|(index, fragment)| self.is_settled(index).then(|| steps(fragment))).collect()
    }

    fn may_train(&self) -> bool {
        let has_samples = self.unspent >= self.settings.samples_per_step;
        !self.busy && self.phase == Phase::Training && self.is_whole() && has_samples
    }

    fn is_whole(&self) -> bool {
        self.fragments.iter().all(|fragment| fragment.held.is_some())
    }

    fn is_drained(&self) -> bool {
        let untouched = |fragment: &Fragment| fragment.since.0 == self.vitals.steps;
        let encoding = self.fragments.iter().any(|fragment| fragment.taken.is_some());
        !self.busy
            && self.outstanding.is_empty()
            && !encoding
            && (self.vitals.steps == 0 || self.fragments.iter().all(untouched))
    }

    fn report_now(&mut self, orders: &mut Vec<SiteOrder>) {
        self.number += 1;
        self.news = false;
        let wants = self.steps_in_hand() * self.settings.samples_per_step;
        orders.push(SiteOrder::Report(Box::new(Status {
            session: self.settings.session,
            number: self.number,
            dataset: self.settings.dataset,
            samples: self.settings.samples,
            fragments: self.held().collect(),
            due: self.due(),
            outstanding: self.outstanding.values().map(|outstanding| outstanding.receipt.clone()).collect(),
            leases_seen: self.leases_seen,
            unspent: self.unspent,
            wants: if self.phase == Phase::Training { wants } else { 0 },
            evaluation: self.evaluation,
            drained: self.is_drained(),
            leaving: self.leaving,
            vitals: self.vitals.clone(),
        })));
    }

    /// Steps for which it would like to hold leases.
    fn steps_in_hand(&self) -> u64 {
        let rounds = ROUNDS_IN_HAND * u64::from(self.steps_per_round);
        let seconds = self.vitals.step_seconds;
        if seconds > 0.0 { rounds.max((SECONDS_IN_HAND / seconds).ceil() as u64) } else { rounds }
    }

    /// Whether the bytes of that address are still wanted.
    pub fn awaits(&self, digest: Digest) -> bool {
        self.fragments.iter().filter_map(|fragment| fragment.moving.as_ref()).any(|step| step.digest() == digest)
    }
}
