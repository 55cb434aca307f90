//! Worlds of toys with everything drawn from a seed: how they synchronize, who lives there, how fast.

use atoll_core::codec::Codec;
use atoll_core::data::DatasetId;
use atoll_core::hash::Digest;
use atoll_core::outer::OuterRule;
use atoll_core::rng::{Rng, mix};
use atoll_core::round::{Goal, Sync};

use crate::toy::{self, Nature, Toys};
use crate::{Description, Hardships, Link, Outcome, Residence, run};

const GOAL_TOKENS: u64 = 20_000;
const SECONDS_MAX: f64 = 3_000.0;
const SAMPLES: u64 = 1000;

/// Runs the world of `seed` to its end.
///
/// # Errors
/// The first invariant that did not hold, with the simulated time.
pub fn simulate(seed: u64, hardships: Hardships) -> Result<Outcome, String> {
    let description = describe(seed, hardships);
    let mut toys = Toys::new(&description, vec![Nature::default(); description.sites.len()]);
    run(description, &mut toys).map_err(|broken| format!("seed {seed}: {broken}"))
}

/// The world of `seed`.
fn describe(seed: u64, hardships: Hardships) -> Description {
    let mut chance = Rng::new(mix(seed));
    let sync = draw_sync(&mut chance);
    let count = 1 + chance.below(5);
    let same_data = chance.chance(0.7);
    let sites = (0..count).map(|index| draw_site(index, same_data, &mut chance)).collect();
    Description {
        chance,
        sync,
        goal: Goal { tokens: Some(GOAL_TOKENS), minutes: None },
        context: toy::CONTEXT as u64,
        sites,
        hardships,
        seconds_max: SECONDS_MAX,
        keeps_payloads: true,
    }
}

fn draw_sync(chance: &mut Rng) -> Sync {
    let pick = |rng: &mut Rng, codecs: &[Codec]| codecs[rng.below(codecs.len() as u64) as usize];
    let rules =
        [OuterRule::Memoryless { learning_rate: 1.0 }, OuterRule::Nesterov { learning_rate: 0.5, momentum: 0.5 }];
    Sync {
        fragments: 1 + chance.below(4) as usize,
        steps: 1 + chance.below(12) as u32,
        up: pick(chance, &Codec::ALL),
        down: pick(chance, &Codec::ALL),
        outer: rules[chance.below(2) as usize],
        evaluate_seconds: 10.0,
        ..Sync::default()
    }
}

fn draw_site(index: u64, same_data: bool, chance: &mut Rng) -> Residence {
    Residence {
        name: format!("site-{index}").parse().expect("a good name"),
        dataset: DatasetId(Digest::of(&[if same_data { 0 } else { index as u8 }])),
        samples: SAMPLES,
        samples_per_step: toy::ROWS as u64,
        step_seconds: 0.01 * (1.0 + 9.0 * chance.unit() * chance.unit()),
        link: Link::INFINITE,
    }
}
