//! Where a model is: in a run folder (finished or not) or in a Hugging Face folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use atoll_core::model::ModelConfig;
use atoll_core::training::Packing;
use atoll_node::data::Tokenizer;
use atoll_node::run::{RunConfig, RunDir};
use atoll_node::{hf, snapshot};

/// A model with its tokenizer.
pub(crate) struct Loaded {
    /// Where it was found.
    pub(crate) folder: PathBuf,
    pub(crate) config: ModelConfig,
    /// One vector per tensor.
    pub(crate) weights: Vec<Vec<f32>>,
    pub(crate) tokenizer: Tokenizer,
}

/// Loads the model of `dir`.
pub(crate) fn load(dir: &Path) -> Result<Loaded> {
    let folder = find(dir)?;
    let (config, weights) = hf::load(&folder)?;
    let own = folder.join("tokenizer.json");
    let path = if own.exists() { own } else { RunDir(dir.to_path_buf()).tokenizer() };
    let bytes = fs::read(&path)
        .with_context(|| format!("{} cannot be read\nhint: a model folder needs its tokenizer.json", path.display()))?;
    Ok(Loaded { folder, config, weights, tokenizer: Tokenizer::from_bytes(bytes)? })
}

/// What a token saw in training, if `dir` is a run folder; a model's own folder does not tell.
pub(crate) fn packing(dir: &Path) -> Result<Packing> {
    let path = RunDir(dir.to_path_buf()).config();
    if !path.exists() {
        return Ok(Packing::default());
    }
    Ok(RunConfig::load(&path)?.training.packing)
}

/// The finished model, else the newest snapshot, else `dir` itself.
fn find(dir: &Path) -> Result<PathBuf> {
    let run = RunDir(dir.to_path_buf());
    if dir.join("config.json").exists() {
        return Ok(dir.to_path_buf());
    }
    if run.model().join("config.json").exists() {
        return Ok(run.model());
    }
    if snapshot::list(&run).is_empty() {
        bail!(
            "there is no model in {}\nhint: give a run folder that has trained, or a Hugging Face folder",
            dir.display()
        );
    }
    snapshot::newest(&run)
}
