//! The laws that all engines obey, for engines in Python.

use atoll_core::engine::conformance::check;
use atoll_core::engine::{Batch, Engine, EngineError, Feed};
use atoll_core::rng::Rng;
use pyo3::prelude::*;

use crate::engine::PyEngine;
use crate::fault::AtollError;
use crate::run::Run;

/// Checks the engines that `make()` returns, equal ones each time, against all laws, on random tokens; raises the
/// first that is broken.
#[pyfunction]
pub(crate) fn check_laws(make: &Bound<'_, PyAny>, model: &str, training: &str, fragments: usize) -> PyResult<()> {
    let first = Run::parse(model, training, fragments)?;
    let (vocab, length) = (first.model.vocab_size as u64, first.training.context);
    let open = || {
        let feed = Random { rng: Rng::new(9), length, vocab };
        let run = Run::parse(model, training, fragments)?;
        PyEngine::open(make.py(), make.call0()?.unbind(), run, Box::new(feed))
    };
    open()?; // What stands in the way of all engines is raised as it is.
    let mut again = || -> Box<dyn Engine> { Box::new(open().expect("an engine that opened once opens again")) };
    let mut batch = Batch::default();
    let mut random = Random { rng: Rng::new(5), length, vocab };
    random.next(first.rows, &mut batch).map_err(|error| AtollError::new_err(error.to_string()))?;
    check(&mut again, &batch).map_err(AtollError::new_err)
}

/// Random tokens without end.
struct Random {
    rng: Rng,
    length: usize,
    vocab: u64,
}

impl Feed for Random {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let tokens = (0..rows * (self.length + 1)).map(|_| self.rng.below(self.vocab) as u32).collect();
        *batch = Batch { rows, length: self.length, tokens, ..Batch::default() };
        Ok(())
    }
}
