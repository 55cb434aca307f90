//! Tokens per second of training: `cargo run --release -p atoll-cpu --example speed -- [PRESET] [THREADS] [ROWS] [LENGTH] [bf16]`.

use std::time::Instant;

use atoll_core::engine::{Engine, Noise};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::training::AdamW;
use atoll_cpu::{CpuEngine, Generator, Options, Precision, Sampling};

const VOCAB: usize = 8192;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: usize| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let preset = arguments.first().map_or("mini", String::as_str);
    let (threads, rows, length) = (number(1, 2)?, number(2, 8)?, number(3, 256)?);
    let precision = if arguments.get(4).is_some_and(|text| text == "bf16") { Precision::Bf16 } else { Precision::F32 };
    let model = ModelConfig::preset(preset, VOCAB, length.max(256)).ok_or("no such preset")?;
    let weights = model.initial_weights(1);

    let manifest = Manifest::balanced(model.tensors(), 4);
    let fragments = manifest.gather(&weights);
    let options = Options {
        model: model.clone(),
        optimizer: AdamW::default(),
        muon: None,
        precision,
        rows,
        accumulate: 1,
        threads,
    };
    let mut engine = CpuEngine::new(options, manifest, fragments, Box::new(Noise::new(2, length, VOCAB)))?;
    engine.train(2)?;
    // The fastest of several medians is the engine's speed; the slower ones are the machine's other work.
    let medians = (0..3).map(|_| median(5, || engine.train(1).map(drop))).collect::<Result<Vec<f64>, _>>()?;
    let seconds = medians.iter().copied().fold(f64::INFINITY, f64::min);
    let speed = (rows * length) as f64 / seconds;
    let gflops = 6.0 * model.parameters() as f64 * speed / 1e9;
    println!("{preset:6} threads {threads} batch {rows} × {length}: train {speed:8.0} tokens/s ({gflops:.0} GFLOP/s)");

    let mut generator = Generator::new(&model, &weights, precision, threads)?;
    let mut tokens = generator.generate(&[1; 16], &Sampling::default())?;
    tokens.next();
    let seconds = median(64, || tokens.next().map(|_| ()).ok_or("an endless text ended"))?;
    println!("{preset:6} threads {threads}: generate {:8.0} tokens/s", 1.0 / seconds);
    Ok(())
}

/// Median seconds of `count` runs of `work`.
fn median<E>(count: usize, mut work: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let mut seconds = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[count / 2])
}
