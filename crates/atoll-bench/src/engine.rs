//! How fast the CPU engine trains.

use std::time::Instant;

use anyhow::Result;
use atoll_core::engine::{Batch, Engine, EngineError, Feed};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::rng::Rng;
use atoll_core::training::AdamW;
use atoll_cpu::{CpuEngine, Options, Precision};

use crate::{Figures, median};

const VOCABULARY: usize = 4096;
const CONTEXT: usize = 256;
const ROWS: usize = 8;

/// Random tokens: the engine does the same work for them as for text.
struct Noise(Rng);

impl Feed for Noise {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        (batch.rows, batch.length) = (rows, CONTEXT);
        batch.tokens = (0..rows * (CONTEXT + 1)).map(|_| self.0.below(VOCABULARY as u64) as u32).collect();
        Ok(())
    }
}

pub(crate) fn run(quick: bool) -> Result<Figures> {
    let steps = if quick { 3 } else { 9 };
    let presets: &[&str] = if quick { &["nano"] } else { &["nano", "micro", "mini"] };
    println!("CPU engine, fp32, vocabulary {VOCABULARY}, batch {ROWS} × {CONTEXT}, median of {steps} steps\n");
    println!("preset   parameters   threads   tokens/s   GFLOP/s");
    let mut figures = Figures::new();
    for preset in presets {
        for threads in [1, 2] {
            let speed = tokens_per_second(preset, threads, steps)?;
            let parameters = model(preset).parameters();
            println!(
                "{preset:8} {parameters:10}   {threads:7}   {speed:8.0}   {:7.0}",
                speed * 6e-9 * parameters as f64
            );
            figures.insert(format!("{preset}_{threads}_threads_tokens_per_second"), speed);
        }
    }
    Ok(figures)
}

fn model(preset: &str) -> ModelConfig {
    ModelConfig::preset(preset, VOCABULARY, CONTEXT).expect("a preset of this page")
}

fn tokens_per_second(preset: &str, threads: usize, steps: usize) -> Result<f64> {
    let model = model(preset);
    let manifest = Manifest::balanced(model.tensors(), 4);
    let weights = manifest.gather(&model.initial_weights(1));
    let (optimizer, precision) = (AdamW::default(), Precision::F32);
    let options = Options { model, optimizer, muon: None, precision, rows: ROWS, accumulate: 1, threads };
    let mut engine = CpuEngine::new(options, manifest, weights, Box::new(Noise(Rng::new(1))))?;
    engine.train(1)?;
    let mut speeds = Vec::new();
    for _ in 0..steps {
        let began = Instant::now();
        let progress = engine.train(1)?;
        speeds.push(progress.tokens as f64 / began.elapsed().as_secs_f64());
    }
    Ok(median(speeds))
}
