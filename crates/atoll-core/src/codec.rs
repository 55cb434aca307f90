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
//! cyclic2   body = | of: u8 | at: u8 | then for each chunk of 4,096 values, of which numbers at, at + of, … are written,
//!                  | 4 levels: bf16 | codes, 2 bits each, lowest first |
//! cyclic4   body = the same, but each chunk | e3m0, the last block as short as it is |
//! ```
//!
//! E3M0 costs 4.125 bits per value; Streaming DiLoCo (arXiv 2501.18512, section 3.3) found it to
//! carry pseudo-gradients without loss. The scale is fitted by least squares after the exponents are
//! chosen, because rounding to powers of two alone shrinks what it rounds.
//!
//! Sparse is for two ends that keep an error feedback (SparseLoCo, arXiv 2508.15706): what one payload leaves out
//! stays in a residual and is part of the next. With `keep` 96 it costs 0.234 bits per value, with 224 0.461. So are the
//! cyclic ones, which cost 0.238 and 0.461 with a turn of nine payloads.
//!
//! Every byte string decodes or is refused: no panic, no allocation from an unchecked length, and
//! nothing that is not finite comes out. Blocks are independent, so a [`Team`] may share them.

mod cyclic;
mod dense;
mod levels;
mod sparse;
#[cfg(test)]
mod tests;
mod unpacked;

use std::fmt;
use std::str::FromStr;

use half::bf16;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::simd::simd;
use crate::team::{Alone, Team, share_out};
pub use cyclic::{Depth, Turn};
use dense::{BLOCK, BLOCK_BYTES};
pub(crate) use sparse::CHUNK;
use sparse::Shape;
pub(crate) use unpacked::{Unpacked, add_scaled};

/// A way to write weights. In `run.toml` and the journal: `"f32"`, `"bf16"`, `"e3m0"`, `"sparse:96"`, `"cyclic2:9"`; where
/// it is known which payload of a turn it is, `"cyclic2:9@4"`.
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
    /// Every so manieth value, in turn.
    Cyclic(Depth, Turn),
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
    /// A sparse chunk's positions do not ascend, or it keeps another number of values than it says.
    #[error("the chunk at value {index} is malformed")]
    Malformed {
        /// Position of its first value.
        index: usize,
    },
}

/// A word that names no codec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is no codec; there are f32, bf16, e3m0, sparse:1 to sparse:2048, cyclic2:1 to cyclic2:255, and cyclic4:1 to cyclic4:255"
)]
pub struct UnknownName(String);

const HEADER: usize = 5;
/// A sparse payload keeps at most half of the values; beyond that others are smaller.
const KEEP_MAX: u16 = (CHUNK / 2) as u16;
/// Weights that a team's member encodes or decodes at a time: a multiple of every block.
const PIECE: usize = 64 * CHUNK;

impl Codec {
    /// One of each kind, for laws that hold for all.
    pub const ALL: [Codec; 7] = [
        Codec::F32,
        Codec::Bf16,
        Codec::E3m0,
        Codec::Sparse(96),
        Codec::Sparse(224),
        Codec::Cyclic(Depth::Two, Turn { of: 9, at: 0 }),
        Codec::Cyclic(Depth::Four, Turn { of: 9, at: 7 }),
    ];

    /// The number on the wire; never used again for something else.
    fn number(self) -> u8 {
        match self {
            Codec::F32 => 1,
            Codec::Bf16 => 2,
            Codec::E3m0 => 3,
            Codec::Sparse(_) => 4,
            Codec::Cyclic(Depth::Two, _) => 5,
            Codec::Cyclic(Depth::Four, _) => 6,
        }
    }

    /// What it is for the payload that moves a fragment on from `version`: the cyclic ones take their turn.
    #[must_use]
    pub fn at(self, version: u64) -> Self {
        match self {
            Codec::Cyclic(depth, turn) => Codec::Cyclic(depth, turn.at(version)),
            other => other,
        }
    }

    /// Whether a payload speaks of few weights only, and others must have their time later.
    pub fn is_partial(self) -> bool {
        matches!(self, Codec::Sparse(_) | Codec::Cyclic(..))
    }

    /// Whether so much is left out that it must be sent later.
    pub fn is_lossy(self) -> bool {
        self != Codec::F32
    }

    /// Whether its numbers are such as encoders use.
    fn is_sound(self) -> bool {
        match self {
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => true,
            Codec::Sparse(keep) => (1..=KEEP_MAX).contains(&keep),
            Codec::Cyclic(_, turn) => turn.is_sound(),
        }
    }

    fn header_len(self) -> usize {
        if self.is_partial() { HEADER + 2 } else { HEADER }
    }

    /// Weights in a block, which can be written and read without the others.
    fn block(self) -> usize {
        match self {
            Codec::F32 | Codec::Bf16 | Codec::Sparse(_) | Codec::Cyclic(..) => CHUNK,
            Codec::E3m0 => BLOCK,
        }
    }

    /// Bytes of a block of `len` weights, at most [`Codec::block`].
    fn block_bytes(self, len: usize) -> usize {
        match self {
            Codec::F32 => 4 * len,
            Codec::Bf16 => 2 * len,
            Codec::E3m0 => BLOCK_BYTES,
            Codec::Sparse(keep) => Shape::new(keep, len).bytes(),
            Codec::Cyclic(depth, turn) => cyclic::bytes(depth, turn, len),
        }
    }

    /// How many of a chunk's `len` weights it speaks of.
    fn values_of(self, len: usize) -> usize {
        match self {
            Codec::Sparse(keep) => Shape::new(keep, len).kept(),
            Codec::Cyclic(_, turn) => turn.room(len),
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => len,
        }
    }

    fn body_len(self, count: usize) -> usize {
        let (blocks, rest) = (count / self.block(), count % self.block());
        blocks * self.block_bytes(self.block()) + if rest > 0 { self.block_bytes(rest) } else { 0 }
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
        self.encode_prepared(wish, team, |_, _| {})
    }

    /// The same for a wish that `prepare` writes stretch by stretch, each when it is about to be encoded and is then
    /// still in the processor's cache. It is given a stretch and its first position.
    ///
    /// # Errors
    /// As [`encode_rest`](Self::encode_rest).
    ///
    /// # Panics
    /// If there are 2³² values or more; manifests are far smaller.
    pub fn encode_prepared(
        self,
        wish: &mut [f32],
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
            Codec::Cyclic(_, Turn { of, at }) => header[HEADER..].copy_from_slice(&[of, at]),
            Codec::F32 | Codec::Bf16 | Codec::E3m0 => {}
        }
        let pieces = wish.chunks_mut(PIECE).zip(body.chunks_mut(self.body_len(PIECE)));
        let done = share_out(pieces, team, |index, (wish, body)| {
            simd(
                #[inline(always)]
                || self.encode_piece(wish, body, |at, block| prepare(index * PIECE + at, block)),
            )
            .map_err(|at| CodecError::NonFinite { index: index * PIECE + at })
        });
        done.into_iter().collect::<Result<(), CodecError>>()?;
        Ok(payload)
    }

    /// Encodes some blocks and leaves their rest; the position of a value that is not finite is the error.
    #[inline(always)]
    fn encode_piece(self, wish: &mut [f32], body: &mut [u8], prepare: impl Fn(usize, &mut [f32])) -> Result<(), usize> {
        let (block, bytes) = (self.block(), self.block_bytes(self.block()));
        for (number, (wish, out)) in wish.chunks_mut(block).zip(body.chunks_mut(bytes)).enumerate() {
            prepare(number * block, wish);
            if !all_finite(wish) {
                let at = wish.iter().position(|value| !value.is_finite()).unwrap_or(0);
                return Err(number * block + at);
            }
            match self {
                Codec::F32 => {
                    out.chunks_exact_mut(4)
                        .zip(&*wish)
                        .for_each(|(out, value)| out.copy_from_slice(&value.to_le_bytes()));
                }
                Codec::Bf16 => {
                    for (out, &value) in out.chunks_exact_mut(2).zip(&*wish) {
                        out.copy_from_slice(&dense::saturate(value).to_le_bytes());
                    }
                }
                Codec::E3m0 => dense::encode_e3m0(wish, out),
                Codec::Sparse(keep) => sparse::encode(Shape::new(keep, wish.len()), wish, out),
                Codec::Cyclic(depth, turn) => cyclic::encode(depth, turn, wish, out),
            }
            self.each(out, wish.len(), |place, value| wish[place] -= value).ok_or(number * block)?;
        }
        Ok(())
    }

    /// Writes what whole blocks of a codec that leaves nothing out say.
    #[inline(always)]
    fn write(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Codec::E3m0 => {
                for (bytes, out) in bytes.chunks(BLOCK_BYTES).zip(out.chunks_mut(BLOCK)) {
                    dense::decode_e3m0(bytes).zip(out).for_each(|(value, out)| *out = value);
                }
            }
            _ => {
                let _ = self.each(bytes, out.len(), |place, value| out[place] = value);
            }
        }
    }

    /// Shows what a block of `len` weights says; `None` if it is malformed or not finite.
    #[inline(always)]
    fn each(self, bytes: &[u8], len: usize, mut show: impl FnMut(usize, f32)) -> Option<()> {
        let mut finite = true;
        let mut look = |(place, value): (usize, f32)| {
            finite &= value.is_finite();
            show(place, value);
        };
        match self {
            Codec::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).enumerate().for_each(look);
            }
            Codec::Bf16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).enumerate().for_each(look);
            }
            Codec::E3m0 => dense::decode_e3m0(bytes).take(len).enumerate().for_each(&mut look),
            Codec::Sparse(keep) => return sparse::visit(Shape::new(keep, len), bytes, show),
            Codec::Cyclic(depth, turn) => return cyclic::visit(depth, turn, len, bytes, show),
        }
        finite.then_some(())
    }
}

/// A payload whose header, length and blocks are sound.
#[derive(Debug, Clone, Copy)]
pub struct Payload<'a> {
    codec: Codec,
    count: usize,
    body: &'a [u8],
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
            Some(index) if matches!(sound.codec, Codec::Sparse(_)) => Err(CodecError::Malformed { index }),
            Some(index) => Err(CodecError::NonFinite { index }),
        }
    }

    /// Where in a piece the first block begins that says nothing sound.
    #[inline(always)]
    fn first_unsound(&self, len: usize, body: &[u8]) -> Option<usize> {
        let mut blocks = self.blocks(len, body).enumerate();
        let (number, _) = blocks.find(|(_, (len, bytes))| self.codec.each(bytes, *len, |_, _| {}).is_none())?;
        Some(number * self.codec.block())
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
            number @ 4..=6 => match (number, rest) {
                (4, [low, high, ..]) => Codec::Sparse(u16::from_le_bytes([*low, *high])),
                (5, [of, at, ..]) => Codec::Cyclic(Depth::Two, Turn { of: *of, at: *at }),
                (6, [of, at, ..]) => Codec::Cyclic(Depth::Four, Turn { of: *of, at: *at }),
                _ => return Err(too_short),
            },
            other => return Err(CodecError::UnknownCodec(other)),
        };
        if !codec.is_sound() {
            return Err(CodecError::Malformed { index: 0 });
        }
        let found = count_in(header);
        if found != count {
            return Err(CodecError::Count { found, expected: count });
        }
        if payload.len() != codec.payload_len(count) {
            return Err(CodecError::Length { found: payload.len(), expected: codec.payload_len(count) });
        }
        Ok(Self { codec, count, body: &payload[codec.header_len()..] })
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

    fn blocks<'b>(&self, len: usize, body: &'b [u8]) -> impl Iterator<Item = (usize, &'b [u8])> + use<'b> {
        let block = self.codec.block();
        let lens = (0..len).step_by(block).map(move |start| block.min(len - start));
        lens.zip(body.chunks(self.codec.block_bytes(block)))
    }

    /// Weights and bytes of chunk number `number`.
    pub(crate) fn chunk(&self, number: usize) -> (usize, &'a [u8]) {
        let (first, bytes) = (number * CHUNK, self.codec.body_len(CHUNK));
        let body = &self.body[number * bytes..];
        (CHUNK.min(self.count - first), &body[..bytes.min(body.len())])
    }

    /// Shows each value that the payload speaks of to `show` with the weight it belongs to.
    fn meet(&self, weights: &mut [f32], team: &dyn Team, show: impl Fn(&mut f32, f32) + Sync) {
        assert_eq!(weights.len(), self.count, "the payload was checked for this count");
        let pieces = self.pieces().zip(weights.chunks_mut(PIECE));
        share_out(pieces, team, |_, ((len, body), weights)| {
            simd(
                #[inline(always)]
                || {
                    for ((len, bytes), weights) in self.blocks(len, body).zip(weights.chunks_mut(self.codec.block())) {
                        let _ = self.codec.each(bytes, len, |place, value| show(&mut weights[place], value));
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

    /// Shows the values between two positions with their position; zeros that a sparse payload leaves out are
    /// skipped. The positions are rounded outwards to whole blocks.
    pub fn visit(&self, range: std::ops::Range<usize>, mut show: impl FnMut(usize, f32)) {
        let (block, bytes) = (self.codec.block(), self.codec.block_bytes(self.codec.block()));
        let blocks = range.start / block..range.end.div_ceil(block);
        for number in blocks {
            let first = number * block;
            let len = block.min(self.count - first);
            let end = (number * bytes + self.codec.block_bytes(len)).min(self.body.len());
            let _ = self.codec.each(&self.body[number * bytes..end], len, |place, value| show(first + place, value));
        }
    }

    /// Squared length of chunk number `number`, if it can be told without unpacking it.
    pub(crate) fn chunk_square(&self, number: usize) -> Option<f64> {
        let Codec::Sparse(keep) = self.codec else { return None };
        let (len, bytes) = self.chunk(number);
        sparse::square(Shape::new(keep, len), bytes)
    }

    /// Euclidean length, summed in the order of positions.
    pub fn norm(&self) -> f64 {
        if let Codec::Sparse(_) = self.codec {
            return (0..self.count.div_ceil(CHUNK)).filter_map(|number| self.chunk_square(number)).sum::<f64>().sqrt();
        }
        let mut square = 0.0;
        self.visit(0..self.count, |_, value| square += f64::from(value) * f64::from(value));
        square.sqrt()
    }
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

/// Whether no exponent is that of infinity and NaN, looked at in a way that vectorizes.
#[inline(always)]
fn all_finite(values: &[f32]) -> bool {
    let greatest = values.iter().fold(0i32, |greatest, value| greatest.max((value.to_bits() & 0x7fff_ffff) as i32));
    greatest < 0x7f80_0000
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::F32 => f.write_str("f32"),
            Codec::Bf16 => f.write_str("bf16"),
            Codec::E3m0 => f.write_str("e3m0"),
            Codec::Sparse(keep) => write!(f, "sparse:{keep}"),
            Codec::Cyclic(depth, Turn { of, at }) => {
                let bits = if *depth == Depth::Two { 2 } else { 4 };
                let at = if *at > 0 { format!("@{at}") } else { String::new() };
                write!(f, "cyclic{bits}:{of}{at}")
            }
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
            other => with_numbers(other).filter(|codec| codec.is_sound()).ok_or_else(|| UnknownName(other.to_string())),
        }
    }
}

/// The codec of a name with numbers.
fn with_numbers(name: &str) -> Option<Codec> {
    let (kind, numbers) = name.split_once(':')?;
    let cyclic = |depth| {
        let (of, at) = numbers.split_once('@').unwrap_or((numbers, "0"));
        Some(Codec::Cyclic(depth, Turn { of: of.parse().ok()?, at: at.parse().ok()? }))
    };
    match kind {
        "sparse" => numbers.parse().ok().map(Codec::Sparse),
        "cyclic2" => cyclic(Depth::Two),
        "cyclic4" => cyclic(Depth::Four),
        _ => None,
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
