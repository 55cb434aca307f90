//! How operands of matrix products lie in memory: as 32-bit words, each one `f32` or a pair of
//! neighbouring `bf16`. Depth (what a product sums over) is counted in words, so everything above the
//! innermost kernel is the same code in both precisions.

#[cfg(target_endian = "big")]
compile_error!("the first of two bf16 lies in the lower half of a word, which must come first in memory");

use bytemuck::{Pod, Zeroable};

use crate::math::simd;

/// What operands of matrix products are rounded to. Sums, weights, moments and the residual stream are
/// `f32` in both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// The upper half of an `f32`, rounded to nearest even; twice as fast where the processor multiplies it.
    Bf16,
}

impl Precision {
    /// The faster one on this processor: `bf16` where it has instructions for it.
    pub fn best() -> Self {
        if crate::gemm::multiplies_bf16() { Self::Bf16 } else { Self::F32 }
    }

    /// Elements in a word.
    pub(crate) const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Words that hold `len` elements.
    pub(crate) const fn words(self, len: usize) -> usize {
        len.div_ceil(self.per_word())
    }

    /// Writes a row; an odd last half is 0.
    #[inline(always)]
    pub(crate) fn encode(self, row: &[f32], words: &mut [u32]) {
        debug_assert_eq!(words.len(), self.words(row.len()));
        match self {
            Self::F32 => words.iter_mut().zip(row).for_each(|(word, x)| *word = x.to_bits()),
            Self::Bf16 => {
                let halves: &mut [u16] = bytemuck::cast_slice_mut(words);
                let (halves, odd) = halves.split_at_mut(row.len());
                halves.iter_mut().zip(row).for_each(|(half, &x)| *half = (rounded(x) >> 16) as u16);
                odd.fill(0);
            }
        }
    }

    /// Reads a row back.
    #[inline(always)]
    pub(crate) fn decode(self, words: &[u32], row: &mut [f32]) {
        debug_assert_eq!(words.len(), self.words(row.len()));
        match self {
            Self::F32 => row.iter_mut().zip(words).for_each(|(x, word)| *x = f32::from_bits(*word)),
            Self::Bf16 => {
                let halves: &[u16] = bytemuck::cast_slice(words);
                row.iter_mut().zip(halves).for_each(|(x, &half)| *x = f32::from_bits(u32::from(half) << 16));
            }
        }
    }

    /// Encodes rows of `width` elements.
    pub(crate) fn encode_rows(self, rows: &[f32], width: usize, words: &mut [u32]) {
        simd(
            #[inline(always)]
            || {
                for (row, words) in rows.chunks(width).zip(words.chunks_mut(self.words(width))) {
                    self.encode(row, words);
                }
            },
        );
    }

    /// Decodes rows of `width` elements.
    pub(crate) fn decode_rows(self, words: &[u32], width: usize, rows: &mut [f32]) {
        simd(
            #[inline(always)]
            || {
                for (row, words) in rows.chunks_mut(width).zip(words.chunks(self.words(width))) {
                    self.decode(words, row);
                }
            },
        );
    }
}

/// Two numbers as `bf16`, the first in the lower half.
#[inline(always)]
pub(crate) fn pair(low: f32, high: f32) -> u32 {
    rounded(low) >> 16 | rounded(high) & 0xFFFF_0000
}

/// The two numbers of a word.
#[cfg(test)]
#[inline(always)]
pub(crate) fn halves(word: u32) -> [f32; 2] {
    [f32::from_bits(word << 16), f32::from_bits(word & 0xFFFF_0000)]
}

/// The bits of x, of which the upper half is x as `bf16`.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { nearest }
}

/// A cache line of words.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Line([u32; 16]);

/// Words that begin at a cache line.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

impl Buffer {
    /// As many words as that; what they hold is unspecified. Memory is kept.
    pub(crate) fn resize(&mut self, len: usize) {
        if self.lines.len() < len.div_ceil(16) {
            self.lines.resize(len.div_ceil(16), Line([0; 16]));
        }
        self.len = len;
    }

    /// The words.
    pub(crate) fn words(&self) -> &[u32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    /// The words, to be written.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even_and_keeps_what_is_not_a_number() {
        let through = |x: f32| halves(pair(x, x));
        for (x, expected) in [(1.0, 1.0), (1.003_906_3, 1.0), (1.011_718_8, 1.015_625), (-3e38, -3.004_055_3e38)] {
            assert_eq!(through(x), [expected; 2], "{x}");
        }
        assert_eq!(through(f32::INFINITY), [f32::INFINITY; 2]);
        let nans = [f32::NAN, f32::from_bits(0x7FFF_FFFF), f32::from_bits(0xFF80_0001)];
        assert!(nans.into_iter().all(|nan| through(nan)[0].is_nan() && through(nan)[1].is_nan()));
    }

    #[test]
    fn rows_of_every_length_come_back() {
        for len in 0..40 {
            let row: Vec<f32> = (0..len).map(|x| x as f32 - 7.0).collect();
            for precision in [Precision::F32, Precision::Bf16] {
                let (mut words, mut back) = (vec![u32::MAX; precision.words(len)], vec![f32::NAN; len]);
                precision.encode(&row, &mut words);
                precision.decode(&words, &mut back);
                assert_eq!(back, row);
            }
        }
    }
}
