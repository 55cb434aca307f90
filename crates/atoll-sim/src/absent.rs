//! What absence does to a model when sites' data differ. Each of four sites sees the common target with
//! an offset of its own, and the model ought to be the mean of what they see. Sites come and go, at
//! random speeds: does the model end at the mean, or at whoever was there last?
//!
//! A rule for absent sites is part of [`Sync`]; [`absences`] tells how good one is.

use std::ops::Range;

use atoll_core::data::DatasetId;
use atoll_core::hash::Digest;
use atoll_core::rng::{Rng, mix};
use atoll_core::round::{Goal, Sync};

use crate::toy::{self, Nature, Toys};
use crate::{Description, Hardships, Link, Outcome, Residence, run};

const SITES: u64 = 4;
const LEAN: f32 = 0.5;
/// So small that no site reaches its own optimum within a round, as in real training.
const LEARNING_RATE: f32 = 0.01;
const GOAL_TOKENS: u64 = 60_000;

/// How often sites are away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attendance {
    /// All are there all the time.
    Constant,
    /// Sites are cut off and crash all the time, and return within some rounds.
    Patchy,
    /// They stay away for longer: at any moment nearly half of them.
    Sparse,
}

/// How good the final models of many worlds are.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Absences {
    /// Distance from the mean that weights sites by their tokens in the model, one per world, ascending.
    pub by_tokens: Vec<f64>,
    /// Distance from the plain mean of all sites, one per world, ascending.
    pub even: Vec<f64>,
    /// Worlds in which an invariant broke or the run did not finish, with why.
    pub broken: Vec<String>,
}

impl Absences {
    /// An error is large if the model is farther from the mean than half of a typical offset.
    pub const LARGE: f64 = LEAN as f64 / 4.0;

    /// How many of `errors` are large.
    pub fn large(errors: &[f64]) -> usize {
        errors.iter().filter(|&&error| error > Self::LARGE).count()
    }
}

/// Lives one world for each of `seeds` with this `sync`.
pub fn absences(sync: &Sync, attendance: Attendance, seeds: Range<u64>) -> Absences {
    let mut all = Absences::default();
    for seed in seeds {
        match live(sync, attendance, seed) {
            Ok((outcome, natures)) => {
                all.by_tokens.push(outcome.error);
                let even: Vec<(f64, Nature)> = natures.into_iter().map(|nature| (1.0, nature)).collect();
                all.even.push(toy::error(&outcome.theta, &even));
            }
            Err(broken) => all.broken.push(format!("seed {seed}: {broken}")),
        }
    }
    all.by_tokens.sort_by(f64::total_cmp);
    all.even.sort_by(f64::total_cmp);
    all
}

fn live(sync: &Sync, attendance: Attendance, seed: u64) -> Result<(Outcome, Vec<Nature>), String> {
    let description = describe(sync, attendance, seed);
    let nature = |site| Nature { key: mix(seed) ^ site, lean: LEAN, learning_rate: LEARNING_RATE };
    let natures: Vec<Nature> = (0..SITES).map(nature).collect();
    let mut toys = Toys::new(&description, natures.clone());
    Ok((run(description, &mut toys)?, natures))
}

fn describe(sync: &Sync, attendance: Attendance, seed: u64) -> Description {
    let mut chance = Rng::new(mix(seed ^ 0xAB5E));
    let sites = (0..SITES).map(|index| draw_site(index, &mut chance)).collect();
    // A cut or a crash every two seconds on average, until the end.
    let faults = Hardships { crashes: 500, cuts: 500, seconds: f64::INFINITY, ..Hardships::NONE };
    let hardships = match attendance {
        Attendance::Constant => Hardships::NONE,
        Attendance::Patchy => faults,
        Attendance::Sparse => Hardships { away: 4.0 * faults.away, ..faults },
    };
    Description {
        chance,
        sync: sync.clone(),
        goal: Goal { tokens: Some(GOAL_TOKENS), minutes: None },
        context: toy::CONTEXT as u64,
        sites,
        hardships,
        seconds_max: 3_000.0,
        keeps_payloads: true,
    }
}

/// A site with data of its own; the slowest is four times slower than the fastest.
fn draw_site(index: u64, chance: &mut Rng) -> Residence {
    Residence {
        name: format!("site-{index}").parse().expect("a good name"),
        dataset: DatasetId(Digest::of(&[index as u8])),
        samples: 100_000,
        samples_per_step: toy::ROWS as u64,
        step_seconds: 0.02 * (1.0 + 3.0 * chance.unit()),
        link: Link::INFINITE,
    }
}
