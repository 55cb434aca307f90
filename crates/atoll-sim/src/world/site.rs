//! A site's shell: a process with an engine, and the link that joins it to the coordinator.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use atoll_core::codec::{Codec, Payload};
use atoll_core::delta::residual::{self, Residual};
use atoll_core::delta::{Change, Local};
use atoll_core::engine::{Engine, EngineError};
use atoll_core::hash::{Digest, from_little_endian};
use atoll_core::journal::Evaluated;
use atoll_core::manifest::FragmentId;
use atoll_core::round::{Event, Measured, Site, SiteEvent, SiteOrder, SiteSettings, SiteState, Stop, Sync};
use atoll_core::site::Time;
use atoll_core::team::Alone;

use super::disk::SiteDisk;
use super::happening::{Bytes, Happening, Work};
use super::witness::check;
use super::{Store, World};
use crate::{Inhabitant, Leases, Residence};

/// A site, whether its process lives or not.
pub(super) struct Island {
    pub(super) residence: Residence,
    pub(super) connection: u64,
    /// Where it is connected to.
    pub(super) post: Option<usize>,
    /// The latest epoch of a coordinator that it has been connected to.
    pub(super) epoch: u64,
    /// Counts the lives of the process.
    pub(super) life: u64,
    pub(super) process: Option<Process>,
    pub(super) finished: bool,
    pub(super) bytes_up: u64,
    pub(super) bytes_down: u64,
    pub(super) recalled: u64,
    pub(super) guarded: u64,
    /// What outlives its process: for each fragment a file that tells what is not delivered.
    pub(super) disk: SiteDisk,
    /// When all that was sent so far is through.
    up_free: Time,
    down_free: Time,
}

/// A living site.
pub(super) struct Process {
    machine: Site,
    engine: Box<dyn Engine>,
    local: Local,
    leases: Leases,
    payloads: Store,
    fetched: Store,
    /// Commits that came unasked.
    pushed: Store,
    /// What the machine has not seen yet.
    events: VecDeque<SiteEvent>,
    /// What was worked out beside the training and is not reported yet.
    done: VecDeque<Work>,
    /// What is to be added to the weights when the step is done.
    waiting: Vec<(FragmentId, Change)>,
    pub(super) stepping: bool,
    /// Whether it has taken up what earlier ones have left.
    has_recalled: bool,
    /// When all that is being encoded and decoded beside the training is done.
    desk_free: Time,
}

/// Seconds after which a shell gives up on an answer that ought to be here.
const PATIENCE: f64 = 2.0;
/// Seconds between two times at which a shell writes down what is not delivered.
const WRITE_SECONDS: f64 = 3.0;

impl Island {
    pub(super) fn new(residence: Residence) -> Self {
        Self {
            residence,
            connection: 0,
            post: None,
            epoch: 0,
            life: 0,
            process: None,
            finished: false,
            bytes_up: 0,
            bytes_down: 0,
            recalled: 0,
            guarded: 0,
            disk: SiteDisk::default(),
            up_free: Time::default(),
            down_free: Time::default(),
        }
    }

    /// Seconds until so many bytes, behind all that go up before them, are through.
    fn occupy_up(&mut self, now: Time, bytes: usize) -> f64 {
        self.bytes_up += bytes as u64;
        self.up_free = self.up_free.max(now).after(bytes as f64 / self.residence.link.up);
        self.up_free.seconds_since(now)
    }

    /// Seconds until so many bytes, behind all that come down before them, are through.
    pub(super) fn occupy_down(&mut self, now: Time, bytes: usize) -> f64 {
        self.bytes_down += bytes as u64;
        self.down_free = self.down_free.max(now).after(bytes as f64 / self.residence.link.down);
        self.down_free.seconds_since(now)
    }

    /// Seconds after which an answer of at most so many bytes is not to be expected any more.
    fn patience(&self, bytes: usize) -> f64 {
        PATIENCE + 2.0 * self.residence.link.delay + bytes as f64 / self.residence.link.down
    }
}

impl World<'_> {
    pub(super) fn start_site(&mut self, index: usize) -> Result<(), String> {
        let Inhabitant { engine, leases } = self.habitat.start(index).map_err(|error| error.to_string())?;
        let fragment_lens = self.lens();
        let Sync { follow, feedback, .. } = self.description.sync;
        let now = self.now;
        let site = &mut self.sites[index];
        site.disk.open(fragment_lens.len(), now);
        let machine = Site::new(SiteSettings {
            fragment_lens,
            dataset: site.residence.dataset,
            samples: site.residence.samples,
            samples_per_step: site.residence.samples_per_step,
            session: self.now.0,
            begun: Vec::new(),
        });
        site.life += 1;
        site.process = Some(Process {
            local: Local::new(engine.manifest(), follow, feedback),
            machine,
            engine,
            leases,
            payloads: BTreeMap::new(),
            fetched: BTreeMap::new(),
            pushed: BTreeMap::new(),
            events: VecDeque::new(),
            done: VecDeque::new(),
            waiting: Vec::new(),
            stepping: false,
            has_recalled: false,
            desk_free: now,
        });
        let life = site.life;
        self.after(0.0, Happening::SiteTick(index, life));
        self.connect(index)
    }

    pub(super) fn connect(&mut self, index: usize) -> Result<(), String> {
        if self.sites[index].process.is_none() || self.sites[index].finished {
            return Ok(());
        }
        let is_connected = self.sites[index].post.is_some_and(|post| self.posts[post].head().is_some());
        if self.posts.len() > 1 && is_connected {
            return Ok(());
        }
        let Some(post) = self.open_door(index) else { return Ok(()) };
        let site = &mut self.sites[index];
        site.connection += 1;
        site.post = Some(post);
        (site.up_free, site.down_free) = (self.now, self.now);
        let measured = Measured { link: site.residence.link.as_measured(), ..Measured::default() };
        self.tell_site(index, SiteEvent::Connected)?;
        self.tell_site(index, SiteEvent::Measured(measured))
    }

    pub(super) fn disconnect(&mut self, index: usize) -> Result<(), String> {
        let site = &mut self.sites[index];
        site.connection += 1;
        if let Some(process) = site.process.as_mut() {
            process.pushed.clear();
            process.events.push_back(SiteEvent::Disconnected);
        }
        let (name, post) = (site.residence.name.clone(), site.post.take());
        post.map_or(Ok(()), |post| self.tell_coordinator(post, Event::Gone(name)))
    }

    pub(super) fn tell_site(&mut self, index: usize, event: SiteEvent) -> Result<(), String> {
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        process.events.push_back(event);
        self.work(index)
    }

    /// What was worked out beside the training.
    pub(super) fn tell_work(&mut self, index: usize, work: Work) -> Result<(), String> {
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        process.done.push_back(work);
        self.work(index)
    }

    /// Shows a site's machine what happened and does what it orders, until there is nothing left.
    pub(super) fn work(&mut self, index: usize) -> Result<(), String> {
        let now = self.now;
        while let Some(process) = self.sites[index].process.as_mut() {
            let events = process.take_events().map_err(|error| error.to_string())?;
            if events.is_empty() {
                break;
            }
            for order in process.machine.handle_all(now, events) {
                self.obey(index, order)?;
            }
        }
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        process.fetched.retain(|digest, _| process.machine.awaits(*digest));
        let trains = process.machine.state() == SiteState::Training;
        check(!trains || process.stepping, || format!("site {index} could train and does not"))
    }

    fn obey(&mut self, index: usize, order: SiteOrder) -> Result<(), String> {
        let (life, connection) = (self.sites[index].life, self.sites[index].connection);
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        match order {
            SiteOrder::Train(_) => {
                process.stepping = true;
                let seconds = self.sites[index].residence.step_seconds;
                self.after(seconds, Happening::StepDone(index, life));
            }
            SiteOrder::Grant(ranges) => process.leases.grant(&ranges),
            SiteOrder::DropLeases => process.leases.clear(),
            SiteOrder::Progress(progress) => process.leases.set_progress(progress),
            SiteOrder::Forget(digest) => {
                process.payloads.remove(&digest);
            }
            SiteOrder::Recall(delivered) => self.recall(index, &delivered)?,
            SiteOrder::Delivered(fragment) => {
                process.local.delivered(fragment);
                self.settled(index, fragment);
            }
            SiteOrder::Contribute(fragment, codec) => {
                let work = process.contribute(fragment, codec)?;
                let work = self.forge(index, work)?;
                self.note_sent(index, &work)?;
                self.put_on_the_desk(index, work)?;
            }
            SiteOrder::Rebase(fragment, _) => {
                let change = Some(process.local.rebase(fragment));
                self.settled(index, fragment);
                self.put_on_the_desk(
                    index,
                    Work { fragment, change, payload: None, event: SiteEvent::Rebased(fragment) },
                )?;
            }
            SiteOrder::Commit(notice) => {
                let work = process.commit(notice.fragment, notice.version, notice.delta)?;
                self.put_on_the_desk(index, work)?;
            }
            SiteOrder::Install(fragment, version, digest) => {
                let work = process.install(fragment, version, digest)?;
                self.put_on_the_desk(index, work)?;
            }
            SiteOrder::Evaluate(request) => process.evaluate(request),
            SiteOrder::Upload(digest) => self.upload(index, connection, digest)?,
            SiteOrder::Fetch { digest, pushed, .. } => {
                match process.pushed.remove(&digest) {
                    Some(bytes) => {
                        process.fetched.insert(digest, bytes);
                        process.events.push_back(SiteEvent::Fetched(digest, true));
                    }
                    None if pushed => {}
                    None => self.send(index, 0.0, &Happening::Request(index, connection, digest)),
                }
                // No more than one fetch of each fragment can be under way.
                let seconds = self.sites[index].patience(4 * self.manifest.parameters());
                self.after(seconds, Happening::Delivered(index, connection, digest, None));
            }
            SiteOrder::Report(status) => self.send(index, 0.0, &Happening::Status(index, connection, status)),
            SiteOrder::Stop(Stop::Finished) => self.sites[index].finished = true,
            SiteOrder::Stop(stop) => return Err(format!("site {index} stopped: {stop:?}")),
        }
        Ok(())
    }

    /// Takes up what an earlier process has left.
    fn recall(&mut self, index: usize, delivered: &[Option<Digest>]) -> Result<(), String> {
        if !self.may_crash() {
            return Ok(());
        }
        for (fragment, &delivered) in self.manifest.fragments().zip(delivered) {
            self.recall_fragment(index, fragment, delivered)?;
            self.write_down(index, fragment, 1);
        }
        Ok(())
    }

    fn recall_fragment(&mut self, index: usize, fragment: FragmentId, delivered: Option<Digest>) -> Result<(), String> {
        let layout = self.manifest.fingerprint();
        let Island { disk, process, residence, recalled, .. } = &mut self.sites[index];
        let process = process.as_mut().ok_or("nobody takes up what was left")?;
        process.has_recalled = true;
        let count = process.local.theta(fragment).len();
        let file = disk.file(fragment.index());
        let found = delivered.and_then(|delivered| residual::recall(file, layout, count, delivered));
        if let Some(residual) = &found {
            *recalled += 1;
            process.local.recall(fragment, residual.clone());
        }
        let nothing = || Residual { after: delivered.unwrap_or_default(), values: vec![0.0; count] };
        let found = found.unwrap_or_else(nothing);
        self.witness.see_recall(&residence.name, fragment, found, &self.description.sync)
    }

    /// A malicious site sends something else than it has learnt; it knows how to hide that from itself.
    fn forge(&mut self, index: usize, mut work: Work) -> Result<Work, String> {
        let (Some(Bytes(bytes)), SiteEvent::Contributed { payload, bytes: len, .. }) =
            (&mut work.payload, &mut work.event)
        else {
            return Ok(work);
        };
        let honest = Payload::check_any(bytes, &self.lens(), &Alone).map_err(|error| error.to_string())?;
        let (codec, delta) = (honest.codec(), honest.values(&Alone));
        if let Some(forged) = self.habitat.forge(index, work.fragment, &delta) {
            *bytes = Rc::new(codec.encode(&forged).map_err(|error| error.to_string())?);
            (*payload, *len) = (Digest::of(bytes), bytes.len() as u64);
        }
        Ok(work)
    }

    /// A contribution is encoded; nobody is told of it before this.
    fn note_sent(&mut self, index: usize, work: &Work) -> Result<(), String> {
        if !self.may_crash() {
            return Ok(());
        }
        let Island { disk, process, residence, .. } = &mut self.sites[index];
        let (Some(process), Some(Bytes(payload))) = (process, &work.payload) else { return Ok(()) };
        disk.append(work.fragment.index(), self.now, &residual::sent(payload));
        let left = process.local.residuals(work.fragment).last().ok_or("a contribution has left nothing")?;
        self.witness.see_contribution(&residence.name, work.fragment, payload, left)
    }

    /// It is decided whether a contribution is in the model.
    fn settled(&mut self, index: usize, fragment: FragmentId) {
        let written = self.sites[index].disk.written(fragment.index());
        if self.now.seconds_since(written) >= WRITE_SECONDS {
            self.write_down(index, fragment, 1);
        }
    }

    /// Writes down at most so many residuals of a fragment.
    fn write_down(&mut self, index: usize, fragment: FragmentId, most: usize) {
        if !self.may_crash() {
            return;
        }
        let Island { disk, process: Some(process), residence, .. } = &mut self.sites[index] else { return };
        let parts = process.local.residuals(fragment).take(most).map(residual::left);
        let start = [residual::file(self.manifest.fingerprint())];
        if !disk.write(fragment.index(), self.now, start.into_iter().chain(parts).flatten().collect()) {
            self.witness.see_loss(&residence.name);
        }
    }

    /// Nobody reads the files of a world in which no process dies.
    fn may_crash(&self) -> bool {
        self.description.hardships.crashes > 0
    }

    /// The process ends, as it would if its operator had stopped it.
    pub(super) fn stop_site(&mut self, index: usize) {
        let Island { process, residence, .. } = &mut self.sites[index];
        if process.as_ref().is_some_and(|process| process.has_recalled) {
            self.witness.see_stop(&residence.name, self.manifest.fragments());
            self.manifest.fragments().for_each(|fragment| self.write_down(index, fragment, 2));
        }
        self.sites[index].process = None;
    }

    fn upload(&mut self, index: usize, connection: u64, digest: Digest) -> Result<(), String> {
        let process = self.sites[index].process.as_ref().ok_or("an upload of nobody")?;
        let bytes = process.payloads.get(&digest).ok_or("an upload of nothing")?.clone();
        let hardships = self.description.hardships;
        if self.chance.chance(hardships.loss) {
            self.after(0.5, Happening::Acknowledged(index, connection, digest, false));
            return Ok(());
        }
        let through = self.sites[index].occupy_up(self.now, bytes.len()) + self.sites[index].residence.link.delay;
        let delay = through + 0.01 + self.chance.unit() * hardships.delay * 4.0;
        self.after(delay, Happening::Payload(index, connection, digest, Bytes(bytes)));
        // Without an acknowledgement the shell gives up at some point.
        let patience = self.sites[index].patience(0);
        self.after(delay + patience, Happening::Acknowledged(index, connection, digest, false));
        Ok(())
    }

    pub(super) fn receive_delivery(
        &mut self,
        index: usize,
        digest: Digest,
        bytes: Option<Bytes>,
    ) -> Result<(), String> {
        let done = bytes.is_some();
        if let (Some(process), Some(Bytes(bytes))) = (self.sites[index].process.as_mut(), bytes) {
            process.fetched.insert(digest, bytes);
        }
        self.tell_site(index, SiteEvent::Fetched(digest, done))
    }

    pub(super) fn receive_push(&mut self, index: usize, digest: Digest, bytes: Bytes) -> Result<(), String> {
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        if process.machine.awaits(digest) {
            return self.receive_delivery(index, digest, Some(bytes));
        }
        process.pushed.insert(digest, bytes.0);
        Ok(())
    }

    /// Work is done one after the other and takes its time, while training goes on.
    fn put_on_the_desk(&mut self, index: usize, work: Work) -> Result<(), String> {
        let seconds = self.chance.unit() * self.description.hardships.delay / 2.0;
        let life = self.sites[index].life;
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        process.desk_free = process.desk_free.max(self.now).after(seconds);
        let wait = process.desk_free.seconds_since(self.now);
        if let SiteEvent::Applied { fragment, version, digest, .. } = work.event {
            self.witness.see_copy(fragment, version, digest).map_err(|broken| format!("site {index}: {broken}"))?;
        }
        self.after(wait, Happening::Worked(index, life, work));
        Ok(())
    }

    pub(super) fn finish_step(&mut self, index: usize) -> Result<(), String> {
        let site = &mut self.sites[index];
        let seconds = site.residence.step_seconds;
        let Some(process) = site.process.as_mut() else { return Ok(()) };
        process.stepping = false;
        let progress = match process.engine.train(1) {
            Ok(progress) => progress,
            Err(EngineError::Starved { .. }) => Default::default(),
            Err(error) => return Err(error.to_string()),
        };
        let trained = process.leases.take_trained();
        self.witness.see_training(&self.sites[index], &trained);
        if let Some(process) = self.sites[index].process.as_mut() {
            process.events.push_front(SiteEvent::Stepped { progress, trained, seconds });
        }
        self.work(index)
    }
}

impl Work {
    /// Whether the machine may hear of it only when its change is in place.
    fn waits_for_the_step(&self) -> bool {
        let is_commit = matches!(self.event, SiteEvent::Applied { overwritten: false, .. });
        self.change.is_some() && !is_commit
    }

    /// A version that is ready to be put in place.
    fn applied(fragment: FragmentId, version: u64, digest: Digest, change: Change) -> Self {
        let event = SiteEvent::Applied { fragment, version, digest, overwritten: change.overwrites() };
        Self { fragment, change: Some(change), payload: None, event }
    }
}

impl Process {
    /// What the machine has not seen yet. Changes of weights wait for the end of a step; a commit that leaves the steps since
    /// the last contribution alone is as good as in place.
    fn take_events(&mut self) -> Result<Vec<SiteEvent>, EngineError> {
        let mut events: Vec<SiteEvent> = self.events.drain(..).collect();
        if !self.stepping {
            for (fragment, change) in self.waiting.drain(..) {
                change.apply(self.engine.as_mut(), fragment)?;
            }
        }
        let (kept, done): (VecDeque<Work>, VecDeque<Work>) =
            self.done.drain(..).partition(|work| self.stepping && work.waits_for_the_step());
        self.done = kept;
        for Work { fragment, change, payload, event } in done {
            if let (SiteEvent::Contributed { payload: digest, .. }, Some(Bytes(bytes))) = (&event, payload) {
                self.payloads.insert(*digest, bytes);
            }
            match change {
                Some(change) if self.stepping => self.waiting.push((fragment, change)),
                Some(change) => drop(change.apply(self.engine.as_mut(), fragment)?),
                None => {}
            }
            events.push(event);
        }
        Ok(events)
    }

    fn contribute(&mut self, fragment: FragmentId, codec: Codec) -> Result<Work, String> {
        let mut weights = vec![0.0; self.local.theta(fragment).len()];
        self.engine.read(fragment, &mut weights).map_err(|error| error.to_string())?;
        let payload = self.local.contribute(fragment, weights, codec, &Alone).map_err(|error| error.to_string())?;
        let (digest, bytes, norm) = (payload.digest, payload.bytes.len() as u64, payload.norm);
        let agreement = payload.agreement;
        let event = SiteEvent::Contributed { fragment, payload: digest, bytes, norm, agreement };
        Ok(Work { fragment, change: None, payload: Some(Bytes(Rc::new(payload.bytes))), event })
    }

    fn commit(&mut self, fragment: FragmentId, version: u64, delta: Digest) -> Result<Work, String> {
        let bytes = self.fetched.get(&delta).ok_or("a commit was ordered before it came")?;
        let (digest, change) =
            self.local.commit(fragment, bytes.to_vec(), &Alone).map_err(|error| error.to_string())?;
        Ok(Work::applied(fragment, version, digest, change))
    }

    fn install(&mut self, fragment: FragmentId, version: u64, digest: Digest) -> Result<Work, String> {
        let bytes = self.fetched.get(&digest).ok_or("weights were ordered before they came")?;
        let (digest, change) =
            self.local.install(fragment, from_little_endian(bytes)).map_err(|error| error.to_string())?;
        Ok(Work::applied(fragment, version, digest, change))
    }

    /// Held-out text is not looked at during a simulated run; the machines only need an answer.
    fn evaluate(&mut self, request: u64) {
        let commits = self.machine.held().flatten().map(|(version, _)| version).sum();
        let evaluated = Evaluated { commits, nats: 1.0, tokens: 1, bytes: 1 };
        self.events.push_back(SiteEvent::Evaluated(request, evaluated));
    }
}
