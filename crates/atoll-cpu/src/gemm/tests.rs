//! Every kernel on every odd shape, against the definition in `f64`.

use atoll_core::rng::Rng;
use proptest::prelude::*;

use super::panels::{LeftGroups, Panels, RightGroups, Stack, TOKENS, fill};
use super::*;
use crate::pool::Pool;
use crate::words::halves;

/// The portable kernel as compiled for some instruction set.
fn portable_for<const BF16: bool>(strip: &mut Strip<'_>, vectorize: impl FnOnce(portable::Run<'_, '_, BF16>)) {
    vectorize(portable::Run(strip));
}

/// All kernels that this processor can run, with their names.
fn kernels(precision: Precision) -> Vec<(&'static str, Kernel)> {
    let mut kernels: Vec<(&str, Option<Kernel>)> = match precision {
        Precision::F32 => vec![("avx512", avx512::f32()), ("portable", Some(portable::f32))],
        Precision::Bf16 => vec![("avx512", avx512::bf16()), ("portable", Some(portable::bf16))],
    };
    fn plain<const BF16: bool>(strip: &mut Strip<'_>) {
        portable_for::<BF16>(strip, |run| pulp::Simd::vectorize(pulp::Scalar::new(), run));
    }
    kernels.push(("plain", Some(if precision == Precision::F32 { plain::<false> } else { plain::<true> })));
    #[cfg(target_arch = "x86_64")]
    {
        fn avx2<const BF16: bool>(strip: &mut Strip<'_>) {
            let v3 = pulp::x86::V3::try_new().expect("asked before");
            portable_for::<BF16>(strip, |run| pulp::Simd::vectorize(v3, run));
        }
        let kernel: Kernel = if precision == Precision::F32 { avx2::<false> } else { avx2::<true> };
        kernels.push(("avx2", pulp::x86::V3::try_new().map(|_| kernel)));
    }
    kernels.into_iter().filter_map(|(name, kernel)| kernel.map(|kernel| (name, kernel))).collect()
}

/// A matrix `(rows, width)` of numbers that are what they are in either precision.
fn matrix(rng: &mut Rng, rows: usize, width: usize) -> Vec<f32> {
    (0..rows * width).map(|_| halves((rng.normal() as f32).to_bits())[1]).collect()
}

/// The definition: (m,n) from a `(m,k)` and b `(k,n)`.
fn expected(a: &[f32], b: &[f32], n: usize, k: usize) -> Vec<f64> {
    let element = |row: &[f32], column: usize| (0..k).map(|l| f64::from(row[l]) * f64::from(b[l * n + column])).sum();
    a.chunks(k).flat_map(|row| (0..n).map(move |column| element(row, column))).collect()
}

fn assert_close(ours: &[f32], definition: &[f64], sign: f64, what: &str) {
    for (index, (&ours, definition)) in ours.iter().zip(definition).enumerate() {
        let apart = (f64::from(ours) - sign * definition).abs();
        assert!(apart < 1e-3, "{what}: element {index} is {ours}, not {definition}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// y = x Wᵀ and dx = dy W, set and added, into some columns of a wider result.
    #[test]
    fn products_with_packed_weights_are_those_of_the_definition(
        (m, n, k) in (1usize..40, 1usize..140, 1usize..700), seed: u64, split in 0.0..1.0,
    ) {
        let (mut rng, pool) = (Rng::new(seed), Pool::new(1));
        let (a, b) = (matrix(&mut rng, m, k), matrix(&mut rng, k, n));
        let b_t: Vec<f32> = (0..n * k).map(|index| b[index % k * n + index / k]).collect();
        let definition = expected(&a, &b, n, k);
        for precision in [Precision::F32, Precision::Bf16] {
            let (row, stride) = ((split * k as f64) as usize, precision.words(k));
            let mut words = vec![0; m * stride];
            precision.encode_rows(&a, k, &mut words);
            let (upper, lower) = b.split_at(row * n);
            let (mut plain, mut transposed) = (Panels::default(), Panels::default());
            plain.pack(&pool, precision, Stack { parts: &[upper, lower], width: n });
            transposed.pack_transposed(&pool, precision, Stack { parts: &[&b_t], width: k });
            for (name, kernel) in kernels(precision) {
                let mut wide = vec![f32::NAN; m * (n + 3)];
                for (panels, write) in [(&plain, Write::Set), (&transposed, Write::Add)] {
                    let out = Out { data: &mut wide[2..], stride: n + 3 };
                    product_by(kernel, out, write, Left::rows(&words, m, stride), panels.right(), panels.depth());
                }
                prop_assert!(wide[0].is_nan() && wide[1].is_nan() && wide[n + 2].is_nan(), "{} wrote beside", name);
                let ours: Vec<f32> = wide.chunks(n + 3).flat_map(|row| &row[2..n + 2]).copied().collect();
                assert_close(&ours, &definition, 2.0, name);
            }
        }
    }

    /// dW = dyᵀ x, summed over tokens that do not fill their groups.
    #[test]
    fn products_over_tokens_are_those_of_the_definition(
        (tokens, m, n) in (1usize..300, 1usize..40, 1usize..80), seed: u64,
    ) {
        let mut rng = Rng::new(seed);
        let (dy, x) = (matrix(&mut rng, tokens, m), matrix(&mut rng, tokens, n));
        let dy_t: Vec<f32> = (0..m * tokens).map(|index| dy[index % tokens * m + index / tokens]).collect();
        let definition = expected(&dy_t, &x, n, tokens);
        for precision in [Precision::F32, Precision::Bf16] {
            let (mut left, mut right) = (LeftGroups::default(), RightGroups::default());
            left.resize(precision, tokens, &[m]);
            right.resize(precision, tokens, &[n]);
            for (group, rows) in left.groups_mut().zip(dy.chunks(TOKENS * m)) {
                fill::<ROWS>(precision, rows, m, 0..m, group);
            }
            for (group, rows) in right.groups_mut().zip(x.chunks(TOKENS * n)) {
                fill::<COLUMNS>(precision, rows, n, 0..n, group);
            }
            for (name, kernel) in kernels(precision) {
                let mut ours = vec![f32::NAN; m * n];
                let out = Out { data: &mut ours, stride: n };
                product_by(kernel, out, Write::Set, left.left(0, m), right.right(n), left.depth(tokens));
                assert_close(&ours, &definition, 1.0, name);
            }
        }
    }
}

/// The kernels that other processors run are tested here as well.
#[test]
fn this_processor_tests_more_than_one_kernel() {
    assert!(kernels(Precision::F32).len() >= 2 && kernels(Precision::Bf16).len() >= 2);
}

#[test]
#[should_panic(expected = "left operand inside its slice")]
fn a_left_operand_that_is_too_short_is_refused() {
    let (mut out, right) = ([0.0; 64], [0; 64]);
    let right = Right { words: &right, columns: 32, panel: 64, group: 0 };
    let out = Out { data: &mut out, stride: 32 };
    product(Precision::F32, out, Write::Set, Left::rows(&[0; 3], 2, 2), right, Depth { groups: 1, steps: 2 });
}
