//! Sites in the test's own process, with engines of which the test says what a step does.

use std::path::PathBuf;

use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Feed, Progress};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_node::identity::Ticket;
use atoll_node::site::{Parts, SiteOptions};

use super::Lab;

/// An engine whose weights lie in memory and begin with zero. Its script is given the number of the step, from 1, and the weights.
pub struct Scripted<S> {
    manifest: Manifest,
    feed: Box<dyn Feed>,
    pub weights: Vec<Vec<f32>>,
    steps: u64,
    script: S,
}

impl<S> Scripted<S> {
    pub fn new(Parts { manifest, feed, .. }: Parts, script: S) -> Self {
        Self { weights: manifest.zeros(), manifest, feed, steps: 0, script }
    }
}

impl<S: FnMut(u64, &mut [Vec<f32>]) -> Result<(), EngineError> + Send> Engine for Scripted<S> {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        let mut batch = Batch::default();
        for _ in 0..steps {
            self.feed.next(4, &mut batch)?;
            (self.script)(self.steps + 1, &mut self.weights)?;
            self.steps += 1;
        }
        Ok(Progress { steps, tokens: u64::from(steps) * (batch.rows * batch.length) as u64, loss: 1.0 })
    }

    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        weights.copy_from_slice(&self.weights[fragment.index()]);
        Ok(())
    }

    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError> {
        self.weights[fragment.index()].copy_from_slice(weights);
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        Ok(Evaluation { nats: 1.0, tokens: (batch.rows * batch.length) as u64 })
    }
}

impl Lab {
    /// The options of a site that runs in this process.
    pub fn site_options(&self, site: &str) -> SiteOptions {
        SiteOptions {
            dir: PathBuf::from(self.path(site)),
            ticket: Ticket::from_text(&self.ticket(site)).unwrap(),
            data: Some(PathBuf::from(self.path("text"))),
            rows: None,
            threads: 1,
            share: 1.0,
            streams: 1,
            engine: site.to_string(),
            device: "none".into(),
        }
    }
}
