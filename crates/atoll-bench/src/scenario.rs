//! One run in the network lab: a coordinator, some sites, a link to each, a stretch of time that is measured.
//!
//! ```text
//! sites load the model        links get rate and loss        the window
//! over links without limit ──▶ once all of them train ──▶ settle ──▶ ├──────────────┤ ──▶ all processes end
//! ```
//!
//! What is known of it afterwards, on one clock: every act of every engine (its diary), the lab's counters
//! of every link, the coordinator's status every half second, its journal and the sizes of all payloads.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use atoll_core::codec::Codec;
use atoll_core::hash::Digest;
use atoll_core::journal::{Chain, Commit, Entry, Invitation};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::plan::{self, Codecs};
use atoll_core::rng::Rng;
use atoll_core::round::{Goal, Setting, Sync};
use atoll_core::site::SiteId;
use atoll_core::training::Training;
use atoll_node::data::{IngestOptions, Sample, Source, TextField, Tokenizer, ingest};
use atoll_node::identity::{Identity, Ticket};
use atoll_node::journal::read_entries;
use atoll_node::report::Report;
use atoll_node::run::{CoordinatorSection, Keep, ModelSection, RunConfig, RunDir, write_atomically};

use crate::emulated::{Act, Diary, Moment};
use crate::engine::everybody_seconds;
use crate::lab::{HUB, Lab, Layout, Link, Wires, between};
use crate::median;
use crate::meter::{self, Reading};
use crate::roles::{Role, SiteRole, Standby};

/// Milliseconds of an inner step, nearly everywhere.
pub(crate) const STEP_MS: u64 = 30;
/// The same in seconds.
pub(crate) const STEP_SECONDS: f64 = STEP_MS as f64 / 1e3;
/// After the links were shaped, until the window begins, usually.
pub(crate) const SETTLE_SECONDS: f64 = 5.0;
/// Sites that have not loaded the model by then never will.
const LOAD_SECONDS: f64 = 180.0;
/// Share of the processors that others may use without a word about it.
const OTHERS_MAX: f64 = 0.1;
/// Port of the coordinator.
const PORT: u16 = 7700;
/// Bytes only: the dimensions below decide how many parameters there are.
const VOCABULARY: usize = 257;
pub(crate) const CONTEXT: usize = 128;
/// Samples of an inner step.
pub(crate) const ROWS: usize = 2;

/// A model by its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// 5.6 M parameters.
    M6,
    /// 12.6 M parameters.
    M12,
    /// 30.8 M.
    M30,
    /// 51.0 M.
    M51,
    /// 99.3 M.
    M99,
}

impl Size {
    fn section(self) -> ModelSection {
        let (hidden, inner, layers) = match self {
            Self::M6 => (256, 864, 6),
            Self::M12 => (384, 1296, 6),
            Self::M30 => (512, 1536, 9),
            Self::M51 => (640, 1792, 10),
            Self::M99 => (768, 2048, 14),
        };
        let heads = Some(hidden / 64);
        ModelSection {
            hidden_size: Some(hidden),
            intermediate_size: Some(inner),
            num_hidden_layers: Some(layers),
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: Some(64),
            ..ModelSection::default()
        }
    }

    fn model(self) -> Result<ModelConfig> {
        self.section().resolve(VOCABULARY, CONTEXT).map_err(|problems| anyhow::anyhow!(problems.join("; ")))
    }

    /// Its layout, in as many fragments as runs have.
    pub(crate) fn manifest(self) -> Result<Manifest> {
        let config = RunConfig { model: self.section(), ..RunConfig::default() };
        Ok(config.manifest(&self.model()?))
    }

    pub(crate) fn parameters(self) -> Result<usize> {
        Ok(self.model()?.parameters())
    }

    /// For tables: `30.8 M`.
    pub(crate) fn name(self) -> Result<String> {
        Ok(format!("{:.1} M", self.parameters()? as f64 / 1e6))
    }
}

/// The codecs of thin links: at most a quarter of a bit per weight up, and half a bit down.
pub(crate) const THINNEST: Setting<Codecs> = Setting::Is(plan::THINNEST);

/// How weights go in these, for tables: `up as tcq:1 and down as tcq:2`.
pub(crate) fn thinnest_ways() -> String {
    let (up, down) = plan::THINNEST;
    format!("up as {up} and down as {down}")
}

/// What is to be run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) bench: &'static str,
    pub(crate) size: Size,
    /// Fragments, if not as many as runs have.
    pub(crate) fragments: Option<usize>,
    pub(crate) sites: usize,
    /// Milliseconds of an inner step at each site, from the front again if there are more sites.
    pub(crate) steps_ms: &'static [u64],
    /// Inner steps per round, H.
    pub(crate) steps: u32,
    /// How weights go up and come down: so, or as the run decides.
    pub(crate) codecs: Setting<Codecs>,
    pub(crate) link: Link,
    /// Whether the links have their rate and losses from the beginning: the model is loaded over them.
    pub(crate) shaped_at_once: bool,
    /// Seconds from all sites' training on shaped links to the window.
    pub(crate) settle_seconds: f64,
    /// Seconds of the window.
    pub(crate) seconds: f64,
}

/// What is known afterwards.
pub(crate) struct Outcome {
    pub(crate) sites: Vec<SiteOutcome>,
    pub(crate) wires: Wires,
    /// The stretch that is measured, in seconds since 1970.
    pub(crate) window: (f64, f64),
    pub(crate) commits: Vec<TimedCommit>,
    /// Sizes of payloads by their names.
    pub(crate) payloads: BTreeMap<Digest, u64>,
    looks: Vec<Report>,
    /// What the coordinator used.
    hub: Vec<Reading>,
    /// What everybody on this machine used up to some moment: processor seconds.
    everybody: Vec<(f64, f64)>,
}

/// A commit and when the coordinator announced it.
pub(crate) struct TimedCommit {
    pub(crate) at: f64,
    pub(crate) commit: Commit,
}

/// One site.
pub(crate) struct SiteOutcome {
    pub(crate) name: String,
    /// In the order of time, without those of evaluations.
    moments: Vec<Moment>,
    /// What it used.
    readings: Vec<Reading>,
}

impl Scenario {
    /// Runs it.
    pub(crate) fn run(&self, wanlab: &Path) -> Result<Outcome> {
        let folder = tempfile::tempdir()?;
        let alive = File::create(alive(folder.path()))?;
        alive.lock()?;
        let dir = run_dir(folder.path(), HUB);
        let tasks = self.prepare(folder.path(), &[HUB])?;
        let out = folder.path().join("lab");
        let layout = Layout {
            bench: self.bench,
            tasks: &tasks,
            rtt_ms: self.link.rtt_ms,
            rtts_ms: &[],
            congestion: congestion(),
            endures: false,
            seconds: self.settle_seconds + self.seconds,
        };
        let mut lab = Lab::start(wanlab, &out, &layout)?;
        if self.shaped_at_once {
            lab.wait(LOAD_SECONDS, "the lab listens", || out.join("ctl").exists())?;
            lab.shape(self.link)?;
        }
        let diaries: Vec<PathBuf> = self.names().map(|name| diary(folder.path(), &name)).collect();
        let train = |path: &PathBuf| Diary::read(path).iter().any(|moment| moment.act == Act::Step);
        lab.wait(LOAD_SECONDS, "all sites train", || diaries.iter().all(train))?;
        lab.shape(self.link)?;
        let begin = now() + self.settle_seconds;
        let window = (begin, begin + self.seconds);
        let (mut looks, mut everybody): (Vec<Report>, Vec<(f64, f64)>) = Default::default();
        lab.wait(self.settle_seconds + self.seconds + 10.0, "the window ends", || {
            looks.extend(Report::load(&dir.status()));
            everybody.extend(everybody_seconds().map(|seconds| (now(), seconds)));
            now() >= window.1
        })?;
        let wires = lab.end()?;
        let site = |name: String| SiteOutcome::read(name, folder.path(), looks.last());
        Ok(Outcome {
            sites: self.names().map(site).collect(),
            wires,
            window,
            commits: commits(&dir)?,
            payloads: sizes(&dir)?,
            looks,
            hub: meter::read(&meter(folder.path(), HUB)),
            everybody,
        })
    }

    /// The sites.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> + use<> {
        (1..=self.sites).map(|number| format!("site-{number}"))
    }

    /// Run folders, a dataset for all, and each place's task. More than one coordinator share the run in an object
    /// store; the first begins it, and whichever starts behind a leader stands by.
    pub(crate) fn prepare(&self, folder: &Path, coordinators: &[&str]) -> Result<Vec<(String, String)>> {
        let mut config = self.config();
        if coordinators.len() > 1 {
            config.coordinator.store = Some(store(folder).display().to_string());
        }
        let dir = run_dir(folder, HUB);
        fs::create_dir_all(&dir.0)?;
        write_atomically(&dir.config(), toml::to_string(&config)?.as_bytes())?;
        let key = Identity::load_or_create(&dir.key())?;
        let data = data(folder, &dir, &config)?;
        let mut tasks = Vec::new();
        for (index, name) in coordinators.iter().enumerate() {
            let own = run_dir(folder, name);
            fs::create_dir_all(&own.0)?;
            for (from, to) in [(dir.config(), own.config()), (dir.tokenizer(), own.tokenizer()), (dir.key(), own.key())]
            {
                if index > 0 {
                    fs::copy(from, to)?;
                }
            }
            let coordinator = Role::Coordinator {
                dir: own.0,
                listen: format!("0.0.0.0:{PORT}"),
                meter: meter(folder, name),
                alive: alive(folder),
                standby: match index {
                    _ if coordinators.len() == 1 => Standby::Never,
                    0 => Standby::Later,
                    _ => Standby::Always,
                },
            };
            tasks.push((name.to_string(), serde_json::to_string(&coordinator)?));
        }
        let doors: Vec<String> = coordinators.iter().map(|name| format!("{name}:{PORT}")).collect();
        for ((seed, name), &step_ms) in (1..).zip(self.names()).zip(self.steps_ms.iter().cycle()) {
            let site: SiteId = name.parse()?;
            let invitation = Invitation { site, role: Default::default(), expires: None };
            let ticket = Ticket::issue(&dir, &config.name, invitation, doors.clone(), key.fingerprint)?;
            let role = SiteRole {
                dir: folder.join(&name),
                ticket: ticket.to_text(),
                data: data.clone(),
                diary: diary(folder, &name),
                meter: meter(folder, &name),
                step_ms,
                seed,
            };
            tasks.push((name, serde_json::to_string(&Role::Site(role))?));
        }
        Ok(tasks)
    }

    fn config(&self) -> RunConfig {
        // Looking at the held-out loss is compute too, and not what is measured here.
        let (up, down) = match self.codecs {
            Setting::Is((up, down)) => (Setting::Is(up), Setting::Is(down)),
            Setting::Auto => (Setting::Auto, Setting::Auto),
        };
        let steps = Setting::Is(self.steps);
        let mut sync = Sync { steps, up, down, evaluate_seconds: 1e6, ..Sync::default() };
        sync.fragments = self.fragments.unwrap_or(sync.fragments);
        RunConfig {
            name: self.bench.to_string(),
            model: self.size.section(),
            training: Training { context: CONTEXT, rows: ROWS, ..Training::default() },
            sync,
            goal: Goal { tokens: None, minutes: Some(600.0) },
            coordinator: CoordinatorSection { keep: Keep::All, ..CoordinatorSection::default() },
            ..RunConfig::default()
        }
    }
}

/// The run folder of a coordinator.
pub(crate) fn run_dir(folder: &Path, coordinator: &str) -> RunDir {
    RunDir(folder.join(if coordinator == HUB { "run".to_string() } else { format!("run-{coordinator}") }))
}

/// The object store of a run with several coordinators.
pub(crate) fn store(folder: &Path) -> PathBuf {
    folder.join("store")
}

/// Where a site's engine notes what it does.
pub(crate) fn diary(folder: &Path, site: &str) -> PathBuf {
    folder.join(format!("{site}.diary"))
}

/// The file that the benchmark holds locked as long as it lives.
pub(crate) fn alive(folder: &Path) -> PathBuf {
    folder.join("alive")
}

fn meter(folder: &Path, site: &str) -> PathBuf {
    folder.join(format!("{site}.meter"))
}

/// Seconds since 1970.
pub(crate) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// BBR, if this kernel has it: what a lossy long link wants.
pub(crate) fn congestion() -> Option<&'static str> {
    let known = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap_or_default();
    known.split_whitespace().any(|name| name == "bbr").then_some("bbr")
}

/// How connections are paced here, for people.
pub(crate) fn congestion_name() -> &'static str {
    congestion().unwrap_or("the kernel's default")
}

/// A tokenizer for the run and a dataset of some hundred kilobytes of made-up words.
fn data(folder: &Path, dir: &RunDir, config: &RunConfig) -> Result<PathBuf> {
    let path = folder.join("text.jsonl");
    fs::write(&path, text())?;
    let source = Source::open(&path)?;
    let tokenizer = Tokenizer::train(&Sample::of(&source, &TextField::default())?, VOCABULARY)?;
    write_atomically(&dir.tokenizer(), tokenizer.json())?;
    let options = IngestOptions { held_out: config.data.held_out, ..IngestOptions::default() };
    let data = folder.join("tokens");
    ingest(&source, &tokenizer, &data, &options, &mut |_| ControlFlow::Continue(()))?;
    Ok(data)
}

/// Documents of made-up words, always the same.
fn text() -> String {
    let mut rng = Rng::new(1);
    let document = |_| {
        let mut word = || -> String {
            let letters = 2 + rng.below(7);
            (0..letters).map(|_| char::from(b'a' + rng.below(26) as u8)).collect()
        };
        let words: Vec<String> = (0..300).map(|_| word()).collect();
        format!("{}\n", serde_json::json!({ "text": words.join(" ") }))
    };
    (0..300).map(document).collect()
}

/// All commits, with the moments at which the coordinator noted them.
fn commits(dir: &RunDir) -> Result<Vec<TimedCommit>> {
    let entries = read_entries(&dir.journal(), 0, Chain::default())?;
    let commits = entries.into_iter().filter_map(|entry| match entry {
        Entry::Committed(commit) => Some(commit),
        _ => None,
    });
    let text = fs::read_to_string(dir.events()).context("a coordinator notes events")?;
    let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let moments = events.filter(|event| event["event"] == "commit").filter_map(|event| event["at"].as_f64());
    Ok(moments.zip(commits).map(|(at, commit)| TimedCommit { at, commit }).collect())
}

/// Sizes of all payloads.
fn sizes(dir: &RunDir) -> Result<BTreeMap<Digest, u64>> {
    let mut sizes = BTreeMap::new();
    for file in fs::read_dir(dir.payloads())? {
        let file = file?;
        if let Ok(digest) = file.file_name().to_string_lossy().parse() {
            sizes.insert(digest, file.metadata()?.len());
        }
    }
    Ok(sizes)
}

impl Outcome {
    /// The codec of the way down at the end.
    pub(crate) fn codec(&self) -> Option<Codec> {
        self.commits.last().map(|timed| timed.commit.recipe.codec)
    }

    /// Commits announced in that stretch.
    pub(crate) fn commits_in(&self, window: (f64, f64)) -> impl Iterator<Item = &Commit> {
        self.commits.iter().filter(move |timed| within(timed.at, window)).map(|timed| &timed.commit)
    }

    /// Tokens that entered the model per second of the window.
    pub(crate) fn tokens_per_second(&self) -> f64 {
        let tokens = |commit: &Commit| commit.contributions.iter().map(|accepted| accepted.tokens).sum::<u64>();
        let fragments = u64::from(self.fragments());
        let sum: u64 = self.commits_in(self.window).map(tokens).sum();
        (sum / fragments) as f64 / (self.window.1 - self.window.0)
    }

    /// Fragments of the model.
    pub(crate) fn fragments(&self) -> u16 {
        self.commits.iter().map(|timed| timed.commit.fragment.0 + 1).max().unwrap_or(1)
    }

    /// Cores that all sites together kept busy in the window, and the coordinator.
    pub(crate) fn cores(&self) -> (f64, f64) {
        let cores = |readings: &[Reading]| {
            let counts: Vec<(f64, f64)> = readings.iter().map(|reading| (reading.at, reading.cpu_seconds)).collect();
            between(&counts, self.window) / (self.window.1 - self.window.0)
        };
        (self.sites.iter().map(|site| cores(&site.readings)).sum(), cores(&self.hub))
    }

    /// Why the measurement deserves less trust than usual, if so.
    pub(crate) fn doubts(&self) -> Vec<String> {
        let (sites, hub) = self.cores();
        let all = between(&self.everybody, self.window) / (self.window.1 - self.window.0);
        let others = all - sites - hub - self.wires.router_cores;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut doubts = self.wires.doubts.clone();
        if others > OTHERS_MAX * cores as f64 {
            doubts.push(format!("NOT A QUIET MACHINE: others kept {others:.1} of {cores} cores busy meanwhile"));
        }
        doubts
    }

    /// Bytes of that site's control connection in that stretch, as the coordinator counted them.
    pub(crate) fn control_bytes(&self, site: &str, window: (f64, f64)) -> f64 {
        let seen = |report: &Report| {
            let site = report.sites.iter().find(|seen| seen.name == site)?;
            Some((report.at, site.bytes_control as f64))
        };
        let looks: Vec<(f64, f64)> = self.looks.iter().filter_map(seen).collect();
        between(&looks, window)
    }

    /// Bytes of all payloads that went up from that site, and down to it, in that stretch.
    pub(crate) fn payload_bytes(&self, site: &str, window: (f64, f64)) -> (f64, f64) {
        let size = |digest: &Digest| self.payloads.get(digest).copied().unwrap_or(0);
        let up = |commit: &Commit| {
            let own = commit.contributions.iter().filter(|accepted| accepted.site.to_string() == site);
            own.map(|accepted| size(&accepted.payload)).sum::<u64>()
        };
        let down = |commit: &Commit| commit.bytes;
        let sum = |bytes: u64| bytes as f64;
        (sum(self.commits_in(window).map(up).sum()), sum(self.commits_in(window).map(down).sum()))
    }
}

fn within(at: f64, window: (f64, f64)) -> bool {
    window.0 < at && at <= window.1
}

impl SiteOutcome {
    fn read(name: String, folder: &Path, report: Option<&Report>) -> Self {
        let fragments = report.map_or(1, |report| report.rounds.len());
        let moments = without_evaluations(Diary::read(&diary(folder, &name)), fragments);
        let readings = meter::read(&meter(folder, &name));
        Self { name, moments, readings }
    }

    /// Bytes that its network interface sent and received in that stretch.
    pub(crate) fn interface_bytes(&self, window: (f64, f64)) -> (f64, f64) {
        let sent: Vec<(f64, f64)> = self.readings.iter().map(|reading| (reading.at, reading.sent as f64)).collect();
        let received: Vec<(f64, f64)> =
            self.readings.iter().map(|reading| (reading.at, reading.received as f64)).collect();
        (between(&sent, window), between(&received, window))
    }

    fn steps(&self) -> impl Iterator<Item = &Moment> {
        self.moments.iter().filter(|moment| moment.act == Act::Step)
    }

    /// Inner steps that ended in that stretch.
    pub(crate) fn steps_in(&self, window: (f64, f64)) -> usize {
        self.steps().filter(|step| within(step.end, window)).count()
    }

    /// Share of a stretch of wall time that went into inner steps: their number × 30 ms ÷ seconds.
    pub(crate) fn utilization(&self, window: (f64, f64)) -> f64 {
        self.steps_in(window) as f64 * STEP_SECONDS / (window.1 - window.0)
    }

    /// The longest time between two steps, a step's own time not counted.
    pub(crate) fn longest_pause(&self, window: (f64, f64)) -> f64 {
        let ends: Vec<f64> = self.steps().map(|step| step.end).filter(|&end| within(end, window)).collect();
        let edges: Vec<f64> = [window.0].into_iter().chain(ends).chain([window.1]).collect();
        edges.windows(2).map(|pair| pair[1] - pair[0] - STEP_SECONDS).fold(0.0, f64::max)
    }

    /// When it took what it had learnt on that fragment, to contribute it. A read before a write of the
    /// same fragment serves the write.
    pub(crate) fn contributions(&self, fragment: u16) -> Vec<f64> {
        let (read, write) = (Act::Read(fragment), Act::Write(fragment));
        let next = self.moments.iter().skip(1).map(|moment| moment.act).chain([Act::Evaluate]);
        let reads = self.moments.iter().zip(next).filter(|(moment, next)| moment.act == read && *next != write);
        reads.map(|(moment, _)| moment.begin).collect()
    }

    /// Seconds from taking a contribution until the next commit of its fragment is in the engine, for
    /// all that were in that stretch.
    pub(crate) fn applied(&self, fragments: u16, window: (f64, f64)) -> Vec<f64> {
        let of = |fragment: u16| {
            let writes: Vec<f64> =
                self.moments.iter().filter(|moment| moment.act == Act::Write(fragment)).map(|m| m.end).collect();
            let commit = move |&taken: &f64| writes.iter().copied().find(|&write| write > taken);
            let pairs = self.contributions(fragment).into_iter();
            let pairs = pairs.filter_map(move |taken| Some((taken, commit(&taken)?)));
            pairs.filter(move |(_, write)| within(*write, window)).map(|(taken, write)| write - taken)
        };
        (0..fragments).flat_map(of).collect()
    }

    /// Its rounds of all fragments in the window: each from one contribution of fragment 0 to the next.
    pub(crate) fn rounds(&self, window: (f64, f64)) -> Vec<Round> {
        let begins: Vec<f64> = self.contributions(0).into_iter().filter(|&at| within(at, window)).collect();
        let round = |pair: &[f64]| {
            let window = (pair[0], pair[1]);
            let steps: Vec<f64> =
                self.steps().filter(|step| within(step.end, window)).map(|step| step.end - step.begin).collect();
            Round { window, steps: steps.len(), busy: steps.iter().sum() }
        };
        begins.windows(2).map(round).collect()
    }

    /// When the last weights of the model it joined with came into the engine.
    pub(crate) fn loaded(&self) -> Option<f64> {
        let first = self.steps().next()?.begin;
        let loads = self.moments.iter().filter(|moment| matches!(moment.act, Act::Write(_)) && moment.begin < first);
        loads.map(|moment| moment.begin).reduce(f64::max)
    }
}

/// From one contribution of a fragment to its next.
pub(crate) struct Round {
    pub(crate) window: (f64, f64),
    pub(crate) steps: usize,
    /// Seconds that these steps took.
    busy: f64,
}

impl Round {
    /// Seconds in which the site took no step.
    pub(crate) fn blocked(&self) -> f64 {
        self.window.1 - self.window.0 - self.busy
    }
}

/// Leaves out evaluations, and the reads and writes of all fragments that are part of them.
fn without_evaluations(moments: Vec<Moment>, fragments: usize) -> Vec<Moment> {
    let mut keep = vec![true; moments.len()];
    for (index, _) in moments.iter().enumerate().filter(|(_, moment)| moment.act == Act::Evaluate) {
        keep[index] = false;
        let (before, after) = (moments.get(index.wrapping_sub(1)), moments.get(index + 1));
        if before.is_some_and(|moment| moment.act != Act::Evaluate) {
            keep[index.saturating_sub(2 * fragments)..index].fill(false);
        }
        if after.is_some_and(|moment| moment.act != Act::Evaluate) {
            let end = moments.len().min(index + 1 + fragments);
            keep[index + 1..end].fill(false);
        }
    }
    moments.into_iter().zip(keep).filter_map(|(moment, keep)| keep.then_some(moment)).collect()
}

/// The middle of some seconds; NaN for none.
pub(crate) fn middle(seconds: impl IntoIterator<Item = f64>) -> f64 {
    median(seconds.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(act: Act, begin: f64, end: f64) -> Moment {
        Moment { act, begin, end }
    }

    #[test]
    fn models_have_the_sizes_they_are_named_after() {
        for (size, parameters) in
            [(Size::M6, 5_623_296), (Size::M12, 12_600_576), (Size::M30, 30_812_160), (Size::M51, 50_968_320)]
        {
            assert_eq!(size.parameters().unwrap(), parameters);
        }
        assert_eq!(Size::M30.name().unwrap(), "30.8 M");
    }

    #[test]
    fn a_contribution_is_a_read_without_a_write() {
        let moments = vec![
            moment(Act::Step, 0.0, 1.0),
            moment(Act::Read(0), 1.0, 1.1),
            moment(Act::Step, 1.2, 2.2),
            moment(Act::Read(0), 2.2, 2.3),
            moment(Act::Write(0), 2.3, 2.5),
            moment(Act::Step, 2.5, 3.5),
            moment(Act::Read(0), 3.5, 3.6),
        ];
        let site = SiteOutcome { name: "oslo".to_string(), moments, readings: Vec::new() };
        assert_eq!(site.contributions(0), [1.0, 3.5]);
        assert_eq!(site.applied(1, (0.0, 10.0)), [1.5]);
        let rounds = site.rounds((0.0, 10.0));
        assert_eq!((rounds.len(), rounds[0].steps, rounds[0].blocked()), (1, 2, 0.5));
    }

    #[test]
    fn evaluations_leave_no_trace() {
        let (read, write) = (|f| moment(Act::Read(f), 0.0, 0.0), |f| moment(Act::Write(f), 0.0, 0.0));
        let (step, evaluate) = (moment(Act::Step, 0.0, 0.0), moment(Act::Evaluate, 0.0, 0.0));
        let around = [step, read(0), read(1), write(0), write(1), evaluate, evaluate, write(0), write(1), step];
        assert_eq!(without_evaluations(around.to_vec(), 2), [step, step]);
    }

    #[test]
    fn pauses_at_the_edges_of_the_window_count() {
        let moments = vec![moment(Act::Step, 4.97, 5.0)];
        let site = SiteOutcome { name: "oslo".to_string(), moments, readings: Vec::new() };
        assert_eq!(site.utilization((0.0, 10.0)), 0.003);
        assert!((site.longest_pause((0.0, 9.0)) - 4.97).abs() < 1e-9);
    }
}
