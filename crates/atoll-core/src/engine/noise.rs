//! Random tokens.

use super::{Batch, EngineError, Feed};
use crate::rng::Rng;

/// Random tokens without end: an engine does the same work for them as for text, so its speed and its laws can be seen
/// where there is none.
#[derive(Debug)]
pub struct Noise {
    rng: Rng,
    length: usize,
    vocab: usize,
}

impl Noise {
    /// Rows of `length` + 1 tokens out of a vocabulary of `vocab`.
    pub fn new(seed: u64, length: usize, vocab: usize) -> Self {
        Self { rng: Rng::new(seed), length, vocab }
    }
}

impl Feed for Noise {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let count = rows * (self.length + 1);
        batch.tokens.clear();
        batch.tokens.extend((0..count).map(|_| self.rng.below(self.vocab as u64) as u32));
        (batch.rows, batch.length) = (rows, self.length);
        batch.starts.clear();
        Ok(())
    }
}
