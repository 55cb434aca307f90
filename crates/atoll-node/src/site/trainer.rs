//! The trainer: the thread that owns the engine. It takes one inner step after another; between two of them it copies
//! weights out, adds changes and looks at held-out text, as the [`clerk`](super::clerk) asks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use atoll_core::delta::{self, Change};
use atoll_core::engine::{Engine, EngineError, Progress};
use atoll_core::journal::Evaluated;
use atoll_core::manifest::FragmentId;
use atoll_core::round::SiteEvent;

use super::HeldOut;
use super::net::Incoming;
use crate::data::Leases;

/// Something to do with the engine. Tasks are done one after the other.
pub(super) enum Task {
    /// Take these inner steps.
    Train(Steps),
    /// Change weights, and then report this.
    Change(FragmentId, Change, SiteEvent),
    /// Copy weights out, into this memory.
    Read(FragmentId, Vec<f32>, mpsc::Sender<Result<Vec<f32>, EngineError>>),
    /// Look at the held-out loss of these weights.
    Evaluate(Look),
}

/// Inner steps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Steps {
    /// How many.
    pub(super) count: u32,
    /// Whether they were ordered as soon as it was known that those before were done.
    pub(super) at_once: bool,
}

/// A look at the global model.
pub(super) struct Look {
    /// The coordinator's number for it.
    pub(super) request: u64,
    /// Commits in the weights.
    pub(super) commits: u64,
    /// The weights, a vector per fragment.
    pub(super) thetas: Vec<Vec<f32>>,
}

/// What was done until the engine had nothing more to do.
#[derive(Default)]
pub(super) struct Pause {
    /// For the machine, in this order.
    pub(super) events: Vec<SiteEvent>,
    /// Time in which the engine could have trained, had it not been for synchronizing.
    pub(super) exposed: Duration,
    /// Memory for the next reading of weights.
    pub(super) spare: Vec<f32>,
}

/// A site that trains at a share of its threads makes up for at most this much lost time.
const LAG: Duration = Duration::from_secs(2);
/// How soon a trainer that holds itself back notices that it is to stop.
const LOOK: Duration = Duration::from_millis(100);

/// Processor time that training may take.
pub(super) struct Share {
    /// Processor seconds per second; none if there is no limit.
    limit: Option<f64>,
    /// Up to when the steps so far would have lasted at this share.
    until: Instant,
}

impl Share {
    /// This `share`, at most 1, of so many threads.
    pub(super) fn new(share: f64, threads: usize) -> Self {
        Self { limit: (share < 1.0).then(|| share * threads.max(1) as f64), until: Instant::now() }
    }

    /// When the next step may begin after one that began then and took so much of the processor. What counts is
    /// processor time, not the wall time: a neighbour must not slow us down twice.
    fn take(&mut self, began: Instant, cpu: Duration) -> Instant {
        let Some(limit) = self.limit else { return Instant::now() };
        // A step that a neighbour held up is made up for by the next ones, within limits.
        let earliest = began.checked_sub(LAG).unwrap_or(began);
        self.until = self.until.max(earliest) + cpu.div_f64(limit);
        self.until
    }
}

pub(super) struct Trainer {
    engine: Box<dyn Engine>,
    leases: Leases,
    held_out: HeldOut,
    share: Share,
    stop: Arc<AtomicBool>,
    /// Since when the engine could have taken the next step.
    ready: Instant,
}

impl Trainer {
    pub(super) fn new(
        engine: Box<dyn Engine>,
        leases: Leases,
        held_out: HeldOut,
        share: Share,
        stop: Arc<AtomicBool>,
    ) -> Self {
        Self { engine, leases, held_out, share, stop, ready: Instant::now() }
    }

    /// Does tasks until nobody can ask for more, or one fails. What is left then goes with the queue, so that nobody
    /// waits for it.
    #[allow(clippy::needless_pass_by_value, reason = "it ends with this")]
    pub(super) fn work(mut self, tasks: mpsc::Receiver<Task>, clerk: &mpsc::Sender<Incoming>) {
        while let Ok(task) = tasks.recv() {
            let done = self.do_until_pause(task, &tasks);
            if done.as_ref().is_ok_and(|pause| pause.events.is_empty()) {
                continue;
            }
            let has_failed = done.is_err();
            if clerk.send(Incoming::Paused(done)).is_err() || has_failed {
                return;
            }
        }
    }

    /// Does a task; after a step also those that have come meanwhile, so that the clerk sees at once all that is new.
    fn do_until_pause(&mut self, task: Task, tasks: &mpsc::Receiver<Task>) -> Result<Pause, EngineError> {
        let mut pause = Pause::default();
        let has_stepped = matches!(task, Task::Train(_));
        self.perform(task, &mut pause)?;
        while has_stepped && !self.stop.load(Ordering::Relaxed) {
            let left = self.ready.saturating_duration_since(Instant::now());
            match tasks.recv_timeout(left.min(LOOK)) {
                Ok(task) => self.perform(task, &mut pause)?,
                Err(mpsc::RecvTimeoutError::Timeout) if !left.is_zero() => {}
                Err(_) => break,
            }
        }
        Ok(pause)
    }

    fn perform(&mut self, task: Task, pause: &mut Pause) -> Result<(), EngineError> {
        match task {
            Task::Train(steps) => {
                if steps.at_once {
                    pause.exposed += self.ready.elapsed();
                }
                pause.events.push(self.train(steps.count)?);
            }
            Task::Change(fragment, change, event) => {
                pause.spare = change.apply(self.engine.as_mut(), fragment)?;
                pause.events.push(event);
            }
            Task::Read(fragment, memory, answer) => {
                let len = self.engine.manifest().fragment_len(fragment).unwrap_or(0);
                let mut weights = delta::of_length(memory, len);
                let read = self.engine.read(fragment, &mut weights);
                let _ = answer.send(read.map(|()| weights)); // Whoever asked may have stopped.
            }
            Task::Evaluate(Look { request, commits, thetas }) => {
                let seen = delta::evaluate(thetas, self.engine.as_mut(), &self.held_out.batches)?;
                let bytes = self.held_out.bytes;
                let evaluated = Evaluated { commits, nats: seen.nats, tokens: seen.tokens, bytes };
                pause.events.push(SiteEvent::Evaluated(request, evaluated));
            }
        }
        Ok(())
    }

    fn train(&mut self, steps: u32) -> Result<SiteEvent, EngineError> {
        let (began, cpu) = (Instant::now(), cpu_time::ProcessTime::now());
        let progress = match self.engine.train(steps) {
            Err(EngineError::Starved { .. }) => Progress::default(),
            other => other?,
        };
        self.ready = self.share.take(began, cpu.elapsed());
        let seconds = self.ready.max(Instant::now()).duration_since(began).as_secs_f64();
        Ok(SiteEvent::Stepped { progress, trained: self.leases.take_trained(), seconds })
    }
}
