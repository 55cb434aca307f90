//! The twin of [`avx512`](super::avx512) in safe code, compiled for the widest vectors that the processor
//! has: AVX2, NEON, or none. Products of `bf16` are exact in `f32`, so only sums round, and the twins
//! differ in no more than their order.

use pulp::{Arch, Simd, WithSimd};

use super::{COLUMNS, Tile, Write};
use crate::words::halves;

/// Rows and columns that stay in 16 registers of 8 lanes.
const BLOCK: (usize, usize) = (4, 16);

/// In `f32`.
pub(super) fn f32(tile: &mut Tile<'_>) {
    Arch::new().dispatch(Run::<'_, '_, false>(tile));
}

/// In `bf16`.
pub(super) fn bf16(tile: &mut Tile<'_>) {
    Arch::new().dispatch(Run::<'_, '_, true>(tile));
}

/// A tile to be computed.
pub(super) struct Run<'a, 'b, const BF16: bool>(pub(super) &'a mut Tile<'b>);

impl<const BF16: bool> WithSimd for Run<'_, '_, BF16> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.0.check();
        for row in (0..self.0.rows).step_by(BLOCK.0) {
            for column in (0..self.0.columns).step_by(BLOCK.1) {
                // Without vectors a fused multiply-add would be a function call.
                match (BF16, S::F32_LANES > 1) {
                    (false, true) => block(self.0, row, column, |word, right, sums| {
                        let x = f32::from_bits(word);
                        for (sum, &y) in sums.iter_mut().zip(right) {
                            *sum = x.mul_add(f32::from_bits(y), *sum);
                        }
                    }),
                    (false, false) => block(self.0, row, column, |word, right, sums| {
                        let x = f32::from_bits(word);
                        for (sum, &y) in sums.iter_mut().zip(right) {
                            *sum += x * f32::from_bits(y);
                        }
                    }),
                    (true, _) => block(self.0, row, column, |word, right, sums| {
                        let [low, high] = halves(word);
                        for (sum, &pair) in sums.iter_mut().zip(right) {
                            let [right_low, right_high] = halves(pair);
                            *sum += low * right_low + high * right_high;
                        }
                    }),
                }
            }
        }
    }
}

/// Computes a block of the tile at `row` and `column`.
#[inline(always)]
fn block(
    tile: &mut Tile<'_>,
    row: usize,
    column: usize,
    multiply_add: impl Fn(u32, &[u32; BLOCK.1], &mut [f32; BLOCK.1]),
) {
    let rows = BLOCK.0.min(tile.rows - row);
    let mut sums = [[0.0f32; BLOCK.1]; BLOCK.0];
    // Rows beyond the tile repeat the last one, so that the loop below has a fixed length.
    let starts: [usize; BLOCK.0] = std::array::from_fn(|index| (row + index.min(rows - 1)) * tile.left_row);
    for group in 0..tile.depth.groups {
        let left = &tile.left[group * tile.left_group..];
        let right = &tile.right[group * tile.right_group..][..tile.depth.steps * COLUMNS];
        for (step, right) in right.as_chunks::<COLUMNS>().0.iter().enumerate() {
            let right: &[u32; BLOCK.1] = right[column..].first_chunk().expect("a block divides the columns");
            for (sums, start) in sums.iter_mut().zip(starts) {
                multiply_add(left[start + step * tile.left_step], right, sums);
            }
        }
    }
    for (index, sums) in sums[..rows].iter().enumerate() {
        let out = &mut tile.out[(row + index) * tile.out_stride..][..tile.columns][column..];
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if tile.write == Write::Add { *out + sum } else { *sum };
        }
    }
}
