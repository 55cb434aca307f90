//! Sites whose steps are so long that others make many commits during one.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Feed, Progress};
use atoll_core::journal::{Accepted, Chain, Commit, Entry};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_node::identity::Ticket;
use atoll_node::journal::read_entries;
use atoll_node::site::{Parts, SiteOptions, join};
use common::Lab;

/// What a step adds to every weight.
const STRIDE: f32 = 1.0 / 256.0;

/// An engine that takes as long as it is told for a step, and goes straight on.
struct Walker {
    manifest: Manifest,
    feed: Box<dyn Feed>,
    weights: Vec<Vec<f32>>,
    step: Duration,
}

impl Engine for Walker {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        let mut batch = Batch::default();
        for _ in 0..steps {
            self.feed.next(4, &mut batch)?;
            std::thread::sleep(self.step);
            self.weights.iter_mut().flatten().for_each(|weight| *weight += STRIDE);
        }
        Ok(Progress { steps, tokens: u64::from(steps) * (batch.rows * batch.length) as u64, loss: 1.0 })
    }

    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        weights.copy_from_slice(&self.weights[fragment.index()]);
        Ok(())
    }

    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError> {
        self.weights[fragment.index()].copy_from_slice(weights);
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        Ok(Evaluation { nats: 1.0, tokens: (batch.rows * batch.length) as u64 })
    }
}

/// Trains at steps of so many milliseconds until the run is finished; returns how many weights each fragment has.
fn walk(options: &SiteOptions, millis: u64) -> Vec<usize> {
    let mut lens = Vec::new();
    let make = |Parts { manifest, feed, .. }: Parts| {
        let weights = manifest.zeros();
        lens = weights.iter().map(Vec::len).collect();
        Ok(Box::new(Walker { manifest, feed, weights, step: Duration::from_millis(millis) }) as Box<dyn Engine>)
    };
    join(options, make, &Arc::new(AtomicBool::new(false)), &mut |_| {}).unwrap();
    lens
}

fn options(lab: &Lab, site: &str) -> SiteOptions {
    SiteOptions {
        dir: PathBuf::from(lab.path(site)),
        ticket: Ticket::from_text(&lab.ticket(site)).unwrap(),
        data: Some(PathBuf::from(lab.path("text"))),
        rows: None,
        threads: 1,
        share: 1.0,
        streams: 1,
        engine: "walker".into(),
        device: "none".into(),
    }
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
    let [slow, fast] = ["slow", "fast"].map(|site| options(&lab, site));
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
    let entries = read_entries(&lab.run().join("journal.jsonl"), 0, Chain::default()).unwrap();
    let commits = entries.into_iter().filter_map(|entry| match entry {
        Entry::Committed(commit) => Some(commit),
        _ => None,
    });
    let commits: Vec<_> = commits.collect();
    let count = commits.len();
    let of = |commit: Commit| commit.contributions.into_iter().map(move |accepted| (commit.fragment, accepted));
    let contributions = commits.into_iter().flat_map(of).filter(|(_, accepted)| accepted.site.to_string() == name);
    (count, contributions.collect())
}
