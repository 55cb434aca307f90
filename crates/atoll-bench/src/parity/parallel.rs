//! The baseline: synchronous data parallelism, which is one engine whose steps take the rows of all sites.
//! Its time and bytes are calculated: every step waits for the slowest site and for a ring all-reduce of
//! the gradient in f32.

use anyhow::Result;
use atoll_core::data::Ranges;
use atoll_core::engine::{Engine, weights};
use atoll_core::manifest::Manifest;
use atoll_cpu::{CpuEngine, Precision};
use atoll_sim::Leases;

use super::rows::{Row, Share};
use super::sites::{link, step_seconds};
use super::{Run, Setting, held_out_nats, options};

/// The run of `seed` with the rows of `sites` sites in each step.
pub(super) fn run(row: &Row, setting: &Setting, seed: u64, sites: usize) -> Result<Run> {
    let (text, training) = (&setting.text, &row.training);
    let rows = training.rows * sites;
    let tokens_per_step = (rows * training.accumulate * text.context) as u64;
    let steps = setting.tokens.div_ceil(tokens_per_step);
    let manifest = Manifest::balanced(text.model.tensors(), 1);
    let leases = Leases::new();
    leases.grant(&Ranges::span(0, steps * (rows * training.accumulate) as u64));
    let feed = text.feed(text.part(Share::Same, 0), leases.clone(), seed, training.packing);
    let first = manifest.gather(&text.model.initial_weights(seed));
    let options = options(text, training, rows, Precision::best());
    let mut engine = CpuEngine::new(options, manifest.clone(), first, Box::new(feed))?;
    for step in 0..steps {
        leases.set_progress(step as f32 / steps as f32);
        engine.train(1)?;
    }
    let theta = weights(&mut engine)?;
    let bytes = ring_bytes(manifest.parameters(), sites);
    let slowest = row.speeds[..sites].iter().map(|&speed| step_seconds(speed, row)).fold(0.0, f64::max);
    let reduce = bytes / link(row).up + 2.0 * (sites - 1) as f64 * link(row).delay;
    let megabytes = bytes * steps as f64 / 1e6;
    Ok(Run {
        nats: held_out_nats(text, training, &manifest, theta)?,
        tokens: (steps * tokens_per_step) as f64,
        seconds: steps as f64 * (slowest + reduce),
        late_percent: 0.0,
        megabytes_up: megabytes,
        megabytes_down: megabytes,
    })
}

/// Bytes that each of `sites` sends, and receives, to sum a gradient of so many weights in a ring.
fn ring_bytes(parameters: usize, sites: usize) -> f64 {
    2.0 * (sites - 1) as f64 / sites as f64 * 4.0 * parameters as f64
}
