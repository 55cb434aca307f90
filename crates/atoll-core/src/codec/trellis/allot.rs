//! Of what a piece speaks, and how much. A step of training moves the rows of an embedding whose tokens came by, and others
//! hardly at all: words about all of them tell a quarter of the former and move the latter by chance.
//!
//! ```text
//! told  = Σ over passages  E · (1 − LEFT^words)     E: what the rows that it is about have of the energy
//! bytes = Σ over passages  head + words · word
//! ```
//!
//! The most is told in so many bytes where no word tells more for its bytes than one that was not said. So for a price of a
//! byte each chunk finds its best passage by itself, and the price is the lowest at which all fit (Lagrange; "reverse
//! water-filling" where each word has one weight, Cover and Thomas, Elements of Information Theory, section 10.3).

use std::array;

use super::passage::{HEAD, KINDS, MARK, ROW, ROWS, WORDS_MAX, head_of, rows_of, shape_of};
use super::{CHUNK, LEAVES, LEFT};

/// An uneven piece must tell so many times what an even one does: it takes longer to read and to merge.
const WORTH: f64 = 1.1;
/// Halvings, of its logarithm, of what is not known of a price.
const HALVINGS: usize = 24;
/// How far from where it is looked for a price may be, in either direction.
const FAR: f64 = 1e6;
/// Sums that grow side by side.
const LANES: usize = 16;

/// A passage to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Allotment {
    pub(super) words: u8,
    pub(super) kind: usize,
    /// A bit for each row that it is about.
    pub(super) rows: u32,
}

/// How the energy of a chunk is spread over its rows.
struct Chunk {
    len: usize,
    /// Its rows, those with the most first.
    order: [u8; ROWS],
    /// What the rows have that a passage of each kind is about; none of a kind for which the chunk has too few.
    energies: [Option<f64>; KINDS + 1],
}

/// A passage that a chunk may have.
#[derive(Clone, Copy)]
struct Offer {
    words: usize,
    kind: usize,
    bytes: usize,
    told: f64,
}

/// The best passages about the finite `values` of a piece in so many `bytes`, if they tell much more than so many `words`
/// about each chunk.
#[inline(always)]
pub(super) fn allot(values: &[f32], words: u8, bytes: usize) -> Option<Vec<Allotment>> {
    let room = bytes.checked_sub(MARK.len())?;
    let mut chunks = Vec::with_capacity(values.len().div_ceil(CHUNK));
    for values in values.chunks(CHUNK) {
        chunks.push(Chunk::of(values));
    }
    let energy: f64 = chunks.iter().filter_map(|chunk| chunk.energies[0]).sum();
    let [left_before, left] = [words - 1, words].map(|words| energy * LEAVES[usize::from(words)]);
    let even = energy - left;
    // What the last words of an even piece cost, or rather those after them.
    let usual = LEFT * (left_before - left) * f64::from(words) / bytes as f64;
    if !(usual.is_normal() && most_told(&chunks, usual, room) > WORTH * even) {
        return None;
    }
    let price = lowest_price(&chunks, usual, room);
    let told: f64 = chunks.iter().map(|chunk| chunk.best(price).told).sum();
    let is_worth = needs(&chunks, price) <= room && told > WORTH * even;
    is_worth.then(|| chunks.iter().map(|chunk| chunk.allotment(chunk.best(price))).collect())
}

/// More than this no passages tell in so many bytes, whatever the price (weak duality).
fn most_told(chunks: &[Chunk], price: f64, room: usize) -> f64 {
    let worth = |chunk: &Chunk| {
        let Offer { told, bytes, .. } = chunk.best(price);
        told - price * bytes as f64
    };
    chunks.iter().map(worth).sum::<f64>() + price * room as f64
}

/// The lowest price, near the `usual` one, at which all chunks' best passages fit; the highest that is near if there is none.
fn lowest_price(chunks: &[Chunk], usual: f64, room: usize) -> f64 {
    let (mut low, mut high) = (usual / FAR, usual * FAR);
    for _ in 0..HALVINGS {
        let price = (low * high).sqrt();
        if needs(chunks, price) <= room { high = price } else { low = price }
    }
    high
}

/// Bytes of all chunks' best passages.
fn needs(chunks: &[Chunk], price: f64) -> usize {
    chunks.iter().map(|chunk| chunk.best(price).bytes).sum()
}

impl Chunk {
    #[inline(always)]
    fn of(values: &[f32]) -> Self {
        let mut energies = [0.0; ROWS];
        for (energy, row) in energies.iter_mut().zip(values.chunks(ROW)) {
            *energy = f64::from(square(row));
        }
        let mut order: [u8; ROWS] = array::from_fn(|row| row as u8);
        order.sort_unstable_by(|&a, &b| energies[usize::from(b)].total_cmp(&energies[usize::from(a)]).then(a.cmp(&b)));
        let of_kind = |kind: usize| {
            let rows = ROWS >> kind;
            let all = || order[..rows].iter().map(|&row| energies[usize::from(row)]).sum();
            (kind == 0 || rows < rows_of(values.len())).then(all)
        };
        Self { len: values.len(), order, energies: array::from_fn(of_kind) }
    }

    /// The passage that is worth the most where a byte has a `price`: none where no word is worth its own.
    fn best(&self, price: f64) -> Offer {
        let silent = Offer { words: 0, kind: 0, bytes: HEAD, told: 0.0 };
        let mut best = (0.0, silent);
        for (kind, energy) in self.energies.iter().enumerate() {
            let Some(energy) = *energy else { continue };
            let word = shape_of(kind, self.len).word();
            // Each word tells LEFT times what the one before it did.
            let least = price * word as f64 / (energy * (1.0 - LEFT));
            let words = LEAVES[..usize::from(WORDS_MAX)].partition_point(|&share| share >= least);
            let bytes = head_of(kind) + words * word;
            let told = energy * (1.0 - LEAVES[words]);
            let worth = told - price * (bytes - HEAD) as f64;
            if worth > best.0 {
                best = (worth, Offer { words, kind, bytes, told });
            }
        }
        best.1
    }

    fn allotment(&self, Offer { words, kind, .. }: Offer) -> Allotment {
        let rows = match kind {
            0 => u32::MAX,
            _ => self.order[..ROWS >> kind].iter().fold(0, |rows, row| rows | 1 << row),
        };
        Allotment { words: words as u8, kind, rows }
    }
}

/// Squared length of a row; infinite if it is beyond all training.
#[inline(always)]
fn square(row: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (groups, rest) = row.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            lanes[lane] += group[lane] * group[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|value| value * value).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of which `active` rows are normal, each time others, and all others a hundredth of it.
    fn uneven(seed: u64, active: impl Fn(usize) -> u64, len: usize) -> Vec<f32> {
        let mut rng = crate::rng::Rng::new(seed);
        let mut values = Vec::new();
        for row in 0..len.div_ceil(ROW) {
            let scale = if rng.below(ROWS as u64) < active(row / ROWS) { 1.0 } else { 0.01 };
            values.extend((0..ROW.min(len - row * ROW)).map(|_| (scale * rng.normal()) as f32));
        }
        values
    }

    fn told(values: &[f32], allotments: &[Allotment]) -> f64 {
        let of = |(values, allotment): (&[f32], &Allotment)| {
            let rows = values.chunks(ROW).enumerate().filter(|(row, _)| allotment.rows >> row & 1 == 1);
            rows.map(|(_, row)| f64::from(square(row))).sum::<f64>() * (1.0 - LEAVES[usize::from(allotment.words)])
        };
        values.chunks(CHUNK).zip(allotments).map(of).sum()
    }

    fn bytes_of(len: usize, allotments: &[Allotment]) -> usize {
        let lens = (0..len).step_by(CHUNK).map(|start| CHUNK.min(len - start));
        let bytes = |(len, a): (usize, &Allotment)| head_of(a.kind) + shape_of(a.kind, len).bytes(a.words);
        MARK.len() + lens.zip(allotments).map(bytes).sum::<usize>()
    }

    #[test]
    fn what_is_spread_evenly_is_told_evenly() {
        for values in
            [uneven(1, |_| 32, 64 * CHUNK), uneven(2, |_| 29, 9000), vec![0.0; 5000], vec![1e30; 5000], vec![]]
        {
            assert_eq!(allot(&values, 1, values.len() / 33), None);
        }
    }

    #[test]
    fn nearly_all_words_are_about_the_rows_that_moved() {
        let values = uneven(3, |chunk| chunk as u64 % 8, 64 * CHUNK);
        let bytes = 64 * shape_of(0, CHUNK).word();
        let allotments = allot(&values, 1, bytes).expect("three rows of 32 moved");
        let energy: f64 = values.chunks(ROW).map(|row| f64::from(square(row))).sum();
        let share = told(&values, &allotments) / energy;
        assert!(share > 0.75, "{share}");
        let used = bytes_of(values.len(), &allotments);
        assert!(used <= bytes && used > bytes * 19 / 20, "{used} of {bytes}");
    }

    /// No passage of another chunk's bytes is as good: what any chunk would gain by a word more is less than any loses by one
    /// less.
    #[test]
    fn no_word_would_tell_more_elsewhere() {
        let values = uneven(4, |chunk| 1 + chunk as u64 % 5, 40 * CHUNK + 700);
        let allotments = allot(&values, 2, values.len() / 16).expect("few rows moved");
        let gain = |number: usize, words: i32| {
            let chunk = Chunk::of(values.chunks(CHUNK).nth(number).expect("a chunk"));
            let Allotment { words: said, kind, .. } = allotments[number];
            let energy = chunk.energies[kind].expect("it was chosen");
            let wanted = usize::from(said).checked_add_signed(words as isize).filter(|&words| words < LEAVES.len())?;
            let told = LEAVES[wanted] - LEAVES[usize::from(said)];
            Some((energy * told / shape_of(kind, chunk.len).word() as f64).abs())
        };
        let all = 0..allotments.len();
        let most = all.clone().filter_map(|number| gain(number, 1)).fold(0.0, f64::max);
        let least = all.filter_map(|number| gain(number, -1)).fold(f64::INFINITY, f64::min);
        assert!(most <= least, "{most} {least}");
    }
}
