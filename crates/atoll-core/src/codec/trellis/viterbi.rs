//! Viterbi's algorithm: the path that goes farthest along a chunk.

use super::CHUNK;
use super::code::{BLOCK, ENTRIES, HALF, STEP};

/// Most steps of a chunk.
const STEPS: usize = CHUNK / STEP;
/// The most that any weight counts.
const MOST: f32 = 127.0;
/// How far behind all states are at first but the one whose bits are all zero: farther than what they could make up for.
const BEHIND: i16 = -20_000;
/// Parts of a path that are traced side by side.
const SEGMENTS: usize = 4;
/// Bytes behind a segment at whose end its tracing begins.
const LEAD: usize = 8;

/// How far the best path goes that ends in a state: states whose oldest bit is zero, and those whose oldest is one.
type Sums = [[i16; HALF]; 2];
/// For each two states that differ in their newest bit, [`HALF`] if the best way there comes from the state whose oldest bit
/// is one, else zero.
type Choices = [u8; HALF];

/// Writes the bits of the path along which `scale` times `values` go farthest (Viterbi), and returns how far that is. It begins
/// as if there had been zeros before. In whole numbers, of which a register holds many, and whose sums are the same in
/// any order.
#[inline(always)]
pub(super) fn find_path(values: &[f32], scale: f32, path: &mut [u8]) -> i32 {
    let mut choices = [[0; HALF]; STEPS];
    let (mut sums, mut far) = ([[BEHIND; HALF]; 2], 0);
    sums[0][0] = 0;
    for (values, choices) in values.as_chunks().0.iter().zip(choices.as_chunks_mut::<8>().0) {
        let steps = round(values, scale);
        let (steps, _) = steps.as_chunks();
        // Written out, for in a loop sums would wait in memory from step to step.
        sums = go_on(sums, steps[0], &mut choices[0]);
        sums = go_on(sums, steps[1], &mut choices[1]);
        sums = go_on(sums, steps[2], &mut choices[2]);
        sums = go_on(sums, steps[3], &mut choices[3]);
        sums = go_on(sums, steps[4], &mut choices[4]);
        sums = go_on(sums, steps[5], &mut choices[5]);
        sums = go_on(sums, steps[6], &mut choices[6]);
        sums = go_on(sums, steps[7], &mut choices[7]);
        far += level(&mut sums);
    }
    let last = farthest(&sums);
    trace(choices.as_chunks().0, last, path);
    far + i32::from(sums.as_flattened()[last])
}

/// Writes the bits of the best path that ends in state `last`, from its end to its beginning. Each step must wait for the
/// one behind it; so the path is cut up, and all segments are traced side by side, but for the last from a guess: best
/// paths to all states are one, a few dozen steps back. Where a guess was wrong its segment is traced again.
#[inline(always)]
fn trace(choices: &[[Choices; 8]], last: usize, path: &mut [u8]) {
    let len = path.len() / SEGMENTS;
    let (even, rest) = path.split_at_mut(SEGMENTS * len);
    let last = trace_all(&choices[SEGMENTS * len..], last, rest);
    if len < LEAD {
        trace_all(choices, last, even);
        return;
    }
    let mut guesses = [0; SEGMENTS - 1];
    for at in (len..len + LEAD).rev() {
        go_back(std::array::from_fn(|segment| &choices[segment * len + at]), &mut guesses);
    }
    let [first, second, third] = guesses;
    let mut states = [first, second, third, last];
    for at in (0..len).rev() {
        let bytes = go_back(std::array::from_fn(|segment| &choices[segment * len + at]), &mut states);
        for (segment, byte) in bytes.into_iter().enumerate() {
            even[segment * len + at] = byte;
        }
    }
    for segment in (0..SEGMENTS - 1).rev() {
        if states[segment + 1] != guesses[segment] {
            let range = segment * len..(segment + 1) * len;
            states[segment] = trace_all(&choices[range.clone()], states[segment + 1], &mut even[range]);
        }
    }
}

/// Traces a whole path and returns the state before it.
#[inline(always)]
fn trace_all(choices: &[[Choices; 8]], last: usize, path: &mut [u8]) -> usize {
    let mut state = [last];
    for (byte, choices) in path.iter_mut().zip(choices).rev() {
        [*byte] = go_back([choices], &mut state);
    }
    state[0]
}

/// Takes each state eight steps back, of which it returns the bits.
#[inline(always)]
fn go_back<const PATHS: usize>(choices: [&[Choices; 8]; PATHS], states: &mut [usize; PATHS]) -> [u8; PATHS] {
    let mut bytes = [0; PATHS];
    for place in 0..8 {
        for path in 0..PATHS {
            let state = states[path];
            bytes[path] |= ((state & 1) << place) as u8;
            let rest = state / 2 % HALF;
            states[path] = rest | usize::from(choices[path][7 - place][rest]);
        }
    }
    bytes
}

/// The nearest whole numbers to `scale` times the values, each in both halves of a word: a load fills a vector with words, but not
/// with half ones.
#[inline(always)]
fn round(values: &[f32; BLOCK], scale: f32) -> [u32; BLOCK] {
    /// Added to a small number, it leaves the nearest whole one in the lowest bits.
    const SHIFT: f32 = 12_582_912.0;
    let mut words = [0; BLOCK];
    for (word, value) in words.iter_mut().zip(values) {
        let whole = ((value * scale).clamp(-MOST, MOST) + SHIFT).to_bits() & 0xffff;
        *word = whole << 16 | whole;
    }
    words
}

/// Makes room for what is to come: keeps differences, which alone matter, and returns what it takes from all.
#[inline(always)]
fn level(sums: &mut Sums) -> i32 {
    let first = sums[0][0];
    for half in sums {
        for sum in half {
            *sum = sum.saturating_sub(first);
        }
    }
    i32::from(first)
}

#[inline(always)]
fn farthest(sums: &Sums) -> usize {
    let sums = sums.as_flattened();
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
fn go_on([zero, one]: Sums, [a, b, c, d]: [u32; STEP], choices: &mut Choices) -> Sums {
    let (mut best, mut along) = ([0i16; HALF], [0i16; HALF]);
    for at in 0..HALF {
        choices[at] = if one[at] > zero[at] { HALF as u8 } else { 0 };
        best[at] = one[at].max(zero[at]);
    }
    let [a, b, c, d]: [[i16; HALF]; 4] = [a, b, c, d].map(|value| bytemuck::cast([value; HALF / 2]));
    for at in 0..HALF {
        let times = |value: [i16; HALF], place: usize| value[at].wrapping_mul(ENTRIES[place][at]);
        along[at] = times(a, 0).wrapping_add(times(b, 1)).wrapping_add(times(c, 2)).wrapping_add(times(d, 3));
    }
    let (mut ahead, mut back) = ([0i16; HALF], [0i16; HALF]);
    for at in 0..HALF {
        ahead[at] = best[at].saturating_add(along[at]);
        back[at] = best[at].saturating_sub(along[at]);
    }
    let (mut zero, mut one) = ([0i16; HALF], [0i16; HALF]);
    for at in 0..HALF / 2 {
        zero[2 * at] = ahead[at];
        zero[2 * at + 1] = back[at];
        one[2 * at] = ahead[HALF / 2 + at];
        one[2 * at + 1] = back[HALF / 2 + at];
    }
    [zero, one]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two paths are one after a while where choices are made by chance, and stay two where the last but one bit decides: then
    /// guesses are wrong.
    #[test]
    fn a_path_is_the_same_however_it_is_traced() {
        let mut rng = crate::rng::Rng::new(3);
        let by_chance = move |_| rng.chance(0.5);
        let by_place = |rest: usize| rest % 2 == 1;
        let choosers: [Box<dyn FnMut(usize) -> bool>; 2] = [Box::new(by_chance), Box::new(by_place)];
        for mut is_one in choosers {
            for bytes in [1, 15, 30, 31, 32, 35, 60, 121] {
                // What lies behind the path's end is not of it.
                let mut choices = vec![[[0; HALF]; 8]; bytes + 6];
                for (at, choice) in choices.as_flattened_mut().as_flattened_mut().iter_mut().enumerate() {
                    *choice = if is_one(at % HALF) { HALF as u8 } else { 0 };
                }
                let (mut quick, mut plain) = (vec![0; bytes], vec![0; bytes]);
                trace(&choices, 37, &mut quick);
                trace_all(&choices, 37, &mut plain);
                assert_eq!(quick, plain, "{bytes}");
            }
        }
    }
}
