//! A device of Burn's as an engine of Atoll. As `atoll-cpu`'s: a step asks the feed once for all of its rows, so it
//! starves as a whole or not at all; adds up the gradients of its micro-batches, looks for anything that is not finite,
//! and only then touches weights and moments.

use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Feed, Progress, check_weights, problems};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::{ModelConfig, Tensor as Description};
use atoll_core::training::{AdamW, Muon};
use burn::tensor::{Tensor, TensorData, Transaction};

use crate::arithmetic::{Precision, matrix, total};
use crate::device::Device;
use crate::llama::{Llama, Windows};
use crate::optimizer::Optimizer;

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
}

/// Trains a Llama on one device.
pub struct BurnEngine {
    options: Options,
    manifest: Manifest,
    device: Device,
    feed: Box<dyn Feed>,
    llama: Llama,
    /// One for each of the manifest's tensors; gains as `(1,D)`.
    weights: Vec<Tensor<2>>,
    optimizer: Optimizer,
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

impl BurnEngine {
    /// An engine on `device` with the weights `fragments`, one vector per fragment as [`Manifest::gather`] makes them,
    /// that trains on what `feed` gives.
    ///
    /// # Errors
    /// [`EngineError::Device`] if the options are unsound, the device cannot multiply in their precision or the manifest
    /// describes another model; [`EngineError::Layout`] if the weights do not fit the manifest.
    pub fn new(
        options: Options,
        device: Device,
        manifest: Manifest,
        fragments: &[Vec<f32>],
        feed: Box<dyn Feed>,
    ) -> Result<Self, EngineError> {
        check(&options, &device, &manifest)?;
        check_weights(&manifest, fragments)?;
        let tensors = manifest.tensors().iter().zip(manifest.scatter(fragments));
        let weights: Vec<Tensor<2>> = tensors.map(|(tensor, values)| upload(tensor, values, &device)).collect();
        let Options { model, optimizer, muon, precision, .. } = &options;
        Ok(Self {
            llama: Llama::new(model, *precision, device.handle()),
            optimizer: Optimizer::new(optimizer.clone(), muon.clone(), *precision, &weights),
            batch: Batch::default(),
            options,
            manifest,
            device,
            feed,
            weights,
        })
    }

    /// Inner steps that this engine has taken.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps
    }

    /// Loss and gradient of the present weights on `batch`, to compare with other frameworks.
    ///
    /// # Errors
    /// [`EngineError::Data`] if the batch does not fit the model, [`EngineError::Device`] if the device fails.
    pub fn gradients(&mut self, batch: &Batch) -> Result<Gradients, EngineError> {
        let (losses, gradient) = self.accumulate(batch)?;
        let nats = sum(&self.device.fetch(losses)?);
        Ok(Gradients { loss: nats / (batch.rows * batch.length) as f64, tensors: self.device.fetch(gradient)? })
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
        let (losses, gradient) = self.accumulate(batch)?;
        let (nats, norm) = self.finite(losses, &gradient)?;
        let clip = self.optimizer.clip(norm);
        self.optimizer.step(batch.progress, clip, self.manifest.tensors(), &mut self.weights, gradient);
        Ok(((batch.rows * batch.length) as u64, nats))
    }

    /// Losses of all tokens, a tensor per micro-batch, and the gradient of their mean.
    fn accumulate(&self, batch: &Batch) -> Result<(Vec<Tensor<2>>, Vec<Tensor<2>>), EngineError> {
        batch.check(&self.options.model)?;
        let share = 1.0 / (batch.rows * batch.length) as f32;
        let (mut all, mut sum) = (Vec::new(), Vec::new());
        for windows in micro_batches(batch, self.options.rows) {
            let (losses, gradient) = self.llama.losses_and_gradient(&self.weights, &windows, share);
            all.push(losses);
            sum = if sum.is_empty() { gradient } else { sum.into_iter().zip(gradient).map(|(a, b)| a + b).collect() };
        }
        Ok((all, sum))
    }

    /// The summed loss and the norm of the gradient, if the loss and every tensor's gradient are finite.
    fn finite(&self, losses: Vec<Tensor<2>>, gradient: &[Tensor<2>]) -> Result<(f64, f64), EngineError> {
        let refuse = |what: String| Err(EngineError::NonFinite { what, step: self.steps() + 1 });
        let count = losses.len();
        let squares = gradient.iter().map(|gradient| total(gradient.clone().square()));
        let numbers = self.device.fetch(losses.into_iter().chain(squares).collect())?;
        let (losses, squares) = numbers.split_at(count);
        let nats = sum(losses);
        if !nats.is_finite() {
            return refuse("the loss".to_string());
        }
        match squares.iter().position(|square| !square[0].is_finite()) {
            Some(tensor) => refuse(format!("the gradient of {}", self.manifest.tensors()[tensor].name)),
            None => Ok((nats, sum(squares).sqrt())),
        }
    }

    /// The tensors of `fragment`, if they have `len` weights.
    fn members(&self, fragment: FragmentId, len: usize) -> Result<Vec<usize>, EngineError> {
        match self.manifest.fragment_len(fragment) {
            Some(wanted) if wanted == len => Ok(self.manifest.places(fragment).map(|place| place.tensor).collect()),
            _ => Err(EngineError::Layout { fragment, len }),
        }
    }

    /// `values`, the weights of `fragment` or changes of them, on the device: with each tensor its index.
    fn scatter(&self, fragment: FragmentId, values: &[f32]) -> Result<Vec<(usize, Tensor<2>)>, EngineError> {
        self.members(fragment, values.len())?;
        let tensors = self.manifest.tensors();
        let places = self.manifest.places(fragment);
        let uploaded = |place: atoll_core::manifest::Place| {
            (place.tensor, upload(&tensors[place.tensor], values[place.range].to_vec(), &self.device))
        };
        Ok(places.map(uploaded).collect())
    }
}

impl Engine for BurnEngine {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        Progress::of(steps, || self.step())
    }

    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        let members = self.members(fragment, weights.len())?;
        let parts = self.device.fetch(members.into_iter().map(|tensor| self.weights[tensor].clone()).collect())?;
        let mut rest = weights;
        for part in parts {
            let (head, tail) = rest.split_at_mut(part.len());
            head.copy_from_slice(&part);
            rest = tail;
        }
        Ok(())
    }

    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError> {
        for (tensor, weights) in self.scatter(fragment, weights)? {
            self.weights[tensor] = weights;
        }
        Ok(())
    }

    fn add(&mut self, fragment: FragmentId, change: &[f32]) -> Result<(), EngineError> {
        for (tensor, change) in self.scatter(fragment, change)? {
            self.weights[tensor].inplace(|weights| weights + change);
        }
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        batch.check(&self.options.model)?;
        let windows = micro_batches(batch, self.options.rows);
        let losses = windows.map(|windows| self.llama.losses(&self.weights, &windows)).collect();
        let nats = sum(&self.device.fetch(losses)?);
        Ok(Evaluation { nats, tokens: (batch.rows * batch.length) as u64 })
    }
}

impl Device {
    /// Copies tensors to the host, in one wait.
    fn fetch(&self, tensors: Vec<Tensor<2>>) -> Result<Vec<Vec<f32>>, EngineError> {
        let failed = |error: &dyn std::fmt::Display| {
            EngineError::Device(format!("{} failed: {error}\nhint: fewer --rows need less memory", self.name()))
        };
        let all = tensors.into_iter().fold(Transaction::default(), Transaction::register);
        let data = all.try_execute().map_err(|error| failed(&error))?;
        data.into_iter().map(|data: TensorData| data.try_into_vec().map_err(|error| failed(&error))).collect()
    }
}

fn upload(tensor: &Description, values: Vec<f32>, device: &Device) -> Tensor<2> {
    let columns = tensor.shape.last().copied().unwrap_or(1);
    let rows = values.len() / columns;
    matrix(values, rows, columns, device.handle())
}

/// In `f64`.
fn sum(numbers: &[Vec<f32>]) -> f64 {
    numbers.iter().flatten().map(|&number| f64::from(number)).sum()
}

/// `batch` in pieces of at most `rows` rows.
fn micro_batches(batch: &Batch, rows: usize) -> impl Iterator<Item = Windows<'_>> {
    let length = batch.length;
    batch.micro_batches(rows).map(move |(tokens, starts)| Windows { length, tokens, starts })
}

fn check(options: &Options, device: &Device, manifest: &Manifest) -> Result<(), EngineError> {
    let Options { model, optimizer, muon, rows, accumulate, precision } = options;
    let mut problems = problems(manifest, model, optimizer, muon.as_ref(), *rows, *accumulate);
    problems.extend(device.check(*precision).err());
    if problems.is_empty() { Ok(()) } else { Err(EngineError::Device(problems.join("\n"))) }
}
