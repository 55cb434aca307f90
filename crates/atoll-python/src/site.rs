//! A site's whole life in one call, on the thread that makes it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use atoll_core::engine::Engine;
use atoll_node::identity::Ticket;
use atoll_node::site::{Parts, SiteOptions, join};
use pyo3::prelude::*;

use crate::engine::PyEngine;
use crate::fault::{from_anyhow, to_rust};
use crate::run::Run;

/// A flag that makes a site leave its run after the present step.
#[pyclass(frozen, module = "atoll")]
#[derive(Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

#[pymethods]
impl Stop {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Warnings of the site's threads go to standard error.
pub(crate) fn log() {
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN);
    // A process that embeds Atoll twice has one log.
    let _ = subscriber.with_target(false).with_writer(std::io::stderr).try_init();
}

/// The name of the site that a ticket was issued to.
#[pyfunction]
pub(crate) fn site_of(ticket: &str) -> PyResult<String> {
    Ticket::from_text(ticket).map(|ticket| ticket.site.to_string()).map_err(|error| from_anyhow(&error))
}

/// Joins a run with a Python object as the engine, and trains until the run is finished (true) or the site has
/// left it (false). `notice` is told what is going on before training starts.
#[pyfunction]
#[pyo3(signature = (ticket, engine, stop, notice, *, dir, data, rows, threads, streams, device))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
pub(crate) fn run_site(
    py: Python<'_>,
    ticket: &str,
    engine: Py<PyAny>,
    stop: &Stop,
    notice: Py<PyAny>,
    dir: PathBuf,
    data: Option<PathBuf>,
    rows: Option<usize>,
    threads: usize,
    streams: usize,
    device: String,
) -> PyResult<bool> {
    let ticket = Ticket::from_text(ticket).map_err(|error| from_anyhow(&error))?;
    let engine_name = "torch".to_string();
    let options = SiteOptions { dir, ticket, data, rows, threads, share: 1.0, streams, engine: engine_name, device };
    let stop = stop.0.clone();
    let make = |parts| Python::attach(|py| make_engine(py, engine, parts));
    let mut say = |line: &str| {
        Python::attach(|py| {
            if let Err(error) = notice.call1(py, (line,)) {
                error.write_unraisable(py, None);
            }
        });
    };
    let ending = py.detach(|| join(&options, make, &stop, &mut say)).map_err(|error| from_anyhow(&error))?;
    Ok(ending == atoll_core::round::Stop::Finished)
}

fn make_engine(py: Python<'_>, object: Py<PyAny>, parts: Parts) -> Result<Box<dyn Engine>> {
    let Parts { terms, manifest, rows, feed } = parts;
    let run =
        Run { model: terms.model, training: terms.config.training, manifest, rows, align: Some(terms.config.align) };
    let engine = PyEngine::open(py, object, run, feed).map_err(|error| to_rust(py, "open", &error, 0))?;
    Ok(Box::new(engine))
}
