//! The numbers that Hugging Face's Llama and PyTorch wrote (`golden/make_golden.py`).
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use atoll_core::engine::{Batch, Engine, weights};
use atoll_core::model::ModelConfig;
use safetensors::SafeTensors;
use serde_json::Value;

/// A model, its weights and batches, and what becomes of them.
pub struct Golden {
    pub numbers: Value,
    bytes: Vec<u8>,
    pub model: ModelConfig,
}

impl Golden {
    /// From the folder that `make_golden.py` wrote.
    pub fn load(folder: &str, name: &str) -> Self {
        let file = |end: &str| format!("{folder}/{name}.{end}");
        let numbers: Value = serde_json::from_slice(&std::fs::read(file("json")).unwrap()).unwrap();
        let model = serde_json::from_value(numbers["model"].clone()).unwrap();
        Self { numbers, bytes: std::fs::read(file("safetensors")).unwrap(), model }
    }

    fn words(&self, name: &str) -> Vec<[u8; 4]> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        tensors.tensor(name).unwrap().data().as_chunks().0.to_vec()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name).into_iter().map(f32::from_le_bytes).collect()
    }

    /// Weights or gradients, one vector per tensor.
    pub fn tensors(&self, what: &str) -> Vec<Vec<f32>> {
        self.model.tensors().iter().map(|tensor| self.floats(&format!("{what}.{}", tensor.name))).collect()
    }

    pub fn number(&self, key: &str) -> usize {
        self.numbers[key].as_u64().unwrap() as usize
    }

    pub fn list(&self, key: &str) -> Vec<f64> {
        self.numbers[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    /// The batch of each step; step i of n is at progress i/n.
    pub fn batches(&self) -> Vec<Batch> {
        let tokens: Vec<u32> = self.words("tokens").into_iter().map(u32::from_le_bytes).collect();
        let (rows, length) = (self.number("rows"), self.number("length"));
        let steps = tokens.chunks(rows * (length + 1));
        let count = steps.len() as f32;
        let batch = |(step, tokens): (usize, &[u32])| Batch {
            rows,
            length,
            tokens: tokens.to_vec(),
            progress: step as f32 / count,
            ..Batch::default()
        };
        steps.enumerate().map(batch).collect()
    }
}

/// How far apart two vectors are, element by element.
pub fn farthest(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Loss and gradients of the first batch are PyTorch's.
pub fn gradients_are_golden(golden: &Golden, loss: f64, gradients: &[Vec<f32>]) {
    let wanted = golden.numbers["loss"].as_f64().unwrap();
    assert!((loss - wanted).abs() < 1e-6, "{loss} is not {wanted}");
    for ((ours, theirs), tensor) in gradients.iter().zip(golden.tensors("gradient")).zip(golden.model.tensors()) {
        let apart = farthest(ours, &theirs);
        assert!(apart < 2e-6, "gradients of {} are {apart} apart", tensor.name);
    }
}

/// An engine that begins from the golden weights and gets the golden batches trains as PyTorch does.
pub fn training_is_golden(golden: &Golden, engine: &mut dyn Engine) {
    for (step, theirs) in golden.list("losses").into_iter().enumerate() {
        let ours = engine.train(1).unwrap().loss;
        assert!((ours - theirs).abs() < 1e-5, "step {step}: loss {ours} is not {theirs}");
    }
    let manifest = engine.manifest().clone();
    let tensors = manifest.scatter(&weights(engine).unwrap());
    for (tensor, weights) in manifest.tensors().iter().zip(&tensors) {
        let norm = weights.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
        let projection: f64 = weights.iter().enumerate().map(|(i, &w)| f64::from(w) * (i as f64).cos()).sum();
        let theirs = |kind: &str| golden.numbers[kind][&tensor.name].as_f64().unwrap();
        assert!((norm - theirs("final_norms")).abs() < 1e-5, "norm of {}: {norm}", tensor.name);
        assert!((projection - theirs("final_projections")).abs() < 2e-5, "projection of {}: {projection}", tensor.name);
    }
}
