//! What a site does with weights. For each fragment it keeps Θ, its copy of the global model, a **reference**, the
//! point from which its own unsent progress is measured, and a **residual**, what its codec has not delivered yet.
//!
//! ```text
//! contribute   wish = residual + (reference − θ)        (pseudo-gradient: the outer step subtracts it)
//!              payload = encode(wish)                   residual ← wish − decode(payload)
//!              reference ← θ
//! commit       Θ ← Θ + decode(payload)
//!   carry      θ ← θ + (Θ − reference)                  reference ← Θ
//!   overwrite  θ ← Θ                                    reference ← Θ
//! ```
//!
//! *Carry* keeps the steps taken while a contribution travelled on top of the new global model; work already sent is
//! not applied twice, whether the commit contains it or not. Everything here runs beside the training: an engine only
//! hands out its weights and takes in a [`Change`].

use serde::{Deserialize, Serialize};

use crate::codec::{self, Codec, CodecError};
use crate::engine::{Batch, Engine, EngineError, Evaluation};
use crate::hash::Digest;
use crate::manifest::{FragmentId, Manifest};
use crate::simd::simd;
use crate::team::Team;

/// What becomes of the steps that a site took while its contribution travelled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Follow {
    /// Carry as long as they point where the commits point, else overwrite.
    #[default]
    Auto,
    /// Keep them.
    Carry,
    /// Give them up.
    Overwrite,
}

/// Where a site keeps what its codec has not delivered yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Feedback {
    /// In its weights: it trains on from what it has learnt, delivered or not, and the next contribution is measured
    /// from the global model as if only what was sent had been handed in.
    #[default]
    Weights,
    /// In a buffer beside its weights, which start over from the global model (SparseLoCo, arXiv 2508.15706).
    Buffer,
}

/// A site's copy of the global model, the references of its own progress, and its residuals.
#[derive(Debug, Clone)]
pub struct Local {
    fragments: Vec<Copies>,
    follow: Follow,
    feedback: Feedback,
}

#[derive(Debug, Clone, Default)]
struct Copies {
    theta: Vec<f32>,
    /// None while it is Θ.
    reference: Option<Vec<f32>>,
    residual: Vec<f32>,
    /// The last commit's payload.
    last: Vec<u8>,
    /// Smoothed cosine of this site's steps to the last commit, where that one moved Θ.
    agreement: f64,
}

/// A pseudo-gradient ready for the wire.
#[derive(Debug, Clone, PartialEq)]
pub struct Payload {
    /// The encoded Δ.
    pub bytes: Vec<u8>,
    /// Their content address.
    pub digest: Digest,
    /// Euclidean length of what they say.
    pub norm: f64,
    /// Smoothed cosine of the site's own steps to the last commit.
    pub agreement: f64,
    /// Memory of the fragment's length for the next reading of weights.
    pub spare: Option<Vec<f32>>,
}

/// What an engine is to do with the weights of a fragment.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Replace them by these.
    Write(Vec<f32>),
    /// Add these.
    Add(Vec<f32>),
}

impl Change {
    /// Has `engine` do it; returns the memory.
    ///
    /// # Errors
    /// What the engine says.
    pub fn apply(self, engine: &mut dyn Engine, fragment: FragmentId) -> Result<Vec<f32>, EngineError> {
        match self {
            Change::Write(weights) => engine.write(fragment, &weights).map(|()| weights),
            Change::Add(change) => engine.add(fragment, &change).map(|()| change),
        }
    }
}

/// Why weights could not be moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{fragment}: {source}")]
pub struct DeltaError {
    /// Where.
    pub fragment: FragmentId,
    /// Why.
    pub source: CodecError,
}

/// The cosine is measured on the first of so many parts of a fragment.
const AGREEMENT_SAMPLE: usize = 8;
/// Weight of the newest cosine in the smoothed one.
const AGREEMENT_SHARE: f64 = 0.2;

impl Local {
    /// Copies for a layout, all zero until [`install`](Self::install).
    pub fn new(manifest: &Manifest, follow: Follow, feedback: Feedback) -> Self {
        let zeros = |fragment| {
            let theta = vec![0.0; manifest.fragment_len(fragment).unwrap_or(0)];
            Copies { residual: theta.clone(), theta, ..Copies::default() }
        };
        Self { fragments: manifest.fragments().map(zeros).collect(), follow, feedback }
    }

    /// This site's copy of the global model.
    pub fn theta(&self, fragment: FragmentId) -> &[f32] {
        &self.fragments[fragment.index()].theta
    }

    /// What the codec of the way up has not delivered yet, by fragment.
    pub fn residuals(&self) -> impl Iterator<Item = &[f32]> {
        self.fragments.iter().map(|copies| copies.residual.as_slice())
    }

    /// Takes up the residuals of an earlier process; those of another length are left out.
    pub fn restore_residuals(&mut self, residuals: Vec<Vec<f32>>) {
        let fits = |(copies, residual): &(&mut Copies, Vec<f32>)| {
            copies.residual.len() == residual.len() && codec::check_finite(residual).is_ok()
        };
        let fitting = self.fragments.iter_mut().zip(residuals).filter(fits);
        fitting.for_each(|(copies, residual)| copies.residual = residual);
    }

    /// Starts `fragment` over from the global `weights`; local progress on it is given up, the residual is kept.
    ///
    /// # Errors
    /// If the weights are not finite or not as many as the fragment has.
    pub fn install(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(Digest, Change), DeltaError> {
        let copies = &mut self.fragments[fragment.index()];
        let expected = copies.theta.len();
        let fits = match weights.len() {
            found if found != expected => Err(CodecError::Count { found, expected }),
            _ => codec::check_finite(weights),
        };
        fits.map_err(|source| DeltaError { fragment, source })?;
        copies.theta.copy_from_slice(weights);
        copies.reference = None;
        copies.last = Vec::new();
        Ok((Digest::of_weights(weights), Change::Write(weights.to_vec())))
    }

    /// Makes a payload of what was learnt since the last contribution. `weights` are the engine's as they are now.
    ///
    /// # Errors
    /// If they are not finite.
    pub fn contribute(
        &mut self,
        fragment: FragmentId,
        mut weights: Vec<f32>,
        codec: Codec,
        team: &dyn Team,
    ) -> Result<Payload, DeltaError> {
        let feedback = self.feedback;
        let copies = &mut self.fragments[fragment.index()];
        copies.agree(&weights);
        let Copies { theta, reference, residual, agreement, .. } = copies;
        let from = reference.as_deref().unwrap_or(theta);
        let bytes = codec.encode_prepared(residual, team, |start, wish| {
            let (weights, from) = (&weights[start..start + wish.len()], &from[start..start + wish.len()]);
            for ((wish, weight), from) in wish.iter_mut().zip(weights).zip(from) {
                *wish += from - weight;
            }
        });
        let bytes = bytes.map_err(|source| DeltaError { fragment, source })?;
        if feedback == Feedback::Weights {
            // What was not sent stays in the weights: the reference moves only by what was.
            weights.iter_mut().zip(residual.iter_mut()).for_each(|(weight, rest)| *weight += std::mem::take(rest));
        }
        let sent = codec::Payload::parse(&bytes, theta.len()).map_err(|source| DeltaError { fragment, source })?;
        let (norm, digest) = (sent.norm(), Digest::of(&bytes));
        let spare = reference.replace(weights);
        Ok(Payload { digest, bytes, norm, agreement: *agreement, spare })
    }

    /// Applies a commit's payload to Θ. Returns the new Θ's digest and what the engine is to do.
    ///
    /// # Errors
    /// If the payload is none; then nothing has changed.
    pub fn commit(
        &mut self,
        fragment: FragmentId,
        payload: Vec<u8>,
        team: &dyn Team,
    ) -> Result<(Digest, Change), DeltaError> {
        let copies = &mut self.fragments[fragment.index()];
        let sound = codec::Payload::check(&payload, copies.theta.len(), team);
        let sound = sound.map_err(|source| DeltaError { fragment, source })?;
        if copies.reference.is_none() {
            copies.reference = Some(copies.theta.clone()); // Nothing was contributed since the last commit.
        }
        sound.add_to(&mut copies.theta, team);
        copies.last = payload;
        Ok((Digest::of_weights_by(&copies.theta, team), copies.rebase(self.follow)))
    }

    /// Gives up what was sent and refused, keeping what was learnt since: θ ← θ + (Θ − reference).
    pub fn rebase(&mut self, fragment: FragmentId) -> Change {
        self.fragments[fragment.index()].rebase(Follow::Carry)
    }

    /// Writes the global model into `engine`, measures its loss on `batches`, and puts the engine's own weights back.
    ///
    /// # Errors
    /// If the engine fails; its own weights are put back all the same.
    pub fn evaluate(&self, engine: &mut dyn Engine, batches: &[Batch]) -> Result<Evaluation, EngineError> {
        let thetas: Vec<&[f32]> = self.fragments.iter().map(|copies| copies.theta.as_slice()).collect();
        evaluate(&thetas, engine, batches)
    }

    /// All of Θ, to be evaluated elsewhere.
    pub fn thetas(&self) -> Vec<Vec<f32>> {
        self.fragments.iter().map(|copies| copies.theta.clone()).collect()
    }
}

impl Copies {
    /// Measures whether the steps since the last contribution point where the last commit pointed, looking only at
    /// weights that it moved.
    fn agree(&mut self, weights: &[f32]) {
        let len = weights.len();
        let Ok(commit) = codec::Payload::parse(&self.last, len) else { return };
        let from = self.reference.as_deref().unwrap_or(&self.theta);
        let (mut dot, mut own, mut theirs) = (0.0, 0.0, 0.0);
        commit.visit(0..len.div_ceil(AGREEMENT_SAMPLE), |place, value| {
            let (step, value) = (f64::from(weights[place] - from[place]), f64::from(value));
            (dot, own, theirs) = (dot + step * value, own + step * step, theirs + value * value);
        });
        if own > 0.0 && theirs > 0.0 {
            self.agreement += AGREEMENT_SHARE * (dot / (own * theirs).sqrt() - self.agreement);
        }
    }

    /// Makes Θ the reference; what the engine must do for that.
    fn rebase(&mut self, follow: Follow) -> Change {
        let carry = match follow {
            Follow::Carry => true,
            Follow::Overwrite => false,
            Follow::Auto => self.agreement >= 0.0,
        };
        let reference = self.reference.take();
        if !carry {
            return Change::Write(self.theta.clone());
        }
        let theta = &self.theta;
        let Some(mut change) = reference else { return Change::Add(vec![0.0; theta.len()]) };
        simd(
            #[inline(always)]
            || {
                for (change, theta) in change.iter_mut().zip(theta) {
                    *change = theta - *change;
                }
            },
        );
        Change::Add(change)
    }
}

/// Loss of the model `thetas` on `batches`, measured by an engine that trains another one.
///
/// # Errors
/// If the engine fails; its own weights are put back all the same.
pub fn evaluate(
    thetas: &[impl AsRef<[f32]>],
    engine: &mut dyn Engine,
    batches: &[Batch],
) -> Result<Evaluation, EngineError> {
    let own = crate::engine::weights(engine)?;
    write_all(engine, thetas)?;
    let losses: Result<Vec<Evaluation>, EngineError> = batches.iter().map(|batch| engine.evaluate(batch)).collect();
    write_all(engine, &own)?;
    let sum = |total: Evaluation, part: &Evaluation| Evaluation {
        nats: total.nats + part.nats,
        tokens: total.tokens + part.tokens,
    };
    Ok(losses?.iter().fold(Evaluation::default(), sum))
}

fn write_all(engine: &mut dyn Engine, fragments: &[impl AsRef<[f32]>]) -> Result<(), EngineError> {
    (0..).zip(fragments).try_for_each(|(index, weights)| engine.write(FragmentId(index), weights.as_ref()))
}

/// Adds `change` to `weights`, element by element.
pub fn add(weights: &mut [f32], change: &[f32]) {
    simd(
        #[inline(always)]
        || {
            for (weight, change) in weights.iter_mut().zip(change) {
                *weight += change;
            }
        },
    );
}

const LANES: usize = 16;

/// Dot product in `f64`, summed in a fixed order: the same bits on every machine.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    simd(
        #[inline(always)]
        || {
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
        },
    )
}

/// Squared length: [`dot`] with itself, bit for bit, in fewer instructions.
pub fn square(values: &[f32]) -> f64 {
    simd(
        #[inline(always)]
        || {
            let mut lanes = [0.0f64; LANES];
            let (blocks, rest) = values.as_chunks::<LANES>();
            for block in blocks {
                for lane in 0..LANES {
                    let value = f64::from(block[lane]);
                    lanes[lane] += value * value;
                }
            }
            let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
            lanes.iter().sum::<f64>() + rest
        },
    )
}

/// Euclidean length, in the same fixed order as [`dot`].
pub fn norm(values: &[f32]) -> f64 {
    square(values).sqrt()
}

/// Cosine of the angle between two vectors; 0 if one of them has no length.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let lengths = norm(a) * norm(b);
    if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
}
