//! What the states of the trellis say of a step, and the reading of paths, two steps at a time.

/// Weights of a step, which a bit speaks of.
pub(super) const STEP: usize = 4;
/// A state is the last six bits.
const STATES: usize = 64;
/// States whose newest bit is zero, and those whose oldest is.
pub(super) const HALF: usize = STATES / 2;
/// Weights that a byte of a path speaks of.
pub(super) const BLOCK: usize = 8 * STEP;
/// What stands for one in [`DIRECTIONS`].
pub(super) const UNIT: i16 = 12;
/// Weights of two steps.
pub(super) const PAIR: usize = 2 * STEP;
/// What the last seven bits can be, which tell what two steps say.
const PAIRS_OF_STATES: usize = 2 * STATES;

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
pub(super) const ENTRIES: [[i16; HALF]; STEP] = entries();
/// What the last seven bits say of two steps.
const PAIRS: [[f32; PAIR]; PAIRS_OF_STATES] = pairs();
/// Squared lengths of these, where [`UNIT`] is one.
const SQUARES: [u32; PAIRS_OF_STATES] = squares();
/// Mean square of what is said of a weight.
pub(super) const MEAN_SQUARE: f32 = mean_square();

const fn entries() -> [[i16; HALF]; STEP] {
    let mut entries = [[0; HALF]; STEP];
    let mut at = 0;
    while at < HALF * STEP {
        entries[at % STEP][at / STEP] = DIRECTIONS[at / STEP][at % STEP];
        at += 1;
    }
    entries
}

/// What a state says of one place of a step.
const fn entry(state: usize, place: usize) -> i16 {
    let entry = DIRECTIONS[state / 2][place];
    if state & 1 == 0 { entry } else { -entry }
}

/// What seven bits say of one place of two steps.
const fn entry_of_pair(bits: usize, place: usize) -> i16 {
    entry(if place < STEP { bits / 2 } else { bits % STATES }, place % STEP)
}

const fn pairs() -> [[f32; PAIR]; PAIRS_OF_STATES] {
    let mut pairs = [[0.0; PAIR]; PAIRS_OF_STATES];
    let mut at = 0;
    while at < PAIRS_OF_STATES * PAIR {
        pairs[at / PAIR][at % PAIR] = entry_of_pair(at / PAIR, at % PAIR) as f32 / UNIT as f32;
        at += 1;
    }
    pairs
}

const fn squares() -> [u32; PAIRS_OF_STATES] {
    let mut squares = [0; PAIRS_OF_STATES];
    let mut at = 0;
    while at < PAIRS_OF_STATES * PAIR {
        let entry = entry_of_pair(at / PAIR, at % PAIR) as i32;
        squares[at / PAIR] += (entry * entry) as u32;
        at += 1;
    }
    squares
}

const fn mean_square() -> f32 {
    let (mut sum, mut bits) = (0, 0);
    while bits < PAIRS_OF_STATES {
        sum += SQUARES[bits];
        bits += 1;
    }
    sum as f32 / ((PAIRS_OF_STATES * PAIR) as f32 * UNIT as f32 * UNIT as f32)
}

/// Reads a path, byte by byte. It begins as if there had been zeros before.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Reader {
    bits: usize,
}

impl Reader {
    /// What a byte says of each two of its eight steps.
    #[inline(always)]
    pub(super) fn read(&mut self, byte: u8) -> [&'static [f32; PAIR]; 4] {
        self.pairs(byte).map(|bits| &PAIRS[bits])
    }

    /// Squared length of what a byte says.
    #[inline(always)]
    fn square(&mut self, byte: u8) -> u32 {
        let [a, b, c, d] = self.pairs(byte).map(|bits| SQUARES[bits]);
        a + b + c + d
    }

    #[inline(always)]
    fn pairs(&mut self, byte: u8) -> [usize; 4] {
        self.bits = self.bits << 8 | usize::from(byte);
        [6, 4, 2, 0].map(|later| (self.bits >> later) % PAIRS_OF_STATES)
    }
}

/// Squared length of what a path says. A sum of whole numbers: exact.
#[inline(always)]
pub(super) fn square(path: &[u8]) -> f64 {
    let (mut reader, mut sum) = (Reader::default(), 0);
    for byte in path {
        sum += reader.square(*byte);
    }
    f64::from(sum) / (f64::from(UNIT) * f64::from(UNIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as the module says it.
    fn said_plainly(path: &[u8]) -> Vec<f32> {
        let (mut state, mut said) = (0, Vec::new());
        for bit in path.iter().flat_map(|byte| (0..8).rev().map(move |place| byte >> place & 1)) {
            state = (2 * state + usize::from(bit)) % STATES;
            let sign = if bit == 0 { 1.0 } else { -1.0 };
            said.extend(DIRECTIONS[state / 2].map(|entry| sign * f32::from(entry) / f32::from(UNIT)));
        }
        said
    }

    #[test]
    fn two_steps_a_look_up_are_two_steps() {
        let mut rng = crate::rng::Rng::new(6);
        let path: Vec<u8> = (0..122).map(|_| rng.below(256) as u8).collect();
        let mut reader = Reader::default();
        let said: Vec<f32> = path.iter().flat_map(|byte| reader.read(*byte)).flatten().copied().collect();
        assert_eq!(said, said_plainly(&path));
        assert!((square(&path) / crate::delta::square(&said) - 1.0).abs() < 1e-6);
    }
}
