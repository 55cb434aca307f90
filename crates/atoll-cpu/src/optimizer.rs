//! How weights move: AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), clipping by the norm over all
//! gradients, and a schedule that looks at how far the *run* has come, so that sites which join late
//! or train slowly share one learning rate.
//!
//! ```text
//! g ← g · min(1, clip / ‖g‖)
//! m ← β₁ m + (1−β₁) g        v ← β₂ v + (1−β₂) g²
//! m̂ = m / (1−β₁ᵗ)            v̂ = v / (1−β₂ᵗ)
//! θ ← θ (1 − η λ) − η r m̂ / (√v̂ + φ √mean(v̂) + ε)
//! ```
//!
//! where r is 1 and φ is 0 for all but embeddings. The mean is over the tensor.
//!
//! With Muon's settings, the layers' matrices move by their [orthogonalized](muon) momentum instead.

use std::ops::Range;

use atoll_core::model::{Tensor, TensorKind};
use atoll_core::training::{AdamW, Muon};
use itertools::izip;

use crate::math::simd;
use crate::muon;
use crate::pool::Pool;
use crate::scratch::take;
use crate::words::Precision;

/// Elements per task.
const TILE: usize = 1 << 14;

/// Tensors, and where each lies among all weights.
type Tensors<'a> = (&'a [Tensor], &'a [Range<usize>]);

/// The moments, as flat as the weights.
pub(crate) struct Moments {
    mean: Vec<f32>,
    square: Vec<f32>,
    /// Updates so far, t − 1 of the next.
    pub(crate) steps: u64,
    /// Muon's, one for each thread.
    scratch: Vec<muon::Scratch>,
}

impl Moments {
    pub(crate) fn new(parameters: usize) -> Self {
        Self { mean: vec![0.0; parameters], square: vec![0.0; parameters], steps: 0, scratch: Vec::new() }
    }

    /// Updates the weights of all `tensors`, at their `places`, by one step.
    pub(crate) fn step(
        &mut self,
        pool: &Pool,
        settings: Settings<'_>,
        (progress, clip): (f32, f32),
        tensors: Tensors<'_>,
        weights: &mut [f32],
        gradient: &[f32],
    ) {
        let schedule = settings.optimizer.schedule(self.steps, progress);
        self.steps += 1;
        let adamw = Update::new(settings.optimizer, schedule, clip, self.steps);
        let floors = adamw.floors(pool, tensors, &self.square, gradient);
        let pieces = izip!(
            tensors.0,
            split(weights, tensors.1),
            split(&mut self.mean, tensors.1),
            split(&mut self.square, tensors.1),
            tensors.1.iter().map(|place| &gradient[place.clone()]),
            floors,
        );
        let by_muon = |tensor: &Tensor| settings.muon.is_some() && tensor.kind == TensorKind::Matrix;
        let (matrices, others): (Vec<_>, Vec<_>) = pieces.partition(|(tensor, ..)| by_muon(tensor));
        let tiles = others.into_iter().flat_map(|(tensor, weights, mean, square, gradient, floor)| {
            let pace = adamw.pace(tensor.kind, floor);
            let tiles =
                izip!(weights.chunks_mut(TILE), gradient.chunks(TILE), mean.chunks_mut(TILE), square.chunks_mut(TILE));
            tiles.map(move |tile| (pace, tile))
        });
        pool.each(tiles, |(pace, (w, g, m, v))| {
            simd(
                #[inline(always)]
                || adamw.apply(pace, w, g, m, v),
            );
        });
        if let Some(muon) = settings.muon {
            self.scratch.resize_with(pool.threads(), Default::default);
            let rate = muon.learning_rate * schedule;
            pool.each_with(&mut self.scratch, matrices.into_iter(), |scratch, (tensor, w, m, _, g, _)| {
                let matrix = Matrix { rows: tensor.shape[0], columns: tensor.shape[1], weights: w, momentum: m };
                matrix.step(muon, settings.precision, rate, clip, g, scratch);
            });
        }
    }
}

/// How weights move.
#[derive(Clone, Copy)]
pub(crate) struct Settings<'a> {
    pub(crate) optimizer: &'a AdamW,
    /// If set, the optimizer of the layers' matrices.
    pub(crate) muon: Option<&'a Muon>,
    /// Of Muon's products.
    pub(crate) precision: Precision,
}

/// A matrix that Muon moves.
struct Matrix<'a> {
    rows: usize,
    columns: usize,
    weights: &'a mut [f32],
    momentum: &'a mut [f32],
}

impl Matrix<'_> {
    fn step(
        self,
        settings: &Muon,
        precision: Precision,
        rate: f32,
        clip: f32,
        gradient: &[f32],
        scratch: &mut muon::Scratch,
    ) {
        let &Muon { momentum: mu, nesterov, iterations, weight_decay, .. } = settings;
        let update = take(&mut scratch.update, gradient.len());
        simd(
            #[inline(always)]
            || {
                for ((update, momentum), g) in update.iter_mut().zip(self.momentum).zip(gradient) {
                    let g = g * clip;
                    *momentum = mu * *momentum + (1.0 - mu) * g;
                    *update = if nesterov { mu * *momentum + (1.0 - mu) * g } else { *momentum };
                }
            },
        );
        muon::orthogonalize(precision, self.rows, self.columns, iterations, scratch);
        let scale = rate * 0.2 * (self.rows.max(self.columns) as f32).sqrt();
        for (w, update) in self.weights.iter_mut().zip(&scratch.update) {
            *w = *w * (1.0 - rate * weight_decay) - scale * update;
        }
    }
}

/// The pieces of `flat` at `places`, which are disjoint but in any order.
fn split<'a>(flat: &'a mut [f32], places: &[Range<usize>]) -> Vec<&'a mut [f32]> {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by_key(|&index| places[index].start);
    let mut pieces: Vec<&'a mut [f32]> = places.iter().map(|_| Default::default()).collect();
    let (mut rest, mut start) = (flat, 0);
    for index in order {
        let (_, after) = rest.split_at_mut(places[index].start - start);
        let (piece, after) = after.split_at_mut(places[index].len());
        (pieces[index], rest, start) = (piece, after, places[index].end);
    }
    pieces
}

/// The numbers of one step of AdamW.
struct Update<'a> {
    settings: &'a AdamW,
    /// Factor of the gradient.
    clip: f32,
    /// η.
    rate: f32,
    /// η / (1−β₁ᵗ).
    corrected_rate: f32,
    /// √(1−β₂ᵗ).
    root_correction: f32,
}

impl<'a> Update<'a> {
    /// Those of step t, from 1 on.
    fn new(settings: &'a AdamW, schedule: f32, clip: f32, step: u64) -> Self {
        let rate = settings.learning_rate * schedule;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
        Self {
            settings,
            clip,
            rate,
            corrected_rate: (f64::from(rate) / correction(settings.beta1)) as f32,
            root_correction: correction(settings.beta2).sqrt() as f32,
        }
    }

    /// φ √mean(v) of each tensor, with the v that this step will have: what is added to each √v.
    fn floors(&self, pool: &Pool, (tensors, places): Tensors<'_>, square: &[f32], gradient: &[f32]) -> Vec<f32> {
        let share = self.settings.embedding_floor;
        let floor = |(tensor, place): (&Tensor, &Range<usize>)| match tensor.kind {
            TensorKind::Embedding if share > 0.0 => {
                share * self.mean_square(pool, &square[place.clone()], &gradient[place.clone()]).sqrt() as f32
            }
            _ => 0.0,
        };
        tensors.iter().zip(places).map(floor).collect()
    }

    /// Mean of what v will be.
    fn mean_square(&self, pool: &Pool, square: &[f32], gradient: &[f32]) -> f64 {
        let mut parts = vec![0.0; square.len().div_ceil(TILE)];
        let beta2 = f64::from(self.settings.beta2);
        let fresh = (1.0 - beta2) * f64::from(self.clip).powi(2);
        pool.each(izip!(square.chunks(TILE), gradient.chunks(TILE), &mut parts), |(v, g, part)| {
            *part = simd(
                #[inline(always)]
                || beta2 * sum(v) + fresh * sum_of_squares(g),
            );
        });
        parts.iter().sum::<f64>() / square.len().max(1) as f64
    }

    /// How fast the weights of such a tensor move whose √v has that floor.
    fn pace(&self, kind: TensorKind, floor: f32) -> Pace {
        let decayed = 1.0 - self.rate * self.settings.weight_decay;
        let eps = self.settings.eps + floor / self.root_correction;
        match kind {
            TensorKind::Embedding => {
                Pace { keep: decayed, rate: self.corrected_rate * self.settings.embedding_rate, eps }
            }
            TensorKind::Matrix => Pace { keep: decayed, rate: self.corrected_rate, eps },
            TensorKind::Vector => Pace { keep: 1.0, rate: self.corrected_rate, eps },
        }
    }

    #[inline(always)]
    fn apply(
        &self,
        Pace { keep, rate, eps }: Pace,
        weights: &mut [f32],
        gradient: &[f32],
        mean: &mut [f32],
        square: &mut [f32],
    ) {
        let &AdamW { beta1, beta2, .. } = self.settings;
        let moments = mean.iter_mut().zip(square);
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
            let g = g * self.clip;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * (g * g);
            *w = *w * keep - rate * *m / (v.sqrt() / self.root_correction + eps);
        }
    }
}

/// How fast the weights of a tensor move.
#[derive(Clone, Copy)]
struct Pace {
    /// What decay leaves of a weight.
    keep: f32,
    /// η r / (1−β₁ᵗ).
    rate: f32,
    /// ε with the tensor's floor.
    eps: f32,
}

/// Σ g² of each tensor, in the order of `places`.
pub(crate) fn squares(pool: &Pool, gradient: &[f32], places: &[Range<usize>]) -> Vec<f64> {
    let tiles = |place: &Range<usize>| gradient[place.clone()].chunks(TILE);
    let mut parts = vec![0.0; places.iter().map(|place| tiles(place).len()).sum()];
    pool.each(places.iter().flat_map(tiles).zip(&mut parts), |(tile, part)| {
        *part = simd(
            #[inline(always)]
            || sum_of_squares(tile),
        );
    });
    let mut parts = parts.into_iter();
    places.iter().map(|place| parts.by_ref().take(tiles(place).len()).sum()).collect()
}

#[inline(always)]
fn sum(values: &[f32]) -> f64 {
    sum_of(values, |x| x)
}

#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f64 {
    sum_of(values, |x| x * x)
}

/// In `f64`, so that no finite gradient overflows.
#[inline(always)]
fn sum_of(values: &[f32], of: impl Fn(f64) -> f64) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += of(f64::from(x));
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&x| of(f64::from(x))).sum::<f64>()
}

/// What the gradient of that norm is multiplied with; the small number is PyTorch's.
pub(crate) fn clip_factor(clip_norm: f32, norm: f64) -> f32 {
    if clip_norm > 0.0 { (f64::from(clip_norm) / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula above, in `f64`.
    #[test]
    fn a_floor_keeps_rare_rows_from_leaping() {
        const STEPS: u64 = 3;
        let settings = AdamW {
            embedding_floor: 1.0,
            embedding_rate: 4.0,
            warmup_steps: 1,
            final_share: 1.0,
            weight_decay: 0.0,
            ..AdamW::default()
        };
        let tensors = [Tensor::new("embedding", &[2, 2], TensorKind::Embedding)];
        let gradient = [1.0f32, -2.0, 1e-3, 0.0];
        let (mut weights, whole) = ([0.0f32; 4], std::iter::once(0..4).collect::<Vec<_>>());
        let mut moments = Moments::new(weights.len());
        let all = Settings { optimizer: &settings, muon: None, precision: Precision::F32 };
        let (mut expected, mut mean, mut square) = ([0.0f64; 4], [0.0f64; 4], [0.0f64; 4]);
        for step in 1..=STEPS {
            moments.step(&Pool::new(1), all, (0.0, 1.0), (&tensors, &whole), &mut weights, &gradient);
            let (beta1, beta2) = (f64::from(settings.beta1), f64::from(settings.beta2));
            let corrected = |value: f64, beta: f64| value / (1.0 - beta.powf(step as f64));
            for (i, g) in gradient.iter().map(|&g| f64::from(g)).enumerate() {
                mean[i] = beta1 * mean[i] + (1.0 - beta1) * g;
                square[i] = beta2 * square[i] + (1.0 - beta2) * g * g;
            }
            let floor = (square.iter().map(|&v| corrected(v, beta2)).sum::<f64>() / 4.0).sqrt();
            for i in 0..4 {
                let pace = corrected(square[i], beta2).sqrt() + floor + f64::from(settings.eps);
                expected[i] -= f64::from(settings.learning_rate) * 4.0 * corrected(mean[i], beta1) / pace;
            }
        }
        for (weight, expected) in weights.iter().zip(expected) {
            assert!((f64::from(*weight) - expected).abs() < 1e-6, "{weight} {expected}");
        }
        assert!(weights[2].abs() < weights[0].abs() / 100.0, "{weights:?}");
    }

    #[test]
    fn clipping_shortens_only_what_is_long() {
        assert_eq!(clip_factor(1.0, 0.5), 1.0);
        assert_eq!(clip_factor(0.0, 1e9), 1.0);
        assert!((clip_factor(1.0, 4.0) - 0.25).abs() < 1e-6);
    }
}
