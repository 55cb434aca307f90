//! Atoll's side: this program again, as a process of its own, so that its memory is counted as PyTorch's is.

use std::fs;
use std::io::stdin;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use atoll_core::engine::{Batch, Engine, EngineError, Feed};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::rng::Rng;
use atoll_core::training::AdamW;
use atoll_cpu::{CpuEngine, Generator, Options, Sampling};

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
        let answer = Answer { seconds: began.elapsed().as_secs_f64(), loss, peak_bytes: peak_bytes() };
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

fn trainer(spec: &Spec) -> Result<Steps> {
    let model = model(&spec.preset)?;
    let manifest = Manifest::balanced(model.tensors(), 4);
    let weights = manifest.gather(&model.initial_weights(1));
    let noise = Noise { rng: Rng::new(1), vocabulary: model.vocab_size, length: spec.length };
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

/// Random tokens: an engine does the same work for them as for text.
struct Noise {
    rng: Rng,
    vocabulary: usize,
    length: usize,
}

impl Feed for Noise {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let count = rows * (self.length + 1);
        (batch.rows, batch.length) = (rows, self.length);
        batch.tokens.clear();
        batch.tokens.extend((0..count).map(|_| self.rng.below(self.vocabulary as u64) as u32));
        Ok(())
    }
}

/// The most memory that this process ever held, where `/proc` tells.
fn peak_bytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    let kibibytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024.0)
}
