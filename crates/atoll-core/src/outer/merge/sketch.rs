//! The products of contributions with one another, on a sketch: some chunks of the fragment, spread over it. Of M
//! contributions it takes every 2·M-th chunk, so M²/2 products cost a quarter of a pass over everything. Of small fragments it takes
//! more: a chunk has 4,096 weights, and 32 of them tell a cosine to 0.003. From 33 to 128 contributions these become fewer, down to
//! eight, so that the cost goes on to grow with M and not with its square: what counts is the median cosine to many peers.
//!
//! Which chunks follows from the contributions' names: no site knows them before all have sent theirs, so none can
//! behave where it is looked at only.

use super::Weighted;
use super::guard::Angles;
use crate::codec::{CHUNK, Unpacked};
use crate::hash::Digest;
use crate::rng::mix;
use crate::simd::simd;
use crate::team::{Team, share_out};

/// Chunks that are looked at, if there are as many, of up to so many contributions; of M times as many an M-th, …
const CHUNKS: usize = 32;
/// … but no fewer than these: whoever is bad in a tenth of its chunks is seen in more than half of the rounds.
const CHUNKS_MIN: usize = 8;
/// Chunks that a team's member takes at a time.
const STRETCH: usize = 4;

/// Products of all pairs.
pub(super) struct Sketch {
    products: Vec<f64>, // (M,M)
    weights: usize,
}

impl Sketch {
    /// Takes the products of contributions of `len` weights.
    pub(super) fn new(contributions: &[Weighted<'_>], len: usize, team: &dyn Team) -> Self {
        let chunks = choose(contributions, len.div_ceil(CHUNK));
        let weights = chunks.iter().map(|number| CHUNK.min(len - number * CHUNK)).sum();
        let parts = share_out(chunks.chunks(STRETCH), team, |_, numbers| {
            simd(
                #[inline(always)]
                || products(contributions, numbers),
            )
        });
        let mut products = vec![0.0; contributions.len().pow(2)];
        parts.iter().for_each(|part| products.iter_mut().zip(part).for_each(|(sum, more)| *sum += more));
        Self { products, weights }
    }

    pub(super) fn angles(&self) -> Angles<'_> {
        Angles { products: &self.products, weights: self.weights }
    }
}

/// How many of so many chunks are looked at.
fn wanted(contributions: usize, chunks: usize) -> usize {
    let count = contributions.max(1);
    let least = (CHUNKS * CHUNKS / count).clamp(CHUNKS_MIN, CHUNKS);
    (chunks / (2 * count)).max(least).min(chunks)
}

/// Chunks to look at, ascending: one in each of as many equal parts, by chance.
fn choose(contributions: &[Weighted<'_>], chunks: usize) -> Vec<usize> {
    let wanted = wanted(contributions.len(), chunks);
    let names = Digest::of_all(contributions.iter().map(|contribution| &contribution.name));
    let seed = names.0.iter().take(8).fold(0, |seed, &byte| seed << 8 | u64::from(byte));
    let pick = |part: usize| {
        let (start, end) = (part * chunks / wanted, (part + 1) * chunks / wanted);
        start + (mix(seed ^ part as u64) % (end - start) as u64) as usize
    };
    (0..wanted).map(pick).collect()
}

/// Products over these chunks.
#[inline(always)]
fn products(contributions: &[Weighted<'_>], chunks: &[usize]) -> Vec<f64> {
    let count = contributions.len();
    let mut products = vec![0.0; count * count];
    let mut rooms: Vec<Unpacked> = contributions.iter().map(|_| Unpacked::default()).collect();
    let mut spread = [0.0; CHUNK];
    for &number in chunks {
        let len = contributions.first().map_or(0, |contribution| contribution.payload.chunk_len(number));
        let spread = &mut spread[..len];
        for (a, contribution) in contributions.iter().enumerate() {
            rooms[a].read(&contribution.payload, number, 0..len);
            rooms[a].unpack();
            spread.fill(0.0);
            rooms[a].part().add_to(1.0, spread);
            for (b, room) in rooms[..=a].iter().enumerate() {
                let product = room.part().along(spread);
                products[a * count + b] += product;
                products[b * count + a] = products[a * count + b];
            }
        }
    }
    products
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_contributions_cost_a_chunk_fewer_products_each() {
        for chunks in [0, 1, 3, 112, 5000] {
            for few in [1, 2, 3, 32] {
                assert_eq!(wanted(few, chunks), (chunks / (2 * few)).max(32).min(chunks), "as it always was");
            }
        }
        assert_eq!([33, 64, 128, 256, 4096].map(|count| wanted(count, 112)), [31, 16, 8, 8, 8]);
        assert_eq!([33, 128, 4096].map(|count| wanted(count, 100_000)), [1515, 390, 12]);
    }
}
