//! What training together costs in bytes, all of them: those of IP packets on the wire, both directions,
//! over whole rounds, per inner step, beside data parallelism that exchanges bf16 gradients every step.
//!
//! ```text
//! reference, per step and site   2 bytes × N up + 2 bytes × N down        (a ring moves (M−1)/M of twice that)
//! reduction                      reference × steps ÷ bytes on the wire
//! framing                        (bytes on the wire − control − payloads) ÷ payloads
//! control                        bytes of the control connection ÷ bytes on the wire
//! ```
//!
//! The link is a wide one, because a narrow one would make rounds longer and the bytes per step fewer. The
//! lab counts every segment with its own headers, which an interface that hands segments to its driver in
//! trains does not.

use anyhow::{Context, Result};

use crate::lab::{self, Link};
use crate::scenario::{Outcome, SETTLE_SECONDS, STEP_MS, Scenario, SiteOutcome, Size};
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
        steps: STEPS,
        link: LINK,
        shaped_at_once: false,
        settle_seconds: SETTLE_SECONDS,
        seconds,
    };
    introduce()?;
    let outcome = scenario.run(&wanlab)?;
    let mut all = Sums::default();
    for site in &outcome.sites {
        let sums = Sums::of(&outcome, site).with_context(|| format!("{}: no whole round in the window", site.name))?;
        sums.print(&site.name)?;
        all.add(&sums);
    }
    all.print("all")?;
    println!(
        "\ntargets: reduction at least {REDUCTION_TARGET}, framing at most {FRAMING_PERCENT_TARGET} %, control at most {CONTROL_PERCENT_TARGET} %"
    );
    outcome.wires.doubts.iter().for_each(|doubt| println!("NOTE: {doubt}"));
    all.figures()
}

fn introduce() -> Result<()> {
    println!(
        "{SITES} sites and a coordinator, {} parameters, {STEPS} inner steps of {STEP_MS} ms per round,",
        SIZE.name()?
    );
    println!(
        "links of {} Mbit/s, {} ms there and back. Bytes of IP packets over whole rounds. Reduction: against",
        { LINK.mbit },
        LINK.rtt_ms
    );
    println!("data parallelism that moves 2 bytes per parameter up and 2 down every step (in brackets: a ring");
    println!("all-reduce, sent and received). Framing: TCP, IP, TLS and frames on the data connections, per byte of");
    println!("payload. Control: statuses and standings, TLS included, per byte on the wire.\n");
    println!(
        "          whole   steps    MB on the wire    bits per parameter and round    reduction        framing   control"
    );
    println!(
        "site     rounds  a round     up     down       up     down   payload only  (ring)                  %         %"
    );
    Ok(())
}

/// What went over a site's link in whole rounds, or over all of them together.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Sums {
    rounds: f64,
    steps: f64,
    /// On the wire.
    up: f64,
    down: f64,
    payload_up: f64,
    payload_down: f64,
    control: f64,
}

impl Sums {
    /// `None` if there was no whole round.
    fn of(outcome: &Outcome, site: &SiteOutcome) -> Option<Self> {
        let rounds = site.rounds(outcome.window);
        let window = (rounds.first()?.window.0, rounds.last()?.window.1);
        let (payload_up, payload_down) = outcome.payload_bytes(&site.name, window);
        Some(Self {
            rounds: rounds.len() as f64,
            steps: rounds.iter().map(|round| round.steps).sum::<usize>() as f64,
            up: outcome.wires.bytes(&site.name, lab::HUB, window),
            down: outcome.wires.bytes(lab::HUB, &site.name, window),
            payload_up: payload_up as f64,
            payload_down: payload_down as f64,
            control: outcome.control_bytes(&site.name, window),
        })
    }

    fn add(&mut self, other: &Self) {
        self.rounds += other.rounds;
        self.steps += other.steps;
        self.up += other.up;
        self.down += other.down;
        self.payload_up += other.payload_up;
        self.payload_down += other.payload_down;
        self.control += other.control;
    }

    fn wire(&self) -> f64 {
        self.up + self.down
    }

    fn payload(&self) -> f64 {
        self.payload_up + self.payload_down
    }

    fn reduction(&self, parameters: f64) -> f64 {
        4.0 * parameters * self.steps / self.wire()
    }

    /// Against a ring all-reduce in bf16, what a site sends and receives: 2·2·N·(M−1)/M each.
    fn reduction_of_ring(&self, parameters: f64) -> f64 {
        let sites = SITES as f64;
        self.reduction(parameters) * 2.0 * (sites - 1.0) / sites
    }

    fn bits(&self, bytes: f64, parameters: f64) -> f64 {
        bytes * 8.0 / (parameters * self.rounds)
    }

    fn framing_percent(&self) -> f64 {
        (self.wire() - self.control - self.payload()) / self.payload() * 100.0
    }

    fn control_percent(&self) -> f64 {
        self.control / self.wire() * 100.0
    }

    fn print(&self, name: &str) -> Result<()> {
        let parameters = SIZE.parameters()? as f64;
        println!(
            "{name:7} {:>7.0} {:>8.1} {:>7.1} {:>8.1} {:>8.3} {:>8.3} {:>7.3} {:>6.3} {:>8.1} ({:.1}) {:>12.2} {:>9.3}",
            self.rounds,
            self.steps / self.rounds,
            self.up / 1e6,
            self.down / 1e6,
            self.bits(self.up, parameters),
            self.bits(self.down, parameters),
            self.bits(self.payload_up, parameters),
            self.bits(self.payload_down, parameters),
            self.reduction(parameters),
            self.reduction_of_ring(parameters),
            self.framing_percent(),
            self.control_percent(),
        );
        Ok(())
    }

    fn figures(&self) -> Result<Figures> {
        let parameters = SIZE.parameters()? as f64;
        let named = [
            ("reduction_vs_bf16_dp", self.reduction(parameters)),
            ("reduction_vs_bf16_ring", self.reduction_of_ring(parameters)),
            ("bits_per_param_up", self.bits(self.up, parameters)),
            ("bits_per_param_down", self.bits(self.down, parameters)),
            ("payload_bits_per_param_up", self.bits(self.payload_up, parameters)),
            ("payload_bits_per_param_down", self.bits(self.payload_down, parameters)),
            ("framing_percent", self.framing_percent()),
            ("control_percent", self.control_percent()),
            ("bytes_per_step", self.wire() / self.steps),
            ("steps_per_round", self.steps / self.rounds),
        ];
        Ok(named.into_iter().map(|(name, value)| (name.to_string(), value)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_each_way_every_thirty_steps_is_480_times_less() {
        let round = Sums {
            rounds: 1.0,
            steps: 30.0,
            up: 1e6,
            down: 1e6,
            payload_up: 0.97e6,
            payload_down: 0.97e6,
            control: 1e4,
        };
        let mut all = round;
        all.add(&round);
        assert_eq!(all.reduction(8e6), 480.0);
        assert_eq!(all.reduction_of_ring(8e6), 720.0);
        assert_eq!(all.bits(all.up, 8e6), 1.0);
        assert!((all.framing_percent() - 2.577).abs() < 1e-3);
        assert_eq!(all.control_percent(), 0.5);
    }
}
