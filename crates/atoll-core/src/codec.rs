//! How weights are written for the wire. A codec is a pure function from a slice of `f32` to bytes
//! and back; a payload names its codec and its length, so it can be decoded without context.
//!
//! ```text
//! payload   0        1              5
//!           | codec  | count: u32   | body …                      (little endian throughout)
//! f32       body = count × 4 bytes
//! bf16      body = count × 2 bytes, round to nearest even, saturating
//! e3m0      body = for each block of 128 values
//!                  | scale: bf16 | 64 bytes, two values each, low nibble first |
//!           nibble = sign (bit 3) and exponent e (bits 0–2): 0, or ± scale · 2^(e−7)
//! sparse    body = | keep: u16 | then for each chunk of 4,096 values, of which the `keep` greatest are written,
//!                  | 4 levels: bf16 | codes, 2 bits each, lowest first | positions: Elias–Fano, see below |
//!           code = large (bit 0), negative (bit 1)
//! tcq        body = | words: u8 | turn: u8 | then for each chunk of 4,096 values and for each word
//!                  | gain: bf16 | path: 121 bytes, highest bit first |             see `trellis`
//!           or, of a piece of 64 chunks, in as many bytes more of some chunks and less of others: see `trellis/passage`
//! ```
//!
//! E3M0 costs 4.125 bits per value; Streaming DiLoCo (arXiv 2501.18512, section 3.3) found it to
//! carry pseudo-gradients without loss. The scale is fitted by least squares after the exponents are
//! chosen, because rounding to powers of two alone shrinks what it rounds.
//!
//! Sparse is for two ends that keep an error feedback (SparseLoCo, arXiv 2508.15706): what one payload leaves out
//! stays in a residual and is part of the next. With `keep` 96 it costs 0.234 bits per value, with 224 0.461. So is
//! trellis-coded quantization, which tells more with as many: 0.240 bits per value with one word, 0.480 with two.
//!
//! Every byte string decodes or is refused: no panic, no allocation from an unchecked length, and
//! nothing that is not finite comes out. Blocks are independent, so a [`Team`] may share them.

mod dense;
mod rotation;
mod sparse;
mod squares;
#[cfg(test)]
mod tests;
mod trellis;
mod unison;
mod unpacked;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::hash::Digest;
use crate::simd::simd;
use crate::team::{Alone, Team, share_out};
use dense::{BLOCK, BLOCK_BYTES};
pub(crate) use sparse::CHUNK;
use sparse::Shape;
pub use squares::Squares;
pub(crate) use trellis::Passage;
use trellis::Passages;
pub(crate) use unison::Unison;
pub(crate) use unpacked::{PIECE as AT_A_TIME, Unpacked, add_all};

/// A way to write weights. In `run.toml` and the journal: `"f32"`, `"bf16"`, `"e3m0"`, `"sparse:96"`, `"tcq:1"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Codec {
    /// Exact.
    F32,
    /// The upper half of an `f32`.
    Bf16,
    /// Sign and exponent in blocks with a scale: 4.125 bits per value.
    E3m0,
    /// So many of 4,096 values, as one of four levels each.
    Sparse(u16),
    /// So many words about each 4,096 values, rotated: a quarter of a bit per value each, on a path through a trellis.
    Tcq(u8),
}

/// Why bytes are no payload, or values have none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// A value is NaN or infinite.
    #[error("value {index} is not finite")]
    NonFinite {
        /// Its position, or that of its block.
        index: usize,
    },
    /// The first byte names no codec.
    #[error("codec {0} is unknown")]
    UnknownCodec(u8),
    /// The payload is for no fragment of this model.
    #[error("the payload is for {found} values, and no fragment has so many")]
    Foreign {
        /// What it says.
        found: usize,
    },
    /// The payload is not for this fragment.
    #[error("the payload is for {found} values, expected {expected}")]
    Count {
        /// What it says.
        found: usize,
        /// What the fragment has.
        expected: usize,
    },
    /// The payload is cut short or has bytes to spare.
    #[error("the payload has {found} bytes, expected {expected}")]
    Length {
        /// What there is.
        found: usize,
        /// What codec and count call for.
        expected: usize,
    },
    /// A sparse chunk's positions do not ascend, or it keeps another number of values than it says; of trellis-coded
    /// quantization, a gain or a passage makes no sense.
    #[error("the chunk at value {index} is malformed")]
    Malformed {
        /// Position of its first value.
        index: usize,
    },
}

/// A word that names no codec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no codec; there are f32, bf16, e3m0, sparse:1 to sparse:2048, and tcq:1 to tcq:8")]
pub struct UnknownName(String);

const HEADER: usize = 5;
/// A sparse payload keeps at most half of the values; beyond that others are smaller.
const KEEP_MAX: u16 = (CHUNK / 2) as u16;
/// Weights that a team's member encodes or decodes at a time, and over which trellis-coded quantization spreads its words: part
/// of the format.
const PIECE: usize = 64 * CHUNK;

impl Codec {
    /// One of each kind, for laws that hold for all.
    pub const ALL: [Codec; 7] =
        [Codec::F32, Codec::Bf16, Codec::E3m0, Codec::Sparse(96), Codec::Sparse(224), Codec::Tcq(1), Codec::Tcq(2)];

    /// The number on the wire; never used again for something else.
    fn number(self) -> u8 {
        match self {
            Codec::F32 => 1,
            Codec::Bf16 => 2,
            Codec::E3m0 => 3,
            Codec::Sparse(_) => 4,
            Codec::Tcq(_) => 6, // 5 had paths of 122 bytes, and even pieces only.
        }
    }

    /// Whether its number is one that it can have.
    fn is_sane(self) -> bool {
        match self {
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => true,
            Codec::Sparse(keep) => (1..=KEEP_MAX).contains(&keep),
            Codec::Tcq(words) => (1..=trellis::WORDS_MAX).contains(&words),
        }
    }

    /// Whether so much is left out that it must be sent later.
    pub fn is_lossy(self) -> bool {
        self != Codec::F32
    }

    /// Whether a payload speaks of few weights only, and the others must have their time later.
    pub fn is_sparse(self) -> bool {
        matches!(self, Codec::Sparse(_))
    }

    /// Whether most of what there is to say is left to later payloads.
    pub fn is_partial(self) -> bool {
        matches!(self, Codec::Sparse(_) | Codec::Tcq(_))
    }

    /// Share of all directions that a payload speaks of: all that there is to say is at most 1/√density times as long.
    pub fn density(self) -> f64 {
        match self {
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => 1.0,
            Codec::Sparse(keep) => f64::from(keep.max(1)) / CHUNK as f64,
            Codec::Tcq(words) => 1.0 - trellis::left_by(usize::from(words)),
        }
    }

    fn header_len(self) -> usize {
        match self {
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => HEADER,
            Codec::Sparse(_) | Codec::Tcq(_) => HEADER + 2,
        }
    }

    /// Bytes of a chunk of `len` weights, which can be written and read without the others.
    fn chunk_bytes(self, len: usize) -> usize {
        match self {
            Codec::F32 => 4 * len,
            Codec::Bf16 => 2 * len,
            Codec::E3m0 => len.div_ceil(BLOCK) * BLOCK_BYTES,
            Codec::Sparse(keep) => Shape::new(keep, len).bytes(),
            Codec::Tcq(words) => trellis::Shape::new(len).bytes(words),
        }
    }

    fn body_len(self, count: usize) -> usize {
        let (chunks, rest) = (count / CHUNK, count % CHUNK);
        chunks * self.chunk_bytes(CHUNK) + if rest > 0 { self.chunk_bytes(rest) } else { 0 }
    }

    /// Bytes of the payload for `count` values.
    pub fn payload_len(self, count: usize) -> usize {
        self.header_len() + self.body_len(count)
    }

    /// Writes `values` as a payload.
    ///
    /// # Errors
    /// [`CodecError::NonFinite`] names the first value that is NaN or infinite.
    ///
    /// # Panics
    /// If there are 2³² values or more; manifests are far smaller.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, CodecError> {
        self.encode_rest(&mut values.to_vec(), &Alone)
    }

    /// Writes `wish` as a payload and leaves in it what the payload lacks: `wish − decode(payload)`.
    ///
    /// # Errors
    /// [`CodecError::NonFinite`] names the first value that is NaN or infinite; then `wish` is not to be used.
    ///
    /// # Panics
    /// If there are 2³² values or more; manifests are far smaller.
    pub fn encode_rest(self, wish: &mut [f32], team: &dyn Team) -> Result<Vec<u8>, CodecError> {
        self.encode_prepared(wish, 0, team, |_, _| {})
    }

    /// The same for a wish that `prepare` writes stretch by stretch, each when it, or the piece that it is in, is about to be
    /// encoded and is then still in the processor's caches. It is given a stretch and its first position. A codec that looks at
    /// weights from another side in each `turn` has the same one in two payloads of the same turn.
    ///
    /// # Errors
    /// As [`encode_rest`](Self::encode_rest).
    ///
    /// # Panics
    /// If there are 2³² values or more; manifests are far smaller.
    pub fn encode_prepared(
        self,
        wish: &mut [f32],
        turn: u8,
        team: &dyn Team,
        prepare: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Vec<u8>, CodecError> {
        let count = u32::try_from(wish.len()).expect("a fragment has fewer than 2^32 weights");
        let mut payload = vec![0u8; self.payload_len(wish.len())];
        let (header, body) = payload.split_at_mut(self.header_len());
        header[0] = self.number();
        header[1..HEADER].copy_from_slice(&count.to_le_bytes());
        match self {
            Codec::Sparse(keep) => header[HEADER..].copy_from_slice(&keep.to_le_bytes()),
            Codec::Tcq(words) => header[HEADER..].copy_from_slice(&[words, turn]),
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => {}
        }
        let pieces = wish.chunks_mut(PIECE).zip(body.chunks_mut(self.body_len(PIECE)));
        let done = share_out(pieces, team, |index, (wish, body)| {
            simd(
                #[inline(always)]
                || self.encode_piece(turn, wish, body, |at, block| prepare(index * PIECE + at, block)),
            )
            .map_err(|at| CodecError::NonFinite { index: index * PIECE + at })
        });
        done.into_iter().collect::<Result<(), CodecError>>()?;
        Ok(payload)
    }

    /// Encodes some chunks and leaves their rest; the position of a value that is not finite is the error.
    #[inline(always)]
    fn encode_piece(
        self,
        turn: u8,
        wish: &mut [f32],
        body: &mut [u8],
        prepare: impl Fn(usize, &mut [f32]),
    ) -> Result<(), usize> {
        if let Codec::Tcq(words) = self {
            // How much is said of a chunk depends on the others.
            for (number, wish) in wish.chunks_mut(CHUNK).enumerate() {
                prepare(number * CHUNK, wish);
                look(wish).map_err(|at| number * CHUNK + at)?;
            }
            trellis::encode(turn, words, wish, body);
            for (number, (chunk, wish)) in self.chunks(wish.len(), body).zip(wish.chunks_mut(CHUNK)).enumerate() {
                self.meet(turn, chunk, wish, |wish, value| *wish -= value).ok_or(number * CHUNK)?;
            }
            return Ok(());
        }
        for (number, (wish, out)) in wish.chunks_mut(CHUNK).zip(body.chunks_mut(self.chunk_bytes(CHUNK))).enumerate() {
            prepare(number * CHUNK, wish);
            look(wish).map_err(|at| number * CHUNK + at)?;
            match self {
                Codec::F32 => dense::encode_f32(wish, out),
                Codec::Bf16 => dense::encode_bf16(wish, out),
                Codec::E3m0 => dense::encode_e3m0(wish, out),
                Codec::Sparse(keep) => sparse::encode(Shape::new(keep, wish.len()), wish, out),
                Codec::Tcq(_) => {} // See above.
            }
            let chunk = Chunk { len: wish.len(), bytes: out, ..Chunk::default() };
            self.meet(turn, chunk, wish, |wish, value| *wish -= value).ok_or(number * CHUNK)?;
        }
        Ok(())
    }

    /// The chunks of a piece of `len` weights.
    #[inline(always)]
    fn chunks(self, len: usize, piece: &[u8]) -> impl Iterator<Item = Chunk<'_>> {
        let mut passages = self.words().map(|words| Passages::of(len, words, piece));
        let chunks = (0..len).step_by(CHUNK).zip(piece.chunks(self.chunk_bytes(CHUNK)));
        chunks.map(
            #[inline(always)]
            move |(start, bytes)| {
                let passage = passages.as_mut().and_then(Iterator::next).flatten();
                Chunk { len: CHUNK.min(len - start), bytes, passage: passage.unwrap_or_default() }
            },
        )
    }

    /// Words of a chunk of trellis-coded quantization.
    fn words(self) -> Option<u8> {
        if let Codec::Tcq(words) = self { Some(words) } else { None }
    }

    /// Shows each value of a chunk to `show` with the weight it belongs to; `None` if the chunk is malformed or not
    /// finite, perhaps after some were shown.
    #[inline(always)]
    fn meet(self, turn: u8, chunk: Chunk<'_>, weights: &mut [f32], show: impl Fn(&mut f32, f32)) -> Option<()> {
        if let Codec::Sparse(keep) = self {
            return sparse::visit(Shape::new(keep, weights.len()), chunk.bytes, |place, value| {
                show(&mut weights[place], value);
            });
        }
        let mut room = [0.0; CHUNK];
        let values = &mut room[..weights.len()];
        self.unpack(turn, chunk, values);
        for (weight, value) in weights.iter_mut().zip(&*values) {
            show(weight, *value);
        }
        all_finite(values).then_some(())
    }

    /// Shows each value of a chunk with its place in it; `None` as in [`meet`](Self::meet).
    #[inline(always)]
    fn each(self, turn: u8, chunk: Chunk<'_>, mut show: impl FnMut(usize, f32)) -> Option<()> {
        if let Codec::Sparse(keep) = self {
            return sparse::visit(Shape::new(keep, chunk.len), chunk.bytes, show);
        }
        let mut room = [0.0; CHUNK];
        let values = &mut room[..chunk.len];
        self.unpack(turn, chunk, values);
        let speaks_of_all = self.words().is_none();
        for (place, value) in values.iter().enumerate() {
            if speaks_of_all || chunk.passage.is_about(place) {
                show(place, *value);
            }
        }
        all_finite(values).then_some(())
    }

    /// Writes what a chunk says; of the sparse codec, nothing.
    #[inline(always)]
    fn unpack(self, turn: u8, chunk: Chunk<'_>, values: &mut [f32]) {
        match self {
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => dense::decode(self, chunk.bytes, values),
            Codec::Tcq(_) => trellis::decode(turn, chunk.passage, values),
            Codec::Sparse(_) => {}
        }
    }
}

/// What a payload says of [`CHUNK`] weights, or of fewer at its end.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Chunk<'a> {
    /// Weights.
    pub(crate) len: usize,
    /// As the codec writes them. Of no meaning if it is trellis-coded quantization …
    bytes: &'a [u8],
    /// … and else this is.
    pub(crate) passage: Passage<'a>,
}

/// A payload whose header, length and blocks are sound.
#[derive(Debug, Clone, Copy)]
pub struct Payload<'a> {
    codec: Codec,
    /// Of trellis-coded quantization; else 0.
    turn: u8,
    count: usize,
    body: &'a [u8],
    /// What is known of its length.
    squares: Option<&'a Squares>,
}

impl<'a> Payload<'a> {
    /// Looks at a payload for a fragment of `count` weights.
    ///
    /// # Errors
    /// If the bytes are not such a payload or hold a value that is not finite.
    pub fn check(payload: &'a [u8], count: usize, team: &dyn Team) -> Result<Self, CodecError> {
        let sound = Self::parse(payload, count)?;
        let looks = share_out(sound.pieces(), team, |index, (len, body)| {
            simd(
                #[inline(always)]
                || sound.first_unsound(len, body),
            )
            .map(|at| index * PIECE + at)
        });
        match looks.into_iter().flatten().next() {
            None => Ok(sound),
            Some(index) if sound.codec.is_partial() => Err(CodecError::Malformed { index }),
            Some(index) => Err(CodecError::NonFinite { index }),
        }
    }

    /// Where in a piece the first chunk begins that says nothing sound.
    #[inline(always)]
    fn first_unsound(&self, len: usize, body: &[u8]) -> Option<usize> {
        if let Some(words) = self.codec.words() {
            return trellis::first_unsound(len, words, body).map(|number| number * CHUNK);
        }
        for (number, chunk) in self.codec.chunks(len, body).enumerate() {
            if self.codec.each(self.turn, chunk, |_, _| {}).is_none() {
                return Some(number * CHUNK);
            }
        }
        None
    }

    /// Looks at a payload for a fragment of any of these lengths.
    ///
    /// # Errors
    /// As [`check`](Self::check), or if there is no such fragment.
    pub fn check_any(payload: &'a [u8], counts: &[usize], team: &dyn Team) -> Result<Self, CodecError> {
        let too_short = CodecError::Length { found: payload.len(), expected: HEADER };
        let (header, _) = payload.split_first_chunk::<HEADER>().ok_or(too_short)?;
        let found = count_in(header);
        if counts.contains(&found) { Self::check(payload, found, team) } else { Err(CodecError::Foreign { found }) }
    }

    /// Looks at header and length only, where the blocks are known to be sound: an encoder made them, or they were
    /// checked before.
    ///
    /// # Errors
    /// If header or length do not fit.
    pub fn parse(payload: &'a [u8], count: usize) -> Result<Self, CodecError> {
        let too_short = CodecError::Length { found: payload.len(), expected: HEADER };
        let Some((header, rest)) = payload.split_first_chunk::<HEADER>() else { return Err(too_short) };
        let codec = match header[0] {
            1 => Codec::F32,
            2 => Codec::Bf16,
            3 => Codec::E3m0,
            4 => match rest {
                [low, high, ..] => Codec::Sparse(u16::from_le_bytes([*low, *high])),
                _ => return Err(too_short),
            },
            6 => Codec::Tcq(*rest.first().ok_or(too_short)?),
            other => return Err(CodecError::UnknownCodec(other)),
        };
        if !codec.is_sane() {
            return Err(CodecError::Malformed { index: 0 });
        }
        let found = count_in(header);
        if found != count {
            return Err(CodecError::Count { found, expected: count });
        }
        if payload.len() != codec.payload_len(count) {
            return Err(CodecError::Length { found: payload.len(), expected: codec.payload_len(count) });
        }
        let turn = if let Codec::Tcq(_) = codec { rest[1] } else { 0 };
        Ok(Self { codec, turn, count, body: &payload[codec.header_len()..], squares: None })
    }

    /// The turn of a codec that has some.
    pub fn turn(&self) -> Option<u8> {
        matches!(self.codec, Codec::Tcq(_)).then_some(self.turn)
    }

    /// Its codec.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Weights that it is for.
    pub fn count(&self) -> usize {
        self.count
    }

    fn pieces(&self) -> impl Iterator<Item = (usize, &'a [u8])> + use<'a> {
        let count = self.count;
        let lens = (0..count).step_by(PIECE).map(move |start| PIECE.min(count - start));
        lens.zip(self.body.chunks(self.codec.body_len(PIECE)))
    }

    /// Weights of chunk number `number`.
    #[inline(always)]
    pub(crate) fn chunk_len(&self, number: usize) -> usize {
        CHUNK.min(self.count - number * CHUNK)
    }

    /// Chunk number `number`.
    #[inline(always)]
    pub(crate) fn chunk(&self, number: usize) -> Chunk<'a> {
        let (bytes, body) = (self.codec.chunk_bytes(CHUNK), self.bytes_from(number));
        let passage = self.codec.words().map_or_else(Passage::default, |words| self.passage(number, words));
        Chunk { len: self.chunk_len(number), bytes: &body[..bytes.min(body.len())], passage }
    }

    /// The bytes of chunk number `number` and of all after it.
    #[inline(always)]
    fn bytes_from(&self, number: usize) -> &'a [u8] {
        &self.body[number * self.codec.chunk_bytes(CHUNK)..]
    }

    /// What is said of chunk number `number` in a payload of so many `words`.
    #[inline(always)]
    fn passage(&self, number: usize, words: u8) -> Passage<'a> {
        let (piece, within) = (number / (PIECE / CHUNK), number % (PIECE / CHUNK));
        let body = &self.body[piece * self.codec.body_len(PIECE)..];
        Passages::of(PIECE.min(self.count - piece * PIECE), words, body).at(within)
    }

    /// Shows each value that the payload speaks of to `show` with the weight it belongs to.
    fn meet(&self, weights: &mut [f32], team: &dyn Team, show: impl Fn(&mut f32, f32) + Sync) {
        assert_eq!(weights.len(), self.count, "the payload was checked for this count");
        let pieces = self.pieces().zip(weights.chunks_mut(PIECE));
        share_out(pieces, team, |_, ((len, body), weights)| {
            simd(
                #[inline(always)]
                || {
                    for (chunk, weights) in self.codec.chunks(len, body).zip(weights.chunks_mut(CHUNK)) {
                        let _ = self.codec.meet(self.turn, chunk, weights, &show);
                    }
                },
            );
        });
    }

    /// Adds it to `weights`: the one operation by which every copy of Θ moves.
    pub fn add_to(&self, weights: &mut [f32], team: &dyn Team) {
        self.meet(weights, team, |weight, value| *weight += value);
    }

    /// Adds `share` times it to `weights`.
    pub fn add_scaled(&self, share: f32, weights: &mut [f32], team: &dyn Team) {
        self.meet(weights, team, |weight, value| *weight += share * value);
    }

    /// All values.
    pub fn values(&self, team: &dyn Team) -> Vec<f32> {
        let mut values = vec![0.0; self.count];
        self.meet(&mut values, team, |out, value| *out = value);
        values
    }

    /// Shows the values between two positions with their position; what a payload does not speak of is skipped. The positions are rounded outwards to whole chunks.
    pub fn visit(&self, range: std::ops::Range<usize>, mut show: impl FnMut(usize, f32)) {
        for number in range.start / CHUNK..range.end.div_ceil(CHUNK) {
            let chunk = self.chunk(number);
            let _ = simd(
                #[inline(always)]
                || self.codec.each(self.turn, chunk, |place, value| show(number * CHUNK + place, value)),
            );
        }
    }

    /// Takes away what `values` have where the payload speaks; of trellis-coded quantization, what they have along its paths.
    pub fn silence(&self, values: &mut [f32]) {
        let Codec::Tcq(_) = self.codec else {
            return self.visit(0..self.count, |place, _| values[place] = 0.0);
        };
        for (number, values) in values.chunks_mut(CHUNK).enumerate() {
            trellis::silence(self.turn, self.chunk(number).passage, values);
        }
    }

    /// Multiplies `values` with about what a payload of trellis-coded quantization leaves of what there is to say of each to later
    /// ones, where sites speak in `up`: where it speaks a share by the number of its words, elsewhere all. Of the sum of a
    /// few paths a few words tell much more than of anything else; that half as much is left of it is a compromise between
    /// sites of one speed and of several (`docs/log.md`, thirteenth day).
    pub(crate) fn leave(&self, up: Codec, values: &mut [f32]) {
        let times = if let Codec::Tcq(_) = up { 0.5 } else { 1.0 };
        for (number, values) in values.chunks_mut(CHUNK).enumerate() {
            self.chunk(number).passage.leave(times, values);
        }
    }

    /// About the share that chunk number `number` tells of the energy that there is in what it speaks of; all but for
    /// trellis-coded quantization.
    #[inline(always)]
    pub(crate) fn told(&self, number: usize) -> f64 {
        if self.codec.words().is_some() { self.chunk(number).passage.told() } else { 1.0 }
    }

    /// Squared length of chunk number `number`, if it can be told without unpacking it.
    #[inline(always)]
    pub(crate) fn chunk_square(&self, number: usize) -> Option<f64> {
        if let Some(square) = self.squares.and_then(|squares| squares.get(number)) {
            return Some(square);
        }
        let Chunk { len, bytes, passage } = self.chunk(number);
        match self.codec {
            Codec::Sparse(keep) => sparse::square(Shape::new(keep, len), bytes),
            Codec::Tcq(_) if len == CHUNK => Some(trellis::chunk_square(passage)),
            _ => None,
        }
    }

    /// The same payload, of whose chunks these are the lengths: then nobody looks for them in it.
    pub fn knowing(self, squares: &'a Squares) -> Self {
        Self { squares: Some(squares), ..self }
    }
}

/// The turn in which all speak who set out from the weights of that address.
pub(crate) fn turn_of(theta: &Digest) -> u8 {
    theta.0[0]
}

/// Weights that a payload with this header is for.
fn count_in(header: &[u8; HEADER]) -> usize {
    u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize
}

/// Reads a payload for a fragment of `count` weights.
///
/// # Errors
/// If the bytes are not such a payload or hold a value that is not finite.
pub fn decode(payload: &[u8], count: usize) -> Result<Vec<f32>, CodecError> {
    Ok(Payload::check(payload, count, &Alone)?.values(&Alone))
}

/// Refuses values that are NaN or infinite.
///
/// # Errors
/// [`CodecError::NonFinite`] names the first one.
pub fn check_finite(values: &[f32]) -> Result<(), CodecError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(CodecError::NonFinite { index }),
        None => Ok(()),
    }
}

/// The position of the first value that is not finite is the error.
#[inline(always)]
fn look(values: &[f32]) -> Result<(), usize> {
    if all_finite(values) {
        return Ok(());
    }
    Err(values.iter().position(|value| !value.is_finite()).unwrap_or(0))
}

/// Whether no exponent is that of infinity and NaN, looked at in a way that vectorizes.
#[inline(always)]
fn all_finite(values: &[f32]) -> bool {
    dense::greatest(values) < f32::INFINITY.to_bits()
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::F32 => f.write_str("f32"),
            Codec::Bf16 => f.write_str("bf16"),
            Codec::E3m0 => f.write_str("e3m0"),
            Codec::Sparse(keep) => write!(f, "sparse:{keep}"),
            Codec::Tcq(words) => write!(f, "tcq:{words}"),
        }
    }
}

impl FromStr for Codec {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "f32" => Ok(Codec::F32),
            "bf16" => Ok(Codec::Bf16),
            "e3m0" => Ok(Codec::E3m0),
            other => {
                let codec = other.split_once(':').and_then(|(kind, number)| match kind {
                    "sparse" => number.parse().ok().map(Codec::Sparse),
                    "tcq" => number.parse().ok().map(Codec::Tcq),
                    _ => None,
                });
                codec.filter(|codec| codec.is_sane()).ok_or_else(|| UnknownName(other.to_string()))
            }
        }
    }
}

impl Serialize for Codec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Codec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
