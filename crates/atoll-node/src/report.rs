//! What an operator sees: `status.json` while a run lives, `report.json` when it is done. Both have
//! the same shape, so every view and every script needs to know only one.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use atoll_core::hash::Digest;
use serde::{Deserialize, Serialize};

/// The first and the latest value of something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct FirstLast {
    /// The first.
    pub first: Option<f64>,
    /// The latest.
    pub last: Option<f64>,
}

impl FirstLast {
    /// Notes a newer value.
    pub fn note(&mut self, value: f64) {
        self.first.get_or_insert(value);
        self.last = Some(value);
    }
}

/// A run, seen from its coordinator.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the run.
    pub run: String,
    /// `training`, `closing`, `finished` or `stopped`.
    pub state: String,
    /// Where the coordinator listens, while it does.
    pub listen: Option<String>,
    /// Number of parameters of the model.
    pub parameters: u64,
    /// Tokens in the model.
    pub tokens: u64,
    /// Commits, over all fragments.
    pub commits: u64,
    /// Digest of the global model.
    pub digest: Digest,
    /// Training loss, nats per token.
    pub loss: FirstLast,
    /// Held-out bits per byte of text.
    pub bits_per_byte: FirstLast,
    /// Seconds of training.
    pub seconds: f64,
    /// Share of the goal that is reached, 0 to 1.
    pub progress: f64,
    /// Seconds to go, if that can be told.
    pub seconds_left: Option<f64>,
    /// Seconds since 1970 of this look.
    pub at: f64,
    /// What each fragment's round is waiting for.
    pub rounds: Vec<String>,
    /// The latest round of each fragment.
    #[serde(default)]
    pub fragments: Vec<FragmentReport>,
    /// Sites by name.
    pub sites: Vec<SiteReport>,
    /// Training loss over time: seconds and loss.
    pub history: Vec<(f64, f64)>,
    /// Bytes of weights that a coordinator has given to joining sites while it stood by.
    #[serde(default)]
    pub given: u64,
}

/// The latest round of a fragment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FragmentReport {
    /// Its commits.
    pub version: u64,
    /// Contributions in the commit.
    pub quorum: usize,
    /// Seconds since the commit before.
    pub round_seconds: f64,
    /// Seconds of training at the commit.
    pub committed_at: f64,
    /// Length of the merged pseudo-gradient.
    pub norm: f64,
    /// ρ, the smoothed cosine of consecutive merged pseudo-gradients.
    pub rho: f64,
    /// η_eff, how far the global model moves along a merged pseudo-gradient in the long run.
    pub effective_step: f64,
    /// Length of what the codec of the way down has not delivered yet.
    pub residual: f64,
    /// Bytes of the commit's payload.
    pub bytes: u64,
}

/// A site, seen from the coordinator. Seconds and payload bytes are of its present session.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    /// Its name.
    pub name: String,
    /// Its engine.
    pub engine: String,
    /// Its device.
    pub device: String,
    /// `training`, `loading`, `silent`, `away`.
    pub state: String,
    /// Tokens it brought into the model.
    pub tokens: u64,
    /// Inner steps it took, as far as this coordinator has heard.
    pub steps: u64,
    /// Tokens trained on per second of its present session.
    pub tokens_per_second: f64,
    /// Share of wall time in inner steps.
    pub utilization: f64,
    /// Bytes it sent, TLS included.
    pub bytes_sent: u64,
    /// Bytes it received, TLS included.
    pub bytes_received: u64,
    /// Of both together, those of control connections: statuses and standings, no weights.
    #[serde(default)]
    pub bytes_control: u64,
    /// Contributions in the model.
    pub contributions: u64,
    /// Contributions that were refused.
    #[serde(default)]
    pub refused: u64,
    /// Why the latest of these was.
    #[serde(default)]
    pub refusal: String,
    /// Contributions in the model of which the guard has left out something, other than for their weight.
    #[serde(default)]
    pub guarded: u64,
    /// Why the latest of these was: `long`, `apart`, `opposed` or `harmful`.
    #[serde(default)]
    pub guarded_for: String,
    /// Share of its latest contribution that the guard let pass, 0 to 1.
    #[serde(default)]
    pub guard_factor: f64,
    /// What its contributions have shown, −1 (works against the others) to 1.
    #[serde(default)]
    pub trust: f64,
    /// How they help on held-out text, −1 (they do harm) to 1; 0 if none was tried.
    #[serde(default)]
    pub quality: f64,
    /// Times that its copy of the model had another digest than announced.
    pub digest_mismatches: u64,
    /// Its latest training loss.
    pub loss: f64,
    /// Bytes of the payloads it sent.
    #[serde(default)]
    pub payload_sent: u64,
    /// Bytes of the payloads it received.
    #[serde(default)]
    pub payload_received: u64,
    /// Bytes of its latest contribution in the model.
    #[serde(default)]
    pub contribution_bytes: u64,
    /// Seconds between inner steps that synchronization cost it.
    #[serde(default)]
    pub exposed_seconds: f64,
    /// Seconds of synchronization that went on beside inner steps.
    #[serde(default)]
    pub hidden_seconds: f64,
    /// Seconds from a contribution to its commit being applied, as measured.
    #[serde(default)]
    pub round_seconds: f64,
    /// The same, as the plan expects it.
    #[serde(default)]
    pub round_seconds_expected: f64,
    /// Commits by which its contributions are behind when they are merged, smoothed.
    #[serde(default)]
    pub staleness: f64,
    /// Cosine of its contributions to the merged pseudo-gradient, smoothed.
    #[serde(default)]
    pub cosine: f64,
    /// Cosine of its own steps to the latest commit, smoothed.
    #[serde(default)]
    pub agreement: f64,
    /// What its link carries up, as measured, Mbit/s.
    #[serde(default)]
    pub up_mbit: f64,
    /// What its link carries down, as measured, Mbit/s.
    #[serde(default)]
    pub down_mbit: f64,
    /// Seconds of a round trip.
    #[serde(default)]
    pub rtt_seconds: f64,
    /// H: inner steps between two contributions of a fragment.
    #[serde(default)]
    pub steps_per_round: u32,
    /// The arithmetic behind H, as a sentence.
    #[serde(default)]
    pub pace: String,
}

impl Report {
    /// Reads a report or status file.
    ///
    /// # Errors
    /// If it is not there or no report.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| {
            format!("{} cannot be read\nhint: the coordinator writes it once it runs", path.display())
        })?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is no report", path.display()))
    }

    /// Adds a point to the history, thinning it out so that it stays small.
    pub fn note_loss(&mut self, loss: f64) {
        const POINTS_MAX: usize = 512;
        self.loss.note(loss);
        let step = self.history.last().map_or(0.0, |_| self.seconds / POINTS_MAX as f64).max(1.0);
        if self.history.last().is_none_or(|(at, _)| self.seconds - at >= step) {
            self.history.push((self.seconds, loss));
        }
        if self.history.len() > 2 * POINTS_MAX {
            let mut keep = false;
            self.history.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }
}
