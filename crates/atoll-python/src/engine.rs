//! A Python object as an engine. It is asked in Python's words, one call each:
//!
//! ```text
//! open(run, batches)         once; `run` is JSON, `batches` an atoll.Batches
//! staging(length)            host memory, a float32 numpy array of that length; pinned where the device has that
//! train(steps)               -> (tokens, mean loss in nats)
//! read(fragment, weights)    fills `weights`
//! write(fragment, weights)   takes `weights` over
//! add(fragment, change)      adds `change`
//! evaluate(batch)            -> summed loss in nats
//! ```
//!
//! Arrays are views of the staging, which is as long as the largest fragment and is used again and again. The
//! interpreter is held while one of these runs, and by nothing else.

use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Feed, Progress};
use atoll_core::manifest::{FragmentId, Manifest};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PySlice;

use crate::batches::{Batches, PyBatch};
use crate::fault::{AtollError, to_rust};
use crate::run::Run;

pub(crate) struct PyEngine {
    object: Py<PyAny>,
    manifest: Manifest,
    staging: Py<PyArray1<f32>>,
    /// Samples of an inner step.
    samples: usize,
}

impl PyEngine {
    /// Opens `object` for a run.
    ///
    /// # Errors
    /// What the object raised.
    pub(crate) fn open(py: Python<'_>, object: Py<PyAny>, run: Run, feed: Box<dyn Feed>) -> PyResult<Self> {
        let engine = object.bind(py);
        engine.call_method1("open", (run.to_json(), Batches::new(feed)))?;
        let lens = run.manifest.fragments().filter_map(|fragment| run.manifest.fragment_len(fragment));
        let largest = lens.max().unwrap_or(0);
        let staging = engine.call_method1("staging", (largest,))?;
        let staging = staging.cast_into::<PyArray1<f32>>().ok().filter(|array| array.len().is_ok_and(|n| n == largest));
        let staging = staging.ok_or_else(|| {
            AtollError::new_err(format!("the engine's staging({largest}) is no float32 array of that length"))
        })?;
        let samples = run.rows * run.training.accumulate;
        Ok(Self { staging: staging.unbind(), object, manifest: run.manifest, samples })
    }

    /// Calls a method with the first `len` weights of the staging: filled from `give` before, copied to `take` after.
    fn exchange(
        &mut self,
        method: &str,
        fragment: FragmentId,
        len: usize,
        give: Option<&[f32]>,
        take: Option<&mut [f32]>,
    ) -> Result<(), EngineError> {
        if self.manifest.fragment_len(fragment) != Some(len) {
            return Err(EngineError::Layout { fragment, len });
        }
        let exchange = |py: Python<'_>| -> PyResult<()> {
            let view = self.staging.bind(py).get_item(PySlice::new(py, 0, len as isize, 1))?;
            let view = view.cast_into::<PyArray1<f32>>()?;
            if let Some(give) = give {
                let mut memory = view.try_readwrite()?;
                let memory = memory.as_slice_mut()?;
                py.detach(|| memory.copy_from_slice(give));
            }
            self.object.bind(py).call_method1(method, (fragment.0, &view))?;
            if let Some(take) = take {
                let memory = view.try_readonly()?;
                let memory = memory.as_slice()?;
                py.detach(|| take.copy_from_slice(memory));
            }
            Ok(())
        };
        Python::attach(|py| exchange(py).map_err(|error| to_rust(py, method, &error, self.samples)))
    }
}

impl Engine for PyEngine {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        let train = |py: Python<'_>| self.object.bind(py).call_method1("train", (steps,))?.extract::<(u64, f64)>();
        let result = Python::attach(|py| train(py).map_err(|error| to_rust(py, "train", &error, self.samples)));
        let (tokens, loss) = result?;
        Ok(Progress { steps, tokens, loss })
    }

    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        self.exchange("read", fragment, weights.len(), None, Some(weights))
    }

    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError> {
        self.exchange("write", fragment, weights.len(), Some(weights), None)
    }

    fn add(&mut self, fragment: FragmentId, change: &[f32]) -> Result<(), EngineError> {
        self.exchange("add", fragment, change.len(), Some(change), None)
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        let evaluate = |py: Python<'_>| {
            self.object.bind(py).call_method1("evaluate", (PyBatch::new(py, batch)?,))?.extract::<f64>()
        };
        let nats = Python::attach(|py| evaluate(py).map_err(|error| to_rust(py, "evaluate", &error, 0)))?;
        Ok(Evaluation { nats, tokens: (batch.rows * batch.length) as u64 })
    }
}
