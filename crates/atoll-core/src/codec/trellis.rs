//! Trellis-coded quantization of rotated weights: a quarter of a bit for each, or a few.
//!
//! ```text
//! chunk of 4,096 weights ──rotation──▶ 1,024 steps of 4 weights, of which 968 are spoken of
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
//!
//! Of a piece of 64 chunks that have not all moved alike, the same bytes say more of some and less of others ([`allot`]).

mod allot;
mod code;
mod passage;
mod viterbi;

use super::CHUNK;
use super::dense::{greatest, saturate, widen};
use super::rotation::{SMALLEST, rotate, rotate_back};
use crate::delta::square;
use allot::{Allotment, allot};
use code::{BLOCK, MEAN_SQUARE, PAIR, Reader, UNIT};
use passage::MARK;
pub(crate) use passage::{Passage, Passages};
use viterbi::find_path;

/// Most words: two bits a weight.
pub(super) const WORDS_MAX: u8 = 8;
/// Share of a chunk's energy that a word leaves to others.
const LEFT: f64 = 0.753;
/// What words leave: none, one, two … Products, since powers may be other bits elsewhere.
const LEAVES: [f64; passage::WORDS_MAX as usize + 1] = leaves();
/// No training is beyond this; sums of such numbers are finite.
const PEAK_MAX: f32 = 1e30;
/// What the root of the mean square stands for where paths are compared.
const USUAL: f32 = 20.0;
/// No training is below this; nothing divided by such numbers is endless.
const LEAST: f32 = 1e-30;

const fn leaves() -> [f64; passage::WORDS_MAX as usize + 1] {
    let mut leaves = [1.0; passage::WORDS_MAX as usize + 1];
    let mut words = 1;
    while words < leaves.len() {
        leaves[words] = leaves[words - 1] * LEFT;
        words += 1;
    }
    leaves
}

/// Share of a chunk's energy that so many words leave to others.
pub(super) fn left_by(words: usize) -> f64 {
    LEAVES.get(words).copied().unwrap_or(0.0)
}

/// How a chunk of so many weights is cut up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shape {
    /// A power of two.
    size: usize,
    /// Bytes of a word's path. What seven of 128 would say pays for gains, frames and control, and the next rotation has
    /// other weights there.
    path: usize,
}

impl Shape {
    #[inline(always)]
    pub(super) fn new(len: usize) -> Self {
        let size = len.next_power_of_two().clamp(SMALLEST, CHUNK);
        let bytes = size / BLOCK;
        Self { size, path: bytes - (7 * bytes).div_ceil(128) }
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

/// Writes a piece of finite `values` in so many `words` for each chunk, or in as many bytes.
#[inline(always)]
pub(super) fn encode(turn: u8, words: u8, values: &[f32], bytes: &mut [u8]) {
    match allot(values, words, bytes.len()) {
        Some(allotments) => encode_uneven(turn, &allotments, values, bytes),
        None => {
            let chunk_bytes = Shape::new(CHUNK).bytes(words);
            for (values, words) in values.chunks(CHUNK).zip(bytes.chunks_mut(chunk_bytes)) {
                speak_of(turn, values, Passage::even(values.len(), &[]), words);
            }
        }
    }
}

/// Writes an uneven piece.
#[inline(always)]
fn encode_uneven(turn: u8, allotments: &[Allotment], values: &[f32], bytes: &mut [u8]) {
    let (mark, mut rest) = bytes.split_at_mut(MARK.len());
    mark.copy_from_slice(&MARK);
    for (&Allotment { words, kind, rows }, values) in allotments.iter().zip(values.chunks(CHUNK)) {
        let about = Passage { rows, shape: passage::shape_of(kind, values.len()), words: &[] };
        let (head, after) = rest.split_at_mut(passage::head_of(kind));
        let (said, after) = after.split_at_mut(about.shape.bytes(words));
        about.write_head(words, kind, head);
        speak_of(turn, values, about, said);
        rest = after;
    }
    rest.fill(0);
}

/// Writes words about the chunk of finite `values`, all that have room; `about` tells of what.
#[inline(always)]
fn speak_of(turn: u8, values: &[f32], about: Passage<'_>, words: &mut [u8]) {
    let (shape, mut room) = (about.shape, [0.0; CHUNK]);
    let room = &mut room[..shape.size];
    // What is beyond all training is not told, and stays with whoever wished it.
    if f32::from_bits(greatest(values)) < PEAK_MAX {
        about.gather(values, room);
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

/// Writes what a passage says of a chunk.
#[inline(always)]
pub(super) fn decode(turn: u8, passage: Passage<'_>, values: &mut [f32]) {
    if passage.words.is_empty() || !passage.is_about_all() {
        values.fill(0.0);
    }
    if passage.words.is_empty() {
        return;
    }
    let mut room = [0.0; CHUNK];
    let room = &mut room[..passage.shape.size];
    for word in passage.words() {
        say(word, room, 1.0);
    }
    rotate_back(room, turn);
    passage.scatter(room, values);
}

/// Writes the sum of what passages about all of a whole chunk say in one turn, each times its share, and adds to `alongs` how
/// far each goes along that sum. All are rotated back at once: a rotation keeps dot products.
#[inline(always)]
pub(super) fn add_up<'a>(
    turn: u8,
    passages: impl Iterator<Item = (Passage<'a>, f32)>,
    values: &mut [f32; CHUNK],
    alongs: &mut [f64],
) {
    let shape = Shape::new(CHUNK);
    let words = |(index, (passage, share)): (usize, (Passage<'a>, f32))| {
        passage.words().map(move |word| Voice::new(index, word, share))
    };
    let mut voices: Vec<Voice<'_>> = passages.enumerate().flat_map(words).collect();
    let (spoken, silent) = values.split_at_mut(shape.path * BLOCK);
    for (at, block) in spoken.as_chunks_mut().0.iter_mut().enumerate() {
        sing(&mut voices, at, block);
    }
    silent.fill(0.0);
    for voice in voices {
        let along: f64 = voice.along.into_iter().map(f64::from).sum();
        alongs[voice.index] += f64::from(voice.gain) * along;
    }
    rotate_back(values, turn);
}

/// A word among others that are added up.
struct Voice<'a> {
    /// Number of its payload.
    index: usize,
    gain: f32,
    /// What its gain is multiplied with in the sum.
    share: f32,
    path: &'a [u8],
    reader: Reader,
    /// How far it goes along the sum so far, but for the gain.
    along: [f32; PAIR],
}

impl<'a> Voice<'a> {
    fn new(index: usize, word: &'a [u8], share: f32) -> Self {
        let (gain, path) = (gain(word), &word[2..]);
        Self { index, gain, share, path, reader: Reader::default(), along: [0.0; PAIR] }
    }
}

/// Writes what all say of block number `at`, and notes how far each goes along it.
#[inline(always)]
fn sing(voices: &mut [Voice<'_>], at: usize, block: &mut [f32; BLOCK]) {
    let mut sum = [0.0; BLOCK];
    for voice in &*voices {
        let (gain, mut reader) = (voice.share * voice.gain, voice.reader);
        for (sum, said) in sum.as_chunks_mut::<PAIR>().0.iter_mut().zip(reader.read(voice.path[at])) {
            for place in 0..PAIR {
                sum[place] += gain * said[place];
            }
        }
    }
    for voice in voices {
        let mut along = voice.along;
        for (sum, said) in sum.as_chunks::<PAIR>().0.iter().zip(voice.reader.read(voice.path[at])) {
            for place in 0..PAIR {
                along[place] += said[place] * sum[place];
            }
        }
        voice.along = along;
    }
    *block = sum;
}

/// Takes away what `values` have along what a passage speaks of, byte by byte.
pub(super) fn silence(turn: u8, passage: Passage<'_>, values: &mut [f32]) {
    if passage.words.is_empty() {
        return;
    }
    let (shape, mut room) = (passage.shape, [0.0; CHUNK]);
    let room = &mut room[..shape.size];
    passage.gather(values, room);
    rotate(room, turn);
    for word in passage.words() {
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
    passage.scatter(room, values);
}

/// Squared length of what a passage says of a whole chunk: rotations keep it.
#[inline(always)]
pub(super) fn chunk_square(passage: Passage<'_>) -> f64 {
    let mut words = passage.words();
    match (words.next(), words.next()) {
        (None, _) => 0.0,
        (Some(word), None) => f64::from(gain(word)).powi(2) * code::square(&word[2..]),
        _ => {
            let mut said = [0.0; CHUNK];
            let said = &mut said[..passage.shape.size];
            for word in passage.words() {
                say(word, said, 1.0);
            }
            square(said)
        }
    }
}

/// Number of the first chunk of a piece of `len` weights of which nothing sound is said.
pub(super) fn first_unsound(len: usize, words: u8, piece: &[u8]) -> Option<usize> {
    let mut passages = Passages::of(len, words, piece);
    let unsound = passages.by_ref().position(|passage| passage.is_none_or(|passage| !passage.is_sound()));
    unsound.or_else(|| (!passages.is_done()).then_some(0))
}

/// Whether a gain is one that training can have.
fn is_gain(gain: f32) -> bool {
    (0.0..=PEAK_MAX).contains(&gain)
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

/// Adds `times` what a word says to rotated `values`.
#[inline(always)]
fn say(word: &[u8], values: &mut [f32], times: f32) {
    let (gain, mut reader) = (times * gain(word), Reader::default());
    for (byte, block) in word[2..].iter().zip(values.as_chunks_mut::<BLOCK>().0) {
        for (values, said) in block.as_chunks_mut::<PAIR>().0.iter_mut().zip(reader.read(*byte)) {
            for place in 0..PAIR {
                values[place] += gain * said[place];
            }
        }
    }
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
        speak_of(TURN, values, Passage::even(values.len(), &[]), &mut out);
        out
    }

    fn rest(values: &[f32], words: u8) -> Vec<f32> {
        let mut said = vec![0.0; values.len()];
        decode(TURN, Passage::even(values.len(), &spoken(values, words)), &mut said);
        values.iter().zip(said).map(|(value, said)| value - said).collect()
    }

    /// Of something else two words tell 43 %.
    #[test]
    fn what_two_have_said_in_one_turn_is_said_again_in_two_words() {
        let said = |seed| {
            let mut values = [0.0; CHUNK];
            decode(TURN, Passage::even(CHUNK, &spoken(&normal(seed), 1)), &mut values);
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
            let passage = Passage::even(CHUNK, &chunk);
            decode(TURN, passage, &mut said);
            assert!((chunk_square(passage) / square(&said) - 1.0).abs() < 1e-5, "{words}");
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
        let passage = Passage::even(CHUNK, &chunk);
        silence(TURN, passage, &mut silent);
        assert!(square(&silent) < square(&rest(&values, 1)), "a word has one gain for all bytes");
        let mut said = [0.0; CHUNK];
        decode(TURN, passage, &mut said);
        let along = crate::delta::cosine(&silent, &said);
        assert!(along.abs() < 1e-4, "{along}");
    }

    #[test]
    fn rows_of_which_nothing_is_said_are_not_silenced() {
        let values = normal(4);
        let (rows, shape) = (0x8421, passage::shape_of(3, CHUNK));
        let mut words = vec![0; shape.bytes(3)];
        speak_of(TURN, &values, Passage { rows, shape, words: &[] }, &mut words);
        let about = |words| Passage { rows, shape, words };
        let mut silent = values;
        silence(TURN, about(&[]), &mut silent);
        assert_eq!(silent, values, "nothing was said");
        silence(TURN, about(&words), &mut silent);
        for (row, (before, after)) in values.chunks(passage::ROW).zip(silent.chunks(passage::ROW)).enumerate() {
            let left = square(after) / square(before);
            assert!(if rows >> row & 1 == 1 { left < 0.7 } else { before == after }, "{row}: {left}");
        }
    }

    #[test]
    fn what_is_beyond_all_training_is_left() {
        assert_eq!(rest(&[f32::MAX, 1.0], 1), [f32::MAX, 1.0]);
        assert_eq!(rest(&[f32::MIN_POSITIVE, 1e-40], 1), [f32::MIN_POSITIVE, 1e-40]);
        let mut endless = spoken(&[1.0], 1);
        assert!(Passage::even(1, &endless).is_sound());
        endless[..2].copy_from_slice(&half::bf16::MAX.to_le_bytes());
        assert!(!Passage::even(1, &endless).is_sound());
    }
}
