//! Atoll's side: this program again, as a process of its own, so that its memory is counted as PyTorch's is.

use std::io::stdin;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use atoll_core::engine::{Engine, Noise};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::training::AdamW;
use atoll_cpu::{CpuEngine, Generator, Options, Sampling};
use atoll_node::memory;

use super::side::{Answer, Side};
use super::spec::{Spec, Work, model};

/// Takes so many steps; returns the last one's loss, if there is one.
type Steps = Box<dyn FnMut(usize) -> Result<Option<f64>>>;

/// Starts this program with that task.
pub(crate) fn start(spec: &Spec) -> Result<Side> {
    let program = std::env::current_exe()?;
    Side::start(Command::new(program).args(["engine", "--worker", &serde_json::to_string(spec)?]))
}

/// Does the task `spec`: a line in, steps, a line out.
pub(crate) fn work(spec: &str) -> Result<()> {
    let spec: Spec = serde_json::from_str(spec).context("--worker wants a task in JSON")?;
    let mut steps = match spec.work {
        Work::Train => trainer(&spec)?,
        Work::Generate => speaker(&spec)?,
    };
    for line in stdin().lines() {
        let count = line?.trim().parse().context("every line is a number of steps")?;
        let began = Instant::now();
        let loss = steps(count)?;
        let peak_bytes = memory::peak_bytes().map(|bytes| bytes as f64);
        let answer = Answer { seconds: began.elapsed().as_secs_f64(), loss, peak_bytes };
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

fn trainer(spec: &Spec) -> Result<Steps> {
    let model = model(&spec.preset)?;
    let manifest = Manifest::balanced(model.tensors(), 4);
    let weights = manifest.gather(&model.initial_weights(1));
    let noise = Noise::new(1, spec.length, model.vocab_size);
    let mut engine = CpuEngine::new(options(spec, model), manifest, weights, Box::new(noise))?;
    Ok(Box::new(move |steps| Ok(Some(engine.train(steps as u32)?.loss))))
}

/// The engine's settings, all in one place.
fn options(spec: &Spec, model: ModelConfig) -> Options {
    Options {
        model,
        optimizer: AdamW::default(),
        muon: None,
        precision: spec.precision.precision(),
        rows: spec.rows,
        accumulate: 1,
        threads: spec.threads,
    }
}

/// One text at a time.
fn speaker(spec: &Spec) -> Result<Steps> {
    let model = model(&spec.preset)?;
    let mut generator = Generator::new(&model, &model.initial_weights(1), spec.precision.precision(), spec.threads)?;
    let likeliest = Sampling { temperature: 0.0, ..Sampling::default() };
    Ok(Box::new(move |steps| {
        let said = generator.generate(&[1], &likeliest)?.take(steps).count();
        debug_assert_eq!(said, steps, "a continuation is endless");
        Ok(None)
    }))
}
