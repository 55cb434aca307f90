//! What every engine must do, as one suite: call [`check`] from the engine's own tests.

use super::{Batch, Engine, EngineError, weights};
use crate::manifest::FragmentId;

/// Builds the engine under test in its first state; two calls must give equal engines.
pub type Make<'a> = &'a mut dyn FnMut() -> Box<dyn Engine>;

/// Runs the whole suite. `batch` is any batch that the engine can evaluate.
///
/// # Errors
/// The first law that does not hold, in words.
pub fn check(make: Make<'_>, batch: &Batch) -> Result<(), String> {
    weights_round_trip(make)?;
    layout_errors_are_refused(make)?;
    training_moves_every_fragment(make)?;
    training_is_deterministic(make)?;
    evaluation_changes_nothing(make, batch)
}

fn law(holds: bool, broken: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(broken.into()) }
}

fn said(error: &EngineError) -> String {
    format!("the engine refused: {error}")
}

fn weights_round_trip(make: Make<'_>) -> Result<(), String> {
    let mut engine = make();
    let first = weights(engine.as_mut()).map_err(|e| said(&e))?;
    law(first.iter().flatten().all(|w| w.is_finite()), "first weights must be finite")?;
    let changed: Vec<Vec<f32>> = first.iter().map(|f| f.iter().map(|w| w * 0.5 + 0.25).collect()).collect();
    let fragments: Vec<FragmentId> = engine.manifest().fragments().collect();
    for (&fragment, weights) in fragments.iter().zip(&changed) {
        engine.write(fragment, weights).map_err(|e| said(&e))?;
    }
    let back = weights(engine.as_mut()).map_err(|e| said(&e))?;
    law(back == changed, "read must return exactly what write was given")?;
    for (&fragment, weights) in fragments.iter().zip(&changed) {
        engine.add(fragment, weights).map_err(|e| said(&e))?;
    }
    let doubled: Vec<Vec<f32>> = changed.iter().map(|f| f.iter().map(|w| w + w).collect()).collect();
    let back = weights(engine.as_mut()).map_err(|e| said(&e))?;
    law(back == doubled, "add must add to every weight just what it is given")
}

fn layout_errors_are_refused(make: Make<'_>) -> Result<(), String> {
    let mut engine = make();
    let count = engine.manifest().fragments().len() as u16;
    let len = engine.manifest().fragment_len(FragmentId(0)).unwrap_or(0);
    let mut short = vec![0.0; len - 1];
    let refused = |result| matches!(result, Err(EngineError::Layout { .. }));
    law(refused(engine.read(FragmentId(0), &mut short)), "reading into a shorter slice must be refused")?;
    law(refused(engine.write(FragmentId(0), &short)), "writing a shorter slice must be refused")?;
    law(refused(engine.add(FragmentId(0), &short)), "adding a shorter slice must be refused")?;
    law(refused(engine.write(FragmentId(count), &vec![0.0; len])), "an unknown fragment must be refused")
}

fn training_moves_every_fragment(make: Make<'_>) -> Result<(), String> {
    let mut engine = make();
    let before = weights(engine.as_mut()).map_err(|e| said(&e))?;
    let progress = engine.train(2).map_err(|e| said(&e))?;
    law(progress.steps == 2 && progress.tokens > 0, "two steps must be counted as two, with their tokens")?;
    law(progress.loss.is_finite(), "the loss must be finite")?;
    let after = weights(engine.as_mut()).map_err(|e| said(&e))?;
    law(before.iter().zip(&after).all(|(a, b)| a != b), "training must change every fragment")
}

fn training_is_deterministic(make: Make<'_>) -> Result<(), String> {
    let (mut one, mut two) = (make(), make());
    one.train(3).map_err(|e| said(&e))?;
    two.train(1).map_err(|e| said(&e))?;
    two.train(2).map_err(|e| said(&e))?;
    let (one, two) = (weights(one.as_mut()), weights(two.as_mut()));
    law(one.is_ok() && one == two, "three steps must give the bits of one step and then two")
}

fn evaluation_changes_nothing(make: Make<'_>, batch: &Batch) -> Result<(), String> {
    let (mut plain, mut evaluated) = (make(), make());
    let first = evaluated.evaluate(batch).map_err(|e| said(&e))?;
    let second = evaluated.evaluate(batch).map_err(|e| said(&e))?;
    law(first == second, "the same weights and tokens must give the same loss")?;
    law(first.tokens == (batch.rows * batch.length) as u64, "every token of the batch must be counted")?;
    law(first.nats.is_finite(), "the loss must be finite")?;
    plain.train(1).map_err(|e| said(&e))?;
    evaluated.train(1).map_err(|e| said(&e))?;
    let (plain, evaluated) = (weights(plain.as_mut()), weights(evaluated.as_mut()));
    law(plain.is_ok() && plain == evaluated, "evaluation must not disturb training")
}
