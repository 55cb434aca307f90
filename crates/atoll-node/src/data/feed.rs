//! Leased positions to batches. The site's protocol side grants positions through [`Leases`]; the
//! engine, in its own thread, pulls batches from a [`LeasedFeed`]; what it pulled comes back as the
//! positions that the next contribution has consumed.
//!
//! Position `p` is sample `permutation(p mod samples)` of epoch `p / samples`, so that any two sites
//! with the same dataset agree on what every position means.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_core::data::{Permutation, Ranges};
use atoll_core::engine::{Batch, EngineError, Feed};
use atoll_core::training::Packing;

use crate::data::DataError;
use crate::data::dataset::{Dataset, Split};

/// The positions that this site may train on, shared between its protocol and its engine.
#[derive(Debug, Clone, Default)]
pub struct Leases(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    available: Ranges,
    trained: Ranges,
    progress: f32,
}

impl Leases {
    /// No leases.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the engine train on `positions`.
    pub fn grant(&self, positions: &Ranges) {
        self.lock().available.insert(positions);
    }

    /// How many granted samples the engine has not taken.
    pub fn available(&self) -> u64 {
        self.lock().available.len()
    }

    /// The positions that the engine has taken since the last call.
    pub fn take_trained(&self) -> Ranges {
        std::mem::take(&mut self.lock().trained)
    }

    /// Forgets the granted samples that the engine has not taken: after a resync they are someone else's.
    pub fn clear(&self) {
        self.lock().available = Ranges::new();
    }

    /// Tells learning-rate schedules how far the run has come, from 0 to 1.
    pub fn set_progress(&self, progress: f32) {
        self.lock().progress = progress;
    }

    /// Moves the `rows` lowest positions to `taken` and returns the progress; `None`, and nothing moves,
    /// if there are fewer.
    fn take(&self, rows: usize, taken: &mut Vec<u64>) -> Option<f32> {
        let state = &mut *self.lock();
        taken.clear();
        if state.available.len() < rows as u64 {
            return None;
        }
        while taken.len() < rows {
            let first = state.available.spans().next();
            let Some((start, end)) = first else { break };
            let end = end.min(start.saturating_add((rows - taken.len()) as u64));
            state.available.remove_span(start, end);
            state.trained.insert_span(start, end);
            taken.extend(start..end);
        }
        Some(state.progress)
    }

    /// Every change is complete before it is visible, so a panic elsewhere leaves sound leases.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The batches of one engine.
#[derive(Debug)]
pub struct LeasedFeed {
    dataset: Arc<Dataset>,
    leases: Leases,
    seed: u64,
    context: usize,
    packing: Packing,
    samples: u64,
    /// The epoch of the last sample and its order.
    order: (u64, Permutation),
    /// Positions of the present batch, kept for its capacity.
    positions: Vec<u64>,
}

impl LeasedFeed {
    /// The feed of windows of `context` tokens, packed like that, in the order of the run's `seed`.
    ///
    /// # Errors
    /// If the dataset has no such window.
    pub fn new(
        dataset: Arc<Dataset>,
        leases: Leases,
        seed: u64,
        context: usize,
        packing: Packing,
    ) -> Result<Self, DataError> {
        let samples = dataset.samples(context);
        if samples == 0 || context == 0 {
            let (path, tokens) = (dataset.path().to_path_buf(), dataset.tokens(Split::Train));
            return Err(DataError::TooFewTokens { path, tokens, context });
        }
        let order = (0, Permutation::new(samples, seed, dataset.id(), 0));
        Ok(Self { dataset, leases, seed, context, packing, samples, order, positions: Vec::new() })
    }

    /// The sample at `position`.
    fn sample(&mut self, position: u64) -> u64 {
        let epoch = position / self.samples;
        if self.order.0 != epoch {
            self.order = (epoch, Permutation::new(self.samples, self.seed, self.dataset.id(), epoch));
        }
        self.order.1.sample(position % self.samples)
    }
}

impl Feed for LeasedFeed {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let progress = self.leases.take(rows, &mut self.positions);
        batch.progress = progress.ok_or(EngineError::Starved { wanted: rows })?;
        (batch.rows, batch.length) = (rows, self.context);
        batch.tokens.clear();
        for row in 0..rows {
            let sample = self.sample(self.positions[row]);
            let window = self.dataset.window(Split::Train, sample, self.context, &mut batch.tokens);
            window.map_err(|error| EngineError::Data(error.to_string()))?;
        }
        batch.pack(self.packing, self.dataset.end_of_text());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
