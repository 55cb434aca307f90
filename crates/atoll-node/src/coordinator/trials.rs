//! Trials: now and then each contribution to a commit is tried alone on text that nobody trains on. What comes of it
//! goes into the journal; how much a site that does harm weighs then is the guard's.
//!
//! ```text
//! a merge is ordered ──begin──▶ Θ and payloads ──a thread──▶ losses without, and with each ──end──▶ Event::Tried
//! ```
//!
//! The coordinator tries by itself and shows contributions to nobody. A trial has a copy of the model, and its engine has two: its
//! weights, and the same ready for products.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Result, bail};
use atoll_core::engine::{Batch, Engine, EngineError, NoFeed, evaluate_all, write_weights};
use atoll_core::journal::Accepted;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::outer::{Global, step_alone};
use atoll_core::round::{Merge, Tried};
use atoll_core::site::{SiteId, Time};

use super::Prepared;
use crate::crew::{Crew, stand_back};
use crate::data::Tokenizer;
use crate::run::{RunDir, Terms};
use crate::site::{Parts, held_out, open_data};
use crate::store::Store;

/// Makes an engine that is to evaluate.
pub type MakeEngine = fn(Parts) -> Result<Box<dyn Engine>>;

/// Between two trials lies so many times what one takes.
const TRIALS_APART: f64 = 10.0;

/// Who tries contributions, and when.
pub(super) struct Trials {
    kit: Kit,
    /// None before the first trial and while one is under way.
    bench: Option<Bench>,
    state: State,
}

enum State {
    /// The next may begin then.
    Due(Time),
    Running,
    /// One failed, and so would the next.
    Failed,
}

/// What a bench is made from.
#[derive(Clone)]
struct Kit {
    text: PathBuf,
    dir: RunDir,
    terms: Terms,
    manifest: Manifest,
    tokenizer: Tokenizer,
    make: MakeEngine,
}

/// An engine and the text that it evaluates on.
struct Bench {
    engine: Box<dyn Engine>,
    batches: Vec<Batch>,
}

/// What a trial has come to.
pub(super) struct Finding {
    tried: Option<Tried>,
    bench: Bench,
    seconds: f64,
}

impl Trials {
    /// Nothing if the run is to have none.
    ///
    /// # Errors
    /// If there is no such text, or nobody to try.
    pub(super) fn of(prepared: &Prepared, make: Option<MakeEngine>) -> Result<Option<Self>> {
        let Some(text) = prepared.config.trial_text(&prepared.dir)? else { return Ok(None) };
        let Some(make) = make else {
            bail!("this coordinator has no engine to try contributions with\nhint: leave out coordinator.trial_text");
        };
        let Prepared { dir, config, model, manifest, tokenizer } = prepared;
        let kit = Kit {
            text,
            dir: dir.clone(),
            terms: Terms::of(config, model),
            manifest: manifest.clone(),
            tokenizer: tokenizer.clone(),
            make,
        };
        Ok(Some(Self { kit, bench: None, state: State::Due(Time(0)) }))
    }

    /// Whether one may begin with this merge. One contribution alone has no peers.
    pub(super) fn is_due(&self, now: Time, merge: &Merge) -> bool {
        matches!(self.state, State::Due(at) if now >= at) && merge.contributions.len() > 1
    }

    /// The work of trying what is to be merged, cut off from the heart. `global` is the model without it.
    pub(super) fn begin(
        &mut self,
        merge: &Merge,
        global: &Global,
        store: &Store,
    ) -> impl FnOnce() -> Result<Finding> + Send + use<> {
        let (theta, store, kit, bench) = (global.theta.clone(), store.clone(), self.kit.clone(), self.bench.take());
        let merge = merge.clone();
        self.state = State::Running;
        let work = move || {
            stand_back(); // And so do the engine's threads, which this one starts.
            let attempt = Attempt::read(merge, theta, &store); // At once: payloads are not kept for long.
            let mut bench = bench.map_or_else(|| kit.bench(), Ok)?;
            let began = Instant::now();
            let tried = attempt.map(|attempt| attempt.make(&mut bench)).transpose()?;
            Ok(Finding { tried, bench, seconds: began.elapsed().as_secs_f64() })
        };
        move || catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| bail!("the thread that tried them died"))
    }

    /// Takes in what a trial has come to.
    pub(super) fn end(&mut self, now: Time, finding: Result<Finding>) -> Option<Tried> {
        match finding {
            Ok(Finding { tried, bench, seconds }) => {
                self.bench = Some(bench);
                self.state = State::Due(now.after(TRIALS_APART * seconds));
                tried
            }
            Err(error) => {
                tracing::error!("contributions cannot be tried: {error:#}; the run goes on without");
                self.state = State::Failed;
                None
            }
        }
    }
}

impl Kit {
    /// Reads the text, which may take a while, and makes an engine.
    fn bench(&self) -> Result<Bench> {
        let Self { text, dir, terms, manifest, tokenizer, make } = self;
        let training = &terms.config.training;
        let never = AtomicBool::new(false);
        let mut notice = |line: &str| tracing::info!("text for trials: {line}");
        let dataset = open_data(Some(text), &dir.trials(), &terms.config, tokenizer, &never, &mut notice)?;
        let Some(dataset) = dataset else { bail!("reading the text was stopped") };
        let batches = held_out(&dataset, tokenizer, training, training.rows)?.batches;
        if batches.is_empty() {
            bail!("{} has no held-out text\nhint: more documents, or a greater data.held_out", text.display());
        }
        let parts =
            Parts { terms: terms.clone(), manifest: manifest.clone(), rows: training.rows, feed: Box::new(NoFeed) };
        Ok(Bench { engine: make(parts)?, batches })
    }
}

impl Bench {
    /// Nats per token of the engine's weights; of weights with which nothing can be computed, infinite.
    fn loss(&mut self) -> Result<f64, EngineError> {
        match evaluate_all(self.engine.as_mut(), &self.batches) {
            Ok(all) => Ok(all.nats / all.tokens.max(1) as f64),
            Err(EngineError::NonFinite { .. }) => Ok(f64::INFINITY),
            Err(error) => Err(error),
        }
    }
}

/// One trial.
struct Attempt {
    fragment: FragmentId,
    version: u64,
    theta: Vec<Vec<f32>>,
    /// Whose, its payload, and the inner steps in it.
    contributions: Vec<(SiteId, Vec<u8>, u64)>,
}

impl Attempt {
    /// Nothing if the payloads of fewer than two are here.
    fn read(merge: Merge, theta: Vec<Vec<f32>>, store: &Store) -> Option<Self> {
        let Merge { fragment, version, contributions, .. } = merge;
        let read = |accepted: Accepted| Some((accepted.site, store.get(accepted.payload)?, accepted.steps));
        let contributions: Vec<(SiteId, Vec<u8>, u64)> = contributions.into_iter().filter_map(read).collect();
        (contributions.len() > 1).then_some(Self { fragment, version, theta, contributions })
    }

    fn make(self, bench: &mut Bench) -> Result<Tried> {
        let Self { fragment, version, theta, contributions } = self;
        write_weights(bench.engine.as_mut(), &theta)?;
        let before = bench.loss()?;
        let own = &theta[fragment.index()];
        let mut after = Vec::new();
        for (site, payload, steps) in contributions {
            // One that does not decode is refused by the merge.
            let Ok(alone) = step_alone(own, &payload, &Crew) else { continue };
            bench.engine.write(fragment, &alone)?;
            after.push((site, bench.loss()?, steps));
        }
        Ok(Tried { fragment, version, before, after })
    }
}
