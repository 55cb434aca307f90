//! `atoll ingest`: text to token shards.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use atoll_node::data::{IngestOptions, IngestProgress, Source, Split, TextField, Tokenizer, corpus, ingest};
use atoll_node::run::RunDir;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A file or folder of text; without it, the sources of the crates Atoll is built from.
    path: Option<PathBuf>,
    /// Where the shards go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The tokenizer.json of the run that the shards are for.
    #[arg(long, value_name = "FILE", required_unless_present = "run")]
    tokenizer: Option<PathBuf>,
    /// The run folder, if it is on this machine.
    #[arg(long, value_name = "DIR", conflicts_with = "tokenizer")]
    run: Option<PathBuf>,
    /// Share of the documents that is never trained on; the same at all sites.
    #[arg(long, default_value_t = 0.02)]
    held_out: f64,
    /// Field or column with the text in .jsonl and .parquet files.
    #[arg(long, default_value = "text")]
    text_field: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let path = match (&arguments.tokenizer, &arguments.run) {
        (Some(path), _) => path.clone(),
        (None, Some(run)) => RunDir(run.clone()).tokenizer(),
        (None, None) => bail!("--tokenizer or --run is needed"),
    };
    let bytes = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let tokenizer = Tokenizer::from_bytes(bytes)?;
    let source = match &arguments.path {
        Some(path) => Source::open(path)?,
        None => corpus::source()?,
    };
    let options = IngestOptions {
        held_out: arguments.held_out,
        text_field: TextField(arguments.text_field.clone()),
        ..IngestOptions::default()
    };
    let mut last = std::time::Instant::now();
    let mut progress = |progress: IngestProgress| {
        if last.elapsed().as_secs() >= 1 {
            last = std::time::Instant::now();
            eprintln!("{} of {} files, {} tokens", progress.files_done, progress.files, progress.tokens);
        }
        ControlFlow::Continue(())
    };
    let dataset = ingest(&source, &tokenizer, &arguments.out, &options, &mut progress)?;
    println!(
        "{}: {} tokens of {} documents to train on, {} tokens of {} documents held out",
        arguments.out.display(),
        dataset.tokens(Split::Train),
        dataset.documents(Split::Train),
        dataset.tokens(Split::HeldOut),
        dataset.documents(Split::HeldOut)
    );
    Ok(())
}
