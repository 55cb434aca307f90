//! Shape-gain vector quantization of rotated weights: a quarter of a bit for each, or a few.
//!
//! ```text
//! chunk of 4,096 weights ──flip signs──▶ ──Walsh–Hadamard──▶ 128 columns of 32 rows, of which 124 are spoken of
//! column ≈ ± gain · pattern          pattern = one of 128 with entries ±1: a byte tells it and the sign
//! ```
//!
//! A random rotation (flipped signs, then a Walsh–Hadamard transform) makes any chunk look like independent normal
//! numbers, whatever it was; QuIP# (arXiv 2402.04396) and EDEN (arXiv 2108.08842) rest on the same. Of such numbers a
//! byte for 32 tells 23 % of the energy where the theory of rate and distortion allows 29 %, and the greatest ones with
//! their positions, at as many bits, 16 %; of what an error feedback leaves of these, which has no great ones, far less.
//! Sites drift apart by half of what they do with the sparse codec.
//! The patterns are four orthonormal bases, each a Hadamard matrix behind other flips, so the best of 128 is found by four
//! fast transforms and no search. Further words say with the same patterns what the words before have left (matching pursuit,
//! Mallat and Zhang 1993).
//!
//! Which signs are flipped is another matter in each turn, so that a residual is looked at from another side; if it were
//! not, what these patterns say badly would never be said. Who speaks in the same turn has the same patterns: what is merged
//! from a few sites is a sum of a few patterns, so a few words say nearly all of it again. A short chunk is one of 512, 1,024
//! or 2,048 weights with zeros behind it.

use super::CHUNK;
use super::dense::{greatest, saturate, widen};

/// Weights side by side in everything here.
const LANES: usize = 16;
/// Weights that a byte speaks of.
const BLOCK: usize = 32;
/// Neighbours whose places differ in the bits that two folds take.
const FOLDED: usize = 16;
/// Columns of a whole chunk.
const COLUMNS: usize = CHUNK / BLOCK;
/// Most words: two bits a weight.
pub(super) const WORDS_MAX: u8 = 8;
/// Share of a chunk's energy that a word leaves to others.
pub(super) const LEFT: f64 = 0.777;
/// No training is beyond this; sums of such numbers are finite.
const PEAK_MAX: f32 = 1e30;
/// Which rows of a column each basis flips.
const BASES: [u32; 4] = [0, 0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372];
/// Signs of each pattern, row by row; its sign, row of the Hadamard matrix and basis are the bits of its number.
const PATTERNS: [u32; 256] = patterns();

const fn patterns() -> [u32; 256] {
    let mut patterns = [0; 256];
    let mut number = 0;
    while number < 256 {
        let (negative, row, basis) = (number & 1, number >> 1 & 31, number >> 6);
        let mut place = 0;
        while place < BLOCK {
            let sign = (row & place).count_ones() & 1 ^ BASES[basis] >> place & 1 ^ negative as u32;
            patterns[number] |= sign << place;
            place += 1;
        }
        number += 1;
    }
    patterns
}

type Row = [f32; LANES];

/// How a chunk of so many weights is cut up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// A power of two.
    size: usize,
    columns: usize,
    /// Columns that a word speaks of. The last of 32 pays for the gains, and the next rotation has others there.
    spoken: usize,
}

impl Shape {
    #[inline(always)]
    pub(super) fn new(len: usize) -> Self {
        let size = len.next_power_of_two().clamp(BLOCK * LANES, CHUNK);
        let columns = size / BLOCK;
        Self { size, columns, spoken: columns - columns / 32 }
    }

    /// Bytes of a word.
    #[inline(always)]
    fn word(self) -> usize {
        2 + self.spoken
    }

    /// Bytes of the chunk.
    pub(super) fn bytes(self, words: u8) -> usize {
        usize::from(words) * self.word()
    }
}

/// Writes the chunk of finite `values` into `words`, which have [`Shape::bytes`].
#[inline(always)]
pub(super) fn encode(turn: u8, values: &[f32], words: &mut [u8]) {
    let (shape, mut room) = (Shape::new(values.len()), [0.0; CHUNK]);
    let room = &mut room[..shape.size];
    // What is beyond all training is not told, and stays with whoever wished it.
    if f32::from_bits(greatest(values)) < PEAK_MAX {
        room[..values.len()].copy_from_slice(values);
    }
    rotate(room, turn);
    for word in words.chunks_exact_mut(shape.word()) {
        speak(shape, room, word);
        say(shape, word, room, -1.0);
    }
}

/// Writes what the chunk says.
#[inline(always)]
pub(super) fn decode(turn: u8, words: &[u8], values: &mut [f32]) {
    let (shape, mut room) = (Shape::new(values.len()), [0.0; CHUNK]);
    let room = &mut room[..shape.size];
    for word in words.chunks_exact(shape.word()) {
        say(shape, word, room, 1.0);
    }
    rotate_back(room, turn);
    values.copy_from_slice(&room[..values.len()]);
}

/// Writes the sum of what whole chunks of one turn say, each times its share, and adds to `alongs` how far each goes along
/// that sum. All are rotated back at once: a rotation keeps dot products.
#[inline(always)]
pub(super) fn add_up<'a>(
    turn: u8,
    chunks: impl Iterator<Item = (&'a [u8], f32)> + Clone,
    values: &mut [f32; CHUNK],
    alongs: &mut [f64],
) {
    let shape = Shape::new(CHUNK);
    values.fill(0.0);
    for (words, share) in chunks.clone() {
        for word in words.chunks_exact(shape.word()) {
            say(shape, word, values, share);
        }
    }
    for ((words, _), sum) in chunks.zip(alongs) {
        for word in words.chunks_exact(shape.word()) {
            *sum += along(shape, word, values);
        }
    }
    rotate_back(values, turn);
}

/// Takes away what `values` have along what the chunk speaks of.
pub(super) fn silence(turn: u8, words: &[u8], values: &mut [f32]) {
    let (shape, mut room) = (Shape::new(values.len()), [0.0; CHUNK]);
    let room = &mut room[..shape.size];
    room[..values.len()].copy_from_slice(values);
    rotate(room, turn);
    for word in words.chunks_exact(shape.word()) {
        for (column, &number) in word[2..].iter().enumerate() {
            let signs = PATTERNS[usize::from(number)];
            let one = |row: usize| f32::from_bits(1.0f32.to_bits() ^ sign(signs, row));
            let place = |row: usize| row * shape.columns + column;
            let along: f32 = (0..BLOCK).map(|row| one(row) * room[place(row)]).sum();
            (0..BLOCK).for_each(|row| room[place(row)] -= one(row) * along / BLOCK as f32);
        }
    }
    rotate_back(room, turn);
    values.copy_from_slice(&room[..values.len()]);
}

/// Squared length of what a whole chunk says: rotations keep it, and how two patterns lie is a matter of counting.
pub(super) fn square(words: &[u8]) -> f64 {
    let shape = Shape::new(CHUNK);
    let words = || words.chunks_exact(shape.word());
    let differ = |(a, b): (&u8, &u8)| (PATTERNS[usize::from(*a)] ^ PATTERNS[usize::from(*b)]).count_ones();
    let mut square = 0.0;
    for word in words() {
        for other in words() {
            let apart: u32 = word[2..].iter().zip(&other[2..]).map(differ).sum();
            let along = (shape.spoken * BLOCK) as f64 - 2.0 * f64::from(apart);
            square += f64::from(gain(word)) * f64::from(gain(other)) * along;
        }
    }
    square
}

/// Whether only finite values come out.
pub(super) fn is_sound(len: usize, words: &[u8]) -> bool {
    let mut gains = words.chunks_exact(Shape::new(len).word()).map(gain);
    gains.all(|gain| (0.0..=PEAK_MAX).contains(&gain))
}

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
    for (number, block) in values.as_chunks_mut::<{ BLOCK * LANES }>().0.iter_mut().enumerate() {
        let mut signs = [0u32; LANES];
        for (lane, signs) in signs.iter_mut().enumerate() {
            *signs = mix((usize::from(turn) << 16 | number << 8 | lane) as u32 + 1);
        }
        for (place, row) in block.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            for (value, signs) in row.iter_mut().zip(signs) {
                *value = f32::from_bits(value.to_bits() ^ sign(signs, place));
            }
        }
    }
}

/// The orthonormal Walsh–Hadamard transform of what is flipped; in another order, which [`rotate_back`] knows: a fast
/// transform takes two bits of a place at a time, and the lowest are had by folding them to the top.
#[inline(always)]
fn rotate(values: &mut [f32], turn: u8) {
    flip(values, turn);
    let (mut room, scale) = ([0.0; CHUNK], unit(values));
    let room = &mut room[..values.len()];
    fold(values, room, scale);
    fold(room, values, 1.0);
    middle(values);
    fold(values, room, 1.0);
    fold(room, values, 1.0);
}

#[inline(always)]
fn rotate_back(values: &mut [f32], turn: u8) {
    let (mut room, scale) = ([0.0; CHUNK], unit(values));
    let room = &mut room[..values.len()];
    unfold(values, room, scale);
    unfold(room, values, 1.0);
    middle(values);
    unfold(values, room, 1.0);
    unfold(room, values, 1.0);
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

/// Writes the word that says most of the rotated `values`.
#[inline(always)]
fn speak(shape: Shape, values: &[f32], word: &mut [u8]) {
    let mut best = [0i32; COLUMNS];
    let best = &mut best[..shape.columns];
    for (group, best) in best.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let mut rows = [[0.0; LANES]; BLOCK];
        for (row, values) in rows.iter_mut().zip(values.chunks_exact(shape.columns)) {
            row.copy_from_slice(&values[group * LANES..][..LANES]);
        }
        for (basis, flips) in BASES.into_iter().enumerate() {
            look(&rows, flips, (basis << 6) as u32, best);
        }
    }
    let along: f64 = best[..shape.spoken].iter().map(|&best| f64::from(f32::from_bits(best as u32))).sum();
    let gain = saturate((along / (shape.spoken * BLOCK) as f64) as f32);
    word[..2].copy_from_slice(&gain.to_le_bytes());
    word[2..].iter_mut().zip(best).for_each(|(byte, best)| *byte = *best as u8);
}

/// Keeps in `best` the longest of what some columns have along the patterns of the basis that flips these rows, and the
/// pattern's number, from `first` on. Lengths order like their bits, of which the last eight are of no account: the number
/// stands there.
#[inline(always)]
fn look(rows: &[Row; BLOCK], flips: u32, first: u32, best: &mut [i32; LANES]) {
    let mut room = [[0.0f32; LANES]; BLOCK];
    for (place, (sums, rows)) in room.as_chunks_mut().0.iter_mut().zip(rows.as_chunks::<4>().0).enumerate() {
        let [a, b, c, d] = sums;
        for lane in 0..LANES {
            let flipped = |row: usize| f32::from_bits(rows[row][lane].to_bits() ^ sign(flips, 4 * place + row));
            [a[lane], b[lane], c[lane], d[lane]] = four([flipped(0), flipped(1), flipped(2), flipped(3)]);
        }
    }
    fours(room.as_flattened_mut(), 4 * LANES);
    let (lower, upper) = room.split_at(BLOCK / 2);
    let mut most = *best;
    for (place, (lower, upper)) in lower.iter().zip(upper).enumerate() {
        let number = first | (place << 1) as u32;
        for lane in 0..LANES {
            let (sum, difference) = (lower[lane] + upper[lane], lower[lane] - upper[lane]);
            let sum = with_number(sum, number);
            let difference = with_number(difference, number | BLOCK as u32);
            most[lane] = most[lane].max(sum).max(difference);
        }
    }
    *best = most;
}

/// The sign bit of a row that `flips` tells to flip.
#[inline(always)]
fn sign(flips: u32, row: usize) -> u32 {
    flips >> row << 31
}

/// A length with the number of its pattern, of which the lowest bit is the sign.
#[inline(always)]
fn with_number(along: f32, number: u32) -> i32 {
    let bits = along.to_bits();
    (bits & 0x7fff_ff00 | bits >> 31 | number) as i32
}

/// Adds `times` what a word says to rotated `values`.
#[inline(always)]
fn say(shape: Shape, word: &[u8], values: &mut [f32], times: f32) {
    let (gain, signs) = (times * gain(word), signs(word));
    let mut gains = [0u32; COLUMNS];
    gains[..shape.spoken].fill(gain.to_bits());
    for (place, row) in values.chunks_exact_mut(shape.columns).enumerate() {
        for ((value, signs), gain) in row.iter_mut().zip(&signs).zip(&gains) {
            *value += f32::from_bits(gain ^ sign(*signs, place));
        }
    }
}

/// Dot product of what a word says and rotated `values`.
#[inline(always)]
fn along(shape: Shape, word: &[u8], values: &[f32]) -> f64 {
    let (mut sums, signs) = ([0.0f32; COLUMNS], signs(word));
    for (place, row) in values.chunks_exact(shape.columns).enumerate() {
        for ((sum, signs), value) in sums.iter_mut().zip(&signs).zip(row) {
            *sum += f32::from_bits(value.to_bits() ^ sign(*signs, place));
        }
    }
    let sum: f64 = sums[..shape.spoken].iter().map(|&sum| f64::from(sum)).sum();
    f64::from(gain(word)) * sum
}

#[inline(always)]
fn gain(word: &[u8]) -> f32 {
    widen([word[0], word[1]])
}

/// For each column its rows' signs.
#[inline(always)]
fn signs(word: &[u8]) -> [u32; COLUMNS] {
    let mut signs = [0; COLUMNS];
    for (signs, &number) in signs.iter_mut().zip(&word[2..]) {
        *signs = PATTERNS[usize::from(number)];
    }
    signs
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: u8 = 5;

    fn normal(seed: u64) -> [f32; CHUNK] {
        let mut rng = crate::rng::Rng::new(seed);
        std::array::from_fn(|_| rng.normal() as f32)
    }

    fn square(values: &[f32]) -> f64 {
        crate::delta::square(values)
    }

    fn spoken(values: &[f32], words: u8) -> Vec<u8> {
        let mut out = vec![0; Shape::new(values.len()).bytes(words)];
        encode(TURN, values, &mut out);
        out
    }

    fn rest(values: &[f32], words: u8) -> Vec<f32> {
        let mut said = vec![0.0; values.len()];
        decode(TURN, &spoken(values, words), &mut said);
        values.iter().zip(said).map(|(value, said)| value - said).collect()
    }

    /// Of something else two words tell 39 %.
    #[test]
    fn what_two_have_said_in_one_turn_is_said_again_in_two_words() {
        let said = |seed| {
            let mut values = [0.0; CHUNK];
            decode(TURN, &spoken(&normal(seed), 1), &mut values);
            values
        };
        let (one, other) = (said(7), said(8));
        let sum: [f32; CHUNK] = std::array::from_fn(|at| 0.7 * one[at] + 0.3 * other[at]);
        let left = square(&rest(&sum, 2)) / square(&sum);
        assert!(left < 0.05, "{left}");
    }

    #[test]
    fn a_rotation_keeps_lengths_and_turns_back() {
        let before = normal(1);
        let mut values = before;
        rotate(&mut values, TURN);
        assert!((square(&values) / square(&before) - 1.0).abs() < 1e-6);
        rotate_back(&mut values, TURN);
        let far = values.iter().zip(before).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5, "{far}");
    }

    #[test]
    fn a_length_is_told_without_unpacking() {
        for words in 1..=WORDS_MAX {
            let chunk = spoken(&normal(6), words);
            let mut said = [0.0; CHUNK];
            decode(TURN, &chunk, &mut said);
            assert!((super::square(&chunk) / square(&said) - 1.0).abs() < 1e-5, "{words}");
        }
    }

    /// A quarter bit can tell 29 % of what is normal (Shannon), half a bit 50 %.
    #[test]
    fn a_word_tells_nearly_a_quarter_whatever_the_chunk_looks_like() {
        let plain = normal(2);
        let uneven: [f32; CHUNK] = std::array::from_fn(|at| plain[at] * (at as f32 / 400.0).exp());
        let mut alone = [0.0; CHUNK];
        alone[99] = 1.0;
        for values in [plain, uneven, alone] {
            let left = [1, 2].map(|words| square(&rest(&values, words)) / square(&values));
            assert!(left[0] < 0.80 && left[1] < 0.63, "{left:?}");
        }
    }

    #[test]
    fn short_chunks_and_chunks_of_zeros_are_told_too() {
        for len in [1, 15, 100, 4095] {
            let values = &normal(3)[..len];
            assert!(square(&rest(values, 1)) < 0.8 * square(values), "{len}");
        }
        assert_eq!(rest(&[0.0; 50], 2), vec![0.0; 50]);
    }

    /// Nothing is owed any more along the patterns of a word.
    #[test]
    fn silence_falls_where_a_word_has_spoken() {
        let values = normal(4);
        let chunk = spoken(&values, 1);
        let mut silent = values;
        silence(TURN, &chunk, &mut silent);
        assert!(square(&silent) < square(&rest(&values, 1)), "what a word says along its patterns is a mean");
        let mut said = [0.0; CHUNK];
        decode(TURN, &chunk, &mut said);
        let along = crate::delta::cosine(&silent, &said);
        assert!(along.abs() < 1e-4, "{along}");
    }

    #[test]
    fn what_is_beyond_all_training_is_left() {
        assert_eq!(rest(&[f32::MAX, 1.0], 1), [f32::MAX, 1.0]);
        let mut endless = spoken(&[1.0], 1);
        assert!(is_sound(1, &endless));
        endless[..2].copy_from_slice(&half::bf16::MAX.to_le_bytes());
        assert!(!is_sound(1, &endless));
    }
}
