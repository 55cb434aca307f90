//! Errors on their way between Rust and Python: one sentence each way, and what is branched on keeps its kind.

use atoll_core::engine::EngineError;
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(atoll, AtollError, PyException, "Something in a run could not be done; says what and gives a hint.");
create_exception!(atoll, Starved, AtollError, "Fewer samples are leased than asked for.");
create_exception!(atoll, NonFinite, AtollError, "A loss, gradient or weight is NaN or infinite.");

/// An engine's error as Python's.
pub(crate) fn to_python(error: &EngineError) -> PyErr {
    match error {
        EngineError::Starved { .. } => Starved::new_err(error.to_string()),
        EngineError::NonFinite { .. } => NonFinite::new_err(error.to_string()),
        _ => AtollError::new_err(error.to_string()),
    }
}

/// What went wrong outside of the engine, causes and all, as Python's.
pub(crate) fn from_anyhow(error: &anyhow::Error) -> PyErr {
    AtollError::new_err(format!("{error:#}"))
}

/// A Python engine's exception, raised in its method of that name, as an engine's error.
pub(crate) fn to_rust(py: Python<'_>, method: &str, error: &PyErr, wanted: usize) -> EngineError {
    let text = error.value(py).to_string();
    if error.is_instance_of::<Starved>(py) {
        return EngineError::Starved { wanted };
    }
    if error.is_instance_of::<AtollError>(py) {
        return EngineError::Device(text);
    }
    let kind = error.get_type(py).name().map_or_else(|_| "an exception".to_string(), |name| name.to_string());
    let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing more");
    EngineError::Device(format!(
        "the engine's {method}() raised {kind}: {first}\nhint: its traceback says where; once it is mended the same call comes back to the run"
    ))
}
