//! The native engine for Python: to compare others with it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use atoll_core::engine::Engine;
use atoll_core::manifest::FragmentId;
use atoll_cpu::{CpuEngine, Options, Precision};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use crate::batches::{Batches, PyBatch, from_numpy};
use crate::fault::to_python;
use crate::run::Run;

/// Names and arrays.
type Named<'py, Array> = Vec<(String, Bound<'py, Array>)>;
/// Loss, outputs of modules, gradients of tensors.
type Traced<'py> = (f64, Named<'py, PyArray2<f32>>, Named<'py, PyArray1<f32>>);

/// The engine that trains on the CPU without Python, in fp32.
#[pyclass(frozen, module = "atoll")]
pub(crate) struct NativeEngine(Mutex<CpuEngine>);

#[pymethods]
impl NativeEngine {
    /// An engine with weights of zero that trains on `batches`, for a run of this model and training (JSON).
    #[new]
    #[pyo3(signature = (model, training, fragments, batches, threads = 1))]
    fn new(model: &str, training: &str, fragments: usize, batches: &Batches, threads: usize) -> PyResult<Self> {
        let Run { model, training, manifest, rows, .. } = Run::parse(model, training, fragments)?;
        let options = Options {
            model,
            optimizer: training.optimizer,
            muon: training.muon,
            precision: Precision::F32,
            rows,
            accumulate: training.accumulate,
            threads,
        };
        let weights = manifest.zeros();
        let engine = CpuEngine::new(options, manifest, weights, batches.take()).map_err(|error| to_python(&error))?;
        Ok(Self(Mutex::new(engine)))
    }

    /// Takes inner steps; tokens and mean loss.
    fn train(&self, py: Python<'_>, steps: u32) -> PyResult<(u64, f64)> {
        let progress = py.detach(|| self.lock().train(steps)).map_err(|error| to_python(&error))?;
        Ok((progress.tokens, progress.loss))
    }

    /// The weights of a fragment.
    fn read<'py>(&self, py: Python<'py>, fragment: u16) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let fragment = FragmentId(fragment);
        let mut engine = self.lock();
        let mut weights = vec![0.0; engine.manifest().fragment_len(fragment).unwrap_or(0)];
        engine.read(fragment, &mut weights).map_err(|error| to_python(&error))?;
        Ok(PyArray1::from_vec(py, weights))
    }

    /// Replaces the weights of a fragment.
    fn write(&self, fragment: u16, weights: PyReadonlyArray1<'_, f32>) -> PyResult<()> {
        self.lock().write(FragmentId(fragment), weights.as_slice()?).map_err(|error| to_python(&error))
    }

    /// Summed loss in nats of `(B, T+1)` tokens.
    fn evaluate(&self, tokens: PyReadonlyArray2<'_, i64>) -> PyResult<f64> {
        let batch = from_numpy(&tokens, 0.0)?;
        self.lock().evaluate(&batch).map(|evaluation| evaluation.nats).map_err(|error| to_python(&error))
    }

    /// Everything that a step on `batch` computes before the optimizer: the mean loss, each module's output `(N, width)`
    /// in the order of computing, and each tensor's gradient, flat.
    fn trace<'py>(&self, py: Python<'py>, batch: &PyBatch) -> PyResult<Traced<'py>> {
        let batch = batch.to_rust(py)?;
        let tokens = batch.rows * batch.length;
        let (gradients, outputs, names) = py
            .detach(|| {
                let mut engine = self.lock();
                let gradients = engine.gradients(&batch)?;
                let names: Vec<String> = engine.manifest().tensors().iter().map(|tensor| tensor.name.clone()).collect();
                Ok((gradients, engine.outputs(), names))
            })
            .map_err(|error| to_python(&error))?;
        let output = |output: atoll_cpu::Output| {
            let width = output.values.len() / tokens;
            Ok((output.module, PyArray1::from_vec(py, output.values).reshape([tokens, width])?))
        };
        let gradient = |(name, values)| (name, PyArray1::from_vec(py, values));
        Ok((
            gradients.loss,
            outputs.into_iter().map(output).collect::<PyResult<_>>()?,
            names.into_iter().zip(gradients.tensors).map(gradient).collect(),
        ))
    }
}

impl NativeEngine {
    /// A panic inside a step leaves weights that were not yet touched.
    fn lock(&self) -> MutexGuard<'_, CpuEngine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
