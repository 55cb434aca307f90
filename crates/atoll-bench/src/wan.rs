//! What the distance between sites costs: the share of wall time that four sites spend in inner steps while
//! they train one model over links that others could not train over.

use anyhow::Result;

use crate::lab::{self, Link};
use crate::scenario::{
    Outcome, SETTLE_SECONDS, STEP_MS, Scenario, Size, THINNEST, congestion_name, middle, thinnest_ways,
};
use crate::{Arguments, Figures};

const SITES: usize = 4;
const STEPS: u32 = 32;
const RTT_MS: u32 = 50;

/// One row of the table.
struct Row {
    /// Ends the names of its figures.
    name: &'static str,
    size: Size,
    mbit: u32,
    loss: f64,
    /// What another public implementation reached in this setting (DiLoCo, fp32).
    reference: &'static str,
    /// What we want to reach.
    target: Option<f64>,
    quick: bool,
}

const ROWS: [Row; 5] = [
    Row { name: "50mbit", size: Size::M30, mbit: 50, loss: 0.0, reference: "2.4 %", target: Some(0.95), quick: true },
    Row { name: "50mbit_loss", size: Size::M30, mbit: 50, loss: 0.1, reference: "", target: Some(0.95), quick: true },
    Row {
        name: "10mbit",
        size: Size::M51,
        mbit: 10,
        loss: 0.0,
        reference: "did not finish",
        target: Some(0.9),
        quick: true,
    },
    Row { name: "10mbit_loss", size: Size::M51, mbit: 10, loss: 0.1, reference: "", target: Some(0.9), quick: false },
    Row { name: "1gbit", size: Size::M30, mbit: 1000, loss: 0.0, reference: "36 %", target: None, quick: false },
];

pub(crate) fn run(arguments: &Arguments) -> Result<Figures> {
    let Some(wanlab) = lab::ready("wan") else { return Ok(Figures::new()) };
    lab::heed_interrupts()?;
    let seconds = if arguments.quick { 20.0 } else { 60.0 };
    introduce(seconds);
    let (mut figures, mut doubts) = (Figures::new(), Vec::new());
    for row in ROWS.iter().filter(|row| row.quick || !arguments.quick) {
        let outcome = row.scenario(seconds).run(&wanlab)?;
        let measured = Measured::of(&outcome);
        row.print(&measured)?;
        figures.extend(row.figures(&measured));
        doubts.extend(outcome.doubts().iter().map(|doubt| format!("{}: {doubt}", row.name)));
    }
    doubts.iter().for_each(|doubt| println!("NOTE: {doubt}"));
    Ok(figures)
}

fn introduce(seconds: f64) {
    println!("{SITES} sites and a coordinator as processes of their own; each site has a link of its own to the");
    println!("coordinator, {RTT_MS} ms there and back, congestion control: {}. An inner step takes {STEP_MS} ms", {
        congestion_name()
    });
    println!("(emulated), all else is the product. Weights go {}; a round takes {STEPS}", thinnest_ways());
    println!("inner steps, or more where the link needs longer. Sites load the model over links");
    println!(
        "without limits; the links get rate and loss once all sites train, and {SETTLE_SECONDS:.0} s later {seconds:.0} s are"
    );
    println!("measured. Utilization: inner steps x {STEP_MS} ms / wall seconds, both as the site counts them; public");
    println!("reference: DiLoCo in fp32 in the same setting. Bytes are those of IP packets.\n");
    println!(
        "                          utilization            public   longest  Mbit/s per site   commits  taken to     tokens    cores used"
    );
    println!(
        "  model      link  loss   least   mean  target   refer.   pause s      up    down              applied s    per s   4 sites   hub"
    );
}

/// What a row shows.
struct Measured {
    least: f64,
    mean: f64,
    pause: f64,
    up_mbit: f64,
    down_mbit: f64,
    commits: usize,
    applied: f64,
    tokens_per_second: f64,
    /// Kept busy by all sites, and by the coordinator.
    cores: (f64, f64),
}

impl Measured {
    fn of(outcome: &Outcome) -> Self {
        let (window, sites) = (outcome.window, &outcome.sites);
        let shares: Vec<f64> = sites.iter().map(|site| site.utilization(window)).collect();
        let per_site = |bytes: f64| bytes * 8.0 / 1e6 / (window.1 - window.0) / sites.len() as f64;
        let up = sites.iter().map(|site| outcome.wires.bytes(&site.name, lab::HUB, window)).sum();
        let down = sites.iter().map(|site| outcome.wires.bytes(lab::HUB, &site.name, window)).sum();
        Self {
            least: shares.iter().copied().fold(f64::INFINITY, f64::min),
            mean: shares.iter().sum::<f64>() / shares.len() as f64,
            pause: sites.iter().map(|site| site.longest_pause(window)).fold(0.0, f64::max),
            up_mbit: per_site(up),
            down_mbit: per_site(down),
            commits: outcome.commits_in(window).count(),
            applied: middle(sites.iter().flat_map(|site| site.applied(outcome.fragments(), window))),
            tokens_per_second: outcome.tokens_per_second(),
            cores: outcome.cores(),
        }
    }
}

impl Row {
    fn scenario(&self, seconds: f64) -> Scenario {
        Scenario {
            bench: "wan",
            size: self.size,
            fragments: None,
            sites: SITES,
            steps_ms: &[STEP_MS],
            steps: STEPS,
            codecs: THINNEST,
            link: Link { mbit: self.mbit, loss: self.loss, rtt_ms: RTT_MS },
            shaped_at_once: false,
            settle_seconds: SETTLE_SECONDS,
            seconds,
        }
    }

    fn print(&self, measured: &Measured) -> Result<()> {
        let target = self.target.map_or_else(String::new, |target| format!("{:.0} %", target * 100.0));
        println!(
            "{:>7} {:>5} Mbit {:>4.1}% {:>6.1}% {:>5.1}% {target:>7} {:>8} {:>9.2} {:>7.1} {:>7.1} {:>9} {:>10.2} {:>8.0} {:>8.2} {:>5.2}",
            self.size.name()?,
            self.mbit,
            self.loss,
            measured.least * 100.0,
            measured.mean * 100.0,
            self.reference,
            measured.pause,
            measured.up_mbit,
            measured.down_mbit,
            measured.commits,
            measured.applied,
            measured.tokens_per_second,
            measured.cores.0,
            measured.cores.1,
        );
        Ok(())
    }

    fn figures(&self, measured: &Measured) -> Figures {
        let named = [
            ("utilization", measured.least),
            ("utilization_mean", measured.mean),
            ("pause_seconds", measured.pause),
            ("up_mbit", measured.up_mbit),
            ("down_mbit", measured.down_mbit),
            ("commits", measured.commits as f64),
            ("applied_seconds", measured.applied),
            ("tokens_per_second", measured.tokens_per_second),
            ("cores_sites", measured.cores.0),
            ("cores_coordinator", measured.cores.1),
        ];
        named.into_iter().map(|(name, value)| (format!("{name}_{}", self.name), value)).collect()
    }
}
