//! What is measured, in words that both sides understand: a [`Cell`] is one row of the table, a [`Spec`] is
//! what its process is told as its only argument, in JSON.

use std::fmt;

use anyhow::{Context, Result};
use atoll_core::model::ModelConfig;
use atoll_cpu::Precision;
use serde::{Deserialize, Serialize};

/// Tokens in the vocabulary.
pub(crate) const VOCABULARY: usize = 8192;
/// Tokens in a row, T.
pub(crate) const LENGTH: usize = 256;
/// Rows in a batch.
pub(crate) const ROWS: usize = 8;

/// In which numbers the matrix products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Number {
    Fp32,
    Bf16,
}

impl Number {
    pub(crate) const BOTH: [Self; 2] = [Self::Fp32, Self::Bf16];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
        }
    }

    /// The engine's word for it.
    pub(crate) fn precision(self) -> Precision {
        match self {
            Self::Fp32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
        }
    }
}

/// Who trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    Atoll,
    Eager,
    Compiled,
}

impl Contender {
    /// For readers.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Atoll => "Atoll",
            Self::Eager => "PyTorch eager",
            Self::Compiled => "PyTorch compiled",
        }
    }

    /// For the names of figures.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Atoll => "atoll",
            Self::Eager => "torch_eager",
            Self::Compiled => "torch_compiled",
        }
    }
}

/// One thing to measure: somebody training one shape in some numbers on some threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) preset: &'static str,
    pub(crate) threads: usize,
    pub(crate) number: Number,
    pub(crate) contender: Contender,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { preset, threads, number, contender } = self;
        write!(f, "{}, {preset}, {}, threads: {threads}", contender.title(), number.name())
    }
}

impl Cell {
    pub(crate) fn spec(&self) -> Result<Spec> {
        let spec = Spec::new(Work::Train, self.preset, self.number, self.threads)?;
        Ok(Spec { compiled: self.contender == Contender::Compiled, ..spec })
    }
}

/// What a process does for every step that it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Work {
    /// One batch, forward and backward, and the optimizer.
    Train,
    /// One token.
    Generate,
}

/// A process's task. `python/train.py` reads the same names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) work: Work,
    pub(crate) preset: String,
    pub(crate) precision: Number,
    pub(crate) threads: usize,
    pub(crate) rows: usize,
    pub(crate) length: usize,
    compiled: bool,
    vocab: usize,
    d: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    keys: usize,
    head_dim: usize,
}

impl Spec {
    pub(crate) fn new(work: Work, preset: &str, precision: Number, threads: usize) -> Result<Self> {
        let model = model(preset)?;
        Ok(Self {
            work,
            preset: preset.to_string(),
            precision,
            threads,
            rows: ROWS,
            length: LENGTH,
            compiled: false,
            vocab: model.vocab_size,
            d: model.hidden_size,
            inner: model.intermediate_size,
            layers: model.num_hidden_layers,
            heads: model.num_attention_heads,
            keys: model.num_key_value_heads,
            head_dim: model.head_dim,
        })
    }
}

pub(crate) fn model(preset: &str) -> Result<ModelConfig> {
    ModelConfig::preset(preset, VOCABULARY, LENGTH).with_context(|| format!("there is no preset {preset}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_survives_the_way_to_its_process() {
        let cell = Cell { preset: "mini", threads: 2, number: Number::Bf16, contender: Contender::Compiled };
        let spec = cell.spec().unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert!(text.contains(r#""precision":"bf16""#) && text.contains(r#""compiled":true"#), "{text}");
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);
    }
}
