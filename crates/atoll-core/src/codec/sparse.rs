//! The sparse codec's chunks: which weights are kept, where they are, and what they become.
//!
//! A chunk of n weights keeps the k of greatest magnitude; equal ones in order of their index. Positions are an
//! Elias–Fano list (Elias 1974): with l = ⌊log₂ n/k⌋ of a whole chunk the lower l bits of each position stand side by side, and the
//! upper bits as a bitmap in which the i-th one stands at bit `upper + i`. That costs at most l + 2 bits a position
//! (7.3 of 96 in 4,096, where plain 12-bit positions would take 12 and the entropy is 6.9) and always the same.
//! Kept weights become one of four levels: small or large, negative or positive. The border between small and large
//! follows Lloyd's iteration; a level is the mean of the weights that it stands for, so what is lost is never longer
//! than what there was.

use super::dense::{saturate, widen};

/// Weights in a chunk.
pub(crate) const CHUNK: usize = 4096;
const LEVELS: usize = 4;
/// Mean, then border, so often.
const LLOYD: usize = 3;

/// Sizes of the parts of a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    len: usize,
    kept: usize,
    low_bits: usize,
    lows: usize,
    highs: usize,
    codes: usize,
}

impl Shape {
    /// A chunk of `len` weights of which [`CHUNK`] would keep `keep`. A shorter one has no more bytes in any part.
    pub(super) fn new(keep: u16, len: usize) -> Self {
        let kept = (usize::from(keep) * len).div_ceil(CHUNK).clamp(1, len.max(1));
        let low_bits = (CHUNK / usize::from(keep).max(1)).max(1).ilog2() as usize;
        let highs = kept + (len.saturating_sub(1) >> low_bits) + 1;
        Self {
            len,
            kept,
            low_bits,
            lows: (kept * low_bits).div_ceil(8),
            highs: highs.div_ceil(8),
            codes: (2 * kept).div_ceil(8),
        }
    }

    /// Weights that are kept.
    pub(super) fn kept(&self) -> usize {
        self.kept
    }

    /// Bytes of the chunk.
    pub(super) fn bytes(&self) -> usize {
        2 * LEVELS + self.codes + self.lows + self.highs
    }
}

/// Writes the chunk of finite `values` into `out`, which has [`Shape::bytes`] zeros.
#[inline(always)]
pub(super) fn encode(shape: Shape, values: &[f32], out: &mut [u8]) {
    let mut places = [0u16; CHUNK];
    let places = &mut places[..shape.kept];
    choose(values, places);
    let border = border(values, places);
    let (levels, rest) = out.split_at_mut(2 * LEVELS);
    let (codes, rest) = rest.split_at_mut(shape.codes);
    let (lows, highs) = rest.split_at_mut(shape.lows);
    let (mut sums, mut counts) = ([0f64; LEVELS], [0u32; LEVELS]);
    for (rank, &place) in places.iter().enumerate() {
        let value = values[usize::from(place)];
        let code = usize::from(value.abs() >= border) | usize::from(value < 0.0) << 1;
        (sums[code], counts[code]) = (sums[code] + f64::from(value), counts[code] + 1);
        codes[rank / 4] |= (code as u8) << (2 * (rank % 4));
        put(lows, rank * shape.low_bits, usize::from(place) & ((1 << shape.low_bits) - 1));
        let bit = (usize::from(place) >> shape.low_bits) + rank;
        highs[bit / 8] |= 1 << (bit % 8);
    }
    for (bytes, (sum, count)) in levels.chunks_exact_mut(2).zip(sums.iter().zip(counts)) {
        let mean = if count > 0 { (sum / f64::from(count)) as f32 } else { 0.0 };
        bytes.copy_from_slice(&saturate(mean).to_le_bytes());
    }
}

/// Adds low bits of a number, which are fewer than 16, at bit `at`.
#[inline(always)]
fn put(bytes: &mut [u8], at: usize, number: usize) {
    let shifted = (number as u32) << (at % 8);
    for (byte, part) in bytes[at / 8..].iter_mut().zip(shifted.to_le_bytes()) {
        *byte |= part;
    }
}

/// Reads `bits` < 16 bits at bit `at`.
#[inline(always)]
fn get(bytes: &[u8], at: usize, bits: usize) -> usize {
    let window = word(bytes.get(at / 8..).unwrap_or(&[]));
    (window >> (at % 8)) as usize & ((1 << bits) - 1)
}

/// Positions of the greatest magnitudes, ascending. A magnitude's bits as a number order like the magnitude, so the
/// least one kept is found bit by bit, each time by counting: no branch depends on a weight. That is done on the upper
/// halves, of which a vector holds twice as many; the few that share the least upper half are then compared in full.
#[inline(always)]
fn choose(values: &[f32], places: &mut [u16]) {
    let mut halves = [0i16; CHUNK];
    let halves = &mut halves[..values.len()];
    for (half, value) in halves.iter_mut().zip(values) {
        *half = ((value.to_bits() & 0x7fff_ffff) >> 16) as i16;
    }
    let kept = places.len();
    let mut least = 0;
    for bit in (0..15).rev() {
        let candidate = least | 1 << bit;
        if count(halves, candidate) >= kept {
            least = candidate;
        }
    }
    let mut candidates = [0u16; CHUNK];
    let candidates = gather(halves, least, &mut candidates);
    let magnitude = |place: u16| values[usize::from(place)].to_bits() & 0x7fff_ffff;
    let mut cut = 0;
    if candidates.len() > kept {
        // How many of those in the least half are kept, and from which magnitude on.
        let mut doubtful = [0u32; CHUNK];
        let mut doubts = 0;
        for &place in candidates.iter().filter(|&&place| halves[usize::from(place)] == least) {
            doubtful[doubts] = magnitude(place);
            doubts += 1;
        }
        let sure = candidates.len() - doubts;
        let (_, nth, _) = doubtful[..doubts].select_nth_unstable_by(kept - sure - 1, |a, b| b.cmp(a));
        cut = *nth;
    }
    // Of those that are just as great as the least one, the first ones fill up.
    let greater = candidates.iter().filter(|&&place| magnitude(place) > cut).count();
    let mut ties = kept.saturating_sub(greater);
    let mut found = 0;
    for &place in candidates {
        let tie = magnitude(place) == cut && ties > 0;
        ties -= usize::from(tie);
        if magnitude(place) > cut || tie {
            places[found] = place;
            found += 1;
        }
    }
}

/// How many are at least `least`.
#[inline(always)]
fn count(halves: &[i16], least: i16) -> usize {
    // A chunk's count fits into 16 bits, which keeps all lanes of a vector busy.
    let mut count = 0i16;
    for &half in halves {
        count = count.wrapping_add(i16::from(half >= least));
    }
    count as usize
}

/// Positions of those that are at least `least`, ascending.
#[inline(always)]
fn gather<'p>(halves: &[i16], least: i16, places: &'p mut [u16; CHUNK]) -> &'p [u16] {
    const STRETCH: usize = 16;
    let mut found = 0;
    for (number, stretch) in halves.chunks(STRETCH).enumerate() {
        // Most stretches hold none, which a vector tells at once.
        if count(stretch, least) == 0 {
            continue;
        }
        for (index, &half) in stretch.iter().enumerate() {
            places[found] = (number * STRETCH + index) as u16;
            found += usize::from(half >= least);
        }
    }
    &places[..found]
}

/// The magnitude from which on a kept weight is large.
#[inline(always)]
fn border(values: &[f32], places: &[u16]) -> f32 {
    let magnitude = |place: &u16| f64::from(values[usize::from(*place)].abs());
    let mut border = places.iter().map(magnitude).sum::<f64>() / places.len() as f64;
    for _ in 0..LLOYD {
        let (mut sums, mut counts) = ([0f64; 2], [0u32; 2]);
        for magnitude in places.iter().map(magnitude) {
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

/// Shows each kept weight with its position, ascending; `None` if the chunk is malformed, perhaps after some were
/// shown.
#[inline(always)]
pub(super) fn visit(shape: Shape, bytes: &[u8], mut show: impl FnMut(usize, f32)) -> Option<()> {
    let (levels, rest) = bytes.split_at_checked(2 * LEVELS)?;
    let (codes, lows_and_highs) = rest.split_at_checked(shape.codes)?;
    let (_, highs) = lows_and_highs.split_at_checked(shape.lows)?;
    let table = table(levels);
    let (mut rank, mut next) = (0, 0);
    for (number, bytes) in highs.chunks(8).enumerate() {
        let mut word = word(bytes);
        while word != 0 {
            let bit = 64 * number + word.trailing_zeros() as usize;
            word &= word - 1;
            if rank == shape.kept {
                return None;
            }
            let place = (bit - rank) << shape.low_bits | get(lows_and_highs, rank * shape.low_bits, shape.low_bits);
            if place < next || place >= shape.len {
                return None;
            }
            show(place, table[usize::from(codes[rank / 4] >> (2 * (rank % 4)) & 3)]);
            (rank, next) = (rank + 1, place + 1);
        }
    }
    let finite = table.iter().all(|level| level.is_finite());
    (rank == shape.kept && finite).then_some(())
}

/// Weights and positions that are unpacked side by side.
pub(super) const GROUP: usize = 4;

/// Writes each kept weight and its position, ascending, as [`visit`] shows them. There must be room for whole groups;
/// what is written behind the last kept weight means nothing. `None` if the chunk is malformed.
#[inline(always)]
pub(super) fn unpack(shape: Shape, bytes: &[u8], values: &mut [f32], places: &mut [u16]) -> Option<()> {
    let (levels, rest) = bytes.split_at_checked(2 * LEVELS)?;
    let (codes, lows_and_highs) = rest.split_at_checked(shape.codes)?;
    let (_, highs) = lows_and_highs.split_at_checked(shape.lows)?;
    let table = table(levels);
    // Values and lower bits do not depend on one another, so a processor works on many of them at a time.
    let groups = values.as_chunks_mut::<GROUP>().0.iter_mut().zip(places.as_chunks_mut::<GROUP>().0);
    for (number, ((values, places), codes)) in groups.zip(codes).enumerate() {
        let at = number * GROUP * shape.low_bits;
        let lows = word(&lows_and_highs[at / 8..]) >> (at % 8);
        for index in 0..GROUP {
            values[index] = table[usize::from(codes >> (2 * index) & 3)];
            places[index] = (lows >> (index * shape.low_bits)) as u16 & ((1 << shape.low_bits) - 1);
        }
    }
    let mut rank = 0;
    for (number, bytes) in highs.chunks(8).enumerate() {
        let mut word = word(bytes);
        while word != 0 {
            let bit = 64 * number + word.trailing_zeros() as usize;
            word &= word - 1;
            *places[..shape.kept].get_mut(rank)? |= ((bit - rank) << shape.low_bits) as u16;
            rank += 1;
        }
    }
    let places = &places[..shape.kept];
    let mut sound = rank == shape.kept && places.last().is_none_or(|&last| usize::from(last) < shape.len);
    for (place, next) in places.iter().zip(places.iter().skip(1)) {
        sound &= place < next;
    }
    (sound && table.iter().all(|level| level.is_finite())).then_some(())
}

/// The first eight bytes as a number, of fewer as if zeros followed.
#[inline(always)]
fn word(bytes: &[u8]) -> u64 {
    match bytes.first_chunk() {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => {
            let mut whole = [0u8; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(whole)
        }
    }
}

/// Squared length of what a sound chunk says, from how often each level occurs. Levels have eight significant bits:
/// such sums lose nothing, in whatever order, unless levels are some 2¹⁰ apart.
pub(super) fn square(shape: Shape, bytes: &[u8]) -> Option<f64> {
    const LOWER: u64 = 0x5555_5555_5555_5555;
    let (levels, rest) = bytes.split_at_checked(2 * LEVELS)?;
    let codes = rest.get(..shape.codes)?;
    let mut counts = [0u32; LEVELS];
    let mut left = shape.kept;
    for bytes in codes.chunks(8) {
        let here = left.min(32);
        let word = word(bytes);
        // What stands behind the last code means nothing.
        let mask = LOWER & (u64::MAX >> (64 - 2 * here));
        let (large, negative) = (word & mask, word >> 1 & mask);
        counts[3] += (large & negative).count_ones();
        counts[2] += (negative & !large).count_ones();
        counts[1] += (large & !negative).count_ones();
        counts[0] += (mask & !large & !negative).count_ones();
        left -= here;
    }
    let squares = table(levels).map(|level| f64::from(level) * f64::from(level));
    Some(squares.iter().zip(counts).map(|(square, count)| square * f64::from(count)).sum())
}

/// The levels as numbers.
#[inline(always)]
fn table(levels: &[u8]) -> [f32; LEVELS] {
    std::array::from_fn(|code| widen([levels[2 * code], levels[2 * code + 1]]))
}
