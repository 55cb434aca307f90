//! What an engine promises: the conformance suite, bits that do not depend on threads, gradients that
//! finite differences confirm, learning, and steps that happen wholly or not at all.
#![allow(clippy::unwrap_used)]

mod common;

use atoll_core::engine::conformance::check;
use atoll_core::engine::weights;
use atoll_core::engine::{Batch, Engine, EngineError, Feed, NoFeed};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::{ModelConfig, TensorKind};
use atoll_core::rng::Rng;
use atoll_core::training::{AdamW, Muon};
use atoll_cpu::{CpuEngine, Options, Precision};
use itertools::izip;

use common::{ListFeed, RandomFeed, engine, lively_weights, options, random_batch, share_apart, tiny};

/// All laws, for the engine with these options.
fn conforms(options: &Options) {
    let model = &options.model;
    let weights = model.initial_weights(3);
    let mut make = || -> Box<dyn Engine> {
        Box::new(engine(options.clone(), &weights, Box::new(RandomFeed::new(17, model.vocab_size))))
    };
    let batch = random_batch(5, 13, model.vocab_size, &mut Rng::new(4));
    assert_eq!(check(&mut make, &batch), Ok(()));
}

#[test]
fn conforms_in_either_precision_and_with_either_optimizer() {
    for precision in [Precision::F32, Precision::Bf16] {
        for muon in [None, Some(Muon::default())] {
            conforms(&Options { precision, muon, ..options(&tiny()) });
        }
    }
}

/// Loss and all weights, as bits, after some steps on shapes that fill several tiles and blocks.
fn bits(threads: usize, precision: Precision) -> (u64, Vec<u32>) {
    // More tokens than gradients of logits are kept for at once.
    let model = ModelConfig { tie_word_embeddings: false, vocab_size: 9000, ..tiny() };
    let muon = Some(Muon::default());
    let options = Options { threads, precision, muon, rows: 7, accumulate: 2, ..options(&model) };
    let feed = RandomFeed::new(151, model.vocab_size);
    let mut engine = engine(options, &lively_weights(&model, 5), Box::new(feed));
    let loss = engine.train(3).unwrap().loss;
    (loss.to_bits(), weights(&mut engine).unwrap().concat().iter().map(|w| w.to_bits()).collect())
}

#[test]
fn the_bits_do_not_depend_on_threads() {
    for precision in [Precision::F32, Precision::Bf16] {
        let one = bits(1, precision);
        for threads in [2, 3, 5] {
            assert!(bits(threads, precision) == one, "{precision:?}, {threads} threads");
        }
    }
}

/// For each tensor, the slope of the loss along a random direction and along single weights must be
/// what the gradient says.
fn gradients_are_slopes(model: &ModelConfig) {
    let weights = lively_weights(model, 1);
    let mut rng = Rng::new(2);
    let batch = random_batch(3, 11, model.vocab_size, &mut rng);
    let mut engine = engine(options(model), &weights, Box::new(NoFeed));
    let gradients = engine.gradients(&batch).unwrap();
    assert!((gradients.loss - loss_at(&mut engine, &weights, &batch)).abs() < 1e-6);
    for (index, tensor) in model.tensors().iter().enumerate() {
        let gradient = &gradients.tensors[index];
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let mut directions = vec![(0..tensor.len()).map(|_| rng.normal() as f32).collect::<Vec<f32>>()];
        for _ in 0..3 {
            let mut single = vec![0.0; tensor.len()];
            single[rng.below(tensor.len() as u64) as usize] = 1.0;
            directions.push(single);
        }
        // Central differences; the step is short along long directions.
        for direction in directions {
            let length = direction.iter().map(|x| x * x).sum::<f32>().sqrt();
            let step = 2e-2 / length;
            let mut moved = |sign: f32| {
                let mut weights = weights.clone();
                weights[index].iter_mut().zip(&direction).for_each(|(w, d)| *w += sign * step * d);
                loss_at(&mut engine, &weights, &batch)
            };
            let slope = (moved(1.0) - moved(-1.0)) / f64::from(2.0 * step * length);
            let product: f64 = gradient.iter().zip(&direction).map(|(&g, &d)| f64::from(g) * f64::from(d)).sum();
            let expected = product / f64::from(length);
            let error = (slope - expected).abs();
            assert!(error < 1e-4 + 5e-3 * norm.max(expected.abs()), "{}: {slope} is not {expected}", tensor.name);
        }
    }
}

fn loss_at(engine: &mut CpuEngine, weights: &[Vec<f32>], batch: &Batch) -> f64 {
    let fragments = engine.manifest().gather(weights);
    for (index, fragment) in fragments.iter().enumerate() {
        engine.write(FragmentId(index as u16), fragment).unwrap();
    }
    let evaluation = engine.evaluate(batch).unwrap();
    evaluation.nats / evaluation.tokens as f64
}

#[test]
fn gradients_are_slopes_with_tied_embeddings() {
    gradients_are_slopes(&tiny());
}

#[test]
fn gradients_are_slopes_with_a_head_of_its_own() {
    let full_heads = ModelConfig { num_key_value_heads: 6, tie_word_embeddings: false, ..tiny() };
    gradients_are_slopes(&full_heads);
    gradients_are_slopes(&ModelConfig { num_key_value_heads: 1, tie_word_embeddings: false, ..tiny() });
}

/// Micro-batches change the order of additions, nothing else; nor does a batch of more than one chunk of logits.
#[test]
fn accumulation_is_one_larger_batch() {
    let model = ModelConfig { vocab_size: 9000, ..tiny() };
    let weights_after = |rows, accumulate| {
        let options = Options { rows, accumulate, ..options(&model) };
        let feed = RandomFeed::new(151, model.vocab_size);
        let mut engine = engine(options, &lively_weights(&model, 6), Box::new(feed));
        let loss = engine.train(2).unwrap().loss;
        (loss, weights(&mut engine).unwrap().concat())
    };
    let (whole, parts) = (weights_after(9, 1), weights_after(3, 3));
    assert!((whole.0 - parts.0).abs() < 1e-6, "{} {}", whole.0, parts.0);
    let apart = whole.1.iter().zip(&parts.1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-6, "{apart}");
}

/// Rows of 0 1 2 … 6 0 1 2 …, each from another start.
struct Pattern;
impl Feed for Pattern {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let tokens = (0..rows).flat_map(|row| (row..row + 25).map(|i| (i % 7) as u32)).collect();
        *batch = Batch { rows, length: 24, tokens, ..Batch::default() };
        Ok(())
    }
}
/// Two documents in one row, the second from position 7 on, are two rows.
#[test]
fn documents_of_a_row_do_not_see_each_other() {
    let model = tiny();
    let mut rng = Rng::new(5);
    let tokens: Vec<u32> = (0..101).map(|_| rng.below(61) as u32).collect();
    let starts = (0..100).map(|position| if position < 7 { 0 } else { 7 }).collect();
    let row = |tokens: &[u32]| Batch { rows: 1, length: tokens.len() - 1, tokens: tokens.to_vec(), ..Batch::default() };
    let packed = Batch { starts, ..row(&tokens) };
    let mut engine = engine(options(&model), &lively_weights(&model, 3), Box::new(NoFeed));
    let (whole, apart) = (row(&tokens), [row(&tokens[..8]), row(&tokens[7..])]);
    let nats: Vec<f64> = apart.iter().map(|batch| engine.evaluate(batch).unwrap().nats).collect();
    let together = engine.evaluate(&packed).unwrap().nats;
    assert!((together - nats[0] - nats[1]).abs() < 1e-3, "{together} is not {nats:?}");
    assert!((together - engine.evaluate(&whole).unwrap().nats).abs() > 0.1, "the documents made no difference");

    let of = |batch: &Batch, engine: &mut CpuEngine| engine.gradients(batch).unwrap().tensors.concat();
    let (ours, first, second) = (of(&packed, &mut engine), of(&apart[0], &mut engine), of(&apart[1], &mut engine));
    for ((ours, first), second) in ours.iter().zip(first).zip(second) {
        let expected = 0.07 * first + 0.93 * second; // each is the gradient of a mean
        assert!((ours - expected).abs() < 1e-5, "{ours} is not {expected}");
    }
    let wrong = Batch { starts: vec![0; 99], ..row(&tokens) };
    assert_eq!(engine.evaluate(&wrong).unwrap_err().to_string(), "99 document starts do not fit 1 windows of 100");
}

/// Odd widths, lengths and groups, a small batch and then a large one: rounding operands turns a gradient a little.
#[test]
fn bf16_gradients_are_those_of_f32_but_for_rounding() {
    let model = ModelConfig { tie_word_embeddings: false, ..tiny() };
    let of = |precision| {
        let options = Options { precision, ..options(&model) };
        engine(options, &lively_weights(&model, 4), Box::new(NoFeed))
    };
    let (mut f32, mut bf16) = (of(Precision::F32), of(Precision::Bf16));
    for (rows, length) in [(1, 17), (3, 151), (1, 1)] {
        let batch = random_batch(rows, length, model.vocab_size, &mut Rng::new(6));
        let (exact, rounded) = (f32.gradients(&batch).unwrap(), bf16.gradients(&batch).unwrap());
        for ((exact, rounded), tensor) in exact.tensors.iter().zip(&rounded.tensors).zip(model.tensors()) {
            let share = share_apart(exact, rounded);
            assert!(share < 0.05, "{rows} × {length}: the gradient of {} is {share} apart", tensor.name);
        }
    }
}

/// An engine that evaluates after a step sees the weights of that step.
#[test]
fn evaluation_sees_the_present_weights() {
    let model = tiny();
    let feed = RandomFeed::new(17, model.vocab_size);
    let mut trained = engine(options(&model), &lively_weights(&model, 2), Box::new(feed));
    let batch = random_batch(2, 17, model.vocab_size, &mut Rng::new(1));
    let before = trained.evaluate(&batch).unwrap();
    trained.train(1).unwrap();
    let fragments = weights(&mut trained).unwrap();
    let tensors = trained.manifest().scatter(&fragments);
    let mut fresh = engine(options(&model), &tensors, Box::new(NoFeed));
    let after = trained.evaluate(&batch).unwrap();
    assert!(after != before && after == fresh.evaluate(&batch).unwrap());
}

/// Rounding operands moves a loss by far less than a step of training does.
#[test]
fn bf16_trains_as_f32_does() {
    let model = ModelConfig { hidden_size: 64, intermediate_size: 160, ..tiny() };
    let losses = |precision| -> Vec<f64> {
        let options = Options { precision, ..options(&model) };
        let mut engine = engine(options, &model.initial_weights(1), Box::new(Pattern));
        (0..60).map(|_| engine.train(1).unwrap().loss).collect()
    };
    let (f32, bf16) = (losses(Precision::F32), losses(Precision::Bf16));
    assert!(f32[59] < 0.5 * f32[0], "{f32:?}");
    let apart = f32.iter().zip(&bf16).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart > 0.0 && apart < 0.02, "losses are {apart} apart");
}

#[test]
fn a_repeating_pattern_is_learned() {
    let model = tiny();
    let optimizer = AdamW { learning_rate: 1e-2, warmup_steps: 5, ..AdamW::default() };
    let options = Options { optimizer, ..options(&model) };
    let mut engine = engine(options, &model.initial_weights(1), Box::new(Pattern));
    let first = engine.train(1).unwrap().loss;
    engine.train(100).unwrap();
    let last = engine.train(1).unwrap().loss;
    assert!((first - (61f64).ln()).abs() < 0.1 && last < 0.2, "{first} → {last}");
}

#[test]
fn only_embeddings_move_at_their_own_rate() {
    let model = tiny();
    let first = model.initial_weights(1);
    let moved = |embedding_rate: f32| -> Vec<Vec<f32>> {
        let optimizer = AdamW { embedding_rate, weight_decay: 0.0, ..AdamW::default() };
        let mut engine = engine(Options { optimizer, ..options(&model) }, &first, Box::new(Pattern));
        engine.train(1).unwrap();
        let trained = engine.manifest().clone().scatter(&weights(&mut engine).unwrap());
        izip!(&trained, &first).map(|(a, b)| izip!(a, b).map(|(a, b)| a - b).collect()).collect()
    };
    for (tensor, once, thrice) in izip!(model.tensors(), moved(1.0), moved(3.0)) {
        let factor = if tensor.kind == TensorKind::Embedding { 3.0 } else { 1.0 };
        let apart = izip!(once, thrice).map(|(once, thrice)| (thrice - factor * once).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-7, "{}: {apart}", tensor.name);
    }
}

#[test]
fn a_starved_step_changes_nothing() {
    let model = tiny();
    let options = Options { accumulate: 2, ..options(&model) };
    let start = |rows_left| {
        let feed = RandomFeed { rows_left, ..RandomFeed::new(9, model.vocab_size) };
        engine(options.clone(), &model.initial_weights(1), Box::new(feed))
    };
    let (mut plenty, mut scarce) = (start(100), start(11));
    plenty.train(2).unwrap();
    assert_eq!(scarce.train(5), Err(EngineError::Starved { wanted: 4 }));
    assert_eq!(scarce.steps(), 2);
    assert!(weights(&mut scarce) == weights(&mut plenty));
}

#[test]
fn nothing_that_is_not_finite_reaches_the_weights() {
    let model = tiny();
    let start = || {
        let feed = RandomFeed::new(9, model.vocab_size);
        engine(options(&model), &model.initial_weights(1), Box::new(feed))
    };
    let (mut untouched, mut poisoned) = (start(), start());
    untouched.train(1).unwrap();
    poisoned.train(1).unwrap();
    let fragment = FragmentId(1);
    let mut good = vec![0.0; poisoned.manifest().fragment_len(fragment).unwrap()];
    poisoned.read(fragment, &mut good).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] = f32::NAN;
    poisoned.write(fragment, &bad).unwrap();
    let before = weights(&mut poisoned).unwrap().concat();
    let error = poisoned.train(1).unwrap_err();
    match error {
        EngineError::NonFinite { what, step: 2 } => assert!(what.starts_with("the loss (first "), "{what}"),
        other => panic!("{other:?}"),
    }
    let after = weights(&mut poisoned).unwrap().concat();
    assert!(before.iter().zip(&after).all(|(a, b)| a.to_bits() == b.to_bits()));

    // With the weights mended, it goes on as if nothing had happened; the step's samples are spent.
    poisoned.write(fragment, &good).unwrap();
    let mut skipped = RandomFeed::new(9, model.vocab_size);
    let batches: Vec<Batch> = (0..3)
        .map(|_| {
            let mut batch = Batch::default();
            skipped.next(2, &mut batch).unwrap();
            batch
        })
        .collect();
    let list = vec![batches[0].clone(), batches[2].clone()];
    let mut same = engine(options(&model), &model.initial_weights(1), Box::new(ListFeed(list.into_iter())));
    same.train(2).unwrap();
    poisoned.train(1).unwrap();
    assert!(weights(&mut same) == weights(&mut poisoned));
}

/// Finite weights whose loss is finite and whose gradient is not.
#[test]
fn a_gradient_that_is_not_finite_is_named() {
    let model = ModelConfig { tie_word_embeddings: false, ..tiny() };
    let mut weights = model.initial_weights(1);
    // A residual stream of zeros hides a huge head from the loss, but not from its gradient.
    weights.first_mut().unwrap().fill(0.0);
    let head = weights.last_mut().unwrap().chunks_mut(model.hidden_size);
    head.enumerate().for_each(|(token, row)| row.fill(if token % 2 == 0 { 3e38 } else { -3e38 }));
    let mut engine = engine(options(&model), &weights, Box::new(RandomFeed::new(9, model.vocab_size)));
    match engine.train(1) {
        Err(EngineError::NonFinite { what, step: 1 }) => assert!(what.starts_with("the gradient of model."), "{what}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let model = tiny();
    let refusal = |options: Options, manifest: Manifest| {
        let fragments = manifest.gather(&tiny().initial_weights(1));
        match CpuEngine::new(options, manifest, fragments, Box::new(NoFeed)) {
            Err(EngineError::Device(text)) => text,
            _ => panic!("accepted"),
        }
    };
    let manifest = Manifest::balanced(model.tensors(), 2);
    let wider = ModelConfig { hidden_size: 24, ..model.clone() };
    assert_eq!(
        refusal(options(&wider), manifest.clone()),
        "the manifest has model.embed_tokens.weight [61, 20] where the model has model.embed_tokens.weight [61, 24]"
    );
    let bad = Options { rows: 0, accumulate: 0, ..options(&model) };
    assert_eq!(refusal(bad, manifest).lines().count(), 2);

    let mut engine = engine(options(&model), &model.initial_weights(1), Box::new(NoFeed));
    assert_eq!(engine.train(1), Err(EngineError::Starved { wanted: 2 }));
    let said = |engine: &mut CpuEngine, batch: Batch| engine.evaluate(&batch).unwrap_err().to_string();
    let batch = Batch { rows: 1, length: 2, tokens: vec![1, 2, 61], ..Batch::default() };
    assert_eq!(said(&mut engine, batch), "token 61 is outside of the vocabulary of 61");
    let batch = Batch { rows: 1, length: 161, tokens: vec![0; 162], ..Batch::default() };
    assert_eq!(said(&mut engine, batch), "windows of 161 tokens for a context of 160");
    assert_eq!(said(&mut engine, Batch::default()), "0 tokens are not 0 windows of 0 + 1");
}
