//! The site's shell.
//!
//! ```text
//! connections ([`net`]) ──▶ clerk: the machine ──tasks──▶ trainer: the engine
//!            ▲               │  ▲      ▲                    │
//!            └──what to send─┘  │      └──at every pause────┘
//!              desk: encodes and decodes
//! ```
//!
//! The [`trainer`]'s thread only trains, changes weights, and hears from the [`clerk`]'s machine between two steps which
//! comes next; a thread of the clerk's own shows the machine everything else as it happens, so that a contribution is
//! on its way and a commit is decoded while the next inner step goes on.

mod arriving;
mod clerk;
mod desk;
mod donors;
mod meter;
mod net;
mod parcel;
mod pile;
mod residuals;
pub mod told;
mod toll;
mod trainer;
mod window;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::codec::Codec;
use atoll_core::delta::Local;
use atoll_core::engine::{Batch, Engine, Feed};
use atoll_core::hash::Digest;
use atoll_core::manifest::Manifest;
use atoll_core::round::{Site, SiteSettings, Stop};
use atoll_core::team::{Alone, Team};
use atoll_core::training::{Packing, Training};

use crate::crew::Crew;
use crate::data::{DataError, corpus, ingest, is_dataset};
use crate::data::{Dataset, IngestOptions, IngestProgress, LeasedFeed, Leases, Source, Split, TextField, Tokenizer};
use crate::identity::{Identity, Ticket};
use crate::run::{RunConfig, Terms, write_atomically};
use crate::way::Way;
use arriving::Arriving;
use clerk::Clerk;
use desk::Desk;
use donors::Suspicion;
use meter::Meter;
use net::Route;
use residuals::Residuals;
use trainer::{Share, Trainer};

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
    /// Data connections; twice as many while a large model is fetched.
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
    crate::link::look_for_bbr();
    let network = runtime.spawn(net::keep_connected(route, receiver, sender.clone()));
    let held_out = held_out(&dataset, &tokenizer, training, rows)?;
    let (tasks, queue) = mpsc::channel();
    let share = Share::new(options.share, options.threads);
    let trainer = Trainer::new(engine, leases.clone(), held_out, share, stop.clone());
    let clerk = Arc::new(Mutex::new(Clerk::new(machine, desk, meter, leases, (tasks, commands))));
    let (follower, stop) = (clerk.clone(), stop.clone());
    let following = std::thread::Builder::new().name("clerk".to_string());
    let following = following.spawn(move || Clerk::run(&follower, &inbox, &stop))?;
    trainer.work(queue, &clerk, &sender);
    let result = following.join().unwrap_or_else(|_| Err(anyhow!("the thread that follows the run has panicked")));
    drop(clerk);
    if matches!(result, Ok(Stop::Finished)) {
        arriving.clear();
    }
    // The network ends when the clerk has hung up and its last status is sent; a dead link may not.
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
