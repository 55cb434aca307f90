//! Trellis-coded quantization of rotated weights: a quarter of a bit for each, or a few.
//!
//! ```text
//! chunk of 4,096 weights ──rotation──▶ 1,024 steps of 4 weights, of which 976 are spoken of
//! step ≈ ± gain · direction          a bit tells the sign; the five bits before it which of 32 directions it is
//! ```
//!
//! Of independent normal numbers, which every chunk looks like in a random rotation, a quarter of a bit each can tell 29 %
//! of the energy (Shannon). The best path through these 64 states, which Viterbi's algorithm finds, tells 26 % of what it
//! speaks of; the best of 256 patterns for every 32 weights 23 %; the greatest ones with their positions, at as many bits,
//! 16 %, and far less of what an error feedback leaves of these, which has no great ones. Trellis-coded quantization is
//! Marcellin and Fischer's (1990); that a state is the last few bits, so that reading is a matter of looking up, is from
//! QTIP (arXiv 2406.11235). The sign is the newest bit, so that two paths that part go opposite ways.
//!
//! Further words say what the words before have left (matching pursuit, Mallat and Zhang 1993). Who speaks in the same
//! turn has the same rotation: what is merged from a few sites is a sum of a few paths, so a few words say nearly all of it
//! again. A short chunk is one of 512, 1,024 or 2,048 weights with zeros behind it.

use super::CHUNK;
use super::dense::{greatest, saturate, widen};
use super::rotation::{SMALLEST, rotate, rotate_back};
use crate::delta::square;

/// Weights of a step, which a bit speaks of.
const STEP: usize = 4;
/// Weights that a byte speaks of.
const BLOCK: usize = 8 * STEP;
/// Most steps of a chunk.
const STEPS: usize = CHUNK / STEP;
/// A state is the last six bits.
const STATES: usize = 64;
/// States whose newest bit is zero, and those whose oldest is.
const HALF: usize = STATES / 2;
/// Most words: two bits a weight.
pub(super) const WORDS_MAX: u8 = 8;
/// Share of a chunk's energy that a word leaves to others.
pub(super) const LEFT: f64 = 0.751;
/// No training is beyond this; sums of such numbers are finite.
const PEAK_MAX: f32 = 1e30;
/// What stands for one in [`DIRECTIONS`].
const UNIT: i16 = 12;
/// What the root of the mean square stands for where paths are compared, and the most that anything does.
const USUAL: f32 = 20.0;
const MOST: f32 = 127.0;
/// No training is below this; nothing divided by such numbers is endless.
const LEAST: f32 = 1e-30;
/// How far behind all states are at first but the one whose bits are all zero: farther than what they could make up for.
const BEHIND: i16 = -20_000;

/// What states say whose newest bit is zero. All are about as long, twice [`UNIT`]. Made by Lloyd's algorithm from random
/// ones: 220 times each became the middle of what chunks of normal numbers, 80 to 400, had there on their best paths.
const DIRECTIONS: [[i16; STEP]; HALF] = [
    [-3, 3, 19, 15],
    [-23, 2, -5, 2],
    [2, 19, -8, 11],
    [-10, 11, -9, -17],
    [-20, 4, -12, 2],
    [-9, -14, 15, -8],
    [11, 2, -3, -21],
    [5, -12, -19, 4],
    [-20, -2, 12, -5],
    [-3, -11, 6, 20],
    [-16, 13, -4, -11],
    [-12, -20, 1, 3],
    [-5, 3, 16, -17],
    [-2, 21, 11, 6],
    [-10, -10, -20, -1],
    [-9, 12, -4, 18],
    [3, -6, -18, -14],
    [22, -2, 8, -4],
    [-4, -20, 8, -10],
    [10, -11, 9, 17],
    [20, -6, 12, -2],
    [10, 14, -15, 7],
    [-11, -4, 3, 21],
    [-7, 10, 20, -4],
    [19, 4, -12, 7],
    [2, 11, -8, -20],
    [17, -12, 5, 11],
    [12, 20, -2, -3],
    [6, -1, -17, 16],
    [0, -21, -11, -5],
    [8, 12, 19, 0],
    [12, -11, 3, -18],
];

/// The same, place by place.
const ENTRIES: [[i16; HALF]; STEP] = entries();
/// What each state says.
const CODEWORDS: [[f32; STEP]; STATES] = codewords();
/// Mean square of what they say of a weight, where [`UNIT`] is one.
const MEAN_SQUARE: f32 = mean_square();

const fn mean_square() -> f32 {
    let (mut sum, mut at) = (0, 0);
    while at < HALF * STEP {
        let entry = DIRECTIONS[at / STEP][at % STEP] as i32;
        sum += entry * entry;
        at += 1;
    }
    sum as f32 / ((HALF * STEP) as f32 * UNIT as f32 * UNIT as f32)
}

const fn entries() -> [[i16; HALF]; STEP] {
    let mut entries = [[0; HALF]; STEP];
    let mut at = 0;
    while at < HALF * STEP {
        entries[at % STEP][at / STEP] = DIRECTIONS[at / STEP][at % STEP];
        at += 1;
    }
    entries
}

const fn codewords() -> [[f32; STEP]; STATES] {
    let mut codewords = [[0.0; STEP]; STATES];
    let mut at = 0;
    while at < STATES * STEP {
        let (state, place) = (at / STEP, at % STEP);
        let entry = DIRECTIONS[state / 2][place] as f32 / UNIT as f32;
        codewords[state][place] = if state & 1 == 0 { entry } else { -entry };
        at += 1;
    }
    codewords
}

/// How a chunk of so many weights is cut up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// A power of two.
    size: usize,
    /// Bytes of a word's path. What three of 64 would say pays for gains and frames, and the next rotation has other
    /// weights there.
    path: usize,
}

impl Shape {
    #[inline(always)]
    pub(super) fn new(len: usize) -> Self {
        let size = len.next_power_of_two().clamp(SMALLEST, CHUNK);
        let bytes = size / BLOCK;
        Self { size, path: bytes - (3 * bytes).div_ceil(64) }
    }

    /// Bytes of a word.
    #[inline(always)]
    fn word(self) -> usize {
        2 + self.path
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
    let mut before: Option<&[u8]> = None;
    for word in words.chunks_exact_mut(shape.word()) {
        if let Some(before) = before {
            say(before, room, -1.0);
        }
        speak(room, word);
        before = Some(word);
    }
}

/// Writes what the chunk says.
#[inline(always)]
pub(super) fn decode(turn: u8, words: &[u8], values: &mut [f32]) {
    let (shape, mut room) = (Shape::new(values.len()), [0.0; CHUNK]);
    let room = &mut room[..shape.size];
    for word in words.chunks_exact(shape.word()) {
        say(word, room, 1.0);
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
            say(word, values, share);
        }
    }
    for ((words, _), sum) in chunks.zip(alongs) {
        for word in words.chunks_exact(shape.word()) {
            *sum += along(word, values);
        }
    }
    rotate_back(values, turn);
}

/// Takes away what `values` have along what the chunk speaks of, byte by byte.
pub(super) fn silence(turn: u8, words: &[u8], values: &mut [f32]) {
    let (shape, mut room) = (Shape::new(values.len()), [0.0; CHUNK]);
    let room = &mut room[..shape.size];
    room[..values.len()].copy_from_slice(values);
    rotate(room, turn);
    for word in words.chunks_exact(shape.word()) {
        let mut said = [0.0; CHUNK];
        say(word, &mut said, 1.0);
        for (said, block) in said.chunks_exact(BLOCK).zip(room.chunks_exact_mut(BLOCK)).take(shape.path) {
            let square: f32 = said.iter().map(|said| said * said).sum();
            let along: f32 = said.iter().zip(&*block).map(|(said, value)| said * value).sum();
            if square > 0.0 {
                block.iter_mut().zip(said).for_each(|(value, said)| *value -= said * along / square);
            }
        }
    }
    rotate_back(room, turn);
    values.copy_from_slice(&room[..values.len()]);
}

/// Squared length of what a whole chunk says: rotations keep it.
pub(super) fn chunk_square(words: &[u8]) -> f64 {
    let mut said = [0.0; CHUNK];
    words.chunks_exact(Shape::new(CHUNK).word()).for_each(|word| say(word, &mut said, 1.0));
    square(&said)
}

/// Whether only finite values come out.
pub(super) fn is_sound(len: usize, words: &[u8]) -> bool {
    let mut gains = words.chunks_exact(Shape::new(len).word()).map(gain);
    gains.all(|gain| (0.0..=PEAK_MAX).contains(&gain))
}

/// Writes the word that says most of the rotated `values`.
#[inline(always)]
fn speak(values: &[f32], word: &mut [u8]) {
    let (head, path) = word.split_at_mut(2);
    let values = &values[..path.len() * BLOCK];
    let usual = (square(values) / values.len() as f64).sqrt() as f32;
    let gain = if usual > LEAST {
        let scale = USUAL / usual;
        let far = find_path(values, scale, path) as f32 / (scale * f32::from(UNIT));
        far / (values.len() as f32 * MEAN_SQUARE)
    } else {
        path.fill(0);
        0.0
    };
    head.copy_from_slice(&saturate(gain.max(0.0)).to_le_bytes());
}

/// For each state, how far the best path goes that ends there.
type Sums = [i16; STATES];
/// For each two states that differ in their newest bit, [`HALF`] if the best way there comes from the state whose oldest bit
/// is one, else zero.
type Choices = [u8; HALF];

/// Writes the bits of the path along which `scale` times `values` go farthest (Viterbi), and returns how far that is. It begins
/// as if there had been zeros before. In whole numbers, of which a register holds many, and whose sums are the same in
/// any order.
#[inline(always)]
fn find_path(values: &[f32], scale: f32, path: &mut [u8]) -> i32 {
    let mut choices = [[0; HALF]; STEPS];
    let (mut sums, mut far) = ([BEHIND; STATES], 0);
    sums[0] = 0;
    for (values, choices) in values.as_chunks().0.iter().zip(choices.as_chunks_mut::<8>().0) {
        for (step, choices) in round(values, scale).as_chunks().0.iter().zip(choices) {
            sums = go_on(&sums, step, choices);
        }
        far += level(&mut sums);
    }
    let mut state = farthest(&sums);
    far += i32::from(sums[state]);
    for (byte, choices) in path.iter_mut().zip(choices.as_chunks::<8>().0).rev() {
        *byte = 0;
        for (place, choices) in choices.iter().rev().enumerate() {
            *byte |= ((state & 1) << place) as u8;
            let rest = state / 2 % HALF;
            state = rest | usize::from(choices[rest]);
        }
    }
    far
}

/// The nearest whole numbers to `scale` times the values.
#[inline(always)]
fn round(values: &[f32; BLOCK], scale: f32) -> [i16; BLOCK] {
    /// Added to a small number, it leaves the nearest whole one in the lowest bits.
    const SHIFT: f32 = 12_582_912.0;
    let mut whole = [0; BLOCK];
    for (whole, value) in whole.iter_mut().zip(values) {
        *whole = ((value * scale).clamp(-MOST, MOST) + SHIFT).to_bits() as i16;
    }
    whole
}

/// Makes room for what is to come: keeps differences, which alone matter, and returns what it takes from all.
#[inline(always)]
fn level(sums: &mut Sums) -> i32 {
    let first = sums[0];
    for sum in sums {
        *sum = sum.saturating_sub(first);
    }
    i32::from(first)
}

#[inline(always)]
fn farthest(sums: &Sums) -> usize {
    let mut state = 0;
    for (number, sum) in sums.iter().enumerate() {
        if *sum > sums[state] {
            state = number;
        }
    }
    state
}

/// A step more. From states that differ in their oldest bit the same two can be reached, which say the same with
/// opposite signs. A product is at most 127 · 23, so nothing wraps; sums of the farthest and of the nearest may saturate.
#[inline(always)]
fn go_on(sums: &Sums, step: &[i16; STEP], choices: &mut Choices) -> Sums {
    let (zero, one) = sums.split_at(HALF);
    let [a, b, c, d] = *step;
    let (mut best, mut along, mut next) = ([0i16; HALF], [0i16; HALF], [0i16; STATES]);
    for at in 0..HALF {
        choices[at] = if one[at] > zero[at] { HALF as u8 } else { 0 };
        best[at] = one[at].max(zero[at]);
    }
    for at in 0..HALF {
        let times = |value: i16, place: usize| value.wrapping_mul(ENTRIES[place][at]);
        along[at] = times(a, 0).wrapping_add(times(b, 1)).wrapping_add(times(c, 2)).wrapping_add(times(d, 3));
    }
    for at in 0..HALF {
        next[2 * at] = best[at].saturating_add(along[at]);
        next[2 * at + 1] = best[at].saturating_sub(along[at]);
    }
    next
}

/// Shows each step to `show` with what a path says of it; steps come in eights, as many as a byte tells.
#[inline(always)]
fn follow<S>(
    path: &[u8],
    eights: impl IntoIterator<Item = impl IntoIterator<Item = S>>,
    mut show: impl FnMut(S, &[f32; STEP]),
) {
    let mut bits = 0;
    for (byte, steps) in path.iter().zip(eights) {
        bits = bits << 8 | usize::from(*byte);
        for (place, step) in steps.into_iter().enumerate() {
            show(step, &CODEWORDS[(bits >> (7 - place)) % STATES]);
        }
    }
}

/// Adds `times` what a word says to rotated `values`.
#[inline(always)]
fn say(word: &[u8], values: &mut [f32], times: f32) {
    let gain = times * gain(word);
    follow(
        &word[2..],
        values.as_chunks_mut::<STEP>().0.as_chunks_mut::<8>().0,
        #[inline(always)]
        |step, said| {
            for at in 0..STEP {
                step[at] += gain * said[at];
            }
        },
    );
}

/// Dot product of what a word says and rotated `values`.
#[inline(always)]
fn along(word: &[u8], values: &[f32]) -> f64 {
    let mut alongs = [0.0f32; STEP];
    follow(
        &word[2..],
        values.as_chunks::<STEP>().0.as_chunks::<8>().0,
        #[inline(always)]
        |step, said| {
            for at in 0..STEP {
                alongs[at] += said[at] * step[at];
            }
        },
    );
    f64::from(gain(word)) * alongs.into_iter().map(f64::from).sum::<f64>()
}

#[inline(always)]
fn gain(word: &[u8]) -> f32 {
    widen([word[0], word[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: u8 = 5;

    fn normal(seed: u64) -> [f32; CHUNK] {
        let mut rng = crate::rng::Rng::new(seed);
        std::array::from_fn(|_| rng.normal() as f32)
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

    /// Of something else two words tell 43 %.
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
    fn a_length_is_told_without_unpacking() {
        for words in 1..=WORDS_MAX {
            let chunk = spoken(&normal(6), words);
            let mut said = [0.0; CHUNK];
            decode(TURN, &chunk, &mut said);
            assert!((chunk_square(&chunk) / square(&said) - 1.0).abs() < 1e-5, "{words}");
        }
    }

    /// A quarter bit can tell 29 % of what is normal (Shannon), half a bit 50 %.
    #[test]
    fn a_word_tells_a_quarter_whatever_the_chunk_looks_like() {
        let plain = normal(2);
        let uneven: [f32; CHUNK] = std::array::from_fn(|at| plain[at] * (at as f32 / 400.0).exp());
        let row: [f32; CHUNK] = std::array::from_fn(|at| if at / 64 == 5 { plain[at] } else { 0.0 });
        let mut alone = [0.0; CHUNK];
        alone[99] = 1.0;
        // What was one weight is the same number everywhere, but for the sign.
        let usual = [0.77, 0.59];
        for (values, [one, two]) in [(plain, usual), (uneven, usual), (row, usual), (alone, [0.79, 0.62])] {
            let left = [1, 2].map(|words| square(&rest(&values, words)) / square(&values));
            assert!(left[0] < one && left[1] < two, "{left:?}");
        }
    }

    #[test]
    fn short_chunks_and_chunks_of_zeros_are_told_too() {
        for len in [1, 15, 100, 4095] {
            let values = &normal(3)[..len];
            assert!(square(&rest(values, 1)) < 0.78 * square(values), "{len}");
        }
        assert_eq!(rest(&[0.0; 50], 2), vec![0.0; 50]);
    }

    /// Nothing is owed any more along the path of a word.
    #[test]
    fn silence_falls_where_a_word_has_spoken() {
        let values = normal(4);
        let chunk = spoken(&values, 1);
        let mut silent = values;
        silence(TURN, &chunk, &mut silent);
        assert!(square(&silent) < square(&rest(&values, 1)), "a word has one gain for all bytes");
        let mut said = [0.0; CHUNK];
        decode(TURN, &chunk, &mut said);
        let along = crate::delta::cosine(&silent, &said);
        assert!(along.abs() < 1e-4, "{along}");
    }

    #[test]
    fn what_is_beyond_all_training_is_left() {
        assert_eq!(rest(&[f32::MAX, 1.0], 1), [f32::MAX, 1.0]);
        assert_eq!(rest(&[f32::MIN_POSITIVE, 1e-40], 1), [f32::MIN_POSITIVE, 1e-40]);
        let mut endless = spoken(&[1.0], 1);
        assert!(is_sound(1, &endless));
        endless[..2].copy_from_slice(&half::bf16::MAX.to_le_bytes());
        assert!(!is_sound(1, &endless));
    }
}
