//! How weights move, on the device: the same AdamW and Muon as `atoll-cpu`'s, whose modules have the formulas. Burn's
//! own are not used: they clip each tensor by itself, and know nothing of a floor or of a rate for embeddings.

use atoll_core::model::{Tensor as Description, TensorKind};
use atoll_core::training::{AdamW, Muon};
use burn::tensor::Tensor;

use crate::arithmetic::{Precision, total};

/// Muon's steepest quintic at 0 that keeps the unit interval.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Keeps a gradient of zeros from dividing by zero.
const EPS: f32 = 1e-7;

/// Moments of all tensors, and how they move the weights.
pub(crate) struct Optimizer {
    adamw: AdamW,
    muon: Option<Muon>,
    /// Of Muon's products.
    precision: Precision,
    moments: Vec<Moments>,
    /// Updates so far, t − 1 of the next.
    pub(crate) steps: u64,
}

/// Of one tensor, shaped like it.
struct Moments {
    mean: Tensor<2>,
    square: Tensor<2>,
}

impl Optimizer {
    pub(crate) fn new(adamw: AdamW, muon: Option<Muon>, precision: Precision, weights: &[Tensor<2>]) -> Self {
        let moments = |weights: &Tensor<2>| Moments { mean: weights.zeros_like(), square: weights.zeros_like() };
        Self { adamw, muon, precision, moments: weights.iter().map(moments).collect(), steps: 0 }
    }

    /// What the gradient of that norm is multiplied with; the small number is PyTorch's.
    pub(crate) fn clip(&self, norm: f64) -> f32 {
        let most = f64::from(self.adamw.clip_norm);
        if most > 0.0 { (most / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
    }

    /// Moves all weights by one step along `gradient`, which is first multiplied by `clip`.
    pub(crate) fn step(
        &mut self,
        progress: f32,
        clip: f32,
        tensors: &[Description],
        weights: &mut [Tensor<2>],
        gradient: Vec<Tensor<2>>,
    ) {
        let schedule = self.adamw.schedule(self.steps, progress);
        self.steps += 1;
        let Self { adamw, muon, precision, moments, steps } = self;
        let update = Update::new(adamw, schedule, *steps);
        for (((tensor, weights), gradient), moments) in tensors.iter().zip(weights).zip(gradient).zip(moments) {
            let gradient = gradient.mul_scalar(clip);
            match muon {
                Some(muon) if tensor.kind == TensorKind::Matrix => {
                    step_muon(muon, *precision, schedule, weights, gradient, &mut moments.mean);
                }
                _ => update.step(tensor.kind, weights, gradient, moments),
            }
        }
    }
}

/// One step's numbers of AdamW.
struct Update<'a> {
    settings: &'a AdamW,
    /// η.
    rate: f32,
    /// η / (1−β₁ᵗ).
    corrected_rate: f32,
    /// √(1−β₂ᵗ).
    root_correction: f32,
}

impl<'a> Update<'a> {
    fn new(settings: &'a AdamW, schedule: f32, step: u64) -> Self {
        let rate = settings.learning_rate * schedule;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
        Self {
            settings,
            rate,
            corrected_rate: (f64::from(rate) / correction(settings.beta1)) as f32,
            root_correction: correction(settings.beta2).sqrt() as f32,
        }
    }

    fn step(&self, kind: TensorKind, weights: &mut Tensor<2>, gradient: Tensor<2>, moments: &mut Moments) {
        let &AdamW { beta1, beta2, .. } = self.settings;
        let Moments { mean, square } = moments;
        mean.inplace(|mean| mean.mul_scalar(beta1) + gradient.clone().mul_scalar(1.0 - beta1));
        square.inplace(|square| square.mul_scalar(beta2) + gradient.square().mul_scalar(1.0 - beta2));
        let root = square.clone().sqrt().div_scalar(self.root_correction) + self.floor(kind, square);
        let (keep, rate) = self.pace(kind);
        weights.inplace(|weights| weights.mul_scalar(keep) - mean.clone().mul_scalar(rate) / root);
    }

    /// What decay leaves of a weight, and η r / (1−β₁ᵗ).
    fn pace(&self, kind: TensorKind) -> (f32, f32) {
        let decayed = 1.0 - self.rate * self.settings.weight_decay;
        match kind {
            TensorKind::Embedding => (decayed, self.corrected_rate * self.settings.embedding_rate),
            TensorKind::Matrix => (decayed, self.corrected_rate),
            TensorKind::Vector => (1.0, self.corrected_rate),
        }
    }

    /// ε, to which embeddings add φ √mean(v̂): `(1,1)`.
    fn floor(&self, kind: TensorKind, square: &Tensor<2>) -> Tensor<2> {
        let share = if kind == TensorKind::Embedding { self.settings.embedding_floor } else { 0.0 };
        let eps = Tensor::full([1, 1], self.settings.eps, &square.device());
        if share == 0.0 {
            return eps;
        }
        let [rows, columns] = square.dims();
        let root = total(square.clone()).div_scalar((rows * columns) as f32).sqrt();
        root.mul_scalar(share / self.root_correction) + eps
    }
}

fn step_muon(
    settings: &Muon,
    precision: Precision,
    schedule: f32,
    weights: &mut Tensor<2>,
    gradient: Tensor<2>,
    momentum: &mut Tensor<2>,
) {
    let &Muon { momentum: mu, nesterov, iterations, weight_decay, .. } = settings;
    let rate = settings.learning_rate * schedule;
    let fresh = gradient.mul_scalar(1.0 - mu);
    momentum.inplace(|momentum| momentum.mul_scalar(mu) + fresh.clone());
    let update = if nesterov { momentum.clone().mul_scalar(mu) + fresh } else { momentum.clone() };
    let [rows, columns] = update.dims();
    let scale = rate * 0.2 * (rows.max(columns) as f32).sqrt();
    let update = orthogonal(precision, iterations, update).mul_scalar(scale);
    weights.inplace(|weights| weights.mul_scalar(1.0 - rate * weight_decay) - update);
}

/// The orthogonal matrix nearest to x, nearly: with X as wide as high or wider and of norm 1, some times
/// A = X Xᵀ, X ← a X + (b A + c A²) X.
fn orthogonal(precision: Precision, iterations: u32, x: Tensor<2>) -> Tensor<2> {
    let [rows, columns] = x.dims();
    if rows > columns {
        return orthogonal(precision, iterations, x.transpose()).transpose();
    }
    let norm = total(x.clone().square()).sqrt().clamp_min(EPS);
    let [a, b, c] = COEFFICIENTS;
    let mut x = x / norm;
    for _ in 0..iterations {
        let gram = precision.product(x.clone(), x.clone().transpose());
        let square = precision.product(gram.clone(), gram.clone());
        let powers = gram.mul_scalar(b) + square.mul_scalar(c);
        x = x.clone().mul_scalar(a) + precision.product(powers, x);
    }
    x
}
