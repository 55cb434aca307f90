//! `atoll new`: a run folder with a commented `run.toml`, a tokenizer and the coordinator's key.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use atoll_core::model::{ModelConfig, PRESETS};
use atoll_node::data::{Sample, Source, TextField, Tokenizer, corpus};
use atoll_node::hf;
use atoll_node::identity::Identity;
use atoll_node::run::{ModelSection, RunConfig, RunDir, write_atomically};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The folder to make.
    dir: PathBuf,
    /// Text to train the tokenizer on; without it, the sources of the crates Atoll is built from.
    #[arg(long, value_name = "PATH", conflicts_with = "tokenizer")]
    data: Option<PathBuf>,
    /// A Hugging Face tokenizer.json to use instead of training one.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// A model to continue: a Hugging Face folder of a Llama, with its tokenizer.json.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["data", "vocab", "preset"])]
    from: Option<PathBuf>,
    /// Tokens in the vocabulary of a trained tokenizer.
    #[arg(long, default_value_t = VOCABULARY)]
    vocab: usize,
    /// Field or column with the text in .jsonl and .parquet files.
    #[arg(long, default_value = "text")]
    text_field: String,
    /// Name of the run; without it, the folder's.
    #[arg(long)]
    name: Option<String>,
    /// The model's size: nano, micro, mini, small, medium or large.
    #[arg(long, default_value = "micro")]
    preset: String,
    /// Minutes to train for.
    #[arg(long)]
    minutes: Option<f64>,
    /// Tokens to train on.
    #[arg(long)]
    tokens: Option<u64>,
    /// Seed of first weights and sample order.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Tokens of a sample unless a model is continued that sees fewer.
const CONTEXT: usize = 256;
/// Tokens in the vocabulary unless the operator says otherwise.
const VOCABULARY: usize = 4096;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dir = RunDir(arguments.dir.clone());
    if dir.config().exists() {
        bail!(
            "{} is a run folder already\nhint: `atoll coordinate {0}` runs it; a new run needs a new folder",
            dir.0.display()
        );
    }
    let begun = arguments.from.as_deref().map(begun).transpose()?;
    let text = run_toml(arguments, begun.as_ref().map(|(model, _)| model));
    let config: RunConfig = toml::from_str(&text).context("the new run.toml is malformed")?;
    let problems = config.problems();
    if !problems.is_empty() {
        bail!("this run cannot be: {}\nhint: `atoll new --help` lists what there is", problems.join("; "));
    }
    let tokenizer = tokenizer(arguments)?;
    if let Err(problems) = config.model.resolve(tokenizer.vocab_size(), config.training.context) {
        bail!("model and tokenizer do not fit: {}\nhint: name the model's own with --tokenizer", problems.join("; "));
    }
    fs::create_dir_all(&dir.0).with_context(|| format!("{} cannot be made", dir.0.display()))?;
    write_atomically(&dir.tokenizer(), tokenizer.json())?;
    Identity::load_or_create(&dir.key())?;
    if let Some((model, weights)) = &begun {
        hf::save(&dir.first(), model, weights, None)?;
    }
    write_atomically(&dir.config(), text.as_bytes())?;
    println!("{} is ready: {} tokens in the vocabulary.", dir.0.display(), tokenizer.vocab_size());
    println!("  look over   {}", dir.config().display());
    println!("  then run    atoll coordinate {}", dir.0.display());
    println!("  and for each site   atoll ticket {} SITE", dir.0.display());
    Ok(())
}

/// Shape and weights of the model to continue.
fn begun(folder: &Path) -> Result<(ModelConfig, Vec<Vec<f32>>)> {
    if folder.extension().is_some_and(|kind| kind == "gguf") {
        bail!(
            "{0} is a GGUF file\nhint: make a Hugging Face folder of it first: python -m atoll.gguf {0} FOLDER",
            folder.display()
        );
    }
    Ok(hf::load(folder)?)
}

fn tokenizer(arguments: &Arguments) -> Result<Tokenizer> {
    let own = arguments.from.as_ref().map(|folder| folder.join("tokenizer.json"));
    if let Some(path) = arguments.tokenizer.as_ref().or(own.as_ref()) {
        let bytes = fs::read(path).with_context(|| {
            format!("{} cannot be read\nhint: name a tokenizer.json with --tokenizer", path.display())
        })?;
        return Ok(Tokenizer::from_bytes(bytes)?);
    }
    let source = match &arguments.data {
        Some(path) => Source::open(path)?,
        None => corpus::source()?,
    };
    eprintln!("training a tokenizer of {} tokens on {}", arguments.vocab, source.path().display());
    let sample = Sample::of(&source, &TextField(arguments.text_field.clone()))?;
    Ok(Tokenizer::train(&sample, arguments.vocab)?)
}

/// The commented `run.toml`. A test holds it to the defaults.
fn run_toml(arguments: &Arguments, begun: Option<&ModelConfig>) -> String {
    let name = arguments.name.clone().unwrap_or_else(|| folder_name(&arguments.dir));
    let goal = match (arguments.tokens, arguments.minutes) {
        (None, None) => "tokens = 100_000_000\n# minutes = 60.0".to_string(),
        (tokens, minutes) => {
            let tokens = tokens.map(|tokens| format!("tokens = {tokens}"));
            let minutes = minutes.map(|minutes| format!("minutes = {minutes:?}"));
            tokens.into_iter().chain(minutes).collect::<Vec<_>>().join("\n")
        }
    };
    let presets: Vec<String> = PRESETS.iter().map(|(name, what)| format!("#   {name:7} {what}")).collect();
    TEMPLATE
        .replace("{name}", &toml::Value::String(name).to_string())
        .replace("{seed}", &arguments.seed.to_string())
        .replace("{learning_rate}", begun.map_or_else(|| learning_rate(&arguments.preset), |_| "2e-4"))
        .replace("{embedding_rate}", embedding_rate(&arguments.preset))
        .replace("{embedding_floor}", embedding_floor(&arguments.preset))
        .replace("{context}", &begun.map_or(CONTEXT, |model| model.max_position_embeddings.min(CONTEXT)).to_string())
        .replace("preset = {preset}", &model_table(&arguments.preset, begun))
        .replace("{presets}", &presets.join("\n"))
        .replace("{goal}", &goal)
        .replace("{text_field}", &toml::Value::String(arguments.text_field.clone()).to_string())
}

/// What `[model]` says: a preset, or every size of a model that others began.
fn model_table(preset: &str, begun: Option<&ModelConfig>) -> String {
    match begun {
        None => format!("preset = {}", toml::Value::String(preset.to_string())),
        Some(model) => {
            let table = toml::to_string(&ModelSection::of(model)).expect("sizes are TOML");
            format!("# The weights in first/ are continued; their sizes cannot be changed.\n{}", table.trim_end())
        }
    }
}

/// A learning rate that suits the preset's width.
fn learning_rate(preset: &str) -> &'static str {
    match preset {
        "nano" | "mini" => "1.5e-3",
        "small" => "8e-4",
        "medium" => "5e-4",
        "large" => "3e-4",
        _ => "2e-3",
    }
}

/// What multiplies it for embeddings: the smallest model's `atoll-bench parity` found, the others' are unmeasured.
fn embedding_rate(preset: &str) -> &'static str {
    if preset == "nano" { "64.0" } else { "1.0" }
}

/// The embeddings' floor, which goes with their rate.
fn embedding_floor(preset: &str) -> &'static str {
    if preset == "nano" { "1.0" } else { "0.0" }
}

fn folder_name(dir: &Path) -> String {
    dir.file_name().map_or_else(|| "run".to_string(), |name| name.to_string_lossy().into_owned())
}

const TEMPLATE: &str = include_str!("run.toml");

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::training::Muon;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn the_template_says_the_defaults() {
        let line = Line::parse_from(["new", "some/run"]);
        let config: RunConfig = toml::from_str(&run_toml(&line.arguments, None)).unwrap();
        assert_eq!(config, RunConfig::default());
    }

    #[test]
    fn the_commented_muon_is_the_default_one() {
        let line = Line::parse_from(["new", "some/run"]);
        let text = run_toml(&line.arguments, None);
        let (_, table) = text.split_once("# [training.muon]\n").unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        let muon: Muon = toml::from_str(&table.replace("# ", "")).unwrap();
        assert_eq!(muon, Muon::default());
    }

    #[test]
    fn wishes_reach_the_template() {
        let line = Line::parse_from(["new", "x", "--minutes", "5", "--preset", "nano", "--name", "a \"b\""]);
        let config: RunConfig = toml::from_str(&run_toml(&line.arguments, None)).unwrap();
        assert_eq!((config.goal.minutes, config.goal.tokens), (Some(5.0), None));
        assert_eq!((config.model.preset.as_str(), config.name.as_str()), ("nano", "a \"b\""));
    }
}
