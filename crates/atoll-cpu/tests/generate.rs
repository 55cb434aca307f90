//! Generation: the cache changes nothing, a seed says everything, a full context slides.
#![allow(clippy::unwrap_used)]

mod common;

use atoll_core::engine::EngineError;
use atoll_core::rng::Rng;
use atoll_cpu::{Generator, Precision, Sampling};

use common::{lively_weights, random_batch, tiny};

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

fn generator(threads: usize) -> Generator {
    let model = tiny();
    Generator::new(&model, &lively_weights(&model, 8), Precision::F32, threads).unwrap()
}

fn prompt(length: usize) -> Vec<u32> {
    random_batch(1, length - 1, tiny().vocab_size, &mut Rng::new(3)).tokens
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap() as u32
}

/// Each token drawn with the cache is the likeliest by a pass over the whole text without it.
#[test]
fn the_cache_changes_nothing() {
    let mut generator = generator(2);
    let vocab = tiny().vocab_size;
    for length in [1, 5, 64, 70] {
        let mut text = prompt(length);
        let said: Vec<u32> = generator.generate(&text, &GREEDY).unwrap().take(40).collect();
        for token in said {
            let logits = generator.logits(&text).unwrap();
            let last = &logits[(text.len() - 1) * vocab..];
            let (best, drawn) = (last[argmax(last) as usize], last[token as usize]);
            assert!(best - drawn < 1e-4, "after {} tokens: {token} has {drawn}, the best has {best}", text.len());
            text.push(token);
        }
    }
}

#[test]
fn a_full_context_goes_on_with_its_last_half() {
    let context = tiny().max_position_embeddings;
    let mut generator = generator(1);
    let start = prompt(context);
    let said: Vec<u32> = generator.generate(&start, &GREEDY).unwrap().take(2 * context).collect();
    // The first token read the whole context. The second no longer fits, so it reads the last half.
    assert_eq!(said[0], argmax(&generator.logits(&start).unwrap()[(context - 1) * tiny().vocab_size..]));
    let text: Vec<u32> = start.iter().chain(&said[..1]).copied().collect();
    let half = &text[text.len() - context / 2..];
    assert_eq!(said[1], generator.generate(half, &GREEDY).unwrap().next().unwrap());
    // Of a prompt longer than the context, the end counts.
    let longer: Vec<u32> = [7; 30].into_iter().chain(start).collect();
    assert_eq!(said[0], generator.generate(&longer, &GREEDY).unwrap().next().unwrap());
}

#[test]
fn a_seed_says_everything() {
    let text = |threads, seed| {
        let sampling = Sampling { temperature: 0.9, top_k: 20, top_p: 0.95, seed };
        let mut generator = generator(threads);
        let first: Vec<u32> = generator.generate(&prompt(9), &sampling).unwrap().take(50).collect();
        let again: Vec<u32> = generator.generate(&prompt(9), &sampling).unwrap().take(50).collect();
        assert_eq!(first, again);
        first
    };
    assert_eq!(text(1, 4), text(3, 4));
    assert_ne!(text(1, 4), text(1, 5));
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let mut generator = generator(1);
    let said = |result: Result<Vec<f32>, EngineError>| result.unwrap_err().to_string();
    assert_eq!(said(generator.logits(&[])), "there is no token to continue");
    assert_eq!(said(generator.logits(&[61])), "token 61 is outside of the vocabulary of 61");
    assert_eq!(said(generator.logits(&[0; 161])), "161 tokens do not fit a context of 160");
    assert!(generator.generate(&[], &GREEDY).is_err());
    assert!(Generator::new(&tiny(), &[], Precision::F32, 1).is_err());
}

/// Texts of a batch are those that each prompt gets alone, also when their contexts fill up at different times.
#[test]
fn a_batch_says_what_each_prompt_would_get_alone() {
    let model = tiny();
    for precision in [Precision::F32, Precision::Bf16] {
        let mut generator = Generator::new(&model, &lively_weights(&model, 8), precision, 2).unwrap();
        let prompts = [prompt(3), prompt(150), prompt(1)];
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let sampling = Sampling { seed: 11, ..Sampling::default() };
        let steps: Vec<Vec<u32>> = generator.generate_batch(&prompts, &sampling).unwrap().take(30).collect();
        for (index, prompt) in prompts.iter().enumerate() {
            let sampling = Sampling { seed: 11 + index as u64, ..Sampling::default() };
            let alone: Vec<u32> = generator.generate(prompt, &sampling).unwrap().take(30).collect();
            let together: Vec<u32> = steps.iter().map(|tokens| tokens[index]).collect();
            assert_eq!(together, alone, "{precision:?}, prompt {index}");
        }
    }
}

#[test]
fn bf16_weights_hardly_move_the_logits() {
    let model = tiny();
    let logits = |precision| {
        let mut generator = Generator::new(&model, &model.initial_weights(2), precision, 1).unwrap();
        generator.logits(&prompt(40)).unwrap()
    };
    let apart =
        logits(Precision::F32).iter().zip(logits(Precision::Bf16)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart > 0.0 && apart < 0.02, "{apart}");
}
