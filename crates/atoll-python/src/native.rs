//! The native engine for Python: to compare others with it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use atoll_core::engine::Engine;
use atoll_core::manifest::FragmentId;
use atoll_cpu::{CpuEngine, Options, Precision};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use crate::batches::{Batches, from_numpy};
use crate::fault::to_python;
use crate::run::Run;

/// The engine that trains on the CPU without Python, in fp32.
#[pyclass(frozen, module = "atoll")]
pub(crate) struct NativeEngine(Mutex<CpuEngine>);

#[pymethods]
impl NativeEngine {
    /// An engine with weights of zero that trains on `batches`, for a run of this model and training (JSON).
    #[new]
    #[pyo3(signature = (model, training, fragments, batches, threads = 1))]
    fn new(model: &str, training: &str, fragments: usize, batches: &Batches, threads: usize) -> PyResult<Self> {
        let Run { model, training, manifest, rows } = Run::parse(model, training, fragments)?;
        let options = Options {
            model,
            optimizer: training.optimizer,
            muon: training.muon,
            precision: Precision::F32,
            rows,
            accumulate: training.accumulate,
            threads,
        };
        let zeros = |fragment| vec![0.0; manifest.fragment_len(fragment).unwrap_or(0)];
        let weights = manifest.fragments().map(zeros).collect();
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
}

impl NativeEngine {
    /// A panic inside a step leaves weights that were not yet touched.
    fn lock(&self) -> MutexGuard<'_, CpuEngine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
