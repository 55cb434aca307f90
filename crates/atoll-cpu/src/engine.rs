//! The CPU as an engine of Atoll. A step asks the feed once for all of its rows, so it starves as a
//! whole or not at all; then it adds up the gradients of its micro-batches, looks for anything that is
//! not finite, and only then touches weights and moments.

use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Feed, Progress, check_weights, problems};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::ModelConfig;
use atoll_core::training::{AdamW, Muon};

use crate::layout::Layout;
use crate::llama::{Directions, Llama, Output, Windows};
use crate::optimizer::{Moments, Settings, clip_factor, squares};
use crate::pool::Pool;
use crate::words::Precision;

/// How an engine trains.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The model.
    pub model: ModelConfig,
    /// The inner optimizer.
    pub optimizer: AdamW,
    /// If set, the optimizer of the layers' matrices.
    pub muon: Option<Muon>,
    /// What operands of matrix products are rounded to.
    pub precision: Precision,
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Micro-batches of an inner step.
    pub accumulate: usize,
    /// Threads; 0 takes one per core. Results do not depend on it.
    pub threads: usize,
}

/// Trains a Llama on the CPU.
pub struct CpuEngine {
    options: Options,
    manifest: Manifest,
    pool: Pool,
    feed: Box<dyn Feed>,
    llama: Llama,
    weights: Vec<f32>,
    /// In which directions `llama` has the present weights packed.
    packed: Option<Directions>,
    gradient: Vec<f32>,
    moments: Moments,
    /// The present step's rows.
    batch: Batch,
}

/// A loss and its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// Mean loss per token in nats.
    pub loss: f64,
    /// One vector per tensor, in the manifest's order.
    pub tensors: Vec<Vec<f32>>,
}

impl CpuEngine {
    /// An engine with the weights `fragments`, one vector per fragment as [`Manifest::gather`] makes
    /// them, that trains on what `feed` gives.
    ///
    /// # Errors
    /// [`EngineError::Device`] if the options are unsound or the manifest describes another model;
    /// [`EngineError::Layout`] if the weights do not fit the manifest.
    pub fn new(
        options: Options,
        manifest: Manifest,
        fragments: Vec<Vec<f32>>,
        feed: Box<dyn Feed>,
    ) -> Result<Self, EngineError> {
        check(&options, &manifest)?;
        check_weights(&manifest, &fragments)?;
        let layout = Layout::by_fragment(&options.model, &manifest);
        let mut weights = Vec::with_capacity(manifest.parameters());
        fragments.into_iter().for_each(|part| weights.extend(part));
        let pool = Pool::new(options.threads);
        Ok(Self {
            llama: Llama::new(&options.model, layout, options.precision, &pool),
            packed: None,
            pool,
            gradient: vec![0.0; weights.len()],
            moments: Moments::new(weights.len()),
            batch: Batch::default(),
            options,
            manifest,
            feed,
            weights,
        })
    }

    /// Inner steps that this engine has taken.
    pub fn steps(&self) -> u64 {
        self.moments.steps
    }

    /// Loss and gradient of the present weights on `batch`, to compare with other frameworks.
    ///
    /// # Errors
    /// [`EngineError::Data`] if the batch does not fit the model.
    pub fn gradients(&mut self, batch: &Batch) -> Result<Gradients, EngineError> {
        let nats = self.accumulate(batch, batch.rows)?;
        let tensors = self.llama.layout.tensors.iter().map(|place| self.gradient[place.clone()].to_vec()).collect();
        Ok(Gradients { loss: nats / (batch.rows * batch.length) as f64, tensors })
    }

    /// What each module gave for the last micro-batch, in the order of computing, to compare with other frameworks.
    pub fn outputs(&self) -> Vec<Output> {
        self.llama.outputs(&self.weights)
    }

    /// One inner step; returns the tokens and their summed loss.
    fn step(&mut self) -> Result<(u64, f64), EngineError> {
        let mut batch = std::mem::take(&mut self.batch);
        let result = self.step_on(&mut batch);
        self.batch = batch;
        result
    }

    fn step_on(&mut self, batch: &mut Batch) -> Result<(u64, f64), EngineError> {
        self.feed.next(self.options.rows * self.options.accumulate, batch)?;
        let nats = self.accumulate(batch, self.options.rows)?;
        let norm = self.finite_norm(nats)?;
        let Self { options, pool, llama, manifest, weights, gradient, moments, .. } = self;
        let clip = clip_factor(options.optimizer.clip_norm, norm);
        let tensors = (manifest.tensors(), llama.layout.tensors.as_slice());
        let Options { optimizer, muon, precision, .. } = options;
        let settings = Settings { optimizer, muon: muon.as_ref(), precision: *precision };
        moments.step(pool, settings, (batch.progress, clip), tensors, weights, gradient);
        self.packed = None;
        Ok(((batch.rows * batch.length) as u64, nats))
    }

    /// Writes the gradient of the mean loss of `batch`, `rows` rows at a time; returns the summed loss.
    fn accumulate(&mut self, batch: &Batch, rows: usize) -> Result<f64, EngineError> {
        batch.check(&self.options.model)?;
        self.pack(Directions::Both);
        let Self { pool, llama, weights, gradient, .. } = self;
        let scale = 1.0 / (batch.rows * batch.length) as f32;
        pool.each(gradient.chunks_mut(1 << 16), |gradient| gradient.fill(0.0));
        let mut nats = 0.0;
        for windows in micro_batches(batch, rows) {
            nats += llama.nats_and_gradient(pool, weights, windows, scale, gradient);
            // What is lost is refused later; the activations that lost it stay to be looked at.
            if !nats.is_finite() {
                break;
            }
        }
        Ok(nats)
    }

    /// Norm of the gradient, if the loss and every tensor's gradient are finite.
    fn finite_norm(&self, nats: f64) -> Result<f64, EngineError> {
        let refuse = |what: &str| EngineError::NonFinite { what: what.to_string(), step: self.steps() + 1 };
        if !nats.is_finite() {
            let origin = self.llama.first_non_finite().unwrap_or_else(|| "the logits".to_string());
            return Err(refuse(&format!("the loss (first {origin})")));
        }
        let Self { pool, gradient, llama, .. } = self;
        let squares = squares(pool, gradient, &llama.layout.tensors);
        match squares.iter().position(|square| !square.is_finite()) {
            Some(tensor) => Err(refuse(&format!("the gradient of {}", self.manifest.tensors()[tensor].name))),
            None => Ok(squares.iter().sum::<f64>().sqrt()),
        }
    }

    /// The weights of `fragment`, if there are `len` of them.
    fn fragment(&mut self, fragment: FragmentId, len: usize) -> Result<&mut [f32], EngineError> {
        let place = self.llama.layout.fragments.get(fragment.index()).filter(|place| place.len() == len);
        let place = place.ok_or(EngineError::Layout { fragment, len })?;
        Ok(&mut self.weights[place.clone()])
    }

    /// Packs the present weights, unless that was done since they changed.
    fn pack(&mut self, directions: Directions) {
        if self.packed < Some(directions) {
            self.llama.pack(&self.pool, &self.weights, directions);
            self.packed = Some(directions);
        }
    }
}

impl Engine for CpuEngine {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        Progress::of(steps, || self.step())
    }

    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        weights.copy_from_slice(self.fragment(fragment, weights.len())?);
        Ok(())
    }

    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError> {
        self.fragment(fragment, weights.len())?.copy_from_slice(weights);
        self.packed = None;
        Ok(())
    }

    fn add(&mut self, fragment: FragmentId, change: &[f32]) -> Result<(), EngineError> {
        atoll_core::delta::add(self.fragment(fragment, change.len())?, change);
        self.packed = None;
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        batch.check(&self.options.model)?;
        self.pack(Directions::Forward);
        let Self { options, pool, llama, weights, .. } = self;
        let nats = micro_batches(batch, options.rows).map(|windows| llama.nats(pool, weights, windows)).sum();
        Ok(Evaluation { nats, tokens: (batch.rows * batch.length) as u64 })
    }
}

/// `batch` in pieces of at most `rows` rows.
fn micro_batches(batch: &Batch, rows: usize) -> impl Iterator<Item = Windows<'_>> {
    let length = batch.length;
    let pieces = batch.micro_batches(rows);
    pieces.map(move |(tokens, starts)| Windows { rows: tokens.len() / (length + 1), length, tokens, starts })
}

fn check(options: &Options, manifest: &Manifest) -> Result<(), EngineError> {
    let Options { model, optimizer, muon, rows, accumulate, .. } = options;
    let problems = problems(manifest, model, optimizer, muon.as_ref(), *rows, *accumulate);
    if problems.is_empty() { Ok(()) } else { Err(EngineError::Device(problems.join("\n"))) }
}
