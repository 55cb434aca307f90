//! The outer step: merge the sites' pseudo-gradients, move Θ, and say by how much. All arithmetic is
//! `f32` and `f64` on the host in a fixed order, so every machine gets the same bits.
//!
//! **Merge** is a radial-directional average per tensor (Decoupled DiLoCo, arXiv 2604.21428): the
//! direction is that of the weighted mean of the unit vectors, the length is the weighted mean of the
//! lengths. A plain mean of nearly orthogonal deltas is short by √M; this one is not. Embeddings,
//! whose rows each site sees at different frequency, are averaged plainly.
//!
//! **The model is what was sent.** The change of Θ is encoded first and then *decoded and added*, here
//! as at every site; what the codec lost stays in a residual for the next round.

use serde::{Deserialize, Serialize};

use crate::codec::{self, Codec, CodecError};
use crate::delta::{add, cosine, norm};
use crate::hash::Digest;
use crate::journal::{Accepted, Commit};
use crate::manifest::{FragmentId, Manifest};
use crate::model::TensorKind;

/// How Θ follows the merged pseudo-gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "rule")]
pub enum OuterRule {
    /// Θ ← Θ − η·Δ. No state; good for short rounds (H ≤ 64).
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

impl Default for OuterRule {
    fn default() -> Self {
        Self::Memoryless { learning_rate: 1.0 }
    }
}

/// One site's pseudo-gradient of one fragment with its weight in the merge.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// Relative weight; only ratios matter.
    pub weight: f64,
    /// Δ of the fragment.
    pub delta: Vec<f32>,
}

/// The global model and the outer optimizer's state, by fragment.
#[derive(Debug, Clone, PartialEq)]
pub struct Global {
    manifest: Manifest,
    /// Θ: the sum of what was broadcast.
    pub theta: Vec<Vec<f32>>,
    /// Nesterov's buffer; empty while the rule keeps none.
    pub momentum: Vec<Vec<f32>>,
    /// What the codec of the way down has not yet delivered.
    pub residual: Vec<Vec<f32>>,
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
    /// Length of the merged pseudo-gradient.
    pub norm: f64,
    /// Cosine of each contribution to the merged pseudo-gradient, in the order given.
    pub cosines: Vec<f64>,
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

/// Merges `deltas`, in the order given, into one pseudo-gradient of `fragment`.
pub fn merge(manifest: &Manifest, fragment: FragmentId, deltas: &[Weighted]) -> Vec<f32> {
    let mut merged = vec![0.0f32; manifest.fragment_len(fragment).unwrap_or(0)];
    let total: f64 = deltas.iter().map(|part| part.weight).sum();
    if total <= 0.0 {
        return merged;
    }
    for place in manifest.places(fragment) {
        let parts: Vec<(f64, &[f32])> =
            deltas.iter().map(|part| (part.weight / total, &part.delta[place.range.clone()])).collect();
        let out = &mut merged[place.range];
        match manifest.tensors()[place.tensor].kind {
            TensorKind::Embedding => weighted_sum(&parts, out),
            TensorKind::Matrix | TensorKind::Vector => radial_directional(&parts, out),
        }
    }
    merged
}

fn weighted_sum(parts: &[(f64, &[f32])], out: &mut [f32]) {
    for (weight, values) in parts {
        let weight = *weight as f32;
        out.iter_mut().zip(*values).for_each(|(out, value)| *out += weight * value);
    }
}

fn radial_directional(parts: &[(f64, &[f32])], out: &mut [f32]) {
    let lengths: Vec<f64> = parts.iter().map(|(_, values)| norm(values)).collect();
    let length: f64 = parts.iter().zip(&lengths).map(|((weight, _), length)| weight * length).sum();
    let units: Vec<(f64, &[f32])> = parts
        .iter()
        .zip(&lengths)
        .map(|((weight, values), length)| (if *length > 0.0 { weight / length } else { 0.0 }, *values))
        .collect();
    weighted_sum(&units, out);
    let direction = norm(out);
    let scale = if direction > 0.0 { (length / direction) as f32 } else { 0.0 };
    out.iter_mut().for_each(|out| *out *= scale);
}

impl Global {
    /// A global model with these first weights (per fragment) and no history.
    pub fn new(manifest: Manifest, theta: Vec<Vec<f32>>) -> Self {
        let residual = theta.iter().map(|fragment| vec![0.0; fragment.len()]).collect();
        let momentum = vec![Vec::new(); theta.len()];
        Self { manifest, theta, momentum, residual }
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

    /// Computes the outer step for `contributions`, whose payloads `payload` finds by address.
    ///
    /// # Errors
    /// If a payload is missing or useless; then nothing has changed.
    pub fn perform(
        &mut self,
        fragment: FragmentId,
        contributions: &[Accepted],
        rule: OuterRule,
        codec: Codec,
        payload: &dyn Fn(Digest) -> Option<Vec<u8>>,
    ) -> Result<Step, StepError> {
        let count = self.theta[fragment.index()].len();
        let weighted = |accepted: &Accepted| {
            let bytes = payload(accepted.payload).ok_or(StepError::Missing(accepted.payload))?;
            let delta = codec::decode(&bytes, count)
                .map_err(|source| StepError::Codec { payload: accepted.payload, source })?;
            Ok(Weighted { weight: accepted.weight, delta })
        };
        let deltas: Vec<Weighted> = contributions.iter().map(weighted).collect::<Result<_, StepError>>()?;
        let first = contributions.first().map_or(Digest::default(), |accepted| accepted.payload);
        self.step(fragment, &deltas, rule, codec).map_err(|source| StepError::Codec { payload: first, source })
    }

    /// Computes a journaled commit again and compares.
    ///
    /// # Errors
    /// If a payload is missing or the result is not the journaled one.
    pub fn replay(&mut self, commit: &Commit, payload: &dyn Fn(Digest) -> Option<Vec<u8>>) -> Result<Step, StepError> {
        let step = self.perform(commit.fragment, &commit.contributions, commit.rule, commit.codec, payload)?;
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

    /// Merges `deltas` and moves `fragment`.
    ///
    /// # Errors
    /// If the change is not finite; then nothing has changed.
    pub fn step(
        &mut self,
        fragment: FragmentId,
        deltas: &[Weighted],
        rule: OuterRule,
        codec: Codec,
    ) -> Result<Step, CodecError> {
        let index = fragment.index();
        let merged = merge(&self.manifest, fragment, deltas);
        let (change, momentum) = outer_change(&merged, &self.momentum[index], rule);
        let wish: Vec<f32> = self.residual[index].iter().zip(&change).map(|(rest, change)| rest + change).collect();
        let payload = codec.encode(&wish)?;
        let sent = codec::decode(&payload, wish.len())?;
        self.momentum[index] = momentum;
        self.residual[index] = wish.iter().zip(&sent).map(|(wish, sent)| wish - sent).collect();
        add(&mut self.theta[index], &sent);
        Ok(Step {
            delta: Digest::of(&payload),
            digest: Digest::of_weights(&self.theta[index]),
            norm: norm(&merged),
            cosines: deltas.iter().map(|part| cosine(&part.delta, &merged)).collect(),
            payload,
        })
    }
}

/// The wished change of Θ, and the optimizer's next state.
fn outer_change(merged: &[f32], momentum: &[f32], rule: OuterRule) -> (Vec<f32>, Vec<f32>) {
    match rule {
        OuterRule::Memoryless { learning_rate } => {
            (merged.iter().map(|delta| -learning_rate * delta).collect(), Vec::new())
        }
        OuterRule::Nesterov { learning_rate, momentum: mu } => {
            let before = momentum.iter().copied().chain(std::iter::repeat(0.0));
            let buffer: Vec<f32> = merged.iter().zip(before).map(|(delta, before)| mu * before + delta).collect();
            let change = merged.iter().zip(&buffer).map(|(delta, buffer)| -learning_rate * (delta + mu * buffer));
            (change.collect(), buffer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Tensor;
    use crate::rng::Rng;
    use proptest::prelude::*;

    fn manifest() -> Manifest {
        let tensors = vec![
            Tensor::new("embed", &[8, 4], TensorKind::Embedding),
            Tensor::new("matrix", &[8, 8], TensorKind::Matrix),
        ];
        Manifest::balanced(tensors, 1)
    }

    fn random(seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..96).map(|_| rng.normal() as f32).collect()
    }

    fn all() -> FragmentId {
        FragmentId(0)
    }

    #[test]
    fn one_contribution_merges_to_itself() {
        let delta = random(1);
        let merged = merge(&manifest(), all(), &[Weighted { weight: 3.0, delta: delta.clone() }]);
        assert!(merged.iter().zip(&delta).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn matrices_keep_their_length_and_embeddings_are_averaged() {
        let parts = [random(1), random(2), random(3)].map(|delta| Weighted { weight: 1.0, delta });
        let merged = merge(&manifest(), all(), &parts);
        let length = parts.iter().map(|part| norm(&part.delta[32..])).sum::<f64>() / 3.0;
        assert!((norm(&merged[32..]) - length).abs() < 1e-4);
        for (i, merged) in merged.iter().take(32).enumerate() {
            let mean = parts.iter().map(|part| part.delta[i]).sum::<f32>() / 3.0;
            assert!((merged - mean).abs() < 1e-6);
        }
    }

    #[test]
    fn nesterov_is_the_textbooks() {
        let rule = OuterRule::Nesterov { learning_rate: 0.5, momentum: 0.9 };
        let (first, buffer) = outer_change(&[1.0], &[], rule);
        assert_eq!((first[0], buffer[0]), (-0.5 * 1.9, 1.0));
        let (second, buffer) = outer_change(&[1.0], &buffer, rule);
        assert!((buffer[0] - 1.9).abs() < 1e-6 && (second[0] + 0.5 * (1.0 + 0.9 * 1.9)).abs() < 1e-6);
    }

    proptest! {
        /// Whatever the codec loses, Θ + residual is where uncompressed steps would have led.
        #[test]
        fn the_residual_keeps_what_the_codec_lost(seed: u64, rounds in 1usize..6) {
            let mut global = Global::new(manifest(), vec![vec![0.0; 96]]);
            let mut exact = vec![0.0f64; 96];
            for round in 0..rounds {
                let delta = random(seed.wrapping_add(round as u64));
                let rule = OuterRule::Memoryless { learning_rate: 0.7 };
                let merged = merge(&manifest(), all(), &[Weighted { weight: 1.0, delta: delta.clone() }]);
                global.step(all(), &[Weighted { weight: 1.0, delta }], rule, Codec::E3m0).unwrap();
                exact.iter_mut().zip(&merged).for_each(|(exact, delta)| *exact -= 0.7 * f64::from(*delta));
            }
            for ((theta, rest), exact) in global.theta[0].iter().zip(&global.residual[0]).zip(&exact) {
                prop_assert!((f64::from(theta + rest) - exact).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_change_that_is_not_finite_changes_nothing() {
        let mut global = Global::new(manifest(), vec![vec![0.0; 96]]);
        let before = global.clone();
        let bad = Weighted { weight: 1.0, delta: vec![f32::INFINITY; 96] };
        assert!(global.step(all(), &[bad], OuterRule::default(), Codec::F32).is_err());
        assert_eq!(global, before);
    }
}
