//! A row of sites: real engines in a calm simulated world.

use anyhow::{Result, anyhow};
use atoll_core::engine::EngineError;
use atoll_core::manifest::Manifest;
use atoll_core::rng::{Rng, mix};
use atoll_core::round::Goal;
use atoll_cpu::{CpuEngine, Precision};
use atoll_sim::toy::{self, Nature, Toys};
use atoll_sim::{Description, Habitat, Hardships, Inhabitant, Leases, Link, Presence, Residence};

use super::rows::Row;
use super::text::Text;
use super::{Run, Setting, held_out_nats, options};

/// Seconds per inner step of a site of speed 1 in the row with the usual speeds.
const STEP_SECONDS: f64 = 1.0;
const ROUND_TRIP_SECONDS: f64 = 0.05;

/// What joins every site to the coordinator.
pub(super) fn link(row: &Row) -> Link {
    Link::of(row.megabits, ROUND_TRIP_SECONDS)
}

/// Seconds per inner step of a site of that `speed`; sites of equal speed are as fast together as the usual
/// ones of different speeds.
pub(super) fn step_seconds(speed: f64, row: &Row) -> f64 {
    const USUAL_SPEEDS: f64 = 8.0;
    STEP_SECONDS * row.speeds.iter().sum::<f64>() / USUAL_SPEEDS / speed
}

pub(super) fn run(row: &Row, setting: &Setting, seed: u64) -> Result<Run> {
    let goal = rehearse(row, setting, seed)?;
    let description = describe(row, setting, seed, goal);
    let manifest = Manifest::balanced(setting.text.model.tensors(), row.sync.fragments);
    let mut engines = Engines { row, text: &setting.text, manifest, seed };
    let outcome = atoll_sim::run(description, &mut engines).map_err(|broken| anyhow!(broken))?;
    let sum = |count: fn(&Presence) -> u64| outcome.sites.iter().map(count).sum::<u64>() as f64;
    let megabytes = 1e6 * outcome.sites.len() as f64;
    Ok(Run {
        nats: outcome.error,
        tokens: outcome.tokens as f64,
        seconds: outcome.seconds,
        late_percent: 100.0 * sum(|site| site.late) / sum(|site| site.contributions),
        megabytes_up: sum(|site| site.bytes_up) / megabytes,
        megabytes_down: sum(|site| site.bytes_down) / megabytes,
    })
}

/// The goal with which a run ends nearest to the setting's tokens. What sites have under way when a goal
/// is reached still enters the model; how much that is, toys tell in a moment.
fn rehearse(row: &Row, setting: &Setting, seed: u64) -> Result<u64> {
    const REHEARSALS: usize = 6;
    let (mut goal, mut best) = (setting.tokens, (u64::MAX, setting.tokens));
    for _ in 0..REHEARSALS {
        let tokens = tokens_of_toys(row, setting, seed, goal)?;
        best = best.min((tokens.abs_diff(setting.tokens), goal));
        goal = (goal + setting.tokens).saturating_sub(tokens).max(1);
    }
    Ok(best.1)
}

/// Tokens in the model of toys that have this goal.
fn tokens_of_toys(row: &Row, setting: &Setting, seed: u64, goal: u64) -> Result<u64> {
    let mut description = describe(row, setting, seed, goal);
    // A step of toys has rows of its own; all together it has as many tokens.
    let tokens_per_step = description.context * (row.training.rows * row.training.accumulate) as u64;
    description.context = tokens_per_step / toy::ROWS as u64;
    for site in &mut description.sites {
        (site.samples_per_step, site.link) = (toy::ROWS as u64, Link { delay: site.link.delay, ..Link::INFINITE });
    }
    let mut toys = Toys::new(&description, vec![Nature::default(); description.sites.len()]);
    Ok(atoll_sim::run(description, &mut toys).map_err(|broken| anyhow!(broken))?.tokens)
}

fn describe(row: &Row, setting: &Setting, seed: u64, goal: u64) -> Description {
    let sites = row.speeds.iter().enumerate().map(|(index, &speed)| {
        let part = setting.text.part(row.share, index);
        Residence {
            name: format!("site-{index}").parse().expect("a good name"),
            dataset: part.id,
            samples: part.samples,
            samples_per_step: (row.training.rows * row.training.accumulate) as u64,
            step_seconds: step_seconds(speed, row),
            link: link(row),
        }
    });
    Description {
        chance: Rng::new(mix(seed)),
        sync: row.sync.clone(),
        goal: Goal { tokens: Some(goal), minutes: None },
        context: setting.text.context as u64,
        sites: sites.collect(),
        hardships: Hardships { delay: 0.0, ..Hardships::NONE },
        seconds_max: 1e6,
        keeps_payloads: false,
    }
}

/// Engines that train a Llama on the text; the model is perfect at a held-out loss of 0.
struct Engines<'a> {
    row: &'a Row,
    text: &'a Text,
    manifest: Manifest,
    seed: u64,
}

impl Habitat for Engines<'_> {
    fn manifest(&self) -> Manifest {
        self.manifest.clone()
    }

    fn first_weights(&self) -> Vec<Vec<f32>> {
        self.manifest.gather(&self.text.model.initial_weights(self.seed))
    }

    fn start(&mut self, site: usize) -> Result<Inhabitant, EngineError> {
        let (text, training) = (self.text, &self.row.training);
        let leases = Leases::new();
        let feed = text.feed(text.part(self.row.share, site), leases.clone(), self.seed, training.packing);
        let options = options(text, training, training.rows, Precision::best());
        let engine = CpuEngine::new(options, self.manifest.clone(), self.first_weights(), Box::new(feed))?;
        Ok(Inhabitant { engine: Box::new(engine), leases })
    }

    fn error(&mut self, theta: &[Vec<f32>], _: &[u64]) -> Result<f64, EngineError> {
        let nats = held_out_nats(self.text, &self.row.training, &self.manifest, theta.to_vec());
        nats.map_err(|error| EngineError::Device(error.to_string()))
    }
}
