//! What a site does with weights. For each fragment it keeps Θ, its copy of the global model, a **reference**, the
//! point from which its own unsent progress is measured, and a **residual**, what its codec has not delivered yet.
//!
//! ```text
//!              residual in the weights                  residual in a buffer
//! contribute   wish = reference − θ                     wish = residual + (reference − θ)
//!              payload = encode(wish), residual ← wish − decode(payload)
//!              reference ← θ + residual                 reference ← θ
//! refused      θ ← θ + (Θ − reference)                  reference ← Θ, and the residual is the one before
//! commit       untold ← what the payload leaves of Θ − reference, and Θ ← Θ + decode(payload), and then
//!   carry      θ ← θ + (Θ − untold − reference),        reference ← Θ − untold
//!   overwrite  reference ← Θ − untold
//!              θ ← reference − residual                 θ ← reference
//! install      θ ← Θ − residual                         θ ← Θ
//! ```
//!
//! A wish is a pseudo-gradient: the outer step subtracts it. *Carry* keeps the steps taken while a contribution
//! travelled on top of the new global model; work already sent is not applied twice, whether the commit contains it or
//! not. A commit in a codec that leaves most to later ones tells the rest later; until then what this site has handed in
//! stays in its weights, or it would learn it again and hand it in twice: all where the payload does not speak, and where
//! trellis-coded quantization does, a share. As long as a contribution is undecided two residuals are kept: the one that
//! it has left and the one before, which holds if its samples go back to the pool. Everything here runs beside the
//! training: an engine only hands out its weights and takes in a [`Change`].

mod products;
pub mod residual;
#[cfg(test)]
mod tests;

use std::mem;

use serde::{Deserialize, Serialize};

use crate::codec::{self, Codec, CodecError, turn_of};
use crate::engine::{self, Batch, Engine, EngineError, Evaluation};
use crate::hash::Digest;
use crate::manifest::{FragmentId, Manifest};
use crate::simd::simd;
use crate::team::Team;
pub(crate) use products::Products;
pub use products::{cosine, dot, norm, square};
use residual::Residual;

/// What becomes of the steps that a site took while its contribution travelled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Follow {
    /// Carry unless they go against the commits; then overwrite.
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
    /// In a buffer beside its weights, which start over from the global model as far as it has been told (SparseLoCo,
    /// arXiv 2508.15706).
    Buffer,
}

/// A site's copy of the global model, the references of its own progress, and its residuals.
#[derive(Debug, Clone)]
pub struct Local {
    fragments: Vec<Copies>,
    follow: Follow,
    feedback: Feedback,
    /// Memory for the next wish.
    scratch: Vec<f32>,
}

#[derive(Debug, Clone, Default)]
struct Copies {
    theta: Vec<f32>,
    /// None while it is Θ.
    reference: Option<Vec<f32>>,
    /// What the last contribution that is in the model has left.
    owed: Option<Residual>,
    /// What a later one has left, of which that is not known yet.
    undecided: Option<Residual>,
    /// The last commit's payload.
    last: Vec<u8>,
    /// The codec of the last contribution.
    up: Option<Codec>,
    /// The turn of the next contribution: that of Θ.
    turn: u8,
    /// Smoothed cosine of this site's steps to the last commit, where that one moved Θ.
    agreement: f64,
    /// Steps were given up, and nothing was contributed since.
    gave_up: bool,
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
    /// Whether it leaves nothing of the steps since the last contribution.
    pub fn overwrites(&self) -> bool {
        matches!(self, Change::Write(_))
    }

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
/// Steps whose smoothed cosine to the commits is no more than this undo what the others do. Less is noise: what a commit
/// has of it every site takes back.
const OPPOSED: f64 = -0.5;
/// Weight of the newest cosine in the smoothed one.
const AGREEMENT_SHARE: f64 = 0.2;

impl Local {
    /// Copies for a layout, all zero until [`install`](Self::install).
    pub fn new(manifest: &Manifest, follow: Follow, feedback: Feedback) -> Self {
        let copies = |theta| Copies { theta, ..Copies::default() };
        Self { fragments: manifest.zeros().into_iter().map(copies).collect(), follow, feedback, scratch: Vec::new() }
    }

    /// This site's copy of the global model.
    pub fn theta(&self, fragment: FragmentId) -> &[f32] {
        &self.fragments[fragment.index()].theta
    }

    /// What the codec of the way up has not delivered yet: after the last contribution that is in the model, and after
    /// a later one that is undecided.
    pub fn residuals(&self, fragment: FragmentId) -> impl Iterator<Item = &Residual> {
        let Copies { owed, undecided, .. } = &self.fragments[fragment.index()];
        owed.iter().chain(undecided)
    }

    /// Takes up what an earlier process has left; [`install`](Self::install) then begins from it.
    pub fn recall(&mut self, fragment: FragmentId, residual: Residual) {
        let copies = &mut self.fragments[fragment.index()];
        if residual.values.len() == copies.theta.len() && codec::check_finite(&residual.values).is_ok() {
            copies.owed = Some(residual);
        }
    }

    /// The last contribution is in the model: what it has left is owed.
    pub fn delivered(&mut self, fragment: FragmentId) {
        let copies = &mut self.fragments[fragment.index()];
        if let Some(residual) = copies.undecided.take()
            && let Some(before) = copies.owed.replace(residual)
        {
            self.scratch = before.values;
        }
    }

    /// Starts `fragment` over from the global `weights`; steps that are not contributed are given up, residuals kept.
    ///
    /// # Errors
    /// If the weights are not finite or not as many as the fragment has.
    pub fn install(&mut self, fragment: FragmentId, weights: Vec<f32>) -> Result<(Digest, Change), DeltaError> {
        let copies = &mut self.fragments[fragment.index()];
        let expected = copies.theta.len();
        let fits = match weights.len() {
            found if found != expected => Err(CodecError::Count { found, expected }),
            _ => codec::check_finite(&weights),
        };
        fits.map_err(|source| DeltaError { fragment, source })?;
        let digest = Digest::of_weights(&weights);
        copies.theta = weights;
        copies.reference = None;
        copies.last = Vec::new();
        copies.turn = turn_of(&digest);
        Ok((digest, Change::Write(copies.start(self.feedback))))
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
        let copies = &mut self.fragments[fragment.index()];
        copies.agree(&weights);
        (copies.gave_up, copies.up) = (false, Some(codec));
        let mut wish = of_length(mem::take(&mut self.scratch), weights.len());
        let Copies { theta, reference, owed, .. } = &*copies;
        let from = reference.as_deref().unwrap_or(theta);
        let buffer = owed.as_ref().filter(|_| self.feedback == Feedback::Buffer);
        let bytes = codec.encode_prepared(&mut wish, copies.turn, team, |start, wish| {
            let range = start..start + wish.len();
            let (weights, from) = (&weights[range.clone()], &from[range.clone()]);
            wish.iter_mut().zip(weights).zip(from).for_each(|((wish, weight), from)| *wish = from - weight);
            if let Some(buffer) = buffer {
                wish.iter_mut().zip(&buffer.values[range]).for_each(|(wish, rest)| *wish += rest);
            }
        });
        let bytes = bytes.map_err(|source| DeltaError { fragment, source })?;
        if self.feedback == Feedback::Weights {
            // What was not sent stays in the weights: the reference moves only by what was.
            weights.iter_mut().zip(&wish).for_each(|(weight, rest)| *weight += rest);
        }
        let sent = codec::Payload::parse(&bytes, theta.len()).map_err(|source| DeltaError { fragment, source })?;
        let (norm, digest) = (codec::Squares::of(&sent, team).norm(), Digest::of(&bytes));
        copies.undecided = Some(Residual { after: digest, values: wish });
        let spare = copies.reference.replace(weights);
        Ok(Payload { digest, bytes, norm, agreement: copies.agreement, spare })
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
        let untold = copies.untold(&sound);
        if copies.reference.is_none() {
            copies.reference = Some(copies.theta.clone()); // Nothing was contributed since the last commit.
        }
        sound.add_to(&mut copies.theta, team);
        let carried = match untold {
            Some(untold) => copies.carry_but(untold),
            None if sound.codec().is_sparse() => copies.carry_where_told(&sound),
            None => copies.carry(),
        };
        let carries = copies.carries(self.follow);
        copies.gave_up |= !carries;
        let change = if carries { carried } else { Change::Write(copies.start(self.feedback)) };
        copies.last = payload;
        let digest = Digest::of_weights_by(&copies.theta, team);
        copies.turn = turn_of(&digest);
        Ok((digest, change))
    }

    /// Gives up a refused contribution, sent and left, keeping what was learnt before and since, but for what was handed in
    /// before and no commit has told yet.
    pub fn rebase(&mut self, fragment: FragmentId) -> Change {
        let copies = &mut self.fragments[fragment.index()];
        let mut change = copies.carry();
        let refused = copies.undecided.take().filter(|_| self.feedback == Feedback::Weights);
        if let (Change::Add(change), Some(refused)) = (&mut change, refused) {
            add(change, &refused.values);
            if let Some(owed) = &copies.owed {
                change.iter_mut().zip(&owed.values).for_each(|(change, rest)| *change -= rest);
            }
        }
        change
    }

    /// Writes the global model into `engine`, measures its loss on `batches`, and puts the engine's own weights back.
    ///
    /// # Errors
    /// If the engine fails; its own weights are put back if it failed on a batch.
    pub fn evaluate(&self, engine: &mut dyn Engine, batches: &[Batch]) -> Result<Evaluation, EngineError> {
        evaluate(self.thetas(), engine, batches)
    }

    /// All of Θ, to be evaluated elsewhere.
    pub fn thetas(&self) -> Vec<Vec<f32>> {
        self.fragments.iter().map(|copies| copies.theta.clone()).collect()
    }
}

impl Copies {
    /// What is not delivered, as far as this site knows.
    fn residual(&self) -> Option<&[f32]> {
        self.undecided.as_ref().or(self.owed.as_ref()).map(|residual| residual.values.as_slice())
    }

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
            let cosine = dot / (own * theirs).sqrt();
            // What is rounded up beyond 1 would be no cosine, and nobody believes a site that says so.
            self.agreement = (self.agreement + AGREEMENT_SHARE * (cosine - self.agreement)).clamp(-1.0, 1.0);
        }
    }

    /// Whether the steps since the last contribution are kept. Those of a site that has given some up are, until it has
    /// contributed: where every step sees a commit, or several, it never would otherwise.
    fn carries(&self, follow: Follow) -> bool {
        self.gave_up
            || match follow {
                Follow::Carry => true,
                Follow::Overwrite => false,
                Follow::Auto => self.agreement > OPPOSED,
            }
    }

    /// Makes Θ the reference where `commit`, which it has in it, spoke; what the engine must do for that. Elsewhere what this
    /// site has handed in is on its way still, at the coordinator, and stays in its weights until a commit tells of it.
    fn carry_where_told(&mut self, commit: &codec::Payload<'_>) -> Change {
        let Self { theta, reference, .. } = self;
        let mut change = vec![0.0; theta.len()];
        if let Some(reference) = reference {
            commit.visit(0..theta.len(), |place, _| {
                change[place] = theta[place] - reference[place];
                reference[place] = theta[place];
            });
        }
        Change::Add(change)
    }

    /// About what a commit that Θ has not in it yet is taken to leave of this site's work that is handed in and not told yet: less
    /// with every commit. None if the codec tells nearly everything, or shows itself of what it does not speak.
    fn untold(&self, commit: &codec::Payload<'_>) -> Option<Vec<f32>> {
        let reference = self.reference.as_ref().filter(|_| matches!(commit.codec(), Codec::Tcq(_)))?;
        let mut untold = self.theta.clone();
        simd(
            #[inline(always)]
            || untold.iter_mut().zip(reference).for_each(|(untold, reference)| *untold -= reference),
        );
        commit.leave(self.up?, &mut untold);
        Some(untold)
    }

    /// Makes Θ, but for what is `untold`, the reference; what the engine must do for that.
    fn carry_but(&mut self, mut untold: Vec<f32>) -> Change {
        let Self { theta, reference, .. } = self;
        let Some(reference) = reference else { return Change::Add(vec![0.0; theta.len()]) };
        simd(
            #[inline(always)]
            || {
                for ((untold, theta), reference) in untold.iter_mut().zip(theta).zip(reference) {
                    let from = *theta - *untold;
                    *untold = from - *reference;
                    *reference = from;
                }
            },
        );
        Change::Add(untold)
    }

    /// Weights with no step since the last contribution.
    fn start(&self, feedback: Feedback) -> Vec<f32> {
        let mut weights = self.reference.as_ref().unwrap_or(&self.theta).clone();
        if feedback == Feedback::Weights
            && let Some(residual) = self.residual()
        {
            weights.iter_mut().zip(residual).for_each(|(weight, rest)| *weight -= rest);
        }
        weights
    }

    /// Makes Θ the reference; what the engine must do for that.
    fn carry(&mut self) -> Change {
        let reference = self.reference.take();
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

/// Loss of the model `thetas` on `batches`, measured by an engine that trains another one, whose weights lie in the memory
/// of `thetas` meanwhile.
///
/// # Errors
/// If the engine fails; its own weights are put back if it failed on a batch.
pub fn evaluate(
    mut thetas: Vec<Vec<f32>>,
    engine: &mut dyn Engine,
    batches: &[Batch],
) -> Result<Evaluation, EngineError> {
    engine::exchange_weights(engine, &mut thetas)?;
    let evaluation = engine::evaluate_all(engine, batches);
    engine::write_weights(engine, &thetas)?;
    evaluation
}

/// A vector of `len` in memory that was used before, unless that is too small or much too large.
pub fn of_length(mut memory: Vec<f32>, len: usize) -> Vec<f32> {
    if !(len..=len + len / 8).contains(&memory.capacity()) {
        return vec![0.0; len];
    }
    memory.resize(len, 0.0);
    memory
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
