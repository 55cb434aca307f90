//! Models as Hugging Face keeps them, so that what Atoll trains is used with everyone's tools, and
//! what others trained goes on in Atoll. A folder holds
//!
//! | file | |
//! |---|---|
//! | `config.json` | the shape: `LlamaForCausalLM`, readable by transformers 4 and 5 |
//! | `model.safetensors` | the weights, f32 here; read as f32, bf16 or f16, in one file or in shards |
//! | `generation_config.json` | where generated text begins and ends |
//! | `tokenizer.json`, `tokenizer_config.json` | the tokenizer, if there is one |
//!
//! [`save`] writes each file whole or not at all; [`load`] refuses, by name, what it could only
//! misread.

mod config;
mod weights;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use atoll_core::model::ModelConfig;

use crate::data::{DataError, Tokenizer, file};

/// Why a model folder could not be written or read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum HfError {
    /// A file is missing or cannot be read.
    #[error("cannot read {}: {reason}\nhint: a model folder holds config.json and model.safetensors", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// A file could not be written.
    #[error("cannot write {}: {reason}\nhint: check the free space and the permissions of its folder", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// A file is truncated, or not of its format.
    #[error("{} is damaged or truncated: {reason}\nhint: copy or download it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The model is of a kind that Atoll does not train.
    #[error("{}: {what} is not supported\nhint: Atoll trains plain Llamas: {PLAIN}", path.display())]
    Unsupported {
        /// The `config.json`.
        path: PathBuf,
        /// The setting.
        what: String,
    },
    /// The shape cannot be built.
    #[error("{}: {}\nhint: correct config.json, or use another model", path.display(), problems.join("; "))]
    BadShape {
        /// The `config.json`.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Vec<String>,
    },
    /// The weights lack a tensor.
    #[error("{} lacks the tensor {name}\nhint: check that config.json belongs to these weights, and that all files were copied", path.display())]
    MissingTensor {
        /// The weights' file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The weights have a tensor that the model does not.
    #[error("{} holds the tensor {name}, which config.json gives no place\nhint: check that config.json belongs to these weights", path.display())]
    UnknownTensor {
        /// The weights' file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the model.
    #[error("{}: {name} has the shape {found:?}, and config.json says {expected:?}\nhint: check that config.json belongs to these weights", path.display())]
    WrongShape {
        /// The weights' file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// Its shape in the model.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a type that cannot be read.
    #[error("{}: {name} is stored as {dtype}\nhint: Atoll reads f32, bf16 and f16; convert the model first", path.display())]
    WrongType {
        /// The weights' file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// The weights given to [`save`] are not the model's.
    #[error("these weights do not fit the model: {reason}\nhint: this is a mistake in Atoll; please report it")]
    WrongWeights {
        /// What differs.
        reason: String,
    },
    /// The tokenizer cannot be used with the model.
    #[error(transparent)]
    Tokenizer(#[from] DataError),
}

const PLAIN: &str = "LlamaForCausalLM with SiLU, default rotary embedding, no biases and no quantization";

impl HfError {
    fn unreadable(path: &Path, reason: impl fmt::Display) -> Self {
        Self::Unreadable { path: path.to_path_buf(), reason: reason.to_string() }
    }

    fn unwritable(path: &Path, reason: impl fmt::Display) -> Self {
        Self::Unwritable { path: path.to_path_buf(), reason: reason.to_string() }
    }

    fn damaged(path: &Path, reason: impl fmt::Display) -> Self {
        Self::Damaged { path: path.to_path_buf(), reason: reason.to_string() }
    }
}

/// Writes a model folder. `weights` has one vector per tensor, in the order of `config.tensors()`.
///
/// # Errors
/// If the weights are not the model's, the tokenizer has more tokens than the model, or a file cannot
/// be written.
pub fn save(
    folder: &Path,
    config: &ModelConfig,
    weights: &[Vec<f32>],
    tokenizer_json: Option<&[u8]>,
) -> Result<(), HfError> {
    let tokenizer = tokenizer_json.map(Tokenizer::from_bytes).transpose()?;
    if let Some(tokenizer) = tokenizer.as_ref().filter(|tokenizer| tokenizer.vocab_size() > config.vocab_size) {
        let (have, need) = (config.vocab_size, tokenizer.vocab_size());
        return Err(HfError::WrongWeights { reason: format!("{need} tokens in the tokenizer, {have} in the model") });
    }
    fs::create_dir_all(folder).map_err(|error| HfError::unwritable(folder, error))?;
    weights::save(&folder.join("model.safetensors"), &config.tensors(), weights)?;
    for (name, bytes) in config::files(config, tokenizer.as_ref()) {
        let path = folder.join(name);
        file::write(&path, &bytes).map_err(|error| HfError::unwritable(&path, error))?;
    }
    Ok(())
}

/// Reads the shape of the model in a folder.
///
/// # Errors
/// If `config.json` is missing or damaged, or describes no plain Llama.
pub fn load_config(folder: &Path) -> Result<ModelConfig, HfError> {
    config::load(&folder.join("config.json"))
}

/// Reads a model folder: the shape and one vector per tensor, in the order of `config.tensors()`.
///
/// # Errors
/// If a file is missing or damaged, the model is no plain Llama, or its weights are not those of its
/// shape.
pub fn load(folder: &Path) -> Result<(ModelConfig, Vec<Vec<f32>>), HfError> {
    let config = load_config(folder)?;
    let weights = weights::load(folder, &config)?;
    Ok((config, weights))
}

#[cfg(test)]
mod tests;
