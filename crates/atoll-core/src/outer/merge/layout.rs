//! The passes of a merge over a fragment's weights.
//!
//! ```text
//! fragment   |   tensor    |      tensor        | tensor |
//! stretches  |      |      |      |      |      |     |  |    what a team's member takes at a time: 16 chunks of a tensor
//! chunks     ||||||||||||||||||||||||||||||||||||||||||||||    what is read of all contributions, into a core's cache
//! ```
//!
//! Chunks that are a tensor's own and of which all speak in one turn are added up before they are rotated back (`Unison`).
//!
//! Chunks are the payloads' own, so where two tensors meet a chunk is read for both. Sums over a tensor are sums of
//! its stretches' sums in their order, and these of their chunks', whoever computed them: the same bits on every machine.

use std::ops::Range;

use super::{Part, Weighted};
use crate::codec::{AT_A_TIME, CHUNK, Unison, Unpacked, add_all};
use crate::delta::{Products, square};
use crate::manifest::{FragmentId, Manifest};
use crate::model::TensorKind;
use crate::simd::simd;
use crate::team::{Team, share_out};

/// Weights of a stretch.
const STRETCH: usize = 16 * CHUNK;

/// The tensors and stretches of a fragment.
pub(super) struct Layout {
    kinds: Vec<TensorKind>,
    stretches: Vec<Stretch>,
}

/// A part of a tensor.
struct Stretch {
    /// The tensor, as an index into the layout's.
    tensor: usize,
    /// Its place in the fragment.
    range: Range<usize>,
}

/// What contributions v and another vector o have to do with each other, over a tensor or a part of it.
#[derive(Debug, Clone)]
pub(super) struct Sums {
    /// ‖v‖² of each contribution.
    pub(super) squares: Vec<f64>,
    /// v·o of each contribution.
    pub(super) alongs: Vec<f64>,
    /// About what ‖v‖² of each contribution would be if it told all; of no meaning in sums over another vector alone.
    pub(super) wishes: Vec<f64>,
    /// ‖o‖².
    pub(super) other: f64,
}

impl Sums {
    fn zero(contributions: usize) -> Self {
        let zeros = || vec![0.0; contributions];
        Self { squares: zeros(), alongs: zeros(), wishes: zeros(), other: 0.0 }
    }

    fn add(&mut self, more: &Self) {
        self.squares.iter_mut().zip(&more.squares).for_each(|(sum, more)| *sum += more);
        self.alongs.iter_mut().zip(&more.alongs).for_each(|(sum, more)| *sum += more);
        self.wishes.iter_mut().zip(&more.wishes).for_each(|(sum, more)| *sum += more);
        self.other += more.other;
    }
}

impl Layout {
    pub(super) fn new(manifest: &Manifest, fragment: FragmentId) -> Self {
        let mut layout = Self { kinds: Vec::new(), stretches: Vec::new() };
        for (tensor, place) in manifest.places(fragment).enumerate() {
            layout.kinds.push(manifest.tensors()[place.tensor].kind);
            let ranges = cut(&place.range, STRETCH);
            layout.stretches.extend(ranges.map(|range| Stretch { tensor, range }));
        }
        layout
    }

    /// Weights of the fragment.
    pub(super) fn len(&self) -> usize {
        self.stretches.last().map_or(0, |stretch| stretch.range.end)
    }

    /// Where each tensor ends.
    pub(super) fn ends(&self) -> impl Iterator<Item = usize> + '_ {
        let last = |tensors: &[Stretch]| tensors.last().map_or(0, |stretch| stretch.range.end);
        self.stretches.chunk_by(|a, b| a.tensor == b.tensor).map(last)
    }

    pub(super) fn is_embedding(&self, tensor: usize) -> bool {
        self.kinds[tensor] == TensorKind::Embedding
    }

    /// For each tensor the length of each contribution and, if some are late, how far these go along the momentum.
    pub(super) fn lengths(&self, contributions: &[Weighted<'_>], momentum: &[f32], team: &dyn Team) -> Vec<Sums> {
        let some_stale = contributions.iter().any(|contribution| contribution.stale);
        let momentum = Some(momentum).filter(|momentum| some_stale && !momentum.is_empty());
        let sums = share_out(&self.stretches, team, |_, stretch| {
            simd(
                #[inline(always)]
                || stretch.lengths(contributions, momentum),
            )
        });
        self.by_tensor(&sums, contributions.len())
    }

    /// Writes the sum of all `parts`, which are given for each tensor and contribution, into `values`. For each tensor,
    /// how far each contribution goes along the sum.
    pub(super) fn add_up(
        &self,
        values: &mut [f32],
        contributions: &[Weighted<'_>],
        parts: &[Vec<Part>],
        momentum: &[f32],
        team: &dyn Team,
    ) -> Vec<Sums> {
        let places = self.stretches.iter().zip(self.cut(values));
        let sums = share_out(places, team, |_, (stretch, values)| {
            simd(
                #[inline(always)]
                || stretch.add_up(values, contributions, &parts[stretch.tensor], momentum),
            )
        });
        self.by_tensor(&sums, contributions.len())
    }

    /// Sums over stretches to sums over tensors.
    fn by_tensor(&self, stretches: &[Sums], contributions: usize) -> Vec<Sums> {
        let mut tensors = vec![Sums::zero(contributions); self.kinds.len()];
        self.stretches.iter().zip(stretches).for_each(|(stretch, sums)| tensors[stretch.tensor].add(sums));
        tensors
    }

    /// `values` by stretches.
    fn cut<'v>(&self, mut values: &'v mut [f32]) -> Vec<&'v mut [f32]> {
        let cut = |stretch: &Stretch| {
            let (piece, rest) = std::mem::take(&mut values).split_at_mut(stretch.range.len());
            values = rest;
            piece
        };
        self.stretches.iter().map(cut).collect()
    }
}

/// A payload's chunk, or as much of it as belongs to a tensor.
struct Chunk {
    number: usize,
    /// Its place in the whole chunk.
    inner: Range<usize>,
    /// Its place in the fragment.
    outer: Range<usize>,
}

impl Stretch {
    /// See [`Layout::lengths`].
    #[inline(always)]
    fn lengths(&self, contributions: &[Weighted<'_>], momentum: Option<&[f32]>) -> Sums {
        let mut sums = Sums::zero(contributions.len());
        let mut room = Unpacked::default();
        for (index, Weighted { payload, stale, .. }) in contributions.iter().enumerate() {
            let momentum = momentum.filter(|_| *stale);
            for chunk in self.chunks() {
                let is_whole = chunk.inner.len() == payload.chunk_len(chunk.number);
                let known = if is_whole { payload.chunk_square(chunk.number) } else { None };
                let told = payload.told(chunk.number);
                if known.is_none() || momentum.is_some() {
                    room.read(payload, chunk.number, chunk.inner);
                }
                let square = match known {
                    Some(square) => square,
                    None => room.part().square(),
                };
                sums.squares[index] += square;
                if told > 0.0 {
                    sums.wishes[index] += square / told;
                }
                if let Some(momentum) = momentum {
                    sums.alongs[index] += room.part().along(&momentum[chunk.outer]);
                }
            }
        }
        sums.other = momentum.map_or(0.0, |momentum| square(&momentum[self.range.clone()]));
        sums
    }

    /// See [`Layout::add_up`].
    #[inline(always)]
    fn add_up(&self, values: &mut [f32], contributions: &[Weighted<'_>], parts: &[Part], momentum: &[f32]) -> Sums {
        let mut sums = Sums::zero(contributions.len());
        let mut reading = Reading::new(contributions.len());
        let unison = Unison::of(contributions.iter().map(|contribution| &contribution.payload));
        let unison = unison.filter(|_| parts.iter().all(|part| part.turn == 0.0));
        for chunk in self.chunks() {
            let out = &mut values[chunk.outer.start - self.range.start..chunk.outer.end - self.range.start];
            let payloads = || contributions.iter().map(|contribution| &contribution.payload);
            let unison = unison.filter(|unison| unison.holds(chunk.number, payloads()));
            if let (Some(unison), Ok(out)) = (unison, <&mut [f32; CHUNK]>::try_from(&mut *out)) {
                let shares = payloads().zip(parts.iter().map(|part| part.share as f32));
                unison.add_up(chunk.number, shares, out, &mut sums.alongs);
            } else {
                // Without momentum nothing is turned towards it.
                let momentum = momentum.get(chunk.outer.clone()).unwrap_or_default();
                if reading.read(&chunk, contributions) {
                    reading.add_up(parts, momentum, out, &mut sums.alongs);
                } else {
                    reading.add_up_sparse(parts, momentum, out, &mut sums.alongs);
                }
            }
            sums.other += square(out);
        }
        sums
    }

    fn chunks(&self) -> impl Iterator<Item = Chunk> {
        cut(&self.range, CHUNK).map(|outer| {
            let number = outer.start / CHUNK;
            Chunk { number, inner: outer.start - number * CHUNK..outer.end - number * CHUNK, outer }
        })
    }
}

/// Where a chunk of every contribution is read.
struct Reading<'a> {
    rooms: Vec<Unpacked<'a>>,
    /// As many values of each as are read at a time.
    pieces: Vec<[f32; AT_A_TIME]>,
    /// How far each goes along the sum of a chunk, while that is made.
    products: Vec<Products>,
}

impl<'a> Reading<'a> {
    fn new(contributions: usize) -> Self {
        let rooms = (0..contributions).map(|_| Unpacked::default()).collect();
        let products = (0..contributions).map(|_| Products::default()).collect();
        Self { rooms, pieces: vec![[0.0; AT_A_TIME]; contributions], products }
    }

    /// Takes in a chunk of every contribution. Whether all speak of all its weights.
    #[inline(always)]
    fn read(&mut self, chunk: &Chunk, contributions: &[Weighted<'a>]) -> bool {
        let mut all_dense = true;
        for (Weighted { payload, .. }, room) in contributions.iter().zip(&mut self.rooms) {
            room.read(payload, chunk.number, chunk.inner.clone());
            all_dense &= room.part().is_dense();
        }
        all_dense
    }

    /// Writes the sum of all `parts` of a chunk, of whose weights all speak, and adds to `alongs` how far each goes along it.
    /// Piece by piece, so that what is unpacked for the one is still in the nearest cache for the other.
    #[inline(always)]
    fn add_up(&mut self, parts: &[Part], momentum: &[f32], out: &mut [f32], alongs: &mut [f64]) {
        self.products.iter_mut().for_each(|products| *products = Products::default());
        // Of most pieces the length is known when this is compiled.
        let (whole, rest) = out.as_chunks_mut::<AT_A_TIME>();
        let end = whole.len() * AT_A_TIME;
        for (number, out) in whole.iter_mut().enumerate() {
            self.add_up_piece(parts, momentum, number * AT_A_TIME, out);
        }
        if !rest.is_empty() {
            self.add_up_piece(parts, momentum, end, rest);
        }
        for (along, products) in alongs.iter_mut().zip(&self.products) {
            *along += products.total();
        }
    }

    /// The same for a piece that begins at `start`.
    #[inline(always)]
    fn add_up_piece(&mut self, parts: &[Part], momentum: &[f32], start: usize, out: &mut [f32]) {
        let mut sum = [0.0f32; AT_A_TIME];
        let sum = &mut sum[..out.len()];
        for ((part, room), piece) in parts.iter().zip(&self.rooms).zip(&mut self.pieces) {
            let piece = &mut piece[..out.len()];
            room.part().piece(start, piece);
            add_all(sum, part.share as f32, piece);
            if part.turn != 0.0 {
                add_all(sum, part.turn as f32, &momentum[start..]);
            }
        }
        out.copy_from_slice(sum);
        let mut wide = [0.0f64; AT_A_TIME];
        let wide = &mut wide[..out.len()];
        for (wide, sum) in wide.iter_mut().zip(&*sum) {
            *wide = f64::from(*sum);
        }
        for (products, piece) in self.products.iter_mut().zip(&self.pieces) {
            products.add(wide, &piece[..wide.len()]);
        }
    }

    /// The same of a chunk of which some speak in part.
    #[inline(always)]
    fn add_up_sparse(&self, parts: &[Part], momentum: &[f32], out: &mut [f32], alongs: &mut [f64]) {
        out.fill(0.0);
        for (part, room) in parts.iter().zip(&self.rooms) {
            room.part().add_to(part.share as f32, out);
            if part.turn != 0.0 {
                add_all(out, part.turn as f32, momentum);
            }
        }
        for (along, room) in alongs.iter_mut().zip(&self.rooms) {
            *along += room.part().along(out);
        }
    }
}

/// Cuts a range wherever a multiple of `len` lies in it.
fn cut(range: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *range;
    (start / len..end.div_ceil(len)).map(move |number| start.max(number * len)..end.min((number + 1) * len))
}
