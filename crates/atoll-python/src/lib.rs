//! Atoll's site machinery inside a Python process: a Python object is an engine.
//!
//! ```text
//! network threads ──▶ the site's loop (atoll-node) ──Engine──▶ PyEngine ──▶ a Python object, such as atoll.TorchEngine
//!  no interpreter       no interpreter                          attached: only here
//! ```
//!
//! The package `atoll` in `python/` says when the loop runs and what trains; here is what it cannot say itself.
#![allow(clippy::needless_pass_by_value, reason = "arguments from Python come by value")]

mod batches;
mod engine;
mod fault;
mod laws;
mod native;
mod run;
mod site;

use pyo3::prelude::*;

#[pymodule]
fn _atoll(module: &Bound<'_, PyModule>) -> PyResult<()> {
    site::log();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("AtollError", module.py().get_type::<fault::AtollError>())?;
    module.add("Starved", module.py().get_type::<fault::Starved>())?;
    module.add("NonFinite", module.py().get_type::<fault::NonFinite>())?;
    module.add_class::<batches::Batches>()?;
    module.add_class::<batches::PyBatch>()?;
    module.add_class::<native::NativeEngine>()?;
    module.add_class::<site::Stop>()?;
    module.add_function(wrap_pyfunction!(site::site_of, module)?)?;
    module.add_function(wrap_pyfunction!(site::run_site, module)?)?;
    module.add_function(wrap_pyfunction!(run::describe, module)?)?;
    module.add_function(wrap_pyfunction!(laws::check_laws, module)?)
}
