//! A witness in another framework: transformers must read what Atoll exports.
//!
//! `PYTHON=python3 cargo test -p atoll-node --test export -- --ignored`, with torch, transformers and
//! safetensors installed for that Python.

use std::path::Path;
use std::process::Command;

use atoll_core::model::ModelConfig;
use atoll_node::data::{Sample, Tokenizer};
use atoll_node::hf;

#[test]
#[ignore = "needs a Python with torch and transformers, named by PYTHON"]
fn transformers_read_what_atoll_exports() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_string());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/check_export.py");
    let mut sample = Sample::default();
    sample.push(&"A site trains on its own text; the coordinator merges what all have learnt. ".repeat(20));
    let tokenizer = Tokenizer::train(&sample, 320).unwrap();
    for tie_word_embeddings in [true, false] {
        let preset = ModelConfig::preset("nano", tokenizer.vocab_size(), 64).unwrap();
        let config = ModelConfig { tie_word_embeddings, rope_theta: 50_000.0, ..preset };
        let folder = tempfile::tempdir().unwrap();
        hf::save(folder.path(), &config, &config.initial_weights(5), Some(tokenizer.json())).unwrap();
        let status = Command::new(&python).arg(&script).arg(folder.path()).status().unwrap();
        assert!(status.success(), "{} failed", script.display());
    }
}
