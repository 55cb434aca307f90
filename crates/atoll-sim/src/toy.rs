//! An engine without a network or a language: each sample is a noisy look at a fixed target, and a
//! step moves the weights a little towards what its samples show. It has the same interface, the
//! same determinism and the same failure modes as a real engine, in a microsecond.

mod toys;

pub use toys::{ToyFeed, Toys};

use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Feed, Progress};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::{Tensor, TensorKind};
use atoll_core::rng::{Rng, mix};

/// Tokens per sample.
pub const CONTEXT: usize = 4;
/// Samples per inner step.
pub const ROWS: usize = 2;

/// The toy engine.
pub struct Toy {
    manifest: Manifest,
    nature: Nature,
    fragments: Vec<Vec<f32>>,
    feed: Box<dyn Feed>,
    batch: Batch,
    steps: u64,
}

/// The toy's layout: 136 weights of all kinds in `fragments` fragments.
pub fn manifest(fragments: usize) -> Manifest {
    let tensors = vec![
        Tensor::new("embed", &[16, 4], TensorKind::Embedding),
        Tensor::new("matrix", &[8, 8], TensorKind::Matrix),
        Tensor::new("gain", &[4], TensorKind::Vector),
        Tensor::new("bias", &[4], TensorKind::Vector),
    ];
    Manifest::balanced(tensors, fragments)
}

/// What all samples show on average: weight `index` of `fragment`.
pub fn target(fragment: usize, index: usize) -> f32 {
    (mix((fragment as u64) << 32 | index as u64) % 2000) as f32 / 1000.0 - 1.0
}

/// What one site's samples show and how fast its toy believes them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nature {
    /// Sites with equal keys lean the same way.
    pub key: u64,
    /// What samples show lies beside the common target by a fixed amount for each weight, of at most this
    /// size; 0 for data that show the target itself.
    pub lean: f32,
    /// Share of the way to what a sample shows that it moves the weights.
    pub learning_rate: f32,
}

impl Default for Nature {
    fn default() -> Self {
        Self { key: 0, lean: 0.0, learning_rate: 0.1 }
    }
}

impl Nature {
    /// What its samples show on average: weight `index` of `fragment`.
    pub fn target(self, fragment: usize, index: usize) -> f32 {
        let noise = mix(mix(self.key) ^ ((fragment as u64) << 32 | index as u64)) % 2000;
        target(fragment, index) + self.lean * (noise as f32 / 1000.0 - 1.0)
    }
}

/// Mean distance of `fragments` from the weighted mean of what sites of these natures see.
pub fn error(fragments: &[Vec<f32>], sites: &[(f64, Nature)]) -> f64 {
    let total: f64 = sites.iter().map(|(weight, _)| weight).sum();
    let wanted = |fragment, index| {
        let shown = sites.iter().map(|(weight, nature)| weight * f64::from(nature.target(fragment, index)));
        shown.sum::<f64>() / total
    };
    let distances = fragments.iter().enumerate().flat_map(|(fragment, weights)| {
        weights.iter().enumerate().map(move |(index, &weight)| (f64::from(weight) - wanted(fragment, index)).abs())
    });
    distances.sum::<f64>() / fragments.iter().map(Vec::len).sum::<usize>() as f64
}

/// What a model loses on fresh samples of the common target: half the mean squared miss, with what of it no model can know.
pub fn loss(fragments: &[Vec<f32>]) -> f64 {
    const UNKNOWABLE: f64 = 0.2 * 0.2 / 12.0;
    let misses = fragments.iter().enumerate().flat_map(|(fragment, weights)| {
        weights.iter().enumerate().map(move |(index, weight)| f64::from(weight - target(fragment, index)))
    });
    let count = fragments.iter().map(Vec::len).sum::<usize>() as f64;
    0.5 * (misses.map(|miss| miss * miss).sum::<f64>() / count + UNKNOWABLE)
}

impl Toy {
    /// An engine with zero weights, of that nature.
    pub fn new(manifest: Manifest, nature: Nature, feed: Box<dyn Feed>) -> Self {
        let fragments = manifest.zeros();
        Self { manifest, nature, fragments, feed, batch: Batch::default(), steps: 0 }
    }

    fn fits(&self, fragment: FragmentId, len: usize) -> Result<usize, EngineError> {
        let fits = self.manifest.fragment_len(fragment) == Some(len);
        if fits { Ok(fragment.index()) } else { Err(EngineError::Layout { fragment, len }) }
    }

    /// Summed loss of `row`, and if asked the step towards what it shows.
    fn look(fragments: &mut [Vec<f32>], nature: Nature, row: &[u32], learn: f32) -> f64 {
        let seed = row.iter().fold(7u64, |seed, &token| mix(seed ^ u64::from(token)));
        let mut rng = Rng::new(seed);
        let mut loss = 0.0;
        for (fragment, weights) in fragments.iter_mut().enumerate() {
            for (index, weight) in weights.iter_mut().enumerate() {
                let seen = nature.target(fragment, index) + (rng.unit() as f32 - 0.5) * 0.2;
                let miss = *weight - seen;
                loss += 0.5 * f64::from(miss * miss);
                *weight -= learn * miss;
            }
        }
        loss
    }
}

impl Engine for Toy {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        let mut progress = Progress::default();
        for _ in 0..steps {
            self.feed.next(ROWS, &mut self.batch)?;
            let (rows, learn) = (self.batch.tokens.chunks(CONTEXT + 1), self.nature.learning_rate);
            let losses = rows.map(|row| Self::look(&mut self.fragments, self.nature, row, learn));
            let loss = losses.sum::<f64>() / ROWS as f64;
            self.steps += 1;
            if !loss.is_finite() {
                return Err(EngineError::NonFinite { what: "the loss".into(), step: self.steps });
            }
            progress.steps += 1;
            progress.tokens += (ROWS * CONTEXT) as u64;
            progress.loss += (loss - progress.loss) / f64::from(progress.steps);
        }
        Ok(progress)
    }

    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        let index = self.fits(fragment, weights.len())?;
        weights.copy_from_slice(&self.fragments[index]);
        Ok(())
    }

    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError> {
        let index = self.fits(fragment, weights.len())?;
        self.fragments[index].copy_from_slice(weights);
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        let rows = batch.tokens.chunks(batch.length + 1);
        let nats = rows.map(|row| Self::look(&mut self.fragments, self.nature, row, 0.0)).sum();
        Ok(Evaluation { nats, tokens: (batch.rows * batch.length) as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::engine::conformance;

    /// Counts upwards for ever.
    struct Counter(u32);

    impl Feed for Counter {
        fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
            let start = self.0;
            self.0 += (rows * (CONTEXT + 1)) as u32;
            *batch = Batch { rows, length: CONTEXT, tokens: (start..self.0).collect(), ..Batch::default() };
            Ok(())
        }
    }

    #[test]
    fn the_toy_is_an_engine() {
        let batch = Batch { rows: 1, length: CONTEXT, tokens: vec![1; CONTEXT + 1], ..Batch::default() };
        let mut make = || Box::new(Toy::new(manifest(3), Nature::default(), Box::new(Counter(0)))) as Box<dyn Engine>;
        assert_eq!(conformance::check(&mut make, &batch), Ok(()));
    }
}
