//! One simulated run: processes, disks, links and a queue of things that will happen.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use atoll_core::codec::{self, Codec};
use atoll_core::data::{DatasetId, Ranges};
use atoll_core::delta::Local;
use atoll_core::engine::{Batch, Engine, EngineError, Feed};
use atoll_core::hash::Digest;
use atoll_core::journal::{Book, Chain, Entry, Evaluated};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::outer::{Global, OuterRule};
use atoll_core::rng::{Rng, mix};
use atoll_core::round::{
    Coordinator, Event, Goal, Merge, Merged, Order, Phase, Site, SiteEvent, SiteOrder, SiteSettings, SiteState,
    Standing, Status, Stop, Sync,
};
use atoll_core::site::{SiteId, Time};

use crate::toy::{self, Toy};

/// What a world does to its inhabitants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hardships {
    /// Probability that a message is lost.
    pub loss: f64,
    /// Probability that a message comes twice.
    pub doubling: f64,
    /// Longest delay of a message in seconds; each takes its own, so they overtake one another.
    pub delay: f64,
    /// Crashes of processes, chosen at random among sites and coordinator.
    pub crashes: u32,
    /// Seconds without connection, chosen at random among sites.
    pub cuts: u32,
}

impl Hardships {
    /// A network as one would wish it.
    pub const NONE: Hardships = Hardships { loss: 0.0, doubling: 0.0, delay: 0.02, crashes: 0, cuts: 0 };

    /// The hostile network that belongs to `seed`: up to 20 % loss, 10 % doubling, 0.4 s of delay, five
    /// crashes and five cuts.
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xA70);
        Self {
            loss: rng.unit() * 0.2,
            doubling: rng.unit() * 0.1,
            delay: 0.01 + rng.unit() * 0.4,
            crashes: rng.below(6) as u32,
            cuts: rng.below(6) as u32,
        }
    }
}

/// How a world ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Hash of everything that happened.
    pub trace: Digest,
    /// Tokens in the model.
    pub tokens: u64,
    /// Commits.
    pub commits: u64,
    /// Digest of the model.
    pub digest: Digest,
    /// Mean distance of the model from the toy's target.
    pub error: f64,
    /// Simulated seconds.
    pub seconds: f64,
}

const GOAL_TOKENS: u64 = 20_000;
const SECONDS_MAX: f64 = 3_000.0;
/// Faults end here, so that every world can show that it recovers.
const SECONDS_OF_FAULTS: f64 = 40.0;

/// Runs the world of `seed` to its end.
///
/// # Errors
/// The first invariant that did not hold, with the simulated time.
pub fn simulate(seed: u64, hardships: Hardships) -> Result<Outcome, String> {
    World::new(seed, hardships).run().map_err(|broken| format!("seed {seed}: {broken}"))
}

/// Something that will happen.
#[derive(Debug, Clone)]
enum Happening {
    /// To the coordinator, over connection number `.1` of that site.
    Status(usize, u64, Box<Status>),
    Payload(usize, u64, Digest, Rc<Vec<u8>>),
    Request(usize, u64, Digest),
    Merged(u64, Merged),
    CoordinatorTick(u64),
    CoordinatorStarts,
    /// To site number `.0`, over connection number `.1`.
    Standing(usize, u64, Box<Standing>),
    Acknowledged(usize, u64, Digest, bool),
    Delivered(usize, u64, Digest, Option<Rc<Vec<u8>>>),
    /// To the life of site number `.0` in its life number `.1`.
    StepDone(usize, u64),
    SiteTick(usize, u64),
    SiteStarts(usize),
    Reconnect(usize, u64),
    Fault,
}

struct World {
    rng: Rng,
    now: Time,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    scheduled: u64,
    trace: Digest,
    hardships: Hardships,
    faults_left: u32,
    sync: Sync,
    manifest: Manifest,
    disk: Disk,
    coordinator: Option<Head>,
    /// Counts the lives of the coordinator.
    life: u64,
    sites: Vec<Island>,
    witness: Witness,
}

/// Bytes by their content address.
type Store = BTreeMap<Digest, Rc<Vec<u8>>>;

/// What outlives the coordinator's process.
#[derive(Default)]
struct Disk {
    journal: Vec<String>,
    chain: Chain,
    payloads: Store,
}

/// A living coordinator.
struct Head {
    machine: Coordinator,
    global: Global,
    deltas: Store,
}

struct Island {
    name: SiteId,
    dataset: DatasetId,
    step_seconds: f64,
    connection: u64,
    /// Counts the lives of the process.
    life: u64,
    process: Option<Process>,
    finished: bool,
}

/// A living site.
struct Process {
    machine: Site,
    engine: Toy,
    local: Local,
    queue: Arc<Mutex<ToyLeases>>,
    payloads: Store,
    fetched: Store,
    waiting: VecDeque<SiteEvent>,
    stepping: bool,
}

/// An observer who believes nobody's bookkeeping.
#[derive(Default)]
struct Witness {
    /// Digest of each version of each fragment, as first seen.
    digests: BTreeMap<(FragmentId, u64), Digest>,
    /// Samples that engines really trained on, by site and session.
    trained: BTreeMap<(SiteId, DatasetId), BTreeSet<u64>>,
    /// Samples that commits say are in the model.
    consumed: BTreeSet<(DatasetId, u64)>,
    /// Highest version of each fragment ever announced.
    announced: BTreeMap<usize, u64>,
}

/// The toy's feed: leased positions, lowest first.
#[derive(Default)]
struct ToyLeases {
    granted: Ranges,
    trained: Ranges,
}

struct ToyFeed {
    leases: Arc<Mutex<ToyLeases>>,
    salt: u32,
}

impl Feed for ToyFeed {
    fn next(&mut self, rows: usize, batch: &mut Batch) -> Result<(), EngineError> {
        let mut leases = self.leases.lock().expect("one thread");
        if leases.granted.len() < rows as u64 {
            return Err(EngineError::Starved { wanted: rows });
        }
        let taken = leases.granted.take_first(rows as u64);
        leases.trained.insert(&taken);
        let tokens = taken.spans().flat_map(|(start, end)| start..end);
        let tokens = tokens.flat_map(|p| (0..=toy::CONTEXT as u32).map(move |i| (p as u32) << 3 | i));
        batch.tokens = tokens.map(|token| token ^ self.salt).collect();
        (batch.rows, batch.length) = (rows, toy::CONTEXT);
        Ok(())
    }
}

thread_local! {
    static VERBOSE: RefCell<bool> = RefCell::new(std::env::var_os("ATOLL_SIM_TRACE").is_some());
}

impl World {
    fn new(seed: u64, hardships: Hardships) -> Self {
        let mut rng = Rng::new(mix(seed));
        let pick = |rng: &mut Rng, codecs: &[Codec]| codecs[rng.below(codecs.len() as u64) as usize];
        let rules =
            [OuterRule::Memoryless { learning_rate: 1.0 }, OuterRule::Nesterov { learning_rate: 0.5, momentum: 0.5 }];
        let sync = Sync {
            fragments: 1 + rng.below(4) as usize,
            steps: 1 + rng.below(12) as u32,
            up: pick(&mut rng, &Codec::ALL),
            down: pick(&mut rng, &Codec::ALL),
            outer: rules[rng.below(2) as usize],
            evaluate_seconds: 10.0,
            ..Sync::default()
        };
        let count = 1 + rng.below(5);
        let same_data = rng.chance(0.7);
        let island = |index: u64, rng: &mut Rng| Island {
            name: format!("site-{index}").parse().expect("a good name"),
            dataset: DatasetId(Digest::of(&[if same_data { 0 } else { index as u8 }])),
            step_seconds: 0.01 * (1.0 + 9.0 * rng.unit() * rng.unit()),
            connection: 0,
            life: 0,
            process: None,
            finished: false,
        };
        let sites = (0..count).map(|index| island(index, &mut rng)).collect();
        let manifest = toy::manifest(sync.fragments);
        Self {
            rng,
            now: Time(1_000_000),
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            scheduled: 0,
            trace: Digest::default(),
            hardships,
            faults_left: hardships.crashes + hardships.cuts,
            sync,
            manifest,
            disk: Disk::default(),
            coordinator: None,
            life: 0,
            sites,
            witness: Witness::default(),
        }
    }

    fn run(mut self) -> Result<Outcome, String> {
        self.begin();
        self.after(0.0, Happening::CoordinatorStarts);
        for index in 0..self.sites.len() {
            let delay = self.rng.unit();
            self.after(delay, Happening::SiteStarts(index));
        }
        if self.faults_left > 0 {
            self.after(1.0, Happening::Fault);
        }
        while let Some(Reverse((time, number))) = self.queue.pop() {
            let happening = self.happenings.remove(&number).ok_or("the queue names nothing")?;
            self.now = time;
            self.note(&happening);
            self.happen(happening).map_err(|broken| format!("at {:.3} s: {broken}", time.0 as f64 / 1e6))?;
            if self.sites.iter().all(|site| site.finished) {
                return self.close();
            }
            if time.0 as f64 / 1e6 > SECONDS_MAX {
                break;
            }
        }
        let Some(head) = self.coordinator.as_ref() else { return Err("the coordinator never came back".into()) };
        let rounds = 0..self.sync.fragments;
        let waiting: Vec<_> = rounds.map(|index| head.machine.waiting(self.now, index)).collect();
        Err(format!(
            "the run did not finish; {} tokens in the model; rounds wait for {waiting:?}",
            head.machine.book().tokens
        ))
    }

    /// The journal of a run that was just created, with all sites admitted.
    fn begin(&mut self) {
        let global = self.first_weights();
        let mut entries = vec![Entry::Began {
            run: "simulated".into(),
            seed: 1,
            context: toy::CONTEXT as u64,
            layout: self.manifest.fingerprint(),
            theta: global.digests(),
        }];
        entries.extend(self.sites.iter().map(|site| Entry::Admitted {
            site: site.name.clone(),
            key: Digest::of(site.name.to_string().as_bytes()),
            ticket: Digest::of(site.name.to_string().as_bytes()),
        }));
        entries.iter().for_each(|entry| self.disk.append(entry));
    }

    fn first_weights(&self) -> Global {
        let zeros = |fragment| vec![0.0; self.manifest.fragment_len(fragment).unwrap_or(0)];
        Global::new(self.manifest.clone(), self.manifest.fragments().map(zeros).collect())
    }

    fn after(&mut self, seconds: f64, happening: Happening) {
        self.scheduled += 1;
        self.queue.push(Reverse((self.now.after(seconds), self.scheduled)));
        self.happenings.insert(self.scheduled, happening);
    }

    fn note(&mut self, happening: &Happening) {
        let line = format!("{} {happening:?}", self.now.0);
        VERBOSE.with_borrow(|verbose| {
            if *verbose {
                eprintln!("{}", line.chars().take(1000).collect::<String>());
            }
        });
        self.trace = Digest::of_all([&self.trace, &Digest::of(line.as_bytes())]);
    }

    /// Sends over a link that may lose, double and delay.
    fn send(&mut self, happening: &Happening) {
        let copies = if self.rng.chance(self.hardships.doubling) { 2 } else { 1 };
        for _ in 0..copies {
            if !self.rng.chance(self.hardships.loss) {
                let delay = 0.001 + self.rng.unit() * self.hardships.delay;
                self.after(delay, happening.clone());
            }
        }
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        match happening {
            Happening::CoordinatorStarts => self.start_coordinator(),
            Happening::CoordinatorTick(life) if life == self.life => {
                self.tell_coordinator(Event::Tick)?;
                self.after(0.25, Happening::CoordinatorTick(life));
                Ok(())
            }
            Happening::Merged(life, merged) if life == self.life => self.tell_coordinator(Event::Merged(merged)),
            Happening::Status(index, connection, status) if self.linked(index, connection) => {
                let site = self.sites[index].name.clone();
                self.tell_coordinator(Event::Heard(site, status))
            }
            Happening::Payload(index, connection, digest, bytes) if self.linked(index, connection) => {
                self.receive_payload(index, connection, digest, &bytes)
            }
            Happening::Request(index, connection, digest) if self.linked(index, connection) => {
                let bytes = self.coordinator.as_ref().and_then(|head| head.bytes(digest));
                self.send(&Happening::Delivered(index, connection, digest, bytes));
                Ok(())
            }
            Happening::Standing(index, connection, standing) if self.linked(index, connection) => {
                self.tell_site(index, SiteEvent::Standing(standing))
            }
            Happening::Acknowledged(index, connection, digest, done) if self.sites[index].connection == connection => {
                self.tell_site(index, SiteEvent::Uploaded(digest, done))
            }
            Happening::Delivered(index, connection, digest, bytes) if self.sites[index].connection == connection => {
                let done = bytes.is_some();
                if let (Some(process), Some(bytes)) = (self.sites[index].process.as_mut(), bytes) {
                    process.fetched.insert(digest, bytes);
                }
                self.tell_site(index, SiteEvent::Fetched(digest, done))
            }
            Happening::StepDone(index, life) if self.sites[index].life == life => self.finish_step(index),
            Happening::SiteTick(index, life) if self.sites[index].life == life => {
                self.after(0.5, Happening::SiteTick(index, life));
                self.tell_site(index, SiteEvent::Tick)
            }
            Happening::SiteStarts(index) => self.start_site(index),
            Happening::Reconnect(index, life) if self.sites[index].life == life => self.connect(index),
            Happening::Fault => self.fault(),
            _ => Ok(()), // It was meant for a connection or a life that is over.
        }
    }

    fn linked(&self, index: usize, connection: u64) -> bool {
        self.coordinator.is_some() && self.sites[index].connection == connection
    }

    // ---- the coordinator ----

    /// Rebuilds everything from the disk, recomputing every outer step.
    fn start_coordinator(&mut self) -> Result<(), String> {
        let (book, global, deltas) = self.replay()?;
        for (fragment, version) in &self.witness.announced {
            let durable = book.fragments[*fragment].version;
            check(durable >= *version, || format!("fragment {fragment} was announced at {version}, is at {durable}"))?;
        }
        self.life += 1;
        let goal = Goal { tokens: Some(GOAL_TOKENS), minutes: None };
        let machine = Coordinator::new(self.sync.clone(), goal, book);
        self.coordinator = Some(Head { machine, global, deltas });
        self.after(0.0, Happening::CoordinatorTick(self.life));
        for index in 0..self.sites.len() {
            let delay = 0.1 + self.rng.unit();
            self.after(delay, Happening::Reconnect(index, self.sites[index].life));
        }
        Ok(())
    }

    fn replay(&self) -> Result<(Book, Global, Store), String> {
        let (mut book, mut global, mut chain) = (Book::default(), self.first_weights(), Chain::default());
        let mut deltas = BTreeMap::new();
        let payload = |digest| self.disk.payloads.get(&digest).map(|bytes| bytes.to_vec());
        for line in &self.disk.journal {
            let entry = chain.read(line).map_err(|error| error.to_string())?;
            book.apply(&entry).map_err(|error| error.to_string())?;
            if let Entry::Committed(commit) = &entry {
                let step = global.replay(commit, &payload).map_err(|error| error.to_string())?;
                deltas.insert(step.delta, Rc::new(step.payload));
            }
        }
        check(book.digest() == Digest::of_all(&global.digests()), || "the book's digest is not the model's".into())?;
        Ok((book, global, deltas))
    }

    fn tell_coordinator(&mut self, event: Event) -> Result<(), String> {
        let Some(head) = self.coordinator.as_mut() else { return Ok(()) };
        let orders = head.machine.handle(self.now, event);
        head.machine.book().ledger.verify()?;
        // A crash may come between any two orders.
        let crash = self.faults_left > 0 && self.rng.chance(0.0005);
        let until = if crash { self.rng.below(orders.len() as u64 + 1) as usize } else { orders.len() };
        for order in orders.into_iter().take(until) {
            self.carry_out(order)?;
        }
        if crash {
            self.faults_left -= 1;
            self.crash_coordinator()?;
        }
        Ok(())
    }

    fn carry_out(&mut self, order: Order) -> Result<(), String> {
        match order {
            Order::Record(entry) => {
                self.witness.see(&entry, &self.sites)?;
                self.disk.append(&entry);
            }
            Order::Tell(site, standing) => {
                for (index, &(version, _)) in standing.fragments.iter().enumerate() {
                    let announced = self.witness.announced.entry(index).or_default();
                    *announced = version.max(*announced);
                }
                let index = self.index_of(&site)?;
                let connection = self.sites[index].connection;
                self.send(&Happening::Standing(index, connection, standing));
            }
            Order::Merge(merge) => self.merge(&merge)?,
            Order::Halt(why) => return Err(why),
            Order::Forget(_) => {} // The simulator keeps payloads, to replay from them.
        }
        Ok(())
    }

    fn merge(&mut self, merge: &Merge) -> Result<(), String> {
        let Some(head) = self.coordinator.as_mut() else { return Ok(()) };
        let payload = |digest| self.disk.payloads.get(&digest).map(|bytes| bytes.to_vec());
        let step = head
            .global
            .perform(merge.fragment, &merge.contributions, self.sync.outer, self.sync.down, &payload)
            .map_err(|error| error.to_string())?;
        let bytes = step.payload.len() as u64;
        head.deltas.insert(step.delta, Rc::new(step.payload));
        let merged =
            Merged { fragment: merge.fragment, delta: step.delta, bytes, digest: step.digest, cosines: step.cosines };
        let seconds = 0.001 + self.rng.unit() * 0.05;
        self.after(seconds, Happening::Merged(self.life, merged));
        Ok(())
    }

    fn receive_payload(
        &mut self,
        index: usize,
        connection: u64,
        digest: Digest,
        bytes: &Rc<Vec<u8>>,
    ) -> Result<(), String> {
        check(Digest::of(bytes) == digest, || "a payload arrived under a wrong name".into())?;
        self.disk.payloads.insert(digest, bytes.clone());
        self.send(&Happening::Acknowledged(index, connection, digest, true));
        self.tell_coordinator(Event::Arrived(digest))?;
        // Now and then a payload turns out to be useless, perhaps when it is being merged already.
        if self.rng.chance(self.hardships.loss / 10.0) {
            let site = self.sites[index].name.clone();
            self.tell_coordinator(Event::Useless(site, digest, "the simulator says so".into()))?;
        }
        Ok(())
    }

    fn crash_coordinator(&mut self) -> Result<(), String> {
        self.coordinator = None;
        self.life += 1;
        for index in 0..self.sites.len() {
            self.disconnect(index)?;
        }
        let delay = 0.5 + 5.0 * self.rng.unit();
        self.after(delay, Happening::CoordinatorStarts);
        Ok(())
    }

    fn index_of(&self, site: &SiteId) -> Result<usize, String> {
        self.sites.iter().position(|island| &island.name == site).ok_or_else(|| format!("who is {site}?"))
    }

    // ---- the sites ----

    fn start_site(&mut self, index: usize) -> Result<(), String> {
        let leases = Arc::new(Mutex::new(ToyLeases::default()));
        let site = &mut self.sites[index];
        let salt = u32::from(site.dataset.0.0[0]) << 24;
        let engine = Toy::new(self.manifest.clone(), Box::new(ToyFeed { leases: leases.clone(), salt }));
        let lens = self.manifest.fragments().map(|f| self.manifest.fragment_len(f).unwrap_or(0));
        let machine = Site::new(SiteSettings {
            fragment_lens: lens.collect(),
            up: self.sync.up,
            dataset: site.dataset,
            samples: 1000,
            samples_per_step: toy::ROWS as u64,
            session: self.now.0,
        });
        site.life += 1;
        site.process = Some(Process {
            local: Local::new(&engine),
            machine,
            engine,
            queue: leases,
            payloads: BTreeMap::new(),
            fetched: BTreeMap::new(),
            waiting: VecDeque::new(),
            stepping: false,
        });
        let life = site.life;
        self.after(0.0, Happening::SiteTick(index, life));
        self.connect(index)
    }

    fn connect(&mut self, index: usize) -> Result<(), String> {
        if self.coordinator.is_none() || self.sites[index].process.is_none() || self.sites[index].finished {
            return Ok(()); // The coordinator's start connects everybody.
        }
        self.sites[index].connection += 1;
        self.tell_site(index, SiteEvent::Connected)
    }

    fn disconnect(&mut self, index: usize) -> Result<(), String> {
        let site = &mut self.sites[index];
        site.connection += 1;
        if let Some(process) = site.process.as_mut() {
            process.waiting.push_back(SiteEvent::Disconnected);
        }
        let name = site.name.clone();
        self.tell_coordinator(Event::Gone(name))
    }

    /// A site's events wait while it steps, as its thread would make them.
    fn tell_site(&mut self, index: usize, event: SiteEvent) -> Result<(), String> {
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        process.waiting.push_back(event);
        if process.stepping { Ok(()) } else { self.work(index) }
    }

    fn work(&mut self, index: usize) -> Result<(), String> {
        let now = self.now;
        while let Some(process) = self.sites[index].process.as_mut()
            && let Some(event) = process.waiting.pop_front()
        {
            let orders = process.machine.handle(now, event);
            for order in orders {
                self.obey(index, order)?;
            }
        }
        let Some(process) = self.sites[index].process.as_ref() else { return Ok(()) };
        let trains = process.machine.state() == SiteState::Training;
        check(!trains || process.stepping, || format!("site {index} could train and does not"))
    }

    fn obey(&mut self, index: usize, order: SiteOrder) -> Result<(), String> {
        let (life, connection) = (self.sites[index].life, self.sites[index].connection);
        let Some(process) = self.sites[index].process.as_mut() else { return Ok(()) };
        match order {
            SiteOrder::Train(_) => {
                process.stepping = true;
                let seconds = self.sites[index].step_seconds;
                self.after(seconds, Happening::StepDone(index, life));
            }
            SiteOrder::Grant(ranges) => process.leases().granted.insert(&ranges),
            SiteOrder::DropLeases => process.leases().granted = Ranges::new(),
            SiteOrder::Progress(_) | SiteOrder::Forget(_) => {}
            SiteOrder::Contribute(fragment, codec) => process.contribute(fragment, codec)?,
            SiteOrder::Rebase(fragment) => {
                process.local.rebase(&mut process.engine, fragment).map_err(|error| error.to_string())?;
            }
            SiteOrder::Commit(notice) => {
                let bytes = process.fetched.get(&notice.delta).cloned().ok_or("a commit was ordered before it came")?;
                let digest = process.local.commit(&mut process.engine, notice.fragment, &bytes);
                let digest = digest.map_err(|error| error.to_string())?;
                self.applied(index, notice.fragment, notice.version, digest)?;
            }
            SiteOrder::Install(fragment, version, digest) => {
                let bytes = process.fetched.get(&digest).cloned().ok_or("weights were ordered before they came")?;
                let weights = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                let weights: Vec<f32> = weights.collect();
                let digest = process.local.install(&mut process.engine, fragment, &weights);
                let digest = digest.map_err(|error| error.to_string())?;
                self.applied(index, fragment, version, digest)?;
            }
            SiteOrder::Evaluate(request) => {
                let commits = process.machine.held().flatten().map(|(version, _)| version).sum();
                let evaluated = Evaluated { commits, nats: 1.0, tokens: 1, bytes: 1 };
                process.waiting.push_back(SiteEvent::Evaluated(request, evaluated));
            }
            SiteOrder::Upload(digest) => {
                let bytes = process.payloads.get(&digest).ok_or("an upload of nothing")?.clone();
                let lost = self.rng.chance(self.hardships.loss);
                if lost {
                    self.after(0.5, Happening::Acknowledged(index, connection, digest, false));
                } else {
                    let delay = 0.01 + self.rng.unit() * self.hardships.delay * 4.0;
                    self.after(delay, Happening::Payload(index, connection, digest, bytes));
                    // Without an acknowledgement the shell gives up at some point.
                    self.after(delay + 2.0, Happening::Acknowledged(index, connection, digest, false));
                }
            }
            SiteOrder::Fetch { digest, .. } => {
                self.send(&Happening::Request(index, connection, digest));
                self.after(2.0, Happening::Delivered(index, connection, digest, None));
            }
            SiteOrder::Report(status) => self.send(&Happening::Status(index, connection, status)),
            SiteOrder::Stop(Stop::Finished) => self.sites[index].finished = true,
            SiteOrder::Stop(stop) => return Err(format!("site {index} stopped: {stop:?}")),
        }
        Ok(())
    }

    fn applied(&mut self, index: usize, fragment: FragmentId, version: u64, digest: Digest) -> Result<(), String> {
        let known = *self.witness.digests.entry((fragment, version)).or_insert(digest);
        check(known == digest, || format!("site {index} has another {fragment} version {version}"))?;
        if let Some(process) = self.sites[index].process.as_mut() {
            process.waiting.push_back(SiteEvent::Applied { fragment, version, digest });
        }
        Ok(())
    }

    fn finish_step(&mut self, index: usize) -> Result<(), String> {
        let site = &mut self.sites[index];
        let seconds = site.step_seconds;
        let Some(process) = site.process.as_mut() else { return Ok(()) };
        process.stepping = false;
        let progress = match process.engine.train(1) {
            Ok(progress) => progress,
            Err(EngineError::Starved { .. }) => Default::default(),
            Err(error) => return Err(error.to_string()),
        };
        let trained = std::mem::take(&mut process.leases().trained);
        let seen = self.witness.trained.entry((site.name.clone(), site.dataset)).or_default();
        seen.extend(trained.spans().flat_map(|(start, end)| start..end));
        process.waiting.push_front(SiteEvent::Stepped { progress, trained, seconds });
        self.work(index)
    }

    // ---- faults and the end ----

    fn fault(&mut self) -> Result<(), String> {
        if self.faults_left == 0 || self.now.0 as f64 / 1e6 > SECONDS_OF_FAULTS {
            self.faults_left = 0;
            return Ok(());
        }
        self.faults_left -= 1;
        let crash =
            self.rng.below(u64::from(self.hardships.crashes + self.hardships.cuts)) < u64::from(self.hardships.crashes);
        let victim = self.rng.below(self.sites.len() as u64 + 1) as usize;
        match (crash, victim.checked_sub(1)) {
            (true, None) if self.coordinator.is_some() => self.crash_coordinator()?,
            (true, Some(index)) if self.sites[index].process.is_some() => {
                self.disconnect(index)?;
                self.sites[index].process = None;
                self.sites[index].life += 1;
                let delay = 0.2 + 5.0 * self.rng.unit();
                self.after(delay, Happening::SiteStarts(index));
            }
            (false, Some(index)) => {
                self.disconnect(index)?;
                if self.sites[index].process.as_ref().is_some_and(|process| !process.stepping) {
                    self.work(index)?;
                }
                let (delay, life) = (self.rng.unit() * 4.0, self.sites[index].life);
                self.after(delay, Happening::Reconnect(index, life));
            }
            _ => {}
        }
        let delay = self.rng.unit() * 4.0;
        self.after(delay, Happening::Fault);
        Ok(())
    }

    fn close(self) -> Result<Outcome, String> {
        let head = self.coordinator.as_ref().ok_or("the run finished without a coordinator")?;
        let (book, global, _) = self.replay()?;
        check(head.machine.phase() == Phase::Finished, || "sites finished before the run".into())?;
        check(&book == head.machine.book(), || "the journal does not rebuild the book".into())?;
        check(global == head.global, || "the journal does not rebuild the model".into())?;
        let (counted, passed) = (head.machine.seconds(), self.now.0 as f64 / 1e6);
        check(counted <= passed + 1e-3, || format!("{counted} s of training were counted in {passed} s"))?;
        check(book.tokens == book.ledger.consumed() * toy::CONTEXT as u64, || "tokens were counted twice".into())?;
        Ok(Outcome {
            trace: self.trace,
            tokens: book.tokens,
            commits: book.commits(),
            digest: book.digest(),
            error: toy::error(&global.theta),
            seconds: self.now.0 as f64 / 1e6,
        })
    }
}

impl Disk {
    fn append(&mut self, entry: &Entry) {
        let line = self.chain.write(entry);
        self.journal.push(line);
    }
}

impl Head {
    /// What a coordinator serves: deltas by address, and the weights of each fragment by digest.
    fn bytes(&self, digest: Digest) -> Option<Rc<Vec<u8>>> {
        let weights = || {
            let fragment = self.global.theta.iter().find(|fragment| Digest::of_weights(fragment) == digest)?;
            Some(Rc::new(fragment.iter().flat_map(|weight| weight.to_le_bytes()).collect()))
        };
        self.deltas.get(&digest).cloned().or_else(weights)
    }
}

impl Process {
    fn leases(&self) -> std::sync::MutexGuard<'_, ToyLeases> {
        self.queue.lock().expect("one thread")
    }

    fn contribute(&mut self, fragment: FragmentId, codec: Codec) -> Result<(), String> {
        let payload = self.local.contribute(&mut self.engine, fragment, codec).map_err(|error| error.to_string())?;
        codec::decode(&payload.bytes, self.local.theta(fragment).len()).map_err(|error| error.to_string())?;
        let (bytes, norm) = (payload.bytes.len() as u64, payload.norm);
        self.payloads.insert(payload.digest, Rc::new(payload.bytes));
        self.waiting.push_back(SiteEvent::Contributed { fragment, payload: payload.digest, bytes, norm });
        Ok(())
    }
}

impl Witness {
    /// Checks a commit against what really happened.
    fn see(&mut self, entry: &Entry, sites: &[Island]) -> Result<(), String> {
        let Entry::Committed(commit) = entry else { return Ok(()) };
        let known = *self.digests.entry((commit.fragment, commit.version)).or_insert(commit.digest);
        check(known == commit.digest, || format!("{} has two versions {}", commit.fragment, commit.version))?;
        for accepted in &commit.contributions {
            let island = sites.iter().find(|island| island.name == accepted.site).ok_or("a commit of a stranger")?;
            let key = (accepted.site.clone(), island.dataset);
            for position in accepted.ranges.spans().flat_map(|(start, end)| start..end) {
                let trained = self.trained.get(&key).is_some_and(|trained| trained.contains(&position));
                check(trained, || format!("{} never trained on sample {position}", accepted.site))?;
                let new = self.consumed.insert((island.dataset, position));
                check(new, || format!("sample {position} is in the model twice"))?;
            }
        }
        Ok(())
    }
}

fn check(holds: bool, broken: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(broken()) }
}
