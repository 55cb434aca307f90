//! The laws that all engines obey, for engines in Python.

use atoll_core::engine::conformance::check;
use atoll_core::engine::{Batch, Engine, Feed, Noise};
use pyo3::prelude::*;

use crate::engine::PyEngine;
use crate::fault::AtollError;
use crate::run::Run;

/// Checks the engines that `make()` returns, equal ones each time, against all laws, on random tokens; raises the
/// first that is broken.
#[pyfunction]
pub(crate) fn check_laws(make: &Bound<'_, PyAny>, model: &str, training: &str, fragments: usize) -> PyResult<()> {
    let first = Run::parse(model, training, fragments)?;
    let (vocab, length) = (first.model.vocab_size, first.training.context);
    let open = || {
        let run = Run::parse(model, training, fragments)?;
        PyEngine::open(make.py(), make.call0()?.unbind(), run, Box::new(Noise::new(9, length, vocab)))
    };
    open()?; // What stands in the way of all engines is raised as it is.
    let mut again = || -> Box<dyn Engine> { Box::new(open().expect("an engine that opened once opens again")) };
    let mut batch = Batch::default();
    let drawn = Noise::new(5, length, vocab).next(first.rows, &mut batch);
    drawn.map_err(|error| AtollError::new_err(error.to_string()))?;
    check(&mut again, &batch).map_err(AtollError::new_err)
}
