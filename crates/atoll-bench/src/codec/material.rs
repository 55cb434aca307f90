//! What the codecs' benchmark works on, and the works themselves.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use atoll_core::codec::{Codec, Payload, Squares};
use atoll_core::hash::Digest;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::ModelConfig;
use atoll_core::outer::{Global, Merged, Recipe, Weighted, merge};
use atoll_core::plan;
use atoll_core::rng::Rng;
use atoll_core::round::Sync;
use atoll_core::simd::simd;
use atoll_core::team::{Job, Team};
use cpu_time::ProcessTime;

/// Sites whose contributions are merged.
pub(super) const SITES: usize = 8;
/// The codec of the way up, and of the way down, that a run has by default.
pub(super) const UP: Codec = plan::THINNEST.0;
pub(super) const DOWN: Codec = plan::THINNEST.1;
const FRAGMENT: FragmentId = FragmentId(0);
/// Contributions, of [`SITES`] a round, before anything is timed: then residuals are as long as in a long run.
const CONTRIBUTIONS_BEFORE: usize = 40;
/// Weights that a member of a team takes at a time in a triad.
const STRETCH: usize = 1 << 18;
/// The first weights of two windows of noise lie so far apart.
const WINDOW_STEP: usize = 4099;
const WINDOWS: usize = 61;

/// Weights of a row, as of an embedding.
const ROW: usize = 128;
/// Where few rows move, it is one of so many.
const ROWS_A_MOVE: usize = 8;

/// Which weights move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Moved {
    All,
    /// Those of a few rows, always the same, as of tokens that often come by.
    FewRows,
}

/// Something to time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Work {
    Triad,
    Fresh,
    Encode(Codec),
    Decode(Codec),
    Look(Codec),
    Merge(Codec),
    Step,
}

/// Seconds of the processor, all threads together, and of the clock.
pub(super) struct Took {
    pub(super) busy: f64,
    pub(super) passed: f64,
}

/// A fragment in all its forms. Each vector is larger than the caches of today.
pub(super) struct Material {
    global: Global,
    noise: Vec<f32>,
    /// What each codec has not delivered yet.
    residuals: BTreeMap<Codec, Vec<f32>>,
    /// A contribution of each site.
    payloads: BTreeMap<Codec, Vec<Vec<u8>>>,
    /// What was seen of these when they came.
    squares: BTreeMap<Codec, Vec<Squares>>,
    merged: Merged,
    /// The memory of merges.
    memory: Vec<f32>,
    triad: [Vec<f32>; 3],
    turn: usize,
    moved: Moved,
}

impl Material {
    /// The first fragment of a preset that is cut into `fragments`, as written in these `codecs`.
    pub(super) fn new(preset: &str, fragments: usize, codecs: &[Codec], moved: Moved) -> Result<Self> {
        let model = ModelConfig::preset(preset, 8192, 1024).with_context(|| format!("there is no preset {preset}"))?;
        let whole = Manifest::balanced(model.tensors(), fragments);
        let tensors = whole.places(FRAGMENT).map(|place| whole.tensors()[place.tensor].clone());
        let manifest = Manifest::balanced(tensors.collect(), 1);
        let weights = manifest.parameters();
        let noise = noise(weights + WINDOWS * WINDOW_STEP);
        let global = Global::new(manifest, vec![noise[..weights].to_vec()]);
        let mut material = Self {
            global,
            noise,
            residuals: codecs.iter().map(|&codec| (codec, vec![0.0; weights])).collect(),
            payloads: BTreeMap::new(),
            squares: BTreeMap::new(),
            merged: Merged::default(),
            memory: Vec::new(),
            triad: [1.0, 2.0, 3.0].map(|value| vec![value; weights]),
            turn: 0,
            moved,
        };
        material.contribute(codecs)?;
        Ok(material)
    }

    /// Makes payloads and residuals like those of a long run.
    fn contribute(&mut self, codecs: &[Codec]) -> Result<()> {
        let team = atoll_node::crew::Crew;
        for &codec in codecs {
            let count = if codec.is_partial() { CONTRIBUTIONS_BEFORE } else { SITES };
            let payloads = (0..count).map(|_| self.encode(codec, &team)).collect::<Result<Vec<_>>>()?;
            self.payloads.insert(codec, payloads.into_iter().skip(count - SITES).collect());
            let squares = (0..SITES).map(|site| self.look(codec, site, &team)).collect::<Result<_>>()?;
            self.squares.insert(codec, squares);
        }
        self.merged = self.merged(UP, &team)?;
        Ok(())
    }

    /// Weights of the fragment.
    pub(super) fn weights(&self) -> usize {
        self.global.theta[0].len()
    }

    /// Bytes of one contribution's payload per weight.
    pub(super) fn payload_bytes(&self, codec: Codec) -> f64 {
        codec.payload_len(self.weights()) as f64 / self.weights() as f64
    }

    /// Does some work once and says how long it took.
    pub(super) fn time(&mut self, work: Work, team: &dyn Team) -> Result<Took> {
        self.turn += 1;
        let (began, busy) = (Instant::now(), ProcessTime::now());
        match work {
            Work::Triad => self.triad(team),
            Work::Fresh => drop(black_box(vec![1.0f32; self.weights()])),
            Work::Encode(codec) => drop(black_box(self.encode(codec, team)?)),
            Work::Decode(codec) => self.decode(codec, team)?,
            Work::Look(codec) => drop(black_box(self.look(codec, self.turn % SITES, team)?)),
            Work::Merge(codec) => self.merge(codec, team)?,
            Work::Step => self.step(team)?,
        }
        Ok(Took { busy: busy.elapsed().as_secs_f64(), passed: began.elapsed().as_secs_f64() })
    }

    fn triad(&mut self, team: &dyn Team) {
        let [a, b, c] = &mut self.triad;
        let stretches = a.chunks_mut(STRETCH).zip(b.chunks(STRETCH)).zip(c.chunks(STRETCH));
        let jobs = stretches.map(|((a, b), c)| {
            Box::new(move || {
                simd(
                    #[inline(always)]
                    || {
                        for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
                            *a = b + 0.5 * c;
                        }
                    },
                );
            }) as Job<'_>
        });
        team.all(jobs.collect());
    }

    /// As a site contributes: from its weights, its copy of Θ and its residual.
    fn encode(&mut self, codec: Codec, team: &dyn Team) -> Result<Vec<u8>> {
        self.turn += 1;
        let count = self.weights();
        let (theta, from) =
            (window(&self.noise, self.turn, count), window(&self.noise, self.turn + WINDOWS / 2, count));
        let residual = self.residuals.get_mut(&codec).context("every codec has a residual")?;
        // Sites of a round have a turn in common.
        let round = ((self.turn - 1) / SITES) as u8;
        let moved = self.moved;
        let payload = codec.encode_prepared(residual, round, team, |start, wish| {
            let (theta, from) = (&theta[start..start + wish.len()], &from[start..start + wish.len()]);
            if moved == Moved::All {
                return walk(wish, theta, from);
            }
            let rows = wish.chunks_mut(ROW).zip(theta.chunks(ROW)).zip(from.chunks(ROW)).zip(start / ROW..);
            for (((wish, theta), from), row) in rows {
                if row.wrapping_mul(0x9E37_79B9) >> 7 & (ROWS_A_MOVE - 1) == 0 {
                    walk(wish, theta, from);
                }
            }
        });
        Ok(payload?)
    }

    /// As a site takes in a commit.
    fn decode(&mut self, codec: Codec, team: &dyn Team) -> Result<()> {
        let payload = &self.payloads[&codec][self.turn % SITES];
        let theta = &mut self.global.theta[0];
        Payload::check(payload, theta.len(), team)?.add_to(theta, team);
        Ok(())
    }

    /// As a coordinator looks at a contribution when it comes.
    fn look(&self, codec: Codec, site: usize, team: &dyn Team) -> Result<Squares> {
        let payload = Payload::check(&self.payloads[&codec][site], self.weights(), team)?;
        Ok(Squares::of(&payload, team))
    }

    /// Merges all sites' contributions into the memory of the merge before, as a coordinator does.
    fn merge(&mut self, codec: Codec, team: &dyn Team) -> Result<()> {
        self.memory = self.merged(codec, team)?.into_memory();
        Ok(())
    }

    fn merged(&mut self, codec: Codec, team: &dyn Team) -> Result<Merged> {
        let seen = self.payloads[&codec].iter().zip(&self.squares[&codec]);
        let weighted = seen.zip(0..).map(|((bytes, squares), site)| {
            let payload = Payload::parse(bytes, self.weights())?.knowing(squares);
            let name = Digest::of(&[site]);
            Ok(Weighted { weight: 1.0, steps: 1, trust: 0.0, quality: 0.0, name, stale: false, payload })
        });
        let contributions = weighted.collect::<Result<Vec<_>>>()?;
        let memory = std::mem::take(&mut self.memory);
        let manifest = self.global.manifest();
        Ok(merge(manifest, FRAGMENT, &recipe(), &contributions, &[], memory, team))
    }

    /// The outer step after a merge.
    fn step(&mut self, team: &dyn Team) -> Result<()> {
        let step = self.global.follow(FRAGMENT, &self.merged, &recipe(), team).map_err(|error| anyhow!(error))?;
        black_box(step);
        Ok(())
    }
}

/// Adds a step to what was not delivered before.
#[inline(always)]
fn walk(wish: &mut [f32], theta: &[f32], from: &[f32]) {
    for ((wish, theta), from) in wish.iter_mut().zip(theta).zip(from) {
        *wish += from - theta;
    }
}

/// How a run merges unless its operator wishes otherwise.
fn recipe() -> Recipe {
    let sync = Sync::default();
    sync.recipe(DOWN, 1.0, sync.guard())
}

/// A stretch of noise; neighbouring windows have nothing in common, weight by weight.
fn window(noise: &[f32], number: usize, count: usize) -> &[f32] {
    let start = number % WINDOWS * WINDOW_STEP;
    &noise[start..start + count]
}

/// Small numbers with tails longer than a normal distribution's, as steps of training are.
fn noise(count: usize) -> Vec<f32> {
    let mut rng = Rng::new(1);
    (0..count).map(|_| (rng.normal() * (0.5 * rng.normal()).exp() * 1e-3) as f32).collect()
}
