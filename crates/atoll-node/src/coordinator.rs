//! The coordinator's shell. One task, the heart, owns the machine, the journal and the clock; around it
//! are connections ([`gate`]), outer steps on blocking threads, and files. Nothing is told to a site
//! before the entries it rests on are on disk.

pub(crate) mod arriving;
mod donor;
mod gate;
mod lead;
mod lobby;
mod log;
mod members;
mod outgoing;
mod share;
mod shelf;
mod trials;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::{Entry, Invitation};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::ModelConfig;
use atoll_core::outer::{Global, StepError};
use atoll_core::round::{Coordinator, Event, Merge, Merged, Order, Phase, Status};
use atoll_core::site::{SiteId, Time};
use atoll_core::wire::{Frame, Purpose, Welcome};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch as signal};
use tokio::time::MissedTickBehavior;

use crate::crew::Crew;
use crate::data::Tokenizer;
use crate::hf;
use crate::identity::Identity;
use crate::link::Gate;
use crate::report::Report;
use crate::rollback;
use crate::run::{Keep, RunConfig, RunDir, Terms, write_atomically};
use crate::shared::{Shared, State};
use crate::snapshot;
use crate::store::Store;
use arriving::Arriving;
use gate::{House, Input, Knock};
use lead::{Turn, bind};
use log::Log;
use members::{keys, off_the_list};
use outgoing::Outgoings;
use share::Share;
use shelf::Shelf;
pub(crate) use shelf::lock;
pub use trials::MakeEngine;
use trials::{Finding, Trials};
use watch::Watch;

/// What an operator decides when a coordinator starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Address to listen on, `host:port`.
    pub listen: String,
    /// Wait behind whoever leads the run, and lead it when that one is gone.
    pub standby: bool,
    /// The run's object store is another one than before, and empty on purpose.
    pub new_store: bool,
}

/// How a coordinator ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// It never led; whether the run is finished.
    StoodBy(bool),
    /// The run reached its goal.
    Finished(Box<Report>),
    /// The operator stopped it; the same command goes on.
    Stopped(Box<Report>),
}

/// Seconds between two looks that are written to `status.json`.
const STATUS_SECONDS: f64 = 0.5;
/// What comes in is taken so much at once.
const INPUTS_MAX: usize = 64;
/// Seconds that sites which are cut off or restarting are given to hear that the run is finished.
const GOODBYE_SECONDS: f64 = 60.0;

/// A run folder that has been read and found sound.
#[derive(Debug)]
pub struct Prepared {
    /// The folder.
    pub dir: RunDir,
    /// What `run.toml` says.
    pub config: RunConfig,
    /// The model that follows from it.
    pub model: ModelConfig,
    /// Its layout.
    pub manifest: Manifest,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
}

impl Prepared {
    /// Reads a run folder and lists everything that is wrong with it.
    ///
    /// # Errors
    /// All problems, one per line.
    pub fn read(dir: &RunDir) -> Result<Self> {
        let config = RunConfig::load(&dir.config())?;
        let mut problems = config.problems();
        let tokenizer = fs::read(dir.tokenizer())
            .map_err(|error| anyhow!("{} cannot be read: {error}", dir.tokenizer().display()))
            .and_then(|bytes| Tokenizer::from_bytes(bytes).map_err(anyhow::Error::from));
        let vocab = match &tokenizer {
            Ok(tokenizer) => tokenizer.vocab_size(),
            Err(error) => {
                problems.push(format!("{error:#}"));
                1
            }
        };
        let model = config.model.resolve(vocab, config.training.context);
        match (tokenizer, model) {
            (Ok(tokenizer), Ok(model)) if problems.is_empty() => {
                let manifest = config.manifest(&model);
                Ok(Self { dir: dir.clone(), config, model, manifest, tokenizer })
            }
            _ => bail!(
                "{} has {} problem{}:\n  - {}\nhint: edit {} and look again with `atoll check`",
                dir.0.display(),
                problems.len(),
                if problems.len() == 1 { "" } else { "s" },
                problems.join("\n  - "),
                dir.config().display()
            ),
        }
    }
}

/// Threads for what waits for the disk. A site that asks fast enough for what is not there would have tokio start 512, of a
/// hundred kilobytes each.
const DISK_THREADS: usize = 32;

/// Where [`coordinate`] runs.
///
/// # Errors
/// If the system gives no threads.
pub fn runtime() -> std::io::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).max_blocking_threads(DISK_THREADS).enable_all().build()
}

/// Coordinates the run in `dir` until it is finished or `stop` turns true. Contributions are tried with an engine that
/// `make` makes, if the run is to have trials.
///
/// # Errors
/// If the folder is unsound, the port is taken, or the disk fails.
pub async fn coordinate(
    dir: &RunDir,
    options: &Options,
    make: Option<MakeEngine>,
    stop: signal::Receiver<bool>,
) -> Result<Ending> {
    let prepared = Prepared::read(dir)?;
    let trials = Trials::of(&prepared, make)?;
    let _hold = dir.hold()?;
    rollback::finish(dir)?;
    let identity = Identity::load(&dir.key())?;
    allow_many_files();
    crate::link::look_for_bbr();
    let listener = bind(&options.listen)?;
    let store = Store::open(dir.payloads())?;
    let shared = open_shared(&prepared.config, options)?;
    let turn = {
        let (prepared, store, shared, options, stop) = (&prepared, &store, shared.as_ref(), options, &stop);
        tokio::task::block_in_place(|| {
            lead::take_the_lead(prepared, store, shared, listener, options, &|| *stop.borrow())
        })?
    };
    let (recovered, holder, listener) = match turn {
        Turn::Lead(recovered, holder, listener) => (*recovered, holder, listener),
        Turn::Stopped => return Ok(Ending::StoodBy(false)),
        Turn::Finished => return Ok(Ending::StoodBy(true)),
    };
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let address = listener.local_addr()?.to_string();
    let (inputs, incoming) = mpsc::channel(1024);
    let known_as = prepared.config.coordinator.advertise.clone().unwrap_or_else(|| address.clone());
    let share = shared.as_ref().map(|shared| Share::new(shared.clone(), holder, known_as, &recovered));
    let mut heart = Heart::new(prepared, identity.fingerprint, address.clone(), store, share, recovered, trials)?;
    let is_told = Report::load(&dir.report()).is_ok_and(|report| report.state == "finished");
    if heart.machine.phase() == Phase::Finished && is_told && dir.model().join("config.json").exists() {
        bail!(
            "the run in {} is finished\nhint: `atoll generate {0}` speaks with it; a new run needs a new folder",
            dir.0.display()
        );
    }
    let house = Arc::new(House {
        gate: Gate::new(&identity)?,
        inputs,
        shelf: heart.shelf.clone(),
        store: heart.store.clone(),
        shared,
        fragment_lens: heart.fragment_lens(),
        arriving: Arriving::new(&heart.fragment_lens()),
        links: Default::default(),
        lobby: Arc::default(),
        rooms: gate::Rooms::default(),
        outgoings: heart.outgoings.clone(),
        off_the_list: heart.off_the_list.subscribe(),
        given: Arc::default(),
    });
    tracing::info!("listening on {address}");
    let server = tokio::spawn(gate::serve(house, listener));
    let ending = heart.live(incoming, stop).await;
    server.abort();
    ending
}

/// Each connection of each site is an open file, and what systems allow unless asked is soon used up.
fn allow_many_files() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
            tracing::debug!("no more open files are allowed: {error}");
        }
    }
}

fn open_shared(config: &RunConfig, options: &Options) -> Result<Option<Arc<Shared>>> {
    match &config.coordinator.store {
        Some(store) => Ok(Some(Arc::new(Shared::open(store)?))),
        None if options.standby => bail!(
            "a standby follows the run in its object store, and run.toml names none\nhint: set coordinator.store, to the same at every coordinator of the run"
        ),
        None => Ok(None),
    }
}

/// A clock that starts at the time of day and then never goes back.
struct Clock {
    start: Instant,
    unix: Duration,
}

impl Clock {
    fn new() -> Self {
        Self { start: Instant::now(), unix: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() }
    }

    fn now(&self) -> Time {
        Time((self.unix + self.start.elapsed()).as_micros() as u64)
    }
}

/// What blocking threads tell the heart.
enum Done {
    Merged(Merged, Arc<Vec<u8>>),
    Unmergeable(FragmentId, Digest, String),
    Snapshot,
    Tried(Result<Finding>),
    /// The object store heard that this coordinator leads, or what it said instead.
    Beaten(Result<share::Beaten>),
    /// A snapshot is in the object store, or why it is not.
    Shared(Result<u64>),
    Failed(anyhow::Error),
}

struct Heart {
    dir: RunDir,
    config: RunConfig,
    model: ModelConfig,
    terms: String,
    layout: Digest,
    /// Fingerprint of this coordinator's key.
    key: Digest,
    clock: Clock,
    machine: Coordinator,
    /// What the machine wants done and is not done yet.
    orders: Vec<Order>,
    journal: Log,
    /// What of the run lies in its object store, if it has one.
    share: Option<Share>,
    global: Arc<Mutex<Global>>,
    store: Store,
    shelf: Arc<Shelf>,
    outgoings: Arc<Outgoings>,
    /// The living control connection of each site, by its number.
    controls: BTreeMap<SiteId, (u64, mpsc::Sender<Frame>)>,
    done: (mpsc::UnboundedSender<Done>, mpsc::UnboundedReceiver<Done>),
    /// Outer steps being computed.
    merging: usize,
    /// Outer steps that wait for a snapshot to be taken.
    waiting_merges: Vec<Merge>,
    /// Who tries contributions, if anybody does.
    trials: Option<Trials>,
    snapshot: SnapshotState,
    /// Payloads of the commits since the oldest snapshot, by entry number.
    payloads: BTreeMap<u64, Vec<Digest>>,
    /// All of these, for looking up.
    kept: BTreeSet<Digest>,
    /// Sites that have been connected since the run finished.
    told: BTreeSet<SiteId>,
    /// What the operator wanted done that is done and cannot be removed.
    stuck: BTreeSet<PathBuf>,
    /// Keys that are off the list, for all connections to see.
    off_the_list: signal::Sender<BTreeSet<Digest>>,
    watch: Watch,
}

#[derive(PartialEq)]
enum SnapshotState {
    Due(Time),
    Waiting,
    Writing,
}

impl Heart {
    fn new(
        prepared: Prepared,
        key: Digest,
        address: String,
        store: Store,
        share: Option<Share>,
        recovered: snapshot::Recovered,
        trials: Option<Trials>,
    ) -> Result<Self> {
        let Prepared { dir, config, model, manifest, tokenizer } = prepared;
        let snapshot::Recovered { journal, book, global, payloads } = recovered;
        if config.coordinator.keep == Keep::Snapshots {
            store.sweep(&snapshot::needed(&payloads, &book))?;
        }
        let current = book.fragments.iter().map(|fragment| fragment.digest).collect();
        let shelf = Arc::new(Shelf::new(global.clone(), store.clone(), tokenizer.json().to_vec(), current));
        let terms = serde_json::to_string(&Terms::of(&config, &model))?;
        let watch = Watch::open(&dir, book.run.clone(), address, manifest.parameters() as u64)?;
        let clock = Clock::new();
        let lens = lock(&global).theta.iter().map(Vec::len).collect();
        let entries = book.entries;
        let machine = Coordinator::new(config.sync.clone(), config.goal, book, lens);
        Ok(Self {
            layout: manifest.fingerprint(),
            key,
            snapshot: SnapshotState::Due(clock.now().after(config.coordinator.snapshot_seconds)),
            dir,
            config,
            model,
            terms,
            clock,
            orders: Vec::new(),
            journal: Log::new(journal, share.as_ref().map(|share| share.shared.clone()), entries),
            share,
            global,
            store,
            shelf,
            outgoings: Arc::default(),
            controls: BTreeMap::new(),
            done: mpsc::unbounded_channel(),
            merging: 0,
            waiting_merges: Vec::new(),
            trials,
            kept: snapshot::needed(&payloads, machine.book()),
            payloads,
            told: BTreeSet::new(),
            stuck: BTreeSet::new(),
            off_the_list: signal::Sender::new(off_the_list(machine.book())),
            machine,
            watch,
        })
    }

    fn fragment_lens(&self) -> Vec<usize> {
        lock(&self.global).theta.iter().map(Vec::len).collect()
    }

    /// Lives until the run is finished or stopped.
    async fn live(&mut self, mut incoming: mpsc::Receiver<Input>, mut stop: signal::Receiver<bool>) -> Result<Ending> {
        let mut status = tokio::time::interval(Duration::from_secs_f64(STATUS_SECONDS));
        status.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut finished: Option<Time> = None;
        loop {
            let now = self.clock.now();
            let (wake, _why) = self.machine.wake_at(now);
            let sleep = Duration::from_micros(wake.0.saturating_sub(now.0));
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return self.end("stopped").await.map(Ending::Stopped),
                // Before what comes in: that may be without end.
                _ = status.tick() => self.look_around()?,
                Some(done) = self.done.1.recv() => self.finish(done)?,
                Some(input) = incoming.recv() => self.take_all(input, &mut incoming)?,
                () = tokio::time::sleep(sleep) => self.handle(Event::Tick),
            }
            self.carry_out()?;
            self.look_after_snapshot();
            if self.machine.phase() == Phase::Finished {
                let since = *finished.get_or_insert(self.clock.now());
                let waited = self.clock.now().seconds_since(since);
                if waited > GOODBYE_SECONDS || (self.all_told() && waited > 0.2) {
                    return self.end("finished").await.map(Ending::Finished);
                }
            }
        }
    }

    /// Whether every site with a session has heard that the run is finished, and none is left.
    fn all_told(&mut self) -> bool {
        self.told.extend(self.controls.keys().cloned());
        let sessions = self.machine.book().sites.iter().filter(|(_, member)| member.open);
        self.controls.is_empty() && sessions.into_iter().all(|(site, _)| self.told.contains(site))
    }

    /// Takes what has come in while the last of it was made durable: a slow disk or object store is asked once for all.
    fn take_all(&mut self, first: Input, incoming: &mut mpsc::Receiver<Input>) -> Result<()> {
        self.take(first)?;
        for _ in 1..INPUTS_MAX {
            let Ok(input) = incoming.try_recv() else { break };
            self.take(input)?;
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Knock(knock) => return self.answer(knock),
            Input::Asked { site, key, request, reply } => {
                self.carry_out()?;
                let answer = self.serve(&site, key, request)?;
                let _ = reply.send(answer); // The peer may have hung up meanwhile.
            }
            // It was on its way when its key was revoked; its connection ends as well.
            Input::Connected { site, .. } if self.machine.book().is_revoked(&site) => {}
            Input::Connected { site, link, outbox } => {
                tracing::info!("{site} is connected");
                self.note(serde_json::json!({"event": "connected", "site": site}));
                let before = self.controls.insert(site.clone(), (link, outbox));
                // What was on its way over an earlier connection is lost.
                if before.is_some() {
                    self.handle(Event::Gone(site));
                }
            }
            // A newer connection has taken over, or there is to be none.
            Input::Heard { site, link, .. } | Input::Gone { site, link } if !self.is_living(&site, link) => {}
            Input::Heard { site, status, .. } => {
                self.hear(&site, &status);
                self.handle(Event::Heard(site, status));
            }
            Input::Gone { site, .. } => {
                self.controls.remove(&site);
                tracing::info!("{site} is gone");
                self.note(serde_json::json!({"event": "gone", "site": site}));
                self.handle(Event::Gone(site));
            }
            Input::Arrived(site, payload, seen) => self.handle(Event::Arrived(site, payload, seen)),
            Input::Useless(site, payload, why) => {
                tracing::warn!("a payload of {site} is useless: {why}");
                self.handle(Event::Useless(site, payload, why));
            }
        }
        Ok(())
    }

    /// Whether this is the number of the site's control connection.
    fn is_living(&self, site: &SiteId, link: u64) -> bool {
        self.controls.get(site).is_some_and(|(living, _)| *living == link)
    }

    /// Notes what a site says of itself, unless it is nonsense: the machine does not listen to that either.
    fn hear(&mut self, site: &SiteId, status: &Status) {
        let is_sane = status.vitals.are_sane();
        if is_sane {
            self.watch.heard(site, status);
        }
        if self.watch.is_new_nonsense(site, !is_sane) {
            tracing::warn!("{site} says of itself what cannot be; nobody waits for it until that changes");
            self.note(serde_json::json!({"event": "nonsense", "site": site}));
        }
    }

    fn welcome(&mut self, site: SiteId, knock: &Knock) -> Welcome {
        if knock.hello.purpose != Purpose::Desk {
            self.watch.greeted(&site, &knock.hello, knock.traffic.clone());
        }
        let (tokenizer, tokenizer_bytes) = self.shelf.tokenizer();
        Welcome {
            run: self.machine.book().run.clone(),
            session: self.machine.book().sites.get(&site).map_or(0, |member| member.session),
            site,
            config: self.terms.clone(),
            layout: self.layout,
            tokenizer,
            tokenizer_bytes,
            epoch: self.machine.book().epoch,
            keys: keys(self.key, self.machine.book()),
        }
    }

    /// What is to be done about `event` is done by [`carry_out`](Self::carry_out).
    fn handle(&mut self, event: Event) {
        let now = self.clock.now();
        self.orders.extend(self.machine.handle(now, event));
    }

    /// Makes durable what is to be recorded, all at once, and then does what rests on it.
    fn carry_out(&mut self) -> Result<()> {
        let orders = std::mem::take(&mut self.orders);
        if let Some(Order::Halt(why)) = orders.iter().find(|order| matches!(order, Order::Halt(_))) {
            bail!(
                "the coordinator stops before it tells anything false: {why}\nhint: start it again, it goes on from its journal; and report this with the journal"
            );
        }
        let (records, orders): (Vec<Order>, Vec<Order>) =
            orders.into_iter().partition(|order| matches!(order, Order::Record(_)));
        let entry = |order| if let Order::Record(entry) = order { Some(entry) } else { None };
        let entries: Vec<Entry> = records.into_iter().filter_map(entry).collect();
        if !entries.is_empty() {
            self.journal.append(&entries)?;
            let first = self.machine.book().entries - entries.len() as u64 + 1;
            (first..).zip(&entries).for_each(|(number, entry)| self.recorded(number, entry));
        }
        orders.into_iter().for_each(|order| self.obey(order));
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Record(_) | Order::Halt(_) => {}
            Order::Tell(site, standing) => {
                if let Some((_, outbox)) = self.controls.get(&site) {
                    // A full outbox drops it; the next standing says it all again.
                    let _ = outbox.try_send(Frame::Standing(standing));
                }
            }
            Order::Push(site, payload) => {
                if let Some(bytes) = self.shelf.get(payload) {
                    self.outgoings.push(&site, payload, &bytes);
                }
            }
            Order::Merge(merge) if self.snapshot == SnapshotState::Waiting => self.waiting_merges.push(merge),
            Order::Merge(merge) => self.merge(merge),
            Order::Forget(payload) => self.forget(payload),
        }
    }

    /// What an entry means for the shell, now that it is on disk.
    fn recorded(&mut self, number: u64, entry: &Entry) {
        match entry {
            Entry::Committed(commit) => {
                let payloads = commit.contributions.iter().map(|accepted| accepted.payload);
                let payloads: Vec<Digest> = payloads.chain([commit.delta]).collect();
                self.kept.extend(&payloads);
                self.share.iter_mut().for_each(|share| share.committed(number, commit));
                self.payloads.insert(number, payloads);
                self.shelf.committed(commit.fragment.index(), commit.digest);
                self.watch.committed(self.clock.now(), commit, &self.machine);
            }
            Entry::Refused { site, number, fragment, ranges, why } => {
                tracing::warn!("contribution {number} of {site}, to {fragment}, was refused: {why}");
                self.watch.refused(site, why);
                self.note(serde_json::json!({
                    "event": "refused", "site": site, "number": number, "fragment": fragment, "why": why,
                    "samples_returned": ranges.len(),
                }));
            }
            Entry::Invited { invitation: Invitation { site, role, .. }, by, .. } => {
                self.note(serde_json::json!({"event": "invited", "site": site, "role": role, "by": by}));
            }
            Entry::Withdrawn { site, by } => {
                self.note(serde_json::json!({"event": "withdrawn", "site": site, "by": by}));
            }
            Entry::Rekeyed { site, from, .. } => {
                tracing::info!("{site} has another key now");
                self.off_the_list.send_modify(|keys| keys.extend([*from]));
                if self.controls.remove(site).is_some() {
                    self.handle(Event::Gone(site.clone()));
                }
                self.note(serde_json::json!({"event": "rekeyed", "site": site}));
            }
            Entry::Revoked { site, key, by } => {
                tracing::warn!("the key of {site} was revoked; its connections end");
                self.controls.remove(site);
                self.off_the_list.send_modify(|keys| keys.extend([*key]));
                self.note(serde_json::json!({"event": "revoked", "site": site, "by": by}));
            }
            Entry::Succession { key } => {
                tracing::info!("the coordinators' next key is {}; sites are told", key.short());
                self.note(serde_json::json!({"event": "succession", "key": key}));
            }
            Entry::Returned { site, why } => {
                tracing::info!("{site}: {why}");
                self.note(serde_json::json!({"event": "returned", "site": site, "why": why}));
            }
            Entry::Tried { fragment, version, before, contributions } => {
                self.note(serde_json::json!({
                    "event": "tried", "fragment": fragment, "version": version, "before": before, "sites": contributions,
                }));
            }
            Entry::Evaluated(evaluated) => {
                self.watch.report.bits_per_byte.note(evaluated.bits_per_byte());
                tracing::info!("held-out bits per byte: {:.4}", evaluated.bits_per_byte());
            }
            Entry::Finished => tracing::info!("the run has reached its goal"),
            Entry::Began { .. }
            | Entry::Leads { .. }
            | Entry::Admitted { .. }
            | Entry::Joined { .. }
            | Entry::Leased { .. }
            | Entry::RolledBack { .. } => {}
        }
    }

    fn forget(&mut self, payload: Digest) {
        if !self.kept.contains(&payload) {
            self.store.remove(payload);
            self.share.iter().for_each(|share| share.forget(payload));
        }
    }

    fn merge(&mut self, merge: Merge) {
        self.try_out(&merge);
        self.merging += 1;
        let (global, store) = (self.global.clone(), self.store.clone());
        self.on_a_thread(move || {
            let Merge { fragment, version, contributions, recipe, .. } = &merge;
            // The lock is taken outside of the crew, whose threads do other work while they wait for one another.
            let mut global = lock(&global);
            let model: &mut Global = &mut global;
            let result = Crew.run(|| {
                let find = |digest| Some(merge.found(digest, store.get(digest)?));
                model.perform(*fragment, *version, contributions, recipe, &find, &Crew)
            });
            drop(global);
            match result {
                Ok(step) => match store.put(step.delta, &step.payload) {
                    Ok(()) => {
                        let merged = Merged {
                            fragment: merge.fragment,
                            delta: step.delta,
                            bytes: step.payload.len() as u64,
                            digest: step.digest,
                            measures: step.measures,
                        };
                        Done::Merged(merged, Arc::new(step.payload))
                    }
                    Err(error) => Done::Failed(error),
                },
                Err(error @ (StepError::Codec { payload, .. } | StepError::Missing(payload))) => {
                    Done::Unmergeable(merge.fragment, payload, error.to_string())
                }
                Err(error) => Done::Failed(anyhow!(error)),
            }
        });
    }

    /// Tries what is to be merged, if that is due and the model need not be waited for.
    fn try_out(&mut self, merge: &Merge) {
        let now = self.clock.now();
        let Some(trials) = self.trials.as_mut().filter(|trials| self.merging == 0 && trials.is_due(now, merge)) else {
            return;
        };
        let (attempt, done) = (trials.begin(merge, &lock(&self.global), &self.store), self.done.0.clone());
        // On a thread that nobody waits for: a trial may take long, and the coordinator may end meanwhile.
        let told = done.clone();
        let thread =
            thread::Builder::new().name("trial".to_string()).spawn(move || drop(done.send(Done::Tried(attempt()))));
        if let Err(error) = thread {
            drop(told.send(Done::Tried(Err(error.into()))));
        }
    }

    /// Does blocking work elsewhere; its answer, or its panic, comes back to the heart.
    fn on_a_thread(&self, work: impl FnOnce() -> Done + Send + 'static) {
        let done = self.done.0.clone();
        tokio::spawn(async move {
            let answer = tokio::task::spawn_blocking(work).await;
            // The heart may have stopped.
            let _ = done.send(
                answer.unwrap_or_else(|error| Done::Failed(anyhow!("a thread of the coordinator died: {error}"))),
            );
        });
    }

    fn finish(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Merged(merged, payload) => {
                self.merging -= 1;
                self.watch.merged(&merged);
                self.shelf.offer(merged.delta, payload);
                self.handle(Event::Merged(merged));
                self.carry_out()
            }
            Done::Unmergeable(fragment, payload, why) => {
                self.merging -= 1;
                self.handle(Event::Unmergeable(fragment, payload, why));
                self.carry_out()
            }
            Done::Tried(finding) => {
                let now = self.clock.now();
                if let Some(tried) = self.trials.as_mut().and_then(|trials| trials.end(now, finding)) {
                    self.handle(Event::Tried(tried));
                }
                self.carry_out()
            }
            Done::Snapshot => {
                self.retire_payloads();
                let next = self.clock.now().after(self.config.coordinator.snapshot_seconds);
                self.snapshot = SnapshotState::Due(next);
                Ok(())
            }
            Done::Beaten(beaten) => {
                self.share.as_mut().map_or(Ok(()), |share| share.beaten(beaten, self.journal.next()))
            }
            Done::Shared(put) => {
                self.share.iter_mut().for_each(|share| share.put(&put));
                self.retire_payloads();
                Ok(())
            }
            Done::Failed(error) => Err(error),
        }
    }

    // ---- snapshots ----

    /// Takes a snapshot when one is due and no outer step is half done.
    fn look_after_snapshot(&mut self) {
        if matches!(self.snapshot, SnapshotState::Due(at) if self.clock.now() >= at) {
            self.snapshot = SnapshotState::Waiting;
        }
        if self.snapshot != SnapshotState::Waiting || self.merging > 0 {
            return;
        }
        self.snapshot = SnapshotState::Writing;
        let save = self.snapshot_job();
        self.on_a_thread(move || match save() {
            Ok(_) => Done::Snapshot,
            Err(error) => Done::Failed(error),
        });
        std::mem::take(&mut self.waiting_merges).into_iter().for_each(|merge| self.merge(merge));
    }

    /// The work of writing the present state down, cut off from the heart.
    fn snapshot_job(&self) -> impl FnOnce() -> Result<PathBuf> + Send + use<> {
        let global = lock(&self.global).clone();
        let (dir, model, book) = (self.dir.clone(), self.model.clone(), self.machine.book().clone());
        let (chain, offset) = self.journal.end();
        move || snapshot::save(&dir, &model, &global, &book, chain, offset)
    }

    /// Drops snapshots and payloads that are too old to be needed.
    fn retire_payloads(&mut self) {
        if self.share.as_ref().is_some_and(Share::is_putting) {
            return; // It reads the snapshot.
        }
        let book = self.machine.book();
        let unneeded = snapshot::retire(&self.dir, &self.config.coordinator, &mut self.payloads, book);
        self.kept = snapshot::needed(&self.payloads, book);
        unneeded.into_iter().for_each(|digest| self.store.remove(digest));
    }

    /// Ends in an orderly way: everything on disk, the report written.
    async fn end(&mut self, state: &str) -> Result<Box<Report>> {
        while self.merging > 0 || self.snapshot == SnapshotState::Writing {
            let Some(done) = self.done.1.recv().await else { break };
            self.finish(done)?;
        }
        let save = self.snapshot_job();
        tokio::task::spawn_blocking(save).await??;
        self.retire_payloads();
        self.look(state);
        self.watch.report.listen = None;
        let report = serde_json::to_vec_pretty(&self.watch.report)?;
        if state == "finished" {
            let tensors = lock(&self.global).tensors();
            hf::save(&self.dir.model(), &self.model, &tensors, fs::read(self.dir.tokenizer()).ok().as_deref())?;
        }
        write_atomically(&self.dir.status(), &report)?;
        write_atomically(&self.dir.report(), &report)?;
        self.hand_over(state).await?;
        Ok(Box::new(self.watch.report.clone()))
    }

    /// Leaves all in the object store for whoever leads next, and says so there.
    async fn hand_over(&mut self, state: &str) -> Result<()> {
        while self.share.as_ref().is_some_and(Share::is_busy) {
            let Some(done) = self.done.1.recv().await else { break };
            self.finish(done)?;
        }
        let state = if state == "finished" { State::Finished } else { State::Stopped };
        let (next, epoch) = (self.journal.next(), self.machine.book().epoch);
        let Some(share) = self.share.as_mut() else { return Ok(()) };
        share.put_now();
        let put = share.put_snapshot(&self.dir, &self.config.coordinator, epoch);
        let beat = share.beat(next, epoch, state);
        tokio::task::spawn_blocking(move || {
            put.map(|put| put()).transpose()?;
            beat.map(|beat| beat()).transpose()
        })
        .await?
        .map(drop)
    }

    // ---- what the operator sees ----

    /// Brings the report up to date.
    fn look(&mut self, state: &str) {
        let (now, controls) = (self.clock.now(), &self.controls);
        self.watch.look(now, state, &self.machine, &|site| controls.contains_key(site));
    }

    /// What is done twice a second.
    fn look_around(&mut self) -> Result<()> {
        self.take_up_acts()?;
        self.look_after_share();
        self.write_status()
    }

    /// Says in the object store that this coordinator lives, and puts a snapshot there when one is due.
    fn look_after_share(&mut self) {
        let (next, epoch) = (self.journal.next(), self.machine.book().epoch);
        let Some(share) = self.share.as_mut() else { return };
        let beat = share.beat(next, epoch, State::Leading);
        let put = share.put_snapshot(&self.dir, &self.config.coordinator, epoch);
        if let Some(beat) = beat {
            self.on_a_thread(move || Done::Beaten(beat()));
        }
        if let Some(put) = put {
            self.on_a_thread(move || Done::Shared(put()));
        }
    }

    fn write_status(&mut self) -> Result<()> {
        self.look(self.state());
        self.watch.write_status()
    }

    /// What the run does, in a word.
    fn state(&self) -> &'static str {
        match self.machine.phase() {
            Phase::Training => "training",
            Phase::Closing => "closing",
            Phase::Finished => "finished",
        }
    }

    /// Adds a line to `events.jsonl`.
    fn note(&mut self, event: serde_json::Value) {
        self.watch.note(self.clock.now(), event);
    }
}

/// The weights that a run begins with: those in its folder, else random ones.
fn first_weights(dir: &RunDir, config: &RunConfig, model: &ModelConfig) -> Result<Vec<Vec<f32>>> {
    let folder = dir.first();
    if !folder.exists() {
        return Ok(model.initial_weights(config.seed));
    }
    let (stored, weights) = hf::load(&folder)?;
    if &stored != model {
        bail!(
            "{} holds another model than run.toml describes\nhint: undo the change to [model], or make the run anew with `atoll new --from`",
            folder.display()
        );
    }
    Ok(weights)
}
