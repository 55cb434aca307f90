//! The witness: logits, loss, gradients and a short training as Hugging Face's Llama and PyTorch's AdamW and
//! Muon compute them (`golden/make_golden.py` writes the numbers).
#![allow(clippy::unwrap_used)]

mod common;

use atoll_core::engine::Engine;
use atoll_core::engine::weights;
use atoll_core::manifest::Manifest;
use atoll_core::training::{AdamW, Muon};
use atoll_cpu::{CpuEngine, Generator, NoFeed, Options, Precision};

use common::golden::Golden;
use common::{ListFeed, engine};

fn golden_engine(golden: &Golden, feed: Box<dyn atoll_core::engine::Feed>) -> CpuEngine {
    let optimizer: AdamW = serde_json::from_value(golden.numbers["optimizer"].clone()).unwrap();
    let muon: Option<Muon> = serde_json::from_value(golden.numbers["muon"].clone()).unwrap();
    let options = Options {
        model: golden.model.clone(),
        optimizer,
        muon,
        precision: Precision::F32,
        rows: golden.number("rows"),
        accumulate: 1,
        threads: 2,
    };
    engine(options, &golden.tensors("weight"), feed)
}

fn farthest(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn check(name: &str) {
    let golden = Golden::load(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"), name);
    forward_and_backward(&golden);
    training(&golden);
}

fn forward_and_backward(golden: &Golden) {
    let batch = golden.batches()[0].clone();
    let mut generator = Generator::new(&golden.model, &golden.tensors("weight"), Precision::F32, 1).unwrap();
    let inputs = batch.tokens.chunks(batch.length + 1).map(|window| &window[..batch.length]);
    let logits: Vec<f32> = inputs.flat_map(|tokens| generator.logits(tokens).unwrap()).collect();
    let apart = farthest(&logits, &golden.floats("logits"));
    assert!(apart < 1e-5, "logits are {apart} apart");

    let gradients = golden_engine(golden, Box::new(NoFeed)).gradients(&batch).unwrap();
    let loss = golden.numbers["loss"].as_f64().unwrap();
    assert!((gradients.loss - loss).abs() < 1e-6, "{} is not {loss}", gradients.loss);
    for ((ours, theirs), tensor) in gradients.tensors.iter().zip(golden.tensors("gradient")).zip(golden.model.tensors())
    {
        let apart = farthest(ours, &theirs);
        assert!(apart < 2e-6, "gradients of {} are {apart} apart", tensor.name);
    }
}

fn training(golden: &Golden) {
    let mut engine = golden_engine(golden, Box::new(ListFeed(golden.batches().into_iter())));
    for (step, theirs) in golden.list("losses").into_iter().enumerate() {
        let ours = engine.train(1).unwrap().loss;
        assert!((ours - theirs).abs() < 1e-5, "step {step}: loss {ours} is not {theirs}");
    }
    let manifest: Manifest = engine.manifest().clone();
    let tensors = manifest.scatter(&weights(&mut engine).unwrap());
    for (tensor, weights) in manifest.tensors().iter().zip(&tensors) {
        let norm = weights.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
        let projection: f64 = weights.iter().enumerate().map(|(i, &w)| f64::from(w) * (i as f64).cos()).sum();
        let theirs = |kind: &str| golden.numbers[kind][&tensor.name].as_f64().unwrap();
        assert!((norm - theirs("final_norms")).abs() < 1e-5, "norm of {}: {norm}", tensor.name);
        assert!((projection - theirs("final_projections")).abs() < 2e-5, "projection of {}: {projection}", tensor.name);
    }
}

#[test]
fn a_tied_llama_is_the_one_of_pytorch() {
    check("tied");
}

#[test]
fn muon_is_the_one_of_pytorch() {
    check("muon");
}

#[test]
fn an_untied_llama_is_the_one_of_pytorch() {
    check("untied");
}
