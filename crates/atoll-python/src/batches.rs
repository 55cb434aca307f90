//! Batches for Python, from the same reader as the native engine's: its tokens as numpy arrays.

use std::sync::{Mutex, PoisonError};

use atoll_core::data::Ranges;
use atoll_core::engine::{Batch, EngineError, Feed, NoFeed};
use atoll_core::training::Packing;
use atoll_node::data::{Dataset, LeasedFeed, Leases};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2};
use pyo3::prelude::*;

use crate::fault::{AtollError, to_python};

/// Where an engine's batches come from: it hands out only what this site holds a lease on.
#[pyclass(frozen, module = "atoll")]
pub(crate) struct Batches(Mutex<Box<dyn Feed>>);

/// Samples for one micro-batch.
#[pyclass(frozen, name = "Batch", module = "atoll", get_all)]
pub(crate) struct PyBatch {
    /// `(B, T+1)`: the first T of a row are inputs, the last T are targets.
    tokens: Py<PyArray2<i64>>,
    /// `(B, T)`: position in its row of the first token that each input may see; None if it may see all before it.
    starts: Option<Py<PyArray2<i64>>>,
    /// How far the run has come, 0 at its start and 1 at its end.
    progress: f32,
}

impl Batches {
    pub(crate) fn new(feed: Box<dyn Feed>) -> Self {
        Self(Mutex::new(feed))
    }

    /// The feed itself, for an engine in Rust.
    pub(crate) fn take(&self) -> Box<dyn Feed> {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), Box::new(NoFeed))
    }
}

#[pymethods]
impl Batches {
    /// The given batches, one after the other; batch i of n is at progress i / n.
    #[staticmethod]
    fn of(tokens: Vec<PyReadonlyArray2<'_, i64>>) -> PyResult<Self> {
        let count = tokens.len() as f32;
        let batches = tokens.iter().zip(0u16..).map(|(tokens, index)| from_numpy(tokens, f32::from(index) / count));
        let batches = batches.collect::<PyResult<Vec<Batch>>>()?;
        Ok(Self::new(Box::new(Listed(batches.into_iter()))))
    }

    /// The first samples of a dataset's first epoch, as if all of them were leased.
    #[staticmethod]
    fn of_dataset(folder: std::path::PathBuf, context: usize, seed: u64, documents: bool) -> PyResult<Self> {
        let refuse = |error: atoll_node::data::DataError| AtollError::new_err(error.to_string());
        let dataset = Dataset::open(&folder).map_err(refuse)?;
        let leases = Leases::new();
        leases.grant(&Ranges::span(0, dataset.samples(context)));
        let packing = if documents { Packing::Documents } else { Packing::Stream };
        let feed = LeasedFeed::new(dataset.into(), leases, seed, context, packing).map_err(refuse)?;
        Ok(Self::new(Box::new(feed)))
    }

    /// The next `rows` leased samples; raises Starved, and consumes none, if there are fewer.
    fn next(&self, py: Python<'_>, rows: usize) -> PyResult<PyBatch> {
        let read = || {
            let mut batch = Batch::default();
            self.0.lock().unwrap_or_else(PoisonError::into_inner).next(rows, &mut batch).map(|()| batch)
        };
        let batch = py.detach(read).map_err(|error| to_python(&error))?;
        PyBatch::new(py, &batch)
    }
}

#[pymethods]
impl PyBatch {
    /// A batch of your own.
    #[new]
    #[pyo3(signature = (tokens, starts = None, progress = 0.0))]
    fn of(tokens: Py<PyArray2<i64>>, starts: Option<Py<PyArray2<i64>>>, progress: f32) -> Self {
        Self { tokens, starts, progress }
    }
}

impl PyBatch {
    /// The batch as engines in Rust read it; they check what it says.
    pub(crate) fn to_rust(&self, py: Python<'_>) -> PyResult<Batch> {
        let mut batch = from_numpy(&self.tokens.bind(py).try_readonly()?, self.progress)?;
        if let Some(starts) = &self.starts {
            batch.starts = words(starts.bind(py).try_readonly()?.as_array().iter())?;
        }
        Ok(batch)
    }

    pub(crate) fn new(py: Python<'_>, batch: &Batch) -> PyResult<Self> {
        let shape = |words: &[u32], width: usize| {
            let words: Vec<i64> = words.iter().map(|&word| i64::from(word)).collect();
            PyArray1::from_vec(py, words).reshape([batch.rows, width]).map(Bound::unbind)
        };
        let starts = (!batch.starts.is_empty()).then(|| shape(&batch.starts, batch.length)).transpose()?;
        Ok(Self { tokens: shape(&batch.tokens, batch.length + 1)?, starts, progress: batch.progress })
    }
}

/// A batch of `(B, T+1)` tokens.
pub(crate) fn from_numpy(tokens: &PyReadonlyArray2<'_, i64>, progress: f32) -> PyResult<Batch> {
    let array = tokens.as_array();
    let (rows, width) = array.dim();
    let tokens = words(array.iter())?;
    if rows == 0 || width < 2 {
        return Err(AtollError::new_err(format!("tokens of shape ({rows}, {width}) have nothing to predict")));
    }
    Ok(Batch { rows, length: width - 1, tokens, progress, ..Batch::default() })
}

fn words<'a>(numbers: impl Iterator<Item = &'a i64>) -> PyResult<Vec<u32>> {
    let word = |&number: &i64| {
        u32::try_from(number)
            .map_err(|_| AtollError::new_err(format!("{number} is no token\nhint: tokens count from 0")))
    };
    numbers.map(word).collect()
}

struct Listed(std::vec::IntoIter<Batch>);

impl Feed for Listed {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        *batch = self.0.next().ok_or(EngineError::Starved { wanted: rows })?;
        Ok(())
    }
}
