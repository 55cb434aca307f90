//! On the first device that `wgpu` reaches, which may be a driver in software (`apt install mesa-vulkan-drivers`): the
//! laws of all engines, PyTorch's numbers, and the CPU engine's losses. Without any device the tests say so loudly and
//! check nothing.
#![allow(clippy::unwrap_used)]

#[path = "../../../crates/atoll-cpu/tests/common/mod.rs"]
mod common;

use std::io::Write;

use atoll_burn::{BurnEngine, Device, Options, Precision};
use atoll_core::engine::conformance::check;
use atoll_core::engine::{Batch, Engine, EngineError, Feed, NoFeed, weights};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::ModelConfig;
use atoll_core::rng::Rng;
use atoll_core::training::{AdamW, Muon};

use common::golden::{Golden, farthest, gradients_are_golden, training_is_golden};
use common::{ListFeed, RandomFeed, lively_weights, random_batch, share_apart, tiny};

/// A device, or a loud excuse.
fn device() -> Option<Device> {
    match Device::open("wgpu") {
        Ok(device) => Some(device),
        Err(error) => {
            skip(&format!("nothing was checked: {error}\nhint: apt install mesa-vulkan-drivers"));
            None
        }
    }
}

/// Written past what the test harness keeps of a test that passes.
fn skip(why: &str) {
    std::io::stderr().write_all(format!("\nSKIPPED, {why}\n\n").as_bytes()).unwrap();
}

fn options(model: &ModelConfig) -> Options {
    Options {
        model: model.clone(),
        optimizer: AdamW::default(),
        muon: None,
        precision: Precision::F32,
        rows: 2,
        accumulate: 1,
    }
}

/// An engine with these per-tensor weights in three fragments.
fn engine(device: &Device, options: Options, weights: &[Vec<f32>], feed: Box<dyn Feed>) -> BurnEngine {
    let manifest = Manifest::balanced(options.model.tensors(), 3);
    let fragments = manifest.gather(weights);
    BurnEngine::new(options, device.clone(), manifest, &fragments, feed).unwrap()
}

#[test]
fn conforms_with_either_optimizer() {
    let Some(device) = device() else { return };
    let model = tiny();
    let first = model.initial_weights(3);
    for muon in [None, Some(Muon::default())] {
        let options = Options { muon, ..options(&model) };
        let mut make = || -> Box<dyn Engine> {
            let feed = RandomFeed::new(17, model.vocab_size);
            Box::new(engine(&device, options.clone(), &first, Box::new(feed)))
        };
        let batch = random_batch(5, 13, model.vocab_size, &mut Rng::new(4));
        assert_eq!(check(&mut make, &batch), Ok(()));
    }
}

#[test]
fn a_llama_and_its_optimizers_are_those_of_pytorch() {
    let Some(device) = device() else { return };
    for name in ["tied", "untied", "muon"] {
        let golden = Golden::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../../crates/atoll-cpu/tests/golden"), name);
        let gradients = golden_engine(&device, &golden, Box::new(NoFeed)).gradients(&golden.batches()[0]).unwrap();
        gradients_are_golden(&golden, gradients.loss, &gradients.tensors);
        let feed = Box::new(ListFeed(golden.batches().into_iter()));
        training_is_golden(&golden, &mut golden_engine(&device, &golden, feed));
    }
}

fn golden_engine(device: &Device, golden: &Golden, feed: Box<dyn Feed>) -> BurnEngine {
    let setting = |key: &str| golden.numbers[key].clone();
    let options = Options {
        optimizer: serde_json::from_value(setting("optimizer")).unwrap(),
        muon: serde_json::from_value(setting("muon")).unwrap(),
        rows: golden.number("rows"),
        ..options(&golden.model)
    };
    engine(device, options, &golden.tensors("weight"), feed)
}

/// Losses of one step after the other from the same weights and tokens, on this device and on the CPU.
fn both_losses(device: &Device, steps: usize, adamw: AdamW) -> Vec<(f64, f64)> {
    let model = ModelConfig { hidden_size: 64, intermediate_size: 160, ..tiny() };
    let first = model.initial_weights(1);
    let feed = || Box::new(RandomFeed::new(48, model.vocab_size));
    let mut ours = engine(device, Options { optimizer: adamw.clone(), ..options(&model) }, &first, feed());
    let theirs = atoll_cpu::Options { optimizer: adamw, ..common::options(&model) };
    let mut theirs = common::engine(theirs, &first, feed());
    (0..steps).map(|_| (ours.train(1).unwrap().loss, theirs.train(1).unwrap().loss)).collect()
}

#[test]
fn losses_are_those_of_the_cpu_engine() {
    let Some(device) = device() else { return };
    let adamw = AdamW { embedding_rate: 2.0, embedding_floor: 1.0, ..AdamW::default() };
    let apart = |(ours, theirs): &(f64, f64)| (ours - theirs).abs();
    let losses = both_losses(&device, 100, AdamW { warmup_steps: 100, ..adamw });
    let first = losses[..5].iter().map(apart).fold(0.0, f64::max);
    let all = losses.iter().map(apart).fold(0.0, f64::max);
    eprintln!("losses are at most {first:.1e} apart in 5 steps, {all:.1e} in {}", losses.len());
    assert!(first < 1e-6, "{:?}", &losses[..5]);
    assert!(all < 1e-3, "{all}: {losses:?}");
}

/// Windows longer than a block of queries, in two micro-batches, with documents: the gradient of the CPU engine.
#[test]
fn blocks_of_queries_documents_and_micro_batches_change_nothing() {
    let Some(device) = device() else { return };
    let model = ModelConfig { max_position_embeddings: 300, ..tiny() };
    let first = lively_weights(&model, 3);
    let mut batch = random_batch(3, 300, model.vocab_size, &mut Rng::new(5));
    for starts in [vec![], (0..900).map(|i| if i % 300 < 140 { 0 } else { 140 }).collect::<Vec<u32>>()] {
        batch.starts = starts;
        let ours = engine(&device, options(&model), &first, Box::new(NoFeed)).gradients(&batch).unwrap();
        let theirs = common::engine(common::options(&model), &first, Box::new(NoFeed)).gradients(&batch).unwrap();
        assert!((ours.loss - theirs.loss).abs() < 2e-6, "{} is not {}", ours.loss, theirs.loss);
        for ((ours, theirs), tensor) in ours.tensors.iter().zip(&theirs.tensors).zip(model.tensors()) {
            let apart = farthest(ours, theirs);
            assert!(apart < 5e-6, "gradients of {} are {apart} apart", tensor.name);
        }
    }
}

/// On a device that multiplies bf16, rounding turns a gradient a little.
#[test]
fn bf16_gradients_are_those_of_f32_but_for_rounding() {
    let Some(device) = device() else { return };
    let model = tiny();
    let bf16 = Options { precision: Precision::Bf16, ..options(&model) };
    let first = lively_weights(&model, 4);
    if !device.multiplies(Precision::Bf16) {
        let manifest = Manifest::balanced(model.tensors(), 3);
        let refused = BurnEngine::new(bf16, device, manifest.clone(), &manifest.gather(&first), Box::new(NoFeed));
        let error = refused.err().unwrap().to_string();
        assert_eq!(error, "wgpu:0 cannot multiply bf16\nhint: --precision f32");
        return skip("only the refusal was checked: this device does not multiply bf16");
    }
    let batch = random_batch(3, 151, model.vocab_size, &mut Rng::new(6));
    let of = |options| engine(&device, options, &first, Box::new(NoFeed)).gradients(&batch).unwrap();
    let (exact, rounded) = (of(options(&model)), of(bf16));
    for ((exact, rounded), tensor) in exact.tensors.iter().zip(&rounded.tensors).zip(model.tensors()) {
        let share = share_apart(exact, rounded);
        assert!(share < 0.1, "the gradient of {} is {share} apart", tensor.name);
    }
}

#[test]
fn a_starved_step_changes_nothing() {
    let Some(device) = device() else { return };
    let model = tiny();
    let options = Options { accumulate: 2, ..options(&model) };
    let start = |rows_left| {
        let feed = RandomFeed { rows_left, ..RandomFeed::new(9, model.vocab_size) };
        engine(&device, options.clone(), &model.initial_weights(1), Box::new(feed))
    };
    let (mut plenty, mut scarce) = (start(100), start(11));
    plenty.train(2).unwrap();
    assert_eq!(scarce.train(5), Err(EngineError::Starved { wanted: 4 }));
    assert_eq!(scarce.steps(), 2);
    assert!(weights(&mut scarce) == weights(&mut plenty));
}

#[test]
fn nothing_that_is_not_finite_reaches_the_weights() {
    let Some(device) = device() else { return };
    let model = tiny();
    let feed = RandomFeed::new(9, model.vocab_size);
    let mut engine = engine(&device, options(&model), &model.initial_weights(1), Box::new(feed));
    for (fragment, poison) in [(FragmentId(1), f32::NAN), (FragmentId(0), f32::INFINITY)] {
        let mut good = vec![0.0; engine.manifest().fragment_len(fragment).unwrap()];
        engine.read(fragment, &mut good).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] = poison;
        engine.write(fragment, &bad).unwrap();
        let before = weights(&mut engine).unwrap().concat();
        match engine.train(1).unwrap_err() {
            EngineError::NonFinite { step, .. } => assert_eq!(step, engine.steps() + 1),
            other => panic!("{other:?}"),
        }
        let after = weights(&mut engine).unwrap().concat();
        assert!(before.iter().zip(&after).all(|(a, b)| a.to_bits() == b.to_bits()));
        engine.write(fragment, &good).unwrap();
        engine.train(1).unwrap();
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(device) = device() else { return };
    let model = tiny();
    let mut engine = engine(&device, options(&model), &model.initial_weights(1), Box::new(NoFeed));
    let wrong = Batch { rows: 1, length: 2, tokens: vec![1, 2, 61], ..Batch::default() };
    let error = engine.evaluate(&wrong).unwrap_err().to_string();
    assert_eq!(error, "token 61 is outside of the vocabulary of 61");
    let other = ModelConfig { vocab_size: 62, ..tiny() };
    let manifest = Manifest::balanced(other.tensors(), 3);
    let fragments = manifest.gather(&other.initial_weights(1));
    let refused = BurnEngine::new(options(&model), device, manifest, &fragments, Box::new(NoFeed));
    assert!(refused.err().unwrap().to_string().starts_with("the manifest has model.embed_tokens.weight"));
}
