//! The merge: contributions of one fragment to one pseudo-gradient.
//!
//! It works piece by piece, each a stretch of one tensor that fits into a core's cache, so that a team can share the
//! pieces and every weight is read from memory once. Sums over a tensor are sums of its pieces' sums in their order,
//! whoever computed them.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::codec::Payload;
use crate::delta::{dot, norm};
use crate::manifest::{FragmentId, Manifest};
use crate::model::TensorKind;
use crate::simd::simd;
use crate::team::{Job, Team};

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

/// One site's pseudo-gradient of a fragment.
#[derive(Debug)]
pub enum Delta<'a> {
    /// A checked payload of which most values are zero.
    Sparse(Payload<'a>),
    /// All values.
    Dense(Vec<f32>),
}

/// A pseudo-gradient with its weight in the merge.
#[derive(Debug)]
pub struct Weighted<'a> {
    /// Relative weight; only ratios matter.
    pub weight: f64,
    /// Whether it set out from an older version than the one that is to be moved.
    pub stale: bool,
    /// The values.
    pub delta: Delta<'a>,
}

/// A merged pseudo-gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Its values.
    pub values: Vec<f32>,
    /// Cosine of each contribution to it, in the order given.
    pub cosines: Vec<f64>,
    /// For each contribution the greatest share of a tensor that the staleness correction took away or turned.
    pub corrections: Vec<f64>,
}

/// Weights of a piece: with those of a few contributions they fit into a core's second-level cache.
const PIECE: usize = 1 << 15;
/// A late contribution whose cosine to the outer momentum is at least this is left alone.
const ALIGNED: f64 = 0.2;
/// The least that is left of a late contribution that points backwards.
const SHRUNK_MIN: f64 = 0.5;

impl<'a> Delta<'a> {
    /// The pseudo-gradient that a checked payload holds.
    pub fn new(payload: Payload<'a>, team: &dyn Team) -> Self {
        match payload.codec() {
            crate::codec::Codec::Sparse(_) => Delta::Sparse(payload),
            _ => Delta::Dense(payload.values(team)),
        }
    }

    /// Squared length of a stretch, and its dot product with `other`'s.
    fn sums(&self, range: Range<usize>, other: &[f32]) -> (f64, f64) {
        match self {
            Delta::Dense(values) => {
                let values = &values[range.clone()];
                (dot(values, values), if other.is_empty() { 0.0 } else { dot(values, &other[range]) })
            }
            Delta::Sparse(payload) => {
                let (mut square, mut along) = (0.0, 0.0);
                payload.visit(range.clone(), |place, value| {
                    if range.contains(&place) {
                        let other = other.get(place).copied().unwrap_or(0.0);
                        square += f64::from(value) * f64::from(value);
                        along += f64::from(value) * f64::from(other);
                    }
                });
                (square, along)
            }
        }
    }

    /// Adds `scale` times a stretch to `out`, which begins where the stretch does.
    fn add_to(&self, range: Range<usize>, scale: f32, out: &mut [f32]) {
        match self {
            Delta::Dense(values) => add_scaled(out, scale, &values[range]),
            Delta::Sparse(payload) => payload.visit(range.clone(), |place, value| {
                if range.contains(&place) {
                    out[place - range.start] += scale * value;
                }
            }),
        }
    }
}

fn add_scaled(out: &mut [f32], scale: f32, values: &[f32]) {
    simd(
        #[inline(always)]
        || out.iter_mut().zip(values).for_each(|(out, value)| *out += scale * value),
    );
}

/// A contribution's part in one tensor: `scale` times it and `turn` times the momentum.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Part {
    scale: f64,
    turn: f64,
    /// Length after the correction.
    length: f64,
    /// Share that the correction took away or turned.
    corrected: f64,
}

/// Merges `deltas`, in the order given. `momentum`, empty if there is none, is what late contributions are
/// corrected by.
pub fn merge(
    manifest: &Manifest,
    fragment: FragmentId,
    averaging: Averaging,
    deltas: &[Weighted<'_>],
    momentum: &[f32],
    team: &dyn Team,
) -> Merged {
    let layout = Layout::new(manifest, fragment);
    let total: f64 = deltas.iter().map(|part| part.weight).sum();
    let mut values = vec![0.0f32; layout.len];
    if total <= 0.0 {
        return Merged { values, cosines: vec![0.0; deltas.len()], corrections: vec![0.0; deltas.len()] };
    }
    let weights: Vec<f64> = deltas.iter().map(|part| part.weight / total).collect();
    let momenta = if deltas.iter().any(|part| part.stale) { layout.squares(momentum, team) } else { Vec::new() };
    let parts: Vec<Vec<Part>> = layout
        .sums(deltas, momentum, team)
        .into_iter()
        .zip(deltas)
        .map(|(sums, delta)| sums.iter().enumerate().map(|(t, &s)| part(s, delta.stale, momenta.get(t))).collect())
        .collect();
    let scales = layout.add_up(&mut values, averaging, deltas, &weights, &parts, momentum, team);
    layout.scale(&mut values, &scales, team);
    let whole = norm(&values);
    let cosines = layout.sums(deltas, &values, team).into_iter().map(|sums| {
        let (square, along) = sums.iter().fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
        if square > 0.0 && whole > 0.0 { along / (square.sqrt() * whole) } else { 0.0 }
    });
    let cosines = cosines.collect();
    let corrections = parts.iter().map(|parts| parts.iter().map(|part| part.corrected).fold(0.0, f64::max)).collect();
    Merged { values, cosines, corrections }
}

/// What a contribution brings to a tensor. Late work that follows the momentum passes; what opposes it is shrunk; what
/// is across is turned towards it, at the same length (HeLoCo, arXiv 2606.00271).
fn part((square, along): (f64, f64), stale: bool, momentum: Option<&f64>) -> Part {
    let length = square.sqrt();
    let plain = Part { scale: 1.0, turn: 0.0, length, corrected: 0.0 };
    let Some(momentum) = momentum.map(|square| square.sqrt()).filter(|m| stale && *m > 0.0 && length > 0.0) else {
        return plain;
    };
    let cosine = (along / (length * momentum)).clamp(-1.0, 1.0);
    if cosine >= ALIGNED {
        return plain;
    }
    if cosine < 0.0 {
        let scale = (1.0 + cosine).max(SHRUNK_MIN);
        return Part { scale, length: length * scale, corrected: 1.0 - scale, ..plain };
    }
    // Δ = length·(cosine·m̂ + sine·û): keep the length, raise the cosine.
    let (sine, wanted) = ((1.0 - cosine * cosine).sqrt(), (1.0 - ALIGNED * ALIGNED).sqrt());
    let scale = wanted / sine;
    let turn = length * (ALIGNED - scale * cosine) / momentum;
    Part { scale, turn, corrected: ALIGNED - cosine, ..plain }
}

/// The tensors and pieces of a fragment.
struct Layout {
    len: usize,
    kinds: Vec<TensorKind>,
    /// Tensor (as an index into `kinds`) and stretch.
    pieces: Vec<(usize, Range<usize>)>,
}

impl Layout {
    fn new(manifest: &Manifest, fragment: FragmentId) -> Self {
        let mut layout = Self { len: 0, kinds: Vec::new(), pieces: Vec::new() };
        for (tensor, place) in manifest.places(fragment).enumerate() {
            layout.kinds.push(manifest.tensors()[place.tensor].kind);
            let starts = place.range.clone().step_by(PIECE);
            layout.pieces.extend(starts.map(|start| (tensor, start..place.range.end.min(start + PIECE))));
            layout.len = place.range.end;
        }
        layout
    }

    /// For each contribution and tensor: squared length, and dot product with `other`.
    fn sums(&self, deltas: &[Weighted<'_>], other: &[f32], team: &dyn Team) -> Vec<Vec<(f64, f64)>> {
        let mut by_piece = vec![vec![(0.0, 0.0); deltas.len()]; self.pieces.len()];
        let jobs = by_piece.iter_mut().zip(&self.pieces).map(|(sums, (_, range))| {
            let sum = move || {
                sums.iter_mut().zip(deltas).for_each(|(sums, part)| *sums = part.delta.sums(range.clone(), other));
            };
            Box::new(sum) as Job<'_>
        });
        team.all(jobs.collect());
        let mut totals = vec![vec![(0.0, 0.0); self.kinds.len()]; deltas.len()];
        for (sums, (tensor, _)) in by_piece.iter().zip(&self.pieces) {
            for (total, (square, along)) in totals.iter_mut().zip(sums) {
                let total = &mut total[*tensor];
                *total = (total.0 + square, total.1 + along);
            }
        }
        totals
    }

    /// Squared length of each tensor of `values`.
    fn squares(&self, values: &[f32], team: &dyn Team) -> Vec<f64> {
        if values.is_empty() {
            return Vec::new();
        }
        let mut squares = vec![0.0; self.pieces.len()];
        let jobs = self.pieces.iter().zip(&mut squares).map(|((_, range), square)| {
            let values = &values[range.clone()];
            Box::new(move || *square = dot(values, values)) as Job<'_>
        });
        team.all(jobs.collect());
        self.by_tensor(&squares)
    }

    /// Sums over pieces to sums over tensors.
    fn by_tensor(&self, pieces: &[f64]) -> Vec<f64> {
        let mut totals = vec![0.0; self.kinds.len()];
        self.pieces.iter().zip(pieces).for_each(|((tensor, _), sum)| totals[*tensor] += sum);
        totals
    }

    /// Adds all contributions up; returns what each tensor is then to be multiplied with.
    #[expect(clippy::too_many_arguments, reason = "one place")]
    fn add_up(
        &self,
        values: &mut [f32],
        averaging: Averaging,
        deltas: &[Weighted<'_>],
        weights: &[f64],
        parts: &[Vec<Part>],
        momentum: &[f32],
        team: &dyn Team,
    ) -> Vec<f64> {
        let radial = |tensor: usize| averaging == Averaging::Radial && self.kinds[tensor] != TensorKind::Embedding;
        let share = |index: usize, tensor: usize| {
            let length = parts[index][tensor].length;
            match (radial(tensor), length > 0.0) {
                (true, true) => weights[index] / length,
                (true, false) => 0.0,
                (false, _) => weights[index],
            }
        };
        let add = |tensor: usize, range: Range<usize>, out: &mut [f32]| -> f64 {
            for (index, delta) in deltas.iter().enumerate() {
                let (part, share) = (parts[index][tensor], share(index, tensor));
                delta.delta.add_to(range.clone(), (share * part.scale) as f32, out);
                if part.turn != 0.0 {
                    add_scaled(out, (share * part.turn) as f32, &momentum[range.clone()]);
                }
            }
            dot(out, out)
        };
        let add = &add;
        let mut squares = vec![0.0; self.pieces.len()];
        let jobs = self.pieces.iter().zip(self.cut(values)).zip(&mut squares);
        team.all(
            jobs.map(|(((tensor, range), out), square)| {
                Box::new(move || *square = add(*tensor, range.clone(), out)) as Job<'_>
            })
            .collect(),
        );
        let total = self.by_tensor(&squares);
        let scale = |tensor: usize| {
            let length: f64 = parts.iter().zip(weights).map(|(parts, weight)| weight * parts[tensor].length).sum();
            let direction = total[tensor].sqrt();
            match (radial(tensor), direction > 0.0) {
                (true, true) => length / direction,
                (true, false) => 0.0,
                (false, _) => 1.0,
            }
        };
        (0..self.kinds.len()).map(scale).collect()
    }

    fn scale(&self, values: &mut [f32], scales: &[f64], team: &dyn Team) {
        let jobs = self.pieces.iter().zip(self.cut(values)).map(|((tensor, _), out)| {
            let scale = scales[*tensor] as f32;
            Box::new(move || {
                simd(
                    #[inline(always)]
                    || out.iter_mut().for_each(|value| *value *= scale),
                );
            }) as Job<'_>
        });
        team.all(jobs.collect());
    }

    /// `values` by pieces.
    fn cut<'v>(&self, mut values: &'v mut [f32]) -> Vec<&'v mut [f32]> {
        let cut = |(_, range): &(usize, Range<usize>)| {
            let (piece, rest) = std::mem::take(&mut values).split_at_mut(range.len());
            values = rest;
            piece
        };
        self.pieces.iter().map(cut).collect()
    }
}
