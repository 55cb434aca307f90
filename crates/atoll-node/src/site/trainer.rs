//! The trainer: the thread that owns the engine. It takes one inner step after another; between two of them it does what
//! the [`clerk`](super::clerk) asks, and has the clerk's machine say itself what comes next, so that no step waits for a
//! thread to wake up.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use atoll_core::delta::{self, Change};
use atoll_core::engine::{Engine, EngineError, Progress};
use atoll_core::journal::Evaluated;
use atoll_core::manifest::FragmentId;
use atoll_core::round::SiteEvent;

use super::HeldOut;
use super::clerk::Clerk;
use super::net::Incoming;
use super::toll;
use crate::coordinator::lock;
use crate::data::Leases;

/// Something to do with the engine. Tasks are done one after the other.
pub(super) enum Task {
    /// Take these inner steps.
    Train(u32),
    /// Change weights, and then report this.
    Change(FragmentId, Change, SiteEvent),
    /// Copy weights out, into this memory.
    Read(FragmentId, Vec<f32>, mpsc::Sender<Result<Vec<f32>, EngineError>>),
    /// Look at the held-out loss of these weights.
    Evaluate(Look),
    /// There is nothing more to do.
    End,
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
    /// Usual seconds of copying a fragment's weights and of adding to them.
    pub(super) copying_seconds: f64,
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
    /// Since when the engine could have taken the next step, or from when on it may.
    ready: Instant,
    /// Inner steps that were ordered as soon as those before were done.
    next: Option<u32>,
    /// Usual seconds of copying a fragment's weights, and of changing them.
    copying: f64,
    changing: f64,
}

impl Trainer {
    pub(super) fn new(
        engine: Box<dyn Engine>,
        leases: Leases,
        held_out: HeldOut,
        share: Share,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let ready = Instant::now();
        Self { engine, leases, held_out, share, stop, ready, next: None, copying: 0.0, changing: 0.0 }
    }

    /// Does tasks until there is nothing more to do, or one fails. What is left then goes with the queue, so that nobody
    /// waits for it.
    #[allow(clippy::needless_pass_by_value, reason = "it ends with this")]
    pub(super) fn work(mut self, tasks: mpsc::Receiver<Task>, clerk: &Mutex<Clerk>, inbox: &mpsc::Sender<Incoming>) {
        let _panic = Panic(inbox.clone());
        loop {
            let done = match self.next.take() {
                Some(steps) => self.train(steps, &tasks, clerk),
                None => match tasks.recv() {
                    Ok(Task::Train(steps)) => {
                        self.ready = self.ready.max(Instant::now()); // What was waited for was not synchronizing.
                        self.train(steps, &tasks, clerk)
                    }
                    Ok(Task::End) | Err(_) => return,
                    Ok(task) => self.interrupt(task, inbox),
                },
            };
            match done {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    let _ = inbox.send(Incoming::Paused(Err(error))); // Whoever would hear it has stopped.
                    return;
                }
            }
        }
    }

    /// A task while nothing is trained. False if nobody wants to know.
    fn interrupt(&mut self, task: Task, inbox: &mpsc::Sender<Incoming>) -> Result<bool, EngineError> {
        let mut pause = Pause::default();
        self.perform(task, &mut pause)?;
        pause.copying_seconds = self.copying_seconds();
        Ok(pause.events.is_empty() || inbox.send(Incoming::Paused(Ok(pause))).is_ok())
    }

    /// A copy of a fragment's weights as they are now, in this memory.
    pub(super) fn read(&mut self, fragment: FragmentId, memory: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        let len = self.engine.manifest().fragment_len(fragment).unwrap_or(0);
        let mut weights = delta::of_length(memory, len);
        let began = Instant::now();
        self.engine.read(fragment, &mut weights)?;
        toll::note(&mut self.copying, began.elapsed());
        Ok(weights)
    }

    /// Changes a fragment's weights; `pause` gets the memory.
    fn change(&mut self, fragment: FragmentId, change: Change, pause: &mut Pause) -> Result<(), EngineError> {
        let began = Instant::now();
        pause.spare = change.apply(self.engine.as_mut(), fragment)?;
        toll::note(&mut self.changing, began.elapsed());
        Ok(())
    }

    /// These steps come next.
    pub(super) fn order(&mut self, steps: u32) {
        self.next = Some(steps);
    }

    /// Takes steps as soon as the site's share allows, does what was asked for until they are done, and hears what
    /// comes next. False if nothing does.
    fn train(&mut self, steps: u32, tasks: &mpsc::Receiver<Task>, clerk: &Mutex<Clerk>) -> Result<bool, EngineError> {
        let mut pause = Pause::default();
        self.do_what_waits(tasks, &mut pause)?;
        self.add_waiting(clerk, &mut pause)?;
        if !self.is_stopped() {
            pause.exposed = self.ready.elapsed();
            pause.events.push(self.step(steps)?);
            while let Ok(task) = tasks.try_recv() {
                self.perform(task, &mut pause)?;
            }
        }
        self.add_waiting(clerk, &mut pause)?;
        // What has come since is little, and nothing may come between it and the next look at the weights.
        let mut clerk = lock(clerk);
        self.add(clerk.take_waiting(), &mut pause)?;
        pause.copying_seconds = self.copying_seconds();
        Ok(clerk.pause(pause, self))
    }

    fn copying_seconds(&self) -> f64 {
        self.copying + self.changing
    }

    /// Adds what commits have changed, while the clerk goes on.
    fn add_waiting(&mut self, clerk: &Mutex<Clerk>, pause: &mut Pause) -> Result<(), EngineError> {
        let waiting = lock(clerk).take_waiting();
        self.add(waiting, pause)
    }

    fn add(&mut self, changes: BTreeMap<FragmentId, Vec<f32>>, pause: &mut Pause) -> Result<(), EngineError> {
        for (fragment, change) in changes {
            self.change(fragment, Change::Add(change), pause)?;
        }
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Does tasks until the next step may begin.
    fn do_what_waits(&mut self, tasks: &mpsc::Receiver<Task>, pause: &mut Pause) -> Result<(), EngineError> {
        loop {
            let left = self.ready.saturating_duration_since(Instant::now());
            match tasks.recv_timeout(left.min(LOOK)) {
                Ok(task) => self.perform(task, pause)?,
                Err(_) if left.is_zero() || self.is_stopped() => return Ok(()),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Does a task other than steps.
    fn perform(&mut self, task: Task, pause: &mut Pause) -> Result<(), EngineError> {
        match task {
            // The machine gives one order at a time, and none after the last.
            Task::Train(steps) => self.order(steps),
            Task::End => self.next = None,
            Task::Change(fragment, change, event) => {
                self.change(fragment, change, pause)?;
                pause.events.push(event);
            }
            Task::Read(fragment, memory, answer) => {
                let _ = answer.send(self.read(fragment, memory)); // Whoever asked may have stopped.
            }
            Task::Evaluate(_) if self.is_stopped() => {}
            Task::Evaluate(Look { request, commits, thetas }) => {
                let seen = delta::evaluate(thetas, self.engine.as_mut(), &self.held_out.batches)?;
                let bytes = self.held_out.bytes;
                let evaluated = Evaluated { commits, nats: seen.nats, tokens: seen.tokens, bytes };
                pause.events.push(SiteEvent::Evaluated(request, evaluated));
            }
        }
        Ok(())
    }

    fn step(&mut self, steps: u32) -> Result<SiteEvent, EngineError> {
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

/// Tells the clerk of a trainer that panics.
struct Panic(mpsc::Sender<Incoming>);

impl Drop for Panic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = EngineError::Device("the engine has panicked".to_string());
            let _ = self.0.send(Incoming::Paused(Err(error))); // Whoever would hear it has stopped.
        }
    }
}
