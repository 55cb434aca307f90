//! What training together costs in bytes, all of them, both directions, over whole rounds, per inner step,
//! beside data parallelism that exchanges bf16 gradients every step.
//!
//! ```text
//! reference, per step and site   2 bytes × N up + 2 bytes × N down        (a ring moves (M−1)/M of twice that)
//! reduction                      reference × H × rounds ÷ bytes
//! framing                        (bytes − control − payloads) ÷ payloads
//! control                        bytes of the control connection ÷ bytes
//! ```
//!
//! Bytes are counted twice. The kernel of a site counts what passes its *interface*; but it hands segments to
//! the driver in trains and counts the headers of a train once. The lab counts what is on the *wire*: every
//! segment with its own headers. With 52 bytes of them in 1,500, that alone is 3.6 % of framing.
//!
//! A round counts for H steps even if it took more: a round that is late is no saving. The link is a wide one,
//! so that none needs to be. Bits are those of a round of the run, in which every fragment is committed once: a site that has
//! missed one has a longer round of its own, and takes in both commits.

use anyhow::{Context, Result};

use crate::lab::{self, Link};
use crate::scenario::{Outcome, SETTLE_SECONDS, STEP_MS, Scenario, SiteOutcome, Size, THINNEST, thinnest_ways};
use crate::{Arguments, Figures};

const SITES: usize = 4;
const STEPS: u32 = 30;
const SIZE: Size = Size::M30;
const LINK: Link = Link { mbit: 1000, loss: 0.0, rtt_ms: 50 };
const REDUCTION_TARGET: f64 = 1000.0;
const FRAMING_PERCENT_TARGET: f64 = 3.0;
const CONTROL_PERCENT_TARGET: f64 = 1.0;

pub(crate) fn run(arguments: &Arguments) -> Result<Figures> {
    let Some(wanlab) = lab::ready("bytes") else { return Ok(Figures::new()) };
    lab::heed_interrupts()?;
    let seconds = if arguments.quick { 20.0 } else { 60.0 };
    let scenario = Scenario {
        bench: "bytes",
        size: SIZE,
        fragments: None,
        sites: SITES,
        steps_ms: &[STEP_MS],
        steps: STEPS,
        codecs: THINNEST,
        link: LINK,
        shaped_at_once: false,
        settle_seconds: SETTLE_SECONDS,
        seconds,
    };
    introduce()?;
    let outcome = scenario.run(&wanlab)?;
    let parameters = SIZE.parameters()? as f64;
    let mut all = Sums::default();
    for site in &outcome.sites {
        let sums = Sums::of(&outcome, site).with_context(|| format!("{}: no whole round in the window", site.name))?;
        sums.print(&site.name, parameters);
        all = all.plus(&sums);
    }
    all.print("all", parameters);
    println!(
        "\ntargets: reduction at least {REDUCTION_TARGET}, framing at most {FRAMING_PERCENT_TARGET} %, control at most {CONTROL_PERCENT_TARGET} %"
    );
    outcome.doubts().iter().for_each(|doubt| println!("NOTE: {doubt}"));
    Ok(all.figures(parameters))
}

fn introduce() -> Result<()> {
    println!("{SITES} sites and a coordinator, {} parameters, {STEPS} inner steps of {STEP_MS} ms per round,", {
        SIZE.name()?
    });
    println!("weights go {}, as over thin links.", thinnest_ways());
    println!(
        "Links of {} Mbit/s, {} ms there and back. Bytes over whole rounds, twice: as the site's kernel counts",
        { LINK.mbit },
        LINK.rtt_ms
    );
    println!("them at its interface, and on the wire, where every segment has headers of its own. Reduction: against");
    println!("data parallelism that moves 2 bytes per parameter up and 2 down every step; ring: against an all-reduce");
    println!("in a ring, sent and received. Framing: TCP, IP, TLS and frames on the data connections, per byte of");
    println!(
        "payload. Control: statuses and standings with their TLS, per byte of all. A round counts for {STEPS} steps"
    );
    println!("even if it took more. Bits: per round of the run, in which each fragment is committed once.\n");
    println!(
        "                  whole    steps            MB     bits per parameter, round    reduction   framing  control"
    );
    println!(
        "site             rounds  a round      up    down       up    down      both              ring        %        %"
    );
    Ok(())
}

/// Bytes in each direction.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Ways {
    up: f64,
    down: f64,
}

impl Ways {
    fn both(self) -> f64 {
        self.up + self.down
    }

    fn plus(self, other: Self) -> Self {
        Self { up: self.up + other.up, down: self.down + other.down }
    }
}

/// What went over a site's link in whole rounds, or over all of them together.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Sums {
    /// From one contribution of the first fragment to the next.
    rounds: f64,
    /// Commits of the whole model: a site that misses one has fewer rounds.
    commits: f64,
    steps: f64,
    interface: Ways,
    wire: Ways,
    payload: Ways,
    control: f64,
}

impl Sums {
    /// `None` if there was no whole round.
    fn of(outcome: &Outcome, site: &SiteOutcome) -> Option<Self> {
        let rounds = site.rounds(outcome.window);
        let window = (rounds.first()?.window.0, rounds.last()?.window.1);
        let ways = |(up, down)| Ways { up, down };
        let wires = &outcome.wires;
        Some(Self {
            rounds: rounds.len() as f64,
            commits: outcome.commits_in(window).count() as f64 / f64::from(outcome.fragments()),
            steps: rounds.iter().map(|round| round.steps).sum::<usize>() as f64,
            interface: ways(site.interface_bytes(window)),
            wire: ways((wires.bytes(&site.name, lab::HUB, window), wires.bytes(lab::HUB, &site.name, window))),
            payload: ways(outcome.payload_bytes(&site.name, window)),
            control: outcome.control_bytes(&site.name, window),
        })
    }

    fn plus(&self, other: &Self) -> Self {
        Self {
            rounds: self.rounds + other.rounds,
            commits: self.commits + other.commits,
            steps: self.steps + other.steps,
            interface: self.interface.plus(other.interface),
            wire: self.wire.plus(other.wire),
            payload: self.payload.plus(other.payload),
            control: self.control + other.control,
        }
    }

    fn print(&self, name: &str, parameters: f64) {
        for (place, ways) in [("interface", self.interface), ("wire", self.wire)] {
            let seen = self.seen(ways, parameters);
            println!(
                "{name:6} {place:9} {:>6.0} {:>8.1} {:>7.1} {:>7.1} {:>8.3} {:>7.3} {:>9.3} {:>8.0} {:>8.0} {:>8.2} {:>8.3}",
                self.rounds,
                self.steps / self.rounds,
                ways.up / 1e6,
                ways.down / 1e6,
                seen.bits.up,
                seen.bits.down,
                seen.bits.both(),
                seen.reduction,
                seen.reduction_of_ring,
                seen.framing_percent,
                seen.control_percent,
            );
        }
        let (bits, megabytes) = (self.bits(self.payload, parameters), |bytes: f64| bytes / 1e6);
        println!(
            "{name:6} payloads {:>23.1} {:>7.1} {:>8.3} {:>7.3} {:>9.3}",
            megabytes(self.payload.up),
            megabytes(self.payload.down),
            bits.up,
            bits.down,
            bits.both()
        );
    }

    /// Bits per parameter and round of the run.
    fn bits(&self, ways: Ways, parameters: f64) -> Ways {
        let bits = |bytes: f64| bytes * 8.0 / (parameters * self.commits);
        Ways { up: bits(ways.up), down: bits(ways.down) }
    }

    /// What follows from bytes that were counted somewhere.
    fn seen(&self, ways: Ways, parameters: f64) -> Seen {
        let (sites, bytes) = (SITES as f64, ways.both());
        let steps = self.steps.min(self.rounds * f64::from(STEPS));
        let reduction = 4.0 * parameters * steps / bytes;
        Seen {
            bits: self.bits(ways, parameters),
            reduction,
            // A site of a ring sends 2·2·N·(M−1)/M bytes a step and receives as many.
            reduction_of_ring: reduction * 2.0 * (sites - 1.0) / sites,
            framing_percent: (bytes - self.control - self.payload.both()) / self.payload.both() * 100.0,
            control_percent: self.control / bytes * 100.0,
        }
    }

    fn figures(&self, parameters: f64) -> Figures {
        let (interface, wire) = (self.seen(self.interface, parameters), self.seen(self.wire, parameters));
        let payload = self.bits(self.payload, parameters);
        let named = [
            ("reduction_vs_bf16_dp", interface.reduction),
            ("reduction_vs_bf16_dp_wire", wire.reduction),
            ("reduction_vs_bf16_ring", interface.reduction_of_ring),
            ("bits_per_param_up", interface.bits.up),
            ("bits_per_param_down", interface.bits.down),
            ("bits_per_param_up_wire", wire.bits.up),
            ("bits_per_param_down_wire", wire.bits.down),
            ("bits_per_param_up_payload", payload.up),
            ("bits_per_param_down_payload", payload.down),
            ("framing_percent", interface.framing_percent),
            ("framing_percent_wire", wire.framing_percent),
            ("control_percent", interface.control_percent),
            ("steps_per_round", self.steps / self.rounds),
            ("rounds", self.rounds),
            ("rounds_of_the_run", self.commits),
        ];
        named.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }
}

/// Bytes that were counted somewhere, in terms that mean something.
struct Seen {
    bits: Ways,
    reduction: f64,
    reduction_of_ring: f64,
    framing_percent: f64,
    control_percent: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_each_way_every_thirty_steps_is_480_times_less() {
        let ways = |bytes| Ways { up: bytes, down: bytes };
        let round = Sums {
            rounds: 1.0,
            commits: 1.0,
            steps: 30.0,
            interface: ways(1e6),
            wire: ways(1.04e6),
            payload: ways(0.97e6),
            control: 1e4,
        };
        let all = round.plus(&round);
        let seen = all.seen(all.interface, 8e6);
        assert_eq!((seen.reduction, seen.reduction_of_ring, seen.bits), (480.0, 720.0, ways(1.0)));
        assert_eq!(seen.control_percent, 0.5);
        assert!((seen.framing_percent - 2.577).abs() < 1e-3);
        assert!(all.figures(8e6)["reduction_vs_bf16_dp_wire"] < 480.0);
    }
}
