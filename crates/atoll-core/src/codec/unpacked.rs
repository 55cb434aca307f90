//! A chunk of a payload, or a part of it, for whoever needs its values more than once. Codecs that write every weight are read
//! piece by piece wherever values are needed: that is faster than to have them lie somewhere. Others are unpacked once,
//! into a core's nearest cache.

use std::ops::Range;

use super::dense::{self, BLOCK};
use super::sparse::{self, GROUP, Shape};
use super::{Codec, Payload};
use crate::delta::{Products, dot, square};
use crate::simd::fetch;

/// Sums that grow side by side.
const LANES: usize = 4;
/// Weights that are read at a time.
pub(crate) const PIECE: usize = BLOCK;
/// Bytes after those of a piece that is read, of which as many are fetched.
const AHEAD: usize = 1024;

/// Room for the values of one chunk of one payload, or where they are written.
#[derive(Debug, Default)]
pub(crate) struct Unpacked<'a> {
    form: Form<'a>,
    values: Vec<f32>,
    /// Where they belong in the part, ascending. Of no meaning unless it is sparse.
    places: Vec<u16>,
}

#[derive(Debug, Default, Clone, Copy)]
enum Form<'a> {
    #[default]
    Dense,
    Sparse,
    Written(Written<'a>),
}

/// What a chunk says of some of its weights.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part<'a> {
    /// All values.
    Dense(&'a [f32]),
    /// Values, and how far each is from the part's beginning.
    Sparse(&'a [f32], &'a [u16]),
    /// All values, as they are written.
    Written(Written<'a>),
}

/// So many values of a codec that writes all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written<'a> {
    codec: Codec,
    /// Of these values and of all after them.
    bytes: &'a [u8],
    len: usize,
}

impl<'a> Unpacked<'a> {
    /// Takes in the weights at `range` in chunk number `number` of a checked payload. A chunk that is malformed says nothing.
    #[inline(always)]
    pub(crate) fn read(&mut self, payload: &Payload<'a>, number: usize, range: Range<usize>) {
        let chunk = payload.chunk(number);
        let super::Chunk { len, bytes, .. } = chunk;
        if let Codec::Sparse(keep) = payload.codec {
            self.form = Form::Sparse;
            return self.read_sparse(Shape::new(keep, len), bytes, range);
        }
        if chunk.passage.is_silent() {
            self.form = Form::Sparse;
            self.values.clear();
            return self.places.clear();
        }
        if let Some(written) = Written::of(payload, number, &range) {
            self.form = Form::Written(written);
            return;
        }
        self.form = Form::Dense;
        self.values.resize(len, 0.0);
        payload.codec.unpack(payload.turn, chunk, &mut self.values);
        self.values.truncate(range.end);
        self.values.drain(..range.start);
    }

    /// Squared length of chunk number `number` of a checked payload. What was read is then of no meaning.
    #[inline(always)]
    pub(crate) fn square(&mut self, payload: &Payload<'a>, number: usize) -> f64 {
        match payload.chunk_square(number) {
            Some(square) => square,
            None => {
                self.read(payload, number, 0..payload.chunk_len(number));
                self.part().square()
            }
        }
    }

    /// Unpacks what was read, if it is only known where it is written: whoever comes to it again and again.
    #[inline(always)]
    pub(crate) fn unpack(&mut self) {
        let Form::Written(written) = self.form else { return };
        self.form = Form::Dense;
        self.values.resize(written.len, 0.0);
        dense::decode(written.codec, written.bytes, &mut self.values);
    }

    #[inline(always)]
    fn read_sparse(&mut self, shape: Shape, bytes: &[u8], range: Range<usize>) {
        let Self { values, places, .. } = self;
        let room = shape.kept().next_multiple_of(GROUP);
        values.resize(room, 0.0);
        places.resize(room, 0);
        let said = sparse::unpack(shape, bytes, values, places).map_or(0, |()| shape.kept());
        let places_before = |end| places[..said].partition_point(|&place| usize::from(place) < end);
        let (from, to) = (places_before(range.start), places_before(range.end));
        values.truncate(to);
        places.truncate(to);
        if range.start > 0 {
            values.drain(..from);
            places.drain(..from);
            for place in places {
                *place -= range.start as u16;
            }
        }
    }

    /// What was read last.
    #[inline(always)]
    pub(crate) fn part(&self) -> Part<'_> {
        match self.form {
            Form::Dense => Part::Dense(&self.values),
            Form::Sparse => Part::Sparse(&self.values, &self.places),
            Form::Written(written) => Part::Written(written),
        }
    }
}

impl<'a> Written<'a> {
    /// The values at `range` of a payload's chunk, if they can be read by themselves.
    #[inline(always)]
    fn of(payload: &Payload<'a>, number: usize, range: &Range<usize>) -> Option<Self> {
        let codec = payload.codec;
        let is_block = |at: usize| codec != Codec::E3m0 || at.is_multiple_of(BLOCK);
        let fits = !codec.is_partial()
            && is_block(range.start)
            && (is_block(range.end) || range.end == payload.chunk_len(number));
        fits.then(|| {
            let bytes = &payload.bytes_from(number)[codec.chunk_bytes(range.start)..];
            Self { codec, bytes, len: range.len() }
        })
    }

    /// Shows piece after piece with the place of its first value.
    #[inline(always)]
    fn pieces(self, mut show: impl FnMut(usize, &[f32])) {
        let Self { codec, bytes, len } = self;
        let mut room = [0.0; PIECE];
        for (start, bytes) in (0..len).step_by(PIECE).zip(bytes.chunks(codec.chunk_bytes(PIECE))) {
            let values = &mut room[..PIECE.min(len - start)];
            dense::decode(codec, bytes, values);
            show(start, values);
        }
    }

    /// A sum of products that `add` takes from each piece.
    #[inline(always)]
    fn products(self, add: impl Fn(&mut Products, usize, &[f32])) -> f64 {
        let mut products = Products::default();
        self.pieces(
            #[inline(always)]
            |start, values| add(&mut products, start, values),
        );
        products.total()
    }
}

impl Part<'_> {
    /// Whether it says something of every weight.
    #[inline(always)]
    pub(crate) fn is_dense(self) -> bool {
        !matches!(self, Part::Sparse(..))
    }

    /// Writes the values of a dense part from `start` on, which is a multiple of [`PIECE`], into `out`, which is no longer than
    /// that.
    #[inline(always)]
    pub(crate) fn piece(self, start: usize, out: &mut [f32]) {
        match self {
            Part::Dense(values) => out.copy_from_slice(&values[start..start + out.len()]),
            Part::Written(Written { codec, bytes, .. }) => {
                let (start, end) = (codec.chunk_bytes(start), codec.chunk_bytes(start + out.len()));
                fetch(&bytes[bytes.len().min(start + AHEAD)..bytes.len().min(end + AHEAD)]);
                dense::decode(codec, &bytes[start..end], out);
            }
            Part::Sparse(..) => {}
        }
    }

    /// Squared length.
    #[inline(always)]
    pub(crate) fn square(self) -> f64 {
        match self {
            Part::Dense(values) | Part::Sparse(values, _) => square(values),
            Part::Written(written) => written.products(
                #[inline(always)]
                |products, _, values| products.add(values, values),
            ),
        }
    }

    /// Dot product with the weights of the same stretch.
    #[inline(always)]
    pub(crate) fn along(self, other: &[f32]) -> f64 {
        match self {
            Part::Dense(values) => dot(values, other),
            Part::Written(written) => written.products(
                #[inline(always)]
                |products, start, values| products.add(values, &other[start..start + values.len()]),
            ),
            Part::Sparse(values, places) => {
                let mut lanes = [0.0f64; LANES];
                let (value_groups, values) = values.as_chunks::<LANES>();
                let (place_groups, places) = places.as_chunks::<LANES>();
                for (values, places) in value_groups.iter().zip(place_groups) {
                    for lane in 0..LANES {
                        lanes[lane] += f64::from(values[lane]) * f64::from(other[usize::from(places[lane])]);
                    }
                }
                for ((lane, value), place) in lanes.iter_mut().zip(values).zip(places) {
                    *lane += f64::from(*value) * f64::from(other[usize::from(*place)]);
                }
                lanes.iter().sum()
            }
        }
    }

    /// Adds `scale` times it to the weights of the same stretch.
    #[inline(always)]
    pub(crate) fn add_to(self, scale: f32, out: &mut [f32]) {
        match self {
            Part::Dense(values) => add_all(out, scale, values),
            Part::Written(written) => written.pieces(
                #[inline(always)]
                |start, values| add_all(&mut out[start..], scale, values),
            ),
            Part::Sparse(values, places) => {
                for (value, place) in values.iter().zip(places) {
                    out[usize::from(*place)] += scale * value;
                }
            }
        }
    }
}

/// Adds `scale` times `values` to `out`.
#[inline(always)]
pub(crate) fn add_all(out: &mut [f32], scale: f32, values: &[f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out += scale * value;
    }
}
