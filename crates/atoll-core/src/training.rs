//! How a site trains between two contributions: batch, context and inner optimizer. All sites of a run
//! share the optimizer; rows per step are each site's own.

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
    /// The inner optimizer.
    pub optimizer: AdamW,
}

impl Default for Training {
    fn default() -> Self {
        Self { context: 256, rows: 4, accumulate: 1, optimizer: AdamW::default() }
    }
}

impl Training {
    /// Every reason why these settings cannot train; empty when they can.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.optimizer.problems();
        for (name, value) in [("context", self.context), ("rows", self.rows), ("accumulate", self.accumulate)] {
            if value == 0 || value > 1 << 20 {
                problems.push(format!("training.{name} = {value} must be between 1 and {}", 1 << 20));
            }
        }
        problems
    }
}

/// AdamW with decoupled decay (arXiv 1711.05101), clipping by the global norm, linear warm-up over an
/// engine's own steps and a cosine over the whole run.
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
            learning_rate: 2e-3,
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
                problems.push(format!("training.optimizer.{name} = {value} must be at least {start} and below {end}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_warms_up_and_falls_along_a_cosine() {
        let adamw = AdamW { learning_rate: 1.0, warmup_steps: 10, final_share: 0.1, ..AdamW::default() };
        assert!((adamw.learning_rate_at(0, 0.0) - 0.1).abs() < 1e-6);
        assert!((adamw.learning_rate_at(100, 0.0) - 1.0).abs() < 1e-6);
        assert!((adamw.learning_rate_at(100, 0.5) - 0.55).abs() < 1e-6);
        assert!((adamw.learning_rate_at(100, 1.0) - 0.1).abs() < 1e-6);
    }

    #[test]
    fn nonsense_is_named() {
        let training = Training {
            rows: 0,
            optimizer: AdamW { learning_rate: f32::NAN, beta1: 1.0, ..AdamW::default() },
            ..Training::default()
        };
        assert_eq!(training.problems().len(), 3);
    }
}
