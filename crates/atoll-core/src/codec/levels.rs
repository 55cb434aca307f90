//! Two bits for each of some weights of a chunk: small or large, negative or positive.
//!
//! The border between small and large follows Lloyd's iteration; a level is the mean of the weights that it stands for,
//! so what is lost is never longer than what there was.

use half::bf16;

use super::dense::saturate;

const LEVELS: usize = 4;
/// Bytes of the levels.
pub(super) const LEVEL_BYTES: usize = 2 * LEVELS;
/// Mean, then border, so often.
const LLOYD: usize = 3;

/// Bytes of so many codes.
pub(super) fn code_bytes(count: usize) -> usize {
    (2 * count).div_ceil(8)
}

/// Writes levels and codes of the weights at `places` into zeros.
#[inline(always)]
pub(super) fn write(
    values: &[f32],
    places: impl ExactSizeIterator<Item = usize> + Clone,
    levels: &mut [u8],
    codes: &mut [u8],
) {
    let border = border(values, places.clone());
    let (mut sums, mut counts) = ([0f64; LEVELS], [0u32; LEVELS]);
    for (rank, place) in places.enumerate() {
        let value = values[place];
        let code = usize::from(value.abs() >= border) | usize::from(value < 0.0) << 1;
        (sums[code], counts[code]) = (sums[code] + f64::from(value), counts[code] + 1);
        codes[rank / 4] |= (code as u8) << (2 * (rank % 4));
    }
    for (bytes, (sum, count)) in levels.chunks_exact_mut(2).zip(sums.iter().zip(counts)) {
        let mean = if count > 0 { (sum / f64::from(count)) as f32 } else { 0.0 };
        bytes.copy_from_slice(&saturate(mean).to_le_bytes());
    }
}

/// The magnitude from which on a weight is large.
#[inline(always)]
fn border(values: &[f32], places: impl ExactSizeIterator<Item = usize> + Clone) -> f32 {
    let magnitudes = || places.clone().map(|place| f64::from(values[place].abs()));
    let mut border = magnitudes().sum::<f64>() / places.len().max(1) as f64;
    for _ in 0..LLOYD {
        let (mut sums, mut counts) = ([0f64; 2], [0u32; 2]);
        for magnitude in magnitudes() {
            let large = usize::from(magnitude >= border);
            (sums[large], counts[large]) = (sums[large] + magnitude, counts[large] + 1);
        }
        if counts.contains(&0) {
            break;
        }
        border = 0.5 * (sums[0] / f64::from(counts[0]) + sums[1] / f64::from(counts[1]));
    }
    border as f32
}

/// Levels as they are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table([f32; LEVELS]);

impl Table {
    /// From their bytes.
    #[inline(always)]
    pub(super) fn read(levels: &[u8]) -> Self {
        Self(std::array::from_fn(|code| bf16::from_le_bytes([levels[2 * code], levels[2 * code + 1]]).to_f32()))
    }

    /// What code number `rank` says.
    #[inline(always)]
    pub(super) fn value(&self, codes: &[u8], rank: usize) -> f32 {
        self.0[usize::from(codes[rank / 4] >> (2 * (rank % 4)) & 3)]
    }

    pub(super) fn is_finite(&self) -> bool {
        self.0.iter().all(|level| level.is_finite())
    }

    /// Squared length of what the first `count` codes say, from how often each level occurs. Levels have eight
    /// significant bits: such sums lose nothing, in whatever order, unless levels are some 2¹⁰ apart.
    pub(super) fn square(&self, codes: &[u8], count: usize) -> f64 {
        const LOWER: u64 = 0x5555_5555_5555_5555;
        let mut counts = [0u32; LEVELS];
        let mut left = count;
        for bytes in codes.chunks(8) {
            let here = left.min(32);
            let word = bytes.iter().rev().fold(0u64, |word, &byte| word << 8 | u64::from(byte));
            // What stands behind the last code means nothing.
            let mask = LOWER & if here == 0 { 0 } else { u64::MAX >> (64 - 2 * here) };
            let (large, negative) = (word & mask, word >> 1 & mask);
            counts[3] += (large & negative).count_ones();
            counts[2] += (negative & !large).count_ones();
            counts[1] += (large & !negative).count_ones();
            counts[0] += (mask & !large & !negative).count_ones();
            left -= here;
        }
        let squares = self.0.map(|level| f64::from(level) * f64::from(level));
        squares.iter().zip(counts).map(|(square, count)| square * f64::from(count)).sum()
    }
}
