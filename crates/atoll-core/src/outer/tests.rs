//! The merge and the outer step, on a fragment of an embedding and a matrix.

use super::*;
use crate::delta::norm;
use crate::model::{Tensor, TensorKind};
use crate::rng::Rng;
use crate::team::Alone;
use proptest::prelude::*;

fn manifest() -> Manifest {
    let tensors =
        vec![Tensor::new("embed", &[8, 4], TensorKind::Embedding), Tensor::new("matrix", &[8, 8], TensorKind::Matrix)];
    Manifest::balanced(tensors, 1)
}

fn random(seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..96).map(|_| rng.normal() as f32).collect()
}

/// A payload with its weight.
type Fresh = (f64, Vec<u8>);

fn fresh(weight: f64, values: &[f32]) -> Fresh {
    (weight, Codec::F32.encode(values).unwrap())
}

fn weigh(payloads: &[Fresh], stale: bool) -> Vec<Weighted<'_>> {
    weigh_of(96, payloads, stale)
}

/// Payloads for `count` weights.
fn weigh_of(count: usize, payloads: &[Fresh], stale: bool) -> Vec<Weighted<'_>> {
    let payload = |bytes| Payload::parse(bytes, count).unwrap();
    let weighted = payloads.iter().map(|(weight, bytes)| {
        let (name, payload) = (Digest::of(bytes), payload(bytes));
        Weighted { weight: *weight, steps: 1, trust: 0.0, quality: 0.0, name, stale, payload }
    });
    weighted.collect()
}

fn average(averaging: Averaging, payloads: &[Fresh]) -> Merged {
    // What is in the memory that is handed over means nothing.
    let memory = vec![f32::NAN; 200];
    let recipe = Recipe { merge: averaging, ..recipe(OuterRule::default(), Codec::F32) };
    merge(&manifest(), FragmentId(0), &recipe, &weigh(payloads, false), &[], memory, &Alone)
}

fn merged(payloads: &[Fresh]) -> Vec<f32> {
    average(Averaging::Radial, payloads).values()
}

fn recipe(rule: OuterRule, codec: Codec) -> Recipe {
    Recipe { merge: Averaging::Radial, rule, codec, share: 1.0, guard: Guard::default() }
}

fn still() -> Global {
    Global::new(manifest(), vec![vec![0.0; 96]])
}

fn step(global: &mut Global, delta: &[f32], recipe: &Recipe) -> Result<Step, CodecError> {
    global.step(FragmentId(0), &weigh(&[fresh(1.0, delta)], false), recipe, &Alone)
}

#[test]
fn one_contribution_merges_to_itself() {
    let delta = random(1);
    let merged = merged(&[fresh(3.0, &delta)]);
    assert!(merged.iter().zip(&delta).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn a_merge_reads_alike_in_stretches() {
    let parts = [random(1), random(2)];
    let merged = average(Averaging::Radial, &parts.each_ref().map(|delta| fresh(1.0, delta)));
    let values = merged.values();
    for (start, len) in [(0, 96), (0, 32), (31, 2), (32, 64), (5, 80), (95, 1), (40, 0)] {
        let mut stretch = vec![f32::NAN; len];
        merged.read(start, &mut stretch);
        assert_eq!(stretch, values[start..start + len], "{start} {len}");
    }
}

#[test]
fn matrices_keep_their_length_and_embeddings_are_averaged() {
    let parts = [random(1), random(2), random(3)];
    let merged = merged(&parts.each_ref().map(|delta| fresh(1.0, delta)));
    let length = parts.iter().map(|part| norm(&part[32..])).sum::<f64>() / 3.0;
    assert!((norm(&merged[32..]) - length).abs() < 1e-4);
    for (i, merged) in merged.iter().take(32).enumerate() {
        let mean = parts.iter().map(|part| part[i]).sum::<f32>() / 3.0;
        assert!((merged - mean).abs() < 1e-6);
    }
}

#[test]
fn plain_averaging_is_the_weighted_mean() {
    let (a, b) = (random(1), random(2));
    let merged = average(Averaging::Plain, &[fresh(3.0, &a), fresh(1.0, &b)]);
    for ((merged, a), b) in merged.values().iter().zip(&a).zip(&b) {
        assert!((merged - (0.75 * a + 0.25 * b)).abs() < 1e-6);
    }
    assert!(merged.cosines[0] > merged.cosines[1] && merged.corrections == [0.0, 0.0]);
}

#[test]
fn late_work_is_shrunk_turned_or_left_alone_by_where_it_points() {
    let momentum = random(1);
    let late = |values: &[f32]| {
        let payloads = [fresh(1.0, values)];
        let late = weigh(&payloads, true);
        let recipe = recipe(OuterRule::default(), Codec::F32);
        merge(&manifest(), FragmentId(0), &recipe, &late, &momentum, Vec::new(), &Alone).values()
    };
    let (matrix, m) = (32..96, &momentum[32..]);
    let along = late(&momentum);
    assert!((norm(&along[matrix.clone()]) - norm(m)).abs() < 1e-3, "what follows the momentum passes");
    let against: Vec<f32> = momentum.iter().map(|value| -value).collect();
    assert!((norm(&late(&against)[matrix.clone()]) - 0.5 * norm(m)).abs() < 1e-3, "what opposes it is halved");
    // Made orthogonal to the momentum, tensor by tensor.
    let mut across = random(2);
    for range in [0..32, matrix.clone()] {
        let share = dot(&across[range.clone()], &momentum[range.clone()]) / norm(&momentum[range.clone()]).powi(2);
        across[range.clone()].iter_mut().zip(&momentum[range]).for_each(|(a, m)| *a -= share as f32 * m);
    }
    let turned = late(&across);
    let cosine = crate::delta::cosine(&turned[matrix.clone()], m);
    assert!((cosine - 0.2).abs() < 1e-4, "what is across is turned: {cosine}");
    assert!((norm(&turned[matrix.clone()]) - norm(&across[matrix])).abs() < 1e-3, "and keeps its length");
}

#[test]
fn nesterov_is_the_textbooks() {
    let mut global = still();
    let rule = OuterRule::Nesterov { learning_rate: 0.5, momentum: 0.9 };
    let delta = random(1);
    for expected in [0.5 * 1.9, 0.5 * (1.0 + 0.9 * 1.9)] {
        let before = global.theta[0].clone();
        step(&mut global, &delta, &recipe(rule, Codec::F32)).unwrap();
        for ((after, before), delta) in global.theta[0].iter().zip(&before).zip(&delta) {
            assert!((before - after - expected * delta).abs() < 1e-5);
        }
    }
}

#[test]
fn auto_moves_as_far_as_its_deltas_whether_they_agree_or_not() {
    let share = |same: bool| {
        let mut global = still();
        let mut length = 0.0;
        for round in 0..200 {
            let delta = random(if same { 1 } else { round });
            length += norm(&delta);
            let rule = OuterRule::Auto { momentum: 0.6 };
            step(&mut global, &delta, &recipe(rule, Codec::F32)).unwrap();
        }
        let way = norm(&global.theta[0]);
        (if same { way / length } else { way / (length / 200f64.sqrt()) }, global.rho[0])
    };
    let ((agreeing, rho), (random, none)) = (share(true), share(false));
    assert!((agreeing - 1.0).abs() < 0.1 && rho > 0.9, "{agreeing} {rho}");
    // What has nothing in common goes on for a while in the buffer: each delta counts 1/(1 + μ) · 1/(1 − μ) in the end.
    assert!((random - 1.5625).abs() < 0.3 && none < 0.2, "{random} {none}");
}

#[test]
fn auto_has_no_momentum_beside_trellis_coded_quantization() {
    let auto = OuterRule::default();
    assert_eq!(auto.beside(Codec::Tcq(2)), OuterRule::Memoryless { learning_rate: 1.0 });
    let nesterov = OuterRule::Nesterov { learning_rate: 0.7, momentum: 0.9 };
    for (rule, down) in [(auto, Codec::E3m0), (auto, Codec::Sparse(224)), (nesterov, Codec::Tcq(2))] {
        assert_eq!(rule.beside(down), rule, "{down}");
    }
}

#[test]
fn a_share_shortens_the_step() {
    let mut global = still();
    let delta = random(1);
    let half = Recipe { share: 0.5, ..recipe(OuterRule::Memoryless { learning_rate: 1.0 }, Codec::F32) };
    let step = step(&mut global, &delta, &half).unwrap();
    assert!((norm(&global.theta[0]) - 0.5 * norm(&delta)).abs() < 1e-4);
    assert_eq!(step.measures.effective_step, 0.5);
}

proptest! {
    /// Whatever the codec loses, Θ + residual is where uncompressed steps would have led.
    #[test]
    fn the_residual_keeps_what_the_codec_lost(seed: u64, rounds in 1usize..6) {
        for codec in Codec::ALL {
            let mut global = still();
            let mut exact = vec![0.0f64; 96];
            for round in 0..rounds {
                let delta = random(seed.wrapping_add(round as u64));
                let rule = OuterRule::Memoryless { learning_rate: 0.7 };
                let merged = merged(&[fresh(1.0, &delta)]);
                step(&mut global, &delta, &recipe(rule, codec)).unwrap();
                exact.iter_mut().zip(&merged).for_each(|(exact, delta)| *exact -= 0.7 * f64::from(*delta));
            }
            for ((theta, rest), exact) in global.theta[0].iter().zip(&global.residual[0]).zip(&exact) {
                prop_assert!((f64::from(theta + rest) - exact).abs() < 1e-4);
            }
        }
    }

    /// Sparse payloads are merged without being unpacked, to what their unpacked values merge to.
    #[test]
    fn sparse_and_dense_merge_alike(seed: u64, sites in 1usize..5) {
        let payloads: Vec<Vec<u8>> =
            (0..sites).map(|site| Codec::Sparse(1000).encode(&random(seed.wrapping_add(site as u64))).unwrap()).collect();
        let dense = payloads.iter().map(|bytes| fresh(1.0, &crate::codec::decode(bytes, 96).unwrap()));
        let dense = merged(&dense.collect::<Vec<_>>());
        let sparse = merged(&payloads.into_iter().map(|bytes| (1.0, bytes)).collect::<Vec<_>>());
        prop_assert!(sparse.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}

/// Three chunks and a short one, of which the first begins in the embedding.
#[test]
fn who_speaks_in_one_turn_is_merged_as_if_each_were_unpacked_by_itself() {
    let tensors = vec![
        Tensor::new("embed", &[8, 4], TensorKind::Embedding),
        Tensor::new("matrix", &[100, 130], TensorKind::Matrix),
    ];
    let manifest = Manifest::balanced(tensors, 1);
    let count = manifest.parameters();
    let mut rng = Rng::new(5);
    // Where only few weights moved, payloads speak of these alone.
    let mut payload = |((codec, turn), moved): ((Codec, u8), usize)| {
        let normal = (0..count).map(|at| if at / 128 % 32 < moved { rng.normal() as f32 } else { 0.0 });
        codec.encode_prepared(&mut normal.collect::<Vec<f32>>(), turn, &Alone, |_, _| {}).unwrap()
    };
    for (turns, moved) in [([7, 7, 7], [32; 3]), ([7, 7, 8], [32; 3]), ([7, 7, 7], [32, 3, 32]), ([7; 3], [2, 3, 1])] {
        let codecs = [Codec::Tcq(1), Codec::Tcq(2), Codec::Tcq(1)];
        let payloads = codecs.into_iter().zip(turns).zip(moved).map(&mut payload);
        let payloads: Vec<Fresh> = [1.0, 2.0, 3.0].into_iter().zip(payloads).collect();
        let is_uneven = |(_, payload): &Fresh| payload[7..9] == [0xff; 2];
        assert_eq!(payloads.iter().map(is_uneven).collect::<Vec<_>>(), moved.map(|moved| moved < 32));
        let weighted = weigh_of(count, &payloads, false);
        let recipe = Recipe { merge: Averaging::Plain, ..recipe(OuterRule::default(), Codec::F32) };
        let merged = merge(&manifest, FragmentId(0), &recipe, &weighted, &[], Vec::new(), &Alone);
        let said: Vec<Vec<f32>> = weighted.iter().map(|one| one.payload.values(&Alone)).collect();
        let mean = |at: usize| (said[0][at] + 2.0 * said[1][at] + 3.0 * said[2][at]) / 6.0;
        let mean: Vec<f32> = (0..count).map(mean).collect();
        let far = merged.values().iter().zip(&mean).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5, "{far}");
        for (cosine, said) in merged.cosines.iter().zip(&said) {
            let expected = crate::delta::cosine(said, &mean);
            assert!((cosine - expected).abs() < 1e-4, "{cosine}, and it should be {expected}");
        }
    }
}

/// Sites agree on a half. Two of their payloads, which tell a quarter each, agree on an eighth of what they say, and would be
/// lengthened 1.33 times.
#[test]
fn what_is_told_in_part_is_lengthened_as_if_all_had_been_told() {
    let matrix = Tensor::new("matrix", &[128, 512], TensorKind::Matrix);
    let manifest = Manifest::balanced(vec![matrix], 1);
    let count = manifest.parameters();
    let mut rng = Rng::new(5);
    let mut normal = || (0..count).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
    let common = normal();
    let sites = [normal(), normal()].map(|own| own.iter().zip(&common).map(|(a, b)| a + b).collect::<Vec<f32>>());
    let lengthened = |codec: Codec, moved: usize| {
        let few = |wish: &Vec<f32>| -> Vec<f32> {
            wish.iter().enumerate().map(|(at, value)| if at / 128 % 32 < moved { *value } else { 0.0 }).collect()
        };
        let payloads: Vec<Fresh> = sites.iter().map(|wish| (1.0, codec.encode(&few(wish)).unwrap())).collect();
        assert!(codec == Codec::F32 || codec == Codec::E3m0 || (payloads[0].1[7..9] == [0xff; 2]) == (moved < 32));
        let norm = |averaging: Averaging| {
            let recipe = Recipe { merge: averaging, ..recipe(OuterRule::default(), Codec::F32) };
            let weighted = weigh_of(count, &payloads, false);
            merge(&manifest, FragmentId(0), &recipe, &weighted, &[], Vec::new(), &Alone).norm
        };
        norm(Averaging::Radial) / norm(Averaging::Plain)
    };
    let wanted = (0.5f64 + 0.5 * 0.5).sqrt().recip();
    for codec in [Codec::F32, Codec::E3m0, Codec::Tcq(4), Codec::Tcq(2), Codec::Tcq(1)] {
        for moved in [32, 3] {
            let found = lengthened(codec, moved);
            assert!((found / wanted - 1.0).abs() < 0.02, "{codec}, {moved} rows: {found} instead of {wanted}");
        }
    }
}

/// If it did not, all would still be right, and told in many more rounds.
#[test]
fn the_coordinator_speaks_in_the_turn_of_the_sites_that_it_has_heard() {
    use crate::delta::{Feedback, Follow, Local};
    let (mut global, fragment) = (still(), FragmentId(0));
    let mut local = Local::new(&manifest(), Follow::Auto, Feedback::Weights);
    local.install(fragment, global.theta[0].clone()).unwrap();
    for seed in 1..4 {
        let said = local.contribute(fragment, random(seed), Codec::Tcq(1), &Alone).unwrap();
        let contributions = [(1.0, said.bytes)];
        let recipe = recipe(OuterRule::default(), Codec::Tcq(2));
        let step = global.step(fragment, &weigh(&contributions, false), &recipe, &Alone).unwrap();
        let turn = |bytes| Payload::parse(bytes, 96).unwrap().turn();
        assert_eq!(turn(&step.payload), turn(&contributions[0].1));
        local.commit(fragment, step.payload, &Alone).unwrap();
    }
}

#[test]
fn a_change_that_is_not_finite_changes_nothing() {
    let mut global = still();
    let before = global.clone();
    let recipe = recipe(OuterRule::default(), Codec::F32);
    for bad in [f32::INFINITY, f32::NAN, 1e37] {
        let mut bytes = Codec::F32.encode(&[0.0; 96]).unwrap();
        bytes[5..].chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&bad.to_le_bytes()));
        assert!(global.step(FragmentId(0), &weigh(&[(1.0, bytes)], false), &recipe, &Alone).is_err());
        assert_eq!(global, before);
    }
}

#[test]
fn recipes_from_before_there_was_a_guard_have_none() {
    let old = r#"{"merge":"radial","rule":{"rule":"auto","momentum":0.3},"codec":"sparse:224","share":1.0}"#;
    let recipe: Recipe = serde_json::from_str(old).unwrap();
    assert_eq!(recipe.guard, Guard { robust: Robust::None, weight_max: 1.0, usual: None });
}

/// Eight contributions around a common direction, two of them its opposite.
fn two_liars_of_eight() -> Vec<Vec<f32>> {
    let common = random(100);
    let near = |site: u64| common.iter().zip(random(site)).map(|(common, own)| common + 0.3 * own);
    (0..8).map(|site| near(site).map(|value| if site < 2 { -value } else { value }).collect()).collect()
}

#[test]
fn what_the_guard_takes_is_not_in_the_merge() {
    let parts = two_liars_of_eight();
    let payloads: Vec<Fresh> = parts.iter().map(|part| fresh(1.0, part)).collect();
    let guard = Guard { robust: Robust::Guard, weight_max: 0.5, usual: None };
    let recipe = Recipe { guard, ..recipe(OuterRule::default(), Codec::F32) };
    let all = merge(&manifest(), FragmentId(0), &recipe, &weigh(&payloads, false), &[], Vec::new(), &Alone);
    let honest = merge(&manifest(), FragmentId(0), &recipe, &weigh(&payloads[2..], false), &[], Vec::new(), &Alone);
    assert_eq!(all.verdicts.iter().map(Verdict::factor).collect::<Vec<_>>(), [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    assert!(all.values().iter().zip(honest.values()).all(|(all, honest)| (all - honest).abs() < 1e-6));
    // Of honest contributions it leaves every bit as it is.
    let honest_alone = average(Averaging::Radial, &payloads[2..]);
    assert_eq!(honest.values(), honest_alone.values());
    assert_eq!(honest.norm.to_bits(), honest_alone.norm.to_bits());
}
