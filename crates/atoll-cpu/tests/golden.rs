//! The witness: logits, loss, gradients and a short training as Hugging Face's Llama and PyTorch's AdamW and
//! Muon compute them (`golden/make_golden.py` writes the numbers).
#![allow(clippy::unwrap_used)]

mod common;

use atoll_core::engine::NoFeed;
use atoll_core::training::{AdamW, Muon};
use atoll_cpu::{CpuEngine, Generator, Options, Precision};

use common::golden::{Golden, farthest, gradients_are_golden, training_is_golden};
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

fn check(name: &str) {
    let golden = Golden::load(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"), name);
    forward_and_backward(&golden);
    let feed = Box::new(ListFeed(golden.batches().into_iter()));
    training_is_golden(&golden, &mut golden_engine(&golden, feed));
}

fn forward_and_backward(golden: &Golden) {
    let batch = golden.batches()[0].clone();
    let mut generator = Generator::new(&golden.model, &golden.tensors("weight"), Precision::F32, 1).unwrap();
    let inputs = batch.tokens.chunks(batch.length + 1).map(|window| &window[..batch.length]);
    let logits: Vec<f32> = inputs.flat_map(|tokens| generator.logits(tokens).unwrap()).collect();
    let apart = farthest(&logits, &golden.floats("logits"));
    assert!(apart < 1e-5, "logits are {apart} apart");

    let gradients = golden_engine(golden, Box::new(NoFeed)).gradients(&batch).unwrap();
    gradients_are_golden(golden, gradients.loss, &gradients.tensors);
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
