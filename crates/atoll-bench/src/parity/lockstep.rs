//! Local steps without a network: engines that train side by side and synchronize everything at once after every so many
//! steps, with the product's codecs, merge and outer step. What separates this from data parallelism is local training
//! itself, and the codec of the row; what separates Atoll from this is that a network takes time.

use anyhow::{Context, Result};
use atoll_core::codec::Payload;
use atoll_core::data::Ranges;
use atoll_core::delta::Local;
use atoll_core::engine::Engine;
use atoll_core::hash::Digest;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::outer::{Global, Weighted};
use atoll_core::plan;
use atoll_core::round::Setting;
use atoll_core::team::Alone;
use atoll_cpu::{CpuEngine, Precision};
use atoll_sim::Leases;

use super::rows::{Row, SITES};
use super::{Run, Setting as Wished, held_out_nats, options};

/// All weights are one fragment.
const ALL: FragmentId = FragmentId(0);

/// An engine, what it may train on, and its copy of the global model.
struct Site {
    engine: CpuEngine,
    leases: Leases,
    local: Local,
}

pub(super) fn run(row: &Row, setting: &Wished, seed: u64, steps_per_round: u64) -> Result<Run> {
    let (text, training) = (&setting.text, &row.training);
    let samples_per_step = (training.rows * training.accumulate) as u64;
    let tokens_per_step = samples_per_step * text.context as u64 * SITES as u64;
    let steps = setting.tokens.div_ceil(tokens_per_step);
    let manifest = Manifest::balanced(text.model.tensors(), 1);
    let first = manifest.gather(&text.model.initial_weights(seed));
    let mut sites = Vec::new();
    for site in 0..SITES {
        let leases = Leases::new();
        let share = steps * samples_per_step;
        leases.grant(&Ranges::span(site as u64 * share, (site as u64 + 1) * share));
        let feed = text.feed(text.part(row.share, site), leases.clone(), seed, training.packing);
        let options = options(text, training, training.rows, Precision::best());
        let engine = CpuEngine::new(options, manifest.clone(), first.clone(), Box::new(feed))?;
        let mut local = Local::new(&manifest, row.sync.follow, row.sync.feedback);
        local.install(ALL, first[0].clone())?;
        sites.push(Site { engine, leases, local });
    }
    let mut global = Global::new(manifest.clone(), first);
    for step in 1..=steps {
        for Site { engine, leases, .. } in &mut sites {
            leases.set_progress((step - 1) as f32 / steps as f32);
            engine.train(1)?;
        }
        if step % steps_per_round == 0 || step == steps {
            synchronize(row, &mut global, &mut sites, step == steps)?;
        }
    }
    Ok(Run {
        nats: held_out_nats(text, training, &manifest, global.theta)?,
        tokens: (steps * tokens_per_step) as f64,
        ..Run::default()
    })
}

/// One round of all sites; the last one of all says everything.
fn synchronize(row: &Row, global: &mut Global, sites: &mut [Site], is_last: bool) -> Result<()> {
    let codec = |wished| match wished {
        Setting::Is(codec) if is_last => Ok(plan::last_of_all(codec)),
        Setting::Is(codec) => Ok(codec),
        Setting::Auto => Err(anyhow::anyhow!("the row '{}' has no link to choose a codec for", row.name)),
    };
    let mut payloads = Vec::new();
    for Site { engine, local, .. } in &mut *sites {
        let mut weights = vec![0.0; local.theta(ALL).len()];
        engine.read(ALL, &mut weights)?;
        payloads.push(local.contribute(ALL, weights, codec(row.sync.up)?, &Alone)?.bytes);
    }
    let contributions = payloads.iter().map(|bytes| weighted(bytes, global.theta[0].len()));
    let contributions = contributions.collect::<Result<Vec<_>>>()?;
    let recipe = row.sync.recipe(codec(row.sync.down)?, 1.0, row.sync.guard());
    let commit = global.step(ALL, &contributions, &recipe, &Alone)?;
    for Site { engine, local, .. } in sites {
        local.delivered(ALL);
        let (digest, change) = local.commit(ALL, commit.payload.clone(), &Alone)?;
        anyhow::ensure!(digest == commit.digest, "a site holds another model than the coordinator");
        change.apply(engine, ALL)?;
    }
    Ok(())
}

/// A contribution that counts as much as every other one.
fn weighted(bytes: &[u8], count: usize) -> Result<Weighted<'_>> {
    let payload = Payload::parse(bytes, count).context("a payload of our own")?;
    Ok(Weighted { weight: 1.0, steps: 1, trust: 0.0, quality: 0.0, name: Digest::of(bytes), stale: false, payload })
}
