//! The guard: how much of each contribution is merged. It sees lengths, cosines and counts, no weights; it believes
//! nobody alone, and whatever more than half of the sites do is right by definition.
//!
//! ```text
//! too long   ‖v‖ > 3 × the peers' median or what is usual, as far as more steps and a richer codec explain it → clipped
//! apart      cᵢ = median over peers j of cos(vᵢ, vⱼ);  c = median of all cᵢ.  Where c is large, cᵢ < c/4 loses weight
//! opposed    where c is beyond chance, cᵢ/c is remembered; whoever keeps below −1/4 of it loses weight, all at −1/2
//! harmful    where contributions are tried on held-out text: how each helps beside the others is remembered, and likewise
//! heavy      of three or more, nobody weighs more than `weight_max` of all
//! ```
//!
//! The median of lengths is Templar's idea, trust as a smoothed cosine RoDiLoCo's. Medians are *upper* ones, so that a
//! minority among an even number cannot drag them down. Sites with data of their own are nearly orthogonal to all others:
//! that is no opposition, and where all are, nobody is judged. One or two contributions have no majority: there only
//! what is remembered counts.

#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

/// What is done about contributions that would harm the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Robust {
    /// Lengths are clipped, and whoever works against the others loses weight.
    #[default]
    Guard,
    /// Lengths are clipped.
    Clip,
    /// Everything is merged as it is.
    None,
}

/// How a merge protects itself: part of the recipe. Journals from before there was a guard have none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// Against what.
    pub robust: Robust,
    /// The greatest share of the weight that one of three or more contributions may have.
    pub weight_max: f64,
    /// What contributions to this fragment are like, if that is known.
    #[serde(default)]
    pub usual: Option<Usual>,
}

/// What contributions to a fragment are like.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Usual {
    /// Their length: the smoothed median.
    pub norm: f64,
    /// Their inner steps, likewise.
    pub steps: f64,
    /// Share of the weights that they speak of.
    pub density: f64,
}

impl Default for Guard {
    fn default() -> Self {
        Self { robust: Robust::None, weight_max: 1.0, usual: None }
    }
}

/// What the guard knows of a contribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// Relative weight; only ratios matter.
    pub weight: f64,
    /// Euclidean length.
    pub norm: f64,
    /// Inner steps in it.
    pub steps: u64,
    /// Share of the weights that it speaks of, above 0 and at most 1.
    pub density: f64,
    /// What its site's earlier contributions have shown, −1 to 1; 0 if nothing.
    pub trust: f64,
    /// How they have helped on held-out text, −1 to 1; 0 if none was tried.
    pub quality: f64,
}

/// How contributions lie to one another, as far as it was looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Angles<'a> {
    /// v·w for each pair, row by row.
    pub products: &'a [f64],
    /// Weights that these products are sums over.
    pub weights: usize,
}

/// Why the guard takes something from a contribution; the gravest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// It would have had too great a share.
    Heavy,
    /// It is far longer than its peers.
    Long,
    /// The others agree, and it does not agree with them.
    Apart,
    /// Its site has been working against the others.
    Opposed,
    /// What its site sends raises the loss on held-out text.
    Harmful,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Heavy => "heavy",
            Self::Long => "long",
            Self::Apart => "apart",
            Self::Opposed => "opposed",
            Self::Harmful => "harmful",
        })
    }
}

/// What is merged of a contribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Its weight is multiplied with this, 0 to 1.
    pub weight: f64,
    /// Its length is multiplied with this, 0 to 1.
    pub length: f64,
    /// Why not all of it, if so; the gravest reason.
    pub reason: Option<Reason>,
    /// How it agrees with the others, −1 to 1, where that can be told: what its site's trust learns from.
    pub agreement: Option<f64>,
}

impl Verdict {
    /// All of it.
    pub const WHOLE: Self = Self { weight: 1.0, length: 1.0, reason: None, agreement: None };

    /// What is left of it, 0 to 1.
    pub fn factor(&self) -> f64 {
        self.weight * self.length
    }
}

/// A contribution this many times as long as its peers explain is no training.
const TIMES_MAX: f64 = 3.0;
/// A cosine is beyond chance if it is this many times 1/√weights, which random vectors have among themselves.
const CHANCE: f64 = 2.0;
/// Contributions agree so much that one which does not stands out: at least this cosine, and twice beyond chance.
const STRONG: f64 = 0.3;
/// Share of the others' agreement below which such a one loses weight.
const APART: f64 = 0.25;
/// Weight of the newest agreement in a site's trust.
const TRUST_SHARE: f64 = 0.25;
/// What rounding may add to a share.
const ROUNDING: f64 = 1.0 + 1e-12;
/// Trust below which a site loses weight, and at which none is left.
const DOUBTED: f64 = -0.25;
const DISTRUSTED: f64 = -0.5;

/// What a site's trust becomes with one more contribution.
pub fn learn(trust: f64, agreement: Option<f64>) -> f64 {
    agreement.map_or(trust, |agreement| trust + TRUST_SHARE * (agreement.clamp(-1.0, 1.0) - trust))
}

/// Losses beyond this, in nats per token, are as bad as any.
const NATS_MAX: f64 = 1e6;
/// What contributions change is at least this share of the loss, or it says nothing.
const NOTICEABLE: f64 = 1e-4;

/// A loss in nats per token that can be calculated with; what is no number is the greatest.
pub fn as_loss(nats: f64) -> f64 {
    if nats.is_nan() { NATS_MAX } else { nats.clamp(0.0, NATS_MAX) }
}

/// A contribution that was tried alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Alone {
    /// The loss after it, in nats per token.
    pub nats: f64,
    /// Inner steps in it.
    pub steps: u64,
    /// How its site's earlier ones have helped, −1 to 1; 0 if none was tried.
    pub quality: f64,
}

/// How each of some contributions helps, −1 to 1, given the loss `before`: 1 if as much as its peers do in the middle or
/// more, 0 if by as much less as contributions usually change, −1 if by twice that. Only what raises the loss is below 0.
/// One alone has no peers: 0. Sites that have done harm are nobody's peers if there are others: where an honest one is
/// missing they would be the middle.
///
/// Where noise is all that is left to learn from, everybody alone raises the loss, by the square of his steps: that much,
/// three times, is no harm.
pub fn help(before: f64, all: &[Alone]) -> Vec<f64> {
    let rises: Vec<(f64, f64)> =
        all.iter().map(|alone| (as_loss(alone.nats) - before, alone.steps.max(1) as f64)).collect();
    let help = |(index, &(rise, steps)): (usize, &(f64, f64))| {
        let others: Vec<usize> = (0..all.len()).filter(|&peer| peer != index).collect();
        let sound: Vec<usize> = others.iter().copied().filter(|&peer| all[peer].quality > DOUBTED).collect();
        let peers = if sound.is_empty() { &others } else { &sound };
        let peers = || peers.iter().map(|&peer| rises[peer]);
        let explained = |(rise, of): (f64, f64)| if rise > 0.0 { rise * (steps / of).max(1.0).powi(2) } else { rise };
        let middle = upper_median(peers().map(explained).collect());
        let usual = upper_median(peers().map(|(rise, _)| rise.abs()).collect()).max(NOTICEABLE * before.abs());
        let unit = (usual + (TIMES_MAX - 1.0) * middle.max(0.0)).max(f64::MIN_POSITIVE);
        (1.0 + (middle - rise) / unit).clamp(if rise > 0.0 { -1.0 } else { 0.0 }, 1.0)
    };
    if all.len() < 2 { vec![0.0; rises.len()] } else { rises.iter().enumerate().map(help).collect() }
}

impl Guard {
    /// Judges contributions, in the order given. Without `angles`, only what is remembered tells who is opposed.
    pub fn judge(&self, all: &[Seen], angles: Option<Angles<'_>>) -> Vec<Verdict> {
        let mut verdicts = vec![Verdict::WHOLE; all.len()];
        if self.robust == Robust::None {
            return verdicts;
        }
        self.clip(all, &mut verdicts);
        if self.robust == Robust::Guard {
            // Whoever does harm on text has no say in what the others are like.
            drop_harmful(all, &mut verdicts);
            angles.into_iter().for_each(|angles| agree(angles, &mut verdicts));
            doubt(all, &mut verdicts);
        }
        limit(all, self.weight_max, &mut verdicts);
        verdicts
    }

    /// Shortens what is too long to what its peers explain, or what is usual if that is more or there are too few.
    fn clip(&self, all: &[Seen], verdicts: &mut [Verdict]) {
        for (index, (seen, verdict)) in all.iter().zip(verdicts).enumerate() {
            let peers = all.iter().enumerate().filter(|(peer, _)| *peer != index);
            let by_peers = upper_median(peers.map(|(_, peer)| seen.explained_by(&peer.usual())).collect());
            let by_peers = if all.len() > 2 { by_peers } else { 0.0 };
            let explained = self.usual.map_or(by_peers, |usual| by_peers.max(seen.explained_by(&usual)));
            if explained > 0.0 && seen.norm > TIMES_MAX * explained {
                (verdict.length, verdict.reason) = (explained / seen.norm, Some(Reason::Long));
            }
        }
    }
}

impl Seen {
    fn usual(&self) -> Usual {
        Usual { norm: self.norm, steps: self.steps as f64, density: self.density }
    }

    /// How long this contribution may be if others are like that. Steps lead no further than that many times as far.
    /// A sparse codec sends the greatest share `d` of what is there, and all that is there is at most 1/√d times as
    /// long.
    fn explained_by(&self, usual: &Usual) -> f64 {
        let (steps, density) = (self.steps as f64 / usual.steps.max(1.0), (self.density / usual.density).sqrt());
        usual.norm * steps.max(1.0) * density.max(1.0)
    }
}

/// Finds how each contribution of which something is left agrees with the others, if there are three; takes weight from
/// those that stand apart from a close majority.
fn agree(angles: Angles<'_>, verdicts: &mut [Verdict]) {
    let chance = 1.0 / (angles.weights.max(1) as f64).sqrt();
    let here: Vec<usize> = (0..verdicts.len()).filter(|&index| verdicts[index].weight > 0.0).collect();
    let cosines: Vec<f64> = here.iter().map(|&index| angles.median_cosine(index, &here, verdicts.len())).collect();
    let consensus = upper_median(cosines.clone());
    if here.len() < 3 || consensus < CHANCE * chance {
        return;
    }
    let strong = consensus >= STRONG.max(2.0 * CHANCE * chance);
    for (index, cosine) in here.into_iter().zip(cosines) {
        let (verdict, share) = (&mut verdicts[index], cosine / consensus);
        let left = if strong { (share / APART).clamp(0.0, 1.0) } else { 1.0 };
        verdict.agreement = Some(if left < 1.0 { 2.0 * left - 1.0 } else { share.clamp(-1.0, 1.0) });
        verdict.take(left, Reason::Apart);
    }
}

impl Angles<'_> {
    /// Median cosine of contribution number `index` of `count` to the others that are `here`.
    fn median_cosine(&self, index: usize, here: &[usize], count: usize) -> f64 {
        let peers = here.iter().filter(|&&peer| peer != index);
        upper_median(peers.map(|&peer| self.cosine(index, peer, count)).collect())
    }

    /// 0 if one of the two has no length.
    fn cosine(&self, a: usize, b: usize, count: usize) -> f64 {
        let product = |a: usize, b: usize| self.products[a * count + b];
        let lengths = (product(a, a) * product(b, b)).sqrt();
        if lengths > 0.0 { (product(a, b) / lengths).clamp(-1.0, 1.0) } else { 0.0 }
    }
}

/// What is left of the weight of a site of so much trust, or quality.
fn left_of(trust: f64) -> f64 {
    ((trust - DISTRUSTED) / (DOUBTED - DISTRUSTED)).clamp(0.0, 1.0)
}

/// Takes weight from sites that have lost trust. If that is everybody here, nobody is left to be harmed: they are
/// believed again, little by little.
fn doubt(all: &[Seen], verdicts: &mut [Verdict]) {
    for (seen, verdict) in all.iter().zip(verdicts.iter_mut()) {
        verdict.take(left_of(learn(seen.trust, verdict.agreement)), Reason::Opposed);
    }
    if verdicts.iter().all(|verdict| verdict.weight == 0.0) {
        let believed = verdicts.iter_mut().filter(|verdict| verdict.reason != Some(Reason::Harmful));
        believed.for_each(|verdict| verdict.agreement = Some(0.0));
    }
}

/// Takes weight from sites whose contributions do harm, as long as somebody else is left.
fn drop_harmful(all: &[Seen], verdicts: &mut [Verdict]) {
    if all.iter().any(|seen| left_of(seen.quality) > 0.0) {
        all.iter().zip(verdicts).for_each(|(seen, verdict)| verdict.take(left_of(seen.quality), Reason::Harmful));
    }
}

/// Brings every share of the weight down to `most`, as far as there are enough contributions to take up the rest.
fn limit(all: &[Seen], most: f64, verdicts: &mut [Verdict]) {
    let weights = all.iter().zip(&*verdicts).map(|(seen, verdict)| seen.weight * verdict.weight);
    let mut order: Vec<(f64, usize)> = weights.zip(0..).filter(|(weight, _)| *weight > 0.0).collect();
    if order.len() < 3 {
        return;
    }
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    let most = most.max(1.0 / order.len() as f64);
    let mut rest: f64 = order.iter().map(|(weight, _)| weight).sum();
    let mut limited = 0;
    // Those limited have `most` each; the others share what is left as they did before.
    let left = |limited: usize| 1.0 - most * limited as f64;
    while order[limited].0 / rest * left(limited) > most * ROUNDING {
        rest -= order[limited].0;
        limited += 1;
    }
    for &(weight, index) in &order[..limited] {
        verdicts[index].take(most / left(limited) * rest / weight, Reason::Heavy);
    }
}

impl Verdict {
    /// Leaves only this share of its weight, for this reason.
    fn take(&mut self, left: f64, reason: Reason) {
        if left < 1.0 {
            self.weight *= left;
            self.reason = self.reason.max(Some(reason));
        }
    }
}

/// The greater of the two in the middle, if there are two; 0 of nothing.
pub(crate) fn upper_median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
