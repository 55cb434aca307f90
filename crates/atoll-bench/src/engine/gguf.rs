//! The same model as a file that llama.cpp reads (GGUF, version 3; all little-endian):
//!
//! ```text
//! "GGUF"  u32 version  u64 tensors  u64 pairs
//! pairs:    name  u32 type  value                              a name is a u64 length and its bytes
//! tensors:  name  u32 dimensions  u64 each, innermost first  u32 type  u64 offset
//! data:     every tensor begins at a multiple of 32
//! ```

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Result;
use atoll_core::model::{ModelConfig, Tensor};
use half::{bf16, f16};

const ALIGNMENT: usize = 32;
const STRING: u32 = 8;
const U32: u32 = 4;
const F32: u32 = 6;

/// How matrices are stored; gains are always fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    Fp32,
    Bf16,
    F16,
}

impl Storage {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The type of a tensor in GGUF.
    fn tensor_type(self) -> u32 {
        match self {
            Self::Fp32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
        }
    }

    /// The type of a whole file in GGUF.
    fn file_type(self) -> u32 {
        match self {
            Self::Fp32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 32,
        }
    }

    fn bytes(self, weights: &[f32]) -> Vec<u8> {
        match self {
            Self::Fp32 => weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
            Self::Bf16 => weights.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect(),
            Self::F16 => weights.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes()).collect(),
        }
    }
}

/// Writes the model to `path`; `weights` are in the order of [`ModelConfig::tensors`].
pub(crate) fn write(path: &Path, model: &ModelConfig, weights: &[Vec<f32>], storage: Storage) -> Result<()> {
    let (tensors, pairs) = (model.tensors(), pairs(model, storage));
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((pairs.len() as u64).to_le_bytes());
    head.extend(pairs.concat());
    let mut data = Vec::new();
    for (tensor, weights) in tensors.iter().zip(weights) {
        let storage = if tensor.shape.len() == 1 { Storage::Fp32 } else { storage };
        head.extend(description(tensor, storage, data.len()));
        data.extend(storage.bytes(&turned(model, tensor, weights)));
        pad(&mut data);
    }
    pad(&mut head);
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&head)?;
    file.write_all(&data)?;
    Ok(file.flush()?)
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

/// The shape of the model, and that there is no tokenizer.
fn pairs(model: &ModelConfig, storage: Storage) -> Vec<Vec<u8>> {
    let count = |key: &str, value: usize| pair(key, U32, &(value as u32).to_le_bytes());
    let real = |key: &str, value: f32| pair(key, F32, &value.to_le_bytes());
    let word = |key: &str, value: &str| pair(key, STRING, &text(value));
    vec![
        word("general.architecture", "llama"),
        count("general.file_type", storage.file_type() as usize),
        word("tokenizer.ggml.model", "no_vocab"),
        count("llama.vocab_size", model.vocab_size),
        count("llama.context_length", model.max_position_embeddings),
        count("llama.embedding_length", model.hidden_size),
        count("llama.feed_forward_length", model.intermediate_size),
        count("llama.block_count", model.num_hidden_layers),
        count("llama.attention.head_count", model.num_attention_heads),
        count("llama.attention.head_count_kv", model.num_key_value_heads),
        count("llama.attention.key_length", model.head_dim),
        count("llama.attention.value_length", model.head_dim),
        count("llama.rope.dimension_count", model.head_dim),
        real("llama.rope.freq_base", model.rope_theta),
        real("llama.attention.layer_norm_rms_epsilon", model.rms_norm_eps),
    ]
}

fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), &kind.to_le_bytes()[..], value].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn description(tensor: &Tensor, storage: Storage, offset: usize) -> Vec<u8> {
    let mut bytes = text(&name(&tensor.name));
    bytes.extend((tensor.shape.len() as u32).to_le_bytes());
    tensor.shape.iter().rev().for_each(|&length| bytes.extend((length as u64).to_le_bytes()));
    bytes.extend(storage.tensor_type().to_le_bytes());
    bytes.extend((offset as u64).to_le_bytes());
    bytes
}

/// llama.cpp's name of one of Hugging Face's tensors.
fn name(theirs: &str) -> String {
    const PARTS: [(&str, &str); 13] = [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    PARTS.iter().fold(theirs.to_string(), |name, (from, to)| name.replace(from, to))
}

/// llama.cpp's rotary embedding turns neighbours (2i, 2i+1) of a head, Hugging Face's turns (i, i + hd/2):
/// the rows of the queries' and keys' matrices change places.
fn turned(model: &ModelConfig, tensor: &Tensor, weights: &[f32]) -> Vec<f32> {
    if !tensor.name.contains("q_proj") && !tensor.name.contains("k_proj") {
        return weights.to_vec();
    }
    let (width, half) = (model.hidden_size, model.head_dim / 2);
    let mut turned = Vec::with_capacity(weights.len());
    for head in weights.chunks(model.head_dim * width) {
        for row in 0..model.head_dim {
            let from = row / 2 + row % 2 * half;
            turned.extend_from_slice(&head[from * width..][..width]);
        }
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_begins_as_the_picture_says() {
        let folder = tempfile::tempdir().unwrap();
        let (path, model) = (folder.path().join("a.gguf"), ModelConfig::preset("nano", 64, 32).unwrap());
        write(&path, &model, &model.initial_weights(1), Storage::Bf16).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[..8], b"GGUF\x03\0\0\0");
        assert_eq!(bytes[8..24], [&38u64.to_le_bytes()[..], &15u64.to_le_bytes()[..]].concat());
        assert_eq!(&bytes[24..32], [20, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[32..52], b"general.architecture");
        assert_eq!(bytes.len() % ALIGNMENT, 0);
    }

    #[test]
    fn names_are_llama_cpps() {
        assert_eq!(name("model.layers.3.post_attention_layernorm.weight"), "blk.3.ffn_norm.weight");
        assert_eq!(name("model.layers.3.input_layernorm.weight"), "blk.3.attn_norm.weight");
        assert_eq!(name("model.embed_tokens.weight"), "token_embd.weight");
    }

    #[test]
    fn neighbours_turn_together() {
        let model = ModelConfig { hidden_size: 1, head_dim: 4, ..ModelConfig::preset("nano", 64, 32).unwrap() };
        let tensor = &model.tensors()[1];
        assert_eq!(
            turned(&model, tensor, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
            [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
        );
    }
}
