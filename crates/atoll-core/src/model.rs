//! The shape of the model: a Llama, described with Hugging Face's names so that `config.json` and
//! this struct say the same thing. From the shape follow the tensors (names, shapes, order), and
//! from the tensors follows everything else that moves through Atoll.

use serde::{Deserialize, Serialize};

use crate::rng::Rng;

/// A Llama's dimensions. All engines of a run build exactly this model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Rows of the embedding, V.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Inner width of SwiGLU.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads (grouped-query attention).
    pub num_key_value_heads: usize,
    /// Width of one head; even, because rotary embedding turns pairs.
    pub head_dim: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Epsilon of RMSNorm.
    pub rms_norm_eps: f32,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
}

/// What a tensor is, as far as merging and weight decay care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorKind {
    /// One row per token: rows are seen by some sites and not by others, so merge by plain average.
    Embedding,
    /// A linear map, stored `[out, in]`.
    Matrix,
    /// A gain vector.
    Vector,
}

/// One named tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Hugging Face's name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: TensorKind,
}

impl Tensor {
    /// A tensor of that name, shape and kind.
    pub fn new(name: impl Into<String>, shape: &[usize], kind: TensorKind) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), kind }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// More layers than any model has.
const LAYERS_MAX: usize = 1 << 12;

/// A preset: its name and what it is for.
pub const PRESETS: [(&str, &str); 6] = [
    ("nano", "1 M parameters: tests and first steps"),
    ("micro", "4 M parameters: the demo, minutes on a laptop"),
    ("mini", "12.6 M parameters: an hour on a workstation's CPU"),
    ("small", "88 M parameters: one GPU"),
    ("medium", "355 M parameters"),
    ("large", "1.1 B parameters"),
];

impl ModelConfig {
    /// The preset of that name with a vocabulary of `vocab_size` and contexts of `context` tokens, or `None`.
    pub fn preset(name: &str, vocab_size: usize, context: usize) -> Option<Self> {
        //                    D   inner layers  heads  kv  dim
        let dimensions = match name {
            "nano" => (128, 384, 4, 4, 2, 32),
            "micro" => (256, 704, 5, 4, 2, 64),
            "mini" => (384, 1024, 6, 6, 2, 64),
            "small" => (768, 2048, 12, 12, 4, 64),
            "medium" => (1024, 2816, 24, 16, 4, 64),
            "large" => (2048, 5632, 22, 32, 4, 64),
            _ => return None,
        };
        let (hidden, inner, layers, heads, kv_heads, head_dim) = dimensions;
        Some(Self {
            vocab_size,
            hidden_size: hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: context,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
        })
    }

    /// Operations that training takes per token, in contexts of `length` tokens: 6 per parameter (the embedding counts
    /// once, as the output's matrix) and, for the scores and sums of attention, of which a causal mask leaves half,
    /// 12·L·(H·hd)·T/2.
    pub fn flop_per_token(&self, length: usize) -> f64 {
        let width = self.num_attention_heads * self.head_dim;
        6.0 * self.parameters() as f64 + (12 * self.num_hidden_layers * width) as f64 * length as f64 / 2.0
    }

    /// Every reason why no engine could build this model; empty when it is sound.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, value) in positive {
            if value == 0 || value > 1 << 24 {
                problems.push(format!("model.{name} = {value} must be between 1 and {}", 1 << 24));
            }
        }
        if self.num_hidden_layers > LAYERS_MAX {
            problems.push(format!("model.num_hidden_layers = {} must be at most {LAYERS_MAX}", self.num_hidden_layers));
        }
        if let Some((name, product)) = self.widest_product().filter(|(_, product)| *product > u64::from(u32::MAX)) {
            problems.push(format!("model: {name} has {product} weights, {} is the most", u32::MAX));
        }
        if self.num_key_value_heads > 0 && !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            problems.push(format!(
                "model.num_attention_heads = {} must be a multiple of num_key_value_heads = {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            problems.push(format!("model.head_dim = {} must be even: rotary embedding turns pairs", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            problems.push(format!("model.rope_theta = {} must be a positive number", self.rope_theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            problems.push(format!("model.rms_norm_eps = {} must be a positive number", self.rms_norm_eps));
        }
        problems
    }

    /// The largest kind of tensor and its weights, of which a product of three sizes may be too large to count.
    fn widest_product(&self) -> Option<(&'static str, u64)> {
        let product = |sizes: &[usize]| sizes.iter().fold(1u64, |product, &size| product.saturating_mul(size as u64));
        let kinds = [
            ("embed_tokens", product(&[self.vocab_size, self.hidden_size])),
            ("q_proj", product(&[self.num_attention_heads, self.head_dim, self.hidden_size])),
            ("k_proj", product(&[self.num_key_value_heads, self.head_dim, self.hidden_size])),
            ("up_proj", product(&[self.intermediate_size, self.hidden_size])),
        ];
        kinds.into_iter().max_by_key(|(_, product)| *product)
    }

    /// The model's tensors in the order in which Hugging Face's Llama declares them.
    pub fn tensors(&self) -> Vec<Tensor> {
        use TensorKind::{Embedding, Matrix, Vector};
        let (d, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let mut tensors = vec![Tensor::new("model.embed_tokens.weight", &[self.vocab_size, d], Embedding)];
        for layer in 0..self.num_hidden_layers {
            let parts: [(&str, &[usize], TensorKind); 9] = [
                ("self_attn.q_proj", &[q, d], Matrix),
                ("self_attn.k_proj", &[kv, d], Matrix),
                ("self_attn.v_proj", &[kv, d], Matrix),
                ("self_attn.o_proj", &[d, q], Matrix),
                ("mlp.gate_proj", &[inner, d], Matrix),
                ("mlp.up_proj", &[inner, d], Matrix),
                ("mlp.down_proj", &[d, inner], Matrix),
                ("input_layernorm", &[d], Vector),
                ("post_attention_layernorm", &[d], Vector),
            ];
            tensors
                .extend(parts.map(|(part, shape, kind)| {
                    Tensor::new(format!("model.layers.{layer}.{part}.weight"), shape, kind)
                }));
        }
        tensors.push(Tensor::new("model.norm.weight", &[d], Vector));
        if !self.tie_word_embeddings {
            tensors.push(Tensor::new("lm_head.weight", &[self.vocab_size, d], Embedding));
        }
        tensors
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(Tensor::len).sum()
    }

    /// First weights of a run: normal with deviation 0.02, the projections that write into the residual
    /// stream scaled down by √(2·layers) (GPT-2, section 2.3), gains at one. One vector per tensor.
    pub fn initial_weights(&self, seed: u64) -> Vec<Vec<f32>> {
        let mut rng = Rng::new(seed);
        let residual = 0.02 / ((2 * self.num_hidden_layers) as f64).sqrt();
        let weights = |tensor: &Tensor| {
            let deviation =
                if tensor.name.contains("o_proj") || tensor.name.contains("down_proj") { residual } else { 0.02 };
            match tensor.kind {
                TensorKind::Vector => vec![1.0; tensor.len()],
                _ => (0..tensor.len()).map(|_| (rng.normal() * deviation) as f32).collect(),
            }
        };
        self.tensors().iter().map(weights).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_sound_and_named_sizes_hold() {
        for (name, _) in PRESETS {
            let config = ModelConfig::preset(name, 4096, 256).unwrap();
            assert_eq!(config.problems(), Vec::<String>::new(), "{name}");
        }
        let mini = ModelConfig::preset("mini", 8192, 256).unwrap();
        assert_eq!(mini.parameters(), 12_587_904);
        assert_eq!(mini.flop_per_token(256), 6.0 * 12_587_904.0 + 12.0 * 6.0 * 384.0 * 128.0);
        assert!(ModelConfig::preset("huge", 1, 1).is_none());
    }

    #[test]
    fn every_problem_is_listed_at_once() {
        let mut config = ModelConfig::preset("nano", 256, 64).unwrap();
        config.num_key_value_heads = 3;
        config.head_dim = 5;
        config.rope_theta = f32::NAN;
        assert_eq!(config.problems().len(), 3);
    }

    #[test]
    fn sizes_that_cannot_be_counted_are_problems() {
        let large = ModelConfig { num_attention_heads: 1 << 24, head_dim: 1 << 24, hidden_size: 1 << 24, ..nano() };
        assert!(large.problems().iter().any(|problem| problem.contains("q_proj has 18446744073709551615 weights")));
        let deep = ModelConfig { num_hidden_layers: 1 << 20, ..nano() };
        assert_eq!(deep.problems(), ["model.num_hidden_layers = 1048576 must be at most 4096"]);
    }

    fn nano() -> ModelConfig {
        ModelConfig::preset("nano", 256, 64).unwrap()
    }
}
