//! The twin of [`avx512`](super::avx512) in safe code, compiled for the widest vectors that the processor
//! has: AVX2, NEON, or none. Products of `bf16` are exact in `f32`, so only sums round, and the
//! twins differ by that and by denormals, which `VDPBF16PS` takes for 0.
//!
//! Vectors are named, not left to the compiler: sums in plain arrays were kept in memory, at a fifteenth of the speed.

use pulp::{Arch, Simd, WithSimd};

use super::{COLUMNS, ROWS, Strip, Write};

/// Rows of a block.
const HEIGHT: usize = 4;
/// Vectors of a block's row: all its sums, a row of the right operand and a word of the left one fit into 16 registers.
const WIDTH: usize = 2;

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
    fn with_simd<S: Simd>(self, simd: S) {
        self.0.check();
        for row in (0..self.0.rows).step_by(HEIGHT) {
            for column in (0..self.0.columns).step_by(WIDTH * S::F32_LANES) {
                let sums = if BF16 {
                    block(simd, self.0, row, column, bf16_products)
                } else {
                    block(simd, self.0, row, column, f32_product)
                };
                store::<S>(self.0, row, column, &sums);
            }
        }
    }
}

/// Adds the product of two words that are `f32`; without vectors a fused one would be a function call.
#[inline(always)]
fn f32_product<S: Simd>(simd: S, sum: S::f32s, left: S::u32s, right: S::u32s) -> S::f32s {
    simd.mul_add_e_f32s(simd.transmute_f32s_u32s(left), simd.transmute_f32s_u32s(right), sum)
}

/// Adds the products of two words that are pairs of `bf16`, summed first.
#[inline(always)]
fn bf16_products<S: Simd>(simd: S, sum: S::f32s, left: S::u32s, right: S::u32s) -> S::f32s {
    let low = |word| simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(word, simd.splat_u32s(16)));
    let high = |word| simd.transmute_f32s_u32s(simd.and_u32s(word, simd.splat_u32s(0xFFFF_0000)));
    let upper = simd.mul_f32s(high(left), high(right));
    simd.add_f32s(sum, simd.mul_add_e_f32s(low(left), low(right), upper))
}

/// The sums of the block of the strip at `row` and `column`.
#[inline(always)]
fn block<S: Simd>(
    simd: S,
    strip: &Strip<'_>,
    row: usize,
    column: usize,
    multiply_add: impl Fn(S, S::f32s, S::u32s, S::u32s) -> S::f32s,
) -> [[S::f32s; WIDTH]; HEIGHT] {
    let rows = HEIGHT.min(strip.rows - row);
    let mut sums = [[simd.splat_f32s(0.0); WIDTH]; HEIGHT];
    // Rows beyond the strip repeat the last one, so that the loop below has a fixed length.
    let starts: [usize; HEIGHT] = std::array::from_fn(|index| {
        let row = row + index.min(rows - 1);
        row / ROWS * strip.left_panel + row % ROWS * strip.left_row
    });
    for group in 0..strip.depth.groups {
        let left = starts.map(|start| &strip.left[group * strip.left_group + start..]);
        let right = &strip.right[group * strip.right_group..][..strip.depth.steps * COLUMNS];
        for (step, right) in right.as_chunks::<COLUMNS>().0.iter().enumerate() {
            let right: [S::u32s; WIDTH] = std::array::from_fn(|vector| {
                let lanes = &right[column + vector * S::U32_LANES..][..S::U32_LANES];
                bytemuck::pod_read_unaligned(bytemuck::cast_slice(lanes))
            });
            for (sums, left) in sums.iter_mut().zip(left) {
                let left = simd.splat_u32s(left[step * strip.left_step]);
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = multiply_add(simd, *sum, left, right);
                }
            }
        }
    }
    sums
}

/// Writes a block's sums, or adds them; those beyond the strip are left out.
#[inline(always)]
fn store<S: Simd>(strip: &mut Strip<'_>, row: usize, column: usize, sums: &[[S::f32s; WIDTH]; HEIGHT]) {
    let rows = HEIGHT.min(strip.rows - row);
    for (index, sums) in sums[..rows].iter().enumerate() {
        let out = &mut strip.out[(row + index) * strip.out_stride..][..strip.columns][column..];
        let sums: &[f32] = bytemuck::cast_slice(sums);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if strip.write == Write::Add { *out + sum } else { *sum };
        }
    }
}
