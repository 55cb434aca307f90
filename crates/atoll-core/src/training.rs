//! How a site trains between two contributions: batch, context, what a token may see, and the inner
//! optimizers. All sites of a run share them; rows per step are each site's own.
//!
//! [`AdamW`] moves all weights, or, beside [`Muon`], only those that are not the matrices of a layer.
//! Both follow one [schedule](AdamW::schedule).

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The `[training]` table of `run.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Training {
    /// Tokens predicted per sample, T.
    pub context: usize,
    /// Samples per micro-batch, B, unless a site chooses its own.
    pub rows: usize,
    /// Micro-batches per inner step.
    pub accumulate: usize,
    /// Which earlier tokens a token sees.
    pub packing: Packing,
    /// The inner optimizer.
    pub optimizer: AdamW,
    /// If set, the optimizer of the layers' matrices; AdamW keeps embeddings, head and gains.
    pub muon: Option<Muon>,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            context: 256,
            rows: 4,
            accumulate: 1,
            packing: Packing::default(),
            optimizer: AdamW::default(),
            muon: None,
        }
    }
}

impl Training {
    /// Every reason why these settings cannot train; empty when they can.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.optimizer.problems();
        problems.extend(self.muon.iter().flat_map(Muon::problems));
        for (name, value) in [("context", self.context), ("rows", self.rows), ("accumulate", self.accumulate)] {
            if value == 0 || value > 1 << 20 {
                problems.push(format!("training.{name} = {value} must be between 1 and {}", 1 << 20));
            }
        }
        problems
    }
}

/// How documents share a sample.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Samples are windows of the stream of tokens, and a token sees all of its window before it.
    #[default]
    Stream,
    /// The same windows, but a token sees only what its window holds of its own document.
    Documents,
}

/// AdamW with decoupled decay (arXiv 1711.05101), clipping by the global norm, linear warm-up over an
/// engine's own steps and a cosine over the whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// η at the schedule's top.
    pub learning_rate: f32,
    /// What multiplies it for embeddings, and for a head that shares their weights: a model that starts from nothing
    /// learns how often each token comes by moving them, and they are far from wide (muP, arXiv 2203.03466, table 8).
    pub embedding_rate: f32,
    /// φ: in embeddings φ √mean(v) is added to each √v, with the mean over the tensor. AdamW makes full steps of the tiny
    /// gradients of tokens that a batch does not hold; with small batches these are noise, which sites do not share.
    pub embedding_floor: f32,
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
            learning_rate: 2e-3,
            embedding_rate: 1.0,
            embedding_floor: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            warmup_steps: 50,
            final_share: 0.1,
        }
    }
}

impl AdamW {
    /// What the step after `steps` others, at `progress` of the run (0 to 1), multiplies a learning rate
    /// with: AdamW's own, and Muon's too.
    pub fn schedule(&self, steps: u64, progress: f32) -> f32 {
        let cosine = 0.5 * (1.0 + (std::f32::consts::PI * progress.clamp(0.0, 1.0)).cos());
        let warmup = (steps + 1) as f32 / self.warmup_steps.max(1) as f32;
        (self.final_share + (1.0 - self.final_share) * cosine) * warmup.min(1.0)
    }

    /// Every reason why these settings cannot train; empty when they can.
    pub fn problems(&self) -> Vec<String> {
        out_of_range(
            "training.optimizer",
            &[
                ("learning_rate", self.learning_rate, 0.0..f32::INFINITY),
                ("embedding_rate", self.embedding_rate, 0.0..f32::INFINITY),
                ("embedding_floor", self.embedding_floor, 0.0..f32::INFINITY),
                ("beta1", self.beta1, 0.0..1.0),
                ("beta2", self.beta2, 0.0..1.0),
                ("eps", self.eps, f32::MIN_POSITIVE..1.0),
                ("weight_decay", self.weight_decay, 0.0..f32::INFINITY),
                ("clip_norm", self.clip_norm, 0.0..f32::INFINITY),
                ("final_share", self.final_share, 0.0..1.0 + f32::EPSILON),
            ],
        )
    }
}

/// Muon (Jordan et al. 2024): momentum whose every matrix is brought near the closest orthogonal one by
/// a few Newton–Schulz iterations, so that all directions in it are learnt at one pace.
///
/// ```text
/// M ← μ M + G        O ← orthogonal(G + μ M), or of M without Nesterov
/// W ← W (1 − η λ) − η · 0.2 √max(rows, columns) · O
/// ```
///
/// The factor 0.2 √max(rows, columns) gives an update the size of AdamW's (Moonlight, arXiv 2502.16982),
/// so AdamW's learning rates and decay carry over; hence the default η is [`AdamW`]'s 2e-3 and not the
/// 0.02 of the first, unscaled Muon. Warm-up and cosine are [`AdamW::schedule`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Muon {
    /// η at the schedule's top.
    pub learning_rate: f32,
    /// μ, decay of the summed gradient.
    pub momentum: f32,
    /// Whether an update looks one gradient ahead of the momentum.
    pub nesterov: bool,
    /// Newton–Schulz iterations.
    pub iterations: u32,
    /// λ.
    pub weight_decay: f32,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            learning_rate: AdamW::default().learning_rate,
            momentum: 0.95,
            nesterov: true,
            iterations: 5,
            weight_decay: 0.1,
        }
    }
}

impl Muon {
    /// More iterations than this only cost time.
    const ITERATIONS_MAX: u32 = 32;

    /// Every reason why these settings cannot train; empty when they can.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = out_of_range(
            "training.muon",
            &[
                ("learning_rate", self.learning_rate, 0.0..f32::INFINITY),
                ("momentum", self.momentum, 0.0..1.0),
                ("weight_decay", self.weight_decay, 0.0..f32::INFINITY),
            ],
        );
        if !(1..=Self::ITERATIONS_MAX).contains(&self.iterations) {
            let (value, most) = (self.iterations, Self::ITERATIONS_MAX);
            problems.push(format!("training.muon.iterations = {value} must be between 1 and {most}"));
        }
        problems
    }
}

/// A sentence for each of `table`'s values that is outside of its range.
fn out_of_range(table: &str, values: &[(&str, f32, Range<f32>)]) -> Vec<String> {
    let is_outside = |(_, value, range): &&(&str, f32, Range<f32>)| !range.contains(value);
    let sentence = |(name, value, Range { start, end }): &(&str, f32, Range<f32>)| {
        format!("{table}.{name} = {value} must be at least {start} and below {end}")
    };
    values.iter().filter(is_outside).map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_warms_up_and_falls_along_a_cosine() {
        let adamw = AdamW { warmup_steps: 10, final_share: 0.1, ..AdamW::default() };
        for (steps, progress, share) in [(0, 0.0, 0.1), (100, 0.0, 1.0), (100, 0.5, 0.55), (100, 1.0, 0.1)] {
            assert!((adamw.schedule(steps, progress) - share).abs() < 1e-6, "{steps} {progress}");
        }
    }

    #[test]
    fn nonsense_is_named() {
        let training = Training {
            rows: 0,
            optimizer: AdamW { learning_rate: f32::NAN, beta1: 1.0, ..AdamW::default() },
            muon: Some(Muon { momentum: 1.0, iterations: 0, ..Muon::default() }),
            ..Training::default()
        };
        let problems = training.problems();
        assert_eq!(problems.len(), 5, "{problems:?}");
        assert!(problems.contains(&"training.muon.momentum = 1 must be at least 0 and below 1".to_string()));
        assert!(problems.contains(&"training.muon.iterations = 0 must be between 1 and 32".to_string()));
    }

    #[test]
    fn the_defaults_train_with_and_without_muon() {
        for muon in [None, Some(Muon::default())] {
            assert_eq!(Training { muon, ..Training::default() }.problems(), Vec::<String>::new());
        }
    }
}
