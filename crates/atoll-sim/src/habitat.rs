//! What a world brings to life: a model and engines that train it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_core::data::Ranges;
use atoll_core::engine::{Engine, EngineError};
use atoll_core::manifest::{FragmentId, Manifest};

/// The model of a world, and the engines of its sites.
pub trait Habitat {
    /// The model's layout.
    fn manifest(&self) -> Manifest;

    /// Θ at the start, one vector per fragment.
    fn first_weights(&self) -> Vec<Vec<f32>>;

    /// A new process of site number `site`. Crashed sites ask again; what an earlier process knew is
    /// lost.
    ///
    /// # Errors
    /// If there can be no such engine.
    fn start(&mut self, site: usize) -> Result<Inhabitant, EngineError>;

    /// What site number `site` sends in place of `delta`, which it has learnt of a fragment; nothing if it is honest.
    fn forge(&mut self, _site: usize, _fragment: FragmentId, _delta: &[f32]) -> Option<Vec<f32>> {
        None
    }

    /// Loss of the model on text that nobody trains on, if the coordinator has any to try contributions on.
    fn trial(&mut self, _theta: &[Vec<f32>]) -> Option<f64> {
        None
    }

    /// How far the finished model is from perfect, given the tokens that each site got into it: a toy's
    /// distance from its target, a language model's held-out loss.
    ///
    /// # Errors
    /// If it cannot be measured.
    fn error(&mut self, theta: &[Vec<f32>], tokens: &[u64]) -> Result<f64, EngineError>;
}

/// The engine of one site's process, and the leases that its feed draws on.
pub struct Inhabitant {
    /// Trains.
    pub engine: Box<dyn Engine>,
    /// Shared with the engine's feed.
    pub leases: Leases,
}

/// The samples that a site may train on, shared by its process and its engine's feed.
#[derive(Debug, Clone, Default)]
pub struct Leases(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    granted: Ranges,
    trained: Ranges,
    progress: f32,
}

impl Leases {
    /// No leases.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the `rows` lowest positions to train on; with them comes how far the run is.
    ///
    /// # Errors
    /// [`EngineError::Starved`] if fewer are leased, and then none is taken.
    pub fn take(&self, rows: usize) -> Result<(Ranges, f32), EngineError> {
        let mut state = self.lock();
        if state.granted.len() < rows as u64 {
            return Err(EngineError::Starved { wanted: rows });
        }
        let taken = state.granted.take_first(rows as u64);
        state.trained.insert(&taken);
        Ok((taken, state.progress))
    }

    /// Lets the engine train on `positions`.
    pub fn grant(&self, positions: &Ranges) {
        self.lock().granted.insert(positions);
    }

    /// Tells learning-rate schedules how far the run has come, 0 to 1.
    pub fn set_progress(&self, progress: f32) {
        self.lock().progress = progress;
    }

    /// Takes back what the engine has not taken.
    pub(crate) fn clear(&self) {
        self.lock().granted = Ranges::new();
    }

    /// What the engine has taken since the last call.
    pub(crate) fn take_trained(&self) -> Ranges {
        std::mem::take(&mut self.lock().trained)
    }

    /// Every change is complete before it is visible, so a panic elsewhere leaves sound leases.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
