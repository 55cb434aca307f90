//! The clerk shows the machine what happens and carries out what it orders. What comes in from elsewhere is shown as it comes,
//! on a thread of the clerk's own, whether the engine is in the middle of a step or not; that a step is done, the trainer
//! shows on its own thread. The clerk waits for the engine only for copies of weights, which are asked for between two steps.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use atoll_core::delta::{self, Change};
use atoll_core::engine::EngineError;
use atoll_core::hash::Digest;
use atoll_core::manifest::FragmentId;
use atoll_core::round::{Measured, Site, SiteEvent, SiteOrder, Stop};
use atoll_core::site::Time;

use super::desk::{Desk, Done, Job};
use super::meter::Meter;
use super::net::{Command, Incoming};
use super::parcel::Parcel;
use super::trainer::{Look, Pause, Task, Trainer};
use crate::coordinator::lock;
use crate::data::Leases;

/// The clerk looks up at least this often when nothing happens.
const IDLE: Duration = Duration::from_millis(100);

pub(super) struct Clerk {
    machine: Site,
    desk: Desk,
    meter: Meter,
    leases: Leases,
    tasks: mpsc::Sender<Task>,
    commands: tokio::sync::mpsc::UnboundedSender<Command>,
    start: Instant,
    /// Encoded contributions that are not settled.
    payloads: BTreeMap<Digest, Arc<Vec<u8>>>,
    /// Fetched bytes that the desk has not taken yet.
    fetched: BTreeMap<Digest, Parcel>,
    /// Commits that came before they were asked for.
    pushed: Pushed,
    /// Memory for the next reading of weights.
    spare: Vec<f32>,
    /// What commits that came during the step under way add to the weights.
    waiting: BTreeMap<FragmentId, Vec<f32>>,
    /// A step was ordered whose end was not shown yet.
    is_stepping: bool,
    /// Events that the machine has not seen yet.
    events: VecDeque<SiteEvent>,
    /// Time between steps in which the engine could have trained.
    exposed: Duration,
    /// What the desk and the network had done before the first step, beside which nothing hides.
    before_steps: Option<Duration>,
    /// Fragment and version of the newest commit that is in the site's copy of the model.
    newest_commit: Option<(FragmentId, u64)>,
    /// How it has ended, for its thread; and that it has, for the trainer.
    ended: Option<Result<Stop>>,
    is_over: bool,
}

/// Payloads of commits that came unasked, oldest first.
#[derive(Default)]
struct Pushed(VecDeque<(Digest, Vec<u8>)>);

impl Pushed {
    /// More than a coordinator sends ahead; what it drops is asked for.
    const MOST: usize = 1 << 10;

    fn put(&mut self, digest: Digest, bytes: Vec<u8>) {
        self.0.push_back((digest, bytes));
        if self.0.len() > Self::MOST {
            self.0.pop_front();
        }
    }

    fn take(&mut self, digest: Digest) -> Option<Vec<u8>> {
        let index = self.0.iter().position(|(at, _)| *at == digest)?;
        self.0.remove(index).map(|(_, bytes)| bytes)
    }
}

/// Lets the trainer go when the clerk's thread ends, however it does.
struct End(mpsc::Sender<Task>);

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.0.send(Task::End); // The trainer may have stopped before.
    }
}

fn gone() -> anyhow::Error {
    anyhow!("the thread that trains has stopped")
}

/// Where the clerk sends to: the trainer and the network.
pub(super) type Outboxes = (mpsc::Sender<Task>, tokio::sync::mpsc::UnboundedSender<Command>);

impl Clerk {
    pub(super) fn new(machine: Site, desk: Desk, meter: Meter, leases: Leases, (tasks, commands): Outboxes) -> Self {
        Self {
            machine,
            desk,
            meter,
            leases,
            tasks,
            commands,
            start: Instant::now(),
            payloads: BTreeMap::new(),
            fetched: BTreeMap::new(),
            pushed: Pushed::default(),
            spare: Vec::new(),
            waiting: BTreeMap::new(),
            is_stepping: false,
            events: VecDeque::new(),
            exposed: Duration::ZERO,
            before_steps: None,
            newest_commit: None,
            ended: None,
            is_over: false,
        }
    }

    /// Follows the run to its end, and keeps what the codec of the way up has not delivered.
    ///
    /// # Errors
    /// Why the site cannot go on.
    pub(super) fn run(clerk: &Mutex<Self>, inbox: &mpsc::Receiver<Incoming>, stop: &AtomicBool) -> Result<Stop> {
        let _end = End(lock(clerk).tasks.clone());
        let mut leaving = false;
        loop {
            let incoming = inbox.recv_timeout(IDLE);
            let mut clerk = lock(clerk);
            let heard = clerk.hear(incoming, inbox);
            if stop.load(Ordering::Relaxed) && !std::mem::replace(&mut leaving, true) {
                clerk.events.push_back(SiteEvent::Leave);
            }
            if let Err(error) = heard.and_then(|()| clerk.attend(None)) {
                clerk.end(Err(error));
            }
            if let Some(ended) = clerk.ended.take() {
                let kept = clerk.desk.close(matches!(ended, Ok(Stop::Finished)));
                // Where the trainer is gone it has said why, among what was not heard yet.
                let why = inbox.try_iter().find_map(|incoming| match incoming {
                    Incoming::Paused(Err(error)) => Some(clerk.give_up(error.into(), "training stopped")),
                    _ => None,
                });
                let ended = ended.map_err(|error| why.unwrap_or(error));
                return ended.and_then(|stop| kept.map(|()| stop));
            }
        }
    }

    fn end(&mut self, result: Result<Stop>) {
        (self.ended, self.is_over) = (Some(result), true);
    }

    /// What commits that came during a step add to the weights, now that the step is over.
    pub(super) fn take_waiting(&mut self) -> BTreeMap<FragmentId, Vec<f32>> {
        std::mem::take(&mut self.waiting)
    }

    /// The trainer has come to the end of a step, and nothing waits any more: says to it what comes next. False if nothing
    /// does.
    pub(super) fn pause(&mut self, pause: Pause, trainer: &mut Trainer) -> bool {
        self.is_stepping = false;
        if self.is_over {
            return false;
        }
        self.paused(pause);
        if let Err(error) = self.attend(Some(trainer)) {
            self.end(Err(error)); // Its thread will see that.
        }
        !self.is_over
    }

    fn now(&self) -> Time {
        Time(self.start.elapsed().as_micros() as u64)
    }

    /// Takes in what has come, and whatever has since.
    fn hear(
        &mut self,
        first: Result<Incoming, mpsc::RecvTimeoutError>,
        inbox: &mpsc::Receiver<Incoming>,
    ) -> Result<()> {
        match first {
            Ok(incoming) => self.note(incoming)?,
            Err(mpsc::RecvTimeoutError::Timeout) => self.events.push_back(SiteEvent::Tick),
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the site's network thread has stopped"),
        }
        inbox.try_iter().try_for_each(|incoming| self.note(incoming))
    }

    fn note(&mut self, incoming: Incoming) -> Result<()> {
        match incoming {
            Incoming::Connected => self.events.push_back(SiteEvent::Connected),
            Incoming::Disconnected => self.events.push_back(SiteEvent::Disconnected),
            Incoming::Standing(standing) => self.events.push_back(SiteEvent::Standing(standing)),
            Incoming::Uploaded(digest, done) => self.events.push_back(SiteEvent::Uploaded(digest, done)),
            Incoming::Fetched(digest, bytes) => self.fetched(digest, bytes),
            Incoming::Pushed(digest, bytes) if self.machine.awaits(digest) => {
                self.fetched(digest, Some(Parcel::Bytes(bytes)));
            }
            Incoming::Pushed(digest, bytes) => self.pushed.put(digest, bytes),
            Incoming::Worked(done) => return self.worked(done),
            Incoming::Paused(Ok(pause)) => self.paused(pause),
            Incoming::Paused(Err(error)) => return Err(self.give_up(error.into(), "training stopped")),
            Incoming::Refused(why) => return Err(anyhow!(why)),
        }
        Ok(())
    }

    fn fetched(&mut self, digest: Digest, bytes: Option<Parcel>) {
        let done = bytes.is_some();
        if let Some(bytes) = bytes {
            self.fetched.insert(digest, bytes);
        }
        self.events.push_back(SiteEvent::Fetched(digest, done));
    }

    /// Takes over what the desk has done.
    fn worked(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Contributed(fragment, Ok(payload)) => {
                let (digest, bytes) = (payload.digest, payload.bytes.len() as u64);
                self.payloads.insert(digest, Arc::new(payload.bytes));
                self.spare = payload.spare.unwrap_or_default();
                let (norm, agreement) = (payload.norm, payload.agreement);
                self.events.push_back(SiteEvent::Contributed { fragment, payload: digest, bytes, norm, agreement });
                Ok(())
            }
            Done::Contributed(_, Err(error)) => {
                Err(self.give_up(error.into(), "the engine's weights cannot be contributed"))
            }
            Done::Rebased(fragment, change) => self.ask(Task::Change(fragment, change, SiteEvent::Rebased(fragment))),
            Done::Applied(fragment, version, digest, change) => {
                let overwritten = change.as_ref().is_some_and(Change::overwrites);
                let event = SiteEvent::Applied { fragment, version, digest, overwritten };
                match change {
                    Some(change) => self.change((fragment, version), change, event),
                    None => {
                        self.events.push_back(event);
                        Ok(())
                    }
                }
            }
        }
    }

    /// Has the engine take in a version, of which that event tells. During a step, what is only added to the weights waits for
    /// its end, and nobody waits for that.
    fn change(&mut self, (fragment, version): (FragmentId, u64), change: Change, event: SiteEvent) -> Result<()> {
        if version > 0 {
            self.newest_commit = Some((fragment, version));
        }
        match change {
            Change::Add(change) if self.is_stepping => {
                match self.waiting.entry(fragment) {
                    Entry::Vacant(entry) => drop(entry.insert(change)),
                    Entry::Occupied(mut entry) => delta::add(entry.get_mut(), &change),
                }
                self.events.push_back(event);
                Ok(())
            }
            change => {
                self.waiting.remove(&fragment); // These weights have it in them.
                self.ask(Task::Change(fragment, change, event))
            }
        }
    }

    /// Takes over what the trainer has done.
    fn paused(&mut self, pause: Pause) {
        let (link, payload_bytes, moved) = self.meter.read();
        self.exposed += pause.exposed;
        let hidden =
            self.before_steps.map_or(Duration::ZERO, |before| (self.desk.busy() + moved).saturating_sub(before));
        if !pause.spare.is_empty() {
            self.spare = pause.spare;
        }
        self.events.push_back(SiteEvent::Measured(Measured {
            exposed_seconds: self.exposed.as_secs_f64(),
            hidden_seconds: hidden.as_secs_f64(),
            coding_seconds: self.desk.coding_seconds(),
            copying_seconds: pause.copying_seconds,
            payload_bytes,
            link,
        }));
        self.events.extend(pause.events);
    }

    /// Shows the machine all events at once and does what it orders, until there is nothing left.
    fn attend(&mut self, mut trainer: Option<&mut Trainer>) -> Result<()> {
        while !self.events.is_empty() {
            for order in self.machine.handle_all(self.now(), std::mem::take(&mut self.events)) {
                self.obey(order, trainer.as_deref_mut())?;
            }
        }
        let machine = &self.machine;
        self.fetched.retain(|digest, _| machine.awaits(*digest));
        Ok(())
    }

    /// Carries out an order, with the `trainer` where it has just come to the end of a step.
    fn obey(&mut self, order: SiteOrder, trainer: Option<&mut Trainer>) -> Result<()> {
        match order {
            SiteOrder::Train(steps) => {
                self.before_steps.get_or_insert_with(|| self.desk.busy() + self.meter.read().2);
                self.is_stepping = true;
                match trainer {
                    Some(trainer) => trainer.order(steps),
                    None => self.ask(Task::Train(steps))?,
                }
            }
            SiteOrder::Grant(ranges) => self.leases.grant(&ranges),
            SiteOrder::Progress(progress) => self.leases.set_progress(progress),
            SiteOrder::DropLeases => {
                self.leases.clear();
                self.leases.take_trained();
            }
            SiteOrder::Recall(delivered) => self.desk.put(Job::Recall(delivered))?,
            SiteOrder::Delivered(fragment) => self.desk.put(Job::Delivered(fragment))?,
            SiteOrder::Contribute(fragment, codec) => {
                let memory = std::mem::take(&mut self.spare);
                let weights = match trainer {
                    Some(trainer) => trainer.read(fragment, memory),
                    None => self.read(fragment, memory)?,
                };
                let weights = weights.map_err(|error| self.give_up(error.into(), "training stopped"))?;
                self.desk.put(Job::Contribute(fragment, weights, codec))?;
            }
            SiteOrder::Rebase(fragment, why) => {
                tracing::warn!(
                    "a contribution to {fragment} was refused: {why}; its samples go back, training goes on"
                );
                self.desk.put(Job::Rebase(fragment))?;
            }
            SiteOrder::Commit(notice) => {
                let payload = self.fetched.remove(&notice.delta).map_or_else(Vec::new, Parcel::into_bytes);
                self.desk.put(Job::Commit(notice, payload))?;
            }
            SiteOrder::Install(fragment, version, digest) => {
                let weights = self.fetched.remove(&digest).map_or_else(Vec::new, Parcel::into_weights);
                self.desk.put(Job::Install(fragment, version, weights))?;
            }
            SiteOrder::Evaluate(request) => {
                let (commits, thetas) = (self.commits(), self.desk.lend()?);
                self.ask(Task::Evaluate(Look { request, commits, thetas }))?;
            }
            SiteOrder::Upload(digest) => {
                if let Some(bytes) = self.payloads.get(&digest) {
                    self.command(Command::Upload(digest, bytes.clone()));
                }
            }
            SiteOrder::Fetch { digest, bytes, pushed, weights } => match self.pushed.take(digest) {
                Some(bytes) => self.fetched(digest, Some(Parcel::Bytes(bytes))),
                None if pushed => {} // It is on its way.
                None => self.command(Command::Fetch(digest, bytes, weights)),
            },
            SiteOrder::Forget(digest) => {
                self.payloads.remove(&digest);
            }
            SiteOrder::Report(status) => self.command(Command::Report(status)),
            SiteOrder::Stop(Stop::Superseded) => bail!(
                "another process has joined as this site\nhint: one ticket and one folder belong to one process; stop one of the two"
            ),
            SiteOrder::Stop(stop) => self.end(Ok(stop)),
        }
        Ok(())
    }

    /// A network that has stopped is noticed where its answers are missed.
    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    fn ask(&self, task: Task) -> Result<()> {
        self.tasks.send(task).map_err(|_| gone())
    }

    /// A copy of a fragment's weights as they are now, in this memory.
    fn read(&self, fragment: FragmentId, memory: Vec<f32>) -> Result<Result<Vec<f32>, EngineError>> {
        let (sender, answer) = mpsc::channel();
        self.ask(Task::Read(fragment, memory, sender))?;
        answer.recv().map_err(|_| gone())
    }

    /// Commits in the site's copy of the model.
    fn commits(&self) -> u64 {
        self.machine.held().flatten().map(|(version, _)| version).sum()
    }

    /// Tells the coordinator that this site is leaving, so that its leases go back at once; returns the
    /// `error` that made it leave with what the operator needs to go back to.
    fn give_up(&mut self, error: anyhow::Error, what: &str) -> anyhow::Error {
        let now = self.now();
        for order in self.machine.handle(now, SiteEvent::Leave) {
            if let SiteOrder::Report(status) = order {
                self.command(Command::Report(status));
            }
        }
        let good = match self.newest_commit {
            Some((fragment, version)) => {
                let commits = self.commits();
                format!("the last good commit is version {version} of {fragment}, with {commits} commits in the model")
            }
            None => "there is no commit yet".to_string(),
        };
        error.context(format!("{what}; {good}; the run goes on without this site"))
    }
}
