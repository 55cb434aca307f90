//! Worlds of eight sites of which two are malicious. With the guard the model learns as if all were honest; without it
//! the same worlds fail, or these tests would prove nothing.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::Range;

use atoll_core::codec::Codec;
use atoll_core::data::DatasetId;
use atoll_core::delta::norm;
use atoll_core::engine::EngineError;
use atoll_core::hash::Digest;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::outer::Robust;
use atoll_core::rng::{Rng, mix};
use atoll_core::round::{Goal, Setting, Sync};
use atoll_sim::toy::{self, Nature, Toys};
use atoll_sim::{Description, Habitat, Hardships, Inhabitant, Link, Outcome, Residence, run};

const SITES: usize = 8;
/// Sites of these numbers are malicious: a quarter, or half.
const QUARTER: Range<usize> = 3..5;
const HALF: Range<usize> = 2..6;
const SEEDS: Range<u64> = 0..16;
/// A site sees little of its optimum in a round, as in real training, and the run ends at its plateau.
const LEARNING_RATE: f32 = 0.04;
const GOAL_TOKENS: u64 = 30_000;
/// Contributions of the malicious in which sleepers do as all do.
const ASLEEP: u64 = 12;

/// What malicious sites send in place of what they have learnt.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Attack {
    /// Just that: they are honest.
    Honest,
    /// So many times that; its opposite, if negative.
    Times(f32),
    /// Noise that is so many times as long.
    Noise(f32),
    /// All of them the same direction, always.
    Collude,
    /// What they have learnt until they are trusted, then ten times its opposite.
    Sleep,
}

/// Toys of which some lie.
struct Liars {
    toys: Toys,
    attack: Attack,
    malicious: Range<usize>,
    chance: Rng,
    lies: u64,
}

impl Liars {
    fn lie(&mut self, fragment: FragmentId, delta: &[f32]) -> Option<Vec<f32>> {
        self.lies += 1;
        match self.attack {
            Attack::Honest => None,
            Attack::Times(factor) => Some(times(factor, delta)),
            Attack::Noise(factor) => Some(noise(&mut self.chance, factor * norm(delta) as f32, delta.len())),
            Attack::Collude => Some(noise(&mut Rng::new(fragment.index() as u64), norm(delta) as f32, delta.len())),
            Attack::Sleep => Some(times(if self.lies > ASLEEP { -10.0 } else { 1.0 }, delta)),
        }
    }
}

fn times(factor: f32, values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| factor * value).collect()
}

/// A random direction of this length.
fn noise(chance: &mut Rng, length: f32, count: usize) -> Vec<f32> {
    let noise: Vec<f32> = (0..count).map(|_| chance.normal() as f32).collect();
    times(length / norm(&noise) as f32, &noise)
}

impl Habitat for Liars {
    fn manifest(&self) -> Manifest {
        self.toys.manifest()
    }

    fn first_weights(&self) -> Vec<Vec<f32>> {
        self.toys.first_weights()
    }

    fn start(&mut self, site: usize) -> Result<Inhabitant, EngineError> {
        self.toys.start(site)
    }

    fn forge(&mut self, site: usize, fragment: FragmentId, delta: &[f32]) -> Option<Vec<f32>> {
        if self.malicious.contains(&site) { self.lie(fragment, delta) } else { None }
    }

    fn trial(&mut self, theta: &[Vec<f32>]) -> Option<f64> {
        self.toys.trial(theta)
    }

    fn error(&mut self, theta: &[Vec<f32>], tokens: &[u64]) -> Result<f64, EngineError> {
        self.toys.error(theta, tokens)
    }
}

/// Who attacks how, and what is done about it.
#[derive(Clone)]
struct Case {
    attack: Attack,
    malicious: Range<usize>,
    robust: Robust,
    /// The coordinator tries contributions on text.
    tries: bool,
}

fn live(case: &Case, seed: u64) -> Result<Outcome, String> {
    let description = describe(case.robust, seed);
    let nature = Nature { learning_rate: LEARNING_RATE, ..Nature::default() };
    let toys = Toys::new(&description, vec![nature; SITES]).trying(case.tries);
    let Case { attack, malicious, .. } = case.clone();
    run(description, &mut Liars { toys, attack, malicious, chance: Rng::new(seed), lies: 0 })
}

/// Eight sites with samples of their own, the slowest three times slower than the fastest. At its end, each world
/// computes all commits again from its journal.
fn describe(robust: Robust, seed: u64) -> Description {
    let mut chance = Rng::new(mix(seed ^ 0x901));
    let sites = (0..SITES).map(|index| Residence {
        name: format!("site-{index}").parse().unwrap(),
        dataset: DatasetId(Digest::of(&[index as u8])),
        samples: 100_000,
        samples_per_step: toy::ROWS as u64,
        step_seconds: 0.02 * (1.0 + 2.0 * chance.unit()),
        link: Link::INFINITE,
    });
    let (steps, codec) = (Setting::Is(8), Setting::Is(Codec::F32));
    Description {
        sites: sites.collect(),
        chance,
        sync: Sync { fragments: 1, steps, up: codec, down: codec, robust, ..Sync::default() },
        goal: Goal { tokens: Some(GOAL_TOKENS), minutes: None },
        context: toy::CONTEXT as u64,
        hardships: Hardships::NONE,
        seconds_max: 3_000.0,
        keeps_payloads: true,
    }
}

/// Many worlds: their mean loss, infinite if the model of one blew up, and the share of the contributions of the
/// honest and of the malicious from which the guard took something.
struct Seen {
    loss: f64,
    honest: f64,
    malicious: f64,
}

fn see(case: &Case) -> Seen {
    let outcomes: Vec<Outcome> = SEEDS.filter_map(|seed| live(case, seed).ok()).collect();
    let all_lived = outcomes.len() as u64 == SEEDS.end - SEEDS.start;
    let mean = outcomes.iter().map(|outcome| toy::loss(&outcome.theta)).sum::<f64>() / outcomes.len() as f64;
    let share = |malicious: bool| {
        let sites = outcomes.iter().flat_map(|outcome| outcome.sites.iter().enumerate());
        let meant = sites.filter(|(index, _)| case.malicious.contains(index) == malicious);
        let (guarded, all) = meant.fold((0, 0), |sums, (_, site)| (sums.0 + site.guarded, sums.1 + site.contributions));
        guarded as f64 / all.max(1) as f64
    };
    Seen { loss: if all_lived { mean } else { f64::INFINITY }, honest: share(false), malicious: share(true) }
}

/// Lives the worlds of an attack with the guard and without; tells both losses in units of the clean run's.
fn withstand(attack: Attack) -> (f64, f64) {
    let case = |attack, robust| Case { attack, malicious: QUARTER, robust, tries: false };
    let clean = see(&case(Attack::Honest, Robust::None)).loss;
    let (guarded, open) = (see(&case(attack, Robust::Guard)), see(&case(attack, Robust::None)));
    let losses = (guarded.loss / clean, open.loss / clean);
    println!(
        "{attack:?}: {:+.2} % guarded, {:+.2} % open; the guard took from {:.2} % of what honest and {:.0} % of what \
         malicious sites sent",
        100.0 * (losses.0 - 1.0),
        100.0 * (losses.1 - 1.0),
        100.0 * guarded.honest,
        100.0 * guarded.malicious
    );
    assert!(losses.0 < 1.02, "{attack:?}: {losses:?}");
    assert!(guarded.honest < 0.01 && guarded.malicious > 0.5, "{} {}", guarded.honest, guarded.malicious);
    losses
}

#[test]
fn two_of_eight_that_flip_signs_do_no_harm() {
    withstand(Attack::Times(-1.0)); // It makes the others slower, guard or not, and little else.
    assert!(withstand(Attack::Times(-2.0)).1 > 1.04);
}

#[test]
fn nor_if_what_they_send_is_ten_times_as_long() {
    for factor in [10.0, -10.0] {
        assert!(withstand(Attack::Times(factor)).1 > 1.04);
    }
}

#[test]
fn nor_if_it_is_noise() {
    withstand(Attack::Noise(1.0)); // Noise of the usual length is lost among the others', guard or not.
    assert!(withstand(Attack::Noise(10.0)).1 > 1.04);
}

#[test]
fn nor_if_they_collude() {
    assert!(withstand(Attack::Collude).1 > 1.02);
}

#[test]
fn nor_if_they_were_honest_until_they_were_trusted() {
    assert!(withstand(Attack::Sleep).1 > 1.04);
}

#[test]
fn honest_sites_are_left_alone() {
    let case = |robust, tries| Case { attack: Attack::Honest, malicious: QUARTER, robust, tries };
    let open = see(&case(Robust::None, false));
    for (tries, most) in [(false, 0.005), (true, 0.01)] {
        let guarded = see(&case(Robust::Guard, tries));
        assert!((guarded.loss / open.loss - 1.0).abs() < 1e-3, "{} {}", guarded.loss, open.loss);
        assert!(guarded.honest < most, "the guard took from {} of all contributions", guarded.honest);
    }
}

/// Half of the sites are the consensus as much as the other half: only text tells them apart.
#[test]
fn half_of_the_sites_may_be_malicious_where_contributions_are_tried() {
    let case = |attack, tries| Case { attack, malicious: HALF, robust: Robust::Guard, tries };
    let clean = see(&case(Attack::Honest, false)).loss;
    for attack in [Attack::Times(-1.0), Attack::Collude, Attack::Sleep] {
        let (tried, untried) = (see(&case(attack, true)), see(&case(attack, false)));
        println!(
            "half, {attack:?}: {:+.2} % tried, {:+.2} % not; the guard took from {:.2} % of what honest and {:.0} % of \
             what malicious sites sent",
            100.0 * (tried.loss / clean - 1.0),
            100.0 * (untried.loss / clean - 1.0),
            100.0 * tried.honest,
            100.0 * tried.malicious
        );
        // Where they collude some runs end on their way back from the first commits, the worst of 16 above 1.2 times the loss.
        assert!(tried.loss < 1.15 * clean && untried.loss > 1.5 * clean, "{attack:?}");
    }
}
