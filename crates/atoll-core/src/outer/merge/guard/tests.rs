//! The guard, on contributions of which only lengths and cosines are known.

use super::*;
use proptest::prelude::*;

const GUARD: Guard = Guard { robust: Robust::Guard, weight_max: 0.5, usual: None };
const SEEN: Seen = Seen { weight: 1.0, norm: 1.0, steps: 8, density: 1.0, trust: 0.0, quality: 0.0 };
/// Weights for which a cosine of 0.01 is beyond chance.
const MANY: usize = 1 << 20;

/// Products of vectors of length 1 with these cosines to one another, row by row.
fn products(count: usize, cosine: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..count * count).map(|at| if at / count == at % count { 1.0 } else { cosine(at / count, at % count) }).collect()
}

/// Judges so many sites like all others, of which `bad` first ones have the opposite direction.
fn judge(count: usize, bad: usize, cosine: f64, trust: f64) -> Vec<Verdict> {
    let flipped = |a: usize, b: usize| if (a < bad) == (b < bad) { cosine } else { -cosine };
    let products = products(count, flipped);
    GUARD.judge(&vec![Seen { trust, ..SEEN }; count], Some(Angles { products: &products, weights: MANY }))
}

#[test]
fn whoever_opposes_a_close_majority_is_left_out_at_once() {
    for (count, bad) in [(3, 1), (4, 1), (5, 2), (8, 2), (8, 3)] {
        let verdicts = judge(count, bad, 0.6, 0.0);
        assert!(verdicts[..bad].iter().all(|verdict| verdict.factor() == 0.0), "{verdicts:?}");
        assert!(verdicts[bad..].iter().all(|verdict| verdict.factor() == 1.0 && verdict.reason.is_none()));
    }
}

#[test]
fn among_nearly_orthogonal_contributions_it_takes_three_rounds() {
    let mut trust = 0.0;
    let mut factors = Vec::new();
    for _ in 0..3 {
        let verdict = judge(8, 1, 0.02, trust)[0];
        trust = learn(trust, verdict.agreement);
        factors.push(verdict.factor());
    }
    assert_eq!(factors[0], 1.0);
    assert!((0.0..1.0).contains(&factors[1]) && factors[2] == 0.0, "{factors:?}");
    // Whoever mends is believed again.
    let mends = (1..20).find(|_| {
        let verdict = judge(8, 0, 0.02, trust)[0];
        trust = learn(trust, verdict.agreement);
        verdict.factor() == 1.0
    });
    assert!(mends < Some(4), "{mends:?}");
}

#[test]
fn where_all_are_orthogonal_nobody_is_judged() {
    let products = products(4, |a, b| if (a + b) % 2 == 0 { 1e-3 } else { -1e-3 });
    let angles = Angles { products: &products, weights: MANY };
    assert_eq!(GUARD.judge(&[SEEN; 4], Some(angles)), [Verdict::WHOLE; 4]);
}

#[test]
fn data_of_ones_own_is_no_opposition() {
    // Three of four see the same; the fourth is at right angles to them, round after round.
    let products = products(4, |a, b| if a == 3 || b == 3 { 0.0 } else { 0.2 });
    let mut trust = 0.5;
    for _ in 0..50 {
        let all = [SEEN, SEEN, SEEN, Seen { trust, ..SEEN }];
        let verdicts = GUARD.judge(&all, Some(Angles { products: &products, weights: MANY }));
        assert!(verdicts.iter().all(|verdict| verdict.factor() == 1.0), "{verdicts:?}");
        trust = learn(trust, verdicts[3].agreement);
    }
}

#[test]
fn what_is_too_long_counts_as_long_as_its_peers() {
    let all = [SEEN, Seen { norm: 1.2, ..SEEN }, Seen { norm: 0.8, ..SEEN }, Seen { norm: 10.0, ..SEEN }];
    let clip = Guard { robust: Robust::Clip, ..GUARD };
    let verdicts = clip.judge(&all, None);
    assert_eq!((verdicts[3].length, verdicts[3].reason), (0.1, Some(Reason::Long)));
    assert_eq!(verdicts[..3], [Verdict::WHOLE; 3]);
    assert_eq!(Guard { robust: Robust::None, ..clip }.judge(&all, None), [Verdict::WHOLE; 4]);
}

#[test]
fn more_steps_and_a_richer_codec_explain_a_length() {
    let clip = Guard { robust: Robust::Clip, ..GUARD };
    let factor = |long: Seen| clip.judge(&[SEEN, SEEN, long], None)[2].factor();
    assert_eq!(factor(Seen { norm: 20.0, steps: 80, weight: 0.5, ..SEEN }), 1.0);
    let sparse = Seen { density: 96.0 / 4096.0, ..SEEN };
    let factor = |norm: f64| clip.judge(&[sparse, sparse, Seen { norm, ..SEEN }], None)[2].factor();
    assert!(factor(15.0) == 1.0 && factor(25.0) < 1.0);
}

#[test]
fn alone_a_contribution_is_measured_by_what_is_usual() {
    let usual = Usual { norm: 1.0, steps: 8.0, density: 1.0 };
    let guard = Guard { usual: Some(usual), ..GUARD };
    let factor = |norm: f64| guard.judge(&[Seen { norm, ..SEEN }], None)[0].factor();
    assert_eq!((factor(2.0), factor(10.0)), (1.0, 0.1));
    assert_eq!(GUARD.judge(&[Seen { norm: 10.0, ..SEEN }], None), [Verdict::WHOLE]);
}

#[test]
fn the_distrusted_are_believed_again_when_nobody_else_is_there() {
    let mut trust = -0.9;
    let rounds = (1..20).find(|_| {
        let verdict = GUARD.judge(&[Seen { trust, ..SEEN }], None)[0];
        trust = learn(trust, verdict.agreement);
        verdict.factor() > 0.0
    });
    assert_eq!(rounds, Some(4));
}

#[test]
fn of_three_or_more_nobody_weighs_more_than_the_rest() {
    let weights = |weights: &[f64]| -> Vec<f64> {
        let all: Vec<Seen> = weights.iter().map(|&weight| Seen { weight, ..SEEN }).collect();
        let verdicts = GUARD.judge(&all, None);
        weights.iter().zip(verdicts).map(|(weight, verdict)| weight * verdict.weight).collect()
    };
    assert_eq!(weights(&[8.0, 1.0, 1.0]), [2.0, 1.0, 1.0]);
    assert_eq!(weights(&[2.0, 1.0, 1.0]), [2.0, 1.0, 1.0]);
    assert_eq!(weights(&[8.0, 1.0]), [8.0, 1.0]);
    assert_eq!(weights(&[0.0, 8.0, 1.0]), [0.0, 8.0, 1.0]);
}

/// Help of contributions with as many steps.
fn help_of(before: f64, after: &[f64]) -> Vec<f64> {
    help(before, &after.iter().map(|&nats| Alone { nats, steps: 8, quality: 0.0 }).collect::<Vec<_>>())
}

#[test]
fn who_has_done_harm_is_nobodys_measure() {
    let alone = |nats: f64, quality: f64| Alone { nats, steps: 8, quality };
    // Three of the four liars are here, and two of the honest.
    let all = [alone(1.9, 0.9), alone(1.9, 0.9), alone(2.1, -0.8), alone(2.1, -0.8), alone(2.1, -0.8)];
    assert_eq!(help(2.0, &all), [1.0, 1.0, -1.0, -1.0, -1.0]);
    assert_eq!(help(2.0, &all.map(|all| Alone { quality: 0.0, ..all }))[2], 1.0, "they are the middle");
    assert_eq!(help(2.0, &all[2..]), [1.0; 3], "nobody else is here");
}

#[test]
fn help_is_told_by_the_peers() {
    // Three help by as much; one does nothing, one harms as much, one much more, one is no number.
    let help = help_of(2.0, &[1.9, 1.9, 1.9, 1.9, 2.0, 2.1, 5.0, f64::NAN]);
    assert_eq!(help[..4], [1.0; 4]);
    assert!(help[4].abs() < 1e-9, "{help:?}");
    assert_eq!(help[5..], [-1.0; 3]);
}

#[test]
fn half_may_be_harmful_and_the_loss_tells_them_apart() {
    assert_eq!(help_of(2.0, &[1.9, 2.1]), [1.0, -1.0]);
    assert_eq!(help_of(2.0, &[1.9, 2.1, 2.1, 1.9]), [1.0, -1.0, -1.0, 1.0]);
}

#[test]
fn nobody_is_blamed_for_what_all_do_nor_for_what_cannot_be_seen() {
    assert_eq!(help_of(2.0, &[2.1, 2.1, 2.1]), [1.0; 3]);
    assert!(help_of(2.0, &[2.000_01, 1.999_99, 2.0]).iter().all(|help| *help > 0.8));
    assert!(help_of(2.0, &[1.9, 1.99, 1.5]).iter().all(|help| *help >= 0.0), "each of them helps");
    assert_eq!(help_of(2.0, &[3.0]), [0.0]);
    assert!(help_of(2.0, &[]).is_empty());
}

#[test]
fn whoever_takes_more_steps_may_raise_the_loss_by_their_square() {
    let steps = |nats: f64, steps: u64| Alone { nats, steps, quality: 0.0 };
    assert!(help(2.0, &[steps(2.01, 8), steps(2.09, 24)]).iter().all(|help| *help > 0.99));
    assert_eq!(help_of(2.0, &[2.01, 2.09])[1], -1.0);
}

#[test]
fn what_does_harm_loses_its_weight_unless_nothing_else_is_left() {
    let harmful = Seen { quality: -1.0, ..SEEN };
    let verdicts = GUARD.judge(&[SEEN, harmful], None);
    assert_eq!((verdicts[0], verdicts[1].weight, verdicts[1].reason), (Verdict::WHOLE, 0.0, Some(Reason::Harmful)));
    let doubted = GUARD.judge(&[SEEN, Seen { quality: -0.375, ..SEEN }], None)[1];
    assert!((doubted.weight - 0.5).abs() < 1e-9);
    assert_eq!(GUARD.judge(&[harmful, harmful], None), [Verdict::WHOLE; 2]);
}

fn any_seen() -> impl Strategy<Value = Seen> {
    let (norm, trust) = (prop_oneof![Just(0.0), 1e-12..1e12], (-1.0..=1.0, -1.0..=1.0));
    (0.0..1e6, norm, 0u64..1000, 0.02..=1.0, trust).prop_map(|(weight, norm, steps, density, (trust, quality))| Seen {
        weight,
        norm,
        steps,
        density,
        trust,
        quality,
    })
}

/// Contributions and vectors of three weights, which have the cosines that vectors can have.
fn any_round() -> impl Strategy<Value = (Vec<Seen>, Vec<[f64; 3]>)> {
    prop::collection::vec((any_seen(), prop::array::uniform3(-1.0..1.0)), 1..12)
        .prop_map(|round| round.into_iter().unzip())
}

fn judge_round(seen: &[Seen], vectors: &[[f64; 3]], weights: usize) -> Vec<Verdict> {
    let dot = |a: &[f64; 3], b: &[f64; 3]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let products: Vec<f64> = vectors.iter().flat_map(|a| vectors.iter().map(move |b| dot(a, b))).collect();
    GUARD.judge(seen, Some(Angles { products: &products, weights }))
}

proptest! {
    /// Every factor is a share, and what is learnt stays within its bounds.
    #[test]
    fn factors_are_shares((seen, vectors) in any_round(), weights in 0usize..1 << 24) {
        for (seen, verdict) in seen.iter().zip(judge_round(&seen, &vectors, weights)) {
            prop_assert!((0.0..=1.0).contains(&verdict.weight) && (0.0..=1.0).contains(&verdict.length), "{verdict:?}");
            prop_assert!(verdict.agreement.is_none_or(|agreement| (-1.0..=1.0).contains(&agreement)));
            prop_assert_eq!(verdict.reason.is_none(), verdict.factor() == 1.0);
            prop_assert!((-1.0..=1.0).contains(&learn(seen.trust, verdict.agreement)));
        }
    }

    /// Who stands where in the order does not matter.
    #[test]
    fn order_does_not_matter((seen, vectors) in any_round(), turn in 0usize..12) {
        let verdicts = judge_round(&seen, &vectors, MANY);
        let turned = |count: usize| turn % count;
        let (mut other_seen, mut other_vectors, mut expected) = (seen.clone(), vectors.clone(), verdicts);
        other_seen.rotate_left(turned(seen.len()));
        other_vectors.rotate_left(turned(seen.len()));
        expected.rotate_left(turned(seen.len()));
        prop_assert_eq!(judge_round(&other_seen, &other_vectors, MANY), expected);
    }

    /// Sites of one mind pass, whatever their lengths and steps, as far as these are those of training.
    #[test]
    fn honest_contributions_are_untouched(
        steps in prop::collection::vec(1u64..64, 3..12),
        agreement in 0.0..1.0f64,
        noise in 0.8..1.25f64,
    ) {
        // Length grows with the root of the steps or faster; weight with the steps, which are more alike than these.
        let root = |steps: u64| (steps as f64).sqrt();
        let seen: Vec<Seen> = steps.iter().map(|&steps| Seen { norm: noise * root(steps), steps, ..SEEN }).collect();
        let products = products(seen.len(), |_, _| agreement);
        let verdicts = GUARD.judge(&seen, Some(Angles { products: &products, weights: MANY }));
        let longest = seen.iter().map(|seen| seen.norm).fold(0.0, f64::max);
        let shortest = seen.iter().map(|seen| seen.norm).fold(f64::INFINITY, f64::min);
        prop_assume!(longest / shortest < 8.0);
        prop_assert!(verdicts.iter().all(|verdict| verdict.factor() == 1.0), "{verdicts:?}");
    }
}
