//! The site's shell. One thread, the trainer, owns the machine and the engine and never waits for anybody: between
//! two inner steps it copies weights out, adds changes, and carries out what the machine orders. Encoding and
//! decoding go on at the [`desk`], connections on other threads ([`net`]).

mod arriving;
mod desk;
mod donors;
mod meter;
mod net;
mod pile;
mod residuals;
pub mod told;
mod window;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::codec::Codec;
use atoll_core::delta::{self, Local};
use atoll_core::engine::{Batch, Engine, EngineError, Feed, Progress};
use atoll_core::hash::Digest;
use atoll_core::journal::Evaluated;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::round::{Measured, Site, SiteEvent, SiteOrder, SiteSettings, Stop};
use atoll_core::site::Time;
use atoll_core::team::{Alone, Team};
use atoll_core::training::{Packing, Training};

use crate::crew::Crew;
use crate::data::{DataError, corpus, ingest, is_dataset};
use crate::data::{Dataset, IngestOptions, IngestProgress, LeasedFeed, Leases, Source, Split, TextField, Tokenizer};
use crate::identity::{Identity, Ticket};
use crate::run::{RunConfig, Terms, write_atomically};
use crate::way::Way;
use arriving::Arriving;
use desk::{Desk, Done, Job};
use donors::Suspicion;
use meter::Meter;
use net::{Command, Incoming, Route};
use residuals::Residuals;

/// What the operator of a site decides.
#[derive(Debug, Clone)]
pub struct SiteOptions {
    /// The site's own folder: key, cached tokens.
    pub dir: PathBuf,
    /// The ticket.
    pub ticket: Ticket,
    /// Text or an ingested dataset; without it the default corpus.
    pub data: Option<PathBuf>,
    /// Samples per micro-batch, if not the run's.
    pub rows: Option<usize>,
    /// Threads that the engine uses.
    pub threads: usize,
    /// Share of these threads' time that training may take, above 0 and at most 1.
    pub share: f64,
    /// Data connections.
    pub streams: usize,
    /// Name of the engine, for people.
    pub engine: String,
    /// Name of the device, for people.
    pub device: String,
}

/// What an engine is built from.
pub struct Parts {
    /// The run's terms.
    pub terms: Terms,
    /// The layout.
    pub manifest: Manifest,
    /// Samples per micro-batch.
    pub rows: usize,
    /// Where its batches come from.
    pub feed: Box<dyn Feed>,
}

/// Says what is going on before training starts.
pub type Notice<'a> = &'a mut dyn FnMut(&str);

/// Rows of held-out text that a look at the global model reads.
const HELD_OUT_ROWS: u64 = 32;
/// A site that trains at a share of its threads makes up for at most this much lost time.
const LAG_SECONDS: f64 = 2.0;
/// The trainer looks up at least this often when it has nothing to train on.
const IDLE_SECONDS: f64 = 0.1;

/// Joins a run and trains until it is finished or `stop` turns true.
///
/// # Errors
/// If the site is refused, its data is unusable, or the engine fails.
pub fn join(
    options: &SiteOptions,
    make_engine: impl FnOnce(Parts) -> Result<Box<dyn Engine>>,
    stop: &Arc<AtomicBool>,
    notice: Notice<'_>,
) -> Result<Stop> {
    fs::create_dir_all(&options.dir).with_context(|| format!("{} cannot be made", options.dir.display()))?;
    let _hold = crate::run::RunDir(options.dir.clone()).hold()?;
    let identity = Identity::load_or_create(&options.dir.join("site.key"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut route = Route {
        way: Way::new(&options.ticket, &identity, &options.dir, &options.engine, &options.device)?,
        streams: options.streams,
        largest: 0,
        meter: Meter::default(),
        arriving: Arriving::open(&options.dir, options.ticket.coordinator)?,
        suspicion: Suspicion::default(),
    };
    let Some((welcome, tokenizer)) = runtime.block_on(enlist(&route, options, stop, notice))? else {
        return Ok(Stop::Left);
    };
    let terms = Terms::read(&welcome.config)?;
    let tokenizer = Tokenizer::from_bytes(tokenizer)?;
    let Some(dataset) = open_data(options.data.as_deref(), &options.dir, &terms.config, &tokenizer, stop, notice)?
    else {
        return Ok(Stop::Left);
    };
    let dataset = Arc::new(dataset);
    let manifest = terms.config.manifest(&terms.model);
    let training = &terms.config.training;
    let (context, packing) = (training.context, training.packing);
    let leases = Leases::new();
    let feed = LeasedFeed::new(dataset.clone(), leases.clone(), terms.config.seed, context, packing)?;
    let rows = options.rows.unwrap_or(training.rows);
    let engine = make_engine(Parts { terms: terms.clone(), manifest: manifest.clone(), rows, feed: Box::new(feed) })?;
    route.way.hello.layout = Some(engine.manifest().fingerprint());
    let fragment_lens: Vec<usize> = manifest.fragments().map(|id| manifest.fragment_len(id).unwrap_or(0)).collect();
    route.largest = Codec::F32.payload_len(fragment_lens.iter().copied().max().unwrap_or(0));
    let meter = route.meter.clone();
    let local = Local::new(&manifest, terms.config.sync.follow, terms.config.sync.feedback);
    let residuals = Residuals::open(&options.dir, &manifest)?;
    let arriving = route.arriving.clone();
    let machine = Site::new(SiteSettings {
        begun: arriving.begun(fragment_lens.len()),
        fragment_lens,
        dataset: dataset.id(),
        samples: dataset.samples(context),
        samples_per_step: (rows * training.accumulate) as u64,
        session: next_session(&options.dir, welcome.session)?,
    });
    let (commands, receiver) = tokio::sync::mpsc::unbounded_channel();
    let (sender, inbox) = mpsc::channel();
    let desk = Desk::open(local, residuals, team(options.threads), sender.clone())?;
    let network = runtime.spawn(net::keep_connected(route, receiver, sender));
    let trainer = Trainer {
        machine,
        desk,
        meter,
        held_out: held_out(&dataset, &tokenizer, training, rows)?,
        engine,
        leases,
        commands,
        inbox,
        stop: stop.clone(),
        cpu_share: options.share * options.threads.max(1) as f64,
        full_speed: options.share >= 1.0,
        paced_until: Instant::now(),
        start: Instant::now(),
        payloads: BTreeMap::new(),
        fetched: BTreeMap::new(),
        pushed: Pushed::default(),
        spare: Vec::new(),
        events: VecDeque::new(),
        steps_ordered: 0,
        exposed: Duration::ZERO,
        newest_commit: None,
        ended: None,
    };
    let result = trainer.run();
    if matches!(result, Ok(Stop::Finished)) {
        arriving.clear();
    }
    // The network ends when the trainer has hung up and its last status is sent; a dead link may not.
    let goodbye = async { tokio::time::timeout(Duration::from_secs(1), network).await };
    if runtime.block_on(goodbye).is_err() {
        tracing::debug!("the last status could not be sent");
    }
    result
}

/// Cores that the engine leaves free encode and decode.
fn team(threads: usize) -> Box<dyn Team + Send> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores > threads + 1 { Box::new(Crew) } else { Box::new(Alone) }
}

async fn enlist(
    route: &Route,
    options: &SiteOptions,
    stop: &Arc<AtomicBool>,
    notice: Notice<'_>,
) -> Result<Option<(atoll_core::wire::Welcome, Vec<u8>)>> {
    let path = |digest: Digest| options.dir.join(format!("tokenizer-{}.json", digest.short()));
    let have = |digest| fs::read(path(digest)).ok().filter(|bytes| Digest::of(bytes) == digest);
    let mut told = false;
    let attempt = route.enlist(have, |error| {
        if !std::mem::replace(&mut told, true) {
            notice(&format!("{error:#}; trying again until the coordinator answers"));
        }
    });
    let stopped = async {
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (welcome, tokenizer) = tokio::select! {
        result = attempt => result?,
        () = stopped => return Ok(None),
    };
    if have(welcome.tokenizer).is_none() {
        write_atomically(&path(welcome.tokenizer), &tokenizer)?;
    }
    Ok(Some((welcome, tokenizer)))
}

/// Opens the operator's dataset, or makes one in `dir` of the operator's text, the default corpus without any.
/// `None` if `stop` turned true meanwhile.
pub(crate) fn open_data(
    data: Option<&Path>,
    dir: &Path,
    config: &RunConfig,
    tokenizer: &Tokenizer,
    stop: &AtomicBool,
    notice: Notice<'_>,
) -> Result<Option<Dataset>> {
    if let Some(path) = data.filter(|path| is_dataset(path)) {
        let dataset = Dataset::open(path)?;
        dataset.check_tokenizer(tokenizer.hash())?;
        let (own, run) = (dataset.held_out_share(), config.data.held_out);
        if own != run {
            bail!(
                "{} holds out {own} of its documents, the run {run}\nhint: `atoll ingest --held-out {run}`, so that nobody trains on what another holds out",
                path.display()
            );
        }
        return Ok(Some(dataset));
    }
    let source = match data {
        Some(path) => Source::open(path)?,
        None => corpus::source()?,
    };
    let settings = IngestOptions {
        held_out: config.data.held_out,
        text_field: TextField(config.data.text_field.clone()),
        ..IngestOptions::default()
    };
    let folder = dir.join(format!("tokens-{}", tokenizer.hash().short()));
    let mut last = Instant::now();
    let mut progress = |progress: IngestProgress| {
        if last.elapsed() > Duration::from_secs(2) {
            last = Instant::now();
            notice(&format!(
                "reading text: {} of {} files, {} tokens",
                progress.files_done, progress.files, progress.tokens
            ));
        }
        if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    match ingest(&source, tokenizer, &folder, &settings, &mut progress) {
        Err(DataError::Stopped) => Ok(None),
        result => Ok(Some(result?)),
    }
}

/// A session number above all earlier ones, even if the clock was set back.
pub(crate) fn next_session(dir: &Path, known: u64) -> Result<u64> {
    let path = dir.join("session");
    let stored = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    let session = clock.max(known + 1).max(stored + 1);
    write_atomically(&path, session.to_string().as_bytes())?;
    Ok(session)
}

/// Held-out batches, the same at every site that brings the same text.
#[derive(Debug)]
pub struct HeldOut {
    /// Windows, in batches of equal length.
    pub batches: Vec<Batch>,
    /// Bytes of text that their targets stand for.
    pub bytes: u64,
}

/// At most [`HELD_OUT_ROWS`] windows, spread evenly over the held-out text and packed as in training.
pub(crate) fn held_out(dataset: &Dataset, tokenizer: &Tokenizer, training: &Training, rows: usize) -> Result<HeldOut> {
    let (context, packing) = (training.context, training.packing);
    let windows = dataset.held_out_samples(context);
    let count = windows.min(HELD_OUT_ROWS);
    let spread = (0..count).map(|row| row * windows / count.max(1));
    held_out_windows(dataset, tokenizer, context, packing, rows, spread)
}

/// Batches of the held-out windows of these numbers.
///
/// # Errors
/// If a shard cannot be read.
pub fn held_out_windows(
    dataset: &Dataset,
    tokenizer: &Tokenizer,
    context: usize,
    packing: Packing,
    rows: usize,
    windows: impl Iterator<Item = u64>,
) -> Result<HeldOut> {
    let mut held_out = HeldOut { batches: Vec::new(), bytes: 0 };
    let mut window = Vec::new();
    for index in windows {
        window.clear();
        dataset.window(Split::HeldOut, index, context, &mut window)?;
        held_out.bytes += window[1..].iter().map(|&token| tokenizer.token_bytes(token) as u64).sum::<u64>();
        let length = window.len() - 1;
        match held_out.batches.last_mut().filter(|batch| batch.length == length && batch.rows < rows) {
            Some(batch) => {
                batch.rows += 1;
                batch.tokens.extend_from_slice(&window);
            }
            None => held_out.batches.push(Batch { rows: 1, length, tokens: window.clone(), ..Batch::default() }),
        }
    }
    held_out.batches.iter_mut().for_each(|batch| batch.pack(packing, dataset.end_of_text()));
    Ok(held_out)
}

struct Trainer {
    machine: Site,
    engine: Box<dyn Engine>,
    desk: Desk,
    meter: Meter,
    held_out: HeldOut,
    leases: Leases,
    commands: tokio::sync::mpsc::UnboundedSender<Command>,
    inbox: mpsc::Receiver<Incoming>,
    stop: Arc<AtomicBool>,
    /// Processor seconds per second that training may take.
    cpu_share: f64,
    full_speed: bool,
    /// Up to when the steps so far would have lasted at the site's share.
    paced_until: Instant,
    start: Instant,
    /// Encoded contributions that are not settled.
    payloads: BTreeMap<Digest, Arc<Vec<u8>>>,
    /// Fetched bytes that the desk has not taken yet.
    fetched: BTreeMap<Digest, Vec<u8>>,
    /// Commits that came before they were asked for.
    pushed: Pushed,
    /// Memory for the next reading of weights.
    spare: Vec<f32>,
    /// Events that the machine has not seen yet.
    events: VecDeque<SiteEvent>,
    steps_ordered: u32,
    /// Time between steps in which the engine could have trained.
    exposed: Duration,
    /// Fragment and version of the newest commit that the engine has taken in.
    newest_commit: Option<(FragmentId, u64)>,
    ended: Option<Stop>,
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

impl Trainer {
    /// Trains to the end, and keeps what the codec of the way up has not delivered.
    fn run(mut self) -> Result<Stop> {
        let result = self.train_on();
        let kept = self.desk.close(matches!(result, Ok(Stop::Finished)));
        result.and_then(|stop| kept.map(|()| stop))
    }

    fn train_on(&mut self) -> Result<Stop> {
        let mut leaving = false;
        loop {
            if self.stop.load(Ordering::Relaxed) && !std::mem::replace(&mut leaving, true) {
                self.events.push_back(SiteEvent::Leave);
            }
            self.receive()?;
            let began = Instant::now();
            self.attend()?;
            if self.steps_ordered > 0 {
                self.exposed += began.elapsed();
            }
            match self.ended {
                Some(Stop::Superseded) => bail!(
                    "another process has joined as this site\nhint: one ticket and one folder belong to one process; stop one of the two"
                ),
                Some(stop) => return Ok(stop),
                None => {}
            }
            let steps = std::mem::take(&mut self.steps_ordered);
            if steps > 0 {
                self.train(steps)?;
            }
        }
    }

    fn now(&self) -> Time {
        Time(self.start.elapsed().as_micros() as u64)
    }

    /// Takes in what has arrived; waits for something only if there is nothing to train.
    fn receive(&mut self) -> Result<()> {
        while let Ok(incoming) = self.inbox.try_recv() {
            self.note(incoming)?;
        }
        if self.steps_ordered == 0 && self.events.is_empty() {
            match self.inbox.recv_timeout(Duration::from_secs_f64(IDLE_SECONDS)) {
                Ok(incoming) => self.note(incoming)?,
                Err(mpsc::RecvTimeoutError::Timeout) => self.events.push_back(SiteEvent::Tick),
                Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the site's network thread has stopped"),
            }
        }
        Ok(())
    }

    fn note(&mut self, incoming: Incoming) -> Result<()> {
        match incoming {
            Incoming::Connected => self.events.push_back(SiteEvent::Connected),
            Incoming::Disconnected => self.events.push_back(SiteEvent::Disconnected),
            Incoming::Standing(standing) => self.events.push_back(SiteEvent::Standing(standing)),
            Incoming::Uploaded(digest, done) => self.events.push_back(SiteEvent::Uploaded(digest, done)),
            Incoming::Fetched(digest, bytes) => self.fetched(digest, bytes),
            Incoming::Pushed(digest, bytes) if self.machine.awaits(digest) => self.fetched(digest, Some(bytes)),
            Incoming::Pushed(digest, bytes) => self.pushed.put(digest, bytes),
            Incoming::Worked(done) => return self.worked(done),
            Incoming::Refused(why) => return Err(anyhow!(why)),
        }
        Ok(())
    }

    fn fetched(&mut self, digest: Digest, bytes: Option<Vec<u8>>) {
        let done = bytes.is_some();
        if let Some(bytes) = bytes {
            self.fetched.insert(digest, bytes);
        }
        self.events.push_back(SiteEvent::Fetched(digest, done));
    }

    /// Takes over what the desk has done.
    fn worked(&mut self, done: Done) -> Result<()> {
        let event = match done {
            Done::Contributed(fragment, Ok(payload)) => {
                let (digest, bytes) = (payload.digest, payload.bytes.len() as u64);
                self.payloads.insert(digest, Arc::new(payload.bytes));
                self.spare = payload.spare.unwrap_or_default();
                let (norm, agreement) = (payload.norm, payload.agreement);
                SiteEvent::Contributed { fragment, payload: digest, bytes, norm, agreement }
            }
            Done::Contributed(_, Err(error)) => {
                return Err(self.give_up(error.into(), "the engine's weights cannot be contributed"));
            }
            Done::Rebased(fragment, change) => {
                self.change(fragment, change)?;
                SiteEvent::Rebased(fragment)
            }
            Done::Applied(fragment, version, digest, change) => {
                if let Some(change) = change {
                    self.change(fragment, change)?;
                    if version > 0 {
                        self.newest_commit = Some((fragment, version));
                    }
                }
                SiteEvent::Applied { fragment, version, digest }
            }
        };
        self.events.push_back(event);
        Ok(())
    }

    fn change(&mut self, fragment: FragmentId, change: delta::Change) -> Result<()> {
        let began = Instant::now();
        self.spare = change.apply(self.engine.as_mut(), fragment)?;
        self.exposed += began.elapsed();
        Ok(())
    }

    /// Shows the machine all events and does what it orders.
    fn attend(&mut self) -> Result<()> {
        while let Some(event) = self.events.pop_front() {
            let now = self.now();
            for order in self.machine.handle(now, event) {
                self.obey(order)?;
            }
        }
        let machine = &self.machine;
        self.fetched.retain(|digest, _| machine.awaits(*digest));
        Ok(())
    }

    fn obey(&mut self, order: SiteOrder) -> Result<()> {
        match order {
            SiteOrder::Train(steps) => self.steps_ordered = steps,
            SiteOrder::Grant(ranges) => self.leases.grant(&ranges),
            SiteOrder::Progress(progress) => self.leases.set_progress(progress),
            SiteOrder::DropLeases => {
                self.leases.clear();
                self.leases.take_trained();
            }
            SiteOrder::Recall(delivered) => self.desk.put(Job::Recall(delivered))?,
            SiteOrder::Delivered(fragment) => self.desk.put(Job::Delivered(fragment))?,
            SiteOrder::Contribute(fragment, codec) => {
                let weights = self.read(fragment)?;
                self.desk.put(Job::Contribute(fragment, weights, codec))?;
            }
            SiteOrder::Rebase(fragment, why) => {
                tracing::warn!(
                    "a contribution to {fragment} was refused: {why}; its samples go back, training goes on"
                );
                self.desk.put(Job::Rebase(fragment))?;
            }
            SiteOrder::Commit(notice) => {
                let payload = self.fetched.remove(&notice.delta).unwrap_or_default();
                self.desk.put(Job::Commit(notice, payload))?;
            }
            SiteOrder::Install(fragment, version, digest) => {
                let bytes = self.fetched.remove(&digest).unwrap_or_default();
                self.desk.put(Job::Install(fragment, version, bytes))?;
            }
            SiteOrder::Evaluate(request) => self.evaluate(request)?,
            SiteOrder::Upload(digest) => {
                if let Some(bytes) = self.payloads.get(&digest) {
                    self.command(Command::Upload(digest, bytes.clone()));
                }
            }
            SiteOrder::Fetch { digest, bytes, pushed, weights } => match self.pushed.take(digest) {
                Some(bytes) => self.fetched(digest, Some(bytes)),
                None if pushed => {} // It is on its way.
                None => self.command(Command::Fetch(digest, bytes, weights)),
            },
            SiteOrder::Forget(digest) => {
                self.payloads.remove(&digest);
            }
            SiteOrder::Report(status) => self.command(Command::Report(status)),
            SiteOrder::Stop(stop) => self.ended = Some(stop),
        }
        Ok(())
    }

    /// A network that has stopped is noticed where its answers are missed.
    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// A copy of a fragment's weights as they are now, in memory that was used before.
    fn read(&mut self, fragment: FragmentId) -> Result<Vec<f32>> {
        let len = self.engine.manifest().fragment_len(fragment).unwrap_or(0);
        let mut weights = delta::of_length(std::mem::take(&mut self.spare), len);
        self.engine.read(fragment, &mut weights)?;
        Ok(weights)
    }

    fn evaluate(&mut self, request: u64) -> Result<()> {
        let commits = self.commits();
        let evaluation = delta::evaluate(self.desk.lend()?, self.engine.as_mut(), &self.held_out.batches)?;
        let evaluated =
            Evaluated { commits, nats: evaluation.nats, tokens: evaluation.tokens, bytes: self.held_out.bytes };
        self.events.push_back(SiteEvent::Evaluated(request, evaluated));
        Ok(())
    }

    fn train(&mut self, steps: u32) -> Result<()> {
        let (began, cpu) = (Instant::now(), cpu_time::ProcessTime::now());
        let progress = match self.engine.train(steps) {
            Ok(progress) => progress,
            Err(EngineError::Starved { .. }) => Progress::default(),
            Err(error) => return Err(self.give_up(error.into(), "training stopped")),
        };
        self.pace(began, cpu.elapsed())?;
        let event = SiteEvent::Stepped {
            progress,
            trained: self.leases.take_trained(),
            seconds: began.elapsed().as_secs_f64(),
        };
        let (link, payload_bytes, moved) = self.meter.read();
        self.events.push_front(SiteEvent::Measured(Measured {
            exposed_seconds: self.exposed.as_secs_f64(),
            hidden_seconds: (self.desk.busy() + moved).as_secs_f64(),
            payload_bytes,
            link,
        }));
        self.events.push_front(event);
        Ok(())
    }

    /// Stretches a step so that the site uses no more than its share of the device. What counts is the
    /// processor time that the step took, not the wall time: a neighbour must not slow us down twice.
    fn pace(&mut self, began: Instant, cpu: Duration) -> Result<()> {
        if self.full_speed {
            return Ok(());
        }
        // A step that a neighbour held up is made up for by the next ones, within limits.
        let earliest = began.checked_sub(Duration::from_secs_f64(LAG_SECONDS)).unwrap_or(began);
        let end = self.paced_until.max(earliest) + cpu.div_f64(self.cpu_share);
        self.paced_until = end;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            match self.inbox.recv_timeout(left.min(Duration::from_secs_f64(IDLE_SECONDS))) {
                Ok(incoming) => self.note(incoming)?,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
        Ok(())
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
