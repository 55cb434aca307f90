//! A world full of toys.

use atoll_core::data::DatasetId;
use atoll_core::engine::{Batch, EngineError, Feed};
use atoll_core::manifest::Manifest;

use super::{CONTEXT, Nature, Toy, error, loss, manifest};
use crate::{Description, Habitat, Inhabitant, Leases};

/// A toy's feed: a sample's tokens are its position and its dataset, told in numbers.
pub struct ToyFeed {
    leases: Leases,
    salt: u32,
}

impl ToyFeed {
    /// The samples of `dataset` that `leases` allow, lowest first.
    pub fn new(leases: Leases, dataset: DatasetId) -> Self {
        Self { leases, salt: u32::from(dataset.0.0[0]) << 24 }
    }
}

impl Feed for ToyFeed {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let (taken, progress) = self.leases.take(rows)?;
        let positions = taken.spans().flat_map(|(start, end)| start..end);
        let tokens = positions.flat_map(|p| (0..=CONTEXT as u32).map(move |i| (p as u32) << 3 | i));
        batch.tokens = tokens.map(|token| token ^ self.salt).collect();
        (batch.rows, batch.length, batch.progress) = (rows, CONTEXT, progress);
        Ok(())
    }
}

/// Toys, one per site, each of its nature. Their model is perfect when it is the mean of what they
/// see, weighted by the tokens that each got into it.
pub struct Toys {
    manifest: Manifest,
    sites: Vec<(DatasetId, Nature)>,
    /// Whether the coordinator has text of the common target, to try contributions on.
    tries: bool,
}

impl Toys {
    /// Toys for the sites of `description`, of as many natures.
    pub fn new(description: &Description, natures: Vec<Nature>) -> Self {
        let datasets = description.sites.iter().map(|site| site.dataset);
        Self { manifest: manifest(description.sync.fragments), sites: datasets.zip(natures).collect(), tries: false }
    }

    /// The coordinator tries contributions, if so.
    pub fn trying(self, tries: bool) -> Self {
        Self { tries, ..self }
    }
}

impl Habitat for Toys {
    fn manifest(&self) -> Manifest {
        self.manifest.clone()
    }

    fn first_weights(&self) -> Vec<Vec<f32>> {
        self.manifest.zeros()
    }

    fn start(&mut self, site: usize) -> Result<Inhabitant, EngineError> {
        let (dataset, nature) = self.sites[site];
        let leases = Leases::new();
        let feed = ToyFeed::new(leases.clone(), dataset);
        Ok(Inhabitant { engine: Box::new(Toy::new(self.manifest.clone(), nature, Box::new(feed))), leases })
    }

    fn trial(&mut self, theta: &[Vec<f32>]) -> Option<f64> {
        self.tries.then(|| loss(theta))
    }

    fn error(&mut self, theta: &[Vec<f32>], tokens: &[u64]) -> Result<f64, EngineError> {
        let weighted = tokens.iter().zip(&self.sites).map(|(&tokens, (_, nature))| (tokens as f64, *nature));
        Ok(error(theta, &weighted.collect::<Vec<_>>()))
    }
}
