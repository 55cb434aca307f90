//! A run in a storm: four sites, a coordinator and a standby, as processes of their own in the network lab, with links of
//! the Internet's length. Processes are killed and stopped, links cut and narrowed; a stretch without faults before
//! the storm tells what it costs. Afterwards every commit is computed again from the journal.

mod evidence;
mod storm;
mod timeline;
mod verdict;
mod weather;

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, bail};
use atoll_node::replay::{Replayed, replay};

use crate::emulated::{Act, Diary};
use crate::lab::{self, HUB, Lab, Layout, Link, SECOND_HUB};
use crate::scenario::{self, STEP_MS, Scenario, Size, now, run_dir};
use crate::{Arguments, Figures, quantile};
use evidence::Evidence;
use storm::{KINDS, Kind};
use verdict::{Aftermath, Verdict};
use weather::{Notes, Weather};

/// Where coordinators run.
const COORDINATORS: [&str; 2] = [HUB, SECOND_HUB];
const SITES: usize = 4;
const SIZE: Size = Size::M6;
/// Nearly two seconds: rounds of four fragments, so a commit about twice a second.
const STEPS: u32 = 64;
/// What a link carries, but for times at which it is slow.
const LINK_MBIT: u32 = 100;
/// Milliseconds there and back, of each site's links.
const RTTS_MS: [u32; SITES] = [20, 30, 40, 50];
/// Sites that have not loaded the model by then never will.
const LOAD_SECONDS: f64 = 120.0;
/// From shaped links to the stretch without faults.
const SETTLE_SECONDS: f64 = 10.0;
/// After the storm, so that the last faults are seen to be over.
const AFTER_SECONDS: f64 = 15.0;
/// For a standby to take in the last entries.
const LAST_WORDS_SECONDS: f64 = 3.0;

/// How long, and how bad.
#[derive(Debug, Clone, Copy)]
struct Forecast {
    calm_seconds: f64,
    storm_seconds: f64,
    faults_per_hour: f64,
}

impl Forecast {
    fn of(arguments: &Arguments) -> Self {
        let (calm, storm, faults_per_hour) = if arguments.quick { (60.0, 4.0, 300.0) } else { (180.0, 30.0, 125.0) };
        Self { calm_seconds: calm, storm_seconds: arguments.minutes.unwrap_or(storm) * 60.0, faults_per_hour }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Figures> {
    let scenario = scenario();
    let sites: Vec<String> = scenario.names().collect();
    if !arguments.again {
        let Some(wanlab) = lab::ready("chaos") else { return Ok(Figures::new()) };
        lab::heed_interrupts()?;
        introduce(arguments)?;
        let _ = fs::remove_dir_all(&arguments.out);
        fs::create_dir_all(&arguments.out)?;
        let folder = arguments.out.canonicalize()?;
        happen(&wanlab, &folder, &scenario, arguments)?;
    }
    let evidence = Evidence::read(&arguments.out, &sites)?;
    let verdict = verdict::judge(&evidence);
    timeline::draw(&arguments.out.join("chaos.svg"), &evidence)?;
    print_faults(&verdict);
    print_summary(&verdict, &evidence);
    let mut figures = figures(&verdict, &evidence);
    let replayed = check_journals(&arguments.out)?;
    println!(
        "replay: {} commits computed again, all digests equal; {} tokens, each once",
        replayed.commits, replayed.tokens
    );
    figures.insert("replayed_commits".to_string(), replayed.commits as f64);
    evidence.notes.doubts.iter().for_each(|doubt| println!("NOTE: {doubt}"));
    println!("logs, journals and chaos.svg are in {}", arguments.out.display());
    Ok(figures)
}

fn scenario() -> Scenario {
    Scenario {
        bench: "chaos",
        size: SIZE,
        fragments: None,
        sites: SITES,
        steps_ms: &[STEP_MS],
        steps: STEPS,
        codecs: scenario::THINNEST,
        link: Link { mbit: LINK_MBIT, loss: 0.0, rtt_ms: RTTS_MS[SITES - 1] },
        shaped_at_once: false,
        settle_seconds: SETTLE_SECONDS,
        seconds: 0.0,
    }
}

fn introduce(arguments: &Arguments) -> Result<()> {
    let Forecast { calm_seconds, storm_seconds, faults_per_hour } = Forecast::of(arguments);
    println!(
        "{SITES} sites and two coordinators, one of which stands by, as processes of their own; each site has links"
    );
    println!(
        "of {LINK_MBIT} Mbit/s to both, {RTTS_MS:?} ms there and back. {} parameters, inner steps of {STEP_MS} ms",
        { SIZE.name()? }
    );
    println!(
        "(emulated), {STEPS} per round; all else is the product. {calm_seconds:.0} s without faults, then {storm_seconds:.0} s with"
    );
    println!(
        "{faults_per_hour:.0} faults an hour, seed {}. A killed process is started again after 2 to 5 s, coordinators as standbys;",
        { arguments.seed }
    );
    println!("pauses and cuts last 5 to 20 s, slow links ({} Mbit/s) 30 to 60 s. Two sites are always well.\n", {
        storm::SLOW_MBIT
    });
    Ok(())
}

/// Lets it all happen, and keeps what was noted.
fn happen(wanlab: &Path, folder: &Path, scenario: &Scenario, arguments: &Arguments) -> Result<()> {
    let Forecast { calm_seconds, storm_seconds, faults_per_hour } = Forecast::of(arguments);
    let sites: Vec<String> = scenario.names().collect();
    let alive = File::create(scenario::alive(folder))?;
    alive.lock()?;
    let tasks = scenario.prepare(folder, &COORDINATORS)?;
    let lengths: Vec<(String, u32)> = sites.iter().cloned().zip(RTTS_MS).collect();
    let layout = Layout {
        bench: scenario.bench,
        tasks: &tasks,
        rtt_ms: RTTS_MS[0],
        rtts_ms: &lengths,
        congestion: scenario::congestion(),
        endures: true,
        seconds: LOAD_SECONDS + calm_seconds + storm_seconds,
    };
    let starts = tasks.iter().map(|(place, _)| (place.clone(), now())).collect();
    let mut lab = Lab::start(wanlab, &folder.join("lab"), &layout)?;
    let trains =
        |site: &String| Diary::read(&scenario::diary(folder, site)).iter().any(|moment| moment.act == Act::Step);
    lab.wait(LOAD_SECONDS, "all sites train", || sites.iter().all(trains))?;
    lab.shape(scenario.link)?;
    let notes = Notes { seed: arguments.seed, starts, ..Notes::default() };
    let mut weather = Weather::new(&mut lab, folder, sites.clone(), notes);
    weather.pass(Vec::new(), now() + scenario.settle_seconds)?;
    let calm = now();
    weather.pass(Vec::new(), calm + calm_seconds)?;
    let begin = now();
    (weather.notes.calm, weather.notes.storm) = ((calm, begin), (begin, begin + storm_seconds));
    weather.pass(storm::storm(arguments.seed, storm_seconds, faults_per_hour, SITES), begin + storm_seconds)?;
    weather.pass(Vec::new(), now() + AFTER_SECONDS)?;
    let mut notes = weather.notes;
    // Nothing is committed any more, and both coordinators come to have the same journal.
    sites.iter().try_for_each(|site| lab.kill(site))?;
    std::thread::sleep(std::time::Duration::from_secs_f64(LAST_WORDS_SECONDS));
    notes.doubts = lab.end()?.doubts;
    notes.save(folder)
}

/// Whether each coordinator's journal is the one in the object store, as far as it goes; computes the first one's again.
fn check_journals(folder: &Path) -> Result<Replayed> {
    let shared = store_journal(folder)?;
    for place in COORDINATORS {
        let own = fs::read_to_string(run_dir(folder, place).journal()).context("a coordinator has a journal")?;
        if !shared.starts_with(&own) {
            bail!("the journal of {place} is not the beginning of the one in the object store");
        }
        let missing = shared[own.len()..].lines().count();
        println!("journal of {place}: {} entries, {missing} behind the object store's", own.lines().count());
    }
    replay(&run_dir(folder, HUB))
}

fn store_journal(folder: &Path) -> Result<String> {
    let mut segments: Vec<_> = fs::read_dir(scenario::store(folder).join("journal"))?.collect::<Result<_, _>>()?;
    segments.sort_by_key(fs::DirEntry::file_name);
    Ok(segments.iter().map(|segment| fs::read_to_string(segment.path())).collect::<Result<Vec<_>, _>>()?.concat())
}

// ---- what is shown ----

/// One of an aftermath's times.
type Of = fn(&Aftermath) -> Option<f64>;

fn times(verdict: &Verdict, is: impl Fn(Kind) -> bool, of: Of) -> Vec<f64> {
    verdict.aftermaths.iter().filter(|aftermath| is(aftermath.kind)).filter_map(of).collect()
}

fn middle(times: &[f64]) -> f64 {
    quantile(times.to_vec(), 0.5)
}

fn most(times: &[f64]) -> f64 {
    times.iter().copied().reduce(f64::max).unwrap_or(f64::NAN)
}

const FAULTS: &str = "
Seconds, each the median and the most. Detected: until the leader knew. Survivors' commit: until the first commit
without the site, or the first after the fault's end, from the fault and from its detection. Trains: from restart,
resumption or healed link to the first step on the model as it was then; contributes: to the first commit with work that
set out from it. Takeover: from the fault to the first commit under the next leader.

fault              count      detected   survivors' commit     detected to it          trains     contributes        takeover";

fn print_faults(verdict: &Verdict) {
    println!("{FAULTS}");
    for (kind, ..) in KINDS {
        let count = verdict.aftermaths.iter().filter(|aftermath| aftermath.kind == kind).count();
        let cell = |of: Of| match times(verdict, |other| other == kind, of) {
            times if times.is_empty() => String::new(),
            times => format!("{:.1} {:>5.1}", middle(&times), most(&times)),
        };
        println!(
            "{kind:18} {count:>5} {:>13} {:>19} {:>18} {:>15} {:>15} {:>15}",
            cell(|aftermath| aftermath.detection),
            cell(|aftermath| aftermath.commit),
            cell(|aftermath| aftermath.commit_after_detection),
            cell(|aftermath| aftermath.rejoin),
            cell(|aftermath| aftermath.rejoin_commit),
            cell(|aftermath| aftermath.takeover),
        );
    }
}

/// Figures with what is wanted of them and, where others have published theirs, these.
const WANTED: [(&str, &str, &str); 15] = [
    ("tokens_share", "0.95 or more", "torchft: 0.82 to 0.88 of the steps"),
    ("available_share", "", "what dead and stopped processes leave of it"),
    ("participation", "0.90 or more", ""),
    ("commit_after_detection_seconds_p50", "below 2", ""),
    ("commit_after_detection_seconds_max", "below 2", ""),
    ("commit_after_detection_led_seconds_max", "below 2", "those during which a coordinator led all the while"),
    ("commit_after_fault_seconds_p50", "", "torchft: 5 to 14"),
    ("rejoin_seconds_p50", "below 10", "torchft: 54 to 86"),
    ("rejoin_commit_seconds_p50", "", ""),
    ("takeover_seconds_p50", "", ""),
    ("longest_stall_seconds", "", ""),
    ("tokens_lost", "0", ""),
    ("commits_lost", "0", ""),
    ("states_wiped", "0", ""),
    ("digest_mismatches", "0", ""),
];

fn print_summary(verdict: &Verdict, evidence: &Evidence) {
    let figures = figures(verdict, evidence);
    println!("\n                                        reached   wanted         others");
    for (name, wanted, others) in WANTED {
        let value = figures.get(name).copied().unwrap_or(f64::NAN);
        println!("{name:38} {value:>9.3}   {wanted:14} {others}");
    }
    let seconds = evidence.notes.storm.1 - evidence.notes.storm.0;
    let Verdict { commits, calm_tokens_per_second, calm_utilization, crashes, .. } = verdict;
    println!("\n{} faults and {commits} commits in {seconds:.0} s.", verdict.aftermaths.len());
    let busy = calm_utilization * 100.0;
    println!("Without faults {calm_tokens_per_second:.0} tokens/s, {busy:.1} % of the time in inner steps.");
    println!("{crashes} processes ended for no good reason.");
    println!("While cut off, a site took no step for at most {:.1} s.", verdict.longest_stall_cut);
    println!("{} contributions that sites were told are in the model were looked for.\n", verdict.contributions_told);
}

fn figures(verdict: &Verdict, evidence: &Evidence) -> Figures {
    let of = |of: Of| times(verdict, |_| true, of);
    let detected = of(|aftermath| aftermath.commit_after_detection);
    let led = of(|aftermath| aftermath.commit_after_detection.filter(|_| aftermath.is_led));
    let commits = of(|aftermath| aftermath.commit);
    let rejoin = of(|aftermath| aftermath.rejoin);
    let rejoin_commit = of(|aftermath| aftermath.rejoin_commit);
    let takeover = of(|aftermath| aftermath.takeover);
    let named = [
        ("tokens_share", verdict.tokens_share),
        ("available_share", verdict.available_share),
        ("participation", verdict.participation),
        ("commit_after_detection_seconds_p50", middle(&detected)),
        ("commit_after_detection_seconds_max", most(&detected)),
        ("commit_after_detection_led_seconds_max", most(&led)),
        ("commit_after_fault_seconds_p50", middle(&commits)),
        ("commit_after_fault_seconds_max", most(&commits)),
        ("rejoin_seconds_p50", middle(&rejoin)),
        ("rejoin_seconds_max", most(&rejoin)),
        ("rejoin_commit_seconds_p50", middle(&rejoin_commit)),
        ("takeover_seconds_p50", middle(&takeover)),
        ("takeover_seconds_max", most(&takeover)),
        ("contributions_told", verdict.contributions_told as f64),
        ("tokens_lost", verdict.tokens_lost),
        ("commits_lost", verdict.commits_lost as f64),
        ("states_wiped", verdict.states_wiped as f64),
        ("digest_mismatches", verdict.digest_mismatches as f64),
        ("faults", verdict.aftermaths.len() as f64),
        ("commits", verdict.commits as f64),
        ("longest_stall_seconds", verdict.longest_stall),
        ("longest_stall_cut_seconds", verdict.longest_stall_cut),
        ("calm_tokens_per_second", verdict.calm_tokens_per_second),
        ("calm_utilization", verdict.calm_utilization),
        ("crashes", verdict.crashes as f64),
        ("seed", evidence.notes.seed as f64),
    ];
    named.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}
