//! What a Python engine is told of the run, as JSON: the model, the training and the layout.

use atoll_core::manifest::Manifest;
use atoll_core::model::{ModelConfig, Tensor};
use atoll_core::training::Training;
use atoll_node::run::Align;
use pyo3::prelude::*;
use serde::Serialize;

use crate::fault::AtollError;

/// A run as far as an engine is concerned.
pub(crate) struct Run {
    pub(crate) model: ModelConfig,
    pub(crate) training: Training,
    pub(crate) manifest: Manifest,
    /// Samples per micro-batch at this site.
    pub(crate) rows: usize,
    /// What the run wants if the engine does not compute what the native one does; nothing where there is no run.
    pub(crate) align: Option<Align>,
}

impl Run {
    /// A run that is not going on anywhere: for tests and comparisons.
    pub(crate) fn parse(model: &str, training: &str, fragments: usize) -> PyResult<Self> {
        let refuse = |what: &str, error: String| AtollError::new_err(format!("{what}: {error}"));
        let model: ModelConfig =
            serde_json::from_str(model).map_err(|error| refuse("this is no model", error.to_string()))?;
        let training: Training =
            serde_json::from_str(training).map_err(|error| refuse("this is no training", error.to_string()))?;
        let problems = [model.problems(), training.problems()].concat();
        if fragments == 0 || !problems.is_empty() {
            return Err(refuse("these settings cannot train", problems.join("; ")));
        }
        let manifest = Manifest::balanced(model.tensors(), fragments);
        Ok(Self { rows: training.rows, model, training, manifest, align: None })
    }

    /// The description: see [`Said`].
    pub(crate) fn to_json(&self) -> String {
        let tensors_of = |fragment| self.manifest.places(fragment).map(|place| place.tensor).collect();
        let said = Said {
            model: &self.model,
            training: &self.training,
            rows: self.rows,
            tensors: self.manifest.tensors(),
            align: self.align,
            fragments: self.manifest.fragments().map(tensors_of).collect(),
        };
        serde_json::to_string(&said).expect("a run is plain data")
    }
}

/// What Python reads. Numbers are written as the operator wrote them: 1e-5, not the nearest f32 in f64.
#[derive(Serialize)]
struct Said<'a> {
    model: &'a ModelConfig,
    training: &'a Training,
    rows: usize,
    tensors: &'a [Tensor],
    align: Option<Align>,
    /// For each fragment its tensors, as indices.
    fragments: Vec<Vec<usize>>,
}

/// The description of a run that is not going on anywhere, from JSON of model and training.
#[pyfunction]
pub(crate) fn describe(model: &str, training: &str, fragments: usize) -> PyResult<String> {
    Run::parse(model, training, fragments).map(|run| run.to_json())
}
