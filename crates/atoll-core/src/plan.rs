//! Arithmetic of pace: how many steps a site should take, what a link can carry, and how much of a change a payload
//! should say at once.

use std::fmt;

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

    /// Whether it has been measured both ways.
    fn is_known(&self) -> bool {
        self.up > 0.0 && self.down > 0.0
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

/// Inner steps between two contributions before it is known what they take.
pub const STEPS: u32 = 32;
/// More rounds are better for the loss, and each costs every site and the coordinator some of their processors' time. Where
/// nothing calls for more, a round takes so many seconds …
const ROUND_SECONDS: f64 = 0.25;
/// … or as long that encoding and decoding is no more than this share of it at any site …
const CODING_SHARE: f64 = 0.1;
/// … and copying weights and adding to them, which no step is taken beside, no more than this. For these reasons nobody takes
/// more than [`STEPS`].
const COPYING_SHARE: f64 = 0.02;
/// More than this harms the model more than a thin link does: such a site misses rounds instead.
const STEPS_MAX: u32 = 16 * STEPS;
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
pub const THINNEST: Codecs = (Codec::Tcq(1), Codec::Tcq(2));
/// What a link may carry, richest first. With what it has not said kept for the next round, E3M0 is as good for the loss as
/// f32, so nothing richer is worth its bytes, which take longer.
pub const LADDER: [Codecs; 2] = [(Codec::E3m0, Codec::E3m0), THINNEST];

/// What the last round of a run is written in where others are written in `codec`: it has no later one to deliver what it
/// leaves out.
pub fn last_of_all(codec: Codec) -> Codec {
    match codec {
        Codec::Sparse(_) | Codec::Tcq(_) | Codec::E3m0 => Codec::Bf16,
        Codec::F32 | Codec::Bf16 => codec,
    }
}

/// Codecs to choose from, and what they move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rung {
    /// How weights are written.
    pub codecs: Codecs,
    /// How much that is.
    pub load: Load,
}

/// Bytes of a fragment, on average, that may be sent over a link of which too little is known: a second at 10 Mbit/s. What is much
/// smaller tells nothing of a link, so whoever sent only that would never come to know it.
const VENTURE: u64 = 1 << 20;

/// Number of the richest rung of the `ladder` whose load hides behind `seconds` of computing on that link; of the last where
/// none does. If only a half is known of the link, or nothing, the load is to be so small, too, that nobody would wait long.
pub fn richest_hidden(ladder: &[Rung], link: &Link, seconds: f64) -> usize {
    let is_small = |load: &Load| load.up.max(load.down) <= VENTURE * load.fragments as u64;
    let is_known_to_hide = |load: &Load| hiding_seconds(link, load) <= seconds;
    let hides = |Rung { load, .. }: &Rung| match link.is_known() {
        true => is_known_to_hide(load),
        false => is_small(load) && (seconds <= 0.0 || is_known_to_hide(load)),
    };
    ladder.iter().position(hides).unwrap_or(ladder.len().saturating_sub(1))
}

/// Inner steps of `step_seconds` between two contributions that let sites drift apart the least, of those that hide what
/// a rung of the `ladder` moves behind computing; those of the last rung if none can, or if nothing is known of the link.
/// A round is not to be shorter than `least_seconds`.
pub fn best_steps(ladder: &[Rung], link: &Link, step_seconds: f64, least_seconds: f64) -> u32 {
    let Some((last, others)) = ladder.split_last() else { return STEPS };
    let needed = |rung: &Rung| hiding_seconds(link, &rung.load);
    let can = |rung: &&Rung| link.is_known() && needed(rung) <= f64::from(STEPS_MAX) * step_seconds;
    let steps = |rung: &Rung| steps_to_hide(needed(rung), step_seconds, least_seconds);
    let drift = |rung: &Rung| f64::from(steps(rung)) * rounds_to_tell(rung.codecs.0);
    let best = others.iter().filter(can).chain([last]).min_by(|a, b| drift(a).total_cmp(&drift(b)));
    best.map_or(STEPS, steps)
}

/// Rounds of a codec in which sites drift as far apart as in one of a codec that tells everything, where the mean square of
/// a walk is a half of the square of its end. A sparse one speaks of a weight when its walk has come far enough, every
/// 1/density rounds, and the mean square of such a walk is a sixth of the square of its end. What trellis-coded
/// quantization leaves of each round's step, 1 − density, is left again in the next: (1 − density)/density steps in all,
/// and half a one.
fn rounds_to_tell(codec: Codec) -> f64 {
    let density = codec.density();
    match codec {
        Codec::F32 | Codec::Bf16 | Codec::E3m0 => 1.0,
        Codec::Sparse(_) => (1.0 / (3.0 * density)).max(1.0),
        Codec::Tcq(_) => 2.0 / density - 1.0,
    }
}

/// What makes a round as long as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The operator's word.
    Asked,
    /// No step has been measured yet.
    Unmeasured,
    /// Still shorter rounds would be of no use to the model.
    Short,
    /// A site's encoding and decoding.
    Coding,
    /// A site's copying of weights.
    Copying,
    /// What a site's link needs to move.
    Link,
    /// The coordinator's merges.
    Merging,
    /// Whatever it is that another site calls for.
    Others,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("as run.toml says"),
            Self::Unmeasured => f.write_str("until it is known how long steps take"),
            Self::Short => write!(f, "since rounds shorter than {ROUND_SECONDS} s, or {STEPS} steps, are of no use"),
            Self::Coding => write!(f, "as encoding and decoding, {:.0} % of it, ask for", 100.0 * CODING_SHARE),
            Self::Copying => write!(f, "as copying weights, {:.0} % of it, asks for", 100.0 * COPYING_SHARE),
            Self::Link => f.write_str("as the link needs to move everything meanwhile"),
            Self::Merging => f.write_str("as the coordinator needs to merge meanwhile"),
            Self::Others => f.write_str("as another site needs"),
        }
    }
}

/// The shortest round of a site that encodes and decodes for `coding` seconds in each, and for `copying` seconds copies
/// weights and adds to them, and what makes it so long.
pub fn least_seconds(coding: f64, copying: f64) -> (f64, Bound) {
    let short = (ROUND_SECONDS, Bound::Short);
    let others = [(coding / CODING_SHARE, Bound::Coding), (copying / COPYING_SHARE, Bound::Copying)];
    longest(short, others)
}

/// What asks for most, of equals the first.
pub(crate) fn longest<T: PartialOrd, const N: usize>(first: (T, Bound), others: [(T, Bound); N]) -> (T, Bound) {
    others.into_iter().fold(first, |longest, other| if other.0 > longest.0 { other } else { longest })
}

/// Inner steps of `step_seconds` between two contributions so that `needed` seconds hide behind them, and, within limits, a
/// round is not shorter than `least_seconds`.
pub fn steps_to_hide(needed: f64, step_seconds: f64, least_seconds: f64) -> u32 {
    if step_seconds <= 0.0 {
        return STEPS;
    }
    let steps = |seconds: f64| (seconds / step_seconds).ceil().min(f64::from(STEPS_MAX)) as u32;
    steps(needed).max(steps(least_seconds).min(STEPS)).max(1)
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
        assert_eq!(steps_to_hide(needed, 0.03, ROUND_SECONDS), 99);
        // A fat link needs no more than is good for the loss; an absurdly thin one is not waited for.
        let steps = |rate: f64| {
            steps_to_hide(hiding_seconds(&Link { up: rate, down: rate, rtt: 0.05 }, &load), 0.03, ROUND_SECONDS)
        };
        assert_eq!([1e9, 1.0, 0.0].map(steps), [9, STEPS_MAX, 9]);
    }

    #[test]
    fn rounds_are_short_where_nothing_calls_for_more() {
        let steps = [0.001, 0.03, 0.05, 0.25, 1.0, 60.0].map(|seconds| steps_to_hide(0.0, seconds, ROUND_SECONDS));
        assert_eq!(steps, [STEPS, 9, 5, 1, 1, 1]);
        assert_eq!(steps_to_hide(0.0, 0.0, ROUND_SECONDS), STEPS, "nothing is known yet");
    }

    /// A fragment of `nano` takes 10 kB in the thinnest codec, which tell nothing of a link, and 169 in E3M0.
    #[test]
    fn over_a_link_of_which_nothing_is_known_a_small_model_ventures_more() {
        let rung = |weights: usize, link: &Link| {
            let bytes = |codec: Codec| codec.payload_len(weights) as u64;
            let load = |(up, down)| Load { up: bytes(up), down: bytes(down), fragments: 4 };
            richest_hidden(&LADDER.map(|codecs| Rung { codecs, load: load(codecs) }), link, 0.25)
        };
        let measured = |rate: f64| Link { up: rate, down: rate, rtt: 0.05 };
        let half_known = Link { up: 0.0, ..measured(1e8) };
        for unknown in [Link::default(), half_known] {
            assert_eq!([20_000, 1_300_000, 3_800_000, 30_800_000].map(|weights| rung(weights, &unknown)), [0, 0, 0, 1]);
        }
        assert_eq!(rung(1_300_000, &Link { up: 0.0, ..measured(1e5) }), 1, "a half that is known is thin");
        assert_eq!([1e5, 1e7].map(|rate| rung(1_300_000, &measured(rate))), [1, 0], "what is known decides");
    }

    #[test]
    fn a_sites_work_on_rounds_stays_a_small_share_of_its_time() {
        let steps = |coding, copying| steps_to_hide(0.0, 0.03, least_seconds(coding, copying).0);
        assert_eq!(
            [(0.0, 0.0), (0.02, 0.004), (0.06, 0.0), (0.0, 0.006), (10.0, 0.0)]
                .map(|(coding, copying)| steps(coding, copying)),
            [9, 9, 20, 10, STEPS]
        );
        let bounds = [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1)].map(|(coding, copying)| least_seconds(coding, copying).1);
        assert_eq!(bounds, [Bound::Short, Bound::Coding, Bound::Copying]);
    }

    /// 30.8 M weights, steps of 0.1 s. E3M0 needs 16 steps at 100 Mbit/s and 159 at 10 Mbit/s, where rounds of the
    /// thinnest codecs would take 19, and tell everything in 7 of them; at 1 Mbit/s only these hide.
    #[test]
    fn rounds_are_as_short_as_is_good_for_the_loss() {
        let bytes = |codec: Codec| codec.payload_len(30_800_000) as u64;
        let ladder = LADDER
            .map(|codecs @ (up, down)| Rung { codecs, load: Load { up: bytes(up), down: bytes(down), fragments: 4 } });
        let at = |megabits: f64| {
            let link = Link { up: megabits * 1.25e5, down: megabits * 1.25e5, rtt: 0.05 };
            best_steps(&ladder, &link, 0.1, ROUND_SECONDS)
        };
        assert_eq!([10_000.0, 100.0, 10.0, 1.0].map(at), [3, 16, 19, 185]);
        assert_eq!(best_steps(&ladder, &Link::default(), 0.1, ROUND_SECONDS), 3, "nothing is known yet");
    }

    /// 30.8 M weights behind 32 steps of 0.1 s: E3M0 takes 1.3 s at 100 Mbit/s and 13 at 10.
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
        assert_eq!([1000.0, 100.0, 10.0, 0.1].map(at), [0, 0, 1, 1]);
        assert_eq!(richest_hidden(&ladder, &Link::default(), 3.2), 1, "nothing is known yet");
    }
}
