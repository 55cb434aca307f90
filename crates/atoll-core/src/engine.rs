//! The engine boundary: what trains inside a site. Five methods over host `f32` slices, no generics
//! and no device pointers, so that a CPU, a GPU of any maker or a Python process can be the one
//! that answers. [`conformance`] says what all of them must have in common.
//!
//! An engine pulls its batches from a [`Feed`], which hands out only samples that this site holds a
//! lease on.

pub mod conformance;

use crate::manifest::{FragmentId, Manifest};

/// Trains one model in place.
pub trait Engine: Send {
    /// The layout of the weights that [`read`](Self::read) and [`write`](Self::write) speak of.
    fn manifest(&self) -> &Manifest;

    /// Takes `steps` inner steps on this site's own leased tokens.
    ///
    /// # Errors
    /// [`EngineError::NonFinite`] before a non-finite loss or gradient could reach the weights;
    /// [`EngineError::Starved`] if the feed ran out, with the weights as after the last whole step.
    fn train(&mut self, steps: u32) -> Result<Progress, EngineError>;

    /// Copies the weights of `fragment` into `weights`.
    ///
    /// # Errors
    /// [`EngineError::Layout`] if there is no such fragment or the length differs.
    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError>;

    /// Replaces the weights of `fragment`; the optimizer's state stays.
    ///
    /// # Errors
    /// [`EngineError::Layout`] if there is no such fragment or the length differs.
    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError>;

    /// Summed loss of the present weights on `batch`; changes nothing.
    ///
    /// # Errors
    /// [`EngineError::Device`] if the device fails.
    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError>;
}

/// All weights, a vector per fragment.
///
/// # Errors
/// What the engine said.
pub fn weights(engine: &mut dyn Engine) -> Result<Vec<Vec<f32>>, EngineError> {
    let fragments: Vec<FragmentId> = engine.manifest().fragments().collect();
    let mut all = Vec::new();
    for fragment in fragments {
        let mut weights = vec![0.0; engine.manifest().fragment_len(fragment).unwrap_or(0)];
        engine.read(fragment, &mut weights)?;
        all.push(weights);
    }
    Ok(all)
}

/// Samples for one micro-batch: each row is a window of `length + 1` tokens, of which the first
/// `length` are inputs and the last `length` are targets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Rows, B.
    pub rows: usize,
    /// Tokens predicted per row, T.
    pub length: usize,
    /// `(B, T+1)`, row-major.
    pub tokens: Vec<u32>,
    /// How far the run has come, 0 at its start and 1 at its end: what learning-rate schedules see.
    pub progress: f32,
}

/// Where an engine's batches come from.
pub trait Feed: Send {
    /// Fills `batch` with `rows` leased samples.
    ///
    /// # Errors
    /// [`EngineError::Starved`] if fewer samples are leased, and then none is consumed;
    /// [`EngineError::Data`] if a shard cannot be read.
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError>;
}

/// What some inner steps amounted to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Progress {
    /// Inner steps taken.
    pub steps: u32,
    /// Tokens predicted.
    pub tokens: u64,
    /// Mean loss per token in nats over these steps.
    pub loss: f64,
}

/// Loss on given tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Evaluation {
    /// Sum of the losses in nats.
    pub nats: f64,
    /// Tokens predicted.
    pub tokens: u64,
}

/// Why an engine could not do what it was asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// A loss, gradient or weight is NaN or infinite.
    #[error(
        "{what} became non-finite at inner step {step}\nhint: lower the learning rate, or look at the data around this step"
    )]
    NonFinite {
        /// What was not finite, such as `the loss` or a tensor's name.
        what: String,
        /// The engine's own count of inner steps.
        step: u64,
    },
    /// No leased sample is left.
    #[error("the feed has fewer than {wanted} leased samples")]
    Starved {
        /// Rows asked for.
        wanted: usize,
    },
    /// A shard could not be read.
    #[error("{0}")]
    Data(String),
    /// Fragment and slice do not fit together.
    #[error("{fragment} does not have {len} weights in this engine's layout")]
    Layout {
        /// The fragment asked for.
        fragment: FragmentId,
        /// Length of the slice.
        len: usize,
    },
    /// The device or its driver failed.
    #[error("{0}")]
    Device(String),
}
