//! The kernel for processors with AVX-512, in `f32` and, with its BF16 extension, in `bf16`. A tile is
//! [`ROWS`] rows of two registers; a word of the left operand is broadcast, two registers of the right
//! operand are loaded, and each pair meets in one instruction.
//!
//! Intel, *Instruction Set Extensions Programming Reference*: `VFMADD231PS`, `VDPBF16PS`.
#![allow(unsafe_code)]

use super::Kernel;

/// The kernel in `f32`, if this processor has AVX-512.
#[cfg(target_arch = "x86_64")]
pub(super) fn f32() -> Option<Kernel> {
    is_x86_feature_detected!("avx512f").then_some(x86::f32 as Kernel)
}

/// The kernel in `bf16`, if this processor has the extension.
#[cfg(target_arch = "x86_64")]
pub(super) fn bf16() -> Option<Kernel> {
    (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")).then_some(x86::bf16 as Kernel)
}

/// Other processors have none.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn f32() -> Option<Kernel> {
    None
}

/// Other processors have none.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn bf16() -> Option<Kernel> {
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_loadu_si512,
        _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
    };

    use crate::gemm::{COLUMNS, ROWS, Tile, Write};

    /// Columns of a register.
    const LANES: usize = 16;

    /// Only handed out where the processor has AVX-512.
    pub(super) fn f32(tile: &mut Tile<'_>) {
        tile.check();
        // SAFETY: the processor was asked, and `check` found every element inside its slice.
        unsafe { run_f32(tile) }
    }

    /// Only handed out where the processor has AVX-512 and its BF16 extension.
    pub(super) fn bf16(tile: &mut Tile<'_>) {
        tile.check();
        // SAFETY: the processor was asked, and `check` found every element inside its slice.
        unsafe { run_bf16(tile) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn run_f32(tile: &mut Tile<'_>) {
        // SAFETY: that of this function.
        unsafe { rows(tile, |sum, left, right| _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum)) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn run_bf16(tile: &mut Tile<'_>) {
        // SAFETY: that of this function; both vector types are 512 bits without invalid values.
        unsafe { rows(tile, |sum, left, right| _mm512_dpbf16_ps(sum, std::mem::transmute(left), std::mem::transmute(right))) }
    }

    /// Computes a tile as panels of 8, 4, 2 and 1 rows.
    ///
    /// # Safety
    /// The processor must have AVX-512 and what `multiply_add` asks for; the tile must be checked.
    #[inline(always)]
    unsafe fn rows(tile: &mut Tile<'_>, multiply_add: impl Fn(__m512, __m512i, __m512i) -> __m512 + Copy) {
        let mut first = 0;
        while first < tile.rows {
            // SAFETY: first + count ≤ tile.rows in every arm.
            unsafe {
                first += match tile.rows - first {
                    ROWS.. => panel::<8>(tile, first, multiply_add),
                    4.. => panel::<4>(tile, first, multiply_add),
                    2.. => panel::<2>(tile, first, multiply_add),
                    _ => panel::<1>(tile, first, multiply_add),
                };
            }
        }
    }

    /// Computes `COUNT` rows of a tile from row `first` on; returns `COUNT`.
    ///
    /// # Safety
    /// That of [`rows`], and `first + COUNT <= tile.rows`.
    #[inline(always)]
    unsafe fn panel<const COUNT: usize>(
        tile: &mut Tile<'_>,
        first: usize,
        multiply_add: impl Fn(__m512, __m512i, __m512i) -> __m512,
    ) -> usize {
        // SAFETY: `Tile::check` holds for all rows, so every pointer stays inside its slice; columns
        // beyond the tile are masked.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; COUNT];
            for group in 0..tile.depth.groups {
                let mut left = tile.left.as_ptr().add(first * tile.left_row + group * tile.left_group);
                let mut right = tile.right.as_ptr().add(group * tile.right_group);
                for _ in 0..tile.depth.steps {
                    let mut columns = [_mm512_setzero_si512(); 2];
                    columns[0] = _mm512_loadu_si512(right.cast());
                    columns[1] = _mm512_loadu_si512(right.add(LANES).cast());
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let word = _mm512_set1_epi32(left.add(row * tile.left_row).read() as i32);
                        sums[0] = multiply_add(sums[0], word, columns[0]);
                        sums[1] = multiply_add(sums[1], word, columns[1]);
                    }
                    left = left.wrapping_add(tile.left_step);
                    right = right.add(COLUMNS);
                }
            }
            let masks = [mask(tile.columns), mask(tile.columns.saturating_sub(LANES))];
            for (row, sums) in sums.iter().enumerate() {
                let out = tile.out.as_mut_ptr().add((first + row) * tile.out_stride);
                for (half, (&sum, &mask)) in sums.iter().zip(&masks).enumerate() {
                    let out = out.wrapping_add(half * LANES);
                    let sum = match tile.write {
                        Write::Set => sum,
                        Write::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sum),
                    };
                    _mm512_mask_storeu_ps(out, mask, sum);
                }
            }
        }
        COUNT
    }

    /// The first `columns` lanes.
    fn mask(columns: usize) -> u16 {
        if columns >= LANES { u16::MAX } else { (1 << columns) - 1 }
    }
}
