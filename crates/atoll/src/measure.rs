//! `atoll measure`: what this machine brings to a run.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::engine::Noise;
use atoll_core::model::{ModelConfig, PRESETS};
use atoll_core::training::{Muon, Training};
use atoll_node::memory;
use atoll_node::run::{RunConfig, Terms};
use atoll_node::site::Parts;
use serde::Serialize;

use crate::cpu::Cpu;
use crate::devices::{Device, Devices};
use crate::precision;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to train on: cpu, or a name that `atoll devices` lists.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Size of the model: nano, micro, mini, small, medium or large.
    #[arg(long, default_value = "mini")]
    preset: String,
    /// Tokens in its vocabulary.
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// Tokens predicted per sample.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Samples per step.
    #[arg(long, default_value_t = 8)]
    rows: usize,
    /// Steps that are measured, after two that are not.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Threads of the CPU engine; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Move the layers' matrices with Muon, not AdamW.
    #[arg(long)]
    muon: bool,
    #[command(flatten)]
    precision: precision::Arguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Steps before the first that counts: kernels are compiled, memory is touched for the first time.
const WARM_UP: usize = 2;

/// What came out.
#[derive(Debug, Serialize)]
struct Measured {
    device: String,
    engine: &'static str,
    parameters: usize,
    rows: usize,
    context: usize,
    steps: usize,
    /// Of the steps.
    median_seconds: f64,
    tokens_per_second: f64,
    /// Billions of operations per second in the model's own count.
    gflops: f64,
    /// The most memory of the host that this process held, if the system tells.
    peak_host_bytes: Option<u64>,
    /// Mean loss of the last step: random tokens teach nothing, so it stays near ln of the vocabulary.
    loss: f64,
}

pub(crate) fn run(arguments: &Arguments, devices: &dyn Devices) -> Result<()> {
    let measured = measure(arguments, devices)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&measured)?);
        return Ok(());
    }
    let Measured { device, engine, parameters, rows, context, steps, .. } = &measured;
    println!("{device}, engine {engine}");
    println!("{}: {:.1} M parameters, {rows} x {context} tokens a step", arguments.preset, *parameters as f64 / 1e6);
    println!(
        "{:.0} tokens/s ({:.3} s a step, median of {steps}), {:.0} GFLOP/s",
        measured.tokens_per_second, measured.median_seconds, measured.gflops
    );
    if let Some(bytes) = measured.peak_host_bytes {
        println!("{:.2} GiB of the host's memory at most", bytes as f64 / f64::from(1 << 30));
    }
    Ok(())
}

fn measure(arguments: &Arguments, devices: &dyn Devices) -> Result<Measured> {
    let &Arguments { vocab, context, rows, steps, .. } = arguments;
    if rows == 0 || steps == 0 {
        bail!("--rows and --steps must be at least 1\nhint: without them there are 8 rows and 10 steps");
    }
    let model = model(arguments)?;
    let device = device(arguments, devices)?;
    let muon = arguments.muon.then(Muon::default);
    let config =
        RunConfig { training: Training { context, rows, muon, ..Training::default() }, ..RunConfig::default() };
    let manifest = config.manifest(&model);
    let weights = manifest.gather(&model.initial_weights(1));
    let feed = Box::new(Noise::new(1, context, vocab));
    let terms = Terms { config, model: model.clone() };
    let mut engine = device.engine(Parts { terms, manifest: manifest.clone(), rows, feed })?;
    manifest.fragments().zip(&weights).try_for_each(|(id, weights)| engine.write(id, weights))?;
    let (mut seconds, mut loss) = (Vec::new(), f64::NAN);
    for step in 0..WARM_UP + steps {
        let began = Instant::now();
        loss = engine.train(1).context("the engine fails")?.loss;
        if step >= WARM_UP {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median_seconds = seconds[seconds.len() / 2];
    let tokens_per_second = (rows * context) as f64 / median_seconds;
    Ok(Measured {
        device: device.describe(),
        engine: device.engine_name(),
        parameters: model.parameters(),
        rows,
        context,
        steps,
        median_seconds,
        tokens_per_second,
        gflops: tokens_per_second * model.flop_per_token(context) / 1e9,
        peak_host_bytes: memory::peak_bytes(),
        loss,
    })
}

fn model(arguments: &Arguments) -> Result<ModelConfig> {
    let Arguments { preset, vocab, context, .. } = arguments;
    let model = ModelConfig::preset(preset, *vocab, *context)
        .ok_or_else(|| anyhow!("there is no preset '{preset}'\nhint: {}", PRESETS.map(|(name, _)| name).join(", ")))?;
    match model.problems().as_slice() {
        [] => Ok(model),
        problems => bail!("no engine can build this: {}\nhint: change --vocab or --context", problems.join("; ")),
    }
}

fn device(arguments: &Arguments, devices: &dyn Devices) -> Result<Box<dyn Device>> {
    if arguments.device == "cpu" {
        return Ok(Box::new(Cpu::new(arguments.threads, arguments.precision.resolve(), 1.0)));
    }
    devices.open(&arguments.device, arguments.precision.wish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::OnlyCpu;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn measure(words: &str) -> Result<Measured> {
        let line = Line::parse_from(std::iter::once("measure").chain(words.split_whitespace()));
        super::measure(&line.arguments, &OnlyCpu)
    }

    #[test]
    fn a_small_model_is_measured() {
        let small = "--preset nano --vocab 64 --context 16 --rows 2 --steps 3 --threads 1 --precision f32";
        let losses = ["", " --muon"].map(|more| {
            let measured = measure(&format!("{small}{more}")).unwrap();
            assert!(measured.tokens_per_second > 0.0 && measured.gflops > 0.0);
            measured.loss
        });
        // Nothing can be learnt of random tokens.
        assert!(losses.iter().all(|loss| (loss - 64f64.ln()).abs() < 0.5) && losses[0] != losses[1], "{losses:?}");
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let refused = |words| measure(words).unwrap_err().to_string();
        assert!(refused("--preset huge").contains("hint: nano"));
        assert!(refused("--steps 0").contains("at least 1"));
        assert!(refused("--device cuda").contains("not in this build"));
    }
}
