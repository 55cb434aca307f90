//! An engine whose compute is emulated: an inner step takes exactly as long as it is told to, as on an
//! accelerator that nobody has to own. All else is real: it consumes its leased samples, holds a vector of
//! the model's size in memory, and hands it out and takes it back like any engine.
//!
//! A step must move the weights, or there would be nothing to send. Within its time (not beside it) it adds
//! noise to one chunk in [`SWEEP`], as much as that many steps of training would, so that after as many
//! steps every weight has moved. The noise is heavy-tailed, its length differs between chunks, half of it is
//! common to all sites, and it keeps its direction for [`TURN`] steps: the pseudo-gradients are dense, and
//! neither zero, periodic nor equal. Two tables read at changing places make it: 16 GB/s, some 1 ms a step.
//!
//! What the engine does is kept in a [`Diary`], for whoever asks afterwards where the time went.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use atoll_core::engine::{Batch, Engine, EngineError, Evaluation, Feed, Progress};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::rng::{Rng, mix};
use serde::{Deserialize, Serialize};

/// A step moves one chunk in so many.
const SWEEP: usize = 32;
/// Steps for which the noise keeps its direction.
const TURN: u64 = 256;
/// Weights that share a place in the tables.
const CHUNK: usize = 1024;
/// Values in a table, and a chunk more, so that any place has a chunk behind it.
const TABLE: usize = 1 << 16;
/// How far a weight moves per step, typically.
const STEP_LENGTH: f64 = 3e-5;

/// The engine.
pub(crate) struct Emulated {
    manifest: Manifest,
    weights: Vec<Vec<f32>>,
    feed: Box<dyn Feed>,
    batch: Batch,
    rows: usize,
    step: Duration,
    steps: u64,
    noise: Noise,
    diary: Diary,
}

impl Emulated {
    /// An engine of that layout, all weights zero. `seed` tells sites apart.
    pub(crate) fn new(
        manifest: Manifest,
        feed: Box<dyn Feed>,
        rows: usize,
        step: Duration,
        seed: u64,
        diary: Diary,
    ) -> Self {
        let weights = manifest.zeros();
        Self { manifest, weights, feed, batch: Batch::default(), rows, step, steps: 0, noise: Noise::new(seed), diary }
    }

    fn fragment(&mut self, fragment: FragmentId, len: usize) -> Result<&mut Vec<f32>, EngineError> {
        let weights = self.weights.get_mut(fragment.index()).filter(|weights| weights.len() == len);
        weights.ok_or(EngineError::Layout { fragment, len })
    }

    /// One inner step, and the moment at which it ended.
    fn take_step(&mut self) -> Result<(), EngineError> {
        if self.steps == 0 {
            go_first();
        }
        let began = Instant::now();
        self.feed.next(self.rows, &mut self.batch)?;
        for (index, weights) in self.weights.iter_mut().enumerate() {
            self.noise.add(weights, index as u64, self.steps);
        }
        self.steps += 1;
        // A step that the processor held up too long is longer: nothing is made up for.
        std::thread::sleep((began + self.step).saturating_duration_since(Instant::now()));
        self.diary.note(Act::Step, began)
    }
}

impl Engine for Emulated {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn train(&mut self, steps: u32) -> Result<Progress, EngineError> {
        let mut progress = Progress::default();
        for _ in 0..steps {
            self.take_step()?;
            progress.steps += 1;
            progress.tokens += (self.batch.rows * self.batch.length) as u64;
        }
        progress.loss = 2.0 + 3.5 / (1.0 + self.steps as f64 / 500.0);
        Ok(progress)
    }

    fn read(&mut self, fragment: FragmentId, weights: &mut [f32]) -> Result<(), EngineError> {
        let began = Instant::now();
        weights.copy_from_slice(self.fragment(fragment, weights.len())?);
        self.diary.note(Act::Read(fragment.0), began)
    }

    fn write(&mut self, fragment: FragmentId, weights: &[f32]) -> Result<(), EngineError> {
        let began = Instant::now();
        self.fragment(fragment, weights.len())?.copy_from_slice(weights);
        self.diary.note(Act::Write(fragment.0), began)
    }

    fn add(&mut self, fragment: FragmentId, change: &[f32]) -> Result<(), EngineError> {
        let began = Instant::now();
        atoll_core::delta::add(self.fragment(fragment, change.len())?, change);
        self.diary.note(Act::Write(fragment.0), began)
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<Evaluation, EngineError> {
        let began = Instant::now();
        let tokens = (batch.rows * batch.length) as u64;
        let weight = self.weights.first().and_then(|weights| weights.first()).copied().unwrap_or(0.0);
        let nats = tokens as f64 * (2.5 + f64::from(weight.clamp(-1.0, 1.0)));
        self.diary.note(Act::Evaluate, began)?;
        Ok(Evaluation { nats, tokens })
    }
}

/// An accelerator does not queue for the host's processor, so the thread that stands for it goes before all others.
/// Without the right to that, steps last longer where four sites share two cores, and the figures say so.
fn go_first() {
    use thread_priority::{
        RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
        thread_native_id,
    };
    let policy = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::Fifo);
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy) {
        eprintln!("NOTE: the emulated accelerators have no priority over other work: {error:?}");
    }
}

/// What steps add to weights.
struct Noise {
    seed: u64,
    common: Vec<f32>,
    own: Vec<f32>,
}

impl Noise {
    fn new(seed: u64) -> Self {
        Self { seed, common: table(0), own: table(mix(seed + 1)) }
    }

    /// What the step after `steps` others adds to fragment number `fragment`.
    fn add(&self, weights: &mut [f32], fragment: u64, steps: u64) {
        let first = (steps % SWEEP as u64) as usize;
        for (index, chunk) in weights.chunks_mut(CHUNK).enumerate().skip(first).step_by(SWEEP) {
            let place = mix(mix(fragment << 32 | index as u64) + steps / TURN);
            let scale = (0.5 + 1.5 * (place >> 48) as f32 / 65536.0) * SWEEP as f32 * STEP_LENGTH as f32;
            let (common, own) = (place as usize % TABLE, mix(place ^ self.seed) as usize % TABLE);
            let noise = self.common[common..].iter().zip(&self.own[own..]);
            for (weight, (common, own)) in chunk.iter_mut().zip(noise) {
                *weight += scale * (common + own);
            }
        }
    }
}

/// Values whose tails are heavier than a normal distribution's: its scale is random too.
fn table(seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..TABLE + CHUNK).map(|_| (rng.normal() * (0.7 * rng.normal()).exp() * 0.6) as f32).collect()
}

/// Something an engine did, and to which fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Act {
    Step,
    Read(u16),
    /// Also an `add`.
    Write(u16),
    Evaluate,
}

/// When it did it, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Moment {
    pub(crate) act: Act,
    pub(crate) begin: f64,
    pub(crate) end: f64,
}

/// A file with a line per moment. Every line is written at once, so the process may be killed.
pub(crate) struct Diary {
    file: File,
    path: PathBuf,
    start: Instant,
    unix: Duration,
}

impl Diary {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("{} cannot be written", path.display()))?;
        let unix = SystemTime::now().duration_since(UNIX_EPOCH)?;
        Ok(Self { file, path: path.to_path_buf(), start: Instant::now(), unix })
    }

    fn note(&mut self, act: Act, began: Instant) -> Result<(), EngineError> {
        let seconds = |at: Instant| (self.unix + at.duration_since(self.start)).as_secs_f64();
        let moment = Moment { act, begin: seconds(began), end: seconds(Instant::now()) };
        let written = serde_json::to_string(&moment).map_err(std::io::Error::from);
        let written = written.and_then(|line| self.file.write_all(format!("{line}\n").as_bytes()));
        written.map_err(|error| EngineError::Device(format!("{}: {error}", self.path.display())))
    }

    /// What is in the diary so far; none if there is none.
    pub(crate) fn read(path: &Path) -> Vec<Moment> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::engine::conformance;
    use atoll_core::model::ModelConfig;

    struct Zeros;

    impl Feed for Zeros {
        fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
            *batch = Batch { rows, length: 8, tokens: vec![0; rows * 9], ..Batch::default() };
            Ok(())
        }
    }

    fn engine(seed: u64, diary: &Path) -> Emulated {
        let model = ModelConfig::preset("nano", 257, 16).unwrap();
        let manifest = Manifest::balanced(model.tensors(), 4);
        Emulated::new(manifest, Box::new(Zeros), 2, Duration::from_millis(1), seed, Diary::new(diary).unwrap())
    }

    #[test]
    fn it_obeys_the_laws_of_engines() {
        let folder = tempfile::tempdir().unwrap();
        let batch = Batch { rows: 1, length: 8, tokens: vec![0; 9], ..Batch::default() };
        conformance::check(&mut || Box::new(engine(1, &folder.path().join("diary"))), &batch).unwrap();
    }

    #[test]
    fn after_a_sweep_every_weight_has_moved_and_sites_differ() {
        let folder = tempfile::tempdir().unwrap();
        let (mut one, mut two) = (engine(1, &folder.path().join("one")), engine(2, &folder.path().join("two")));
        one.train(SWEEP as u32).unwrap();
        two.train(SWEEP as u32).unwrap();
        assert!(one.weights.iter().flatten().all(|&weight| weight != 0.0 && weight.is_finite()));
        let cosine = atoll_core::delta::cosine(&one.weights[0], &two.weights[0]);
        assert!((0.3..0.7).contains(&cosine), "{cosine}");
        let moments = Diary::read(&folder.path().join("one"));
        assert_eq!(moments.len(), SWEEP);
        assert!(moments.iter().all(|moment| moment.act == Act::Step && moment.end - moment.begin >= 0.001));
    }
}
