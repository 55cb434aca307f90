//! The engine boundary: what trains inside a site. Five methods over host `f32` slices, no generics
//! and no device pointers, so that a CPU, a GPU of any maker or a Python process can be the one
//! that answers. [`conformance`] says what all of them must have in common.
//!
//! An engine pulls its batches from a [`Feed`], which hands out only samples that this site holds a
//! lease on.

pub mod conformance;
mod noise;

pub use noise::Noise;

use crate::manifest::{FragmentId, Manifest};
use crate::model::ModelConfig;
use crate::training::{AdamW, Muon, Packing};

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

    /// Adds `change` to the weights of `fragment`, as after a commit; the optimizer's state stays. An engine
    /// whose weights are in the host's memory does better than this.
    ///
    /// # Errors
    /// [`EngineError::Layout`] if there is no such fragment or the length differs.
    fn add(&mut self, fragment: FragmentId, change: &[f32]) -> Result<(), EngineError> {
        let mut weights = vec![0.0; change.len()];
        self.read(fragment, &mut weights)?;
        crate::delta::add(&mut weights, change);
        self.write(fragment, &weights)
    }

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

/// Replaces all weights, a vector per fragment.
///
/// # Errors
/// What the engine said.
pub fn write_weights(engine: &mut dyn Engine, fragments: &[impl AsRef<[f32]>]) -> Result<(), EngineError> {
    (0..).zip(fragments).try_for_each(|(index, weights)| engine.write(FragmentId(index), weights.as_ref()))
}

/// Has `engine` and `fragments`, a vector per fragment, change weights. Needs memory for one fragment more.
///
/// # Errors
/// What the engine said; fragments before the one that failed have changed places.
pub fn exchange_weights(engine: &mut dyn Engine, fragments: &mut [Vec<f32>]) -> Result<(), EngineError> {
    let mut own = Vec::new();
    for (index, weights) in (0..).zip(fragments) {
        own.resize(weights.len(), 0.0);
        engine.read(FragmentId(index), &mut own)?;
        engine.write(FragmentId(index), weights)?;
        std::mem::swap(&mut own, weights);
    }
    Ok(())
}

/// Summed loss of the present weights on all `batches`.
///
/// # Errors
/// What the engine said.
pub fn evaluate_all(engine: &mut dyn Engine, batches: &[Batch]) -> Result<Evaluation, EngineError> {
    batches.iter().try_fold(Evaluation::default(), |all, batch| {
        let part = engine.evaluate(batch)?;
        Ok(Evaluation { nats: all.nats + part.nats, tokens: all.tokens + part.tokens })
    })
}

/// Every reason why an engine with this model and these settings cannot train in that layout; empty when it can.
pub fn problems(
    manifest: &Manifest,
    model: &ModelConfig,
    optimizer: &AdamW,
    muon: Option<&Muon>,
    rows: usize,
    accumulate: usize,
) -> Vec<String> {
    let mut problems = model.problems();
    problems.extend(optimizer.problems());
    problems.extend(muon.into_iter().flat_map(Muon::problems));
    for (name, value) in [("rows", rows), ("accumulate", accumulate)] {
        if value == 0 {
            problems.push(format!("{name} = 0 must be at least 1"));
        }
    }
    if problems.is_empty() {
        problems.extend(manifest.difference(model));
    }
    problems
}

/// Whether `fragments`, one vector per fragment, are weights in that layout.
///
/// # Errors
/// [`EngineError::Device`] if there are too many or too few, [`EngineError::Layout`] if one has another length.
pub fn check_weights(manifest: &Manifest, fragments: &[Vec<f32>]) -> Result<(), EngineError> {
    let (have, want) = (fragments.len(), manifest.fragments().len());
    if have != want {
        return Err(EngineError::Device(format!("{have} fragments of weights for a manifest of {want}")));
    }
    match manifest.fragments().zip(fragments).find(|(id, part)| manifest.fragment_len(*id) != Some(part.len())) {
        Some((fragment, part)) => Err(EngineError::Layout { fragment, len: part.len() }),
        None => Ok(()),
    }
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
    /// `(B, T)`, row-major: for each input the position in its row of the first token that it may see,
    /// its document's first; empty if every token may see its row from the beginning.
    pub starts: Vec<u32>,
    /// How far the run has come, 0 at its start and 1 at its end: what learning-rate schedules see.
    pub progress: f32,
}

impl Batch {
    /// Writes `starts` for the present tokens. An `end_of_text` belongs to the document that it ends;
    /// the token after it begins the next one.
    pub fn pack(&mut self, packing: Packing, end_of_text: u32) {
        self.starts.clear();
        if packing == Packing::Stream {
            return;
        }
        for row in self.tokens.chunks_exact(self.length + 1) {
            let mut start = 0;
            for (position, &token) in (0..).zip(&row[..self.length]) {
                self.starts.push(start);
                if token == end_of_text {
                    start = position + 1;
                }
            }
        }
    }

    /// Tokens and starts of pieces of at most `rows` rows.
    pub fn micro_batches(&self, rows: usize) -> impl Iterator<Item = (&[u32], &[u32])> {
        let (rows, length) = (rows.max(1), self.length);
        let starts = self.starts.chunks(rows * length).chain(std::iter::repeat(&[][..]));
        self.tokens.chunks(rows * (length + 1)).zip(starts)
    }

    /// Whether an engine with this model can read the batch.
    ///
    /// # Errors
    /// [`EngineError::Data`] if there are no tokens, or tokens or starts are too many, too few or out of range.
    pub fn check(&self, model: &ModelConfig) -> Result<(), EngineError> {
        let Self { rows, length, .. } = *self;
        let wrong = |what: String| Err(EngineError::Data(what));
        if rows == 0 || length == 0 || self.tokens.len() != rows * (length + 1) {
            return wrong(format!("{} tokens are not {rows} windows of {length} + 1", self.tokens.len()));
        }
        if length > model.max_position_embeddings {
            return wrong(format!("windows of {length} tokens for a context of {}", model.max_position_embeddings));
        }
        let in_order = |(index, &start): (usize, &u32)| start as usize <= index % length;
        if !self.starts.is_empty()
            && (self.starts.len() != rows * length || !self.starts.iter().enumerate().all(in_order))
        {
            return wrong(format!("{} document starts do not fit {rows} windows of {length}", self.starts.len()));
        }
        match self.tokens.iter().find(|&&token| token as usize >= model.vocab_size) {
            Some(token) => wrong(format!("token {token} is outside of the vocabulary of {}", model.vocab_size)),
            None => Ok(()),
        }
    }
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

/// A feed without samples: for engines that only evaluate.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoFeed;

impl Feed for NoFeed {
    fn next(&mut self, rows: usize, _: &mut Batch) -> Result<(), EngineError> {
        Err(EngineError::Starved { wanted: rows })
    }
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

impl Progress {
    /// Takes `steps` steps, each of which returns its tokens and their summed loss.
    ///
    /// # Errors
    /// Those of the first step that fails.
    pub fn of(steps: u32, mut step: impl FnMut() -> Result<(u64, f64), EngineError>) -> Result<Self, EngineError> {
        let (mut tokens, mut nats) = (0, 0.0);
        for _ in 0..steps {
            let step = step()?;
            tokens += step.0;
            nats += step.1;
        }
        Ok(Self { steps, tokens, loss: nats / tokens.max(1) as f64 })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn starts(rows: usize, tokens: &[u32], packing: Packing) -> Vec<u32> {
        let length = tokens.len() / rows - 1;
        let mut batch = Batch { rows, length, tokens: tokens.to_vec(), starts: vec![9], progress: 0.0 };
        batch.pack(packing, 0);
        batch.starts
    }

    #[test]
    fn a_document_begins_behind_an_end_of_text() {
        assert_eq!(starts(1, &[5, 6, 0, 7, 8, 9], Packing::Documents), [0, 0, 0, 3, 3]);
        assert_eq!(starts(1, &[0, 0, 7, 8, 0, 9], Packing::Documents), [0, 1, 2, 2, 2]);
        // The last token of a row is only a target, and the next row begins anew.
        assert_eq!(starts(2, &[5, 6, 0, 7, 0, 8], Packing::Documents), [0, 0, 0, 0]);
    }

    #[test]
    fn a_stream_needs_no_starts() {
        assert_eq!(starts(1, &[5, 0, 7, 8], Packing::Stream), [0u32; 0]);
    }
}
