//! What a site does with weights. For each fragment it keeps Θ, its copy of the global model, and a
//! **reference**: the point from which its own unsent progress is measured.
//!
//! ```text
//! contribute   Δ = reference − θ          (pseudo-gradient: the outer step subtracts it)
//!              reference ← θ
//! commit       Θ ← Θ + decode(payload)    θ ← Θ + (θ − reference)      reference ← Θ
//! ```
//!
//! The second line is *carry*: steps taken while a contribution travelled are kept on top of the new
//! global model, and work already sent is not applied twice, whether the commit contains it or not.

use crate::codec::{self, Codec, CodecError};
use crate::engine::{Batch, Engine, EngineError, Evaluation};
use crate::hash::Digest;
use crate::manifest::FragmentId;

/// A site's copy of the global model and the references of its own progress.
#[derive(Debug, Clone, Default)]
pub struct Local {
    fragments: Vec<Copies>,
}

#[derive(Debug, Clone, Default)]
struct Copies {
    theta: Vec<f32>,
    reference: Vec<f32>,
}

/// A pseudo-gradient ready for the wire.
#[derive(Debug, Clone, PartialEq)]
pub struct Payload {
    /// The encoded Δ.
    pub bytes: Vec<u8>,
    /// Their content address.
    pub digest: Digest,
    /// Euclidean length of Δ.
    pub norm: f64,
}

/// Why weights could not be moved.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DeltaError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Weights or payload are unusable.
    #[error("{fragment}: {source}")]
    Codec {
        /// Where.
        fragment: FragmentId,
        /// Why.
        source: CodecError,
    },
}

impl Local {
    /// Copies for an engine's fragments, all zero until [`install`](Self::install).
    pub fn new(engine: &dyn Engine) -> Self {
        let manifest = engine.manifest();
        let zeros = |fragment| {
            let theta = vec![0.0; manifest.fragment_len(fragment).unwrap_or(0)];
            Copies { reference: theta.clone(), theta }
        };
        Self { fragments: manifest.fragments().map(zeros).collect() }
    }

    /// This site's copy of the global model.
    pub fn theta(&self, fragment: FragmentId) -> &[f32] {
        &self.fragments[fragment.index()].theta
    }

    /// Starts `fragment` over from the global `weights`; local progress on it is given up.
    ///
    /// # Errors
    /// If the weights are not finite or do not fit the engine.
    pub fn install(
        &mut self,
        engine: &mut dyn Engine,
        fragment: FragmentId,
        weights: &[f32],
    ) -> Result<Digest, DeltaError> {
        codec::check_finite(weights).map_err(|source| DeltaError::Codec { fragment, source })?;
        engine.write(fragment, weights)?;
        let copies = &mut self.fragments[fragment.index()];
        copies.theta.copy_from_slice(weights);
        copies.reference.copy_from_slice(weights);
        Ok(Digest::of_weights(&copies.theta))
    }

    /// Takes what the engine has learnt since the last contribution as a payload.
    ///
    /// # Errors
    /// If the engine's weights are not finite.
    pub fn contribute(
        &mut self,
        engine: &mut dyn Engine,
        fragment: FragmentId,
        codec: Codec,
    ) -> Result<Payload, DeltaError> {
        let copies = &mut self.fragments[fragment.index()];
        let mut local = vec![0.0; copies.theta.len()];
        engine.read(fragment, &mut local)?;
        let delta: Vec<f32> = copies.reference.iter().zip(&local).map(|(reference, local)| reference - local).collect();
        let bytes = codec.encode(&delta).map_err(|source| DeltaError::Codec { fragment, source })?;
        copies.reference = local;
        Ok(Payload { digest: Digest::of(&bytes), bytes, norm: norm(&delta) })
    }

    /// Applies a commit's payload to Θ and carries local progress over. Returns the new Θ's digest.
    ///
    /// # Errors
    /// If the payload is none, or the engine fails.
    pub fn commit(
        &mut self,
        engine: &mut dyn Engine,
        fragment: FragmentId,
        payload: &[u8],
    ) -> Result<Digest, DeltaError> {
        let copies = &mut self.fragments[fragment.index()];
        let change = codec::decode(payload, copies.theta.len());
        let change = change.map_err(|source| DeltaError::Codec { fragment, source })?;
        add(&mut copies.theta, &change);
        self.rebase(engine, fragment)?;
        Ok(Digest::of_weights(self.theta(fragment)))
    }

    /// Gives up what was sent and refused, keeping what was learnt since: θ ← Θ + (θ − reference).
    ///
    /// # Errors
    /// If the engine fails.
    pub fn rebase(&mut self, engine: &mut dyn Engine, fragment: FragmentId) -> Result<(), DeltaError> {
        let copies = &mut self.fragments[fragment.index()];
        let mut local = vec![0.0; copies.theta.len()];
        engine.read(fragment, &mut local)?;
        for ((local, reference), theta) in local.iter_mut().zip(&copies.reference).zip(&copies.theta) {
            *local = theta + (*local - reference);
        }
        engine.write(fragment, &local)?;
        copies.reference.copy_from_slice(&copies.theta);
        Ok(())
    }

    /// Loss of the global model (not of the local weights) on `batches`.
    ///
    /// # Errors
    /// If the engine fails; its own weights are put back all the same.
    pub fn evaluate(&self, engine: &mut dyn Engine, batches: &[Batch]) -> Result<Evaluation, EngineError> {
        let own = crate::engine::weights(engine)?;
        self.write_all(engine, self.fragments.iter().map(|copies| &copies.theta))?;
        let losses: Result<Vec<Evaluation>, EngineError> = batches.iter().map(|batch| engine.evaluate(batch)).collect();
        self.write_all(engine, own.iter())?;
        let sum = |total: Evaluation, part: &Evaluation| Evaluation {
            nats: total.nats + part.nats,
            tokens: total.tokens + part.tokens,
        };
        Ok(losses?.iter().fold(Evaluation::default(), sum))
    }

    fn write_all<'a>(
        &self,
        engine: &mut dyn Engine,
        weights: impl Iterator<Item = &'a Vec<f32>>,
    ) -> Result<(), EngineError> {
        weights.enumerate().try_for_each(|(index, weights)| engine.write(FragmentId(index as u16), weights))
    }
}

/// Adds `change` to `weights`, element by element: the one operation by which every copy of Θ moves.
pub fn add(weights: &mut [f32], change: &[f32]) {
    weights.iter_mut().zip(change).for_each(|(weight, change)| *weight += change);
}

const LANES: usize = 8;

/// Dot product in `f64`, summed in a fixed order: the same bits on every machine.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    lanes.iter().sum::<f64>() + rest
}

/// Euclidean length, in the same fixed order as [`dot`].
pub fn norm(values: &[f32]) -> f64 {
    dot(values, values).sqrt()
}

/// Cosine of the angle between two vectors; 0 if one of them has no length.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let lengths = norm(a) * norm(b);
    if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
}
