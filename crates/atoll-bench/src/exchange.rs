//! What one synchronization of the whole model costs two sites, in seconds: those in which a site cannot
//! step, and those from taking a contribution until its commit is in the engine. And how fast a site that
//! joins gets the model, and one that contributes sends its weights, as shares of its link.

use std::path::Path;

use anyhow::{Context, Result, bail};
use atoll_core::codec::Codec;
use atoll_core::plan::{self, Codecs};
use atoll_core::round::Setting;

use crate::lab::{self, Link};
use crate::scenario::{
    Outcome, SETTLE_SECONDS, STEP_MS, Scenario, Size, THINNEST, congestion_name, middle, thinnest_ways,
};
use crate::{Arguments, Figures};

const SIZE: Size = Size::M12;
/// Nearly two seconds, so that one synchronization is over before the next begins.
const STEPS: u32 = 64;
const RTT_MS: u32 = 50;

/// One row of the table.
struct Row {
    /// Ends the names of its figures.
    name: &'static str,
    mbit: u32,
    loss: f64,
    /// One fragment: the whole model at once, as others do it. Else as many as a run has.
    whole: bool,
    codecs: Setting<Codecs>,
    /// Seconds of others in the same lab, as far as they were measured: they block throughout.
    reference: &'static str,
    quick: bool,
}

const SLOW: &str = "torchft 7.35, hivemind 6.8 (u8 1.5), Gloo 5.8, PCCL 4.5 (u8 1.4)";
const FAST: &str = "torchft 4.3, hivemind 1.6, Gloo 1.4, PCCL 1.1";

impl Row {
    /// The thinnest codecs over links without loss.
    const fn of(name: &'static str, mbit: u32, reference: &'static str) -> Self {
        Self { name, mbit, loss: 0.0, whole: false, codecs: THINNEST, reference, quick: false }
    }
}

const ROWS: [Row; 7] = [
    Row { quick: true, ..Row::of("100mbit", 100, SLOW) },
    Row { loss: 0.1, ..Row::of("100mbit_loss", 100, "") },
    Row { whole: true, ..Row::of("100mbit_whole", 100, SLOW) },
    Row { codecs: Setting::Auto, quick: true, ..Row::of("100mbit_auto", 100, "") },
    Row { quick: true, ..Row::of("1gbit", 1000, FAST) },
    Row { loss: 0.1, ..Row::of("1gbit_loss", 1000, "") },
    Row { codecs: Setting::Auto, ..Row::of("1gbit_auto", 1000, "") },
];

/// The last rows: a site that joins, and one that contributes.
const JOINING: &str = "join";
const SENDING: &str = "send";
/// How one gets the model, and the other sends it.
const FULL: Link = Link { mbit: 1000, loss: 0.1, rtt_ms: RTT_MS };
const LINK_SHARE_TARGET: f64 = 0.9;

pub(crate) fn run(arguments: &Arguments) -> Result<Figures> {
    let known = || ROWS.iter().map(|row| row.name).chain([JOINING, SENDING]);
    if let Some(name) = arguments.rows.iter().find(|name| known().all(|known| known != **name)) {
        bail!("there is no row '{name}'\nhint: rows are {}", known().collect::<Vec<_>>().join(", "));
    }
    let Some(wanlab) = lab::ready("exchange") else { return Ok(Figures::new()) };
    lab::heed_interrupts()?;
    introduce()?;
    let mut figures = Figures::new();
    let is_wished = |name: &str| arguments.rows.is_empty() || arguments.rows.iter().any(|row| row == name);
    let is_time = |row: &Row| row.quick || !arguments.quick || !arguments.rows.is_empty();
    for row in ROWS.iter().filter(|row| is_wished(row.name) && is_time(row)) {
        figures.extend(row.measure(&wanlab, if arguments.quick { 24.0 } else { 60.0 })?);
    }
    let size = if arguments.quick { Size::M51 } else { Size::M99 };
    if is_wished(JOINING) {
        figures.insert("link_share_1gbit".to_string(), link_share(&wanlab, size)?);
    }
    if is_wished(SENDING) {
        figures.insert(
            "link_share_1gbit_up".to_string(),
            link_share_up(&wanlab, size, if arguments.quick { 20.0 } else { 40.0 })?,
        );
    }
    Ok(figures)
}

fn introduce() -> Result<()> {
    println!(
        "Two sites and a coordinator, {} parameters ({:.0} MB in fp32), links of {RTT_MS} ms there and back,",
        { SIZE.name()? },
        SIZE.parameters()? as f64 * 4e-6
    );
    println!(
        "congestion control: {}. {STEPS} inner steps of {STEP_MS} ms between synchronizations. Blocked: seconds",
        { congestion_name() }
    );
    println!("in which a site takes no step, per synchronization of all fragments. Applied: seconds from taking a");
    println!("contribution until the next commit of its fragment is in the engine; the site trains meanwhile.");
    println!("Weights go {}, but in rows where the run decides by itself.", thinnest_ways());
    println!("Medians over all synchronizations of both sites. Others, in the same lab, block all the time: fp32,");
    println!("seconds per synchronization.\n");
    println!("       link  loss  fragments  commits in  synchronizations  blocked s  applied s   others");
    Ok(())
}

impl Row {
    fn measure(&self, wanlab: &Path, seconds: f64) -> Result<Figures> {
        let scenario = Scenario {
            bench: "exchange",
            size: SIZE,
            fragments: self.whole.then_some(1),
            sites: 2,
            steps_ms: &[STEP_MS],
            steps: STEPS,
            codecs: self.codecs,
            link: Link { mbit: self.mbit, loss: self.loss, rtt_ms: RTT_MS },
            shaped_at_once: false,
            settle_seconds: SETTLE_SECONDS,
            seconds,
        };
        let outcome = scenario.run(wanlab)?;
        let sites = || outcome.sites.iter();
        let rounds: Vec<f64> =
            sites().flat_map(|site| site.rounds(outcome.window)).map(|round| round.blocked()).collect();
        let applied = middle(sites().flat_map(|site| site.applied(outcome.fragments(), outcome.window)));
        let (count, blocked) = (rounds.len(), middle(rounds));
        println!(
            "{:>6} Mbit {:>4.1}% {:>10} {:>11} {count:>17} {blocked:>10.3} {applied:>10.2}   {}",
            self.mbit,
            self.loss,
            outcome.fragments(),
            outcome.codec().map_or_else(|| "none".to_string(), |codec| codec.to_string()),
            self.reference
        );
        outcome.doubts().iter().for_each(|doubt| println!("NOTE: {doubt}"));
        let named = [("blocked_seconds", blocked), ("applied_seconds", applied)];
        Ok(named.into_iter().map(|(name, value)| (format!("{name}_{}", self.name), value)).collect())
    }
}

/// When a transfer begins and ends is seen only roughly: such a share of it is left out at each end.
const CUT: f64 = 0.01;
const KEPT: f64 = 1.0 - 2.0 * CUT;

/// Lets a site join over the full link and compares the speed at which the model comes with the link's.
fn link_share(wanlab: &Path, size: Size) -> Result<f64> {
    let scenario = Scenario {
        bench: "exchange",
        size,
        fragments: None,
        sites: 1,
        steps_ms: &[STEP_MS],
        steps: STEPS,
        codecs: THINNEST,
        link: FULL,
        shaped_at_once: true,
        settle_seconds: 0.0,
        seconds: 0.0,
    };
    let outcome = scenario.run(wanlab)?;
    let site = outcome.sites.first().context("there is one site")?;
    let loaded = site.loaded().context("the site never got the model")?;
    let bytes = outcome.wires.delivered(lab::HUB, &site.name, (0.0, loaded));
    let seconds = kept_seconds(&outcome, (lab::HUB, &site.name), 0.0, bytes).context("nothing was delivered")?;
    let megabits = KEPT * size.parameters()? as f64 * 32.0 / 1e6;
    println!(
        "\nA site that joins gets {} parameters ({:.0} MB) over {} Mbit/s with {} % loss at {:.0} Mbit/s:",
        size.name()?,
        megabits / KEPT / 8.0,
        FULL.mbit,
        FULL.loss,
        megabits / seconds,
    );
    Ok(judge(&outcome, megabits / seconds))
}

/// Lets a site contribute all its weights in `f32` over the full link and compares the speed at which they go with the link's.
fn link_share_up(wanlab: &Path, size: Size, seconds: f64) -> Result<f64> {
    let scenario = Scenario {
        bench: "exchange",
        size,
        fragments: Some(1),
        sites: 1,
        steps_ms: &[STEP_MS],
        steps: STEPS,
        codecs: Setting::Is((Codec::F32, plan::THINNEST.1)),
        link: FULL,
        shaped_at_once: false,
        settle_seconds: SETTLE_SECONDS,
        seconds,
    };
    let outcome = scenario.run(wanlab)?;
    let site = outcome.sites.first().context("there is one site")?;
    let megabits = KEPT * size.parameters()? as f64 * 32.0 / 1e6;
    let taken: Vec<f64> = site.contributions(0).into_iter().filter(|&at| at >= outcome.window.0).collect();
    let seconds = taken.windows(2).filter_map(|pair| {
        let sent = |window| outcome.wires.delivered(&site.name, lab::HUB, window);
        let (before, bytes) = (sent((0.0, pair[0])), sent((pair[0], pair[1])));
        kept_seconds(&outcome, (&site.name, lab::HUB), before, bytes)
    });
    let seconds: Vec<f64> = seconds.collect();
    anyhow::ensure!(!seconds.is_empty(), "the site contributed less than twice");
    let (count, rate) = (seconds.len(), megabits / middle(seconds));
    println!(
        "\nA site that contributes sends {} weights in f32 over such a link at {rate:.0} Mbit/s, the median of {count}:",
        size.name()?
    );
    Ok(judge(&outcome, rate))
}

/// Seconds that `bytes` took from one place to the other after so many before them, but for what is left out at both ends.
fn kept_seconds(outcome: &Outcome, (from, to): (&str, &str), before: f64, bytes: f64) -> Option<f64> {
    let by = |share: f64| outcome.wires.delivered_by(from, to, before + share * bytes);
    by(1.0 - CUT).zip(by(CUT)).map(|(end, begin)| end - begin)
}

/// Says which share of the full link so many Mbit/s are, and what is to be doubted about it.
fn judge(outcome: &Outcome, rate: f64) -> f64 {
    let share = rate / f64::from(FULL.mbit);
    println!("{:.1} % of the link (target {:.0} %)", share * 100.0, LINK_SHARE_TARGET * 100.0);
    outcome.doubts().iter().for_each(|doubt| println!("NOTE: {doubt}"));
    share
}
