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
use atoll_core::training::AdamW;
use rayon::prelude::*;

use crate::math::simd;

/// Elements per task.
const TILE: usize = 1 << 14;

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
        let rate = settings.learning_rate * settings.schedule(self.steps, progress);
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
    fn clipping_shortens_only_what_is_long() {
        assert_eq!(clip_factor(1.0, 0.5), 1.0);
        assert_eq!(clip_factor(0.0, 1e9), 1.0);
        assert!((clip_factor(1.0, 4.0) - 0.25).abs() < 1e-6);
    }
}
