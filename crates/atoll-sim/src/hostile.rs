//! Worlds of toys with everything drawn from a seed: how they synchronize, who lives there, how fast.

use atoll_core::codec::Codec;
use atoll_core::data::DatasetId;
use atoll_core::delta::{Feedback, Follow};
use atoll_core::hash::Digest;
use atoll_core::outer::OuterRule;
use atoll_core::rng::{Rng, mix};
use atoll_core::round::{Absent, Goal, Setting, Sync};

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
    live(seed, describe(seed, hardships))
}

/// Runs the world of `seed` with the codecs of a run that has a thin link: commits tell half a bit of a weight, contributions
/// a quarter, a half, or all. A toy has so few weights that they tell it more of these than of a model.
///
/// # Errors
/// As [`simulate`].
pub fn simulate_thin(seed: u64, hardships: Hardships) -> Result<Outcome, String> {
    let mut description = describe(seed, hardships);
    let up = [Codec::F32, Codec::E3m0, Codec::Tcq(1), Codec::Tcq(2)];
    description.sync.up = Setting::Is(up[Rng::new(seed ^ 0x7417).below(up.len() as u64) as usize]);
    description.sync.down = Setting::Is(Codec::Tcq(2));
    live(seed, description)
}

fn live(seed: u64, description: Description) -> Result<Outcome, String> {
    let toys = Toys::new(&description, vec![Nature::default(); description.sites.len()]);
    let mut toys = toys.trying(Rng::new(seed ^ 0x7E57).chance(0.5));
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
    fn pick<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
        choices[rng.below(choices.len() as u64) as usize]
    }
    // A toy has so few weights that a share of 96 in 4,096 would take it for ever.
    let codecs = [Codec::F32, Codec::Bf16, Codec::E3m0, Codec::Sparse(800), Codec::Sparse(2000)];
    let rules = [
        OuterRule::Auto { momentum: 0.3 },
        OuterRule::Memoryless { learning_rate: 1.0 },
        OuterRule::Nesterov { learning_rate: 0.5, momentum: 0.5 },
    ];
    Sync {
        fragments: 1 + chance.below(4) as usize,
        steps: Setting::Is(1 + chance.below(12) as u32),
        up: Setting::Is(pick(chance, &codecs)),
        down: Setting::Is(pick(chance, &codecs)),
        outer: pick(chance, &rules),
        follow: pick(chance, &[Follow::Auto, Follow::Carry, Follow::Overwrite]),
        absent: pick(chance, &[Absent::Reserve, Absent::Ignore]),
        evaluate_seconds: 10.0,
        // Of a copy, so that the worlds of old seeds stay what they were.
        feedback: pick(&mut chance.clone(), &[Feedback::Weights, Feedback::Buffer]),
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
