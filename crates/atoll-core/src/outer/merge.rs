//! The merge: contributions of one fragment to one pseudo-gradient.
//!
//! ```text
//! for each tensor, of contributions v with weights w that sum up to 1, and the outer momentum b:
//!   lengths    ‖v‖ and, of late ones, v·b        → what each is multiplied with: w/‖v‖, and less if it opposes b
//!   add up     u = Σ share·v, ‖u‖ and v·u        → what the sum is multiplied with: (Σ w·‖v‖) / ‖u‖
//!   scale      whoever reads a value gets scale·u, so that this takes no pass over the memory
//! ```
//!
//! A payload that tells a share ρ² of the energy has a cosine of ρ to what its site has to say, so the cosine of two payloads
//! is about ρ₁ρ₂ times that of two sites. A sum of payloads that look like strangers only for that would be lengthened as if
//! their sites were; so ‖u‖ is taken for what it would be had all been told ([`agreed`]).
//!
//! Contributions are never unpacked as a whole (see [`layout`]), and read once if they were looked at when they came
//! ([`Squares`](crate::codec::Squares)): then only late ones, and chunks where two tensors meet, are read for the lengths.
//! Between the two the [`guard`] says how much of each is merged, from lengths and from a [`sketch`] of the angles between them.

pub mod guard;
mod layout;
mod sketch;

use serde::{Deserialize, Serialize};

use super::Recipe;
use crate::codec::Payload;
use crate::hash::Digest;
use crate::manifest::{FragmentId, Manifest};
use crate::team::Team;
use guard::{Robust, Seen, Verdict};
use layout::{Layout, Sums};
use sketch::Sketch;

/// How contributions become one pseudo-gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Averaging {
    /// Radial-directional per tensor (Decoupled DiLoCo, arXiv 2604.21428): the direction is that of the weighted mean
    /// of the unit vectors, the length is the weighted mean of the lengths. A plain mean of nearly orthogonal deltas
    /// is short by √M; this one is not. Embeddings, whose rows each site sees at different frequency, are averaged
    /// plainly.
    #[default]
    Radial,
    /// The weighted mean.
    Plain,
}

/// A checked payload with its weight in the merge.
#[derive(Debug, Clone, Copy)]
pub struct Weighted<'a> {
    /// Relative weight; only ratios matter.
    pub weight: f64,
    /// Inner steps in it.
    pub steps: u64,
    /// What its site's earlier contributions have shown: see [`guard::learn`].
    pub trust: f64,
    /// How they helped on held-out text: see [`guard::help`].
    pub quality: f64,
    /// Content address of the payload.
    pub name: Digest,
    /// Whether it set out from an older version than the one that is to be moved.
    pub stale: bool,
    /// The pseudo-gradient.
    pub payload: Payload<'a>,
}

/// A merged pseudo-gradient.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Merged {
    /// u: its values before they are multiplied with the scale of their tensor.
    sum: Vec<f32>,
    /// Where each tensor ends, and its scale.
    scales: Vec<(usize, f32)>,
    /// Its length.
    pub norm: f64,
    /// Cosine of each contribution to it, in the order given.
    pub cosines: Vec<f64>,
    /// For each contribution the greatest share of a tensor that the staleness correction took away or turned.
    pub corrections: Vec<f64>,
    /// What the guard says of each contribution.
    pub verdicts: Vec<Verdict>,
}

impl Merged {
    /// Writes its values from position `start` on into `out`.
    #[inline(always)]
    pub(super) fn read(&self, start: usize, out: &mut [f32]) {
        let first = self.scales.partition_point(|(end, _)| *end <= start);
        let (mut from, end) = (start, start + out.len());
        for &(tensor_end, scale) in &self.scales[first..] {
            let to = tensor_end.min(end);
            let (out, sum) = (&mut out[from - start..to - start], &self.sum[from..to]);
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = scale * sum;
            }
            if to == end {
                return;
            }
            from = to;
        }
    }

    /// All its values.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.sum.len()];
        self.read(0, &mut values);
        values
    }

    /// Weights that it is for.
    pub(super) fn len(&self) -> usize {
        self.sum.len()
    }

    /// Its memory, for the next merge.
    pub fn into_memory(self) -> Vec<f32> {
        self.sum
    }
}

/// A late contribution whose cosine to the outer momentum is at least this is left alone.
const ALIGNED: f64 = 0.2;
/// The least that is left of a late contribution that points backwards.
const SHRUNK_MIN: f64 = 0.5;

/// Merges `contributions`, in the order given, into `memory`, whatever that holds. `momentum`, empty if there is none, is
/// what late contributions are corrected by.
pub fn merge(
    manifest: &Manifest,
    fragment: FragmentId,
    recipe: &Recipe,
    contributions: &[Weighted<'_>],
    momentum: &[f32],
    memory: Vec<f32>,
    team: &dyn Team,
) -> Merged {
    let layout = Layout::new(manifest, fragment);
    let mut sum = memory;
    sum.resize(layout.len(), 0.0);
    let lengths = layout.lengths(contributions, momentum, team);
    let norms: Vec<f64> = (0..contributions.len()).map(|index| norm(&lengths, index)).collect();
    let verdicts = judge(recipe, contributions, &norms, layout.len(), team);
    let radial = |tensor: usize| recipe.merge == Averaging::Radial && !layout.is_embedding(tensor);
    let parts: Vec<Vec<Part>> = lengths
        .iter()
        .enumerate()
        .map(|(tensor, sums)| parts(contributions, &verdicts, sums, radial(tensor)))
        .collect();
    let sums = layout.add_up(&mut sum, contributions, &parts, momentum, team);
    let scale = |(tensor, parts): (usize, &Vec<Part>)| {
        if radial(tensor) { scale(parts, agreed(parts, &lengths[tensor], &sums[tensor])) } else { 1.0 }
    };
    let scales: Vec<f64> = parts.iter().enumerate().map(scale).collect();
    let norm = scales.iter().zip(&sums).map(|(scale, sums)| scale * scale * sums.other).sum::<f64>().sqrt();
    let cosine = |index: usize| {
        let along: f64 = scales.iter().zip(&sums).map(|(scale, sums)| scale * sums.alongs[index]).sum();
        if norms[index] > 0.0 && norm > 0.0 { along / (norms[index] * norm) } else { 0.0 }
    };
    let correction = |index: usize| parts.iter().map(|parts| parts[index].corrected).fold(0.0, f64::max);
    let all = 0..contributions.len();
    let (cosines, corrections) = (all.clone().map(cosine).collect(), all.map(correction).collect());
    let scales = layout.ends().zip(scales.iter().map(|scale| *scale as f32)).collect();
    Merged { sum, scales, norm, cosines, corrections, verdicts }
}

/// Length of contribution number `index`, of which these are the lengths by tensor.
fn norm(lengths: &[Sums], index: usize) -> f64 {
    lengths.iter().map(|sums| sums.squares[index]).sum::<f64>().sqrt()
}

/// How much of each contribution to a fragment of `len` weights is merged.
fn judge(recipe: &Recipe, contributions: &[Weighted<'_>], norms: &[f64], len: usize, team: &dyn Team) -> Vec<Verdict> {
    let seen = |(contribution, &norm): (&Weighted<'_>, &f64)| {
        let &Weighted { weight, steps, trust, quality, payload, .. } = contribution;
        Seen { weight, norm, steps, density: payload.codec().density(), trust, quality }
    };
    let all: Vec<Seen> = contributions.iter().zip(norms).map(seen).collect();
    let is_needed = recipe.guard.robust == Robust::Guard && all.len() > 2;
    let sketch = is_needed.then(|| Sketch::new(contributions, len, team));
    recipe.guard.judge(&all, sketch.as_ref().map(Sketch::angles))
}

/// A contribution's part in one tensor: `share` times it and `turn` times the momentum.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Part {
    share: f64,
    turn: f64,
    weight: f64,
    /// Length after the correction, and as far as the guard lets it count.
    length: f64,
    /// Share that the correction took away or turned.
    corrected: f64,
}

/// What each contribution brings to a tensor of these lengths. A radial average adds directions: lengths do not count.
fn parts(contributions: &[Weighted<'_>], verdicts: &[Verdict], lengths: &Sums, radial: bool) -> Vec<Part> {
    let weights =
        contributions.iter().zip(verdicts).map(|(contribution, verdict)| contribution.weight * verdict.weight);
    let weights: Vec<f64> = weights.collect();
    let total: f64 = weights.iter().sum();
    let momentum = lengths.other.sqrt();
    let part = |(index, contribution): (usize, &Weighted<'_>)| {
        let weight = if total <= 0.0 { 0.0 } else { weights[index] / total };
        let counted = verdicts[index].length;
        let length = lengths.squares[index].sqrt();
        let plain = Part { share: 1.0, turn: 0.0, weight, length, corrected: 0.0 };
        let part = if contribution.stale { plain.corrected_by(momentum, lengths.alongs[index]) } else { plain };
        let share = match (radial, part.length > 0.0) {
            (true, true) => weight / part.length,
            (true, false) => 0.0,
            (false, _) => weight * counted,
        };
        Part { share: share * part.share, turn: share * part.turn, length: part.length * counted, ..part }
    };
    contributions.iter().enumerate().map(part).collect()
}

impl Part {
    /// Late work that follows the momentum passes; what opposes it is shrunk; what is across is turned towards it, at
    /// the same length (HeLoCo, arXiv 2606.00271).
    fn corrected_by(self, momentum: f64, along: f64) -> Self {
        if momentum == 0.0 || self.length == 0.0 {
            return self;
        }
        let cosine = (along / (self.length * momentum)).clamp(-1.0, 1.0);
        if cosine >= ALIGNED {
            return self;
        }
        if cosine < 0.0 {
            let share = (1.0 + cosine).max(SHRUNK_MIN);
            return Part { share, length: self.length * share, corrected: 1.0 - share, ..self };
        }
        // Δ = length·(cosine·m̂ + sine·û): keep the length, raise the cosine.
        let (sine, wanted) = ((1.0 - cosine * cosine).sqrt(), (1.0 - ALIGNED * ALIGNED).sqrt());
        let share = wanted / sine;
        let turn = self.length * (ALIGNED - share * cosine) / momentum;
        Part { share, turn, corrected: ALIGNED - cosine, ..self }
    }
}

/// Length that the sum of all parts of a tensor, of directions, would have if each contribution had told all: no less than it has.
/// Where contributions tell different shares this is about so.
fn agreed(parts: &[Part], lengths: &Sums, sums: &Sums) -> f64 {
    let cosine = |index: usize| (lengths.squares[index] / lengths.wishes[index]).sqrt();
    let told: Vec<f64> = (0..parts.len()).map(|at| if lengths.squares[at] > 0.0 { cosine(at) } else { 1.0 }).collect();
    let is_plain = told.iter().all(|&told| told == 1.0) || parts.iter().any(|part| part.turn != 0.0);
    let total: f64 = parts.iter().filter(|part| part.share > 0.0).map(|part| part.weight).sum();
    if is_plain || total <= 0.0 {
        return sums.other.sqrt();
    }
    let spoken = parts.iter().zip(&told).filter(|(part, _)| part.share > 0.0);
    let usual = spoken.map(|(part, told)| part.weight * told).sum::<f64>() / total;
    let square = |(index, part): (usize, &Part)| {
        let length = lengths.squares[index].sqrt();
        // How far it goes itself along its own direction, and all others.
        let own = part.share * length;
        let others = if length > 0.0 { sums.alongs[index] / length - own } else { 0.0 };
        own * (own + others / (told[index] * usual))
    };
    let square: f64 = parts.iter().enumerate().map(square).sum();
    square.clamp(sums.other.min(1.0), 1.0).sqrt()
}

/// What the sum of all parts of a tensor, of directions whose sum is taken to be `agreed` long, is to be multiplied with.
fn scale(parts: &[Part], agreed: f64) -> f64 {
    let length: f64 = parts.iter().map(|part| part.weight * part.length).sum();
    if agreed > 0.0 { length / agreed } else { 0.0 }
}
