//! `config.json` and the small files beside it.

use std::fs;
use std::path::Path;

use atoll_core::model::ModelConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::HfError;
use crate::data::Tokenizer;

/// What transformers 5 calls `rope_parameters`, and 4 splits into `rope_theta` and `rope_scaling`.
#[derive(Serialize)]
struct RopeParameters {
    rope_theta: f32,
    rope_type: &'static str,
}

/// The fields that transformers 4 and 5 need, under both of their names where they differ.
#[derive(Serialize)]
struct Written<'a> {
    architectures: [&'static str; 1],
    model_type: &'static str,
    #[serde(flatten)]
    shape: &'a ModelConfig,
    rope_parameters: RopeParameters,
    rope_scaling: Option<()>,
    hidden_act: &'static str,
    attention_bias: bool,
    mlp_bias: bool,
    attention_dropout: f32,
    initializer_range: f32,
    use_cache: bool,
    dtype: &'static str,
    torch_dtype: &'static str,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    pad_token_id: Option<u32>,
}

/// All files of a model folder but the weights: names and contents, `config.json` last.
pub(super) fn files(config: &ModelConfig, tokenizer: Option<&Tokenizer>) -> Vec<(&'static str, Vec<u8>)> {
    let mut files = Vec::new();
    let end_of_text = tokenizer.map(Tokenizer::end_of_text);
    if let Some(tokenizer) = tokenizer {
        files.push(("tokenizer.json", tokenizer.json().to_vec()));
        files.push(("tokenizer_config.json", pretty(&tokenizer_config(config, tokenizer))));
    }
    let generation = end_of_text.map_or_else(|| json!({}), |id| json!({"bos_token_id": id, "eos_token_id": id}));
    files.push(("generation_config.json", pretty(&generation)));
    files.push(("config.json", pretty(&written(config, end_of_text))));
    files
}

fn written(config: &ModelConfig, end_of_text: Option<u32>) -> Written<'_> {
    Written {
        architectures: ["LlamaForCausalLM"],
        model_type: "llama",
        shape: config,
        rope_parameters: RopeParameters { rope_theta: config.rope_theta, rope_type: "default" },
        rope_scaling: None,
        hidden_act: "silu",
        attention_bias: false,
        mlp_bias: false,
        attention_dropout: 0.0,
        initializer_range: 0.02,
        use_cache: true,
        dtype: "float32",
        torch_dtype: "float32",
        bos_token_id: end_of_text,
        eos_token_id: end_of_text,
        pad_token_id: None,
    }
}

fn tokenizer_config(config: &ModelConfig, tokenizer: &Tokenizer) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.end_of_text_name(),
        "eos_token": tokenizer.end_of_text_name(),
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
    })
}

fn pretty(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("plain structs of numbers and strings are JSON");
    bytes.push(b'\n');
    bytes
}

/// What `config.json` says, in either style. Absent fields have the defaults of `LlamaConfig`.
#[derive(Deserialize)]
struct Read {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f32>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f32>,
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<Value>,
    quantization_config: Option<Value>,
}

/// Reads the shape from the `config.json` at `path`.
pub(super) fn load(path: &Path) -> Result<ModelConfig, HfError> {
    let bytes = fs::read(path).map_err(|error| HfError::unreadable(path, error))?;
    // First the kind: a config of another kind may lack any of the other fields.
    let json: Value = serde_json::from_slice(&bytes).map_err(|error| HfError::damaged(path, error))?;
    let unsupported = |what: String| HfError::Unsupported { path: path.to_path_buf(), what };
    if let Some(kind) = other_kind(&json) {
        return Err(unsupported(kind));
    }
    let read: Read = serde_json::from_value(json).map_err(|error| HfError::damaged(path, error))?;
    if let Some(what) = read.unsupported() {
        return Err(unsupported(what));
    }
    let config = read.shape();
    match config.problems() {
        problems if problems.is_empty() => Ok(config),
        problems => Err(HfError::BadShape { path: path.to_path_buf(), problems }),
    }
}

/// The kind of the model, unless it is a Llama.
fn other_kind(json: &Value) -> Option<String> {
    let architecture = json["architectures"][0].as_str();
    let kind = json["model_type"].as_str();
    match (architecture, kind) {
        (Some("LlamaForCausalLM"), None | Some("llama")) | (None, Some("llama")) => None,
        (Some(architecture), _) if architecture != "LlamaForCausalLM" => {
            Some(format!("the architecture {architecture}"))
        }
        (_, kind) => Some(format!("the model type '{}'", kind.unwrap_or("unknown"))),
    }
}

impl Read {
    /// The first setting that changes the arithmetic into one that Atoll does not have.
    fn unsupported(&self) -> Option<String> {
        let rope = |value: &Option<Value>| value.as_ref().and_then(scaled_rope);
        let is_set = |value: &Option<Value>| value.as_ref().is_some_and(|value| !value.is_null());
        let act = self.hidden_act.as_deref().unwrap_or("silu");
        let checks = [
            (act != "silu", format!("hidden_act = {act}")),
            (self.attention_bias == Some(true), "attention_bias".to_string()),
            (self.mlp_bias == Some(true), "mlp_bias".to_string()),
            (is_set(&self.sliding_window), "sliding_window".to_string()),
            (is_set(&self.quantization_config), "quantization_config".to_string()),
            (self.partial_rotary_factor.is_some_and(|factor| factor != 1.0), "partial_rotary_factor".to_string()),
        ];
        let scaling = rope(&self.rope_parameters).or_else(|| rope(&self.rope_scaling));
        checks.into_iter().find_map(|(is_wrong, what)| is_wrong.then_some(what)).or(scaling)
    }

    fn shape(&self) -> ModelConfig {
        let theta_5 = self.rope_parameters.as_ref().and_then(|rope| rope["rope_theta"].as_f64());
        ModelConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1)),
            max_position_embeddings: self.max_position_embeddings.unwrap_or(2048),
            rope_theta: theta_5.map(|theta| theta as f32).or(self.rope_theta).unwrap_or(10_000.0),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
        }
    }
}

/// What a rope setting asks for beyond the default.
fn scaled_rope(rope: &Value) -> Option<String> {
    let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
    let is_partial = rope["partial_rotary_factor"].as_f64().is_some_and(|factor| factor != 1.0);
    match kind {
        "default" if is_partial => Some("partial_rotary_factor".to_string()),
        "default" => None,
        kind => Some(format!("rope scaling of type {kind}")),
    }
}
