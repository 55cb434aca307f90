//! Arithmetic of pace: how many steps a site should take, what a link can carry, and how much of a change a payload
//! should say at once.

use serde::{Deserialize, Serialize};

use crate::codec::Codec;

/// What a site's link to the coordinator does, as measured; 0 where nothing is known yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Bytes per second that the site sends.
    pub up: f64,
    /// Bytes per second that it receives.
    pub down: f64,
    /// Seconds of a round trip.
    pub rtt: f64,
}

impl Link {
    /// Whether the numbers can be calculated with.
    pub fn is_sane(&self) -> bool {
        [self.up, self.down].iter().all(|rate| (0.0..1e15).contains(rate)) && (0.0..1e6).contains(&self.rtt)
    }
}

/// Bytes that a site moves while every fragment is synchronized once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Sent.
    pub up: u64,
    /// Received.
    pub down: u64,
    /// Fragments that share it.
    pub fragments: usize,
}

/// Inner steps between two contributions where nothing calls for more.
pub const STEPS: u32 = 32;
/// More than so many times [`STEPS`] harms the model more than a thin link does: such a site misses rounds instead.
const STEPS_FACTOR_MAX: u32 = 16;
/// Share of a link that payloads may take on average.
const LINK_SHARE: f64 = 0.8;
/// Share of the time between two contributions of a fragment within which the first should be settled.
const TURN_SHARE: f64 = 0.8;

/// Seconds on the way of one fragment, there and back.
pub fn turn_seconds(link: &Link, load: &Load) -> f64 {
    let (up, down) = way_seconds(link, load);
    (up + down) / load.fragments.max(1) as f64 + link.rtt
}

/// Seconds that a load is on its way up and down.
pub fn way_seconds(link: &Link, load: &Load) -> (f64, f64) {
    let seconds = |bytes: u64, rate: f64| if rate > 0.0 { bytes as f64 / rate } else { 0.0 };
    (seconds(load.up, link.up), seconds(load.down, link.down))
}

/// The shortest time between two contributions of a fragment in which all of it hides behind computing: the link is
/// busy for a part of the time, and each fragment is back before its turn comes again.
pub fn hiding_seconds(link: &Link, load: &Load) -> f64 {
    let (up, down) = way_seconds(link, load);
    (up.max(down) / LINK_SHARE).max(turn_seconds(link, load) / TURN_SHARE)
}

/// The codecs of a way up and a way down.
pub type Codecs = (Codec, Codec);

/// The thinnest: at most a quarter of a bit per weight up and half a bit down.
pub const THINNEST: Codecs = (Codec::Sparse(96), Codec::Sparse(224));
/// What a link may carry, richest first: each says of a change at once several times more than the next.
pub const LADDER: [Codecs; 3] = [(Codec::Bf16, Codec::Bf16), (Codec::E3m0, Codec::E3m0), THINNEST];

/// Codecs to choose from, and what they move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rung {
    /// How weights are written.
    pub codecs: Codecs,
    /// How much that is.
    pub load: Load,
}

/// Number of the richest rung of the `ladder` whose load hides behind `seconds` of computing on that link; of the last
/// where none does, or where nothing is known of the link.
pub fn richest_hidden(ladder: &[Rung], link: &Link, seconds: f64) -> usize {
    let is_known = link.up > 0.0 && link.down > 0.0;
    let hides = |rung: &Rung| is_known && hiding_seconds(link, &rung.load) <= seconds;
    ladder.iter().position(hides).unwrap_or(ladder.len().saturating_sub(1))
}

/// Inner steps of `step_seconds` between two contributions so that `needed` seconds hide behind them.
pub fn steps_to_hide(needed: f64, step_seconds: f64) -> u32 {
    if step_seconds <= 0.0 || needed <= 0.0 {
        return STEPS;
    }
    let steps = (needed / step_seconds).ceil();
    if steps >= f64::from(STEPS * STEPS_FACTOR_MAX) { STEPS * STEPS_FACTOR_MAX } else { (steps as u32).max(STEPS) }
}

/// Inner steps for a site that takes `step_seconds` each, when the fastest takes `fastest_seconds` and
/// is to take `steps`: all finish together (dynamic local updates, arXiv 2401.09135, section 5).
pub fn steps_for(steps: u32, step_seconds: f64, fastest_seconds: f64) -> u32 {
    if step_seconds <= 0.0 || fastest_seconds <= 0.0 {
        return steps;
    }
    let share = (fastest_seconds / step_seconds).min(1.0);
    ((f64::from(steps) * share).round() as u32).max(1)
}

/// Exponential moving average with weight `share` for the new value; the first value starts it.
pub fn smooth(average: f64, value: f64, share: f64) -> f64 {
    if average == 0.0 { value } else { average + share * (value - average) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_sites_take_fewer_steps_and_finish_together() {
        assert_eq!(steps_for(16, 1.0, 1.0), 16);
        assert_eq!(steps_for(16, 4.0, 1.0), 4);
        assert_eq!(steps_for(16, 100.0, 1.0), 1);
        assert_eq!(steps_for(16, 0.0, 1.0), 16);
    }

    /// 51 M parameters at 0.234 and 0.461 bits over 10 Mbit/s, 50 ms: 2.95 MB down take 2.4 s.
    #[test]
    fn a_thin_link_takes_as_many_steps_as_hide_it() {
        let link = Link { up: 1.25e6, down: 1.25e6, rtt: 0.05 };
        let load = Load { up: 1_500_000, down: 2_950_000, fragments: 4 };
        let needed = hiding_seconds(&link, &load);
        assert!((needed - 2.36 / 0.8).abs() < 1e-9, "{needed}");
        assert_eq!(steps_to_hide(needed, 0.03), 99);
        // A fat link needs no more than is good for the loss; an absurdly thin one is not waited for.
        assert_eq!(steps_to_hide(hiding_seconds(&Link { up: 1e9, down: 1e9, rtt: 0.05 }, &load), 0.03), STEPS);
        assert_eq!(steps_to_hide(hiding_seconds(&Link { up: 1.0, down: 1.0, rtt: 0.05 }, &load), 0.03), STEPS * 16);
        assert_eq!(steps_to_hide(hiding_seconds(&Link::default(), &load), 0.03), STEPS);
    }

    /// 30.8 M weights behind 32 steps of 0.1 s: bf16 would take 4.9 s at 100 Mbit/s, E3M0 takes 1.3.
    #[test]
    fn a_payload_is_as_rich_as_hides_behind_computing() {
        const WEIGHTS: usize = 30_800_000;
        let bytes = |codec: Codec| codec.payload_len(WEIGHTS) as u64;
        let load = |(up, down): Codecs| Load { up: bytes(up), down: bytes(down), fragments: 4 };
        let ladder = LADDER.map(|codecs| Rung { codecs, load: load(codecs) });
        let at = |megabits: f64| {
            let link = Link { up: megabits * 1.25e5, down: megabits * 1.25e5, rtt: 0.05 };
            richest_hidden(&ladder, &link, 3.2)
        };
        assert_eq!([1000.0, 100.0, 10.0, 0.1].map(at), [0, 1, 2, 2]);
        assert_eq!(richest_hidden(&ladder, &Link::default(), 3.2), 2, "nothing is known yet");
    }
}
