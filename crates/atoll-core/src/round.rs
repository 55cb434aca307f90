//! Rounds: how sites and coordinator agree on what is in the model. Both are values that turn
//! `(now, event)` into orders; a shell with sockets, a simulator or a replay carries the orders out.
//!
//! ```text
//! site ── Status: where I stand, what I have sent, what I need ──────────────▶ coordinator
//! site ◀── Standing: versions, commits to follow, settled work, leases ────── coordinator
//! ```
//!
//! Both messages are **levels**: they state what is true now and are simply said again. Any of them may
//! be lost, doubled, late or overtaken; the next one mends it. Weights never pass through a machine:
//! it sees receipts and content addresses, and the shell moves the bytes.

mod coordinator;
mod site;

use coordinator::SECONDS_AWAY;
pub use coordinator::{Coordinator, Event, Forecast, Merge, Merged, Order, Refusal, Seen, Tried, Waiting};
pub use site::{Measured, Site, SiteEvent, SiteOrder, SiteSettings, SiteState, Stop};

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, IntoDeserializer, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::codec::Codec;
use crate::data::{DatasetId, Ranges};
use crate::delta::{Feedback, Follow};
use crate::hash::Digest;
use crate::journal::{Evaluated, Notice, Settled};
use crate::manifest::FragmentId;
use crate::outer::{Averaging, Guard, OuterRule, Recipe, Robust};
use crate::plan::Link;

/// A setting that follows from what is measured unless the operator chooses: `"auto"` or a value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Setting<T> {
    /// Found out while the run goes on.
    #[default]
    Auto,
    /// Chosen.
    Is(T),
}

/// The word for [`Setting::Auto`].
const AUTO: &str = "auto";

impl<T: Serialize> Serialize for Setting<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Setting::Auto => serializer.serialize_str(AUTO),
            Setting::Is(value) => value.serialize(serializer),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Setting<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SettingVisitor(PhantomData))
    }
}

/// Leaves all but the word to the value, whose errors say what it may be.
struct SettingVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for SettingVisitor<T> {
    type Value = Setting<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{AUTO}\" or a value")
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
        if word == AUTO { Ok(Setting::Auto) } else { T::deserialize(word.into_deserializer()).map(Setting::Is) }
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
        T::deserialize(number.into_deserializer()).map(Setting::Is)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
        T::deserialize(number.into_deserializer()).map(Setting::Is)
    }
}

/// What becomes of a round in which sites are missing whose data nobody else has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Absent {
    /// Each dataset keeps the weight that its sites usually have: those present speak for their own dataset only, and
    /// the step is as much shorter as is missing. A backlog counts at most twice the usual.
    #[default]
    Reserve,
    /// Whoever is there decides alone.
    Ignore,
}

/// How a run synchronizes: the `[sync]` table of `run.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sync {
    /// Fragments, P; each is a round of its own.
    pub fragments: usize,
    /// Inner steps between two contributions of a fragment at the fastest site, H. `auto`: what takes a quarter of a second,
    /// and as many more as the thinnest link needs for synchronization to hide behind computing, and any site for its
    /// own part in it to stay small.
    pub steps: Setting<u32>,
    /// Sites that must contribute before a round may close; 0 means more than half of the living.
    pub quorum: usize,
    /// Codec of the way up. `auto`: for each site the richest whose bytes hide behind computing on its link.
    pub up: Setting<Codec>,
    /// Codec of the way down. `auto`: what the thinnest link can carry.
    pub down: Setting<Codec>,
    /// How contributions are merged.
    pub merge: Averaging,
    /// What is done about contributions that would harm the model.
    pub robust: Robust,
    /// The greatest share of a merge's weight that one of three or more contributions may have.
    pub weight_max: f64,
    /// Outer optimizer.
    pub outer: OuterRule,
    /// What becomes of a site's steps while its contribution travels.
    pub follow: Follow,
    /// Where sites keep what their codec has not delivered yet.
    pub feedback: Feedback,
    /// What is done about sites that are missing.
    pub absent: Absent,
    /// Seconds of training between two looks at the held-out loss; more where a look takes more than a tenth of that.
    pub evaluate_seconds: f64,
}

impl Default for Sync {
    fn default() -> Self {
        Self {
            fragments: 4,
            steps: Setting::Auto,
            quorum: 0,
            up: Setting::Auto,
            down: Setting::Auto,
            merge: Averaging::default(),
            robust: Robust::default(),
            weight_max: 0.5,
            outer: OuterRule::default(),
            follow: Follow::default(),
            feedback: Feedback::default(),
            absent: Absent::default(),
            evaluate_seconds: 30.0,
        }
    }
}

impl Sync {
    /// How a merge protects itself.
    pub fn guard(&self) -> Guard {
        Guard { robust: self.robust, weight_max: self.weight_max, usual: None }
    }

    /// How an outer step is computed of which the way down has that codec.
    pub fn recipe(&self, down: Codec, share: f64, guard: Guard) -> Recipe {
        Recipe { merge: self.merge, rule: self.outer.beside(down), codec: down, share, guard }
    }

    /// Every reason why a run cannot synchronize like this.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !(1..=4096).contains(&self.fragments) {
            problems.push(format!("sync.fragments = {} must be between 1 and 4096", self.fragments));
        }
        if self.steps == Setting::Is(0) {
            problems.push("sync.steps must be \"auto\" or at least 1".to_string());
        }
        if !(self.weight_max > 0.0 && self.weight_max <= 1.0) {
            problems.push(format!("sync.weight_max = {} must be above 0 and at most 1", self.weight_max));
        }
        if !(self.evaluate_seconds.is_finite() && self.evaluate_seconds > 0.0) {
            problems.push(format!("sync.evaluate_seconds = {} must be positive", self.evaluate_seconds));
        }
        let (learning_rate, momentum) = match self.outer {
            OuterRule::Auto { momentum } => (1.0, momentum),
            OuterRule::Memoryless { learning_rate } => (learning_rate, 0.0),
            OuterRule::Nesterov { learning_rate, momentum } => (learning_rate, momentum),
        };
        if !(learning_rate.is_finite() && learning_rate > 0.0) {
            problems.push(format!("sync.outer.learning_rate = {learning_rate} must be positive"));
        }
        if !(0.0..1.0).contains(&momentum) {
            problems.push(format!("sync.outer.momentum = {momentum} must be at least 0 and below 1"));
        }
        problems
    }
}

/// When a run has reached its goal. The first that is reached counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Goal {
    /// Tokens in the model.
    pub tokens: Option<u64>,
    /// Minutes of training, not counting time when the coordinator was down.
    pub minutes: Option<f64>,
}

/// What a site says about a contribution it made; the payload travels beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// Counts the contributions of a session from 1.
    pub number: u64,
    /// The fragment.
    pub fragment: FragmentId,
    /// Version of the fragment that the steps set out from.
    pub base: u64,
    /// Inner steps since the site's last contribution to this fragment.
    pub steps: u64,
    /// Tokens in these steps.
    pub tokens: u64,
    /// Euclidean length of what the payload says.
    pub norm: f64,
    /// Content address of the payload.
    pub payload: Digest,
    /// Bytes of the payload.
    pub bytes: u64,
    /// Samples trained on since the site's last contribution to any fragment: they enter the ledger
    /// with this one.
    pub ranges: Ranges,
}

/// Where a site stands. Said again whenever something changed, and now and then anyway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The session; a site process starts a new, higher one.
    pub session: u64,
    /// Grows with every status of a session.
    pub number: u64,
    /// The dataset it trains on.
    pub dataset: DatasetId,
    /// Samples in one epoch of it.
    pub samples: u64,
    /// For each fragment the version and digest that it holds, if any.
    pub fragments: Vec<Option<(u64, Digest)>>,
    /// Inner steps to its next contribution of each fragment; none while the last one is undecided.
    pub due: Vec<Option<u32>>,
    /// Contributions that it does not know to be settled.
    pub outstanding: Vec<Receipt>,
    /// The last lease it has received.
    pub leases_seen: u64,
    /// Leased samples not yet trained on.
    pub unspent: u64,
    /// Leased samples it would like to have in hand.
    pub wants: u64,
    /// The latest evaluation it was asked for, by request number.
    pub evaluation: Option<(u64, Evaluated)>,
    /// Everything it trained on has been contributed and settled.
    pub drained: bool,
    /// It is about to stop on purpose.
    pub leaving: bool,
    /// How it is doing.
    pub vitals: Vitals,
}

/// How a site is doing, for planning and for the operator. No decision about correctness uses it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Vitals {
    /// Inner steps of this session.
    pub steps: u64,
    /// Tokens trained on in this session.
    pub tokens: u64,
    /// Mean training loss of the latest steps, nats per token.
    pub loss: f64,
    /// Seconds per inner step, averaged over the latest.
    pub step_seconds: f64,
    /// Seconds spent in inner steps in this session.
    pub busy_seconds: f64,
    /// Seconds since the first inner step of this session.
    pub wall_seconds: f64,
    /// Seconds between inner steps in which the site could have trained and did something for the others instead.
    pub exposed_seconds: f64,
    /// Seconds of encoding and decoding, and of sending and receiving, that went on beside inner steps: both may at once.
    pub hidden_seconds: f64,
    /// Usual seconds of encoding a contribution to each fragment and decoding a commit of each.
    pub coding_seconds: f64,
    /// Usual seconds of copying each fragment's weights out of the engine and adding a commit to each, between inner steps.
    pub copying_seconds: f64,
    /// Smoothed seconds from a contribution to the commit that holds it being applied.
    pub round_seconds: f64,
    /// Smoothed cosine of the site's own steps to the latest commit.
    pub agreement: f64,
    /// Bytes of payloads sent and received in this session.
    pub payload_bytes: (u64, u64),
    /// What its link does.
    pub link: Link,
    /// Times that a digest was not the announced one.
    pub digest_mismatches: u64,
}

impl Vitals {
    /// Whether the numbers can be calculated with.
    pub fn are_sane(&self) -> bool {
        let seconds = [
            self.busy_seconds,
            self.wall_seconds,
            self.exposed_seconds,
            self.hidden_seconds,
            self.coding_seconds,
            self.copying_seconds,
            self.round_seconds,
        ];
        let counts = [self.steps, self.tokens, self.payload_bytes.0, self.payload_bytes.1, self.digest_mismatches];
        let sane = seconds.iter().all(|seconds| (0.0..=1e10).contains(seconds)) && self.link.is_sane();
        let sane = sane && counts.iter().all(|&count| count < 1 << 53);
        // A step of a month is a mistake; a loss may be anything that is a number.
        sane && (0.0..3e6).contains(&self.step_seconds) && self.loss.is_finite() && self.agreement.abs() <= 1.0
    }
}

/// Where the run stands, as far as one site needs to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// Grows with every standing of a coordinator's life; a new connection starts over.
    pub number: u64,
    /// The session this speaks of.
    pub session: u64,
    /// Whether that session is good; if not, the site starts a higher one.
    pub open: bool,
    /// The latest status number that this takes into account.
    pub heard: u64,
    /// What the site should be doing.
    pub phase: Phase,
    /// How far the run has come, 0 to 1.
    pub progress: f32,
    /// Inner steps between contributions of a fragment, for this site.
    pub steps: u32,
    /// Codec of its contributions.
    pub up: Codec,
    /// For each fragment the latest version and its digest.
    pub fragments: Vec<(u64, Digest)>,
    /// Commits that this site lacks and may follow one by one: the next few of each fragment, and the newest.
    pub notices: Vec<Notice>,
    /// For each fragment the latest version whose payload is sent to the site without being asked for.
    pub pushed: Vec<u64>,
    /// What became of its outstanding contributions.
    pub settled: Vec<(u64, Settled)>,
    /// Outstanding contributions whose payload has not arrived.
    pub wanted: Vec<u64>,
    /// Leases that the site has not confirmed.
    pub leases: Vec<(u64, Ranges)>,
    /// Number of the evaluation this site is asked for.
    pub evaluate: Option<u64>,
    /// For a site that holds nothing yet: of each fragment the payload of its last contribution in the model, made by
    /// whichever of its processes.
    pub delivered: Vec<Option<Digest>>,
    /// Fingerprint of the key that coordinators will have, or have by now, if there ever was to be another.
    pub successor: Option<Digest>,
}

/// What a run is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Sites train.
    #[default]
    Training,
    /// The goal is reached: sites hand in what they have and stop.
    Closing,
    /// All is in the model.
    Finished,
}
