//! A chunk of a payload, unpacked into a core's nearest cache: whoever needs its values more than once decodes them
//! once, and whatever the codec, they are then plain slices.

use std::ops::Range;

use super::sparse::{self, GROUP, Shape};
use super::{Codec, Payload};
use crate::delta::{dot, square};
use crate::simd::simd;

/// Sums that grow side by side.
const LANES: usize = 4;

/// Room for the values of one chunk of one payload.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    values: Vec<f32>,
    /// Where they belong in the chunk, ascending; none if there is a value for every place.
    places: Vec<u16>,
    is_sparse: bool,
}

/// What a chunk says of some of its weights.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part<'a> {
    /// All values.
    Dense(&'a [f32]),
    /// Values, and how far each is from the part's beginning.
    Sparse(&'a [f32], &'a [u16], u16),
}

impl Unpacked {
    /// Takes in chunk number `number` of a checked payload. A chunk that is malformed says nothing.
    #[inline(always)]
    pub(crate) fn read(&mut self, payload: &Payload<'_>, number: usize) {
        let (len, bytes) = payload.chunk(number);
        let Self { values, places, is_sparse } = self;
        let Codec::Sparse(keep) = payload.codec else {
            *is_sparse = false;
            values.resize(len, 0.0);
            payload.codec.unpack(payload.turn, bytes, values);
            return;
        };
        *is_sparse = true;
        let shape = Shape::new(keep, len);
        let room = shape.kept().next_multiple_of(GROUP);
        values.resize(room, 0.0);
        places.resize(room, 0);
        let said = sparse::unpack(shape, bytes, values, places).map_or(0, |()| shape.kept());
        values.truncate(said);
        places.truncate(said);
    }

    /// What it says of the weights at `range` in the chunk.
    #[inline(always)]
    pub(crate) fn part(&self, range: Range<usize>) -> Part<'_> {
        let Self { values, places, is_sparse } = self;
        if !is_sparse {
            return Part::Dense(&values[range]);
        }
        let from = places.partition_point(|&place| usize::from(place) < range.start);
        let to = places.partition_point(|&place| usize::from(place) < range.end);
        Part::Sparse(&values[from..to], &places[from..to], range.start as u16)
    }
}

impl Part<'_> {
    /// Squared length.
    #[inline(always)]
    pub(crate) fn square(self) -> f64 {
        let (Part::Dense(values) | Part::Sparse(values, ..)) = self;
        square(values)
    }

    /// Dot product with the weights of the same stretch.
    #[inline(always)]
    pub(crate) fn along(self, other: &[f32]) -> f64 {
        match self {
            Part::Dense(values) => dot(values, other),
            Part::Sparse(values, places, first) => {
                let mut lanes = [0.0f64; LANES];
                let (value_groups, values) = values.as_chunks::<LANES>();
                let (place_groups, places) = places.as_chunks::<LANES>();
                for (values, places) in value_groups.iter().zip(place_groups) {
                    for lane in 0..LANES {
                        lanes[lane] += f64::from(values[lane]) * f64::from(other[usize::from(places[lane] - first)]);
                    }
                }
                for ((lane, value), place) in lanes.iter_mut().zip(values).zip(places) {
                    *lane += f64::from(*value) * f64::from(other[usize::from(place - first)]);
                }
                lanes.iter().sum()
            }
        }
    }

    /// Adds `scale` times it to the weights of the same stretch.
    #[inline(always)]
    pub(crate) fn add_to(self, scale: f32, out: &mut [f32]) {
        match self {
            Part::Dense(values) => add_scaled(out, scale, values),
            Part::Sparse(values, places, first) => {
                for (value, place) in values.iter().zip(places) {
                    out[usize::from(place - first)] += scale * value;
                }
            }
        }
    }
}

/// Adds `scale` times `values` to `out`.
pub(crate) fn add_scaled(out: &mut [f32], scale: f32, values: &[f32]) {
    simd(
        #[inline(always)]
        || {
            for (out, value) in out.iter_mut().zip(values) {
                *out += scale * value;
            }
        },
    );
}
