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
        __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_castsi512_ps, _mm512_dpbf16_ps,
        _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32,
        _mm512_setzero_ps,
    };

    use std::mem::transmute;

    use crate::gemm::{COLUMNS, ROWS, Strip, Write};

    /// Columns of a register.
    const LANES: usize = 16;

    /// Only handed out where the processor has AVX-512.
    pub(super) fn f32(strip: &mut Strip<'_>) {
        strip.check();
        // SAFETY: the processor was asked, and `check` found every element inside its slice.
        unsafe { run_f32(strip) }
    }

    /// Only handed out where the processor has AVX-512 and its BF16 extension.
    pub(super) fn bf16(strip: &mut Strip<'_>) {
        strip.check();
        // SAFETY: the processor was asked, and `check` found every element inside its slice.
        unsafe { run_bf16(strip) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn run_f32(strip: &mut Strip<'_>) {
        // SAFETY: that of this function.
        unsafe {
            rows(strip, |sum, left, right| _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum));
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn run_bf16(strip: &mut Strip<'_>) {
        // SAFETY: that of this function; both vector types are 512 bits without invalid values.
        unsafe {
            rows(strip, |sum, left, right| {
                _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(left), transmute::<__m512i, __m512bh>(right))
            });
        }
    }

    /// Computes the tiles of a strip, the last one perhaps as 4, 2 and 1 rows.
    ///
    /// # Safety
    /// The processor must have AVX-512 and what `multiply_add` asks for; the strip must be checked.
    #[inline(always)]
    unsafe fn rows(strip: &mut Strip<'_>, multiply_add: impl Fn(__m512, __m512i, __m512i) -> __m512 + Copy) {
        let mut first = 0;
        while first < strip.rows {
            // SAFETY: first + count ≤ strip.rows in every arm, and no arm crosses the end of a panel.
            unsafe {
                first += match strip.rows - first {
                    ROWS.. => tile::<8>(strip, first, multiply_add),
                    4.. => tile::<4>(strip, first, multiply_add),
                    2.. => tile::<2>(strip, first, multiply_add),
                    _ => tile::<1>(strip, first, multiply_add),
                };
            }
        }
    }

    /// Computes `COUNT` rows from row `first` on; returns `COUNT`.
    ///
    /// # Safety
    /// That of [`rows`]; these rows must be of one panel and of the strip.
    #[inline(always)]
    unsafe fn tile<const COUNT: usize>(
        strip: &mut Strip<'_>,
        first: usize,
        multiply_add: impl Fn(__m512, __m512i, __m512i) -> __m512,
    ) -> usize {
        // SAFETY: `Strip::check` holds for all rows, so every pointer that is read or written stays inside its
        // slice; columns beyond the strip are masked. Prefetching may go anywhere.
        unsafe {
            let start = strip.left.as_ptr().add(first / ROWS * strip.left_panel + first % ROWS * strip.left_row);
            // Each tile fetches its share of the right operand that comes next.
            let share = strip.depth.steps * COLUMNS * first / strip.rows;
            let pace = COLUMNS * COUNT / strip.rows;
            let mut sums = [[_mm512_setzero_ps(); 2]; COUNT];
            for group in 0..strip.depth.groups {
                let mut left = start.add(group * strip.left_group);
                let mut right = strip.right.as_ptr().add(group * strip.right_group);
                let mut next = right.wrapping_add(strip.next).wrapping_add(share);
                for _ in 0..strip.depth.steps {
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    if COUNT < ROWS {
                        // Few rows pass over more than a cache line at a time.
                        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(LANES).cast());
                    }
                    let columns = [_mm512_loadu_si512(right.cast()), _mm512_loadu_si512(right.add(LANES).cast())];
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let word = _mm512_set1_epi32(left.add(row * strip.left_row).read() as i32);
                        sums[0] = multiply_add(sums[0], word, columns[0]);
                        sums[1] = multiply_add(sums[1], word, columns[1]);
                    }
                    left = left.wrapping_add(strip.left_step);
                    right = right.add(COLUMNS);
                    next = next.wrapping_add(pace);
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                let out = strip.out.as_mut_ptr().add((first + row) * strip.out_stride);
                store(out, sums, strip.columns, strip.write);
            }
        }
        COUNT
    }

    /// Writes `columns` sums of a row, or adds them.
    ///
    /// # Safety
    /// The processor must have AVX-512; `out` must be valid for that many elements.
    #[inline(always)]
    unsafe fn store(out: *mut f32, sums: &[__m512; 2], columns: usize, write: Write) {
        let masks = [mask(columns), mask(columns.saturating_sub(LANES))];
        for (half, (&sum, mask)) in sums.iter().zip(masks).enumerate() {
            let out = out.wrapping_add(half * LANES);
            // SAFETY: only the first `columns` elements are in the masks.
            unsafe {
                let sum = match write {
                    Write::Set => sum,
                    Write::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sum),
                };
                _mm512_mask_storeu_ps(out, mask, sum);
            }
        }
    }

    /// The first `columns` lanes.
    fn mask(columns: usize) -> u16 {
        if columns >= LANES { u16::MAX } else { (1 << columns) - 1 }
    }
}
