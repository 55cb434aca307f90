//! The twin of [`avx512`](super::avx512) in safe code, compiled for the widest vectors that the processor
//! has: AVX2, NEON, or none. Products of `bf16` are exact in `f32`, so only sums round, and the
//! twins differ by that and by denormals, which `VDPBF16PS` takes for 0.

use pulp::{Arch, Simd, WithSimd};

use super::{COLUMNS, ROWS, Strip, Write};
use crate::words::halves;

/// Rows and columns that stay in 16 registers of 8 lanes.
const BLOCK: (usize, usize) = (4, 16);

/// In `f32`.
pub(super) fn f32(strip: &mut Strip<'_>) {
    Arch::new().dispatch(Run::<'_, '_, false>(strip));
}

/// In `bf16`.
pub(super) fn bf16(strip: &mut Strip<'_>) {
    Arch::new().dispatch(Run::<'_, '_, true>(strip));
}

/// A strip to be computed.
pub(super) struct Run<'a, 'b, const BF16: bool>(pub(super) &'a mut Strip<'b>);

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

/// Computes a block of the strip at `row` and `column`.
#[inline(always)]
fn block(
    strip: &mut Strip<'_>,
    row: usize,
    column: usize,
    multiply_add: impl Fn(u32, &[u32; BLOCK.1], &mut [f32; BLOCK.1]),
) {
    let rows = BLOCK.0.min(strip.rows - row);
    let mut sums = [[0.0f32; BLOCK.1]; BLOCK.0];
    // Rows beyond the strip repeat the last one, so that the loop below has a fixed length.
    let starts: [usize; BLOCK.0] = std::array::from_fn(|index| {
        let row = row + index.min(rows - 1);
        row / ROWS * strip.left_panel + row % ROWS * strip.left_row
    });
    for group in 0..strip.depth.groups {
        let left = &strip.left[group * strip.left_group..];
        let right = &strip.right[group * strip.right_group..][..strip.depth.steps * COLUMNS];
        for (step, right) in right.as_chunks::<COLUMNS>().0.iter().enumerate() {
            let right: &[u32; BLOCK.1] = right[column..].first_chunk().expect("a block divides the columns");
            for (sums, start) in sums.iter_mut().zip(starts) {
                multiply_add(left[start + step * strip.left_step], right, sums);
            }
        }
    }
    for (index, sums) in sums[..rows].iter().enumerate() {
        let out = &mut strip.out[(row + index) * strip.out_stride..][..strip.columns][column..];
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if strip.write == Write::Add { *out + sum } else { *sum };
        }
    }
}
