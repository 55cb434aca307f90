//! What a model becomes must be the same bits on every machine, with every instruction set, now and later: a
//! coordinator that is restarted, and `atoll replay`, compute journaled commits again. So the digests stand here.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;

use atoll_core::codec::{Codec, Payload, Squares};
use atoll_core::data::Ranges;
use atoll_core::hash::Digest;
use atoll_core::journal::Accepted;
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::{Tensor, TensorKind};
use atoll_core::outer::{Averaging, Found, Global, Guard, OuterRule, Recipe, Robust};
use atoll_core::rng::Rng;
use atoll_core::team::Alone;

/// Tensors that begin and end in the middle of everything that work is cut into.
fn manifest() -> Manifest {
    let tensors = vec![
        Tensor::new("embedding", &[300, 65], TensorKind::Embedding),
        Tensor::new("matrix", &[431, 433], TensorKind::Matrix),
        Tensor::new("gain", &[65], TensorKind::Vector),
        Tensor::new("other", &[257, 129], TensorKind::Matrix),
    ];
    Manifest::balanced(tensors, 1)
}

fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    // Without logarithms, which differ between the libraries of systems.
    let cube = |value: f64| (value * value * value) as f32;
    (0..count).map(|_| cube(rng.unit() - 0.5)).collect()
}

/// The same in so many of 32 rows, and nothing in others.
fn noise_in(rows: usize, seed: u64, count: usize) -> Vec<f32> {
    let mut values = noise(seed, count);
    values.chunks_mut(128).enumerate().filter(|(row, _)| row % 32 >= rows).for_each(|(_, row)| row.fill(0.0));
    values
}

/// Digest of Θ after some rounds of three sites, one of them late, with these codecs up and down, where so many of 32 rows move.
/// Whether contributions were looked at when they came makes no difference.
fn model_after(up: Codec, down: Codec, rows: usize) -> Digest {
    let [seen, unseen] = [true, false].map(|is_seen| model_of(up, down, rows, is_seen));
    assert_eq!(seen, unseen, "{up}");
    seen
}

fn model_of(up: Codec, down: Codec, rows: usize, is_seen: bool) -> Digest {
    let count = manifest().parameters();
    let mut global = Global::new(manifest(), vec![vec![0.25; count]]);
    for version in 1..=4 {
        let mut payloads = BTreeMap::new();
        let mut contribution = |site: u64| {
            let payload = up.encode(&noise_in(rows, 10 * version + site, count)).unwrap();
            assert_eq!(payload[7..9] == [0xff; 2], rows < 32, "few rows move: their payloads are uneven");
            let name = Digest::of(&payload);
            payloads.insert(name, payload);
            Accepted {
                site: format!("site-{site}").parse().unwrap(),
                number: version,
                payload: name,
                base: (version - 1).saturating_sub(u64::from(site == 2)),
                steps: 1,
                tokens: 1,
                weight: 1.0 + site as f64 / 3.0,
                norm: 1.0,
                trust: 0.0,
                quality: 0.0,
                ranges: Ranges::new(),
            }
        };
        let contributions = [contribution(0), contribution(1), contribution(2)];
        let (merge, guard) = (Averaging::Radial, Guard { robust: Robust::Guard, weight_max: 0.5, usual: None });
        let recipe = Recipe { merge, rule: OuterRule::Auto { momentum: 0.3 }, codec: down, share: 0.75, guard };
        let find = |name| {
            let bytes: &Vec<u8> = payloads.get(&name)?;
            let look = || Squares::of(&Payload::check(bytes, count, &Alone).unwrap(), &Alone);
            Some(Found { bytes: bytes.clone(), squares: if is_seen { look() } else { Squares::default() } })
        };
        global.perform(FragmentId(0), version, &contributions, &recipe, &find, &Alone).unwrap();
    }
    global.digests()[0]
}

#[test]
fn the_model_is_the_same_bits_everywhere() {
    let digests: Vec<String> = Codec::ALL
        .into_iter()
        .map(|up| Digest::of_all(&[Codec::F32, Codec::Sparse(224)].map(|down| model_after(up, down, 32))).short())
        .collect();
    assert_eq!(
        digests,
        ["32e666d7d2", "ccb1d1d9b8", "1462cf3a6e", "a11a489981", "6017ce4660", "b4316ade4c", "5d34ee40c7"]
    );
    let thin = [32, 3].map(|rows| model_after(Codec::Tcq(1), Codec::Tcq(2), rows).short());
    assert_eq!(thin, ["5ce372d47c", "553dc2fb53"]);
}
