//! What the tests share: a tiny model, feeds, and an engine of both.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod golden;

use atoll_core::engine::{Batch, EngineError, Feed};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::rng::Rng;
use atoll_core::training::AdamW;
use atoll_cpu::{CpuEngine, Options, Precision};

/// Odd sizes everywhere, three query heads for each of two key heads.
pub fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        hidden_size: 20,
        intermediate_size: 27,
        num_hidden_layers: 2,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 6,
        max_position_embeddings: 160,
        rope_theta: 1000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    }
}

/// Weights far from zero, so that every path of the network matters.
pub fn lively_weights(config: &ModelConfig, seed: u64) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed);
    let mut random = |mean: f64| (mean + 0.2 * rng.normal()) as f32;
    let gain = |shape: &[usize]| if shape.len() == 1 { 1.0 } else { 0.0 };
    config.tensors().iter().map(|t| (0..t.len()).map(|_| random(gain(&t.shape))).collect()).collect()
}

pub fn random_batch(rows: usize, length: usize, vocab: usize, rng: &mut Rng) -> Batch {
    let tokens = (0..rows * (length + 1)).map(|_| rng.below(vocab as u64) as u32).collect();
    Batch { rows, length, tokens, ..Batch::default() }
}

/// ‖exact − rounded‖ / ‖exact‖.
pub fn share_apart(exact: &[f32], rounded: &[f32]) -> f32 {
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let apart: Vec<f32> = exact.iter().zip(rounded).map(|(a, b)| a - b).collect();
    norm(&apart) / norm(exact).max(1e-6)
}

/// Random tokens; `rows_left` of them.
pub struct RandomFeed {
    pub rng: Rng,
    pub length: usize,
    pub vocab: usize,
    pub rows_left: usize,
}

impl RandomFeed {
    pub fn new(length: usize, vocab: usize) -> Self {
        Self { rng: Rng::new(9), length, vocab, rows_left: usize::MAX }
    }
}

impl Feed for RandomFeed {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        self.rows_left = self.rows_left.checked_sub(rows).ok_or(EngineError::Starved { wanted: rows })?;
        *batch = random_batch(rows, self.length, self.vocab, &mut self.rng);
        Ok(())
    }
}

/// The given batches, one after the other.
pub struct ListFeed(pub std::vec::IntoIter<Batch>);

impl Feed for ListFeed {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        *batch = self.0.next().ok_or(EngineError::Starved { wanted: rows })?;
        Ok(())
    }
}

pub fn options(model: &ModelConfig) -> Options {
    Options {
        model: model.clone(),
        optimizer: AdamW::default(),
        muon: None,
        precision: Precision::F32,
        rows: 2,
        accumulate: 1,
        threads: 2,
    }
}

/// An engine with these per-tensor weights in three fragments.
pub fn engine(options: Options, weights: &[Vec<f32>], feed: Box<dyn Feed>) -> CpuEngine {
    let manifest = Manifest::balanced(options.model.tensors(), 3);
    let fragments = manifest.gather(weights);
    CpuEngine::new(options, manifest, fragments, feed).unwrap()
}
