//! Sites whose steps are so long that others make many commits during one.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use atoll_core::engine::Engine;
use atoll_core::journal::{Accepted, Commit, Entry};
use atoll_core::manifest::FragmentId;
use atoll_node::site::{Parts, SiteOptions, join};
use common::engine::Scripted;
use common::{Lab, entries};

/// What a step adds to every weight.
const STRIDE: f32 = 1.0 / 256.0;

/// Trains at steps of so many milliseconds, straight on, until the run is finished; returns how many weights each fragment has.
fn walk(options: &SiteOptions, millis: u64) -> Vec<usize> {
    let mut lens = Vec::new();
    let make = |parts: Parts| {
        let engine = Scripted::new(parts, move |_, weights: &mut [Vec<f32>]| {
            std::thread::sleep(Duration::from_millis(millis));
            weights.iter_mut().flatten().for_each(|weight| *weight += STRIDE);
            Ok(())
        });
        lens = engine.weights.iter().map(Vec::len).collect();
        Ok(Box::new(engine) as Box<dyn Engine>)
    };
    join(options, make, &Arc::new(AtomicBool::new(false)), &mut |_| {}).unwrap();
    lens
}

/// While one commit of a fragment was taken in a step, such a site fell behind for ever. Now commits are taken in during a
/// step, and what they add to the weights waits for its end: whatever was missed or added twice when weights are read
/// would be handed in as learnt.
#[test]
fn a_site_keeps_up_with_many_commits_a_step_and_hands_in_its_own_steps_only() {
    let changes = [
        ("steps = 8", "steps = 1"),
        ("quorum = 0", "quorum = 1"),
        ("up = \"auto\"", "up = \"f32\""),
        ("down = \"auto\"", "down = \"f32\""),
    ];
    let lab = Lab::new(60_000, &changes);
    let mut coordinator = lab.coordinate();
    let [slow, fast] = ["slow", "fast"].map(|site| lab.site_options(site));
    let lens = std::thread::scope(|scope| {
        scope.spawn(|| walk(&fast, 20));
        walk(&slow, 400)
    });
    lab.finish(&mut coordinator);
    let (commits, contributions) = history(&lab, "slow");
    let steps: u64 = contributions.iter().map(|(_, accepted)| accepted.steps).sum();
    let count = contributions.len();
    assert!(commits > 5 * count, "{commits} commits beside {count} contributions");
    assert!(count as u64 * 10 > steps * 7, "{count} contributions of {steps} steps");
    for (fragment, Accepted { steps, norm, .. }) in contributions {
        let own = f64::from(STRIDE) * steps as f64 * (lens[fragment.index()] as f64).sqrt();
        assert!((norm / own - 1.0).abs() < 1e-3, "{fragment}: {norm} where {steps} steps make {own}");
    }
    lab.replay();
}

/// How many commits a run has, and the contributions of that site.
fn history(lab: &Lab, name: &str) -> (usize, Vec<(FragmentId, Accepted)>) {
    let commits = entries(&lab.run()).into_iter().filter_map(|entry| match entry {
        Entry::Committed(commit) => Some(commit),
        _ => None,
    });
    let commits: Vec<_> = commits.collect();
    let count = commits.len();
    let of = |commit: Commit| commit.contributions.into_iter().map(move |accepted| (commit.fragment, accepted));
    let contributions = commits.into_iter().flat_map(of).filter(|(_, accepted)| accepted.site.to_string() == name);
    (count, contributions.collect())
}
