//! The text of the comparison, made into a dataset as a site does it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use atoll_core::data::{DatasetId, Permutation};
use atoll_core::engine::{Batch, EngineError, Feed};
use atoll_core::hash::Digest;
use atoll_core::model::ModelConfig;
use atoll_core::training::Packing;
use atoll_node::data::{Dataset, IngestOptions, Sample, Source, Split, TextField, Tokenizer, corpus, ingest};
use atoll_node::site::{HeldOut, held_out_windows};
use atoll_sim::Leases;

use super::rows::{SITES, Share, training};

const PRESET: &str = "nano";
const VOCABULARY: usize = 4096;
/// More than a run holds out, so that small differences are seen.
const HELD_OUT: f64 = 0.05;

/// Every other held-out window is looked at.
const HELD_OUT_STRIDE: usize = 2;

/// A dataset, its held-out windows, and the model that learns it.
pub(super) struct Text {
    pub(super) what: String,
    pub(super) model: ModelConfig,
    pub(super) context: usize,
    pub(super) held_out: HeldOut,
    dataset: Arc<Dataset>,
    /// Where the shards lie while they are mapped.
    _folder: tempfile::TempDir,
}

impl Text {
    /// Trains a tokenizer on the text at `wish` and makes shards of it.
    pub(super) fn read(wish: Option<&Path>) -> Result<Self> {
        let (path, what) = crate::processes::data(wish);
        let source = match path {
            Some(path) => Source::open(&path)?,
            None => corpus::source()?,
        };
        let tokenizer = Tokenizer::train(&Sample::of(&source, &TextField::default())?, VOCABULARY)?;
        let folder = tempfile::tempdir()?;
        let options = IngestOptions { held_out: HELD_OUT, ..IngestOptions::default() };
        let dataset = ingest(&source, &tokenizer, folder.path(), &options, &mut |_| ControlFlow::Continue(()))?;
        let training = training();
        let context = training.context;
        let model = ModelConfig::preset(PRESET, tokenizer.vocab_size(), context).context("the preset is gone")?;
        let windows = (0..dataset.held_out_samples(context)).step_by(HELD_OUT_STRIDE);
        let held_out = held_out_windows(&dataset, &tokenizer, context, training.packing, training.rows, windows)?;
        let what = format!("{what}, {} tokens to train on", dataset.tokens(Split::Train));
        Ok(Self { what, model, context, held_out, dataset: Arc::new(dataset), _folder: folder })
    }

    /// The windows that site number `site` trains on.
    pub(super) fn part(&self, share: Share, site: usize) -> Part {
        let (all, id) = (self.dataset.samples(self.context), self.dataset.id());
        match share {
            Share::Same => Part { id, first: 0, samples: all },
            Share::Own => {
                let (site, sites) = (site as u64, SITES as u64);
                let (first, end) = (site * all / sites, (site + 1) * all / sites);
                let id = DatasetId(Digest::of_all(&[id.0, Digest::of(&site.to_le_bytes())]));
                Part { id, first, samples: end - first }
            }
        }
    }

    /// Batches of `part`, in the order of `seed`, as `leases` allow.
    pub(super) fn feed(&self, part: Part, leases: Leases, seed: u64, packing: Packing) -> PartFeed {
        let order = (0, Permutation::new(part.samples, seed, part.id, 0));
        PartFeed { dataset: self.dataset.clone(), context: self.context, part, leases, seed, packing, order }
    }
}

/// Some windows of the text, as a dataset of their own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) id: DatasetId,
    first: u64,
    pub(super) samples: u64,
}

/// The batches of one engine.
pub(super) struct PartFeed {
    dataset: Arc<Dataset>,
    context: usize,
    part: Part,
    leases: Leases,
    seed: u64,
    packing: Packing,
    /// The epoch of the last sample and its order.
    order: (u64, Permutation),
}

impl PartFeed {
    /// The window at `position`.
    fn window(&mut self, position: u64) -> u64 {
        let Part { id, first, samples } = self.part;
        let epoch = position / samples;
        if self.order.0 != epoch {
            self.order = (epoch, Permutation::new(samples, self.seed, id, epoch));
        }
        first + self.order.1.sample(position % samples)
    }
}

impl Feed for PartFeed {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let (taken, progress) = self.leases.take(rows)?;
        (batch.rows, batch.length, batch.progress) = (rows, self.context, progress);
        batch.tokens.clear();
        for position in taken.spans().flat_map(|(start, end)| start..end) {
            let window = self.window(position);
            let read = self.dataset.window(Split::Train, window, self.context, &mut batch.tokens);
            read.map_err(|error| EngineError::Data(error.to_string()))?;
        }
        batch.pack(self.packing, self.dataset.end_of_text());
        Ok(())
    }
}
