//! The outer step: merge the sites' pseudo-gradients, move Θ, and say by how much. All arithmetic is
//! `f32` and `f64` on the host in a fixed order, so every machine gets the same bits.
//!
//! **The model is what was sent.** The change of Θ is encoded first and then *decoded and added*, here
//! as at every site; what the codec lost stays in a residual for the next round.
//!
//! **The step needs no tuning.** With b ← μ·b + Δ and Θ ← Θ − η·(Δ + μ·b), consecutive merged deltas of cosine ρ add
//! up: Θ moves along Δ as if the learning rate were η·(1 + μ/(1 − μρ)). The textbook's η 0.7, μ 0.9 is an effective
//! step of up to 7, far too long for short rounds. [`OuterRule::Auto`] measures ρ and sets η so that the effective step
//! is 1: momentum then smooths the direction and does not lengthen the way.

mod merge;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use merge::guard::{self, Guard, Reason, Robust, Usual, Verdict};
pub use merge::{Averaging, Merged, Weighted, merge};

use crate::codec::{CHUNK, Codec, CodecError, Payload, Squares, turn_of};
use crate::delta::{dot, square};
use crate::hash::Digest;
use crate::journal::{Accepted, Commit};
use crate::manifest::{FragmentId, Manifest};
use crate::plan;
use crate::simd::simd;
use crate::team::{Team, share_out};

/// How Θ follows the merged pseudo-gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "rule")]
pub enum OuterRule {
    /// Nesterov whose η is set from the measured ρ so that the effective step is 1, and which has no momentum beside
    /// trellis-coded quantization.
    Auto {
        /// μ.
        #[serde(default = "OuterRule::auto_momentum")]
        momentum: f32,
    },
    /// Θ ← Θ − η·Δ. No state.
    Memoryless {
        /// η.
        learning_rate: f32,
    },
    /// b ← μ·b + Δ; Θ ← Θ − η·(Δ + μ·b) (DiLoCo, arXiv 2311.08105).
    Nesterov {
        /// η.
        learning_rate: f32,
        /// μ.
        momentum: f32,
    },
}

impl OuterRule {
    fn auto_momentum() -> f32 {
        0.3
    }

    /// The rule where the way down has that codec. "Auto" does without momentum beside trellis-coded quantization: a few words say
    /// nearly all of what is merged in one turn from a few sites' words, but little of older deltas.
    #[must_use]
    pub(crate) fn beside(self, down: Codec) -> Self {
        match self {
            Self::Auto { .. } if matches!(down, Codec::Tcq(_)) => Self::Memoryless { learning_rate: 1.0 },
            rule => rule,
        }
    }

    /// η and μ for consecutive merged deltas of cosine `rho`.
    fn coefficients(self, rho: f64) -> (f64, f64) {
        match self {
            Self::Auto { momentum } => (1.0 / lengthening(f64::from(momentum), rho), f64::from(momentum)),
            Self::Memoryless { learning_rate } => (f64::from(learning_rate), 0.0),
            Self::Nesterov { learning_rate, momentum } => (f64::from(learning_rate), f64::from(momentum)),
        }
    }
}

/// 1 + μ/(1 − μρ): how much further than η Θ moves along deltas of cosine ρ.
fn lengthening(mu: f64, rho: f64) -> f64 {
    if mu > 0.0 { 1.0 + mu / (1.0 - mu * rho) } else { 1.0 }
}

impl Default for OuterRule {
    fn default() -> Self {
        Self::Auto { momentum: Self::auto_momentum() }
    }
}

/// How one outer step is computed: with its contributions, all that is needed to do it again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// How contributions are merged.
    pub merge: Averaging,
    /// How Θ follows.
    pub rule: OuterRule,
    /// The codec of the way down.
    pub codec: Codec,
    /// The change is multiplied with this: below 1 when sites are absent whose data nobody present has.
    pub share: f64,
    /// How the merge protects itself.
    #[serde(default)]
    pub guard: Guard,
}

/// The global model and the outer optimizer's state, by fragment.
#[derive(Debug, Clone, PartialEq)]
pub struct Global {
    manifest: Manifest,
    /// Θ: the sum of what was broadcast.
    pub theta: Vec<Vec<f32>>,
    /// b; empty before the first step.
    pub momentum: Vec<Vec<f32>>,
    /// What the codec of the way down has not yet delivered.
    pub residual: Vec<Vec<f32>>,
    /// ρ, smoothed.
    pub rho: Vec<f64>,
    /// The turn in which all speak who set out from Θ as it is now.
    turns: Vec<u8>,
    memory: Memory,
}

/// Memory of one merge for the next: the system takes longer to hand out fresh memory than a merge of sparse
/// contributions takes to fill it. What it holds means nothing.
#[derive(Debug, Default)]
struct Memory(Vec<f32>);

impl Clone for Memory {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for Memory {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// The result of one outer step.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The encoded change of Θ, to be broadcast.
    pub payload: Vec<u8>,
    /// Content address of the payload.
    pub delta: Digest,
    /// Digest of the fragment's Θ after the change.
    pub digest: Digest,
    /// What was seen on the way.
    pub measures: Measures,
}

/// What an outer step shows of how the run is doing. The guard's verdicts go into the journal with the commit; no
/// decision about correctness uses anything else.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Length of the merged pseudo-gradient.
    pub norm: f64,
    /// Cosine of each contribution to the merged pseudo-gradient, in the order given.
    pub cosines: Vec<f64>,
    /// For each contribution the greatest share of a tensor that the correction for staleness changed.
    pub corrections: Vec<f64>,
    /// What the guard says of each contribution.
    pub verdicts: Vec<Verdict>,
    /// Bytes of each contribution's payload, in the order given.
    pub bytes: Vec<u64>,
    /// Codec of each, in the order given.
    #[serde(default)]
    pub codecs: Vec<Codec>,
    /// Smoothed cosine of consecutive merged pseudo-gradients.
    pub rho: f64,
    /// The effective step η·(1 + μ/(1 − μρ)), with the share of the recipe.
    pub effective_step: f64,
    /// Length of what the codec has not delivered yet.
    pub residual: f64,
}

/// Why an outer step could not be computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A payload is gone.
    #[error("the payload {0} of a contribution is missing")]
    Missing(Digest),
    /// A payload does not decode, or the change is not finite.
    #[error("{payload}: {source}")]
    Codec {
        /// Which payload.
        payload: Digest,
        /// Why.
        source: CodecError,
    },
    /// Doing it again gave something else.
    #[error("{fragment} version {version} was {journaled} and is now {computed}")]
    Differs {
        /// The fragment.
        fragment: FragmentId,
        /// The version.
        version: u64,
        /// Digest in the journal.
        journaled: Digest,
        /// Digest computed.
        computed: Digest,
    },
}

/// The payload of a contribution.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What is known of its length, if it was looked at before.
    pub squares: Squares,
}

impl From<Vec<u8>> for Found {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, squares: Squares::default() }
    }
}

/// A fragment of weights `theta` as a whole step along one payload alone would leave it.
///
/// # Errors
/// If the payload is not for so many weights.
pub fn step_alone(theta: &[f32], payload: &[u8], team: &dyn Team) -> Result<Vec<f32>, CodecError> {
    let mut stepped = theta.to_vec();
    Payload::parse(payload, theta.len())?.add_scaled(-1.0, &mut stepped, team);
    Ok(stepped)
}

/// Weight of the newest ρ in the smoothed one.
const RHO_SHARE: f64 = 0.1;
/// Beyond this, consecutive deltas are the same and the model of ρ ends.
const RHO_MAX: f64 = 0.95;
/// Weights that a team's member takes at a time.
const STRETCH: usize = 1 << 16;
/// Lengths beyond this are no training; sums of such numbers might not be finite.
const NORM_MAX: f64 = 1e30;

impl Global {
    /// A global model with these first weights (per fragment) and no history.
    pub fn new(manifest: Manifest, theta: Vec<Vec<f32>>) -> Self {
        let residual = theta.iter().map(|fragment| vec![0.0; fragment.len()]).collect();
        let momentum = vec![Vec::new(); theta.len()];
        let rho = vec![0.0; theta.len()];
        let turns = theta.iter().map(|fragment| turn_of(&Digest::of_weights(fragment))).collect();
        Self { manifest, theta, momentum, residual, rho, turns, memory: Memory::default() }
    }

    /// The layout.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Digest of each fragment.
    pub fn digests(&self) -> Vec<Digest> {
        self.theta.iter().map(|fragment| Digest::of_weights(fragment)).collect()
    }

    /// Weights by tensor, as Hugging Face orders them.
    pub fn tensors(&self) -> Vec<Vec<f32>> {
        self.manifest.scatter(&self.theta)
    }

    /// Computes the outer step that leads to `version`, for `contributions` whose payloads `payload` finds by address.
    ///
    /// # Errors
    /// If a payload is missing or useless; then nothing has changed.
    pub fn perform(
        &mut self,
        fragment: FragmentId,
        version: u64,
        contributions: &[Accepted],
        recipe: &Recipe,
        payload: &dyn Fn(Digest) -> Option<Found>,
        team: &dyn Team,
    ) -> Result<Step, StepError> {
        let count = self.theta[fragment.index()].len();
        let bytes = |accepted: &Accepted| payload(accepted.payload).ok_or(StepError::Missing(accepted.payload));
        let payloads: Vec<Found> = contributions.iter().map(bytes).collect::<Result<_, _>>()?;
        let mut weighted = Vec::new();
        for (accepted, Found { bytes, squares }) in contributions.iter().zip(&payloads) {
            // Every payload was checked when it came, and its address says that it is still the same.
            let sound = Payload::parse(bytes, count);
            let sound = sound.map_err(|source| StepError::Codec { payload: accepted.payload, source })?;
            let sound = sound.knowing(squares);
            let stale = accepted.base + 1 < version;
            let &Accepted { weight, steps, trust, quality, payload: name, .. } = accepted;
            weighted.push(Weighted { weight, steps, trust, quality, name, stale, payload: sound });
        }
        let first = contributions.first().map_or(Digest::default(), |accepted| accepted.payload);
        let step = self.step(fragment, &weighted, recipe, team);
        let mut step = step.map_err(|source| StepError::Codec { payload: first, source })?;
        step.measures.codecs = weighted.iter().map(|contribution| contribution.payload.codec()).collect();
        step.measures.bytes = payloads.iter().map(|found| found.bytes.len() as u64).collect();
        Ok(step)
    }

    /// Computes a journaled commit again and compares.
    ///
    /// # Errors
    /// If a payload is missing or the result is not the journaled one.
    pub fn replay(
        &mut self,
        commit: &Commit,
        payload: &dyn Fn(Digest) -> Option<Found>,
        team: &dyn Team,
    ) -> Result<Step, StepError> {
        let Commit { fragment, version, contributions, recipe, .. } = commit;
        let step = self.perform(*fragment, *version, contributions, recipe, payload, team)?;
        if step.digest != commit.digest {
            return Err(StepError::Differs {
                fragment: commit.fragment,
                version: commit.version,
                journaled: commit.digest,
                computed: step.digest,
            });
        }
        Ok(step)
    }

    /// Merges `contributions` and moves `fragment`.
    ///
    /// # Errors
    /// If the merged delta is not finite; then nothing has changed.
    pub fn step(
        &mut self,
        fragment: FragmentId,
        contributions: &[Weighted<'_>],
        recipe: &Recipe,
        team: &dyn Team,
    ) -> Result<Step, CodecError> {
        let (momentum, memory) = (&self.momentum[fragment.index()], std::mem::take(&mut self.memory.0));
        let merged = merge(&self.manifest, fragment, recipe, contributions, momentum, memory, team);
        let step = self.follow(fragment, &merged, recipe, team);
        self.memory.0 = merged.into_memory();
        step
    }

    /// Moves `fragment` by what was merged.
    ///
    /// # Errors
    /// If the merged delta is not finite; then nothing has changed.
    pub fn follow(
        &mut self,
        fragment: FragmentId,
        merged: &Merged,
        recipe: &Recipe,
        team: &dyn Team,
    ) -> Result<Step, CodecError> {
        let index = fragment.index();
        if !merged.norm.is_finite() || merged.norm >= NORM_MAX {
            return Err(CodecError::NonFinite { index: 0 });
        }
        self.gather_speed(index, merged, recipe, team);
        let payload = self.write_down(index, merged, recipe, team)?;
        let theta = &mut self.theta[index];
        Payload::parse(&payload, theta.len())?.add_to(theta, team);
        let digest = Digest::of_weights_by(theta, team);
        self.turns[index] = turn_of(&digest);
        let (rate, mu) = recipe.rule.coefficients(self.rho[index]);
        Ok(Step {
            delta: Digest::of(&payload),
            digest,
            payload,
            measures: Measures {
                norm: merged.norm,
                bytes: Vec::new(),
                codecs: Vec::new(),
                cosines: merged.cosines.clone(),
                corrections: merged.corrections.clone(),
                verdicts: merged.verdicts.clone(),
                rho: self.rho[index],
                effective_step: recipe.share * rate * lengthening(mu, self.rho[index]),
                residual: length(&self.residual[index], team),
            },
        })
    }

    /// Moves a fragment's momentum, and ρ by what the momentum and the merged delta had in common.
    fn gather_speed(&mut self, index: usize, merged: &Merged, recipe: &Recipe, team: &dyn Team) {
        let momentum = &mut self.momentum[index];
        momentum.resize(merged.len(), 0.0);
        let (_, mu) = recipe.rule.coefficients(0.0);
        let along = share_out(momentum.chunks_mut(STRETCH), team, |number, momentum| {
            let mut values = [0.0; CHUNK];
            let mut along = 0.0;
            for (index, momentum) in momentum.chunks_mut(CHUNK).enumerate() {
                let values = &mut values[..momentum.len()];
                simd(
                    #[inline(always)]
                    || {
                        merged.read(number * STRETCH + index * CHUNK, values);
                        along += dot(values, momentum);
                        let mu = mu as f32;
                        for (buffer, delta) in momentum.iter_mut().zip(&*values) {
                            *buffer = mu * *buffer + delta;
                        }
                    },
                );
            }
            along
        });
        let measured = measured_rho(along.iter().sum(), merged.norm, mu);
        self.rho[index] = plan::smooth(self.rho[index], measured, RHO_SHARE);
    }

    /// Writes down by how much Θ is to move; what the codec cannot say stays in the residual.
    fn write_down(
        &mut self,
        index: usize,
        merged: &Merged,
        recipe: &Recipe,
        team: &dyn Team,
    ) -> Result<Vec<u8>, CodecError> {
        let (rate, mu) = recipe.rule.coefficients(self.rho[index]);
        let (rate, mu) = ((recipe.share * rate) as f32, mu as f32);
        let momentum = &self.momentum[index];
        recipe.codec.encode_prepared(&mut self.residual[index], self.turns[index], team, |start, wish| {
            let mut values = [0.0; CHUNK];
            let values = &mut values[..wish.len()];
            merged.read(start, values);
            for ((wish, delta), buffer) in wish.iter_mut().zip(&*values).zip(&momentum[start..]) {
                *wish -= rate * (delta + mu * buffer);
            }
        })
    }
}

/// ρ from how far the merged delta goes along the buffer b before it: if cosines fall off as ρ, ρ², …, then
/// r = Δ·b/‖Δ‖² is ρ/(1 − μρ).
fn measured_rho(along: f64, length: f64, mu: f64) -> f64 {
    if length == 0.0 {
        return 0.0;
    }
    let ratio = along / (length * length);
    (ratio / (1.0 + mu * ratio).max(1e-3)).clamp(0.0, RHO_MAX)
}

/// Euclidean length, by stretches that a team shares.
fn length(values: &[f32], team: &dyn Team) -> f64 {
    share_out(values.chunks(STRETCH), team, |_, stretch| square(stretch)).iter().sum::<f64>().sqrt()
}
