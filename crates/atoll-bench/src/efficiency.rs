//! What training together is worth: tokens per second of sites of very different speeds in one run, against the sum of
//! what each does alone at its best.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_core::engine::{Batch, Engine, EngineError, Feed};

use crate::emulated::{Diary, Emulated};
use crate::lab::{self, Link};
use crate::scenario::{
    CONTEXT, Outcome, ROWS, SETTLE_SECONDS, Scenario, Size, THINNEST, congestion_name, thinnest_ways,
};
use crate::{Arguments, Figures};

/// Milliseconds of an inner step at each site, speeds 1 : 2 : 4 : 8: once as of a model that keeps its accelerators busy, and
/// once so short that a commit is applied four times a second.
const STEPS_MS: [[u64; 4]; 2] = [[800, 400, 200, 100], [240, 120, 60, 30]];
const STEPS: u32 = 32;
const LINK: Link = Link { mbit: 1000, loss: 0.0, rtt_ms: 30 };
const SIZE: Size = Size::M30;
/// What we want to reach.
const TARGET: f64 = 0.98;

pub(crate) fn run(arguments: &Arguments) -> Result<Figures> {
    let Some(wanlab) = lab::ready("efficiency") else { return Ok(Figures::new()) };
    lab::heed_interrupts()?;
    let seconds = if arguments.quick { 40.0 } else { 120.0 };
    introduce(seconds)?;
    println!("  site     step ms   tokens/s alone   trained together    share   in the model    share");
    let mut figures = Figures::new();
    for steps_ms in &STEPS_MS {
        let (efficiency, outcome) = measure(&wanlab, steps_ms, seconds)?;
        let name = format!("joint_efficiency_{}ms", steps_ms[steps_ms.len() - 1]);
        figures.extend([(name, efficiency)]);
        outcome.doubts().iter().for_each(|doubt| println!("NOTE: {doubt}"));
    }
    figures.extend([("joint_efficiency".to_string(), figures["joint_efficiency_100ms"])]);
    println!("\nwanted: {:.0} %. An equal split with a barrier gives {:.0} %.", TARGET * 100.0, barrier() * 100.0);
    Ok(figures)
}

/// Sites with such steps, alone and together; prints what came out.
fn measure(wanlab: &Path, steps_ms: &'static [u64], seconds: f64) -> Result<(f64, Outcome)> {
    let alone = steps_ms.iter().map(|&step| alone(step, seconds / 8.0)).collect::<Result<Vec<f64>>>()?;
    let outcome = scenario(steps_ms, seconds).run(wanlab)?;
    let (mut joint, tokens) = (0.0, (ROWS * CONTEXT) as f64);
    for ((&step, &alone), site) in steps_ms.iter().zip(&alone).zip(&outcome.sites) {
        let together = rate_in_the_model(&outcome, &site.name);
        let trained = site.steps_in(outcome.window) as f64 * tokens / seconds;
        let share = |rate: f64| rate / alone * 100.0;
        println!(
            "  {}  {step:>8} {alone:>16.1} {trained:>18.1} {:>7.1}% {together:>14.1} {:>7.1}%",
            site.name,
            share(trained),
            share(together)
        );
        joint += together;
    }
    let sum: f64 = alone.iter().sum();
    println!("  all     {:>8} {sum:>16.1} {:>27} {joint:>14.1} {:>7.1}%", "", "", joint / sum * 100.0);
    Ok((joint / sum, outcome))
}

fn introduce(seconds: f64) -> Result<()> {
    println!(
        "Four sites of speeds 1 : 2 : 4 : 8 and a coordinator as processes of their own, {} parameters,",
        SIZE.name()?
    );
    println!(
        "{STEPS} inner steps per round of the fastest; a link of {} Mbit/s and {} ms there and back to each,",
        LINK.mbit, LINK.rtt_ms
    );
    println!(
        "congestion control: {}. Weights go {}. Steps are emulated, all else is the product. Alone: the engine in a",
        congestion_name(),
        thinnest_ways()
    );
    println!(
        "loop that does nothing else. Together: tokens that entered the model in {seconds:.0} s, from commit to commit.\n"
    );
    Ok(())
}

/// What four equal shares and a barrier would reach: everybody is as fast as the slowest.
fn barrier() -> f64 {
    let [steps, _] = STEPS_MS;
    let slowest = steps.iter().copied().max().unwrap_or(1) as f64;
    steps.len() as f64 / steps.iter().map(|&step| slowest / step as f64).sum::<f64>()
}

fn scenario(steps_ms: &'static [u64], seconds: f64) -> Scenario {
    Scenario {
        bench: "efficiency",
        size: SIZE,
        fragments: None,
        sites: steps_ms.len(),
        steps_ms,
        steps: STEPS,
        codecs: THINNEST,
        link: LINK,
        shaped_at_once: false,
        settle_seconds: 2.0 * SETTLE_SECONDS,
        seconds,
    }
}

/// Tokens per second of a site in the model: of all commits in the window but the first, over the time since that.
fn rate_in_the_model(outcome: &Outcome, site: &str) -> f64 {
    let within = |at: f64| at >= outcome.window.0 && at < outcome.window.1;
    let mut commits = outcome.commits.iter().filter(|timed| within(timed.at));
    let Some(first) = commits.next().map(|timed| timed.at) else { return 0.0 };
    let (mut samples, mut last) = (0, first);
    for timed in commits {
        let theirs = timed.commit.contributions.iter().filter(|accepted| accepted.site.to_string() == site);
        samples += theirs.map(|accepted| accepted.ranges.len()).sum::<u64>();
        last = timed.at;
    }
    (samples * CONTEXT as u64) as f64 / (last - first)
}

/// Tokens per second of an engine of such steps that has nothing else to do.
fn alone(step_ms: u64, seconds: f64) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let diary = Diary::new(&folder.path().join("diary"))?;
    let step = Duration::from_millis(step_ms);
    let mut engine = Emulated::new(SIZE.manifest()?, Box::new(Endless), ROWS, step, 1, diary);
    let (began, mut tokens) = (Instant::now(), 0);
    while began.elapsed().as_secs_f64() < seconds {
        tokens += engine.train(1).context("an engine alone")?.tokens;
    }
    Ok(tokens as f64 / began.elapsed().as_secs_f64())
}

/// Samples without end, of which an emulated engine wants nothing but to have them.
struct Endless;

impl Feed for Endless {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        *batch = Batch { rows, length: CONTEXT, tokens: vec![0; rows * (CONTEXT + 1)], ..Batch::default() };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_gives_a_quarter() {
        assert!((barrier() - 4.0 / 15.0).abs() < 1e-12);
    }
}
