//! A random rotation of a chunk of weights: some signs are flipped, then follows a Walsh–Hadamard transform. Whatever the
//! chunk was, it looks like independent normal numbers afterwards; QuIP# (arXiv 2402.04396) and EDEN (arXiv 2108.08842)
//! rest on the same.
//!
//! Which signs are flipped is another matter in each turn, so that a residual is looked at from another side.

use super::CHUNK;

/// Weights side by side in everything here.
const LANES: usize = 16;
/// Weights of the smallest chunk that can be rotated; others have twice as many, and so on up to [`CHUNK`].
pub(super) const SMALLEST: usize = 32 * LANES;
/// Neighbours whose places differ in the bits that two folds take.
const FOLDED: usize = 16;

/// Scatters the bits of a number (Wellons' `lowbias32`).
#[inline(always)]
fn mix(mut bits: u32) -> u32 {
    bits = (bits ^ bits >> 16).wrapping_mul(0x7feb_352d);
    bits = (bits ^ bits >> 15).wrapping_mul(0x846c_a68b);
    bits ^ bits >> 16
}

/// Flips the signs that belong to `turn`.
#[inline(always)]
fn flip(values: &mut [f32], turn: u8) {
    for (number, block) in values.as_chunks_mut::<{ SMALLEST }>().0.iter_mut().enumerate() {
        let mut signs = [0u32; LANES];
        for (lane, signs) in signs.iter_mut().enumerate() {
            *signs = mix((usize::from(turn) << 16 | number << 8 | lane) as u32 + 1);
        }
        for row in block.as_chunks_mut::<LANES>().0 {
            for lane in 0..LANES {
                row[lane] = f32::from_bits(row[lane].to_bits() ^ signs[lane] << 31);
                signs[lane] >>= 1;
            }
        }
    }
}

/// The orthonormal Walsh–Hadamard transform of what is flipped; in another order, which [`rotate_back`] knows: a fast
/// transform takes two bits of a place at a time, of which the highest become the lowest. Neighbours come of the bits in
/// the middle: if the lowest or highest did it, they would be the same but for their signs where a chunk has one great
/// row or column.
#[inline(always)]
pub(super) fn rotate(values: &mut [f32], turn: u8) {
    flip(values, turn);
    let (mut room, scale) = ([0.0; CHUNK], unit(values));
    let room = &mut room[..values.len()];
    unfold(values, room, scale);
    unfold(room, values, 1.0);
    middle(values);
    unfold(values, room, 1.0);
    unfold(room, values, 1.0);
}

#[inline(always)]
pub(super) fn rotate_back(values: &mut [f32], turn: u8) {
    let (mut room, scale) = ([0.0; CHUNK], unit(values));
    let room = &mut room[..values.len()];
    fold(values, room, scale);
    fold(room, values, 1.0);
    middle(values);
    fold(values, room, 1.0);
    fold(room, values, 1.0);
    flip(values, turn);
}

/// What keeps lengths.
#[inline(always)]
fn unit(values: &[f32]) -> f32 {
    1.0 / (values.len() as f32).sqrt()
}

/// The transform of four.
#[inline(always)]
fn four([a, b, c, d]: [f32; 4]) -> [f32; 4] {
    let (sum, difference, later_sum, later_difference) = (a + b, a - b, c + d, c - d);
    [sum + later_sum, difference + later_difference, sum - later_sum, difference - later_difference]
}

/// Transforms each four neighbours, which go to the four quarters of `to`: the two lowest bits of their place become the
/// highest.
#[inline(always)]
fn fold(from: &[f32], to: &mut [f32], scale: f32) {
    let (lower, upper) = to.split_at_mut(from.len() / 2);
    let ((a, b), (c, d)) = (lower.split_at_mut(from.len() / 4), upper.split_at_mut(from.len() / 4));
    for ((((values, a), b), c), d) in from.as_chunks().0.iter().zip(a).zip(b).zip(c).zip(d) {
        [*a, *b, *c, *d] = four(*values).map(|value| value * scale);
    }
}

/// Undoes [`fold`], but for the scale.
#[inline(always)]
fn unfold(from: &[f32], to: &mut [f32], scale: f32) {
    let (lower, upper) = from.split_at(from.len() / 2);
    let ((a, b), (c, d)) = (lower.split_at(from.len() / 4), upper.split_at(from.len() / 4));
    for ((((values, a), b), c), d) in to.as_chunks_mut().0.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        *values = four([*a, *b, *c, *d]).map(|value| value * scale);
    }
}

/// Transforms what is left to do between two folds and two more, each of four bits: the bits in the middle.
#[inline(always)]
fn middle(values: &mut [f32]) {
    let (mut step, end) = (FOLDED, values.len() / FOLDED);
    while 4 * step <= end {
        fours(values, step);
        step *= 4;
    }
    if step < end {
        butterflies(values, step);
    }
}

/// The transform of each four that are `step` apart.
#[inline(always)]
fn fours(values: &mut [f32], step: usize) {
    for quarters in values.chunks_exact_mut(4 * step) {
        let (lower, upper) = quarters.split_at_mut(2 * step);
        let ((a, b), (c, d)) = (lower.split_at_mut(step), upper.split_at_mut(step));
        for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
            [*a, *b, *c, *d] = four([*a, *b, *c, *d]);
        }
    }
}

/// Sums and differences of values that are `step` apart.
#[inline(always)]
fn butterflies(values: &mut [f32], step: usize) {
    for pair in values.chunks_exact_mut(2 * step) {
        let (lower, upper) = pair.split_at_mut(step);
        for (lower, upper) in lower.iter_mut().zip(upper) {
            (*lower, *upper) = (*lower + *upper, *lower - *upper);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::square;

    #[test]
    fn a_rotation_keeps_lengths_and_turns_back() {
        let mut rng = crate::rng::Rng::new(1);
        let before: [f32; CHUNK] = std::array::from_fn(|_| rng.normal() as f32);
        for len in [SMALLEST, 2 * SMALLEST, 4 * SMALLEST, CHUNK] {
            let (before, mut values) = (&before[..len], before[..len].to_vec());
            rotate(&mut values, 5);
            assert!((square(&values) / square(before) - 1.0).abs() < 1e-6);
            rotate_back(&mut values, 5);
            let far = values.iter().zip(before).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 1e-5, "{far}");
        }
    }
}
