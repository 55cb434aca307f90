//! Calm worlds of toys behind real links.

use atoll_core::codec::Codec;
use atoll_core::data::DatasetId;
use atoll_core::hash::Digest;
use atoll_core::rng::Rng;
use atoll_core::round::{Absent, Goal, Setting, Sync};
use atoll_sim::toy::{self, Nature, Toys};
use atoll_sim::{Attendance, Description, Hardships, Link, Outcome, Residence, absences, run};

fn live(link: Link, keeps_payloads: bool) -> Outcome {
    let residence = |name: &str, step_seconds| Residence {
        name: name.parse().expect("a good name"),
        dataset: DatasetId(Digest::default()),
        samples: 1000,
        samples_per_step: toy::ROWS as u64,
        step_seconds,
        link,
    };
    let description = Description {
        chance: Rng::new(1),
        sync: Sync { steps: Setting::Is(8), ..Sync::default() },
        goal: Goal { tokens: Some(10_000), minutes: None },
        context: toy::CONTEXT as u64,
        sites: vec![residence("fast", 0.05), residence("slow", 0.1)],
        hardships: Hardships::NONE,
        seconds_max: 3_000.0,
        keeps_payloads,
    };
    let mut toys = Toys::new(&description, vec![Nature::default(); 2]);
    run(description, &mut toys).expect("a calm world")
}

#[test]
fn a_narrow_link_takes_time_and_is_counted() {
    let (wide, narrow) = (live(Link::INFINITE, true), live(Link { up: 100.0, down: 400.0, delay: 0.1 }, true));
    let late = |outcome: &atoll_sim::Outcome| outcome.sites.iter().map(|site| site.late).sum::<u64>();
    assert!(late(&narrow) > late(&wide), "{} against {} contributions come late", late(&narrow), late(&wide));
    for outcome in [wide, narrow] {
        assert_eq!(outcome.sites.iter().map(|site| site.tokens).sum::<u64>(), outcome.tokens);
        assert!(outcome.sites[0].tokens > outcome.sites[1].tokens, "the faster one has the greater share");
        assert!(outcome.sites.iter().all(|site| site.bytes_up > 0 && site.bytes_down > 0));
        assert!(outcome.error < 0.1, "{}", outcome.error);
    }
}

#[test]
fn a_world_without_memory_is_the_same_world() {
    assert_eq!(live(Link::of(1.0, 0.05), false), live(Link::of(1.0, 0.05), true));
}

#[test]
fn sites_whose_data_differ_meet_at_the_mean() {
    let all = absences(&Sync::default(), Attendance::Constant, 0..8);
    assert_eq!((all.broken.len(), all.by_tokens.len()), (0, 8), "{:?}", all.broken);
    assert!(all.by_tokens.iter().sum::<f64>() / 8.0 < 0.1, "{:?}", all.by_tokens);
    assert_eq!(all, absences(&Sync::default(), Attendance::Constant, 0..8), "the same seeds, the same worlds");
}

#[test]
fn a_reserve_for_the_absent_keeps_the_model_nearer_to_the_mean() {
    let median = |absent| {
        let all = absences(&Sync { absent, ..Sync::default() }, Attendance::Sparse, 0..WORLDS);
        assert_eq!(all.broken, Vec::<String>::new());
        all.by_tokens[WORLDS as usize / 2]
    };
    const WORLDS: u64 = 9;
    let (with, without) = (median(Absent::Reserve), median(Absent::Ignore));
    assert!(with < without, "{with} with the reserve, {without} without");
}

/// Four sites with these seconds a step, far from each other and never ill, until the model has so many tokens.
fn side_by_side(step_seconds: [f64; 4], steps: u32, tokens: u64) -> Outcome {
    let residence = |(name, &step_seconds): (&str, &f64)| Residence {
        name: name.parse().expect("a good name"),
        dataset: DatasetId(Digest::default()),
        samples: 100_000,
        samples_per_step: toy::ROWS as u64,
        step_seconds,
        link: Link { delay: 0.025, ..Link::INFINITE },
    };
    let description = Description {
        chance: Rng::new(1),
        sync: Sync { steps: Setting::Is(steps), evaluate_seconds: 1e6, ..Sync::default() },
        goal: Goal { tokens: Some(tokens), minutes: None },
        context: toy::CONTEXT as u64,
        sites: ["a", "b", "c", "d"].into_iter().zip(&step_seconds).map(residence).collect(),
        hardships: Hardships { delay: 0.0, ..Hardships::NONE },
        seconds_max: 3_000.0,
        keeps_payloads: false,
    };
    let mut toys = Toys::new(&description, vec![Nature::default(); 4]);
    run(description, &mut toys).expect("a calm world")
}

/// A round that closed with its quorum while the last site was about to come would leave out that site, and then
/// another, for ever: a third of all contributions came late.
#[test]
fn sites_in_step_miss_no_round() {
    for (step_seconds, steps) in [([0.5; 4], 4), ([2.0, 2.0, 1.0, 0.5], 32)] {
        let outcome = side_by_side(step_seconds, steps, 60_000);
        let (late, commits) = (outcome.sites.iter().map(|site| site.late).sum::<u64>(), outcome.commits);
        assert!(commits > 20 && late * 20 < commits * 4, "{late} late contributions in {commits} commits");
    }
}

/// Whoever takes in one commit a step falls behind for ever where the others make four meanwhile, and contributes when it has
/// caught up, if ever. Of the three fragments one is so small that it is fetched as a whole, which does wait for the step.
#[test]
fn a_site_with_long_steps_takes_in_all_commits_that_come_during_one() {
    let outcome = side_by_side([1.0, 0.25, 0.25, 0.25], 1, 15_000);
    let slow = &outcome.sites[0];
    let steps = slow.tokens / (toy::ROWS * toy::CONTEXT) as u64;
    let contributions = slow.contributions;
    assert!(steps > 100 && contributions * 10 > 2 * steps * 9, "{contributions} contributions of {steps} steps");
}

/// Two sites, one behind a link of so many bytes per second; where they may choose, each writes as its link allows.
fn thin_beside_fat(bytes_per_second: f64, codec: Setting<Codec>) -> Outcome {
    let residence = |name: &str, rate| Residence {
        name: name.parse().expect("a good name"),
        dataset: DatasetId(Digest::default()),
        samples: 100_000,
        samples_per_step: toy::ROWS as u64,
        step_seconds: 0.1,
        link: Link { up: rate, down: rate, delay: 0.01 },
    };
    let description = Description {
        chance: Rng::new(1),
        sync: Sync { steps: Setting::Is(32), up: codec, down: codec, evaluate_seconds: 1e6, ..Sync::default() },
        goal: Goal { tokens: Some(40_000), minutes: None },
        context: toy::CONTEXT as u64,
        sites: vec![residence("fat", 1e6), residence("thin", bytes_per_second)],
        hardships: Hardships { delay: 0.0, ..Hardships::NONE },
        seconds_max: 3_000.0,
        keeps_payloads: false,
    };
    let mut toys = Toys::new(&description, vec![Nature::default(); 2]);
    run(description, &mut toys).expect("a calm world")
}

#[test]
fn each_site_writes_as_richly_as_its_link_allows() {
    let sent = |bytes_per_second, codec| {
        let outcome = thin_beside_fat(bytes_per_second, codec);
        [0, 1].map(|index| outcome.sites[index].bytes_up / outcome.sites[index].contributions)
    };
    let sparse = sent(1e6, Setting::Is(Codec::Sparse(96)));
    let [fat, also_fat] = sent(1e6, Setting::Auto);
    assert_eq!(fat, also_fat);
    assert!(fat > 2 * sparse[0], "{fat} bytes a contribution, {} if sparse", sparse[0]);
    let [fat, thin] = sent(80.0, Setting::Auto);
    assert!(fat > 2 * thin, "{fat} and {thin} bytes a contribution");
}
