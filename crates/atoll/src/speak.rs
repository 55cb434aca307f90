//! What one does with a model: `atoll generate`, `atoll eval`, `atoll export`.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Result, bail};
use atoll_core::engine::{NoFeed, evaluate_all};
use atoll_core::journal::Evaluated;
use atoll_core::manifest::Manifest;
use atoll_core::training::AdamW;
use atoll_cpu::{CpuEngine, Generator, Options, Precision, Sampling};
use atoll_node::data::{Dataset, IngestOptions, Source, TextField, ingest, is_dataset};
use atoll_node::hf;
use atoll_node::site::held_out_windows;

use crate::model::{self, Loaded};
use crate::precision;

#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArguments {
    /// A run folder or a Hugging Face folder.
    dir: PathBuf,
    /// The text to continue.
    #[arg(long)]
    prompt: String,
    /// Tokens to add at most.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// 0 always takes the likeliest token; higher is bolder.
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Draw among this many of the likeliest tokens; 0 among all.
    #[arg(long, default_value_t = 40)]
    top_k: usize,
    /// Draw among the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    precision: precision::Arguments,
}

pub(crate) fn generate(arguments: &GenerateArguments) -> Result<()> {
    if !(arguments.temperature >= 0.0 && arguments.temperature.is_finite()) {
        bail!("--temperature {} must be 0 or more", arguments.temperature);
    }
    if !(arguments.top_p > 0.0 && arguments.top_p <= 1.0) {
        bail!("--top-p {} must be above 0 and at most 1", arguments.top_p);
    }
    let Loaded { config, weights, tokenizer, .. } = model::load(&arguments.dir)?;
    let mut prompt = tokenizer.encode(&arguments.prompt)?;
    if prompt.is_empty() {
        prompt.push(tokenizer.end_of_text()); // A text starts after the end of another.
    }
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        seed: arguments.seed,
    };
    let mut generator = Generator::new(&config, &weights, arguments.precision.resolve(), arguments.threads)?;
    let mut said: Vec<u32> = Vec::new();
    let mut shown = 0;
    let mut out = std::io::stdout().lock();
    write!(out, "{}", arguments.prompt)?;
    let tokens = generator.generate(&prompt, &sampling)?;
    for token in tokens.take(arguments.tokens).take_while(|&token| token != tokenizer.end_of_text()) {
        said.push(token);
        // A character may be spread over several tokens; print it when it is whole.
        let text = tokenizer.decode(&said)?;
        let whole = text.trim_end_matches('\u{FFFD}').len();
        if whole > shown {
            write!(out, "{}", &text[shown..whole])?;
            out.flush()?;
            shown = whole;
        }
    }
    writeln!(out)?;
    Ok(())
}

#[derive(Debug, clap::Args)]
pub(crate) struct EvalArguments {
    /// A run folder or a Hugging Face folder.
    dir: PathBuf,
    /// Text, or a folder made by `atoll ingest`.
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Share of the documents that counts as held out; 1 looks at all of the text.
    #[arg(long, default_value_t = 0.02)]
    held_out: f64,
    /// Field or column with the text in .jsonl and .parquet files.
    #[arg(long, default_value = "text")]
    text_field: String,
    /// Look at no more than this many windows, spread evenly; 0 looks at all.
    #[arg(long, default_value_t = 0)]
    windows: u64,
    /// Threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Rows of an evaluation batch.
const ROWS: usize = 8;

pub(crate) fn eval(arguments: &EvalArguments) -> Result<()> {
    let loaded = model::load(&arguments.dir)?;
    let scratch = tempfile::tempdir()?;
    let dataset = dataset(arguments, &loaded, &scratch)?;
    let context = loaded.config.max_position_embeddings;
    let all = dataset.held_out_samples(context);
    if all == 0 {
        bail!("{} has no held-out text\nhint: give --held-out a larger share", arguments.data.display());
    }
    let count = if arguments.windows == 0 { all } else { arguments.windows.min(all) };
    let windows = (0..count).map(|window| window * all / count);
    let held_out =
        held_out_windows(&dataset, &loaded.tokenizer, context, model::packing(&arguments.dir)?, ROWS, windows)?;
    let mut engine = engine(&loaded, arguments)?;
    let sum = evaluate_all(&mut engine, &held_out.batches)?;
    let evaluated = Evaluated { commits: 0, nats: sum.nats, tokens: sum.tokens, bytes: held_out.bytes };
    let loss = sum.nats / sum.tokens as f64;
    if arguments.json {
        let figures = serde_json::json!({
            "bits_per_byte": evaluated.bits_per_byte(), "loss": loss, "perplexity": loss.exp(),
            "tokens": sum.tokens, "bytes": held_out.bytes,
        });
        println!("{figures}");
    } else {
        println!("bits per byte   {:.4}", evaluated.bits_per_byte());
        println!("loss            {loss:.4} nats per token");
        println!("perplexity      {:.2} per token", loss.exp());
        println!(
            "held out        {} tokens, {} bytes of text in {}",
            sum.tokens,
            held_out.bytes,
            arguments.data.display()
        );
        println!("model           {}", loaded.folder.display());
    }
    Ok(())
}

fn dataset(arguments: &EvalArguments, loaded: &Loaded, scratch: &tempfile::TempDir) -> Result<Dataset> {
    if is_dataset(&arguments.data) {
        let dataset = Dataset::open(&arguments.data)?;
        dataset.check_tokenizer(loaded.tokenizer.hash())?;
        return Ok(dataset);
    }
    if !(arguments.held_out > 0.0 && arguments.held_out <= 1.0) {
        bail!("--held-out {} must be above 0 and at most 1", arguments.held_out);
    }
    let options = IngestOptions {
        held_out: arguments.held_out,
        text_field: TextField(arguments.text_field.clone()),
        ..IngestOptions::default()
    };
    let source = Source::open(&arguments.data)?;
    Ok(ingest(
        &source,
        &loaded.tokenizer,
        &scratch.path().join("tokens"),
        &options,
        &mut |_| ControlFlow::Continue(()),
    )?)
}

fn engine(loaded: &Loaded, arguments: &EvalArguments) -> Result<CpuEngine> {
    let options = Options {
        model: loaded.config.clone(),
        optimizer: AdamW::default(),
        muon: None,
        // A measurement is to be the same wherever it is taken.
        precision: Precision::F32,
        rows: ROWS,
        accumulate: 1,
        threads: arguments.threads,
    };
    let manifest = Manifest::balanced(loaded.config.tensors(), 1);
    let weights = manifest.gather(&loaded.weights);
    Ok(CpuEngine::new(options, manifest, weights, Box::new(NoFeed))?)
}

#[derive(Debug, clap::Args)]
pub(crate) struct ExportArguments {
    /// A run folder.
    dir: PathBuf,
    /// The folder to write.
    out: PathBuf,
}

pub(crate) fn export(arguments: &ExportArguments) -> Result<()> {
    let loaded = model::load(&arguments.dir)?;
    if arguments.out.join("model.safetensors").exists() {
        bail!("{} holds a model already\nhint: choose another folder, or remove it", arguments.out.display());
    }
    std::fs::create_dir_all(&arguments.out)?;
    hf::save(&arguments.out, &loaded.config, &loaded.weights, Some(loaded.tokenizer.json()))?;
    println!("{} holds the model of {}", arguments.out.display(), loaded.folder.display());
    Ok(())
}
