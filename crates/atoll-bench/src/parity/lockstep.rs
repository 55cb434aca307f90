//! Local steps without a network: engines that train side by side and average all their weights after every so many
//! steps, which is a whole outer step, or a row's own with Nesterov's momentum. What separates this from data parallelism is local training itself; what separates Atoll from this is Atoll.

use anyhow::Result;
use atoll_core::data::Ranges;
use atoll_core::engine::{Engine, weights, write_weights};
use atoll_core::manifest::Manifest;
use atoll_core::outer::OuterRule;
use atoll_cpu::{CpuEngine, Precision};
use atoll_sim::Leases;

use super::rows::{Row, SITES};
use super::{Run, Setting, held_out_nats, options};

pub(super) fn run(row: &Row, setting: &Setting, seed: u64, steps_per_round: u64) -> Result<Run> {
    let (text, training) = (&setting.text, &row.training);
    let samples_per_step = (training.rows * training.accumulate) as u64;
    let tokens_per_step = samples_per_step * text.context as u64 * SITES as u64;
    let steps = setting.tokens.div_ceil(tokens_per_step);
    let manifest = Manifest::balanced(text.model.tensors(), 1);
    let first = manifest.gather(&text.model.initial_weights(seed));
    let mut sites = Vec::new();
    for site in 0..SITES as u64 {
        let leases = Leases::new();
        let share = steps * samples_per_step;
        leases.grant(&Ranges::span(site * share, (site + 1) * share));
        let part = text.part(row.share, site as usize);
        let feed = text.feed(part, leases.clone(), seed, training.packing);
        let options = options(text, training, training.rows, Precision::best());
        let engine = CpuEngine::new(options, manifest.clone(), first.clone(), Box::new(feed))?;
        sites.push((engine, leases));
    }
    let (learning_rate, momentum) = outer(row);
    let mut buffer: Vec<Vec<f32>> = first.iter().map(|weights| vec![0.0; weights.len()]).collect();
    let mut theta = first;
    for step in 1..=steps {
        for (engine, leases) in &mut sites {
            leases.set_progress((step - 1) as f32 / steps as f32);
            engine.train(1)?;
        }
        if step % steps_per_round == 0 || step == steps {
            let mean = mean(&mut sites)?;
            for ((theta, buffer), mean) in theta.iter_mut().zip(&mut buffer).zip(mean) {
                for ((theta, buffer), mean) in theta.iter_mut().zip(buffer).zip(mean) {
                    let delta = *theta - mean;
                    *buffer = momentum * *buffer + delta;
                    *theta -= learning_rate * (delta + momentum * *buffer);
                }
            }
            for (engine, _) in &mut sites {
                write_weights(engine, &theta)?;
            }
        }
    }
    Ok(Run {
        nats: held_out_nats(text, training, &manifest, theta)?,
        tokens: (steps * tokens_per_step) as f64,
        ..Run::default()
    })
}

/// Learning rate and momentum of the outer step; "auto" is a whole step without momentum here.
fn outer(row: &Row) -> (f32, f32) {
    match row.sync.outer {
        OuterRule::Nesterov { learning_rate, momentum } => (learning_rate, momentum),
        OuterRule::Memoryless { learning_rate } => (learning_rate, 0.0),
        OuterRule::Auto { .. } => (1.0, 0.0),
    }
}

/// The mean of all engines' weights.
fn mean(sites: &mut [(CpuEngine, Leases)]) -> Result<Vec<Vec<f32>>> {
    let mut mean: Vec<Vec<f32>> = Vec::new();
    let share = 1.0 / sites.len() as f32;
    for (engine, _) in sites.iter_mut() {
        let own = weights(engine)?;
        mean.resize_with(own.len(), Vec::new);
        for (mean, own) in mean.iter_mut().zip(own) {
            mean.resize(own.len(), 0.0);
            mean.iter_mut().zip(own).for_each(|(mean, own)| *mean += share * own);
        }
    }
    Ok(mean)
}
