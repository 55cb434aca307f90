//! AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), clipping by the norm over all
//! gradients, and a schedule that looks at how far the *run* has come, so that sites which join late
//! or train slowly share one learning rate.
//!
//! ```text
//! g ← g · min(1, clip / ‖g‖)
//! m ← β₁ m + (1−β₁) g        v ← β₂ v + (1−β₂) g²
//! θ ← θ (1 − η λ) − η (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)
//! ```

use std::ops::Range;

use atoll_core::model::{Tensor, TensorKind};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::math::simd;

/// Elements per task.
const TILE: usize = 1 << 14;

/// The inner optimizer's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// η at the schedule's top.
    pub learning_rate: f32,
    /// β₁, decay of the mean gradient.
    pub beta1: f32,
    /// β₂, decay of the mean squared gradient.
    pub beta2: f32,
    /// ε.
    pub eps: f32,
    /// λ, on matrices and embeddings; gains do not decay.
    pub weight_decay: f32,
    /// Longest gradient, over all tensors together; 0 does not clip.
    pub clip_norm: f32,
    /// Steps of this engine over which the learning rate rises from 0.
    pub warmup_steps: u32,
    /// Share of the learning rate that is left at the run's end; between, a cosine.
    pub final_share: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            warmup_steps: 100,
            final_share: 0.1,
        }
    }
}

impl AdamW {
    /// The learning rate of the step after `steps` others, at `progress` of the run (0 to 1).
    pub fn learning_rate_at(&self, steps: u64, progress: f32) -> f32 {
        let cosine = 0.5 * (1.0 + (std::f32::consts::PI * progress.clamp(0.0, 1.0)).cos());
        let schedule = self.final_share + (1.0 - self.final_share) * cosine;
        let warmup = (steps + 1) as f32 / self.warmup_steps.max(1) as f32;
        self.learning_rate * schedule * warmup.min(1.0)
    }

    /// Every reason why these settings cannot train; empty when they can.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut need = |name: &str, value: f32, range: Range<f32>| {
            if !range.contains(&value) {
                let Range { start, end } = range;
                problems.push(format!("optimizer.{name} = {value} must be at least {start} and below {end}"));
            }
        };
        need("learning_rate", self.learning_rate, 0.0..f32::INFINITY);
        need("beta1", self.beta1, 0.0..1.0);
        need("beta2", self.beta2, 0.0..1.0);
        need("eps", self.eps, f32::MIN_POSITIVE..1.0);
        need("weight_decay", self.weight_decay, 0.0..f32::INFINITY);
        need("clip_norm", self.clip_norm, 0.0..f32::INFINITY);
        need("final_share", self.final_share, 0.0..1.0 + f32::EPSILON);
        problems
    }
}

/// The moments, as flat as the weights.
pub(crate) struct Moments {
    mean: Vec<f32>,
    square: Vec<f32>,
    /// Updates so far, t − 1 of the next.
    pub(crate) steps: u64,
}

impl Moments {
    pub(crate) fn new(parameters: usize) -> Self {
        Self { mean: vec![0.0; parameters], square: vec![0.0; parameters], steps: 0 }
    }

    /// Updates the weights of all `tensors`, at their `places`, by one step.
    pub(crate) fn step(
        &mut self,
        settings: &AdamW,
        progress: f32,
        clip: f32,
        tensors: (&[Tensor], &[Range<usize>]),
        weights: &mut [f32],
        gradient: &[f32],
    ) {
        let rate = settings.learning_rate_at(self.steps, progress);
        self.steps += 1;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(self.steps as f64);
        let update = Update {
            settings,
            clip,
            rate: (f64::from(rate) / correction(settings.beta1)) as f32,
            root_correction: correction(settings.beta2).sqrt() as f32,
        };
        for (tensor, place) in tensors.0.iter().zip(tensors.1) {
            let decays = tensor.kind != TensorKind::Vector;
            let keep = if decays { 1.0 - rate * settings.weight_decay } else { 1.0 };
            let (mean, square) = (&mut self.mean[place.clone()], &mut self.square[place.clone()]);
            let tiles = weights[place.clone()].par_chunks_mut(TILE).zip(gradient[place.clone()].par_chunks(TILE));
            let tiles = tiles.zip(mean.par_chunks_mut(TILE)).zip(square.par_chunks_mut(TILE));
            tiles.for_each(|(((w, g), m), v)| simd(|| update.apply(keep, w, g, m, v)));
        }
    }
}

/// The numbers of one step.
struct Update<'a> {
    settings: &'a AdamW,
    /// Factor of the gradient.
    clip: f32,
    /// η / (1−β₁ᵗ).
    rate: f32,
    /// √(1−β₂ᵗ).
    root_correction: f32,
}

impl Update<'_> {
    #[inline(always)]
    fn apply(&self, keep: f32, weights: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32]) {
        let &AdamW { beta1, beta2, eps, .. } = self.settings;
        let moments = mean.iter_mut().zip(square);
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
            let g = g * self.clip;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * (g * g);
            *w = *w * keep - self.rate * *m / (v.sqrt() / self.root_correction + eps);
        }
    }
}

/// Σ g² of each tensor, in the order of `places`.
pub(crate) fn squares(gradient: &[f32], places: &[Range<usize>]) -> Vec<f64> {
    let tensor = |place: &Range<usize>| {
        let tiles = gradient[place.clone()].par_chunks(TILE);
        let parts: Vec<f64> = tiles.map(|tile| simd(|| sum_of_squares(tile))).collect();
        parts.iter().sum()
    };
    places.iter().map(tensor).collect()
}

/// In `f64`, so that no finite gradient overflows.
#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
}

/// What the gradient of that norm is multiplied with; the small number is PyTorch's.
pub(crate) fn clip_factor(clip_norm: f32, norm: f64) -> f32 {
    if clip_norm > 0.0 { (f64::from(clip_norm) / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_and_falls() {
        let settings = AdamW { learning_rate: 1.0, warmup_steps: 4, final_share: 0.1, ..AdamW::default() };
        let rates = [(0, 0.0), (3, 0.0), (9, 0.0), (9, 0.5), (9, 1.0)].map(|(s, p)| settings.learning_rate_at(s, p));
        let expected = [0.25, 1.0, 1.0, 0.55, 0.1];
        assert!(rates.iter().zip(expected).all(|(rate, e)| (rate - e).abs() < 1e-6), "{rates:?}");
        let cold = AdamW { warmup_steps: 0, learning_rate: 1.0, ..AdamW::default() };
        assert_eq!(cold.learning_rate_at(0, 0.0), 1.0);
    }

    #[test]
    fn clipping_shortens_only_what_is_long() {
        assert_eq!(clip_factor(1.0, 0.5), 1.0);
        assert_eq!(clip_factor(0.0, 1e9), 1.0);
        assert!((clip_factor(1.0, 4.0) - 0.25).abs() < 1e-6);
    }

    #[test]
    fn every_problem_is_listed_at_once() {
        assert_eq!(AdamW::default().problems(), Vec::<String>::new());
        let bad = AdamW { learning_rate: f32::NAN, beta1: 1.0, clip_norm: -1.0, ..AdamW::default() };
        assert_eq!(bad.problems().len(), 3);
    }
}
