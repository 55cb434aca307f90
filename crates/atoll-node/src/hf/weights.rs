//! Weights in safetensors: written as f32, read from f32, bf16 and f16, one file or sharded.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use atoll_core::codec::check_finite;
use atoll_core::hash::little_endian;
use atoll_core::model::{ModelConfig, Tensor};
use safetensors::tensor::{TensorView, View};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::HfError;
use crate::data::file;
use crate::data::map::Map;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A tensor as safetensors wants it; its bytes are made when they are written, one tensor at a time.
struct Stored<'a> {
    shape: &'a [usize],
    weights: &'a [f32],
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        little_endian(self.weights)
    }

    fn data_len(&self) -> usize {
        size_of_val(self.weights)
    }
}

/// Writes `weights`, one vector per tensor.
pub(super) fn save(path: &Path, tensors: &[Tensor], weights: &[Vec<f32>]) -> Result<(), HfError> {
    let wrong = |reason: String| HfError::WrongWeights { reason };
    if tensors.len() != weights.len() {
        return Err(wrong(format!("{} tensors, and the model has {}", weights.len(), tensors.len())));
    }
    if let Some((tensor, weights)) = tensors.iter().zip(weights).find(|(tensor, weights)| tensor.len() != weights.len())
    {
        return Err(wrong(format!("{} of {} elements for {:?}", tensor.name, weights.len(), tensor.shape)));
    }
    let stored = tensors.iter().zip(weights);
    let stored = stored.map(|(tensor, weights)| (tensor.name.as_str(), Stored { shape: &tensor.shape, weights }));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let write =
        |temporary: &Path| safetensors::serialize_to_file(stored, Some(metadata), temporary).map_err(io::Error::other);
    file::write_with(path, write).map_err(|error| HfError::unwritable(path, error))
}

/// Reads the weights of a `config` from the files of `folder`.
pub(super) fn load(folder: &Path, config: &ModelConfig) -> Result<Vec<Vec<f32>>, HfError> {
    let tensors = config.tensors();
    let mut weights = vec![None; tensors.len()];
    let files = files(folder)?;
    for path in &files {
        load_file(path, config, &tensors, &mut weights)?;
    }
    let source = if let [single] = files.as_slice() { single.clone() } else { folder.join(INDEX) };
    let present = |(tensor, weights): (&Tensor, Option<Vec<f32>>)| {
        weights.ok_or_else(|| HfError::MissingTensor { path: source.clone(), name: tensor.name.clone() })
    };
    tensors.iter().zip(weights).map(present).collect()
}

/// The files of the weights: one, or those of an index.
fn files(folder: &Path) -> Result<Vec<PathBuf>, HfError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let path = folder.join(INDEX);
    if folder.join(SINGLE).exists() || !path.exists() {
        return Ok(vec![folder.join(SINGLE)]);
    }
    let bytes = fs::read(&path).map_err(|error| HfError::unreadable(&path, error))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| HfError::damaged(&path, error))?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort_unstable();
    names.dedup();
    let is_plain = |name: &String| Path::new(name).file_name().is_some_and(|file| file == name.as_str());
    match names.iter().find(|name| !is_plain(name)) {
        Some(name) => Err(HfError::damaged(&path, format!("'{name}' is no file name"))),
        None => Ok(names.iter().map(|name| folder.join(name)).collect()),
    }
}

/// Reads the tensors of one file into their places.
fn load_file(
    path: &Path,
    config: &ModelConfig,
    tensors: &[Tensor],
    weights: &mut [Option<Vec<f32>>],
) -> Result<(), HfError> {
    let map = Map::open(path).map_err(|error| HfError::unreadable(path, error))?;
    let file = SafeTensors::deserialize(&map).map_err(|error| HfError::damaged(path, error))?;
    let places: BTreeMap<&str, usize> = tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    for (name, view) in file.tensors() {
        match places.get(name.as_str()) {
            Some(&place) => weights[place] = Some(read(path, &tensors[place], &view)?),
            None if is_redundant(&name, config) => {}
            None => return Err(HfError::UnknownTensor { path: path.to_path_buf(), name }),
        }
    }
    Ok(())
}

/// Tensors that say nothing new: a tied output projection, and the frequencies that old files store.
fn is_redundant(name: &str, config: &ModelConfig) -> bool {
    (config.tie_word_embeddings && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
}

fn read(path: &Path, tensor: &Tensor, view: &TensorView<'_>) -> Result<Vec<f32>, HfError> {
    let (path, name) = (path.to_path_buf(), tensor.name.clone());
    if view.shape() != tensor.shape {
        let (found, expected) = (view.shape().to_vec(), tensor.shape.clone());
        return Err(HfError::WrongShape { path, name, found, expected });
    }
    let (words, _) = view.data().as_chunks::<4>();
    let (halves, _) = view.data().as_chunks::<2>();
    let weights: Vec<f32> = match view.dtype() {
        Dtype::F32 => words.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        Dtype::BF16 => halves.iter().map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32()).collect(),
        Dtype::F16 => halves.iter().map(|&bytes| half::f16::from_le_bytes(bytes).to_f32()).collect(),
        other => return Err(HfError::WrongType { path, name, dtype: format!("{other:?}") }),
    };
    match check_finite(&weights) {
        Ok(()) => Ok(weights),
        Err(error) => Err(HfError::damaged(&path, format!("{name}: {error}"))),
    }
}
